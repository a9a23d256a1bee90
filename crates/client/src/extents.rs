use bytes::Bytes;
use lazarette_proto::MAX_WRITE_PARTS;
use std::collections::BTreeMap;

/// Extents never cross a multiple of this many bytes, so each fits one write request and one
/// chunk (chunks are multiples of it).
pub(crate) const PIECE: u64 = 1 << 20;

/// An extent that grows to this length is taken to be written in a stream.
const STREAM: usize = 64 << 10;

/// Most bytes of one write request, at least a piece.
const WRITE_BYTES: usize = 4 << 20;

/// What one write request puts into one chunk.
#[derive(Debug)]
pub(crate) struct ChunkWrite {
    /// The chunk's place in the file.
    pub(crate) index: u32,
    /// Bytes with their offset in the chunk, in order.
    pub(crate) parts: Vec<(u32, Bytes)>,
}

/// Bytes written and not yet flushed, by file offset: no overlaps, neighbours in a piece joined.
#[derive(Debug, Default)]
pub(crate) struct Extents {
    map: BTreeMap<u64, Vec<u8>>,
    bytes: u64,
}

impl Extents {
    pub(crate) fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// One past the last byte; 0 if empty.
    pub(crate) fn end(&self) -> u64 {
        self.map
            .last_key_value()
            .map_or(0, |(start, data)| start + data.len() as u64)
    }

    /// The latest bytes win.
    pub(crate) fn insert(&mut self, mut offset: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let room = (PIECE - offset % PIECE) as usize;
            let (now, later) = data.split_at(room.min(data.len()));
            self.insert_in_piece(offset, now);
            offset += now.len() as u64;
            data = later;
        }
    }

    fn insert_in_piece(&mut self, start: u64, data: &[u8]) {
        let end = start + data.len() as u64;
        let piece = start - start % PIECE;
        // The common case: a stream continues, or a range within one extent is written again.
        if let Some((&at, extent)) = self.map.range(piece..=start).next_back() {
            let extent_end = at + extent.len() as u64;
            let next_free = extent_end >= end || {
                let next = self.map.range(start + 1..piece + PIECE).next();
                next.is_none_or(|(&next, _)| next > end)
            };
            if extent_end >= start
                && next_free
                && let Some(extent) = self.map.get_mut(&at)
            {
                let within = (start - at) as usize;
                let overlap = extent.len().saturating_sub(within).min(data.len());
                extent[within..within + overlap].copy_from_slice(&data[..overlap]);
                let longer = within + data.len();
                if longer > extent.capacity() && longer >= STREAM {
                    // It will be a whole piece: once is enough to move it.
                    extent.reserve_exact((piece + PIECE - at) as usize - extent.len());
                }
                extent.extend_from_slice(&data[overlap..]);
                self.bytes += (data.len() - overlap) as u64;
                return;
            }
        }
        // Join everything that overlaps or touches.
        let touching: Vec<u64> = self
            .map
            .range(piece..(end + 1).min(piece + PIECE))
            .filter(|(at, extent)| *at + extent.len() as u64 >= start)
            .map(|(&at, _)| at)
            .collect();
        let mut joined_start = start;
        let mut joined_end = end;
        let mut parts = Vec::with_capacity(touching.len());
        for at in touching {
            if let Some(extent) = self.map.remove(&at) {
                self.bytes -= extent.len() as u64;
                joined_start = joined_start.min(at);
                joined_end = joined_end.max(at + extent.len() as u64);
                parts.push((at, extent));
            }
        }
        let mut joined = vec![0; (joined_end - joined_start) as usize];
        for (at, part) in parts
            .iter()
            .map(|(at, part)| (*at, part.as_slice()))
            .chain([(start, data)])
        {
            let within = (at - joined_start) as usize;
            joined[within..within + part.len()].copy_from_slice(part);
        }
        self.bytes += joined.len() as u64;
        self.map.insert(joined_start, joined);
    }

    /// Drops what lies at or beyond `size`.
    pub(crate) fn truncate(&mut self, size: u64) {
        let beyond = self.map.split_off(&size);
        for extent in beyond.values() {
            self.bytes -= extent.len() as u64;
        }
        if let Some((&at, extent)) = self.map.iter_mut().next_back() {
            let keep = (size - at) as usize;
            if keep < extent.len() {
                self.bytes -= (extent.len() - keep) as u64;
                extent.truncate(keep);
            }
        }
    }

    /// The parts of extents that lie in `[offset, end)`, each with its file offset.
    pub(crate) fn parts(&self, offset: u64, end: u64) -> impl Iterator<Item = (u64, &[u8])> {
        let near = self.map.range((offset - offset % PIECE).min(end)..end);
        near.filter_map(move |(&at, data)| {
            let (from, to) = clip(at, data.len(), offset, end)?;
            Some((at + from as u64, &data[from..to]))
        })
    }

    /// The extents as they are sent.
    pub(crate) fn freeze(self) -> Frozen {
        Frozen {
            extents: self.map.into_iter().map(|(at, data)| (at, Bytes::from(data))).collect(),
        }
    }
}

