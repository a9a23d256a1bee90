//! What the schema accepts and refuses.

use crate::world::{World, sample};
use kube::ResourceExt;
use serde_json::{Value, json};

fn merge(target: &mut Value, patch: &Value) {
    match (target, patch) {
        (Value::Object(target), Value::Object(patch)) => {
            for (key, value) in patch {
                if value.is_null() {
                    target.remove(key);
                } else {
                    merge(target.entry(key.clone()).or_insert(Value::Null), value);
                }
            }
        }
        (target, patch) => *target = patch.clone(),
    }
}

#[tokio::test]
async fn a_short_spec_gets_defaults() {
    let world = World::new().await;
    let cluster = world.create(&sample("short")).await.unwrap();
    let spec = cluster.spec;
    assert_eq!((spec.etcd.members, spec.storage_nodes.count), (3, 3));
    assert_eq!((spec.replication.copies, spec.replication.ack), (3, 2));
    assert_eq!(spec.image_pull_policy, "IfNotPresent");
    assert_eq!(spec.storage_nodes.failure_domain_label, "kubernetes.io/hostname");
    assert!(!spec.paused && !spec.stopped);
}

#[tokio::test]
async fn bad_specs_are_refused_with_field_and_remedy() {
    let world = World::new().await;
    let host = |path: &str| json!({"storage": {"volumeClaimTemplate": null, "hostPath": {"path": path}}});
    let cases = [
        (
            json!({"spec": {"etcd": {"members": 2}}}),
            "spec.etcd.members must be 1, for tests, or 3",
        ),
        (
            json!({"spec": {"replication": {"copies": 4, "ack": 2}}}),
            "spec.replication.copies is more than there are storage nodes: lower it or raise spec.storageNodes.count",
        ),
        (
            json!({"spec": {"replication": {"copies": 2, "ack": 3}}}),
            "spec.replication.ack is more than copies: lower ack or raise copies",
        ),
        (
            json!({"spec": {"replication": {"copies": 9}, "storageNodes": {"count": 9}}}),
            "spec.replication.copies in body should be less than or equal to 8",
        ),
        (
            json!({"spec": {"replication": {"ack": 0}}}),
            "spec.replication.ack in body should be greater than or equal to 1",
        ),
        (
            json!({"spec": {"storageNodes": {"count": 0}}}),
            "spec.storageNodes.count in body should be greater than or equal to 1",
        ),
        (
            json!({"spec": {"storageNodes": {"storage": {"hostPath": {"path": "/x"}}}}}),
            "spec.storageNodes.storage must have exactly one of volumeClaimTemplate and hostPath",
        ),
        (
            json!({"spec": {"etcd": {"storage": {"volumeClaimTemplate": null}}}}),
            "spec.etcd.storage must have exactly one of volumeClaimTemplate and hostPath",
        ),
        (
            json!({"spec": {"etcd": {"storage": null}}}),
            "spec.etcd.storage: Required value",
        ),
        (
            json!({"spec": {"storageNodes": {"storage": {"volumeClaimTemplate": {"spec": {"resources": null}}}}}}),
            "spec.storageNodes.storage.volumeClaimTemplate.spec.resources.requests.storage is missing: set it",
        ),
        (
            json!({"spec": {"etcd": {"storage": {"volumeClaimTemplate": {"spec": {"volumeMode": "Block"}}}}}}),
            "spec.etcd.storage.volumeClaimTemplate.spec.volumeMode must be Filesystem",
        ),
        (
            json!({"spec": {"etcd": host("data")}}),
            "path must be absolute and without '..'",
        ),
        (
            json!({"spec": {"storageNodes": host("/data/../etc")}}),
            "path must be absolute and without '..'",
        ),
        (
            json!({"spec": {"storageNodes": {
                "storage": host("/data")["storage"],
                "affinity": {"nodeAffinity": {}},
            }}}),
            "spec.storageNodes.affinity.nodeAffinity does not work together with hostPath: use nodeSelector",
        ),
        (
            json!({"spec": {"storageNodes": {"failureDomainLabel": "rack"}}}),
            "spec.storageNodes.failureDomainLabel must be kubernetes.io/hostname",
        ),
        (
            json!({"spec": {"imagePullPolicy": "Sometimes"}}),
            "spec.imagePullPolicy: Unsupported value: \"Sometimes\"",
        ),
        (
            json!({"metadata": {"name": "a".repeat(41)}}),
            "metadata.name is too long: use at most 40 characters",
        ),
        (
            json!({"metadata": {"name": "1st"}}),
            "metadata.name is not the name of a Service",
        ),
    ];
    let mut wrong = Vec::new();
    for (change, expected) in cases {
        let mut cluster = sample("bad");
        merge(&mut cluster, &change);
        match world.create(&cluster).await {
            Ok(created) => {
                wrong.push(format!("{change} was accepted"));
                let _ = world.clusters().delete(&created.name_any(), &Default::default()).await;
            }
            Err(message) if message.contains(expected) => {}
            Err(message) => wrong.push(format!("{change}: {message}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn what_cannot_change_stays() {
    let world = World::new().await;
    world.create(&sample("fixed")).await.unwrap();
    let mut host = sample("host");
    let folder = json!({"hostPath": {"path": "/data"}});
    host["spec"]["etcd"]["storage"] = folder.clone();
    host["spec"]["storageNodes"]["storage"] = folder;
    world.create(&host).await.unwrap();
    let cases = [
        (
            "fixed",
            json!({"spec": {"etcd": {"members": 1}}}),
            "spec.etcd.members cannot be changed",
        ),
        (
            "fixed",
            json!({"spec": {"storageNodes": {"count": 2}, "replication": {"copies": 2}}}),
            "spec.storageNodes.count cannot be lowered",
        ),
        (
            "fixed",
            json!({"spec": {"storageNodes": {"storage": {
                "volumeClaimTemplate": null, "hostPath": {"path": "/data"},
            }}}}),
            "spec.storageNodes.storage cannot change between volumeClaimTemplate and hostPath",
        ),
        (
            "fixed",
            json!({"spec": {"etcd": {"storage": {"volumeClaimTemplate": {"spec": {
                "resources": {"requests": {"storage": "20Gi"}},
            }}}}}}),
            "spec.etcd.storage.volumeClaimTemplate cannot be changed",
        ),
        (
            "host",
            json!({"spec": {"etcd": {"storage": {"hostPath": {"path": "/other"}}}}}),
            "spec.etcd.storage.hostPath cannot be changed",
        ),
    ];
    for (name, change, expected) in cases {
        let refused = world.patch(name, change).await.unwrap_err();
        assert!(refused.contains(expected), "{expected}: {refused}");
    }
    let change = json!({"spec": {"storageNodes": {"count": 5}, "replication": {"ack": 3}, "stopped": true}});
    world.patch("fixed", change).await.unwrap();
}
