use super::*;
use crate::cluster::tests::sample;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use lazarette_api::condition;
use lazarette_proto::cluster::NodeStatus;
use serde_json::json;

fn rollout(ready: i32) -> Rollout {
    Rollout {
        exists: true,
        ready,
        changing: false,
    }
}

fn view() -> ClusterStatus {
    let node = |id: &str| NodeStatus {
        id: id.to_owned(),
        live: true,
        capacity_bytes: 10 << 30,
        used_bytes: 1 << 30,
        ..NodeStatus::default()
    };
    ClusterStatus {
        cluster_id: "c1".to_owned(),
        nodes: ["demo-storage-0", "demo-storage-1", "demo-storage-2"].map(node).into(),
        replica_sets: 8,
        volumes: 2,
        ..ClusterStatus::default()
    }
}

fn healthy() -> Seen {
    Seen {
        mistakes: Vec::new(),
        apply_error: None,
        unsatisfied: Vec::new(),
        etcd: rollout(3),
        storage: rollout(3),
        pod_problems: Vec::new(),
        view: Ok(view()),
        waiting: None,
        hold: None,
    }
}

/// The conditions as `Type=Status:Reason`.
fn conditions(cluster: &StorageCluster, seen: &Seen) -> [String; 4] {
    let status = status(cluster, seen, Timestamp::UNIX_EPOCH);
    ConditionType::ALL.map(|kind| {
        let Condition { status, reason, .. } = condition(&status.conditions, kind).unwrap();
        format!("{}={status}:{reason}", kind.as_str())
    })
}

fn message(cluster: &StorageCluster, seen: &Seen, kind: ConditionType) -> String {
    let status = status(cluster, seen, Timestamp::UNIX_EPOCH);
    condition(&status.conditions, kind).unwrap().message.clone()
}

fn known() -> StorageCluster {
    let mut cluster = sample();
    cluster.status = Some(status(&cluster, &healthy(), Timestamp::UNIX_EPOCH));
    cluster
}

#[test]
fn a_healthy_cluster() {
    let cluster = sample();
    assert_eq!(
        conditions(&cluster, &healthy()),
        [
            "Available=True:VolumesServed",
            "Progressing=False:AsSpecified",
            "Degraded=False:Healthy",
            "Paused=False:Active",
        ]
    );
    let status = status(&cluster, &healthy(), Timestamp::UNIX_EPOCH);
    assert_eq!(status.capacity.as_deref(), Some("30Gi"));
    assert_eq!(status.used.as_deref(), Some("3Gi"));
    assert_eq!(status.storage_nodes.as_ref().unwrap().summary, "3/3");
    assert_eq!((status.volumes, status.cluster_id.as_deref()), (Some(2), Some("c1")));
    assert!(!is_unsettled(&status));
}

#[test]
fn the_first_start_is_progress_and_no_defect() {
    let seen = Seen {
        etcd: rollout(1),
        storage: rollout(0),
        view: Err("storage nodes at x cannot be reached".to_owned()),
        ..healthy()
    };
    assert_eq!(
        conditions(&sample(), &seen),
        [
            "Available=False:Starting",
            "Progressing=True:Starting",
            "Degraded=False:Healthy",
            "Paused=False:Active",
        ]
    );
}

#[test]
fn a_dead_node_degrades_and_volumes_stay_available() {
    let mut seen = healthy();
    seen.storage.ready = 2;
    let view = seen.view.as_mut().unwrap();
    view.nodes[1].live = false;
    (view.degraded_replica_sets, view.missing_copies) = (8, 8);
    let cluster = known();
    assert_eq!(
        conditions(&cluster, &seen)[..3],
        [
            "Available=True:VolumesServed",
            "Progressing=False:AsSpecified",
            "Degraded=True:StorageNodesDown",
        ]
    );
    assert_eq!(
        message(&cluster, &seen, ConditionType::Degraded),
        "storage nodes not live: demo-storage-1; 8 of 8 replica sets have fewer copies than wanted: 8 copies are \
         missing, 0 are to be copied; 2/3 storage nodes are ready"
    );
}

