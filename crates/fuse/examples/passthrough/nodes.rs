//! Descriptors of the nodes and open files that the kernel knows.

use lazarette_fuse::abi::ROOT;
use lazarette_fuse::{Attr, Errno, Result, Timestamp};
use rustix::fs::{self as sys, AtFlags, Mode, OFlags, Stat};
use rustix::mount::OpenTreeFlags;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

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

/// A node: the name under which it was found, or a descriptor that keeps it.
///
/// A descriptor costs more than all else that a lookup does, and most nodes need none. So a node gets it when
/// something is done with it, at the latest before its name goes. Names that somebody else takes away below
/// the mount are `ESTALE`; the kernel then looks again.
pub(crate) struct Node {
    ino: u64,
    name: Option<(Arc<Node>, OsString)>,
    /// Opened with O_PATH.
    fd: OnceLock<OwnedFd>,
    lookups: AtomicU64,
    way: Mutex<Way>,
}

impl Node {
    fn new(ino: u64, name: Option<(Arc<Node>, OsString)>, fd: OnceLock<OwnedFd>) -> Arc<Self> {
        Arc::new(Self {
            ino,
            name,
            fd,
            lookups: AtomicU64::new(0),
            way: Mutex::new(Way::Served(0)),
        })
    }

    /// Its O_PATH descriptor.
    pub(crate) fn fd(&self) -> Result<&OwnedFd> {
        match self.fd.get() {
            Some(fd) => Ok(fd),
            None => {
                let opened = self.open_by_name(OFlags::PATH | OFlags::CLOEXEC)?;
                // If its name has gone meanwhile, it got one.
                opened
                    .map_or_else(|| self.fd.get(), |fd| Some(self.fd.get_or_init(|| fd)))
                    .ok_or(Errno::ESTALE)
            }
        }
    }

    /// A path to it for calls that take no O_PATH descriptor.
    pub(crate) fn path(&self) -> Result<String> {
        Ok(format!("/proc/self/fd/{}", self.fd()?.as_raw_fd()))
    }

    /// Opens it.
    pub(crate) fn reopen(&self, how: OFlags) -> Result<OwnedFd> {
        // What is found under the name must not be changed before it is known to be the node.
        if self.fd.get().is_none()
            && !how.contains(OFlags::TRUNC)
            && let Some(fd) = self.open_by_name(how)?
        {
            return Ok(fd);
        }
        Ok(sys::open(self.path()?, how, Mode::empty())?)
    }

    /// None if there is something else under the name, or nothing.
    fn open_by_name(&self, how: OFlags) -> Result<Option<OwnedFd>> {
        let Some((parent, name)) = &self.name else {
            return Ok(None);
        };
        match sys::openat(parent.fd()?, name, how | OFlags::NOFOLLOW, Mode::empty()) {
            Ok(fd) => Ok((sys::fstat(&fd)?.st_ino == self.ino).then_some(fd)),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::LOOP) => Ok(None),
            Err(error) => Err(error.into()),
        }
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
        let root = Node::new(stat.st_ino, None, OnceLock::from(fd));
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
    pub(crate) fn lookup(&self, parent: &Arc<Node>, name: &OsStr) -> Result<(u64, Stat)> {
        let stat = sys::statat(parent.fd()?, name, AtFlags::SYMLINK_NOFOLLOW)?;
        self.named(parent, name, stat)
    }

    /// As `lookup`, of a name whose attributes are known.
    pub(crate) fn named(&self, parent: &Arc<Node>, name: &OsStr, stat: Stat) -> Result<(u64, Stat)> {
        self.enter(stat, || {
            let name = Some((Arc::clone(parent), name.to_owned()));
            Node::new(stat.st_ino, name, OnceLock::new())
        })
    }

    /// As `lookup`, of an open file without a name: a second descriptor that keeps nothing but the node.
    pub(crate) fn unnamed(&self, file: &OwnedFd, stat: Stat) -> Result<(u64, Stat)> {
        let how = OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let fd = rustix::mount::open_tree(file, "", how)?;
        self.enter(stat, || Node::new(stat.st_ino, None, OnceLock::from(fd)))
    }

    fn enter(&self, stat: Stat, make: impl FnOnce() -> Arc<Node>) -> Result<(u64, Stat)> {
        let number = self.number(&stat)?;
        if let Some(node) = read(&self.known).get(&number) {
            node.lookups.fetch_add(1, Ordering::SeqCst);
            return Ok((number, stat));
        }
        let made = make();
        let mut known = write(&self.known);
        known
            .entry(number)
            .or_insert(made)
            .lookups
            .fetch_add(1, Ordering::SeqCst);
        Ok((number, stat))
    }

    /// A name is about to go: its node gets its descriptor while there is a way to it. What is wrong with the
    /// name is for the call that takes it away to say.
    pub(crate) fn keep(&self, parent: &Node, name: &OsStr) -> Result<()> {
        let how = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(fd) = sys::openat(parent.fd()?, name, how, Mode::empty()) else {
            return Ok(());
        };
        let stat = sys::fstat(&fd)?;
        if let Ok(number) = self.number(&stat)
            && let Ok(node) = self.get(number)
        {
            let _ = node.fd.set(fd);
        }
        Ok(())
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
