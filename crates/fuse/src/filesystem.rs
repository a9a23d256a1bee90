//! What a file system implements.

use crate::attributes::{Attributes, Entry, Lock, Opened, Statfs, Statx};
use crate::buffer::ReplyBuffer;
use crate::directory::Listing;
use crate::errno::{Errno, Result};
use crate::operation::*;
use crate::request::Request;
use bytes::Bytes;
use std::ffi::OsString;
use std::future::{Future, ready};

/// Data of a reply.
#[derive(Debug)]
pub enum Data {
    /// In one piece.
    Bytes(Bytes),
    /// In several, sent without being put together.
    Chunks(Vec<Bytes>),
    /// In a buffer of [`Request::buffer`].
    Buffer(ReplyBuffer),
}

impl Data {
    /// Bytes in all.
    pub fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Chunks(chunks) => chunks.iter().map(Bytes::len).sum(),
            Self::Buffer(buffer) => buffer.len(),
        }
    }

    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl From<Vec<u8>> for Data {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes.into())
    }
}

impl From<Bytes> for Data {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<Vec<Bytes>> for Data {
    fn from(chunks: Vec<Bytes>) -> Self {
        Self::Chunks(chunks)
    }
}

impl From<ReplyBuffer> for Data {
    fn from(buffer: ReplyBuffer) -> Self {
        Self::Buffer(buffer)
    }
}

/// The answer to ioctl.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IoctlReply {
    /// What ioctl(2) returns.
    pub result: i32,
    /// What it writes, at most the operation's `output_size` bytes.
    pub output: Vec<u8>,
}

/// ENOSYS: most operations are not asked for again after it.
fn unsupported<T: Send>() -> impl Future<Output = Result<T>> + Send {
    ready(Err(Errno::ENOSYS))
}

