//! The store's operations, blocking. Every change goes: reserve room in the log, lock the chunk,
//! prepare, append one record, and, once that is durable, make its effects visible.
//!
//! Locks, in the order in which they are taken: a chunk's change lock (held over a whole change),
//! its file lock (while its file is read, written in place or exchanged; never over a sync), the
//! state.

use super::disk::{Disk, Space, is_full, is_transient};
use super::format::{FileId, Key, TRASH, chunk_path, parse_volume_dir, set_dir, volume_dir};
use super::log::{Log, Reservation};
use super::poison::Poison;
use super::record::{RECORD_OVERHEAD, Record};
use super::state::{Entry, State};
use super::writing::{record_bytes, touched};
use crate::chunk::{BLOCK_SIZE, Change, ChunkError, Step, admit};
use lazarette_types::{ReplicaSetId, Version, VolumeId};
use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError,
};

pub(super) const BLOCK: usize = BLOCK_SIZE as usize;
const CHANGE_LOCKS: usize = 1024;
const FILE_LOCKS: usize = 256;

/// Sizes that tests make small.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes of the log, a multiple of 4096.
    pub(super) log: u64,
    /// Writes of at least this many bytes may go to the chunk file first.
    pub(super) direct: usize,
    /// Bytes of the disk that data never takes, so that folding the log never runs full.
    pub(super) headroom: u64,
}

/// Wakes the thread that folds the log into the files.
#[derive(Debug, Default)]
pub(super) struct Wake {
    pub(super) wanted: bool,
    pub(super) stop: bool,
}

pub(super) struct Engine {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) log: Log,
    pub(super) limits: Limits,
    pub(super) poison: Poison,
    pub(super) next_file: AtomicU64,
    /// The last checkpoint found the disk full.
    pub(super) full: AtomicBool,
    /// Whether a thread folds the log; otherwise whoever finds it full does.
    pub(super) background: AtomicBool,
    pub(super) wake: Mutex<Wake>,
    /// `wake` has changed, or a checkpoint has ended.
    pub(super) woken: Condvar,
    pub(super) checkpointing: Mutex<()>,
    state: Mutex<State>,
    changes: Vec<Mutex<()>>,
    files: Vec<RwLock<()>>,
    hasher: RandomState,
}

impl Engine {
    pub(super) fn new(
        disk: Arc<dyn Disk>,
        log: Log,
        limits: Limits,
        poison: Poison,
        state: State,
        next_file: FileId,
    ) -> Self {
        Self {
            disk,
            log,
            limits,
            poison,
            next_file: AtomicU64::new(next_file),
            full: AtomicBool::new(false),
            background: AtomicBool::new(false),
            wake: Mutex::default(),
            woken: Condvar::new(),
            checkpointing: Mutex::new(()),
            state: Mutex::new(state),
            changes: (0..CHANGE_LOCKS).map(|_| Mutex::new(())).collect(),
            files: (0..FILE_LOCKS).map(|_| RwLock::new(())).collect(),
            hasher: RandomState::new(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_change(&self, key: Key) -> MutexGuard<'_, ()> {
        let lock = &self.changes[self.hasher.hash_one(key) as usize % CHANGE_LOCKS];
        lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file_lock(&self, key: Key) -> &RwLock<()> {
        &self.files[self.hasher.hash_one(key) as usize % FILE_LOCKS]
    }

    pub(super) fn share_file(&self, key: Key) -> RwLockReadGuard<'_, ()> {
        let lock = self.file_lock(key).read();
        lock.unwrap_or_else(PoisonError::into_inner)
    }

    /// The same, unless it would wait.
    pub(super) fn try_share_file(&self, key: Key) -> Option<RwLockReadGuard<'_, ()>> {
        match self.file_lock(key).try_read() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    pub(super) fn lock_file(&self, key: Key) -> RwLockWriteGuard<'_, ()> {
        let lock = self.file_lock(key).write();
        lock.unwrap_or_else(PoisonError::into_inner)
    }

    /// The error of a file operation other than a sync: one that may pass leaves everything as
    /// before, any other means that the disk is failing.
    pub(super) fn failed(&self, doing: &str, error: &io::Error) -> ChunkError {
        if is_full(error) {
            ChunkError::NoSpace
        } else if is_transient(error) {
            ChunkError::Io(format!("{doing}: {error}"))
        } else {
            self.poison.set(doing, error)
        }
    }

    /// Waits for room in the log.
    pub(super) fn reserve(&self, record: u64) -> Result<Reservation<'_>, ChunkError> {
        loop {
            self.poison.check()?;
            if let Some(reservation) = self.log.reserve(record) {
                if self.wants_checkpoint() {
                    self.ask_for_checkpoint();
                }
                return Ok(reservation);
            }
            if !self.background.load(Ordering::Acquire) {
                self.checkpoint()?;
                continue;
            }
            if self.full.load(Ordering::Acquire) {
                self.ask_for_checkpoint();
                return Err(ChunkError::NoSpace);
            }
            self.ask_for_checkpoint();
            let wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
            // The time-out only bounds how long a wake-up that came too early costs.
            let timeout = std::time::Duration::from_millis(20);
            drop(self.woken.wait_timeout(wake, timeout));
        }
    }

