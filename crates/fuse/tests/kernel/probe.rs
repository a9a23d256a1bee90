//! A file system of one directory and one file, which answers as a test wants and notes what it was
//! asked.

use lazarette_fuse::operation::*;
use lazarette_fuse::*;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// The file, whatever name it is looked up by.
pub(crate) const FILE: u64 = 2;

/// What is worth noting of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Note {
    Write {
        offset: u64,
        length: usize,
        from_cache: bool,
        /// The data begin where a page does.
        aligned: bool,
    },
    Read {
        handle: u64,
        size: u32,
    },
    /// With the caller's supplementary group that fits the directory.
    Created(Vec<u32>),
}

pub(crate) struct Probe {
    /// Owner and group of the directory.
    pub(crate) owner: (u32, u32),
    pub(crate) mode: u32,
    pub(crate) opened: OpenReplyFlags,
    /// Opening needs no request.
    pub(crate) unopened: bool,
    /// What the kernel reads itself.
    pub(crate) backing: Option<File>,
    /// The file's list of access rights, as `system.posix_acl_access` has it.
    pub(crate) rights: Vec<u8>,
    pub(crate) data: Mutex<Vec<u8>>,
    pub(crate) mtime: AtomicI64,
    pub(crate) notes: Mutex<Vec<Note>>,
    /// Look-ups wait until it is open.
    pub(crate) gate: watch::Sender<bool>,
    /// The file can be read, as poll(2) tells.
    pub(crate) ready: AtomicBool,
    pub(crate) waiter: watch::Sender<Option<u64>>,
    /// Each read invalidates what it reads.
    pub(crate) notifier: Mutex<Option<Notifier>>,
}

pub(crate) use lazarette_fuse::abi::OpenReplyFlags;

