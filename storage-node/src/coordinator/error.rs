use lazarette_metastore::{RecordError, StoreError};
use lazarette_types::{ErrorCode, LayoutError};

/// Why no placement table can be given.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PlacementError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A record could not be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The policy makes no sense.
    #[error(transparent)]
    Policy(#[from] LayoutError),
    /// No storage node has made the cluster's record yet.
    #[error("the cluster has no record yet: no storage node has joined")]
    NoCluster,
    /// Fewer nodes than copies.
    #[error("{copies} copies need {copies} storage nodes, {nodes} are registered: add nodes or ask for fewer copies")]
    InsufficientNodes {
        /// As the policy asks.
        copies: u32,
        /// Registered, running or not, and not draining.
        nodes: usize,
    },
}

impl PlacementError {
    /// What a caller over the network is told.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Store(StoreError::Refused(_)) | Self::Record(_) => ErrorCode::Internal,
            Self::Store(StoreError::Full(_)) => ErrorCode::NoSpace,
            Self::Store(_) | Self::NoCluster => ErrorCode::Unavailable,
            Self::Policy(_) => ErrorCode::InvalidArgument,
            Self::InsufficientNodes { .. } => ErrorCode::InsufficientNodes,
        }
    }
}
