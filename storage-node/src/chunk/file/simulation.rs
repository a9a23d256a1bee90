//! A disk in memory whose power can be cut between any two operations: what was not synced then
//! survives in part, by sector and in no order.

use super::disk::{Disk, DiskFile, Mode, Name, Space};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

const SECTOR: usize = 512;
const PAGE: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Node {
    Dir,
    File(u64),
}

type Names = BTreeMap<String, Node>;

#[derive(Clone, Debug)]
enum NameChange {
    Make(String, Node),
    Rename(String, String),
    Remove(String),
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(dir, _)| dir)
}

impl NameChange {
    fn touches(&self, dir: &str) -> bool {
        match self {
            Self::Make(path, _) | Self::Remove(path) => parent(path) == dir,
            Self::Rename(from, to) => parent(from) == dir || parent(to) == dir,
        }
    }

    fn apply(&self, names: &mut Names) {
        let within = |path: &str, top: &str| path == top || path.strip_prefix(top).is_some_and(|r| r.starts_with('/'));
        match self {
            Self::Make(path, node) => {
                names.insert(path.clone(), *node);
            }
            Self::Rename(from, to) => {
                let moved: Vec<_> = names.keys().filter(|p| within(p, from)).cloned().collect();
                for path in moved {
                    if let Some(node) = names.remove(&path) {
                        names.insert(format!("{to}{}", &path[from.len()..]), node);
                    }
                }
            }
            Self::Remove(path) => names.retain(|p, _| !within(p, path)),
        }
    }
}

#[derive(Clone, Debug)]
enum Write {
    Data(u64, Vec<u8>),
    Length(u64),
}

impl Write {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Data(offset, data) => {
                let end = *offset as usize + data.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[*offset as usize..end].copy_from_slice(data);
            }
            Self::Length(length) => bytes.resize(*length as usize, 0),
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Inode {
    durable: Vec<u8>,
    now: Vec<u8>,
    pending: Vec<Write>,
    pages: BTreeSet<u64>,
}

#[derive(Clone, Debug, Default)]
struct Inner {
    names: Names,
    durable: Names,
    journal: Vec<NameChange>,
    inodes: BTreeMap<u64, Inode>,
    capacity: Option<u64>,
    /// Operations until the power is gone, the one during which it goes included.
    fuse: Option<u64>,
    /// How long a read takes.
    read_time: Duration,
    /// Syncs until one fails, once.
    bad_sync: Option<u64>,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct SimDisk(Arc<Mutex<Inner>>);

fn off() -> io::Error {
    io::Error::other("the power is off")
}

fn sync_failed() -> io::Error {
    io::Error::other("sync failed")
}

impl Inner {
    /// Counts an operation that changes something; whether it takes place for certain.
    fn step(&mut self) -> io::Result<()> {
        if let Some(left) = &mut self.fuse {
            *left = left.saturating_sub(1);
        }
        self.alive()
    }

    fn alive(&self) -> io::Result<()> {
        if self.fuse == Some(0) {
            return Err(off());
        }
        Ok(())
    }

    /// Counts a sync; whether it is the one that fails.
    fn sync_step(&mut self) -> io::Result<bool> {
        self.step()?;
        match self.bad_sync {
            Some(0) => {
                self.bad_sync = None;
                Ok(true)
            }
            left => {
                self.bad_sync = left.map(|left| left - 1);
                Ok(false)
            }
        }
    }

    fn change(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.journal.push(change);
    }

    fn commit_names(&mut self, count: usize) {
        for change in self.journal.drain(..count) {
            change.apply(&mut self.durable);
        }
    }

    fn used(&self) -> u64 {
        let live: BTreeSet<u64> = self
            .names
            .values()
            .filter_map(|node| match node {
                Node::File(inode) => Some(*inode),
                Node::Dir => None,
            })
            .collect();
        live.iter()
            .map(|inode| self.inodes[inode].pages.len() as u64 * PAGE)
            .sum()
    }
}

impl Inode {
    fn commit(&mut self) {
        for write in self.pending.drain(..) {
            write.apply(&mut self.durable);
        }
    }
}

impl SimDisk {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// The power goes after this many more changes and syncs.
    pub(super) fn cut_after(&self, operations: u64) {
        self.lock().fuse = Some(operations + 1);
    }

    /// The sync after this many more fails. As with a real kernel, what it should have made durable
    /// still shows, but no later sync will write it.
    pub(super) fn fail_sync_after(&self, syncs: u64) {
        self.lock().bad_sync = Some(syncs);
    }

