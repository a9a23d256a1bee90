//! The main job as a story on the local cluster: shared by `cargo xtask demo --local` and the
//! tests. The same story on Kubernetes runs the same workload in pods.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lazarette_proto::cluster::GetMapRequest;
use lazarette_workload::{append, check_appended, copy_tree, hash_tree, steady, verify};
use rustix::process::Signal;

use crate::local::LocalCluster;
use crate::{Deadline, build, cmd, wait_for};

/// Lines that each writer appends to the shared log.
const LINES: u64 = 100;

/// Tells a person what happens; one line each.
pub trait Narrator {
    /// A step begins.
    fn step(&self, line: &str);
    /// Something was verified or measured.
    fn fact(&self, line: &str);
}

/// A source tree of several thousand files that every checkout has: an unpacked dependency.
pub async fn source_tree() -> Result<PathBuf> {
    let metadata = cmd!["cargo", "metadata", "--format-version=1"]
        .cwd(build::workspace_root())
        .run()
        .await?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    let packages = metadata["packages"].as_array().context("no packages")?;
    let package = packages
        .iter()
        .find(|package| package["name"] == "k8s-openapi")
        .context("k8s-openapi is no dependency any more: choose another large one")?;
    let manifest = package["manifest_path"].as_str().context("no manifest path")?;
    Ok(Path::new(manifest).parent().context("no folder")?.to_owned())
}

/// Plays the whole story on a volume of its own, mounted three times.
pub async fn play(cluster: &LocalCluster, narrator: &dyn Narrator) -> Result<()> {
    let mounts = Mounts::new(cluster, "story", 3).await?;
    narrator.fact("one volume, mounted by three clients");
    tree(&mounts, narrator).await?;
    appends(&mounts, narrator).await?;
    let owner = owner_of(cluster, "story").await?;
    narrator.step(&format!(
        "SIGKILL of storage node {owner}, the owner of the volume's metadata, while writing"
    ));
    hurt_while_writing(cluster, &mounts, owner, Fault::Kill, "owner-killed", narrator).await?;
    let primary = busiest_primary(cluster, "story").await?;
    narrator.step(&format!(
        "SIGKILL of storage node {primary}, a primary of its data, while writing"
    ));
    hurt_while_writing(cluster, &mounts, primary, Fault::Kill, "primary-killed", narrator).await?;
    mounts.unmount(cluster).await
}

/// The folders where a volume is mounted, one client each.
pub struct Mounts {
    folders: Vec<PathBuf>,
}

impl Mounts {
    /// Mounts `volume` `count` times under the cluster's folder.
    pub async fn new(cluster: &LocalCluster, volume: &str, count: usize) -> Result<Self> {
        let mut folders = Vec::new();
        for client in 0..count {
            let folder = cluster.dir().join("mnt").join(format!("{volume}-{client}"));
            cluster.mount(volume, &folder).await?;
            folders.push(folder);
        }
        Ok(Self { folders })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.folders.len()
    }

    /// A path under mount `client`.
    pub fn path(&self, client: usize, name: &str) -> PathBuf {
        self.folders[client].join(name)
    }

    /// Unmounts all of them.
    pub async fn unmount(&self, cluster: &LocalCluster) -> Result<()> {
        for folder in &self.folders {
            cluster.umount(folder).await?;
        }
        Ok(())
    }
}

/// A source tree written by one client reads the same by another.
pub async fn tree(mounts: &Mounts, narrator: &dyn Narrator) -> Result<()> {
    let source = source_tree().await?;
    narrator.step(&format!(
        "client 0 writes the source tree of {}",
        source.file_name().unwrap_or_default().to_string_lossy()
    ));
    let (here, there) = (mounts.path(0, "tree"), mounts.path(1, "tree"));
    blocking(move || {
        let started = Instant::now();
        let files = copy_tree(&source, &here)?;
        let written = started.elapsed();
        let sums = hash_tree(&source)?;
        let read = hash_tree(&there)?;
        ensure!(sums == read, "client 1 reads other sums than were written");
        Ok((files, written))
    })
    .await
    .map(|(files, written)| {
        narrator.fact(&format!(
            "{files} files written in {:.1} s; client 1 reads the same SHA-256 sums",
            written.as_secs_f32()
        ));
    })
}

/// All clients append to one log under flock.
pub async fn appends(mounts: &Mounts, narrator: &dyn Narrator) -> Result<()> {
    let writers = mounts.folders.len();
    narrator.step(&format!("{writers} clients append to one log under flock"));
    let tasks = (0..writers).map(|writer| {
        let log = mounts.path(writer, "shared.log");
        blocking(move || append(&log, &format!("client-{writer}"), LINES))
    });
    for result in futures::future::join_all(tasks).await {
        result?;
    }
    let log = mounts.path(0, "shared.log");
    let found = blocking(move || check_appended(&log, writers as u64, LINES)).await?;
    narrator.fact(&format!("{} lines, none lost, doubled or torn", found.lines));
    Ok(())
}

