//! CSI's Node service: volumes on this machine, on behalf of the kubelet.
//!
//! The mount daemon mounts a volume once, at the staging path; pods get bind mounts of it. What is
//! mounted is read from the kernel each time, so a restart loses nothing.

pub mod daemon;
pub mod mountinfo;
pub mod mounts;

use crate::capability::{self, Access, CapabilityError, MountOptions};
use crate::cluster::EndpointTemplate;
use crate::error::{invalid, require};
use crate::handle::VolumeHandle;
use crate::identity::Ready;
use crate::in_flight::{InFlight, Permit};
use crate::{context, deadline};
use daemon::MountDaemon;
use lazarette_proto::csi::node_server::Node;
use lazarette_proto::csi::node_service_capability::rpc::Type as Rpc;
use lazarette_proto::csi::node_service_capability::{self, Type};
use lazarette_proto::csi::*;
use mountinfo::Mount;
use mounts::{Liveness, MountError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

/// What the node can do; csi-sanity tests each.
const CAPABILITIES: &[Rpc] = &[
    Rpc::StageUnstageVolume,
    Rpc::GetVolumeStats,
    Rpc::ExpandVolume,
    Rpc::SingleNodeMultiWriter,
];

/// Between two looks whether a mount has appeared or gone.
const POLL: Duration = Duration::from_millis(20);

/// How long a daemon may take to forget a mount that is already gone.
const FAREWELL: Duration = Duration::from_secs(2);

/// How long a file system may take to tell its use.
const ASKING: Duration = Duration::from_secs(10);

/// Longest node name, in bytes, that CSI allows.
const NODE_ID_MAX: usize = 256;

/// What the node service needs to know.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// This machine's name in Kubernetes.
    pub node: String,
    /// Where clusters are reached if a PersistentVolume does not say.
    pub template: EndpointTemplate,
    /// A folder of the driver, on a file system that all mount namespaces share (the kubelet's),
    /// for mounts that exist for a moment.
    pub scratch: PathBuf,
}

/// The Node service.
#[derive(Debug)]
pub struct NodeService {
    config: NodeConfig,
    daemon: MountDaemon,
    /// Operations by volume.
    in_flight: InFlight,
    /// Questions for a file system's use, by path: apart from the operations, so that neither
    /// makes the other fail.
    asking: InFlight,
    scratches: Arc<AtomicU64>,
}

/// The node can work while the mount daemon answers.
#[derive(Clone, Debug)]
pub struct DaemonAnswers(pub MountDaemon);

impl Ready for DaemonAnswers {
    async fn ready(&self) -> bool {
        self.0.answers(Duration::from_secs(1)).await
    }
}

/// A checked NodePublishVolume.
struct Publish {
    staging: PathBuf,
    target: PathBuf,
    options: MountOptions,
    single_pod: bool,
    scratch: PathBuf,
}

impl From<MountError> for Status {
    fn from(error: MountError) -> Self {
        match error {
            MountError::Busy(_) => Self::failed_precondition(error.to_string()),
            MountError::Io { .. } => Self::internal(error.to_string()),
        }
    }
}

impl NodeService {
    /// Removes what a killed predecessor may have left in the scratch folder.
    pub fn new(mut config: NodeConfig, daemon: MountDaemon) -> Result<Self, MountError> {
        mounts::create_target(&config.scratch)?;
        if let Some(resolved) = mounts::resolve(&config.scratch)? {
            config.scratch = resolved;
        }
        for mount in mounts::all()? {
            if mount.mount_point.starts_with(&config.scratch) {
                mounts::remove(&mount.mount_point)?;
            }
        }
        Ok(Self {
            config,
            daemon,
            in_flight: InFlight::default(),
            asking: InFlight::default(),
            scratches: Arc::default(),
        })
    }

    fn scratch(&self) -> PathBuf {
        let number = self.scratches.fetch_add(1, Ordering::Relaxed);
        self.config.scratch.join(format!("{}-{number}", std::process::id()))
    }

