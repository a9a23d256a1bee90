//! Changes of a cluster that serves: new templates, fewer nodes, an etcd of others.

use crate::world::{World, sample};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use lazarette_api::ConditionType::{Degraded, Progressing};
use serde_json::{Value, json};

#[tokio::test]
async fn storage_nodes_are_renewed_one_by_one_while_all_copies_are_there() {
    let world = World::new().await;
    let context = world.start(&sample("demo")).await;
    world.make_ready("demo").await;
    for ordinal in 0..3 {
        world.make_pod("storage", ordinal, "r0", true).await;
    }
    // r1 is what `make_ready` writes as the new revision. A copy is missing: nobody goes.
    world.storage.nodes(3);
    world
        .storage
        .set(|answers| answers.status.as_mut().unwrap().degraded_replica_sets = 1);
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(world.pod_names().await.len(), 3);

    world.storage.nodes(3);
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(world.pod_names().await, ["demo-storage-0", "demo-storage-1"]);
    // Until it is back, the others stay.
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(world.pod_names().await.len(), 2);

    world.make_pod("storage", 2, "r1", true).await;
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(world.pod_names().await, ["demo-storage-0", "demo-storage-2"]);
    let events = world.events("demo").await;
    assert!(events.contains(&"Normal PodRestarting".to_owned()), "{events:?}");
}

#[tokio::test]
async fn etcd_members_come_first_and_a_template_that_fails_stops_all() {
    let world = World::new().await;
    world.create_nodes(3).await;
    let context = world.start(&world.on_own_nodes()).await;
    world.make_ready("demo").await;
    world.storage.nodes(3);
    for component in ["etcd", "storage"] {
        for ordinal in 0..3 {
            world.make_pod(component, ordinal, "r0", true).await;
        }
    }
    world.reconcile(&context, "demo").await.unwrap();
    let left = world.pod_names().await;
    assert!(left.len() == 5 && !left.contains(&"demo-etcd-2".to_owned()), "{left:?}");

    // The new one fails: no member and no storage node follows.
    world.make_pod("etcd", 2, "r1", false).await;
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(world.pod_names().await.len(), 6);
    let crashing = json!({"status": {"containerStatuses": [{
        "name": "main", "image": "x", "imageID": "", "ready": false, "restartCount": 2,
        "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}},
        "lastState": {"terminated": {"exitCode": 1, "message": "unknown flag: --wrong\n"}},
    }]}});
    world
        .api::<Pod>()
        .patch_status("demo-etcd-2", &PatchParams::default(), &Patch::Merge(crashing))
        .await
        .unwrap();
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(world.pod_names().await.len(), 6);
    let (state, message) = world.condition("demo", Degraded).await;
    let expected = "the new template does not work: pod demo-etcd-2: CrashLoopBackOff: unknown flag: --wrong";
    assert!(
        state == "True:RolloutStopped" && message.contains(expected),
        "{state}: {message}"
    );

    // It recovers: the next member goes, and still no storage node.
    let api = world.api::<Pod>();
    api.delete("demo-etcd-2", &Default::default()).await.unwrap();
    world.make_pod("etcd", 2, "r1", true).await;
    world.reconcile(&context, "demo").await.unwrap();
    let left = world.pod_names().await;
    assert!(left.len() == 5 && !left.contains(&"demo-etcd-1".to_owned()), "{left:?}");
}

#[tokio::test]
async fn a_storage_node_hands_over_before_it_goes() {
    let world = World::new().await;
    world.create_nodes(4).await;
    let mut cluster = world.on_own_nodes();
    cluster["spec"]["storageNodes"]["count"] = json!(4);

    let context = world.start(&cluster).await;
    let set = "demo-storage";
    assert_eq!(world.replicas(set).await, Some(4));
    for ordinal in 0..4 {
        world.make_pod("storage", ordinal, "r1", true).await;
    }
    world.set_ready("demo-etcd", 3).await;
    world.set_ready(set, 4).await;
    world.storage.nodes(4);
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(world.storage.asked(), Vec::<String>::new());

    // Nobody goes whom nobody could ask.
    world.storage.set(|answers| answers.status = None);
    let count = |count: i32| json!({"spec": {"storageNodes": {"count": count}}});
    world.patch("demo", count(3)).await.unwrap();
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(world.replicas(set).await, Some(4));

    // The others have no room for its copies: it stays, and the status says why.
    world.storage.nodes(4);
    world
        .storage
        .set(|answers| answers.refusal = Some("4 copies need 4 storage nodes".to_owned()));
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(world.replicas(set).await, Some(4));
    let (state, message) = world.condition("demo", Degraded).await;
    assert!(state == "True:ScaleInRefused", "{state}: {message}");
    for words in [
        "spec.storageNodes.count is 3",
        "demo-storage-3",
        "4 copies need",
        "raise the count",
    ] {
        assert!(message.contains(words), "{message}");
    }

    world.storage.set(|answers| answers.refusal = None);
    world.storage.asked();
    world.reconcile(&context, "demo").await.unwrap();
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(world.storage.asked(), ["drain demo-storage-3"]);
    assert_eq!(world.replicas(set).await, Some(4));
    assert_eq!(world.condition("demo", Progressing).await.0, "True:ScalingIn");
    let status = world.clusters().get("demo").await.unwrap().status.unwrap();
    assert_eq!(status.draining, ["demo-storage-3"]);

    // A change of mind, and back.
    world.patch("demo", count(4)).await.unwrap();
    world.reconcile(&context, "demo").await.unwrap();
    world.patch("demo", count(3)).await.unwrap();
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(
        world.storage.asked(),
        ["undrain demo-storage-3", "drain demo-storage-3"]
    );

    world
        .storage
        .set(|answers| answers.node("demo-storage-3", |node| node.safe_to_remove = true));
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(world.replicas(set).await, Some(3));
    world
        .storage
        .set(|answers| answers.node("demo-storage-3", |node| node.live = false));
    world
        .api::<Pod>()
        .delete("demo-storage-3", &Default::default())
        .await
        .unwrap();
    world.set_ready(set, 3).await;
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(world.storage.asked(), ["forget demo-storage-3"]);
    world.reconcile(&context, "demo").await.unwrap();
    let (state, message) = world.condition("demo", Degraded).await;
    assert!(!message.contains("demo-storage-3"), "{state}: {message}");
    let events = world.events("demo").await;
    for event in [
        "Warning ScaleInRefused",
        "Normal StorageNodeDraining",
        "Normal StorageNodeRemoved",
    ] {
        assert!(events.contains(&event.to_owned()), "no {event} among {events:?}");
    }
}

