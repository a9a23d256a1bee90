use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PropagationPolicy};
use lazarette_proto::cluster::{GetMapRequest, GetStatusRequest, ListVolumesRequest, VolumeMap};
use serde_json::{Value, json};

use super::images::WORKLOAD;
use super::install::{APPS, Installation, NAMESPACE};
use crate::story::Narrator;
use crate::{Deadline, wait_for};

/// Lines that each pod appends to the shared log.
const LINES: u64 = 100;
/// The story's claim.
const CLAIM: &str = "shared";
pub(super) const PODS: [&str; 3] = ["pod-a", "pod-b", "pod-c"];
/// Longest that the cluster may take to have all copies again.
pub(super) const HEAL: Duration = Duration::from_secs(300);

/// Plays the whole story; it starts and ends without its claim and pods.
pub async fn play(installation: &Installation, narrator: &dyn Narrator) -> Result<()> {
    let story = Story { installation, narrator };
    story.clean().await?;
    story.claim_and_pods().await?;
    story.tree().await?;
    story.appends().await?;
    let owner = installation.pod_at(&story.map().await?.owner_address).await?;
    story.disturb(&owner, Fault::Kill, "the owner of the metadata").await?;
    let primary = story.busiest_primary().await?;
    story.disturb(&primary, Fault::Kill, "a primary of the data").await?;
    let primary = story.busiest_primary().await?;
    story.disturb(&primary, Fault::DeletePod, "a storage pod").await?;
    story.grow().await?;
    story.numbers().await?;
    story.delete().await
}

/// Pods of applications, and what they do.
pub(super) struct Story<'a> {
    pub(super) installation: &'a Installation,
    pub(super) narrator: &'a dyn Narrator,
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    Kill,
    DeletePod,
}