#[test]
fn what_cannot_be_served_is_not_available() {
    let cluster = known();
    let available = |change: fn(&mut Seen)| {
        let mut seen = healthy();
        change(&mut seen);
        conditions(&cluster, &seen)[0].clone()
    };
    assert_eq!(
        available(|s| s.view.as_mut().unwrap().unavailable_replica_sets = 1),
        "Available=False:ReplicaSetsUnavailable"
    );
    assert_eq!(
        available(|s| s.view.as_mut().unwrap().ownerless_volumes = 1),
        "Available=False:VolumesWithoutOwner"
    );
    assert_eq!(
        available(|s| s.view.as_mut().unwrap().nodes.truncate(2)),
        "Available=False:TooFewStorageNodes"
    );
    // No answer although storage nodes are ready: the operator's network may be at fault.
    assert_eq!(
        available(|s| s.view = Err("x".to_owned())),
        "Available=Unknown:StorageNodesUnreachable"
    );
    assert_eq!(
        available(|s| {
            s.view = Err("x".to_owned());
            s.storage.ready = 0;
        }),
        "Available=False:StorageNodesDown"
    );
}

#[test]
fn figures_stay_while_the_storage_nodes_are_silent() {
    let cluster = known();
    let seen = Seen {
        view: Err("x".to_owned()),
        ..healthy()
    };
    let status = status(&cluster, &seen, Timestamp::UNIX_EPOCH);
    assert_eq!(status.cluster_id.as_deref(), Some("c1"));
    assert_eq!(status.volumes, Some(2));
    assert!(is_unsettled(&status));
}

#[test]
fn a_held_deletion_names_the_volumes() {
    let volumes: Vec<_> = (0..25).map(|n| format!("v{n}")).collect();
    let seen = Seen {
        hold: Some(DeletionHold::Volumes(volumes)),
        ..healthy()
    };
    let cluster = known();
    assert_eq!(conditions(&cluster, &seen)[1], "Progressing=True:DeletionBlocked");
    let text = message(&cluster, &seen, ConditionType::Progressing);
    assert!(
        text.starts_with("deletion waits for 25 volumes to be deleted: v0, v1,"),
        "{text}"
    );
    let status = status(&cluster, &seen, Timestamp::UNIX_EPOCH);
    assert_eq!(status.blocking_volumes.len(), 20);
}

#[test]
fn mistakes_and_failures_are_told() {
    let cluster = known();
    let invalid = Seen {
        mistakes: vec!["a".to_owned(), "b".to_owned()],
        ..healthy()
    };
    assert_eq!(
        conditions(&cluster, &invalid)[1..3],
        ["Progressing=False:InvalidSpec", "Degraded=True:InvalidSpec"]
    );
    assert_eq!(message(&cluster, &invalid, ConditionType::Degraded), "a; b");
    let refused = Seen {
        apply_error: Some("é".repeat(2000)),
        ..healthy()
    };
    assert_eq!(conditions(&cluster, &refused)[2], "Degraded=True:ApplyFailed");
    let text = message(&cluster, &refused, ConditionType::Degraded);
    assert!(text.len() <= MESSAGE_MAX && text.ends_with('…'), "{} bytes", text.len());
}

#[test]
fn paused_and_stopped_are_no_defects() {
    let mut cluster = known();
    cluster.spec.stopped = true;
    let seen = Seen {
        etcd: rollout(0),
        storage: rollout(0),
        view: Err("x".to_owned()),
        ..healthy()
    };
    assert_eq!(
        conditions(&cluster, &seen),
        [
            "Available=False:Stopped",
            "Progressing=False:Stopped",
            "Degraded=False:Healthy",
            "Paused=True:Stopped",
        ]
    );
    cluster.spec.stopped = false;
    cluster.spec.paused = true;
    assert_eq!(
        conditions(&cluster, &healthy())[..],
        [
            "Available=True:VolumesServed",
            "Progressing=False:Paused",
            "Degraded=False:Healthy",
            "Paused=True:Paused",
        ]
    );
}

