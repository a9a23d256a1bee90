//! An etcd in the simulation: a [`MemoryStore`] on a host of its own, and the unreliable way to it.

use crate::conditions::{Fate, World};
use async_trait::async_trait;
use futures::StreamExt;
use futures::future::BoxFuture;
use lazarette_metastore::{
    KeyValue, LeaseId, MemoryStore, MetaStore, Revision, StoreError, Txn, TxnOutcome, WatchStream,
};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};

/// As [`EtcdConfig`](lazarette_metastore::EtcdConfig) has it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// A watch on a connection that is cut ends after so long.
const WATCH_SILENCE: Duration = Duration::from_secs(3);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Milliseconds.
const LATENCY: u64 = 4;
const LATE: u64 = 6000;

type Job = Box<dyn FnOnce(MemoryStore) -> BoxFuture<'static, ()> + Send>;

/// The host. Leases end by its clock.
pub(crate) struct Etcd {
    pub(crate) store: MemoryStore,
    sender: mpsc::UnboundedSender<Job>,
    receiver: Mutex<Option<mpsc::UnboundedReceiver<Job>>>,
}

impl Etcd {
    pub(crate) fn new() -> Arc<Self> {
        let (sender, receiver) = mpsc::unbounded_channel();
        Arc::new(Self {
            store: MemoryStore::new(),
            sender,
            receiver: Mutex::new(Some(receiver)),
        })
    }

    /// Runs on the host until the simulation ends.
    pub(crate) async fn serve(self: Arc<Self>) -> turmoil::Result {
        let receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut receiver = receiver.ok_or("etcd is never restarted")?;
        while let Some(job) = receiver.recv().await {
            tokio::spawn(job(self.store.clone()));
        }
        Ok(())
    }

    /// The way to it from a host.
    pub(crate) fn path(self: &Arc<Self>, world: &Arc<World>, host: &str) -> Path {
        Path(Arc::new(Link {
            etcd: Arc::clone(self),
            world: Arc::clone(world),
            host: host.to_owned(),
        }))
    }
}

/// The store as a host sees it.
pub(crate) struct Path(Arc<Link>);

/// The connection of one host to etcd.
struct Link {
    etcd: Arc<Etcd>,
    world: Arc<World>,
    host: String,
}

/// What a request does: decides which error no answer is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
}

fn no_answer(kind: Kind) -> StoreError {
    match kind {
        Kind::Read => StoreError::Unavailable("no answer".into()),
        Kind::Write => StoreError::Ambiguous("no answer".into()),
    }
}

impl Link {
    fn cut(&self) -> bool {
        self.world.conditions().without_etcd.contains(&self.host)
    }

    /// Runs a call at etcd. It may be run though nobody hears the answer, also long after.
    async fn call<T, F>(
        self: &Arc<Self>,
        kind: Kind,
        call: impl FnOnce(MemoryStore) -> F + Send + 'static,
    ) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let odds = self.world.conditions().etcd;
        let mut fate = self.world.fate(odds, LATE);
        if self.cut() {
            // A connection that is cut loses what it carries, or delivers it when it is whole again.
            let lost = rand::Rng::random_bool(&mut *self.world.rng(), 0.6);
            fate = if lost { Fate::Lost } else { Fate::Late(Duration::ZERO) };
        }
        let there = self.world.some_ms(LATENCY);
        let back = self.world.some_ms(LATENCY);
        let (sender, answer) = oneshot::channel();
        let path = Arc::clone(self);
        let job: Job = Box::new(move |store| {
            Box::pin(async move {
                match fate {
                    Fate::Lost => return,
                    Fate::Late(time) | Fate::Ghost(time) | Fate::Twice(time) => sleep(time).await,
                    _ => sleep(there).await,
                }
                while path.cut() {
                    sleep(LOOK_EVERY).await;
                }
                let result = call(store).await;
                if matches!(fate, Fate::AnswerLost | Fate::Ghost(_)) {
                    return;
                }
                sleep(back).await;
                while path.cut() {
                    sleep(LOOK_EVERY).await;
                }
                let _ = sender.send(result);
            })
        });
        let _ = self.etcd.sender.send(job);
        // A connection may also break at once.
        let patience = match fate {
            Fate::Lost | Fate::AnswerLost | Fate::Ghost(_) => self.world.some_ms(REQUEST_TIMEOUT.as_millis() as u64),
            _ => REQUEST_TIMEOUT,
        };
        let started = Instant::now();
        match timeout(patience, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => {
                // Nothing tells that it was lost.
                sleep(patience.saturating_sub(started.elapsed())).await;
                Err(no_answer(kind))
            }
            Err(_) => Err(no_answer(kind)),
        }
    }
}

#[async_trait]
impl MetaStore for Path {
    async fn get(&self, key: &[u8]) -> Result<Option<KeyValue>, StoreError> {
        let key = key.to_vec();
        self.0
            .call(Kind::Read, |store| async move { store.get(&key).await })
            .await
    }

    async fn range(&self, prefix: &[u8]) -> Result<(Vec<KeyValue>, Revision), StoreError> {
        let prefix = prefix.to_vec();
        self.0
            .call(Kind::Read, |store| async move { store.range(&prefix).await })
            .await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        let txn = match self.0.world.bug {
            Some(bug) => bug.transaction(txn),
            None => txn,
        };
        self.0
            .call(Kind::Write, |store| async move { store.txn(txn).await })
            .await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.0
            .call(Kind::Write, move |store| async move { store.grant(ttl).await })
            .await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.0
            .call(Kind::Read, move |store| async move { store.keep_alive(lease).await })
            .await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.0
            .call(Kind::Write, move |store| async move { store.revoke(lease).await })
            .await
    }

    async fn watch(&self, prefix: &[u8], from: Revision) -> Result<WatchStream, StoreError> {
        let prefix = prefix.to_vec();
        let stream = self
            .0
            .call(Kind::Read, move |store| async move { store.watch(&prefix, from).await })
            .await?;
        let path = Arc::clone(&self.0);
        let delayed = stream.then(move |batch| {
            let path = Arc::clone(&path);
            async move {
                sleep(path.world.some_ms(LATENCY)).await;
                let mut silent = Duration::ZERO;
                while path.cut() {
                    if silent >= WATCH_SILENCE {
                        return Err(StoreError::Unavailable("the watch is silent".into()));
                    }
                    sleep(LOOK_EVERY).await;
                    silent += LOOK_EVERY;
                }
                batch
            }
        });
        Ok(ended_by_error(delayed.boxed()))
    }
}

/// A stream ends after its first error.
fn ended_by_error(stream: WatchStream) -> WatchStream {
    futures::stream::unfold(Some(stream), |stream| async move {
        let mut stream = stream?;
        let batch = stream.next().await?;
        let rest = batch.is_ok().then_some(stream);
        Some((batch, rest))
    })
    .boxed()
}
