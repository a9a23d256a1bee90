//! The write-ahead log: one preallocated file, written round and round in frames. All records
//! that wait while a frame is being made durable share the next one (group commit). See
//! `docs/formats.md`.

use super::disk::{Disk, DiskFile, Mode, is_full};
use super::poison::Poison;
use super::record::Record;
use crate::chunk::{ChunkError, crc32c};
use bytes::{Buf, BufMut, Bytes};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes ever written to the log, wrap-arounds included: the place of a frame.
pub(super) type Lsn = u64;

/// The log's file.
pub(super) const LOG: &str = "log";
/// The same while it is being made.
pub(super) const NEW_LOG: &str = "log.new";

/// Frames start at multiples of this, so that writing one never rewrites a sector of another.
const PAGE: u64 = 4096;
const FRAME_MAGIC: &[u8; 8] = b"LZCHFRM1";
const SLOT_MAGIC: &[u8; 8] = b"LZCHLOG1";
const SLOT_FORMAT: u32 = 1;
const FRAME_HEADER: usize = 48;
const SLOT_BYTES: usize = 64;
/// Two slots, written in turn.
const AREA_START: u64 = 2 * PAGE;
/// A frame's memory is used again up to this size.
const SPARE: usize = 4 << 20;
/// Upper bound of what a record may cost beyond its own bytes: a frame of its own.
const FRAME_COST: u64 = 2 * PAGE;

/// A damaged log, or one that this version cannot read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogError {
    /// The operating system refused.
    #[error("the log cannot be read or written: {0}")]
    Io(#[from] std::io::Error),
    /// Neither slot is valid.
    #[error(
        "both slots at the start of the log are damaged; give the node an empty folder to restore its data from the other copies"
    )]
    Slots,
    /// Written by a newer version.
    #[error(
        "the log is of format {0}, this version reads up to {SLOT_FORMAT}; run the version that wrote it, or a newer one"
    )]
    Format(u32),
    /// A frame that was durable is not readable, though later ones are.
    #[error(
        "the log is damaged in the middle: no valid frame at byte {offset} (lsn {lsn}), but a later one of lsn {later}; give the node an empty folder to restore its data from the other copies"
    )]
    Middle {
        /// Place in the file.
        offset: u64,
        /// What should be there.
        lsn: Lsn,
        /// What is further on.
        later: Lsn,
    },
    /// A frame with a good checksum holds nonsense.
    #[error("the log's frame of lsn {lsn} holds an invalid record: {reason}")]
    Record {
        /// Which frame.
        lsn: Lsn,
        /// What is wrong.
        reason: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    area: u64,
    salt: u64,
    sequence: u64,
    start: Lsn,
    next_file: u64,
}

impl Slot {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(PAGE as usize);
        out.put_slice(SLOT_MAGIC);
        out.put_u32_le(SLOT_FORMAT);
        out.put_u32_le(0);
        out.put_u64_le(self.area);
        out.put_u64_le(self.salt);
        out.put_u64_le(self.sequence);
        out.put_u64_le(self.start);
        out.put_u64_le(self.next_file);
        out.put_u32_le(0);
        let crc = crc32c(&out);
        out.put_u32_le(crc);
        out.resize(PAGE as usize, 0);
        out
    }

    fn decode(page: &[u8]) -> Result<Option<Self>, LogError> {
        let Some(mut bytes) = page.get(..SLOT_BYTES) else {
            return Ok(None);
        };
        if &bytes[..8] != SLOT_MAGIC || crc32c(&bytes[..60]) != (&bytes[60..]).get_u32_le() {
            return Ok(None);
        }
        bytes.advance(8);
        let format = bytes.get_u32_le();
        if format > SLOT_FORMAT {
            return Err(LogError::Format(format));
        }
        bytes.advance(4);
        Ok(Some(Self {
            area: bytes.get_u64_le(),
            salt: bytes.get_u64_le(),
            sequence: bytes.get_u64_le(),
            start: bytes.get_u64_le(),
            next_file: bytes.get_u64_le(),
        }))
    }
}

