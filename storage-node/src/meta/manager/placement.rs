//! Which node shall own which volume: pure functions of the cluster's view.

use crate::membership::ClusterView;
use lazarette_types::{NodeId, VolumeId};
use std::collections::{BTreeMap, HashSet};

/// The volumes without owner, each with the live nodes in the order in which they should try.
///
/// Every node computes the same from the same view: the node with the fewest volumes comes first,
/// and what it is first for counts as its own for the volumes after.
pub(super) fn plan(view: &ClusterView) -> Vec<(VolumeId, Vec<NodeId>)> {
    let mut owned = counts(view);
    let mut plan = Vec::new();
    for volume in view.volumes.keys().filter(|volume| !view.owners.contains_key(volume)) {
        let mut ranks: Vec<NodeId> = owned.keys().cloned().collect();
        ranks.sort_by_key(|node| (owned[node], affinity(*volume, node)));
        if let Some(first) = ranks.first()
            && let Some(count) = owned.get_mut(first)
        {
            *count += 1;
        }
        plan.push((*volume, ranks));
    }
    plan
}

/// One of `mine` to give up: this node is to leave, or there is a live node with at least two fewer
/// than this one and nothing is without owner.
pub(super) fn surplus(view: &ClusterView, me: &NodeId, mine: &HashSet<VolumeId>) -> Option<VolumeId> {
    if leaves(view, me) {
        return mine.iter().copied().min();
    }
    if view.volumes.keys().any(|volume| !view.owners.contains_key(volume)) {
        return None;
    }
    let owned = counts(view);
    let most = *owned.get(me)?;
    let (least_node, least) = owned.iter().min_by_key(|(_, count)| **count)?;
    if most < least + 2 {
        return None;
    }
    // Of several nodes with too many only the first gives up at a time.
    let first = owned
        .iter()
        .filter(|(_, count)| **count == most)
        .map(|(node, _)| node)
        .next()?;
    if owned.values().max() != Some(&most) || first != me {
        return None;
    }
    mine.iter().copied().min_by_key(|volume| affinity(*volume, least_node))
}

/// Whether a node is to own nothing: it is draining, and others can take over.
pub(super) fn leaves(view: &ClusterView, node: &NodeId) -> bool {
    draining(view, node) && !counts(view).contains_key(node)
}

fn draining(view: &ClusterView, node: &NodeId) -> bool {
    view.nodes.get(node).is_some_and(|record| record.draining)
}

/// How many volumes each node owns that can own some: the live ones, without those that are draining
/// unless there are no others.
fn counts(view: &ClusterView) -> BTreeMap<NodeId, usize> {
    let all_drain = view.live.keys().all(|node| draining(view, node));
    let able = view.live.keys().filter(|node| all_drain || !draining(view, node));
    let mut owned: BTreeMap<NodeId, usize> = able.map(|node| (node.clone(), 0)).collect();
    for owner in view.owners.values() {
        if let Some(count) = owned.get_mut(&owner.node) {
            *count += 1;
        }
    }
    owned
}

/// Rendezvous hashing: lower is nearer.
fn affinity(volume: VolumeId, node: &NodeId) -> u64 {
    let mut bytes = volume.0.to_le_bytes().to_vec();
    bytes.extend_from_slice(node.0.as_bytes());
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lazarette_metastore::{LivenessRecord, OwnerRecord, VolumeRecord, VolumeState};
    use lazarette_types::{ReplicaSetId, ReplicationPolicy};

    pub(super) fn view(nodes: &[&str], volumes: u64, owners: &[(u64, &str)]) -> ClusterView {
        let mut view = ClusterView::default();
        for node in nodes {
            let record = LivenessRecord {
                address: format!("{node}:7400"),
                lease: 1,
                capacity_bytes: 0,
                used_bytes: 0,
            };
            view.live.insert(NodeId((*node).into()), record);
        }
        for id in 1..=volumes {
            let record = VolumeRecord {
                id: VolumeId(id),
                name: format!("v{id}"),
                size: 1,
                replication: ReplicationPolicy::default(),
                chunk_size: 1 << 20,
                replica_sets: vec![ReplicaSetId(1)],
                labels: Default::default(),
                state: VolumeState::Ready,
            };
            view.volumes.insert(VolumeId(id), record);
        }
        for (id, node) in owners {
            let record = OwnerRecord {
                node: NodeId((*node).into()),
                address: String::new(),
                epoch: 1,
            };
            view.owners.insert(VolumeId(*id), record);
        }
        view
    }

    #[test]
    fn many_volumes_spread_evenly() {
        let plan = plan(&view(&["a", "b", "c"], 9, &[]));
        for node in ["a", "b", "c"] {
            let first = plan.iter().filter(|(_, ranks)| ranks[0].0 == node).count();
            assert_eq!(first, 3, "{node}");
        }
        assert!(plan.iter().all(|(_, ranks)| ranks.len() == 3));
    }

    #[test]
    fn the_node_with_the_fewest_comes_first_and_dead_ones_not_at_all() {
        let plan = plan(&view(&["a", "b"], 5, &[(1, "a"), (2, "a"), (3, "dead"), (4, "b")]));
        assert_eq!(plan.len(), 1);
        assert_eq!(plan[0].1, [NodeId("b".into()), NodeId("a".into())]);
    }

    #[test]
    fn only_a_real_surplus_moves() {
        let me = NodeId("a".into());
        let mine = |ids: &[u64]| ids.iter().map(|id| VolumeId(*id)).collect();
        let uneven = view(&["a", "b"], 3, &[(1, "a"), (2, "a"), (3, "b")]);
        assert_eq!(surplus(&uneven, &me, &mine(&[1, 2])), None);
        let more = view(&["a", "b"], 3, &[(1, "a"), (2, "a"), (3, "a")]);
        assert!(surplus(&more, &me, &mine(&[1, 2, 3])).is_some());
        let ownerless = view(&["a", "b"], 3, &[(1, "a"), (2, "a")]);
        assert_eq!(surplus(&ownerless, &me, &mine(&[1, 2])), None);
    }

    #[test]
    fn a_draining_node_gives_everything_up_and_claims_nothing() {
        let me = NodeId("a".into());
        let mine = HashSet::from([VolumeId(1), VolumeId(2)]);
        let mut view = view(&["a", "b"], 3, &[(1, "a"), (2, "a")]);
        let mark = |view: &mut ClusterView, name: &str| {
            let record = lazarette_metastore::NodeRecord {
                disk: "d".into(),
                failure_domain: "z".into(),
                draining: true,
            };
            view.nodes.insert(NodeId(name.into()), record);
        };
        assert!(!leaves(&view, &me));
        mark(&mut view, "a");
        assert!(leaves(&view, &me));
        assert_eq!(surplus(&view, &me, &mine), Some(VolumeId(1)));
        assert_eq!(plan(&view)[0].1, [NodeId("b".into())]);
        // With nobody else, somebody has to.
        mark(&mut view, "b");
        assert!(!leaves(&view, &me));
        assert_eq!(plan(&view)[0].1.len(), 2);
    }
}
