use super::Invalidator;
use super::convert::{
    attr, attributes, entry, errno, kind_of, kind_of_mode, lock, lock_range, set_attributes, unknown_handle, xattr_mode,
};
use super::handles::{Ahead, Handles};
use crate::joined::Joined;
use bytes::Bytes;
use lazarette_client as client;
use lazarette_client::{File, Found, LockKind, LockOwner, NewNode, OpenMode, SetAttributes, Volume};
use lazarette_fuse::abi::OpenReplyFlags;
use lazarette_fuse::attributes::{Lock, LockKind as Requested};
use lazarette_fuse::operation::{
    Create, Fallocate, Flush, Forget, Fsync, Getattr, Getxattr, Link, Listxattr, LockRequest, Lookup, Mkdir, Mknod,
    Open, Read, Readdir, Readlink, Release, Remove, Removexattr, Rename, Setattr, Setxattr, StatfsQuery, Symlink,
    Write,
};
use lazarette_fuse::{
    Attr, Attributes, Data, Entry, Errno, Filesystem, Kind, Listed, Listing, Opened, Request, Result, Statfs,
};
use lazarette_types::ErrorCode;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;
use std::time::Duration;

/// Entries asked for at a time when a directory is listed.
const LISTING: u32 = 256;
/// Directory offsets 1 and 2 are "." and ".."; the owner's cookies follow.
const DOTS: u64 = 2;
/// For "..", whose number nobody needs: as libfuse has it.
const UNKNOWN_INODE: u64 = 0xffff_ffff;
const O_DSYNC: u32 = 0o10_000;
/// Includes O_DSYNC.
const O_SYNC: u32 = 0o4_010_000;
const O_TRUNC: u32 = 0o1000;
const O_EXCL: u32 = 0o200;
const O_APPEND: u32 = 0o2000;
const S_ISUID: u32 = 0o4000;
const S_ISGID: u32 = 0o2000;
const S_IXGRP: u32 = 0o10;
const FALLOC_FL_KEEP_SIZE: u32 = 1;
const FALLOC_FL_PUNCH_HOLE: u32 = 2;
const FALLOC_FL_ZERO_RANGE: u32 = 0x10;
const RENAME_NOREPLACE: u32 = 1;
const RENAME_EXCHANGE: u32 = 2;

/// A volume as the kernel sees it.
pub(crate) struct VolumeFilesystem {
    shared: Arc<Shared>,
}

struct Shared {
    volume: Joined,
    handles: Handles,
    invalidator: Invalidator,
}

/// Access control lists are not kept, and saying so here saves asking the owner about every file.
fn refuse_acl(name: &OsStr) -> Result<()> {
    if name.as_bytes().starts_with(b"system.posix_acl_") {
        return Err(Errno::EOPNOTSUPP);
    }
    Ok(())
}

fn open_mode(flags: u32) -> OpenMode {
    OpenMode {
        append: flags & O_APPEND != 0,
        truncate: flags & O_TRUNC != 0,
    }
}

fn node(kind: client::Kind, mode: u32, request: &Request) -> NewNode {
    NewNode {
        uid: request.uid(),
        gid: request.gid(),
        ..NewNode::new(kind, mode & 0o7777)
    }
}

/// Whether a file has bits that must not survive a change by another than its owner.
fn has_privileges(attr: &client::Attr) -> bool {
    let group = S_ISGID | S_IXGRP;
    attr.kind() == client::Kind::File && (attr.mode & S_ISUID != 0 || attr.mode & group == group)
}

/// Drops set-id bits; the kernel leaves it to us to know whether there are any.
async fn drop_privileges(volume: &Volume, entry: client::Entry) -> client::Result<client::Entry> {
    if !has_privileges(&entry.attr) {
        return Ok(entry);
    }
    let set = SetAttributes {
        drop_privileges: true,
        ..SetAttributes::default()
    };
    volume.set_attr(entry.attr.ino, set).await
}

impl Shared {
    fn volume(&self) -> Arc<Volume> {
        self.volume.present()
    }

    fn file(&self, handle: u64) -> client::Result<Arc<File>> {
        self.handles.file(handle).ok_or_else(unknown_handle)
    }

