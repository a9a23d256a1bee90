use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams};
use lazarette_proto::cluster::cluster_client::ClusterClient;
use serde_json::Value;
use tonic::transport::Channel;

use super::{images, numbers};
use crate::image::{self, LAZARETTE};
use crate::lab::Lab;
use crate::story::Narrator;
use crate::tools::Tool;
use crate::{Deadline, build, wait_for};

/// Where Lazarette is installed.
pub const NAMESPACE: &str = "lazarette";
/// The label that tells what a pod is.
const COMPONENT: &str = "app.kubernetes.io/component";
/// The StorageCluster's name.
pub(super) const CLUSTER: &str = "main";
/// Where the pods and claims of the story live.
pub(super) const APPS: &str = "story";

/// The chart's value that names a sidecar's image of ours.
fn sidecar(value: &str, tool: Tool) -> Result<String> {
    let (name, version) = (tool.name(), tool.version()?);
    Ok(format!("csi.controller.{value}.image=localhost/{name}:{version}"))
}

/// Lazarette, installed on a lab.
pub struct Installation {
    pub(super) lab: Lab,
}

impl Installation {
    /// Builds and loads the images, installs the chart, applies a StorageCluster and waits until
    /// it is available. On a lab where this was done before it brings everything up to date.
    pub async fn up(lab: Lab, narrator: &dyn Narrator) -> Result<Self> {
        narrator.step("building the programs and images, loading them into the nodes");
        let binaries = build::all().await?;
        let archives = lab.load(&image::chart(&binaries).await?).await?;
        let mut names = archives.iter().map(|archive| archive.name.as_str());
        let image = names.find(|name| name.starts_with(LAZARETTE)).context("no image")?;
        narrator.fact(&numbers::image_sizes(&archives)?);
        lab.load(&[images::workload(&binaries).await?, images::toolbox()])
            .await?;
        let this = Self { lab };
        narrator.step("helm install");
        let started = Instant::now();
        let chart = build::workspace_root().join("charts/lazarette");
        let (repository, tag) = image.rsplit_once(':').context("no tag")?;
        this.lab
            .helm(["upgrade", "--install", "lazarette"])
            .await?
            .arg(&chart)
            .args(["--namespace", NAMESPACE, "--create-namespace", "--wait"])
            .args(["--set", &format!("image.repository={repository},image.tag={tag}")])
            .args(["--set", &format!("storageClass.parameters.cluster={CLUSTER}")])
            .args([
                "--set",
                &format!("operator.etcdImage=localhost/etcd:{}", Tool::Etcd.version()?),
            ])
            .args(["--set", &sidecar("provisioner", Tool::CsiProvisioner)?])
            .args(["--set", &sidecar("resizer", Tool::CsiResizer)?])
            .run()
            .await
            .context("helm install")?;
        narrator.fact(&format!("installed in {:.1} s", started.elapsed().as_secs_f32()));
        narrator.step("kubectl apply of a StorageCluster: 3 etcd members, 3 storage nodes");
        this.lab.offer_disks().await?;
        this.lab.apply(include_str!("manifests/storagecluster.yaml")).await?;
        this.wait_upgraded(image).await?;
        let status = this.wait_healthy(Duration::from_secs(300)).await?;
        narrator.fact(&format!(
            "Ready {:.1} s after `helm install` began: {} storage nodes",
            started.elapsed().as_secs_f32(),
            status["storageNodes"]["summary"].as_str().unwrap_or("?")
        ));
        Ok(this)
    }

    /// Waits until every pod runs this image, after an earlier installation.
    async fn wait_upgraded(&self, image: &str) -> Result<()> {
        let api: Api<Pod> = Api::namespaced(self.lab.client().await?, NAMESPACE);
        let deadline = Deadline::secs(300).logs(self.lab.config().logs());
        wait_for(deadline, format!("all pods to run {image}"), || async {
            let pods = self.pods("").await?;
            let old: Vec<_> = pods.iter().filter(|pod| runs_other_build(pod, image)).collect();
            for pod in &old {
                let name = pod.metadata.name.as_deref().unwrap_or_default();
                // Mounts end with their daemon, so the chart leaves the moment to the administrator.
                if pod
                    .metadata
                    .labels
                    .as_ref()
                    .and_then(|labels| labels.get(COMPONENT))
                    .map(String::as_str)
                    == Some("mount")
                {
                    api.delete(name, &DeleteParams::default()).await?;
                }
            }
            ensure!(old.is_empty(), "{} pods run another build", old.len());
            Ok(Some(()))
        })
        .await
    }

    /// The lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The StorageCluster's status.
    pub async fn status(&self) -> Result<Value> {
        let kind = GroupVersionKind::gvk("lazarette.io", "v1alpha1", "StorageCluster");
        let resource = ApiResource::from_gvk(&kind);
        let api: Api<DynamicObject> = Api::namespaced_with(self.lab.client().await?, NAMESPACE, &resource);
        let object = api.get(CLUSTER).await?;
        Ok(object.data["status"].clone())
    }

