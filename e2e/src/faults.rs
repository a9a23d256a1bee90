//! Faults on a local cluster while the verifier runs on several mounts of one volume: shared by the
//! tests and `cargo xtask soak faults`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lazarette_workload::verifier::{Failure, Random, Stalls};
use rustix::process::Signal;

use crate::local::{LocalCluster, Part, Shape};
use crate::process::Process;
use crate::story::{Mounts, Narrator, busiest_primary, owner_of};
use crate::verifier::{Verifier, check};
use crate::{Deadline, build, wait_for};

const VOLUME: &str = "faults";
/// Operations that each mount which must not suffer has to do while a fault lasts.
const PROGRESS: u64 = 40;
/// A client that is silent for longer than its session (10 s) loses it, and its leases long before that: in the
/// second half of a short silence it can do nothing.
const SHORT: Duration = Duration::from_secs(7);
const LONG: Duration = Duration::from_secs(14);
/// How long anything may take before it counts as hung. Stalls are measured, not judged.
const PATIENCE: u64 = 150;

/// Which storage node a fault hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// The owner of the volume's metadata.
    Owner,
    /// A primary of most of its data.
    Primary,
    /// The one with this index.
    Index(usize),
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL of a storage node, which starts again.
    KillNode(Node),
    /// A storage node stands still for longer than its leases.
    PauseNode(Node),
    /// A storage node's network is cut for so long.
    CutNode(Node, Duration),
    /// The mount daemon of a client stands still for so long.
    PauseClient(usize, Duration),
    /// A client's network is cut for so long.
    CutClient(usize, Duration),
    /// A client's network is cut for longer than its session, which ends; it joins the volume anew.
    LoseClient(usize),
    /// SIGKILL of etcd's leader, which starts again.
    KillEtcd,
    /// etcd's leader stands still for longer than all leases.
    PauseEtcd,
    /// The network of etcd's leader is cut for so long.
    CutEtcd(Duration),
    /// SIGKILL of all members of etcd at once.
    KillAllEtcd,
    /// SIGKILL of all storage nodes at once.
    KillAllNodes,
    /// SIGKILL of everything at once, the mount daemons too.
    PowerCut,
    /// A storage node's disk gets full, and empty again.
    FillDisk(usize),
    /// All disks get full, and empty again.
    FillAllDisks,
    /// All that a storage node has stored is deleted while it runs; it then starts with nothing.
    LoseDisk(usize),
}

impl Fault {
    /// Faults without end, decided by a seed, for three storage nodes and three clients.
    pub fn at_random(seed: u64) -> impl Iterator<Item = Self> {
        let mut random = Random::new(seed);
        std::iter::repeat_with(move || {
            let node = match random.below(4) {
                0 => Node::Owner,
                1 => Node::Primary,
                _ => Node::Index(random.below(3) as usize),
            };
            let (number, time) = (random.below(3) as usize, Duration::from_secs(1 + random.below(30)));
            match random.below(15) {
                0 => Self::KillNode(node),
                1 => Self::PauseNode(node),
                2 => Self::CutNode(node, time),
                3 => Self::PauseClient(number, SHORT),
                4 => Self::CutClient(number, SHORT),
                5 => Self::KillEtcd,
                6 => Self::PauseEtcd,
                7 => Self::CutEtcd(time),
                8 => Self::KillAllEtcd,
                9 => Self::KillAllNodes,
                10 => Self::PowerCut,
                11 => Self::LoseClient(number),
                14 => Self::FillDisk(number),
                12 => Self::FillAllDisks,
                _ => Self::LoseDisk(number),
            }
        })
    }

    /// Whether applications may see this failure meanwhile.
    fn allows(self, failure: &Failure) -> bool {
        match self {
            Self::FillDisk(_) | Self::FillAllDisks => failure.errno == rustix::io::Errno::NOSPC.raw_os_error(),
            Self::LoseClient(mount) => failure.mount == mount,
            // The applications die with it.
            Self::PowerCut => true,
            _ => false,
        }
    }
}

