//! Attributes of nodes and how replies carry them.

use crate::wire::Head;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The kind of a node, as in the upper bits of its mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A pipe.
    Fifo = 1,
    /// A character device.
    CharDevice = 2,
    /// A directory.
    Directory = 4,
    /// A block device.
    BlockDevice = 6,
    /// A regular file.
    File = 8,
    /// A symbolic link.
    Symlink = 10,
    /// A socket.
    Socket = 12,
}

impl Kind {
    /// The kind in a mode. A mode without one is a file's, as for mknod(2).
    pub fn of_mode(mode: u32) -> Option<Self> {
        match mode >> 12 & 0o17 {
            0 | 8 => Some(Self::File),
            1 => Some(Self::Fifo),
            2 => Some(Self::CharDevice),
            4 => Some(Self::Directory),
            6 => Some(Self::BlockDevice),
            10 => Some(Self::Symlink),
            12 => Some(Self::Socket),
            _ => None,
        }
    }

    /// The upper bits of a mode.
    pub fn mode(self) -> u32 {
        u32::from(self as u8) << 12
    }
}

/// A point in time, to the nanosecond.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Seconds since 1970, before it negative.
    pub seconds: i64,
    /// Nanoseconds after that second, below 1,000,000,000.
    pub nanoseconds: u32,
}

impl Timestamp {
    /// The present.
    pub fn now() -> Self {
        SystemTime::now().into()
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => Self {
                seconds: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
                nanoseconds: after.subsec_nanos(),
            },
            Err(error) => {
                let before = error.duration();
                let seconds = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
                match before.subsec_nanos() {
                    0 => Self {
                        seconds: -seconds,
                        nanoseconds: 0,
                    },
                    nanos => Self {
                        seconds: -seconds - 1,
                        nanoseconds: 1_000_000_000 - nanos,
                    },
                }
            }
        }
    }
}

/// What stat(2) tells of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attr {
    /// Inode number shown to applications.
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the data.
    pub mtime: Timestamp,
    /// Last change of the attributes.
    pub ctime: Timestamp,
    /// Kind and permissions.
    pub mode: u32,
    /// Names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device, in the kernel's 32-bit form (see [`encode_device`]).
    pub rdev: u32,
    /// Bytes that applications should read or write at a time.
    pub blksize: u32,
    /// `FUSE_ATTR_…`: 1 for the root of a submount, 2 for DAX.
    pub flags: u32,
}

/// A device number in the form of `Attr::rdev`: minor below 2²⁰, major below 2¹².
pub fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & !0xff) << 12
}

/// Major and minor of a device number in the form of `Attr::rdev`.
pub fn decode_device(rdev: u32) -> (u32, u32) {
    ((rdev >> 8) & 0xfff, (rdev & 0xff) | (rdev >> 12 & 0xf_ff00))
}

/// The answer to a lookup or creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// The node; 0 says that the name does not exist and may be remembered as such for `entry_ttl`.
    pub node: u64,
    /// Together with `node` unique as long as the file system lives; for NFS export.
    pub generation: u64,
    /// Its attributes.
    pub attr: Attr,
    /// How long the kernel may trust the attributes.
    pub attr_ttl: Duration,
    /// How long the kernel may trust the name.
    pub entry_ttl: Duration,
}

/// The answer to getattr and setattr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes {
    /// The attributes.
    pub attr: Attr,
    /// How long the kernel may trust them.
    pub ttl: Duration,
}

/// The answer to open, create and opendir.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Opened {
    /// Comes back with every request on this open file.
    pub handle: u64,
    /// How the kernel treats it.
    pub flags: crate::abi::OpenReplyFlags,
    /// With `OpenReplyFlags::PASSTHROUGH`: the backing file's id.
    pub backing: i32,
}

/// Figures of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statfs {
    /// Blocks of `frsize` bytes.
    pub blocks: u64,
    /// Free ones.
    pub free: u64,
    /// Free ones for users without privileges.
    pub available: u64,
    /// Inodes.
    pub files: u64,
    /// Free inodes.
    pub free_files: u64,
    /// Preferred bytes of an I/O.
    pub bsize: u32,
    /// Longest name, bytes.
    pub name_max: u32,
    /// Bytes of a block.
    pub frsize: u32,
}

impl Default for Statfs {
    fn default() -> Self {
        Self {
            blocks: 0,
            free: 0,
            available: 0,
            files: 0,
            free_files: 0,
            bsize: 4096,
            name_max: 255,
            frsize: 4096,
        }
    }
}

/// What statx(2) tells of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statx {
    /// The attributes.
    pub attr: Attr,
    /// Creation.
    pub btime: Option<Timestamp>,
    /// `STATX_ATTR_…` that are set.
    pub attributes: u64,
    /// `STATX_ATTR_…` that are known.
    pub attributes_mask: u64,
    /// How long the kernel may trust them.
    pub ttl: Duration,
}

/// A POSIX or flock lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lock {
    /// First byte.
    pub start: u64,
    /// Last byte; `i64::MAX` reaches to the end of the file however it grows.
    pub end: u64,
    /// Shared, exclusive, or none.
    pub kind: LockKind,
    /// Process that holds it.
    pub pid: u32,
}

/// Kinds of locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LockKind {
    /// Several at a time.
    Shared,
    /// One at a time.
    Exclusive,
    /// None; drop the lock.
    Unlock,
}

impl LockKind {
    pub(crate) fn from_raw(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::Shared),
            1 => Some(Self::Exclusive),
            2 => Some(Self::Unlock),
            _ => None,
        }
    }

    fn raw(self) -> u32 {
        match self {
            Self::Shared => 0,
            Self::Exclusive => 1,
            Self::Unlock => 2,
        }
    }
}

