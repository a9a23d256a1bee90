//! The configurations of a replica set, and the steps from one to the next: pure functions, each
//! followed by a compare-and-swap.
//!
//! What holds of every configuration `c` that is in the store ("holders" of an acknowledged change
//! are the members where it is durable):
//!
//! - **Held**: each acknowledged change has at least `min(ack, |in_sync|)` holders in `in_sync`,
//!   and while `recovering`, any `recovery_quorum` of `in_sync` have a holder among them.
//! - **One author**: all versions that carry an epoch come from one process: the one that wrote
//!   that epoch into the store, be it by [`claim`] or by a later step of the same tenure.
//! - **Alone**: a primary serves only in epochs of its own tenure, and only while its lease lasts;
//!   [`fail_over`] is made only if the primary's liveness, which hangs on that lease, is gone.
//!
//! `members` is what the coordinator wishes, and no part of this: it is changed without a new epoch
//! ([`exchanged`]) and says who is brought into `in_sync`, and who leaves it.
//!
//! From *Held*: any `|in_sync| − ack + 1` members include a holder of every acknowledged change
//! ([`quorum`]), so a new primary that asks so many finds all.

use lazarette_metastore::ReplicaSetRecord;
use lazarette_types::NodeId;
use std::collections::BTreeMap;

/// In-sync members that must be asked to find every acknowledged change, at least 1.
pub fn quorum(record: &ReplicaSetRecord) -> usize {
    let in_sync = record.in_sync.len();
    if record.recovering {
        match record.recovery_quorum as usize {
            0 => in_sync.max(1),
            some => some,
        }
    } else {
        (in_sync + 1).saturating_sub(record.replication.ack as usize).max(1)
    }
}

/// The configuration after the primary's death: the living in-sync members go on under the one of
/// them with the fewest sets to lead, and not under one that is to leave if there are others. None if
/// they are too few to know every acknowledged change: then the set waits for a member to come back.
pub fn fail_over(
    record: &ReplicaSetRecord,
    live: impl Fn(&NodeId) -> bool,
    leading: &BTreeMap<NodeId, usize>,
) -> Option<ReplicaSetRecord> {
    let in_sync: Vec<_> = record
        .in_sync
        .iter()
        .filter(|node| **node != record.primary && live(node))
        .cloned()
        .collect();
    if in_sync.len() < quorum(record) {
        return None;
    }
    let primary = in_sync
        .iter()
        .min_by_key(|node| {
            let leaves = !record.members.contains(node);
            (leaves, leading.get(node).copied().unwrap_or(0))
        })?
        .clone();
    Some(ReplicaSetRecord {
        epoch: record.epoch + 1,
        recovering: true,
        recovery_quorum: quorum(record) as u32,
        in_sync,
        primary,
        ..record.clone()
    })
}

/// The first step of a primary's tenure: an epoch that nobody has used, in which it reconciles the
/// members. Each attempt to recover claims anew, so that requests of the former attempt, which may
/// still be on their way, are refused.
pub fn claim(record: &ReplicaSetRecord) -> ReplicaSetRecord {
    ReplicaSetRecord {
        epoch: record.epoch + 1,
        recovering: true,
        recovery_quorum: quorum(record) as u32,
        ..record.clone()
    }
}

/// The end of a recovery: `reconciled` members (the primary among them, at least [`quorum`] many)
/// have every chunk in the same version. The epoch stays: it is the claim's, so nobody else's.
pub fn recovered(record: &ReplicaSetRecord, reconciled: &[NodeId]) -> Option<ReplicaSetRecord> {
    let in_sync: Vec<_> = record
        .in_sync
        .iter()
        .filter(|node| reconciled.contains(node))
        .cloned()
        .collect();
    if in_sync.len() < quorum(record) || !in_sync.contains(&record.primary) {
        return None;
    }
    Some(ReplicaSetRecord {
        recovering: false,
        recovery_quorum: 0,
        in_sync,
        ..record.clone()
    })
}

/// Without some members. Before this every acknowledged change must be on all that remain.
pub fn without(record: &ReplicaSetRecord, ejected: &[NodeId]) -> ReplicaSetRecord {
    let mut next = record.clone();
    next.epoch += 1;
    next.in_sync
        .retain(|node| !ejected.contains(node) || *node == record.primary);
    next
}

/// With a member that has caught up: every acknowledged change is on it.
pub fn with(record: &ReplicaSetRecord, member: &NodeId) -> ReplicaSetRecord {
    let mut next = record.clone();
    next.epoch += 1;
    if record.members.contains(member) && !record.in_sync.contains(member) {
        next.in_sync.push(member.clone());
        // In the order of the members, so that equal configurations look equal.
        let place = |node: &NodeId| record.members.iter().position(|member| member == node);
        next.in_sync.sort_by_key(|node| place(node).unwrap_or(usize::MAX));
    }
    next
}

/// With another node in a member's place. Nothing else changes, the epoch neither: the primary
/// brings the new member in, and then lets the old one go. None if `to` is a member already.
pub fn exchanged(record: &ReplicaSetRecord, from: &NodeId, to: &NodeId) -> Option<ReplicaSetRecord> {
    let place = record.members.iter().position(|member| member == from)?;
    if record.members.contains(to) {
        return None;
    }
    let mut next = record.clone();
    next.members[place] = to.clone();
    Some(next)
}

