//! Between the protocol's messages and the types of this crate.

use super::ReplicationError;
use crate::chunk::{Change, ChunkSummary};
use lazarette_proto::chunk as pb;
use lazarette_types::{ChunkId, InodeId, Version, VolumeId};

pub(super) fn chunk_to(chunk: ChunkId) -> Option<pb::ChunkId> {
    Some(pb::ChunkId {
        volume: chunk.volume.0,
        ino: chunk.ino.0,
        index: chunk.index,
    })
}

pub(super) fn chunk_from(chunk: Option<pb::ChunkId>) -> Result<ChunkId, ReplicationError> {
    let chunk = chunk.ok_or(ReplicationError::Malformed("chunk is missing"))?;
    if chunk.volume == 0 || chunk.ino == 0 {
        return Err(ReplicationError::Malformed("chunk names volume 0 or inode 0"));
    }
    Ok(ChunkId {
        volume: VolumeId(chunk.volume),
        ino: InodeId(chunk.ino),
        index: chunk.index,
    })
}

pub(super) fn version_to(version: Version) -> Option<pb::Version> {
    Some(pb::Version {
        epoch: version.epoch,
        sequence: version.sequence,
    })
}

/// A message that is absent is the zero version.
pub(super) fn version_from(version: Option<pb::Version>) -> Version {
    version.map_or(Version::NONE, |v| Version {
        epoch: v.epoch,
        sequence: v.sequence,
    })
}

pub(super) fn change_to(change: &Change) -> Option<pb::apply_request::Change> {
    Some(match change {
        Change::Write { offset, data, crc } => pb::apply_request::Change::Write(pb::WriteChange {
            offset: *offset,
            data: data.clone(),
            crc: *crc,
        }),
        Change::Truncate(length) => pb::apply_request::Change::Truncate(*length),
        Change::Delete => pb::apply_request::Change::Delete(true),
    })
}

pub(super) fn change_from(change: Option<pb::apply_request::Change>) -> Result<Change, ReplicationError> {
    match change {
        Some(pb::apply_request::Change::Write(write)) => Ok(Change::Write {
            offset: write.offset,
            data: write.data,
            crc: write.crc,
        }),
        Some(pb::apply_request::Change::Truncate(length)) => Ok(Change::Truncate(length)),
        Some(pb::apply_request::Change::Delete(true)) => Ok(Change::Delete),
        Some(pb::apply_request::Change::Delete(false)) | None => Err(ReplicationError::Malformed("change is missing")),
    }
}

pub(super) fn summary_to(summary: &ChunkSummary) -> pb::ChunkSummary {
    pb::ChunkSummary {
        chunk: chunk_to(summary.chunk),
        version: version_to(summary.version),
        length: summary.length,
    }
}

pub(super) fn summary_from(summary: pb::ChunkSummary) -> Result<ChunkSummary, ReplicationError> {
    Ok(ChunkSummary {
        chunk: chunk_from(summary.chunk)?,
        version: version_from(summary.version),
        length: summary.length,
    })
}
