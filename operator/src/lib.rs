//! The operator: keeps etcd, storage nodes and everything around them as StorageClusters ask.
//!
//! Nothing depends on it to serve I/O: it may be away at any time.

pub mod cluster;
mod context;
mod controller;
mod etcd_member;
mod leader;

pub use context::Context;
pub use controller::{Metrics, run};
pub use etcd_member::{EtcdMember, EtcdMemberError, prepare};
pub use leader::{Leadership, Timing};
