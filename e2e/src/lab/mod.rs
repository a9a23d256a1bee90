//! A real multi-node Kubernetes on one machine, without a container engine or virtual machines.
//!
//! Every machine of the lab (one for the control plane, the others are worker nodes) is a set of
//! namespaces and control groups; its programs are the real ones. [`Lab::up`] starts or repairs,
//! [`Lab::down`] removes every trace, and both may be interrupted at any point and run again.

mod addons;
mod client;
mod config;
mod control_plane;
mod fault;
mod host;
mod machine;
mod network;
mod node;
mod pki;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Node as KubeNode;
use kube::api::Api;

pub use config::{CONTROL_PLANE, DISK_CLASS, DISKS_PER_NODE, LabConfig};
pub use fault::Signal;

use crate::command::Cmd;
use crate::process::write_atomically;
use crate::tools::{self, Tool};
use crate::{Deadline, debian, image, wait_for};
use config::Node;
use machine::Machine;
use pki::Pki;

/// A running lab.
#[derive(Debug, Clone)]
pub struct Lab {
    config: LabConfig,
}

/// How a lab is doing.
#[derive(Debug, Clone)]
pub struct Status {
    /// Whether it was started completely.
    pub complete: bool,
    /// Name of each daemon that runs, and its process id.
    pub daemons: Vec<(String, i32)>,
    /// Name of each node that Kubernetes knows, and whether it is Ready.
    pub nodes: Vec<(String, bool)>,
    /// Why the nodes are not known.
    pub problem: Option<String>,
}

impl Lab {
    /// Starts a lab. One that runs is kept and repaired where faults were left behind: stopped
    /// nodes, pulled cables. One that was started halfway is removed first.
    pub async fn up(config: LabConfig) -> Result<Self> {
        config.validate()?;
        debian::ensure(debian::LAB_PACKAGES).await?;
        tools::ensure(Tool::LAB).await?;
        let _lock = tools::lock(&config.lock_path()).await?;
        let lab = Self { config };
        if lab.is_complete() && lab.repair().await? {
            return Ok(lab);
        }
        host::clean(&lab.config).await.context("remove an earlier lab")?;
        if let Err(error) = lab.create().await {
            // The state stays for inspection; the next start removes it.
            return Err(error.context(format!("start the lab (logs: {})", lab.config.logs().display())));
        }
        Ok(lab)
    }

    /// The lab that runs already.
    pub async fn attach(config: LabConfig) -> Result<Self> {
        let lab = Self {
            config: config.as_started(),
        };
        if !lab.is_complete() || !control_plane::is_running(&lab.control()?) {
            bail!("no lab is running in {}", lab.config.dir.display());
        }
        Ok(lab)
    }

    /// Removes every trace of the lab. Nothing there is no error.
    pub async fn down(config: &LabConfig) -> Result<()> {
        config.validate()?;
        let path = config.lock_path();
        let lock = tools::lock(&path).await?;
        host::clean(config).await?;
        fs::remove_file(&path).ok();
        drop(lock);
        Ok(())
    }

    /// What a lab has left on this machine; empty after [`Lab::down`].
    pub fn leftovers(config: &LabConfig) -> Result<Vec<String>> {
        host::leftovers(config)
    }

    /// Looks at a lab without changing anything.
    pub async fn status(config: &LabConfig) -> Result<Status> {
        let lab = Self {
            config: config.as_started(),
        };
        let daemons = crate::process::list(&config.dir)
            .into_iter()
            .map(|(name, p)| (name, p.pid))
            .collect();
        let mut status = Status {
            complete: lab.is_complete(),
            daemons,
            nodes: Vec::new(),
            problem: None,
        };
        if !lab.control()?.runs("apiserver") {
            status.problem = Some("no API server is running".to_owned());
            return Ok(status);
        }
        let list = async {
            let nodes = Api::<KubeNode>::all(lab.client().await?);
            anyhow::Ok(nodes.list(&Default::default()).await?)
        };
        match tokio::time::timeout(Duration::from_secs(5), list).await {
            Ok(Ok(list)) => {
                let name = |node: &KubeNode| node.metadata.name.clone().unwrap_or_default();
                status.nodes = list.iter().map(|node| (name(node), client::is_ready(node))).collect();
            }
            Ok(Err(error)) => status.problem = Some(format!("{error:#}")),
            Err(_) => status.problem = Some("the API server does not answer".to_owned()),
        }
        Ok(status)
    }

