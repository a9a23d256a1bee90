//! A machine of the cluster loses its network, and gets it back, while an application on another one writes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams};

use super::install::{APPS, Installation};
use super::story::{HEAL, PODS, Story};
use crate::story::Narrator;
use crate::wait_for;

/// Longer than any lease.
const CUT: Duration = Duration::from_secs(30);
const FOLDER: &str = "/data/steady-cut";
const STOP: &str = "/tmp/stop-cut";

/// Cuts the machine of pod C off: a storage node, a member of etcd and a mount. Pod A must see no error and
/// lose nothing; pod C, started anew when its machine is back, must read all of it.
pub async fn cut_a_machine_off(installation: &Installation, narrator: &dyn Narrator) -> Result<()> {
    let story = Story { installation, narrator };
    story.clean().await?;
    story.claim_and_pods().await?;
    let args = ["steady", FOLDER, "--until", STOP];
    let writing = installation.workload(PODS[0], &args);
    let cutting = async {
        let cut = cut(&story).await;
        installation
            .lab()
            .kubectl(["exec", "--namespace", APPS, PODS[0], "--", "touch", STOP])
            .run()
            .await?;
        cut
    };
    let (report, cut) = tokio::join!(writing, cutting);
    cut?;
    let report = report?;
    let errors = report["errors"].as_array().context("no report")?;
    ensure!(errors.is_empty(), "the application saw errors: {errors:?}");
    let acknowledged = report["acknowledged"].to_string();

    // Its client was silent for longer than its session lasts.
    narrator.step("pod C is started anew");
    let nodes = installation.lab().config().node_names();
    let pods: Api<Pod> = Api::namespaced(installation.lab().client().await?, APPS);
    pods.delete(PODS[2], &DeleteParams::default()).await?;
    wait_for(story.deadline(180), "pod C to go", || async {
        Ok(pods.get_opt(PODS[2]).await?.is_none().then_some(()))
    })
    .await?;
    story.start_pod(PODS[2], &nodes[2], true).await?;
    installation
        .workload(PODS[2], &["verify", FOLDER, &acknowledged])
        .await?;
    narrator.fact(&format!(
        "no error; longest stall {:.1} s; pod C reads all {acknowledged} acknowledged records",
        report["longest_ms"].as_u64().unwrap_or_default() as f32 / 1e3
    ));
    story.clean().await
}

async fn cut(story: &Story<'_>) -> Result<()> {
    let lab = story.installation.lab();
    let nodes = lab.config().node_names();
    let machine = &nodes[2];
    let before = story.files_in(FOLDER, 3).await?;
    story.narrator.step(&format!(
        "{machine} is cut off for {} s while pod A writes",
        CUT.as_secs()
    ));
    lab.cut(machine).await?;
    let gone_on = async {
        tokio::time::sleep(CUT).await;
        story.files_in(FOLDER, before + 20).await
    }
    .await;
    lab.heal(machine).await?;
    lab.wait_nodes(std::slice::from_ref(machine), true, HEAL).await?;
    let before = gone_on?;
    story.installation.wait_healthy(HEAL).await?;
    story.files_in(FOLDER, before + 5).await.map(drop)
}