/// Keeps a wrong value from the kernel, which answers such ones with EIO.
fn nanos(time: Timestamp) -> u32 {
    time.nanoseconds.min(999_999_999)
}

pub(crate) fn put_attr(head: &mut Head, attr: &Attr) {
    head.u64(attr.ino).u64(attr.size).u64(attr.blocks);
    head.i64(attr.atime.seconds)
        .i64(attr.mtime.seconds)
        .i64(attr.ctime.seconds);
    head.u32(nanos(attr.atime))
        .u32(nanos(attr.mtime))
        .u32(nanos(attr.ctime));
    head.u32(attr.mode).u32(attr.nlink).u32(attr.uid).u32(attr.gid);
    head.u32(attr.rdev).u32(attr.blksize).u32(attr.flags);
}

pub(crate) fn put_entry(head: &mut Head, entry: &Entry) {
    head.u64(entry.node).u64(entry.generation);
    head.u64(entry.entry_ttl.as_secs()).u64(entry.attr_ttl.as_secs());
    head.u32(entry.entry_ttl.subsec_nanos())
        .u32(entry.attr_ttl.subsec_nanos());
    put_attr(head, &entry.attr);
}

pub(crate) fn put_attributes(head: &mut Head, attributes: &Attributes) {
    head.u64(attributes.ttl.as_secs())
        .u32(attributes.ttl.subsec_nanos())
        .u32(0);
    put_attr(head, &attributes.attr);
}

pub(crate) fn put_opened(head: &mut Head, opened: &Opened) {
    head.u64(opened.handle).u32(opened.flags.bits()).i32(opened.backing);
}

pub(crate) fn put_statfs(head: &mut Head, statfs: &Statfs) {
    head.u64(statfs.blocks).u64(statfs.free).u64(statfs.available);
    head.u64(statfs.files).u64(statfs.free_files);
    head.u32(statfs.bsize).u32(statfs.name_max).u32(statfs.frsize).zeros(28);
}

pub(crate) fn put_lock(head: &mut Head, lock: &Lock) {
    head.u64(lock.start).u64(lock.end).u32(lock.kind.raw()).u32(lock.pid);
}

fn put_statx_time(head: &mut Head, time: Timestamp) {
    head.i64(time.seconds).u32(nanos(time)).i32(0);
}

pub(crate) fn put_statx(head: &mut Head, statx: &Statx) {
    const BASIC: u32 = 0x7ff;
    const BTIME: u32 = 0x800;
    let attr = &statx.attr;
    head.u64(statx.ttl.as_secs())
        .u32(statx.ttl.subsec_nanos())
        .u32(0)
        .zeros(16);
    head.u32(if statx.btime.is_some() { BASIC | BTIME } else { BASIC });
    head.u32(attr.blksize)
        .u64(statx.attributes)
        .u32(attr.nlink)
        .u32(attr.uid)
        .u32(attr.gid);
    head.u16((attr.mode & 0xffff) as u16).zeros(2);
    head.u64(attr.ino)
        .u64(attr.size)
        .u64(attr.blocks)
        .u64(statx.attributes_mask);
    for time in [attr.atime, statx.btime.unwrap_or_default(), attr.ctime, attr.mtime] {
        put_statx_time(head, time);
    }
    let (major, minor) = decode_device(attr.rdev);
    head.u32(major).u32(minor).u32(0).u32(0).zeros(112);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of the structures in the kernel's header.
    #[test]
    fn sizes_are_the_kernels() {
        let size = |build: &dyn Fn(&mut Head)| {
            let mut head = Head::new();
            build(&mut head);
            head.as_slice().len()
        };
        assert_eq!(size(&|head| put_attr(head, &Attr::default())), 88);
        assert_eq!(size(&|head| put_entry(head, &Entry::default())), 128);
        assert_eq!(size(&|head| put_attributes(head, &Attributes::default())), 104);
        assert_eq!(size(&|head| put_opened(head, &Opened::default())), 16);
        assert_eq!(size(&|head| put_statfs(head, &Statfs::default())), 80);
        assert_eq!(size(&|head| put_statx(head, &Statx::default())), 288);
    }

    #[test]
    fn times_before_1970() {
        let time = UNIX_EPOCH - Duration::from_nanos(1);
        assert_eq!(
            Timestamp::from(time),
            Timestamp {
                seconds: -1,
                nanoseconds: 999_999_999
            }
        );
        let time = UNIX_EPOCH - Duration::from_secs(5);
        assert_eq!(
            Timestamp::from(time),
            Timestamp {
                seconds: -5,
                nanoseconds: 0
            }
        );
        let time = UNIX_EPOCH + Duration::new(7, 8);
        assert_eq!(
            Timestamp::from(time),
            Timestamp {
                seconds: 7,
                nanoseconds: 8
            }
        );
    }

    #[test]
    fn devices_there_and_back() {
        for (major, minor) in [(0, 0), (8, 1), (255, 255), (0xfff, 0xf_ffff), (1, 0x12345)] {
            assert_eq!(decode_device(encode_device(major, minor)), (major, minor));
        }
        assert_eq!(encode_device(10, 229), 0xae5);
    }

    #[test]
    fn kinds_of_modes() {
        assert_eq!(Kind::of_mode(0o644), Some(Kind::File));
        assert_eq!(Kind::of_mode(0o040_755), Some(Kind::Directory));
        assert_eq!(Kind::of_mode(0o170_000), None);
        for kind in [
            Kind::Fifo,
            Kind::Socket,
            Kind::Symlink,
            Kind::BlockDevice,
            Kind::CharDevice,
            Kind::File,
        ] {
            assert_eq!(Kind::of_mode(kind.mode() | 0o7777), Some(kind));
        }
    }
}
