//! Reading ahead of a stream: when a handle reads on where it left off, the next blocks are asked
//! for before they are wanted.

use crate::extents::PIECE;
use crate::inode::Inode;
use crate::volume::Inner;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OwnedSemaphorePermit;

/// Bytes of one block; blocks start at multiples of it.
const BLOCK: u64 = PIECE;
/// Blocks ahead of the reader.
const AHEAD: u64 = 4;
/// Bytes read in sequence before anything is read ahead.
const RUN: u64 = 256 << 10;
/// Blocks of all handles of a volume.
pub(crate) const BLOCKS_PER_VOLUME: usize = 48;

/// What one handle has read ahead.
#[derive(Default)]
pub(crate) struct ReadAhead {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// One past the furthest byte of the present run.
    next: u64,
    /// Bytes of the run.
    run: u64,
    blocks: VecDeque<Block>,
}

struct Block {
    start: u64,
    /// The inode's content counter when it was asked for: another one, and it is stale.
    content: u64,
    /// None if it could not be read; the reader then sees for itself why.
    data: Shared<BoxFuture<'static, Option<Bytes>>>,
    _room: OwnedSemaphorePermit,
}

impl ReadAhead {
    /// The bytes at `[offset, end)` if they were read ahead and are current. Notes the read, and
    /// asks for what probably comes next.
    pub(crate) async fn read(&self, inner: &Arc<Inner>, inode: &Arc<Inode>, offset: u64, end: u64) -> Option<Bytes> {
        let start = offset - offset % BLOCK;
        let data = {
            let (content, size) = {
                let state = inode.state();
                (state.content, state.view().size)
            };
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.note(offset, end);
            if state.run < RUN {
                return None;
            }
            state.blocks.retain(|block| block.content == content);
            state.extend(inner, inode, content, size);
            if end > start + BLOCK {
                return None;
            }
            state.blocks.iter().find(|block| block.start == start)?.data.clone()
        };
        let data = data.await?;
        let from = (offset - start) as usize;
        let to = (end - start) as usize;
        // Shorter only if the file was when it was read.
        (to <= data.len()).then(|| data.slice(from..to))
    }
}

impl State {
    /// The kernel sends the requests of a stream several at a time, so order is not exact.
    fn note(&mut self, offset: u64, end: u64) {
        if offset.abs_diff(self.next) <= BLOCK {
            self.run += end - offset;
            self.next = self.next.max(end);
        } else {
            self.run = end - offset;
            self.next = end;
            self.blocks.clear();
        }
        // One block behind stays for requests that were overtaken.
        let keep = self.next.saturating_sub(2 * BLOCK);
        self.blocks.retain(|block| block.start >= keep);
    }

    fn extend(&mut self, inner: &Arc<Inner>, inode: &Arc<Inode>, content: u64, size: u64) {
        let first = self.next - self.next % BLOCK;
        for index in 0..=AHEAD {
            let start = first + index * BLOCK;
            if start >= size {
                // The stream is near its end: nothing comes after.
                return;
            }
            if self.blocks.iter().any(|block| block.start == start) {
                continue;
            }
            let Ok(room) = inner.read_ahead.clone().try_acquire_owned() else {
                return;
            };
            let data = {
                let inner = inner.clone();
                let inode = inode.clone();
                let tracker = inner.work.clone();
                let task = tracker.spawn(async move { inner.read(&inode, start, BLOCK as u32).await.ok() });
                task.map(|result| result.ok().flatten()).boxed().shared()
            };
            self.blocks.push_back(Block {
                start,
                content,
                data,
                _room: room,
            });
        }
    }
}
