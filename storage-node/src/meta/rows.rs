//! The rows of a shard: everything that a namespace consists of, as typed keys and values.
//!
//! The whole persistent state is an ordered map from [`Key`] to [`Row`]. Rows of one inode are
//! neighbours, so a page of the map holds whole directories and files.

mod codec;

pub use codec::{Change, FORMAT, MAX_NAME, MAX_XATTR_VALUE, Reader, RowError, Writer, open_envelope, seal_envelope};

use lazarette_proto::meta::{Attr, Kind};
use lazarette_types::{ErrorCode, InodeId, SessionId};
use std::sync::Arc;

/// A row's key. The order is that of the pages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// The shard's counters.
    Counters,
    /// A mounted client.
    Session(SessionId),
    /// The lowest op id that a session may still repeat.
    Acked(SessionId),
    /// The result of a session's mutation, by op id.
    Result(SessionId, u64),
    /// An inode that is gone and whose chunks are to be removed.
    Garbage(InodeId),
    /// A file whose chunks are to be cut.
    Truncate(InodeId),
    /// A part of an inode.
    Inode(InodeId, Part),
}

/// The rows that an inode consists of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Attributes.
    Attributes,
    /// Locks and the turn to append.
    Locks,
    /// What may lie beyond the file's end.
    Reach,
    /// An extended attribute, by name.
    Xattr(Box<[u8]>),
    /// An entry of the directory, by cookie.
    Dentry(u64),
}

/// A row's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Row {
    /// Of [`Key::Counters`].
    Counters {
        /// The number of the next inode. Never lowered, so numbers are never reused.
        next_inode: u64,
    },
    /// Of [`Key::Session`].
    Session(Box<Session>),
    /// Of [`Key::Acked`].
    Acked(u64),
    /// Of [`Key::Result`].
    Result(Box<OpResult>),
    /// Of [`Key::Garbage`].
    Garbage(Garbage),
    /// Of [`Key::Truncate`].
    Truncate(Truncate),
    /// Of [`Part::Attributes`].
    Inode(Box<Inode>),
    /// Of [`Part::Locks`]; never empty.
    Locks(Box<Vec<Held>>),
    /// Of [`Part::Reach`].
    Reach(Reach),
    /// Of [`Part::Xattr`].
    Xattr(Box<[u8]>),
    /// Of [`Part::Dentry`].
    Dentry(Dentry),
}

/// A mounted client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// What the client calls itself, for people.
    pub client: String,
}

/// What a mutation returned the first time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpResult {
    /// Nothing but success.
    Done,
    /// An inode as it was right after.
    Attr(InodeId, Box<Inode>),
    /// Where to append.
    Turn {
        /// The end of the file.
        offset: u64,
        /// The inode's change counter.
        change: u64,
    },
    /// It failed and changed nothing.
    Failed(ErrorCode, String),
}

/// The chunks of an inode that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Garbage {
    /// The file's placement seed.
    pub seed: u32,
    /// Chunks with an index below this may exist.
    pub chunks: u32,
}

/// A cut of a file's chunks that is not finished: because the file was shrunk, or before it grows
/// over bytes that may be stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Truncate {
    /// The file's placement seed.
    pub seed: u32,
    /// No chunk has anything from here on.
    pub from: u64,
    /// From here on nothing is to be left.
    pub to: u64,
}

/// What is known of a file's chunks besides its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Chunks below this may have bytes that are not part of the file, in addition to the chunk in
    /// which it ends.
    pub end: u64,
    /// The change of the inode that last had its chunks cut; 0 if none did.
    pub cut: u64,
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dentry {
    /// 1 to 255 bytes without slash and NUL.
    pub name: Arc<[u8]>,
    /// What it names.
    pub ino: InodeId,
}

/// An inode's attributes. Times are nanoseconds since the Unix epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Never `Unspecified`.
    pub kind: Kind,
    /// Permission bits with set-id and sticky.
    pub mode: u32,
    /// 0: no name left, alive only because it is open.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes; of a symlink the length of its target.
    pub size: u64,
    /// Last access, as far as recorded.
    pub atime: i64,
    /// Last change of the contents.
    pub mtime: i64,
    /// Last change of the inode.
    pub ctime: i64,
    /// Device number of device files.
    pub rdev: u32,
    /// Where the placement table is entered.
    pub seed: u32,
    /// Raised by every change.
    pub change: u64,
    /// The directory that holds it; of a file with several names the last one used.
    pub parent: InodeId,
    /// Of a directory: the cookie of its next entry.
    pub next_cookie: u64,
    /// Of a symlink.
    pub target: Box<[u8]>,
}

impl Inode {
    /// Whether this is a directory.
    pub fn is_dir(&self) -> bool {
        self.kind == Kind::Directory
    }

    /// The attributes on the wire.
    pub fn attr(&self, ino: InodeId) -> Attr {
        Attr {
            ino: ino.0,
            kind: self.kind.into(),
            mode: self.mode,
            nlink: self.nlink,
            uid: self.uid,
            gid: self.gid,
            size: self.size,
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            rdev: self.rdev,
            seed: self.seed,
            change: self.change,
            parent: self.parent.0,
        }
    }
}

/// The kinds of locks; those of different kinds never conflict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LockClass {
    /// flock(2): the whole file, owned by an open file description.
    Flock,
    /// fcntl(2): ranges, owned by a process.
    Posix,
    /// The turn to append, owned by a session.
    Append,
}

/// A lock that is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// See [`LockClass`].
    pub class: LockClass,
    /// Shared locks do not conflict with each other.
    pub exclusive: bool,
    /// The holder's session.
    pub session: SessionId,
    /// The holder within the session.
    pub owner: u64,
    /// First byte.
    pub start: u64,
    /// Last byte, included.
    pub end: u64,
    /// The holder's process, for F_GETLK.
    pub pid: u32,
}

impl Key {
    /// The inode whose readers have to wait until a change of this row is committed.
    pub fn inode(&self) -> Option<InodeId> {
        match self {
            Self::Inode(ino, _) | Self::Garbage(ino) | Self::Truncate(ino) => Some(*ino),
            Self::Counters | Self::Session(_) | Self::Acked(_) | Self::Result(..) => None,
        }
    }

    /// The key of an inode's attributes.
    pub fn attributes(ino: InodeId) -> Self {
        Self::Inode(ino, Part::Attributes)
    }

    /// The key of an inode's locks.
    pub fn locks(ino: InodeId) -> Self {
        Self::Inode(ino, Part::Locks)
    }

    /// The key of what may lie beyond a file's end.
    pub fn reach(ino: InodeId) -> Self {
        Self::Inode(ino, Part::Reach)
    }

    /// The key of a directory's entry.
    pub fn dentry(dir: InodeId, cookie: u64) -> Self {
        Self::Inode(dir, Part::Dentry(cookie))
    }

    /// The key of an extended attribute.
    pub fn xattr(ino: InodeId, name: &[u8]) -> Self {
        Self::Inode(ino, Part::Xattr(name.into()))
    }
}
