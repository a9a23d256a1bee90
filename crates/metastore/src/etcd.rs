use crate::store::{
    Condition, Event, KeyValue, LeaseId, MetaStore, Op, Revision, StoreError, Txn, TxnOutcome, WatchBatch, WatchStream,
};
use async_trait::async_trait;
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, DeleteOptions, Error, EventType, GetOptions, Identity,
    PutOptions, TlsOptions, TxnOp, WatchOptions,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Bytes of one answer to a range: the largest page is far below, and gRPC's limit above.
const RANGE_KEYS: i64 = 64;
/// etcd's limit for a request is 1.5 MiB by default; answers may be larger.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// How to reach etcd.
#[derive(Clone, Debug)]
pub struct EtcdConfig {
    /// `http://host:port` of the members, or `https://host:port` with `tls`.
    pub endpoints: Vec<String>,
    /// Certificates for members that speak TLS.
    pub tls: Option<EtcdTls>,
    /// How long one request may take. Shorter than the node's lease, so that a member that hangs
    /// is left for another one in time.
    pub request_timeout: Duration,
}

/// Certificates, as PEM.
#[derive(Clone)]
pub struct EtcdTls {
    /// Of the authorities that sign the members' certificates.
    pub ca: Vec<u8>,
    /// The client's own certificate and its private key, where etcd asks for them.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl std::fmt::Debug for EtcdTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the key.
        f.debug_struct("EtcdTls").finish_non_exhaustive()
    }
}

impl EtcdConfig {
    /// Without TLS, with the default time-out.
    pub fn new(endpoints: Vec<String>) -> Self {
        Self {
            endpoints,
            tls: None,
            request_timeout: Duration::from_secs(2),
        }
    }
}

/// The store in etcd.
#[derive(Clone)]
pub struct EtcdStore {
    members: Arc<Members>,
    request_timeout: Duration,
}

/// All requests go to one member until it leaves one unanswered. Spread over the members, every third
/// request would wait for one that hangs: its machine still accepts connections for it.
struct Members {
    clients: Vec<Client>,
    current: AtomicUsize,
}

/// A request to a member. Dropped before the member has answered, it makes the next one current.
struct Turn {
    members: Arc<Members>,
    number: usize,
    answered: bool,
}

impl Turn {
    fn client(&self) -> &Client {
        &self.members.clients[self.number]
    }

    /// Judges the answer: a member that cannot serve is left, too.
    fn end<T>(mut self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        self.answered = !matches!(result, Err(StoreError::Unavailable(_) | StoreError::Ambiguous(_)));
        result
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.answered {
            let next = (self.number + 1) % self.members.clients.len();
            let current = &self.members.current;
            // Unless another request has found it out already.
            let _ = current.compare_exchange(self.number, next, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

impl std::fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdStore").finish_non_exhaustive()
    }
}

impl EtcdStore {
    /// Connects lazily: an unreachable etcd shows at the first call.
    pub async fn connect(config: &EtcdConfig) -> Result<Self, StoreError> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(Duration::from_secs(1))
            // A member that falls silent is left soon. etcd hangs up on who pings more often than every
            // 5 s unless it is told otherwise (`--grpc-keepalive-min-time`), and on who pings without a
            // request under way.
            .with_keep_alive(Duration::from_secs(1), Duration::from_secs(2))
            .with_keep_alive_while_idle(false)
            // A watch on a member that is cut off from the others ends instead of being silent.
            .with_require_leader(true);
        if let Some(EtcdTls { ca, identity }) = &config.tls {
            let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(ca));
            if let Some((certificate, key)) = identity {
                tls = tls.identity(Identity::from_pem(certificate, key));
            }
            options = options.with_tls(tls);
        }
        let mut clients = Vec::new();
        for endpoint in &config.endpoints {
            let client = Client::connect([endpoint], Some(options.clone())).await;
            clients.push(client.map_err(read_error)?);
        }
        if clients.is_empty() {
            return Err(StoreError::Refused("no endpoints of etcd are given".into()));
        }
        // Storage nodes begin with different members.
        let first = std::process::id() as usize % clients.len();
        Ok(Self {
            members: Arc::new(Members {
                clients,
                current: AtomicUsize::new(first),
            }),
            request_timeout: config.request_timeout,
        })
    }