/// A file system: one method for each operation, with defaults for what it lacks.
///
/// A method may take as long as it likes; others go on meanwhile. It is first run on the thread
/// that read the request, and moves to the tokio runtime when it waits for something: one that
/// never waits costs no switch, and one that blocks its thread blocks one reader of
/// [`crate::Config::readers`]. A panic is answered with EIO.
///
/// While a method waits, its future may be dropped: because a signal reached the caller (the
/// answer is EINTR then, see [`crate::InterruptPolicy`]), or because another process takes over (no
/// answer, the other one gets the request again, [`Request::is_resend`]).
/// [`Request::commit`] prevents both from there on.
///
/// Implementations write `async fn lookup(&self, request: &Request, lookup: Lookup<'_>) -> Result<Entry>`.
pub trait Filesystem: Send + Sync + 'static {
    /// Looks a name up.
    fn lookup(&self, _request: &Request, _lookup: Lookup<'_>) -> impl Future<Output = Result<Entry>> + Send {
        unsupported()
    }

    /// The kernel gives references back. Is to return at once.
    fn forget(&self, _forgets: &[Forget]) {}

    /// Attributes.
    fn getattr(&self, _request: &Request, _getattr: Getattr) -> impl Future<Output = Result<Attributes>> + Send {
        unsupported()
    }

    /// Attributes with the time of creation. ENOSYS makes the kernel use getattr.
    fn statx(&self, _request: &Request, _statx: StatxQuery) -> impl Future<Output = Result<Statx>> + Send {
        unsupported()
    }

    /// Changes attributes.
    fn setattr(&self, _request: &Request, _setattr: Setattr) -> impl Future<Output = Result<Attributes>> + Send {
        unsupported()
    }

    /// The target of a symbolic link.
    fn readlink(&self, _request: &Request, _readlink: Readlink) -> impl Future<Output = Result<OsString>> + Send {
        unsupported()
    }

    /// Creates a symbolic link.
    fn symlink(&self, _request: &Request, _symlink: Symlink<'_>) -> impl Future<Output = Result<Entry>> + Send {
        unsupported()
    }

    /// Creates a file, device, pipe or socket.
    fn mknod(&self, _request: &Request, _mknod: Mknod<'_>) -> impl Future<Output = Result<Entry>> + Send {
        unsupported()
    }

    /// Creates a directory.
    fn mkdir(&self, _request: &Request, _mkdir: Mkdir<'_>) -> impl Future<Output = Result<Entry>> + Send {
        unsupported()
    }

    /// Removes a name of anything but a directory.
    fn unlink(&self, _request: &Request, _remove: Remove<'_>) -> impl Future<Output = Result<()>> + Send {
        unsupported()
    }

    /// Removes an empty directory.
    fn rmdir(&self, _request: &Request, _remove: Remove<'_>) -> impl Future<Output = Result<()>> + Send {
        unsupported()
    }

    /// Renames.
    fn rename(&self, _request: &Request, _rename: Rename<'_>) -> impl Future<Output = Result<()>> + Send {
        unsupported()
    }

    /// Another name for a node.
    fn link(&self, _request: &Request, _link: Link<'_>) -> impl Future<Output = Result<Entry>> + Send {
        unsupported()
    }

    /// Opens a file. ENOSYS (with `NO_OPEN_SUPPORT`) means that opens need no request ever after.
    fn open(&self, _request: &Request, _open: Open) -> impl Future<Output = Result<Opened>> + Send {
        unsupported()
    }

    /// Creates and opens a file. ENOSYS makes the kernel use mknod and open.
    fn create(&self, _request: &Request, _create: Create<'_>) -> impl Future<Output = Result<(Entry, Opened)>> + Send {
        unsupported()
    }

    /// Creates and opens a file without a name.
    fn tmpfile(&self, _request: &Request, _create: Create<'_>) -> impl Future<Output = Result<(Entry, Opened)>> + Send {
        unsupported()
    }

    /// Reads; less than asked for means the end of the file.
    fn read(&self, _request: &Request, _read: Read) -> impl Future<Output = Result<Data>> + Send {
        unsupported()
    }

    /// Writes; returns the bytes taken.
    fn write(&self, _request: &Request, _write: Write) -> impl Future<Output = Result<u32>> + Send {
        unsupported()
    }

    /// A descriptor is closed. ENOSYS means that closing needs no request.
    fn flush(&self, _request: &Request, _flush: Flush) -> impl Future<Output = Result<()>> + Send {
        unsupported()
    }

    /// The last descriptor is closed. Nobody waits for the answer or sees it.
    fn release(&self, _request: &Request, _release: Release) -> impl Future<Output = Result<()>> + Send {
        ready(Ok(()))
    }

    /// Makes a file durable.
    fn fsync(&self, _request: &Request, _fsync: Fsync) -> impl Future<Output = Result<()>> + Send {
        unsupported()
    }

    /// Opens a directory. ENOSYS (with `NO_OPENDIR_SUPPORT`) means that it needs no request.
    fn opendir(&self, _request: &Request, _open: Open) -> impl Future<Output = Result<Opened>> + Send {
        unsupported()
    }

    /// Lists a directory into `listing`, from the entry after the cookie `readdir.offset`;
    /// [`Listing::is_plus`] tells whether attributes are wanted.
    fn readdir(
        &self,
        _request: &Request,
        _readdir: Readdir,
        _listing: &mut Listing,
    ) -> impl Future<Output = Result<()>> + Send {
        unsupported()
    }

    /// The last descriptor of a directory is closed.
    fn releasedir(&self, _request: &Request, _release: Release) -> impl Future<Output = Result<()>> + Send {
        ready(Ok(()))
    }

    /// Makes a directory durable.
    fn fsyncdir(&self, _request: &Request, _fsync: Fsync) -> impl Future<Output = Result<()>> + Send {
        unsupported()
    }

    /// Figures of the file system.
    fn statfs(&self, _request: &Request, _statfs: StatfsQuery) -> impl Future<Output = Result<Statfs>> + Send {
        ready(Ok(Statfs::default()))
    }

    /// Makes everything durable.
    fn syncfs(&self, _request: &Request, _syncfs: Syncfs) -> impl Future<Output = Result<()>> + Send {
        unsupported()
    }

    /// Sets an extended attribute.
    fn setxattr(&self, _request: &Request, _setxattr: Setxattr<'_>) -> impl Future<Output = Result<()>> + Send {
        unsupported()
    }

    /// The whole value of an extended attribute, whatever size the caller has room for: asking for
    /// the length and ERANGE are the session's business.
    fn getxattr(&self, _request: &Request, _getxattr: Getxattr<'_>) -> impl Future<Output = Result<Bytes>> + Send {
        unsupported()
    }

    /// All names of extended attributes, each ended by NUL.
    fn listxattr(&self, _request: &Request, _listxattr: Listxattr) -> impl Future<Output = Result<Bytes>> + Send {
        unsupported()
    }

    /// Removes an extended attribute.
    fn removexattr(
        &self,
        _request: &Request,
        _removexattr: Removexattr<'_>,
    ) -> impl Future<Output = Result<()>> + Send {
        unsupported()
    }

    /// A lock that would be in the way, or one of kind `Unlock`.
    fn getlk(&self, _request: &Request, _lock: LockRequest) -> impl Future<Output = Result<Lock>> + Send {
        unsupported()
    }

    /// Takes or drops a lock; waits for it if `lock.wait`, else EAGAIN.
    fn setlk(&self, _request: &Request, _lock: LockRequest) -> impl Future<Output = Result<()>> + Send {
        unsupported()
    }

    /// Checks permissions, for mounts without `default_permissions`.
    fn access(&self, _request: &Request, _access: Access) -> impl Future<Output = Result<()>> + Send {
        unsupported()
    }

    /// Block number on the device of a file's block.
    fn bmap(&self, _request: &Request, _bmap: Bmap) -> impl Future<Output = Result<u64>> + Send {
        unsupported()
    }

    /// Device control.
    fn ioctl(&self, _request: &Request, _ioctl: Ioctl<'_>) -> impl Future<Output = Result<IoctlReply>> + Send {
        // Else every ioctl(2) of programs that ask a file for being a terminal would be "not implemented".
        ready(Err(Errno::ENOTTY))
    }

    /// Readiness, as `POLL…`. ENOSYS means always ready.
    fn poll(&self, _request: &Request, _poll: Poll) -> impl Future<Output = Result<u32>> + Send {
        unsupported()
    }

    /// Allocates, punches, zeroes.
    fn fallocate(&self, _request: &Request, _fallocate: Fallocate) -> impl Future<Output = Result<()>> + Send {
        unsupported()
    }

    /// Finds data or a hole. ENOSYS makes the kernel take all for data.
    fn lseek(&self, _request: &Request, _lseek: Lseek) -> impl Future<Output = Result<u64>> + Send {
        unsupported()
    }

    /// Copies between files; returns the bytes copied. ENOSYS makes the kernel copy by pages.
    fn copy_file_range(&self, _request: &Request, _copy: CopyFileRange) -> impl Future<Output = Result<u64>> + Send {
        unsupported()
    }
}
