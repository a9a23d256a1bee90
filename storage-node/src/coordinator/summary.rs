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
}

/// Counts the replica sets of a view.
pub fn summarize(view: &ClusterView) -> Summary {
    let mut summary = Summary::default();
    for set in view.replica_sets.values() {
        summary.replica_sets += 1;
        let running = running_in_sync(view, &set.record);
        if running < set.record.replication.copies as usize {
            summary.degraded += 1;
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
