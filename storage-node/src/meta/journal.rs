//! The journal: records of changed rows, each committed by one fenced transaction.

use super::rows::{Change, FORMAT, Key, Reader, RowError, Writer, open_envelope, seal_envelope};
use super::state::State;
use lazarette_metastore::{Condition, MetaStore, Op, Revision, ShardKey, StoreError, Txn};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Pause before the store is asked again after it failed.
pub(super) const RETRY_AFTER: Duration = Duration::from_millis(50);

/// Proof of ownership: the owner's key as this owner made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The owner's key.
    pub key: Vec<u8>,
    /// The key's `create_revision`, which names this ownership and no other.
    pub create_revision: Revision,
    /// The shard's epoch.
    pub epoch: u64,
}

impl Fence {
    /// Holds as long as this owner is the owner.
    pub fn condition(&self) -> Condition {
        Condition::CreateRevision(self.key.clone(), self.create_revision)
    }

    /// Whether this owner is still the owner, asked again until there is an answer.
    pub async fn holds(&self, store: &dyn MetaStore) -> bool {
        let found = insist(|| store.get(&self.key)).await;
        found.is_some_and(|kv| kv.create_revision == self.create_revision)
    }
}

impl Fence {
    /// Gives the ownership up, asked until there is an answer: while this node lives its lease
    /// does, and a key left behind would keep all others from the shard.
    pub async fn release(&self, store: &dyn MetaStore) {
        let txn = Txn {
            conditions: vec![self.condition()],
            then: vec![Op::Delete(self.key.clone())],
        };
        while let Err(error) = store.txn(txn.clone()).await {
            tracing::warn!(%error, "ownership is not given up yet");
            tokio::time::sleep(RETRY_AFTER * 2).await;
        }
    }
}

/// Repeats a read until it is answered.
pub(super) async fn insist<T, F>(mut read: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, StoreError>>,
{
    loop {
        match read().await {
            Ok(answer) => return answer,
            Err(error) => {
                tracing::debug!(%error, "read is repeated");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

/// Another node owns the shard, or may own it by now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ownership is lost: {0}")]
pub struct Lost(pub String);

/// A record's contents.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Its writer's epoch.
    pub epoch: u64,
    /// Its writer's [`Fence::create_revision`].
    pub writer: Revision,
    /// Its number.
    pub lsn: u64,
    /// The rows as they are after it.
    pub changes: Vec<Change>,
}

/// The bytes of a record: what the rows under `keys` are now.
pub fn encode(fence: &Fence, lsn: u64, state: &State, keys: &BTreeSet<Key>) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.number(fence.epoch);
    writer.number(fence.create_revision as u64);
    writer.number(lsn);
    for key in keys {
        writer.change(key, state.get(key));
    }
    seal_envelope(FORMAT, &writer.into_bytes())
}

/// Reads a record.
pub fn decode(bytes: &[u8]) -> Result<Record, RowError> {
    let mut reader = Reader::new(open_envelope(FORMAT, bytes)?);
    let epoch = reader.number()?;
    let writer = reader.number()? as Revision;
    let lsn = reader.number()?;
    let mut changes = Vec::new();
    while !reader.is_empty() {
        changes.push(reader.change()?);
    }
    Ok(Record {
        epoch,
        writer,
        lsn,
        changes,
    })
}

/// Commits records. One at a time: a record is begun when the one before it is committed.
#[derive(Clone)]
pub struct Journal {
    store: Arc<dyn MetaStore>,
    keys: ShardKey,
    fence: Fence,
}

impl Journal {
    /// The journal of a shard under this ownership.
    pub fn new(store: Arc<dyn MetaStore>, keys: ShardKey, fence: Fence) -> Self {
        Self { store, keys, fence }
    }

    /// Commits a record. Returns only when it certainly is committed, or when it can never be
    /// because the ownership is lost. The caller gives up waiting when its lease ends.
    pub async fn commit(self, lsn: u64, bytes: Vec<u8>) -> Result<(), Lost> {
        let key = self.keys.journal_record(lsn);
        let txn = Txn {
            conditions: vec![self.fence.condition(), Condition::absent(key.clone())],
            then: vec![Op::put(key.clone(), bytes.clone())],
        };
        let mut tries = 0u32;
        loop {
            match self.store.txn(txn.clone()).await {
                Ok(outcome) if outcome.succeeded => return Ok(()),
                Ok(_) | Err(StoreError::Ambiguous(_)) => {
                    // Somebody's record is there, or nobody knows. The record names its writer,
                    // so equal bytes mean that an earlier try of this one succeeded.
                    match insist(|| self.store.get(&key)).await {
                        Some(kv) if kv.value == bytes => return Ok(()),
                        Some(_) => return Err(Lost(format!("record {lsn} was written by another owner"))),
                        None if self.fence.holds(&*self.store).await => {}
                        None => return Err(Lost("the owner's key is gone".into())),
                    }
                }
                Err(error @ (StoreError::Refused(_) | StoreError::LeaseExpired(_) | StoreError::Compacted(_))) => {
                    return Err(Lost(error.to_string()));
                }
                Err(error @ (StoreError::Unavailable(_) | StoreError::Full(_))) => {
                    if tries.is_multiple_of(100) {
                        tracing::warn!(%error, lsn, tries, "record is not committed yet");
                    }
                    tries += 1;
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
    }
}
