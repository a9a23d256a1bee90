//! Locks.

use super::Parse;
use crate::abi::{self, Opcode};
use crate::attributes::{Lock, LockKind};
use crate::header::Header;
use crate::wire::{Malformed, Reader};
use bytes::Bytes;

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
