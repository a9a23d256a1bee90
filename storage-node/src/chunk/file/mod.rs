//! The chunk store in files: a write-ahead log in front, one file per chunk behind.
//!
//! - `disk`: the file operations, behind a trait; `simulation` (tests) cuts the power there.
//! - `identity`: whose folder it is.
//! - `log`, `record`: the write-ahead log with group commit, and what is in it.
//! - `format`: the chunk file.
//! - `state`: the index, and the overlay of what only the log has.
//! - `engine`: locks and room, `writing`: changes; `reading`: reads; `checkpoint` folds the log into the files; `recovery` opens.
//! - `check`: the offline check.

mod check;
mod checkpoint;
mod disk;
mod engine;
mod format;
mod identity;
mod log;
mod poison;
mod reading;
mod record;
mod recovery;
mod state;
mod writing;

#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod store_tests;
#[cfg(test)]
mod tests;

pub use check::{CheckError, CheckReport, Problem, check};
pub use identity::{Identity, IdentityError};

use crate::chunk::{Change, ChunkError, ChunkStore, ChunkSummary, Contents, Usage};
use async_trait::async_trait;
use bytes::Bytes;
use disk::{Disk, Mode, RealDisk};
use engine::{Engine, Limits};
use identity::Folder;
use lazarette_types::{ChunkId, NodeId, ReplicaSetId, Version, VolumeId};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// Calls that change something and are under way at the same time: enough to fill the log's
/// frames, each holds a thread while it waits for the disk.
const CHANGES_AT_ONCE: usize = 128;
/// The same for reads.
const READS_AT_ONCE: usize = 32;
/// Bytes of a read that may be copied and verified on the caller's thread.
const READ_HERE: u32 = 64 << 10;
/// How often the log is folded into the files if nothing asks for it earlier.
const FOLD_INTERVAL: Duration = Duration::from_secs(5);
/// A killed process keeps its lock until its last write to the disk has ended.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);

/// Sizes for a disk of this many bytes: small ones must have room for data as well.
fn limits(capacity: u64) -> Limits {
    Limits {
        log: (capacity / 16).clamp(4 << 20, 64 << 20).next_multiple_of(4096),
        direct: 64 << 10,
        headroom: (capacity / 64).clamp(1 << 20, 32 << 20),
    }
}

/// Why a chunk store cannot be opened. The folder is as it was.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The operating system refused.
    #[error("chunk store {}: {source}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Another process has it.
    #[error("chunk store {}: another process uses it; stop that one first", .0.display())]
    Locked(PathBuf),
    /// Not this node's disk.
    #[error("chunk store {}: {source}", path.display())]
    Identity {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        source: IdentityError,
    },
    /// The log cannot be read.
    #[error("chunk store {}: {reason}", path.display())]
    Log {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// Counts since the store was opened, and the present state of its log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Calls that met a damaged chunk.
    pub damaged: u64,
    /// Calls refused because they made no sense or their data did not match its checksum.
    pub refused: u64,
    /// Bytes of the log that recovery would read.
    pub log_bytes: u64,
    /// Bytes that the log has room for.
    pub log_capacity: u64,
}

#[derive(Debug, Default)]
struct Counters {
    damaged: AtomicU64,
    refused: AtomicU64,
}

