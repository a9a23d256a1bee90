use crate::membership::ClusterView;
use crate::meta::chunks::{ChunkError, ChunkRemover};
use crate::replication::ChunkAccess;
use async_trait::async_trait;
use futures::{StreamExt, TryStreamExt};
use lazarette_types::{ChunkId, InodeId, Layout, VolumeId};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Chunks of one file changed at the same time.
const CONCURRENCY: usize = 16;
/// See [`ChunkRemover::truncate`]; an owner's lease lasts 3 s.
const TRUNCATE_WITHIN: Duration = Duration::from_secs(1);

/// The metadata owner's way to chunks: through the replica sets of the volume's layout.
pub(crate) struct ReplicatedChunks {
    pub(crate) access: ChunkAccess,
    pub(crate) view: watch::Receiver<Arc<ClusterView>>,
}

impl ReplicatedChunks {
    fn layout(&self, volume: VolumeId) -> Result<Layout, ChunkError> {
        let view = self.view.borrow();
        let record = view
            .volumes
            .get(&volume)
            .ok_or_else(|| ChunkError(format!("volume {volume} is not known here")))?;
        Ok(Layout {
            chunk_size: record.chunk_size,
            replica_sets: record.replica_sets.clone(),
        })
    }
}

#[async_trait]
impl ChunkRemover for ReplicatedChunks {
    async fn remove(
        &self,
        volume: VolumeId,
        ino: InodeId,
        seed: u32,
        from_index: u32,
        to_index: u32,
    ) -> Result<(), ChunkError> {
        let layout = self.layout(volume)?;
        let deletions = (from_index..to_index).map(|index| {
            let set = layout.replica_set(seed, index);
            self.access.delete(set, ChunkId { volume, ino, index })
        });
        futures::stream::iter(deletions)
            .buffer_unordered(CONCURRENCY)
            .try_collect()
            .await
            .map_err(|error| ChunkError(error.to_string()))
    }

    async fn truncate(
        &self,
        volume: VolumeId,
        ino: InodeId,
        seed: u32,
        index: u32,
        length: u32,
    ) -> Result<(), ChunkError> {
        let set = self.layout(volume)?.replica_set(seed, index);
        self.access
            .truncate(set, ChunkId { volume, ino, index }, length, TRUNCATE_WITHIN)
            .await
            .map_err(|error| ChunkError(error.to_string()))
    }
}
