//! The chunk file: names and header. See `docs/formats.md`.

use crate::chunk::{BLOCK_SIZE, MAX_CHUNK_LENGTH, crc32c};
use bytes::{Buf, BufMut};
use lazarette_types::{ChunkId, InodeId, ReplicaSetId, Version, VolumeId};
use std::sync::LazyLock;

/// A chunk of a replica set: what the store is keyed by.
pub(super) type Key = (ReplicaSetId, ChunkId);

/// Number of a chunk file, never used twice in a store.
pub(super) type FileId = u64;

/// Folder of the chunk files.
pub(super) const CHUNKS: &str = "chunks";
/// Folder of files that a log record has yet to make valid.
pub(super) const STAGING: &str = "staging";
/// Folder of what is being removed.
pub(super) const TRASH: &str = "trash";

/// The newest format that this version reads, and the one that it writes.
pub(super) const FORMAT: u32 = 1;

/// Length of the fixed part of a chunk file's header; the checksum table follows.
pub(super) const HEADER_BYTES: usize = 64;

const MAGIC: &[u8; 8] = b"LZCHUNK\0";
const MAX_BLOCKS: usize = (MAX_CHUNK_LENGTH / BLOCK_SIZE) as usize;

/// Where the data starts in a chunk file: after the header and the largest checksum table. What
/// the table does not use is a hole.
pub(super) const DATA_START: u64 = ((HEADER_BYTES + MAX_BLOCKS * 4) as u64).next_multiple_of(BLOCK_SIZE as u64);

static ZERO_CRC: LazyLock<u32> = LazyLock::new(|| crc32c(&[0; BLOCK_SIZE as usize]));

/// Number of blocks of a chunk of this length.
pub(super) fn blocks(length: u32) -> u32 {
    length.div_ceil(BLOCK_SIZE)
}

/// Where a block starts in a chunk file.
pub(super) fn block_offset(block: u32) -> u64 {
    DATA_START + u64::from(block) * u64::from(BLOCK_SIZE)
}

/// Where the block's entry in the checksum table starts in a chunk file.
pub(super) fn table_offset(block: u32) -> u64 {
    HEADER_BYTES as u64 + u64::from(block) * 4
}

/// A block's entry in the checksum table: its CRC32C, as the difference from that of a block of
/// zeros, so that a hole in data and table verifies.
pub(super) fn block_sum(block: &[u8]) -> u32 {
    crc32c(block) ^ *ZERO_CRC
}

/// The fixed part of a chunk file's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) rs: ReplicaSetId,
    pub(super) chunk: ChunkId,
    pub(super) version: Version,
    pub(super) length: u32,
}

impl Header {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.put_slice(MAGIC);
        out.put_u32_le(FORMAT);
        out.put_u32_le(self.rs.0);
        out.put_u64_le(self.chunk.volume.0);
        out.put_u64_le(self.chunk.ino.0);
        out.put_u32_le(self.chunk.index);
        out.put_u32_le(self.length);
        out.put_u64_le(self.version.epoch);
        out.put_u64_le(self.version.sequence);
        out.put_u32_le(0);
        let crc = crc32c(&out[start..]);
        out.put_u32_le(crc);
    }

    /// Reads a header, or says what is wrong with it.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let Some(mut bytes) = bytes.get(..HEADER_BYTES) else {
            return Err("its header is missing".into());
        };
        if &bytes[..8] != MAGIC {
            return Err("its header does not start with the magic number".into());
        }
        let found = u32::from_le_bytes([bytes[60], bytes[61], bytes[62], bytes[63]]);
        if crc32c(&bytes[..60]) != found {
            return Err("its header fails its checksum".into());
        }
        bytes.advance(8);
        let format = bytes.get_u32_le();
        if format > FORMAT {
            return Err(format!(
                "its header is of format {format}, this version reads up to {FORMAT}"
            ));
        }
        let rs = ReplicaSetId(bytes.get_u32_le());
        let chunk = ChunkId {
            volume: VolumeId(bytes.get_u64_le()),
            ino: InodeId(bytes.get_u64_le()),
            index: bytes.get_u32_le(),
        };
        let length = bytes.get_u32_le();
        if length > MAX_CHUNK_LENGTH {
            return Err(format!("its header gives a length of {length} bytes"));
        }
        let version = Version {
            epoch: bytes.get_u64_le(),
            sequence: bytes.get_u64_le(),
        };
        Ok(Self {
            rs,
            chunk,
            version,
            length,
        })
    }
}

