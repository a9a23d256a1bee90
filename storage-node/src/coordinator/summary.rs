use crate::membership::ClusterView;
use lazarette_metastore::ReplicaSetRecord;

/// Replica sets by what they can do now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// All.
    pub replica_sets: u32,
    /// With fewer running in-sync members than copies wanted.
    pub degraded: u32,
    /// That cannot take writes: no running primary, recovering, or fewer than `ack` in sync.
    pub unavailable: u32,
    /// Copies that the degraded ones lack.
    pub missing_copies: u32,
    /// Whose members are being exchanged.
    pub moving: u32,
}

/// Counts the replica sets of a view.
pub fn summarize(view: &ClusterView) -> Summary {
    let mut summary = Summary::default();
    for set in view.replica_sets.values() {
        summary.replica_sets += 1;
        let running = running_in_sync(view, &set.record);
        let copies = set.record.replication.copies as usize;
        if running < copies {
            summary.degraded += 1;
            summary.missing_copies += (copies - running) as u32;
        }
        // A member that fell behind, or died, is degradation; one too many is in exchange for one.
        if set.record.leaving().next().is_some() {
            summary.moving += 1;
        }
        if !view.live.contains_key(&set.record.primary)
            || set.record.recovering
            || running < set.record.replication.ack as usize
        {
            summary.unavailable += 1;
        }
    }
    summary
}

fn running_in_sync(view: &ClusterView, record: &ReplicaSetRecord) -> usize {
    record
        .in_sync
        .iter()
        .filter(|node| view.live.contains_key(node))
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::Versioned;
    use lazarette_metastore::LivenessRecord;
    use lazarette_types::{NodeId, ReplicaSetId, ReplicationPolicy};

    #[test]
    fn sets_are_counted_by_what_runs() {
        let node = |name: &str| NodeId(name.into());
        let record = |in_sync: &[&str], recovering| ReplicaSetRecord {
            id: ReplicaSetId(1),
            epoch: 1,
            replication: ReplicationPolicy::default(),
            members: vec![node("a"), node("b"), node("c")],
            in_sync: in_sync.iter().map(|name| node(name)).collect(),
            primary: node(in_sync[0]),
            recovering,
            recovery_quorum: 0,
        };
        let mut view = ClusterView::default();
        for name in ["a", "b", "c"] {
            let live = LivenessRecord {
                address: name.into(),
                lease: 1,
                capacity_bytes: 0,
                used_bytes: 0,
            };
            view.live.insert(node(name), live);
        }
        let sets = [
            record(&["a", "b", "c"], false),
            record(&["a", "b"], false),
            record(&["a", "b", "c"], true),
            record(&["c"], false),
        ];
        for (id, record) in (1..).zip(sets) {
            let mod_revision = 1;
            view.replica_sets
                .insert(ReplicaSetId(id), Versioned { record, mod_revision });
        }
        let summary = |view: &ClusterView| {
            let Summary {
                replica_sets,
                degraded,
                unavailable,
                missing_copies,
                moving,
            } = summarize(view);
            (replica_sets, degraded, unavailable, missing_copies, moving)
        };
        assert_eq!(summary(&view), (4, 2, 2, 3, 0));
        view.live.remove(&node("a"));
        assert_eq!(summary(&view), (4, 4, 4, 6, 0));
        let exchanged = view.replica_sets.get_mut(&ReplicaSetId(1)).unwrap();
        exchanged.record.members[0] = node("d");
        assert_eq!(summary(&view), (4, 4, 4, 6, 1));
    }
}