impl Default for Probe {
    fn default() -> Self {
        Self {
            owner: (0, 0),
            mode: 0o600,
            opened: OpenReplyFlags::empty(),
            unopened: false,
            backing: None,
            rights: Vec::new(),
            data: Mutex::default(),
            mtime: AtomicI64::new(1000),
            notes: Mutex::default(),
            gate: watch::Sender::new(true),
            ready: AtomicBool::new(false),
            waiter: watch::Sender::new(None),
            notifier: Mutex::default(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Probe {
    /// Changes the file behind the kernel's back.
    pub(crate) fn change(&self, data: &[u8]) {
        *lock(&self.data) = data.to_vec();
        self.mtime.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn notes(&self) -> Vec<Note> {
        lock(&self.notes).clone()
    }

    fn note(&self, note: Note) {
        lock(&self.notes).push(note);
    }

    fn attr(&self, node: u64) -> Attr {
        let time = Timestamp {
            seconds: self.mtime.load(Ordering::SeqCst),
            nanoseconds: 0,
        };
        let common = Attr {
            ino: node,
            nlink: 1,
            atime: time,
            mtime: time,
            ctime: time,
            ..Attr::default()
        };
        match node {
            abi::ROOT => Attr {
                mode: Kind::Directory.mode() | 0o777,
                uid: self.owner.0,
                gid: self.owner.1,
                ..common
            },
            _ => Attr {
                mode: Kind::File.mode() | self.mode,
                size: lock(&self.data).len() as u64,
                ..common
            },
        }
    }

    fn entry(&self) -> Entry {
        Entry {
            node: FILE,
            attr: self.attr(FILE),
            ..Entry::default()
        }
    }

    fn opened(&self, request: &Request) -> Result<Opened> {
        if self.unopened {
            return Err(Errno::ENOSYS);
        }
        if let Some(file) = &self.backing {
            let backing = request.back(file)?;
            return Ok(Opened {
                handle: backing as u64,
                flags: OpenReplyFlags::PASSTHROUGH,
                backing,
            });
        }
        Ok(Opened {
            handle: 7,
            flags: self.opened,
            ..Opened::default()
        })
    }
}

impl Filesystem for Probe {
    async fn lookup(&self, _request: &Request, lookup: Lookup<'_>) -> Result<Entry> {
        let mut gate = self.gate.subscribe();
        gate.wait_for(|open| *open).await.map_err(|_| Errno::EIO)?;
        if lookup.name == "new" {
            return Err(Errno::ENOENT);
        }
        Ok(self.entry())
    }

    async fn getattr(&self, _request: &Request, getattr: Getattr) -> Result<Attributes> {
        Ok(Attributes {
            attr: self.attr(getattr.node),
            ttl: Duration::ZERO,
        })
    }

    async fn setattr(&self, _request: &Request, setattr: Setattr) -> Result<Attributes> {
        if let Some(size) = setattr.size {
            lock(&self.data).resize(size as usize, 0);
        }
        Ok(Attributes {
            attr: self.attr(setattr.node),
            ttl: Duration::ZERO,
        })
    }

    async fn mknod(&self, request: &Request, _mknod: Mknod<'_>) -> Result<Entry> {
        self.note(Note::Created(request.groups().to_vec()));
        Ok(self.entry())
    }

    async fn open(&self, request: &Request, _open: Open) -> Result<Opened> {
        self.opened(request)
    }

    async fn release(&self, request: &Request, release: Release) -> Result<()> {
        if self.backing.is_some() {
            request.unback(release.handle as i32)?;
            // Once only.
            assert_eq!(request.unback(release.handle as i32), Err(Errno::ENOENT));
        }
        Ok(())
    }

    async fn opendir(&self, request: &Request, _open: Open) -> Result<Opened> {
        self.opened(request)
    }

    async fn readdir(&self, _request: &Request, readdir: Readdir, listing: &mut Listing) -> Result<()> {
        if readdir.offset == 0 {
            let _ = listing.add(FILE, 1, Kind::File, std::ffi::OsStr::new("file"));
        }
        Ok(())
    }

    async fn read(&self, _request: &Request, read: Read) -> Result<Data> {
        self.note(Note::Read {
            handle: read.handle,
            size: read.size,
        });
        if let Some(notifier) = lock(&self.notifier).clone() {
            // It waits for this very read: for a task of its own.
            tokio::spawn(async move { notifier.inval_inode(FILE, 0, 0).await });
        }
        let data = lock(&self.data);
        let start = data.len().min(read.offset as usize);
        let end = data.len().min(start + read.size as usize);
        Ok(data[start..end].to_vec().into())
    }

    async fn write(&self, _request: &Request, write: Write) -> Result<u32> {
        self.note(Note::Write {
            offset: write.offset,
            length: write.data.len(),
            from_cache: write.from_cache,
            aligned: (write.data.as_ptr() as usize).is_multiple_of(4096),
        });
        let mut data = lock(&self.data);
        let end = write.offset as usize + write.data.len();
        if data.len() < end {
            data.resize(end, 0);
        }
        data[write.offset as usize..end].copy_from_slice(&write.data);
        Ok(write.data.len() as u32)
    }

    async fn fsync(&self, _request: &Request, _fsync: Fsync) -> Result<()> {
        Ok(())
    }

    async fn getxattr(&self, _request: &Request, getxattr: Getxattr<'_>) -> Result<bytes::Bytes> {
        match getxattr.name.to_str() {
            Some("system.posix_acl_access") if getxattr.node == FILE && !self.rights.is_empty() => {
                Ok(self.rights.clone().into())
            }
            _ => Err(Errno::ENODATA),
        }
    }

    async fn ioctl(&self, _request: &Request, ioctl: Ioctl<'_>) -> Result<IoctlReply> {
        Ok(IoctlReply {
            result: 5,
            output: ioctl.input.iter().rev().copied().collect(),
        })
    }

    async fn poll(&self, _request: &Request, poll: Poll) -> Result<u32> {
        const POLLIN: u32 = 1;
        if self.ready.load(Ordering::SeqCst) {
            return Ok(POLLIN);
        }
        if poll.notify {
            self.waiter.send_replace(Some(poll.waiter));
        }
        Ok(0)
    }
}
