//! What the status says, as a pure function of what was seen.

use super::dereference::{Rollout, Unsatisfied};
use super::rolling::has_left;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use lazarette_api::{
    ConditionType, CountStatus, Finding, ReplicaSetsStatus, ScrubStatus, StorageCluster, StorageClusterStatus,
    human_bytes, is_true, merge,
};
use lazarette_proto::cluster::ClusterStatus;

/// Longest message in a condition, in bytes. Events take no more than 1,024.
const MESSAGE_MAX: usize = 1000;

/// Blocking volumes that are listed by name.
const VOLUMES_LISTED: usize = 20;

/// Why a cluster that shall be deleted is still there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DeletionHold {
    /// These volumes exist.
    Volumes(Vec<String>),
    /// Whether volumes exist could not be found out.
    Unknown(String),
}

/// Everything that was seen in one reconciliation.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// Mistakes in the spec.
    pub mistakes: Vec<String>,
    /// Writing the objects failed.
    pub apply_error: Option<String>,
    /// What Kubernetes lacks.
    pub unsatisfied: Vec<Unsatisfied>,
    /// etcd's StatefulSet.
    pub etcd: Rollout,
    /// The storage nodes' StatefulSet.
    pub storage: Rollout,
    /// What keeps pods from running.
    pub pod_problems: Vec<Unsatisfied>,
    /// What the storage nodes said.
    pub view: Result<ClusterStatus, String>,
    /// Why outdated pods are not started anew yet.
    pub waiting: Option<String>,
    /// Set while the cluster is being deleted and may not be.
    pub hold: Option<DeletionHold>,
}

/// The new status.
pub(super) fn status(cluster: &StorageCluster, seen: &Seen, now: Timestamp) -> StorageClusterStatus {
    let old = cluster.status.clone().unwrap_or_default();
    let generation = cluster.metadata.generation;
    let spec = &cluster.spec;
    let wanted = |pods| if spec.stopped { 0 } else { pods };
    let findings = findings(cluster, seen);
    let mut status = StorageClusterStatus {
        observed_generation: generation,
        conditions: merge(&old.conditions, &findings, generation, now),
        etcd: own_etcd(cluster).then(|| CountStatus::new(seen.etcd.ready, wanted(spec.etcd.members))),
        storage_nodes: Some(CountStatus::new(seen.storage.ready, wanted(spec.storage_nodes.count))),
        blocking_volumes: match &seen.hold {
            Some(DeletionHold::Volumes(volumes)) => volumes.iter().take(VOLUMES_LISTED).cloned().collect(),
            _ => Vec::new(),
        },
        // What is known from before stays while the storage nodes cannot be asked.
        cluster_id: old.cluster_id,
        replica_sets: old.replica_sets,
        draining: old.draining,
        scrub: old.scrub,
        volumes: old.volumes,
        capacity: old.capacity,
        used: old.used,
    };
    if let Ok(view) = &seen.view {
        let sum = |what: fn(&lazarette_proto::cluster::NodeStatus) -> u64| -> u64 {
            view.nodes.iter().map(what).fold(0, u64::saturating_add)
        };
        status.cluster_id = Some(view.cluster_id.clone()).filter(|id| !id.is_empty());
        status.replica_sets = Some(ReplicaSetsStatus {
            total: view.replica_sets.into(),
            degraded: view.degraded_replica_sets.into(),
            unavailable: view.unavailable_replica_sets.into(),
            copies_missing: view.missing_copies.into(),
            moving: view.moving_replica_sets.into(),
            to_copy: human_bytes(view.repair_bytes),
        });
        let draining = view.nodes.iter().filter(|node| node.draining && !has_left(node));
        status.draining = draining.map(|node| node.id.clone()).collect();
        status.scrub = scrub(view);
        status.volumes = Some(view.volumes.into());
        status.capacity = Some(human_bytes(sum(|node| node.capacity_bytes)));
        status.used = Some(human_bytes(sum(|node| node.used_bytes)));
    }
    status
}

fn own_etcd(cluster: &StorageCluster) -> bool {
    cluster.spec.etcd.external.is_none()
}

/// What all storage nodes have found; absent until one has said it.
fn scrub(view: &ClusterStatus) -> Option<ScrubStatus> {
    let mut reports = view.nodes.iter().filter_map(|node| node.scrub.as_ref()).peekable();
    reports.peek()?;
    let count = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    Some(reports.fold(ScrubStatus::default(), |sum, report| ScrubStatus {
        damaged: sum.damaged.saturating_add(count(report.found)),
        repaired: sum.repaired.saturating_add(count(report.repaired)),
        lost: sum.lost.saturating_add(count(report.lost)),
    }))
}

