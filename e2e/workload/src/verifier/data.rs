//! What a data file must and may hold.

use super::content::{Place, SLOT, Value, explain};
use std::collections::BTreeMap;
use std::ops::Range;

/// Slots of a region, one after the other.
const REGION: u32 = 16;
/// Regions: at the file's start and across its first two chunk borders.
const REGIONS: u32 = 3;
/// Slots of a data file.
pub(super) const SLOTS: u32 = REGION * REGIONS;
/// Values that are kept for readers that began before the newest was published.
const KEPT: u64 = 256;

/// Offset of a slot. A region at a chunk border has a slot across it.
pub(super) fn offset(chunk: u64, slot: u32) -> u64 {
    let (region, at) = (u64::from(slot / REGION), u64::from(slot % REGION));
    let start = (region * chunk).saturating_sub(if region == 0 { 0 } else { 7 * SLOT as u64 + 2000 });
    start + at * SLOT as u64
}

/// The last slot of a write that begins at `first` and wants `count` slots: they must be neighbours.
pub(super) fn end_of_write(first: u32, count: u32) -> u32 {
    (first + count).min((first / REGION + 1) * REGION)
}

/// A slot's values in the order in which they were issued.
#[derive(Clone, Debug)]
struct Slot {
    values: Vec<Value>,
    /// Number of the first value that is kept.
    first: u64,
    /// Nothing older than this value may be there: it is durable, or others have seen it.
    base: u64,
    /// The newest value whose write was answered.
    answered: u64,
    /// Values up to this one were in doubt when they should have become durable.
    doubtful: Option<u64>,
}

impl Slot {
    fn new() -> Self {
        Self {
            values: vec![Value::ZEROS],
            first: 0,
            base: 0,
            answered: 0,
            doubtful: None,
        }
    }

    fn latest(&self) -> u64 {
        self.first + self.values.len() as u64 - 1
    }

    fn sure(&self, number: u64) -> bool {
        self.doubtful.is_none_or(|doubtful| number > doubtful)
    }

    fn raise(&mut self, number: u64) {
        self.base = self.base.max(number);
        let keep_from = self.base.saturating_sub(KEPT).max(self.first);
        self.values.drain(..(keep_from - self.first) as usize);
        self.first = keep_from;
    }

    /// The oldest value that a reader may find: one on the writer's mount finds all answered writes.
    fn floor(&self, beside_writer: bool) -> u64 {
        if beside_writer && self.sure(self.answered) {
            self.answered.max(self.base)
        } else {
            self.base
        }
    }
}

/// A data file.
#[derive(Clone, Debug)]
pub(super) struct DataFile {
    /// Whose mount writes: others only after a hand-over.
    pub(super) mount: usize,
    slots: Vec<Slot>,
    size: u64,
    size_known: bool,
    /// Whether its name must be there; `None` after a creation or removal in doubt.
    pub(super) exists: Option<bool>,
    chunk: u64,
}

/// What a reader may find, taken before it reads.
pub(super) struct Floors {
    floors: Vec<(u32, u64)>,
    beside_writer: bool,
}

impl Floors {
    pub(super) fn beside_writer(&self) -> bool {
        self.beside_writer
    }
}

impl DataFile {
    pub(super) fn new(mount: usize, chunk: u64) -> Self {
        Self {
            mount,
            slots: (0..SLOTS).map(|_| Slot::new()).collect(),
            size: 0,
            size_known: true,
            exists: None,
            chunk,
        }
    }

    pub(super) fn write_issued(&mut self, slots: Range<u32>, seq: u64) {
        for slot in slots {
            self.slots[slot as usize].values.push(Value::written(seq));
        }
    }

    pub(super) fn write_answered(&mut self, slots: Range<u32>, ok: bool) {
        let end = slots
            .clone()
            .last()
            .map_or(0, |last| offset(self.chunk, last) + SLOT as u64);
        for slot in slots {
            let slot = &mut self.slots[slot as usize];
            if ok {
                slot.answered = slot.latest();
            } else {
                slot.doubtful = Some(slot.latest());
            }
        }
        self.size = self.size.max(end);
        self.size_known &= ok;
        if !ok {
            // It may have been told of an earlier one, and the next fsync knows nothing of that.
            self.sync_answered(false);
        }
    }

