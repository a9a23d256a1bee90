//! From the write buffer to the replica sets and the owner.

use crate::extents::Frozen;
use crate::inode::{DIRTY_PER_INODE, Inode};
use crate::metadata;
use crate::volume::Inner;
use crate::{Error, Result};
use bytes::Bytes;
use crc_fast::CrcAlgorithm;
use lazarette_proto::chunk::WriteRequest;
use lazarette_proto::meta::{Attr, Extend, request::Op, response};
use lazarette_types::{ErrorCode, spans};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// A write waits at the primary while too few copies are in sync; after so long it is sent again.
const ATTEMPT: Duration = Duration::from_secs(15);

/// What the background flush knows.
#[derive(Default)]
pub(crate) struct Flusher {
    dirty: Mutex<HashMap<u64, Arc<Inode>>>,
    kick: Notify,
    /// Writers wait for room: flush everything, whatever its age.
    pressure: AtomicBool,
}

impl Flusher {
    fn dirty(&self) -> MutexGuard<'_, HashMap<u64, Arc<Inode>>> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Now, in nanoseconds since the Unix epoch.
pub(crate) fn wall_clock() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_nanos() as i64)
}

/// CRC32C, as all data on the wire carries it.
pub(crate) fn crc32c(data: &[u8]) -> u32 {
    crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, data) as u32
}

