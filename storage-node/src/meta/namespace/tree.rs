//! Names: lookup, create, link, rename, unlink, list.

use super::{Fault, Namespace, Reply, check_name, invalid};
use crate::meta::rows::{Dentry, Garbage, Inode, Key, OpResult, Part, Row};
use lazarette_proto::meta::{Create, DirEntry, Kind, Link, Lookup, Missing, ReadDir, ReadDirReply, Rename};
use lazarette_types::{ErrorCode, InodeId, Layout, ROOT_INODE, SessionId};

/// Entries of one ReadDir at most.
const MAX_ENTRIES: u32 = 4096;
/// Longest target of a symlink, in bytes (PATH_MAX without its NUL).
const MAX_TARGET: usize = 4095;
/// Names of one inode at most.
const MAX_LINKS: u32 = 1 << 30;
/// The parent of a file that was created without a name and has not got one yet.
const NEVER_NAMED: InodeId = InodeId(0);

impl Namespace {
    pub(super) fn lookup(&self, op: &Lookup) -> Result<Reply, Fault> {
        check_name(&op.name)?;
        let dir = InodeId(op.parent);
        self.dir(dir)?;
        match self.state.entry(dir, &op.name) {
            Some((_, ino)) => self.attr_reply(ino),
            None => Ok(Reply::Missing(Missing {})),
        }
    }

    /// An existing entry of a directory: its cookie and inode.
    fn entry(&self, dir: InodeId, name: &[u8]) -> Result<(u64, InodeId), Fault> {
        self.dir(dir)?;
        self.state
            .entry(dir, name)
            .ok_or_else(|| Fault::new(ErrorCode::NotFound, "no such entry"))
    }

    pub(super) fn read_link(&self, ino: InodeId) -> Result<Reply, Fault> {
        let inode = self.inode(ino)?;
        if inode.kind != Kind::Symlink {
            return Err(invalid("not a symlink"));
        }
        Ok(Reply::Bytes(inode.target.to_vec().into()))
    }

    pub(super) fn read_dir(&self, op: &ReadDir) -> Result<Reply, Fault> {
        let dir = InodeId(op.ino);
        // A removed directory that is still open reads as empty.
        if !self.inode(dir)?.is_dir() {
            return Err(Fault::new(ErrorCode::NotDirectory, "not a directory"));
        }
        let limit = if op.limit == 0 { 1024 } else { op.limit.min(MAX_ENTRIES) };
        let mut entries = Vec::new();
        let mut end = true;
        for (cookie, dentry) in self.state.entries(dir, op.after) {
            if entries.len() == limit as usize {
                end = false;
                break;
            }
            let attr = self.inode(dentry.ino)?.attr(dentry.ino);
            entries.push(DirEntry {
                name: dentry.name.to_vec().into(),
                cookie,
                attr: Some(attr),
            });
        }
        Ok(Reply::ReadDir(ReadDirReply { entries, end }))
    }