/// The folder of a replica set.
pub(super) fn set_dir(rs: ReplicaSetId) -> String {
    format!("{CHUNKS}/{:08x}", rs.0)
}

/// The folder of a volume's chunks in a replica set.
pub(super) fn volume_dir(rs: ReplicaSetId, volume: VolumeId) -> String {
    format!("{CHUNKS}/{:08x}/{:016x}", rs.0, volume.0)
}

/// What [`volume_dir`] gave a path for.
pub(super) fn parse_volume_dir(path: &str) -> Option<(ReplicaSetId, VolumeId)> {
    let (set, volume) = path.strip_prefix(CHUNKS)?.strip_prefix('/')?.split_once('/')?;
    let set = u32::try_from(parse_hex(set, 8)?).ok()?;
    Some((ReplicaSetId(set), VolumeId(parse_hex(volume, 16)?)))
}

/// The path of a chunk file.
pub(super) fn chunk_path((rs, chunk): Key, file: FileId) -> String {
    format!(
        "{}/{:016x}-{:08x}.{file:016x}",
        volume_dir(rs, chunk.volume),
        chunk.ino.0,
        chunk.index
    )
}

/// The path of a file that is not valid yet.
pub(super) fn staging_path(file: FileId) -> String {
    format!("{STAGING}/{file:016x}")
}

/// Reads a number of exactly `digits` hexadecimal digits.
pub(super) fn parse_hex(text: &str, digits: usize) -> Option<u64> {
    let lower = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    if text.len() != digits || !text.chars().all(lower) {
        return None;
    }
    u64::from_str_radix(text, 16).ok()
}

/// Inode, index and number of a chunk file's name.
pub(super) fn parse_chunk_name(name: &str) -> Option<(InodeId, u32, FileId)> {
    let (ino, rest) = name.split_once('-')?;
    let (index, file) = rest.split_once('.')?;
    Some((
        InodeId(parse_hex(ino, 16)?),
        u32::try_from(parse_hex(index, 8)?).ok()?,
        parse_hex(file, 16)?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_and_names_round_trip(
            ids: (u32, u64, u64, u32), version: (u64, u64), length in 0..=MAX_CHUNK_LENGTH, file: u64,
            flip in 0..HEADER_BYTES * 8,
        ) {
            let chunk = ChunkId { volume: VolumeId(ids.1), ino: InodeId(ids.2), index: ids.3 };
            let header = Header {
                rs: ReplicaSetId(ids.0),
                chunk,
                version: Version { epoch: version.0, sequence: version.1 },
                length,
            };
            let mut bytes = Vec::new();
            header.encode(&mut bytes);
            prop_assert_eq!(bytes.len(), HEADER_BYTES);
            prop_assert_eq!(Header::decode(&bytes), Ok(header));
            bytes[flip / 8] ^= 1 << (flip % 8);
            prop_assert!(Header::decode(&bytes).is_err());
            let path = chunk_path((header.rs, chunk), file);
            let name = path.rsplit('/').next().unwrap();
            prop_assert_eq!(parse_chunk_name(name), Some((chunk.ino, chunk.index, file)));
        }
    }

    #[test]
    fn a_hole_verifies() {
        assert_eq!(block_sum(&[0; BLOCK_SIZE as usize]), 0);
        assert_eq!(DATA_START % u64::from(BLOCK_SIZE), 0);
        assert!(Header::decode(&[]).is_err() && Header::decode(&[0; 64]).is_err());
    }
}
