use crate::membership::{ClusterView, Lease};
use crate::replication::configuration::fail_over;
use lazarette_metastore::{
    Condition, CoordinatorRecord, Keys, MetaStore, Op, ReplicaSetRecord, Revision, StoreError, Txn, encode,
};
use lazarette_types::NodeId;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How often work that failed or was not possible is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Stands for election on every storage node; the elected one replaces dead primaries.
///
/// Nothing depends on there being only one: each decision is a compare-and-swap that also requires
/// the dead node's liveness to be absent. Election only spares the store the duplicates.
pub struct Coordinator {
    node: NodeId,
    store: Arc<dyn MetaStore>,
    keys: Keys,
    lease: Lease,
    view: watch::Receiver<Arc<ClusterView>>,
}

impl Coordinator {
    /// For this node, whose liveness hangs on `lease`.
    pub fn new(
        node: NodeId,
        store: Arc<dyn MetaStore>,
        keys: Keys,
        lease: Lease,
        view: watch::Receiver<Arc<ClusterView>>,
    ) -> Self {
        Self {
            node,
            store,
            keys,
            lease,
            view,
        }
    }

    /// Works until the view ends. Run it in a task.
    pub async fn run(mut self) {
        loop {
            let view = Arc::clone(&self.view.borrow_and_update());
            if self.lease.valid() {
                match &view.coordinator {
                    None => self.stand(&view).await,
                    Some(node) if *node == self.node => self.replace_dead_primaries(&view).await,
                    Some(_) => {}
                }
            }
            match tokio::time::timeout(LOOK_AGAIN, self.view.changed()).await {
                Ok(Ok(())) | Err(_) => {}
                Ok(Err(_)) => return,
            }
        }
    }

    async fn stand(&self, view: &ClusterView) {
        let record = CoordinatorRecord {
            node: self.node.clone(),
        };
        let txn = Txn {
            conditions: vec![Condition::absent(self.keys.coordinator())],
            then: vec![Op::Put {
                key: self.keys.coordinator(),
                value: encode(&record),
                lease: Some(self.lease.id()),
            }],
        };
        match self.store.txn(txn).await {
            Ok(outcome) if outcome.succeeded => {
                tracing::info!("elected coordinator");
                // A former coordinator may have died together with a primary: do not wait for
                // one's own key to come back through the view.
                self.replace_dead_primaries(view).await;
            }
            // Another was elected, or the view will tell.
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "standing for coordinator failed"),
        }
    }

    async fn replace_dead_primaries(&self, view: &ClusterView) {
        let mut leading: BTreeMap<NodeId, usize> = BTreeMap::new();
        for set in view.replica_sets.values() {
            *leading.entry(set.record.primary.clone()).or_default() += 1;
        }
        let mut changes = Vec::new();
        for set in view.replica_sets.values() {
            if view.live.contains_key(&set.record.primary) {
                continue;
            }
            match fail_over(&set.record, |node| view.live.contains_key(node), &leading) {
                Some(next) => {
                    *leading.entry(next.primary.clone()).or_default() += 1;
                    changes.push(self.replace(&set.record, set.mod_revision, next));
                }
                None => {
                    tracing::debug!(replica_set = %set.record.id, "too few in-sync members run to replace the primary");
                }
            }
        }
        futures::future::join_all(changes).await;
    }

    async fn replace(&self, old: &ReplicaSetRecord, mod_revision: Revision, next: ReplicaSetRecord) {
        let key = self.keys.replica_set(old.id);
        let txn = Txn {
            conditions: vec![
                Condition::ModRevision(key.clone(), mod_revision),
                // It may have come back, and rely on its lease, since the view was made.
                Condition::absent(self.keys.node_live(&old.primary)),
            ],
            then: vec![Op::put(key, encode(&next))],
        };
        match self.store.txn(txn).await {
            Ok(outcome) if outcome.succeeded => {
                tracing::info!(
                    replica_set = %old.id, epoch = next.epoch, from = %old.primary, to = %next.primary,
                    "primary replaced"
                );
            }
            Ok(_) => {}
            Err(StoreError::Ambiguous(error)) => {
                tracing::warn!(replica_set = %old.id, error, "replacing a primary: no answer")
            }
            Err(error) => tracing::warn!(replica_set = %old.id, %error, "replacing a primary failed"),
        }
    }
}