/// Whether two configurations differ in nothing but the members.
pub fn same_but_members(a: &ReplicaSetRecord, b: &ReplicaSetRecord) -> bool {
    let members = a.members.clone();
    ReplicaSetRecord { members, ..b.clone() } == *a
}

/// Led by another in-sync member: every acknowledged change is on all of them, and this primary
/// has stopped serving. The new one claims its own epoch.
pub fn handed_over(record: &ReplicaSetRecord, to: &NodeId) -> ReplicaSetRecord {
    ReplicaSetRecord {
        epoch: record.epoch + 1,
        primary: to.clone(),
        recovering: true,
        recovery_quorum: quorum(record) as u32,
        ..record.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lazarette_types::{ReplicaSetId, ReplicationPolicy};

    fn node(name: &str) -> NodeId {
        NodeId(name.into())
    }

    fn set(copies: u32, ack: u32) -> ReplicaSetRecord {
        let members: Vec<_> = ["a", "b", "c", "d", "e"][..copies as usize]
            .iter()
            .map(|name| node(name))
            .collect();
        ReplicaSetRecord {
            id: ReplicaSetId(1),
            epoch: 4,
            replication: ReplicationPolicy { copies, ack },
            in_sync: members.clone(),
            primary: members[0].clone(),
            members,
            recovering: false,
            recovery_quorum: 0,
        }
    }

    #[test]
    fn a_dead_primary_is_replaced_by_the_least_burdened() {
        let leading = BTreeMap::from([(node("b"), 5), (node("c"), 2)]);
        let next = fail_over(&set(3, 2), |n| n.0 != "a", &leading).unwrap();
        assert_eq!(next.primary, node("c"));
        assert_eq!(next.in_sync, [node("b"), node("c")]);
        assert_eq!((next.epoch, next.recovering, next.recovery_quorum), (5, true, 2));
    }

    #[test]
    fn no_failover_without_all_acknowledged_changes() {
        // Acknowledged by a and b perhaps, and neither lives.
        assert_eq!(fail_over(&set(3, 2), |n| n.0 == "c", &BTreeMap::new()), None);
        // Background mirroring: the primary may be the only holder.
        assert_eq!(fail_over(&set(2, 1), |n| n.0 == "b", &BTreeMap::new()), None);
        // Everything is on both.
        assert!(fail_over(&set(2, 2), |n| n.0 == "b", &BTreeMap::new()).is_some());
        assert!(fail_over(&set(3, 3), |n| n.0 == "c", &BTreeMap::new()).is_some());
    }

    #[test]
    fn a_second_death_during_recovery_does_not_lower_the_quorum() {
        let first = fail_over(&set(3, 2), |n| n.0 != "a", &BTreeMap::new()).unwrap();
        assert_eq!(fail_over(&first, |n| n.0 == "c", &BTreeMap::new()), None);
        let claimed = claim(&first);
        assert_eq!(claimed.recovery_quorum, 2);
        assert_eq!(recovered(&claimed, &[node("b")]), None);
        // A restarted primary of three asks any two.
        let restarted = claim(&set(3, 2));
        let next = recovered(&restarted, &[node("a"), node("c")]).unwrap();
        assert_eq!(next.in_sync, [node("a"), node("c")]);
        assert!(!next.recovering);
        assert_eq!(next.epoch, restarted.epoch);
        assert_eq!(recovered(&restarted, &[node("b"), node("c")]), None);
    }

    #[test]
    fn members_leave_and_return_in_order() {
        let two = without(&set(3, 2), &[node("b")]);
        assert_eq!((two.epoch, two.in_sync.len()), (5, 2));
        let three = with(&two, &node("b"));
        assert_eq!(three.in_sync, [node("a"), node("b"), node("c")]);
        assert_eq!(with(&three, &node("x")).in_sync.len(), 3);
        // The primary never ejects itself.
        assert_eq!(without(&set(3, 2), &[node("a")]).in_sync.len(), 3);
    }

    #[test]
    fn an_exchanged_member_stays_in_sync_until_it_is_let_go() {
        let moving = exchanged(&set(3, 2), &node("a"), &node("d")).unwrap();
        assert_eq!(moving.members, [node("d"), node("b"), node("c")]);
        assert_eq!((moving.epoch, moving.in_sync.len()), (4, 3));
        assert!(same_but_members(&moving, &set(3, 2)) && !moving.settled());
        assert_eq!(exchanged(&moving, &node("b"), &node("d")), None);
        assert_eq!(exchanged(&moving, &node("a"), &node("e")), None);
        let four = with(&moving, &node("d"));
        assert_eq!(four.in_sync, [node("d"), node("b"), node("c"), node("a")]);
        // The one that leaves leads only if nobody else can.
        let next = fail_over(
            &ReplicaSetRecord {
                primary: node("b"),
                ..four.clone()
            },
            |_| true,
            &BTreeMap::from([(node("d"), 9), (node("c"), 9)]),
        )
        .unwrap();
        assert_ne!(next.primary, node("a"));
        let led_by_d = ReplicaSetRecord {
            primary: node("d"),
            ..four
        };
        let done = without(&led_by_d, &[node("a")]);
        assert_eq!(done.in_sync, done.members);
        assert!(done.settled());
    }
}
