//! Opening a store: the index from the chunk files' headers, then the log on top.

use super::disk::{Disk, Mode, Name};
use super::engine::{Engine, Limits};
use super::format::{
    CHUNKS, FileId, HEADER_BYTES, Header, Key, STAGING, TRASH, chunk_path, parse_chunk_name, parse_hex, staging_path,
    volume_dir,
};
use super::log::{Log, LogError, Recovered};
use super::poison::Poison;
use super::record::Record;
use super::state::{Entry, State};
use crate::chunk::DAMAGED;
use lazarette_types::{ChunkId, ReplicaSetId, VolumeId};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::sync::Arc;

/// Threads that read headers: enough to keep a disk's queue busy.
const READERS: usize = 8;

/// What a store's folder holds, before anything in it is changed.
pub(super) struct Found {
    pub(super) state: State,
    pub(super) log: Log,
    pub(super) poison: Poison,
    next_file: FileId,
    /// Records of the log.
    pub(super) records: usize,
    /// Chunks whose records were in the log: what their headers say does not count.
    pub(super) touched: HashSet<Key>,
    /// Current files that are still in the staging folder.
    pub(super) staged: Vec<(Key, FileId)>,
    /// Paths that nothing refers to.
    pub(super) garbage: Vec<String>,
    /// Paths that no store made.
    pub(super) unknown: Vec<String>,
    /// Damaged chunks.
    pub(super) damaged: Vec<(Key, FileId, String)>,
}

/// Files by chunk, and what else there is.
#[derive(Default)]
struct Scan {
    files: HashMap<Key, Vec<FileId>>,
    dirs: HashSet<String>,
    staged: HashSet<FileId>,
    unknown: Vec<String>,
}

fn list(disk: &dyn Disk, path: &str) -> io::Result<Vec<Name>> {
    match disk.list(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    }
}

fn scan(disk: &dyn Disk) -> io::Result<Scan> {
    let mut scan = Scan::default();
    for set in list(disk, CHUNKS)? {
        let path = format!("{CHUNKS}/{}", set.name);
        let id = parse_hex(&set.name, 8).and_then(|id| u32::try_from(id).ok());
        let (true, Some(id)) = (set.is_dir, id) else {
            scan.unknown.push(path);
            continue;
        };
        let rs = ReplicaSetId(id);
        scan.dirs.insert(path.clone());
        for volume in list(disk, &path)? {
            let path = format!("{path}/{}", volume.name);
            let (true, Some(id)) = (volume.is_dir, parse_hex(&volume.name, 16)) else {
                scan.unknown.push(path);
                continue;
            };
            scan.volume(disk, rs, VolumeId(id))?;
        }
    }
    for name in list(disk, STAGING)? {
        match parse_hex(&name.name, 16) {
            Some(file) if !name.is_dir => {
                scan.staged.insert(file);
            }
            _ => scan.unknown.push(format!("{STAGING}/{}", name.name)),
        }
    }
    Ok(scan)
}

impl Scan {
    fn volume(&mut self, disk: &dyn Disk, rs: ReplicaSetId, volume: VolumeId) -> io::Result<()> {
        let path = volume_dir(rs, volume);
        for name in list(disk, &path)? {
            match parse_chunk_name(&name.name) {
                Some((ino, index, file)) if !name.is_dir => {
                    let chunk = ChunkId { volume, ino, index };
                    self.files.entry((rs, chunk)).or_default().push(file);
                }
                _ => self.unknown.push(format!("{path}/{}", name.name)),
            }
        }
        self.dirs.insert(path);
        Ok(())
    }
}

/// Reads the folder; `mode` is how the log is opened.
pub(super) fn find(disk: &dyn Disk, mode: Mode) -> Result<Found, LogError> {
    let poison = Poison::default();
    let (log, Recovered { records, next_file }) = Log::open(disk, mode, poison.clone())?;
    let scan = scan(disk)?;
    let mut found = Found {
        state: State::default(),
        log,
        poison,
        next_file,
        records: records.len(),
        touched: HashSet::new(),
        staged: Vec::new(),
        garbage: Vec::new(),
        unknown: scan.unknown,
        damaged: Vec::new(),
    };
    let mut files = scan.files;
    for (lsn, record) in records {
        found.next_file = found.next_file.max(record.file() + 1);
        found.touch(&record, &mut files);
        found.state.redo(record, lsn);
    }
    for file in scan.staged.iter().chain(files.values().flatten()) {
        found.next_file = found.next_file.max(file + 1);
    }
    found.settle(disk, &scan.staged, files);
    found.state.known_dirs = scan.dirs;
    Ok(found)
}

impl Found {
    /// Notes which chunks a record is about, and the files that it makes garbage.
    fn touch(&mut self, record: &Record, files: &mut HashMap<Key, Vec<FileId>>) {
        let mut supersede = |key: Key, list: &mut Vec<FileId>, below: FileId| {
            list.retain(|file| {
                if *file < below {
                    self.garbage.push(chunk_path(key, *file));
                }
                *file >= below
            });
        };
        match record {
            Record::Change(change) => {
                if change.fresh
                    && let Some(list) = files.get_mut(&change.key)
                {
                    supersede(change.key, list, change.file);
                }
                self.touched.insert(change.key);
            }
            Record::Replace(replace) => {
                if let Some(list) = files.get_mut(&replace.key) {
                    supersede(replace.key, list, replace.file);
                }
                self.touched.insert(replace.key);
            }
            Record::Remove { key, below } => {
                if let Some(list) = files.get_mut(key) {
                    supersede(*key, list, *below);
                }
                self.touched.insert(*key);
            }
            Record::DropVolume { volume, below } => {
                for (key, list) in files.iter_mut().filter(|(k, _)| k.1.volume == *volume) {
                    supersede(*key, list, *below);
                }
            }
            Record::DropReplicaSet { rs, below } => {
                for (key, list) in files.iter_mut().filter(|(k, _)| k.0 == *rs) {
                    supersede(*key, list, *below);
                }
            }
        }
    }