impl Story<'_> {
    pub(super) fn deadline(&self, seconds: u64) -> Deadline {
        Deadline::secs(seconds).logs(self.installation.lab.config().logs())
    }

    async fn pods_api(&self) -> Result<Api<Pod>> {
        Ok(Api::namespaced(self.installation.lab.client().await?, APPS))
    }

    async fn claims_api(&self) -> Result<Api<PersistentVolumeClaim>> {
        Ok(Api::namespaced(self.installation.lab.client().await?, APPS))
    }

    /// Removes what an earlier, perhaps interrupted story left.
    pub(super) async fn clean(&self) -> Result<()> {
        self.installation
            .lab
            .apply(&format!(
                "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {APPS}}}\n"
            ))
            .await?;
        let pods = self.pods_api().await?;
        let at_once = DeleteParams {
            grace_period_seconds: Some(0),
            propagation_policy: Some(PropagationPolicy::Background),
            ..DeleteParams::default()
        };
        pods.delete_collection(&at_once, &Default::default()).await?;
        self.claims_api()
            .await?
            .delete_collection(&DeleteParams::default(), &Default::default())
            .await?;
        wait_for(
            self.deadline(120),
            "an earlier story's pods and claims to go",
            || async {
                let pods = pods.list(&Default::default()).await?.items.len();
                let claims = self.claims_api().await?.list(&Default::default()).await?.items.len();
                ensure!(pods + claims == 0, "{pods} pods, {claims} claims");
                Ok(Some(()))
            },
        )
        .await
    }

    pub(super) async fn claim_and_pods(&self) -> Result<()> {
        self.narrator.step("a PersistentVolumeClaim, ReadWriteMany");
        let started = Instant::now();
        self.installation
            .lab
            .apply(include_str!("manifests/claim.yaml"))
            .await?;
        let claims = self.claims_api().await?;
        let deadline = self.deadline(60).every(Duration::from_millis(50));
        wait_for(deadline, "the claim to be Bound", || async {
            let claim = claims.get(CLAIM).await?;
            let phase = claim.status.and_then(|status| status.phase).unwrap_or_default();
            ensure!(phase == "Bound", "phase {phase}");
            Ok(Some(()))
        })
        .await?;
        self.narrator
            .fact(&format!("Bound after {:.1} s", started.elapsed().as_secs_f32()));

        let nodes = self.installation.lab.config().node_names();
        self.narrator.step("pods A, B and C on three nodes mount it");
        let node = nodes.first().context("no nodes")?;
        let bare = self.start_pod("pod-bare", node, false).await?;
        let mut slowest = Duration::ZERO;
        for (pod, node) in PODS.iter().zip(&nodes) {
            slowest = slowest.max(self.start_pod(pod, node, true).await?);
        }
        self.narrator.fact(&format!(
            "pod start {:.1} s with the volume, {:.1} s without",
            slowest.as_secs_f32(),
            bare.as_secs_f32()
        ));
        Ok(())
    }

    pub(super) async fn start_pod(&self, name: &str, node: &str, mounted: bool) -> Result<Duration> {
        let started = Instant::now();
        let mounts = if mounted {
            json!([{"name": "data", "mountPath": "/data"}])
        } else {
            json!([])
        };
        let volumes = if mounted {
            json!([{"name": "data", "persistentVolumeClaim": {"claimName": CLAIM}}])
        } else {
            json!([])
        };
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {
                "nodeSelector": {"kubernetes.io/hostname": node},
                "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": "app",
                    "image": WORKLOAD,
                    "imagePullPolicy": "IfNotPresent",
                    "volumeMounts": mounts,
                }],
                "volumes": volumes,
            },
        });
        let apply = PatchParams::apply("lazarette-story").force();
        self.pods_api().await?.patch(name, &apply, &Patch::Apply(pod)).await?;
        self.installation.wait_pods(&[name]).await?;
        Ok(started.elapsed())
    }

    async fn tree(&self) -> Result<()> {
        self.narrator.step("pod A unpacks a source tree");
        let started = Instant::now();
        self.installation
            .lab
            .kubectl([
                "exec",
                "--namespace",
                APPS,
                PODS[0],
                "--",
                "tar",
                "xf",
                "/tree.tar",
                "-C",
                "/data",
            ])
            .limit(Duration::from_secs(900))
            .run()
            .await?;
        let unpacked = started.elapsed();
        let written = self.installation.workload(PODS[0], &["hash", "/data/tree"]).await?;
        let read = self.installation.workload(PODS[1], &["hash", "/data/tree"]).await?;
        ensure!(written == read, "pod B reads {read}, pod A wrote {written}");
        self.narrator.fact(&format!(
            "{} files in {:.1} s; pod B on another node sees the same SHA-256 sums",
            written["files"],
            unpacked.as_secs_f32()
        ));
        Ok(())
    }

    async fn appends(&self) -> Result<()> {
        self.narrator.step("pods A, B and C append to one log under flock");
        let lines = LINES.to_string();
        let appends = PODS.map(|pod| {
            let args = ["append", "/data/shared.log", pod, &lines].map(str::to_owned);
            async move {
                let args: Vec<_> = args.iter().map(String::as_str).collect();
                self.installation.workload(pod, &args).await
            }
        });
        futures::future::try_join_all(appends).await?;
        let found = self
            .installation
            .workload(PODS[1], &["check-appended", "/data/shared.log", "3", &lines])
            .await?;
        self.narrator
            .fact(&format!("{} lines, none lost, doubled or torn", found["lines"]));
        Ok(())
    }

    async fn map(&self) -> Result<VolumeMap> {
        let mut client = self.installation.cluster_client().await?;
        let volumes = client
            .list_volumes(ListVolumesRequest::default())
            .await?
            .into_inner()
            .volumes;
        let volume = volumes
            .iter()
            .find(|volume| volume.labels.values().any(|value| value == CLAIM))
            .with_context(|| format!("no volume of claim {CLAIM} among {volumes:?}"))?;
        // A forwarded connection lasts for one client.
        let mut client = self.installation.cluster_client().await?;
        Ok(client.get_map(GetMapRequest { volume: volume.id }).await?.into_inner())
    }

    /// The pod that is primary for most of the volume's replica sets.
    async fn busiest_primary(&self) -> Result<String> {
        let sets = self.map().await?.replica_sets;
        let count = |address: &str| sets.iter().filter(|set| set.primary_address == address).count();
        let busiest = sets
            .iter()
            .map(|set| &set.primary_address)
            .max_by_key(|address| count(address))
            .context("no replica sets")?;
        self.installation.pod_at(busiest).await
    }

    /// Hurts a storage pod while pod A writes; pod B must then find all that was acknowledged.
    async fn disturb(&self, victim: &str, fault: Fault, role: &str) -> Result<()> {
        let action = match fault {
            Fault::Kill => format!("SIGKILL of {victim}, {role}, while pod A writes"),
            Fault::DeletePod => format!("kubectl delete of {victim}, {role}, while pod A writes"),
        };
        self.narrator.step(&action);
        let stop = format!("/tmp/stop-{}", short_name(&action));
        let folder = format!("/data/steady-{}", short_name(&action));
        let args = ["steady", &folder, "--until", &stop];
        let writing = self.installation.workload(PODS[0], &args);
        let disturbing = async {
            let before = self.files_in(&folder, 3).await?;
            match fault {
                Fault::Kill => {
                    self.installation.lab.kill(NAMESPACE, victim, "lazarette-node").await?;
                }
                Fault::DeletePod => {
                    let pods: Api<Pod> = Api::namespaced(self.installation.lab.client().await?, NAMESPACE);
                    pods.delete(victim, &DeleteParams::default()).await?;
                }
            }
            let degraded = self.installation.wait_condition("Degraded", true, HEAL).await;
            // Written on after the fault.
            self.files_in(&folder, before + 5).await?;
            self.installation.wait_healthy(HEAL).await?;
            self.installation
                .lab
                .kubectl(["exec", "--namespace", APPS, PODS[0], "--", "touch", &stop])
                .run()
                .await?;
            degraded.map(drop)
        };
        let (report, disturbed) = tokio::join!(writing, disturbing);
        disturbed?;
        let report = report?;
        let errors = report["errors"].as_array().context("no report")?;
        ensure!(errors.is_empty(), "the application saw errors: {errors:?}");
        let acknowledged = report["acknowledged"].to_string();
        self.installation
            .workload(PODS[1], &["verify", &folder, &acknowledged])
            .await?;
        self.narrator.fact(&format!(
            "no error; longest stall {:.1} s; all {acknowledged} acknowledged records are there; \
             reported Degraded, then Available with all copies",
            report["longest_ms"].as_u64().unwrap_or_default() as f32 / 1e3
        ));
        Ok(())
    }

    /// Waits until pod B sees at least so many files in a folder; returns how many there are.
    pub(super) async fn files_in(&self, folder: &str, at_least: usize) -> Result<usize> {
        wait_for(self.deadline(180), format!("{at_least} files in {folder}"), || async {
            let list = self
                .installation
                .lab
                .exec(APPS, PODS[1], &format!("ls {folder}"))
                .await?;
            let count = list.lines().count();
            ensure!(count >= at_least, "{count} files");
            Ok(Some(count))
        })
        .await
    }

    async fn grow(&self) -> Result<()> {
        self.narrator.step("the claim grows from 1 GiB to 2 GiB");
        let size = async || -> Result<u64> {
            let output = self
                .installation
                .lab
                .exec(APPS, PODS[2], "df -k /data | tail -n 1")
                .await?;
            let field = output.split_whitespace().nth(1).context("df printed nothing")?;
            Ok(field.parse()?)
        };
        let before = size().await?;
        let claims = self.claims_api().await?;
        let patch: Value = json!({"spec": {"resources": {"requests": {"storage": "2Gi"}}}});
        claims
            .patch(CLAIM, &PatchParams::default(), &Patch::Merge(patch))
            .await?;
        wait_for(self.deadline(180), "df in pod C to show the new size", || async {
            let now = size().await?;
            ensure!(now >= 2 * before - before / 50, "{now} KiB, {before} KiB before");
            Ok(Some(()))
        })
        .await?;
        self.narrator.fact("df in the running pod C shows the new size");
        Ok(())
    }

    async fn numbers(&self) -> Result<()> {
        self.narrator.step("memory of each part");
        for line in super::numbers::memory(self.installation).await? {
            self.narrator.fact(&line);
        }
        Ok(())
    }

    async fn used_bytes(&self) -> Result<u64> {
        let mut client = self.installation.cluster_client().await?;
        let status = client.get_status(GetStatusRequest {}).await?.into_inner();
        Ok(status.nodes.iter().map(|node| node.used_bytes).sum())
    }

    async fn delete(&self) -> Result<()> {
        self.narrator.step("kubectl delete of the pods and the claim");
        let before = self.used_bytes().await?;
        self.clean().await?;
        let after = wait_for(self.deadline(300), "the storage nodes to free the space", || async {
            let mut client = self.installation.cluster_client().await?;
            let volumes = client
                .list_volumes(ListVolumesRequest::default())
                .await?
                .into_inner()
                .volumes;
            let left = volumes
                .iter()
                .any(|volume| volume.labels.values().any(|value| value == CLAIM));
            let now = self.used_bytes().await?;
            // The tree alone is more than 40 MB, three times.
            ensure!(
                !left && now + (100 << 20) < before,
                "volume there: {left}, used {now} of {before}"
            );
            Ok(Some(now))
        })
        .await?;
        self.narrator
            .fact(&format!("{} MiB freed on the storage nodes", (before - after) >> 20));
        Ok(())
    }
}

/// A folder name from a sentence, different for each step of the story.
fn short_name(text: &str) -> String {
    let name: String = text
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .collect();
    name.trim_matches('-').to_owned()
}