#[derive(Clone, Copy, Debug)]
struct FrameHeader {
    salt: u64,
    lsn: Lsn,
    /// Where the frame before this one ended.
    previous: Lsn,
    length: u32,
    crc: u32,
}

impl FrameHeader {
    fn encode(&self) -> [u8; FRAME_HEADER] {
        let mut out = [0; FRAME_HEADER];
        let mut put = &mut out[..];
        put.put_slice(FRAME_MAGIC);
        put.put_u64_le(self.salt);
        put.put_u64_le(self.lsn);
        put.put_u64_le(self.previous);
        put.put_u32_le(self.length);
        put.put_u32_le(self.crc);
        let crc = crc32c(&out[..40]);
        out[40..44].copy_from_slice(&crc.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8], salt: u64) -> Option<Self> {
        let mut bytes = bytes.get(..FRAME_HEADER)?;
        if &bytes[..8] != FRAME_MAGIC || crc32c(&bytes[..40]) != (&bytes[40..44]).get_u32_le() {
            return None;
        }
        bytes.advance(8);
        let header = Self {
            salt: bytes.get_u64_le(),
            lsn: bytes.get_u64_le(),
            previous: bytes.get_u64_le(),
            length: bytes.get_u32_le(),
            crc: bytes.get_u32_le(),
        };
        (header.salt == salt).then_some(header)
    }

    fn end(&self) -> Lsn {
        self.lsn + frame_bytes(self.length as usize)
    }
}

fn frame_bytes(payload: usize) -> u64 {
    ((FRAME_HEADER + payload) as u64).next_multiple_of(PAGE)
}

/// What the log held when it was opened.
#[derive(Debug)]
pub(super) struct Recovered {
    /// Records with the place of their frame, in order.
    pub(super) records: Vec<(Lsn, Record)>,
    /// At least one more than any file number given out at the last checkpoint.
    pub(super) next_file: u64,
}

pub(super) struct Log {
    file: Arc<dyn DiskFile>,
    area: u64,
    salt: u64,
    poison: Poison,
    state: Mutex<State>,
    /// A frame was written, or the log's start moved.
    changed: Condvar,
}

struct State {
    /// The first frame that recovery needs.
    start: Lsn,
    /// Where the last durable frame ends.
    end: Lsn,
    slot: Slot,
    /// Records that wait for the next frame; room for the header in front.
    batch: Vec<u8>,
    /// The memory of the frame before: empty.
    spare: Vec<u8>,
    /// Number of the batch being filled; those below `done` are written.
    filling: u64,
    done: u64,
    writing: bool,
    /// Batches that found the disk full, with the records that have yet to learn of it.
    refused: HashMap<u64, usize>,
    waiting: usize,
    /// Frames at or after these places hold records whose effects are not yet visible.
    pins: BTreeMap<Lsn, usize>,
    reserved: u64,
}

/// Room in the log, given back on drop.
pub(super) struct Reservation<'a> {
    log: &'a Log,
    bytes: u64,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut state = self.log.lock();
        state.reserved -= self.bytes;
        drop(state);
        self.log.changed.notify_all();
    }
}

/// A durable record. Its frame stays in the log while this lives, which must be until the record's
/// effects are visible to a checkpoint.
pub(super) struct Durable<'a> {
    log: &'a Log,
    /// At most the place of its frame.
    pub(super) lsn: Lsn,
}

impl Drop for Durable<'_> {
    fn drop(&mut self) {
        self.log.lock().unpin(self.lsn);
    }
}

impl State {
    fn unpin(&mut self, lsn: Lsn) {
        if let Some(count) = self.pins.get_mut(&lsn) {
            *count -= 1;
            if *count == 0 {
                self.pins.remove(&lsn);
            }
        }
    }
}

