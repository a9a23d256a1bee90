use super::ReplicationError;
use crate::chunk::{Change, ChunkError, ChunkStore, ChunkSummary, Contents, DAMAGED};
use bytes::Bytes;
use lazarette_types::{ChunkId, ReplicaSetId, Version};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use tokio::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard};

/// Changes of chunks in different stripes are independent.
const STRIPES: usize = 128;

/// This node's copy of a replica set, as the primary (perhaps this node itself) sees it.
///
/// Invariant: once [`Member::prepare`] of an epoch has returned, nothing of an older epoch changes
/// the copy any more. So a new primary that has prepared a member may rely on what it lists.
///
/// The promise is not stored: every epoch is in the metadata store before anyone speaks of it, so
/// a restarted member starts from at least what it had promised.
pub(crate) struct Member {
    set: ReplicaSetId,
    chunks: Arc<dyn ChunkStore>,
    /// Held for reading during each request, for writing to raise it.
    promised: RwLock<u64>,
    stripes: Vec<Mutex<()>>,
    hasher: RandomState,
}

impl Member {
    /// The copy of a member that knows of `epoch`.
    pub(crate) fn new(set: ReplicaSetId, chunks: Arc<dyn ChunkStore>, epoch: u64) -> Self {
        Self {
            set,
            chunks,
            promised: RwLock::new(epoch),
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
        }
    }

    /// The replica set.
    pub(crate) fn set(&self) -> ReplicaSetId {
        self.set
    }

    /// Learns of an epoch and waits for all requests that are under way.
    pub(crate) async fn prepare(&self, epoch: u64) -> Result<(), ReplicationError> {
        let mut promise = self.promised.write().await;
        if epoch < *promise {
            return Err(ReplicationError::StaleEpoch {
                set: self.set,
                asked: epoch,
                present: *promise,
            });
        }
        *promise = epoch;
        Ok(())
    }

    /// Makes one change. Returns the version that is present then: the change's, if it was made
    /// now or before, else the one that it does not follow.
    pub(crate) async fn apply(
        &self,
        epoch: u64,
        chunk: ChunkId,
        previous: Version,
        version: Version,
        change: Change,
    ) -> Result<Version, ReplicationError> {
        let _promise = self.enter(epoch).await?;
        let _stripe = self.stripe(chunk).await;
        let after = if change == Change::Delete {
            Version::NONE
        } else {
            version
        };
        match self.chunks.apply(self.set, chunk, previous, version, change).await {
            Ok(()) => Ok(after),
            Err(ChunkError::VersionMismatch { present, .. }) => Ok(present),
            Err(error) => Err(error.into()),
        }
    }

    /// Replaces a chunk if it is at `previous`. Returns the version that is present then.
    pub(crate) async fn install(
        &self,
        epoch: u64,
        chunk: ChunkId,
        previous: Version,
        version: Version,
        data: Bytes,
        crc: u32,
    ) -> Result<Version, ReplicationError> {
        let _promise = self.enter(epoch).await?;
        let _stripe = self.stripe(chunk).await;
        let present = match self.chunks.version(self.set, chunk).await {
            Ok(present) => present,
            Err(ChunkError::Corrupt { .. }) => DAMAGED,
            Err(error) => return Err(error.into()),
        };
        if present != previous {
            return Ok(present);
        }
        self.chunks.install(self.set, chunk, version, data, crc).await?;
        Ok(version)
    }

    /// All chunks.
    pub(crate) async fn list(&self, epoch: u64) -> Result<Vec<ChunkSummary>, ReplicationError> {
        let _promise = self.enter(epoch).await?;
        Ok(self.chunks.list(self.set).await?)
    }

    /// A whole chunk.
    pub(crate) async fn fetch(&self, epoch: u64, chunk: ChunkId) -> Result<Contents, ReplicationError> {
        let _promise = self.enter(epoch).await?;
        Ok(self.chunks.fetch(self.set, chunk).await?)
    }

