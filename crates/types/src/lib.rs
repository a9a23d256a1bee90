//! Identifiers, layout and error codes shared by all parts. No I/O.

mod error;
mod ids;
mod layout;

pub use error::ErrorCode;
pub use ids::{ChunkId, InodeId, NodeId, ReplicaSetId, SessionId, Version, VolumeId};
pub use layout::{ChunkSpan, DEFAULT_CHUNK_SIZE, Layout, LayoutError, ReplicationPolicy, spans};

/// The inode number of every volume's root directory.
pub const ROOT_INODE: InodeId = InodeId(1);

/// Longest name of a directory entry, in bytes (POSIX NAME_MAX).
pub const NAME_MAX: usize = 255;

/// Largest file size, in bytes.
pub const FILE_SIZE_MAX: u64 = 16 << 40;