    /// A new handle, and how the kernel is to treat it. Pages from before stay only if the file has
    /// not changed since; attributes that the kernel may still hold are dropped with them.
    async fn opened(&self, file: File, entry: &client::Entry, created: bool) -> Opened {
        let mut flags = OpenReplyFlags::empty();
        if file.appends() {
            // The kernel's idea of the end of the file must not get in the way.
            flags |= OpenReplyFlags::DIRECT_IO;
        } else if self.handles.note_cached(entry.attr.ino, entry.attr.change) {
            flags |= OpenReplyFlags::KEEP_CACHE;
        } else if !created {
            self.invalidator.attributes(entry.attr.ino).await;
        }
        Opened {
            handle: self.handles.add_file(file),
            flags,
            backing: 0,
        }
    }

    async fn open(&self, open: Open) -> client::Result<Opened> {
        let (file, mut entry) = self.volume().open(open.node, open_mode(open.flags)).await?;
        if open.kill_suidgid {
            entry = drop_privileges(file.volume(), entry).await?;
        }
        Ok(self.opened(file, &entry, false).await)
    }

    async fn write(&self, write: &Write) -> client::Result<()> {
        let file = self.file(write.handle)?;
        if write.kill_suidgid && has_privileges(&file.attr()) {
            let entry = file.volume().get_attr(file.ino()).await?;
            drop_privileges(file.volume(), entry).await?;
        }
        if write.from_cache {
            // Pages of a shared mapping, through whichever handle the kernel found.
            return file.write_at(write.offset, &write.data).await;
        }
        file.write(write.offset, &write.data).await?;
        if write.flags & O_DSYNC != 0 && !file.appends() {
            let all = write.flags & O_SYNC == O_SYNC;
            if all {
                file.fsync().await?
            } else {
                file.sync_data().await?
            }
        }
        Ok(())
    }

    /// Entries after the offset, from what was read ahead or from the owner.
    async fn list(&self, ino: u64, offset: u64, ahead: &mut Ahead) -> client::Result<()> {
        let after = offset.saturating_sub(DOTS);
        let known = ahead.fresh_until.is_some() && ahead.after == after && offset > 0;
        if known && (!ahead.entries.is_empty() || ahead.end) {
            return Ok(());
        }
        let asked = tokio::time::Instant::now();
        let news = self.volume().news();
        let (entries, end, ttl) = self.volume().read_dir(ino, after, LISTING).await?;
        *ahead = Ahead {
            entries: entries.into(),
            after,
            end,
            fresh_until: Some(asked + ttl),
            news,
        };
        Ok(())
    }

    async fn lock(&self, request: LockRequest) -> client::Result<()> {
        let file = self.file(request.handle)?;
        let range = lock_range(&request);
        if request.lock.kind == Requested::Unlock {
            file.lock(range, false).await?;
            return Ok(());
        }
        let before = file.attr().change;
        let entry = file.lock(range, request.wait).await?;
        // Whoever had the lock before may have written.
        if entry.attr.change != before || entry.ttl.is_zero() {
            self.handles.note_cached(entry.attr.ino, entry.attr.change);
            self.invalidator.all(entry.attr.ino).await;
        }
        Ok(())
    }

    async fn release(&self, release: Release) {
        let Some(file) = self.handles.remove_file(release.handle) else {
            return;
        };
        if release.flock_unlock
            && let Err(error) = file.unlock_all(LockKind::Flock, LockOwner(release.lock_owner)).await
        {
            tracing::warn!(%error, ino = file.ino(), "cannot release a lock at close");
        }
        if let Err(error) = file.close().await {
            tracing::warn!(%error, ino = file.ino(), "closing a file failed after its last close(2)");
        }
    }
}

impl VolumeFilesystem {
    pub(super) fn new(volume: Joined, invalidator: Invalidator) -> Self {
        Self {
            shared: Arc::new(Shared {
                volume,
                handles: Handles::default(),
                invalidator,
            }),
        }
    }

    /// Another session has taken the place of one that was ended: what the kernel has cached is from the old
    /// one, and may show writes that are lost. Handles stay with the session that they are from.
    pub(crate) async fn joined_anew(&self) {
        let Shared {
            handles, invalidator, ..
        } = &*self.shared;
        for ino in handles.forget_cached() {
            invalidator.all(ino).await;
        }
        handles.forget_listings().await;
    }

    /// Runs a change to its end, also when the caller is killed meanwhile: what this client knows of
    /// the volume is updated by its answer.
    async fn change<T: Send + 'static, F>(&self, work: impl FnOnce(Arc<Shared>) -> F) -> Result<T>
    where
        F: Future<Output = client::Result<T>> + Send + 'static,
    {
        match tokio::spawn(work(self.shared.clone())).await {
            Ok(result) => result.map_err(errno),
            Err(_) => Err(Errno::EIO),
        }
    }

