//! Stand-ins for the other processes, for tests of the driver alone: a Cluster service in memory
//! and a mount daemon that mounts a tmpfs where the real one mounts the volume. The conformance tests
//! of the whole are in `e2e/tests/csi.rs`.

// Each test file is a crate of its own and uses a part.
#![allow(dead_code, unreachable_pub)]

use futures::stream::{BoxStream, StreamExt};
use lazarette_csi::node::mountinfo;
use lazarette_proto::cluster::cluster_server::{Cluster, ClusterServer};
use lazarette_proto::cluster::*;
use lazarette_proto::mount::mount_server::{Mount, MountServer};
use lazarette_proto::mount::*;
use lazarette_proto::status;
use lazarette_types::{DEFAULT_CHUNK_SIZE, ErrorCode};
use rustix::mount::{MountFlags, UnmountFlags};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// Longer than anything takes on a busy machine.
pub const GENEROUS: Duration = Duration::from_secs(60);

/// A folder of the test's own. Whatever is mounted in it goes when the test ends, however it ends.
pub struct Place {
    // Unmounts before the folder is removed.
    _mounts: MountGuard,
    dir: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // As /proc/self/mountinfo spells it.
        let root = dir.path().canonicalize().unwrap();
        Self {
            _mounts: MountGuard(root),
            dir,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }
}

struct MountGuard(PathBuf);

