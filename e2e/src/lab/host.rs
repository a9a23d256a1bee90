//! What the lab does to the machine it runs on, and how it is undone.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use super::config::{CONTROL_PLANE, LabConfig};
use super::network;
use crate::cgroup::Cgroups;
use crate::process::{self, Process, write_atomically};
use crate::{Deadline, wait_for};

/// Kernel parameters of the whole machine that a kubelet changes.
const SYSCTLS: &[&str] = &[
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// The magic number of overlayfs.
const OVERLAYFS: u64 = 0x794c_7630;

/// Refuses what cannot work, with a remedy.
pub(super) fn check(config: &LabConfig) -> Result<()> {
    config.validate()?;
    ensure!(
        rustix::process::geteuid().is_root(),
        "the lab makes namespaces and mounts: run it as root"
    );
    ensure!(
        Path::new("/dev/fuse").exists(),
        "/dev/fuse is missing: load the kernel module fuse"
    );
    fs::create_dir_all(&config.dir).with_context(|| format!("create {}", config.dir.display()))?;
    let kind = rustix::fs::statfs(&config.dir)?.f_type;
    ensure!(
        u64::try_from(kind) != Ok(OVERLAYFS),
        "{} is on an overlay file system, on which containers cannot be unpacked; set LAZARETTE_LAB_DIR to a folder \
         on a real one",
        config.dir.display()
    );
    Ok(())
}

/// Remembers the kernel parameters as they were before the lab.
pub(super) fn remember(config: &LabConfig) -> Result<()> {
    let path = sysctl_file(config);
    if path.exists() {
        return Ok(());
    }
    let values: BTreeMap<_, _> = SYSCTLS
        .iter()
        .filter_map(|name| Some((*name, fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?)))
        .collect();
    write_atomically(&path, &serde_json::to_vec(&values)?)
}

fn restore(config: &LabConfig) -> Result<()> {
    let Ok(text) = fs::read(sysctl_file(config)) else {
        return Ok(());
    };
    let values: BTreeMap<String, String> = serde_json::from_slice(&text).unwrap_or_default();
    for (name, value) in values.iter().filter(|(name, _)| SYSCTLS.contains(&name.as_str())) {
        let path = Path::new("/proc/sys").join(name);
        if fs::read_to_string(&path).is_ok_and(|now| now != *value) {
            fs::write(&path, value).with_context(|| format!("restore {}", path.display()))?;
        }
    }
    Ok(())
}

fn sysctl_file(config: &LabConfig) -> PathBuf {
    config.dir.join("host-sysctls.json")
}

/// Removes everything of the lab from this machine; nothing there is no error.
pub(super) async fn clean(config: &LabConfig) -> Result<()> {
    let cgroups = Cgroups::discover()?;
    // Who got into a node's network namespace by other ways has to be found before the process
    // that holds the namespace is dead.
    let strangers = namespace_processes(config);
    cgroups.kill(&config.cgroup()).await?;
    process::stop_all(&config.dir, Duration::ZERO).await?;
    for stranger in strangers {
        stranger.stop(Duration::ZERO).await?;
    }
    network::disconnect_host(config).await?;
    cgroups.remove(&config.cgroup()).await?;
    restore(config)?;
    // Namespaces die asynchronously; a folder that is still a mount point must not be deleted
    // through.
    let deadline = Deadline::secs(30);
    wait_for(deadline, "the lab's mounts and links to vanish", || async {
        let left: Vec<_> = mounts(&config.dir)?;
        ensure!(left.is_empty(), "mounted: {}", left.join(", "));
        ensure!(
            !network::host_link_exists(config),
            "{} is still there",
            config.host_link()
        );
        Ok(Some(()))
    })
    .await?;
    remove_folder(&config.dir)
}

/// What is left of the lab on this machine; empty after [`clean`].
pub(super) fn leftovers(config: &LabConfig) -> Result<Vec<String>> {
    let cgroups = Cgroups::discover()?;
    let mut found = Vec::new();
    found.extend(
        cgroups
            .existing(&config.cgroup())
            .iter()
            .map(|folder| format!("cgroup {}", folder.display())),
    );
    found.extend(
        cgroups
            .processes(&config.cgroup())
            .iter()
            .map(|p| format!("process {}", p.pid)),
    );
    found.extend(
        process::list(&config.dir)
            .into_iter()
            .map(|(name, p)| format!("daemon {name} ({})", p.pid)),
    );
    found.extend(mounts(&config.dir)?.into_iter().map(|mount| format!("mount {mount}")));
    if network::host_link_exists(config) {
        found.push(format!("link {}", config.host_link()));
    }
    if config.dir.exists() {
        found.push(format!("folder {}", config.dir.display()));
    }
    Ok(found)
}

/// Processes in the network namespaces of the lab's machines.
fn namespace_processes(config: &LabConfig) -> Vec<Process> {
    let namespace = |pid: &str| fs::metadata(format!("/proc/{pid}/ns/net")).ok().map(|meta| meta.ino());
    let own = namespace("self");
    let lab: Vec<_> = std::iter::once(CONTROL_PLANE.to_owned())
        // Whatever the number of nodes was.
        .chain(config.clone().nodes(9).node_names())
        .filter_map(|name| process::find(&config.dir, &format!("{name}.namespaces")))
        .filter_map(|holder| namespace(&holder.pid.to_string()))
        // An interrupted start may have left a holder that has not unshared yet.
        .filter(|inode| Some(*inode) != own)
        .collect();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| namespace(&pid.to_string()).is_some_and(|inode| lab.contains(&inode)))
        .filter_map(Process::of)
        .collect()
}

/// Mount points at or below a folder, as this process sees them.
fn mounts(folder: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    Ok(text
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|point| Path::new(point).starts_with(folder))
        .map(str::to_owned)
        .collect())
}

fn remove_folder(folder: &Path) -> Result<()> {
    // Another process may still be writing its last words.
    for _ in 0..20 {
        match fs::remove_dir_all(folder) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(error) => return Err(error).with_context(|| format!("remove {}", folder.display())),
        }
    }
    bail!("{} does not stay empty", folder.display())
}

/// Sends a signal to every process called `name` in a control group and below.
pub(super) fn signal_named(cgroups: &Cgroups, group: &str, name: &str, signal: Signal) -> Result<Vec<i32>> {
    let mut pids = Vec::new();
    for process in cgroups.processes(group) {
        let comm = fs::read_to_string(format!("/proc/{}/comm", process.pid)).unwrap_or_default();
        // The kernel keeps the first 15 bytes of a name.
        let wanted: String = name.chars().take(15).collect();
        if comm.trim_end() == wanted && process.signal(signal)? {
            pids.push(process.pid);
        }
    }
    Ok(pids)
}
