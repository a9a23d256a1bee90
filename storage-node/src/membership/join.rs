use super::Lease;
use lazarette_metastore::{
    ClusterRecord, Condition, Keys, LeaseId, LivenessRecord, MetaStore, NodeRecord, Op, RecordError, ReplicaSetRecord,
    StoreError, Txn, decode, encode,
};
use lazarette_types::{NodeId, ReplicaSetId};
use std::time::Duration;

/// Why a storage node cannot take its place.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A record could not be read.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// Gives a random identity to the cluster if it has none yet; returns what it has.
pub async fn ensure_cluster(store: &dyn MetaStore, keys: &Keys) -> Result<ClusterRecord, JoinError> {
    loop {
        if let Some(kv) = store.get(&keys.cluster()).await? {
            return Ok(decode(&kv.value)?);
        }
        let record = ClusterRecord {
            id: format!("{:032x}", rand::random::<u128>()),
            next_volume: 1,
            next_replica_set: 1,
        };
        let txn = Txn {
            conditions: vec![Condition::absent(keys.cluster())],
            then: vec![Op::put(keys.cluster(), encode(&record))],
        };
        // Whoever wrote it, also if the answer was lost: the next read tells.
        match store.txn(txn).await {
            Ok(_) | Err(StoreError::Ambiguous(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A storage node's registration.
#[derive(Clone, Debug)]
pub struct Registration {
    /// Its name.
    pub node: NodeId,
    /// `host:port` under which the others reach it.
    pub address: String,
    /// See [`NodeRecord`].
    pub failure_domain: String,
    /// The identity of the disk, whose lock this process holds.
    pub disk: String,
}

impl Registration {
    /// Takes the node's place: writes its record and, attached to `lease`, its liveness.
    ///
    /// With the disk that was registered before, the previous process is certainly gone (this one
    /// holds the disk's lock), so what is left of its lease is revoked. With another disk the
    /// node's copies are lost, and it waits until no replica set counts on them any more and no
    /// other process lives under the node's name.
    pub async fn join(
        &self,
        store: &dyn MetaStore,
        keys: &Keys,
        lease: &Lease,
        usage: (u64, u64),
    ) -> Result<(), JoinError> {
        self.register(store, keys).await?;
        if let Some(kv) = store.get(&keys.node_live(&self.node)).await? {
            let old: LivenessRecord = decode(&kv.value)?;
            if old.lease != lease.id().0 {
                store.revoke(LeaseId(old.lease)).await?;
            }
        }
        self.report(store, keys, lease, usage).await
    }

    /// Writes liveness with the disk's capacity and use in bytes.
    pub async fn report(
        &self,
        store: &dyn MetaStore,
        keys: &Keys,
        lease: &Lease,
        (capacity_bytes, used_bytes): (u64, u64),
    ) -> Result<(), JoinError> {
        let record = LivenessRecord {
            address: self.address.clone(),
            lease: lease.id().0,
            capacity_bytes,
            used_bytes,
        };
        let put = Op::Put {
            key: keys.node_live(&self.node),
            value: encode(&record),
            lease: Some(lease.id()),
        };
        store
            .txn(Txn {
                conditions: vec![],
                then: vec![put],
            })
            .await?;
        Ok(())
    }

    async fn register(&self, store: &dyn MetaStore, keys: &Keys) -> Result<(), JoinError> {
        let key = keys.node(&self.node);
        let mut told = false;
        loop {
            let present = store.get(&key).await?;
            let seen = present.as_ref().map_or(0, |kv| kv.mod_revision);
            let record: Option<NodeRecord> = present.as_ref().map(|kv| decode(&kv.value)).transpose()?;
            let wanted = NodeRecord {
                disk: self.disk.clone(),
                failure_domain: self.failure_domain.clone(),
                draining: record.as_ref().is_some_and(|record| record.draining),
            };
            if record.as_ref() == Some(&wanted) {
                return Ok(());
            }
            if record.is_some_and(|record| record.disk != self.disk) {
                let counted_on = self.counted_on(store, keys).await?;
                let alive = store.get(&keys.node_live(&self.node)).await?.is_some();
                if alive || !counted_on.is_empty() {
                    if !told {
                        tracing::warn!(
                            node = %self.node, alive, replica_sets = ?counted_on,
                            "the node's former disk is gone; waiting until these replica sets go on without it \
                             (bring the disk back if they have no other copy)"
                        );
                        told = true;
                    }
                    tokio::time::sleep(Duration::from_millis(500)).await;
                    continue;
                }
            }
            let txn = Txn {
                conditions: vec![Condition::ModRevision(key.clone(), seen)],
                then: vec![Op::put(key.clone(), encode(&wanted))],
            };
            match store.txn(txn).await {
                Ok(_) | Err(StoreError::Ambiguous(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The replica sets that take this node for an in-sync member.
    async fn counted_on(&self, store: &dyn MetaStore, keys: &Keys) -> Result<Vec<ReplicaSetId>, JoinError> {
        let (found, _) = store.range(&keys.replica_sets()).await?;
        let mut sets = Vec::new();
        for kv in found {
            let record: ReplicaSetRecord = decode(&kv.value)?;
            if record.in_sync.contains(&self.node) {
                sets.push(record.id);
            }
        }
        Ok(sets)
    }
}
