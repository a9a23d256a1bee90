//! Reading: what the replica sets hold, with unflushed bytes over it.

use crate::flush::crc32c;
use crate::inode::{Inode, State};
use crate::volume::Inner;
use crate::{Error, Result};
use bytes::{Bytes, BytesMut};
use lazarette_proto::chunk::ReadRequest;
use lazarette_types::{ErrorCode, spans};
use std::time::Duration;

const ATTEMPT: Duration = Duration::from_secs(5);

/// Bytes written here that the replica sets may not have yet, later ones winning.
struct Overlay(Vec<(u64, Bytes)>);

impl Overlay {
    fn take(state: &State, offset: u64, end: u64) -> Self {
        let flushing = state.flushing.iter().flat_map(|frozen| frozen.parts(offset, end));
        let dirty = state.dirty.parts(offset, end);
        Self(
            flushing
                .chain(dirty.map(|(at, part)| (at, Bytes::copy_from_slice(part))))
                .collect(),
        )
    }

    /// The whole range, if it is here in one part.
    fn whole(&self, offset: u64, length: usize) -> Option<Bytes> {
        let (at, part) = self.0.last()?;
        (*at == offset && part.len() == length).then(|| part.clone())
    }

    fn apply(&self, offset: u64, buffer: &mut [u8]) {
        for (at, part) in &self.0 {
            let from = (at - offset) as usize;
            buffer[from..from + part.len()].copy_from_slice(part);
        }
    }
}

impl Inner {
    /// Bytes of a file from `offset`, `length` of them or fewer at the end of the file.
    pub(crate) async fn read(&self, inode: &Inode, offset: u64, length: u32) -> Result<Bytes> {
        self.lease.check()?;
        // Taken before asking the replica sets: bytes flushed meanwhile are then in one or the other.
        let (seed, end, stored, overlay) = {
            let state = inode.state();
            let view = state.view();
            let end = view.size.min(offset.saturating_add(u64::from(length)));
            if end <= offset {
                return Ok(Bytes::new());
            }
            let overlay = Overlay::take(&state, offset, end);
            (view.seed, end, state.attr().size, overlay)
        };
        let wanted = (end - offset) as usize;
        if let Some(whole) = overlay.whole(offset, wanted) {
            return Ok(whole);
        }
        // Beyond the size that the owner knows, nothing is stored.
        let fetch = stored.min(end).saturating_sub(offset);
        let parts: Vec<_> = spans(self.map().layout.chunk_size, offset, fetch).collect();
        if overlay.0.is_empty()
            && let [span] = parts[..]
            && span.length as usize == wanted
        {
            let data = self
                .read_chunk(inode.ino, seed, span.index, span.offset, span.length)
                .await?;
            if data.len() == wanted {
                return Ok(data);
            }
            let mut buffer = BytesMut::zeroed(wanted);
            buffer[..data.len()].copy_from_slice(&data);
            return Ok(buffer.freeze());
        }
        let mut buffer = BytesMut::zeroed(wanted);
        let reads = parts
            .iter()
            .map(|span| self.read_chunk(inode.ino, seed, span.index, span.offset, span.length));
        for (span, data) in parts.iter().zip(futures::future::try_join_all(reads).await?) {
            let at = span.start as usize;
            buffer[at..at + data.len()].copy_from_slice(&data);
        }
        overlay.apply(offset, &mut buffer);
        Ok(buffer.freeze())
    }

    /// Bytes of one chunk; fewer than asked for where the chunk ends.
    async fn read_chunk(&self, ino: u64, seed: u32, index: u32, offset: u32, length: u32) -> Result<Bytes> {
        self.at_primary((ino, seed, index), ATTEMPT, |mut client, target| {
            let request = ReadRequest {
                replica_set: target.replica_set,
                epoch: target.epoch,
                chunk: Some(target.chunk),
                offset,
                length,
            };
            async move {
                let reply = client.read(request).await?.into_inner();
                if reply.data.len() > length as usize {
                    return Err(Error::malformed("more data than asked for"));
                }
                if crc32c(&reply.data) != reply.crc {
                    // The server verified what it read, so this happened on the way.
                    return Err(Error::new(ErrorCode::Unavailable, "data damaged in transit"));
                }
                Ok(reply.data)
            }
        })
        .await
    }
}
