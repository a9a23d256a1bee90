//! INIT.

use super::{SessionError, io_error};
use crate::abi::{self, Capabilities, Opcode};
use crate::device::Channel;
use crate::errno::Errno;
use crate::header::Header;
use crate::negotiation::{InitRequest, Parameters, Terms};
use crate::wire::{Head, Malformed};
use std::io::IoSlice;

/// Answers INIT.
pub(super) fn handshake(channel: &Channel, terms: &Terms) -> Result<Parameters, SessionError> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let length = match channel.read(&mut buffer) {
            Ok(length) => length,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::NOENT) => continue,
            Err(error) => return Err(io_error("cannot read INIT")(error.into())),
        };
        let header = Header::parse(&buffer[..length])?;
        let refuse = |errno: Errno| reply(channel, header.unique, -errno.raw(), &[]);
        if header.opcode != Opcode::Init as u32 {
            refuse(Errno::EIO)?;
            return Err(Malformed::Unexpected.into());
        }
        let request = InitRequest::parse(&buffer[abi::IN_HEADER..length])?;
        if request.major > abi::MAJOR {
            // It asks again in the version it gets told.
            let mut head = Head::new();
            head.u32(abi::MAJOR).u32(abi::MINOR).zeros(56);
            reply(channel, header.unique, 0, head.as_slice())?;
            continue;
        }
        match Parameters::negotiate(&request, terms) {
            Ok(parameters) => {
                reply(channel, header.unique, 0, parameters.reply().as_slice())?;
                let left = terms.wanted - parameters.agreed - Capabilities::INIT_EXT;
                tracing::debug!(minor = parameters.minor, agreed = ?parameters.agreed, unavailable = ?left, "negotiated");
                return Ok(parameters);
            }
            Err(error) => {
                refuse(Errno::EPROTO)?;
                return Err(error.into());
            }
        }
    }
}

fn reply(channel: &Channel, unique: u64, error: i32, body: &[u8]) -> Result<(), SessionError> {
    let mut head = Head::new();
    head.u32((abi::OUT_HEADER + body.len()) as u32).i32(error).u64(unique);
    channel
        .write(&[IoSlice::new(head.as_slice()), IoSlice::new(body)])
        .map_err(|error| io_error("cannot answer INIT")(error.into()))
}
