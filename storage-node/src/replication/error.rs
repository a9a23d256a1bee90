use crate::chunk::ChunkError;
use lazarette_metastore::StoreError;
use lazarette_proto::{code_of, status};
use lazarette_types::{ChunkId, ErrorCode, NodeId, ReplicaSetId};
use tonic::Status;

/// Why a request to a replica set, or a step between its members, failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReplicationError {
    /// Not the primary (any more).
    #[error("this node is not the primary of replica set {0}")]
    NotPrimary(ReplicaSetId),
    /// Not a member, as far as this node knows.
    #[error("this node is not a member of replica set {0}")]
    NotMember(ReplicaSetId),
    /// The request is of a configuration that has been replaced.
    #[error("the request is of epoch {asked} of replica set {set}, which is at {present}")]
    StaleEpoch {
        /// The set.
        set: ReplicaSetId,
        /// The request's epoch.
        asked: u64,
        /// The epoch known here.
        present: u64,
    },
    /// The request was meant for another node that had this address.
    #[error("the request is for node {0}, which this is not")]
    WrongNode(NodeId),
    /// Nothing may be served without a lease.
    #[error("this node cannot prove its lease")]
    NoLease,
    /// It came after its deadline, or for a process that was here before this one.
    #[error("the request is too late")]
    Late,
    /// Cannot be served now.
    #[error("replica set {set} cannot serve this now: {reason}")]
    NotNow {
        /// The set.
        set: ReplicaSetId,
        /// Why.
        reason: &'static str,
    },
    /// No good copy of a chunk is left in sync.
    #[error("no member in sync has a good copy of chunk {0}")]
    NoGoodCopy(ChunkId),
    /// A request that makes no sense.
    #[error("malformed request: {0}")]
    Malformed(&'static str),
    /// This node's chunk store.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// Another member answered so, or did not answer.
    #[error("storage node {node}: {message}")]
    Peer {
        /// The member.
        node: NodeId,
        /// What it answered.
        code: ErrorCode,
        /// In its words.
        message: String,
    },
    /// The metadata store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A task ended without a result.
    #[error("internal error: {0}")]
    Internal(String),
}

impl ReplicationError {
    /// The code that crosses the wire.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NotPrimary(_) | Self::NotMember(_) | Self::StaleEpoch { .. } | Self::WrongNode(_) => {
                ErrorCode::WrongEpoch
            }
            Self::NoLease | Self::NotNow { .. } => ErrorCode::Unavailable,
            Self::Late => ErrorCode::Late,
            Self::NoGoodCopy(_) => ErrorCode::Corrupt,
            Self::Malformed(_) => ErrorCode::InvalidArgument,
            Self::Chunk(error) => error.code(),
            Self::Peer { code, .. } => *code,
            Self::Store(_) => ErrorCode::Unavailable,
            Self::Internal(_) => ErrorCode::Internal,
        }
    }

    pub(crate) fn from_peer(node: &NodeId, status: &Status) -> Self {
        Self::Peer {
            node: node.clone(),
            code: code_of(status),
            message: status.message().to_owned(),
        }
    }

    pub(crate) fn unreachable(node: &NodeId, message: impl Into<String>) -> Self {
        Self::Peer {
            node: node.clone(),
            code: ErrorCode::Unavailable,
            message: message.into(),
        }
    }
}

impl From<ReplicationError> for Status {
    fn from(error: ReplicationError) -> Self {
        status(error.code(), error.to_string())
    }
}