    fn turn(&self) -> Turn {
        Turn {
            members: Arc::clone(&self.members),
            number: self.members.current.load(Ordering::Relaxed),
            answered: false,
        }
    }

    async fn read<T>(&self, turn: Turn, call: impl Future<Output = Result<T, Error>>) -> Result<T, StoreError> {
        turn.end(match tokio::time::timeout(self.request_timeout, call).await {
            Ok(result) => result.map_err(read_error),
            Err(_) => Err(StoreError::Unavailable("no answer in time".into())),
        })
    }

    async fn write<T>(&self, turn: Turn, call: impl Future<Output = Result<T, Error>>) -> Result<T, StoreError> {
        turn.end(match tokio::time::timeout(self.request_timeout, call).await {
            Ok(result) => result.map_err(write_error),
            Err(_) => Err(StoreError::Ambiguous("no answer in time".into())),
        })
    }
}

fn read_error(error: Error) -> StoreError {
    match error {
        Error::GRpcStatus(status) => match status.code() {
            tonic::Code::OutOfRange if status.message().contains("compacted") => StoreError::Compacted(0),
            tonic::Code::NotFound if status.message().contains("lease") => StoreError::LeaseExpired(LeaseId(0)),
            tonic::Code::InvalidArgument => StoreError::Refused(status.message().into()),
            _ => StoreError::Unavailable(status.message().into()),
        },
        other => StoreError::Unavailable(other.to_string()),
    }
}

fn write_error(error: Error) -> StoreError {
    match error {
        Error::GRpcStatus(status) => match status.code() {
            tonic::Code::InvalidArgument => StoreError::Refused(status.message().into()),
            tonic::Code::NotFound if status.message().contains("lease") => StoreError::LeaseExpired(LeaseId(0)),
            tonic::Code::ResourceExhausted if status.message().contains("space") => {
                StoreError::Full(status.message().into())
            }
            // Refused at the door, before raft.
            tonic::Code::ResourceExhausted => StoreError::Unavailable(status.message().into()),
            _ => StoreError::Ambiguous(status.message().into()),
        },
        other => StoreError::Ambiguous(other.to_string()),
    }
}

fn with_lease(error: StoreError, lease: LeaseId) -> StoreError {
    match error {
        StoreError::LeaseExpired(_) => StoreError::LeaseExpired(lease),
        other => other,
    }
}

fn key_value(kv: &etcd_client::KeyValue) -> KeyValue {
    KeyValue {
        key: kv.key().to_vec(),
        value: kv.value().to_vec(),
        create_revision: kv.create_revision(),
        mod_revision: kv.mod_revision(),
    }
}

/// The first key after all that begin with `prefix`.
fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

fn compare(condition: Condition) -> Compare {
    match condition {
        Condition::CreateRevision(key, revision) => Compare::create_revision(key, CompareOp::Equal, revision),
        Condition::ModRevision(key, revision) => Compare::mod_revision(key, CompareOp::Equal, revision),
    }
}

fn operation(op: Op) -> TxnOp {
    match op {
        Op::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
            TxnOp::put(key, value, options)
        }
        Op::Delete(key) => TxnOp::delete(key, None),
        Op::DeleteRange(from, to) => TxnOp::delete(from, Some(DeleteOptions::new().with_range(to))),
    }
}

#[async_trait]
impl MetaStore for EtcdStore {
    async fn get(&self, key: &[u8]) -> Result<Option<KeyValue>, StoreError> {
        let turn = self.turn();
        let mut client = turn.client().kv_client();
        let answer = self.read(turn, client.get(key, None)).await?;
        Ok(answer.kvs().first().map(key_value))
    }

