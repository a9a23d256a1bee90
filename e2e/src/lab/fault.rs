//! Breaking things on purpose.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::Api;

pub use rustix::process::Signal;

use super::{Lab, host, network, node};
use crate::cgroup::Cgroups;
use crate::{Deadline, wait_for};

impl Lab {
    /// Sends a signal to the processes called `process` in a pod; returns their pids.
    ///
    /// The pod's containers are found through their control group, so this works while the API
    /// server believes anything else. None found is an error.
    pub async fn signal(&self, namespace: &str, pod: &str, process: &str, signal: Signal) -> Result<Vec<i32>> {
        let group = self.pod_group(namespace, pod).await?;
        let pids = host::signal_named(&Cgroups::discover()?, &group, process, signal)?;
        ensure!(!pids.is_empty(), "no process {process} in pod {namespace}/{pod}");
        Ok(pids)
    }

    /// Kills (SIGKILL) the processes called `process` in a pod; returns their pids.
    pub async fn kill(&self, namespace: &str, pod: &str, process: &str) -> Result<Vec<i32>> {
        self.signal(namespace, pod, process, Signal::KILL).await
    }

    /// The processes in a pod as this machine numbers them, without the one that holds the pod's
    /// namespaces.
    pub async fn pod_processes(&self, namespace: &str, pod: &str) -> Result<Vec<i32>> {
        let group = self.pod_group(namespace, pod).await?;
        Ok(Cgroups::discover()?
            .processes(&group)
            .iter()
            .map(|process| process.pid)
            .collect())
    }

    async fn pod_group(&self, namespace: &str, pod: &str) -> Result<String> {
        let object = Api::<Pod>::namespaced(self.client().await?, namespace).get(pod).await?;
        let uid = object.metadata.uid.context("a pod without uid")?;
        let node = object
            .spec
            .and_then(|spec| spec.node_name)
            .context("the pod is on no node yet")?;
        let machine = self.machine(self.config().node(&node)?)?;
        let found = Cgroups::discover()?.find(machine.cgroup(), &format!("pod{uid}"));
        found.with_context(|| format!("pod {namespace}/{pod} has no control group on {node}"))
    }

    /// Pulls a node's network cable.
    pub async fn cut(&self, node: &str) -> Result<()> {
        network::plug(&self.control()?, self.config().node(node)?, false).await
    }

    /// Plugs a node's network cable in again.
    pub async fn heal(&self, node: &str) -> Result<()> {
        network::plug(&self.control()?, self.config().node(node)?, true).await
    }

    /// Delays and drops what a node sends: `netem` arguments such as `["delay", "50ms", "loss",
    /// "1%"]`; none to end it.
    pub async fn disturb(&self, node: &str, netem: &[&str]) -> Result<()> {
        let machine = self.machine(self.config().node(node)?)?;
        let tc = || machine.enter("tc");
        if netem.is_empty() {
            tc()?.args(["qdisc", "delete", "dev", "eth0", "root"]).run().await?;
        } else {
            tc()?
                .args(["qdisc", "replace", "dev", "eth0", "root", "netem"])
                .args(netem)
                .run()
                .await?;
        }
        Ok(())
    }

    /// Pulls a node's plug: everything on it dies at once. Its disks keep what they have.
    pub async fn stop_node(&self, node: &str) -> Result<()> {
        self.machine(self.config().node(node)?)?
            .kill()
            .await
            .with_context(|| format!("stop {node}"))
    }

    /// Starts a node that was stopped, and waits until it is Ready.
    pub async fn start_node(&self, name: &str) -> Result<()> {
        let node = self.config().node(name)?;
        let machine = self.machine(node)?;
        if !node::is_running(&machine) {
            machine.kill().await?;
            let before = self.sign_of_life(name).await?;
            self.boot(node).await?;
            node::start_kubernetes(self.config(), node, &machine).await?;
            // Until the grace period is over, a dead node still counts as Ready.
            let deadline = Deadline::secs(60).logs(self.config().logs());
            wait_for(deadline, format!("{name} to report"), || async {
                Ok((self.sign_of_life(name).await? != before).then_some(()))
            })
            .await?;
        }
        self.heal(name).await?;
        self.wait_nodes(&[name.to_owned()], true, Duration::from_secs(90)).await
    }

    /// When the node's kubelet last renewed its lease.
    async fn sign_of_life(&self, node: &str) -> Result<Option<MicroTime>> {
        let leases = Api::<Lease>::namespaced(self.client().await?, "kube-node-lease");
        Ok(leases.get_opt(node).await?.and_then(|lease| lease.spec?.renew_time))
    }
}
