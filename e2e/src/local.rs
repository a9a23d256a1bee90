//! A local cluster: etcd and storage nodes as plain processes, without Kubernetes, and volumes
//! mounted in folders.
//!
//! Everything lives in one folder: `local.json` (ports, chosen once), `run/` and `logs/` (see
//! [`crate::process`]), `etcd-N/` and `storage-N/` (the data). For tests of failures every part can
//! have a network of its own, and every storage node a small disk ([`Shape`]).

mod disk;
mod etcd;
mod network;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lazarette_proto::cluster::cluster_client::ClusterClient;
use lazarette_proto::cluster::{
    ClusterStatus, CreateVolumeRequest, GetStatusRequest, GetVolumeRequest, ReplicationPolicy, Volume,
};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tonic::transport::Channel;

use self::network::{Network, Station};
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
    etcd: Vec<EtcdPorts>,
    nodes: Vec<NodePorts>,
    /// Further arguments of the storage nodes.
    #[serde(default)]
    node_args: Vec<String>,
    /// See [`Network`].
    network: Option<u8>,
    /// Size of each storage node's disk.
    disk_mib: Option<u64>,
}

impl Config {
    /// Where its parts listen, running or not.
    fn ports(&self) -> impl Iterator<Item = u16> {
        let nodes = self.nodes.iter().flat_map(|node| [node.grpc, node.admin]);
        let etcd = self.etcd.iter().flat_map(|member| [member.client, member.peer]);
        nodes.chain(etcd)
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EtcdPorts {
    client: u16,
    peer: u16,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NodePorts {
    grpc: u16,
    admin: u16,
}

/// What a new cluster consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Storage nodes, 1 to 64.
    pub storage_nodes: usize,
    /// Members of etcd, 1 to 5.
    pub etcd_members: usize,
    /// Gives every process a network namespace, so that [`LocalCluster::cut`] works. Needs root.
    pub networks: bool,
    /// Gives every storage node a disk of this size, in a file. Needs root.
    pub disk_mib: Option<u64>,
    /// Further arguments of the storage nodes, now and later.
    pub node_args: &'static [&'static str],
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            storage_nodes: 3,
            etcd_members: 1,
            networks: false,
            disk_mib: None,
            node_args: &[],
        }
    }
}

/// A part of the cluster that can be cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part<'a> {
    /// The member with this index.
    Etcd(usize),
    /// The storage node with this index.
    StorageNode(usize),
    /// The mount daemon of this folder.
    Mount(&'a Path),
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
    /// Its number in the cluster's network.
    station: u8,
}

impl LocalCluster {
    /// Starts what is not running, building what is missing, and waits until the cluster serves.
    /// A new folder gets `nodes` storage nodes (default 3); one with data gets more if it has fewer.
    pub async fn up(dir: &Path, nodes: Option<usize>) -> Result<Self> {
        let shape = Shape::default();
        let storage_nodes = nodes.unwrap_or(shape.storage_nodes);
        Self::start_all(dir, Shape { storage_nodes, ..shape }, nodes).await
    }

    /// As [`Self::up`]; the shape counts for a new folder only.
    pub async fn up_as(dir: &Path, shape: Shape) -> Result<Self> {
        Self::start_all(dir, shape, None).await
    }

    async fn start_all(dir: &Path, shape: Shape, nodes: Option<usize>) -> Result<Self> {
        tools::ensure(&[Tool::Etcd]).await?;
        build::storage().await?;
        let mut cluster = match Self::open(dir) {
            Ok(cluster) => cluster,
            Err(_) if !dir.join("local.json").exists() => Self::create(dir, shape)?,
            Err(error) => return Err(error),
        };
        cluster.grow(nodes)?;
        cluster.start().await?;
        Ok(cluster)
    }

    /// Starts what is not running and waits until the cluster serves.
    pub async fn start(&self) -> Result<()> {
        if let Some(network) = self.network() {
            network.up().await?;
        }
        for member in 0..self.config.etcd.len() {
            self.start_etcd(member).await?;
        }
        for index in 0..self.nodes() {
            self.start_node(index).await?;
        }
        self.wait_until_healthy(Duration::from_secs(60)).await.map(drop)
    }

