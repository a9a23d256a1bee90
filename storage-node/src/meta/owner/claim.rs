//! Claiming a shard, and reading its state back.

use super::OwnerContext;
use crate::meta::journal::{self, Fence};
use crate::meta::namespace::{Limits, Namespace};
use crate::meta::pages::{EtcdPages, PageError, PageMap, PageStore};
use crate::meta::rows::RowError;
use crate::meta::state::State;
use lazarette_metastore::{
    Condition, Keys, Op, OwnerRecord, RecordError, Revision, ShardRecord, StoreError, Txn, decode, encode,
};
use lazarette_types::{ROOT_INODE, VolumeId};
use std::collections::VecDeque;

/// An ownership that was won, before anything was recovered.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The volume.
    pub volume: VolumeId,
    /// The proof.
    pub fence: Fence,
    /// Journal records up to this one are in the pages.
    pub checkpoint: u64,
    /// The `mod_revision` of the shard's configuration.
    pub config_revision: Revision,
}

/// Why a claim failed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another node was faster, or owns the shard.
    #[error("shard has an owner")]
    Taken,
    /// The volume does not exist.
    #[error("volume does not exist")]
    NoVolume,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A record could not be read.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// Why a shard could not be recovered.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The pages cannot be read.
    #[error(transparent)]
    Pages(#[from] PageError),
    /// A journal record cannot be read.
    #[error("journal record {0}: {1}")]
    Record(u64, RowError),
    /// A journal record is missing.
    #[error("journal record {0} is missing")]
    Gap(u64),
    /// There are rows, but no root directory.
    #[error("volume has no root directory")]
    NoRoot,
}

/// Claims a shard that has no owner.
pub async fn claim(context: &OwnerContext, volume: VolumeId) -> Result<Claim, ClaimError> {
    let (store, keys) = (&context.store, &context.keys);
    let owner_key = keys.owner(volume);
    let config_key = keys.shard(volume).config();
    let volume_key = keys.volume(volume);
    if store.get(&owner_key).await?.is_some() {
        return Err(ClaimError::Taken);
    }
    let Some(volume_kv) = store.get(&volume_key).await? else {
        return Err(ClaimError::NoVolume);
    };
    let config = store.get(&config_key).await?;
    let seen = config.as_ref().map_or(0, |kv| kv.mod_revision);
    let before = match &config {
        Some(kv) => decode::<ShardRecord>(&kv.value)?,
        None => ShardRecord {
            epoch: 0,
            checkpoint: 0,
        },
    };
    let after = ShardRecord {
        epoch: before.epoch + 1,
        ..before
    };
    let owner = encode(&OwnerRecord {
        node: context.node.clone(),
        address: context.address.clone(),
        epoch: after.epoch,
    });
    let txn = Txn {
        conditions: vec![
            Condition::absent(owner_key.clone()),
            Condition::ModRevision(config_key.clone(), seen),
            Condition::ModRevision(volume_key, volume_kv.mod_revision),
        ],
        then: vec![
            Op::Put {
                key: owner_key.clone(),
                value: owner.clone(),
                lease: Some(context.lease.id()),
            },
            Op::put(config_key, encode(&after)),
        ],
    };
    let mut ambiguous = false;
    let revision = loop {
        match store.txn(txn.clone()).await {
            Ok(outcome) if outcome.succeeded => break outcome.revision,
            Ok(_) if ambiguous => {
                // The epoch was never used before, so this owner record is this claim's, made by
                // an earlier try.
                match journal::insist(|| store.get(&owner_key)).await {
                    Some(kv) if kv.value == owner => break kv.create_revision,
                    _ => return Err(ClaimError::Taken),
                }
            }
            Ok(_) => return Err(ClaimError::Taken),
            // It may still be made. This must be known: an ownership that nobody serves would
            // last as long as the node. Trying again makes it or shows that it was made.
            Err(StoreError::Ambiguous(_)) => ambiguous = true,
            Err(StoreError::Unavailable(_)) if ambiguous => {}
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(journal::RETRY_AFTER).await;
    };
    Ok(Claim {
        volume,
        fence: Fence {
            key: owner_key,
            create_revision: revision,
            epoch: after.epoch,
        },
        checkpoint: after.checkpoint,
        config_revision: revision,
    })
}

/// A shard's state as the owners before left it.
pub(super) struct Recovered {
    pub(super) namespace: Namespace,
    pub(super) pages: PageMap,
    pub(super) page_store: Box<dyn PageStore>,
    /// Records beyond the checkpoint: number and bytes.
    pub(super) records: VecDeque<(u64, usize)>,
    /// The last record.
    pub(super) last: u64,
}

/// Reads pages and journal. Nothing changes under it, because the claim has fenced all others off.
pub(super) async fn recover(
    context: &OwnerContext,
    claim: &Claim,
    limits: Limits,
    now: i64,
) -> Result<Recovered, RecoverError> {
    let shard = context.keys.shard(claim.volume);
    let mut page_store = EtcdPages::new(
        context.store.clone(),
        shard.clone(),
        claim.fence.clone(),
        claim.checkpoint,
        claim.config_revision,
    );
    let stored = page_store.load().await?;
    let prefix = shard.journal();
    let (found, _) = context.store.range(&prefix).await?;

    let mut state = State::new(0);
    let pages = PageMap::load(stored, |key, row| state.load_page_row(key, row))?;
    let mut records = VecDeque::new();
    let mut last = claim.checkpoint;
    for kv in found {
        let number = Keys::suffix(&kv.key, &prefix).and_then(|text| u64::from_str_radix(text, 16).ok());
        let Some(lsn) = number.filter(|lsn| *lsn > claim.checkpoint) else {
            continue;
        };
        let record = journal::decode(&kv.value).map_err(|error| RecoverError::Record(lsn, error))?;
        if lsn != last + 1 || record.lsn != lsn {
            return Err(RecoverError::Gap(last + 1));
        }
        last = lsn;
        for (key, row) in record.changes {
            state.redo(key, row);
        }
        records.push_back((lsn, kv.value.len()));
    }
    state.set_open_record(last + 1);
    if !state.rows().is_empty() && state.inode(ROOT_INODE).is_none() {
        return Err(RecoverError::NoRoot);
    }
    Ok(Recovered {
        namespace: Namespace::new(state, limits, now),
        pages,
        page_store: Box::new(page_store),
        records,
        last,
    })
}
