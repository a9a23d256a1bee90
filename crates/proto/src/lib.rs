//! Lazarette's gRPC protocols: generated code, and the mapping of error codes to statuses.
//!
//! `docs/formats.md` describes the messages' meaning; the `.proto` files are the reference.

pub mod clock;
mod codec;
mod status;

pub use status::{code_of, is_answer, status};

/// Volume administration and the cluster map.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod cluster {
    tonic::include_proto!("lazarette.cluster.v1");
}

/// File metadata, locks and sessions, served by a volume's owner.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod meta {
    tonic::include_proto!("lazarette.meta.v1");
}

/// File data, served by the members of a replica set.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod chunk {
    tonic::include_proto!("lazarette.chunk.v1");
}

/// The mount daemon's local control socket.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod mount {
    tonic::include_proto!("lazarette.mount.v1");
}

/// The Container Storage Interface: Identity, Controller and Node.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// Registration of a plugin with the kubelet.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod registration {
    tonic::include_proto!("pluginregistration");
}

/// Largest gRPC message that any side accepts, in bytes: the largest chunk and its framing.
pub const MAX_MESSAGE_BYTES: usize = (64 << 20) + (64 << 10);

/// Longest HTTP/2 frame that connections for data accept, in bytes. Each frame costs a system call on both
/// sides, so the protocol's 16 KiB are little; but tonic copies the first frame of a message once more.
pub const FRAME_BYTES: u32 = 128 << 10;

/// Most parts of one write of a chunk. Even if each of them lies in two blocks of its own, a record of
/// the chunk store's log on all but the smallest disks can hold them.
pub const MAX_WRITE_PARTS: usize = 512;