    /// The cluster of a folder that `up` has made.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("local.json");
        let text = fs::read(&path)
            .with_context(|| format!("{} holds no local cluster; `local up` makes one", dir.display()))?;
        let config = serde_json::from_slice(&text)
            .with_context(|| format!("read {}; delete the folder if an older version made it", path.display()))?;
        let dir = fs::canonicalize(dir)?;
        Ok(Self { dir, config })
    }

    fn create(dir: &Path, shape: Shape) -> Result<Self> {
        let (nodes, members) = (shape.storage_nodes, shape.etcd_members);
        ensure!((1..=64).contains(&nodes), "--nodes is {nodes}; use 1 to 64");
        ensure!((1..=5).contains(&members), "{members} members of etcd; use 1 to 5");
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let mut ports = free_ports(2 * (nodes + members), &[])?.into_iter();
        let mut port = || ports.next().context("too few ports");
        let etcd = (0..members).map(|_| {
            Ok(EtcdPorts {
                client: port()?,
                peer: port()?,
            })
        });
        let config = Config {
            etcd: etcd.collect::<Result<_>>()?,
            nodes: (0..nodes)
                .map(|_| {
                    Ok(NodePorts {
                        grpc: port()?,
                        admin: port()?,
                    })
                })
                .collect::<Result<_>>()?,
            node_args: shape.node_args.iter().map(|arg| (*arg).to_owned()).collect(),
            network: shape.networks.then(Network::free_number).transpose()?,
            disk_mib: shape.disk_mib,
        };
        process::write_atomically(&dir.join("local.json"), &serde_json::to_vec_pretty(&config)?)?;
        Self::open(dir)
    }

    /// Adds storage nodes until there are so many; they are not started.
    fn grow(&mut self, nodes: Option<usize>) -> Result<()> {
        let have = self.config.nodes.len();
        let wanted = nodes.unwrap_or(have);
        ensure!(
            (have..=64).contains(&wanted),
            "{} holds a cluster of {have} storage nodes; use --nodes {have} to 64, or another --dir",
            self.dir.display()
        );
        // What is not running has its ports all the same.
        let taken: Vec<_> = self.config.ports().collect();
        for ports in free_ports(2 * (wanted - have), &taken)?.chunks_exact(2) {
            let (grpc, admin) = (ports[0], ports[1]);
            self.config.nodes.push(NodePorts { grpc, admin });
        }
        process::write_atomically(&self.dir.join("local.json"), &serde_json::to_vec_pretty(&self.config)?)
    }

    fn network(&self) -> Option<Network> {
        Some(Network::of(&self.dir, self.config.network?))
    }

    /// Where a part of the cluster listens.
    fn host(&self, part: Part<'_>) -> Result<String> {
        let Some(network) = self.network() else {
            return Ok("127.0.0.1".to_owned());
        };
        Ok(network.address(self.station(part)?))
    }

    fn station(&self, part: Part<'_>) -> Result<Station> {
        let number = match part {
            Part::Etcd(member) => 10 + u8::try_from(member)?,
            Part::StorageNode(index) => 20 + u8::try_from(index)?,
            Part::Mount(target) => self.mount_record(target)?.station,
        };
        Ok(Station { number })
    }

    fn mount_record(&self, target: &Path) -> Result<Mount> {
        let path = self.dir.join("mounts").join(mount_name(&absolute(target)?));
        let text = fs::read(&path).with_context(|| format!("nothing was mounted at {}", target.display()))?;
        Ok(serde_json::from_slice(&text)?)
    }

    /// A daemon in its part's network, if it has one of its own.
    async fn daemon(&self, name: &str, program: &Path, part: Part<'_>) -> Result<Daemon> {
        let Some(network) = self.network() else {
            return Ok(Daemon::new(name, &self.dir, program));
        };
        let station = self.station(part)?;
        network.connect(station).await?;
        let [enter, args @ ..] = network.enter(station)?;
        Ok(Daemon::new(name, &self.dir, enter).args(args).arg(program))
    }

    /// Drops every packet to and from a part, so that it and the others see silence.
    pub async fn cut(&self, part: Part<'_>) -> Result<()> {
        self.plug(part, false).await?;
        let url = match part {
            Part::Etcd(member) => self.etcd_url(member)?,
            Part::StorageNode(index) => self.endpoints().swap_remove(index),
            Part::Mount(_) => return Ok(()),
        };
        let address = url.trim_start_matches("http://");
        let heard = tokio::time::timeout(Duration::from_millis(500), TcpStream::connect(address)).await;
        ensure!(heard.is_err(), "{part:?} was cut off and answers: {heard:?}");
        Ok(())
    }

    /// Ends [`Self::cut`].
    pub async fn heal(&self, part: Part<'_>) -> Result<()> {
        self.plug(part, true).await
    }

    async fn plug(&self, part: Part<'_>, plugged: bool) -> Result<()> {
        let network = self.network().context("this cluster has no networks to cut")?;
        network.cut(self.station(part)?, !plugged).await
    }

    /// Starts storage node `index` unless it runs.
    pub async fn start_node(&self, index: usize) -> Result<Process> {
        let ports = self.config.nodes.get(index).context("no such storage node")?;
        let (name, data) = (node_name(index), self.data_dir(index));
        self.attach_disk(index).await?;
        fs::create_dir_all(&data)?;
        let host = self.host(Part::StorageNode(index))?;
        let program = build::release_dir().join(build::STORAGE_NODE);
        self.daemon(&name, &program, Part::StorageNode(index))
            .await?
            .arg("serve")
            .args(["--cluster", "local", "--node", &name, "--failure-domain", &name])
            .arg(format!("--etcd={}", self.etcd()))
            .arg(format!("--data-dir={}", data.display()))
            .arg(format!("--listen={host}:{}", ports.grpc))
            .arg(format!("--advertise={host}:{}", ports.grpc))
            .arg(format!("--admin={host}:{}", ports.admin))
            .args(&self.config.node_args)
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
        let url = |(index, ports): (usize, &NodePorts)| {
            let host = self.host(Part::StorageNode(index)).unwrap_or_default();
            format!("http://{host}:{}", ports.grpc)
        };
        self.config.nodes.iter().enumerate().map(url).collect()
    }

    /// Creates a volume with as many copies as the cluster can hold (at most 3), acknowledged at
    /// two; returns the existing one if it was made like that.
    pub async fn volume(&self, name: &str) -> Result<Volume> {
        self.volume_of(name, VOLUME_BYTES).await
    }

    /// The same with a quota in bytes.
    pub async fn volume_of(&self, name: &str, size: u64) -> Result<Volume> {
        let copies = self.nodes().min(3) as u32;
        let request = CreateVolumeRequest {
            name: name.into(),
            size,
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
        let find = GetVolumeRequest {
            name: volume.into(),
            ..GetVolumeRequest::default()
        };
        if self.client().await?.get_volume(find).await.is_err() {
            self.volume(volume).await?;
        }
        fs::create_dir_all(target).or_else(|error| match is_mounted(target) {
            // A dead mount: the daemon clears it away.
            Ok(true) => Ok(()),
            _ => Err(error),
        })?;
        let target = absolute(target)?;
        let name = mount_name(&target);
        let record = self.dir.join("mounts").join(&name);
        if !record.exists() {
            fs::create_dir_all(self.dir.join("mounts"))?;
            let taken: Vec<u8> = self.mounts()?.iter().map(|mount| mount.station).collect();
            let mount = Mount {
                volume: volume.into(),
                target: target.clone(),
                station: (100..=254)
                    .find(|number| !taken.contains(number))
                    .context("too many mounts")?,
            };
            process::write_atomically(&record, &serde_json::to_vec(&mount)?)?;
        }
        let program = build::release_dir().join(build::MOUNT);
        let daemon = self
            .daemon(&name, &program, Part::Mount(&target))
            .await?
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
                // What is mounted may be a dead daemon's, which the new one has yet to clear away.
                let serves = || rustix::fs::statvfs(&target).is_ok();
                let state = if process.is_running() {
                    is_mounted(&target).map(|mounted| (mounted && serves()).then_some(true))
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

    /// The process that serves a mount, if it runs.
    pub fn mount_daemon(&self, target: &Path) -> Result<Option<Process>> {
        Ok(process::find(&self.dir, &mount_name(&absolute(target)?)))
    }

    fn mounts(&self) -> Result<Vec<Mount>> {
        let entries = fs::read_dir(self.dir.join("mounts")).into_iter().flatten();
        entries
            .map(|entry| Ok(serde_json::from_slice(&fs::read(entry?.path())?)?))
            .collect()
    }

    /// Unmounts everything and stops all processes; the data stays.
    pub async fn down(&self) -> Result<()> {
        for mount in self.mounts()? {
            self.umount(&mount.target).await?;
        }
        for index in 0..self.nodes() {
            process::stop(&self.dir, &node_name(index), GRACE).await?;
        }
        process::stop_all(&self.dir, GRACE).await?;
        for index in 0..self.nodes() {
            self.detach_disk(index)?;
        }
        match self.network() {
            Some(network) => network.down().await,
            None => Ok(()),
        }
    }

    /// As [`Self::down`], then deletes the folder.
    pub async fn wipe(&self) -> Result<()> {
        self.down().await?;
        fs::remove_dir_all(&self.dir).with_context(|| format!("delete {}", self.dir.display()))
    }
}

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

/// Ports that nobody listens on and that are not `taken`, none of those that the kernel gives to connections:
/// one of these may be taken while a process that has it is dead for a moment.
fn free_ports(count: usize, taken: &[u16]) -> Result<Vec<u16>> {
    const FIRST: u16 = 10_000;
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").context("read the range of ports")?;
    let end: u16 = range.split_whitespace().next().context("no range of ports")?.parse()?;
    ensure!(end > FIRST, "the kernel gives connections all ports from {end} on");
    // Not the ones that another process, which also looks for some, tries first.
    let start = u32::from(end - FIRST) * (std::process::id() % 1009) / 1009;
    let all = (FIRST..end).cycle().skip(start as usize).take(usize::from(end - FIRST));
    let free = all
        .filter(|port| !taken.contains(port))
        .filter(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok());
    let ports: Vec<_> = free.take(count).collect();
    ensure!(ports.len() == count, "there are no {count} free ports below {end}");
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    #[allow(clippy::unwrap_used)]
    fn a_new_node_gets_ports_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let mut cluster = LocalCluster::create(folder.path(), Shape::default()).unwrap();
        // Nothing runs, so all ports are free.
        cluster.grow(Some(5)).unwrap();
        assert_eq!(cluster.config.ports().collect::<HashSet<_>>().len(), 12);
    }
}
