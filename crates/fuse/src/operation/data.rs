//! Open files and what is in them.

use super::Parse;
use crate::abi::{self, Opcode};
use crate::header::Header;
use crate::wire::{Malformed, Reader};
use bytes::Bytes;
use std::ffi::OsStr;

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