    /// Gives others time to come in between two reads.
    pub(super) fn slow_reads(&self, time: Duration) {
        self.lock().read_time = time;
    }

    pub(super) fn set_capacity(&self, bytes: Option<u64>) {
        self.lock().capacity = bytes;
    }

    pub(super) fn used(&self) -> u64 {
        self.lock().used()
    }

    /// The process is gone, the machine goes on.
    pub(super) fn after_kill(&self) -> Self {
        let mut inner = self.lock().clone();
        inner.fuse = None;
        inner.bad_sync = None;
        Self(Arc::new(Mutex::new(inner)))
    }

    /// What is found after a power cut now.
    pub(super) fn after_power_cut(&self, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut inner = self.lock().clone();
        inner.fuse = None;
        inner.bad_sync = None;
        let kept = rng.random_range(0..=inner.journal.len());
        inner.commit_names(kept);
        inner.journal.clear();
        inner.names = inner.durable.clone();
        for inode in inner.inodes.values_mut() {
            let mode = rng.random_range(0..4);
            for write in std::mem::take(&mut inode.pending) {
                match write {
                    _ if mode == 0 => {}
                    Write::Data(offset, data) if mode > 1 => {
                        // Sectors of the file, whatever the write's own alignment.
                        let mut at = 0;
                        while at < data.len() {
                            let next = (offset as usize + at + 1).next_multiple_of(SECTOR);
                            let end = (next - offset as usize).min(data.len());
                            if rng.random_ratio(if mode == 2 { 5 } else { 9 }, 10) {
                                let part = data[at..end].to_vec();
                                Write::Data(offset + at as u64, part).apply(&mut inode.durable);
                            }
                            at = end;
                        }
                    }
                    Write::Length(_) if rng.random() => {}
                    write => write.apply(&mut inode.durable),
                }
            }
            inode.now = inode.durable.clone();
            inode.pages = (0..(inode.now.len() as u64).div_ceil(PAGE)).collect();
        }
        Self(Arc::new(Mutex::new(inner)))
    }

    /// Paths of all files.
    pub(super) fn files(&self) -> Vec<String> {
        let inner = self.lock();
        let files = inner.names.iter().filter(|(_, n)| **n != Node::Dir);
        files.map(|(path, _)| path.clone()).collect()
    }

    /// Changes bytes of a file, as a failing disk would.
    pub(super) fn rot(&self, path: &str, offset: usize, bytes: &[u8]) {
        let mut inner = self.lock();
        let Some(Node::File(inode)) = inner.names.get(path).copied() else {
            panic!("no file {path}");
        };
        let inode = inner.inodes.get_mut(&inode).unwrap();
        for image in [&mut inode.now, &mut inode.durable] {
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }

    pub(super) fn bytes(&self, path: &str) -> Vec<u8> {
        let inner = self.lock();
        match inner.names.get(path) {
            Some(Node::File(inode)) => inner.inodes[inode].now.clone(),
            _ => panic!("no file {path}"),
        }
    }

    pub(super) fn delete(&self, path: &str) {
        self.remove_file(path).unwrap();
    }
}

fn not_found() -> io::Error {
    io::Error::from(io::ErrorKind::NotFound)
}

impl Disk for SimDisk {
    fn list(&self, path: &str) -> io::Result<Vec<Name>> {
        let inner = self.lock();
        inner.alive()?;
        if !path.is_empty() && inner.names.get(path) != Some(&Node::Dir) {
            return Err(not_found());
        }
        Ok(inner
            .names
            .iter()
            .filter(|(p, _)| parent(p) == path)
            .map(|(p, node)| Name {
                name: p.rsplit('/').next().unwrap_or(p).to_owned(),
                is_dir: *node == Node::Dir,
            })
            .collect())
    }

    fn create_dir(&self, path: &str) -> io::Result<()> {
        let mut inner = self.lock();
        let mut at = String::new();
        for part in path.split('/') {
            if !at.is_empty() {
                at.push('/');
            }
            at.push_str(part);
            if !inner.names.contains_key(&at) {
                inner.step()?;
                inner.change(NameChange::Make(at.clone(), Node::Dir));
            }
        }
        Ok(())
    }

