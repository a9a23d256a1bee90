use crate::{InodeId, ReplicaSetId};
use serde::{Deserialize, Serialize};

/// Chunk size where nothing else was asked for, in bytes.
pub const DEFAULT_CHUNK_SIZE: u32 = 4 << 20;

/// How many copies a chunk has, and how many must be durable before a write is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicationPolicy {
    /// Copies of each chunk, 1 to 8.
    pub copies: u32,
    /// Durable copies before the acknowledgement, 1 to `copies`.
    pub ack: u32,
}

impl Default for ReplicationPolicy {
    fn default() -> Self {
        Self { copies: 3, ack: 2 }
    }
}

/// What is wrong with a policy or layout; the message names field and remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// `copies` outside 1 to 8.
    #[error("copies is {0}; use 1 to 8")]
    Copies(u32),
    /// `ack` outside 1 to `copies`.
    #[error("ack is {ack}; use 1 to copies ({copies})")]
    Ack {
        /// As given.
        ack: u32,
        /// As given.
        copies: u32,
    },
    /// Not a power of two from 1 MiB to 64 MiB.
    #[error("chunk size is {0} bytes; use a power of two from 1 MiB to 64 MiB")]
    ChunkSize(u32),
}

impl ReplicationPolicy {
    /// Checks the ranges of both fields.
    pub fn validate(self) -> Result<Self, LayoutError> {
        if !(1..=8).contains(&self.copies) {
            return Err(LayoutError::Copies(self.copies));
        }
        if self.ack < 1 || self.ack > self.copies {
            return Err(LayoutError::Ack {
                ack: self.ack,
                copies: self.copies,
            });
        }
        Ok(self)
    }
}

/// Where a volume's chunks live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes, a power of two.
    pub chunk_size: u32,
    /// The placement table, never empty.
    pub replica_sets: Vec<ReplicaSetId>,
}

impl Layout {
    /// Checks a chunk size.
    pub fn validate_chunk_size(bytes: u32) -> Result<u32, LayoutError> {
        if bytes.is_power_of_two() && (1 << 20..=64 << 20).contains(&bytes) {
            Ok(bytes)
        } else {
            Err(LayoutError::ChunkSize(bytes))
        }
    }

    /// The replica set of chunk `index` of a file with this seed: round-robin over the table.
    pub fn replica_set(&self, seed: u32, index: u32) -> ReplicaSetId {
        let width = self.replica_sets.len() as u64;
        self.replica_sets[((u64::from(seed) + u64::from(index)) % width) as usize]
    }

    /// The seed of a new file where load gives no preference: spreads first chunks over the table.
    pub fn default_seed(ino: InodeId) -> u32 {
        (ino.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
    }

    /// Number of chunks of a file of `size` bytes.
    pub fn chunks(&self, size: u64) -> u32 {
        size.div_ceil(u64::from(self.chunk_size)) as u32
    }
}

/// A part of a byte range that lies within one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkSpan {
    /// The chunk's place in the file.
    pub index: u32,
    /// First byte within the chunk.
    pub offset: u32,
    /// Bytes, never 0.
    pub length: u32,
    /// Where the span starts within the whole range.
    pub start: u64,
}

/// Splits `[offset, offset + length)` of a file at chunk boundaries.
pub fn spans(chunk_size: u32, offset: u64, length: u64) -> impl Iterator<Item = ChunkSpan> {
    let size = u64::from(chunk_size);
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let within = at % size;
        let take = (size - within).min(end - at);
        let span = ChunkSpan {
            index: (at / size) as u32,
            offset: within as u32,
            length: take as u32,
            start: at - offset,
        };
        at += take;
        Some(span)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_cover_the_range() {
        let got: Vec<_> = spans(1 << 20, (1 << 20) - 3, (1 << 20) + 10).collect();
        assert_eq!(got.len(), 3);
        assert_eq!((got[0].index, got[0].offset, got[0].length), (0, (1 << 20) - 3, 3));
        assert_eq!((got[1].index, got[1].offset, got[1].length), (1, 0, 1 << 20));
        assert_eq!((got[2].index, got[2].offset, got[2].length), (2, 0, 7));
        assert_eq!(got[2].start, 3 + (1 << 20));
    }

    #[test]
    fn consecutive_chunks_go_round_robin() {
        let layout = Layout {
            chunk_size: DEFAULT_CHUNK_SIZE,
            replica_sets: (10..14).map(ReplicaSetId).collect(),
        };
        let sets: Vec<_> = (0..5).map(|i| layout.replica_set(u32::MAX, i).0).collect();
        assert_eq!(sets, [13, 10, 11, 12, 13]);
    }

    #[test]
    fn policy_errors_name_field_and_remedy() {
        let error = ReplicationPolicy { copies: 3, ack: 4 }.validate().unwrap_err();
        assert_eq!(error.to_string(), "ack is 4; use 1 to copies (3)");
        assert!(ReplicationPolicy { copies: 0, ack: 0 }.validate().is_err());
    }
}
