//! Listings, built in the kernel's form within the size it asked for.

use crate::abi::NAME_MAX;
use crate::attributes::{Entry, Kind, put_entry};
use crate::wire::Head;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// Bytes before the name in `fuse_dirent`.
const DIRENT: usize = 24;
/// Bytes of `fuse_entry_out`.
const ENTRY: usize = 128;

/// A listing's reply. Fill it until an entry does not fit; that one comes first next time.
#[derive(Debug)]
pub struct Listing {
    bytes: Vec<u8>,
    limit: usize,
    plus: bool,
}

/// What became of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Listed {
    /// It is in the listing.
    Added,
    /// It does not fit: the listing is complete.
    Full,
}

impl Listing {
    pub(crate) fn new(limit: u32, plus: bool) -> Self {
        // Most listings are short: the vector grows to the limit only as it has to.
        Self {
            bytes: Vec::with_capacity((limit as usize).min(4096)),
            limit: limit as usize,
            plus,
        }
    }

    /// Does the kernel want attributes with the entries ([`Listing::add_plus`])?
    pub fn is_plus(&self) -> bool {
        self.plus
    }

    /// Nothing is in it yet.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Adds an entry. `cookie` is what the kernel gives to go on after it, never 0. A name that the
    /// kernel would not take (empty, longer than 255 bytes, with a slash or NUL) is left out.
    ///
    /// In a listing with attributes the entry goes without: the kernel looks it up if it has to.
    pub fn add(&mut self, ino: u64, cookie: u64, kind: Kind, name: &OsStr) -> Listed {
        self.push(None, ino, cookie, kind as u32, name)
    }

    /// Adds an entry with its attributes. If it is added, the kernel holds one more reference to the
    /// node, as after a lookup, unless the name is "." or "..". In a listing without attributes only
    /// the entry is added, and no reference is held.
    pub fn add_plus(&mut self, entry: &Entry, cookie: u64, name: &OsStr) -> Listed {
        let kind = entry.attr.mode >> 12 & 0o17;
        self.push(self.plus.then_some(entry), entry.attr.ino, cookie, kind, name)
    }

    fn push(&mut self, entry: Option<&Entry>, ino: u64, cookie: u64, kind: u32, name: &OsStr) -> Listed {
        let name = name.as_bytes();
        if name.is_empty() || name.len() > NAME_MAX || name.contains(&b'/') || name.contains(&0) {
            tracing::warn!(name = %String::from_utf8_lossy(name), "left a name out of a listing that the kernel would not take");
            return Listed::Added;
        }
        let head = if self.plus { ENTRY } else { 0 };
        let size = (head + DIRENT + name.len()).next_multiple_of(8);
        if self.bytes.len() + size > self.limit {
            return Listed::Full;
        }
        let end = self.bytes.len() + size;
        if self.plus {
            let mut bytes = Head::new();
            put_entry(&mut bytes, &entry.copied().unwrap_or_default());
            self.bytes.extend_from_slice(bytes.as_slice());
        }
        self.bytes.extend_from_slice(&ino.to_ne_bytes());
        self.bytes.extend_from_slice(&cookie.to_ne_bytes());
        self.bytes.extend_from_slice(&(name.len() as u32).to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(end, 0);
        Listed::Added
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_end_at_the_limit() {
        let mut listing = Listing::new(100, false);
        assert_eq!(listing.add(1, 1, Kind::File, OsStr::new("a")), Listed::Added);
        assert_eq!(listing.bytes.len(), 32);
        assert_eq!(listing.add(2, 2, Kind::File, OsStr::new("123456789")), Listed::Added);
        assert_eq!(listing.bytes.len(), 72);
        assert_eq!(listing.add(3, 3, Kind::File, OsStr::new("12345")), Listed::Full);
        assert_eq!(listing.add(3, 3, Kind::File, OsStr::new("1234")), Listed::Full);
        assert_eq!(listing.into_bytes().len(), 72);
    }

    #[test]
    fn names_the_kernel_refuses_are_left_out() {
        let mut listing = Listing::new(4096, true);
        let long = "x".repeat(256);
        for name in ["", "a/b", "a\0b", long.as_str()] {
            assert_eq!(listing.add_plus(&Entry::default(), 1, OsStr::new(name)), Listed::Added);
        }
        assert!(listing.is_empty());
        assert_eq!(
            listing.add_plus(&Entry::default(), 1, OsStr::new(&long[..255])),
            Listed::Added
        );
        assert_eq!(listing.into_bytes().len(), 128 + 24 + 256 + 1 - 1);
    }
}
