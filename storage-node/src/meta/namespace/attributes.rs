//! Attributes, sizes and extended attributes.

use super::{Fault, Namespace, Reply, invalid};
use crate::meta::rows::{Key, MAX_NAME, MAX_XATTR_VALUE, OpResult, Row, Truncate};
use lazarette_proto::meta::{Extend, GetXattr, Kind, RemoveXattr, SetAttr, SetXattr, XattrNames};
use lazarette_types::{ErrorCode, FILE_SIZE_MAX, InodeId};

/// Names and values of one inode's extended attributes at most, in bytes.
const MAX_XATTRS: usize = 256 << 10;

impl Namespace {
    pub(super) fn set_attr(&mut self, op: &SetAttr, now: i64) -> Result<OpResult, Fault> {
        let ino = InodeId(op.ino);
        let inode = self.inode(ino)?;
        let (seed, old) = (inode.seed, inode.size);
        if let Some(size) = op.size {
            match inode.kind {
                Kind::File => self.check_size(old, size)?,
                Kind::Directory => return Err(Fault::new(ErrorCode::IsDirectory, "a directory has no size")),
                _ => return Err(invalid("only files can be truncated")),
            }
        }
        self.state.update(ino, |inode| {
            if op.uid.is_some() || op.gid.is_some() {
                inode.uid = op.uid.unwrap_or(inode.uid);
                inode.gid = op.gid.unwrap_or(inode.gid);
                // A kernel with default_permissions sends the mode along when it has to clear
                // set-id bits (also for truncation, where it depends on the caller's
                // privileges); a change of owner clears them for everyone.
                if !inode.is_dir() {
                    inode.mode &= !0o4000;
                    if inode.mode & 0o010 != 0 {
                        inode.mode &= !0o2000;
                    }
                }
            }
            if let Some(mode) = op.mode {
                inode.mode = mode & 0o7777;
            }
            if let Some(size) = op.size {
                inode.size = size;
                inode.mtime = now;
            }
            inode.atime = op.atime.unwrap_or(inode.atime);
            inode.mtime = op.mtime.unwrap_or(inode.mtime);
            inode.ctime = op.ctime.unwrap_or(now);
        });
        if let Some(to) = op.size
            && to < old
        {
            let from = self.state.truncate(ino).map_or(old, |cut| cut.from.max(old));
            self.state
                .put(Key::Truncate(ino), Row::Truncate(Truncate { seed, from, to }));
            self.work.push(super::Work::Cut(ino));
        }
        self.attr_result(ino)
    }

    /// Whether a file may change its size from `old` to `new`.
    fn check_size(&self, old: u64, new: u64) -> Result<(), Fault> {
        if new > FILE_SIZE_MAX {
            return Err(Fault::new(ErrorCode::FileTooBig, "size is over 16 TiB"));
        }
        let more = new.saturating_sub(old);
        if more > 0 && self.state.usage().bytes.saturating_add(more) > self.limits.size {
            return Err(Fault::new(ErrorCode::NoSpace, "volume is full"));
        }
        Ok(())
    }

    pub(super) fn extend(&mut self, op: &Extend, now: i64) -> Result<OpResult, Fault> {
        let ino = InodeId(op.ino);
        self.extend_to(ino, op.end, op.mtime, now)?;
        self.attr_result(ino)
    }

    /// Data up to `end` is durable: makes the file at least so long.
    pub(super) fn extend_to(&mut self, ino: InodeId, end: u64, mtime: i64, now: i64) -> Result<(), Fault> {
        let inode = self.inode(ino)?;
        if inode.kind != Kind::File {
            return Err(invalid("only files can be extended"));
        }
        self.check_size(inode.size, end)?;
        self.state.update(ino, |inode| {
            inode.size = inode.size.max(end);
            inode.mtime = if mtime == 0 { now } else { mtime };
            inode.ctime = now;
        });
        Ok(())
    }

    pub(super) fn get_xattr(&self, op: &GetXattr) -> Result<Reply, Fault> {
        let ino = InodeId(op.ino);
        self.inode(ino)?;
        check_xattr_name(&op.name)?;
        match self.state.get(&Key::xattr(ino, &op.name)) {
            Some(Row::Xattr(value)) => Ok(Reply::Bytes(value.to_vec().into())),
            _ => Err(no_attribute()),
        }
    }

    pub(super) fn list_xattr(&self, ino: InodeId) -> Result<Reply, Fault> {
        self.inode(ino)?;
        let names = self.state.xattrs(ino).map(|(name, _)| name.to_vec().into()).collect();
        Ok(Reply::XattrNames(XattrNames { names }))
    }

    pub(super) fn set_xattr(&mut self, op: &SetXattr, now: i64) -> Result<OpResult, Fault> {
        let ino = InodeId(op.ino);
        self.inode(ino)?;
        check_xattr_name(&op.name)?;
        if op.value.len() > MAX_XATTR_VALUE {
            return Err(Fault::new(ErrorCode::OutOfRange, "attribute value is over 64 KiB"));
        }
        let key = Key::xattr(ino, &op.name);
        let exists = self.state.get(&key).is_some();
        if op.create_only && exists {
            return Err(Fault::new(ErrorCode::Exists, "attribute exists"));
        }
        if op.replace_only && !exists {
            return Err(no_attribute());
        }
        let others: usize = self
            .state
            .xattrs(ino)
            .filter(|(name, _)| *name != &op.name[..])
            .map(|(name, value)| name.len() + value.len())
            .sum();
        if others + op.name.len() + op.value.len() > MAX_XATTRS {
            return Err(Fault::new(
                ErrorCode::NoSpace,
                "attributes of the inode are over 256 KiB",
            ));
        }
        self.state.put(key, Row::Xattr(op.value.to_vec().into()));
        self.state.update(ino, |inode| inode.ctime = now);
        Ok(OpResult::Done)
    }

    pub(super) fn remove_xattr(&mut self, op: &RemoveXattr, now: i64) -> Result<OpResult, Fault> {
        let ino = InodeId(op.ino);
        self.inode(ino)?;
        check_xattr_name(&op.name)?;
        let key = Key::xattr(ino, &op.name);
        if self.state.get(&key).is_none() {
            return Err(no_attribute());
        }
        self.state.remove(key);
        self.state.update(ino, |inode| inode.ctime = now);
        Ok(OpResult::Done)
    }
}

fn check_xattr_name(name: &[u8]) -> Result<(), Fault> {
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(Fault::new(
            ErrorCode::OutOfRange,
            "attribute name is empty or over 255 bytes",
        ));
    }
    Ok(())
}

fn no_attribute() -> Fault {
    Fault::new(ErrorCode::NoAttribute, "no such attribute")
}