    async fn make(&self, parent: u64, name: &OsStr, node: NewNode) -> Result<Entry> {
        let name = name.as_bytes().to_vec();
        self.change(|fs| async move { fs.volume().make(parent, &name, node).await })
            .await
            .map(entry)
    }
}

impl Filesystem for VolumeFilesystem {
    async fn lookup(&self, _: &Request, lookup: Lookup<'_>) -> Result<Entry> {
        let found = self.shared.volume().find(lookup.parent, lookup.name.as_bytes()).await;
        match found.map_err(errno)? {
            Found::Entry(found) => Ok(entry(found)),
            Found::Missing(Duration::ZERO) => Err(Errno::ENOENT),
            Found::Missing(entry_ttl) => Ok(Entry {
                node: 0,
                entry_ttl,
                ..Entry::default()
            }),
        }
    }

    fn forget(&self, forgets: &[Forget]) {
        for forget in forgets {
            self.shared.handles.forget(forget.node);
        }
    }

    async fn getattr(&self, _: &Request, getattr: Getattr) -> Result<Attributes> {
        let found = match self.shared.volume().get_attr(getattr.node).await {
            Err(error) if error.code() == ErrorCode::Stale => self.shared.handles.removed(getattr.node).ok_or(error),
            found => found,
        };
        found.map(attributes).map_err(errno)
    }

    async fn setattr(&self, _: &Request, setattr: Setattr) -> Result<Attributes> {
        let (ino, set) = (setattr.node, set_attributes(&setattr));
        self.change(|fs| async move {
            match setattr.handle {
                // With the rights that it was opened with: its locks may be others' since.
                Some(handle) => fs.file(handle)?.volume().set_attr(ino, set).await,
                None => fs.volume().set_attr(ino, set).await,
            }
        })
        .await
        .map(attributes)
    }

    async fn readlink(&self, _: &Request, readlink: Readlink) -> Result<OsString> {
        let target = self.shared.volume().read_link(readlink.node).await.map_err(errno)?;
        Ok(OsString::from_vec(target.to_vec()))
    }

    async fn symlink(&self, request: &Request, symlink: Symlink<'_>) -> Result<Entry> {
        let node = NewNode {
            target: Bytes::copy_from_slice(symlink.target.as_bytes()),
            ..node(client::Kind::Symlink, 0o777, request)
        };
        self.make(symlink.parent, symlink.name, node).await
    }

    async fn mknod(&self, request: &Request, mknod: Mknod<'_>) -> Result<Entry> {
        let node = NewNode {
            rdev: mknod.rdev,
            ..node(kind_of_mode(mknod.mode)?, mknod.mode, request)
        };
        self.make(mknod.parent, mknod.name, node).await
    }

    async fn mkdir(&self, request: &Request, mkdir: Mkdir<'_>) -> Result<Entry> {
        let node = node(client::Kind::Directory, mkdir.mode, request);
        self.make(mkdir.parent, mkdir.name, node).await
    }

    async fn unlink(&self, _: &Request, remove: Remove<'_>) -> Result<()> {
        let name = remove.name.as_bytes().to_vec();
        self.change(|fs| async move { fs.volume().unlink(remove.parent, &name).await })
            .await
    }

    async fn rmdir(&self, _: &Request, remove: Remove<'_>) -> Result<()> {
        let name = remove.name.as_bytes().to_vec();
        self.change(|fs| async move {
            let removed = fs.volume().rmdir(remove.parent, &name).await?;
            fs.handles.note_removed(removed);
            Ok(())
        })
        .await
    }

    async fn rename(&self, _: &Request, rename: Rename<'_>) -> Result<()> {
        // Whiteouts are for layers of overlayfs, which needs more than them.
        if rename.flags & !(RENAME_NOREPLACE | RENAME_EXCHANGE) != 0 {
            return Err(Errno::EINVAL);
        }
        let no_replace = rename.flags & RENAME_NOREPLACE != 0;
        let exchange = rename.flags & RENAME_EXCHANGE != 0;
        let (parent, name) = (rename.parent, rename.name.as_bytes().to_vec());
        let (new_parent, new_name) = (rename.new_parent, rename.new_name.as_bytes().to_vec());
        self.change(|fs| async move {
            let (from, to) = ((parent, &name[..]), (new_parent, &new_name[..]));
            fs.volume().rename(from, to, no_replace, exchange).await
        })
        .await
    }