impl Log {
    /// Makes an empty log; `area` is a multiple of 4096.
    pub(super) fn create(disk: &dyn Disk, area: u64, salt: u64) -> Result<(), LogError> {
        let file = disk.open(NEW_LOG, Mode::Create)?;
        let slot = Slot {
            area,
            salt,
            sequence: 0,
            start: 0,
            next_file: 1,
        };
        file.write_at(&slot.encode(), 0)?;
        file.write_at(&slot.encode(), PAGE)?;
        // Written out, so that frames later go to blocks that the file system need not allocate:
        // making one durable then costs no change of the file's own metadata.
        let zeros = vec![0; 1 << 20];
        let mut at = AREA_START;
        while at < AREA_START + area {
            let take = (AREA_START + area - at).min(zeros.len() as u64);
            file.write_at(&zeros[..take as usize], at)?;
            at += take;
        }
        file.sync()?;
        disk.rename(NEW_LOG, LOG)?;
        disk.sync_dir("")?;
        Ok(())
    }

    /// Reads the log and finds its end.
    pub(super) fn open(disk: &dyn Disk, mode: Mode, poison: Poison) -> Result<(Self, Recovered), LogError> {
        let file = disk.open(LOG, mode)?;
        let mut pages = vec![0; AREA_START as usize];
        file.read_at(&mut pages, 0)?;
        let mut slot: Option<Slot> = None;
        for page in pages.chunks(PAGE as usize) {
            if let Some(found) = Slot::decode(page)?
                && slot.is_none_or(|s| s.sequence < found.sequence)
            {
                slot = Some(found);
            }
        }
        let Some(slot) = slot.filter(|s| s.area > 0 && s.area.is_multiple_of(PAGE)) else {
            return Err(LogError::Slots);
        };
        let mut log = Self {
            file,
            area: slot.area,
            salt: slot.salt,
            poison,
            changed: Condvar::new(),
            state: Mutex::new(State {
                start: slot.start,
                end: slot.start,
                slot,
                batch: vec![0; FRAME_HEADER],
                spare: Vec::new(),
                filling: 0,
                done: 0,
                writing: false,
                refused: HashMap::new(),
                waiting: 0,
                pins: BTreeMap::new(),
                reserved: 0,
            }),
        };
        let (records, last, end) = log.scan(slot.start)?;
        let state = log.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.end = end;
        if mode == Mode::Write {
            log.settle(last)?;
        }
        let recovered = Recovered {
            records,
            next_file: slot.next_file,
        };
        Ok((log, recovered))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offset(&self, lsn: Lsn) -> u64 {
        AREA_START + lsn % self.area
    }

    /// The start of the next round.
    fn wrap(&self, lsn: Lsn) -> Lsn {
        lsn.next_multiple_of(self.area)
    }

    /// Makes durable what was found. If the process before this one was told that a sync had
    /// failed, the system's cache may show what the disk does not have; only the last frame and
    /// slot can be of that kind.
    fn settle(&self, last: Option<FrameHeader>) -> Result<(), LogError> {
        if let Some(header) = last {
            let mut frame = vec![0; frame_bytes(header.length as usize) as usize];
            self.file.read_at(&mut frame, self.offset(header.lsn))?;
            self.file.write_at(&frame, self.offset(header.lsn))?;
        }
        let slot = {
            let mut state = self.lock();
            state.slot.sequence += 1;
            state.slot
        };
        let place = slot.sequence % 2 * PAGE;
        self.file.write_at(&slot.encode(), place)?;
        self.file.sync()?;
        Ok(())
    }

    /// Records, the last frame, and the place where it ends.
    #[allow(clippy::type_complexity)]
    fn scan(&self, start: Lsn) -> Result<(Vec<(Lsn, Record)>, Option<FrameHeader>, Lsn), LogError> {
        let mut records = Vec::new();
        let mut last = None;
        let mut at = start;
        loop {
            let mut next = self.frame(at)?.filter(|(h, _)| h.previous == at);
            if next.is_none() && self.wrap(at) != at {
                next = self.frame(self.wrap(at))?.filter(|(h, _)| h.previous == at);
            }
            let Some((header, payload)) = next else {
                break;
            };
            let mut payload = payload;
            while !payload.is_empty() {
                let reason = |reason: String| LogError::Record {
                    lsn: header.lsn,
                    reason,
                };
                if payload.len() < 4 {
                    return Err(reason("bytes after the last one".into()));
                }
                let length = payload.get_u32_le() as usize;
                if length > payload.len() {
                    return Err(reason("it ends beyond its frame".into()));
                }
                let record = Record::decode(payload.split_to(length)).map_err(reason)?;
                records.push((header.lsn, record));
            }
            at = header.end();
            last = Some(header);
        }
        self.expect_end(at)?;
        Ok((records, last, at))
    }

    /// The valid frame of this place, if it is there.
    fn frame(&self, lsn: Lsn) -> Result<Option<(FrameHeader, Bytes)>, LogError> {
        let mut page = vec![0; FRAME_HEADER];
        self.file.read_at(&mut page, self.offset(lsn))?;
        match FrameHeader::decode(&page, self.salt) {
            Some(header) if header.lsn == lsn => Ok(self.payload(header)?.map(|payload| (header, payload))),
            _ => Ok(None),
        }
    }

    fn payload(&self, header: FrameHeader) -> Result<Option<Bytes>, LogError> {
        if header.lsn % self.area + frame_bytes(header.length as usize) > self.area {
            return Ok(None);
        }
        let mut payload = vec![0; header.length as usize];
        self.file
            .read_at(&mut payload, self.offset(header.lsn) + FRAME_HEADER as u64)?;
        Ok((crc32c(&payload) == header.crc).then(|| payload.into()))
    }

    /// Tells a torn tail, which was never acknowledged, from damage. A frame is written only after
    /// the one before it is durable; so if any valid one follows which does not directly continue
    /// at `end`, then what should be at `end` was durable once.
    fn expect_end(&self, end: Lsn) -> Result<(), LogError> {
        let mut buffer = vec![0; 256 * PAGE as usize];
        let mut at = 0;
        while at < self.area {
            let take = (self.area - at).min(buffer.len() as u64) as usize;
            self.file.read_at(&mut buffer[..take], AREA_START + at)?;
            for (page, bytes) in buffer[..take].chunks(PAGE as usize).enumerate() {
                let Some(header) = FrameHeader::decode(bytes, self.salt) else {
                    continue;
                };
                let place = at + page as u64 * PAGE;
                if header.previous > end && header.lsn % self.area == place && self.payload(header)?.is_some() {
                    return Err(LogError::Middle {
                        offset: self.offset(end),
                        lsn: end,
                        later: header.lsn,
                    });
                }
            }
            at += take as u64;
        }
        Ok(())
    }

    /// The longest record, in bytes.
    pub(super) fn max_record(&self) -> u64 {
        self.area / 8 - FRAME_COST
    }

    fn max_batch(&self) -> u64 {
        self.area / 8
    }

    /// Room for a record of at most this many bytes; `None` if a checkpoint must come first.
    pub(super) fn reserve(&self, record: u64) -> Option<Reservation<'_>> {
        let bytes = record + FRAME_COST;
        let mut state = self.lock();
        // What is skipped at the end of a round is at most a frame.
        let free = self.area - self.max_batch() - FRAME_COST;
        if state.end - state.start + state.reserved + bytes > free {
            return None;
        }
        state.reserved += bytes;
        Some(Reservation { log: self, bytes })
    }

