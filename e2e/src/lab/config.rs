//! What the lab looks like: names, addresses, folders.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, ensure};

/// Name of the machine that runs the control plane.
pub const CONTROL_PLANE: &str = "control";

/// StorageClass of the empty folders that stand for a node's disks.
pub const DISK_CLASS: &str = "lab-disk";

/// How many disks each node has.
pub const DISKS_PER_NODE: u8 = 4;

/// What kind of lab to run and where.
#[derive(Clone)]
pub struct LabConfig {
    /// Where state and logs live; on a real file system, because containers' overlays need one.
    pub dir: PathBuf,
    /// How many worker nodes.
    pub nodes: u8,
    /// Labs with different numbers can run at the same time: their addresses and names differ.
    pub instance: u8,
    /// Is told what happens, a short line at a time.
    pub progress: Arc<dyn Fn(&str) + Send + Sync>,
}

impl fmt::Debug for LabConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LabConfig")
            .field("dir", &self.dir)
            .field("nodes", &self.nodes)
            .finish_non_exhaustive()
    }
}

impl Default for LabConfig {
    /// Three nodes in `$LAZARETTE_LAB_DIR` or `/var/lib/lazarette-lab`, silent.
    fn default() -> Self {
        let instance = std::env::var("LAZARETTE_LAB_INSTANCE")
            .ok()
            .and_then(|number| number.parse().ok());
        let mut config = Self::numbered(instance.unwrap_or(0));
        if let Some(dir) = std::env::var_os("LAZARETTE_LAB_DIR").filter(|dir| !dir.is_empty()) {
            config.dir = dir.into();
        }
        config
    }
}

impl LabConfig {
    /// Three nodes of the lab with this number, in `/var/lib/lazarette-lab` or
    /// `/var/lib/lazarette-lab-NUMBER`.
    pub fn numbered(instance: u8) -> Self {
        let suffix = if instance == 0 {
            String::new()
        } else {
            format!("-{instance}")
        };
        Self {
            dir: PathBuf::from(format!("/var/lib/lazarette-lab{suffix}")),
            nodes: 3,
            instance,
            progress: Arc::new(|_| {}),
        }
    }

    /// Reports progress to `progress`.
    #[must_use]
    pub fn progress(mut self, progress: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.progress = Arc::new(progress);
        self
    }

    /// A lab with so many nodes.
    #[must_use]
    pub fn nodes(mut self, nodes: u8) -> Self {
        self.nodes = nodes;
        self
    }

    pub(super) fn say(&self, line: impl AsRef<str>) {
        (self.progress)(line.as_ref());
    }

    pub(super) fn validate(&self) -> Result<()> {
        ensure!(
            (1..=9).contains(&self.nodes),
            "a lab has one to nine nodes, not {}",
            self.nodes
        );
        ensure!(
            self.instance <= 15,
            "labs are numbered from 0 to 15, {} is too high",
            self.instance
        );
        ensure!(self.dir.is_absolute(), "{} is not an absolute path", self.dir.display());
        // The folder is deleted as a whole at the end.
        ensure!(
            self.dir.components().count() > 2,
            "{} is too close to the root to be the lab's own folder",
            self.dir.display()
        );
        Ok(())
    }

    /// The worker nodes.
    pub fn node_names(&self) -> Vec<String> {
        self.all_nodes().map(Node::name).collect()
    }

    /// The configuration with as many nodes as the lab that was started, if any was.
    pub(super) fn as_started(&self) -> Self {
        let started = std::fs::read_to_string(self.complete_marker())
            .ok()
            .and_then(|nodes| nodes.parse().ok());
        self.clone().nodes(started.unwrap_or(self.nodes))
    }

    pub(super) fn all_nodes(&self) -> impl Iterator<Item = Node> + use<> {
        let instance = self.instance;
        (1..=self.nodes).map(move |index| Node { instance, index })
    }

    pub(super) fn node(&self, name: &str) -> Result<Node> {
        let node = self.all_nodes().find(|node| node.name() == name);
        node.ok_or_else(|| anyhow::anyhow!("the lab has no node {name}, only {}", self.node_names().join(", ")))
    }

    /// For kubectl and other clients on this machine.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// One log file per component.
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    pub(super) fn pki(&self) -> PathBuf {
        self.dir.join("pki")
    }

    pub(super) fn node_dir(&self, node: Node) -> PathBuf {
        self.dir.join("nodes").join(node.name())
    }

    /// Present when the lab was started completely; holds the number of nodes.
    pub(super) fn complete_marker(&self) -> PathBuf {
        self.dir.join("complete")
    }

    pub(super) fn api_server(&self) -> String {
        format!("https://{}:6443", self.control_plane_address())
    }

    /// Address of the API server (and of the bridge that joins the nodes).
    pub fn control_plane_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 213, self.instance, 1)
    }

    /// This machine's address on the lab's bridge.
    pub fn host_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 213, self.instance, 254)
    }

    /// Addresses of all pods.
    pub fn pod_range(&self) -> String {
        format!("10.214.{}.0/20", self.instance * 16)
    }

    /// Addresses of Services.
    pub fn service_range(&self) -> String {
        format!("10.215.{}.0/20", self.instance * 16)
    }

    /// Address of the Service `kubernetes`, the first of the range.
    pub(super) fn kubernetes_service(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 215, self.instance * 16, 1)
    }

    /// Address of the cluster's name server.
    pub fn dns_service(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 215, self.instance * 16, 10)
    }

    /// The control group that holds the whole lab.
    pub(super) fn cgroup(&self) -> String {
        format!("lz-lab{}", self.instance)
    }

    /// This machine's end of the cable to the lab.
    pub(super) fn host_link(&self) -> String {
        format!("lz-host{}", self.instance)
    }

    /// One command at a time changes the lab. Beside the folder, not in it, because the folder is
    /// deleted while the lock is held.
    pub(super) fn lock_path(&self) -> PathBuf {
        let name = self.dir.file_name().unwrap_or_default().to_string_lossy();
        Path::new("/run").join(format!("lz-{name}.lock"))
    }
}

/// A worker node, numbered from one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Node {
    instance: u8,
    pub(super) index: u8,
}

impl Node {
    pub(super) fn name(self) -> String {
        format!("node{}", self.index)
    }

    pub(super) fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 213, self.instance, 10 + self.index)
    }

    pub(super) fn pod_range(self) -> String {
        format!("10.214.{}.0/24", self.instance * 16 + self.index)
    }

    /// The end of the node's cable at the bridge.
    pub(super) fn port(self) -> String {
        format!("lz-{}", self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_not_ours_is_refused() {
        let with = |dir: &str| LabConfig {
            dir: dir.into(),
            ..LabConfig::default()
        };
        assert!(with("/").validate().is_err());
        assert!(with("/var").validate().is_err());
        assert!(with("lab").validate().is_err());
        assert!(with("/var/lib/lab").validate().is_ok());
        assert!(with("/var/lib/lab").nodes(10).validate().is_err());
    }
}
