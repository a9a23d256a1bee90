//! The descriptors of a connection.
//!
//! A request has to be answered through the descriptor it was read from, and a clone that nobody
//! holds any more aborts its requests: whoever keeps a connection alive keeps all of them.

use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{self, Setter, opcode};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// `FUSE_DEV_IOC_CLONE`
const CLONE: ioctl::Opcode = opcode::read::<u32>(229, 0);

/// Opens /dev/fuse.
pub(crate) fn open() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(
        "/dev/fuse",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Another descriptor of a mounted connection.
#[allow(unsafe_code)]
pub(crate) fn clone(of: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let fresh = open()?;
    let number = of.as_raw_fd() as u32;
    // SAFETY: FUSE_DEV_IOC_CLONE reads one u32 from the address it is given, the number of an open
    // descriptor, and writes nothing; `Setter` passes the address of `number`'s copy.
    unsafe { ioctl::ioctl(&fresh, Setter::<CLONE, u32>::new(number))? };
    Ok(fresh)
}

/// `struct fuse_backing_map`
#[repr(C)]
struct Backing {
    file: i32,
    flags: u32,
    padding: u64,
}

/// `FUSE_DEV_IOC_BACKING_OPEN`
const BACK: ioctl::Opcode = opcode::write::<Backing>(229, 1);
/// `FUSE_DEV_IOC_BACKING_CLOSE`
const UNBACK: ioctl::Opcode = opcode::write::<u32>(229, 2);

/// Makes a file known to the kernel for open files to stand in for; returns its number.
#[allow(unsafe_code)]
pub(crate) fn back(connection: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<i32> {
    use std::os::fd::AsRawFd;
    let backing = Backing {
        file: file.as_raw_fd(),
        flags: 0,
        padding: 0,
    };
    // SAFETY: the command reads the structure whose address it is given, and writes nothing.
    match unsafe { libc::ioctl(connection.as_raw_fd(), BACK as _, &raw const backing) } {
        number if number < 0 => Err(io::Error::last_os_error()),
        number => Ok(number),
    }
}

/// The opposite of [`back`]. Files that are open stay as they are.
#[allow(unsafe_code)]
pub(crate) fn unback(connection: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    // SAFETY: the command reads one u32 from the address it is given, and writes nothing.
    unsafe { ioctl::ioctl(connection, Setter::<UNBACK, u32>::new(number as u32)) }?;
    Ok(())
}

/// One descriptor of a connection.
#[derive(Debug)]
pub(crate) struct Channel {
    fd: OwnedFd,
}

impl Channel {
    /// Reads are to block: a flag that another holder may have set is cleared.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        if flags.contains(OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK)?;
        }
        Ok(Self { fd })
    }

    pub(crate) fn read(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        rustix::io::read(&self.fd, buffer)
    }

    /// One message; the kernel takes it whole or not at all.
    pub(crate) fn write(&self, parts: &[IoSlice<'_>]) -> rustix::io::Result<()> {
        match parts {
            [only] => rustix::io::write(&self.fd, only)?,
            several => rustix::io::writev(&self.fd, several)?,
        };
        Ok(())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
