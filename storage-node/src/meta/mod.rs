//! The metadata owner: the inode tree of each volume that this node owns, served from memory and
//! committed to the metadata store.
//!
//! A change becomes rows ([`rows`]), which a record of the [`journal`] commits in one fenced
//! transaction, and which are later folded into [`pages`]. [`owner`] claims and serves a shard,
//! [`manager`] decides which. `docs/formats.md` describes the bytes.

pub mod chunks;
pub mod journal;
pub mod locks;
pub mod manager;
pub mod namespace;
pub mod owner;
pub mod pages;
pub mod rows;
pub mod service;
pub mod state;

pub use chunks::{ChunkError, ChunkRemover};
pub use manager::Manager;
pub use owner::{Metrics, OwnerContext, Shard};
pub use service::{MetaService, Shards};