    async fn range(&self, prefix: &[u8]) -> Result<(Vec<KeyValue>, Revision), StoreError> {
        let end = prefix_end(prefix);
        let mut from = prefix.to_vec();
        let mut revision = 0;
        let mut found = Vec::new();
        loop {
            let options = GetOptions::new()
                .with_range(end.clone())
                .with_limit(RANGE_KEYS)
                .with_revision(revision);
            let turn = self.turn();
            let mut client = turn.client().kv_client().max_decoding_message_size(MAX_ANSWER_BYTES);
            let answer = self.read(turn, client.get(from, Some(options))).await?;
            if revision == 0 {
                revision = answer
                    .header()
                    .map(|header| header.revision())
                    .ok_or_else(|| StoreError::Unavailable("answer without a revision".into()))?;
            }
            found.extend(answer.kvs().iter().map(key_value));
            match answer.kvs().last() {
                Some(last) if answer.more() => {
                    from = last.key().to_vec();
                    from.push(0);
                }
                _ => return Ok((found, revision)),
            }
        }
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        let lease = txn.then.iter().find_map(|op| match op {
            Op::Put { lease, .. } => *lease,
            _ => None,
        });
        let request = etcd_client::Txn::new()
            .when(txn.conditions.into_iter().map(compare).collect::<Vec<_>>())
            .and_then(txn.then.into_iter().map(operation).collect::<Vec<_>>());
        let turn = self.turn();
        let mut client = turn.client().kv_client();
        let answer = self
            .write(turn, client.txn(request))
            .await
            .map_err(|error| with_lease(error, lease.unwrap_or(LeaseId(0))))?;
        Ok(TxnOutcome {
            succeeded: answer.succeeded(),
            revision: answer.header().map_or(0, |header| header.revision()),
        })
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let turn = self.turn();
        let mut client = turn.client().lease_client();
        let seconds = ttl.as_secs_f64().ceil() as i64;
        let answer = self.write(turn, client.grant(seconds, None)).await?;
        Ok(LeaseId(answer.id()))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        // A stream for one renewal (opening it sends and awaits one): a standing stream is bound to
        // one member and would have to be watched for silence. At a renewal or two a second it
        // costs nothing.
        let turn = self.turn();
        let mut client = turn.client().lease_client();
        turn.end(
            match tokio::time::timeout(self.request_timeout, client.keep_alive(lease.0)).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(Error::LeaseKeepAliveError(message))) if message.contains("not found") => {
                    Err(StoreError::LeaseExpired(lease))
                }
                Ok(Err(error)) => Err(with_lease(read_error(error), lease)),
                Err(_) => Err(StoreError::Unavailable("no answer in time".into())),
            },
        )
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        let turn = self.turn();
        let mut client = turn.client().lease_client();
        match self.write(turn, client.revoke(lease.0)).await {
            Ok(_) | Err(StoreError::LeaseExpired(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn watch(&self, prefix: &[u8], from: Revision) -> Result<WatchStream, StoreError> {
        let options = WatchOptions::new()
            .with_range(prefix_end(prefix))
            .with_start_revision(from);
        let turn = self.turn();
        let mut client = turn.client().watch_client().max_decoding_message_size(MAX_ANSWER_BYTES);
        let stream = self.read(turn, client.watch(prefix, Some(options))).await?;
        Ok(Box::pin(futures::stream::unfold(
            Some(stream),
            move |state| async move {
                let mut stream = state?;
                loop {
                    let answer = match stream.message().await {
                        Ok(Some(answer)) => answer,
                        Ok(None) => return None,
                        Err(error) => return Some((Err(read_error(error)), None)),
                    };
                    if answer.canceled() {
                        let error = match answer.compact_revision() {
                            0 => StoreError::Unavailable(format!("watch cancelled: {}", answer.cancel_reason())),
                            revision => StoreError::Compacted(revision),
                        };
                        return Some((Err(error), None));
                    }
                    if answer.events().is_empty() {
                        continue;
                    }
                    // The header may be ahead of the events of a watch that is catching up.
                    let revision = answer
                        .events()
                        .last()
                        .and_then(|event| Some(event.kv()?.mod_revision()));
                    let events = answer
                        .events()
                        .iter()
                        .filter_map(|event| {
                            let kv = event.kv()?;
                            Some(match event.event_type() {
                                EventType::Put => Event::Put(key_value(kv)),
                                EventType::Delete => Event::Delete(kv.key().to_vec()),
                            })
                        })
                        .collect();
                    let revision = revision.unwrap_or_default();
                    return Some((Ok(WatchBatch { revision, events }), Some(stream)));
                }
            },
        )))
    }
}