    async fn link(&self, _: &Request, link: Link<'_>) -> Result<Entry> {
        let name = link.new_name.as_bytes().to_vec();
        self.change(|fs| async move { fs.volume().link(link.node, link.new_parent, &name).await })
            .await
            .map(entry)
    }

    async fn open(&self, _: &Request, open: Open) -> Result<Opened> {
        if open.kill_suidgid {
            return self.change(|fs| async move { fs.open(open).await }).await;
        }
        self.shared.open(open).await.map_err(errno)
    }

    async fn create(&self, request: &Request, create: Create<'_>) -> Result<(Entry, Opened)> {
        let node = node(client::Kind::File, create.mode, request);
        let (parent, name) = (create.parent, create.name.as_bytes().to_vec());
        let exclusive = create.flags & O_EXCL != 0;
        let mode = open_mode(create.flags);
        self.change(|fs| async move {
            let (file, found) = fs.volume().create(parent, &name, node, exclusive, mode).await?;
            let opened = fs.opened(file, &found, true).await;
            Ok((entry(found), opened))
        })
        .await
    }

    async fn tmpfile(&self, request: &Request, create: Create<'_>) -> Result<(Entry, Opened)> {
        let node = node(client::Kind::File, create.mode, request);
        let (parent, mode) = (create.parent, open_mode(create.flags));
        self.change(|fs| async move {
            let (file, found) = fs.volume().create_unnamed(parent, node, mode).await?;
            let opened = fs.opened(file, &found, true).await;
            Ok((entry(found), opened))
        })
        .await
    }

    async fn read(&self, _: &Request, read: Read) -> Result<Data> {
        let file = self.shared.file(read.handle).map_err(errno)?;
        let data = file.read(read.offset, read.size).await;
        data.map(Data::from).map_err(errno)
    }

    async fn write(&self, _: &Request, write: Write) -> Result<u32> {
        let taken = write.data.len() as u32;
        self.change(|fs| async move { fs.write(&write).await }).await?;
        Ok(taken)
    }

    /// What close(2) does: everything flushed, the process's POSIX locks released.
    async fn flush(&self, _: &Request, flush: Flush) -> Result<()> {
        let file = self.shared.file(flush.handle).map_err(errno)?;
        let flushed = file.fsync().await;
        let unlocked = file.unlock_all(LockKind::Posix, LockOwner(flush.lock_owner)).await;
        flushed.and(unlocked).map_err(errno)
    }

    async fn release(&self, _: &Request, release: Release) -> Result<()> {
        self.shared.release(release).await;
        Ok(())
    }

    async fn fsync(&self, _: &Request, fsync: Fsync) -> Result<()> {
        let file = self.shared.file(fsync.handle).map_err(errno)?;
        let synced = if fsync.data_only {
            file.sync_data().await
        } else {
            file.fsync().await
        };
        synced.map_err(errno)
    }

    async fn opendir(&self, _: &Request, _: Open) -> Result<Opened> {
        Ok(Opened {
            handle: self.shared.handles.add_directory(),
            ..Opened::default()
        })
    }

    async fn readdir(&self, _: &Request, readdir: Readdir, listing: &mut Listing) -> Result<()> {
        let (ino, offset) = (readdir.node, readdir.offset);
        let ahead = self.shared.handles.directory(readdir.handle);
        let ahead = ahead.ok_or_else(|| errno(unknown_handle()))?;
        let mut ahead = ahead.lock().await;
        self.shared.list(ino, offset, &mut ahead).await.map_err(errno)?;
        for (cookie, ino, name) in [(1, ino, "."), (2, UNKNOWN_INODE, "..")] {
            if offset < cookie && listing.add(ino, cookie, Kind::Directory, OsStr::new(name)) == Listed::Full {
                return Ok(());
            }
        }
        let ttl = ahead.ttl();
        // The kernel takes attributes for as new as its request, so these must not be from before something
        // that happened here since: it would forget what was written to the end of a file, for example.
        let current = ahead.news == self.shared.volume().news();
        while let Some(next) = ahead.entries.front() {
            let cookie = next.cookie;
            let attr = next.attr.as_ref().map_or_else(Attr::default, attr);
            let entry = Entry {
                node: attr.ino,
                generation: 0,
                attr,
                attr_ttl: ttl,
                entry_ttl: ttl,
            };
            let name = OsStr::from_bytes(&next.name);
            let listed = match current {
                true => listing.add_plus(&entry, cookie + DOTS, name),
                false => listing.add(entry.node, cookie + DOTS, kind_of(&entry.attr), name),
            };
            if listed == Listed::Full {
                break;
            }
            ahead.entries.pop_front();
            ahead.after = cookie;
        }
        Ok(())
    }