impl Inner {
    /// Copies bytes into the buffer, waiting for room.
    pub(crate) async fn buffer(self: &Arc<Self>, inode: &Arc<Inode>, offset: u64, data: &[u8]) -> Result<()> {
        /// Room is taken in steps, so that large writes do not starve small ones.
        const STEP: usize = 1 << 20;
        let step = STEP.min(self.options.dirty_bytes).max(1);
        let mut at = offset;
        for part in data.chunks(step) {
            self.lease.check()?;
            self.take_room(inode, part.len()).await?;
            let full = {
                let mut state = inode.state();
                state.charged += part.len();
                state.dirty.insert(at, part);
                state.mtime = wall_clock();
                state.content += 1;
                let first = state.dirty_since.is_none();
                state.dirty_since.get_or_insert_with(Instant::now);
                let full = state.dirty.bytes() >= u64::from(self.map().layout.chunk_size);
                if first {
                    self.flusher.dirty().insert(inode.ino, inode.clone());
                }
                first || full
            };
            if full {
                self.flusher.kick.notify_one();
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    async fn take_room(&self, inode: &Inode, bytes: usize) -> Result<()> {
        let one = self.acquire(&inode.room, bytes).await?;
        let all = self.acquire(&self.room, bytes).await?;
        one.forget();
        all.forget();
        Ok(())
    }

    async fn acquire<'a>(&self, room: &'a Semaphore, bytes: usize) -> Result<SemaphorePermit<'a>> {
        if let Ok(permit) = room.try_acquire_many(bytes as u32) {
            return Ok(permit);
        }
        self.flusher.pressure.store(true, Ordering::Relaxed);
        self.flusher.kick.notify_one();
        self.lease
            .unless_dead(room.acquire_many(bytes as u32))
            .await?
            .map_err(|_| Error::new(ErrorCode::Internal, "the write buffer is closed"))
    }

    fn give_room(&self, inode: &Inode, bytes: usize) {
        inode.room.add_permits(bytes);
        self.room.add_permits(bytes);
        debug_assert!(inode.room.available_permits() <= DIRTY_PER_INODE);
    }

    /// Forgets unflushed bytes at or beyond `size`. The caller holds the file's turn.
    pub(crate) fn discard_from(&self, inode: &Inode, size: u64) {
        let mut state = inode.state();
        state.dirty.truncate(size);
        state.content += 1;
    }

    /// Makes everything written so far durable and part of the file. Errors are kept for the
    /// handles to report and returned too.
    pub(crate) async fn flush(self: &Arc<Self>, inode: &Arc<Inode>) -> Result<()> {
        // A task of its own: a caller that goes away must not leave the buffer half sent.
        let turn = inode.turn.clone().lock_owned().await;
        let inner = self.clone();
        let inode = inode.clone();
        let task = self.work.spawn(async move {
            let result = inner.flush_in_turn(&inode).await;
            drop(turn);
            result.map_or(Ok(()), Err)
        });
        task.await
            .map_err(|_| Error::new(ErrorCode::Internal, "flush task failed"))?
    }

    /// Flushes while the caller holds the file's turn; gives the error, which is also kept.
    pub(crate) async fn flush_in_turn(self: &Arc<Self>, inode: &Arc<Inode>) -> Option<Error> {
        let (batch, seed, mtime, charged) = {
            let mut state = inode.state();
            self.flusher.dirty().remove(&inode.ino);
            state.dirty_since = None;
            let charged = std::mem::take(&mut state.charged);
            if state.dirty.is_empty() {
                drop(state);
                self.give_room(inode, charged);
                return None;
            }
            let batch = std::mem::take(&mut state.dirty).freeze();
            state.flushing = Some(batch.clone());
            (batch, state.attr().seed, state.mtime, charged)
        };
        let result = self.send(inode, seed, &batch, mtime).await;
        let error = {
            let mut state = inode.state();
            state.flushing = None;
            match result {
                Ok((attr, ttl)) => {
                    state.learn(attr, ttl);
                    None
                }
                Err(error) => {
                    tracing::error!(
                        volume = self.id.0, ino = inode.ino, start = batch.start(), end = batch.end(), %error,
                        "buffered writes cannot be flushed and are lost"
                    );
                    state.failures += 1;
                    state.failure = Some(error.clone());
                    state.content += 1;
                    Some(error)
                }
            }
        };
        self.give_room(inode, charged);
        error
    }

    async fn send(&self, inode: &Inode, seed: u32, batch: &Frozen, mtime: i64) -> Result<(Attr, Duration)> {
        let mut writes = Vec::with_capacity(batch.extents().len());
        for (at, data) in batch.extents() {
            writes.push(self.write_durably(inode.ino, seed, *at, data.clone()));
        }
        // All are awaited, also after a failure: nothing of this batch is under way when the next starts.
        let results: Vec<Result<()>> = futures::future::join_all(writes).await;
        results.into_iter().collect::<Result<()>>()?;
        let extend = Extend {
            ino: inode.ino,
            start: batch.start(),
            end: batch.end(),
            mtime,
        };
        let response = self.call(Op::Extend(extend)).await?;
        let ttl = metadata::ttl(&response);
        match response.result {
            Some(response::Result::Attr(attr)) => Ok((attr, ttl)),
            _ => Err(Error::malformed("no attributes")),
        }
    }

    /// Writes a range, split at chunk boundaries, until acknowledged.
    pub(crate) async fn write_durably(&self, ino: u64, seed: u32, offset: u64, data: Bytes) -> Result<()> {
        let chunk_size = self.map().layout.chunk_size;
        for span in spans(chunk_size, offset, data.len() as u64) {
            let from = span.start as usize;
            let part = data.slice(from..from + span.length as usize);
            self.write_chunk(ino, seed, span.index, span.offset, part).await?;
        }
        Ok(())
    }

    async fn write_chunk(&self, ino: u64, seed: u32, index: u32, offset: u32, data: Bytes) -> Result<()> {
        let _in_flight = self.in_flight.acquire().await;
        let crc = crc32c(&data);
        self.at_primary((ino, seed, index), ATTEMPT, |mut client, target| {
            let request = WriteRequest {
                replica_set: target.replica_set,
                epoch: target.epoch,
                chunk: Some(target.chunk),
                offset,
                data: data.clone(),
                crc,
            };
            async move {
                self.lease.held().await?;
                client.write(request).await?;
                Ok(())
            }
        })
        .await
    }
}

/// Flushes what is old or large, and everything when writers wait for room.
pub(crate) async fn in_background(inner: Arc<Inner>) {
    loop {
        let pressure = inner.flusher.pressure.swap(false, Ordering::Relaxed);
        let chunk = u64::from(inner.map().layout.chunk_size);
        let now = Instant::now();
        let mut next = None;
        let dirty: Vec<Arc<Inode>> = inner.flusher.dirty().values().cloned().collect();
        for inode in dirty {
            {
                let state = inode.state();
                let Some(since) = state.dirty_since else { continue };
                let due = since + inner.options.flush_after;
                if !pressure && due > now && state.dirty.bytes() < chunk {
                    next = Some(next.map_or(due, |next: Instant| next.min(due)));
                    continue;
                }
            }
            match inode.turn.clone().try_lock_owned() {
                Ok(turn) => {
                    let flush = inner.clone();
                    inner.work.spawn(async move {
                        flush.flush_in_turn(&inode).await;
                        drop(turn);
                        // More may have been written, and its kick missed because the turn was taken.
                        flush.flusher.kick.notify_one();
                    });
                }
                // Someone is at it; what was written since is looked at soon.
                Err(_) => {
                    let soon = now + Duration::from_millis(20);
                    next = Some(next.map_or(soon, |next: Instant| next.min(soon)));
                }
            }
        }
        match next {
            Some(next) => {
                tokio::select! {
                    () = tokio::time::sleep_until(next) => {}
                    () = inner.flusher.kick.notified() => {}
                }
            }
            None => inner.flusher.kick.notified().await,
        }
    }
}
