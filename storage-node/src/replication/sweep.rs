//! Drops what nobody needs any more: chunks of deleted volumes and of sets left.

use super::Replicas;
use super::context::Context;
use crate::chunk::ChunkError;
use lazarette_metastore::StoreError;
use lazarette_types::{ReplicaSetId, VolumeId};

/// Sweeps now and then, and soon after a volume or a membership has gone. Never returns.
pub(super) async fn run(replicas: &Replicas) {
    let ctx = &*replicas.ctx;
    let mut view = ctx.view.clone();
    let mut swept: Option<(Vec<VolumeId>, Vec<ReplicaSetId>)> = None;
    loop {
        let now = {
            let view = view.borrow_and_update();
            let volumes: Vec<_> = view.volumes.keys().copied().collect();
            let sets = view
                .replica_sets
                .iter()
                .filter(|(_, set)| set.record.involves(&ctx.node))
                .map(|(id, _)| *id)
                .collect();
            (volumes, sets)
        };
        if swept.as_ref() != Some(&now) {
            match sweep(replicas).await {
                Ok(()) => swept = Some(now),
                Err(error) => tracing::warn!(%error, "sweep of chunks failed, trying again later"),
            }
        }
        tokio::select! {
            changed = view.changed() => if changed.is_err() { return },
            // A write that was under way may have brought a chunk back.
            () = tokio::time::sleep(ctx.config.sweep_every) => swept = None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum SweepError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Chunk(#[from] ChunkError),
}

async fn sweep(replicas: &Replicas) -> Result<(), SweepError> {
    let ctx = &*replicas.ctx;
    for volume in ctx.chunks.volumes().await? {
        if ctx.view.borrow().volumes.contains_key(&volume) {
            continue;
        }
        // The view may lag behind. The store does not, and numbers of volumes are never reused.
        if ctx.store.get(&ctx.keys.volume(volume)).await?.is_none() {
            tracing::info!(%volume, "dropping the chunks of a deleted volume");
            ctx.chunks.drop_volume(volume).await?;
        }
    }
    for set in ctx.chunks.replica_sets().await? {
        if ctx.known(set).is_some_and(|known| known.record.involves(&ctx.node)) {
            continue;
        }
        let present = ctx.read_record(set).await?;
        let epoch = present.map_or(0, |present| present.record.epoch);
        let dropped = replicas.member(set, epoch).drop_if(left(ctx, set)).await?;
        if dropped {
            tracing::info!(replica_set = %set, "chunks of a replica set left were dropped");
        }
    }
    Ok(())
}

/// Whether the set is whole without this node. As long as it is not, what this node has may be the
/// last good copy, if only for someone to take it out by hand.
async fn left(ctx: &Context, set: ReplicaSetId) -> Result<bool, SweepError> {
    let Some(present) = ctx.read_record(set).await? else {
        return Ok(true);
    };
    let record = present.record;
    let view = ctx.view.borrow();
    let running = record
        .in_sync
        .iter()
        .filter(|node| view.live.contains_key(node))
        .count();
    Ok(!record.involves(&ctx.node) && !record.recovering && running >= record.replication.copies as usize)
}
