//! What requests carry, operation by operation.
//!
//! Every structure is read by its `parse` from a request's header and body, within bounds; names
//! are never empty and never contain a slash or a NUL.

use crate::abi::{self, NAME_MAX, Opcode};
use crate::attributes::{Lock, LockKind, Timestamp};
use crate::header::Header;
use crate::wire::{Malformed, Reader};
use bytes::Bytes;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// A request's body can be read as this operation.
pub(crate) trait Parse<'a>: Sized {
    fn parse(header: &Header, body: &'a Bytes) -> Result<Self, Malformed>;
}

macro_rules! operation {
    ($(#[$doc:meta])* $name:ident $(<$life:lifetime>)? {
        $($(#[$field_doc:meta])* $field:ident: $type:ty,)*
    } |$header:ident, $reader:ident| $parse:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name $(<$life>)? {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl<'a> Parse<'a> for $name $(<$life>)? {
            fn parse($header: &Header, body: &'a Bytes) -> Result<Self, Malformed> {
                #[allow(unused_mut)]
                let mut $reader = Reader::new(&body[..]);
                $parse
            }
        }
    };
}

operation! {
    /// Look a name up in a directory. The kernel holds one more reference to the node afterwards.
    Lookup<'a> {
        /// The directory.
        parent: u64,
        /// The name; "." and ".." only with `EXPORT_SUPPORT`.
        name: &'a OsStr,
    }
    |header, reader| Ok(Self { parent: header.node, name: reader.name()? })
}

/// References to a node that the kernel gives back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forget {
    /// The node.
    pub node: u64,
    /// How many lookups are forgotten.
    pub lookups: u64,
}

/// The entries of a forget or batch_forget request.
pub(crate) fn parse_forgets(opcode: Opcode, header: &Header, body: &[u8]) -> Result<Vec<Forget>, Malformed> {
    let mut reader = Reader::new(body);
    if opcode == Opcode::Forget {
        return Ok(vec![Forget {
            node: header.node,
            lookups: reader.u64()?,
        }]);
    }
    let count = reader.u32()? as usize;
    reader.skip(4)?;
    if reader.rest().len() / 16 < count {
        return Err(Malformed::Short);
    }
    (0..count)
        .map(|_| {
            Ok(Forget {
                node: reader.u64()?,
                lookups: reader.u64()?,
            })
        })
        .collect()
}

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
    /// Target of a symbolic link.
    Readlink {
        /// The node.
        node: u64,
    }
    |header, _reader| Ok(Self { node: header.node })
}

operation! {
    /// Create a symbolic link.
    Symlink<'a> {
        /// The directory.
        parent: u64,
        /// The new name.
        name: &'a OsStr,
        /// What it points to.
        target: &'a OsStr,
    }
    |header, reader| {
        let name = reader.name()?;
        let target = reader.text()?;
        if target.is_empty() {
            return Err(Malformed::Text);
        }
        Ok(Self { parent: header.node, name, target: OsStr::from_bytes(target) })
    }
}

operation! {
    /// Create a file, device, pipe or socket.
    Mknod<'a> {
        /// The directory.
        parent: u64,
        /// The new name.
        name: &'a OsStr,
        /// Kind and permissions, the umask applied unless `DONT_MASK` is agreed.
        mode: u32,
        /// The caller's umask.
        umask: u32,
        /// Device number.
        rdev: u32,
    }
    |header, reader| {
        let (mode, rdev, umask) = (reader.u32()?, reader.u32()?, reader.u32()?);
        reader.skip(4)?;
        Ok(Self { parent: header.node, name: reader.name()?, mode, umask, rdev })
    }
}

operation! {
    /// Create a directory.
    Mkdir<'a> {
        /// The directory to create it in.
        parent: u64,
        /// The new name.
        name: &'a OsStr,
        /// Permissions, the umask applied unless `DONT_MASK` is agreed.
        mode: u32,
        /// The caller's umask.
        umask: u32,
    }
    |header, reader| {
        let (mode, umask) = (reader.u32()?, reader.u32()?);
        Ok(Self { parent: header.node, name: reader.name()?, mode, umask })
    }
}

