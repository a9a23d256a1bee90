//! Replica sets: this node's copies, and the sets that it leads.
//!
//! Primary-backup with the configuration in the metadata store (PacificA). [`configuration`] has
//! the invariants; `docs/replication.md` tells the whole story. In short:
//!
//! - **Order.** The primary makes the changes of a chunk one after the other (a lock per chunk),
//!   gives each a version that is never used twice, and sends it to all other in-sync members
//!   while it makes it itself. A member makes a change only on top of the version that it follows.
//! - **Acknowledgement** at `ack` durable copies, this node's always among them, on members that
//!   stay in sync; the rest arrives in the background, in order, bounded in bytes and age. A
//!   deletion leaves no version behind, so it is acknowledged only when it is everywhere in sync.
//! - **Reads** come from the primary's copy under the same lock, so they never show a change that
//!   could still be lost.
//! - **Epochs.** Each request between members carries one; older ones are refused. Requests are
//!   also conditional on the version present, so late and repeated ones do no harm.
//! - **Lease.** Nothing is acknowledged or read unless the lease is provably valid afterwards.

pub mod configuration;

mod access;
mod config;
mod context;
mod counters;
mod error;
mod links;
mod member;
mod operation;
mod read;
mod repair;
mod scrub;
mod service;
mod set;
mod supervision;
mod sweep;
mod takeover;
mod tenure;
mod wire;
mod write;

#[cfg(test)]
mod tests;

pub use access::ChunkAccess;
pub use config::ReplicationConfig;
pub use counters::{Counter, Counters};
pub use error::ReplicationError;
pub use links::{Dial, dial_plain, endpoint};
pub use service::{ChunkService, ReplicaService};
pub use set::{RepairBacklog, Replicas, ReplicasParts};

pub(crate) use member::Member;
