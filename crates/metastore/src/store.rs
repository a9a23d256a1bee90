use async_trait::async_trait;
use futures::stream::BoxStream;
use std::time::Duration;

/// The store's clock: raised by one with every transaction that changes something.
pub type Revision = i64;

/// A lease; keys attached to it vanish together when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseId(pub i64);

/// A key and its value at some revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The whole key.
    pub key: Vec<u8>,
    /// The value.
    pub value: Vec<u8>,
    /// Revision at which the key last came into being.
    pub create_revision: Revision,
    /// Revision of the last change.
    pub mod_revision: Revision,
}

/// A precondition of a transaction. Revision 0 means that the key does not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The key's `create_revision` is this.
    CreateRevision(Vec<u8>, Revision),
    /// The key's `mod_revision` is this.
    ModRevision(Vec<u8>, Revision),
}

impl Condition {
    /// The key does not exist.
    pub fn absent(key: impl Into<Vec<u8>>) -> Self {
        Self::CreateRevision(key.into(), 0)
    }
}

/// A change within a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Sets a key, attached to a lease or to none.
    Put {
        /// The whole key.
        key: Vec<u8>,
        /// The value.
        value: Vec<u8>,
        /// The lease with which the key vanishes.
        lease: Option<LeaseId>,
    },
    /// Removes a key; nothing happens if it is absent.
    Delete(Vec<u8>),
    /// Removes all keys `from <= key < to`.
    DeleteRange(Vec<u8>, Vec<u8>),
}

impl Op {
    /// A put without lease.
    pub fn put(key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        Self::Put {
            key: key.into(),
            value: value.into(),
            lease: None,
        }
    }
}

/// All conditions hold → all changes are made, atomically; else none is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// What must hold.
    pub conditions: Vec<Condition>,
    /// What is done then. At most 128 operations (etcd's limit), each key at most once.
    pub then: Vec<Op>,
}

/// What became of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TxnOutcome {
    /// Whether the conditions held.
    pub succeeded: bool,
    /// The store's revision after it. If it succeeded and changed something, the `mod_revision`
    /// of the keys it put.
    pub revision: Revision,
}

/// A change seen by a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The key was set.
    Put(KeyValue),
    /// The key was removed, or its lease ended.
    Delete(Vec<u8>),
}

/// All changes of one revision (or several), in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchBatch {
    /// Everything up to this revision has been delivered.
    pub revision: Revision,
    /// The changes.
    pub events: Vec<Event>,
}

/// Ends with an error when the watch is lost; the watcher then ranges and watches anew.
pub type WatchStream = BoxStream<'static, Result<WatchBatch, StoreError>>;

/// Why a call failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// Not done, or not answered: for reads, and for writes that were certainly not made.
    #[error("metadata store unavailable: {0}")]
    Unavailable(String),
    /// A write that may or may not have been made. The caller reads to learn which.
    #[error("metadata store gave no answer, the change may have been made: {0}")]
    Ambiguous(String),
    /// The lease has ended.
    #[error("lease {} has ended", .0.0)]
    LeaseExpired(LeaseId),
    /// The watch's start revision is compacted away.
    #[error("revision {0} is compacted")]
    Compacted(Revision),
    /// The store is full (etcd's NOSPACE alarm).
    #[error("metadata store is full: {0}")]
    Full(String),
    /// Refused: a malformed request.
    #[error("metadata store refused the request: {0}")]
    Refused(String),
}

/// A versioned compare-and-swap store with leases and watches. Reads are linearizable.
#[async_trait]
pub trait MetaStore: Send + Sync + 'static {
    /// One key.
    async fn get(&self, key: &[u8]) -> Result<Option<KeyValue>, StoreError>;

    /// All keys that begin with `prefix`, in order, all at the returned revision. Read in pages,
    /// so it may be large.
    async fn range(&self, prefix: &[u8]) -> Result<(Vec<KeyValue>, Revision), StoreError>;

    /// Runs a transaction.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError>;

    /// Makes a lease. The store may grant more than asked for, never less.
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError>;

    /// Renews a lease for its whole time from when the store received this.
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Ends a lease: its keys vanish. Ending one that has ended succeeds.
    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Changes of keys that begin with `prefix`, from revision `from` (included) on.
    async fn watch(&self, prefix: &[u8], from: Revision) -> Result<WatchStream, StoreError>;
}
