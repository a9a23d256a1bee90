//! Error numbers, as replies to the kernel carry them.

use std::fmt;
use std::io;

/// What a handler answers with.
pub type Result<T> = std::result::Result<T, Errno>;

/// An error number between 1 and 511, the range the kernel accepts from a file system.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(u16);

macro_rules! names {
    ($($name:ident = $source:ident;)*) => {
        impl Errno {
            $(
                #[doc = concat!("`", stringify!($name), "`")]
                pub const $name: Errno = Errno(rustix::io::Errno::$source.raw_os_error() as u16);
            )*

            /// The symbolic name, if it is a usual one.
            pub fn name(self) -> Option<&'static str> {
                $(if self == Self::$name { return Some(stringify!($name)); })*
                None
            }
        }
    };
}

names! {
    EPERM = PERM;
    ENOENT = NOENT;
    EINTR = INTR;
    EIO = IO;
    ENXIO = NXIO;
    E2BIG = TOOBIG;
    EBADF = BADF;
    EAGAIN = AGAIN;
    ENOMEM = NOMEM;
    EACCES = ACCESS;
    EBUSY = BUSY;
    EEXIST = EXIST;
    EXDEV = XDEV;
    ENODEV = NODEV;
    ENOTDIR = NOTDIR;
    EISDIR = ISDIR;
    EINVAL = INVAL;
    ENOTTY = NOTTY;
    EFBIG = FBIG;
    ENOSPC = NOSPC;
    EROFS = ROFS;
    EMLINK = MLINK;
    ERANGE = RANGE;
    EDEADLK = DEADLK;
    ENAMETOOLONG = NAMETOOLONG;
    ENOLCK = NOLCK;
    ENOSYS = NOSYS;
    ENOTEMPTY = NOTEMPTY;
    ELOOP = LOOP;
    ENODATA = NODATA;
    EPROTO = PROTO;
    EOVERFLOW = OVERFLOW;
    EOPNOTSUPP = OPNOTSUPP;
    ENOTCONN = NOTCONN;
    ETIMEDOUT = TIMEDOUT;
    ECONNABORTED = CONNABORTED;
    ESTALE = STALE;
    EDQUOT = DQUOT;
}

impl Errno {
    /// The error of this number; EIO for numbers the kernel would not take.
    pub const fn from_raw(number: i32) -> Self {
        if number > 0 && number < 512 {
            Self(number as u16)
        } else {
            Self::EIO
        }
    }

    /// The number, positive.
    pub const fn raw(self) -> i32 {
        self.0 as i32
    }
}

impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Self {
        if let Some(number) = error.raw_os_error() {
            return Self::from_raw(number);
        }
        match error.kind() {
            io::ErrorKind::NotFound => Self::ENOENT,
            io::ErrorKind::PermissionDenied => Self::EACCES,
            io::ErrorKind::AlreadyExists => Self::EEXIST,
            io::ErrorKind::InvalidInput => Self::EINVAL,
            io::ErrorKind::Interrupted => Self::EINTR,
            _ => Self::EIO,
        }
    }
}

impl From<rustix::io::Errno> for Errno {
    fn from(error: rustix::io::Errno) -> Self {
        Self::from_raw(error.raw_os_error())
    }
}

impl From<Errno> for io::Error {
    fn from(error: Errno) -> Self {
        io::Error::from_raw_os_error(error.raw())
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => formatter.write_str(name),
            None => write!(formatter, "errno {}", self.0),
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from_raw_os_error(self.raw()).fmt(formatter)
    }
}

impl std::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_the_kernel_refuses_become_eio() {
        for number in [0, -1, 512, 513, i32::MAX, i32::MIN] {
            assert_eq!(Errno::from_raw(number), Errno::EIO);
        }
        assert_eq!(Errno::from_raw(2), Errno::ENOENT);
        assert_eq!(
            format!("{:?} {:?}", Errno::ENOENT, Errno::from_raw(500)),
            "ENOENT errno 500"
        );
    }

    #[test]
    fn from_io_errors() {
        assert_eq!(Errno::from(io::Error::from_raw_os_error(28)), Errno::ENOSPC);
        assert_eq!(Errno::from(io::Error::from(io::ErrorKind::NotFound)), Errno::ENOENT);
        assert_eq!(Errno::from(io::Error::other("?")), Errno::EIO);
    }
}
