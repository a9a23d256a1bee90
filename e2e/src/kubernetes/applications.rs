//! Applications of [`crate::applications`] in pods.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::images::TOOLBOX;
use super::install::{APPS, Installation};
use super::story::{CLAIM, Story};
use crate::story::Narrator;
use crate::{applications, cmd};

/// Longest that one may take.
const LIMIT: Duration = Duration::from_secs(600);
const PODS: [&str; 2] = ["toolbox-a", "toolbox-b"];

/// Runs each application in a pod on the volume, and checks in a pod on another node what is there then.
pub async fn run_applications(installation: &Installation, narrator: &dyn Narrator) -> Result<()> {
    let story = Story { installation, narrator };
    story.clean().await?;
    story.claim_and_pods().await?;
    let nodes = installation.lab().config().node_names();
    for (pod, node) in PODS.iter().zip(&nodes) {
        story.start(pod, toolbox(pod, node).await?).await?;
    }
    for application in applications::ALL {
        let name = application.name;
        narrator.step(&format!("{name} in a pod"));
        let folder = format!("/data/{name}");
        installation
            .lab()
            .exec(APPS, PODS[0], &format!("mkdir {folder}"))
            .await?;
        for (pod, script) in PODS.into_iter().zip([application.work, application.check]) {
            installation
                .lab()
                .kubectl([
                    "exec",
                    "--namespace",
                    APPS,
                    pod,
                    "--",
                    "sh",
                    "-ec",
                    script,
                    "sh",
                    &folder,
                ])
                .limit(LIMIT)
                .run()
                .await
                .with_context(|| format!("{name} in {pod}"))?;
        }
        narrator.fact("done, and seen in a pod on another node");
    }
    story.clean().await
}

/// A pod with the volume and this machine's programs.
async fn toolbox(name: &str, node: &str) -> Result<serde_json::Value> {
    let sysroot = cmd!["rustc", "--print", "sysroot"].run().await?;
    let sysroot = sysroot.trim();
    let host = ["/usr", "/etc", sysroot];
    let name_of = |index: usize| format!("host-{index}");
    let mut mounts = vec![json!({"name": "data", "mountPath": "/data"})];
    let mut volumes = vec![json!({"name": "data", "persistentVolumeClaim": {"claimName": CLAIM}})];
    for (index, path) in host.iter().enumerate() {
        mounts.push(json!({"name": name_of(index), "mountPath": path, "readOnly": true}));
        volumes.push(json!({"name": name_of(index), "hostPath": {"path": path, "type": "Directory"}}));
    }
    Ok(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "app",
                "image": TOOLBOX,
                "imagePullPolicy": "IfNotPresent",
                "env": [
                    {"name": "PATH", "value": format!("{sysroot}/bin:/usr/sbin:/usr/bin")},
                    {"name": "HOME", "value": "/tmp"},
                ],
                "volumeMounts": mounts,
            }],
            "volumes": volumes,
        },
    }))
}
