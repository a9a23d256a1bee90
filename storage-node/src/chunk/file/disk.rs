//! The file operations that the store needs, behind a trait so that tests can cut the power
//! between any two of them.

use rustix::fs::{OFlags, ResolveFlags};
use rustix::io::ReadWriteFlags;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Read,
    /// For reading what is in memory: opening and reading fail rather than wait for the disk.
    ReadCached,
    Write,
    /// For reading and writing; made if it does not exist, emptied if it does.
    Create,
}

/// Threads that sync files.
const SYNCS_AT_ONCE: usize = 8;

/// One name in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) name: String,
    pub(super) is_dir: bool,
}

/// Bytes of a file system.
#[derive(Clone, Copy, Debug)]
pub(super) struct Space {
    pub(super) capacity: u64,
    pub(super) free: u64,
    pub(super) available: u64,
}

/// A folder. Paths are relative to it, with `/` between names and `""` for itself.
///
/// Nothing is durable before a `sync`: a file's bytes and length need its own, the names in a
/// folder (made, renamed or removed) that of the folder. A rename is atomic.
pub(super) trait Disk: Send + Sync {
    fn list(&self, path: &str) -> io::Result<Vec<Name>>;
    /// Makes a folder and those above it; succeeds if it exists.
    fn create_dir(&self, path: &str) -> io::Result<()>;
    fn open(&self, path: &str, mode: Mode) -> io::Result<Arc<dyn DiskFile>>;
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    fn remove_file(&self, path: &str) -> io::Result<()>;
    fn remove_dir_all(&self, path: &str) -> io::Result<()>;
    fn sync_dir(&self, path: &str) -> io::Result<()>;
    /// Syncs each of the files.
    fn sync_files(&self, files: &[Arc<dyn DiskFile>]) -> io::Result<()> {
        files.iter().try_for_each(|file| file.sync())
    }
    fn space(&self) -> io::Result<Space>;
}

/// An open file.
pub(super) trait DiskFile: Send + Sync {
    /// Fills the buffer as far as the file goes; returns the bytes read.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;
    fn set_len(&self, length: u64) -> io::Result<()>;
    fn len(&self) -> io::Result<u64>;
    /// Makes bytes and length durable.
    fn sync(&self) -> io::Result<()>;
}

/// A folder of the operating system, locked against other processes while this lives.
#[derive(Debug)]
pub(super) struct RealDisk {
    root: PathBuf,
    /// Holds the lock.
    folder: File,
}

impl RealDisk {
    /// Opens and locks the folder; `None` if another process has it.
    pub(super) fn open(root: &Path) -> io::Result<Option<Self>> {
        let folder = File::open(root)?;
        if !folder.metadata()?.is_dir() {
            return Err(io::Error::from(io::ErrorKind::NotADirectory));
        }
        match folder.try_lock() {
            Ok(()) => Ok(Some(Self {
                root: root.to_owned(),
                folder,
            })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn open_cached(&self, path: &str) -> io::Result<Arc<dyn DiskFile>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat2(
            &self.folder,
            path,
            flags,
            rustix::fs::Mode::empty(),
            ResolveFlags::CACHED,
        )?;
        Ok(Arc::new(CachedFile(file.into())))
    }

    fn path(&self, path: &str) -> PathBuf {
        if path.is_empty() {
            self.root.clone()
        } else {
            self.root.join(path)
        }
    }
}

impl Disk for RealDisk {
    fn list(&self, path: &str) -> io::Result<Vec<Name>> {
        std::fs::read_dir(self.path(path))?
            .map(|entry| {
                let entry = entry?;
                Ok(Name {
                    name: entry.file_name().to_string_lossy().into_owned(),
                    is_dir: entry.file_type()?.is_dir(),
                })
            })
            .collect()
    }

    fn create_dir(&self, path: &str) -> io::Result<()> {
        std::fs::create_dir_all(self.path(path))
    }

    fn open(&self, path: &str, mode: Mode) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true);
        match mode {
            Mode::Read => {}
            Mode::ReadCached => return self.open_cached(path),
            Mode::Write => {
                options.write(true);
            }
            Mode::Create => {
                options.write(true).create(true).truncate(true);
            }
        }
        Ok(Arc::new(options.open(self.path(path))?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.path(from), self.path(to))
    }

    fn remove_file(&self, path: &str) -> io::Result<()> {
        std::fs::remove_file(self.path(path))
    }

    fn remove_dir_all(&self, path: &str) -> io::Result<()> {
        std::fs::remove_dir_all(self.path(path))
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        File::open(self.path(path))?.sync_all()
    }

    /// Several at a time, so that file systems with a journal commit for many together.
    fn sync_files(&self, files: &[Arc<dyn DiskFile>]) -> io::Result<()> {
        let share = files.len().div_ceil(SYNCS_AT_ONCE).max(1);
        std::thread::scope(|threads| {
            let started: Vec<_> = files
                .chunks(share)
                .map(|files| threads.spawn(|| files.iter().try_for_each(|file| file.sync())))
                .collect();
            let ended = started
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            // All of them are waited for, whatever the first says.
            ended.collect::<Vec<_>>().into_iter().collect()
        })
    }

    fn space(&self) -> io::Result<Space> {
        let stat = rustix::fs::fstatvfs(&self.folder)?;
        Ok(Space {
            capacity: stat.f_blocks * stat.f_frsize,
            free: stat.f_bfree * stat.f_frsize,
            available: stat.f_bavail * stat.f_frsize,
        })
    }
}

/// Reads until the buffer is full or the file ends.
fn read_all(
    buffer: &mut [u8],
    offset: u64,
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match read(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

impl DiskFile for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        read_all(buffer, offset, |buffer, offset| FileExt::read_at(self, buffer, offset))
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(data, offset)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        File::set_len(self, length)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// A file of [`Mode::ReadCached`].
struct CachedFile(File);

impl DiskFile for CachedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        read_all(buffer, offset, |buffer, offset| {
            let mut buffers = [IoSliceMut::new(buffer)];
            Ok(rustix::io::preadv2(
                &self.0,
                &mut buffers,
                offset,
                ReadWriteFlags::NOWAIT,
            )?)
        })
    }

    fn write_at(&self, _data: &[u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_len(&self, _length: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn len(&self) -> io::Result<u64> {
        DiskFile::len(&self.0)
    }

    fn sync(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Whether an error says that the disk is full.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether an error comes of a shortage of descriptors, so says nothing about the disk.
pub(super) fn is_transient(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error);
    errno.is_some_and(|errno| errno == Errno::MFILE || errno == Errno::NFILE)
}