    /// Drops the whole copy if nobody needs it, which `unneeded` finds out while no request is under
    /// way and none begins: so whoever counts on this copy again has looked at it after the drop.
    /// Whether it was dropped.
    pub(crate) async fn drop_if<E: From<ChunkError>>(
        &self,
        unneeded: impl Future<Output = Result<bool, E>>,
    ) -> Result<bool, E> {
        let _promise = self.promised.write().await;
        let unneeded = unneeded.await?;
        if unneeded {
            self.chunks.drop_replica_set(self.set).await?;
        }
        Ok(unneeded)
    }

    async fn enter(&self, epoch: u64) -> Result<RwLockReadGuard<'_, u64>, ReplicationError> {
        loop {
            let promise = self.promised.read().await;
            if epoch == *promise {
                return Ok(promise);
            }
            if epoch < *promise {
                return Err(ReplicationError::StaleEpoch {
                    set: self.set,
                    asked: epoch,
                    present: *promise,
                });
            }
            drop(promise);
            let mut promise = self.promised.write().await;
            *promise = epoch.max(*promise);
        }
    }

    async fn stripe(&self, chunk: ChunkId) -> MutexGuard<'_, ()> {
        let hash = self.hasher.hash_one(chunk) as usize;
        self.stripes[hash % STRIPES].lock().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::{MemoryChunkStore, crc32c};
    use lazarette_types::{InodeId, VolumeId};

    const CHUNK: ChunkId = ChunkId {
        volume: VolumeId(1),
        ino: InodeId(2),
        index: 0,
    };

    fn v(epoch: u64, sequence: u64) -> Version {
        Version { epoch, sequence }
    }

    fn write(data: &'static [u8]) -> Change {
        Change::write([(0, data)])
    }

    fn member() -> Member {
        Member::new(ReplicaSetId(1), Arc::new(MemoryChunkStore::new()), 3)
    }

    #[tokio::test]
    async fn older_epochs_are_refused_after_a_newer_one() {
        let member = member();
        assert!(
            member
                .apply(3, CHUNK, Version::NONE, v(3, 1), write(b"a"))
                .await
                .is_ok()
        );
        member.prepare(4).await.unwrap();
        let error = member.apply(3, CHUNK, v(3, 1), v(3, 2), write(b"b")).await.unwrap_err();
        assert!(matches!(error, ReplicationError::StaleEpoch { present: 4, .. }));
        assert!(member.fetch(3, CHUNK).await.is_err());
        // Any request of a newer epoch is a promise.
        assert!(member.list(5).await.is_ok());
        assert!(member.list(4).await.is_err());
    }

    #[tokio::test]
    async fn changes_tell_the_version_that_they_do_not_follow() {
        let member = member();
        let one = member.apply(3, CHUNK, Version::NONE, v(3, 1), write(b"a")).await;
        assert_eq!(one.unwrap(), v(3, 1));
        let gap = member.apply(3, CHUNK, v(3, 2), v(3, 3), write(b"c")).await;
        assert_eq!(gap.unwrap(), v(3, 1));
        let again = member.apply(3, CHUNK, Version::NONE, v(3, 1), write(b"a")).await;
        assert_eq!(again.unwrap(), v(3, 1));
        let gone = member.apply(3, CHUNK, v(3, 1), v(3, 4), Change::Delete).await;
        assert_eq!(gone.unwrap(), Version::NONE);
    }

    #[tokio::test]
    async fn a_delayed_install_does_not_undo_later_changes() {
        let member = member();
        let data = Bytes::from_static(b"old");
        let install = |previous| member.install(3, CHUNK, previous, v(3, 1), data.clone(), crc32c(&data));
        assert_eq!(install(Version::NONE).await.unwrap(), v(3, 1));
        member.apply(3, CHUNK, v(3, 1), v(3, 2), write(b"new")).await.unwrap();
        assert_eq!(install(Version::NONE).await.unwrap(), v(3, 2));
        assert_eq!(&member.fetch(3, CHUNK).await.unwrap().data[..], b"new");
    }
}
