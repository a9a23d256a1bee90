use super::MAX_CHUNK_LENGTH;
use bytes::Bytes;
use std::ops::Deref;
use std::sync::Arc;

/// Bytes at a place in a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// First byte, counted from the chunk's start.
    pub offset: u32,
    /// Not empty in [`Parts`].
    pub data: Bytes,
    /// CRC32C of `data`, as whoever sent it has computed it.
    pub crc: u32,
}

impl Part {
    /// One past the last byte.
    pub fn end(&self) -> u32 {
        self.offset + self.data.len() as u32
    }
}

/// What one write puts into a chunk, all of it or nothing: at least one part, none empty, in the order of
/// their offsets, not overlapping, within [`MAX_CHUNK_LENGTH`]. Clones share it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parts(Arc<[Part]>);

impl Parts {
    /// Takes parts, or says what is wrong with them. Their checksums are not looked at.
    pub fn new(parts: Vec<Part>) -> Result<Self, &'static str> {
        if parts.is_empty() || parts.iter().any(|part| part.data.is_empty()) {
            return Err("a write without data");
        }
        let mut free = 0;
        for part in &parts {
            if u64::from(part.offset) < free {
                return Err("its parts overlap or are not in order");
            }
            free = u64::from(part.offset) + part.data.len() as u64;
            if free > u64::from(MAX_CHUNK_LENGTH) {
                return Err("it ends beyond the longest chunk of 64 MiB");
            }
        }
        Ok(Self(parts.into()))
    }

    /// One past the last byte of all.
    pub fn end(&self) -> u32 {
        self.last().map_or(0, Part::end)
    }

    /// Bytes in all.
    pub fn bytes(&self) -> usize {
        self.iter().map(|part| part.data.len()).sum()
    }

    /// Whether there are no gaps between them.
    pub(crate) fn touch(&self) -> bool {
        self.windows(2).all(|pair| pair[0].end() == pair[1].offset)
    }
}

impl Deref for Parts {
    type Target = [Part];

    fn deref(&self) -> &[Part] {
        &self.0
    }
}

#[cfg(test)]
impl super::Change {
    /// A write of bytes at offsets, with their checksums.
    pub(crate) fn write<D: Into<Bytes>>(parts: impl IntoIterator<Item = (u32, D)>) -> Self {
        let part = |(offset, data): (u32, D)| {
            let data = data.into();
            let crc = super::crc32c(&data);
            Part { offset, data, crc }
        };
        Self::Write(Parts::new(parts.into_iter().map(part).collect()).unwrap())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(list: &[(u32, usize)]) -> Result<Parts, &'static str> {
        let part = |&(offset, length): &(u32, usize)| Part {
            offset,
            data: vec![1; length].into(),
            crc: 0,
        };
        Parts::new(list.iter().map(part).collect())
    }

    #[test]
    fn only_ordered_parts_with_data_within_a_chunk() {
        let max = MAX_CHUNK_LENGTH;
        for bad in [&[][..], &[(5, 0)], &[(0, 1), (1, 0)]] {
            assert_eq!(parts(bad), Err("a write without data"), "{bad:?}");
        }
        for bad in [&[(5, 2), (6, 1)][..], &[(5, 1), (5, 1)], &[(5, 1), (0, 1)]] {
            assert_eq!(parts(bad), Err("its parts overlap or are not in order"), "{bad:?}");
        }
        for bad in [&[(max, 1)][..], &[(u32::MAX, 9)], &[(0, 1), (max - 1, 2)]] {
            assert_eq!(parts(bad), Err("it ends beyond the longest chunk of 64 MiB"), "{bad:?}");
        }
        let apart = parts(&[(0, 2), (3, 4), (max - 1, 1)]).unwrap();
        assert_eq!((apart.end(), apart.bytes(), apart.touch()), (max, 7, false));
        let touching = parts(&[(7, 2), (9, 4)]).unwrap();
        assert_eq!((touching.end(), touching.bytes(), touching.touch()), (13, 6, true));
    }
}
