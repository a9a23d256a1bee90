use super::PlacementError;
use lazarette_metastore::{
    ClusterRecord, Condition, Keys, LivenessRecord, MetaStore, NodeRecord, Op, ReplicaSetRecord, StoreError, Txn,
    decode, encode,
};
use lazarette_types::{NodeId, ReplicaSetId, ReplicationPolicy};
use std::collections::{BTreeMap, BTreeSet};

/// Fewest replica sets of a table: enough that the chunks of one file use all nodes' disks.
const SETS_MIN: usize = 8;
/// Replica sets per storage node: so that a dead node's primaries are taken over by several others.
const SETS_PER_NODE: usize = 4;
/// A table is made in one transaction, which may hold 128 operations.
const SETS_MAX: usize = 120;

/// A storage node as placement sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The node.
    pub id: NodeId,
    /// Copies of one chunk are spread over failure domains.
    pub failure_domain: String,
    /// Whether it runs now.
    pub live: bool,
}

/// The replica sets of this policy, made if there are none; in order of their ids.
///
/// Works on any node: everything is decided by one compare-and-swap on the cluster's counters, so
/// two callers at once get the same table. A change of nodes later does not change the table.
pub async fn ensure_table(
    store: &dyn MetaStore,
    keys: &Keys,
    policy: ReplicationPolicy,
) -> Result<Vec<ReplicaSetId>, PlacementError> {
    let policy = policy.validate()?;
    loop {
        // The counter is read first: sets made after that change it, and the transaction fails.
        let cluster = store.get(&keys.cluster()).await?.ok_or(PlacementError::NoCluster)?;
        let (sets, _) = store.range(&keys.replica_sets()).await?;
        let mut found = Vec::new();
        for kv in &sets {
            let record: ReplicaSetRecord = decode(&kv.value)?;
            if record.replication == policy {
                found.push(record.id);
            }
        }
        if !found.is_empty() {
            return Ok(found);
        }
        let nodes = candidates(store, keys).await?;
        if nodes.len() < policy.copies as usize {
            return Err(PlacementError::InsufficientNodes {
                copies: policy.copies,
                nodes: nodes.len(),
            });
        }
        let mut counters: ClusterRecord = decode(&cluster.value)?;
        let first = counters.next_replica_set;
        let records = plan(policy, &nodes, first);
        counters.next_replica_set += records.len() as u32;
        let mut then = vec![Op::put(keys.cluster(), encode(&counters))];
        then.extend(
            records
                .iter()
                .map(|record| Op::put(keys.replica_set(record.id), encode(record))),
        );
        let txn = Txn {
            conditions: vec![Condition::ModRevision(keys.cluster(), cluster.mod_revision)],
            then,
        };
        match store.txn(txn).await {
            Ok(outcome) if outcome.succeeded => {
                tracing::info!(
                    copies = policy.copies,
                    ack = policy.ack,
                    first,
                    count = records.len(),
                    "replica sets made"
                );
                return Ok(records.into_iter().map(|record| record.id).collect());
            }
            // Somebody else was quicker, or nobody knows: the next round reads what is there.
            Ok(_) | Err(StoreError::Ambiguous(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// All registered nodes that are not to leave.
async fn candidates(store: &dyn MetaStore, keys: &Keys) -> Result<Vec<Candidate>, PlacementError> {
    let (live, _) = store.range(&keys.live()).await?;
    let mut running = BTreeSet::new();
    for kv in &live {
        let _: LivenessRecord = decode(&kv.value)?;
        running.extend(Keys::suffix(&kv.key, &keys.live()).map(str::to_owned));
    }
    let (nodes, _) = store.range(&keys.nodes()).await?;
    let mut all = Vec::new();
    for kv in &nodes {
        let Some(id) = Keys::suffix(&kv.key, &keys.nodes()) else {
            continue;
        };
        let record: NodeRecord = decode(&kv.value)?;
        if record.draining {
            continue;
        }
        all.push(Candidate {
            id: NodeId(id.to_owned()),
            failure_domain: record.failure_domain,
            live: running.contains(id),
        });
    }
    Ok(all)
}

/// Plans the replica sets of a policy: members over as many failure domains as there are, every
/// node in about as many sets, and first in about as many. The first member is the preferred
/// primary. Nodes that do not run are members all the same, but not in sync; if fewer nodes run
/// than there are copies, that is what remains possible.
pub fn plan(policy: ReplicationPolicy, nodes: &[Candidate], first: ReplicaSetIdNumber) -> Vec<ReplicaSetRecord> {
    let count = SETS_MIN.max(SETS_PER_NODE * nodes.len()).min(SETS_MAX);
    let copies = policy.copies as usize;
    // Running nodes alone if they are enough.
    let live: Vec<_> = nodes.iter().filter(|node| node.live).cloned().collect();
    let pool = if live.len() >= copies { live } else { nodes.to_vec() };
    let mut used: BTreeMap<&NodeId, usize> = BTreeMap::new();
    let mut leading: BTreeMap<&NodeId, usize> = BTreeMap::new();
    let mut together: BTreeMap<(&NodeId, &NodeId), usize> = BTreeMap::new();
    let mut records = Vec::with_capacity(count);
    for number in 0..count {
        let mut members: Vec<&Candidate> = Vec::with_capacity(copies);
        while members.len() < copies {
            let place = members.len();
            let next = pool
                .iter()
                .filter(|node| !members.iter().any(|member| member.id == node.id))
                .min_by_key(|node| {
                    let crowded = members
                        .iter()
                        .filter(|member| member.failure_domain == node.failure_domain)
                        .count();
                    let leads = if place == 0 {
                        leading.get(&node.id).copied().unwrap_or(0)
                    } else {
                        0
                    };
                    // A node that does not run can not lead.
                    let away = place == 0 && !node.live;
                    // Spreads each node's partners, so that its loss burdens all others alike.
                    let partners: usize = members
                        .iter()
                        .map(|member| together.get(&(&member.id, &node.id)).copied().unwrap_or(0))
                        .sum();
                    (away, crowded, leads, used.get(&node.id).copied().unwrap_or(0), partners)
                });
            let Some(next) = next else { break };
            if place == 0 {
                *leading.entry(&next.id).or_default() += 1;
            }
            *used.entry(&next.id).or_default() += 1;
            for member in &members {
                *together.entry((&member.id, &next.id)).or_default() += 1;
                *together.entry((&next.id, &member.id)).or_default() += 1;
            }
            members.push(next);
        }
        let Some(primary) = members.first().map(|node| node.id.clone()) else {
            break;
        };
        // The set is empty, so whoever runs is in sync, and the primary is whether it runs or not.
        let in_sync = members
            .iter()
            .filter(|node| node.live || node.id == primary)
            .map(|node| node.id.clone())
            .collect();
        records.push(ReplicaSetRecord {
            id: ReplicaSetId(first + number as u32),
            epoch: 1,
            replication: policy,
            members: members.iter().map(|node| node.id.clone()).collect(),
            in_sync,
            primary,
            recovering: false,
            recovery_quorum: 0,
        });
    }
    records
}

/// The bare number of a replica set.
type ReplicaSetIdNumber = u32;

#[cfg(test)]
mod tests {
    use super::*;
    use lazarette_metastore::MemoryStore;
    use std::sync::Arc;

    fn nodes(count: usize, domains: usize) -> Vec<Candidate> {
        (0..count)
            .map(|i| Candidate {
                id: NodeId(format!("node-{i}")),
                failure_domain: format!("zone-{}", i % domains),
                live: true,
            })
            .collect()
    }

    fn spread(records: &[ReplicaSetRecord], of: impl Fn(&ReplicaSetRecord) -> Vec<NodeId>) -> (usize, usize) {
        let mut counts: BTreeMap<NodeId, usize> = BTreeMap::new();
        for record in records {
            for node in of(record) {
                *counts.entry(node).or_default() += 1;
            }
        }
        (
            counts.values().copied().min().unwrap_or(0),
            counts.values().copied().max().unwrap_or(0),
        )
    }

    #[test]
    fn members_and_primaries_are_spread_evenly() {
        for (count, domains) in [(3, 1), (3, 3), (4, 2), (5, 5), (6, 3), (7, 7), (10, 5)] {
            let records = plan(ReplicationPolicy::default(), &nodes(count, domains), 5);
            assert_eq!(records.len(), 8.max(4 * count));
            assert_eq!(records[0].id, ReplicaSetId(5));
            let (least, most) = spread(&records, |r| vec![r.primary.clone()]);
            assert!(
                least > 0 && most - least <= 1,
                "{count}/{domains}: primaries {least}..{most}"
            );
            let (least, most) = spread(&records, |r| r.members.clone());
            assert!(
                least > 0 && most - least <= 2,
                "{count}/{domains}: members {least}..{most}"
            );
            for record in &records {
                let distinct: BTreeSet<_> = record.members.iter().collect();
                assert_eq!(distinct.len(), 3);
                let zones: BTreeSet<_> = record
                    .members
                    .iter()
                    .map(|m| m.0.trim_start_matches("node-").parse::<usize>().unwrap() % domains)
                    .collect();
                assert_eq!(zones.len(), domains.min(3));
                assert_eq!(record.members, record.in_sync);
                assert_eq!(record.primary, record.members[0]);
            }
        }
    }

    #[test]
    fn nodes_that_are_away_neither_lead_nor_count_as_in_sync() {
        let mut three = nodes(3, 3);
        three[1].live = false;
        for record in plan(ReplicationPolicy::default(), &three, 1) {
            assert_ne!(record.primary, three[1].id);
            assert!(!record.in_sync.contains(&three[1].id));
            assert!(record.members.contains(&three[1].id));
        }
    }

    async fn register(store: &MemoryStore, keys: &Keys, count: usize) {
        let mut then = vec![Op::put(
            keys.cluster(),
            encode(&ClusterRecord {
                id: "x".into(),
                next_volume: 1,
                next_replica_set: 1,
            }),
        )];
        for i in 0..count {
            then.push(Op::put(
                keys.node(&NodeId(format!("node-{i}"))),
                encode(&NodeRecord {
                    disk: "d".into(),
                    failure_domain: format!("node-{i}"),
                    draining: false,
                }),
            ));
        }
        store
            .txn(Txn {
                conditions: vec![],
                then,
            })
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn callers_at_once_get_one_table() {
        let store = Arc::new(MemoryStore::new());
        let keys = Keys::new("c");
        register(&store, &keys, 3).await;
        let callers: Vec<_> = (0..8)
            .map(|_| {
                let (store, keys) = (Arc::clone(&store), keys.clone());
                tokio::spawn(async move {
                    ensure_table(&*store, &keys, ReplicationPolicy::default())
                        .await
                        .unwrap()
                })
            })
            .collect();
        let mut tables = Vec::new();
        for caller in callers {
            tables.push(caller.await.unwrap());
        }
        assert_eq!(tables[0].len(), 12);
        assert!(tables.iter().all(|table| *table == tables[0]));
        // Another policy gets sets of its own.
        let other = ensure_table(&*store, &keys, ReplicationPolicy { copies: 2, ack: 2 })
            .await
            .unwrap();
        assert!(other.iter().all(|id| !tables[0].contains(id)));
    }

    #[tokio::test]
    async fn too_few_nodes_are_named() {
        let store = MemoryStore::new();
        let keys = Keys::new("c");
        register(&store, &keys, 2).await;
        let error = ensure_table(&store, &keys, ReplicationPolicy::default())
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "3 copies need 3 storage nodes, 2 are registered: add nodes or ask for fewer copies"
        );
    }
}