    async fn releasedir(&self, _: &Request, release: Release) -> Result<()> {
        self.shared.handles.remove_directory(release.handle);
        Ok(())
    }

    async fn fsyncdir(&self, _: &Request, _: Fsync) -> Result<()> {
        // Every metadata operation was durable when it was answered.
        Ok(())
    }

    async fn statfs(&self, _: &Request, _: StatfsQuery) -> Result<Statfs> {
        const BLOCK: u64 = 4096;
        let stat = self.shared.volume().stat_fs().await.map_err(errno)?;
        let free = stat.size_bytes.saturating_sub(stat.used_bytes) / BLOCK;
        Ok(Statfs {
            blocks: stat.size_bytes / BLOCK,
            free,
            available: free,
            files: stat.inodes,
            free_files: stat.inodes.saturating_sub(stat.used_inodes),
            bsize: BLOCK as u32,
            name_max: lazarette_types::NAME_MAX as u32,
            frsize: BLOCK as u32,
        })
    }

    async fn setxattr(&self, _: &Request, setxattr: Setxattr<'_>) -> Result<()> {
        refuse_acl(setxattr.name)?;
        let mode = xattr_mode(setxattr.flags)?;
        let (ino, name, value) = (
            setxattr.node,
            setxattr.name.as_bytes().to_vec(),
            setxattr.value.to_vec(),
        );
        self.change(|fs| async move { fs.volume().set_xattr(ino, &name, &value, mode).await })
            .await
    }

    async fn getxattr(&self, _: &Request, getxattr: Getxattr<'_>) -> Result<Bytes> {
        refuse_acl(getxattr.name)?;
        let volume = self.shared.volume();
        let value = volume.get_xattr(getxattr.node, getxattr.name.as_bytes());
        value.await.map_err(errno)
    }

    async fn listxattr(&self, request: &Request, listxattr: Listxattr) -> Result<Bytes> {
        let names = self.shared.volume().list_xattr(listxattr.node).await.map_err(errno)?;
        let mut all = Vec::new();
        for name in names {
            // The kernel checks who may read or set them, but not who may see their names.
            if name.starts_with(b"trusted.") && request.uid() != 0 {
                continue;
            }
            all.extend_from_slice(&name);
            all.push(0);
        }
        Ok(all.into())
    }

    async fn removexattr(&self, _: &Request, removexattr: Removexattr<'_>) -> Result<()> {
        refuse_acl(removexattr.name)?;
        let (ino, name) = (removexattr.node, removexattr.name.as_bytes().to_vec());
        self.change(|fs| async move { fs.volume().remove_xattr(ino, &name).await })
            .await
    }

    async fn getlk(&self, _: &Request, request: LockRequest) -> Result<Lock> {
        let file = self.shared.file(request.handle).map_err(errno)?;
        let held = file.test_lock(lock_range(&request)).await;
        held.map(lock).map_err(errno)
    }

    async fn setlk(&self, _: &Request, request: LockRequest) -> Result<()> {
        // Not to its end at any price: whoever gives up waiting shall not get the lock.
        self.shared.lock(request).await.map_err(errno)
    }

    async fn fallocate(&self, _: &Request, fallocate: Fallocate) -> Result<()> {
        let Fallocate {
            offset, length, mode, ..
        } = fallocate;
        let keeps_size = mode & FALLOC_FL_KEEP_SIZE != 0;
        self.change(|fs| async move {
            let file = fs.file(fallocate.handle)?;
            let end = offset.saturating_add(length);
            match mode & !FALLOC_FL_KEEP_SIZE {
                FALLOC_FL_PUNCH_HOLE if keeps_size => file.zero(offset, length).await,
                FALLOC_FL_ZERO_RANGE => {
                    file.zero(offset, length).await?;
                    if keeps_size { Ok(()) } else { file.grow(end).await }
                }
                0 if !keeps_size => file.grow(end).await,
                // The bytes of a file count whether they are written or not. Beyond its end nothing can be
                // set aside.
                0 if file.volume().get_attr(file.ino()).await?.attr.size >= end => Ok(()),
                _ => Err(client::Error::new(ErrorCode::Unsupported, "mode of fallocate")),
            }
        })
        .await
    }
}
