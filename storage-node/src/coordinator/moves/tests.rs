use super::*;
use crate::coordinator::{Candidate, plan as table};
use lazarette_metastore::{LivenessRecord, NodeRecord};
use lazarette_types::ReplicationPolicy;

fn node(i: usize) -> NodeId {
    NodeId(format!("node-{i}"))
}

fn add(view: &mut ClusterView, i: usize, domain: usize) {
    let record = NodeRecord {
        disk: format!("disk-{i}"),
        failure_domain: format!("zone-{domain}"),
        draining: false,
    };
    let live = LivenessRecord {
        address: format!("node-{i}:7400"),
        lease: 1,
        capacity_bytes: 1 << 40,
        used_bytes: 1 << 30,
    };
    view.nodes.insert(node(i), record);
    view.live.insert(node(i), live);
}

/// A cluster at rest.
fn cluster(count: usize, domains: usize) -> ClusterView {
    let mut view = ClusterView::default();
    for i in 0..count {
        add(&mut view, i, i % domains);
    }
    let candidates: Vec<_> = view
        .nodes
        .iter()
        .map(|(id, record)| Candidate {
            id: id.clone(),
            failure_domain: record.failure_domain.clone(),
            live: true,
        })
        .collect();
    for record in table(ReplicationPolicy::default(), &candidates, 1) {
        let mod_revision = 1;
        view.replica_sets.insert(record.id, Versioned { record, mod_revision });
    }
    view
}

/// What primaries do when they have copied: bring in, let go, hand over.
fn carry_out(view: &mut ClusterView, exchanges: Vec<Exchange>) {
    for exchange in exchanges {
        let record = &mut view.replica_sets.get_mut(&exchange.set).unwrap().record;
        *record = exchange.next;
        record.in_sync = record.members.clone();
        record.primary = record.members[0].clone();
    }
}

/// Plans until nothing is left to do.
fn settle(view: &mut ClusterView, away: &Away) -> usize {
    let mut total = 0;
    loop {
        let exchanges = plan(view, away);
        if exchanges.is_empty() {
            return total;
        }
        total += exchanges.len();
        assert!(total < 1000, "never at rest");
        carry_out(view, exchanges);
    }
}

fn counts(view: &ClusterView, of: impl Fn(&ReplicaSetRecord, &NodeId) -> bool) -> Vec<usize> {
    let count = |node: &NodeId| view.replica_sets.values().filter(|set| of(&set.record, node)).count();
    view.nodes.keys().map(count).collect()
}

fn members(view: &ClusterView) -> Vec<usize> {
    counts(view, |set, node| set.members.contains(node))
}

fn leading(view: &ClusterView) -> Vec<usize> {
    counts(view, |set, node| set.members[0] == *node)
}

fn spread(counts: &[usize]) -> usize {
    counts.iter().max().unwrap() - counts.iter().min().unwrap()
}

/// Kills a node: it is gone, and ejected by those who live.
fn kill(view: &mut ClusterView, dead: &NodeId) {
    view.live.remove(dead);
    for set in view.replica_sets.values_mut() {
        set.record.in_sync.retain(|node| node != dead);
        if set.record.primary == *dead {
            set.record.primary = set.record.in_sync[0].clone();
        }
    }
}

fn away(nodes: &[NodeId]) -> Away {
    Away {
        for_good: nodes.iter().cloned().collect(),
        for_now: nodes.iter().cloned().collect(),
    }
}

#[test]
fn a_new_cluster_is_at_rest() {
    for (count, domains) in [(3, 3), (4, 4), (5, 5), (6, 3), (7, 7), (9, 3)] {
        let view = cluster(count, domains);
        assert_eq!(plan(&view, &Away::default()), [], "{count} nodes, {domains} domains");
    }
}

#[test]
fn the_copies_of_a_lost_node_go_to_all_others() {
    let mut view = cluster(5, 5);
    kill(&mut view, &node(2));
    assert_eq!(plan(&view, &Away::default()), [], "it may come back");
    let exchanges = plan(&view, &away(&[node(2)]));
    assert_eq!(exchanges.len(), 12);
    for exchange in &exchanges {
        assert_eq!(exchange.absent, Some(node(2)));
        let known = &view.replica_sets[&exchange.set].record;
        assert_eq!(exchange.next.in_sync, known.in_sync);
        assert_eq!(
            (exchange.next.epoch, &exchange.next.primary),
            (known.epoch, &known.primary)
        );
    }
    settle(&mut view, &away(&[node(2)]));
    let members = members(&view);
    assert_eq!(members[2], 0);
    let others = [members[0], members[1], members[3], members[4]];
    assert!(spread(&others) <= 2, "{members:?}");
    let leading = leading(&view);
    assert!(
        spread(&[leading[0], leading[1], leading[3], leading[4]]) <= 1,
        "{leading:?}"
    );
}

