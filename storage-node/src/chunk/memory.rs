use super::{Change, ChunkError, ChunkStore, ChunkSummary, Contents, Step, Usage, admit, admit_install};
use async_trait::async_trait;
use bytes::Bytes;
use lazarette_types::{ChunkId, ReplicaSetId, Version, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A [`ChunkStore`] in memory, for tests of the layers above: nothing survives its drop.
#[derive(Debug)]
pub struct MemoryChunkStore {
    capacity: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    chunks: BTreeMap<(ReplicaSetId, ChunkId), Stored>,
    used: u64,
}

#[derive(Debug)]
struct Stored {
    version: Version,
    data: Vec<u8>,
    damaged: bool,
}

impl Default for MemoryChunkStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryChunkStore {
    /// An empty store of 1 TiB.
    pub fn new() -> Self {
        Self::with_capacity(1 << 40)
    }

    /// An empty store that takes this many bytes of data.
    pub fn with_capacity(bytes: u64) -> Self {
        Self {
            capacity: bytes,
            state: Mutex::default(),
        }
    }

    /// Damages a chunk: reads fail with [`ChunkError::Corrupt`] until it is installed anew.
    /// Whether there was such a chunk.
    pub fn damage(&self, rs: ReplicaSetId, chunk: ChunkId) -> bool {
        self.lock()
            .chunks
            .get_mut(&(rs, chunk))
            .map(|stored| stored.damaged = true)
            .is_some()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn retain(&self, keep: impl Fn(ReplicaSetId, ChunkId) -> bool) {
        let mut state = self.lock();
        state.chunks.retain(|(rs, chunk), _| keep(*rs, *chunk));
        state.used = state.chunks.values().map(|c| c.data.len() as u64).sum();
    }
}

impl State {
    fn put(&mut self, capacity: u64, key: (ReplicaSetId, ChunkId), stored: Stored) -> Result<(), ChunkError> {
        let old = self.chunks.get(&key).map_or(0, |c| c.data.len() as u64);
        let used = self.used - old + stored.data.len() as u64;
        if used > capacity && used > self.used {
            return Err(ChunkError::NoSpace);
        }
        self.used = used;
        self.chunks.insert(key, stored);
        Ok(())
    }

    fn remove(&mut self, key: (ReplicaSetId, ChunkId)) {
        if let Some(stored) = self.chunks.remove(&key) {
            self.used -= stored.data.len() as u64;
        }
    }
}

#[async_trait]
impl ChunkStore for MemoryChunkStore {
    async fn apply(
        &self,
        rs: ReplicaSetId,
        chunk: ChunkId,
        previous: Version,
        version: Version,
        change: Change,
    ) -> Result<(), ChunkError> {
        let mut state = self.lock();
        let key = (rs, chunk);
        let present = state.chunks.get(&key);
        let at = present.map_or(Version::NONE, |c| c.version);
        let damaged = present.is_some_and(|c| c.damaged);
        if admit(chunk, at, false, previous, version, &change)? == Step::Repeated {
            return Ok(());
        }
        let mut data = present.map(|c| c.data.clone()).unwrap_or_default();
        match change {
            Change::Write(parts) => {
                data.resize(data.len().max(parts.end() as usize), 0);
                for part in parts.iter() {
                    data[part.offset as usize..part.end() as usize].copy_from_slice(&part.data);
                }
            }
            Change::Truncate(length) => data.truncate(length as usize),
            Change::Delete => {
                state.remove(key);
                return Ok(());
            }
        }
        let stored = Stored { version, data, damaged };
        state.put(self.capacity, key, stored)
    }

    async fn read(&self, rs: ReplicaSetId, chunk: ChunkId, offset: u32, length: u32) -> Result<Contents, ChunkError> {
        let state = self.lock();
        let Some(stored) = state.chunks.get(&(rs, chunk)) else {
            return Ok(Contents::new(Version::NONE, Bytes::new()));
        };
        if stored.damaged {
            return Err(ChunkError::Corrupt {
                chunk,
                reason: "damaged by a test".into(),
            });
        }
        let start = (offset as usize).min(stored.data.len());
        let end = (offset as usize).saturating_add(length as usize).min(stored.data.len());
        let data = Bytes::copy_from_slice(&stored.data[start..end]);
        Ok(Contents::new(stored.version, data))
    }

    async fn version(&self, rs: ReplicaSetId, chunk: ChunkId) -> Result<Version, ChunkError> {
        let state = self.lock();
        Ok(state.chunks.get(&(rs, chunk)).map_or(Version::NONE, |c| c.version))
    }

    async fn list(&self, rs: ReplicaSetId) -> Result<Vec<ChunkSummary>, ChunkError> {
        let state = self.lock();
        Ok(state
            .chunks
            .iter()
            .filter(|((of, _), _)| *of == rs)
            .map(|((_, chunk), stored)| ChunkSummary {
                chunk: *chunk,
                version: stored.version,
                length: stored.data.len() as u32,
            })
            .collect())
    }

    async fn install(
        &self,
        rs: ReplicaSetId,
        chunk: ChunkId,
        version: Version,
        data: Bytes,
        crc: u32,
    ) -> Result<(), ChunkError> {
        admit_install(chunk, version, &data, crc)?;
        let mut state = self.lock();
        if version == Version::NONE {
            state.remove((rs, chunk));
            return Ok(());
        }
        let stored = Stored {
            version,
            data: data.to_vec(),
            damaged: false,
        };
        state.put(self.capacity, (rs, chunk), stored)
    }

    async fn drop_volume(&self, volume: VolumeId) -> Result<(), ChunkError> {
        self.retain(|_, chunk| chunk.volume != volume);
        Ok(())
    }

    async fn drop_replica_set(&self, rs: ReplicaSetId) -> Result<(), ChunkError> {
        self.retain(|of, _| of != rs);
        Ok(())
    }

    async fn volumes(&self) -> Result<Vec<VolumeId>, ChunkError> {
        let state = self.lock();
        let ids: BTreeSet<_> = state.chunks.keys().map(|(_, c)| c.volume).collect();
        Ok(ids.into_iter().collect())
    }

    async fn replica_sets(&self) -> Result<Vec<ReplicaSetId>, ChunkError> {
        let state = self.lock();
        let ids: BTreeSet<_> = state.chunks.keys().map(|(rs, _)| *rs).collect();
        Ok(ids.into_iter().collect())
    }

    async fn usage(&self) -> Result<Usage, ChunkError> {
        let used = self.lock().used;
        Ok(Usage {
            capacity: self.capacity,
            used,
            available: self.capacity.saturating_sub(used),
        })
    }

    fn health(&self) -> Result<(), ChunkError> {
        Ok(())
    }
}