/// What happens to a storage node's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It dies and is started again.
    Kill,
    /// It stands still for longer than its leases and goes on as if nothing had been.
    Pause,
}

/// Hurts a storage node while client 0 writes; client 1 must then find all that was acknowledged.
pub async fn hurt_while_writing(
    cluster: &LocalCluster,
    mounts: &Mounts,
    node: usize,
    fault: Fault,
    folder: &str,
    narrator: &dyn Narrator,
) -> Result<()> {
    let writer = Writer::start(mounts.path(0, folder));
    writer.progress(cluster, 50).await?;
    let process = cluster.node(node).context("the storage node does not run")?;
    match fault {
        Fault::Kill => {
            process.signal(Signal::KILL)?;
            process.wait(Duration::from_secs(20)).await?;
        }
        Fault::Pause => {
            process.signal(Signal::STOP)?;
        }
    }
    // Only the others can serve these.
    writer.progress(cluster, 50).await?;
    match fault {
        Fault::Kill => {
            cluster.start_node(node).await?;
        }
        Fault::Pause => {
            process.signal(Signal::CONT)?;
        }
    }
    writer.progress(cluster, 50).await?;
    let report = writer.stop().await?;
    cluster.wait_until_healthy(Duration::from_secs(120)).await?;
    ensure!(
        report.errors.is_empty(),
        "the application saw errors: {:?}",
        report.errors
    );
    let (there, acknowledged) = (mounts.path(1, folder), report.acknowledged);
    blocking(move || verify(&there, acknowledged)).await?;
    narrator.fact(&format!(
        "no error; the longest stall was {:.1} s; all {acknowledged} acknowledged records are there, \
         the cluster has all copies again",
        report.longest_ms as f32 / 1e3
    ));
    Ok(())
}

/// [`steady`] in the background.
#[derive(Debug)]
pub struct Writer {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<Result<lazarette_workload::Report>>,
}

impl Writer {
    /// Writes in a folder.
    pub fn start(dir: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let written = Arc::new(AtomicU64::new(0));
        let (stop_here, written_here) = (Arc::clone(&stop), Arc::clone(&written));
        let task = tokio::task::spawn_blocking(move || {
            steady(&dir, || {
                written_here.fetch_add(1, Ordering::Relaxed);
                stop_here.load(Ordering::Relaxed)
            })
        });
        Self { stop, written, task }
    }

    /// Waits for so many more records.
    pub async fn progress(&self, cluster: &LocalCluster, records: u64) -> Result<()> {
        let goal = self.written.load(Ordering::Relaxed) + records;
        let deadline = Deadline::secs(120).logs(cluster.dir().join("logs"));
        wait_for(deadline, format!("{records} more records"), || async {
            let written = self.written.load(Ordering::Relaxed);
            ensure!(written >= goal, "{written} of {goal} written");
            Ok(Some(()))
        })
        .await
    }

    /// Ends it; tells what was acknowledged.
    pub async fn stop(mut self) -> Result<lazarette_workload::Report> {
        self.stop.store(true, Ordering::Relaxed);
        (&mut self.task).await?
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The index of the storage node that owns a volume's metadata.
pub async fn owner_of(cluster: &LocalCluster, volume: &str) -> Result<usize> {
    let id = cluster.volume(volume).await?.id;
    let map = cluster.client().await?.get_map(GetMapRequest { volume: id }).await?;
    index_of(cluster, &map.into_inner().owner_address)
}

/// The index of the storage node that is primary for most of a volume's replica sets.
pub async fn busiest_primary(cluster: &LocalCluster, volume: &str) -> Result<usize> {
    let id = cluster.volume(volume).await?.id;
    let map = cluster.client().await?.get_map(GetMapRequest { volume: id }).await?;
    let sets = map.into_inner().replica_sets;
    let count = |address: &str| sets.iter().filter(|set| set.primary_address == address).count();
    let busiest = sets
        .iter()
        .map(|set| &set.primary_address)
        .max_by_key(|address| count(address))
        .context("the volume has no replica sets")?;
    index_of(cluster, busiest)
}

fn index_of(cluster: &LocalCluster, address: &str) -> Result<usize> {
    let endpoints = cluster.endpoints();
    let found = endpoints.iter().position(|url| url.ends_with(&format!("//{address}")));
    found.with_context(|| format!("no storage node has address {address:?}"))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// Writes what is told to standard error; for tests.
#[derive(Debug, Clone, Copy)]
pub struct Quiet;

impl Narrator for Quiet {
    fn step(&self, line: &str) {
        eprintln!("… {line}");
    }

    fn fact(&self, line: &str) {
        eprintln!("✓ {line}");
    }
}
