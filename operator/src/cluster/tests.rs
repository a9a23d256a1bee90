use super::*;
use k8s_openapi::api::core::v1::Node;
use lazarette_api::{HostPathSource, StorageSource};

pub(crate) fn defaults() -> Defaults {
    Defaults {
        image: Some("localhost/lazarette:test".to_owned()),
        etcd_image: Some("localhost/etcd:test".to_owned()),
        priority_class: Some("lazarette-storage".to_owned()),
    }
}

/// A storage cluster as the API server would hand it out: with defaults, uid and generation.
pub(crate) fn sample() -> StorageCluster {
    serde_json::from_value(json!({
        "apiVersion": "lazarette.io/v1alpha1",
        "kind": "StorageCluster",
        "metadata": {"name": "demo", "namespace": "storage", "uid": "4711", "generation": 1},
        "spec": {
            "etcd": {"storage": {"volumeClaimTemplate": {"spec": {
                "storageClassName": "fast",
                "resources": {"requests": {"storage": "10Gi"}},
            }}}},
            "storageNodes": {"storage": {"volumeClaimTemplate": {
                "metadata": {"labels": {"team": "blue"}},
                "spec": {"resources": {"requests": {"storage": "100Gi"}}},
            }}},
        },
    }))
    .unwrap()
}

/// The same with all data in folders of the Kubernetes nodes.
pub(crate) fn host_path_sample() -> StorageCluster {
    let mut cluster = sample();
    let storage = StorageSource {
        volume_claim_template: None,
        host_path: Some(HostPathSource {
            path: "/var/lib/lazarette".to_owned(),
        }),
    };
    cluster.spec.etcd.storage = Some(storage.clone());
    cluster.spec.storage_nodes.storage = storage;
    cluster
}

pub(crate) fn valid(cluster: &StorageCluster) -> ValidCluster {
    validate(cluster, &defaults()).unwrap()
}

pub(crate) fn node(name: &str, ready: bool) -> Node {
    serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "status": {"conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]},
    }))
    .unwrap()
}

fn with_condition(kind: ConditionType, status: &str, reason: &str) -> StorageClusterStatus {
    serde_json::from_value(json!({"conditions": [{
        "type": kind.as_str(), "status": status, "reason": reason, "message": "m",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }]}))
    .unwrap()
}

#[test]
fn events_tell_transitions_once() {
    let up = with_condition(ConditionType::Available, "True", "VolumesServed");
    let down = with_condition(ConditionType::Available, "False", "StorageNodesDown");
    let down_otherwise = with_condition(ConditionType::Available, "False", "ReplicaSetsUnavailable");
    let types = |old, new| -> Vec<EventType> { transitions(old, new).into_iter().map(|e| e.0).collect() };
    assert_eq!(types(None, &up), [EventType::Normal]);
    assert_eq!(types(None, &down), []);
    assert_eq!(types(Some(&up), &up), []);
    assert_eq!(types(Some(&up), &down), [EventType::Warning]);
    assert_eq!(types(Some(&down), &down_otherwise), [EventType::Warning]);
    assert_eq!(types(Some(&down), &up), [EventType::Normal]);
    let blocked = with_condition(ConditionType::Progressing, "True", "DeletionBlocked");
    assert_eq!(types(Some(&up), &blocked), [EventType::Warning]);
}