    /// Whether so much of the log is used that folding it should not wait.
    pub(super) fn wants_checkpoint(&self) -> bool {
        self.log.used() > self.log.area() / 4
    }

    fn ask_for_checkpoint(&self) {
        let mut wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
        if !wake.wanted {
            wake.wanted = true;
            self.woken.notify_all();
        }
    }

    pub(super) fn check_space(&self, bytes: u64) -> Result<(), ChunkError> {
        let space = self.space()?;
        let taken = self.state().overlay_cost() + self.limits.headroom;
        if self.full.load(Ordering::Acquire) {
            // Once there is space again, only a checkpoint finds out.
            self.ask_for_checkpoint();
            return Err(ChunkError::NoSpace);
        }
        if space.available < taken + bytes {
            return Err(ChunkError::NoSpace);
        }
        Ok(())
    }

    pub(super) fn space(&self) -> Result<Space, ChunkError> {
        let space = self.disk.space();
        space.map_err(|error| ChunkError::Io(format!("space on the disk: {error}")))
    }

    pub(super) fn new_file(&self) -> FileId {
        self.next_file.fetch_add(1, Ordering::Relaxed)
    }

    /// Makes the folder of a chunk file. The caller has the chunk's change lock.
    pub(super) fn ensure_dir(&self, (rs, chunk): Key) -> io::Result<()> {
        let dir = volume_dir(rs, chunk.volume);
        if !self.state().known_dirs.contains(&dir) {
            self.disk.create_dir(&dir)?;
            let mut state = self.state();
            state.dirty_dirs.insert(super::format::CHUNKS.to_owned());
            state.dirty_dirs.insert(set_dir(rs));
            state.dirty_dirs.insert(dir.clone());
            state.known_dirs.insert(dir);
        }
        Ok(())
    }

    pub(super) fn apply(
        &self,
        key: Key,
        previous: Version,
        version: Version,
        change: Change,
    ) -> Result<(), ChunkError> {
        let blocks = match &change {
            Change::Write(parts) => touched(parts),
            Change::Truncate(_) | Change::Delete => 1,
        };
        // What makes a longer record goes to a file, and only its checksums to the log.
        let _room = self.reserve(record_bytes(blocks).min(self.log.max_record()))?;
        let _change = self.lock_change(key);
        let entry = self.state().entry(key);
        let present = entry.map_or(Version::NONE, |e| e.version);
        let is_damaged = entry.is_some_and(|e| e.is_damaged());
        if admit(key.1, present, is_damaged, previous, version, &change)? == Step::Repeated {
            return Ok(());
        }
        match change {
            Change::Write(parts) => self.write(key, entry, version, &parts),
            Change::Truncate(length) => self.truncate(key, entry, version, length),
            Change::Delete => self.remove(key, entry),
        }
    }

