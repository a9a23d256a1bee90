//! Giving a connection to another process.

use crate::negotiation::{NegotiationError, Parameters};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// Descriptors that the kernel passes in one message at most.
pub const MAX_DESCRIPTORS: usize = 253;
/// First bytes of a message; the last is the form's version.
const MAGIC: &[u8; 8] = b"lzfuseh\x01";
/// Bytes of a message after its magic, at most.
const LONGEST: usize = 16 << 20;

/// All it takes to serve a mounted connection: what was agreed on at INIT, and its descriptors.
///
/// A connection lives as long as anybody holds one of its descriptors, and a request in flight as
/// long as the very descriptor is held that it was read from. A process that shall keep mounts alive
/// while their server restarts holds all of them, and reads from none.
#[derive(Debug)]
pub struct Connection {
    /// What was agreed on.
    pub parameters: Parameters,
    /// The first is the one that was mounted, the others are its clones.
    pub descriptors: Vec<OwnedFd>,
    /// Where it is mounted, if known.
    pub mountpoint: Option<PathBuf>,
}

/// Why a connection was not handed over.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The socket failed.
    #[error("handing over: {0}")]
    Io(#[from] io::Error),
    /// The other side went away before it sent anything.
    #[error("the other side closed the socket")]
    Closed,
    /// The other side sent something else.
    #[error("the other side sent something that is not a connection: {0}")]
    Malformed(&'static str),
    /// The parameters are damaged.
    #[error(transparent)]
    Parameters(#[from] NegotiationError),
    /// More than one message can carry.
    #[error("a connection has between 1 and {MAX_DESCRIPTORS} descriptors, this one has {0}")]
    Descriptors(usize),
}

impl Connection {
    /// Another holder of the same connection, in this process.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            parameters: self.parameters,
            descriptors: self
                .descriptors
                .iter()
                .map(OwnedFd::try_clone)
                .collect::<io::Result<_>>()?,
            mountpoint: self.mountpoint.clone(),
        })
    }

    /// Sends the connection and `extra`, which means something to the other side only. Blocks.
    pub fn send(&self, socket: &UnixStream, extra: &[u8]) -> Result<(), HandoverError> {
        let count = self.descriptors.len();
        if count == 0 || count > MAX_DESCRIPTORS {
            return Err(HandoverError::Descriptors(count));
        }
        let mountpoint = self
            .mountpoint
            .as_ref()
            .map_or(&[][..], |path| path.as_os_str().as_bytes());
        let mut body = Vec::new();
        body.extend((count as u32).to_le_bytes());
        for part in [&self.parameters.to_bytes()[..], mountpoint, extra] {
            body.extend((part.len() as u32).to_le_bytes());
            body.extend(part);
        }
        if body.len() > LONGEST {
            return Err(HandoverError::Malformed("the extra bytes are too many"));
        }
        let mut message = MAGIC.to_vec();
        message.extend((body.len() as u32).to_le_bytes());
        message.extend(body);
        let borrowed: Vec<BorrowedFd<'_>> = self.descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(HandoverError::Descriptors(count));
        }
        let sent = loop {
            match sendmsg(socket, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other.map_err(io::Error::from)?,
            }
        };
        let mut writer = socket;
        writer.write_all(&message[sent..])?;
        Ok(())
    }

    /// Receives a connection and the sender's extra bytes. Blocks.
    pub fn receive(socket: &UnixStream) -> Result<(Self, Vec<u8>), HandoverError> {
        let mut head = [0; 12];
        let (count, descriptors) = receive_with_descriptors(socket, &mut head)?;
        if count == 0 {
            return Err(HandoverError::Closed);
        }
        let mut reader = socket;
        reader.read_exact(&mut head[count..])?;
        if &head[..8] != MAGIC {
            return Err(HandoverError::Malformed("unknown beginning"));
        }
        let length = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
        if length > LONGEST {
            return Err(HandoverError::Malformed("too long"));
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let (expected, mut rest) = number(&body)?;
        let mut parts = [&[][..]; 3];
        for part in &mut parts {
            let (length, after) = number(rest)?;
            (*part, rest) = after
                .split_at_checked(length as usize)
                .ok_or(HandoverError::Malformed("ends early"))?;
        }
        if descriptors.is_empty() || descriptors.len() != expected as usize {
            return Err(HandoverError::Descriptors(descriptors.len()));
        }
        let mountpoint = (!parts[1].is_empty()).then(|| PathBuf::from(std::ffi::OsString::from_vec(parts[1].to_vec())));
        let parameters = Parameters::from_bytes(parts[0])?;
        Ok((
            Self {
                parameters,
                descriptors,
                mountpoint,
            },
            parts[2].to_vec(),
        ))
    }
}

fn number(bytes: &[u8]) -> Result<(u32, &[u8]), HandoverError> {
    let (number, rest) = bytes
        .split_first_chunk::<4>()
        .ok_or(HandoverError::Malformed("ends early"))?;
    Ok((u32::from_le_bytes(*number), rest))
}

fn receive_with_descriptors(socket: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(
            socket,
            &mut [IoSliceMut::new(bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    Ok((received.bytes, descriptors))
}

/// One descriptor, as fusermount3 sends it; None if it sends none.
pub(crate) fn receive_descriptor(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0; 1];
    Ok(receive_with_descriptors(socket, &mut byte)?.1.into_iter().next())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::negotiation::{InitRequest, Terms};

    fn parameters() -> Parameters {
        let request = InitRequest {
            major: 7,
            minor: 45,
            max_readahead: 4096,
            flags: crate::abi::Capabilities::all(),
        };
        Parameters::negotiate(&request, &Terms::default()).unwrap()
    }

    fn connection(count: usize) -> Connection {
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        Connection {
            parameters: parameters(),
            descriptors: (0..count).map(|_| file()).collect(),
            mountpoint: Some("/mnt/x".into()),
        }
    }

    #[test]
    fn what_is_sent_arrives() {
        for (count, extra) in [(1, vec![]), (MAX_DESCRIPTORS, vec![7; 300_000])] {
            let (left, right) = UnixStream::pair().unwrap();
            let sent = connection(count);
            let copy = extra.clone();
            let sender = std::thread::spawn(move || sent.send(&left, &copy).unwrap());
            let (received, bytes) = Connection::receive(&right).unwrap();
            sender.join().unwrap();
            assert_eq!((received.descriptors.len(), bytes), (count, extra));
            assert_eq!(
                (received.parameters, received.mountpoint),
                (parameters(), Some("/mnt/x".into()))
            );
        }
    }

    #[test]
    fn what_is_not_a_connection_is_refused() {
        let (left, right) = UnixStream::pair().unwrap();
        assert!(matches!(
            connection(0).send(&left, &[]),
            Err(HandoverError::Descriptors(0))
        ));
        drop(left);
        assert!(matches!(Connection::receive(&right), Err(HandoverError::Closed)));
        for bytes in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"lzfuseh\x01\xff\xff\xff\xff",
            b"lzfuseh\x01\x02\0\0\0ab",
        ] {
            let (mut left, right) = UnixStream::pair().unwrap();
            left.write_all(bytes).unwrap();
            drop(left);
            assert!(
                matches!(Connection::receive(&right), Err(HandoverError::Malformed(_))),
                "{bytes:?}"
            );
        }
    }
}