operation! {
    /// Remove a name: of a directory for rmdir, of anything else for unlink.
    Remove<'a> {
        /// The directory.
        parent: u64,
        /// The name.
        name: &'a OsStr,
    }
    |header, reader| Ok(Self { parent: header.node, name: reader.name()? })
}

operation! {
    /// Rename.
    Rename<'a> {
        /// The directory.
        parent: u64,
        /// The name.
        name: &'a OsStr,
        /// The directory to move to.
        new_parent: u64,
        /// The name to be.
        new_name: &'a OsStr,
        /// `RENAME_NOREPLACE`, `RENAME_EXCHANGE`, `RENAME_WHITEOUT`
        flags: u32,
    }
    |header, reader| {
        let new_parent = reader.u64()?;
        let mut flags = 0;
        if header.opcode == Opcode::Rename2 as u32 {
            flags = reader.u32()?;
            reader.skip(4)?;
        }
        Ok(Self { parent: header.node, name: reader.name()?, new_parent, new_name: reader.name()?, flags })
    }
}

operation! {
    /// Another name for a node.
    Link<'a> {
        /// The node.
        node: u64,
        /// The directory.
        new_parent: u64,
        /// The new name.
        new_name: &'a OsStr,
    }
    |header, reader| Ok(Self { node: reader.u64()?, new_parent: header.node, new_name: reader.name()? })
}

operation! {
    /// Open a file or a directory.
    Open {
        /// The node.
        node: u64,
        /// `O_…`
        flags: u32,
        /// Drop set-user-id and set-group-id.
        kill_suidgid: bool,
    }
    |header, reader| {
        Ok(Self { node: header.node, flags: reader.u32()?, kill_suidgid: reader.u32()? & abi::OPEN_KILL_SUIDGID != 0 })
    }
}

operation! {
    /// Create and open a file, with or (tmpfile) without a name.
    Create<'a> {
        /// The directory.
        parent: u64,
        /// The new name; for tmpfile empty.
        name: &'a OsStr,
        /// `O_…`
        flags: u32,
        /// Kind and permissions, the umask applied unless `DONT_MASK` is agreed.
        mode: u32,
        /// The caller's umask.
        umask: u32,
    }
    |header, reader| {
        let (flags, mode, umask) = (reader.u32()?, reader.u32()?, reader.u32()?);
        reader.skip(4)?;
        // What the kernel calls a file without a name is "/".
        let tmpfile = header.opcode == Opcode::Tmpfile as u32;
        let name = if tmpfile { OsStr::new("") } else { reader.name()? };
        Ok(Self { parent: header.node, name, flags, mode, umask })
    }
}

operation! {
    /// Read. Fewer bytes than asked for mean the end of the file.
    Read {
        /// The node.
        node: u64,
        /// The open file; 0 if opens send no request.
        handle: u64,
        /// First byte.
        offset: u64,
        /// Most bytes.
        size: u32,
        /// `O_…` of the open file.
        flags: u32,
        /// Whose locks let the read through.
        lock_owner: Option<u64>,
    }
    |header, reader| {
        let (handle, offset, size, read_flags) = (reader.u64()?, reader.u64()?, reader.u32()?, reader.u32()?);
        let (lock_owner, flags) = (reader.u64()?, reader.u32()?);
        Ok(Self {
            node: header.node,
            handle,
            offset,
            size,
            flags,
            lock_owner: (read_flags & abi::READ_LOCKOWNER != 0).then_some(lock_owner),
        })
    }
}

/// Write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// The node.
    pub node: u64,
    /// The open file; 0 if opens send no request.
    pub handle: u64,
    /// First byte.
    pub offset: u64,
    /// What to write. A clone holds the request's buffer, which counts against the session's
    /// memory until it is dropped.
    pub data: Bytes,
    /// `O_…` of the open file.
    pub flags: u32,
    /// The kernel writes pages back: the handle may be another one's and the caller nobody.
    pub from_cache: bool,
    /// Whose locks let the write through.
    pub lock_owner: Option<u64>,
    /// Drop set-user-id and set-group-id.
    pub kill_suidgid: bool,
}