/// Extents that are being flushed: they do not change, and copies share the bytes.
#[derive(Clone, Debug)]
pub(crate) struct Frozen {
    extents: Vec<(u64, Bytes)>,
}

impl Frozen {
    pub(crate) fn start(&self) -> u64 {
        self.extents.first().map_or(0, |(at, _)| *at)
    }

    pub(crate) fn end(&self) -> u64 {
        self.extents.last().map_or(0, |(at, data)| at + data.len() as u64)
    }

    /// The extents as write requests, as few as may be.
    pub(crate) fn writes(&self, chunk_size: u32) -> Vec<ChunkWrite> {
        let mut writes: Vec<ChunkWrite> = Vec::new();
        let mut bytes = 0;
        for (at, data) in &self.extents {
            let index = (at / u64::from(chunk_size)) as u32;
            let part = ((at % u64::from(chunk_size)) as u32, data.clone());
            bytes += data.len();
            match writes.last_mut() {
                Some(last) if last.index == index && bytes <= WRITE_BYTES && last.parts.len() < MAX_WRITE_PARTS => {
                    last.parts.push(part);
                }
                _ => {
                    bytes = data.len();
                    let parts = vec![part];
                    writes.push(ChunkWrite { index, parts });
                }
            }
        }
        writes
    }

    /// Whether a file of this size gets holes by them.
    pub(crate) fn leave_holes(&self, size: u64) -> bool {
        let mut end = size;
        self.extents.iter().any(|(at, data)| {
            let hole = *at > end;
            end = end.max(at + data.len() as u64);
            hole
        })
    }

    /// The parts of extents that lie in `[offset, end)`, each with its file offset.
    pub(crate) fn parts(&self, offset: u64, end: u64) -> impl Iterator<Item = (u64, Bytes)> {
        // No extent crosses a piece boundary.
        let first = self.extents.partition_point(|(at, _)| *at < offset - offset % PIECE);
        let near = self.extents[first..].iter().take_while(move |(at, _)| *at < end);
        near.filter_map(move |(at, data)| {
            let (from, to) = clip(*at, data.len(), offset, end)?;
            Some((at + from as u64, data.slice(from..to)))
        })
    }
}