    pub(super) fn create(&mut self, session: SessionId, op: &Create, now: i64) -> Result<OpResult, Fault> {
        if !op.unnamed {
            check_name(&op.name)?;
        } else if !op.name.is_empty() || op.kind != i32::from(Kind::File) || !op.open {
            return Err(invalid("only an open file can do without a name"));
        }
        let kind = Kind::try_from(op.kind).unwrap_or(Kind::Unspecified);
        if kind == Kind::Unspecified {
            return Err(invalid("kind is not given"));
        }
        let dir = InodeId(op.parent);
        let parent = self.dir(dir)?;
        let (parent_mode, parent_gid, parent_links) = (parent.mode, parent.gid, parent.nlink);
        if let Some((_, existing)) = self.state.entry(dir, &op.name) {
            if op.exclusive || kind != Kind::File {
                return Err(Fault::new(ErrorCode::Exists, "name exists"));
            }
            if self.inode(existing)?.is_dir() {
                return Err(Fault::new(ErrorCode::IsDirectory, "name is a directory"));
            }
            if op.open {
                self.reopen(session, existing);
            }
            return self.attr_result(existing);
        }
        if kind == Kind::Symlink {
            if op.target.len() > MAX_TARGET {
                return Err(Fault::new(ErrorCode::NameTooLong, "target is over 4095 bytes"));
            }
            if op.target.is_empty() || op.target.contains(&0) {
                return Err(invalid("target is empty or has a NUL in it"));
            }
        } else if !op.target.is_empty() {
            return Err(invalid("target is given for something else than a symlink"));
        }
        if kind == Kind::Directory && parent_links >= MAX_LINKS {
            return Err(Fault::new(ErrorCode::TooManyLinks, "too many directories in one"));
        }
        if self.state.usage().inodes >= self.limits.inodes() {
            return Err(Fault::new(
                ErrorCode::NoSpace,
                "volume has as many inodes as its size allows",
            ));
        }
        let ino = self.next_inode()?;
        let mut mode = if kind == Kind::Symlink { 0o777 } else { op.mode & 0o7777 };
        let mut gid = op.gid;
        if parent_mode & 0o2000 != 0 {
            gid = parent_gid;
            if kind == Kind::Directory {
                mode |= 0o2000;
            }
        }
        let is_dir = kind == Kind::Directory;
        let inode = Inode {
            kind,
            mode,
            nlink: match (op.unnamed, is_dir) {
                (true, _) => 0,
                (false, true) => 2,
                (false, false) => 1,
            },
            uid: op.uid,
            gid,
            size: op.target.len() as u64,
            atime: now,
            mtime: now,
            ctime: now,
            rdev: if matches!(kind, Kind::CharDevice | Kind::BlockDevice) {
                op.rdev
            } else {
                0
            },
            seed: if kind == Kind::File {
                Layout::default_seed(ino)
            } else {
                0
            },
            change: 1,
            parent: if op.unnamed { NEVER_NAMED } else { dir },
            next_cookie: u64::from(is_dir),
            target: op.target.to_vec().into(),
        };
        self.state.put(Key::attributes(ino), Row::Inode(Box::new(inode)));
        if !op.unnamed {
            self.add_entry(dir, &op.name, ino, is_dir, now);
        }
        if op.open {
            self.reopen(session, ino);
        }
        self.attr_result(ino)
    }

    fn next_inode(&mut self) -> Result<InodeId, Fault> {
        let next = match self.state.get(&Key::Counters) {
            Some(Row::Counters { next_inode }) => *next_inode,
            _ => return Err(Fault::new(ErrorCode::Corrupt, "volume has no counters")),
        };
        let next_inode = next + 1;
        self.state.put(Key::Counters, Row::Counters { next_inode });
        Ok(InodeId(next))
    }

    /// Adds a name at the end of a directory.
    fn add_entry(&mut self, dir: InodeId, name: &[u8], ino: InodeId, is_dir: bool, now: i64) {
        let mut cookie = 0;
        self.state.update(dir, |dir| {
            cookie = dir.next_cookie;
            dir.next_cookie += 1;
            dir.nlink += u32::from(is_dir);
            dir.mtime = now;
            dir.ctime = now;
        });
        let name = name.into();
        self.state
            .put(Key::dentry(dir, cookie), Row::Dentry(Dentry { name, ino }));
    }

    /// Takes a name out of a directory.
    fn remove_entry(&mut self, dir: InodeId, cookie: u64, is_dir: bool, now: i64) {
        self.state.remove(Key::dentry(dir, cookie));
        self.state.update(dir, |dir| {
            dir.nlink -= u32::from(is_dir).min(dir.nlink);
            dir.mtime = now;
            dir.ctime = now;
        });
    }

