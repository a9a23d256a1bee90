//! Control groups: they hold every process that was started in one, so that none escapes the end.
//!
//! Works with both layouts: one tree per controller (version 1) and the unified tree (version 2).

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use crate::process::Process;

/// The trees of control groups of this machine.
#[derive(Debug, Clone)]
pub struct Cgroups {
    /// Where groups are made.
    trees: Vec<PathBuf>,
    /// Where container runtimes may make more: the unified tree beside separate ones.
    others: Vec<PathBuf>,
    unified: bool,
}

impl Cgroups {
    /// Finds the trees that are mounted.
    pub fn discover() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("read the mounts")?;
        let of_type = |kind: &str| -> Vec<PathBuf> {
            mounts
                .lines()
                .filter_map(|line| {
                    let mut words = line.split(' ').skip(1);
                    let path = words.next()?;
                    (words.next()? == kind).then(|| PathBuf::from(path))
                })
                .collect()
        };
        let separate = of_type("cgroup");
        let unified = separate.is_empty();
        let (trees, others) = if unified {
            (of_type("cgroup2"), Vec::new())
        } else {
            (separate, of_type("cgroup2"))
        };
        if trees.is_empty() {
            bail!("no control groups are mounted, which containers need");
        }
        Ok(Self { trees, others, unified })
    }

    /// Makes a group (and its parents) ready for processes or child groups.
    pub fn create(&self, group: &str) -> Result<()> {
        for tree in &self.trees {
            let mut parent = tree.clone();
            for part in Path::new(group) {
                if self.unified {
                    enable_controllers(&parent)?;
                }
                let child = parent.join(part);
                match fs::create_dir(&child) {
                    Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                        return Err(error).with_context(|| format!("create {}", child.display()));
                    }
                    _ => {}
                }
                inherit_cpuset(&parent, &child)?;
                parent = child;
            }
        }
        Ok(())
    }

    /// The folders that a process of the group has to be put into, one per tree.
    pub fn folders(&self, group: &str) -> Vec<PathBuf> {
        self.trees.iter().map(|tree| tree.join(group)).collect()
    }

    fn all_folders(&self, group: &str) -> Vec<PathBuf> {
        self.trees
            .iter()
            .chain(&self.others)
            .map(|tree| tree.join(group))
            .collect()
    }

    /// The processes in the group and below.
    pub fn processes(&self, group: &str) -> Vec<Process> {
        let mut pids = BTreeSet::new();
        for folder in self.all_folders(group) {
            for group in tree(&folder) {
                let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
                pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            }
        }
        pids.into_iter().filter_map(Process::of).collect()
    }

    /// Groups below `group` whose folder has this name, in the first tree that has any.
    pub fn find(&self, group: &str, name: &str) -> Option<String> {
        self.trees.iter().find_map(|root| {
            tree(&root.join(group)).into_iter().find_map(|folder| {
                let found = folder.file_name()?.to_str()? == name;
                found.then(|| folder.strip_prefix(root).ok()?.to_str().map(str::to_owned))?
            })
        })
    }

    /// Processor time that the group and all below have used since they were made.
    pub fn processor(&self, group: &str) -> Result<Duration> {
        let read = |file: &str| {
            let mut files = self.trees.iter().map(|tree| tree.join(group).join(file));
            files.find_map(|file| fs::read_to_string(file).ok())
        };
        let used = if self.unified {
            let stat = read("cpu.stat");
            let line = stat.as_deref().and_then(|stat| stat.lines().next());
            line.and_then(|line| line.strip_prefix("usage_usec ")?.parse().ok())
                .map(Duration::from_micros)
        } else {
            read("cpuacct.usage")
                .and_then(|nanoseconds| nanoseconds.trim().parse().ok())
                .map(Duration::from_nanos)
        };
        used.with_context(|| format!("control group {group} counts no processor time"))
    }

    /// Kills every process in the group and below.
    pub async fn kill(&self, group: &str) -> Result<()> {
        // Processes that fork while they are being killed need another round.
        for _ in 0..400 {
            let left = self.processes(group);
            if left.is_empty() {
                return Ok(());
            }
            for process in &left {
                process.signal(Signal::KILL)?;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let left: Vec<_> = self.processes(group).iter().map(|p| p.pid.to_string()).collect();
        bail!("processes in control group {group} survive SIGKILL: {}", left.join(" "))
    }

    /// Removes the group and everything below. A group that is not there is no error.
    pub async fn remove(&self, group: &str) -> Result<()> {
        for folder in self.all_folders(group) {
            for child in tree(&folder).into_iter().rev() {
                remove_one(&child).await?;
            }
        }
        Ok(())
    }

    /// The group's folders that exist.
    pub fn existing(&self, group: &str) -> Vec<PathBuf> {
        self.all_folders(group)
            .into_iter()
            .filter(|folder| folder.exists())
            .collect()
    }
}

/// A group and all groups below, parents first.
fn tree(folder: &Path) -> Vec<PathBuf> {
    if !folder.is_dir() {
        return Vec::new();
    }
    let mut found = vec![folder.to_owned()];
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        found.extend(tree(&entry.path()));
    }
    found
}

async fn remove_one(folder: &Path) -> Result<()> {
    // A killed process leaves its group a moment after it is gone from the process table.
    for _ in 0..200 {
        match fs::remove_dir(folder) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                tokio::time::sleep(Duration::from_millis(25)).await;
            }
            Err(error) => return Err(error).with_context(|| format!("remove {}", folder.display())),
        }
    }
    bail!("{} stays busy", folder.display())
}

/// A version 1 cpuset accepts no process before it was given processors and memory nodes.
fn inherit_cpuset(parent: &Path, child: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (from, to) = (parent.join(file), child.join(file));
        let is_empty = |path: &Path| fs::read_to_string(path).is_ok_and(|text| text.trim().is_empty());
        if is_empty(&to) && !is_empty(&from) {
            let value = fs::read_to_string(&from).with_context(|| format!("read {}", from.display()))?;
            // In the unified tree an empty value means "inherited" and the copy would be harmless.
            fs::write(&to, value.trim()).with_context(|| format!("write {}", to.display()))?;
        }
    }
    Ok(())
}

/// Version 2: children get the controllers that their parent hands down.
fn enable_controllers(folder: &Path) -> Result<()> {
    let controllers = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    let wanted: Vec<_> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let path = folder.join("cgroup.subtree_control");
    fs::write(&path, wanted.join(" ")).with_context(|| format!("write {}", path.display()))
}
