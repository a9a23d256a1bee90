//! The file system.

use crate::tree::{Content, PAGE, Pages, Tree};
use bytes::Bytes;
use lazarette_fuse::attributes::{Lock, LockKind};
use lazarette_fuse::operation::*;
use lazarette_fuse::*;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// The kernel is the only one to change anything.
const TTL: Duration = Duration::from_secs(3600);
const LARGEST: u64 = i64::MAX as u64;

/// A file system in memory.
pub(crate) struct Memory {
    tree: Mutex<Tree>,
    unlocked: Notify,
}

impl Memory {
    pub(crate) fn new() -> Self {
        let now = Timestamp::now();
        let root = Attr {
            ino: 1,
            mode: Kind::Directory.mode() | 0o755,
            nlink: 2,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            atime: now,
            mtime: now,
            ctime: now,
            ..Attr::default()
        };
        Self {
            tree: Mutex::new(Tree::new(root)),
            unlocked: Notify::new(),
        }
    }

    /// All that there are, the root included.
    #[allow(dead_code, reason = "tests ask for it")]
    pub(crate) fn nodes(&self) -> u64 {
        self.tree().len()
    }

    fn tree(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn create_node(
        &self,
        request: &Request,
        parent: u64,
        name: Option<&OsStr>,
        attr: Attr,
        content: Content,
    ) -> Result<Entry> {
        let mut tree = self.tree();
        if let Some(name) = name {
            match tree.find(parent, name) {
                Err(Errno::ENOENT) => {}
                Ok(_) => return Err(Errno::EEXIST),
                Err(error) => return Err(error),
            }
        }
        let attr = Attr {
            uid: request.uid(),
            gid: request.gid(),
            ..attr
        };
        let number = tree.create(parent, attr, content)?;
        if let Some(name) = name {
            tree.enter(parent, name, number)?;
        }
        entry(&mut tree, number)
    }
}

/// An entry, for which the kernel holds a reference from now on.
fn entry(tree: &mut Tree, number: u64) -> Result<Entry> {
    let node = tree.node_mut(number)?;
    node.references += 1;
    Ok(Entry {
        node: number,
        generation: 0,
        attr: node.attr(),
        attr_ttl: TTL,
        entry_ttl: TTL,
    })
}

fn attributes(tree: &Tree, number: u64) -> Result<Attributes> {
    Ok(Attributes {
        attr: tree.node(number)?.attr(),
        ttl: TTL,
    })
}

fn file(content: &mut Content) -> Result<&mut Pages> {
    match content {
        Content::File(pages) => Ok(pages),
        Content::Directory { .. } => Err(Errno::EISDIR),
        _ => Err(Errno::EINVAL),
    }
}

fn opened() -> Opened {
    Opened {
        flags: abi::OpenReplyFlags::KEEP_CACHE,
        ..Opened::default()
    }
}

impl Filesystem for Memory {
    async fn lookup(&self, _request: &Request, lookup: Lookup<'_>) -> Result<Entry> {
        let mut tree = self.tree();
        match tree.look_up(lookup.parent, lookup.name) {
            Ok(number) => entry(&mut tree, number),
            Err(Errno::ENOENT) => Ok(Entry {
                entry_ttl: TTL,
                ..Entry::default()
            }),
            Err(error) => Err(error),
        }
    }

    fn forget(&self, forgets: &[Forget]) {
        let mut tree = self.tree();
        for forget in forgets {
            if let Ok(node) = tree.node_mut(forget.node) {
                node.references = node.references.saturating_sub(forget.lookups);
                tree.drop_unused(forget.node);
            }
        }
    }

    async fn getattr(&self, _request: &Request, getattr: Getattr) -> Result<Attributes> {
        attributes(&self.tree(), getattr.node)
    }

    async fn statx(&self, _request: &Request, statx: StatxQuery) -> Result<Statx> {
        let tree = self.tree();
        let node = tree.node(statx.node)?;
        Ok(Statx {
            attr: node.attr(),
            btime: Some(node.born),
            ttl: TTL,
            ..Statx::default()
        })
    }

