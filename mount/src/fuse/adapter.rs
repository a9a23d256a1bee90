use super::Invalidator;
use super::convert::{attr, errno, kind, kind_of_mode, nanoseconds, time_or_now};
use super::handles::{Handles, Listing};
use crate::caller;
use crate::mountpoint::MAX_REQUEST;
use bytes::Bytes;
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock,
    ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use lazarette_client::{
    DirEntry, Entry, Error, File, Kind, LockKind, LockMode, LockRange, NewNode, OpenMode, SetAttributes, Volume,
    XattrMode,
};
use lazarette_types::ErrorCode;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::runtime::Handle;

/// Inode numbers are never used again, so there are no generations.
const GENERATION: Generation = Generation(0);
/// Entries asked for at a time when a directory is listed.
const LISTING: u32 = 256;
/// Directory offsets 1 and 2 are "." and ".."; the owner's cookies follow.
const DOTS: u64 = 2;
/// For "..", whose number nobody needs: as libfuse has it.
const UNKNOWN_INODE: INodeNo = INodeNo(0xffff_ffff);
/// Inodes that statfs reports as free: there is no limit.
const FREE_INODES: u64 = 1 << 40;

const O_DSYNC: i32 = 0o10_000;
const O_TRUNC: i32 = 0o1000;
const O_EXCL: i32 = 0o200;
const O_APPEND: i32 = 0o2000;
const S_ISUID: u32 = 0o4000;
const S_ISGID: u32 = 0o2000;
const S_IXGRP: u32 = 0o10;

/// Requests become tasks; replies are sent by them.
pub(super) struct Adapter {
    runtime: Handle,
    shared: Arc<Shared>,
}

struct Shared {
    volume: Volume,
    handles: Handles,
    invalidator: Invalidator,
}

type Result<T> = std::result::Result<T, Error>;

impl Adapter {
    /// Must be called within a tokio runtime, which then serves the requests.
    pub(super) fn new(volume: Volume, invalidator: Invalidator) -> Self {
        Self {
            runtime: Handle::current(),
            shared: Arc::new(Shared {
                volume,
                handles: Handles::default(),
                invalidator,
            }),
        }
    }