impl Drop for MountGuard {
    fn drop(&mut self) {
        for mount in mounts_under(&self.0).iter().rev() {
            let _ = rustix::mount::unmount(mount, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
    }
}

/// The mount points below a folder.
pub fn mounts_under(root: &Path) -> Vec<PathBuf> {
    mountinfo::read()
        .unwrap()
        .into_iter()
        .map(|mount| mount.mount_point)
        .filter(|point| point.starts_with(root))
        .collect()
}

/// Waits for a state.
pub async fn eventually(what: &str, mut reached: impl FnMut() -> bool) {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < GENEROUS, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A file system whose daemon has gone: every access fails with ENOTCONN.
pub fn mount_dead_fuse(target: &Path) {
    drop(mount_hung_fuse(target));
    assert_eq!(rustix::fs::statfs(target).unwrap_err(), rustix::io::Errno::NOTCONN);
}

/// A file system whose daemon lives and does not answer, until what this returns is dropped.
pub fn mount_hung_fuse(target: &Path) -> std::fs::File {
    let device = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&device);
    let data = std::ffi::CString::new(format!("fd={fd},rootmode=40000,user_id=0,group_id=0")).unwrap();
    rustix::mount::mount("lazarette", target, "fuse", MountFlags::NOSUID, data.as_c_str()).unwrap();
    device
}

/// A process that ends when the test ends, however it ends.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The driver's binary.
pub fn driver(arguments: &[&str]) -> Process {
    Process(
        Command::new(env!("CARGO_BIN_EXE_lazarette-csi"))
            .args(arguments)
            .env("LAZARETTE_LOG", "error")
            .spawn()
            .unwrap(),
    )
}

/// Volumes in memory, by the rules of cluster.proto.
#[derive(Clone, Default)]
pub struct FakeCluster {
    state: Arc<Mutex<ClusterState>>,
}

#[derive(Default)]
struct ClusterState {
    volumes: BTreeMap<u64, Volume>,
    last: u64,
    /// Calls to be answered with "unavailable" before the next is served.
    refusals: u32,
    /// Deletions refused since the volume was in use.
    in_use: u32,
    /// Every CreateVolume seen.
    created: Vec<CreateVolumeRequest>,
}

pub const NODES: u32 = 3;
pub const NODE_BYTES: u64 = 100 << 30;

impl FakeCluster {
    /// Serves on a port of its own; the URL.
    pub async fn serve(&self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = ClusterServer::new(self.clone());
        tokio::spawn(
            Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        format!("http://{address}")
    }

    pub fn refuse(&self, calls: u32) {
        self.state.lock().unwrap().refusals = calls;
    }

    pub fn refusals(&self) -> u32 {
        self.state.lock().unwrap().refusals
    }

    pub fn in_use(&self) -> u32 {
        self.state.lock().unwrap().in_use
    }

    pub fn set_sessions(&self, id: u64, sessions: u32) {
        let mut state = self.state.lock().unwrap();
        state.volumes.get_mut(&id).unwrap().sessions = sessions;
    }

    pub fn volumes(&self) -> Vec<Volume> {
        self.state.lock().unwrap().volumes.values().cloned().collect()
    }

    pub fn created(&self) -> Vec<CreateVolumeRequest> {
        self.state.lock().unwrap().created.clone()
    }

    fn state(&self) -> Result<std::sync::MutexGuard<'_, ClusterState>, Status> {
        let mut state = self.state.lock().unwrap();
        if state.refusals > 0 {
            state.refusals -= 1;
            return Err(status(ErrorCode::Unavailable, "failing over"));
        }
        Ok(state)
    }
}

fn no_volume() -> Status {
    status(ErrorCode::VolumeNotFound, "there is no such volume")
}

#[tonic::async_trait]
impl Cluster for FakeCluster {
    async fn create_volume(&self, request: Request<CreateVolumeRequest>) -> Result<Response<Volume>, Status> {
        let request = request.into_inner();
        let mut state = self.state()?;
        state.created.push(request.clone());
        let replication = request.replication.unwrap_or(ReplicationPolicy { copies: 3, ack: 2 });
        let chunk_size = match request.chunk_size {
            0 => DEFAULT_CHUNK_SIZE,
            bytes => bytes,
        };
        if let Some(found) = state.volumes.values().find(|volume| volume.name == request.name) {
            let same =
                found.size == request.size && found.replication == Some(replication) && found.chunk_size == chunk_size;
            return if same {
                Ok(Response::new(found.clone()))
            } else {
                Err(status(ErrorCode::VolumeExists, "the volume exists otherwise"))
            };
        }
        if replication.copies > NODES {
            let message = format!(
                "{} copies need as many storage nodes; there are {NODES}",
                replication.copies
            );
            return Err(status(ErrorCode::InsufficientNodes, message));
        }
        state.last += 1;
        let volume = Volume {
            id: state.last,
            name: request.name,
            size: request.size,
            replication: Some(replication),
            chunk_size,
            labels: request.labels,
            ..Volume::default()
        };
        state.volumes.insert(volume.id, volume.clone());
        Ok(Response::new(volume))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let id = request.into_inner().id;
        let mut state = self.state()?;
        if state.volumes.get(&id).is_some_and(|volume| volume.sessions > 0) {
            state.in_use += 1;
            return Err(status(ErrorCode::VolumeInUse, "the volume is mounted"));
        }
        state.volumes.remove(&id);
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn expand_volume(&self, request: Request<ExpandVolumeRequest>) -> Result<Response<Volume>, Status> {
        let request = request.into_inner();
        let mut state = self.state()?;
        let volume = state.volumes.get_mut(&request.id).ok_or_else(no_volume)?;
        if request.size < volume.size {
            return Err(status(ErrorCode::OutOfRange, "volumes cannot shrink"));
        }
        volume.size = request.size;
        Ok(Response::new(volume.clone()))
    }

    async fn get_volume(&self, request: Request<GetVolumeRequest>) -> Result<Response<Volume>, Status> {
        let request = request.into_inner();
        let state = self.state()?;
        let found = match request.id {
            0 => state.volumes.values().find(|volume| volume.name == request.name),
            id => state.volumes.get(&id),
        };
        found.cloned().map(Response::new).ok_or_else(no_volume)
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let request = request.into_inner();
        let limit = match request.limit {
            0 => usize::MAX,
            limit => limit as usize,
        };
        let volumes = self
            .state()?
            .volumes
            .range(request.after_id + 1..)
            .take(limit)
            .map(|(_, volume)| volume.clone())
            .collect();
        Ok(Response::new(ListVolumesResponse { volumes }))
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<ClusterStatus>, Status> {
        drop(self.state()?);
        let nodes = (0..NODES).map(|number| NodeStatus {
            id: format!("node-{number}"),
            live: true,
            capacity_bytes: NODE_BYTES,
            ..NodeStatus::default()
        });
        Ok(Response::new(ClusterStatus {
            nodes: nodes.collect(),
            ..ClusterStatus::default()
        }))
    }

    async fn get_map(&self, _: Request<GetMapRequest>) -> Result<Response<VolumeMap>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn drain_node(&self, _: Request<DrainNodeRequest>) -> Result<Response<DrainNodeResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn undrain_node(&self, _: Request<UndrainNodeRequest>) -> Result<Response<UndrainNodeResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn forget_node(&self, _: Request<ForgetNodeRequest>) -> Result<Response<ForgetNodeResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    type WatchMapStream = BoxStream<'static, Result<VolumeMap, Status>>;

    async fn watch_map(&self, _: Request<GetMapRequest>) -> Result<Response<Self::WatchMapStream>, Status> {
        Ok(Response::new(futures::stream::empty().boxed()))
    }
}

/// Mounts a tmpfs for each volume, by the rules of mount.proto.
#[derive(Clone, Default)]
pub struct FakeMountDaemon {
    mounts: Arc<Mutex<BTreeMap<String, MountVolumeRequest>>>,
    /// Calls wait while the test holds it.
    pub gate: Arc<tokio::sync::Mutex<()>>,
    /// Calls that arrived.
    pub calls: Arc<AtomicU32>,
    /// Flushing fails since the sessions have ended.
    pub ended: Arc<AtomicBool>,
}

impl FakeMountDaemon {
    /// Serves on a Unix socket until the handle is dropped, which kills it: connections break.
    pub fn serve(&self, socket: &Path) -> Serving {
        let _ = std::fs::remove_file(socket);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let entered = runtime.enter();
        let listener = tokio::net::UnixListener::bind(socket).unwrap();
        drop(entered);
        let server = Server::builder()
            .add_service(MountServer::new(self.clone()))
            .serve_with_incoming(UnixListenerStream::new(listener));
        runtime.spawn(async move { server.await.unwrap() });
        Serving {
            runtime: Some(runtime),
            socket: socket.to_owned(),
        }
    }

    pub fn mounts(&self) -> Vec<MountVolumeRequest> {
        self.mounts.lock().unwrap().values().cloned().collect()
    }
}

/// A process of its own, as it were.
pub struct Serving {
    runtime: Option<tokio::runtime::Runtime>,
    socket: PathBuf,
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[tonic::async_trait]
impl Mount for FakeMountDaemon {
    async fn mount_volume(
        &self,
        request: Request<MountVolumeRequest>,
    ) -> Result<Response<MountVolumeResponse>, Status> {
        let request = request.into_inner();
        self.calls.fetch_add(1, Ordering::SeqCst);
        let _open = self.gate.lock().await;
        let mut mounts = self.mounts.lock().unwrap();
        match mounts.get(&request.target) {
            Some(found) if *found == request && is_mounted(&request.target) => {}
            Some(found) if *found != request => return Err(status(ErrorCode::Exists, "another volume is there")),
            _ => {
                let flags = if request.read_only {
                    MountFlags::RDONLY
                } else {
                    MountFlags::empty()
                };
                rustix::mount::mount(
                    "lazarette",
                    &request.target,
                    "tmpfs",
                    flags | MountFlags::NOSUID,
                    c"size=64m",
                )
                .map_err(|error| Status::internal(format!("mounting needs root: {error}")))?;
                mounts.insert(request.target.clone(), request);
            }
        }
        Ok(Response::new(MountVolumeResponse {}))
    }

    async fn unmount_volume(
        &self,
        request: Request<UnmountVolumeRequest>,
    ) -> Result<Response<UnmountVolumeResponse>, Status> {
        let UnmountVolumeRequest { target, force } = request.into_inner();
        if self.ended.load(Ordering::SeqCst) && !force {
            return Err(status(ErrorCode::SessionExpired, "the session has ended"));
        }
        let mut mounts = self.mounts.lock().unwrap();
        if mounts.contains_key(&target) && is_mounted(&target) {
            rustix::mount::unmount(&target, UnmountFlags::empty())
                .map_err(|error| Status::internal(error.to_string()))?;
        }
        mounts.remove(&target);
        Ok(Response::new(UnmountVolumeResponse {}))
    }

    async fn list_mounts(&self, _: Request<ListMountsRequest>) -> Result<Response<ListMountsResponse>, Status> {
        let mounts = self.mounts.lock().unwrap();
        let mounts = mounts.values().map(|mount| MountInfo {
            volume: mount.volume,
            target: mount.target.clone(),
            read_only: mount.read_only,
            session: 1,
            dirty_bytes: 0,
        });
        Ok(Response::new(ListMountsResponse {
            mounts: mounts.collect(),
        }))
    }
}

pub fn is_mounted(path: &str) -> bool {
    mountinfo::at(&mountinfo::read().unwrap(), Path::new(path)).is_some()
}
