use super::moves::{self, Away, Exchange};
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
use tokio::time::Instant;

/// How often work that failed or was not possible is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A node that is away for so long is not waited for where nothing depends on its copies: the
/// copies are all there, and it was only to be one more.
const PATIENCE: Duration = Duration::from_secs(30);

/// Stands for election on every storage node; the elected one replaces dead primaries, and decides
/// which nodes shall hold which sets.
///
/// Nothing depends on there being only one: each decision is a compare-and-swap that also requires
/// the dead node's liveness to be absent. Election only spares the store the duplicates.
pub struct Coordinator {
    node: NodeId,
    store: Arc<dyn MetaStore>,
    keys: Keys,
    lease: Lease,
    view: watch::Receiver<Arc<ClusterView>>,
    replace_after: Duration,
    /// Since when nodes have been away, as seen in this time as coordinator: so after a stop of the
    /// whole cluster nobody is replaced for having been stopped.
    away_since: BTreeMap<NodeId, Instant>,
}

impl Coordinator {
    /// For this node, whose liveness hangs on `lease`. Nodes that are away for `replace_after` are
    /// replaced in their sets.
    pub fn new(
        node: NodeId,
        store: Arc<dyn MetaStore>,
        keys: Keys,
        lease: Lease,
        view: watch::Receiver<Arc<ClusterView>>,
        replace_after: Duration,
    ) -> Self {
        Self {
            node,
            store,
            keys,
            lease,
            view,
            replace_after,
            away_since: BTreeMap::new(),
        }
    }

    /// Works until the view ends. Run it in a task.
    pub async fn run(mut self) {
        loop {
            let view = Arc::clone(&self.view.borrow_and_update());
            if self.lease.valid() {
                match &view.coordinator {
                    None => self.stand(&view).await,
                    Some(node) if *node == self.node => {
                        self.replace_dead_primaries(&view).await;
                        self.exchange_members(&view).await;
                    }
                    Some(_) => self.away_since.clear(),
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

    async fn exchange_members(&mut self, view: &ClusterView) {
        self.away_since.retain(|node, _| !view.live.contains_key(node));
        let members = view.replica_sets.values().flat_map(|set| &set.record.members);
        for node in members.filter(|node| !view.live.contains_key(*node)) {
            self.away_since.entry(node.clone()).or_insert_with(Instant::now);
        }
        let away_for = |limit: Duration| {
            let away = self.away_since.iter().filter(|(_, since)| since.elapsed() >= limit);
            away.map(|(node, _)| node.clone()).collect()
        };
        let away = Away {
            for_good: away_for(self.replace_after),
            for_now: away_for(self.replace_after.min(PATIENCE)),
        };
        let exchanges = moves::plan(view, &away);
        futures::future::join_all(exchanges.into_iter().map(|exchange| self.exchange(view, exchange))).await;
    }

    async fn exchange(&self, view: &ClusterView, exchange: Exchange) {
        let Some(old) = view.replica_sets.get(&exchange.set) else {
            return;
        };
        let key = self.keys.replica_set(exchange.set);
        let mut conditions = vec![Condition::ModRevision(key.clone(), old.mod_revision)];
        conditions.extend(
            exchange
                .absent
                .map(|node| Condition::absent(self.keys.node_live(&node))),
        );
        let then = vec![Op::put(key, encode(&exchange.next))];
        match self.store.txn(Txn { conditions, then }).await {
            Ok(outcome) if outcome.succeeded => {
                tracing::info!(
                    replica_set = %exchange.set, from = ?old.record.members, to = ?exchange.next.members,
                    why = exchange.why, "members exchanged"
                );
            }
            // Something has changed, or nobody knows: the view will tell, and the next plan is another.
            Ok(_) | Err(StoreError::Ambiguous(_)) => {}
            Err(error) => tracing::warn!(replica_set = %exchange.set, %error, "exchanging members failed"),
        }
    }
}
