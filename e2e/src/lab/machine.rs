//! A pretended machine: network, mount and UTS namespaces, and the processes inside.
//!
//! The namespaces have no name in the file system. A sleeping process holds them; when it and all
//! the others of the machine are dead, the kernel removes interfaces and mounts by itself, so no
//! interruption can leave any behind.

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::config::LabConfig;
use crate::cgroup::Cgroups;
use crate::command::Cmd;
use crate::process::{self, Daemon, Process};
use crate::{Deadline, cmd, wait_for};

#[derive(Debug, Clone)]
pub(super) struct Machine {
    name: String,
    state: PathBuf,
    cgroup: String,
    cgroups: Cgroups,
}

impl Machine {
    pub(super) fn new(config: &LabConfig, name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        Ok(Self {
            cgroup: format!("{}/{name}", config.cgroup()),
            name,
            state: config.dir.clone(),
            cgroups: Cgroups::discover()?,
        })
    }

    fn holder(&self) -> String {
        format!("{}.namespaces", self.name)
    }

    /// The control group that holds all of the machine's processes.
    pub(super) fn cgroup(&self) -> &str {
        &self.cgroup
    }

    fn system_cgroup(&self) -> String {
        // The unified tree allows processes in leaves only, and the kubelet puts groups beside.
        format!("{}/system", self.cgroup)
    }

    /// Makes the namespaces.
    pub(super) async fn start(&self) -> Result<()> {
        self.cgroups.create(&self.system_cgroup())?;
        let holder = Daemon::new(self.holder(), &self.state, "unshare")
            .args(["--net", "--mount", "--uts", "--propagation", "private"])
            .args(["sleep", "infinity"])
            .cgroups(self.cgroups.folders(&self.system_cgroup()))
            .start()
            .await?;
        // unshare(1) replaces itself by sleep when the namespaces are complete.
        let deadline = Deadline::secs(10).every(Duration::from_millis(10));
        wait_for(deadline, format!("the namespaces of {}", self.name), || {
            let ready = fs::read_to_string(format!("/proc/{}/comm", holder.pid)).is_ok_and(|comm| comm == "sleep\n");
            async move { Ok(ready.then_some(())) }
        })
        .await?;
        self.enter("hostname")?.arg(&self.name).run().await?;
        Ok(())
    }

    /// The process that holds the namespaces.
    pub(super) fn process(&self) -> Result<Process> {
        process::find(&self.state, &self.holder()).ok_or_else(|| anyhow!("machine {} is not running", self.name))
    }

    pub(super) fn is_running(&self) -> bool {
        self.process().is_ok()
    }

    /// A program to run inside.
    pub(super) fn enter(&self, program: impl AsRef<OsStr>) -> Result<Cmd> {
        let pid = self.process()?.pid.to_string();
        // Not `ip netns exec`: it mounts a new /sys, in which the control groups are missing.
        Ok(cmd!["nsenter", "--target", pid, "--net", "--mount", "--uts", "--"].arg(program))
    }

    /// A daemon that runs inside; its log is `MACHINE.NAME.log`.
    pub(super) fn daemon(&self, name: &str, program: impl AsRef<OsStr>) -> Result<Daemon> {
        let pid = self.process()?.pid.to_string();
        Ok(Daemon::new(format!("{}.{name}", self.name), &self.state, "nsenter")
            .args(["--target", &pid, "--net", "--mount", "--uts", "--"])
            .arg(program)
            .cgroups(self.cgroups.folders(&self.system_cgroup())))
    }

    /// Whether the machine's daemon `name` runs.
    pub(super) fn runs(&self, name: &str) -> bool {
        process::is_running(&self.state, &format!("{}.{name}", self.name))
    }

    /// Runs a batch of ip(8) commands inside.
    pub(super) async fn ip(&self, batch: &[String]) -> Result<()> {
        self.enter("ip")?
            .args(["-batch", "-"])
            .stdin(batch.join("\n") + "\n")
            .run()
            .await
            .with_context(|| format!("set up the network of {}", self.name))?;
        Ok(())
    }

    /// Sets a kernel parameter of the machine's network namespace.
    pub(super) async fn sysctl(&self, path: &str, value: &str) -> Result<()> {
        let file = format!("/proc/sys/{path}");
        self.enter("tee")?
            .arg(&file)
            .stdin(value)
            .run()
            .await
            .with_context(|| format!("set {path}"))?;
        Ok(())
    }

    /// Pulls the plug: everything inside dies at once.
    pub(super) async fn kill(&self) -> Result<()> {
        self.cgroups.kill(&self.cgroup).await?;
        self.cgroups.remove(&self.cgroup).await
    }
}