    fn open(&self, path: &str, mode: Mode) -> io::Result<Arc<dyn DiskFile>> {
        let mut inner = self.lock();
        inner.alive()?;
        let found = inner.names.get(path).copied();
        let inode = match (found, mode) {
            (Some(Node::Dir), _) => return Err(io::Error::from(io::ErrorKind::IsADirectory)),
            (Some(Node::File(inode)), Mode::Create) => {
                inner.step()?;
                let file = inner.inodes.get_mut(&inode).unwrap();
                file.now.clear();
                file.pages.clear();
                file.pending.push(Write::Length(0));
                inode
            }
            (Some(Node::File(inode)), _) => inode,
            (None, Mode::Create) => {
                if !parent(path).is_empty() && !inner.names.contains_key(parent(path)) {
                    return Err(not_found());
                }
                inner.step()?;
                let inode = inner.inodes.keys().next_back().map_or(1, |last| last + 1);
                inner.inodes.insert(inode, Inode::default());
                inner.change(NameChange::Make(path.to_owned(), Node::File(inode)));
                inode
            }
            (None, _) => return Err(not_found()),
        };
        Ok(Arc::new(SimFile {
            disk: self.clone(),
            inode,
            writable: matches!(mode, Mode::Write | Mode::Create),
        }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut inner = self.lock();
        inner.step()?;
        if !inner.names.contains_key(from) || (!parent(to).is_empty() && !inner.names.contains_key(parent(to))) {
            return Err(not_found());
        }
        inner.change(NameChange::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove_file(&self, path: &str) -> io::Result<()> {
        let mut inner = self.lock();
        inner.step()?;
        if !matches!(inner.names.get(path), Some(Node::File(_))) {
            return Err(not_found());
        }
        inner.change(NameChange::Remove(path.to_owned()));
        Ok(())
    }

    fn remove_dir_all(&self, path: &str) -> io::Result<()> {
        let mut inner = self.lock();
        inner.step()?;
        if inner.names.get(path) != Some(&Node::Dir) {
            return Err(not_found());
        }
        inner.change(NameChange::Remove(path.to_owned()));
        Ok(())
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        let mut inner = self.lock();
        if inner.sync_step()? {
            return Err(sync_failed());
        }
        if !path.is_empty() && inner.names.get(path) != Some(&Node::Dir) {
            return Err(not_found());
        }
        let last = inner.journal.iter().rposition(|c| c.touches(path));
        inner.commit_names(last.map_or(0, |last| last + 1));
        Ok(())
    }

    fn space(&self) -> io::Result<Space> {
        let inner = self.lock();
        inner.alive()?;
        let capacity = inner.capacity.unwrap_or(1 << 40);
        let free = capacity.saturating_sub(inner.used());
        Ok(Space {
            capacity,
            free,
            available: free,
        })
    }
}

struct SimFile {
    disk: SimDisk,
    inode: u64,
    writable: bool,
}

impl SimFile {
    fn file<'a>(&self, inner: &'a mut Inner) -> &'a mut Inode {
        inner.inodes.get_mut(&self.inode).unwrap()
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let time = self.disk.lock().read_time;
        if !time.is_zero() {
            std::thread::sleep(time);
        }
        let mut inner = self.disk.lock();
        inner.alive()?;
        let file = self.file(&mut inner);
        let from = (offset as usize).min(file.now.len());
        let count = buffer.len().min(file.now.len() - from);
        buffer[..count].copy_from_slice(&file.now[from..from + count]);
        Ok(count)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        assert!(self.writable);
        let mut inner = self.disk.lock();
        inner.alive()?;
        let last_page = (offset + data.len() as u64).div_ceil(PAGE);
        let pages: Vec<u64> = (offset / PAGE..last_page).collect();
        if let Some(capacity) = inner.capacity {
            let used = inner.used();
            let file = self.file(&mut inner);
            let new = pages.iter().filter(|p| !file.pages.contains(p)).count() as u64;
            if new > 0 && used + new * PAGE > capacity {
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            }
        }
        // With the power gone in its middle, a write may still have reached the disk in part.
        let outcome = inner.step();
        let file = self.file(&mut inner);
        let write = Write::Data(offset, data.to_vec());
        write.apply(&mut file.now);
        file.pages.extend(pages);
        file.pending.push(write);
        outcome
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        assert!(self.writable);
        let mut inner = self.disk.lock();
        inner.step()?;
        let file = self.file(&mut inner);
        let write = Write::Length(length);
        write.apply(&mut file.now);
        file.pages.retain(|page| page * PAGE < length);
        file.pending.push(write);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        let mut inner = self.disk.lock();
        inner.alive()?;
        Ok(self.file(&mut inner).now.len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        let mut inner = self.disk.lock();
        if inner.sync_step()? {
            self.file(&mut inner).pending.clear();
            return Err(sync_failed());
        }
        self.file(&mut inner).commit();
        Ok(())
    }
}