    /// What kind of lab this is.
    pub fn config(&self) -> &LabConfig {
        &self.config
    }

    /// A program to run on a node, outside of any pod: in its network, mount and UTS namespaces.
    pub fn on_node(&self, node: &str, program: &str) -> Result<Cmd> {
        self.machine(self.config.node(node)?)?.enter(program)
    }

    /// Where this machine keeps what a node has under one of its own folders (`/var/lib`,
    /// `/var/log`).
    pub fn node_path(&self, node: &str, path: impl AsRef<Path>) -> Result<PathBuf> {
        let path = path.as_ref();
        node::host_path(&self.config, self.config.node(node)?, path)
            .with_context(|| format!("{} is not {node}'s own, all nodes share it", path.display()))
    }

    fn control(&self) -> Result<Machine> {
        Machine::new(&self.config, CONTROL_PLANE)
    }

    fn machine(&self, node: Node) -> Result<Machine> {
        Machine::new(&self.config, node.name())
    }

    fn is_complete(&self) -> bool {
        fs::read_to_string(self.config.complete_marker()).is_ok_and(|nodes| nodes == self.config.nodes.to_string())
    }

    async fn create(&self) -> Result<()> {
        let config = &self.config;
        host::check(config)?;
        host::remember(config)?;
        fs::create_dir_all(config.logs())?;

        config.say("credentials");
        let pki = Pki::create(config)?;
        control_plane::credentials(config, &pki)?;
        for node in config.all_nodes() {
            node::configure(config, &pki, node)?;
        }

        config.say("control plane");
        let control = self.control()?;
        control.start().await?;
        network::connect_control_plane(config, &control).await?;
        control_plane::start(config, &control).await?;

        config.say(format!("{} nodes", config.nodes));
        let images = [image::pause().await?, image::busybox().await?, image::coredns().await?];
        let boots = config.all_nodes().map(|node| self.boot(node));
        let ready = self.wait_api_server();
        futures::try_join!(futures::future::try_join_all(boots), ready)?;
        self.load(&images).await?;
        for node in config.all_nodes() {
            node::start_kubernetes(config, node, &self.machine(node)?).await?;
        }

        let [_, _, dns] = &images;
        self.apply_dns(dns.name()).await?;
        self.offer_disks().await?;
        config.say("waiting for the nodes to be Ready");
        self.wait_nodes(&config.node_names(), true, Duration::from_secs(120))
            .await?;
        config.say("waiting for the name server");
        self.wait_dns().await?;
        write_atomically(&config.complete_marker(), config.nodes.to_string().as_bytes())
    }

    /// Brings a lab that was complete back to that; `false` if it has to be made anew.
    async fn repair(&self) -> Result<bool> {
        let control = self.control()?;
        if !control.is_running() || !control_plane::is_running(&control) {
            return Ok(false);
        }
        if let Err(error) = self.wait_api_server().await {
            self.config
                .say(format!("the lab that runs is beyond repair: {error:#}"));
            return Ok(false);
        }
        for name in self.config.node_names() {
            self.start_node(&name).await?;
        }
        self.offer_disks().await?;
        self.wait_dns().await?;
        Ok(true)
    }

    /// Starts a node's namespaces and its container runtime.
    async fn boot(&self, node: Node) -> Result<()> {
        let boot = async {
            let machine = self.machine(node)?;
            machine.start().await?;
            node::mount(&self.config, node, &machine).await?;
            network::connect_node(&self.config, &self.control()?, node, &machine).await?;
            node::start_containerd(&self.config, node, &machine).await
        };
        boot.await.with_context(|| format!("start {}", node.name()))
    }

    async fn wait_api_server(&self) -> Result<()> {
        let deadline = Deadline::secs(60).logs(crate::process::log_path(&self.config.dir, "control.apiserver"));
        wait_for(deadline, "the API server", || async {
            self.kubectl(["get", "--raw", "/readyz"])
                .limit(Duration::from_secs(10))
                .run()
                .await
                .map(Some)
        })
        .await?;
        Ok(())
    }

    async fn wait_dns(&self) -> Result<()> {
        let deployments = Api::<Deployment>::namespaced(self.client().await?, "kube-system");
        let deadline = Deadline::secs(120).logs(self.config.logs());
        wait_for(deadline, "the cluster's name server", || async {
            let ready = deployments
                .get("coredns")
                .await?
                .status
                .and_then(|status| status.ready_replicas);
            Ok(ready.is_some_and(|count| count > 0).then_some(()))
        })
        .await
    }
}
