//! The chunk store: durable, checksummed chunks of this node, each with a version.
//!
//! [`ChunkStore`] is what replication builds on. It knows nothing of epochs, primaries or peers:
//! a change is accepted when it follows the version that is present, and it is durable when the
//! call returns. [`FileChunkStore`] keeps it so through a kill or a power cut at any point;
//! [`MemoryChunkStore`] is for tests of upper layers.

mod error;
mod file;
mod memory;
mod parts;

#[cfg(test)]
mod contract;

pub use error::ChunkError;
pub use file::{CheckError, CheckReport, FileChunkStore, Identity, IdentityError, OpenError, Problem, Stats, check};
pub use memory::MemoryChunkStore;
pub use parts::{Part, Parts};

use async_trait::async_trait;
use bytes::Bytes;
use lazarette_types::{ChunkId, ReplicaSetId, Version, VolumeId};

/// Checksums at rest cover blocks of this many bytes.
pub const BLOCK_SIZE: u32 = 4096;

/// The longest chunk, in bytes: the largest chunk size that a volume can have.
pub const MAX_CHUNK_LENGTH: u32 = 64 << 20;

/// The version under which [`ChunkStore::list`] shows a chunk whose header is unreadable. It is
/// less than every version that was ever written and equal to none, so reconciling replaces it.
pub const DAMAGED: Version = Version {
    epoch: 0,
    sequence: u64::MAX,
};

/// CRC32C (Castagnoli), as on the wire and on disk.
pub fn crc32c(data: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(data)
}

/// One change of one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Puts bytes at one or more offsets. The chunk grows if need be; gaps read as zeros. All
    /// checksums are checked before anything is written.
    Write(Parts),
    /// Cuts the chunk to at most this many bytes; a shorter one keeps its length. At 0 the chunk
    /// stays as an empty one with its version, and one that does not exist is created so: a
    /// tombstone that keeps older copies from coming back.
    Truncate(u32),
    /// Removes the chunk and its version.
    Delete,
}

/// Bytes of a chunk, verified against the checksums at rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// The chunk's version; [`Version::NONE`] if it does not exist.
    pub version: Version,
    /// Shorter than asked for where the chunk ends; what is missing reads as zeros.
    pub data: Bytes,
    /// CRC32C of `data`.
    pub crc: u32,
}

impl Contents {
    /// `data` at `version`, with its checksum computed.
    pub fn new(version: Version, data: Bytes) -> Self {
        let crc = crc32c(&data);
        Self { version, data, crc }
    }
}

/// A chunk in a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkSummary {
    /// Which chunk.
    pub chunk: ChunkId,
    /// Its version, or [`DAMAGED`].
    pub version: Version,
    /// Bytes.
    pub length: u32,
}

/// Space on the store's disk, in bytes. A file system shared with others counts them as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The disk's size.
    pub capacity: u64,
    /// Taken, by whomever.
    pub used: u64,
    /// What the store could still take.
    pub available: u64,
}

