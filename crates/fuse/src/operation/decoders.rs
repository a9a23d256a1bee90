//! All decoders at once, for property tests and the fuzz target.

use super::*;
use crate::abi::Opcode;

/// Every decoder, on one body.
pub(crate) fn decode_all(header: &Header, body: &Bytes) {
    let _ = Lookup::parse(header, body);
    let _ = parse_forgets(Opcode::Forget, header, body);
    let _ = parse_forgets(Opcode::BatchForget, header, body);
    let _ = Getattr::parse(header, body);
    let _ = StatxQuery::parse(header, body);
    let _ = Setattr::parse(header, body);
    let _ = Symlink::parse(header, body);
    let _ = Mknod::parse(header, body);
    let _ = Mkdir::parse(header, body);
    let _ = Rename::parse(header, body);
    let _ = Link::parse(header, body);
    let _ = Open::parse(header, body);
    let _ = Create::parse(header, body);
    let _ = Read::parse(header, body);
    let _ = Release::parse(header, body);
    let _ = Flush::parse(header, body);
    let _ = Fsync::parse(header, body);
    let _ = Readdir::parse(header, body);
    let _ = Setxattr::parse(header, body, false);
    let _ = Setxattr::parse(header, body, true);
    let _ = Getxattr::parse(header, body);
    let _ = Listxattr::parse(header, body);
    let _ = Removexattr::parse(header, body);
    let _ = LockRequest::parse(header, body);
    let _ = Access::parse(header, body);
    let _ = Bmap::parse(header, body);
    let _ = Ioctl::parse(header, body);
    let _ = Poll::parse(header, body);
    let _ = Fallocate::parse(header, body);
    let _ = Lseek::parse(header, body);
    let _ = CopyFileRange::parse(header, body);
    let _ = parse_interrupt(body);
    let _ = parse_groups(body);
    if let Ok(write) = Write::parse(header, body) {
        assert!(write.data.len() <= body.len());
    }
}

/// A message from the kernel, from its header on, and bytes of another process.
#[cfg(fuzzing)]
pub fn decode(bytes: &[u8]) {
    let _ = crate::negotiation::Parameters::from_bytes(bytes);
    if bytes.len() < crate::abi::IN_HEADER {
        return;
    }
    // With the length that it says, or no message would get any further.
    let mut message = bytes.to_vec();
    message[..4].copy_from_slice(&(bytes.len() as u32).to_ne_bytes());
    let Ok(header) = Header::parse(&message) else { return };
    let body = Bytes::from(message).slice(crate::abi::IN_HEADER..);
    let _ = crate::negotiation::InitRequest::parse(&body);
    let extensions = body.len() - header.extensions;
    let _ = parse_groups(&body[extensions..]);
    decode_all(&header, &body.slice(..extensions));
}
