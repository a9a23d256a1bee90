//! Where pages are kept.

use crate::meta::journal::{Fence, Lost, insist};
use async_trait::async_trait;
use lazarette_metastore::{Condition, Keys, MetaStore, Op, Revision, ShardKey, ShardRecord, StoreError, Txn, encode};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Pages that are written together.
#[derive(Debug, Default)]
pub struct PageBatch {
    /// By page number: the image, or `None` to delete the page.
    pub writes: BTreeMap<u64, Option<Vec<u8>>>,
}

/// Keeps the pages of one shard.
#[async_trait]
pub trait PageStore: Send + 'static {
    /// Reads all pages, by number.
    async fn load(&mut self) -> Result<Vec<(u64, Vec<u8>)>, StoreError>;

    /// Writes a batch, all or nothing. With `checkpoint` the journal records up to that number
    /// are then deleted, in the same step.
    async fn write(&mut self, batch: PageBatch, checkpoint: Option<u64>) -> Result<(), Lost>;
}

/// Pages in the metadata store, beside the journal.
///
/// Each write also writes the shard's configuration, on the condition that it is as the write
/// before left it. So a write that was given up for lost and repeated cannot come late and undo a
/// newer one.
pub struct EtcdPages {
    store: Arc<dyn MetaStore>,
    keys: ShardKey,
    fence: Fence,
    checkpoint: u64,
    config_revision: Revision,
}

impl EtcdPages {
    /// Pages of a shard whose configuration was last changed at `config_revision`.
    pub fn new(
        store: Arc<dyn MetaStore>,
        keys: ShardKey,
        fence: Fence,
        checkpoint: u64,
        config_revision: Revision,
    ) -> Self {
        Self {
            store,
            keys,
            fence,
            checkpoint,
            config_revision,
        }
    }
}

#[async_trait]
impl PageStore for EtcdPages {
    async fn load(&mut self) -> Result<Vec<(u64, Vec<u8>)>, StoreError> {
        let prefix = self.keys.pages();
        let (found, _) = self.store.range(&prefix).await?;
        let numbered = found.into_iter().filter_map(|kv| {
            let id = Keys::suffix(&kv.key, &prefix).and_then(|text| u64::from_str_radix(text, 16).ok())?;
            Some((id, kv.value))
        });
        Ok(numbered.collect())
    }

    async fn write(&mut self, batch: PageBatch, checkpoint: Option<u64>) -> Result<(), Lost> {
        let to = checkpoint.unwrap_or(self.checkpoint);
        let record = ShardRecord {
            epoch: self.fence.epoch,
            checkpoint: to,
        };
        let config = self.keys.config();
        let mut then: Vec<Op> = Vec::with_capacity(batch.writes.len() + 2);
        for (id, image) in batch.writes {
            let key = self.keys.page(id);
            then.push(match image {
                Some(image) => Op::put(key, image),
                None => Op::Delete(key),
            });
        }
        then.push(Op::put(config.clone(), encode(&record)));
        if to > self.checkpoint {
            let (from, to) = (self.keys.journal_record(0), self.keys.journal_record(to + 1));
            then.push(Op::DeleteRange(from, to));
        }
        let txn = Txn {
            conditions: vec![
                self.fence.condition(),
                Condition::ModRevision(config.clone(), self.config_revision),
            ],
            then,
        };
        loop {
            match self.store.txn(txn.clone()).await {
                Ok(outcome) if outcome.succeeded => {
                    self.config_revision = outcome.revision;
                    break;
                }
                Ok(_) | Err(StoreError::Ambiguous(_)) => {
                    if !self.fence.holds(&*self.store).await {
                        return Err(Lost("the owner's key is gone".into()));
                    }
                    // Only the owner changes the configuration, and only here.
                    let found = insist(|| self.store.get(&config)).await;
                    let revision = found.map_or(0, |kv| kv.mod_revision);
                    if revision != self.config_revision {
                        self.config_revision = revision;
                        break;
                    }
                }
                Err(error @ (StoreError::Refused(_) | StoreError::LeaseExpired(_) | StoreError::Compacted(_))) => {
                    return Err(Lost(error.to_string()));
                }
                Err(error @ (StoreError::Unavailable(_) | StoreError::Full(_))) => {
                    tracing::warn!(%error, "pages are not written yet");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        self.checkpoint = to;
        Ok(())
    }
}