#[tokio::test]
async fn etcd_begins_only_once() {
    let world = World::new().await;
    let context = world.start(&sample("demo")).await;
    let state = async || {
        let map = world.api::<ConfigMap>().get("demo-etcd").await.unwrap();
        map.data.unwrap()["state"].clone()
    };
    let claims = world.api::<PersistentVolumeClaim>();
    for ordinal in 0..3 {
        let claim: PersistentVolumeClaim = serde_json::from_value(json!({
            "metadata": {
                "name": format!("data-demo-etcd-{ordinal}"),
                "labels": lazarette_api::component_labels("demo", "etcd"),
            },
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
        }))
        .unwrap();
        claims.create(&PostParams::default(), &claim).await.unwrap();
    }
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(state().await, "new");
    world.set_ready("demo-etcd", 1).await;
    for _ in 0..2 {
        world.reconcile(&context, "demo").await.unwrap();
    }
    assert_eq!(state().await, "existing");
    let marked = claims.list(&ListParams::default()).await.unwrap();
    for claim in marked {
        assert_eq!(claim.annotations()["lazarette.io/etcd-has-run"], "true");
    }
    // While etcd is away, and for a new claim of a lost disk, it has still run.
    world.set_ready("demo-etcd", 0).await;
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(state().await, "existing");
}

#[tokio::test]
async fn an_external_etcd_is_used_with_its_certificates() {
    let world = World::new().await;
    let mut cluster = sample("demo");
    let secret = |name: &str, key: &str| json!({"secretName": name, "key": key});
    cluster["spec"]["etcd"] = json!({"external": {
        "endpoints": ["https://etcd-0.example.com:2379", "https://etcd-1.example.com:2379"],
        "tls": {
            "ca": secret("authority", "root.pem"),
            "certificate": secret("client", "tls.crt"),
            "privateKey": secret("client", "tls.key"),
        },
    }});
    cluster["spec"]["repair"] = json!({"replaceAfter": "1h", "bandwidth": "1Gi", "scrubBandwidth": "0"});
    let context = world.start(&cluster).await;
    let objects: Vec<_> = world.versions().await.into_keys().collect();
    assert_eq!(
        objects,
        [
            "PodDisruptionBudget/demo-storage",
            "Service/demo-storage",
            "Service/demo-storage-nodes",
            "ServiceAccount/demo-storage",
            "StatefulSet/demo-storage",
            "StorageCluster/demo",
        ]
    );
    let set = world.api::<StatefulSet>().get("demo-storage").await.unwrap();
    let pod: Value = serde_json::to_value(set.spec.unwrap().template.spec.unwrap()).unwrap();
    let arguments = pod["containers"][0]["args"].as_array().unwrap();
    for expected in [
        format!("--cluster={}/demo", world.namespace),
        "--etcd=https://etcd-0.example.com:2379,https://etcd-1.example.com:2379".to_owned(),
        "--etcd-ca=/etc/lazarette/etcd/ca.crt".to_owned(),
        "--etcd-cert=/etc/lazarette/etcd/tls.crt".to_owned(),
        "--etcd-key=/etc/lazarette/etcd/tls.key".to_owned(),
        "--replace-after=1h".to_owned(),
        "--repair-rate=1024".to_owned(),
        "--scrub-rate=0".to_owned(),
        "--scrub-every=7d".to_owned(),
    ] {
        assert!(
            arguments.contains(&json!(expected)),
            "no {expected} among {arguments:?}"
        );
    }
    let projected = |index: usize| {
        let source = &pod["volumes"][0]["projected"]["sources"][index]["secret"];
        let item = &source["items"][0];
        [&source["name"], &item["key"], &item["path"]].map(|text| text.as_str().unwrap().to_owned())
    };
    assert_eq!(projected(0), ["authority", "root.pem", "ca.crt"]);
    assert_eq!(projected(2), ["client", "tls.key", "tls.key"]);

    world.set_ready("demo-storage", 3).await;
    world.storage.nodes(3);
    world.reconcile(&context, "demo").await.unwrap();
    let status = world.clusters().get("demo").await.unwrap().status.unwrap();
    assert!(status.etcd.is_none());
    assert_eq!(world.condition("demo", Progressing).await.0, "False:AsSpecified");
    let (state, message) = world.condition("demo", Degraded).await;
    assert!(!message.contains("etcd"), "{state}: {message}");
}