/// Whether the next look should come soon: something is under way or wrong.
pub(super) fn is_unsettled(status: &StorageClusterStatus) -> bool {
    !is_true(&status.conditions, ConditionType::Available)
        || is_true(&status.conditions, ConditionType::Progressing)
        || is_true(&status.conditions, ConditionType::Degraded)
}

fn findings(cluster: &StorageCluster, seen: &Seen) -> Vec<Finding> {
    let available = available(cluster, seen);
    let progressing = progressing(cluster, seen, available.value == Some(true));
    let degraded = degraded(cluster, seen, progressing.value == Some(true));
    vec![available, progressing, degraded, paused(cluster)]
}

fn finding(kind: ConditionType, value: Option<bool>, reason: &'static str, message: impl Into<String>) -> Finding {
    let mut message = message.into();
    if message.len() > MESSAGE_MAX {
        let end = (0..=MESSAGE_MAX - 3).rev().find(|&i| message.is_char_boundary(i));
        message.truncate(end.unwrap_or_default());
        message.push('…');
    }
    Finding {
        kind,
        value,
        reason,
        message,
    }
}

fn available(cluster: &StorageCluster, seen: &Seen) -> Finding {
    let finding = |value, reason, message: String| finding(ConditionType::Available, value, reason, message);
    let spec = &cluster.spec;
    if spec.stopped {
        return finding(Some(false), "Stopped", "stopped as spec.stopped asks".to_owned());
    }
    let view = match &seen.view {
        Ok(view) => view,
        Err(_) if cluster_id(cluster).is_none() => {
            let message = "the storage nodes have not started yet";
            return finding(Some(false), "Starting", message.to_owned());
        }
        Err(error) if seen.storage.ready == 0 => return finding(Some(false), "StorageNodesDown", error.clone()),
        Err(error) => return finding(None, "StorageNodesUnreachable", error.clone()),
    };
    let copies = u32::try_from(spec.replication.copies).unwrap_or_default();
    let known = u32::try_from(view.nodes.len()).unwrap_or(u32::MAX);
    if known < copies {
        let message = format!("{known} storage nodes have joined, a volume needs {copies}");
        return finding(Some(false), "TooFewStorageNodes", message);
    }
    if view.unavailable_replica_sets > 0 {
        let message = format!(
            "{} of {} replica sets cannot take writes: too few of their storage nodes run",
            view.unavailable_replica_sets, view.replica_sets
        );
        return finding(Some(false), "ReplicaSetsUnavailable", message);
    }
    if view.ownerless_volumes > 0 {
        let message = format!(
            "the metadata of {} of {} volumes is served by no storage node now",
            view.ownerless_volumes, view.volumes
        );
        return finding(Some(false), "VolumesWithoutOwner", message);
    }
    let live = u32::try_from(view.nodes.iter().filter(|node| node.live).count()).unwrap_or(u32::MAX);
    if live < u32::try_from(spec.replication.ack).unwrap_or(1) {
        let message = format!("{live} of {known} storage nodes are live");
        return finding(Some(false), "TooFewStorageNodes", message);
    }
    finding(Some(true), "VolumesServed", "all volumes can be served".to_owned())
}

fn cluster_id(cluster: &StorageCluster) -> Option<&str> {
    cluster.status.as_ref()?.cluster_id.as_deref()
}

