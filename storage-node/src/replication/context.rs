use super::configuration::same_but_members;
use super::links::Links;
use super::{Counters, Member, ReplicationConfig, ReplicationError};
use crate::chunk::{ChunkStore, ChunkSummary, Contents};
use crate::membership::{ClusterView, Lease, Versioned};
use lazarette_metastore::{
    Condition, Keys, MetaStore, Op, ReplicaSetRecord, ScrubRecord, StoreError, Txn, decode, encode,
};
use lazarette_proto::clock::Clocks;
use lazarette_types::{ChunkId, NodeId, ReplicaSetId, Version};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What all replica sets of this node share.
pub(crate) struct Context {
    pub(crate) node: NodeId,
    pub(crate) store: Arc<dyn MetaStore>,
    pub(crate) keys: Keys,
    pub(crate) chunks: Arc<dyn ChunkStore>,
    pub(crate) lease: Lease,
    pub(crate) view: watch::Receiver<Arc<ClusterView>>,
    pub(crate) links: Links,
    /// Of other nodes, by their names.
    pub(crate) clocks: Clocks,
    pub(crate) config: ReplicationConfig,
    pub(crate) counters: Counters,
    /// Chunks being copied by repair.
    pub(crate) repairs: Semaphore,
    /// When repair may copy again, by its rate.
    pub(crate) repair_pace: tokio::sync::Mutex<Option<Instant>>,
    /// How far scrubbing is.
    pub(crate) scrub: std::sync::Mutex<ScrubRecord>,
    /// Sets being handed back: one after the other.
    pub(crate) hand_backs: Semaphore,
    pub(crate) stopped: CancellationToken,
}

/// What became of a compare-and-swap of a replica set's record.
#[derive(Debug)]
pub(crate) enum Swap {
    /// The record is the new one.
    Made(Versioned<ReplicaSetRecord>),
    /// The record is another one; None if there is none.
    Lost(Option<Versioned<ReplicaSetRecord>>),
}

/// What became of a step of a tenure.
#[derive(Debug)]
pub(crate) enum Step {
    /// It was made, and this is the record.
    Made(Versioned<ReplicaSetRecord>),
    /// It was made, but the coordinator may have exchanged members since: this is the record now.
    Found(Versioned<ReplicaSetRecord>),
    /// The record is another one; None if there is none.
    Lost(Option<Versioned<ReplicaSetRecord>>),
}

impl Context {
    /// This node's view of a replica set.
    pub(crate) fn known(&self, set: ReplicaSetId) -> Option<Versioned<ReplicaSetRecord>> {
        self.view.borrow().replica_sets.get(&set).cloned()
    }

    /// Reads a replica set's record, linearizably.
    pub(crate) async fn read_record(
        &self,
        set: ReplicaSetId,
    ) -> Result<Option<Versioned<ReplicaSetRecord>>, StoreError> {
        let Some(kv) = self.store.get(&self.keys.replica_set(set)).await? else {
            return Ok(None);
        };
        match decode(&kv.value) {
            Ok(record) => Ok(Some(Versioned {
                record,
                mod_revision: kv.mod_revision,
            })),
            Err(error) => Err(StoreError::Refused(format!("record of replica set {set}: {error}"))),
        }
    }

    /// Replaces a replica set's record once. An error means that nobody knows.
    pub(crate) async fn swap(
        &self,
        old: &Versioned<ReplicaSetRecord>,
        next: &ReplicaSetRecord,
    ) -> Result<Swap, StoreError> {
        let key = self.keys.replica_set(old.record.id);
        let txn = Txn {
            conditions: vec![Condition::ModRevision(key.clone(), old.mod_revision)],
            then: vec![Op::put(key, encode(next))],
        };
        let outcome = self.store.txn(txn).await?;
        if outcome.succeeded {
            return Ok(Swap::Made(Versioned {
                record: next.clone(),
                mod_revision: outcome.revision,
            }));
        }
        Ok(Swap::Lost(self.read_record(old.record.id).await?))
    }

    /// Replaces a replica set's record, tries until the outcome is known or `abort`ed (None).
    ///
    /// Only for a primary in its own tenure: nobody else could write just this record, so finding
    /// it after an ambiguous answer means that it was this one, whatever the members are by now.
    pub(crate) async fn swap_until_known(
        &self,
        old: &Versioned<ReplicaSetRecord>,
        next: &ReplicaSetRecord,
        abort: &CancellationToken,
    ) -> Option<Step> {
        let mut pause = Duration::from_millis(20);
        loop {
            let error = match self.swap(old, next).await {
                Ok(Swap::Made(record)) => return Some(Step::Made(record)),
                Ok(Swap::Lost(Some(found))) if same_but_members(&found.record, next) => {
                    return Some(Step::Found(found));
                }
                Ok(Swap::Lost(found)) => return Some(Step::Lost(found)),
                Err(error) => error,
            };
            tracing::warn!(replica_set = %old.record.id, %error, "change of configuration not answered, trying again");
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_millis(500)),
                () = abort.cancelled() => return None,
            }
        }
    }

    /// [`Member::prepare`], here or at another node.
    pub(crate) async fn prepare(&self, member: &Member, node: &NodeId, epoch: u64) -> Result<(), ReplicationError> {
        if *node == self.node {
            member.prepare(epoch).await
        } else {
            self.links.prepare(node, member.set(), epoch).await
        }
    }

    /// [`Member::list`], here or at another node.
    pub(crate) async fn list(
        &self,
        member: &Member,
        node: &NodeId,
        epoch: u64,
    ) -> Result<Vec<ChunkSummary>, ReplicationError> {
        if *node == self.node {
            member.list(epoch).await
        } else {
            self.links.list(node, member.set(), epoch).await
        }
    }

    /// [`Member::fetch`], here or at another node.
    pub(crate) async fn fetch(
        &self,
        member: &Member,
        node: &NodeId,
        epoch: u64,
        chunk: ChunkId,
    ) -> Result<Contents, ReplicationError> {
        if *node == self.node {
            member.fetch(epoch, chunk).await
        } else {
            self.links.fetch(node, member.set(), epoch, chunk).await
        }
    }

    /// [`Member::install`], here or at another node, whatever version is there; `previous` is a
    /// guess.
    pub(crate) async fn install(
        &self,
        member: &Member,
        node: &NodeId,
        epoch: u64,
        chunk: ChunkId,
        mut previous: Version,
        contents: &Contents,
    ) -> Result<(), ReplicationError> {
        loop {
            let present = if *node == self.node {
                let data = contents.data.clone();
                member
                    .install(epoch, chunk, previous, contents.version, data, contents.crc)
                    .await?
            } else {
                self.links
                    .install(node, member.set(), epoch, chunk, previous, contents.clone())
                    .await?
            };
            if present == contents.version {
                return Ok(());
            }
            previous = present;
        }
    }
}
