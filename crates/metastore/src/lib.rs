//! The cluster's source of truth: a small, versioned compare-and-swap store with leases and
//! watches, the keys of Lazarette in it, and the records behind the small keys.
//!
//! [`EtcdStore`] is the real one; [`MemoryStore`] serves unit tests and simulation. Both pass the
//! same contract suite (`tests/contract.rs`).

mod etcd;
mod keys;
mod memory;
mod records;
mod store;

pub use etcd::{EtcdConfig, EtcdStore, EtcdTls};
pub use keys::{Keys, ShardKey};
pub use memory::MemoryStore;
pub use records::{
    ActivityRecord, ClusterRecord, CoordinatorRecord, LivenessRecord, NodeRecord, OwnerRecord, RecordError,
    ReplicaSetRecord, ScrubRecord, ShardRecord, UsageRecord, VolumeRecord, VolumeState, decode, encode,
};
pub use store::{
    Condition, Event, KeyValue, LeaseId, MetaStore, Op, Revision, StoreError, Txn, TxnOutcome, WatchBatch, WatchStream,
};