    /// Makes a record durable. The caller has reserved the room.
    pub(super) fn append(&self, record: &Record) -> Result<Durable<'_>, ChunkError> {
        let length = record.encoded_len();
        let mut state = self.lock();
        while state.batch.len() > FRAME_HEADER && (state.batch.len() + 4 + length) as u64 > self.max_batch() {
            self.poison.check()?;
            if state.writing {
                state = self.wait(state);
            } else {
                state = self.write(state);
            }
        }
        let batch = state.filling;
        // And for what fills up the frame's last page.
        state.batch.reserve(4 + length + PAGE as usize);
        state.batch.put_u32_le(length as u32);
        record.encode(&mut state.batch);
        state.waiting += 1;
        let lsn = state.end;
        *state.pins.entry(lsn).or_default() += 1;
        loop {
            let outcome = if let Err(error) = self.poison.check() {
                Some(Err(error))
            } else if let Some(left) = state.refused.get_mut(&batch) {
                *left -= 1;
                if *left == 0 {
                    state.refused.remove(&batch);
                }
                Some(Err(ChunkError::NoSpace))
            } else if batch < state.done {
                Some(Ok(()))
            } else {
                None
            };
            match outcome {
                Some(Ok(())) => return Ok(Durable { log: self, lsn }),
                Some(Err(error)) => {
                    state.unpin(lsn);
                    return Err(error);
                }
                None if state.writing => state = self.wait(state),
                None => state = self.write(state),
            }
        }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the present batch for all that wait for it.
    fn write<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let mut next = std::mem::take(&mut state.spare);
        next.resize(FRAME_HEADER, 0);
        let mut frame = std::mem::replace(&mut state.batch, next);
        let records = std::mem::take(&mut state.waiting);
        let batch = state.filling;
        state.filling += 1;
        state.writing = true;
        let previous = state.end;
        let payload = frame.len() - FRAME_HEADER;
        let bytes = frame_bytes(payload);
        let lsn = if previous % self.area + bytes > self.area {
            self.wrap(previous)
        } else {
            previous
        };
        drop(state);