    fn spawn<F>(&self, serve: impl FnOnce(Arc<Shared>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.runtime.spawn(serve(self.shared.clone()));
    }
}

fn reply_entry(reply: ReplyEntry, result: Result<Entry>) {
    match result {
        Ok(entry) => reply.entry(&entry.ttl, &attr(&entry.attr), GENERATION),
        Err(error) => reply.error(errno(&error)),
    }
}

fn reply_attr(reply: ReplyAttr, result: Result<Entry>) {
    match result {
        Ok(entry) => reply.attr(&entry.ttl, &attr(&entry.attr)),
        Err(error) => reply.error(errno(&error)),
    }
}

fn reply_empty(reply: ReplyEmpty, result: Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

/// A value whose size may be asked for first.
fn reply_xattr(reply: ReplyXattr, size: u32, result: Result<Bytes>) {
    match result {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(errno(&error)),
    }
}

/// Access control lists are not kept, and saying so here saves asking the owner about every file.
fn is_acl(name: &[u8]) -> bool {
    name.starts_with(b"system.posix_acl_")
}

fn open_mode(flags: i32) -> OpenMode {
    OpenMode {
        append: flags & O_APPEND != 0,
        truncate: flags & O_TRUNC != 0,
    }
}

fn node(kind: Kind, mode: u32, request: &Request) -> NewNode {
    NewNode {
        kind,
        mode: mode & 0o7777,
        uid: request.uid(),
        gid: request.gid(),
        rdev: 0,
        target: Bytes::new(),
    }
}

/// The mode without the bits that must not survive a change by another than the owner.
fn without_privileges(mode: u32) -> Option<u32> {
    let mut drop = mode & S_ISUID;
    if mode & S_IXGRP != 0 {
        drop |= mode & S_ISGID;
    }
    (drop != 0).then_some(mode & !drop)
}

impl Shared {
    fn file(&self, handle: FileHandle) -> Result<Arc<File>> {
        self.handles
            .file(handle.0)
            .ok_or_else(|| Error::new(ErrorCode::InvalidArgument, "unknown file handle"))
    }

    /// Drops set-id bits; the kernel leaves it to us to know when.
    async fn drop_privileges(&self, entry: Entry) -> Result<Entry> {
        match without_privileges(entry.attr.mode) {
            Some(mode) if entry.attr.kind() == Kind::File => {
                let set = SetAttributes {
                    mode: Some(mode),
                    ..SetAttributes::default()
                };
                self.volume.set_attr(entry.attr.ino, set).await
            }
            _ => Ok(entry),
        }
    }

    /// A new handle, and how the kernel is to treat it. Pages from before stay only if the file has
    /// not changed since; attributes that the kernel may still hold are dropped with them.
    async fn opened(&self, file: File, entry: &Entry, created: bool) -> (FileHandle, FopenFlags) {
        let mut flags = FopenFlags::empty();
        if file.appends() {
            // The kernel's idea of the end of the file must not get in the way.
            flags |= FopenFlags::FOPEN_DIRECT_IO;
        } else if self.handles.note_cached(entry.attr.ino, entry.attr.change) {
            flags |= FopenFlags::FOPEN_KEEP_CACHE;
        } else if !created {
            self.invalidator.attributes(entry.attr.ino).await;
        }
        (FileHandle(self.handles.add_file(file)), flags)
    }

    async fn set_attr(&self, ino: u64, set: SetAttributes, uid: u32) -> Result<Entry> {
        let entry = self.volume.set_attr(ino, set).await?;
        let chown = (set.uid.is_some() || set.gid.is_some()) && set.mode.is_none();
        if chown || (set.size.is_some() && uid != 0) {
            return self.drop_privileges(entry).await;
        }
        Ok(entry)
    }

    async fn write(&self, handle: FileHandle, offset: u64, data: &[u8], how: WriteFlags, flags: i32) -> Result<()> {
        let file = self.file(handle)?;
        if how.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID) && without_privileges(file.attr().mode).is_some() {
            let entry = self.volume.get_attr(file.ino()).await?;
            self.drop_privileges(entry).await?;
        }
        if how.contains(WriteFlags::FUSE_WRITE_CACHE) {
            // Pages of a shared mapping, through whichever handle the kernel found.
            return file.write_at(offset, data).await;
        }
        file.write(offset, data).await?;
        if flags & O_DSYNC != 0 && !file.appends() {
            file.fsync().await?;
        }
        Ok(())
    }

    /// Entries after the offset, from what was read ahead or from the owner.
    async fn list(&self, ino: u64, offset: u64, listing: &mut Listing) -> Result<()> {
        let after = offset.saturating_sub(DOTS);
        let known = listing.fresh_until.is_some() && listing.after == after && offset > 0;
        if known && (!listing.entries.is_empty() || listing.end) {
            return Ok(());
        }
        let asked = tokio::time::Instant::now();
        let (entries, end, ttl) = self.volume.read_dir(ino, after, LISTING).await?;
        *listing = Listing {
            entries: entries.into(),
            after,
            end,
            fresh_until: Some(asked + ttl),
        };
        Ok(())
    }

    /// Passes entries to `add` until it says that the buffer is full.
    async fn read_dir(
        &self,
        ino: u64,
        handle: FileHandle,
        offset: u64,
        mut add: impl FnMut(Option<&DirEntry>, &str, u64, Duration) -> bool,
    ) -> Result<()> {
        let unknown = || Error::new(ErrorCode::InvalidArgument, "unknown directory handle");
        let listing = self.handles.directory(handle.0).ok_or_else(unknown)?;
        let mut listing = listing.lock().await;
        self.list(ino, offset, &mut listing).await?;
        for (at, dot) in [(1, "."), (2, "..")] {
            if offset < at && add(None, dot, at, Duration::ZERO) {
                return Ok(());
            }
        }
        let ttl = listing.ttl();
        while let Some(entry) = listing.entries.front() {
            let cookie = entry.cookie;
            if add(Some(entry), "", cookie + DOTS, ttl) {
                break;
            }
            listing.entries.pop_front();
            listing.after = cookie;
        }
        Ok(())
    }

    async fn lock(&self, file: &File, mut range: LockRange, wait: bool, thread: u32) -> Result<()> {
        let kind = caller::lock_kind(thread).await;
        range.kind = kind.unwrap_or(LockKind::Posix).into();
        if range.mode() == LockMode::Unlock {
            file.lock(range, false).await?;
            return Ok(());
        }
        let before = file.attr().change;
        let entry = if wait {
            tokio::select! {
                entry = file.lock(range, true) => entry?,
                () = caller::interrupted(thread) => {
                    return Err(Error::new(ErrorCode::Interrupted, "interrupted while waiting for a lock"));
                }
            }
        } else {
            file.lock(range, false).await?
        };
        // Whoever had the lock before may have written.
        if entry.attr.change != before || entry.ttl.is_zero() {
            self.handles.note_cached(entry.attr.ino, entry.attr.change);
            self.invalidator.all(entry.attr.ino).await;
        }
        Ok(())
    }

    /// What close(2) does: everything flushed, the process's POSIX locks released.
    async fn flush(&self, handle: FileHandle, owner: LockOwner) -> Result<()> {
        let file = self.file(handle)?;
        let flushed = file.fsync().await;
        file.unlock_all(LockKind::Posix, lazarette_client::LockOwner(owner.0))
            .await?;
        flushed
    }

    async fn release(&self, handle: FileHandle, owner: Option<LockOwner>) {
        let Some(file) = self.handles.remove_file(handle.0) else {
            return;
        };
        if let Some(owner) = owner {
            // Where flock and fcntl could not be told apart, it was taken as a POSIX lock.
            for kind in [LockKind::Flock, LockKind::Posix] {
                if let Err(error) = file.unlock_all(kind, lazarette_client::LockOwner(owner.0)).await {
                    tracing::warn!(%error, ino = file.ino(), "cannot release a lock at close");
                }
            }
        }
        if let Err(error) = file.close().await {
            tracing::warn!(%error, ino = file.ino(), "closing a file failed after its last close(2)");
        }
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let needed = InitFlags::FUSE_POSIX_LOCKS
            | InitFlags::FUSE_FLOCK_LOCKS
            | InitFlags::FUSE_ATOMIC_O_TRUNC
            | InitFlags::FUSE_AUTO_INVAL_DATA;
        config.add_capabilities(needed).map_err(|missing| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                format!("this kernel's FUSE lacks {missing:?}; use Linux 5.4 or newer"),
            )
        })?;
        for wanted in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            // Without it the kernel asks for security.capability before every write.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            // Shared mappings of files that are open to append.
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ] {
            let _ = config.add_capabilities(wanted);
        }
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_background(64);
        let _ = config.set_congestion_threshold(48);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        self.spawn(|fs| async move {
            reply_entry(reply, fs.volume.lookup(parent.0, name.as_bytes()).await);
        });
    }

    fn forget(&self, _: &Request, ino: INodeNo, _: u64) {
        self.shared.handles.forget(ino.0);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.spawn(|fs| async move {
            reply_attr(reply, fs.volume.get_attr(ino.0).await);
        });
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttributes {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size,
            atime: atime.map(time_or_now),
            mtime: mtime.map(time_or_now),
            ctime: ctime.map(nanoseconds),
        };
        let caller = request.uid();
        self.spawn(|fs| async move {
            reply_attr(reply, fs.set_attr(ino.0, set, caller).await);
        });
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        self.spawn(|fs| async move {
            match fs.volume.read_link(ino.0).await {
                Ok(target) => reply.data(&target),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let Some(kind) = kind_of_mode(mode) else {
            return reply.error(Errno::EINVAL);
        };
        let node = NewNode {
            rdev,
            ..node(kind, mode, request)
        };
        let name = name.to_owned();
        self.spawn(|fs| async move {
            reply_entry(reply, fs.volume.make(parent.0, name.as_bytes(), node).await);
        });
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        let node = node(Kind::Directory, mode, request);
        let name = name.to_owned();
        self.spawn(|fs| async move {
            reply_entry(reply, fs.volume.make(parent.0, name.as_bytes(), node).await);
        });
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.spawn(|fs| async move {
            reply_empty(reply, fs.volume.unlink(parent.0, name.as_bytes()).await);
        });
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.spawn(|fs| async move {
            reply_empty(reply, fs.volume.rmdir(parent.0, name.as_bytes()).await);
        });
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let node = NewNode {
            target: Bytes::copy_from_slice(target.as_os_str().as_bytes()),
            ..node(Kind::Symlink, 0o777, request)
        };
        let name = name.to_owned();
        self.spawn(|fs| async move {
            reply_entry(reply, fs.volume.make(parent.0, name.as_bytes(), node).await);
        });
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if flags.contains(RenameFlags::RENAME_WHITEOUT) {
            return reply.error(Errno::EINVAL);
        }
        let no_replace = flags.contains(RenameFlags::RENAME_NOREPLACE);
        let exchange = flags.contains(RenameFlags::RENAME_EXCHANGE);
        let name = name.to_owned();
        let new_name = new_name.to_owned();
        self.spawn(|fs| async move {
            let from = (parent.0, name.as_bytes());
            let to = (new_parent.0, new_name.as_bytes());
            reply_empty(reply, fs.volume.rename(from, to, no_replace, exchange).await);
        });
    }

    fn link(&self, _: &Request, ino: INodeNo, new_parent: INodeNo, new_name: &OsStr, reply: ReplyEntry) {
        let name = new_name.to_owned();
        self.spawn(|fs| async move {
            reply_entry(reply, fs.volume.link(ino.0, new_parent.0, name.as_bytes()).await);
        });
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let mode = open_mode(flags.0);
        let caller = request.uid();
        self.spawn(|fs| async move {
            let opened = async {
                let (file, mut entry) = fs.volume.open(ino.0, mode).await?;
                if mode.truncate && caller != 0 {
                    entry = fs.drop_privileges(entry).await?;
                }
                Ok(fs.opened(file, &entry, false).await)
            };
            match opened.await {
                Ok((handle, flags)) => reply.opened(handle, flags),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let node = node(Kind::File, mode, request);
        let name = name.to_owned();
        self.spawn(|fs| async move {
            let created = async {
                let exclusive = flags & O_EXCL != 0;
                let mode = open_mode(flags);
                let (file, entry) = fs
                    .volume
                    .create(parent.0, name.as_bytes(), node, exclusive, mode)
                    .await?;
                let (handle, flags) = fs.opened(file, &entry, true).await;
                Ok::<_, Error>((entry, handle, flags))
            };
            match created.await {
                Ok((entry, handle, flags)) => {
                    reply.created(&entry.ttl, &attr(&entry.attr), GENERATION, handle, flags);
                }
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.spawn(|fs| async move {
            let read = async { fs.file(handle)?.read(offset, size).await };
            match read.await {
                Ok(data) => reply.data(&data),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        how: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = data.to_vec();
        self.spawn(|fs| async move {
            match fs.write(handle, offset, &data, how, flags.0).await {
                Ok(()) => reply.written(data.len() as u32),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, handle: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        self.spawn(|fs| async move {
            reply_empty(reply, fs.flush(handle, owner).await);
        });
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        owner: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.spawn(|fs| async move {
            fs.release(handle, owner).await;
            reply.ok();
        });
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        self.spawn(|fs| async move {
            let fsync = async { fs.file(handle)?.fsync().await };
            reply_empty(reply, fsync.await);
        });
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(self.shared.handles.add_directory()), FopenFlags::empty());
    }

    fn readdir(&self, _: &Request, ino: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.spawn(|fs| async move {
            let read = fs.read_dir(ino.0, handle, offset, |entry, dot, at, _| match entry {
                None if dot == "." => reply.add(ino, at, fuser::FileType::Directory, dot),
                None => reply.add(UNKNOWN_INODE, at, fuser::FileType::Directory, dot),
                Some(entry) => entry.attr.as_ref().is_some_and(|attr| {
                    let name = OsStr::from_bytes(&entry.name);
                    reply.add(INodeNo(attr.ino), at, kind(attr.kind()), name)
                }),
            });
            match read.await {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn readdirplus(&self, _: &Request, ino: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        self.spawn(|fs| async move {
            let read = fs.read_dir(ino.0, handle, offset, |entry, dot, at, ttl| match entry {
                None => {
                    // The kernel takes no attributes from these two.
                    let number = if dot == "." { ino } else { UNKNOWN_INODE };
                    let like = lazarette_client::Attr {
                        ino: number.0,
                        kind: Kind::Directory.into(),
                        ..lazarette_client::Attr::default()
                    };
                    reply.add(number, at, dot, &Duration::ZERO, &attr(&like), GENERATION)
                }
                Some(entry) => entry.attr.as_ref().is_some_and(|found| {
                    let name = OsStr::from_bytes(&entry.name);
                    reply.add(INodeNo(found.ino), at, name, &ttl, &attr(found), GENERATION)
                }),
            });
            match read.await {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.shared.handles.remove_directory(handle.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // Every metadata operation was durable when it was answered.
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        const BLOCK: u64 = 4096;
        self.spawn(|fs| async move {
            match fs.volume.stat_fs().await {
                Ok(stat) => {
                    let free = stat.size_bytes.saturating_sub(stat.used_bytes) / BLOCK;
                    reply.statfs(
                        stat.size_bytes / BLOCK,
                        free,
                        free,
                        stat.used_inodes.saturating_add(FREE_INODES),
                        FREE_INODES,
                        BLOCK as u32,
                        lazarette_types::NAME_MAX as u32,
                        BLOCK as u32,
                    );
                }
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn setxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, value: &[u8], flags: i32, _: u32, reply: ReplyEmpty) {
        if is_acl(name.as_bytes()) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let mode = match flags {
            0 => XattrMode::Set,
            1 => XattrMode::Create,
            2 => XattrMode::Replace,
            _ => return reply.error(Errno::EINVAL),
        };
        let name = name.to_owned();
        let value = value.to_vec();
        self.spawn(|fs| async move {
            let set = fs.volume.set_xattr(ino.0, name.as_bytes(), &value, mode);
            reply_empty(reply, set.await);
        });
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if is_acl(name.as_bytes()) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let name = name.to_owned();
        self.spawn(|fs| async move {
            reply_xattr(reply, size, fs.volume.get_xattr(ino.0, name.as_bytes()).await);
        });
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.spawn(|fs| async move {
            let names = fs.volume.list_xattr(ino.0).await.map(|names| {
                let mut all = Vec::new();
                for name in names {
                    all.extend_from_slice(&name);
                    all.push(0);
                }
                Bytes::from(all)
            });
            reply_xattr(reply, size, names);
        });
    }

    fn removexattr(&self, _: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if is_acl(name.as_bytes()) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let name = name.to_owned();
        self.spawn(|fs| async move {
            reply_empty(reply, fs.volume.remove_xattr(ino.0, name.as_bytes()).await);
        });
    }

    fn getlk(
        &self,
        request: &Request,
        _: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let thread = request.pid();
        self.spawn(|fs| async move {
            let test = async {
                let mut range = lock_range(owner, start, end, typ, pid)?;
                range.kind = caller::lock_kind(thread).await.unwrap_or(LockKind::Posix).into();
                fs.file(handle)?.test_lock(range).await
            };
            match test.await {
                Ok(None) => reply.locked(0, 0, F_UNLCK, 0),
                Ok(Some(held)) => {
                    let typ = if held.mode() == LockMode::Shared {
                        F_RDLCK
                    } else {
                        F_WRLCK
                    };
                    reply.locked(held.start, held.end, typ, held.pid);
                }
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn setlk(
        &self,
        request: &Request,
        _: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let thread = request.pid();
        self.spawn(|fs| async move {
            let lock = async {
                let range = lock_range(owner, start, end, typ, pid)?;
                fs.lock(&*fs.file(handle)?, range, sleep, thread).await
            };
            reply_empty(reply, lock.await);
        });
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if mode != 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let caller = request.uid();
        self.spawn(|fs| async move {
            let grow = async {
                fs.file(handle)?;
                let end = offset.saturating_add(length);
                if fs.volume.get_attr(ino.0).await?.attr.size < end {
                    let set = SetAttributes {
                        size: Some(end),
                        ..SetAttributes::default()
                    };
                    fs.set_attr(ino.0, set, caller).await?;
                }
                Ok(())
            };
            reply_empty(reply, grow.await);
        });
    }

    // What the kernel does itself once it has heard that it must.

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: PollNotifier,
        _: PollEvents,
        _: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }
}

const F_RDLCK: i32 = 0;
const F_WRLCK: i32 = 1;
const F_UNLCK: i32 = 2;

fn lock_range(owner: LockOwner, start: u64, end: u64, typ: i32, pid: u32) -> Result<LockRange> {
    let mode = match typ {
        F_RDLCK => LockMode::Shared,
        F_WRLCK => LockMode::Exclusive,
        F_UNLCK => LockMode::Unlock,
        _ => return Err(Error::new(ErrorCode::InvalidArgument, "unknown lock type")),
    };
    Ok(LockRange {
        kind: LockKind::Posix.into(),
        mode: mode.into(),
        owner: owner.0,
        start,
        end: end.min(i64::MAX as u64),
        pid,
    })
}
