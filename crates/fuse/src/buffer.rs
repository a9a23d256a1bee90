//! Buffers for requests and for data of replies: pooled, bounded, aligned.

use crate::abi::{IN_HEADER, WRITE_IN};
use crate::request::FULL_INTERVAL;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Memory pages, and the alignment that O_DIRECT needs at most.
const PAGE: usize = 4096;
/// What comes before the data of a write.
const BEFORE_DATA: usize = IN_HEADER + WRITE_IN;
/// Replies up to here get memory of their own, bytes: a buffer for the largest write is much more, and
/// when the idle ones are used up each has to be cleared.
const SMALL_REPLY: usize = 16 << 10;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct State {
    free: Vec<Vec<u8>>,
    /// Bytes of requests' data that handlers hold.
    charged: usize,
    stopping: bool,
}

/// Buffers of one size.
pub(crate) struct Pool {
    /// Bytes of data a buffer has room for.
    data: usize,
    /// Idle buffers kept.
    keep: usize,
    /// Most bytes of requests' data held by handlers.
    limit: usize,
    state: Mutex<State>,
    released: Condvar,
}

impl Pool {
    /// `data` is the largest write; `limit` the bytes that requests under way may hold, at least one
    /// largest write.
    pub(crate) fn new(data: usize, keep: usize, limit: usize) -> Arc<Self> {
        Arc::new(Self {
            data,
            keep,
            limit: limit.max(data),
            state: Mutex::new(State {
                free: Vec::new(),
                charged: 0,
                stopping: false,
            }),
            released: Condvar::new(),
        })
    }

    fn get(self: &Arc<Self>) -> Buffer {
        let free = lock(&self.state).free.pop();
        // Zeroed memory of this size comes from the kernel untouched: pages take no memory before use.
        let bytes = free.unwrap_or_else(|| vec![0; self.data + BEFORE_DATA + 2 * PAGE]);
        let start =
            (bytes.as_ptr() as usize + BEFORE_DATA).next_multiple_of(PAGE) - BEFORE_DATA - bytes.as_ptr() as usize;
        Buffer {
            bytes,
            start,
            pool: self.clone(),
        }
    }

    /// A buffer to read a request into; data of a write in it are at a page's beginning.
    pub(crate) fn request(self: &Arc<Self>) -> Buffer {
        self.get()
    }

    /// A buffer for `size` bytes of a reply, at a page's beginning.
    pub(crate) fn reply(self: &Arc<Self>, size: usize) -> ReplyBuffer {
        if size <= SMALL_REPLY || size > self.data {
            return ReplyBuffer {
                storage: Storage::Own(Own::new(size)),
                length: size,
            };
        }
        ReplyBuffer {
            storage: Storage::Pooled(self.get()),
            length: size,
        }
    }

    /// Waits until handlers hold little enough for `bytes` more, and calls `full` from time to time
    /// meanwhile. None once the session stops.
    pub(crate) fn charge(self: &Arc<Self>, bytes: usize, full: impl Fn()) -> Option<Charge> {
        let mut state = lock(&self.state);
        while state.charged > 0 && state.charged + bytes > self.limit {
            if state.stopping {
                return None;
            }
            let (held, waited) = self
                .released
                .wait_timeout(state, FULL_INTERVAL)
                .unwrap_or_else(PoisonError::into_inner);
            state = held;
            if waited.timed_out() {
                drop(state);
                full();
                state = lock(&self.state);
            }
        }
        state.charged += bytes;
        Some(Charge {
            bytes,
            pool: self.clone(),
        })
    }

    /// Wakes those that wait in [`Pool::charge`] for good, or lets them wait again.
    pub(crate) fn set_stopping(&self, stopping: bool) {
        lock(&self.state).stopping = stopping;
        self.released.notify_all();
    }

    #[cfg(test)]
    fn charged(&self) -> usize {
        lock(&self.state).charged
    }
}

/// Counts bytes that a handler holds.
pub(crate) struct Charge {
    bytes: usize,
    pool: Arc<Pool>,
}

impl Drop for Charge {
    fn drop(&mut self) {
        lock(&self.pool.state).charged -= self.bytes;
        self.pool.released.notify_all();
    }
}

pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    /// Room for the largest request.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        let end = self.start + BEFORE_DATA + self.pool.data.max(2 * PAGE - BEFORE_DATA);
        let end = end.min(self.bytes.len());
        &mut self.bytes[self.start..end]
    }

    /// The first bytes read into it.
    pub(crate) fn message(&self, length: usize) -> &[u8] {
        &self.bytes[self.start..self.start + length]
    }

    /// Where data are aligned.
    fn data_start(&self) -> usize {
        self.start + BEFORE_DATA
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut state = lock(&self.pool.state);
        if state.free.len() < self.pool.keep {
            state.free.push(bytes);
        }
    }
}

/// A buffer with a message that a handler holds, for `Bytes::from_owner`.
pub(crate) struct Held {
    pub(crate) buffer: Buffer,
    pub(crate) length: usize,
    pub(crate) _charge: Charge,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        self.buffer.message(self.length)
    }
}

/// A copy of a message that a handler holds.
pub(crate) struct Copied {
    pub(crate) bytes: Box<[u8]>,
    pub(crate) _charge: Charge,
}

impl AsRef<[u8]> for Copied {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Memory of a reply that is not the pool's, used from a page's beginning on.
struct Own {
    bytes: Vec<u8>,
    start: usize,
}

impl Own {
    fn new(size: usize) -> Self {
        let bytes = vec![0; size + PAGE];
        let address = bytes.as_ptr() as usize;
        Self {
            start: address.next_multiple_of(PAGE) - address,
            bytes,
        }
    }
}

enum Storage {
    Pooled(Buffer),
    Own(Own),
}

/// Page-aligned room for the data of a reply, from the session's pool. What is in it before it is
/// written is undefined.
pub struct ReplyBuffer {
    storage: Storage,
    length: usize,
}

impl ReplyBuffer {
    /// Keeps the first `length` bytes only.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }
}

impl Deref for ReplyBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.storage {
            Storage::Pooled(buffer) => &buffer.bytes[buffer.data_start()..][..self.length],
            Storage::Own(own) => &own.bytes[own.start..][..self.length],
        }
    }
}

impl DerefMut for ReplyBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.storage {
            Storage::Pooled(buffer) => {
                let start = buffer.data_start();
                &mut buffer.bytes[start..][..self.length]
            }
            Storage::Own(own) => &mut own.bytes[own.start..][..self.length],
        }
    }
}

impl std::fmt::Debug for ReplyBuffer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "ReplyBuffer({} bytes)", self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_are_aligned_and_fit() {
        for size in [4096, 131_072, 1 << 20] {
            let pool = Pool::new(size, 2, size);
            for _ in 0..4 {
                let mut buffer = pool.request();
                let room = buffer.room();
                assert!(room.len() >= (BEFORE_DATA + size).max(8192));
                assert_eq!((room.as_ptr() as usize + BEFORE_DATA) % PAGE, 0);
                let mut reply = pool.reply(size);
                assert_eq!((reply.as_ptr() as usize % PAGE, reply.len()), (0, size));
                reply[size - 1] = 1;
                reply.truncate(3);
                assert_eq!(reply.len(), 3);
            }
            assert_eq!(lock(&pool.state).free.len(), 1 + usize::from(size > SMALL_REPLY));
            for size in [1, SMALL_REPLY.min(size), size + 1] {
                let reply = pool.reply(size);
                assert_eq!((reply.as_ptr() as usize % PAGE, reply.len()), (0, size));
            }
        }
    }

    #[test]
    fn charges_wait_for_others_to_end() {
        let pool = Pool::new(4096, 0, 8192);
        let first = pool.charge(8000, || {}).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let other = pool.clone();
        let waiter = std::thread::spawn(move || {
            let charge = other.charge(4096, || {});
            sender.send(charge.is_some()).unwrap();
        });
        assert!(receiver.try_recv().is_err());
        drop(first);
        assert!(receiver.recv().unwrap());
        waiter.join().unwrap();
        assert_eq!(pool.charged(), 0);
        // Alone, a request may be larger than the limit.
        assert!(pool.charge(100_000, || {}).is_some());
        let _held = pool.charge(8192, || {}).unwrap();
        pool.set_stopping(true);
        assert!(pool.charge(1, || {}).is_none());
    }
}
