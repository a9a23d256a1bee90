//! What an administrator does to a cluster that serves, while an application writes all the time.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams};
use serde_json::{Value, json};

use super::install::{CLUSTER, Installation, NAMESPACE, is_ready};
use super::story::{HEAL, PODS, Story};
use crate::story::Narrator;
use crate::{Deadline, wait_for};

/// Longest that a rolling change of all pods may take.
const ROLL: Duration = Duration::from_secs(600);
const FOLDER: &str = "/data/steady-day-two";

/// Scales out, changes resources, loses disks of an etcd member and a storage node, and scales in
/// again. No application may see an error, and nothing acknowledged may be lost.
pub async fn change_everything(installation: &Installation, narrator: &dyn Narrator) -> Result<()> {
    let story = Story { installation, narrator };
    story.clean().await?;
    story.claim_and_pods().await?;
    let written = story.while_writing(FOLDER, changes(&story)).await?;
    story.verify(PODS[1], FOLDER, &written).await?;
    story.clean().await
}

async fn changes(story: &Story<'_>) -> Result<()> {
    let Story { installation, narrator } = story;
    story.files_in(FOLDER, 3).await?;
    narrator.step("scale out to 4 storage nodes");
    patch(installation, json!({"storageNodes": {"count": 4}})).await?;
    settle(story, 4, ROLL).await?;

    narrator.step("other resources for etcd and storage nodes: all pods are renewed, one after the other");
    let before = uids(installation).await?;
    let resources = json!({"requests": {"cpu": "50m", "memory": "200Mi"}});
    patch(
        installation,
        json!({"etcd": {"resources": resources}, "storageNodes": {"resources": resources}}),
    )
    .await?;
    wait_for(story.deadline(ROLL.as_secs()), "all pods to be renewed", || async {
        let now = uids(installation).await?;
        let old = now.iter().filter(|uid| before.contains(uid)).count();
        ensure!(old == 0, "{old} pods are old: {}", installation.status().await?);
        Ok(Some(()))
    })
    .await?;
    settle(story, 4, HEAL).await?;

    for (pod, what) in [("main-etcd-1", "an etcd member"), ("main-storage-1", "a storage node")] {
        narrator.step(&format!("the disk of {pod}, {what}, is lost"));
        lose_disk(story, pod).await?;
        settle(story, 4, ROLL).await?;
    }

    narrator.step("scale in to 3 storage nodes");
    patch(installation, json!({"storageNodes": {"count": 3}})).await?;
    let gone = || async {
        let nodes = installation.pods("app.kubernetes.io/component=storage-node").await?;
        ensure!(
            nodes.len() == 3,
            "{} pods: {}",
            nodes.len(),
            installation.status().await?
        );
        Ok(Some(()))
    };
    wait_for(story.deadline(ROLL.as_secs()), "the fourth storage node to go", gone).await?;
    settle(story, 3, HEAL).await
}

async fn patch(installation: &Installation, spec: Value) -> Result<()> {
    let kind = GroupVersionKind::gvk("lazarette.io", "v1alpha1", "StorageCluster");
    let resource = ApiResource::from_gvk(&kind);
    let api: Api<DynamicObject> = Api::namespaced_with(installation.lab().client().await?, NAMESPACE, &resource);
    let patch = Patch::Merge(json!({"spec": spec}));
    api.patch(CLUSTER, &PatchParams::default(), &patch).await?;
    Ok(())
}

/// The uids of the etcd members' and storage nodes' pods.
async fn uids(installation: &Installation) -> Result<Vec<String>> {
    let pods = installation
        .pods("app.kubernetes.io/name=lazarette,app.kubernetes.io/instance=main")
        .await?;
    Ok(pods.into_iter().filter_map(|pod| pod.metadata.uid).collect())
}

/// Waits until the operator has seen the spec and everything is as it asks, with all copies.
async fn settle(story: &Story<'_>, nodes: i32, limit: Duration) -> Result<()> {
    let installation = story.installation;
    let deadline = Deadline::after(limit).logs(installation.lab().config().logs());
    wait_for(deadline, "the cluster to be as specified and healthy", || async {
        let status = installation.status().await?;
        let seen = status["storageNodes"]["summary"] == format!("{nodes}/{nodes}");
        let etcd = status["etcd"]["summary"] == "3/3";
        for condition in status["conditions"].as_array().context("no conditions")? {
            let wanted = if condition["type"] == "Available" {
                "True"
            } else {
                "False"
            };
            if condition["status"] != wanted || !seen || !etcd {
                bail!("{status}");
            }
        }
        Ok(Some(()))
    })
    .await
}

/// Deletes a pod together with its claim, and waits until it is back with another disk.
async fn lose_disk(story: &Story<'_>, pod: &str) -> Result<()> {
    let client = story.installation.lab().client().await?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client, NAMESPACE);
    let claim = format!("data-{pod}");
    let before = claims.get(&claim).await?.metadata.uid;
    // Nothing waits here: the claim goes when the pod is gone.
    claims.delete(&claim, &DeleteParams::default()).await?;
    pods.delete(pod, &DeleteParams::default()).await?;
    wait_for(
        story.deadline(ROLL.as_secs()),
        format!("{pod} with a new disk"),
        || async {
            let now = claims.get(&claim).await?.metadata.uid;
            ensure!(now != before, "the claim is the old one");
            let pod = pods.get(pod).await?;
            ensure!(is_ready(&pod), "{}", serde_json::to_string(&pod.status)?);
            Ok(Some(()))
        },
    )
    .await
}
