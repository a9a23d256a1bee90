//! A disk in the simulation. What is not synced when its machine dies is lost, but for the first part of it.

use crate::bugs::Bug;
use crate::conditions::World;
use async_trait::async_trait;
use bytes::Bytes;
use lazarette_node::chunk::{Change, ChunkError, ChunkStore, ChunkSummary, Contents, MemoryChunkStore, Usage};
use lazarette_types::{ChunkId, ReplicaSetId, Version, VolumeId};
use rand::Rng;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

/// How long a sync takes at most, in milliseconds.
const SYNC: u64 = 4;
const SLOW_SYNC: u64 = 1000;
/// What a lying disk has said to be durable is so after this time.
const LIE: Duration = Duration::from_millis(1500);

/// A node's disk: outlives its processes.
pub(crate) struct Disk {
    node: String,
    world: Arc<World>,
    /// What is durable, which is all that can be read.
    durable: MemoryChunkStore,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Not synced yet, in order.
    queue: VecDeque<Pending>,
    syncing: bool,
    failed: bool,
    /// Of a lying disk: what was there before the changes that are not really durable yet.
    undo: VecDeque<(Instant, ReplicaSetId, ChunkId, Contents)>,
}

struct Pending {
    write: Write,
    done: oneshot::Sender<Result<(), ChunkError>>,
}

#[derive(Clone)]
enum Write {
    Apply(ReplicaSetId, ChunkId, Version, Version, Change),
    Install(ReplicaSetId, ChunkId, Version, Bytes, u32),
    DropVolume(VolumeId),
    DropReplicaSet(ReplicaSetId),
}

impl Write {
    /// Whether it needs space.
    fn grows(&self) -> bool {
        match self {
            Self::Apply(_, _, _, _, change) => matches!(change, Change::Write(_)),
            Self::Install(_, _, _, data, _) => !data.is_empty(),
            Self::DropVolume(_) | Self::DropReplicaSet(_) => false,
        }
    }
}

