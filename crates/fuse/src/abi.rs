//! Numbers of the FUSE protocol, versions 7.31 to 7.45.

use bitflags::bitflags;

/// The major version spoken.
pub const MAJOR: u32 = 7;
/// The newest minor version known.
pub const MINOR: u32 = 45;
/// The oldest minor version accepted (Linux 5.4).
pub const OLDEST_MINOR: u32 = 31;
/// Node id of the mounted directory.
pub const ROOT: u64 = 1;
/// Bytes of a request's header.
pub const IN_HEADER: usize = 40;
/// Bytes of a reply's header.
pub const OUT_HEADER: usize = 16;
/// Bytes of `fuse_write_in`: data of a write begin this far after the header.
pub const WRITE_IN: usize = 40;
/// In the unique number of a request that was sent before.
pub const UNIQUE_RESEND: u64 = 1 << 63;
/// In the unique number of an interrupt.
pub(crate) const UNIQUE_INTERRUPT: u64 = 1;
/// Longest name of a directory entry that the kernel takes, in bytes.
pub const NAME_MAX: usize = 255;

macro_rules! opcodes {
    ($($(#[$doc:meta])* $name:ident = $number:literal $text:literal;)*) => {
        /// What a request asks for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Opcode {
            $($(#[$doc])* $name = $number,)*
        }

        impl Opcode {
            /// All of them.
            pub const ALL: &[Opcode] = &[$(Opcode::$name,)*];

            /// The opcode of this number.
            pub fn from_raw(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// A name for metrics and logs.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

opcodes! {
    /// Name to node.
    Lookup = 1 "lookup";
    /// The kernel drops references to a node.
    Forget = 2 "forget";
    /// Attributes.
    Getattr = 3 "getattr";
    /// Change attributes.
    Setattr = 4 "setattr";
    /// Target of a symbolic link.
    Readlink = 5 "readlink";
    /// Create a symbolic link.
    Symlink = 6 "symlink";
    /// Create a file, device, pipe or socket.
    Mknod = 8 "mknod";
    /// Create a directory.
    Mkdir = 9 "mkdir";
    /// Remove a name.
    Unlink = 10 "unlink";
    /// Remove a directory.
    Rmdir = 11 "rmdir";
    /// Rename without flags.
    Rename = 12 "rename";
    /// Another name for a node.
    Link = 13 "link";
    /// Open a file.
    Open = 14 "open";
    /// Read from a file.
    Read = 15 "read";
    /// Write to a file.
    Write = 16 "write";
    /// Figures of the file system.
    Statfs = 17 "statfs";
    /// The last descriptor of an open file is closed.
    Release = 18 "release";
    /// Make a file durable.
    Fsync = 20 "fsync";
    /// Set an extended attribute.
    Setxattr = 21 "setxattr";
    /// Get an extended attribute.
    Getxattr = 22 "getxattr";
    /// Names of extended attributes.
    Listxattr = 23 "listxattr";
    /// Remove an extended attribute.
    Removexattr = 24 "removexattr";
    /// A descriptor of an open file is closed.
    Flush = 25 "flush";
    /// The first request of a connection.
    Init = 26 "init";
    /// Open a directory.
    Opendir = 27 "opendir";
    /// List a directory.
    Readdir = 28 "readdir";
    /// The last descriptor of an open directory is closed.
    Releasedir = 29 "releasedir";
    /// Make a directory durable.
    Fsyncdir = 30 "fsyncdir";
    /// Test for a lock.
    Getlk = 31 "getlk";
    /// Take or drop a lock, do not wait.
    Setlk = 32 "setlk";
    /// Take a lock, wait for it.
    Setlkw = 33 "setlkw";
    /// Check permissions.
    Access = 34 "access";
    /// Create and open a file.
    Create = 35 "create";
    /// A signal reached the process that waits for a request.
    Interrupt = 36 "interrupt";
    /// Block number of a file's block.
    Bmap = 37 "bmap";
    /// The file system goes away.
    Destroy = 38 "destroy";
    /// Device control.
    Ioctl = 39 "ioctl";
    /// Readiness of a file.
    Poll = 40 "poll";
    /// Answer to a retrieve notification.
    NotifyReply = 41 "notify_reply";
    /// Several forgets.
    BatchForget = 42 "batch_forget";
    /// Allocate or punch.
    Fallocate = 43 "fallocate";
    /// List a directory with attributes.
    Readdirplus = 44 "readdirplus";
    /// Rename with flags.
    Rename2 = 45 "rename2";
    /// Find data or a hole.
    Lseek = 46 "lseek";
    /// Copy between files, result in 32 bits.
    CopyFileRange = 47 "copy_file_range";
    /// Map a file into a window of memory (virtiofs only).
    SetupMapping = 48 "setup_mapping";
    /// Unmap (virtiofs only).
    RemoveMapping = 49 "remove_mapping";
    /// Make the whole file system durable.
    Syncfs = 50 "syncfs";
    /// Create a file without a name.
    Tmpfile = 51 "tmpfile";
    /// Extended attributes of a node as of statx(2).
    Statx = 52 "statx";
    /// Copy between files, result in 64 bits.
    CopyFileRange64 = 53 "copy_file_range_64";
}

/// One more than the largest opcode.
pub(crate) const OPCODES: usize = 54;

bitflags! {
    /// What kernel and file system can agree on at INIT.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Capabilities: u64 {
        /// Several reads of one file at a time.
        const ASYNC_READ = 1 << 0;
        /// fcntl(2) locks come to the file system.
        const POSIX_LOCKS = 1 << 1;
        /// O_TRUNC comes with open instead of as a setattr.
        const ATOMIC_O_TRUNC = 1 << 3;
        /// Lookups of "." and ".." are handled, so the mount can be exported over NFS.
        const EXPORT_SUPPORT = 1 << 4;
        /// Writes of more than 4 KiB.
        const BIG_WRITES = 1 << 5;
        /// The umask is not applied by the kernel.
        const DONT_MASK = 1 << 6;
        /// splice(2) to the device.
        const SPLICE_WRITE = 1 << 7;
        /// Pages move when spliced.
        const SPLICE_MOVE = 1 << 8;
        /// splice(2) from the device.
        const SPLICE_READ = 1 << 9;
        /// flock(2) locks come to the file system.
        const FLOCK_LOCKS = 1 << 10;
        /// ioctl(2) on directories.
        const IOCTL_DIR = 1 << 11;
        /// Cached pages are dropped when attributes show another size or modification time.
        const AUTO_INVAL_DATA = 1 << 12;
        /// Listings can carry attributes.
        const READDIRPLUS = 1 << 13;
        /// The kernel chooses when listings carry attributes.
        const READDIRPLUS_AUTO = 1 << 14;
        /// Direct I/O is sent in parallel.
        const ASYNC_DIO = 1 << 15;
        /// The kernel keeps written data and is the authority on size and times.
        const WRITEBACK_CACHE = 1 << 16;
        /// ENOSYS from open means that opens need no request.
        const NO_OPEN_SUPPORT = 1 << 17;
        /// Lookups and listings of one directory in parallel.
        const PARALLEL_DIROPS = 1 << 18;
        /// The file system drops set-user-id bits and capabilities.
        const HANDLE_KILLPRIV = 1 << 19;
        /// POSIX ACLs, checked by the kernel.
        const POSIX_ACL = 1 << 20;
        /// An aborted connection reads ECONNABORTED, not ENODEV.
        const ABORT_ERROR = 1 << 21;
        /// Requests of more than 32 pages.
        const MAX_PAGES = 1 << 22;
        /// Targets of symbolic links are cached.
        const CACHE_SYMLINKS = 1 << 23;
        /// ENOSYS from opendir means that it needs no request.
        const NO_OPENDIR_SUPPORT = 1 << 24;
        /// Cached pages are dropped on request only.
        const EXPLICIT_INVAL_DATA = 1 << 25;
        /// DAX mappings are aligned as told.
        const MAP_ALIGNMENT = 1 << 26;
        /// Attributes may announce mount points.
        const SUBMOUNTS = 1 << 27;
        /// The file system drops set-user-id bits when told so.
        const HANDLE_KILLPRIV_V2 = 1 << 28;
        /// Setxattr has flags of its own.
        const SETXATTR_EXT = 1 << 29;
        /// INIT has a second word of flags.
        const INIT_EXT = 1 << 30;
        /// Security contexts come with creations.
        const SECURITY_CTX = 1 << 32;
        /// DAX for each inode.
        const HAS_INODE_DAX = 1 << 33;
        /// Creations tell a supplementary group that matches the directory's.
        const CREATE_SUPP_GROUP = 1 << 34;
        /// Entries can be expired instead of dropped.
        const HAS_EXPIRE_ONLY = 1 << 35;
        /// Shared mappings of files opened for direct I/O.
        const DIRECT_IO_ALLOW_MMAP = 1 << 36;
        /// Reads and writes can go straight to a backing file.
        const PASSTHROUGH = 1 << 37;
        /// No NFS export.
        const NO_EXPORT_SUPPORT = 1 << 38;
        /// Requests in flight can be sent once more.
        const HAS_RESEND = 1 << 39;
        /// Mounts may be id-mapped.
        const ALLOW_IDMAP = 1 << 40;
        /// Requests over io_uring.
        const OVER_IO_URING = 1 << 41;
        /// Requests time out.
        const REQUEST_TIMEOUT = 1 << 42;
    }
}

bitflags! {
    /// How the kernel treats an open file or directory.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct OpenReplyFlags: u32 {
        /// Reads and writes bypass the page cache.
        const DIRECT_IO = 1 << 0;
        /// Pages cached before stay.
        const KEEP_CACHE = 1 << 1;
        /// lseek(2) fails.
        const NONSEEKABLE = 1 << 2;
        /// The directory's listing is cached.
        const CACHE_DIR = 1 << 3;
        /// There is no position.
        const STREAM = 1 << 4;
        /// Closing sends no flush; then nothing says that POSIX locks are to be dropped.
        const NOFLUSH = 1 << 5;
        /// Direct writes of one file in parallel.
        const PARALLEL_DIRECT_WRITES = 1 << 6;
        /// Reads and writes go straight to the backing file.
        const PASSTHROUGH = 1 << 7;
    }
}

/// Codes of notifications, in the error field of a message with unique 0.
pub(crate) mod notify {
    pub(crate) const POLL: i32 = 1;
    pub(crate) const INVAL_INODE: i32 = 2;
    pub(crate) const INVAL_ENTRY: i32 = 3;
    pub(crate) const STORE: i32 = 4;
    pub(crate) const RETRIEVE: i32 = 5;
    pub(crate) const DELETE: i32 = 6;
    pub(crate) const RESEND: i32 = 7;
    pub(crate) const INC_EPOCH: i32 = 8;
    pub(crate) const PRUNE: i32 = 9;
    /// In the flags of INVAL_ENTRY.
    pub(crate) const EXPIRE_ONLY: u32 = 1;
}

/// Bits of `fuse_setattr_in.valid`.
pub(crate) mod fattr {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const LOCKOWNER: u32 = 1 << 9;
    pub(crate) const CTIME: u32 = 1 << 10;
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

pub(crate) const GETATTR_FH: u32 = 1;
pub(crate) const LK_FLOCK: u32 = 1;
pub(crate) const RELEASE_FLUSH: u32 = 1 << 0;
pub(crate) const RELEASE_FLOCK_UNLOCK: u32 = 1 << 1;
pub(crate) const WRITE_CACHE: u32 = 1 << 0;
pub(crate) const WRITE_LOCKOWNER: u32 = 1 << 1;
pub(crate) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
pub(crate) const READ_LOCKOWNER: u32 = 1 << 1;
pub(crate) const FSYNC_FDATASYNC: u32 = 1;
pub(crate) const OPEN_KILL_SUIDGID: u32 = 1;
pub(crate) const SETXATTR_ACL_KILL_SGID: u32 = 1;
pub(crate) const POLL_SCHEDULE_NOTIFY: u32 = 1;
pub(crate) const EXT_GROUPS: u32 = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opcodes_are_unique_and_fit_the_tables() {
        for opcode in Opcode::ALL {
            assert_eq!(Opcode::from_raw(*opcode as u32), Some(*opcode));
            assert!((*opcode as usize) < OPCODES);
        }
        assert_eq!(Opcode::from_raw(7), None);
        assert_eq!(Opcode::from_raw(4096), None);
    }
}
