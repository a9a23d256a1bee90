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
    assert_eq!(spec.repair, lazarette_api::RepairSpec::default());
}

#[tokio::test]
async fn bad_specs_are_refused_with_field_and_remedy() {
    let world = World::new().await;
    let secret = json!({"secretName": "etcd", "key": "x"});
    let external = |external: Value| json!({"spec": {"etcd": {"storage": null, "external": external}}});
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
            "spec.etcd must have exactly one of storage, for an etcd of its own, and external",
        ),
        (
            json!({"spec": {"etcd": {"external": {"endpoints": ["http://etcd:2379"]}}}}),
            "spec.etcd must have exactly one of storage, for an etcd of its own, and external",
        ),
        (
            external(json!({"endpoints": []})),
            "spec.etcd.external.endpoints in body should have at least 1 items",
        ),
        (
            external(json!({"endpoints": ["etcd:2379"]})),
            "spec.etcd.external.endpoints must each be http:// or https:// with host and port",
        ),
        (
            external(json!({"endpoints": ["https://etcd:2379"]})),
            "spec.etcd.external.endpoints must all begin with https:// if tls is set, and with http:// if not",
        ),
        (
            external(json!({"endpoints": ["http://etcd:2379"], "tls": {"ca": secret}})),
            "spec.etcd.external.endpoints must all begin with https:// if tls is set, and with http:// if not",
        ),
        (
            external(json!({"endpoints": ["https://etcd:2379"], "tls": {"ca": secret, "certificate": secret}})),
            "spec.etcd.external.tls needs both certificate and privateKey, or none",
        ),
        (
            {
                let mut change = external(json!({"endpoints": ["http://etcd:2379"]}));
                change["spec"]["etcd"]["nodeSelector"] = json!({"a": "b"});
                change
            },
            "are of an etcd that the operator runs: remove them, or spec.etcd.external",
        ),
        (
            json!({"spec": {"repair": {"replaceAfter": "soon"}}}),
            "spec.repair.replaceAfter must be a whole number of s, m, h or d: use such as 10m",
        ),
        (
            json!({"spec": {"repair": {"bandwidth": "0"}}}),
            "spec.repair.bandwidth must be a whole number of Mi or Gi: use such as 200Mi",
        ),
        (
            json!({"spec": {"repair": {"scrubBandwidth": "16MB"}}}),
            "spec.repair.scrubBandwidth must be 0 or a whole number of Mi or Gi: use such as 16Mi",
        ),
        (
            json!({"spec": {"repair": {"scrubInterval": "0d"}}}),
            "spec.repair.scrubInterval must be a whole number of s, m, h or d: use such as 7d",
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
            "spec.etcd.members cannot be lowered",
        ),
        (
            "fixed",
            json!({"spec": {"storageNodes": {"count": 2}}}),
            "spec.replication.copies is more than there are storage nodes",
        ),
        (
            "fixed",
            json!({"spec": {"storageNodes": {"count": 2}, "replication": {"copies": 2}, "stopped": true}}),
            "spec.storageNodes.count cannot be lowered while spec.stopped is set: set stopped to false first",
        ),
        (
            "fixed",
            json!({"spec": {"etcd": {"storage": null, "external": {"endpoints": ["http://etcd:2379"]}}}}),
            "spec.etcd cannot change between an etcd of its own and an external one",
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
    let change = json!({"spec": {"storageNodes": {"count": 5}, "replication": {"ack": 3}}});
    world.patch("fixed", change).await.unwrap();
    let change = json!({"spec": {"storageNodes": {"count": 4}, "repair": {"replaceAfter": "1h"}}});
    world.patch("fixed", change).await.unwrap();
    let mut one = sample("one");
    one["spec"]["etcd"]["members"] = json!(1);
    world.create(&one).await.unwrap();
    world
        .patch("one", json!({"spec": {"etcd": {"members": 3}, "stopped": true}}))
        .await
        .unwrap();
}

#[tokio::test]
async fn kubectl_get_shows_the_columns() {
    let world = World::new().await;
    world.storage.healthy(&["v1"]);
    let context = world.start(&sample("demo")).await;
    world.make_ready("demo").await;
    world.reconcile(&context, "demo").await.unwrap();
    let url = format!(
        "/apis/lazarette.io/v1alpha1/namespaces/{}/storageclusters/demo",
        world.namespace
    );
    let request = tonic::codegen::http::Request::get(url)
        .header("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")
        .body(Vec::new())
        .unwrap();
    let table: Value = world.client.request(request).await.unwrap();
    let names = table["columnDefinitions"].as_array().unwrap().iter();
    let cells = table["rows"][0]["cells"].as_array().unwrap();
    let shown: Vec<_> = names
        .map(|column| column["name"].as_str().unwrap())
        .zip(cells)
        .collect();
    for expected in [
        ("Name", json!("demo")),
        ("Available", json!("True")),
        ("Nodes", json!("3/3")),
        ("Volumes", json!(1)),
        ("Capacity", json!("30Gi")),
        ("Used", json!("3Gi")),
        ("Missing", json!(0)),
    ] {
        assert!(shown.contains(&(expected.0, &expected.1)), "{expected:?}: {shown:?}");
    }
}