impl Disk {
    pub(crate) fn new(world: &Arc<World>, node: &str) -> Arc<Self> {
        Arc::new(Self {
            node: node.to_owned(),
            world: Arc::clone(world),
            durable: MemoryChunkStore::new(),
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a new process finds.
    pub(crate) fn open(self: &Arc<Self>) -> Arc<dyn ChunkStore> {
        let mut state = self.state();
        *state = State::default();
        drop(state);
        Arc::new(Opened(Arc::clone(self)))
    }

    /// The machine or its process dies. Of what was being synced the first part may be durable.
    pub(crate) async fn crash(&self) {
        let (queue, undo) = {
            let mut state = self.state();
            (std::mem::take(&mut state.queue), std::mem::take(&mut state.undo))
        };
        for (at, set, chunk, before) in undo.into_iter().rev() {
            if at.elapsed() < LIE {
                let _ = self
                    .durable
                    .install(set, chunk, before.version, before.data, before.crc)
                    .await;
            }
        }
        let kept = self.world.rng().random_range(0..=queue.len());
        for pending in queue.into_iter().take(kept) {
            let _ = self.carry_out(&pending.write).await;
        }
    }

    /// A sync fails: nothing works any more until a process opens the disk again.
    pub(crate) async fn fail(&self) {
        self.state().failed = true;
        self.crash().await;
    }

    /// Everything there is, for comparisons.
    pub(crate) fn contents(&self) -> &MemoryChunkStore {
        &self.durable
    }

    async fn carry_out(&self, write: &Write) -> Result<(), ChunkError> {
        if write.grows() && self.world.conditions().full.contains(&self.node) {
            return Err(ChunkError::NoSpace);
        }
        match write.clone() {
            Write::Apply(set, chunk, previous, version, change) => {
                self.durable.apply(set, chunk, previous, version, change).await
            }
            Write::Install(set, chunk, version, data, crc) => {
                self.durable.install(set, chunk, version, data, crc).await
            }
            Write::DropVolume(volume) => self.durable.drop_volume(volume).await,
            Write::DropReplicaSet(set) => self.durable.drop_replica_set(set).await,
        }
    }

    async fn remember(&self, write: &Write) {
        let (Write::Apply(set, chunk, ..) | Write::Install(set, chunk, ..)) = write else {
            return;
        };
        if let Ok(before) = self.durable.fetch(*set, *chunk).await {
            self.state().undo.push_back((Instant::now(), *set, *chunk, before));
        }
    }

    /// Syncs until the queue is empty.
    async fn sync(self: Arc<Self>) {
        loop {
            let batch = self.state().queue.len();
            if batch == 0 {
                self.state().syncing = false;
                return;
            }
            let slow = self.world.conditions().slow.contains(&self.node);
            let time = self.world.some_ms(if slow { SLOW_SYNC } else { SYNC });
            sleep(time).await;
            for _ in 0..batch {
                let Some(pending) = self.state().queue.pop_front() else {
                    break;
                };
                if self.world.bug == Some(Bug::LyingDisks) {
                    self.remember(&pending.write).await;
                }
                let result = self.carry_out(&pending.write).await;
                let _ = pending.done.send(result);
            }
        }
    }

    fn failed(&self) -> ChunkError {
        ChunkError::Poisoned(format!("the disk of {} has failed", self.node))
    }
}

/// The disk, as a process uses it.
struct Opened(Arc<Disk>);

impl Opened {
    async fn write(&self, write: Write) -> Result<(), ChunkError> {
        let disk = &self.0;
        let (done, answer) = oneshot::channel();
        {
            let mut state = disk.state();
            if state.failed {
                return Err(disk.failed());
            }
            state.queue.push_back(Pending { write, done });
            if !state.syncing {
                state.syncing = true;
                tokio::spawn(Arc::clone(disk).sync());
            }
        }
        answer.await.unwrap_or_else(|_| Err(disk.failed()))
    }

    fn read(&self) -> Result<&MemoryChunkStore, ChunkError> {
        if self.0.state().failed {
            return Err(self.0.failed());
        }
        Ok(&self.0.durable)
    }
}

#[async_trait]
impl ChunkStore for Opened {
    async fn apply(
        &self,
        rs: ReplicaSetId,
        chunk: ChunkId,
        previous: Version,
        version: Version,
        change: Change,
    ) -> Result<(), ChunkError> {
        self.write(Write::Apply(rs, chunk, previous, version, change)).await
    }

    async fn read(&self, rs: ReplicaSetId, chunk: ChunkId, offset: u32, length: u32) -> Result<Contents, ChunkError> {
        self.read()?.read(rs, chunk, offset, length).await
    }

    async fn version(&self, rs: ReplicaSetId, chunk: ChunkId) -> Result<Version, ChunkError> {
        self.read()?.version(rs, chunk).await
    }

    async fn list(&self, rs: ReplicaSetId) -> Result<Vec<ChunkSummary>, ChunkError> {
        self.read()?.list(rs).await
    }

    async fn install(
        &self,
        rs: ReplicaSetId,
        chunk: ChunkId,
        version: Version,
        data: Bytes,
        crc: u32,
    ) -> Result<(), ChunkError> {
        self.write(Write::Install(rs, chunk, version, data, crc)).await
    }

    async fn drop_volume(&self, volume: VolumeId) -> Result<(), ChunkError> {
        self.write(Write::DropVolume(volume)).await
    }

    async fn drop_replica_set(&self, rs: ReplicaSetId) -> Result<(), ChunkError> {
        self.write(Write::DropReplicaSet(rs)).await
    }

    async fn volumes(&self) -> Result<Vec<VolumeId>, ChunkError> {
        self.read()?.volumes().await
    }

    async fn replica_sets(&self) -> Result<Vec<ReplicaSetId>, ChunkError> {
        self.read()?.replica_sets().await
    }

    async fn usage(&self) -> Result<Usage, ChunkError> {
        self.read()?.usage().await
    }

    fn health(&self) -> Result<(), ChunkError> {
        self.read().map(drop)
    }
}
