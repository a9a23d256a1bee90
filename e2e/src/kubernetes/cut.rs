//! A machine of the cluster loses its network, and gets it back, while an application on another one writes.

use std::time::Duration;

use anyhow::Result;

use super::install::{APPS, Installation};
use super::story::{HEAL, PODS, Story};
use crate::story::Narrator;
use crate::wait_for;

/// Longer than any lease.
const CUT: Duration = Duration::from_secs(30);
const FOLDER: &str = "/data/steady-cut";

/// Cuts the machine of pod C off: a storage node, a member of etcd and a mount. Pod A must see no error and
/// lose nothing; pod C must read all of it when its machine is back.
pub async fn cut_a_machine_off(installation: &Installation, narrator: &dyn Narrator) -> Result<()> {
    let story = Story { installation, narrator };
    story.clean().await?;
    story.claim_and_pods().await?;
    let written = story.while_writing(FOLDER, cut(&story)).await?;

    // Its client was silent for longer than its session lasts, and joins the volume anew.
    let look = format!("ls {FOLDER}");
    wait_for(story.deadline(60), "pod C to have its volume again", || async {
        installation.lab().exec(APPS, PODS[2], &look).await.map(Some)
    })
    .await?;
    story.verify(PODS[2], FOLDER, &written).await?;
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