        let header = FrameHeader {
            salt: self.salt,
            lsn,
            previous,
            length: payload as u32,
            crc: crc32c(&frame[FRAME_HEADER..]),
        };
        frame[..FRAME_HEADER].copy_from_slice(&header.encode());
        frame.resize(bytes as usize, 0);
        let written = self.file.write_at(&frame, self.offset(lsn));
        let full = written.as_ref().is_err_and(is_full);
        if !full && let Err(error) = written.and_then(|()| self.file.sync()) {
            self.poison.set("writing the log", &error);
        }

        frame.clear();
        let mut state = self.lock();
        if frame.capacity() <= SPARE {
            state.spare = frame;
        }
        state.writing = false;
        if full {
            state.refused.insert(batch, records);
        } else {
            state.end = lsn + bytes;
        }
        state.done = batch + 1;
        self.changed.notify_all();
        state
    }

    /// The place before which no record is invisible to a checkpoint that begins now.
    pub(super) fn visible(&self) -> Lsn {
        let state = self.lock();
        state.pins.keys().next().map_or(state.end, |&pin| pin)
    }

    /// Bytes between the first frame that recovery needs and the end.
    pub(super) fn used(&self) -> u64 {
        let state = self.lock();
        state.end - state.start
    }

    /// Bytes that frames may take.
    pub(super) fn area(&self) -> u64 {
        self.area
    }

    /// Lets recovery begin at `start`: everything before it is durable elsewhere. One caller at a
    /// time.
    pub(super) fn advance(&self, start: Lsn, next_file: u64) -> Result<(), ChunkError> {
        self.poison.check()?;
        let slot = {
            let state = self.lock();
            if start == state.start && next_file == state.slot.next_file {
                return Ok(());
            }
            Slot {
                sequence: state.slot.sequence + 1,
                start,
                next_file,
                ..state.slot
            }
        };
        let written = self
            .file
            .write_at(&slot.encode(), slot.sequence % 2 * PAGE)
            .and_then(|()| self.file.sync());
        match written {
            Ok(()) => {}
            // The other slot still holds: nothing is lost but the room.
            Err(error) if is_full(&error) => return Err(ChunkError::NoSpace),
            Err(error) => return Err(self.poison.set("writing the log's start", &error)),
        }
        let mut state = self.lock();
        state.slot = slot;
        state.start = start;
        drop(state);
        self.changed.notify_all();
        Ok(())
    }
}