impl<'a> Parse<'a> for Write {
    fn parse(header: &Header, body: &'a Bytes) -> Result<Self, Malformed> {
        let mut reader = Reader::new(&body[..]);
        let (handle, offset, size, write_flags) = (reader.u64()?, reader.u64()?, reader.u32()?, reader.u32()?);
        let (lock_owner, flags) = (reader.u64()?, reader.u32()?);
        reader.skip(4)?;
        let size = size as usize;
        if reader.rest().len() < size {
            return Err(Malformed::Short);
        }
        Ok(Self {
            node: header.node,
            handle,
            offset,
            data: body.slice(abi::WRITE_IN..abi::WRITE_IN + size),
            flags,
            from_cache: write_flags & abi::WRITE_CACHE != 0,
            lock_owner: (write_flags & abi::WRITE_LOCKOWNER != 0).then_some(lock_owner),
            kill_suidgid: write_flags & abi::WRITE_KILL_SUIDGID != 0,
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

operation! {
    /// The last descriptor of an open file or directory is closed.
    Release {
        /// The node.
        node: u64,
        /// The open file.
        handle: u64,
        /// `O_…` of the open file.
        flags: u32,
        /// Flush too.
        flush: bool,
        /// Drop the owner's flock locks.
        flock_unlock: bool,
        /// The owner of flock locks.
        lock_owner: u64,
    }
    |header, reader| {
        let (handle, flags, release_flags) = (reader.u64()?, reader.u32()?, reader.u32()?);
        Ok(Self {
            node: header.node,
            handle,
            flags,
            flush: release_flags & abi::RELEASE_FLUSH != 0,
            flock_unlock: release_flags & abi::RELEASE_FLOCK_UNLOCK != 0,
            lock_owner: reader.u64()?,
        })
    }
}

operation! {
    /// A descriptor of an open file is closed; the owner's POSIX locks are to be dropped.
    Flush {
        /// The node.
        node: u64,
        /// The open file.
        handle: u64,
        /// The owner of POSIX locks.
        lock_owner: u64,
    }
    |header, reader| {
        let handle = reader.u64()?;
        reader.skip(8)?;
        Ok(Self { node: header.node, handle, lock_owner: reader.u64()? })
    }
}

operation! {
    /// Make a file or directory durable.
    Fsync {
        /// The node.
        node: u64,
        /// The open file or directory.
        handle: u64,
        /// The data is enough.
        data_only: bool,
    }
    |header, reader| {
        let handle = reader.u64()?;
        Ok(Self { node: header.node, handle, data_only: reader.u32()? & abi::FSYNC_FDATASYNC != 0 })
    }
}

operation! {
    /// List a directory, with attributes for readdirplus.
    Readdir {
        /// The directory.
        node: u64,
        /// The open directory.
        handle: u64,
        /// The cookie after which to go on; 0 at the beginning.
        offset: u64,
        /// Most bytes of the reply.
        size: u32,
    }
    |header, reader| {
        Ok(Self { node: header.node, handle: reader.u64()?, offset: reader.u64()?, size: reader.u32()? })
    }
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
    /// Test for, take or drop a lock.
    LockRequest {
        /// The node.
        node: u64,
        /// The open file.
        handle: u64,
        /// Who locks: the process for fcntl(2), the open file for flock(2).
        owner: u64,
        /// The lock.
        lock: Lock,
        /// From flock(2).
        flock: bool,
        /// Wait until it is free.
        wait: bool,
    }
    |header, reader| {
        let (handle, owner, start, end) = (reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?);
        let kind = LockKind::from_raw(reader.u32()?).ok_or(Malformed::Range)?;
        let pid = reader.u32()?;
        if start > end {
            return Err(Malformed::Range);
        }
        Ok(Self {
            node: header.node,
            handle,
            owner,
            lock: Lock { start, end, kind, pid },
            flock: reader.u32()? & abi::LK_FLOCK != 0,
            wait: header.opcode == Opcode::Setlkw as u32,
        })
    }
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

operation! {
    /// Block number on the device of a file's block.
    Bmap {
        /// The node.
        node: u64,
        /// The file's block.
        block: u64,
        /// Bytes of a block.
        block_size: u32,
    }
    |header, reader| Ok(Self { node: header.node, block: reader.u64()?, block_size: reader.u32()? })
}

operation! {
    /// Device control.
    Ioctl<'a> {
        /// The node.
        node: u64,
        /// The open file.
        handle: u64,
        /// `FUSE_IOCTL_…`
        flags: u32,
        /// The command.
        command: u32,
        /// Its argument, an address of the caller's.
        argument: u64,
        /// What the argument points to.
        input: &'a [u8],
        /// Most bytes of output.
        output_size: u32,
    }
    |header, reader| {
        let (handle, flags, command) = (reader.u64()?, reader.u32()?, reader.u32()?);
        let (argument, input_size, output_size) = (reader.u64()?, reader.u32()?, reader.u32()?);
        let input = reader.take(input_size as usize)?;
        Ok(Self { node: header.node, handle, flags, command, argument, input, output_size })
    }
}

operation! {
    /// Readiness of an open file.
    Poll {
        /// The node.
        node: u64,
        /// The open file.
        handle: u64,
        /// Names the waiter in [`crate::Notifier::poll_wakeup`].
        waiter: u64,
        /// Tell when one of `events` comes to be.
        notify: bool,
        /// `POLL…`
        events: u32,
    }
    |header, reader| {
        let (handle, waiter, flags) = (reader.u64()?, reader.u64()?, reader.u32()?);
        Ok(Self {
            node: header.node,
            handle,
            waiter,
            notify: flags & abi::POLL_SCHEDULE_NOTIFY != 0,
            events: reader.u32()?,
        })
    }
}

operation! {
    /// Allocate, punch, zero.
    Fallocate {
        /// The node.
        node: u64,
        /// The open file.
        handle: u64,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// `FALLOC_FL_…`
        mode: u32,
    }
    |header, reader| {
        Ok(Self {
            node: header.node,
            handle: reader.u64()?,
            offset: reader.u64()?,
            length: reader.u64()?,
            mode: reader.u32()?,
        })
    }
}

operation! {
    /// Find data or a hole.
    Lseek {
        /// The node.
        node: u64,
        /// The open file.
        handle: u64,
        /// Where to begin.
        offset: u64,
        /// `SEEK_DATA` or `SEEK_HOLE`.
        whence: u32,
    }
    |header, reader| {
        Ok(Self { node: header.node, handle: reader.u64()?, offset: reader.u64()?, whence: reader.u32()? })
    }
}

operation! {
    /// Copy between files.
    CopyFileRange {
        /// The source's node.
        node: u64,
        /// The open source.
        handle: u64,
        /// First byte to copy.
        offset: u64,
        /// The destination's node.
        to_node: u64,
        /// The open destination.
        to_handle: u64,
        /// First byte to write.
        to_offset: u64,
        /// Most bytes.
        length: u64,
        /// Flags of copy_file_range(2).
        flags: u64,
    }
    |header, reader| {
        let (handle, offset, to_node) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let (to_handle, to_offset, length, flags) = (reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?);
        // The older form's reply has 32 bits.
        let limit = if header.opcode == Opcode::CopyFileRange as u32 { u64::from(u32::MAX) & !4095 } else { u64::MAX };
        Ok(Self { node: header.node, handle, offset, to_node, to_handle, to_offset, length: length.min(limit), flags })
    }
}

operation! {
    /// Make the whole file system durable.
    Syncfs {
        /// A node of it.
        node: u64,
    }
    |header, _reader| Ok(Self { node: header.node })
}

/// The number of the request that an interrupt is for.
pub(crate) fn parse_interrupt(body: &[u8]) -> Result<u64, Malformed> {
    Reader::new(body).u64()
}

/// Supplementary groups among a request's extensions.
pub(crate) fn parse_groups(extensions: &[u8]) -> Result<Vec<u32>, Malformed> {
    let mut reader = Reader::new(extensions);
    while !reader.is_empty() {
        let (size, kind) = (reader.u32()? as usize, reader.u32()?);
        let rest = size.checked_sub(8).ok_or(Malformed::Range)?;
        let mut content = Reader::new(reader.take(rest)?);
        if kind != abi::EXT_GROUPS {
            continue;
        }
        let count = content.u32()? as usize;
        if content.rest().len() / 4 < count {
            return Err(Malformed::Short);
        }
        return (0..count).map(|_| content.u32()).collect();
    }
    Ok(Vec::new())
}

#[cfg(test)]
#[path = "operation_tests.rs"]
mod tests;