/// Which part of an extent lies in `[offset, end)`.
fn clip(at: u64, length: usize, offset: u64, end: u64) -> Option<(usize, usize)> {
    let from = offset.saturating_sub(at) as usize;
    let to = (end.saturating_sub(at) as usize).min(length);
    (from < to).then_some((from, to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, usize, u8),
        Truncate(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        // Around a piece boundary, so that splits and joins happen.
        let near = (PIECE - 64)..(PIECE + 64);
        prop_oneof![
            4 => (near.clone(), 1..40_usize, 1..255_u8).prop_map(|(at, len, byte)| Step::Write(at, len, byte)),
            1 => near.prop_map(Step::Truncate),
        ]
    }

    proptest! {
        #[test]
        fn same_as_an_array(steps in proptest::collection::vec(step(), 1..60)) {
            let base = PIECE - 64;
            let mut extents = Extents::default();
            let mut model = vec![0_u8; 256];
            for step in steps {
                match step {
                    Step::Write(at, len, byte) => {
                        extents.insert(at, &vec![byte; len]);
                        let from = (at - base) as usize;
                        model[from..from + len].fill(byte);
                    }
                    Step::Truncate(size) => {
                        extents.truncate(size);
                        model[(size - base) as usize..].fill(0);
                    }
                }
                let mut got = vec![0; model.len()];
                for (at, part) in extents.parts(base, base + 256) {
                    got[(at - base) as usize..][..part.len()].copy_from_slice(part);
                }
                prop_assert_eq!(&got, &model);
                let held = model.iter().filter(|byte| **byte != 0).count() as u64;
                prop_assert_eq!(extents.bytes(), held);
                let end = model.iter().rposition(|byte| *byte != 0).map_or(0, |last| base + last as u64 + 1);
                prop_assert_eq!(extents.end(), end);
                for (i, byte) in model.iter().enumerate() {
                    let at = base + i as u64;
                    let got: Vec<_> = extents.parts(at, at + 1).collect();
                    let want = [(at, &model[i..=i])];
                    prop_assert_eq!(&got[..], if *byte == 0 { &[] } else { &want[..] });
                }
                let mut previous = None;
                for (at, data) in &extents.map {
                    prop_assert!(!data.is_empty());
                    prop_assert_eq!(at / PIECE, (at + data.len() as u64 - 1) / PIECE);
                    if let Some(end) = previous {
                        prop_assert!(end < *at || at % PIECE == 0, "neighbours are joined");
                    }
                    previous = Some(at + data.len() as u64);
                }
            }
            let mut got = vec![0; model.len()];
            let frozen = extents.freeze();
            for (at, part) in frozen.parts(base, base + 256) {
                got[(at - base) as usize..][..part.len()].copy_from_slice(&part);
            }
            prop_assert_eq!(&got, &model);
            for (i, byte) in model.iter().enumerate() {
                let at = base + i as u64;
                prop_assert_eq!(frozen.parts(at, at + 1).count(), usize::from(*byte != 0));
            }
        }
    }

    #[test]
    fn holes_are_what_lies_between_the_end_of_the_file_and_bytes_beyond() {
        let mut extents = Extents::default();
        extents.insert(10, &[1; 10]);
        extents.insert(PIECE - 1, &[1; 2]);
        let frozen = extents.freeze();
        let holes = |size| frozen.leave_holes(size);
        assert!(holes(0) && holes(9) && holes(10) && holes(PIECE - 2));
        assert!(!holes(PIECE - 1) && !holes(PIECE) && !holes(u64::MAX));
        assert!(!Extents::default().freeze().leave_holes(0));
    }

    #[test]
    fn a_stream_makes_whole_pieces() {
        let mut extents = Extents::default();
        for i in 0..1024_u64 {
            extents.insert(i * 4096, &[1; 4096]);
        }
        let frozen = extents.freeze();
        assert_eq!(frozen.extents.len(), 4);
        assert!(frozen.extents.iter().all(|(_, data)| data.len() as u64 == PIECE));
        assert_eq!((frozen.start(), frozen.end()), (0, 4 << 20));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn writes_are_few_and_bring_everything_to_its_place(
            // Around the ends of chunks, and anywhere.
            near in proptest::collection::vec((1..4_u64, -200..200_i64, 1..300_usize), 0..20),
            anywhere in proptest::collection::vec((0..7 * PIECE, 1..300_000_usize), 0..40),
            small in 0..1500_u64,
        ) {
            let chunk_size = 2 * PIECE as u32;
            let mut extents = Extents::default();
            let mut model = vec![0; 10 * PIECE as usize];
            let near = near.iter().map(|(chunk, off, len)| ((chunk * 2 * PIECE).saturating_add_signed(*off), *len));
            let small = (0..small).map(|i| (8 * PIECE + i * 20, 1));
            for (i, (at, len)) in near.chain(anywhere).chain(small).enumerate() {
                let byte = 1 + (i % 255) as u8;
                extents.insert(at, &vec![byte; len]);
                model[at as usize..at as usize + len].fill(byte);
            }
            let writes = extents.freeze().writes(chunk_size);
            let mut got = vec![0; model.len()];
            for write in &writes {
                let mut free = 0;
                for (offset, data) in &write.parts {
                    prop_assert!(!data.is_empty() && *offset >= free, "in order");
                    free = offset + data.len() as u32;
                    let at = write.index as usize * chunk_size as usize + *offset as usize;
                    got[at..at + data.len()].copy_from_slice(data);
                }
                prop_assert!(free <= chunk_size, "within the chunk");
                let bytes: usize = write.parts.iter().map(|(_, data)| data.len()).sum();
                prop_assert!(bytes <= WRITE_BYTES && write.parts.len() <= MAX_WRITE_PARTS);
            }
            prop_assert!(got == model, "everything is there");
            for pair in writes.windows(2).filter(|pair| pair[0].index == pair[1].index) {
                let bytes: usize = pair[0].parts.iter().map(|(_, data)| data.len()).sum();
                let full = bytes + pair[1].parts[0].1.len() > WRITE_BYTES || pair[0].parts.len() == MAX_WRITE_PARTS;
                prop_assert!(full, "another part would have fitted");
            }
        }
    }
}
