//! What a handler's result becomes, and how it reaches the kernel.

use crate::abi::OUT_HEADER;
use crate::device::Channel;
use crate::errno::Errno;
use crate::filesystem::Data;
use crate::session::Shared;
use crate::wire::{Head, Malformed};
use bytes::Bytes;
use rustix::io::Errno as Os;
use std::io::IoSlice;
use std::sync::atomic::Ordering::Relaxed;

/// Bytes of the longest link target the kernel takes.
pub(super) const LONGEST_TARGET: usize = 4095;

/// What a handler's result becomes.
pub(crate) enum Reply {
    Empty,
    Head(Head),
    Data(Data),
    Both(Head, Vec<u8>),
}

/// Why there is no such result.
pub(super) enum Failure {
    Errno(Errno),
    Malformed(Malformed),
    /// The handler's answer is not one the kernel takes.
    Handler(&'static str),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<Malformed> for Failure {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

pub(super) type Outcome = Result<Reply, Failure>;

pub(super) fn head(build: impl FnOnce(&mut Head)) -> Outcome {
    let mut head = Head::new();
    build(&mut head);
    Ok(Reply::Head(head))
}

pub(super) fn number(value: u64) -> Outcome {
    head(|head| {
        head.u64(value);
    })
}

/// `fuse_write_out`, `fuse_getxattr_out`, `fuse_poll_out`
pub(super) fn half(value: u32) -> Outcome {
    head(|head| {
        head.u32(value).u32(0);
    })
}

pub(super) fn value(value: Bytes, size: u32) -> Outcome {
    match size {
        0 => half(u32::try_from(value.len()).map_err(|_| Errno::E2BIG)?),
        size if value.len() > size as usize => Err(Errno::ERANGE.into()),
        _ => Ok(Reply::Data(value.into())),
    }
}

/// Sends one answer.
pub(crate) fn send(shared: &Shared, channel: &Channel, unique: u64, result: Result<&Reply, Errno>) {
    let (errno, fixed, data) = match result {
        Err(errno) => (-errno.raw(), &[][..], None),
        Ok(Reply::Empty) => (0, &[][..], None),
        Ok(Reply::Head(head)) => (0, head.as_slice(), None),
        Ok(Reply::Data(data)) => (0, &[][..], Some(data)),
        Ok(Reply::Both(head, bytes)) => {
            let mut prefix = prefix(0, head.as_slice().len() + bytes.len(), unique);
            prefix.put(head.as_slice());
            let parts = [IoSlice::new(prefix.as_slice()), IoSlice::new(bytes)];
            return report(shared, channel, unique, channel.write(&parts));
        }
    };
    let length = fixed.len() + data.map_or(0, Data::len);
    let mut first = Prefix::new(errno, length, unique);
    first.put(fixed);
    let first = IoSlice::new(first.as_slice());
    let written = match data {
        None => channel.write(&[first]),
        Some(Data::Bytes(bytes)) => channel.write(&[first, IoSlice::new(bytes)]),
        Some(Data::Buffer(buffer)) => channel.write(&[first, IoSlice::new(buffer)]),
        Some(Data::Chunks(chunks)) => {
            // The kernel's limit of parts is 1024; whoever has more has small ones.
            if chunks.len() < 1000 {
                let parts: Vec<_> = std::iter::once(first)
                    .chain(chunks.iter().map(|chunk| IoSlice::new(chunk)))
                    .collect();
                channel.write(&parts)
            } else {
                channel.write(&[first, IoSlice::new(&chunks.concat())])
            }
        }
    };
    report(shared, channel, unique, written);
}

fn report(shared: &Shared, channel: &Channel, unique: u64, written: rustix::io::Result<()>) {
    match written {
        Ok(()) => {}
        // The kernel no longer waits for it, or the connection is gone.
        Err(Os::NOENT | Os::NODEV | Os::CONNABORTED | Os::PERM) => {
            shared.statistics.unsent.fetch_add(1, Relaxed);
        }
        Err(error) => {
            shared.statistics.unsent.fetch_add(1, Relaxed);
            tracing::error!(%error, unique, "the kernel refused an answer");
            let eio = Prefix::new(-Errno::EIO.raw(), 0, unique);
            let _ = channel.write(&[IoSlice::new(eio.as_slice())]);
        }
    }
}

/// `fuse_out_header` and room for the fixed part of a reply.
struct Prefix {
    bytes: [u8; OUT_HEADER + 288],
    length: usize,
}

impl Prefix {
    fn new(error: i32, rest: usize, unique: u64) -> Self {
        let mut bytes = [0; OUT_HEADER + 288];
        bytes[..4].copy_from_slice(&((OUT_HEADER + rest) as u32).to_ne_bytes());
        bytes[4..8].copy_from_slice(&error.to_ne_bytes());
        bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
        Self {
            bytes,
            length: OUT_HEADER,
        }
    }

    /// Never more than a `Head` holds.
    fn put(&mut self, fixed: &[u8]) {
        let end = (self.length + fixed.len()).min(self.bytes.len());
        let count = end - self.length;
        self.bytes[self.length..end].copy_from_slice(&fixed[..count]);
        self.length = end;
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

fn prefix(error: i32, rest: usize, unique: u64) -> Prefix {
    Prefix::new(error, rest, unique)
}
