//! What is written: every eight bytes tell which write they are from, so that a mix of two writes,
//! a byte of a third one or of another place shows.

use std::fmt;

/// Bytes of a slot of a data file: no multiple of a disk's or a page's blocks, but of eight.
pub(super) const SLOT: usize = 4104;
/// Bytes of a record in a shared log.
pub(super) const RECORD: usize = 200;
const WORD: usize = 8;

/// A place's content: what the write `seq` put there, up to a later truncation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Value {
    /// Zero where nothing was written: all bytes are zeros.
    pub(super) seq: u64,
    /// Bytes from the slot's start that the write still fills; zeros follow. A multiple of eight.
    pub(super) upto: u32,
}

impl Value {
    pub(super) const ZEROS: Self = Self { seq: 0, upto: 0 };

    pub(super) fn written(seq: u64) -> Self {
        Self { seq, upto: SLOT as u32 }
    }

    fn word(self, place: Place, index: usize) -> u64 {
        if index * WORD < self.upto as usize {
            word(place, self.seq, index)
        } else {
            0
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.upto as usize {
            0 => write!(f, "zeros"),
            SLOT => write!(f, "write {}", self.seq),
            upto => write!(f, "write {} cut at byte {upto}", self.seq),
        }
    }
}

/// Where something is written: the same write has other bytes at another place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The file, unlike all others ever made, or the writer of a record.
    pub(super) file: u64,
    pub(super) slot: u32,
}

/// The first word tells the write's number in clear, for messages; the others are mixed.
fn word(place: Place, seq: u64, index: usize) -> u64 {
    if index == 0 {
        return seq;
    }
    let mut mixed = place.file ^ u64::from(place.slot) << 40 ^ seq.rotate_left(20) ^ (index as u64) << 52;
    for shift in [30, 27, 31] {
        mixed = (mixed ^ mixed >> shift).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    mixed | 1
}

/// `length` bytes (a multiple of eight) of one write.
pub(super) fn bytes(place: Place, seq: u64, length: usize) -> Vec<u8> {
    (0..length / WORD)
        .flat_map(|index| word(place, seq, index).to_le_bytes())
        .collect()
}

/// Which of the allowed values is there. A mix of them has none, and is an error unless `mixed`: then
/// each word may be of another one.
pub(super) fn explain(found: &[u8], place: Place, allowed: &[Value], mixed: bool) -> Result<Option<usize>, String> {
    let word_at = |index: usize| {
        let mut word = [0; WORD];
        word.copy_from_slice(&found[index * WORD..][..WORD]);
        u64::from_le_bytes(word)
    };
    let words = found.len() / WORD;
    // The newest first: that is what is there most of the time.
    for (at, value) in allowed.iter().enumerate().rev() {
        if (0..words).all(|index| word_at(index) == value.word(place, index)) {
            return Ok(Some(at));
        }
    }
    let strange = (0..words).find(|index| !allowed.iter().any(|value| value.word(place, *index) == word_at(*index)));
    if strange.is_none() && mixed {
        return Ok(None);
    }
    let names: Vec<_> = allowed.iter().map(Value::to_string).collect();
    let seen = match (word_at(0), strange) {
        (0, _) if found.iter().all(|byte| *byte == 0) => "zeros".to_owned(),
        (seq, _) if found == bytes(place, seq, found.len()) => format!("write {seq}"),
        (seq, Some(index)) => format!("{:#x} at byte {} after write {seq}", word_at(index), index * WORD),
        (seq, None) => format!("a mix that begins with write {seq}"),
    };
    Err(format!("found {seen}, allowed are {}", names.join(", ")))
}

/// The writer and the number of a record, if it is whole.
pub(super) fn record_of(found: &[u8]) -> Result<(u64, u64), String> {
    let (writer, body) = found.split_at(WORD);
    let writer = u64::from_le_bytes(writer.try_into().unwrap_or_default());
    let seq = u64::from_le_bytes(body[..WORD].try_into().unwrap_or_default());
    if writer == 0 || body != bytes(record_place(writer), seq, body.len()) {
        return Err(format!("torn: begins with writer {writer}, number {seq}"));
    }
    Ok((writer, seq))
}

/// A record as a shared log holds it. Writers count from one.
pub(super) fn record(writer: u64, seq: u64) -> Vec<u8> {
    let mut record = writer.to_le_bytes().to_vec();
    record.extend(bytes(record_place(writer), seq, RECORD - WORD));
    record
}

fn record_place(writer: u64) -> Place {
    Place { file: writer, slot: 0 }
}

/// The content of a small file: its id and how long it is are in it.
pub(super) fn small(id: u64) -> Vec<u8> {
    let length = 64 + (id.wrapping_mul(0x9e37_79b9) % 6000) as usize / WORD * WORD;
    bytes(Place { file: id, slot: 1 }, id, length)
}
