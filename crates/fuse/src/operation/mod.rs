//! What requests carry, operation by operation.
//!
//! Every structure is read by its `parse` from a request's header and body, within bounds; names
//! are never empty and never contain a slash or a NUL.

use crate::abi;
use crate::header::Header;
use crate::wire::{Malformed, Reader};
use bytes::Bytes;

/// A request's body can be read as this operation.
pub(crate) trait Parse<'a>: Sized {
    fn parse(header: &Header, body: &'a Bytes) -> Result<Self, Malformed>;
}

macro_rules! operation {
    ($(#[$doc:meta])* $name:ident $(<$life:lifetime>)? {
        $($(#[$field_doc:meta])* $field:ident: $type:ty,)*
    } |$header:ident, $reader:ident| $parse:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name $(<$life>)? {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl<'a> Parse<'a> for $name $(<$life>)? {
            fn parse($header: &Header, body: &'a Bytes) -> Result<Self, Malformed> {
                #[allow(unused_mut)]
                let mut $reader = Reader::new(&body[..]);
                $parse
            }
        }
    };
}

mod attributes;
mod data;
#[cfg(any(test, fuzzing))]
mod decoders;
mod locks;
mod names;

pub use attributes::*;
pub use data::*;
#[cfg(fuzzing)]
pub use decoders::decode;
pub use locks::*;
pub use names::*;

/// The number of the request that an interrupt is for.
pub(crate) fn parse_interrupt(body: &[u8]) -> Result<u64, Malformed> {
    Reader::new(body).u64()
}

/// Supplementary groups among a request's extensions.
pub(crate) fn parse_groups(extensions: &[u8]) -> Result<Vec<u32>, Malformed> {
    let mut reader = Reader::new(extensions);
    while !reader.is_empty() {
        let (size, kind) = (reader.u32()? as usize, reader.u32()?);
        let rest = size.checked_sub(8).ok_or(Malformed::Range)?;
        let mut content = Reader::new(reader.take(rest)?);
        if kind != abi::EXT_GROUPS {
            continue;
        }
        let count = content.u32()? as usize;
        if content.rest().len() / 4 < count {
            return Err(Malformed::Short);
        }
        return (0..count).map(|_| content.u32()).collect();
    }
    Ok(Vec::new())
}

#[cfg(test)]
mod tests;