/// Durable chunks, kept by replica set and chunk id.
///
/// Every method that changes something returns when the change is durable; if it fails with
/// anything but [`ChunkError::Poisoned`], nothing has changed. Dropping the future of a call does
/// not undo or tear it: the change happens as a whole or not at all. Changes of one chunk are
/// made one after the other, reads see whole changes only.
#[async_trait]
pub trait ChunkStore: Send + Sync + 'static {
    /// Makes one change, which takes the chunk from `previous` (`Version::NONE`: it does not
    /// exist) to `version`, which must be greater. Fails with [`ChunkError::VersionMismatch`] if
    /// another version is present. A change whose `version` is present already succeeds without
    /// doing anything, as does `Delete` of a chunk that does not exist, so a call may be repeated.
    /// `Delete` of a damaged chunk succeeds whatever its version was.
    async fn apply(
        &self,
        rs: ReplicaSetId,
        chunk: ChunkId,
        previous: Version,
        version: Version,
        change: Change,
    ) -> Result<(), ChunkError>;

    /// Reads `[offset, offset + length)`, short at the chunk's end. A chunk that does not exist is
    /// empty.
    async fn read(&self, rs: ReplicaSetId, chunk: ChunkId, offset: u32, length: u32) -> Result<Contents, ChunkError>;

    /// The chunk's version, [`Version::NONE`] if it does not exist.
    async fn version(&self, rs: ReplicaSetId, chunk: ChunkId) -> Result<Version, ChunkError>;

    /// All chunks of a replica set, empty and damaged ones too, ordered by chunk id.
    async fn list(&self, rs: ReplicaSetId) -> Result<Vec<ChunkSummary>, ChunkError>;

    /// A whole chunk.
    async fn fetch(&self, rs: ReplicaSetId, chunk: ChunkId) -> Result<Contents, ChunkError> {
        self.read(rs, chunk, 0, MAX_CHUNK_LENGTH).await
    }

    /// Replaces a whole chunk, whatever version is present, damaged ones too.
    /// [`Version::NONE`] removes it; `data` must be empty then. `crc` is checked first.
    async fn install(
        &self,
        rs: ReplicaSetId,
        chunk: ChunkId,
        version: Version,
        data: Bytes,
        crc: u32,
    ) -> Result<(), ChunkError>;

    /// Removes all chunks of a volume in all replica sets.
    async fn drop_volume(&self, volume: VolumeId) -> Result<(), ChunkError>;

    /// Removes all chunks of a replica set.
    async fn drop_replica_set(&self, rs: ReplicaSetId) -> Result<(), ChunkError>;

    /// The volumes that have chunks here, in order.
    async fn volumes(&self) -> Result<Vec<VolumeId>, ChunkError>;

    /// The replica sets that have chunks here, in order.
    async fn replica_sets(&self) -> Result<Vec<ReplicaSetId>, ChunkError>;

    /// Space on the disk.
    async fn usage(&self) -> Result<Usage, ChunkError>;

    /// An error once the store has failed for good ([`ChunkError::Poisoned`]): the process should
    /// then report itself unhealthy, give up its lease and be restarted.
    fn health(&self) -> Result<(), ChunkError>;
}

/// What [`ChunkStore::apply`] must do about the versions of a change.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Make the change.
    Apply,
    /// It was made before.
    Repeated,
}

/// The checks of [`ChunkStore::apply`] that need nothing but the present version; `damaged` if
/// that is unknown.
fn admit(
    chunk: ChunkId,
    present: Version,
    damaged: bool,
    previous: Version,
    version: Version,
    change: &Change,
) -> Result<Step, ChunkError> {
    if version <= previous || version == DAMAGED {
        return Err(ChunkError::InvalidChange {
            chunk,
            reason: "its version does not follow the previous one",
        });
    }
    match change {
        Change::Write(parts) => check_parts(chunk, parts)?,
        Change::Truncate(length) if *length > MAX_CHUNK_LENGTH => {
            return Err(ChunkError::InvalidChange {
                chunk,
                reason: "it ends beyond the longest chunk of 64 MiB",
            });
        }
        Change::Truncate(_) => {}
        Change::Delete if damaged => return Ok(Step::Apply),
        Change::Delete if present == Version::NONE => return Ok(Step::Repeated),
        Change::Delete => {}
    }
    if damaged {
        return Err(ChunkError::Corrupt {
            chunk,
            reason: "its header is damaged".into(),
        });
    }
    if present == version {
        return Ok(Step::Repeated);
    }
    if present != previous {
        return Err(ChunkError::VersionMismatch { chunk, present });
    }
    Ok(Step::Apply)
}

/// The checks of [`ChunkStore::install`].
fn admit_install(chunk: ChunkId, version: Version, data: &[u8], crc: u32) -> Result<(), ChunkError> {
    let reason = if data.len() > MAX_CHUNK_LENGTH as usize {
        "it ends beyond the longest chunk of 64 MiB"
    } else if version == Version::NONE && !data.is_empty() {
        "data without a version"
    } else if version == DAMAGED {
        "a version that marks damage"
    } else {
        return check_crc(chunk, data, crc);
    };
    Err(ChunkError::InvalidChange { chunk, reason })
}

/// Whether all parts of a write have the checksums that were sent with them.
pub(crate) fn check_parts(chunk: ChunkId, parts: &Parts) -> Result<(), ChunkError> {
    parts.iter().try_for_each(|part| check_crc(chunk, &part.data, part.crc))
}

fn check_crc(chunk: ChunkId, data: &[u8], expected: u32) -> Result<(), ChunkError> {
    let found = crc32c(data);
    if found == expected {
        Ok(())
    } else {
        Err(ChunkError::DamagedInTransit { chunk, expected, found })
    }
}
