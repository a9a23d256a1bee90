use crate::store::{
    Condition, Event, KeyValue, LeaseId, MetaStore, Op, Revision, StoreError, Txn, TxnOutcome, WatchBatch, WatchStream,
};
use async_trait::async_trait;
use futures::StreamExt;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// The store in memory, with etcd's semantics: for unit tests and simulation.
///
/// Leases end by tokio's clock, looked at on each call and by a task per lease.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    revision: Revision,
    keys: BTreeMap<Vec<u8>, Stored>,
    leases: HashMap<i64, Lease>,
    next_lease: i64,
    history: Vec<WatchBatch>,
    watchers: Vec<Watcher>,
    unavailable: bool,
}

#[derive(Debug, Clone)]
struct Stored {
    value: Vec<u8>,
    create_revision: Revision,
    mod_revision: Revision,
    lease: Option<LeaseId>,
}

#[derive(Debug)]
struct Lease {
    ttl: Duration,
    ends: Instant,
}

#[derive(Debug)]
struct Watcher {
    prefix: Vec<u8>,
    sender: mpsc::UnboundedSender<Result<WatchBatch, StoreError>>,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// While set, every call fails with [`StoreError::Unavailable`] and leases still run out.
    pub fn set_unavailable(&self, unavailable: bool) {
        self.locked().unavailable = unavailable;
    }

    /// Ends a lease at once, as if its time had run out.
    pub fn expire(&self, lease: LeaseId) {
        self.locked().end_lease(lease);
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        state.end_overdue();
        state
    }

    fn serving(&self) -> Result<MutexGuard<'_, State>, StoreError> {
        let state = self.locked();
        if state.unavailable {
            return Err(StoreError::Unavailable("switched off by the test".into()));
        }
        Ok(state)
    }
}

impl State {
    fn end_overdue(&mut self) {
        let now = Instant::now();
        let overdue: Vec<_> = self
            .leases
            .iter()
            .filter(|(_, l)| l.ends <= now)
            .map(|(&id, _)| id)
            .collect();
        for id in overdue {
            self.end_lease(LeaseId(id));
        }
    }

    fn end_lease(&mut self, lease: LeaseId) {
        if self.leases.remove(&lease.0).is_none() {
            return;
        }
        let keys: Vec<_> = self
            .keys
            .iter()
            .filter(|(_, stored)| stored.lease == Some(lease))
            .map(|(key, _)| key.clone())
            .collect();
        if !keys.is_empty() {
            self.commit(keys.into_iter().map(Op::Delete).collect());
        }
    }

    fn commit(&mut self, ops: Vec<Op>) {
        let revision = self.revision + 1;
        let mut events = Vec::new();
        for op in ops {
            match op {
                Op::Put { key, value, lease } => {
                    let create_revision = self.keys.get(&key).map_or(revision, |s| s.create_revision);
                    let stored = Stored {
                        value: value.clone(),
                        create_revision,
                        mod_revision: revision,
                        lease,
                    };
                    events.push(Event::Put(stored.to_key_value(&key)));
                    self.keys.insert(key, stored);
                }
                Op::Delete(key) => {
                    if self.keys.remove(&key).is_some() {
                        events.push(Event::Delete(key));
                    }
                }
                Op::DeleteRange(from, to) => {
                    let keys: Vec<_> = self.keys.range(from..to).map(|(key, _)| key.clone()).collect();
                    for key in keys {
                        self.keys.remove(&key);
                        events.push(Event::Delete(key));
                    }
                }
            }
        }
        if events.is_empty() {
            return;
        }
        self.revision = revision;
        let batch = WatchBatch { revision, events };
        self.watchers.retain(|watcher| match select(&batch, &watcher.prefix) {
            Some(batch) => watcher.sender.send(Ok(batch)).is_ok(),
            None => !watcher.sender.is_closed(),
        });
        self.history.push(batch);
    }

    fn holds(&self, condition: &Condition) -> bool {
        match condition {
            Condition::CreateRevision(key, revision) => {
                self.keys.get(key).map_or(0, |s| s.create_revision) == *revision
            }
            Condition::ModRevision(key, revision) => self.keys.get(key).map_or(0, |s| s.mod_revision) == *revision,
        }
    }
}

impl Stored {
    fn to_key_value(&self, key: &[u8]) -> KeyValue {
        KeyValue {
            key: key.to_vec(),
            value: self.value.clone(),
            create_revision: self.create_revision,
            mod_revision: self.mod_revision,
        }
    }
}

/// The part of a batch that lies under a prefix.
fn select(batch: &WatchBatch, prefix: &[u8]) -> Option<WatchBatch> {
    let events: Vec<_> = batch
        .events
        .iter()
        .filter(|event| match event {
            Event::Put(kv) => kv.key.starts_with(prefix),
            Event::Delete(key) => key.starts_with(prefix),
        })
        .cloned()
        .collect();
    (!events.is_empty()).then_some(WatchBatch {
        revision: batch.revision,
        events,
    })
}

#[async_trait]
impl MetaStore for MemoryStore {
    async fn get(&self, key: &[u8]) -> Result<Option<KeyValue>, StoreError> {
        let state = self.serving()?;
        Ok(state.keys.get(key).map(|stored| stored.to_key_value(key)))
    }

    async fn range(&self, prefix: &[u8]) -> Result<(Vec<KeyValue>, Revision), StoreError> {
        let state = self.serving()?;
        let found = state
            .keys
            .range(prefix.to_vec()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, stored)| stored.to_key_value(key))
            .collect();
        Ok((found, state.revision))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        let mut state = self.serving()?;
        if txn.then.len() > 128 {
            return Err(StoreError::Refused("more than 128 operations".into()));
        }
        let succeeded = txn.conditions.iter().all(|condition| state.holds(condition));
        if succeeded {
            for op in &txn.then {
                if let Op::Put { lease: Some(lease), .. } = op
                    && !state.leases.contains_key(&lease.0)
                {
                    return Err(StoreError::LeaseExpired(*lease));
                }
            }
            state.commit(txn.then);
        }
        Ok(TxnOutcome {
            succeeded,
            revision: state.revision,
        })
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let id = {
            let mut state = self.serving()?;
            state.next_lease += 1;
            let id = state.next_lease;
            let ends = Instant::now() + ttl;
            state.leases.insert(id, Lease { ttl, ends });
            id
        };
        let store = self.clone();
        tokio::spawn(async move {
            loop {
                let ends = match store.locked().leases.get(&id) {
                    Some(lease) => lease.ends,
                    None => return,
                };
                tokio::time::sleep_until(ends).await;
            }
        });
        Ok(LeaseId(id))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        let mut state = self.serving()?;
        let held = state.leases.get_mut(&lease.0).ok_or(StoreError::LeaseExpired(lease))?;
        held.ends = Instant::now() + held.ttl;
        Ok(())
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.serving()?.end_lease(lease);
        Ok(())
    }

    async fn watch(&self, prefix: &[u8], from: Revision) -> Result<WatchStream, StoreError> {
        let mut state = self.serving()?;
        let (sender, receiver) = mpsc::unbounded_channel();
        for batch in state.history.iter().filter(|batch| batch.revision >= from) {
            if let Some(batch) = select(batch, prefix) {
                let _ = sender.send(Ok(batch));
            }
        }
        state.watchers.push(Watcher {
            prefix: prefix.to_vec(),
            sender,
        });
        Ok(tokio_stream::wrappers::UnboundedReceiverStream::new(receiver).boxed())
    }
}
