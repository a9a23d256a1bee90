//! Drops what nobody needs any more: chunks of deleted volumes and of sets left.

use super::context::Context;
use crate::chunk::ChunkError;
use lazarette_metastore::StoreError;
use lazarette_types::{ReplicaSetId, VolumeId};

/// Sweeps now and then, and soon after a volume or a membership has gone. Never returns.
pub(super) async fn run(ctx: &Context) {
    let mut view = ctx.view.clone();
    let mut swept: Option<(Vec<VolumeId>, Vec<ReplicaSetId>)> = None;
    loop {
        let now = {
            let view = view.borrow_and_update();
            let volumes: Vec<_> = view.volumes.keys().copied().collect();
            let sets = view
                .replica_sets
                .iter()
                .filter(|(_, set)| set.record.members.contains(&ctx.node))
                .map(|(id, _)| *id)
                .collect();
            (volumes, sets)
        };
        if swept.as_ref() != Some(&now) {
            match sweep(ctx).await {
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

async fn sweep(ctx: &Context) -> Result<(), SweepError> {
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
        let belongs = |record: &lazarette_metastore::ReplicaSetRecord| record.members.contains(&ctx.node);
        if ctx.known(set).is_some_and(|known| belongs(&known.record)) {
            continue;
        }
        let present = ctx.read_record(set).await?;
        if !present.is_some_and(|present| belongs(&present.record)) {
            tracing::info!(replica_set = %set, "dropping the chunks of a replica set left");
            ctx.chunks.drop_replica_set(set).await?;
        }
    }
    Ok(())
}
