//! From the write buffer to the replica sets and the owner.

use crate::extents::{ChunkWrite, Frozen, PIECE};
use crate::inode::{Admission, DIRTY_PER_INODE, Inode};
use crate::metadata;
use crate::volume::Inner;
use crate::{Error, Result};
use bytes::Bytes;
use crc_fast::CrcAlgorithm;
use futures::StreamExt;
use lazarette_proto::chunk::{TruncateRequest, WritePart, WriteRequest};
use lazarette_proto::meta::{Attr, Extend, GetAttr, Reserve, Response, SetAttr, StatFs, request::Op, response};
use lazarette_types::{ErrorCode, spans};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// How old the owner's word on free space may get, with which writes are accepted.
const FREE_FRESH: Duration = Duration::from_secs(2);

/// A file that is written in a stream has chunks reserved in steps of so many.
const CHUNKS_AHEAD: u64 = 16;

/// What a flush has to achieve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// fsync(2).
    All,
    /// fdatasync(2): the time of a write that leaves the size as it is may become durable later. Each time costs
    /// a commit at the owner, which databases that overwrite their logs would wait for.
    Data,
}

/// What the owner last said of free space.
#[derive(Debug, Default)]
pub(crate) struct Free(Mutex<Option<(u64, Instant)>>);

impl Free {
    fn state(&self) -> MutexGuard<'_, Option<(u64, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns from the reply to a request that was sent at `sent`.
    pub(crate) fn learn(&self, bytes: u64, sent: Instant) {
        let mut state = self.state();
        match &mut *state {
            // Which of the two is older is not known: replies may overtake each other.
            Some((known, at)) if sent < *at => *known = bytes.min(*known),
            _ => *state = Some((bytes, Instant::now())),
        }
    }

    /// Bytes, unless it has been long.
    fn bytes(&self) -> Option<u64> {
        let (bytes, at) = (*self.state())?;
        (at.elapsed() < FREE_FRESH).then_some(bytes)
    }
}