    /// Waits until a condition of the StorageCluster has this value; returns the status.
    pub async fn wait_condition(&self, kind: &str, wanted: bool, limit: Duration) -> Result<Value> {
        let deadline = Deadline::after(limit).logs(self.lab.config().logs());
        let word = if wanted { "True" } else { "False" };
        wait_for(deadline, format!("condition {kind} to be {word}"), || async {
            let status = self.status().await?;
            let conditions = status["conditions"].as_array().context("no conditions yet")?;
            let condition = conditions
                .iter()
                .find(|condition| condition["type"] == kind)
                .with_context(|| format!("no condition {kind}"))?;
            if condition["status"] == word {
                Ok(Some(status.clone()))
            } else {
                bail!("{condition}")
            }
        })
        .await
    }

    /// Waits until everything is available and nothing lacks a copy.
    pub async fn wait_healthy(&self, limit: Duration) -> Result<Value> {
        self.wait_condition("Available", true, limit).await?;
        self.wait_condition("Degraded", false, limit).await
    }

    /// A connection to the storage nodes' Cluster service, forwarded through the API server to a
    /// ready pod.
    pub(super) async fn cluster_client(&self) -> Result<ClusterClient<Channel>> {
        let pods = self.pods("app.kubernetes.io/component=storage-node").await?;
        let pod = pods
            .iter()
            .find(|pod| is_ready(pod))
            .and_then(|pod| pod.metadata.name.clone())
            .context("no storage node is ready")?;
        let api: Api<Pod> = Api::namespaced(self.lab.client().await?, NAMESPACE);
        let mut forward = api.portforward(&pod, &[7400]).await?;
        let stream = forward.take_stream(7400).context("no stream")?;
        let mut stream = Some(TokioIo::new(stream));
        let connector = tower::service_fn(move |_: tonic::transport::Uri| {
            let stream = stream.take().ok_or_else(|| std::io::Error::other("forwarded once"));
            async move { stream }
        });
        let channel = tonic::transport::Endpoint::from_static("http://forwarded")
            .timeout(Duration::from_secs(10))
            .connect_with_connector(connector)
            .await?;
        Ok(ClusterClient::new(channel))
    }

    /// Lazarette's pods with a label.
    pub(super) async fn pods(&self, selector: &str) -> Result<Vec<Pod>> {
        let api: Api<Pod> = Api::namespaced(self.lab.client().await?, NAMESPACE);
        let list = api.list(&ListParams::default().labels(selector)).await?;
        Ok(list.items)
    }

    /// The name of the pod with this address.
    pub(super) async fn pod_at(&self, address: &str) -> Result<String> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let pods = self.pods("app.kubernetes.io/component=storage-node").await?;
        let found = pods
            .iter()
            .find(|pod| pod.status.as_ref().and_then(|status| status.pod_ip.as_deref()) == Some(host));
        found
            .and_then(|pod| pod.metadata.name.clone())
            .with_context(|| format!("no storage node has address {address:?}"))
    }

    /// Runs the workload in a pod of the story; returns its closing line.
    pub(super) async fn workload(&self, pod: &str, args: &[&str]) -> Result<Value> {
        self.workload_for(pod, args, Duration::from_secs(600)).await
    }

    /// The same for something that takes long.
    pub(super) async fn workload_for(&self, pod: &str, args: &[&str], limit: Duration) -> Result<Value> {
        let output = self
            .lab
            .kubectl(["exec", "--namespace", APPS, pod, "--", "/bin/workload"])
            .args(args)
            .limit(limit)
            .run()
            .await
            .with_context(|| format!("{args:?} in pod {pod}"))?;
        let line = output.lines().last().context("the workload printed nothing")?;
        Ok(serde_json::from_str(line)?)
    }

    /// Waits until pods of the story are Ready.
    pub(super) async fn wait_pods(&self, pods: &[&str]) -> Result<()> {
        let api: Api<Pod> = Api::namespaced(self.lab.client().await?, APPS);
        let deadline = Deadline::secs(120)
            .every(Duration::from_millis(100))
            .logs(self.lab.config().logs());
        wait_for(deadline, format!("pods {} to be Ready", pods.join(", ")), || async {
            for pod in pods {
                let pod = api.get(pod).await?;
                ensure!(is_ready(&pod), "{}", serde_json::to_string(&pod.status)?);
            }
            Ok(Some(()))
        })
        .await
    }
}

/// Whether a pod runs Lazarette, but not from this image.
fn runs_other_build(pod: &Pod, image: &str) -> bool {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut images = containers.filter_map(|container| container.image.as_deref());
    images.any(|running| running.starts_with(LAZARETTE) && running != image)
}

pub(super) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}