#[test]
fn pods_that_cannot_run_say_why() {
    let pods: Vec<Pod> = serde_json::from_value(json!([
        {
            "metadata": {"name": "demo-storage-0", "creationTimestamp": "1970-01-01T00:01:00Z"},
            "status": {"conditions": [{
                "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                "message": "0/3 nodes are available",
            }]},
        },
        {
            "metadata": {"name": "demo-storage-1"},
            "status": {"containerStatuses": [{
                "name": "storage-node", "image": "x", "imageID": "", "ready": false, "restartCount": 9,
                "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}},
                "lastState": {"terminated": {
                    "exitCode": 1,
                    "message": "{\"level\":\"INFO\"}\nError: the folder belongs to cluster \"x\"\n\n",
                }},
            }]},
        },
        {
            "metadata": {"name": "demo-storage-2", "creationTimestamp": "1970-01-01T00:01:00Z"},
            "status": {"containerStatuses": [{
                "name": "storage-node", "image": "x", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"waiting": {"reason": "ContainerCreating"}},
            }]},
        },
    ]))
    .unwrap();
    let told = |seconds| -> Vec<String> {
        let problems = pod_problems(&pods, Timestamp::from_second(seconds).unwrap());
        let lines = problems.into_iter();
        lines
            .map(|problem| format!("{}: {}", problem.reason, problem.message))
            .collect()
    };
    assert_eq!(
        told(75),
        [
            "PodsNotScheduled: pod demo-storage-0: 0/3 nodes are available",
            "PodsCrashing: pod demo-storage-1: CrashLoopBackOff: Error: the folder belongs to cluster \"x\"",
        ]
    );
    // A moment after its creation a pod may still wait for its claim.
    assert_eq!(told(74).len(), 1);
    let late = told(151);
    assert_eq!(
        late[2],
        "PodsNotCreated: pod demo-storage-2 waits for a volume, a Secret or an image: see its events"
    );
}

#[test]
fn leaving_nodes_missing_copies_and_damage_show() {
    use lazarette_proto::cluster::ScrubStatus as Report;
    let mut seen = healthy();
    let mut view = view();
    view.nodes.push(NodeStatus {
        id: "demo-storage-3".to_owned(),
        live: true,
        draining: true,
        replica_sets: 2,
        scrub: Some(Report {
            found: 3,
            repaired: 2,
            lost: 1,
            ..Report::default()
        }),
        ..NodeStatus::default()
    });
    // Gone, and not struck off the list yet: no defect.
    view.nodes.push(NodeStatus {
        id: "demo-storage-4".to_owned(),
        draining: true,
        safe_to_remove: true,
        ..NodeStatus::default()
    });
    (view.degraded_replica_sets, view.missing_copies, view.repair_bytes) = (1, 2, 3 << 20);
    seen.view = Ok(view);
    let cluster = known();
    assert_eq!(
        conditions(&cluster, &seen)[1..3],
        ["Progressing=True:ScalingIn", "Degraded=True:CopiesMissing"]
    );
    let degraded = message(&cluster, &seen, ConditionType::Degraded);
    assert!(
        degraded.contains("2 copies are missing, 3Mi are to be copied"),
        "{degraded}"
    );
    assert!(
        degraded.contains("1 damaged copies of data have no good copy"),
        "{degraded}"
    );
    let progressing = message(&cluster, &seen, ConditionType::Progressing);
    assert!(progressing.contains("demo-storage-3"), "{progressing}");
    let status = status(&cluster, &seen, Timestamp::UNIX_EPOCH);
    let sets = status.replica_sets.unwrap();
    assert_eq!((sets.copies_missing, sets.to_copy.as_str()), (2, "3Mi"));
    assert_eq!(status.draining, ["demo-storage-3"]);
    assert_eq!(
        status.scrub.unwrap(),
        ScrubStatus {
            damaged: 3,
            repaired: 2,
            lost: 1
        }
    );
}

#[test]
fn a_rollout_that_waits_says_for_what() {
    let mut seen = healthy();
    seen.storage.changing = true;
    seen.waiting = Some("1 replica sets lack copies".to_owned());
    let progressing = message(&known(), &seen, ConditionType::Progressing);
    assert_eq!(
        progressing,
        "storage nodes: other pods wait, as 1 replica sets lack copies"
    );
}