    /// An fsync, or a close, which does as much.
    pub(super) fn sync_answered(&mut self, ok: bool) {
        for slot in &mut self.slots {
            let latest = slot.latest();
            if !ok && slot.base < latest {
                slot.doubtful = Some(latest);
                self.size_known = false;
            } else if ok && slot.sure(latest) {
                slot.raise(latest);
            }
        }
    }

    /// The writer's mount is gone: what was not durable may be lost.
    pub(super) fn mount_lost(&mut self) {
        self.sync_answered(false);
    }

    pub(super) fn truncate_issued(&mut self, size: u64) {
        for (slot, cut) in cuts(self.chunk, size) {
            let slot = &mut self.slots[slot as usize];
            let last = slot.values.last().copied().unwrap_or(Value::ZEROS);
            slot.values.push(if cut == 0 {
                Value::ZEROS
            } else {
                Value {
                    seq: last.seq,
                    upto: last.upto.min(cut),
                }
            });
        }
    }

    pub(super) fn truncate_answered(&mut self, size: u64, ok: bool) {
        for (slot, cut) in cuts(self.chunk, size) {
            let slot = &mut self.slots[slot as usize];
            let latest = slot.latest();
            if !ok {
                slot.doubtful = Some(latest);
            } else {
                slot.answered = latest;
                // Zeros are zeros, whatever was there before.
                if cut == 0 || slot.sure(latest - 1) && slot.base + 1 == latest {
                    slot.raise(latest);
                }
            }
        }
        self.size = size;
        self.size_known = ok;
        if !ok {
            self.sync_answered(false);
        }
    }

    /// Whether nothing is on its way: a partial cut of something in doubt would be too.
    pub(super) fn is_settled(&self) -> bool {
        self.slots.iter().all(|slot| slot.base == slot.latest())
    }

    /// The size, if it is known.
    pub(super) fn size(&self) -> Option<u64> {
        self.size_known.then_some(self.size)
    }

    /// To be taken before a read of some slots, on the mount that writes or another; `buffered` if
    /// answered writes must be there before they are durable.
    pub(super) fn floors(&self, slots: Range<u32>, beside_writer: bool, buffered: bool) -> Floors {
        let floor = |slot: u32| (slot, self.slots[slot as usize].floor(beside_writer && buffered));
        Floors {
            floors: slots.map(floor).collect(),
            beside_writer,
        }
    }

    /// Judges what a read has found of the slots that `floors` is about, missing bytes being zeros.
    /// What another mount has seen must stay.
    pub(super) fn judge(&mut self, id: u64, floors: &Floors, found: &[u8]) -> Result<(), String> {
        for (part, (number, floor)) in found.chunks(SLOT).zip(&floors.floors) {
            let slot = &mut self.slots[*number as usize];
            let Some(from) = floor.checked_sub(slot.first) else {
                continue;
            };
            let allowed = &slot.values[from as usize..];
            let place = Place {
                file: id,
                slot: *number,
            };
            // Of several writes that are not durable each may be there in part.
            let mixed = allowed.len() > 1;
            let seen = explain(part, place, allowed, mixed).map_err(|problem| format!("slot {number}: {problem}"))?;
            if let Some(at) = seen
                && !floors.beside_writer
                && allowed.iter().filter(|value| **value == allowed[at]).count() == 1
            {
                let seen = slot.first + from + at as u64;
                slot.raise(seen);
            }
        }
        Ok(())
    }
}

/// The slots that a truncation changes, with how many of their bytes it leaves.
fn cuts(chunk: u64, size: u64) -> impl Iterator<Item = (u32, u32)> {
    (0..SLOTS).filter_map(move |slot| {
        let start = offset(chunk, slot);
        let left = size.saturating_sub(start).min(SLOT as u64);
        (left < SLOT as u64).then_some((slot, left as u32))
    })
}

/// A worker's data files by id.
pub(super) type DataFiles = BTreeMap<u64, DataFile>;
