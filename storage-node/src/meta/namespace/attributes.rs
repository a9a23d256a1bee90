//! Attributes, also the extended ones.

use super::{Fault, Namespace, Reply, invalid};
use crate::meta::rows::{Inode, Key, MAX_NAME, MAX_XATTR_VALUE, OpResult, Row};
use lazarette_proto::meta::{GetXattr, RemoveXattr, SetAttr, SetXattr, XattrNames};
use lazarette_types::{ErrorCode, InodeId, SessionId};

/// Names and values of one inode's extended attributes at most, in bytes.
const MAX_XATTRS: usize = 256 << 10;

impl Namespace {
    pub(super) fn set_attr(&mut self, session: SessionId, op: &SetAttr, now: i64) -> Result<OpResult, Fault> {
        let ino = InodeId(op.ino);
        self.inode(ino)?;
        if let Some(extend) = &op.extend {
            if op.size.is_some() || extend.ino != op.ino {
                return Err(invalid("extend is of another inode, or together with a size"));
            }
            self.extend_to(ino, extend.end, extend.since, extend.mtime, now)?;
        }
        if let Some(size) = op.size {
            self.resize(session, ino, size)?;
        }
        let chown = op.uid.is_some() || op.gid.is_some();
        self.state.update(ino, |inode| {
            inode.uid = op.uid.unwrap_or(inode.uid);
            inode.gid = op.gid.unwrap_or(inode.gid);
            if chown || op.drop_privileges {
                drop_privileges(inode);
            }
            if let Some(mode) = op.mode {
                inode.mode = mode & 0o7777;
            }
            if op.size.is_some() {
                inode.mtime = now;
            }
            inode.atime = op.atime.unwrap_or(inode.atime);
            inode.mtime = op.mtime.unwrap_or(inode.mtime);
            inode.ctime = op.ctime.unwrap_or(now);
        });
        if chown || op.size.is_some() {
            self.drop_capability(ino);
        }
        self.attr_result(ino)
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

/// Clears the set-id bits of anything but a directory, where they mean something else; set-group-id without
/// the group's right to execute means something else, too.
fn drop_privileges(inode: &mut Inode) {
    if inode.is_dir() {
        return;
    }
    inode.mode &= !0o4000;
    if inode.mode & 0o010 != 0 {
        inode.mode &= !0o2000;
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