    async fn setattr(&self, _request: &Request, setattr: Setattr) -> Result<Attributes> {
        let mut tree = self.tree();
        let now = Timestamp::now();
        let node = tree.node_mut(setattr.node)?;
        if let Some(size) = setattr.size {
            if size > LARGEST {
                return Err(Errno::EFBIG);
            }
            file(&mut node.content)?.clear(size, u64::MAX);
            node.attr.size = size;
            node.attr.mtime = now;
        }
        if let Some(mode) = setattr.mode {
            node.attr.mode = node.attr.mode & !0o7777 | mode & 0o7777;
        }
        node.attr.uid = setattr.uid.unwrap_or(node.attr.uid);
        node.attr.gid = setattr.gid.unwrap_or(node.attr.gid);
        let time = |time: Option<SetTime>, old: Timestamp| match time {
            None => old,
            Some(SetTime::Now) => now,
            Some(SetTime::At(time)) => time,
        };
        node.attr.atime = time(setattr.atime, node.attr.atime);
        node.attr.mtime = time(setattr.mtime, node.attr.mtime);
        node.attr.ctime = setattr.ctime.unwrap_or(now);
        attributes(&tree, setattr.node)
    }

    async fn readlink(&self, _request: &Request, readlink: Readlink) -> Result<OsString> {
        match &self.tree().node(readlink.node)?.content {
            Content::Symlink(target) => Ok(target.clone()),
            _ => Err(Errno::EINVAL),
        }
    }

    async fn symlink(&self, request: &Request, symlink: Symlink<'_>) -> Result<Entry> {
        let attr = Attr {
            mode: Kind::Symlink.mode() | 0o777,
            size: symlink.target.len() as u64,
            ..Attr::default()
        };
        self.create_node(
            request,
            symlink.parent,
            Some(symlink.name),
            attr,
            Content::Symlink(symlink.target.into()),
        )
    }

    async fn mknod(&self, request: &Request, mknod: Mknod<'_>) -> Result<Entry> {
        let kind = Kind::of_mode(mknod.mode).ok_or(Errno::EINVAL)?;
        let content = if kind == Kind::File {
            Content::File(Pages::default())
        } else {
            Content::Special
        };
        let attr = Attr {
            mode: kind.mode() | mknod.mode & 0o7777,
            rdev: mknod.rdev,
            ..Attr::default()
        };
        self.create_node(request, mknod.parent, Some(mknod.name), attr, content)
    }

    async fn mkdir(&self, request: &Request, mkdir: Mkdir<'_>) -> Result<Entry> {
        let content = Content::Directory {
            entries: BTreeMap::new(),
            parent: mkdir.parent,
        };
        let attr = Attr {
            mode: Kind::Directory.mode() | mkdir.mode & 0o7777,
            nlink: 2,
            ..Attr::default()
        };
        self.create_node(request, mkdir.parent, Some(mkdir.name), attr, content)
    }

    async fn unlink(&self, _request: &Request, remove: Remove<'_>) -> Result<()> {
        let mut tree = self.tree();
        let number = tree.find(remove.parent, remove.name)?;
        if tree.node(number)?.is_directory() {
            return Err(Errno::EISDIR);
        }
        tree.remove(remove.parent, remove.name)
    }

    async fn rmdir(&self, _request: &Request, remove: Remove<'_>) -> Result<()> {
        let mut tree = self.tree();
        let number = tree.find(remove.parent, remove.name)?;
        if !tree.entries(number)?.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        tree.remove(remove.parent, remove.name)
    }

