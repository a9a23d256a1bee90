//! The header of every request.

use crate::abi::{IN_HEADER, UNIQUE_RESEND};
use crate::wire::{Malformed, Reader};

/// What every request begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the whole message.
    pub length: u32,
    /// What is asked for; see [`crate::abi::Opcode`].
    pub opcode: u32,
    /// Names the request in replies and interrupts.
    pub unique: u64,
    /// The node it is about.
    pub node: u64,
    /// File system user id of the caller.
    pub uid: u32,
    /// File system group id of the caller.
    pub gid: u32,
    /// Thread id of the caller as the mounting process sees it; 0 where it sees none.
    pub pid: u32,
    /// Bytes of extensions at the message's end.
    pub extensions: usize,
}

impl Header {
    /// Reads a header and checks the message's length against it.
    pub fn parse(message: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(message);
        let header = Self {
            length: reader.u32()?,
            opcode: reader.u32()?,
            unique: reader.u64()?,
            node: reader.u64()?,
            uid: reader.u32()?,
            gid: reader.u32()?,
            pid: reader.u32()?,
            extensions: usize::from(reader.u16()?) * 8,
        };
        if header.length as usize != message.len() || header.extensions > message.len().saturating_sub(IN_HEADER) {
            return Err(Malformed::Length);
        }
        Ok(header)
    }

    /// The kernel sent this request before, to a server that did not answer.
    pub fn is_resend(&self) -> bool {
        self.unique & UNIQUE_RESEND != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: u32, extensions: u16, size: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(length.to_ne_bytes());
        bytes.extend(1u32.to_ne_bytes());
        bytes.extend((6u64 | UNIQUE_RESEND).to_ne_bytes());
        bytes.extend(1u64.to_ne_bytes());
        for number in [10u32, 20, 30] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes.extend(extensions.to_ne_bytes());
        bytes.resize(size, 0);
        bytes
    }

    #[test]
    fn lengths_have_to_agree() {
        let header = Header::parse(&message(48, 1, 48)).unwrap();
        assert_eq!((header.uid, header.gid, header.pid, header.extensions), (10, 20, 30, 8));
        assert!(header.is_resend());
        assert_eq!(Header::parse(&message(47, 0, 48)), Err(Malformed::Length));
        assert_eq!(Header::parse(&message(48, 2, 48)), Err(Malformed::Length));
        assert_eq!(Header::parse(&message(48, 0, 48)[..39]), Err(Malformed::Length));
        assert_eq!(Header::parse(&[]), Err(Malformed::Short));
    }
}
