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
pub(super) const CLAIM: &str = "shared";
pub(super) const PODS: [&str; 3] = ["pod-a", "pod-b", "pod-c"];
/// Longest that the cluster may take to have all copies again.
pub(super) const HEAL: Duration = Duration::from_secs(300);
/// Longest that pod A may write.
const WRITING: Duration = Duration::from_secs(1800);

/// Plays the whole story; it starts and ends without its claim and pods.
pub async fn play(installation: &Installation, narrator: &dyn Narrator) -> Result<()> {
    let story = Story { installation, narrator };
    story.clean().await?;
    story.claim_and_pods().await?;
    story.tree().await?;
    story.appends().await?;
    let owner = installation.pod_at(&story.map().await?.owner_address).await?;
    story
        .disturb(&owner, Fault::Kill, "the owner of the metadata", "/data/owner-killed")
        .await?;
    let primary = story.busiest_primary().await?;
    story
        .disturb(&primary, Fault::Kill, "a primary of the data", "/data/primary-killed")
        .await?;
    let primary = story.busiest_primary().await?;
    story
        .disturb(&primary, Fault::DeletePod, "a storage pod", "/data/pod-deleted")
        .await?;
    story.grow().await?;
    story.numbers().await?;
    story.delete().await
}

/// What pod A has written meanwhile.
pub(super) struct Written {
    /// Records that were durable.
    acknowledged: u64,
    /// The longest that one of them took.
    longest: Duration,
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
        self.start(name, pod).await?;
        Ok(started.elapsed())
    }

    /// Makes a pod and waits until it is ready.
    pub(super) async fn start(&self, name: &str, pod: Value) -> Result<()> {
        let apply = PatchParams::apply("lazarette-story").force();
        self.pods_api().await?.patch(name, &apply, &Patch::Apply(pod)).await?;
        self.installation.wait_pods(&[name]).await
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
    async fn disturb(&self, victim: &str, fault: Fault, role: &str, folder: &str) -> Result<()> {
        let what = match fault {
            Fault::Kill => "SIGKILL",
            Fault::DeletePod => "kubectl delete",
        };
        self.narrator
            .step(&format!("{what} of {victim}, {role}, while pod A writes"));
        let written = self
            .while_writing(folder, async {
                let before = self.files_in(folder, 3).await?;
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
                self.files_in(folder, before + 5).await?;
                self.installation.wait_healthy(HEAL).await?;
                degraded.map(drop)
            })
            .await?;
        self.verify(PODS[1], folder, &written).await?;
        self.narrator.fact("reported Degraded, then Available with all copies");
        Ok(())
    }

    /// Pod A writes files of records into a folder of the volume, each acknowledged when it is durable, until
    /// the action has ended. It may see no error.
    pub(super) async fn while_writing(
        &self,
        folder: &str,
        action: impl Future<Output = Result<()>>,
    ) -> Result<Written> {
        let stop = folder.replacen("/data/", "/tmp/stop-", 1);
        let args = ["steady", folder, "--until", &stop];
        let writing = self.installation.workload_for(PODS[0], &args, WRITING);
        let acting = async {
            let done = action.await;
            let script = format!("touch {stop}");
            self.installation.lab.exec(APPS, PODS[0], &script).await?;
            done
        };
        let (report, done) = tokio::join!(writing, acting);
        done?;
        let report = report?;
        let errors = report["errors"].as_array().context("no report")?;
        ensure!(errors.is_empty(), "the application saw errors: {errors:?}");
        Ok(Written {
            acknowledged: report["acknowledged"].as_u64().context("no report")?,
            longest: Duration::from_millis(report["longest_ms"].as_u64().context("no report")?),
        })
    }

    /// Reads in another pod all that was acknowledged, and tells of it.
    pub(super) async fn verify(&self, pod: &str, folder: &str, written: &Written) -> Result<()> {
        let acknowledged = written.acknowledged.to_string();
        self.installation
            .workload(pod, &["verify", folder, &acknowledged])
            .await?;
        self.narrator.fact(&format!(
            "no error; longest stall {:.1} s; all {acknowledged} acknowledged records are there",
            written.longest.as_secs_f32()
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
