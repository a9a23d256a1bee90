//! What the log holds: redo records of whole blocks, so that applying one twice, or over a file
//! that a crash left half written, gives the same result. See `docs/formats.md`.

use super::format::{FileId, Key, blocks};
use crate::chunk::{BLOCK_SIZE, MAX_CHUNK_LENGTH};
use bytes::{Buf, BufMut, Bytes};
use lazarette_types::{ChunkId, InodeId, ReplicaSetId, Version, VolumeId};

/// Where a changed block is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Block {
    /// In the record, as a whole.
    Image(Bytes),
    /// In the chunk file already, with this entry for the checksum table.
    InFile(u32),
}

/// A change of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ChangeRecord {
    pub(super) key: Key,
    pub(super) version: Version,
    /// Bytes, after the change.
    pub(super) length: u32,
    /// Bytes, before the change.
    pub(super) previous_length: u32,
    pub(super) file: FileId,
    /// The change makes the file: nothing of earlier ones counts.
    pub(super) fresh: bool,
    /// Changed blocks, ascending.
    pub(super) blocks: Vec<(u32, Block)>,
}

/// A file takes the place of whatever the chunk was. The file is complete and durable, in the
/// staging folder or in its final place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ReplaceRecord {
    pub(super) key: Key,
    pub(super) version: Version,
    pub(super) length: u32,
    pub(super) file: FileId,
}

/// A redo record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Record {
    Change(ChangeRecord),
    Replace(ReplaceRecord),
    /// The chunk is gone, with its files of numbers below this.
    Remove {
        key: Key,
        below: FileId,
    },
    /// The volume's chunks are gone, with their files of numbers below this.
    DropVolume {
        volume: VolumeId,
        below: FileId,
    },
    /// The replica set's chunks are gone, with their files of numbers below this.
    DropReplicaSet {
        rs: ReplicaSetId,
        below: FileId,
    },
}

const CHANGE: u8 = 1;
const REPLACE: u8 = 2;
const REMOVE: u8 = 3;
const DROP_VOLUME: u8 = 4;
const DROP_REPLICA_SET: u8 = 5;

const IMAGE: u8 = 1;
const IN_FILE: u8 = 2;

/// Bytes of a record without its blocks, rounded up.
pub(super) const RECORD_OVERHEAD: u64 = 128;
/// Bytes of a block in a record beside its image, rounded up.
pub(super) const BLOCK_OVERHEAD: u64 = 16;

/// A key in a record.
const KEY_BYTES: usize = 24;

fn put_key(out: &mut Vec<u8>, (rs, chunk): Key) {
    out.put_u32_le(rs.0);
    out.put_u64_le(chunk.volume.0);
    out.put_u64_le(chunk.ino.0);
    out.put_u32_le(chunk.index);
}

fn put_version(out: &mut Vec<u8>, version: Version) {
    out.put_u64_le(version.epoch);
    out.put_u64_le(version.sequence);
}

impl Record {
    /// Bytes that [`encode`](Self::encode) adds.
    pub(super) fn encoded_len(&self) -> usize {
        let blocks = match self {
            Self::Change(change) => &change.blocks[..],
            Self::Replace(_) => return 1 + KEY_BYTES + 16 + 4 + 8,
            Self::Remove { .. } => return 1 + KEY_BYTES + 8,
            Self::DropVolume { .. } => return 1 + 8 + 8,
            Self::DropReplicaSet { .. } => return 1 + 4 + 8,
        };
        let block = |(_, block): &(u32, Block)| match block {
            Block::Image(image) => 5 + image.len(),
            Block::InFile(_) => 5 + 4,
        };
        1 + KEY_BYTES + 16 + 4 + 4 + 8 + 1 + 4 + blocks.iter().map(block).sum::<usize>()
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Change(change) => {
                out.put_u8(CHANGE);
                put_key(out, change.key);
                put_version(out, change.version);
                out.put_u32_le(change.length);
                out.put_u32_le(change.previous_length);
                out.put_u64_le(change.file);
                out.put_u8(u8::from(change.fresh));
                out.put_u32_le(change.blocks.len() as u32);
                for (index, block) in &change.blocks {
                    out.put_u32_le(*index);
                    match block {
                        Block::Image(image) => {
                            out.put_u8(IMAGE);
                            out.put_slice(image);
                        }
                        Block::InFile(sum) => {
                            out.put_u8(IN_FILE);
                            out.put_u32_le(*sum);
                        }
                    }
                }
            }
            Self::Replace(replace) => {
                out.put_u8(REPLACE);
                put_key(out, replace.key);
                put_version(out, replace.version);
                out.put_u32_le(replace.length);
                out.put_u64_le(replace.file);
            }
            Self::Remove { key, below } => {
                out.put_u8(REMOVE);
                put_key(out, *key);
                out.put_u64_le(*below);
            }
            Self::DropVolume { volume, below } => {
                out.put_u8(DROP_VOLUME);
                out.put_u64_le(volume.0);
                out.put_u64_le(*below);
            }
            Self::DropReplicaSet { rs, below } => {
                out.put_u8(DROP_REPLICA_SET);
                out.put_u32_le(rs.0);
                out.put_u64_le(*below);
            }
        }
    }

    /// Reads one record, or says what is wrong. Images share the memory of `bytes`.
    pub(super) fn decode(bytes: Bytes) -> Result<Self, String> {
        let mut reader = Reader(bytes);
        let record = reader.record()?;
        if reader.0.is_empty() {
            Ok(record)
        } else {
            Err("bytes after its end".into())
        }
    }

    /// The greatest file number that the record knows of.
    pub(super) fn file(&self) -> FileId {
        match self {
            Self::Change(change) => change.file,
            Self::Replace(replace) => replace.file,
            Self::Remove { below, .. } | Self::DropVolume { below, .. } | Self::DropReplicaSet { below, .. } => *below,
        }
    }
}

