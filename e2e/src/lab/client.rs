//! Talking to the lab's cluster.

use std::ffi::OsStr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Node as KubeNode;
use kube::api::Api;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};

use super::Lab;
use crate::command::Cmd;
use crate::image::{Archive, Image};
use crate::tools::{Tool, cache_dir, ensure};
use crate::{Deadline, cmd, wait_for};

impl Lab {
    /// A kubectl command for this cluster.
    pub fn kubectl<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Cmd {
        cmd![Tool::Kubectl.path()]
            .args(args)
            .env("KUBECONFIG", self.config().kubeconfig())
    }

    /// A helm command for this cluster. Helm is built when it is first needed.
    pub async fn helm<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Cmd> {
        ensure(&[Tool::Helm]).await?;
        // Helm keeps caches and plugins in the user's folders unless told otherwise.
        let home = self.config().dir.join("helm");
        Ok(cmd![Tool::Helm.path()]
            .args(args)
            .env("KUBECONFIG", self.config().kubeconfig())
            .env("HELM_CACHE_HOME", home.join("cache"))
            .env("HELM_CONFIG_HOME", home.join("config"))
            .env("HELM_DATA_HOME", home.join("data"))
            .limit(Duration::from_secs(600)))
    }

    /// Applies manifests (server-side).
    pub async fn apply(&self, manifests: &str) -> Result<()> {
        self.kubectl(["apply", "--server-side", "--force-conflicts", "-f", "-"])
            .stdin(manifests)
            .run()
            .await?;
        Ok(())
    }

    /// Runs a shell command in a pod and returns what it printed.
    pub async fn exec(&self, namespace: &str, pod: &str, script: &str) -> Result<String> {
        self.kubectl(["exec", "--namespace", namespace, pod, "--", "sh", "-c", script])
            .run()
            .await
    }

    /// A typed client for this cluster, with an administrator's rights.
    pub async fn client(&self) -> Result<kube::Client> {
        let path = self.config().kubeconfig();
        let kubeconfig = Kubeconfig::read_from(&path).with_context(|| format!("read {}", path.display()))?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        Ok(kube::Client::try_from(config)?)
    }

    /// Builds images (into the cache) and imports them into every node that lacks them.
    pub async fn load(&self, images: &[Image]) -> Result<Vec<Archive>> {
        let folder = cache_dir().join("images");
        let mut archives = Vec::new();
        for image in images {
            let archive = image.build(&folder).await?;
            self.import(&archive).await?;
            archives.push(archive);
        }
        Ok(archives)
    }

    /// Imports an image into every node that lacks it.
    pub async fn import(&self, archive: &Archive) -> Result<()> {
        let imports = self.config().all_nodes().map(|node| async move {
            let machine = self.machine(node)?;
            super::node::import(self.config(), node, &machine, archive).await
        });
        let imported = futures::future::try_join_all(imports).await?;
        let count = imported.into_iter().filter(|imported| *imported).count();
        if count > 0 {
            self.config()
                .say(format!("image {} imported into {count} nodes", archive.name));
        }
        Ok(())
    }

    /// Waits until these nodes are Ready, or not Ready any more.
    pub async fn wait_nodes(&self, names: &[String], ready: bool, limit: Duration) -> Result<()> {
        let nodes = Api::<KubeNode>::all(self.client().await?);
        let what = if ready { "Ready" } else { "not Ready" };
        let deadline = Deadline::after(limit).logs(self.config().logs());
        wait_for(deadline, format!("{} to be {what}", names.join(", ")), || async {
            for name in names {
                let node = nodes.get(name).await?;
                ensure!(
                    is_ready(&node) == ready,
                    "{name} is still {}",
                    if ready { "not Ready" } else { "Ready" }
                );
            }
            Ok(Some(()))
        })
        .await
    }
}

/// Whether the node's Ready condition is true.
pub(super) fn is_ready(node: &KubeNode) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .any(|c| c.type_ == "Ready" && c.status == "True")
}
