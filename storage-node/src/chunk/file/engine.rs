//! The store's operations, blocking. Every change goes: reserve room in the log, lock the chunk,
//! prepare, append one record, and, once that is durable, make its effects visible.
//!
//! Locks, in the order in which they are taken: a chunk's change lock (held over a whole change),
//! its file lock (while its file is read, written in place or exchanged; never over a sync), the
//! state.

use super::disk::{Disk, DiskFile, Mode, Space, is_full, is_transient};
use super::format::{
    FileId, HEADER_BYTES, Header, Key, STAGING, TRASH, block_offset, block_sum, blocks, chunk_path, parse_volume_dir,
    set_dir, staging_path, volume_dir,
};
use super::log::{Log, Reservation};
use super::poison::Poison;
use super::record::{BLOCK_OVERHEAD, Block, ChangeRecord, RECORD_OVERHEAD, Record, ReplaceRecord};
use super::state::{Entry, State};
use crate::chunk::{BLOCK_SIZE, Change, ChunkError, Step, admit, admit_install};
use bytes::Bytes;
use lazarette_types::{ReplicaSetId, Version, VolumeId};
use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

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
    fn reserve(&self, record: u64) -> Result<Reservation<'_>, ChunkError> {
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

    fn check_space(&self, bytes: u64) -> Result<(), ChunkError> {
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

    fn new_file(&self) -> FileId {
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

    /// Upper bound of the record of a change that brings this many bytes.
    fn record_bound(&self, data: usize) -> u64 {
        let count = data as u64 / u64::from(BLOCK_SIZE) + 2;
        let images = RECORD_OVERHEAD + count * (u64::from(BLOCK_SIZE) + BLOCK_OVERHEAD);
        // A longer one goes to a file, and only its checksums to the log.
        images.min(self.log.max_record())
    }

    pub(super) fn apply(
        &self,
        key: Key,
        previous: Version,
        version: Version,
        change: Change,
    ) -> Result<(), ChunkError> {
        let bytes = match &change {
            Change::Write { data, .. } => data.len(),
            Change::Truncate(_) | Change::Delete => 0,
        };
        let _room = self.reserve(self.record_bound(bytes))?;
        let _change = self.lock_change(key);
        let entry = self.state().entry(key);
        let present = entry.map_or(Version::NONE, |e| e.version);
        let is_damaged = entry.is_some_and(|e| e.is_damaged());
        if admit(key.1, present, is_damaged, previous, version, &change)? == Step::Repeated {
            return Ok(());
        }
        match change {
            Change::Write { offset, data, crc: _ } => self.write(key, entry, version, offset, &data),
            Change::Truncate(length) => self.truncate(key, entry, version, length),
            Change::Delete => self.remove(key, entry),
        }
    }

    fn write(
        &self,
        key: Key,
        entry: Option<Entry>,
        version: Version,
        offset: u32,
        data: &[u8],
    ) -> Result<(), ChunkError> {
        let old = entry.map_or(0, |e| e.length);
        let end = offset + data.len() as u32;
        let length = old.max(end);
        let (first, last) = (offset / BLOCK_SIZE, blocks(end));
        let big = data.len() >= self.limits.direct;
        let count = u64::from(last - first);
        self.check_space((count + 2) * u64::from(BLOCK_SIZE))?;

        let extends = first <= blocks(old) && first + 1 >= blocks(old);
        if let Some(entry) = entry
            && extends
            && (last - first.max(blocks(old))) as usize * BLOCK >= self.limits.direct
            && self.is_extendable(key)
        {
            return self.extend(key, entry, version, offset, data);
        }
        let logged = RECORD_OVERHEAD + count * (u64::from(BLOCK_SIZE) + BLOCK_OVERHEAD);
        if logged > self.log.max_record() || (big && data.len() >= length as usize / 2) {
            if offset == 0 && end == length {
                return self.replace(key, entry, version, data);
            }
            let mut whole = vec![0; length as usize];
            let head = self.read_blocks(key, 0, blocks(offset.min(old)))?;
            let keep = (offset.min(old)) as usize;
            whole[..keep].copy_from_slice(&head[..keep]);
            drop(head);
            if end < old {
                let from = end / BLOCK_SIZE;
                let tail = self.read_blocks(key, from, blocks(old))?;
                let skip = (end % BLOCK_SIZE) as usize;
                let rest = (old - end) as usize;
                whole[end as usize..].copy_from_slice(&tail[skip..skip + rest]);
            }
            whole[offset as usize..end as usize].copy_from_slice(data);
            return self.replace(key, entry, version, &whole);
        }
        let images = self.compose(key, old, offset, data)?;
        let record = Record::Change(ChangeRecord {
            key,
            version,
            length,
            previous_length: old,
            file: entry.map_or_else(|| self.new_file(), |e| e.file),
            fresh: entry.is_none(),
            blocks: (first..last).zip(split(&images)).collect(),
        });
        self.commit(record)
    }

    /// The whole blocks that a write changes, as they will be.
    fn compose(&self, key: Key, old: u32, offset: u32, data: &[u8]) -> Result<Bytes, ChunkError> {
        let end = offset + data.len() as u32;
        let (first, last) = (offset / BLOCK_SIZE, blocks(end));
        let mut images = vec![0; (last - first) as usize * BLOCK];
        let start = first * BLOCK_SIZE;
        if offset > start && start < old {
            images[..BLOCK].copy_from_slice(&self.read_blocks(key, first, first + 1)?);
        }
        let partial_end = !end.is_multiple_of(BLOCK_SIZE) && end < old;
        if partial_end && (last - 1 > first || offset == start) {
            let at = images.len() - BLOCK;
            images[at..].copy_from_slice(&self.read_blocks(key, last - 1, last)?);
        }
        let at = (offset - start) as usize;
        images[at..at + data.len()].copy_from_slice(data);
        Ok(images.into())
    }

    /// Whether the chunk's file durably exists, so that blocks may be put behind the chunk's end.
    fn is_extendable(&self, key: Key) -> bool {
        let state = self.state();
        state.overlay(key).is_none_or(|o| !o.fresh)
    }

    /// Puts the blocks that lie beyond the chunk's present ones into its file, where nobody looks
    /// before the record says so; only the first block, if the chunk ends within it, is logged.
    fn extend(&self, key: Key, entry: Entry, version: Version, offset: u32, data: &[u8]) -> Result<(), ChunkError> {
        let images = self.compose(key, entry.length, offset, data)?;
        let first = offset / BLOCK_SIZE;
        let direct = first.max(blocks(entry.length));
        let list: Vec<_> = (first..)
            .zip(split(&images))
            .map(|(index, block)| match block {
                Block::Image(image) if index >= direct => (index, Block::InFile(block_sum(&image))),
                block => (index, block),
            })
            .collect();
        let doing = "writing a chunk file";
        let file = self
            .disk
            .open(&chunk_path(key, entry.file), Mode::Write)
            .map_err(|error| self.missing(key, doing, &error))?;
        let skip = (direct - first) as usize * BLOCK;
        if let Err(error) = file.write_at(&images[skip..], block_offset(direct)) {
            // Gives the room back; what stays is beyond the chunk's end and counts for nothing.
            let _ = file.set_len(block_offset(blocks(entry.length)));
            return Err(self.failed(doing, &error));
        }
        file.sync()
            .map_err(|error| self.poison.set("syncing a chunk file", &error))?;
        self.commit(Record::Change(ChangeRecord {
            key,
            version,
            length: entry.length.max(offset + data.len() as u32),
            previous_length: entry.length,
            file: entry.file,
            fresh: false,
            blocks: list,
        }))
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

    fn truncate(&self, key: Key, entry: Option<Entry>, version: Version, length: u32) -> Result<(), ChunkError> {
        let old = entry.map_or(0, |e| e.length);
        let length = length.min(old);
        let within = (length % BLOCK_SIZE) as usize;
        let mut list = Vec::new();
        if length < old && within != 0 {
            let index = length / BLOCK_SIZE;
            let mut block = self.read_blocks(key, index, index + 1)?;
            block[within..].fill(0);
            list.push((index, Block::Image(block.into())));
        }
        self.commit(Record::Change(ChangeRecord {
            key,
            version,
            length,
            previous_length: old,
            file: entry.map_or_else(|| self.new_file(), |e| e.file),
            fresh: entry.is_none(),
            blocks: list,
        }))
    }

    fn remove(&self, key: Key, entry: Option<Entry>) -> Result<(), ChunkError> {
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
    fn unlink(&self, key: Key, file: FileId) -> Result<(), ChunkError> {
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
    fn commit(&self, record: Record) -> Result<(), ChunkError> {
        let durable = self.log.append(&record)?;
        self.state().redo(record, durable.lsn);
        Ok(())
    }

    /// Writes a whole chunk into a new file, which then takes the place of the old.
    fn replace(&self, key: Key, old: Option<Entry>, version: Version, data: &[u8]) -> Result<(), ChunkError> {
        let file = self.new_file();
        self.check_space(data.len() as u64 + 3 * u64::from(BLOCK_SIZE))?;
        let staged = staging_path(file);
        if let Err(error) = self.stage(key, &staged, version, data) {
            let _ = self.disk.remove_file(&staged);
            return Err(error);
        }
        let length = data.len() as u32;
        let record = Record::Replace(ReplaceRecord {
            key,
            version,
            length,
            file,
        });
        let durable = match self.log.append(&record) {
            Ok(durable) => durable,
            Err(error) => {
                // After any other failure the record may yet be found in the log.
                if matches!(error, ChunkError::NoSpace) {
                    let _ = self.disk.remove_file(&staged);
                }
                return Err(error);
            }
        };
        let _file = self.lock_file(key);
        self.state().redo(record, durable.lsn);
        self.disk
            .rename(&staged, &chunk_path(key, file))
            .map_err(|error| self.poison.set("renaming a chunk file", &error))?;
        let dir = volume_dir(key.0, key.1.volume);
        self.state().dirty_dirs.insert(dir);
        match old {
            Some(old) => self.unlink(key, old.file),
            None => Ok(()),
        }
    }

    fn stage(&self, key: Key, path: &str, version: Version, data: &[u8]) -> Result<(), ChunkError> {
        let doing = "writing a new chunk file";
        let write = || -> io::Result<Arc<dyn DiskFile>> {
            self.ensure_dir(key)?;
            let file = self.disk.open(path, Mode::Create)?;
            let (whole, rest) = data.as_chunks::<BLOCK>();
            let mut last = [0; BLOCK];
            last[..rest.len()].copy_from_slice(rest);
            let header = Header {
                rs: key.0,
                chunk: key.1,
                version,
                length: data.len() as u32,
            };
            let mut start = Vec::with_capacity(HEADER_BYTES + (whole.len() + 1) * 4);
            header.encode(&mut start);
            for block in whole {
                start.extend_from_slice(&block_sum(block).to_le_bytes());
            }
            if !rest.is_empty() {
                start.extend_from_slice(&block_sum(&last).to_le_bytes());
            }
            file.write_at(&start, 0)?;
            file.write_at(whole.as_flattened(), block_offset(0))?;
            if !rest.is_empty() {
                file.write_at(&last, block_offset(whole.len() as u32))?;
            }
            Ok(file)
        };
        let file = write().map_err(|error| self.failed(doing, &error))?;
        file.sync()
            .and_then(|()| self.disk.sync_dir(STAGING))
            .map_err(|error| self.poison.set("syncing a new chunk file", &error))
    }

    pub(super) fn install(&self, key: Key, version: Version, data: &Bytes, crc: u32) -> Result<(), ChunkError> {
        admit_install(key.1, version, data, crc)?;
        let bound = self.record_bound(data.len());
        let _room = self.reserve(bound)?;
        let _change = self.lock_change(key);
        let old = self.state().entry(key);
        if version == Version::NONE {
            return self.remove(key, old);
        }
        if data.len() >= self.limits.direct || bound == self.log.max_record() {
            return self.replace(key, old, version, data);
        }
        if !data.is_empty() {
            self.check_space(data.len() as u64 + 3 * u64::from(BLOCK_SIZE))?;
        }
        let images = if data.is_empty() {
            Bytes::new()
        } else {
            self.compose(key, 0, 0, data)?
        };
        let record = Record::Change(ChangeRecord {
            key,
            version,
            length: data.len() as u32,
            previous_length: 0,
            file: self.new_file(),
            fresh: true,
            blocks: (0..).zip(split(&images)).collect(),
        });
        let durable = self.log.append(&record)?;
        let _file = self.lock_file(key);
        self.state().redo(record, durable.lsn);
        match old {
            Some(old) => self.unlink(key, old.file),
            None => Ok(()),
        }
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

/// Whole blocks, sharing the memory.
fn split(images: &Bytes) -> impl Iterator<Item = Block> + '_ {
    (0..images.len() / BLOCK).map(|i| Block::Image(images.slice(i * BLOCK..(i + 1) * BLOCK)))
}
