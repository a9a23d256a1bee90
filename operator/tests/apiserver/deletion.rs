//! A storage cluster goes only when nothing is lost by it.

use crate::world::{World, sample};
use kube::ResourceExt;
use kube::api::DeleteParams;
use lazarette_api::ConditionType::{Available, Progressing};
use serde_json::json;

/// A cluster that was up once, its uid, and the running operator.
async fn running(world: &World) -> (String, crate::world::Operator) {
    let operator = world.operate();
    let cluster = world.create(&sample("demo")).await.unwrap();
    world.wait_condition("demo", Available, "False:Starting").await;
    world.make_ready("demo").await;
    world.storage.healthy(&["v1"]);
    world.wait_condition("demo", Available, "True:VolumesServed").await;
    (cluster.uid().unwrap(), operator)
}

async fn delete(world: &World) {
    world.clusters().delete("demo", &DeleteParams::default()).await.unwrap();
}

#[tokio::test]
async fn volumes_hold_it_until_they_are_gone() {
    let world = World::new().await;
    let (uid, operator) = running(&world).await;
    delete(&world).await;
    world.wait_condition("demo", Progressing, "True:DeletionBlocked").await;
    let status = world.clusters().get("demo").await.unwrap().status.unwrap();
    assert_eq!(status.blocking_volumes, ["v1"]);
    // All objects stay, and volumes are served.
    assert_eq!(world.versions().await.len(), 11);
    assert_eq!(world.condition("demo", Available).await.0, "True:VolumesServed");
    let events = world.events("demo").await;
    assert!(events.contains(&"Warning DeletionBlocked".to_owned()), "{events:?}");

    world.storage.healthy(&[]);
    world.wait_deleted("demo", &uid).await;
    operator.stop().await;
}

#[tokio::test]
async fn silence_holds_it_and_the_annotation_frees_it() {
    let world = World::new().await;
    let (uid, operator) = running(&world).await;
    world.storage.set(|answers| {
        answers.status = None;
        answers.volumes = None;
    });
    delete(&world).await;
    world.wait_condition("demo", Progressing, "True:DeletionWaiting").await;
    let (_, message) = world.condition("demo", Progressing).await;
    assert!(message.contains("lazarette.io/force-delete=true"), "{message}");

    let force = json!({"metadata": {"annotations": {"lazarette.io/force-delete": "true"}}});
    world.patch("demo", force).await.unwrap();
    world.wait_deleted("demo", &uid).await;
    let events = world.events("demo").await;
    assert!(events.contains(&"Warning Deleting".to_owned()), "{events:?}");
    operator.stop().await;
}

#[tokio::test]
async fn a_failed_first_start_can_be_deleted() {
    let world = World::new().await;
    let operator = world.operate();
    let cluster = world.create(&sample("demo")).await.unwrap();
    world.wait_condition("demo", Available, "False:Starting").await;
    delete(&world).await;
    world.wait_deleted("demo", &cluster.uid().unwrap()).await;
    operator.stop().await;
}
