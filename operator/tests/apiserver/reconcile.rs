//! Objects appear, stay as they are, and the status tells what is so.

use crate::world::{World, sample};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolume, Service};
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use lazarette_api::ConditionType::{Available, Degraded, Paused, Progressing};
use serde_json::{Value, json};

const OBJECTS: [&str; 11] = [
    "ConfigMap/demo-etcd",
    "NetworkPolicy/demo-etcd",
    "PodDisruptionBudget/demo-etcd",
    "PodDisruptionBudget/demo-storage",
    "Service/demo-etcd",
    "Service/demo-storage",
    "Service/demo-storage-nodes",
    "ServiceAccount/demo-storage",
    "StatefulSet/demo-etcd",
    "StatefulSet/demo-storage",
    "StorageCluster/demo",
];

#[tokio::test]
async fn a_second_reconciliation_changes_nothing() {
    let world = World::new().await;
    world.storage.healthy(&["v1"]);
    let context = world.start(&sample("demo")).await;
    world.make_ready("demo").await;
    world.reconcile(&context, "demo").await.unwrap();
    let before = world.versions().await;
    let names: Vec<_> = before.keys().map(String::as_str).collect();
    assert_eq!(names, OBJECTS);
    world.reconcile(&context, "demo").await.unwrap();
    assert_eq!(world.versions().await, before);
}

#[tokio::test]
async fn from_creation_to_available_to_degraded_and_back() {
    let world = World::new().await;
    let operator = world.operate();
    world.create(&world.on_own_nodes()).await.unwrap();
    world.wait_condition("demo", Available, "False:Starting").await;
    world.wait_condition("demo", Degraded, "True:NotEnoughNodes").await;
    world.create_nodes(3).await;
    world.make_ready("demo").await;
    world.storage.healthy(&["v1", "v2"]);
    world.wait_condition("demo", Available, "True:VolumesServed").await;
    world.wait_condition("demo", Progressing, "False:AsSpecified").await;
    world.wait_condition("demo", Degraded, "False:Healthy").await;
    let status = world.clusters().get("demo").await.unwrap().status.unwrap();
    assert_eq!(status.storage_nodes.unwrap().summary, "3/3");
    assert_eq!((status.volumes, status.capacity.as_deref()), (Some(2), Some("30Gi")));
    assert_eq!(status.observed_generation, Some(1));
    for condition in &status.conditions {
        assert_eq!(condition.observed_generation, Some(1), "{condition:?}");
    }

    world.storage.set(|answers| {
        let status = answers.status.as_mut().unwrap();
        status.nodes[0].live = false;
        status.degraded_replica_sets = 8;
    });
    // The watch on the StatefulSet brings the operator here.
    world.set_ready("demo-storage", 2).await;
    world.wait_condition("demo", Degraded, "True:StorageNodesDown").await;
    assert_eq!(world.condition("demo", Available).await.0, "True:VolumesServed");

    world.storage.healthy(&["v1", "v2"]);
    world.set_ready("demo-storage", 3).await;
    world.wait_condition("demo", Degraded, "False:Healthy").await;
    let events = world.events("demo").await;
    for event in ["Normal VolumesServed", "Warning StorageNodesDown", "Normal Healthy"] {
        assert!(events.contains(&event.to_owned()), "no {event} among {events:?}");
    }
    operator.stop().await;
}

#[tokio::test]
async fn drift_is_corrected_and_orphans_go() {
    let world = World::new().await;
    let cluster = world.create(&sample("demo")).await.unwrap();
    let context = world.context();
    for _ in 0..2 {
        world.reconcile(&context, "demo").await.unwrap();
    }
    let sets = world.api::<StatefulSet>();
    let foreign = PatchParams::apply("someone").force();
    let replicas = json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "demo-storage"},
        "spec": {"replicas": 7},
    });
    sets.patch("demo-storage", &foreign, &Patch::Apply(replicas))
        .await
        .unwrap();
    let services = world.api::<Service>();
    let service = |name: &str, uid: &str| -> Service {
        serde_json::from_value(json!({
            "metadata": {
                "name": name,
                "labels": lazarette_api::component_labels("demo", "storage-node"),
                "ownerReferences": [{
                    "apiVersion": "lazarette.io/v1alpha1", "kind": "StorageCluster", "name": "demo", "uid": uid,
                }],
            },
            "spec": {"ports": [{"port": 1}]},
        }))
        .unwrap()
    };
    let uid = cluster.uid().unwrap();
    for (name, uid) in [("ours", uid.as_str()), ("theirs", "another")] {
        let created = services.create(&PostParams::default(), &service(name, uid)).await;
        created.unwrap();
    }
    // Nobody goes of whom nobody knows what is on it.
    world.storage.nodes(3);
    world.make_pod("storage", 0, "r0", true).await;
    world.reconcile(&context, "demo").await.unwrap();
    let replicas = sets.get("demo-storage").await.unwrap().spec.unwrap().replicas;
    assert_eq!(replicas, Some(3));
    assert!(services.get_opt("ours").await.unwrap().is_none());
    assert!(services.get_opt("theirs").await.unwrap().is_some());
}