/// A cluster on which the verifier runs.
pub struct Arena<'a> {
    cluster: LocalCluster,
    mounts: Mounts,
    model: tempfile::TempDir,
    seed: u64,
    running: Option<Verifier>,
    /// A disk has been full.
    filled: bool,
    narrator: &'a dyn Narrator,
}

impl<'a> Arena<'a> {
    /// A shape in which every fault of the network can be done.
    pub const NETWORKS: Shape = Shape {
        storage_nodes: 3,
        etcd_members: 3,
        networks: true,
        disk_mib: None,
        node_args: &[],
    };
    /// A shape in which every fault can be done.
    pub const EVERYTHING: Shape = Shape {
        disk_mib: Some(512),
        ..Self::NETWORKS
    };

    /// Mounts a volume three times and lets the verifier loose on it.
    pub async fn new(cluster: &LocalCluster, seed: u64, narrator: &'a dyn Narrator) -> Result<Self> {
        build::all().await?;
        let mut arena = Self {
            cluster: cluster.clone(),
            mounts: Mounts::new(cluster, VOLUME, 3).await?,
            // Not in the cluster's folder: its disks fill up.
            model: tempfile::tempdir()?,
            seed,
            running: None,
            filled: false,
            narrator,
        };
        narrator.fact(&format!(
            "the verifier runs on {} mounts, seed {seed}",
            arena.mounts.count()
        ));
        arena.start()?;
        arena.progress(|_| true).await?;
        Ok(arena)
    }

    fn start(&mut self) -> Result<()> {
        let log = self.logs().join("verifier.log");
        let (folders, model) = (self.folders(), self.model.path());
        let full_disks = self.cluster.has_small_disks();
        self.running = Some(Verifier::start(&folders, model, self.seed, full_disks, &log)?);
        Ok(())
    }

    fn folders(&self) -> Vec<PathBuf> {
        (0..self.mounts.count())
            .map(|mount| self.mounts.path(mount, ""))
            .collect()
    }

    fn running(&self) -> Result<&Verifier> {
        self.running.as_ref().context("the verifier does not run")
    }

    /// Does something bad, waits until all is well again, and judges what the applications saw.
    pub async fn inflict(&mut self, fault: Fault) -> Result<Stalls> {
        self.narrator.step(&format!("{fault:?}"));
        self.running()?.stalls().await?;
        let begun = Instant::now();
        self.filled |= matches!(fault, Fault::FillDisk(_) | Fault::FillAllDisks);
        self.hurt(fault).await.with_context(|| format!("{fault:?}"))?;
        self.progress(|_| true)
            .await
            .with_context(|| format!("after {fault:?}"))?;
        self.cluster
            .wait_until_healthy(Duration::from_secs(PATIENCE))
            .await
            .with_context(|| format!("after {fault:?}"))?;
        let stalls = self.running()?.stalls().await?;
        let problems = self.running()?.problems().await?;
        ensure!(problems.is_empty(), "{fault:?}, seed {}: {problems:#?}", self.seed);
        for (failure, count) in &stalls.failures {
            // An fsync tells of writes that failed before it, when a disk was full.
            let late = self.filled && failure.errno == rustix::io::Errno::NOSPC.raw_os_error();
            // The kernel asks for the attributes of what a name has just led to, also of the folders on the
            // way. If others have replaced that meanwhile, it looks once more, and if they have again, gives up.
            let raced = failure.kind.is_of_names() && failure.errno == rustix::io::Errno::STALE.raw_os_error();
            ensure!(
                fault.allows(failure) || late || raced,
                "{fault:?}, seed {}: applications saw {count} of {failure:?}",
                self.seed
            );
        }
        let hit = match fault {
            Fault::CutClient(mount, _) | Fault::PauseClient(mount, _) | Fault::LoseClient(mount) => Some(mount),
            _ => None,
        };
        self.narrator.fact(&format!(
            "longest stall {:.1} s; whole again after {:.1} s; {stalls}",
            stalls.longest_of(|mount| Some(mount) != hit).as_secs_f32(),
            begun.elapsed().as_secs_f32(),
        ));
        Ok(stalls)
    }

