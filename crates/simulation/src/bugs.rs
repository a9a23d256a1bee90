//! Mistakes that are made on purpose, to see that they are found. They are made around the product, by
//! changing what it is told and what it says, so that it need not have them itself.

use crate::etcd::Etcd;
use crate::node::keys;
use bytes::{BufMut, Bytes, BytesMut};
use futures::FutureExt;
use http_body_util::{BodyExt, Full};
use lazarette_metastore::{Condition, MetaStore, Op, ReplicaSetRecord, Txn, decode};
use lazarette_proto::{chunk, meta};
use lazarette_types::ReplicaSetId;
use prost::Message;
use std::sync::atomic::{AtomicU64, Ordering};
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, HeaderValue, Response};

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Bug {
    /// Disks say that data is durable that they lose when their machine dies.
    LyingDisks,
    /// Backups acknowledge changes before they make them.
    EarlyAcknowledgement,
    /// Backups acknowledge changes and never make them.
    PretendedChanges,
    /// Half of the copies that recovery and repair install are not there in the end.
    PretendedCopies,
    /// Members take requests of any epoch.
    NoEpochs,
    /// An owner commits whether or not it still is the owner.
    NoFencing,
    /// Storage nodes trust their lease for three times as long as it lasts.
    LongLeases,
    /// Clients are not told which of their leases are void.
    NoRecalls,
    /// A request that is repeated is executed again.
    NoOperationIds,
    /// Who calls fsync does not hear of errors.
    IgnoredFlushErrors,
}

/// What becomes of a request.
pub(crate) enum Verdict {
    Pass(Bytes),
    /// Answered so, and not executed, or later.
    Answered(Bytes, Option<Bytes>),
}

static ATTEMPTS: AtomicU64 = AtomicU64::new(0);

/// The message in a request or answer with only one.
fn message<M: Message + Default>(body: &Bytes) -> Option<M> {
    M::decode(body.get(5..)?).ok()
}

/// A message as it is in a body: not compressed, its length, itself.
fn framed(message: &impl Message) -> Bytes {
    let bytes = message.encode_to_vec();
    let mut framed = BytesMut::with_capacity(5 + bytes.len());
    framed.put_u8(0);
    framed.put_u32(bytes.len() as u32);
    framed.extend_from_slice(&bytes);
    framed.freeze()
}

/// The answer with a message.
pub(crate) fn answer(body: Bytes) -> Response<Body> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let body = Full::new(body).with_trailers(async move { Some(Ok(trailers)) });
    let mut response = Response::new(Body::new(body));
    let kind = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert("content-type", kind);
    response
}

impl Bug {
    /// Whether it has to do with requests at all.
    pub(crate) fn changes_requests(self) -> bool {
        use Bug::{EarlyAcknowledgement, NoEpochs, NoOperationIds, PretendedChanges, PretendedCopies};
        matches!(
            self,
            EarlyAcknowledgement | PretendedChanges | PretendedCopies | NoEpochs | NoOperationIds
        )
    }

    /// What a storage node makes of a request.
    pub(crate) fn request(self, etcd: &Etcd, method: &str, body: Bytes) -> Verdict {
        self.changed(etcd, method, &body).unwrap_or(Verdict::Pass(body))
    }

    fn changed(self, etcd: &Etcd, method: &str, body: &Bytes) -> Option<Verdict> {
        match (self, method) {
            (Self::EarlyAcknowledgement | Self::PretendedChanges, "Apply") => {
                let request: chunk::ApplyRequest = message(body)?;
                let present = request.version;
                let later = (self == Self::EarlyAcknowledgement).then(|| body.clone());
                Some(Verdict::Answered(framed(&chunk::ApplyResponse { present }), later))
            }
            (Self::PretendedCopies, "Install") => {
                let request: chunk::InstallRequest = message(body)?;
                if ATTEMPTS.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
                    return None;
                }
                let present = request.version;
                Some(Verdict::Answered(framed(&chunk::InstallResponse { present }), None))
            }
            (Self::NoEpochs, _) => {
                macro_rules! newest {
                    ($($method:literal $request:ty)*) => { match method {
                        $($method => {
                            let mut request: $request = message(body)?;
                            request.epoch = epoch(etcd, request.replica_set)?;
                            Some(Verdict::Pass(framed(&request)))
                        })*
                        _ => None,
                    } };
                }
                newest!(
                    "Write" chunk::WriteRequest
                    "Read" chunk::ReadRequest
                    "Truncate" chunk::TruncateRequest
                    "Apply" chunk::ApplyRequest
                    "Install" chunk::InstallRequest
                    "Prepare" chunk::PrepareRequest
                    "List" chunk::ListRequest
                    "Fetch" chunk::FetchRequest
                )
            }
            (Self::NoOperationIds, "Call") => {
                let mut request: meta::Request = message(body)?;
                if request.op_id == 0 {
                    return None;
                }
                request.op_id = 16 * request.op_id + ATTEMPTS.fetch_add(1, Ordering::Relaxed) % 16;
                request.ack_below *= 16;
                Some(Verdict::Pass(framed(&request)))
            }
            _ => None,
        }
    }

    /// What a storage node's transaction becomes.
    pub(crate) fn transaction(self, mut txn: Txn) -> Txn {
        let fenced = |condition: &Condition| match condition {
            Condition::CreateRevision(key, revision) => *revision != 0 && key.starts_with(&keys().owners()),
            Condition::ModRevision(..) => false,
        };
        if self == Self::NoFencing && txn.conditions.iter().any(fenced) {
            let put: Vec<_> = txn.then.iter().filter_map(put_key).collect();
            let conditions = std::mem::take(&mut txn.conditions).into_iter();
            // Nor is it noticed that another owner's record has the same number.
            txn.conditions = conditions
                .filter(|condition| !fenced(condition) && !put.contains(&condition_key(condition)))
                .collect();
        }
        txn
    }
}

fn put_key(op: &Op) -> Option<Vec<u8>> {
    match op {
        Op::Put { key, .. } => Some(key.clone()),
        Op::Delete(_) | Op::DeleteRange(..) => None,
    }
}

fn condition_key(condition: &Condition) -> Vec<u8> {
    let (Condition::CreateRevision(key, _) | Condition::ModRevision(key, _)) = condition;
    key.clone()
}

/// The present epoch of a replica set.
fn epoch(etcd: &Etcd, set: u32) -> Option<u64> {
    let key = keys().replica_set(ReplicaSetId(set));
    let found = etcd.store.get(&key).now_or_never()?.ok()??;
    let record: ReplicaSetRecord = decode(&found.value).ok()?;
    Some(record.epoch)
}

/// An answer that tells of recalls, without what they recall.
pub(crate) fn without_recalls(response: Response<Body>) -> Response<Body> {
    response.map(|body| {
        Body::new(body.map_frame(|frame| {
            frame.map_data(|data| match message::<meta::Recall>(&data) {
                Some(recall) if recall.company == 0 => framed(&meta::Recall {
                    inodes: Vec::new(),
                    ..recall
                }),
                _ => data,
            })
        }))
    })
}
