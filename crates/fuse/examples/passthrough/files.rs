//! Every operation as the system call that it came from.

use crate::nodes::{Handles, Node, Nodes, attr};
use bytes::Bytes;
use lazarette_fuse::abi::OpenReplyFlags;
use lazarette_fuse::attributes::decode_device;
use lazarette_fuse::operation::*;
use lazarette_fuse::*;
use rustix::fs::{
    self as sys, AtFlags, FallocateFlags, Gid, Mode, OFlags, RenameFlags, Stat, StatxFlags, Uid, XattrFlags,
};
use rustix::io::ReadWriteFlags;
use std::ffi::{OsStr, OsString};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::Duration;
use tokio::sync::Semaphore;

/// A directory of the machine.
pub(crate) struct Passthrough {
    nodes: Nodes,
    files: Handles,
    ttl: Duration,
    /// Readers that may wait for a disk at a time.
    may_wait: Semaphore,
    /// Bytes from which on a file is read and written by the kernel itself, where it can.
    backed_from: u64,
    /// This process's user and group, to whom belongs what it makes.
    owner: (u32, u32),
}

/// To make a file known to the kernel costs as much as some reads of it do: small ones are read through
/// this process.
pub(crate) const BACKED_FROM: u64 = 256 << 10;

/// Bytes of the longest extended attribute, and of all their names.
const XATTR_MOST: usize = 65_536;

/// Flags of an open(2) that are for the one who calls it.
fn flags(raw: u32) -> OFlags {
    let kept = OFlags::from_bits_retain(raw) - OFlags::NOFOLLOW - OFlags::CREATE - OFlags::EXCL - OFlags::DIRECT;
    kept | OFlags::CLOEXEC
}

/// Bytes of an open file; 0 of what is none.
fn size(file: &OwnedFd) -> u64 {
    let of_file = |stat: &Stat| Kind::of_mode(stat.st_mode) == Some(Kind::File);
    sys::fstat(file)
        .ok()
        .filter(of_file)
        .map_or(0, |stat| stat.st_size as u64)
}

/// Work that may take long, on a thread that is there for it.
async fn elsewhere<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(Errno::EIO))
}

/// Reads as much as there is: a short answer would mean the end of the file.
fn read_at(file: &OwnedFd, buffer: &mut [u8], offset: u64, flags: ReadWriteFlags) -> Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        let parts = &mut [IoSliceMut::new(&mut buffer[done..])];
        match rustix::io::preadv2(file, parts, offset + done as u64, flags) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(done)
}