    async fn rename(&self, _request: &Request, rename: Rename<'_>) -> Result<()> {
        const NOREPLACE: u32 = 1;
        const EXCHANGE: u32 = 2;
        let mut tree = self.tree();
        let number = tree.find(rename.parent, rename.name)?;
        let target = match tree.find(rename.new_parent, rename.new_name) {
            Ok(target) => Some(target),
            Err(Errno::ENOENT) => None,
            Err(error) => return Err(error),
        };
        match (rename.flags, target) {
            (NOREPLACE, Some(_)) => return Err(Errno::EEXIST),
            (0, Some(target)) if target == number => return Ok(()),
            (0, Some(target)) => {
                match (tree.node(number)?.is_directory(), tree.node(target)?.is_directory()) {
                    (true, false) => return Err(Errno::ENOTDIR),
                    (false, true) => return Err(Errno::EISDIR),
                    (true, true) if !tree.entries(target)?.is_empty() => return Err(Errno::ENOTEMPTY),
                    _ => {}
                }
                tree.remove(rename.new_parent, rename.new_name)?;
            }
            (0 | NOREPLACE, None) => {}
            (EXCHANGE, None) => return Err(Errno::ENOENT),
            (EXCHANGE, Some(_)) => {
                let other = tree.detach(rename.new_parent, rename.new_name)?;
                tree.detach(rename.parent, rename.name)?;
                tree.enter(rename.parent, rename.name, other)?;
                return tree.enter(rename.new_parent, rename.new_name, number);
            }
            _ => return Err(Errno::EINVAL),
        }
        tree.detach(rename.parent, rename.name)?;
        tree.enter(rename.new_parent, rename.new_name, number)
    }

    async fn link(&self, _request: &Request, link: Link<'_>) -> Result<Entry> {
        let mut tree = self.tree();
        match tree.find(link.new_parent, link.new_name) {
            Err(Errno::ENOENT) => {}
            Ok(_) => return Err(Errno::EEXIST),
            Err(error) => return Err(error),
        }
        if tree.node(link.new_parent)?.attr.nlink == 0 {
            return Err(Errno::ENOENT);
        }
        tree.enter(link.new_parent, link.new_name, link.node)?;
        entry(&mut tree, link.node)
    }

    async fn open(&self, _request: &Request, open: Open) -> Result<Opened> {
        const O_TRUNC: u32 = 0o1000;
        let mut tree = self.tree();
        let node = tree.node_mut(open.node)?;
        if open.flags & O_TRUNC != 0 {
            file(&mut node.content)?.clear(0, u64::MAX);
            node.attr.size = 0;
            node.attr.mtime = Timestamp::now();
            node.attr.ctime = node.attr.mtime;
        }
        node.references += 1;
        Ok(opened())
    }

    async fn create(&self, request: &Request, create: Create<'_>) -> Result<(Entry, Opened)> {
        let attr = Attr {
            mode: Kind::File.mode() | create.mode & 0o7777,
            ..Attr::default()
        };
        let entry = self.create_node(
            request,
            create.parent,
            Some(create.name),
            attr,
            Content::File(Pages::default()),
        )?;
        self.tree().node_mut(entry.node)?.references += 1;
        Ok((entry, opened()))
    }

    async fn tmpfile(&self, request: &Request, create: Create<'_>) -> Result<(Entry, Opened)> {
        let attr = Attr {
            mode: Kind::File.mode() | create.mode & 0o7777,
            ..Attr::default()
        };
        let entry = self.create_node(request, create.parent, None, attr, Content::File(Pages::default()))?;
        self.tree().node_mut(entry.node)?.references += 1;
        Ok((entry, opened()))
    }

    async fn read(&self, request: &Request, read: Read) -> Result<Data> {
        let mut tree = self.tree();
        let node = tree.node_mut(read.node)?;
        let size = node.attr.size.saturating_sub(read.offset).min(u64::from(read.size));
        let mut buffer = request.buffer(size as usize);
        file(&mut node.content)?.read(read.offset, &mut buffer);
        node.attr.atime = Timestamp::now();
        Ok(buffer.into())
    }

    async fn write(&self, _request: &Request, write: Write) -> Result<u32> {
        let mut tree = self.tree();
        let node = tree.node_mut(write.node)?;
        let end = write
            .offset
            .checked_add(write.data.len() as u64)
            .filter(|end| *end <= LARGEST)
            .ok_or(Errno::EFBIG)?;
        file(&mut node.content)?.write(write.offset, &write.data);
        node.attr.size = node.attr.size.max(end);
        node.attr.mtime = Timestamp::now();
        node.attr.ctime = node.attr.mtime;
        Ok(write.data.len() as u32)
    }