    /// Makes sure that a living mount of the volume is at the staging path.
    async fn ensure_staged(
        &self,
        handle: &VolumeHandle,
        endpoint: &str,
        staging: &str,
        read_only: bool,
        permit: &Permit,
        deadline: Instant,
    ) -> Result<(), Status> {
        let path = PathBuf::from(staging);
        blocking(permit, deadline, staging, move || {
            mounts::create_target_unless_mounted(&path)?;
            if staged(&path)? == Some(Liveness::Dead) {
                tracing::warn!(path = %path.display(), "replacing a dead mount");
                unmount(&path)?;
            }
            Ok(())
        })
        .await?;
        self.daemon
            .mount(endpoint, handle.volume, staging, read_only, deadline)
            .await?;
        loop {
            let path = PathBuf::from(staging);
            let now = blocking(permit, deadline, staging, move || Ok(staged(&path)?)).await?;
            match now {
                Some(Liveness::Alive) => return Ok(()),
                // The mount has still to appear in this mount namespace.
                _ if Instant::now() + POLL < deadline => tokio::time::sleep(POLL).await,
                None => {
                    return Err(Status::unavailable(format!(
                        "the mount daemon mounted the volume at {staging}, but it does not appear here; check that both share the kubelet's folder with mountPropagation: Bidirectional"
                    )));
                }
                Some(Liveness::Failing | Liveness::Dead) => {
                    return Err(Status::unavailable(format!(
                        "the volume mounted at {staging} does not answer"
                    )));
                }
            }
        }
    }
}

/// Runs `work`, which may block, and waits for it until `deadline`. It keeps the permit for as
/// long as it runs, even if nobody waits any more.
async fn blocking<T: Send + 'static>(
    permit: &Permit,
    deadline: Instant,
    path: &str,
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let permit = permit.clone();
    let work = tokio::task::spawn_blocking(move || {
        let result = work();
        drop(permit);
        result
    });
    match tokio::time::timeout_at(deadline, work).await {
        Ok(Ok(result)) => result,
        Ok(Err(error)) => Err(Status::internal(format!("{path}: {error}"))),
        Err(_) => Err(Status::unavailable(format!(
            "the file system at {path} does not answer"
        ))),
    }
}

/// What is mounted at the staging path, if anything.
fn staged(path: &Path) -> Result<Option<Liveness>, MountError> {
    let Some(path) = mounts::resolve(path)? else {
        return Ok(None);
    };
    let found = mountinfo::at(&mounts::all()?, &path).is_some();
    Ok(found.then(|| mounts::liveness(&path)))
}

fn unmount(path: &Path) -> Result<(), MountError> {
    match mounts::resolve(path)? {
        Some(path) => mounts::unmount_all(&path),
        None => Ok(()),
    }
}

fn publish(publish: &Publish) -> Result<(), Status> {
    let not_staged = || {
        Status::failed_precondition(format!(
            "the volume is not staged at {}; call NodeStageVolume first",
            publish.staging.display()
        ))
    };
    let staging = mounts::resolve(&publish.staging)?.ok_or_else(not_staged)?;
    let mut all = mounts::all()?;
    let staged = mountinfo::at(&all, &staging).ok_or_else(not_staged)?.clone();
    if let Some(parent) = publish.target.parent() {
        mounts::create_target(parent)?;
    }
    let target = mounts::resolve(&publish.target)?.ok_or_else(|| Status::internal("the target's folder has gone"))?;
    if let Some(present) = mountinfo::at(&all, &target) {
        if mounts::liveness(&target) == Liveness::Dead {
            mounts::unmount_all(&target)?;
            all = mounts::all()?;
        } else if !present.shows_same(&staged) {
            return Err(Status::already_exists(format!(
                "something else ({}) is mounted at {}",
                present.file_system,
                target.display()
            )));
        } else if !has_options(present, publish.options) {
            return Err(Status::already_exists(format!(
                "the volume is published at {} with other options ({})",
                target.display(),
                present.options
            )));
        } else {
            return Ok(());
        }
    }
    if publish.single_pod
        && let Some(other) = published_elsewhere(&all, &staged, &staging, &target)
    {
        return Err(Status::failed_precondition(format!(
            "the volume is for one pod only (ReadWriteOncePod) and is published at {} already",
            other.mount_point.display()
        )));
    }
    mounts::create_target(&target)?;
    if let Err(error) = mounts::bind(&staging, &target, publish.options, &publish.scratch) {
        // Leave nothing behind; the error matters more than whether that worked.
        let _ = mounts::remove_target(&target);
        return Err(error.into());
    }
    Ok(())
}

fn has_options(mount: &Mount, options: MountOptions) -> bool {
    // A mount may have more of the last three than was asked for: those of the staging mount.
    mount.has_option("ro") == options.read_only
        && (!options.no_suid || mount.has_option("nosuid"))
        && (!options.no_dev || mount.has_option("nodev"))
        && (!options.no_exec || mount.has_option("noexec"))
}