    /// Decides which file each chunk has.
    fn settle(&mut self, disk: &dyn Disk, staged: &HashSet<FileId>, files: HashMap<Key, Vec<FileId>>) {
        let mut wanted = HashSet::new();
        for key in self.touched.clone() {
            let list = files.get(&key).map_or(&[][..], Vec::as_slice);
            let Some(entry) = self.state.entry(key) else {
                // Removed. A file that outlived it can only be of a later life, of which there
                // would be a record.
                self.garbage.extend(list.iter().map(|file| chunk_path(key, *file)));
                continue;
            };
            for file in list.iter().filter(|file| **file != entry.file) {
                self.garbage.push(chunk_path(key, *file));
            }
            if list.contains(&entry.file) {
                continue;
            }
            if staged.contains(&entry.file) {
                wanted.insert(entry.file);
                self.staged.push((key, entry.file));
            } else if self.state.overlay(key).is_none_or(|o| !o.fresh) {
                self.damage(key, entry.file, "its file is missing".into());
            }
        }
        for file in staged.difference(&wanted) {
            self.garbage.push(staging_path(*file));
        }
        let mut untouched: Vec<(Key, FileId)> = Vec::new();
        for (key, list) in files {
            if self.touched.contains(&key) {
                continue;
            }
            // Files get their final names once they are valid, so the newest counts.
            let Some(newest) = list.iter().copied().max() else {
                continue;
            };
            for file in list.into_iter().filter(|file| *file != newest) {
                self.garbage.push(chunk_path(key, file));
            }
            untouched.push((key, newest));
        }
        for (key, file, header) in read_headers(disk, &untouched) {
            match header {
                Ok(header) => {
                    let entry = Entry {
                        version: header.version,
                        file,
                        length: header.length,
                    };
                    self.state.set(key, entry);
                }
                Err(reason) => self.damage(key, file, reason),
            }
        }
    }

    fn damage(&mut self, key: Key, file: FileId, reason: String) {
        tracing::error!(chunk = %key.1, replica_set = key.0.0, %reason, "a chunk is damaged");
        let entry = Entry {
            version: DAMAGED,
            file,
            length: 0,
        };
        self.state.damaged(key, entry);
        self.damaged.push((key, file, reason));
    }

    /// Brings the folder in order and starts an engine on it.
    pub(super) fn start(self, disk: Arc<dyn Disk>, limits: Limits) -> io::Result<Engine> {
        for path in &self.unknown {
            tracing::warn!(%path, "not a file of the chunk store; left alone");
        }
        let mut dirs = BTreeSet::new();
        let mut note = |path: &str| {
            if let Some((dir, _)) = path.rsplit_once('/') {
                dirs.insert(dir.to_owned());
            }
        };
        for path in [CHUNKS, STAGING, TRASH] {
            disk.create_dir(path)?;
        }
        for (key, file) in &self.staged {
            let path = chunk_path(*key, *file);
            disk.create_dir(&volume_dir(key.0, key.1.volume))?;
            note(&volume_dir(key.0, key.1.volume));
            note(&super::format::set_dir(key.0));
            disk.rename(&staging_path(*file), &path)?;
            note(&path);
        }
        for path in &self.garbage {
            disk.remove_file(path)?;
            note(path);
        }
        for name in list(&*disk, TRASH)? {
            disk.remove_dir_all(&format!("{TRASH}/{}", name.name))?;
        }
        let mut state = self.state;
        state.dirty_dirs.extend(dirs);
        if self.records > 0 {
            // The process before this one may have renamed and removed files without a sync.
            let known: Vec<_> = state.known_dirs.iter().cloned().collect();
            state.dirty_dirs.extend(known);
            state.dirty_dirs.extend([CHUNKS, STAGING].map(str::to_owned));
        }
        Ok(Engine::new(disk, self.log, limits, self.poison, state, self.next_file))
    }
}

fn read_header(disk: &dyn Disk, key: Key, file: FileId) -> Result<Header, String> {
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; HEADER_BYTES];
        let file = disk.open(&chunk_path(key, file), Mode::Read)?;
        let length = file.read_at(&mut bytes, 0)?;
        bytes.truncate(length);
        Ok(bytes)
    };
    let bytes = read().map_err(|error| format!("its header cannot be read: {error}"))?;
    let header = Header::decode(&bytes)?;
    if (header.rs, header.chunk) != key {
        return Err(format!(
            "its header is of chunk {} of replica set {}",
            header.chunk, header.rs
        ));
    }
    Ok(header)
}

/// Reads many headers at a time.
fn read_headers(disk: &dyn Disk, files: &[(Key, FileId)]) -> Vec<(Key, FileId, Result<Header, String>)> {
    let read = |part: &[(Key, FileId)]| -> Vec<_> {
        part.iter()
            .map(|(key, file)| (*key, *file, read_header(disk, *key, *file)))
            .collect()
    };
    if files.len() < 64 {
        return read(files);
    }
    std::thread::scope(|scope| {
        let parts: Vec<_> = files
            .chunks(files.len().div_ceil(READERS))
            .map(|part| (part, scope.spawn(move || read(part))))
            .collect();
        parts
            .into_iter()
            .flat_map(|(part, thread)| thread.join().unwrap_or_else(|_| read(part)))
            .collect()
    })
}
