//! Descriptors of the nodes and open files that the kernel knows.

use lazarette_fuse::abi::ROOT;
use lazarette_fuse::{Attr, Errno, Result, Timestamp};
use rustix::fs::{self as sys, AtFlags, Mode, OFlags, Stat};
use rustix::mount::OpenTreeFlags;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// How those that have a file open read and write it.
enum Way {
    /// Through this process; so many.
    Served(u64),
    /// In the kernel, from the file of this number.
    Backed { number: i32, users: u64 },
}

/// A node, held open by an O_PATH descriptor.
pub(crate) struct Node {
    pub(crate) fd: OwnedFd,
    lookups: AtomicU64,
    way: Mutex<Way>,
}

impl Node {
    /// A path to it for calls that take no O_PATH descriptor.
    pub(crate) fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd())
    }

    fn new(fd: OwnedFd, lookups: u64) -> Arc<Self> {
        Arc::new(Self {
            fd,
            lookups: AtomicU64::new(lookups),
            way: Mutex::new(Way::Served(0)),
        })
    }

    fn way(&self) -> MutexGuard<'_, Way> {
        self.way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is opened once more: the number of the file that the kernel shall use, if any. The first who
    /// opens it decides, by `back`.
    pub(crate) fn open(&self, back: impl FnOnce() -> Option<i32>) -> Option<i32> {
        let mut way = self.way();
        match &mut *way {
            Way::Served(0) => match back() {
                Some(number) => {
                    *way = Way::Backed { number, users: 1 };
                    Some(number)
                }
                None => {
                    *way = Way::Served(1);
                    None
                }
            },
            Way::Served(users) => {
                *users += 1;
                None
            }
            Way::Backed { number, users } => {
                *users += 1;
                Some(*number)
            }
        }
    }

    /// It is closed once: a number to give back.
    pub(crate) fn close(&self) -> Option<i32> {
        let mut way = self.way();
        match &mut *way {
            Way::Served(users) => *users = users.saturating_sub(1),
            Way::Backed { number, users: 1 } => {
                let number = *number;
                *way = Way::Served(0);
                return Some(number);
            }
            Way::Backed { users, .. } => *users -= 1,
        }
        None
    }
}

/// The nodes; their numbers are the inodes' numbers, but for the root's.
pub(crate) struct Nodes {
    device: u64,
    root: u64,
    known: RwLock<HashMap<u64, Arc<Node>>>,
}

impl Nodes {
    pub(crate) fn new(source: &str) -> std::io::Result<Self> {
        let fd = sys::open(
            source,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let stat = sys::fstat(&fd)?;
        let root = Node::new(fd, 1);
        Ok(Self {
            device: stat.st_dev,
            root: stat.st_ino,
            known: RwLock::new(HashMap::from([(ROOT, root)])),
        })
    }

    pub(crate) fn get(&self, number: u64) -> Result<Arc<Node>> {
        read(&self.known).get(&number).cloned().ok_or(Errno::ESTALE)
    }

    fn number(&self, stat: &Stat) -> Result<u64> {
        match stat.st_ino {
            _ if stat.st_dev != self.device => Err(Errno::EXDEV),
            ino if ino == self.root => Ok(ROOT),
            // The root of another file system that has this inode number is not in this one.
            ROOT => Err(Errno::EXDEV),
            ino => Ok(ino),
        }
    }

    /// A name's node, for which the kernel holds one more reference from now on.
    pub(crate) fn lookup(&self, parent: &Node, name: &OsStr) -> Result<(u64, Stat)> {
        let stat = sys::statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let number = self.number(&stat)?;
        if let Some(node) = read(&self.known).get(&number) {
            node.lookups.fetch_add(1, Ordering::SeqCst);
            return Ok((number, stat));
        }
        self.made(parent, name)
    }

    /// As `lookup`, of a name that was made a moment ago: its node is hardly known.
    pub(crate) fn made(&self, parent: &Node, name: &OsStr) -> Result<(u64, Stat)> {
        self.enter(sys::openat(
            &parent.fd,
            name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }

    /// As `lookup`, of a file that is open: a second descriptor that keeps nothing but the node.
    pub(crate) fn opened(&self, file: &OwnedFd) -> Result<(u64, Stat)> {
        let how = OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        self.enter(rustix::mount::open_tree(file, "", how)?)
    }

    /// Notes a node that is open.
    fn enter(&self, fd: OwnedFd) -> Result<(u64, Stat)> {
        let stat = sys::fstat(&fd)?;
        let number = self.number(&stat)?;
        let fresh = Node::new(fd, 0);
        let mut known = write(&self.known);
        known
            .entry(number)
            .or_insert(fresh)
            .lookups
            .fetch_add(1, Ordering::SeqCst);
        Ok((number, stat))
    }

    pub(crate) fn forget(&self, number: u64, lookups: u64) {
        if number == ROOT {
            return;
        }
        let mut known = write(&self.known);
        if let Some(node) = known.get(&number)
            && node.lookups.fetch_sub(lookups, Ordering::SeqCst) <= lookups
        {
            let forgotten = known.remove(&number);
            // Others need not wait until it is closed.
            drop(known);
            drop(forgotten);
        }
    }
}

/// Open files and directories.
#[derive(Default)]
pub(crate) struct Handles {
    open: RwLock<HashMap<u64, Arc<OwnedFd>>>,
    next: AtomicU64,
}

impl Handles {
    pub(crate) fn add(&self, fd: OwnedFd) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        write(&self.open).insert(number, Arc::new(fd));
        number
    }

    pub(crate) fn get(&self, number: u64) -> Result<Arc<OwnedFd>> {
        read(&self.open).get(&number).cloned().ok_or(Errno::EBADF)
    }

    pub(crate) fn remove(&self, number: u64) {
        let removed = write(&self.open).remove(&number);
        // Closing may take a while.
        drop(removed);
    }
}

pub(crate) fn attr(stat: &Stat) -> Attr {
    let time = |seconds: i64, nanoseconds: u64| Timestamp {
        seconds,
        nanoseconds: nanoseconds as u32,
    };
    Attr {
        ino: stat.st_ino,
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        mode: stat.st_mode,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: lazarette_fuse::attributes::encode_device(sys::major(stat.st_rdev), sys::minor(stat.st_rdev)),
        blksize: stat.st_blksize as u32,
        flags: 0,
    }
}