#[tokio::test]
async fn objects_of_others_are_left_alone() {
    let world = World::new().await;
    let services = world.api::<Service>();
    let service: Service = serde_json::from_value(json!({
        "metadata": {"name": "demo-etcd"},
        "spec": {"ports": [{"port": 1}]},
    }))
    .unwrap();
    services.create(&PostParams::default(), &service).await.unwrap();
    world.create(&sample("demo")).await.unwrap();
    let context = world.context();
    world.reconcile(&context, "demo").await.unwrap();
    let error = world.reconcile(&context, "demo").await.unwrap_err();
    let expected = "Service demo-etcd exists and is not of this StorageCluster";
    assert!(error.contains(expected), "{error}");
    let (state, message) = world.condition("demo", Degraded).await;
    assert!(
        state == "True:ApplyFailed" && message.contains(expected),
        "{state}: {message}"
    );
    let service = services.get("demo-etcd").await.unwrap();
    assert!(service.metadata.owner_references.is_none());

    // Of a cluster of the same name that was deleted before.
    let owner = json!({"metadata": {"ownerReferences": [{
        "apiVersion": "lazarette.io/v1alpha1", "kind": "StorageCluster", "name": "demo", "uid": "before",
    }]}});
    services
        .patch("demo-etcd", &PatchParams::default(), &Patch::Merge(owner))
        .await
        .unwrap();
    let error = world.reconcile(&context, "demo").await.unwrap_err();
    assert!(
        error.contains("Service demo-etcd of a StorageCluster that was deleted"),
        "{error}"
    );

    services.delete("demo-etcd", &Default::default()).await.unwrap();
    world.reconcile(&context, "demo").await.unwrap();
    let service = services.get("demo-etcd").await.unwrap();
    assert!(service.metadata.owner_references.is_some());
}

#[tokio::test]
async fn paused_changes_nothing_and_stopped_ends_pods() {
    let world = World::new().await;
    let mut cluster = sample("demo");
    cluster["spec"]["paused"] = json!(true);
    let context = world.start(&cluster).await;
    assert_eq!(world.versions().await.len(), 1);
    assert_eq!(world.condition("demo", Paused).await.0, "True:Paused");

    world
        .patch("demo", json!({"spec": {"paused": false, "stopped": true}}))
        .await
        .unwrap();
    world.reconcile(&context, "demo").await.unwrap();
    for set in world.api::<StatefulSet>().list(&ListParams::default()).await.unwrap() {
        assert_eq!(set.spec.unwrap().replicas, Some(0));
    }
    assert_eq!(world.condition("demo", Available).await.0, "False:Stopped");
    assert_eq!(world.condition("demo", Paused).await.0, "True:Stopped");
}

#[tokio::test]
async fn what_only_the_cluster_can_tell_is_told() {
    let world = World::new().await;
    let context = world.context();
    let mut cluster = sample("demo");
    let class = "/spec/etcd/storage/volumeClaimTemplate/spec/storageClassName";
    *cluster.pointer_mut(class).unwrap() = json!("nowhere");
    cluster["spec"]["storageNodes"]["resources"] = json!({"requests": {"memory": "much"}});
    world.create(&cluster).await.unwrap();
    world.reconcile(&context, "demo").await.unwrap();

    let error = world.reconcile(&context, "demo").await.unwrap_err();
    assert!(error.contains("apply StatefulSet demo-storage"), "{error}");
    let (state, message) = world.condition("demo", Degraded).await;
    assert_eq!(state, "True:ApplyFailed", "{message}");
    let expected = "spec.etcd.storage.volumeClaimTemplate.spec.storageClassName is nowhere, which does not exist";
    assert!(message.contains(expected), "{message}");

    let repaired = json!({"spec": {"storageNodes": {"resources": {"requests": {"memory": "1Gi"}}}}});
    world.patch("demo", repaired).await.unwrap();
    world.reconcile(&context, "demo").await.unwrap();
    let (state, message) = world.condition("demo", Degraded).await;
    assert!(!message.contains("StatefulSet"), "{state}: {message}");
}

#[tokio::test]
async fn folders_are_tied_to_nodes_by_persistent_volumes() {
    let world = World::new().await;
    let nodes = world.create_nodes(3).await;
    let mut cluster = world.on_own_nodes();
    for role in ["etcd", "storageNodes"] {
        cluster["spec"][role]["storage"] = json!({"hostPath": {"path": "/data"}});
    }
    let context = world.start(&cluster).await;
    let volumes: Api<PersistentVolume> = Api::all(world.client.clone());
    let of_cluster = ListParams::default().labels(&format!("lazarette.io/namespace={}", world.namespace));
    let list = async || -> Vec<Value> {
        let volumes = volumes.list(&of_cluster).await.unwrap();
        volumes
            .iter()
            .map(|volume| serde_json::to_value(volume).unwrap())
            .collect()
    };
    let made = list().await;
    assert_eq!(made.len(), 6);
    let storage_1 = made
        .iter()
        .find(|v| v["spec"]["claimRef"]["name"] == "data-demo-storage-1")
        .unwrap();
    let path = format!("/data/{}/data-demo-storage-1", world.namespace);
    assert_eq!(storage_1["spec"]["hostPath"]["path"], json!(path));
    let hostname = "/spec/nodeAffinity/required/nodeSelectorTerms/0/matchExpressions/0/values/0";
    assert_eq!(storage_1.pointer(hostname), Some(&json!(nodes[1])));

    // A claim was deleted: its volume is offered to the next one of the same name.
    let name = storage_1["metadata"]["name"].as_str().unwrap();
    let bound = json!({"spec": {"claimRef": {"uid": "0815", "resourceVersion": "1"}}});
    volumes
        .patch(name, &PatchParams::default(), &Patch::Merge(bound))
        .await
        .unwrap();
    let released = json!({"status": {"phase": "Released"}});
    volumes
        .patch_status(name, &PatchParams::default(), &Patch::Merge(released))
        .await
        .unwrap();
    world.reconcile(&context, "demo").await.unwrap();
    let offered = volumes.get(name).await.unwrap().spec.unwrap().claim_ref.unwrap();
    assert_eq!(
        (offered.name.as_deref(), offered.uid),
        (Some("data-demo-storage-1"), None)
    );
    assert_eq!(list().await.len(), 6);
}
