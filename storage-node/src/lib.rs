//! The storage node: metadata owner of some volumes, chunk server for some replica sets, and
//! sometimes the cluster's coordinator, in one process.

pub mod chunk;
pub mod cluster;
pub mod coordinator;
pub mod membership;
pub mod meta;
mod metrics;
pub mod node;
mod removal;
pub mod replication;
