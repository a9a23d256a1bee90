//! The offline check of a store (`fsck`): reads everything, changes nothing.

use super::disk::{Disk, DiskFile, Mode, Name, Space};
use super::engine::{Engine, Limits};
use super::format::{FileId, Key, chunk_path, staging_path};
use super::identity::{self, Folder, Identity, IdentityError};
use super::log::LogError;
use super::recovery::{Found, find};
use super::{OpenError, lock};
use crate::chunk::{ChunkError, MAX_CHUNK_LENGTH};
use lazarette_types::{ChunkId, ReplicaSetId};
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Why a store could not be checked at all.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It cannot be opened, or another process has it.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The folder is empty.
    #[error("chunk store {0}: the folder is empty")]
    Empty(String),
}

/// Something wrong with a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// A chunk's header or data is damaged; its copy on another node is the remedy.
    Damaged {
        /// Which replica set.
        rs: ReplicaSetId,
        /// Which chunk.
        chunk: ChunkId,
        /// What was found.
        reason: String,
    },
    /// The log is damaged: what it held is lost.
    Log(String),
    /// A file that the store did not make; it is left alone.
    Unknown(String),
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Damaged { rs, chunk, reason } => {
                write!(f, "replica set {rs}: chunk {chunk} is damaged: {reason}")
            }
            Self::Log(reason) => f.write_str(reason),
            Self::Unknown(path) => write!(f, "{path} is not a file of the chunk store"),
        }
    }
}

/// What the check found.
#[derive(Clone, Debug)]
pub struct CheckReport {
    /// Whose store it is.
    pub identity: Identity,
    /// Chunks, damaged ones too.
    pub chunks: u64,
    /// Bytes of the chunks that are whole.
    pub bytes: u64,
    /// Records in the log.
    pub log_records: u64,
    /// Files that the next start removes: left over from an interrupted change.
    pub leftovers: u64,
    /// What is wrong; empty if all is well.
    pub problems: Vec<Problem>,
}

/// Verifies every byte of the store in a folder against its checksums. Nothing may use the store
/// meanwhile. Blocks.
pub fn check(path: &Path) -> Result<CheckReport, CheckError> {
    let disk = Arc::new(lock(path, Duration::ZERO)?);
    check_disk(disk).map_err(|error| match error {
        Refused::Empty => CheckError::Empty(path.display().to_string()),
        Refused::Io(source) => CheckError::Open(OpenError::Io {
            path: path.to_owned(),
            source,
        }),
        Refused::Identity(source) => CheckError::Open(OpenError::Identity {
            path: path.to_owned(),
            source,
        }),
    })
}

#[derive(Debug)]
pub(super) enum Refused {
    Empty,
    Io(io::Error),
    Identity(IdentityError),
}

pub(super) fn check_disk(disk: Arc<dyn Disk>) -> Result<CheckReport, Refused> {
    let identity = match identity::inspect(&*disk).map_err(Refused::Identity)? {
        Folder::Ready(identity) => identity,
        Folder::Empty => return Err(Refused::Empty),
    };
    let mut report = CheckReport {
        identity,
        chunks: 0,
        bytes: 0,
        log_records: 0,
        leftovers: 0,
        problems: Vec::new(),
    };
    match find(&*disk, Mode::Read) {
        Ok(found) => verify(disk, found, &mut report),
        Err(LogError::Io(error)) => return Err(Refused::Io(error)),
        Err(error) => report.problems.push(Problem::Log(error.to_string())),
    }
    Ok(report)
}

fn verify(disk: Arc<dyn Disk>, found: Found, report: &mut CheckReport) {
    report.log_records = found.records as u64;
    report.leftovers = found.garbage.len() as u64;
    for path in &found.unknown {
        report.problems.push(Problem::Unknown(path.clone()));
    }
    for (key, _, reason) in &found.damaged {
        report.problems.push(damaged(*key, reason.clone()));
    }
    let keys: Vec<Key> = {
        let sets = found.state.sets();
        let keys = sets.flat_map(|(rs, set)| set.iter().map(move |(c, e)| ((rs, *c), e)));
        report.chunks = 0;
        keys.inspect(|_| report.chunks += 1)
            .filter(|(_, entry)| !entry.is_damaged())
            .map(|(key, _)| key)
            .collect()
    };
    let limits = Limits {
        log: 0,
        direct: 0,
        headroom: 0,
    };
    let engine = found.read_only(disk, limits);
    for key in keys {
        match engine.read(key, 0, MAX_CHUNK_LENGTH) {
            Ok(contents) => report.bytes += contents.data.len() as u64,
            Err(ChunkError::Corrupt { reason, .. }) => report.problems.push(damaged(key, reason)),
            Err(error) => report.problems.push(damaged(key, error.to_string())),
        }
    }
}

fn damaged((rs, chunk): Key, reason: String) -> Problem {
    Problem::Damaged { rs, chunk, reason }
}

impl Found {
    /// An engine that only reads, on the folder as it is.
    fn read_only(self, disk: Arc<dyn Disk>, limits: Limits) -> Engine {
        let moved = |(key, file): &(Key, FileId)| (chunk_path(*key, *file), staging_path(*file));
        let staged = self.staged.iter().map(moved).collect();
        Engine::new(
            Arc::new(Unchanged { disk, staged }),
            self.log,
            limits,
            self.poison,
            self.state,
            0,
        )
    }
}

/// A disk that is only read, on which files that the next start would move seem to be moved.
struct Unchanged {
    disk: Arc<dyn Disk>,
    staged: HashMap<String, String>,
}

fn read_only() -> io::Error {
    io::Error::from(io::ErrorKind::ReadOnlyFilesystem)
}

impl Disk for Unchanged {
    fn list(&self, path: &str) -> io::Result<Vec<Name>> {
        self.disk.list(path)
    }

    fn open(&self, path: &str, mode: Mode) -> io::Result<Arc<dyn DiskFile>> {
        if mode != Mode::Read {
            return Err(read_only());
        }
        let path = self.staged.get(path).map_or(path, String::as_str);
        self.disk.open(path, mode)
    }

    fn space(&self) -> io::Result<Space> {
        self.disk.space()
    }

    fn create_dir(&self, _path: &str) -> io::Result<()> {
        Err(read_only())
    }

    fn rename(&self, _from: &str, _to: &str) -> io::Result<()> {
        Err(read_only())
    }

    fn remove_file(&self, _path: &str) -> io::Result<()> {
        Err(read_only())
    }

    fn remove_dir_all(&self, _path: &str) -> io::Result<()> {
        Err(read_only())
    }

    fn sync_dir(&self, _path: &str) -> io::Result<()> {
        Err(read_only())
    }
}