fn progressing(cluster: &StorageCluster, seen: &Seen, available: bool) -> Finding {
    let finding = |value, reason, message: String| finding(ConditionType::Progressing, Some(value), reason, message);
    match &seen.hold {
        Some(DeletionHold::Volumes(volumes)) => {
            let mut names = volumes
                .iter()
                .take(VOLUMES_LISTED)
                .cloned()
                .collect::<Vec<_>>()
                .join(", ");
            if volumes.len() > VOLUMES_LISTED {
                names.push_str(", …");
            }
            let message = format!(
                "deletion waits for {} volumes to be deleted: {names}; delete their PersistentVolumeClaims",
                volumes.len()
            );
            return finding(true, "DeletionBlocked", message);
        }
        Some(DeletionHold::Unknown(error)) => {
            let message = format!(
                "deletion waits until the storage nodes can be asked whether volumes exist: {error}; to delete all \
                 the same, set the annotation {}=true",
                lazarette_api::annotation::FORCE_DELETE
            );
            return finding(true, "DeletionWaiting", message);
        }
        None => {}
    }
    if cluster.spec.paused {
        return finding(false, "Paused", "changes are held back as spec.paused asks".to_owned());
    }
    if !seen.mistakes.is_empty() {
        return finding(
            false,
            "InvalidSpec",
            "nothing is changed while the spec is invalid".to_owned(),
        );
    }
    let stopped = cluster.spec.stopped;
    let parts = [
        (seen.etcd, "etcd", own_etcd(cluster)),
        (seen.storage, "storage nodes", true),
    ];
    for (rollout, name, _) in parts.into_iter().filter(|(_, _, there)| *there) {
        if !rollout.exists || rollout.changing {
            let message = match &seen.waiting {
                Some(waiting) => format!("{name}: other pods wait, as {waiting}"),
                None => format!("{name}: {} pods are ready, others are being changed", rollout.ready),
            };
            return finding(true, if stopped { "Stopping" } else { "RollingOut" }, message);
        }
    }
    if stopped {
        return finding(false, "Stopped", "no pod is running".to_owned());
    }
    let nodes = cluster.spec.storage_nodes.count;
    if !available && cluster_id(cluster).is_none() {
        let etcd = match own_etcd(cluster) {
            true => format!("{}/{} etcd members and ", seen.etcd.ready, cluster.spec.etcd.members),
            false => String::new(),
        };
        let message = format!(
            "waiting for the first start: {etcd}{}/{nodes} storage nodes are ready",
            seen.storage.ready
        );
        return finding(true, "Starting", message);
    }
    if let Ok(view) = &seen.view {
        let leaving: Vec<_> = view.nodes.iter().filter(|node| node.draining).collect();
        if !leaving.is_empty() {
            let names: Vec<_> = leaving.iter().map(|node| node.id.as_str()).collect();
            let sets: u32 = leaving.iter().map(|node| node.replica_sets).sum();
            let message = format!(
                "scaling in to {nodes} storage nodes: {} hand over {sets} copies of replica sets, {} are to be copied",
                names.join(", "),
                human_bytes(view.repair_bytes)
            );
            return finding(true, "ScalingIn", message);
        }
        if view.moving_replica_sets > 0 {
            let message = format!(
                "{} of {} replica sets are moving to other storage nodes, {} are to be copied",
                view.moving_replica_sets,
                view.replica_sets,
                human_bytes(view.repair_bytes)
            );
            return finding(true, "Rebalancing", message);
        }
    }
    finding(false, "AsSpecified", "all objects are as the spec asks".to_owned())
}

