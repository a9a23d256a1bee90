//! Dropping a deleted volume's keys.

use crate::meta::journal::{Fence, insist};
use crate::meta::owner::{OwnerContext, guarded};
use lazarette_metastore::{Condition, Op, StoreError, Txn, VolumeRecord};
use std::time::Duration;

/// Keys of one transaction.
const STEP: usize = 256;

/// Drops all keys of a volume that is being deleted: the shard's, then the volume's, and at last
/// the ownership. Whoever comes next goes on where this one stopped.
pub(super) async fn destroy(context: &OwnerContext, fence: &Fence, record: &VolumeRecord) {
    drop_keys(context, fence, record).await;
    fence.release(&*context.store).await;
}

async fn drop_keys(context: &OwnerContext, fence: &Fence, record: &VolumeRecord) {
    let keys = &context.keys;
    let shard = keys.shard(record.id);
    let volume_key = keys.volume(record.id);
    for prefix in [shard.pages(), shard.journal()] {
        let (found, _) = insist(|| context.store.range(&prefix)).await;
        for step in found.chunks(STEP) {
            if let (Some(first), Some(last)) = (step.first(), step.last()) {
                let end = [&last.key[..], &[0]].concat();
                let txn = guarded(fence, [], vec![Op::DeleteRange(first.key.clone(), end)]);
                if !insist_on(context, txn).await {
                    return;
                }
            }
        }
    }
    // The name may be another volume's by now.
    let name_key = keys.volume_name(&record.name);
    let name = insist(|| context.store.get(&name_key)).await;
    let own_name = name.filter(|kv| kv.value == record.id.to_string().into_bytes());
    let mut conditions = Vec::new();
    let mut then = vec![
        Op::Delete(shard.config()),
        Op::Delete(keys.usage(record.id)),
        Op::Delete(volume_key),
        Op::Delete(fence.key.clone()),
    ];
    if let Some(kv) = own_name {
        conditions.push(Condition::ModRevision(name_key.clone(), kv.mod_revision));
        then.push(Op::Delete(name_key));
    }
    if insist_on(context, guarded(fence, conditions, then)).await {
        tracing::info!(volume = %record.id, "volume's metadata is dropped");
    }
}

/// Repeats a transaction that may be repeated until it is answered; whether it was made.
async fn insist_on(context: &OwnerContext, txn: Txn) -> bool {
    loop {
        match context.store.txn(txn.clone()).await {
            Ok(outcome) => return outcome.succeeded,
            Err(StoreError::Unavailable(_) | StoreError::Ambiguous(_) | StoreError::Full(_)) => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(error) => {
                tracing::error!(%error, "volume's keys are not dropped");
                return false;
            }
        }
    }
}
