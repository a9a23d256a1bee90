use lazarette_types::{NodeId, ReplicaSetId, ReplicationPolicy, VolumeId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;

/// Version of the JSON records' format.
const FORMAT: u32 = 1;

/// A record in etcd could not be read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RecordError {
    /// Not the JSON of this record.
    #[error("record is damaged: {0}")]
    Damaged(String),
    /// Written by a newer version.
    #[error("record has format {0}, this version reads up to {FORMAT}: upgrade first")]
    TooNew(u32),
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    format: u32,
    #[serde(flatten)]
    record: T,
}

/// The stored form of a record: JSON with its format version.
pub fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    serde_json::to_vec(&Envelope { format: FORMAT, record }).unwrap_or_default()
}

/// Reads a stored record.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, RecordError> {
    let envelope: Envelope<T> = serde_json::from_slice(bytes).map_err(|e| RecordError::Damaged(e.to_string()))?;
    if envelope.format > FORMAT {
        return Err(RecordError::TooNew(envelope.format));
    }
    Ok(envelope.record)
}

/// The cluster's identity and its counters, made by the first storage node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// Random; also on every disk, so that a foreign disk is noticed.
    pub id: String,
    /// The id that the next volume gets.
    pub next_volume: u64,
    /// The id that the next replica set gets.
    pub next_replica_set: u32,
}

/// Who coordinates membership, placement and repair; leased.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoordinatorRecord {
    /// The elected node.
    pub node: NodeId,
}

/// A storage node, also while it is away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// The identity of the node's disk. Another disk means that its data is gone.
    pub disk: String,
    /// Copies of one chunk are spread over failure domains.
    pub failure_domain: String,
    /// It is to leave: its copies move to other nodes, and it owns no metadata.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
}

/// What a storage node does in the background, as it last reported. Not leased: scrubbing goes on
/// from here after a restart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActivityRecord {
    /// The disk that this is about.
    pub disk: String,
    /// Chunks and bytes that the node still has to copy to others.
    pub repair_chunks: u64,
    /// See `repair_chunks`.
    pub repair_bytes: u64,
    /// How far scrubbing is.
    pub scrub: ScrubRecord,
}

/// How far a node's scrubbing is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubRecord {
    /// Replica sets below this are done in the present pass.
    pub next: Option<ReplicaSetId>,
    /// Bytes verified in the present pass.
    pub verified_bytes: u64,
    /// Bytes of all copies when the pass began.
    pub total_bytes: u64,
    /// When the present pass began, in seconds since 1970.
    pub began: u64,
    /// When the last complete pass ended, in seconds since 1970; 0 if none has.
    pub last_pass: u64,
    /// Chunks found damaged or different since the process started.
    pub found: u64,
    /// Those that were replaced by a good copy.
    pub repaired: u64,
    /// Those without a good copy in sync.
    pub lost: u64,
}

/// A running storage node; leased.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LivenessRecord {
    /// `host:port` of its gRPC services.
    pub address: String,
    /// The lease that this hangs on. The node's next process, once it holds the disk's lock,
    /// revokes it instead of waiting for its end.
    pub lease: i64,
    /// Size of the disk in bytes.
    pub capacity_bytes: u64,
    /// Bytes of it in use.
    pub used_bytes: u64,
}

/// Who owns a shard; leased.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerRecord {
    /// The owner.
    pub node: NodeId,
    /// `host:port` of its gRPC services.
    pub address: String,
    /// The shard's epoch under this owner.
    pub epoch: u64,
}

/// What a volume holds; leased, reported by its owner every few seconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageRecord {
    /// Bytes counted against the quota.
    pub used_bytes: u64,
    /// Inodes, the root included.
    pub used_inodes: u64,
    /// Mounted clients.
    pub sessions: u32,
}

/// A shard's configuration; outlives owners.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRecord {
    /// Raised by every claim.
    pub epoch: u64,
    /// Journal records up to this number are folded into pages and deleted.
    pub checkpoint: u64,
}

/// Whether a volume is there to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeState {
    /// In use.
    Ready,
    /// Deleted by its user; its metadata and chunks are being dropped.
    Deleting,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Never reused.
    pub id: VolumeId,
    /// Unique in the cluster.
    pub name: String,
    /// Quota in bytes.
    pub size: u64,
    /// Copies and acknowledgement.
    pub replication: ReplicationPolicy,
    /// Bytes.
    pub chunk_size: u32,
    /// The placement table; never empty.
    pub replica_sets: Vec<ReplicaSetId>,
    /// From the creator.
    pub labels: BTreeMap<String, String>,
    /// See [`VolumeState`].
    pub state: VolumeState,
}

/// A replica set's configuration: the single truth about who may serve its chunks. Changed by
/// compare-and-swap only, each time with a raised epoch (PacificA), except that the coordinator may
/// exchange `members` alone: they say who shall hold the copies, `in_sync` who does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaSetRecord {
    /// The set.
    pub id: ReplicaSetId,
    /// Version of this configuration.
    pub epoch: u64,
    /// Copies wanted and acknowledgement.
    pub replication: ReplicationPolicy,
    /// The nodes that shall hold the copies; the first is the preferred primary.
    pub members: Vec<NodeId>,
    /// Those nodes that hold every acknowledged write, or, while `recovering`, hold together
    /// every acknowledged write. One that is not among `members` leaves when all of these are.
    pub in_sync: Vec<NodeId>,
    /// Orders the writes. One of `in_sync`.
    pub primary: NodeId,
    /// The primary has not yet reconciled the in-sync members after a change of primary. It
    /// serves nothing until all of them agree; then it clears this.
    pub recovering: bool,
    /// While `recovering`: any so many of `in_sync` hold together every acknowledged write, so
    /// others may be given up. 0 otherwise.
    #[serde(default)]
    pub recovery_quorum: u32,
}

impl ReplicaSetRecord {
    /// Whether a node shall hold the copies, or holds some that count.
    pub fn involves(&self, node: &NodeId) -> bool {
        self.members.contains(node) || self.in_sync.contains(node)
    }

    /// Whether the members that hold the copies are those that shall.
    pub fn settled(&self) -> bool {
        self.lacking().next().is_none() && self.leaving().next().is_none()
    }

    /// Members that do not hold the copies yet.
    pub fn lacking(&self) -> impl Iterator<Item = &NodeId> {
        self.members.iter().filter(|node| !self.in_sync.contains(node))
    }

    /// Nodes in sync that shall not hold the copies any more.
    pub fn leaving(&self) -> impl Iterator<Item = &NodeId> {
        self.in_sync.iter().filter(|node| !self.members.contains(node))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip_and_reject_what_they_cannot_read() {
        let record = ShardRecord {
            epoch: 3,
            checkpoint: 9,
        };
        let bytes = encode(&record);
        assert_eq!(bytes, br#"{"format":1,"epoch":3,"checkpoint":9}"#);
        assert_eq!(decode::<ShardRecord>(&bytes).unwrap(), record);
        let newer = br#"{"format":2,"epoch":3,"checkpoint":9}"#;
        assert!(matches!(decode::<ShardRecord>(newer), Err(RecordError::TooNew(2))));
        assert!(matches!(decode::<ShardRecord>(b"x"), Err(RecordError::Damaged(_))));
    }
}
