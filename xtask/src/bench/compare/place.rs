//! Where one system runs during one turn.

use crate::bench::disk::{self, Disk};
use anyhow::{Context, Result, bail};
use lazarette_e2e::cgroup::Cgroups;
use lazarette_e2e::local::is_mounted;
use lazarette_e2e::process::{self, Daemon, Process};
use lazarette_e2e::{Deadline, wait_for};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The control group of everything that the benchmark starts.
const GROUP: &str = "lazarette-bench";
/// An address of this machine that is not 127.0.0.1, which some servers refuse to be known by.
pub(super) const ADDRESS: &str = "10.77.0.1";
/// The daemon that serves the mount.
const CLIENT: &str = "client";
const LIMIT: Duration = Duration::from_secs(120);

/// A folder, a mount point and a control group. What is in the control group belongs to the system.
pub(super) struct Place {
    /// Configuration, data and logs of the servers.
    pub(super) data: PathBuf,
    pub(super) mountpoint: PathBuf,
    /// The folder above, for what outlives a turn.
    pub(super) dir: PathBuf,
    /// Bytes of the disk that `data` is on.
    pub(super) disk: u64,
    cgroups: Cgroups,
    group: String,
}

impl Place {
    /// `data` and `mountpoint` are made, empty.
    pub(super) fn new(dir: &Path, disk: &Disk, name: &str) -> Result<Self> {
        let place = Self {
            data: disk.folder().join(name),
            disk: disk.bytes(),
            mountpoint: dir.join("mounted").join(name),
            dir: dir.to_owned(),
            cgroups: Cgroups::discover()?,
            group: format!("{GROUP}/{name}"),
        };
        fs::create_dir_all(place.data.join("logs"))?;
        fs::create_dir_all(&place.mountpoint)?;
        place.cgroups.create(&place.group)?;
        Ok(place)
    }

    /// A daemon of the system.
    pub(super) fn daemon(&self, name: &str, program: impl AsRef<std::ffi::OsStr>) -> Daemon {
        Daemon::new(name, &self.data, program).cgroups(self.cgroups.folders(&self.group))
    }

    /// Takes in a process that was started otherwise.
    pub(super) fn adopt(&self, process: &Process) -> Result<()> {
        for folder in self.cgroups.folders(&self.group) {
            fs::write(folder.join("cgroup.procs"), process.pid.to_string())
                .with_context(|| format!("put process {} into {}", process.pid, folder.display()))?;
        }
        Ok(())
    }

    pub(super) fn processes(&self) -> Vec<Process> {
        self.cgroups.processes(&self.group)
    }

    /// Processor time of the system so far.
    pub(super) fn processor(&self) -> Result<Duration> {
        self.cgroups.processor(&self.group)
    }

    pub(super) async fn wait<F>(&self, what: &str, mut ready: impl FnMut() -> F) -> Result<()>
    where
        F: Future<Output = Result<bool>>,
    {
        let deadline = Deadline::after(LIMIT)
            .every(Duration::from_millis(100))
            .logs(self.data.join("logs"));
        wait_for(deadline, what, || {
            let ready = ready();
            async { Ok(ready.await?.then_some(())) }
        })
        .await
    }

    pub(super) async fn wait_for_port(&self, what: &str, port: u16) -> Result<()> {
        self.wait(what, || async {
            tokio::net::TcpStream::connect((ADDRESS, port)).await?;
            Ok(true)
        })
        .await
    }

    /// Starts the program that serves the mount and waits until it answers.
    pub(super) async fn mount(&self, program: &str, arguments: &[&str]) -> Result<()> {
        let client = self.daemon(CLIENT, program).args(arguments).start().await?;
        self.wait("the mount", || async {
            if !client.is_running() {
                let log = process::log_path(&self.data, CLIENT);
                bail!("the client has ended: {}", process::last_lines(&log, 5));
            }
            if !is_mounted(&self.mountpoint)? {
                return Ok(false);
            }
            // The kernel's answer would not be one of the client.
            let mountpoint = self.mountpoint.clone();
            tokio::task::spawn_blocking(move || fs::read_dir(mountpoint)).await??;
            Ok(true)
        })
        .await
    }

    /// Unmounts, which writes back what the client holds, and waits for the client to end.
    pub(super) async fn unmount(&self) -> Result<()> {
        self.wait("the mount to be unused", || async {
            match rustix::mount::unmount(&self.mountpoint, UnmountFlags::empty()) {
                Err(Errno::INVAL) => Ok(true),
                Err(error) => Err(error.into()),
                Ok(()) => Ok(true),
            }
        })
        .await?;
        if let Some(client) = process::find(&self.data, CLIENT) {
            let _ = client.wait(Duration::from_secs(10)).await;
        }
        process::stop(&self.data, CLIENT, Duration::from_secs(10)).await
    }
}

/// Ends what runs and unmounts everything.
pub(super) async fn end(dir: &Path) -> Result<()> {
    let cgroups = Cgroups::discover()?;
    cgroups.kill(GROUP).await?;
    cgroups.remove(GROUP).await?;
    disk::release(dir).await
}

/// Ends and removes what a run has started, whether this one or an earlier one.
pub(super) async fn clean(dir: &Path) -> Result<()> {
    end(dir).await?;
    // Fails if it is not there.
    let _ = loopback("del").output().await?;
    Ok(())
}

/// Adds [`ADDRESS`] to the machine or removes it.
pub(super) fn loopback(verb: &str) -> lazarette_e2e::command::Cmd {
    lazarette_e2e::cmd!["ip", "address", verb, format!("{ADDRESS}/32"), "dev", "lo"]
}
