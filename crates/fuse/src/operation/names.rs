//! Names: looking them up, making, moving and removing them, listing them.

use super::Parse;
use crate::abi::Opcode;
use crate::header::Header;
use crate::wire::{Malformed, Reader};
use bytes::Bytes;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

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
