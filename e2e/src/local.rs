//! A local cluster: etcd and storage nodes as plain processes, without Kubernetes, and volumes
//! mounted in folders.
//!
//! Everything lives in one folder: `local.json` (ports, chosen once), `run/` and `logs/` (see
//! [`crate::process`]), `etcd/` and `storage-N/` (the data).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lazarette_proto::cluster::cluster_client::ClusterClient;
use lazarette_proto::cluster::{ClusterStatus, CreateVolumeRequest, GetStatusRequest, ReplicationPolicy, Volume};
use serde::{Deserialize, Serialize};
use tonic::transport::Channel;

use crate::process::{self, Daemon, Process};
use crate::tools::{self, Tool};
use crate::{Deadline, build, wait_for};

/// Long enough for a clean unmount with 64 MiB to flush on a slow disk.
const GRACE: Duration = Duration::from_secs(20);
/// Quota of a volume that `mount` creates.
const VOLUME_BYTES: u64 = 1 << 40;

/// A cluster in a folder.
#[derive(Debug, Clone)]
pub struct LocalCluster {
    dir: PathBuf,
    config: Config,
}

/// What must stay the same from one start to the next.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    etcd_client: u16,
    etcd_peer: u16,
    nodes: Vec<NodePorts>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NodePorts {
    grpc: u16,
    admin: u16,
}

/// What a process does in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The source of truth.
    Etcd,
    /// Owner and chunk server.
    StorageNode,
    /// A mount daemon.
    Mount,
}

impl Role {
    /// As `local pids` prints it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::StorageNode => "storage-node",
            Self::Mount => "mount",
        }
    }

    fn of(daemon: &str) -> Option<Self> {
        match daemon.split_once('-').map_or(daemon, |(role, _)| role) {
            "etcd" => Some(Self::Etcd),
            "storage" => Some(Self::StorageNode),
            "mount" => Some(Self::Mount),
            _ => None,
        }
    }
}

/// A mounted volume, remembered for `umount` and `down`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mount {
    volume: String,
    target: PathBuf,
}

impl LocalCluster {
    /// Starts what is not running, building what is missing, and waits until the cluster serves.
    /// `nodes` counts for a new folder only (default 3); a folder with data keeps its number.
    pub async fn up(dir: &Path, nodes: Option<usize>) -> Result<Self> {
        let etcd = tools::ensure(&[Tool::Etcd]).await?.remove(0);
        build::storage().await?;
        let cluster = match Self::open(dir) {
            Ok(cluster) => cluster,
            Err(_) if !dir.join("local.json").exists() => Self::create(dir, nodes.unwrap_or(3))?,
            Err(error) => return Err(error),
        };
        let have = cluster.config.nodes.len();
        ensure!(
            nodes.is_none_or(|wanted| wanted == have),
            "{} holds a cluster of {have} storage nodes; leave --nodes out or use another --dir",
            dir.display()
        );
        cluster.start_etcd(&etcd).await?;
        for index in 0..have {
            cluster.start_node(index).await?;
        }
        cluster.wait_until_healthy(Duration::from_secs(60)).await?;
        Ok(cluster)
    }

