use lazarette_types::{ChunkId, ErrorCode, Version};

/// Why a call on a [`ChunkStore`](super::ChunkStore) failed. Nothing has changed then, except
/// where [`Poisoned`](Self::Poisoned) says that it is unknown.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ChunkError {
    /// The change does not follow the version that is present.
    #[error(
        "chunk {chunk} is at version {}.{}, which is not the one that the change follows",
        present.epoch,
        present.sequence
    )]
    VersionMismatch {
        /// Which chunk.
        chunk: ChunkId,
        /// The version that is present, `Version::NONE` if the chunk does not exist.
        present: Version,
    },
    /// Stored bytes fail their checksum, or the disk cannot read them.
    #[error("chunk {chunk} is damaged on disk: {reason}")]
    Corrupt {
        /// Which chunk.
        chunk: ChunkId,
        /// What was found.
        reason: String,
    },
    /// The data given does not have the checksum given.
    #[error("data for chunk {chunk} was damaged on its way: crc32c is {found:08x}, sent as {expected:08x}")]
    DamagedInTransit {
        /// Which chunk.
        chunk: ChunkId,
        /// As sent.
        expected: u32,
        /// As computed.
        found: u32,
    },
    /// A change that makes no sense.
    #[error("invalid change of chunk {chunk}: {reason}")]
    InvalidChange {
        /// Which chunk.
        chunk: ChunkId,
        /// Why.
        reason: &'static str,
    },
    /// The disk is full.
    #[error("no space left on the chunk store's disk")]
    NoSpace,
    /// An earlier failure to make data durable: what the disk holds is unknown until the process
    /// is restarted. A change that failed so may be there after the restart, or not.
    #[error("the chunk store has failed and must be restarted: {0}")]
    Poisoned(String),
    /// The operating system refused for now, as when it is out of memory or descriptors.
    #[error("the chunk store cannot do this now: {0}")]
    Io(String),
}

impl ChunkError {
    /// The code that crosses the wire.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::VersionMismatch { .. } => ErrorCode::WrongEpoch,
            Self::Corrupt { .. } => ErrorCode::Corrupt,
            // Another attempt, or another copy of the store, may well succeed.
            Self::DamagedInTransit { .. } | Self::Poisoned(_) | Self::Io(_) => ErrorCode::Unavailable,
            Self::InvalidChange { .. } => ErrorCode::InvalidArgument,
            Self::NoSpace => ErrorCode::NoSpace,
        }
    }
}