    pub(super) fn unlink(&mut self, dir: InodeId, name: &[u8], now: i64) -> Result<OpResult, Fault> {
        check_name(name)?;
        let (cookie, ino) = self.entry(dir, name)?;
        if self.inode(ino)?.is_dir() {
            return Err(Fault::new(ErrorCode::IsDirectory, "is a directory"));
        }
        self.remove_entry(dir, cookie, false, now);
        self.drop_name(ino, now);
        Ok(OpResult::Done)
    }

    pub(super) fn rm_dir(&mut self, dir: InodeId, name: &[u8], now: i64) -> Result<OpResult, Fault> {
        check_name(name)?;
        let (cookie, ino) = self.entry(dir, name)?;
        self.check_removable_dir(ino)?;
        self.remove_entry(dir, cookie, true, now);
        let mut removed = self.inode(ino)?.clone();
        (removed.nlink, removed.ctime) = (0, now);
        self.drop_name(ino, now);
        Ok(OpResult::Attr(ino, Box::new(removed)))
    }

    fn check_removable_dir(&self, ino: InodeId) -> Result<(), Fault> {
        if !self.inode(ino)?.is_dir() {
            return Err(Fault::new(ErrorCode::NotDirectory, "not a directory"));
        }
        if !self.state.is_empty_dir(ino) {
            return Err(Fault::new(ErrorCode::NotEmpty, "directory has entries"));
        }
        Ok(())
    }

    /// An inode lost a name; a directory thereby its only one.
    fn drop_name(&mut self, ino: InodeId, now: i64) {
        let mut left = 0;
        self.state.update(ino, |inode| {
            inode.nlink = if inode.is_dir() {
                0
            } else {
                inode.nlink.saturating_sub(1)
            };
            inode.ctime = now;
            left = inode.nlink;
        });
        if left == 0 && !self.in_use(ino) {
            self.collect(ino);
        }
    }

    /// Gives up an inode that has neither name nor user. Its chunks become garbage.
    pub(super) fn collect(&mut self, ino: InodeId) {
        let Some(inode) = self.state.inode(ino) else {
            return;
        };
        if inode.kind == Kind::File {
            let (seed, size) = (inode.seed, inode.size);
            let chunks = self.chunks_of(ino, size);
            self.state
                .put(Key::Garbage(ino), Row::Garbage(Garbage { seed, chunks }));
            self.work.push(super::Work::Remove(ino));
        }
        self.state.remove(Key::Truncate(ino));
        self.state.remove(Key::locks(ino));
        self.state.remove(Key::reach(ino));
        let names: Vec<Box<[u8]>> = self.state.xattrs(ino).map(|(name, _)| name.into()).collect();
        for name in names {
            self.state.remove(Key::Inode(ino, Part::Xattr(name)));
        }
        self.state.remove(Key::attributes(ino));
        self.fail_waiters(ino);
    }

    pub(super) fn link(&mut self, op: &Link, now: i64) -> Result<OpResult, Fault> {
        check_name(&op.new_name)?;
        let (ino, dir) = (InodeId(op.ino), InodeId(op.new_parent));
        self.dir(dir)?;
        let inode = self.inode(ino)?;
        if inode.is_dir() {
            return Err(Fault::new(ErrorCode::NotPermitted, "directories have one name only"));
        }
        if inode.nlink == 0 && inode.parent != NEVER_NAMED {
            return Err(Fault::new(ErrorCode::NotFound, "inode has no name any more"));
        }
        if inode.nlink >= MAX_LINKS {
            return Err(Fault::new(ErrorCode::TooManyLinks, "too many names"));
        }
        if self.state.entry(dir, &op.new_name).is_some() {
            return Err(Fault::new(ErrorCode::Exists, "name exists"));
        }
        self.state.update(ino, |inode| {
            inode.nlink += 1;
            inode.ctime = now;
            inode.parent = dir;
        });
        self.add_entry(dir, &op.new_name, ino, false, now);
        self.attr_result(ino)
    }