impl Passthrough {
    /// Shows `source`, read by so many `readers`; what is told of it is true for `ttl`. Files of
    /// `backed_from` bytes or more are the kernel's own business.
    pub(crate) fn new(source: &str, ttl: Duration, readers: usize, backed_from: u64) -> std::io::Result<Self> {
        Ok(Self {
            nodes: Nodes::new(source)?,
            files: Handles::default(),
            ttl,
            may_wait: Semaphore::new(readers.saturating_sub(1)),
            backed_from,
            owner: (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
        })
    }

    fn entry(&self, (node, stat): (u64, Stat)) -> Entry {
        Entry {
            node,
            generation: 0,
            attr: attr(&stat),
            attr_ttl: self.ttl,
            entry_ttl: self.ttl,
        }
    }

    fn attributes(&self, stat: &Stat) -> Attributes {
        Attributes {
            attr: attr(stat),
            ttl: self.ttl,
        }
    }

    /// Gives what was created here to whom it was created for.
    fn own(&self, request: &Request, node: (u64, Stat), mode: u32) -> Result<Entry> {
        let (number, stat) = node;
        let (us, our_group) = self.owner;
        let uid = (request.uid() != us).then(|| Uid::from_raw(request.uid()));
        // A directory may have given its own group.
        let inherited = stat.st_gid != our_group;
        let gid = (request.gid() != our_group && !inherited).then(|| Gid::from_raw(request.gid()));
        if uid.is_none() && gid.is_none() {
            return Ok(self.entry((number, stat)));
        }
        let node = self.nodes.get(number)?;
        sys::chownat(node.fd()?, "", uid, gid, AtFlags::EMPTY_PATH)?;
        // Which takes these bits away.
        if mode & 0o6000 != 0 && Kind::of_mode(stat.st_mode) != Some(Kind::Symlink) {
            sys::chmod(node.path()?, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
        }
        Ok(self.entry((number, sys::fstat(node.fd()?)?)))
    }

    /// A file that was opened; `size` tells its bytes.
    fn opened(&self, request: &Request, node: &Node, fd: OwnedFd, size: impl FnOnce(&OwnedFd) -> u64) -> Opened {
        let backing = node.open(|| {
            let large = size(&fd) >= self.backed_from;
            if large { request.back(&fd).ok() } else { None }
        });
        Opened {
            handle: self.files.add(fd),
            flags: match backing {
                Some(_) => OpenReplyFlags::PASSTHROUGH,
                None => OpenReplyFlags::empty(),
            },
            backing: backing.unwrap_or_default(),
        }
    }

    /// A file that was created and opened.
    fn created(&self, request: &Request, made: (u64, Stat), mode: u32, fd: OwnedFd) -> Result<(Entry, Opened)> {
        let entry = self.own(request, made, mode)?;
        let node = self.nodes.get(entry.node)?;
        Ok((entry, self.opened(request, &node, fd, |_| entry.attr.size)))
    }

    /// The open file, or the node opened if there is none.
    fn file(&self, node: u64, handle: Option<u64>, wanted: OFlags) -> Result<std::sync::Arc<OwnedFd>> {
        match handle {
            Some(handle) => self.files.get(handle),
            None => Ok(self.nodes.get(node)?.reopen(wanted | OFlags::CLOEXEC)?.into()),
        }
    }
}

impl Filesystem for Passthrough {
    async fn lookup(&self, _request: &Request, lookup: Lookup<'_>) -> Result<Entry> {
        let parent = self.nodes.get(lookup.parent)?;
        // Above the root is nothing.
        let name = if lookup.parent == abi::ROOT && lookup.name == ".." {
            OsStr::new(".")
        } else {
            lookup.name
        };
        let found = self.nodes.lookup(&parent, name)?;
        if name == "." || name == ".." {
            // What these lead to may be another one's parent tomorrow.
            self.nodes.get(found.0)?.fd()?;
        }
        Ok(self.entry(found))
    }

    fn forget(&self, forgets: &[Forget]) {
        for forget in forgets {
            self.nodes.forget(forget.node, forget.lookups);
        }
    }

    async fn getattr(&self, _request: &Request, getattr: Getattr) -> Result<Attributes> {
        Ok(self.attributes(&sys::fstat(self.nodes.get(getattr.node)?.fd()?)?))
    }

    async fn statx(&self, _request: &Request, query: StatxQuery) -> Result<Statx> {
        let node = self.nodes.get(query.node)?;
        let how = AtFlags::EMPTY_PATH | AtFlags::from_bits_retain(query.flags);
        let told = sys::statx(node.fd()?, "", how, StatxFlags::BASIC_STATS | StatxFlags::BTIME)?;
        let born = StatxFlags::from_bits_retain(told.stx_mask).contains(StatxFlags::BTIME);
        Ok(Statx {
            attr: attr(&sys::fstat(node.fd()?)?),
            btime: born.then_some(Timestamp {
                seconds: told.stx_btime.tv_sec,
                nanoseconds: told.stx_btime.tv_nsec,
            }),
            attributes: told.stx_attributes.bits(),
            attributes_mask: told.stx_attributes_mask.bits(),
            ttl: self.ttl,
        })
    }

    async fn setattr(&self, _request: &Request, setattr: Setattr) -> Result<Attributes> {
        let node = self.nodes.get(setattr.node)?;
        if setattr.uid.is_some() || setattr.gid.is_some() {
            let (uid, gid) = (setattr.uid.map(Uid::from_raw), setattr.gid.map(Gid::from_raw));
            sys::chownat(node.fd()?, "", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if let Some(mode) = setattr.mode {
            sys::chmod(node.path()?, Mode::from_raw_mode(mode & 0o7777))?;
        }
        if let Some(size) = setattr.size {
            let wanted = OFlags::WRONLY | OFlags::NONBLOCK;
            let file = self.file(setattr.node, setattr.handle, wanted)?;
            match sys::ftruncate(&file, size) {
                // An open(2) for reading may truncate, too.
                Err(rustix::io::Errno::INVAL) => sys::ftruncate(&self.file(setattr.node, None, wanted)?, size)?,
                done => done?,
            }
        }
        if setattr.atime.is_some() || setattr.mtime.is_some() {
            let time = |time: Option<SetTime>| match time {
                None => sys::Timespec {
                    tv_sec: 0,
                    tv_nsec: sys::UTIME_OMIT,
                },
                Some(SetTime::Now) => sys::Timespec {
                    tv_sec: 0,
                    tv_nsec: sys::UTIME_NOW,
                },
                Some(SetTime::At(at)) => sys::Timespec {
                    tv_sec: at.seconds,
                    tv_nsec: at.nanoseconds.into(),
                },
            };
            let times = sys::Timestamps {
                last_access: time(setattr.atime),
                last_modification: time(setattr.mtime),
            };
            sys::utimensat(node.fd()?, "", &times, AtFlags::EMPTY_PATH)?;
        }
        Ok(self.attributes(&sys::fstat(node.fd()?)?))
    }

    async fn readlink(&self, _request: &Request, readlink: Readlink) -> Result<OsString> {
        let target = sys::readlinkat(self.nodes.get(readlink.node)?.fd()?, "", Vec::with_capacity(256))?;
        Ok(OsString::from_vec(target.into_bytes()))
    }

    async fn symlink(&self, request: &Request, symlink: Symlink<'_>) -> Result<Entry> {
        let parent = self.nodes.get(symlink.parent)?;
        sys::symlinkat(symlink.target, parent.fd()?, symlink.name)?;
        self.own(request, self.nodes.lookup(&parent, symlink.name)?, 0)
    }

    async fn mknod(&self, request: &Request, mknod: Mknod<'_>) -> Result<Entry> {
        let parent = self.nodes.get(mknod.parent)?;
        let (major, minor) = decode_device(mknod.rdev);
        let kind = sys::FileType::from_raw_mode(mknod.mode);
        sys::mknodat(
            parent.fd()?,
            mknod.name,
            kind,
            Mode::from_raw_mode(mknod.mode & 0o7777),
            sys::makedev(major, minor),
        )?;
        self.own(request, self.nodes.lookup(&parent, mknod.name)?, mknod.mode)
    }

    async fn mkdir(&self, request: &Request, mkdir: Mkdir<'_>) -> Result<Entry> {
        let parent = self.nodes.get(mkdir.parent)?;
        sys::mkdirat(parent.fd()?, mkdir.name, Mode::from_raw_mode(mkdir.mode & 0o7777))?;
        self.own(request, self.nodes.lookup(&parent, mkdir.name)?, 0)
    }

    async fn unlink(&self, _request: &Request, remove: Remove<'_>) -> Result<()> {
        let parent = self.nodes.get(remove.parent)?;
        self.nodes.keep(&parent, remove.name)?;
        Ok(sys::unlinkat(parent.fd()?, remove.name, AtFlags::empty())?)
    }

    async fn rmdir(&self, _request: &Request, remove: Remove<'_>) -> Result<()> {
        let parent = self.nodes.get(remove.parent)?;
        self.nodes.keep(&parent, remove.name)?;
        Ok(sys::unlinkat(parent.fd()?, remove.name, AtFlags::REMOVEDIR)?)
    }

    async fn rename(&self, _request: &Request, rename: Rename<'_>) -> Result<()> {
        let (from, to) = (self.nodes.get(rename.parent)?, self.nodes.get(rename.new_parent)?);
        self.nodes.keep(&from, rename.name)?;
        self.nodes.keep(&to, rename.new_name)?;
        let flags = RenameFlags::from_bits_retain(rename.flags);
        Ok(sys::renameat_with(
            from.fd()?,
            rename.name,
            to.fd()?,
            rename.new_name,
            flags,
        )?)
    }

    async fn link(&self, _request: &Request, link: Link<'_>) -> Result<Entry> {
        let (node, parent) = (self.nodes.get(link.node)?, self.nodes.get(link.new_parent)?);
        sys::linkat(
            sys::CWD,
            node.path()?,
            parent.fd()?,
            link.new_name,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        Ok(self.entry(self.nodes.lookup(&parent, link.new_name)?))
    }

    async fn open(&self, request: &Request, open: Open) -> Result<Opened> {
        let node = self.nodes.get(open.node)?;
        let fd = node.reopen(flags(open.flags))?;
        Ok(self.opened(request, &node, fd, size))
    }

    async fn create(&self, request: &Request, create: Create<'_>) -> Result<(Entry, Opened)> {
        let parent = self.nodes.get(create.parent)?;
        // The kernel asks for this for names that were free a moment ago.
        let how = flags(create.flags) | OFlags::CREATE | OFlags::NOFOLLOW;
        let how = how | OFlags::from_bits_retain(create.flags) & OFlags::EXCL;
        let fd = sys::openat(
            parent.fd()?,
            create.name,
            how,
            Mode::from_raw_mode(create.mode & 0o7777),
        )?;
        let made = self.nodes.named(&parent, create.name, sys::fstat(&fd)?)?;
        self.created(request, made, create.mode, fd)
    }

    async fn tmpfile(&self, request: &Request, create: Create<'_>) -> Result<(Entry, Opened)> {
        let parent = self.nodes.get(create.parent)?;
        let how = OFlags::from_bits_retain(create.flags) | OFlags::TMPFILE | OFlags::CLOEXEC;
        let fd = sys::openat(parent.fd()?, ".", how, Mode::from_raw_mode(create.mode & 0o7777))?;
        let made = self.nodes.unnamed(&fd, sys::fstat(&fd)?)?;
        self.created(request, made, create.mode, fd)
    }

    /// Most reads are done by the thread that has the request, even if they wait for a disk: to hand
    /// one on costs more than twice its processor time. Only the last reader does not wait.
    async fn read(&self, request: &Request, read: Read) -> Result<Data> {
        let file = self.files.get(read.handle)?;
        let mut buffer = request.buffer(read.size as usize);
        if let Ok(_turn) = self.may_wait.try_acquire() {
            let count = read_at(&file, &mut buffer, read.offset, ReadWriteFlags::empty())?;
            buffer.truncate(count);
            return Ok(buffer.into());
        }
        match read_at(&file, &mut buffer, read.offset, ReadWriteFlags::NOWAIT) {
            Ok(count) => {
                buffer.truncate(count);
                Ok(buffer.into())
            }
            // Not in memory, or a file system that cannot tell.
            Err(Errno::EAGAIN | Errno::EOPNOTSUPP) => {
                elsewhere(move || {
                    let count = read_at(&file, &mut buffer, read.offset, ReadWriteFlags::empty())?;
                    buffer.truncate(count);
                    Ok(buffer.into())
                })
                .await
            }
            Err(error) => Err(error),
        }
    }

    async fn write(&self, _request: &Request, write: Write) -> Result<u32> {
        let file = self.files.get(write.handle)?;
        loop {
            match rustix::io::pwrite(&file, &write.data, write.offset) {
                Err(rustix::io::Errno::INTR) => {}
                other => return Ok(other? as u32),
            }
        }
    }

    async fn release(&self, request: &Request, release: Release) -> Result<()> {
        self.files.remove(release.handle);
        match self.nodes.get(release.node)?.close() {
            Some(number) => request.unback(number),
            None => Ok(()),
        }
    }

    async fn fsync(&self, _request: &Request, fsync: Fsync) -> Result<()> {
        let file = self.files.get(fsync.handle)?;
        let done = if fsync.data_only {
            sys::fdatasync(&file)
        } else {
            sys::fsync(&file)
        };
        Ok(done?)
    }

    async fn opendir(&self, _request: &Request, open: Open) -> Result<Opened> {
        let fd = self.nodes.get(open.node)?.reopen(OFlags::DIRECTORY | OFlags::CLOEXEC)?;
        Ok(Opened {
            handle: self.files.add(fd),
            flags: OpenReplyFlags::empty(),
            backing: 0,
        })
    }

    async fn readdir(&self, _request: &Request, readdir: Readdir, listing: &mut Listing) -> Result<()> {
        let (parent, directory) = (self.nodes.get(readdir.node)?, self.files.get(readdir.handle)?);
        // Listings of one handle come one after another.
        sys::seek(&*directory, sys::SeekFrom::Start(readdir.offset))?;
        let mut space = [MaybeUninit::uninit(); 8192];
        let mut entries = sys::RawDir::new(directory.as_fd(), &mut space);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            let cookie = entry.next_entry_cookie();
            let kind = Kind::of_mode(entry.file_type().as_raw_mode()).unwrap_or(Kind::File);
            let dots = name == "." || name == "..";
            if !listing.is_plus() || dots {
                if listing.add(entry.ino(), cookie, kind, name) == Listed::Full {
                    break;
                }
                continue;
            }
            match self.nodes.lookup(&parent, name) {
                Ok(found) => {
                    let number = found.0;
                    if listing.add_plus(&self.entry(found), cookie, name) == Listed::Full {
                        self.nodes.forget(number, 1);
                        break;
                    }
                }
                // Removed meanwhile.
                Err(Errno::ENOENT) => {}
                Err(_) => {
                    if listing.add(entry.ino(), cookie, kind, name) == Listed::Full {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    async fn releasedir(&self, _request: &Request, release: Release) -> Result<()> {
        self.files.remove(release.handle);
        Ok(())
    }

    async fn fsyncdir(&self, _request: &Request, fsync: Fsync) -> Result<()> {
        let directory = self.files.get(fsync.handle)?;
        elsewhere(move || Ok(sys::fsync(&*directory)?)).await
    }

    async fn statfs(&self, _request: &Request, statfs: StatfsQuery) -> Result<Statfs> {
        let figures = sys::fstatvfs(self.nodes.get(statfs.node)?.fd()?)?;
        Ok(Statfs {
            blocks: figures.f_blocks,
            free: figures.f_bfree,
            available: figures.f_bavail,
            files: figures.f_files,
            free_files: figures.f_ffree,
            bsize: figures.f_bsize as u32,
            name_max: figures.f_namemax as u32,
            frsize: figures.f_frsize as u32,
        })
    }

    async fn syncfs(&self, _request: &Request, syncfs: Syncfs) -> Result<()> {
        let directory = self.nodes.get(syncfs.node)?.reopen(OFlags::RDONLY | OFlags::CLOEXEC)?;
        elsewhere(move || Ok(sys::syncfs(directory)?)).await
    }

    async fn setxattr(&self, _request: &Request, setxattr: Setxattr<'_>) -> Result<()> {
        let path = self.nodes.get(setxattr.node)?.path()?;
        Ok(sys::setxattr(
            path,
            setxattr.name,
            setxattr.value,
            XattrFlags::from_bits_retain(setxattr.flags),
        )?)
    }

    async fn getxattr(&self, _request: &Request, getxattr: Getxattr<'_>) -> Result<Bytes> {
        // Before it writes, the kernel asks for what hardly any file has: a small buffer does for that.
        let mut value = Vec::with_capacity(match getxattr.size {
            0 => XATTR_MOST,
            size => XATTR_MOST.min(size as usize),
        });
        let path = self.nodes.get(getxattr.node)?.path()?;
        sys::getxattr(path, getxattr.name, rustix::buffer::spare_capacity(&mut value))?;
        Ok(value.into())
    }

    async fn listxattr(&self, _request: &Request, listxattr: Listxattr) -> Result<Bytes> {
        let path = self.nodes.get(listxattr.node)?.path()?;
        let mut names = Vec::with_capacity(XATTR_MOST);
        sys::listxattr(path, rustix::buffer::spare_capacity(&mut names))?;
        Ok(Bytes::copy_from_slice(&names))
    }

    async fn removexattr(&self, _request: &Request, removexattr: Removexattr<'_>) -> Result<()> {
        Ok(sys::removexattr(
            self.nodes.get(removexattr.node)?.path()?,
            removexattr.name,
        )?)
    }

    async fn fallocate(&self, _request: &Request, fallocate: Fallocate) -> Result<()> {
        let file = self.files.get(fallocate.handle)?;
        let mode = FallocateFlags::from_bits_retain(fallocate.mode);
        Ok(sys::fallocate(&file, mode, fallocate.offset, fallocate.length)?)
    }

    async fn lseek(&self, _request: &Request, lseek: Lseek) -> Result<u64> {
        const SEEK_DATA: u32 = 3;
        let to = if lseek.whence == SEEK_DATA {
            sys::SeekFrom::Data(lseek.offset)
        } else {
            sys::SeekFrom::Hole(lseek.offset)
        };
        Ok(sys::seek(&*self.files.get(lseek.handle)?, to)?)
    }

    async fn copy_file_range(&self, _request: &Request, copy: CopyFileRange) -> Result<u64> {
        let (from, to) = (self.files.get(copy.handle)?, self.files.get(copy.to_handle)?);
        let (mut offset, mut to_offset) = (copy.offset, copy.to_offset);
        let length = usize::try_from(copy.length).unwrap_or(usize::MAX);
        Ok(sys::copy_file_range(&from, Some(&mut offset), &to, Some(&mut to_offset), length)? as u64)
    }
}
