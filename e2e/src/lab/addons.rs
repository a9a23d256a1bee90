//! What every cluster has beside the control plane: a name server and storage for single nodes.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::PersistentVolume;
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use super::Lab;
use super::config::{DISK_CLASS, DISKS_PER_NODE, Node};
use super::node::{DISKS, host_path};
use crate::{Deadline, wait_for};

const FIELD_MANAGER: &str = "lazarette-lab";

impl Lab {
    /// Applies CoreDNS, as `kube-dns` at the address that pods are told.
    pub(super) async fn apply_dns(&self, image: &str) -> Result<()> {
        let manifest = include_str!("manifests/coredns.yaml")
            .replace("${IMAGE}", image)
            .replace("${ADDRESS}", &self.config().dns_service().to_string());
        self.apply(&manifest).await.context("apply CoreDNS")
    }

    /// Offers the nodes' disks as PersistentVolumes of StorageClass [`DISK_CLASS`].
    ///
    /// Disks whose claim was deleted are wiped and offered anew, which on a real cluster is the job
    /// of an administrator or a provisioner.
    pub async fn offer_disks(&self) -> Result<()> {
        let client = self.client().await?;
        let apply = PatchParams::apply(FIELD_MANAGER).force();
        let class = json!({
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {"name": DISK_CLASS},
            "provisioner": "kubernetes.io/no-provisioner",
            "volumeBindingMode": "WaitForFirstConsumer",
        });
        Api::<StorageClass>::all(client.clone())
            .patch(DISK_CLASS, &apply, &Patch::Apply(class))
            .await?;

        let volumes = Api::<PersistentVolume>::all(client);
        let known: BTreeMap<_, _> = volumes
            .list(&Default::default())
            .await?
            .into_iter()
            .filter_map(|volume| Some((volume.metadata.name.clone()?, volume)))
            .collect();
        for node in self.config().all_nodes() {
            for disk in 0..DISKS_PER_NODE {
                let (name, path) = (format!("{}-disk{disk}", node.name()), format!("{DISKS}/disk{disk}"));
                match known
                    .get(&name)
                    .and_then(|volume| volume.status.as_ref()?.phase.as_deref())
                {
                    Some("Released" | "Failed") => self.recycle(&volumes, node, &name, Path::new(&path)).await?,
                    Some(_) => continue,
                    None => {}
                }
                let volume = disk_volume(node, &name, &path);
                volumes
                    .patch(&name, &apply, &Patch::Apply(volume))
                    .await
                    .with_context(|| format!("offer {name}"))?;
            }
        }
        Ok(())
    }

    async fn recycle(&self, volumes: &Api<PersistentVolume>, node: Node, name: &str, path: &Path) -> Result<()> {
        volumes
            .delete(name, &DeleteParams::default())
            .await
            .with_context(|| format!("delete {name}"))?;
        wait_for(Deadline::secs(60), format!("volume {name} to go"), || async {
            Ok(volumes.get_opt(name).await?.is_none().then_some(()))
        })
        .await?;
        if let Some(folder) = host_path(self.config(), node, path) {
            fs::remove_dir_all(&folder).with_context(|| format!("wipe {}", folder.display()))?;
            fs::create_dir_all(&folder)?;
        }
        Ok(())
    }
}

fn disk_volume(node: Node, name: &str, path: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            // A folder of this machine's disk: the size is a label, not a limit.
            "capacity": {"storage": "50Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": DISK_CLASS,
            "local": {"path": path},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
                {"key": "kubernetes.io/hostname", "operator": "In", "values": [node.name()]},
            ]}]}},
        },
    })
}