struct Reader(Bytes);

impl Reader {
    fn take(&mut self, length: usize) -> Result<Bytes, String> {
        if self.0.len() < length {
            return Err("it ends too early".into());
        }
        Ok(self.0.split_to(length))
    }

    fn u8(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?.get_u8())
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(self.take(4)?.get_u32_le())
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(self.take(8)?.get_u64_le())
    }

    fn key(&mut self) -> Result<Key, String> {
        Ok((
            ReplicaSetId(self.u32()?),
            ChunkId {
                volume: VolumeId(self.u64()?),
                ino: InodeId(self.u64()?),
                index: self.u32()?,
            },
        ))
    }

    fn version(&mut self) -> Result<Version, String> {
        Ok(Version {
            epoch: self.u64()?,
            sequence: self.u64()?,
        })
    }

    fn length(&mut self) -> Result<u32, String> {
        let length = self.u32()?;
        if length > MAX_CHUNK_LENGTH {
            return Err(format!("a chunk of {length} bytes"));
        }
        Ok(length)
    }

    fn record(&mut self) -> Result<Record, String> {
        Ok(match self.u8()? {
            CHANGE => Record::Change(self.change()?),
            REPLACE => Record::Replace(ReplaceRecord {
                key: self.key()?,
                version: self.version()?,
                length: self.length()?,
                file: self.u64()?,
            }),
            REMOVE => Record::Remove {
                key: self.key()?,
                below: self.u64()?,
            },
            DROP_VOLUME => Record::DropVolume {
                volume: VolumeId(self.u64()?),
                below: self.u64()?,
            },
            DROP_REPLICA_SET => Record::DropReplicaSet {
                rs: ReplicaSetId(self.u32()?),
                below: self.u64()?,
            },
            kind => return Err(format!("unknown kind {kind}")),
        })
    }

    fn change(&mut self) -> Result<ChangeRecord, String> {
        let key = self.key()?;
        let version = self.version()?;
        let length = self.length()?;
        let previous_length = self.length()?;
        let file = self.u64()?;
        let fresh = match self.u8()? {
            0 => false,
            1 => true,
            flags => return Err(format!("unknown flags {flags}")),
        };
        let count = self.u32()?;
        if count > blocks(length) {
            return Err(format!("{count} blocks in a chunk of {length} bytes"));
        }
        let mut list = Vec::with_capacity(count as usize);
        let mut next = 0;
        for _ in 0..count {
            let index = self.u32()?;
            if index < next || index >= blocks(length) {
                return Err(format!("block {index} out of order or beyond the end"));
            }
            next = index + 1;
            let block = match self.u8()? {
                IMAGE => Block::Image(self.take(BLOCK_SIZE as usize)?),
                IN_FILE => Block::InFile(self.u32()?),
                kind => return Err(format!("unknown kind of block {kind}")),
            };
            list.push((index, block));
        }
        Ok(ChangeRecord {
            key,
            version,
            length,
            previous_length,
            file,
            fresh,
            blocks: list,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> impl Strategy<Value = Key> {
        any::<(u32, u64, u64, u32)>().prop_map(|(rs, volume, ino, index)| {
            let chunk = ChunkId {
                volume: VolumeId(volume),
                ino: InodeId(ino),
                index,
            };
            (ReplicaSetId(rs), chunk)
        })
    }

    fn version() -> impl Strategy<Value = Version> {
        any::<(u64, u64)>().prop_map(|(epoch, sequence)| Version { epoch, sequence })
    }

    fn block() -> impl Strategy<Value = Block> {
        prop_oneof![
            any::<u8>().prop_map(|b| Block::Image(vec![b; BLOCK_SIZE as usize].into())),
            any::<u32>().prop_map(Block::InFile),
        ]
    }

    fn change() -> impl Strategy<Value = Record> {
        let length = 0..=MAX_CHUNK_LENGTH;
        let list = proptest::collection::btree_map(0..50u32, block(), 0..6);
        (key(), version(), length.clone(), length, any::<(u64, bool)>(), list).prop_map(
            |(key, version, length, previous_length, (file, fresh), list)| {
                Record::Change(ChangeRecord {
                    key,
                    version,
                    length,
                    previous_length,
                    file,
                    fresh,
                    blocks: list.into_iter().filter(|(b, _)| *b < blocks(length)).collect(),
                })
            },
        )
    }

    fn record() -> impl Strategy<Value = Record> {
        prop_oneof![
            change(),
            (key(), version(), 0..=MAX_CHUNK_LENGTH, any::<u64>()).prop_map(|(key, version, length, file)| {
                Record::Replace(ReplaceRecord {
                    key,
                    version,
                    length,
                    file,
                })
            }),
            (key(), any::<u64>()).prop_map(|(key, below)| Record::Remove { key, below }),
            any::<(u64, u64)>().prop_map(|(v, below)| Record::DropVolume {
                volume: VolumeId(v),
                below
            }),
            any::<(u32, u64)>().prop_map(|(rs, below)| Record::DropReplicaSet {
                rs: ReplicaSetId(rs),
                below
            }),
        ]
    }

    proptest! {
        #[test]
        fn records_round_trip(record in record(), cut: prop::sample::Index) {
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            prop_assert_eq!(record.encoded_len(), bytes.len());
            prop_assert_eq!(Record::decode(bytes.clone().into()), Ok(record));
            let cut = cut.index(bytes.len());
            prop_assert!(Record::decode(bytes[..cut].to_vec().into()).is_err());
        }

        #[test]
        fn garbage_is_refused_or_read_but_never_a_panic(bytes: Vec<u8>) {
            let _ = Record::decode(bytes.into());
        }
    }
}
