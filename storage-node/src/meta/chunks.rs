//! What the metadata owner does to chunks: it removes those of files that are gone and cuts those
//! of files that were shrunk.

use super::rows::{Garbage, Truncate};
use async_trait::async_trait;
use futures::{StreamExt, TryStreamExt};
use lazarette_types::{InodeId, VolumeId};
use std::sync::Arc;
use std::time::Duration;

/// Requests for one file under way at a time.
const CONCURRENCY: usize = 16;

/// Chunks could not be changed now. The owner tries again.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct ChunkError(pub String);

/// Changes chunks at their replica sets. Every call is idempotent and returns when the change is
/// as durable as an acknowledged write.
#[async_trait]
pub trait ChunkRemover: Send + Sync + 'static {
    /// Removes the chunks `from_index <= index < to_index` of a file that is gone for good. Many
    /// of them may not exist.
    async fn remove(
        &self,
        volume: VolumeId,
        ino: InodeId,
        seed: u32,
        from_index: u32,
        to_index: u32,
    ) -> Result<(), ChunkError>;

    /// Cuts one chunk to at most `length` bytes. The file lives on, so nothing of it may take effect after
    /// the owner's lease has ended or after the call has returned.
    async fn truncate(
        &self,
        volume: VolumeId,
        ino: InodeId,
        seed: u32,
        index: u32,
        length: u32,
    ) -> Result<(), ChunkError>;
}

/// Removes the chunks of a file that is gone, however often it has to try.
pub(super) async fn remove(chunks: Arc<dyn ChunkRemover>, volume: VolumeId, ino: InodeId, garbage: Garbage) {
    persist(|| chunks.remove(volume, ino, garbage.seed, 0, garbage.chunks)).await;
}

/// Cuts the chunks of a file that was shrunk, however often it has to try.
pub(super) async fn cut(chunks: Arc<dyn ChunkRemover>, volume: VolumeId, ino: InodeId, cut: Truncate, chunk_size: u32) {
    persist(|| async {
        let calls = cuts(cut, chunk_size).map(|(index, length)| {
            let chunks = &chunks;
            async move { chunks.truncate(volume, ino, cut.seed, index, length).await }
        });
        futures::stream::iter(calls)
            .buffer_unordered(CONCURRENCY)
            .try_collect::<()>()
            .await
    })
    .await;
}

/// The chunks to cut, each with the length that it keeps.
fn cuts(cut: Truncate, chunk_size: u32) -> impl Iterator<Item = (u32, u32)> {
    let size = u64::from(chunk_size);
    let first = cut.to / size;
    let end = cut.from.div_ceil(size);
    (first..end).map(move |index| {
        let keep = cut.to.saturating_sub(index * size);
        (index as u32, keep as u32)
    })
}

async fn persist<F>(mut attempt: impl FnMut() -> F)
where
    F: Future<Output = Result<(), ChunkError>>,
{
    let mut pause = Duration::from_millis(50);
    while let Err(error) = attempt().await {
        tracing::debug!(%error, "chunks are not changed yet");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cuts_of(from: u64, to: u64) -> Vec<(u32, u32)> {
        cuts(Truncate { seed: 0, from, to }, 100).collect()
    }

    #[test]
    fn the_boundary_chunk_keeps_its_head_and_those_beyond_nothing() {
        assert_eq!(cuts_of(350, 120), [(1, 20), (2, 0), (3, 0)]);
        assert_eq!(cuts_of(300, 100), [(1, 0), (2, 0)]);
        assert_eq!(cuts_of(99, 98), [(0, 98)]);
        assert_eq!(cuts_of(99, 0), [(0, 0)]);
    }
}
