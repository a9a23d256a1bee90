//! The client of a Lazarette cluster: an asynchronous API over inodes, without FUSE.
//!
//! [`Cluster`] finds storage nodes and administers volumes. [`Volume`] is a mounted session:
//! metadata operations go to the volume's owner, each with an operation id so that it happens
//! exactly once however often it is sent; file data goes to the primaries of the replica sets.
//! Errors that may pass are retried here, without limit in time, and never reach the caller.
//!
//! Writes are buffered: [`File::write`] returns when the bytes are in memory, [`File::fsync`] when
//! they are durable and the new size is known to the owner. What one client has flushed, another
//! sees at its next open or lock.

mod append;
mod backoff;
mod cache;
mod channel;
mod cluster;
mod error;
mod extents;
mod file;
mod flush;
mod inode;
mod lock;
mod map;
mod metadata;
mod ops;
mod primary;
mod read;
mod readahead;
mod registry;
mod session;
mod volume;

#[cfg(feature = "testing")]
pub mod testing;

pub use channel::Dial;
pub use cluster::{Cluster, ClusterOptions};
pub use error::{Error, Result};
pub use file::{File, OpenMode};
pub use lock::LockOwner;
pub use metadata::{Entry, Found, NewNode, SetAttributes, XattrMode};
pub use volume::{Volume, VolumeOptions};

pub use lazarette_proto::cluster::{ClusterStatus, CreateVolumeRequest, Volume as VolumeRecord};
pub use lazarette_proto::meta::{Attr, DirEntry, Kind, LockKind, LockMode, LockRange, StatFsReply};
