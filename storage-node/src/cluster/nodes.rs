//! Draining, and forgetting, storage nodes.

use super::{ClusterService, damaged, invalid, unavailable};
use lazarette_metastore::{
    Condition, KeyValue, Keys, NodeRecord, Op, ReplicaSetRecord, StoreError, Txn, decode, encode,
};
use lazarette_proto::status;
use lazarette_types::{ErrorCode, NodeId, ReplicaSetId};
use std::collections::BTreeMap;
use tonic::Status;

impl ClusterService {
    /// Marks a node as draining, or not. Decided by a compare-and-swap that also needs the cluster's
    /// record unchanged and writes it: so two nodes drained at once, or a table made meanwhile,
    /// cannot both find enough nodes.
    pub(super) async fn set_draining(&self, node: &NodeId, draining: bool) -> Result<(), Status> {
        let cluster_key = self.keys.cluster();
        loop {
            let cluster = self.store.get(&cluster_key).await.map_err(unavailable)?;
            let cluster = cluster.ok_or_else(|| status(ErrorCode::Internal, "the cluster has no record"))?;
            let nodes = self.node_records().await?;
            let Some((record, kv)) = nodes.get(node) else {
                return Err(invalid(format!(
                    "node is {node:?}, which is no storage node; GetStatus lists them",
                    node = node.0
                )));
            };
            if record.draining == draining {
                return Ok(());
            }
            if draining {
                self.enough_without(node, &nodes).await?;
            }
            let next = NodeRecord {
                draining,
                ..record.clone()
            };
            let txn = Txn {
                conditions: vec![
                    Condition::ModRevision(cluster_key.clone(), cluster.mod_revision),
                    Condition::ModRevision(kv.key.clone(), kv.mod_revision),
                ],
                then: vec![
                    Op::put(cluster_key.clone(), cluster.value.clone()),
                    Op::put(kv.key.clone(), encode(&next)),
                ],
            };
            match self.store.txn(txn).await {
                Ok(outcome) if outcome.succeeded => {
                    tracing::info!(%node, draining, "storage node marked");
                    return Ok(());
                }
                // Changed meanwhile, or nobody knows: the next round reads what is there.
                Ok(_) | Err(StoreError::Ambiguous(_)) => {}
                Err(error) => return Err(unavailable(error)),
            }
        }
    }

    /// Strikes a node off the list.
    pub(super) async fn forget(&self, node: &NodeId) -> Result<(), Status> {
        loop {
            let key = self.keys.node(node);
            let Some(kv) = self.store.get(&key).await.map_err(unavailable)? else {
                return Ok(());
            };
            if self
                .store
                .get(&self.keys.node_live(node))
                .await
                .map_err(unavailable)?
                .is_some()
            {
                return Err(status(
                    ErrorCode::Unavailable,
                    format!("storage node {node} is live; stop it first"),
                ));
            }
            let held = self.replica_sets().await?;
            let held = held.values().filter(|record| record.involves(node)).count();
            if held > 0 {
                let message = format!("storage node {node} is still in {held} replica sets; drain it first");
                return Err(status(ErrorCode::Unavailable, message));
            }
            // A node that is not registered gets no sets, and registers before it is live.
            let txn = Txn {
                conditions: vec![
                    Condition::ModRevision(key.clone(), kv.mod_revision),
                    Condition::absent(self.keys.node_live(node)),
                ],
                then: vec![Op::Delete(key), Op::Delete(self.keys.activity(node))],
            };
            match self.store.txn(txn).await {
                Ok(outcome) if outcome.succeeded => {
                    tracing::info!(%node, "storage node forgotten");
                    return Ok(());
                }
                Ok(_) | Err(StoreError::Ambiguous(_)) => {}
                Err(error) => return Err(unavailable(error)),
            }
        }
    }

    /// Refuses if too few nodes would remain without one for the copies of any replica set.
    async fn enough_without(
        &self,
        node: &NodeId,
        nodes: &BTreeMap<NodeId, (NodeRecord, KeyValue)>,
    ) -> Result<(), Status> {
        let (live, _) = self.store.range(&self.keys.live()).await.map_err(unavailable)?;
        let runs = |id: &NodeId| live.iter().any(|kv| kv.key == self.keys.node_live(id));
        let remain = nodes
            .iter()
            .filter(|(id, (record, _))| *id != node && !record.draining && runs(id))
            .count();
        let sets = self.replica_sets().await?;
        let needed = sets.values().map(|set| set.replication.copies).max().unwrap_or(1);
        if remain < needed as usize {
            let message = format!(
                "without storage node {node}, {remain} would run that are not draining, and there are volumes of \
                 {needed} copies: add storage nodes, or delete these volumes, first"
            );
            return Err(status(ErrorCode::InsufficientNodes, message));
        }
        Ok(())
    }

    async fn node_records(&self) -> Result<BTreeMap<NodeId, (NodeRecord, KeyValue)>, Status> {
        let prefix = self.keys.nodes();
        let (found, _) = self.store.range(&prefix).await.map_err(unavailable)?;
        let mut nodes = BTreeMap::new();
        for kv in found {
            let Some(id) = Keys::suffix(&kv.key, &prefix) else {
                continue;
            };
            let record = decode(&kv.value).map_err(damaged)?;
            nodes.insert(NodeId(id.to_owned()), (record, kv));
        }
        Ok(nodes)
    }

    async fn replica_sets(&self) -> Result<BTreeMap<ReplicaSetId, ReplicaSetRecord>, Status> {
        let (found, _) = self.store.range(&self.keys.replica_sets()).await.map_err(unavailable)?;
        found
            .iter()
            .map(|kv| {
                let record: ReplicaSetRecord = decode(&kv.value).map_err(damaged)?;
                Ok((record.id, record))
            })
            .collect()
    }
}