/// The durable [`ChunkStore`]: a folder on a local disk.
///
/// It works within a tokio runtime, on its blocking threads. A call goes on to its end if its
/// future is dropped. Dropping the store waits for the folding thread, not for such calls.
pub struct FileChunkStore {
    engine: Arc<Engine>,
    identity: Identity,
    changes: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    counters: Counters,
    folding: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for FileChunkStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileChunkStore")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// Opens the folder; waits a little for a process that was killed to let go of it.
fn lock(path: &Path, patience: Duration) -> Result<RealDisk, OpenError> {
    let deadline = Instant::now() + patience;
    loop {
        match RealDisk::open(path) {
            Ok(Some(disk)) => return Ok(disk),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            Ok(None) => return Err(OpenError::Locked(path.to_owned())),
            Err(source) => {
                return Err(OpenError::Io {
                    path: path.to_owned(),
                    source,
                });
            }
        }
    }
}

impl FileChunkStore {
    /// Opens the folder, which must exist, be empty or belong to this cluster and node. Blocks
    /// while it reads every chunk's header and the log, and up to 3 s for another process to let go
    /// of the folder; call it before serving.
    pub fn open(path: &Path, cluster: &str, node: &NodeId) -> Result<Self, OpenError> {
        let disk = Arc::new(lock(path, LOCK_PATIENCE)?);
        let space = disk.space().map_err(|error| PrepareError::Io(error).at(path))?;
        let (identity, engine) = prepare(disk, limits(space.capacity), cluster, node).map_err(|e| e.at(path))?;
        let engine = Arc::new(engine);
        engine.background.store(true, Ordering::Release);
        let folder = Arc::clone(&engine);
        let folding = std::thread::Builder::new()
            .name("chunk-fold".into())
            .spawn(move || {
                let fold = AssertUnwindSafe(|| folder.fold_in_background(FOLD_INTERVAL));
                if catch_unwind(fold).is_err() {
                    folder
                        .poison
                        .set("folding the log", &"a bug, see the log of the process");
                }
            })
            .map_err(|source| OpenError::Io {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self {
            engine,
            identity,
            changes: Arc::new(Semaphore::new(CHANGES_AT_ONCE)),
            reads: Arc::new(Semaphore::new(READS_AT_ONCE)),
            counters: Counters::default(),
            folding: Some(folding),
        })
    }

    /// Whose disk it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Folds the whole log into the files now, as before a planned stop: opening is quicker then.
    pub async fn fold(&self) -> Result<(), ChunkError> {
        self.run(&self.changes, Engine::checkpoint).await
    }

    /// What has happened since the store was opened.
    pub fn stats(&self) -> Stats {
        Stats {
            damaged: self.counters.damaged.load(Ordering::Relaxed),
            refused: self.counters.refused.load(Ordering::Relaxed),
            log_bytes: self.engine.log.used(),
            log_capacity: self.engine.log.area(),
        }
    }

    /// Runs a call to its end on a blocking thread.
    async fn run<T: Send + 'static>(
        &self,
        limit: &Arc<Semaphore>,
        call: impl FnOnce(&Engine) -> Result<T, ChunkError> + Send + 'static,
    ) -> Result<T, ChunkError> {
        let permit = Arc::clone(limit).acquire_owned().await;
        let engine = Arc::clone(&self.engine);
        let done = tokio::task::spawn_blocking(move || {
            let result = call(&engine);
            drop((engine, permit));
            result
        });
        match done.await {
            Ok(result) => {
                match &result {
                    Err(ChunkError::Corrupt { chunk, reason }) => {
                        tracing::error!(%chunk, reason, "a chunk is damaged");
                        self.counters.damaged.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(ChunkError::DamagedInTransit { .. } | ChunkError::InvalidChange { .. }) => {
                        self.counters.refused.fetch_add(1, Ordering::Relaxed);
                    }
                    _ => {}
                }
                result
            }
            // A bug: what the call had done is unknown.
            Err(error) if error.is_panic() => Err(self.engine.poison.set("a call", &error)),
            Err(error) => Err(ChunkError::Io(error.to_string())),
        }
    }
}

impl Drop for FileChunkStore {
    fn drop(&mut self) {
        let mut wake = self.engine.wake.lock().unwrap_or_else(PoisonError::into_inner);
        wake.stop = true;
        drop(wake);
        self.engine.woken.notify_all();
        if let Some(thread) = self.folding.take() {
            let _ = thread.join();
        }
    }
}

/// [`OpenError`] without the path.
#[derive(Debug)]
enum PrepareError {
    Io(io::Error),
    Identity(IdentityError),
    Log(log::LogError),
}

impl From<io::Error> for PrepareError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<IdentityError> for PrepareError {
    fn from(error: IdentityError) -> Self {
        Self::Identity(error)
    }
}

impl From<log::LogError> for PrepareError {
    fn from(error: log::LogError) -> Self {
        match error {
            log::LogError::Io(error) => Self::Io(error),
            error => Self::Log(error),
        }
    }
}

impl PrepareError {
    fn at(self, path: &Path) -> OpenError {
        let path = path.to_owned();
        match self {
            Self::Io(source) => OpenError::Io { path, source },
            Self::Identity(source) => OpenError::Identity { path, source },
            Self::Log(error) => OpenError::Log {
                path,
                reason: error.to_string(),
            },
        }
    }
}

/// Initialises an empty folder, or checks whose it is, and recovers.
fn prepare(
    disk: Arc<dyn Disk>,
    limits: Limits,
    cluster: &str,
    node: &NodeId,
) -> Result<(Identity, Engine), PrepareError> {
    let identity = match identity::inspect(&*disk)? {
        Folder::Ready(identity) => {
            identity::expect(&identity, cluster, node)?;
            identity
        }
        Folder::Empty => {
            let identity = Identity {
                format: format::FORMAT,
                cluster: cluster.to_owned(),
                node: node.clone(),
                disk: format!("{:032x}", rand::random::<u128>()),
            };
            identity::begin(&*disk, &identity)?;
            log::Log::create(&*disk, limits.log, rand::random())?;
            identity::finish(&*disk)?;
            identity
        }
    };
    let engine = recovery::find(&*disk, Mode::Write)?.start(disk, limits)?;
    Ok((identity, engine))
}

#[async_trait]
impl ChunkStore for FileChunkStore {
    async fn apply(
        &self,
        rs: ReplicaSetId,
        chunk: ChunkId,
        previous: Version,
        version: Version,
        change: Change,
    ) -> Result<(), ChunkError> {
        let call = move |engine: &Engine| engine.apply((rs, chunk), previous, version, change);
        self.run(&self.changes, call).await
    }