    pub(super) fn rename(&mut self, op: &Rename, now: i64) -> Result<OpResult, Fault> {
        check_name(&op.name)?;
        check_name(&op.new_name)?;
        if op.no_replace && op.exchange {
            return Err(invalid("no_replace and exchange exclude each other"));
        }
        let (from, to) = (InodeId(op.parent), InodeId(op.new_parent));
        let (cookie, ino) = self.entry(from, &op.name)?;
        self.dir(to)?;
        let is_dir = self.inode(ino)?.is_dir();
        if is_dir && self.is_within(to, ino) {
            return Err(invalid("directory would become its own descendant"));
        }
        let Some((target_cookie, target)) = self.state.entry(to, &op.new_name) else {
            if op.exchange {
                return Err(Fault::new(ErrorCode::NotFound, "nothing to exchange with"));
            }
            self.remove_entry(from, cookie, is_dir, now);
            self.add_entry(to, &op.new_name, ino, is_dir, now);
            self.moved(ino, to, now);
            return self.attr_result(ino);
        };
        if op.no_replace {
            return Err(Fault::new(ErrorCode::Exists, "new name exists"));
        }
        let target_is_dir = self.inode(target)?.is_dir();
        if target == ino {
            return self.attr_result(ino);
        }
        if op.exchange {
            if target_is_dir && self.is_within(from, target) {
                return Err(invalid("directory would become its own descendant"));
            }
            self.point(from, cookie, target);
            self.point(to, target_cookie, ino);
            self.count_dir(from, i64::from(target_is_dir) - i64::from(is_dir), now);
            self.count_dir(to, i64::from(is_dir) - i64::from(target_is_dir), now);
            self.moved(target, from, now);
            self.moved(ino, to, now);
            return self.attr_result(ino);
        }
        match (is_dir, target_is_dir) {
            (true, true) => self.check_removable_dir(target)?,
            (true, false) => return Err(Fault::new(ErrorCode::NotDirectory, "new name is not a directory")),
            (false, true) => return Err(Fault::new(ErrorCode::IsDirectory, "new name is a directory")),
            (false, false) => {}
        }
        self.remove_entry(from, cookie, is_dir, now);
        self.point(to, target_cookie, ino);
        // The directory that came takes the count of the one that went.
        self.count_dir(to, 0, now);
        self.moved(ino, to, now);
        self.drop_name(target, now);
        self.attr_result(ino)
    }

    /// Makes an entry name another inode.
    fn point(&mut self, dir: InodeId, cookie: u64, ino: InodeId) {
        let key = Key::dentry(dir, cookie);
        if let Some(Row::Dentry(dentry)) = self.state.get(&key) {
            let name = dentry.name.clone();
            self.state.put(key, Row::Dentry(Dentry { name, ino }));
        }
    }

    /// A directory's contents changed, and the number of directories in it by `delta`.
    fn count_dir(&mut self, dir: InodeId, delta: i64, now: i64) {
        self.state.update(dir, |dir| {
            dir.nlink = dir.nlink.saturating_add_signed(delta as i32);
            dir.mtime = now;
            dir.ctime = now;
        });
    }

    fn moved(&mut self, ino: InodeId, to: InodeId, now: i64) {
        self.state.update(ino, |inode| {
            inode.parent = to;
            inode.ctime = now;
        });
    }

    /// Whether `dir` is `ancestor` or lies below it.
    fn is_within(&self, dir: InodeId, ancestor: InodeId) -> bool {
        let mut at = dir;
        // A damaged tree could have a loop; a path is never longer than the number of inodes.
        for _ in 0..=self.state.usage().inodes {
            if at == ancestor {
                return true;
            }
            if at == ROOT_INODE {
                return false;
            }
            match self.state.inode(at) {
                Some(inode) => at = inode.parent,
                None => return false,
            }
        }
        true
    }
}