    async fn flush(&self, _request: &Request, flush: Flush) -> Result<()> {
        self.tree().node_mut(flush.node)?.locks.release(flush.lock_owner, false);
        self.unlocked.notify_waiters();
        Ok(())
    }

    async fn release(&self, _request: &Request, release: Release) -> Result<()> {
        let mut tree = self.tree();
        let node = tree.node_mut(release.node)?;
        node.references = node.references.saturating_sub(1);
        node.locks.release(release.lock_owner, false);
        if release.flock_unlock {
            node.locks.release(release.lock_owner, true);
        }
        tree.drop_unused(release.node);
        self.unlocked.notify_waiters();
        Ok(())
    }

    async fn fsync(&self, _request: &Request, _fsync: Fsync) -> Result<()> {
        Ok(())
    }

    async fn fsyncdir(&self, _request: &Request, _fsync: Fsync) -> Result<()> {
        Ok(())
    }

    /// The cookie of an entry is its node's number, by which listings are ordered, so that it stays
    /// good while entries come and go.
    async fn readdir(&self, _request: &Request, readdir: Readdir, listing: &mut Listing) -> Result<()> {
        let mut tree = self.tree();
        let Content::Directory { entries, parent } = &tree.node(readdir.node)?.content else {
            return Err(Errno::ENOTDIR);
        };
        let parent = *parent;
        let mut rest: Vec<(u64, OsString)> = entries.iter().map(|(name, number)| (*number, name.clone())).collect();
        rest.sort();
        for (cookie, number, name) in [(1, readdir.node, "."), (2, parent, "..")] {
            if readdir.offset < cookie && listing.add(number, cookie, Kind::Directory, OsStr::new(name)) == Listed::Full
            {
                return Ok(());
            }
        }
        // Names of one node share its number: they count on from a multiple.
        let mut index = 0;
        let mut last = 0;
        for (number, name) in rest {
            index = if number == last { index + 1 } else { 0 };
            last = number;
            let cookie = (number << 20) + 3 + index;
            if cookie <= readdir.offset {
                continue;
            }
            let node = tree.node_mut(number)?;
            let attr = node.attr();
            let entry = Entry {
                node: number,
                generation: 0,
                attr,
                attr_ttl: TTL,
                entry_ttl: TTL,
            };
            if listing.add_plus(&entry, cookie, &name) == Listed::Full {
                break;
            }
            if listing.is_plus() {
                node.references += 1;
            }
        }
        Ok(())
    }

    async fn statfs(&self, _request: &Request, _statfs: StatfsQuery) -> Result<Statfs> {
        let files = self.tree().len();
        Ok(Statfs {
            blocks: 1 << 30,
            free: 1 << 29,
            available: 1 << 29,
            files: files + (1 << 30),
            free_files: 1 << 30,
            ..Statfs::default()
        })
    }

    async fn syncfs(&self, _request: &Request, _syncfs: Syncfs) -> Result<()> {
        Ok(())
    }

    async fn setxattr(&self, _request: &Request, setxattr: Setxattr<'_>) -> Result<()> {
        const CREATE: u32 = 1;
        const REPLACE: u32 = 2;
        if setxattr.name.as_bytes().starts_with(b"system.") {
            return Err(Errno::EOPNOTSUPP);
        }
        let mut tree = self.tree();
        let node = tree.node_mut(setxattr.node)?;
        match (setxattr.flags, node.xattrs.contains_key(setxattr.name)) {
            (CREATE, true) => return Err(Errno::EEXIST),
            (REPLACE, false) => return Err(Errno::ENODATA),
            _ => {}
        }
        node.xattrs.insert(setxattr.name.into(), setxattr.value.into());
        node.attr.ctime = Timestamp::now();
        Ok(())
    }

    async fn getxattr(&self, _request: &Request, getxattr: Getxattr<'_>) -> Result<Bytes> {
        let tree = self.tree();
        let value = tree
            .node(getxattr.node)?
            .xattrs
            .get(getxattr.name)
            .ok_or(Errno::ENODATA)?;
        Ok(Bytes::copy_from_slice(value))
    }