    /// The cluster of a folder that `up` has made.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("local.json");
        let text = fs::read(&path)
            .with_context(|| format!("{} holds no local cluster; `local up` makes one", dir.display()))?;
        let config = serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?;
        let dir = fs::canonicalize(dir)?;
        Ok(Self { dir, config })
    }

    fn create(dir: &Path, nodes: usize) -> Result<Self> {
        ensure!((1..=64).contains(&nodes), "--nodes is {nodes}; use 1 to 64");
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let mut ports = free_ports(2 + 2 * nodes)?.into_iter();
        let mut port = || ports.next().context("too few ports");
        let config = Config {
            etcd_client: port()?,
            etcd_peer: port()?,
            nodes: (0..nodes)
                .map(|_| {
                    Ok(NodePorts {
                        grpc: port()?,
                        admin: port()?,
                    })
                })
                .collect::<Result<_>>()?,
        };
        process::write_atomically(&dir.join("local.json"), &serde_json::to_vec_pretty(&config)?)?;
        Self::open(dir)
    }

    async fn start_etcd(&self, binary: &Path) -> Result<()> {
        let client = format!("http://127.0.0.1:{}", self.config.etcd_client);
        let peer = format!("http://127.0.0.1:{}", self.config.etcd_peer);
        Daemon::new("etcd", &self.dir, binary)
            .args(["--name=local", "--log-level=warn"])
            .arg(format!("--data-dir={}", self.dir.join("etcd").display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=local={peer}"))
            .args(ETCD_SETTINGS)
            .start()
            .await?;
        Ok(())
    }

    /// Starts storage node `index` unless it runs.
    pub async fn start_node(&self, index: usize) -> Result<Process> {
        let ports = self.config.nodes.get(index).context("no such storage node")?;
        let name = node_name(index);
        let data = self.dir.join(&name);
        fs::create_dir_all(&data)?;
        Daemon::new(&name, &self.dir, build::release_dir().join(build::STORAGE_NODE))
            .arg("serve")
            .args(["--cluster", "local", "--node", &name, "--failure-domain", &name])
            .arg(format!("--etcd=http://127.0.0.1:{}", self.config.etcd_client))
            .arg(format!("--data-dir={}", data.display()))
            .arg(format!("--listen=127.0.0.1:{}", ports.grpc))
            .arg(format!("--advertise=127.0.0.1:{}", ports.grpc))
            .arg(format!("--admin=127.0.0.1:{}", ports.admin))
            .start()
            .await
    }

    /// Waits until every storage node is live, every volume has an owner and no replica set lacks
    /// a copy.
    pub async fn wait_until_healthy(&self, limit: Duration) -> Result<ClusterStatus> {
        let deadline = Deadline::after(limit).logs(self.dir.join("logs"));
        wait_for(deadline, "a healthy cluster", || async {
            let status = self.status().await?;
            let live = status.nodes.iter().filter(|node| node.live).count();
            let healthy = live == self.config.nodes.len()
                && !status.coordinator.is_empty()
                && status.ownerless_volumes == 0
                && status.degraded_replica_sets == 0
                && status.unavailable_replica_sets == 0;
            if healthy { Ok(Some(status)) } else { bail!("{status:?}") }
        })
        .await
    }

    /// The cluster's state, from any storage node that answers.
    pub async fn status(&self) -> Result<ClusterStatus> {
        let answer = self.client().await?.get_status(GetStatusRequest {}).await?;
        Ok(answer.into_inner())
    }

    /// A connection to any storage node that accepts one.
    pub async fn client(&self) -> Result<ClusterClient<Channel>> {
        let mut last = None;
        for endpoint in self.endpoints() {
            let endpoint = tonic::transport::Endpoint::from_shared(endpoint)?
                .connect_timeout(Duration::from_secs(1))
                .timeout(Duration::from_secs(10));
            match endpoint.connect().await {
                Ok(channel) => return Ok(ClusterClient::new(channel)),
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("no storage nodes")?.into())
    }

    /// The folder with all state.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Number of storage nodes.
    pub fn nodes(&self) -> usize {
        self.config.nodes.len()
    }

    /// `http://host:port` of the storage nodes.
    pub fn endpoints(&self) -> Vec<String> {
        let url = |ports: &NodePorts| format!("http://127.0.0.1:{}", ports.grpc);
        self.config.nodes.iter().map(url).collect()
    }

    /// `http://host:port` of etcd.
    pub fn etcd(&self) -> String {
        format!("http://127.0.0.1:{}", self.config.etcd_client)
    }

    /// Creates a volume with as many copies as the cluster can hold (at most 3), acknowledged at
    /// two; returns the existing one if it was made like that.
    pub async fn volume(&self, name: &str) -> Result<Volume> {
        let copies = self.nodes().min(3) as u32;
        let request = CreateVolumeRequest {
            name: name.into(),
            size: VOLUME_BYTES,
            replication: Some(ReplicationPolicy {
                copies,
                ack: copies.min(2),
            }),
            ..Default::default()
        };
        let volume = self.client().await?.create_volume(request).await;
        Ok(volume.with_context(|| format!("create volume {name}"))?.into_inner())
    }

    /// Mounts a volume at a folder (both are made if need be), with a mount daemon of its own.
    pub async fn mount(&self, volume: &str, target: &Path) -> Result<Process> {
        self.volume(volume).await?;
        fs::create_dir_all(target).or_else(|error| match is_mounted(target) {
            // A dead mount: the daemon clears it away.
            Ok(true) => Ok(()),
            _ => Err(error),
        })?;
        let target = absolute(target)?;
        let name = mount_name(&target);
        fs::create_dir_all(self.dir.join("mounts"))?;
        let mount = Mount {
            volume: volume.into(),
            target: target.clone(),
        };
        let record = self.dir.join("mounts").join(&name);
        process::write_atomically(&record, &serde_json::to_vec(&mount)?)?;
        let daemon = Daemon::new(&name, &self.dir, build::release_dir().join(build::MOUNT))
            .arg("mount")
            .args(self.endpoints().iter().flat_map(|url| ["--endpoint", url]))
            .args(["--volume", volume, "--foreground", "--target"])
            .arg(&target);
        let log = daemon.log();
        let process = daemon.start().await?;
        let deadline = Deadline::secs(60).logs(&log);
        wait_for(
            deadline,
            format!("{volume} to be mounted at {}", target.display()),
            || {
                let state = if process.is_running() {
                    is_mounted(&target).map(|mounted| mounted.then_some(true))
                } else {
                    Ok(Some(false))
                };
                async { state }
            },
        )
        .await
        .and_then(|mounted| {
            ensure!(mounted, "the mount daemon ended: {}", process::last_lines(&log, 10));
            Ok(process.clone())
        })
    }

    /// Flushes and unmounts. A folder where nothing is mounted is no error.
    pub async fn umount(&self, target: &Path) -> Result<()> {
        let target = absolute(target)?;
        let name = mount_name(&target);
        process::stop(&self.dir, &name, GRACE).await?;
        detach(&target)?;
        fs::remove_file(self.dir.join("mounts").join(&name)).ok();
        Ok(())
    }

    /// The running processes.
    pub fn processes(&self) -> Vec<(Role, String, Process)> {
        process::list(&self.dir)
            .into_iter()
            .filter_map(|(name, process)| Some((Role::of(&name)?, name, process)))
            .collect()
    }

    /// The process of storage node `index`, if it runs.
    pub fn node(&self, index: usize) -> Option<Process> {
        process::find(&self.dir, &node_name(index))
    }

    /// Unmounts everything and stops all processes; the data stays.
    pub async fn down(&self) -> Result<()> {
        for entry in fs::read_dir(self.dir.join("mounts")).into_iter().flatten() {
            let mount: Mount = serde_json::from_slice(&fs::read(entry?.path())?)?;
            self.umount(&mount.target).await?;
        }
        for index in 0..self.nodes() {
            process::stop(&self.dir, &node_name(index), GRACE).await?;
        }
        process::stop_all(&self.dir, GRACE).await
    }

    /// As [`Self::down`], then deletes the folder.
    pub async fn wipe(&self) -> Result<()> {
        self.down().await?;
        fs::remove_dir_all(&self.dir).with_context(|| format!("delete {}", self.dir.display()))
    }
}

/// What Lazarette's etcd is run with, here as in the operator's StatefulSet.
const ETCD_SETTINGS: &[&str] = &[
    "--quota-backend-bytes=8589934592",
    "--auto-compaction-mode=periodic",
    "--auto-compaction-retention=1m",
    "--snapshot-count=2000",
];

/// The name of storage node `index`, also of its daemon and data folder.
pub fn node_name(index: usize) -> String {
    format!("storage-{index}")
}

fn mount_name(target: &Path) -> String {
    format!("mount{}", target.display().to_string().replace('/', "-"))
}

/// Absolute without looking at the last part, which may be a dead mount.
fn absolute(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let parent = path.parent().unwrap_or(&path);
    let parent = fs::canonicalize(parent).with_context(|| format!("find {}", parent.display()))?;
    Ok(path.file_name().map_or(parent.clone(), |name| parent.join(name)))
}

/// Whether something is mounted at exactly this folder.
pub fn is_mounted(target: &Path) -> Result<bool> {
    let target = absolute(target)?;
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    // Field 5 is the mount point; spaces in it are written as \040.
    let wanted = target.display().to_string().replace(' ', "\\040");
    Ok(table.lines().any(|line| line.split(' ').nth(4) == Some(&wanted)))
}

/// Removes a mount that is still there, whatever its state.
fn detach(target: &Path) -> Result<()> {
    while is_mounted(target)? {
        rustix::mount::unmount(target, rustix::mount::UnmountFlags::DETACH)
            .with_context(|| format!("unmount {}", target.display()))?;
    }
    Ok(())
}

fn free_ports(count: usize) -> Result<Vec<u16>> {
    let listeners: Vec<_> = (0..count)
        .map(|_| std::net::TcpListener::bind("127.0.0.1:0"))
        .collect::<std::io::Result<_>>()?;
    let ports = listeners.iter().map(|listener| Ok(listener.local_addr()?.port()));
    ports.collect()
}
