use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A volume: one inode namespace with a quota. Never reused in a cluster.
    VolumeId(u64)
);
id!(
    /// An inode of a volume. Never reused in the volume; the root is 1.
    InodeId(u64)
);
id!(
    /// A mounted client, chosen at random by the client.
    SessionId(u64)
);
id!(
    /// An ordered group of storage nodes that hold the same chunks.
    ReplicaSetId(u32)
);

/// A storage node's name: stable over restarts (the pod's name in Kubernetes).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub String);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A fixed-size piece of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId {
    /// The file's volume.
    pub volume: VolumeId,
    /// The file.
    pub ino: InodeId,
    /// The chunk's place in the file: byte offset divided by chunk size.
    pub index: u32,
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.volume, self.ino, self.index)
    }
}

/// A chunk's version. The epoch of the replica set's configuration under which it was written
/// comes first, so versions of a deposed primary never equal those of its successor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// The replica set's epoch at the write.
    pub epoch: u64,
    /// Grows with every change in the replica set, and is never used twice in an epoch.
    pub sequence: u64,
}

impl Version {
    /// The version of a chunk that does not exist.
    pub const NONE: Self = Self { epoch: 0, sequence: 0 };
}
