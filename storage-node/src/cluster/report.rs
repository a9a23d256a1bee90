//! The cluster's state as GetStatus tells it.

use crate::coordinator::summarize;
use crate::membership::ClusterView;
use lazarette_metastore::{ActivityRecord, ScrubRecord, VolumeState};
use lazarette_proto::cluster as pb;
use lazarette_types::NodeId;
use std::collections::BTreeMap;

pub(super) fn status(
    view: &ClusterView,
    cluster_id: &str,
    activities: &BTreeMap<NodeId, ActivityRecord>,
) -> pb::ClusterStatus {
    let nodes: Vec<_> = view
        .nodes
        .keys()
        .map(|id| node_status(view, id, activities.get(id)))
        .collect();
    let sets = summarize(view);
    let ready: Vec<_> = view
        .volumes
        .values()
        .filter(|v| v.state == VolumeState::Ready)
        .collect();
    pb::ClusterStatus {
        cluster_id: cluster_id.into(),
        replica_sets: sets.replica_sets,
        degraded_replica_sets: sets.degraded,
        unavailable_replica_sets: sets.unavailable,
        missing_copies: sets.missing_copies,
        moving_replica_sets: sets.moving,
        volumes: ready.len() as u32,
        ownerless_volumes: ready.iter().filter(|v| !view.owners.contains_key(&v.id)).count() as u32,
        coordinator: view.coordinator.as_ref().map(|node| node.0.clone()).unwrap_or_default(),
        repair_chunks: nodes.iter().map(|node| node.repair_chunks).sum(),
        repair_bytes: nodes.iter().map(|node| node.repair_bytes).sum(),
        nodes,
    }
}

fn node_status(view: &ClusterView, id: &NodeId, activity: Option<&ActivityRecord>) -> pb::NodeStatus {
    let record = view.nodes.get(id);
    let live = view.live.get(id);
    let sets = || view.replica_sets.values().map(|set| &set.record);
    let owned_volumes = view.owners.values().filter(|owner| owner.node == *id).count() as u32;
    let replica_sets = sets().filter(|set| set.involves(id)).count() as u32;
    let draining = record.is_some_and(|record| record.draining);
    // What a dead node, or one with another disk, last reported is not going on.
    let activity = activity.filter(|activity| record.is_some_and(|record| record.disk == activity.disk));
    let working = activity.filter(|_| live.is_some());
    pb::NodeStatus {
        id: id.0.clone(),
        address: live.map(|live| live.address.clone()).unwrap_or_default(),
        failure_domain: record.map(|record| record.failure_domain.clone()).unwrap_or_default(),
        live: live.is_some(),
        capacity_bytes: live.map_or(0, |live| live.capacity_bytes),
        used_bytes: live.map_or(0, |live| live.used_bytes),
        owned_volumes,
        primary_replica_sets: sets().filter(|set| set.primary == *id).count() as u32,
        replica_sets,
        draining,
        safe_to_remove: draining && replica_sets == 0 && owned_volumes == 0,
        repair_chunks: working.map_or(0, |work| work.repair_chunks),
        repair_bytes: working.map_or(0, |work| work.repair_bytes),
        scrub: activity.map(|activity| scrub_status(&activity.scrub)),
    }
}

fn scrub_status(scrub: &ScrubRecord) -> pb::ScrubStatus {
    pb::ScrubStatus {
        verified_bytes: scrub.verified_bytes,
        total_bytes: scrub.total_bytes,
        last_pass_seconds: scrub.last_pass,
        found: scrub.found,
        repaired: scrub.repaired,
        lost: scrub.lost,
    }
}