    async fn listxattr(&self, _request: &Request, listxattr: Listxattr) -> Result<Bytes> {
        let tree = self.tree();
        let mut names = Vec::new();
        for name in tree.node(listxattr.node)?.xattrs.keys() {
            names.extend(name.as_bytes());
            names.push(0);
        }
        Ok(names.into())
    }

    async fn removexattr(&self, _request: &Request, removexattr: Removexattr<'_>) -> Result<()> {
        let mut tree = self.tree();
        let node = tree.node_mut(removexattr.node)?;
        node.xattrs.remove(removexattr.name).map(|_| ()).ok_or(Errno::ENODATA)
    }

    async fn getlk(&self, _request: &Request, lock: LockRequest) -> Result<Lock> {
        let conflict = self
            .tree()
            .node(lock.node)?
            .locks
            .conflict(lock.owner, lock.flock, &lock.lock);
        Ok(conflict.unwrap_or(Lock {
            kind: LockKind::Unlock,
            ..lock.lock
        }))
    }

    async fn setlk(&self, _request: &Request, lock: LockRequest) -> Result<()> {
        loop {
            let unlocked = self.unlocked.notified();
            {
                let mut tree = self.tree();
                let node = tree.node_mut(lock.node)?;
                let wanted = lock.lock.kind != LockKind::Unlock;
                if !wanted || node.locks.conflict(lock.owner, lock.flock, &lock.lock).is_none() {
                    node.locks.set(lock.owner, lock.flock, lock.lock);
                    // An exclusive lock that became shared lets others in, too.
                    self.unlocked.notify_waiters();
                    return Ok(());
                }
                if !lock.wait {
                    return Err(Errno::EAGAIN);
                }
            }
            unlocked.await;
        }
    }

    async fn fallocate(&self, _request: &Request, fallocate: Fallocate) -> Result<()> {
        const KEEP_SIZE: u32 = 1;
        const PUNCH_HOLE: u32 = 2;
        const ZERO_RANGE: u32 = 16;
        let mut tree = self.tree();
        let node = tree.node_mut(fallocate.node)?;
        let end = fallocate
            .offset
            .checked_add(fallocate.length)
            .filter(|end| *end <= LARGEST)
            .ok_or(Errno::EFBIG)?;
        let pages = file(&mut node.content)?;
        match fallocate.mode & !KEEP_SIZE {
            0 => {}
            PUNCH_HOLE | ZERO_RANGE => pages.clear(fallocate.offset, end),
            _ => return Err(Errno::EOPNOTSUPP),
        }
        if fallocate.mode & (KEEP_SIZE | PUNCH_HOLE) == 0 {
            node.attr.size = node.attr.size.max(end);
        }
        node.attr.mtime = Timestamp::now();
        node.attr.ctime = node.attr.mtime;
        Ok(())
    }

    async fn lseek(&self, _request: &Request, lseek: Lseek) -> Result<u64> {
        const SEEK_DATA: u32 = 3;
        let mut tree = self.tree();
        let node = tree.node_mut(lseek.node)?;
        let size = node.attr.size;
        file(&mut node.content)?.seek(lseek.offset, size, lseek.whence == SEEK_DATA)
    }

    async fn copy_file_range(&self, _request: &Request, copy: CopyFileRange) -> Result<u64> {
        let mut tree = self.tree();
        let source = tree.node_mut(copy.node)?;
        let length = source
            .attr
            .size
            .saturating_sub(copy.offset)
            .min(copy.length)
            .min(256 * PAGE);
        let mut bytes = vec![0; length as usize];
        file(&mut source.content)?.read(copy.offset, &mut bytes);
        let node = tree.node_mut(copy.to_node)?;
        let end = copy
            .to_offset
            .checked_add(length)
            .filter(|end| *end <= LARGEST)
            .ok_or(Errno::EFBIG)?;
        file(&mut node.content)?.write(copy.to_offset, &bytes);
        node.attr.size = node.attr.size.max(end);
        node.attr.mtime = Timestamp::now();
        node.attr.ctime = node.attr.mtime;
        Ok(length)
    }
}