#[test]
fn failure_domains_stay_apart_and_full_disks_are_spared() {
    let mut view = cluster(6, 3);
    kill(&mut view, &node(0));
    // node-3 is alone in zone-0 now.
    settle(&mut view, &away(&[node(0)]));
    for set in view.replica_sets.values() {
        let zones: BTreeSet<_> = set
            .record
            .members
            .iter()
            .map(|node| &view.nodes[node].failure_domain)
            .collect();
        assert_eq!(zones.len(), 3, "{:?}", set.record.members);
    }
    let mut view = cluster(5, 5);
    view.live.get_mut(&node(4)).unwrap().used_bytes = (1 << 40) - 1;
    kill(&mut view, &node(0));
    for exchange in plan(&view, &away(&[node(0)])) {
        let before = &view.replica_sets[&exchange.set].record;
        let others = (1..4).any(|i| !before.involves(&node(i)));
        assert!(!others || before.members.contains(&node(4)) == exchange.next.members.contains(&node(4)));
    }
}

#[test]
fn without_a_spare_or_a_primary_nothing_is_changed() {
    let mut view = cluster(3, 3);
    kill(&mut view, &node(1));
    assert_eq!(plan(&view, &away(&[node(1)])), []);
    add(&mut view, 3, 3);
    let gone = node(0);
    for set in view.replica_sets.values_mut() {
        set.record.primary = gone.clone();
    }
    view.live.remove(&gone);
    assert_eq!(plan(&view, &away(&[node(0), node(1)])), [], "nobody could copy");
    add(&mut view, 0, 0);
    view.replica_sets
        .values_mut()
        .for_each(|set| set.record.recovering = true);
    assert_eq!(plan(&view, &away(&[node(1)])), [], "recovering");
    view.replica_sets
        .values_mut()
        .for_each(|set| set.record.recovering = false);
    assert_eq!(plan(&view, &away(&[node(1)])).len(), 12);
}

#[test]
fn a_new_node_gets_its_share_little_by_little() {
    let mut view = cluster(4, 4);
    add(&mut view, 4, 4);
    let first = plan(&view, &Away::default());
    assert_eq!(first.len(), MOVES_PER_NODE * 5);
    for exchange in &first {
        assert_eq!(exchange.absent, None);
        let before = &view.replica_sets[&exchange.set].record;
        let changed = before
            .members
            .iter()
            .zip(&exchange.next.members)
            .filter(|(a, b)| a != b);
        assert_eq!(changed.count(), 1);
        assert!(exchange.next.members.contains(&node(4)));
    }
    // Not before the first ones are through.
    for exchange in &first {
        view.replica_sets.get_mut(&exchange.set).unwrap().record = exchange.next.clone();
    }
    assert_eq!(plan(&view, &Away::default()), []);
    carry_out(&mut view, first);
    settle(&mut view, &Away::default());
    assert!(spread(&members(&view)) <= 2, "{:?}", members(&view));
    assert!(spread(&leading(&view)) <= 1, "{:?}", leading(&view));
    // A disk of twice the size gets about twice as much.
    add(&mut view, 5, 5);
    view.live.get_mut(&node(5)).unwrap().capacity_bytes = 2 << 40;
    settle(&mut view, &Away::default());
    let members = members(&view);
    assert!(members[5] > members[0] + members[0] / 2, "{members:?}");
}

#[test]
fn nothing_is_spread_while_copies_are_missing() {
    let mut view = cluster(4, 4);
    add(&mut view, 4, 4);
    kill(&mut view, &node(0));
    assert_eq!(plan(&view, &Away::default()), []);
}

#[test]
fn a_draining_node_ends_with_nothing_and_undrained_gets_its_share_again() {
    let mut view = cluster(4, 4);
    view.nodes.get_mut(&node(1)).unwrap().draining = true;
    let first = plan(&view, &Away::default());
    assert_eq!(first.len(), MOVES_PER_NODE * 3);
    settle(&mut view, &Away::default());
    assert_eq!(members(&view)[1], 0);
    view.nodes.get_mut(&node(1)).unwrap().draining = false;
    settle(&mut view, &Away::default());
    assert!(spread(&members(&view)) <= 2, "{:?}", members(&view));
}

#[test]
fn a_draining_node_that_dies_is_not_waited_for() {
    let mut view = cluster(5, 5);
    view.nodes.get_mut(&node(1)).unwrap().draining = true;
    kill(&mut view, &node(1));
    let exchanges = plan(&view, &Away::default());
    assert_eq!(exchanges.len(), 12);
    assert!(exchanges.iter().all(|exchange| exchange.absent == Some(node(1))));
}

#[test]
fn a_move_to_a_node_that_vanishes_takes_another_way() {
    let mut view = cluster(5, 5);
    view.nodes.get_mut(&node(0)).unwrap().draining = true;
    let exchanges = plan(&view, &Away::default());
    let one = exchanges[0].clone();
    let target = one.next.lacking().next().unwrap().clone();
    view.replica_sets.get_mut(&one.set).unwrap().record = one.next.clone();
    view.live.remove(&target);
    let gone = Away {
        for_now: BTreeSet::from([target.clone()]),
        ..Away::default()
    };
    let again = plan(&view, &gone)
        .into_iter()
        .find(|exchange| exchange.set == one.set)
        .unwrap();
    assert!(!again.next.members.contains(&target) && !again.next.members.contains(&node(0)));
    // With the old member free to stay, it stays.
    view.nodes.get_mut(&node(0)).unwrap().draining = false;
    let back = plan(&view, &gone)
        .into_iter()
        .find(|exchange| exchange.set == one.set)
        .unwrap();
    assert!(back.next.members.contains(&node(0)) && back.next.settled());
}