/// A write that was let in; near the volume's end, as the only one.
type LetIn<'a> = (Admission<'a>, Option<tokio::sync::MutexGuard<'a, ()>>);

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
        let _let_in = self.fits(inode, offset + data.len() as u64).await?;
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
                state.recount();
                self.totals.note_news();
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

    /// Lets a write in after which a file ends at `end`, if the volume has room for it in addition to what is
    /// buffered. When there is hardly any, it is found out exactly, by one writer at a time. What is returned is
    /// to be held until the bytes are in the buffer.
    async fn fits(self: &Arc<Self>, inode: &Arc<Inode>, end: u64) -> Result<LetIn<'_>> {
        let admit = |free: Option<u64>| {
            let more = end.saturating_sub(inode.state().view().size);
            let free = if more == 0 { Some(u64::MAX) } else { free };
            self.totals.admit(more, free?)
        };
        if let Some(admission) = admit(self.free.bytes()) {
            return Ok((admission, None));
        }
        let guard = self.lease.unless_dead(self.last_bytes.lock()).await?;
        // What is being flushed counts here and, already, at the owner; so it may take more than one look.
        for _ in 0..3 {
            self.call(Op::StatFs(StatFs {})).await?;
            // Whatever time that took.
            let free = self.free.state().map(|(bytes, _)| bytes);
            if let Some(admission) = admit(free) {
                return Ok((admission, Some(guard)));
            }
            let inodes: Vec<_> = self.inodes().values().cloned().collect();
            for inode in inodes.into_iter().filter(|inode| inode.state().is_dirty()) {
                // The error is kept for the file's own handles.
                let _ = self.flush(&inode, Scope::All).await;
            }
        }
        Err(Error::new(ErrorCode::NoSpace, "the volume is full"))
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
        state.recount();
    }

    /// Makes everything written so far durable and part of the file. Errors are kept for the
    /// handles to report and returned too.
    pub(crate) async fn flush(self: &Arc<Self>, inode: &Arc<Inode>, scope: Scope) -> Result<()> {
        // A task of its own: a caller that goes away must not leave the buffer half sent.
        let turn = inode.turn.clone().lock_owned().await;
        let inner = self.clone();
        let inode = inode.clone();
        let task = self.work.spawn(async move {
            let result = inner.flush_batch(&inode, scope, &mut None).await;
            drop(turn);
            result.map_or(Ok(()), Err)
        });
        task.await
            .map_err(|_| Error::new(ErrorCode::Internal, "flush task failed"))?
    }

    /// Flushes while the caller holds the file's turn; gives the error, which is also kept.
    pub(crate) async fn flush_in_turn(self: &Arc<Self>, inode: &Arc<Inode>) -> Option<Error> {
        self.flush_batch(inode, Scope::All, &mut None).await
    }

    /// The same. A change of attributes is done with it, and then is not there any more, if there is anything
    /// to flush and that succeeds.
    pub(crate) async fn flush_and_set(
        self: &Arc<Self>,
        inode: &Arc<Inode>,
        set: &mut Option<SetAttr>,
    ) -> Option<Error> {
        self.flush_batch(inode, Scope::All, set).await
    }

    async fn flush_batch(
        self: &Arc<Self>,
        inode: &Arc<Inode>,
        scope: Scope,
        set: &mut Option<SetAttr>,
    ) -> Option<Error> {
        let (batch, mtime, charged, since) = {
            let mut state = inode.state();
            let charged = std::mem::take(&mut state.charged);
            let owed = state.time_owed && scope == Scope::All;
            if state.dirty.is_empty() && !owed {
                if !state.time_owed {
                    self.flusher.dirty().remove(&inode.ino);
                    state.dirty_since = None;
                }
                drop(state);
                self.give_room(inode, charged);
                return None;
            }
            self.flusher.dirty().remove(&inode.ino);
            let since = state.dirty_since.take();
            let batch = std::mem::take(&mut state.dirty).freeze();
            state.flushing = Some(batch.clone());
            (batch, state.mtime, charged, since)
        };
        let result = self.send(inode, &batch, scope, mtime, set).await;
        let error = {
            let mut state = inode.state();
            state.flushing = None;
            match result {
                Ok(Some((attr, ttl))) => {
                    state.time_owed = false;
                    state.learn(attr, ttl);
                    None
                }
                Ok(None) => {
                    state.time_owed = true;
                    state.dirty_since = since.or(state.dirty_since);
                    self.flusher.dirty().insert(inode.ino, inode.clone());
                    self.flusher.kick.notify_one();
                    None
                }
                Err(error) => {
                    tracing::error!(
                        volume = self.id.0, ino = inode.ino, start = batch.start(), end = batch.end(), %error,
                        "buffered writes cannot be flushed and are lost"
                    );
                    state.time_owed = false;
                    state.reserved = 0;
                    state.recount();
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

    /// Writes a batch to the chunks and makes it part of the file, again if chunks were cut meanwhile. None: it
    /// is part of the file already, and the owner has yet to be told of its time.
    async fn send(
        &self,
        inode: &Inode,
        batch: &Frozen,
        scope: Scope,
        mtime: i64,
        set: &mut Option<SetAttr>,
    ) -> Result<Option<(Attr, Duration)>> {
        loop {
            let known = self.reserve(inode, batch.end(), |size| batch.leave_holes(size)).await?;
            let writes = batch.writes(self.map().layout.chunk_size).into_iter();
            let writes = writes.map(|write| self.write_chunk(inode.ino, known.seed, write));
            // All are awaited, also after a failure: nothing of this batch is under way when the next starts.
            let results: Vec<Result<()>> = futures::future::join_all(writes).await;
            results.into_iter().collect::<Result<()>>()?;
            // Nobody else has anything cached that this makes stale, or can have cut the chunks meanwhile.
            let alone = !self.cache.sole().is_zero();
            if scope == Scope::Data && alone && batch.end() <= known.size {
                return Ok(None);
            }
            let done = self.extend(inode, (batch.start(), batch.end()), mtime, &known, set);
            if let Some(done) = done.await? {
                return Ok(Some(done));
            }
        }
    }

    /// Tells the owner of bytes that are durable, written since `known`. None: chunks were cut meanwhile,
    /// write again.
    async fn extend(
        &self,
        inode: &Inode,
        (start, end): (u64, u64),
        mtime: i64,
        known: &Attr,
        set: &mut Option<SetAttr>,
    ) -> Result<Option<(Attr, Duration)>> {
        let extend = Extend {
            ino: inode.ino,
            start,
            end,
            mtime,
            since: known.change,
        };
        let op = match *set {
            Some(set) => Op::SetAttr(SetAttr {
                extend: Some(extend),
                ..set
            }),
            None => Op::Extend(extend),
        };
        match self.call(op).await {
            Ok(response) => {
                *set = None;
                Ok(Some(attributes(response)?))
            }
            Err(error) if error.code() == ErrorCode::Overtaken => {
                let (attr, ttl) = attributes(self.call(Op::GetAttr(GetAttr { ino: inode.ino })).await?)?;
                inode.state().learn(attr, ttl);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Has the owner reserve and clean what bytes up to `end` need, if they need it. Gives what is known of
    /// the file from then on. `holes` says whether they leave any in a file of a size.
    async fn reserve(&self, inode: &Inode, end: u64, holes: impl Fn(u64) -> bool) -> Result<Attr> {
        let chunk = u64::from(self.map().layout.chunk_size);
        let mut clean = false;
        loop {
            let (known, reserved) = {
                let state = inode.state();
                (*state.attr(), state.reserved)
            };
            let holes = holes(known.size);
            let reach = known.size.max(1).next_multiple_of(chunk).max(reserved);
            if end <= reach && (clean || !holes) {
                return Ok(known);
            }
            let reach = end.next_multiple_of(CHUNKS_AHEAD * chunk);
            let reserve = Reserve {
                ino: inode.ino,
                end,
                reach,
                holes,
            };
            let (attr, ttl) = attributes(self.call(Op::Reserve(reserve)).await?)?;
            let mut state = inode.state();
            state.learn(attr, ttl);
            state.reserved = reach;
            clean |= holes;
        }
    }

    /// Makes a file at least so long, with zeros. The caller holds the file's turn.
    pub(crate) async fn grow_in_turn(&self, inode: &Inode, end: u64) -> Result<()> {
        loop {
            let (attr, ttl) = attributes(self.call(Op::GetAttr(GetAttr { ino: inode.ino })).await?)?;
            inode.state().learn(attr, ttl);
            if attr.size >= end {
                return Ok(());
            }
            let known = self.reserve(inode, end, |size| size < end).await?;
            if let Some((attr, ttl)) = self.extend(inode, (end, end), wall_clock(), &known, &mut None).await? {
                inode.state().learn(attr, ttl);
                return Ok(());
            }
        }
    }

    /// Zeros a range of a file as far as the file goes. Whole chunks of it take no space afterwards. The
    /// caller holds the file's turn.
    pub(crate) async fn zero_in_turn(&self, inode: &Inode, offset: u64, end: u64) -> Result<()> {
        loop {
            let (known, ttl) = attributes(self.call(Op::GetAttr(GetAttr { ino: inode.ino })).await?)?;
            inode.state().learn(known, ttl);
            let end = end.min(known.size);
            if end <= offset {
                return Ok(());
            }
            let chunk_size = self.map().layout.chunk_size;
            let parts = spans(chunk_size, offset, end - offset).map(|span| async move {
                // Not in the chunk in which the file ends: what others write behind it would go, too.
                if span.offset + span.length == chunk_size {
                    return self.cut_chunk(inode.ino, known.seed, span.index, span.offset).await;
                }
                for from in (0..span.length).step_by(PIECE as usize) {
                    let length = (span.length - from).min(PIECE as u32);
                    let zeros = Bytes::from(vec![0; length as usize]);
                    let write = ChunkWrite {
                        index: span.index,
                        parts: vec![(span.offset + from, zeros)],
                    };
                    self.write_chunk(inode.ino, known.seed, write).await?;
                }
                Ok(())
            });
            let limit = self.options.in_flight;
            let results: Vec<Result<()>> = futures::stream::iter(parts).buffer_unordered(limit).collect().await;
            results.into_iter().collect::<Result<()>>()?;
            if let Some((attr, ttl)) = self
                .extend(inode, (offset, end), wall_clock(), &known, &mut None)
                .await?
            {
                let mut state = inode.state();
                state.learn(attr, ttl);
                state.content += 1;
                return Ok(());
            }
        }
    }

    async fn cut_chunk(&self, ino: u64, seed: u32, index: u32, length: u32) -> Result<()> {
        let _in_flight = self.in_flight.acquire().await;
        self.change_at_primary((ino, seed, index), |mut client, target, deadline| {
            let request = TruncateRequest {
                replica_set: target.replica_set,
                epoch: target.epoch,
                chunk: Some(target.chunk),
                length,
                deadline: Some(deadline),
            };
            async move { client.truncate(request).await.map(drop) }
        })
        .await
    }

    /// Writes a range, split at chunk boundaries, until acknowledged.
    pub(crate) async fn write_durably(&self, ino: u64, seed: u32, offset: u64, data: Bytes) -> Result<()> {
        let chunk_size = self.map().layout.chunk_size;
        for span in spans(chunk_size, offset, data.len() as u64) {
            let from = span.start as usize;
            let part = data.slice(from..from + span.length as usize);
            let write = ChunkWrite {
                index: span.index,
                parts: vec![(span.offset, part)],
            };
            self.write_chunk(ino, seed, write).await?;
        }
        Ok(())
    }

    async fn write_chunk(&self, ino: u64, seed: u32, write: ChunkWrite) -> Result<()> {
        let bytes: usize = write.parts.iter().map(|(_, data)| data.len()).sum();
        let requests = bytes.div_ceil(PIECE as usize).clamp(1, self.options.in_flight);
        let _in_flight = self.in_flight.acquire_many(requests as u32).await;
        let part = |(offset, data): (u32, Bytes)| {
            let crc = crc32c(&data);
            WritePart { offset, data, crc }
        };
        let parts: Vec<WritePart> = write.parts.into_iter().map(part).collect();
        self.change_at_primary((ino, seed, write.index), |mut client, target, deadline| {
            let request = WriteRequest {
                replica_set: target.replica_set,
                epoch: target.epoch,
                chunk: Some(target.chunk),
                parts: parts.clone(),
                deadline: Some(deadline),
            };
            async move { client.write(request).await.map(drop) }
        })
        .await
    }
}

fn attributes(response: Response) -> Result<(Attr, Duration)> {
    let ttl = metadata::ttl(&response);
    match response.result {
        Some(response::Result::Attr(attr)) => Ok((attr, ttl)),
        _ => Err(Error::malformed("no attributes")),
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