    async fn hurt(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::KillNode(node) => {
                let index = self.index(node).await?;
                kill(&[self.node(index)?]).await?;
                self.progress(|_| true).await?;
                self.cluster.start_node(index).await?;
            }
            Fault::PauseNode(node) => {
                let process = self.node(self.index(node).await?)?;
                self.pause(&process, Duration::from_secs(6), |_| true).await?;
            }
            Fault::CutNode(node, time) => {
                let index = self.index(node).await?;
                self.cut(Part::StorageNode(index), time, |_| true).await?;
            }
            Fault::PauseClient(mount, time) => {
                let process = self.cluster.mount_daemon(&self.mounts.path(mount, ""))?;
                let process = process.context("the mount daemon does not run")?;
                self.running()?.isolate(mount).await?;
                ensure!(process.signal(Signal::STOP)?, "process {} is gone", process.pid);
                let stood_still = self.stands_still(mount, time).await;
                process.signal(Signal::CONT)?;
                stood_still?;
                self.progress(|_| true).await?;
                self.running()?.join_all().await?;
            }
            Fault::CutClient(mount, time) => {
                let folder = self.mounts.path(mount, "");
                self.running()?.isolate(mount).await?;
                self.cluster.cut(Part::Mount(&folder)).await?;
                let stood_still = self.stands_still(mount, time).await;
                self.cluster.heal(Part::Mount(&folder)).await?;
                stood_still?;
                self.progress(|_| true).await?;
                self.running()?.join_all().await?;
            }
            Fault::LoseClient(mount) => {
                let folder = self.mounts.path(mount, "");
                self.running()?.isolate(mount).await?;
                self.cut(Part::Mount(&folder), LONG, |other| other != mount).await?;
                // What was under way in the old session has failed; then it goes on by itself.
                self.wait_for_failure(mount).await?;
                self.progress(|_| true).await?;
                self.running()?.join_all().await?;
            }
            Fault::KillEtcd => {
                let leader = self.cluster.etcd_leader().await?;
                kill(&[self.member(leader)?]).await?;
                self.progress(|_| true).await?;
                self.cluster.start_etcd(leader).await?;
            }
            Fault::PauseEtcd => {
                let process = self.member(self.cluster.etcd_leader().await?)?;
                self.pause(&process, Duration::from_secs(6), |_| true).await?;
            }
            Fault::CutEtcd(time) => {
                let leader = self.cluster.etcd_leader().await?;
                self.cut(Part::Etcd(leader), time, |_| true).await?;
            }
            Fault::KillAllEtcd => {
                let members = 0..self.cluster.etcd_members();
                kill(&members.map(|member| self.member(member)).collect::<Result<Vec<_>>>()?).await?;
                self.cluster.start().await?;
            }
            Fault::KillAllNodes => {
                let nodes = 0..self.cluster.nodes();
                kill(&nodes.map(|node| self.node(node)).collect::<Result<Vec<_>>>()?).await?;
                self.cluster.start().await?;
            }
            Fault::PowerCut => self.power_cut().await?,
            Fault::FillDisk(index) => {
                self.cluster.fill_disk(index)?;
                self.linger(Duration::from_secs(8)).await?;
                self.progress(|_| true).await?;
                self.cluster.free_disk(index)?;
            }
            Fault::FillAllDisks => self.fill_all().await?,
            Fault::LoseDisk(index) => {
                self.cluster.lose_disk(index)?;
                self.progress(|_| true).await?;
                // It ends by itself or is ended by who looks after it, as the kubelet would.
                let process = self.node(index);
                if let Ok(process) = process {
                    process.stop(Duration::from_secs(25)).await?;
                }
                self.progress(|_| true).await?;
                // It may have made a folder or two before it ended.
                self.cluster.lose_disk(index)?;
                self.cluster.start_node(index).await?;
            }
        }
        Ok(())
    }

    async fn power_cut(&mut self) -> Result<()> {
        let processes: Vec<_> = self
            .cluster
            .processes()
            .into_iter()
            .map(|(_, _, process)| process)
            .collect();
        let verifier = self.running.take().context("the verifier does not run")?;
        for process in &processes {
            process.signal(Signal::KILL)?;
        }
        verifier.kill().await?;
        kill(&processes).await?;
        self.cluster.start().await?;
        for folder in self.folders() {
            self.cluster.mount(VOLUME, &folder).await?;
        }
        self.start()
    }

    async fn fill_all(&mut self) -> Result<()> {
        for index in 0..self.cluster.nodes() {
            self.cluster.fill_disk(index)?;
        }
        let full = rustix::io::Errno::NOSPC.raw_os_error();
        let filled = Instant::now();
        let deadline = Deadline::secs(PATIENCE).logs(self.logs());
        // An application is told.
        let path = self.mounts.path(0, "filler");
        wait_for(deadline, "the disks to be full for an application", || {
            let path = path.clone();
            async {
                let written = tokio::task::spawn_blocking(move || write_durably(&path, 64 << 20)).await?;
                match written {
                    Err(error) if error.raw_os_error() == Some(full) => Ok(Some(())),
                    Err(error) => bail!("another error: {error}"),
                    Ok(()) => Ok(None),
                }
            }
        })
        .await?;
        self.narrator
            .fact(&format!("ENOSPC after {:.1} s", filled.elapsed().as_secs_f32()));
        for index in 0..self.cluster.nodes() {
            self.cluster.free_disk(index)?;
        }
        // The file may be removed while its disks are full or after.
        let path = self.mounts.path(1, "filler");
        tokio::task::spawn_blocking(move || std::fs::remove_file(path))
            .await?
            .context("remove the filler")?;
        // It is over when an fsync succeeds again.
        let path = self.mounts.path(2, "after");
        let deadline = Deadline::secs(PATIENCE).logs(self.logs());
        wait_for(deadline, "room for an application", || {
            let path = path.clone();
            async {
                Ok(Some(
                    tokio::task::spawn_blocking(move || write_durably(&path, 1 << 20)).await??,
                ))
            }
        })
        .await
    }

    /// Pauses a process for so long, during which some mounts must go on.
    async fn pause(&self, process: &Process, time: Duration, unharmed: impl Fn(usize) -> bool) -> Result<()> {
        ensure!(process.signal(Signal::STOP)?, "process {} is gone", process.pid);
        let result = async {
            self.linger(time).await?;
            self.progress(unharmed).await
        }
        .await;
        process.signal(Signal::CONT)?;
        result
    }

    async fn cut(&self, part: Part<'_>, time: Duration, unharmed: impl Fn(usize) -> bool) -> Result<()> {
        self.cluster.cut(part).await?;
        let result = async {
            self.linger(time).await?;
            self.progress(unharmed).await
        }
        .await;
        self.cluster.heal(part).await?;
        result
    }

    /// Lets the time of a client's fault pass. Its applications must feel it: one that nobody feels would prove
    /// nothing. The others need not go on, as it may hold the lock.
    async fn stands_still(&self, mount: usize, time: Duration) -> Result<()> {
        let done = async || -> Result<Option<u64>> { Ok(self.running()?.operations().await?.get(mount).copied()) };
        self.linger(time / 2).await?;
        let (before, _) = (done().await?, self.linger(time / 2).await?);
        let after = done().await?;
        ensure!(
            before == after,
            "mount {mount} goes on: {before:?} operations, then {after:?}"
        );
        Ok(())
    }

    /// A fault's time, which is part of what it is.
    async fn linger(&self, time: Duration) -> Result<()> {
        tokio::time::sleep(time).await;
        Ok(())
    }

    /// Waits until these mounts have done something more.
    async fn progress(&self, wanted: impl Fn(usize) -> bool) -> Result<()> {
        let running = self.running()?;
        let before = running.operations().await?;
        let goals: Vec<_> = before.iter().map(|done| done + PROGRESS).enumerate().collect();
        let goals: Vec<_> = goals.into_iter().filter(|(mount, _)| wanted(*mount)).collect();
        let deadline = Deadline::secs(PATIENCE)
            .logs(self.logs())
            .every(Duration::from_millis(50));
        wait_for(deadline, "the applications to go on", || async {
            let done = running.operations().await?;
            let behind = goals
                .iter()
                .filter(|(mount, goal)| done.get(*mount).is_none_or(|done| done < goal));
            let behind: Vec<_> = behind.map(|(mount, _)| *mount).collect();
            ensure!(
                behind.is_empty(),
                "mounts {behind:?} stand still; {:?}",
                running.problems().await
            );
            Ok(Some(()))
        })
        .await
    }

    async fn wait_for_failure(&self, mount: usize) -> Result<()> {
        let deadline = Deadline::secs(PATIENCE).logs(self.logs());
        wait_for(
            deadline,
            "the client's applications to see that its session has ended",
            || async {
                let stalls = self.running()?.stalls().await?;
                let failed = stalls.failures.iter().any(|(failure, _)| failure.mount == mount);
                Ok(failed.then_some(()))
            },
        )
        .await
    }

    fn logs(&self) -> PathBuf {
        self.cluster.dir().join("logs")
    }

    async fn index(&self, node: Node) -> Result<usize> {
        match node {
            Node::Owner => owner_of(&self.cluster, VOLUME).await,
            Node::Primary => busiest_primary(&self.cluster, VOLUME).await,
            Node::Index(index) => Ok(index),
        }
    }

    fn node(&self, index: usize) -> Result<Process> {
        self.cluster
            .node(index)
            .with_context(|| format!("storage node {index} does not run"))
    }

    fn member(&self, member: usize) -> Result<Process> {
        self.cluster
            .etcd_member(member)
            .with_context(|| format!("member {member} of etcd does not run"))
    }

    /// Stops the verifier, compares the volume with the model through each mount, and unmounts.
    pub async fn finish(mut self) -> Result<()> {
        self.judge().await?;
        self.mounts.unmount(&self.cluster).await
    }

    /// Stops the verifier, compares the volume with the model through each mount, and lets it go on.
    pub async fn judge_and_go_on(&mut self) -> Result<()> {
        self.judge().await?;
        self.start()
    }

    async fn judge(&mut self) -> Result<()> {
        let running = self.running.take().context("the verifier does not run")?;
        let report = running.stop().await?;
        let mut problems = report.problems;
        let mut facts = String::new();
        for folder in self.folders() {
            let checked = check(&folder, self.model.path()).await?;
            let through = |problem| format!("through {}: {problem}", folder.display());
            problems.extend(checked.problems.into_iter().map(through));
            facts = format!(
                "{} files and {} records are as they must be ({} operations in doubt)",
                checked.files, checked.records, checked.doubts
            );
        }
        if !problems.is_empty() {
            let model = keep(&self.model)?;
            bail!("seed {}, model kept in {}: {problems:#?}", self.seed, model.display());
        }
        self.narrator.fact(&facts);
        Ok(())
    }
}

/// Copies the model to where it outlives the test.
fn keep(model: &tempfile::TempDir) -> Result<PathBuf> {
    let kept = tempfile::Builder::new()
        .prefix("lazarette-model-")
        .tempdir_in("/var/tmp")?
        .keep();
    for entry in std::fs::read_dir(model.path())? {
        let entry = entry?;
        std::fs::copy(entry.path(), kept.join(entry.file_name()))?;
    }
    Ok(kept)
}

/// All at the same time, as far as one can.
async fn kill(processes: &[Process]) -> Result<()> {
    for process in processes {
        process.signal(Signal::KILL)?;
    }
    for process in processes {
        process.wait(Duration::from_secs(20)).await?;
    }
    Ok(())
}

/// Adds to a file and makes it durable.
fn write_durably(path: &Path, bytes: usize) -> std::io::Result<()> {
    use std::io::Write;
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
    let block = vec![0x5a; 1 << 20];
    for _ in 0..bytes / block.len() {
        file.write_all(&block)?;
    }
    file.sync_all()
}