    pub(super) fn missing(&self, key: Key, doing: &str, error: &io::Error) -> ChunkError {
        if error.kind() == io::ErrorKind::NotFound {
            ChunkError::Corrupt {
                chunk: key.1,
                reason: "its file is missing".into(),
            }
        } else {
            self.failed(doing, error)
        }
    }

    pub(super) fn remove(&self, key: Key, entry: Option<Entry>) -> Result<(), ChunkError> {
        let Some(entry) = entry else {
            return Ok(());
        };
        let record = Record::Remove {
            key,
            below: entry.file + 1,
        };
        let durable = self.log.append(&record)?;
        let _file = self.lock_file(key);
        self.state().redo(record, durable.lsn);
        self.unlink(key, entry.file)
    }

    /// Removes a chunk's former file.
    pub(super) fn unlink(&self, key: Key, file: FileId) -> Result<(), ChunkError> {
        match self.disk.remove_file(&chunk_path(key, file)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(self.poison.set("removing a chunk file", &error));
            }
            _ => {}
        }
        let dir = volume_dir(key.0, key.1.volume);
        self.state().dirty_dirs.insert(dir);
        Ok(())
    }

    /// Logs a change of a chunk and makes it visible.
    pub(super) fn commit(&self, record: Record) -> Result<(), ChunkError> {
        let durable = self.log.append(&record)?;
        self.state().redo(record, durable.lsn);
        Ok(())
    }

    pub(super) fn drop_volume(&self, volume: VolumeId) -> Result<(), ChunkError> {
        self.drop_where(
            |below| Record::DropVolume { volume, below },
            |rs, set_volume| (set_volume == volume).then(|| volume_dir(rs, volume)),
        )
    }

    pub(super) fn drop_replica_set(&self, rs: ReplicaSetId) -> Result<(), ChunkError> {
        self.drop_where(
            |below| Record::DropReplicaSet { rs, below },
            |of, _| (of == rs).then(|| set_dir(rs)),
        )
    }

    /// Removes many chunks with one record: their folders go to the trash at once and are emptied
    /// after the locks are given back.
    fn drop_where(
        &self,
        record: impl FnOnce(FileId) -> Record,
        folder: impl Fn(ReplicaSetId, VolumeId) -> Option<String>,
    ) -> Result<(), ChunkError> {
        let room = self.reserve(RECORD_OVERHEAD)?;
        let lock = |lock| Mutex::lock(lock).unwrap_or_else(PoisonError::into_inner);
        let changes: Vec<_> = self.changes.iter().map(lock).collect();
        let folders: BTreeSet<String> = {
            let state = self.state();
            let chunks = state
                .sets()
                .flat_map(|(rs, set)| set.keys().map(move |chunk| (rs, chunk.volume)));
            // Folders of chunks that were all deleted, too.
            let known = state.known_dirs.iter().filter_map(|dir| parse_volume_dir(dir));
            chunks.chain(known).filter_map(|(rs, v)| folder(rs, v)).collect()
        };
        if folders.is_empty() {
            return Ok(());
        }
        let record = record(self.new_file());
        let durable = self.log.append(&record)?;
        let exclude = |lock| RwLock::write(lock).unwrap_or_else(PoisonError::into_inner);
        let files: Vec<_> = self.files.iter().map(exclude).collect();
        self.state().redo(record, durable.lsn);
        let mut trash = Vec::new();
        for folder in &folders {
            let place = format!("{TRASH}/{:016x}", self.new_file());
            match self.disk.rename(folder, &place) {
                Ok(()) => trash.push(place),
                // All of its chunks were in the log only.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(self.poison.set("moving to the trash", &error)),
            }
        }
        {
            let mut state = self.state();
            for folder in &folders {
                state.known_dirs.retain(|dir| !dir.starts_with(folder.as_str()));
                if let Some((parent, _)) = folder.rsplit_once('/') {
                    state.dirty_dirs.insert(parent.to_owned());
                }
            }
        }
        drop((durable, files, changes, room));
        for place in trash {
            // What stays is removed when the store is opened next.
            if let Err(error) = self.disk.remove_dir_all(&place) {
                tracing::warn!(%place, %error, "the trash cannot be emptied");
            }
        }
        Ok(())
    }
}
