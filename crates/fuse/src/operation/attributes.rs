//! Attributes, also the extended ones.

use super::Parse;
use crate::abi::{self, NAME_MAX};
use crate::attributes::Timestamp;
use crate::header::Header;
use crate::wire::{Malformed, Reader};
use bytes::Bytes;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

operation! {
    /// Attributes of a node.
    Getattr {
        /// The node.
        node: u64,
        /// An open file of it, if the call was on one.
        handle: Option<u64>,
    }
    |header, reader| {
        let flags = reader.u32()?;
        reader.skip(4)?;
        let handle = reader.u64()?;
        Ok(Self { node: header.node, handle: (flags & abi::GETATTR_FH != 0).then_some(handle) })
    }
}

operation! {
    /// Attributes of a node as of statx(2).
    StatxQuery {
        /// The node.
        node: u64,
        /// An open file of it, if the call was on one.
        handle: Option<u64>,
        /// `AT_STATX_…`
        flags: u32,
        /// `STATX_…` wanted.
        mask: u32,
    }
    |header, reader| {
        let flags = reader.u32()?;
        reader.skip(4)?;
        let handle = reader.u64()?;
        Ok(Self {
            node: header.node,
            handle: (flags & abi::GETATTR_FH != 0).then_some(handle),
            flags: reader.u32()?,
            mask: reader.u32()?,
        })
    }
}

/// A time to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// The server's present.
    Now,
    /// This one.
    At(Timestamp),
}

operation! {
    /// Change attributes; what is None stays.
    Setattr {
        /// The node.
        node: u64,
        /// An open file of it, if the call was on one (ftruncate).
        handle: Option<u64>,
        /// Kind and permissions.
        mode: Option<u32>,
        /// Owner.
        uid: Option<u32>,
        /// Group.
        gid: Option<u32>,
        /// Bytes.
        size: Option<u64>,
        /// Last access.
        atime: Option<SetTime>,
        /// Last change of the data.
        mtime: Option<SetTime>,
        /// Last change of the attributes; only with the write-back cache.
        ctime: Option<Timestamp>,
        /// Whose locks let the truncation through.
        lock_owner: Option<u64>,
        /// Drop set-user-id and set-group-id.
        kill_suidgid: bool,
    }
    |header, reader| {
        use abi::fattr;
        let valid = reader.u32()?;
        reader.skip(4)?;
        let handle = reader.u64()?;
        let size = reader.u64()?;
        let lock_owner = reader.u64()?;
        let seconds = [reader.u64()?, reader.u64()?, reader.u64()?];
        let nanoseconds = [reader.u32()?, reader.u32()?, reader.u32()?];
        let mode = reader.u32()?;
        reader.skip(4)?;
        let uid = reader.u32()?;
        let gid = reader.u32()?;
        reader.skip(4)?;
        let has = |bit: u32| valid & bit != 0;
        let time = |index: usize| match nanoseconds[index] {
            nanoseconds @ 0..=999_999_999 => Ok(Timestamp { seconds: seconds[index] as i64, nanoseconds }),
            _ => Err(Malformed::Range),
        };
        let set_time = |index: usize, bit: u32, now: u32| match (has(bit), has(now)) {
            (true, true) => Ok(Some(SetTime::Now)),
            (true, false) => time(index).map(|time| Some(SetTime::At(time))),
            (false, _) => Ok(None),
        };
        Ok(Self {
            node: header.node,
            handle: has(fattr::FH).then_some(handle),
            mode: has(fattr::MODE).then_some(mode),
            uid: has(fattr::UID).then_some(uid),
            gid: has(fattr::GID).then_some(gid),
            size: has(fattr::SIZE).then_some(size),
            atime: set_time(0, fattr::ATIME, fattr::ATIME_NOW)?,
            mtime: set_time(1, fattr::MTIME, fattr::MTIME_NOW)?,
            ctime: if has(fattr::CTIME) { Some(time(2)?) } else { None },
            lock_owner: has(fattr::LOCKOWNER).then_some(lock_owner),
            kill_suidgid: has(fattr::KILL_SUIDGID),
        })
    }
}

operation! {
    /// Figures of the file system.
    StatfsQuery {
        /// A node of it.
        node: u64,
    }
    |header, _reader| Ok(Self { node: header.node })
}

/// Set an extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setxattr<'a> {
    /// The node.
    pub node: u64,
    /// The attribute's name.
    pub name: &'a OsStr,
    /// Its value.
    pub value: &'a [u8],
    /// `XATTR_CREATE`, `XATTR_REPLACE`
    pub flags: u32,
    /// Drop set-group-id, as an ACL is set by somebody outside the group.
    pub kill_sgid: bool,
}

impl<'a> Setxattr<'a> {
    /// `extended` says that `SETXATTR_EXT` is agreed.
    pub(crate) fn parse(header: &Header, body: &'a Bytes, extended: bool) -> Result<Self, Malformed> {
        let mut reader = Reader::new(&body[..]);
        let (size, flags) = (reader.u32()? as usize, reader.u32()?);
        let mut kill_sgid = false;
        if extended {
            kill_sgid = reader.u32()? & abi::SETXATTR_ACL_KILL_SGID != 0;
            reader.skip(4)?;
        }
        Ok(Self {
            node: header.node,
            name: xattr_name(&mut reader)?,
            value: reader.take(size)?,
            flags,
            kill_sgid,
        })
    }
}

/// Names of extended attributes may contain slashes.
fn xattr_name<'a>(reader: &mut Reader<'a>) -> Result<&'a OsStr, Malformed> {
    match reader.text()? {
        [] => Err(Malformed::Text),
        name if name.len() > NAME_MAX => Err(Malformed::Range),
        name => Ok(OsStr::from_bytes(name)),
    }
}

operation! {
    /// Get an extended attribute.
    Getxattr<'a> {
        /// The node.
        node: u64,
        /// The attribute's name.
        name: &'a OsStr,
        /// Most bytes of the value; 0 asks for its length.
        size: u32,
    }
    |header, reader| {
        let size = reader.u32()?;
        reader.skip(4)?;
        Ok(Self { node: header.node, name: xattr_name(&mut reader)?, size })
    }
}

operation! {
    /// Names of extended attributes, each ended by NUL.
    Listxattr {
        /// The node.
        node: u64,
        /// Most bytes; 0 asks for the length.
        size: u32,
    }
    |header, reader| Ok(Self { node: header.node, size: reader.u32()? })
}

operation! {
    /// Remove an extended attribute.
    Removexattr<'a> {
        /// The node.
        node: u64,
        /// The attribute's name.
        name: &'a OsStr,
    }
    |header, reader| Ok(Self { node: header.node, name: xattr_name(&mut reader)? })
}

operation! {
    /// Check permissions.
    Access {
        /// The node.
        node: u64,
        /// `R_OK`, `W_OK`, `X_OK`
        mask: u32,
    }
    |header, reader| Ok(Self { node: header.node, mask: reader.u32()? })
}
