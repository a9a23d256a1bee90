//! Between the protocol's messages and the types of this crate.

use super::ReplicationError;
use crate::chunk::{Change, ChunkSummary, Part, Parts};
use lazarette_proto::{MAX_WRITE_PARTS, chunk as pb};
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

pub(super) fn parts_to(parts: &Parts) -> Vec<pb::WritePart> {
    let part = |part: &Part| pb::WritePart {
        offset: part.offset,
        data: part.data.clone(),
        crc: part.crc,
    };
    parts.iter().map(part).collect()
}

pub(super) fn parts_from(parts: Vec<pb::WritePart>) -> Result<Parts, ReplicationError> {
    if parts.len() > MAX_WRITE_PARTS {
        return Err(ReplicationError::Malformed("a write of more than 512 parts"));
    }
    let part = |part: pb::WritePart| Part {
        offset: part.offset,
        data: part.data,
        crc: part.crc,
    };
    Parts::new(parts.into_iter().map(part).collect()).map_err(ReplicationError::Malformed)
}

pub(super) fn change_to(change: &Change) -> Option<pb::apply_request::Change> {
    Some(match change {
        Change::Write(parts) => pb::apply_request::Change::Write(pb::WriteChange { parts: parts_to(parts) }),
        Change::Truncate(length) => pb::apply_request::Change::Truncate(*length),
        Change::Delete => pb::apply_request::Change::Delete(true),
    })
}

pub(super) fn change_from(change: Option<pb::apply_request::Change>) -> Result<Change, ReplicationError> {
    match change {
        Some(pb::apply_request::Change::Write(write)) => Ok(Change::Write(parts_from(write.parts)?)),
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
