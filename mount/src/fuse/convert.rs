//! Our types and the FUSE server's.

use lazarette_client as client;
use lazarette_fuse::attributes::{Lock, LockKind};
use lazarette_fuse::operation::{LockRequest, SetTime, Setattr};
use lazarette_fuse::{Attr, Attributes, Entry, Errno, Kind, Result, Timestamp};
use lazarette_types::ErrorCode;

/// Bytes that applications are told to read and write at a time.
const BLOCK_SIZE: u32 = 128 << 10;
const NANOSECONDS: i64 = 1_000_000_000;

/// What the kernel is told about an error.
pub(super) fn errno(error: client::Error) -> Errno {
    Errno::from_raw(error.errno())
}

fn kind(kind: client::Kind) -> Kind {
    match kind {
        client::Kind::File | client::Kind::Unspecified => Kind::File,
        client::Kind::Directory => Kind::Directory,
        client::Kind::Symlink => Kind::Symlink,
        client::Kind::Fifo => Kind::Fifo,
        client::Kind::Socket => Kind::Socket,
        client::Kind::CharDevice => Kind::CharDevice,
        client::Kind::BlockDevice => Kind::BlockDevice,
    }
}

/// The kind in the mode of attributes.
pub(super) fn kind_of(attr: &Attr) -> Kind {
    Kind::of_mode(attr.mode).unwrap_or(Kind::File)
}

/// The kind in the upper bits of a mode.
pub(super) fn kind_of_mode(mode: u32) -> Result<client::Kind> {
    Ok(match Kind::of_mode(mode).ok_or(Errno::EINVAL)? {
        Kind::File => client::Kind::File,
        Kind::Directory => client::Kind::Directory,
        Kind::Symlink => client::Kind::Symlink,
        Kind::Fifo => client::Kind::Fifo,
        Kind::Socket => client::Kind::Socket,
        Kind::CharDevice => client::Kind::CharDevice,
        Kind::BlockDevice => client::Kind::BlockDevice,
    })
}

fn timestamp(nanoseconds: i64) -> Timestamp {
    Timestamp {
        seconds: nanoseconds.div_euclid(NANOSECONDS),
        nanoseconds: nanoseconds.rem_euclid(NANOSECONDS) as u32,
    }
}

fn nanoseconds(time: Timestamp) -> i64 {
    time.seconds
        .saturating_mul(NANOSECONDS)
        .saturating_add(i64::from(time.nanoseconds))
}

fn set_time(time: SetTime) -> i64 {
    match time {
        SetTime::At(time) => nanoseconds(time),
        SetTime::Now => nanoseconds(Timestamp::now()),
    }
}

pub(super) fn set_attributes(set: &Setattr) -> client::SetAttributes {
    client::SetAttributes {
        mode: set.mode.map(|mode| mode & 0o7777),
        uid: set.uid,
        gid: set.gid,
        size: set.size,
        atime: set.atime.map(set_time),
        mtime: set.mtime.map(set_time),
        ctime: set.ctime.map(nanoseconds),
        drop_privileges: set.kill_suidgid,
    }
}

pub(super) fn attr(attr: &client::Attr) -> Attr {
    Attr {
        ino: attr.ino,
        size: attr.size,
        blocks: attr.size.div_ceil(512),
        atime: timestamp(attr.atime),
        mtime: timestamp(attr.mtime),
        ctime: timestamp(attr.ctime),
        mode: kind(attr.kind()).mode() | attr.mode & 0o7777,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

/// Inode numbers are never used again, so there are no generations.
pub(super) fn entry(entry: client::Entry) -> Entry {
    Entry {
        node: entry.attr.ino,
        generation: 0,
        attr: attr(&entry.attr),
        attr_ttl: entry.ttl,
        entry_ttl: entry.ttl,
    }
}

pub(super) fn attributes(entry: client::Entry) -> Attributes {
    Attributes {
        attr: attr(&entry.attr),
        ttl: entry.ttl,
    }
}

pub(super) fn lock_range(request: &LockRequest) -> client::LockRange {
    let kind = if request.flock {
        client::LockKind::Flock
    } else {
        client::LockKind::Posix
    };
    let mode = match request.lock.kind {
        LockKind::Shared => client::LockMode::Shared,
        LockKind::Exclusive => client::LockMode::Exclusive,
        LockKind::Unlock => client::LockMode::Unlock,
    };
    client::LockRange {
        kind: kind.into(),
        mode: mode.into(),
        owner: request.owner,
        start: request.lock.start,
        end: request.lock.end.min(i64::MAX as u64),
        pid: request.lock.pid,
    }
}

/// The lock that is in the way, or none.
pub(super) fn lock(held: Option<client::LockRange>) -> Lock {
    let Some(held) = held else {
        return Lock {
            start: 0,
            end: 0,
            kind: LockKind::Unlock,
            pid: 0,
        };
    };
    Lock {
        start: held.start,
        end: held.end,
        kind: match held.mode() {
            client::LockMode::Shared => LockKind::Shared,
            _ => LockKind::Exclusive,
        },
        pid: held.pid,
    }
}

pub(super) fn xattr_mode(flags: u32) -> Result<client::XattrMode> {
    match flags {
        0 => Ok(client::XattrMode::Set),
        1 => Ok(client::XattrMode::Create),
        2 => Ok(client::XattrMode::Replace),
        _ => Err(Errno::EINVAL),
    }
}

pub(super) fn unknown_handle() -> client::Error {
    client::Error::new(ErrorCode::InvalidArgument, "unknown handle")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_and_after_the_epoch() {
        for nanos in [0, 1, -1, 1_500_000_000_123_456_789, -1_500_000_000] {
            let time = timestamp(nanos);
            assert_eq!(nanoseconds(time), nanos);
            assert!(time.nanoseconds < 1_000_000_000);
        }
        assert_eq!(
            nanoseconds(Timestamp {
                seconds: i64::MAX,
                nanoseconds: 5
            }),
            i64::MAX
        );
    }

    #[test]
    fn modes_carry_the_kind() {
        let fifo = client::Attr {
            kind: client::Kind::Fifo.into(),
            mode: 0o644,
            ..client::Attr::default()
        };
        assert_eq!(attr(&fifo).mode, 0o010_644);
        assert_eq!(kind_of_mode(0o010_600), Ok(client::Kind::Fifo));
        assert_eq!(kind_of_mode(0o170_000), Err(Errno::EINVAL));
    }
}
