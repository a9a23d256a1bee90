//! Reading requests and building replies, byte by byte and within bounds.
//!
//! Numbers are in the machine's byte order, as the kernel that sends them is on the same machine.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// A request that is not what the protocol says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Shorter than its structure.
    #[error("the message ends before its fields do")]
    Short,
    /// The length in the header is not the length read.
    #[error("the message's length is not the one in its header")]
    Length,
    /// A name or target without its end, or an empty one.
    #[error("a string is not terminated or is empty")]
    Text,
    /// A name with a slash in it.
    #[error("a name contains a slash")]
    Name,
    /// A number out of range.
    #[error("a field is out of range")]
    Range,
    /// A request that cannot come now.
    #[error("a request of this kind is not expected here")]
    Unexpected,
}

/// Reads a message's fields one after another.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_ne_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_ne_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_ne_bytes)
    }

    pub(crate) fn skip(&mut self, count: usize) -> Result<(), Malformed> {
        self.take(count).map(|_| ())
    }

    /// Bytes up to a NUL, which is consumed.
    pub(crate) fn text(&mut self) -> Result<&'a [u8], Malformed> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(Malformed::Text)?;
        let (text, rest) = self.0.split_at(end);
        self.0 = &rest[1..];
        Ok(text)
    }

    /// The name of a directory entry: not empty and without a slash.
    pub(crate) fn name(&mut self) -> Result<&'a OsStr, Malformed> {
        let name = self.text()?;
        if name.is_empty() {
            return Err(Malformed::Text);
        }
        if name.contains(&b'/') {
            return Err(Malformed::Name);
        }
        Ok(OsStr::from_bytes(name))
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        self.0
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Largest fixed part of a reply: `fuse_statx_out`.
const HEAD: usize = 288;

/// The fixed part of a reply, built in place.
pub(crate) struct Head {
    bytes: [u8; HEAD],
    length: usize,
}

impl Head {
    pub(crate) fn new() -> Self {
        Self {
            bytes: [0; HEAD],
            length: 0,
        }
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) -> &mut Self {
        // The replies are all ours, and the largest fits: a longer one is cut, never written beyond.
        let end = (self.length + bytes.len()).min(HEAD);
        let count = end - self.length;
        self.bytes[self.length..end].copy_from_slice(&bytes[..count]);
        self.length = end;
        self
    }

    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.put(&value.to_ne_bytes())
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.put(&value.to_ne_bytes())
    }

    pub(crate) fn i32(&mut self, value: i32) -> &mut Self {
        self.put(&value.to_ne_bytes())
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.put(&value.to_ne_bytes())
    }

    pub(crate) fn i64(&mut self, value: i64) -> &mut Self {
        self.put(&value.to_ne_bytes())
    }

    pub(crate) fn zeros(&mut self, count: usize) -> &mut Self {
        self.length = (self.length + count).min(HEAD);
        self
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}