fn degraded(cluster: &StorageCluster, seen: &Seen, progressing: bool) -> Finding {
    let spec = &cluster.spec;
    let mut problems: Vec<(&'static str, String)> = Vec::new();
    if !seen.mistakes.is_empty() {
        problems.push(("InvalidSpec", seen.mistakes.join("; ")));
    }
    if let Some(error) = &seen.apply_error {
        problems.push(("ApplyFailed", error.clone()));
    }
    let missing = seen.unsatisfied.iter().chain(&seen.pod_problems);
    problems.extend(missing.map(|problem| (problem.reason, problem.message.clone())));
    // While everything starts for the first time, pods that are not ready are no defect.
    let starting = progressing && cluster_id(cluster).is_none();
    if !spec.stopped && !starting {
        if let Ok(view) = &seen.view {
            let down = view.nodes.iter().filter(|n| !n.live && !has_left(n));
            let down: Vec<_> = down.map(|n| n.id.as_str()).collect();
            if !down.is_empty() {
                problems.push((
                    "StorageNodesDown",
                    format!("storage nodes not live: {}", down.join(", ")),
                ));
            }
            if view.degraded_replica_sets > 0 {
                let message = format!(
                    "{} of {} replica sets have fewer copies than wanted: {} copies are missing, {} are to be copied",
                    view.degraded_replica_sets,
                    view.replica_sets,
                    view.missing_copies,
                    human_bytes(view.repair_bytes)
                );
                problems.push(("CopiesMissing", message));
            }
            let lost = scrub(view).map_or(0, |scrub| scrub.lost);
            if lost > 0 {
                let message = format!("{lost} damaged copies of data have no good copy from which to replace them");
                problems.push(("DataDamaged", message));
            }
        }
        if let Err(error) = &seen.view {
            problems.push(("StorageNodesUnreachable", error.clone()));
        }
        for (rollout, wanted, reason, name) in [
            (seen.etcd, spec.etcd.members, "EtcdMembersDown", "etcd members"),
            (
                seen.storage,
                spec.storage_nodes.count,
                "StorageNodesNotReady",
                "storage nodes",
            ),
        ] {
            if rollout.ready < wanted && (own_etcd(cluster) || reason != "EtcdMembersDown") {
                problems.push((reason, format!("{}/{wanted} {name} are ready", rollout.ready)));
            }
        }
    }
    let Some((reason, _)) = problems.first() else {
        return finding(
            ConditionType::Degraded,
            Some(false),
            "Healthy",
            "nothing is broken or missing",
        );
    };
    let messages: Vec<_> = problems.iter().map(|(_, message)| message.as_str()).collect();
    finding(ConditionType::Degraded, Some(true), reason, messages.join("; "))
}

fn paused(cluster: &StorageCluster) -> Finding {
    let finding = |value, reason, message: &str| finding(ConditionType::Paused, Some(value), reason, message);
    match (cluster.spec.paused, cluster.spec.stopped) {
        (true, _) => finding(
            true,
            "Paused",
            "the operator changes nothing until spec.paused is false",
        ),
        (false, true) => finding(true, "Stopped", "no pod runs until spec.stopped is false"),
        (false, false) => finding(false, "Active", "neither spec.paused nor spec.stopped is set"),
    }
}

/// A pod may be unschedulable for so long, in seconds, without being a problem: claims are bound
/// after pods are made.
const SCHEDULING: i64 = 15;

/// A pod's containers may be in the making for so long, in seconds.
const CREATION: i64 = 90;

/// What keeps pods from running, as far as Kubernetes tells.
pub(super) fn pod_problems(pods: &[Pod], now: Timestamp) -> Vec<Unsatisfied> {
    const SERIOUS: [(&str, &str); 8] = [
        ("CrashLoopBackOff", "PodsCrashing"),
        ("ImagePullBackOff", "ImageNotPulled"),
        ("ErrImagePull", "ImageNotPulled"),
        ("ErrImageNeverPull", "ImageNotPulled"),
        ("InvalidImageName", "ImageNotPulled"),
        ("CreateContainerConfigError", "PodsNotCreated"),
        ("CreateContainerError", "PodsNotCreated"),
        ("RunContainerError", "PodsNotCreated"),
    ];
    let mut problems: Vec<Unsatisfied> = Vec::new();
    for pod in pods {
        let Some(status) = &pod.status else { continue };
        let name = pod.name_any();
        let created = pod.metadata.creation_timestamp.as_ref();
        let is_new = created.is_some_and(|time| now.as_second() - time.0.as_second() < SCHEDULING);
        let unscheduled = status.conditions.iter().flatten().find(|condition| {
            condition.type_ == "PodScheduled"
                && condition.status == "False"
                && condition.reason.as_deref() == Some("Unschedulable")
                && !is_new
        });
        if let Some(condition) = unscheduled {
            problems.push(Unsatisfied {
                reason: "PodsNotScheduled",
                message: format!(
                    "pod {name}: {}",
                    condition.message.as_deref().unwrap_or("unschedulable")
                ),
            });
        }
        let containers = status.init_container_statuses.iter().flatten();
        for container in containers.chain(status.container_statuses.iter().flatten()) {
            let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
            let Some((waiting, word)) = waiting.and_then(|w| Some((w, w.reason.as_deref()?))) else {
                continue;
            };
            if word == "ContainerCreating"
                && created.is_some_and(|time| now.as_second() - time.0.as_second() > CREATION)
            {
                problems.push(Unsatisfied {
                    reason: "PodsNotCreated",
                    message: format!("pod {name} waits for a volume, a Secret or an image: see its events"),
                });
                break;
            }
            if let Some((_, reason)) = SERIOUS.into_iter().find(|(serious, _)| *serious == word) {
                let text = last_words(container).or(waiting.message.as_deref()).unwrap_or_default();
                problems.push(Unsatisfied {
                    reason,
                    message: format!("pod {name}: {word}: {text}"),
                });
            }
        }
    }
    problems
}

/// What a container said when it ended: the last line of its log, as the pods' templates ask for.
fn last_words(container: &ContainerStatus) -> Option<&str> {
    let ended = container.last_state.as_ref()?.terminated.as_ref()?;
    ended.message.as_deref()?.lines().rfind(|line| !line.trim().is_empty())
}

#[cfg(test)]
mod tests;