/// Another place than `target` where pods see the whole of what is staged.
fn published_elsewhere<'a>(all: &'a [Mount], staged: &Mount, staging: &Path, target: &Path) -> Option<&'a Mount> {
    all.iter().find(|mount| {
        mount.shows_same(staged)
            && mount.mount_point != staging
            && mount.mount_point != target
            // The kubelet's own bind mounts for containers of a pod that has the volume.
            && !mount
                .mount_point
                .components()
                .any(|part| part.as_os_str() == "volume-subpaths")
    })
}

/// A path of a request: present, absolute, plain.
fn path(field: &str, value: &str) -> Result<PathBuf, Status> {
    let path = PathBuf::from(require(field, value)?);
    if mounts::is_plain(&path) {
        Ok(path)
    } else {
        Err(invalid(format!(
            "{field} is {value:?}; use an absolute path without \"..\""
        )))
    }
}

fn handle(volume_id: &str) -> Result<VolumeHandle, Status> {
    volume_id.parse().map_err(|error| Status::not_found(format!("{error}")))
}

fn access(capability: Option<&VolumeCapability>) -> Result<Access, Status> {
    capability::check(capability).map_err(|error| match error {
        CapabilityError::Missing | CapabilityError::NoAccessType | CapabilityError::Mode(_) => invalid(error),
        // The specification's code at the node for what the volume cannot do.
        CapabilityError::Block
        | CapabilityError::FileSystem(_)
        | CapabilityError::Option(_)
        | CapabilityError::MountGroup => Status::failed_precondition(error.to_string()),
    })
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let request = request.into_inner();
        require("volume_id", &request.volume_id)?;
        path("staging_target_path", &request.staging_target_path)?;
        let access = access(request.volume_capability.as_ref())?;
        let handle = handle(&request.volume_id)?;
        let endpoint = self.endpoint(&request.volume_context, &handle)?;
        let permit = self.in_flight.enter(&request.volume_id)?;
        self.ensure_staged(
            &handle,
            &endpoint,
            &request.staging_target_path,
            access.read_only,
            &permit,
            deadline,
        )
        .await?;
        Ok(Response::new(NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let request = request.into_inner();
        require("volume_id", &request.volume_id)?;
        let staging = path("staging_target_path", &request.staging_target_path)?;
        let spelled = request.staging_target_path.as_str();
        let permit = self.in_flight.enter(&request.volume_id)?;
        let at = staging.clone();
        match blocking(&permit, deadline, spelled, move || Ok(staged(&at)?)).await? {
            // The daemon alone knows what still has to be flushed, so without it nothing happens.
            Some(Liveness::Alive | Liveness::Failing) => self.daemon.unmount(spelled, deadline).await?,
            // There is nothing to save here; the daemon should forget it too, if it is there.
            Some(Liveness::Dead) | None => {
                let soon = deadline.min(Instant::now() + FAREWELL);
                if let Err(error) = self.daemon.detach(spelled, soon).await {
                    tracing::info!(path = spelled, %error, "mount daemon not told of an unmount");
                }
            }
        }
        blocking(&permit, deadline, spelled, move || Ok(unmount(&staging)?)).await?;
        Ok(Response::new(NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let request = request.into_inner();
        require("volume_id", &request.volume_id)?;
        let target = path("target_path", &request.target_path)?;
        let access = access(request.volume_capability.as_ref())?;
        if request.staging_target_path.is_empty() {
            return Err(Status::failed_precondition(
                "staging_target_path is missing; call NodeStageVolume first and give its path",
            ));
        }
        let staging = path("staging_target_path", &request.staging_target_path)?;
        let handle = handle(&request.volume_id)?;
        let endpoint = self.endpoint(&request.volume_context, &handle)?;
        let permit = self.in_flight.enter(&request.volume_id)?;
        let at = staging.clone();
        let spelled = request.staging_target_path.as_str();
        // The mount daemon may have died, or its session, since the volume was staged, and the
        // kubelet does not stage again for the next pod.
        let found = blocking(&permit, deadline, spelled, move || Ok(staged(&at)?)).await?;
        if let Some(Liveness::Dead | Liveness::Failing) = found {
            self.ensure_staged(&handle, &endpoint, spelled, access.read_only, &permit, deadline)
                .await?;
        }
        let wanted = Publish {
            staging,
            target,
            options: MountOptions {
                read_only: access.options.read_only || request.readonly,
                ..access.options
            },
            single_pod: access.single_pod,
            scratch: self.scratch(),
        };
        blocking(&permit, deadline, &request.target_path, move || publish(&wanted)).await?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let request = request.into_inner();
        require("volume_id", &request.volume_id)?;
        let target = path("target_path", &request.target_path)?;
        let permit = self.in_flight.enter(&request.volume_id)?;
        blocking(&permit, deadline, &request.target_path, move || {
            if let Some(target) = mounts::resolve(&target)? {
                mounts::unmount_all(&target)?;
                mounts::remove_target(&target)?;
            }
            Ok(())
        })
        .await?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let request = request.into_inner();
        require("volume_id", &request.volume_id)?;
        require("volume_path", &request.volume_path)?;
        handle(&request.volume_id)?;
        let deadline = deadline.min(Instant::now() + ASKING);
        let permit = self.asking.enter(&request.volume_path)?;
        let path = request.volume_path.clone();
        let usage = blocking(&permit, deadline, &request.volume_path, move || {
            Ok(mounts::usage(&mounted(&path)?)?)
        })
        .await?;
        let of = |unit: volume_usage::Unit, (total, used, available): (u64, u64, u64)| {
            let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
            VolumeUsage {
                unit: unit.into(),
                total: number(total),
                used: number(used),
                available: number(available),
            }
        };
        Ok(Response::new(NodeGetVolumeStatsResponse {
            usage: vec![
                of(volume_usage::Unit::Bytes, usage.bytes),
                of(volume_usage::Unit::Inodes, usage.inodes),
            ],
        }))
    }

    /// Nothing to do: the quota is served by the owner of the volume's metadata to all nodes.
    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let request = request.into_inner();
        require("volume_id", &request.volume_id)?;
        require("volume_path", &request.volume_path)?;
        if request.volume_capability.is_some() {
            capability::check(request.volume_capability.as_ref()).map_err(invalid)?;
        }
        let size = crate::size::SizeRange::parse(request.capacity_range.as_ref())
            .map_err(|error| Status::out_of_range(error.to_string()))?;
        handle(&request.volume_id)?;
        let permit = self.in_flight.enter(&request.volume_id)?;
        let path = request.volume_path.clone();
        blocking(&permit, deadline, &request.volume_path, move || mounted(&path)).await?;
        Ok(Response::new(NodeExpandVolumeResponse {
            capacity_bytes: i64::try_from(size.required).unwrap_or(i64::MAX),
        }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capabilities = CAPABILITIES
            .iter()
            .map(|&rpc| NodeServiceCapability {
                r#type: Some(Type::Rpc(node_service_capability::Rpc { r#type: rpc.into() })),
            })
            .collect();
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.config.node.clone(),
            max_volumes_per_node: 0,
            // Volumes are reached from everywhere.
            accessible_topology: None,
        }))
    }

    async fn node_get_volume_health(
        &self,
        _: Request<NodeGetVolumeHealthRequest>,
    ) -> Result<Response<NodeGetVolumeHealthResponse>, Status> {
        Err(Status::unimplemented("volume health is not served"))
    }

    async fn node_get_storage_health(
        &self,
        _: Request<NodeGetStorageHealthRequest>,
    ) -> Result<Response<NodeGetStorageHealthResponse>, Status> {
        Err(Status::unimplemented("storage health is not served"))
    }
}

impl NodeService {
    fn endpoint(
        &self,
        volume_context: &std::collections::HashMap<String, String>,
        handle: &VolumeHandle,
    ) -> Result<String, Status> {
        let given = context::read(volume_context, handle).map_err(invalid)?;
        Ok(given.map_or_else(|| self.config.template.expand(&handle.cluster), str::to_owned))
    }
}

/// The path, if a file system is mounted there.
fn mounted(path: &str) -> Result<PathBuf, Status> {
    let not_found = || Status::not_found(format!("no volume is mounted at {path:?}"));
    if !mounts::is_plain(Path::new(path)) {
        return Err(not_found());
    }
    let resolved = mounts::resolve(Path::new(path))?.ok_or_else(not_found)?;
    if mountinfo::at(&mounts::all()?, &resolved).is_none() {
        return Err(not_found());
    }
    Ok(resolved)
}

/// Checks a node's name.
pub fn check_node(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > NODE_ID_MAX {
        return Err(format!("node name has {} bytes; use 1 to {NODE_ID_MAX}", name.len()));
    }
    Ok(())
}