    async fn read(&self, rs: ReplicaSetId, chunk: ChunkId, offset: u32, length: u32) -> Result<Contents, ChunkError> {
        // A thread for what is in memory would cost more than the read.
        if length <= READ_HERE
            && let Some(contents) = self.engine.read_cached((rs, chunk), offset, length)
        {
            return Ok(contents);
        }
        let call = move |engine: &Engine| engine.read((rs, chunk), offset, length);
        self.run(&self.reads, call).await
    }

    async fn version(&self, rs: ReplicaSetId, chunk: ChunkId) -> Result<Version, ChunkError> {
        self.engine.version((rs, chunk))
    }

    async fn list(&self, rs: ReplicaSetId) -> Result<Vec<ChunkSummary>, ChunkError> {
        self.run(&self.reads, move |engine| engine.list(rs)).await
    }

    async fn install(
        &self,
        rs: ReplicaSetId,
        chunk: ChunkId,
        version: Version,
        data: Bytes,
        crc: u32,
    ) -> Result<(), ChunkError> {
        let call = move |engine: &Engine| engine.install((rs, chunk), version, &data, crc);
        self.run(&self.changes, call).await
    }

    async fn drop_volume(&self, volume: VolumeId) -> Result<(), ChunkError> {
        self.run(&self.changes, move |engine| engine.drop_volume(volume)).await
    }

    async fn drop_replica_set(&self, rs: ReplicaSetId) -> Result<(), ChunkError> {
        self.run(&self.changes, move |engine| engine.drop_replica_set(rs)).await
    }

    async fn volumes(&self) -> Result<Vec<VolumeId>, ChunkError> {
        self.run(&self.reads, Engine::volumes).await
    }

    async fn replica_sets(&self) -> Result<Vec<ReplicaSetId>, ChunkError> {
        self.run(&self.reads, Engine::replica_sets).await
    }

    async fn usage(&self) -> Result<Usage, ChunkError> {
        self.run(&self.reads, Engine::usage).await
    }

    fn health(&self) -> Result<(), ChunkError> {
        self.engine.poison.check()
    }
}
