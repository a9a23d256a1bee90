//! CSI's Controller service: volumes as wholes, on behalf of the provisioner and the resizer.

use crate::capability;
use crate::cluster::Clusters;
use crate::context;
use crate::deadline;
use crate::error::{invalid, require};
use crate::handle::{ClusterRef, STRING_MAX, VolumeHandle};
use crate::identity::Ready;
use crate::in_flight::InFlight;
use crate::parameters::Parameters;
use crate::size::SizeRange;
use lazarette_proto::cluster;
use lazarette_proto::csi::controller_server::Controller;
use lazarette_proto::csi::controller_service_capability::rpc::Type as Rpc;
use lazarette_proto::csi::controller_service_capability::{self, Type};
use lazarette_proto::csi::*;
use lazarette_types::{DEFAULT_CHUNK_SIZE, ReplicationPolicy, VolumeId};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tonic::{Code, Request, Response, Status};

/// What the controller can do; csi-sanity tests each.
const CAPABILITIES: &[Rpc] = &[
    Rpc::CreateDeleteVolume,
    Rpc::ListVolumes,
    Rpc::GetCapacity,
    Rpc::ExpandVolume,
    Rpc::GetVolume,
    Rpc::SingleNodeMultiWriter,
];

/// Volumes asked from a cluster at once, so that no reply exceeds gRPC's usual 4 MiB.
const BATCH: u32 = 1000;

/// How long a volume may be reported as in use after it was unmounted.
const UNMOUNTED: Duration = Duration::from_secs(8);

/// Between two tries to delete a volume in use.
const POLL: Duration = Duration::from_millis(200);

/// The Controller service.
#[derive(Debug)]
pub struct ControllerService {
    clusters: Arc<Clusters>,
    /// Where clusters are looked for if a StorageClass does not say.
    namespace: String,
    in_flight: InFlight,
}

/// A controller can work as soon as it answers: which cluster it needs, only a call tells.
#[derive(Debug)]
pub struct Always;

impl Ready for Always {
    async fn ready(&self) -> bool {
        true
    }
}

impl ControllerService {
    /// `namespace` is where clusters are looked for if a StorageClass does not say.
    pub fn new(clusters: Arc<Clusters>, namespace: String) -> Self {
        Self {
            clusters,
            namespace,
            in_flight: InFlight::default(),
        }
    }

    async fn get(&self, handle: &VolumeHandle, deadline: Instant) -> Result<cluster::Volume, Status> {
        let id = handle.volume.0;
        self.clusters
            .call(&handle.cluster, deadline, |mut client| async move {
                let name = String::new();
                client.get_volume(cluster::GetVolumeRequest { id, name }).await
            })
            .await
    }

    /// The volume as the caller knows it.
    fn volume(&self, cluster: &ClusterRef, volume: &cluster::Volume) -> Result<Volume, Status> {
        let handle = VolumeHandle {
            cluster: cluster.clone(),
            volume: VolumeId(volume.id),
        };
        Ok(Volume {
            capacity_bytes: capacity(volume)?,
            volume_id: handle.to_string(),
            volume_context: context::write(self.clusters.endpoint(cluster), handle.volume),
            content_source: None,
            accessible_topology: Vec::new(),
        })
    }

    /// The volume that already has the name, if it is what was asked for.
    async fn existing(
        &self,
        cluster: &ClusterRef,
        request: &cluster::CreateVolumeRequest,
        size: &SizeRange,
        deadline: Instant,
    ) -> Result<cluster::Volume, Status> {
        let found = self
            .clusters
            .call(cluster, deadline, |mut client| {
                let name = request.name.clone();
                async move { client.get_volume(cluster::GetVolumeRequest { id: 0, name }).await }
            })
            .await
            .map_err(|status| match status.code() {
                // It was there when we tried to make it and has gone since.
                Code::NotFound => Status::aborted("the volume of this name is being deleted"),
                _ => status,
            })?;
        let differs = |what: String| {
            Err(Status::already_exists(format!(
                "volume {:?} exists in cluster {cluster} with {what}",
                request.name
            )))
        };
        if !size.contains(found.size) {
            return differs(format!("{} bytes", found.size));
        }
        if let (Some(wanted), Some(has)) = (request.replication, found.replication)
            && wanted != has
        {
            return differs(format!("copies {} and ack {}", has.copies, has.ack));
        }
        let wanted = match request.chunk_size {
            0 => DEFAULT_CHUNK_SIZE,
            bytes => bytes,
        };
        if found.chunk_size != wanted {
            return differs(format!("chunks of {} bytes", found.chunk_size));
        }
        Ok(found)
    }

    /// The next volumes of a cluster; none: there are no more.
    async fn batch(
        &self,
        cluster: &ClusterRef,
        after_id: u64,
        limit: u32,
        deadline: Instant,
    ) -> Result<Vec<cluster::Volume>, Status> {
        let reply = self
            .clusters
            .call(cluster, deadline, |mut client| async move {
                client
                    .list_volumes(cluster::ListVolumesRequest { after_id, limit })
                    .await
            })
            .await?;
        Ok(reply.volumes)
    }

    /// Bytes that new volumes with `copies` copies can hold in one cluster.
    async fn available(
        &self,
        cluster: &ClusterRef,
        replication: ReplicationPolicy,
        deadline: Instant,
    ) -> Result<u64, Status> {
        let status = self
            .clusters
            .call(cluster, deadline, |mut client| async move {
                client.get_status(cluster::GetStatusRequest {}).await
            })
            .await?;
        Ok(available(&status, replication))
    }
}

/// Free bytes of the live nodes, divided by the copies of each byte.
fn available(status: &cluster::ClusterStatus, replication: ReplicationPolicy) -> u64 {
    let live = || status.nodes.iter().filter(|node| node.live);
    if live().count() < replication.copies as usize {
        return 0;
    }
    let free: u128 = live()
        .map(|node| u128::from(node.capacity_bytes.saturating_sub(node.used_bytes)))
        .sum();
    u64::try_from(free / u128::from(replication.copies.max(1))).unwrap_or(u64::MAX)
}

fn capacity(volume: &cluster::Volume) -> Result<i64, Status> {
    i64::try_from(volume.size).map_err(|_| Status::internal(format!("volume {} has {} bytes", volume.id, volume.size)))
}

fn handle(volume_id: &str) -> Result<VolumeHandle, Status> {
    // A handle that this driver never gave out names no volume.
    require("volume_id", volume_id)?
        .parse()
        .map_err(|error| Status::not_found(format!("{error}")))
}

fn check_name(name: &str) -> Result<(), Status> {
    require("name", name)?;
    if name.len() > STRING_MAX {
        return Err(invalid(format!(
            "name has {} bytes; use {STRING_MAX} at most",
            name.len()
        )));
    }
    if name.chars().any(char::is_control) {
        return Err(invalid("name has control characters; remove them"));
    }
    Ok(())
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let request = request.into_inner();
        check_name(&request.name)?;
        capability::check_all(&request.volume_capabilities).map_err(invalid)?;
        if request.volume_content_source.is_some() {
            return Err(invalid(
                "volume_content_source is not supported: volumes cannot be made from snapshots or other volumes yet; leave it out",
            ));
        }
        if !request.mutable_parameters.is_empty() {
            return Err(invalid(
                "mutable_parameters are not supported; use a claim without volumeAttributesClassName",
            ));
        }
        let size = SizeRange::parse(request.capacity_range.as_ref())
            .map_err(|error| Status::out_of_range(error.to_string()))?;
        let parameters = Parameters::parse(&request.parameters, &self.namespace).map_err(invalid)?;
        let cluster = parameters.require_cluster().map_err(invalid)?;
        let _permit = self.in_flight.enter(&format!("{cluster}/{}", request.name))?;

        let wanted = cluster::CreateVolumeRequest {
            name: request.name,
            size: size.size,
            replication: parameters.replication.map(|policy| cluster::ReplicationPolicy {
                copies: policy.copies,
                ack: policy.ack,
            }),
            chunk_size: parameters.chunk_size.unwrap_or(0),
            labels: parameters.labels.clone(),
        };
        let created = self
            .clusters
            .call(cluster, deadline, |mut client| {
                let wanted = wanted.clone();
                async move { client.create_volume(wanted).await }
            })
            .await;
        let volume = match created {
            Err(status) if status.code() == Code::AlreadyExists => {
                self.existing(cluster, &wanted, &size, deadline).await?
            }
            other => other?,
        };
        Ok(Response::new(CreateVolumeResponse {
            volume: Some(self.volume(cluster, &volume)?),
        }))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let request = request.into_inner();
        let done = Ok(Response::new(DeleteVolumeResponse {}));
        let handle = match handle(&request.volume_id) {
            // Never given out, so there is nothing to delete.
            Err(status) if status.code() == Code::NotFound => {
                tracing::warn!(
                    volume_id = request.volume_id,
                    "asked to delete what is no volume of this driver"
                );
                return done;
            }
            other => other?,
        };
        let _permit = self.in_flight.enter(&request.volume_id)?;
        let id = handle.volume.0;
        // The count of mounted clients lags: a volume that was just unmounted still counts as in use.
        let patience = deadline.min(Instant::now() + UNMOUNTED);
        loop {
            let deleted = self
                .clusters
                .call(&handle.cluster, deadline, |mut client| async move {
                    let force = false;
                    client.delete_volume(cluster::DeleteVolumeRequest { id, force }).await
                })
                .await;
            match deleted {
                Err(status) if status.code() == Code::FailedPrecondition && Instant::now() + POLL < patience => {
                    tokio::time::sleep(POLL).await;
                }
                Err(status) if status.code() == Code::NotFound => return done,
                Err(status) => return Err(status),
                Ok(_) => return done,
            }
        }
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let request = request.into_inner();
        require("volume_id", &request.volume_id)?;
        if request.volume_capabilities.is_empty() {
            return Err(invalid("volume_capabilities is missing"));
        }
        let handle = handle(&request.volume_id)?;
        let volume = self.get(&handle, deadline).await?;
        let refusal = capability::check_all(&request.volume_capabilities)
            .err()
            .map(|error| error.to_string())
            .or_else(|| mismatch(&request, &self.namespace, &handle, &volume));
        let (confirmed, message) = match refusal {
            Some(message) => (None, message),
            None => (
                Some(validate_volume_capabilities_response::Confirmed {
                    volume_context: request.volume_context,
                    volume_capabilities: request.volume_capabilities,
                    parameters: request.parameters,
                    mutable_parameters: request.mutable_parameters,
                }),
                String::new(),
            ),
        };
        Ok(Response::new(ValidateVolumeCapabilitiesResponse { confirmed, message }))
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let request = request.into_inner();
        let max_entries = usize::try_from(request.max_entries)
            .map_err(|_| invalid(format!("max_entries is {}; use 0 or more", request.max_entries)))?;
        // A token is the handle of the last volume of the page before. It stays good when that
        // volume is deleted, and pages neither repeat nor miss a volume that exists throughout.
        let after: Option<VolumeHandle> = match request.starting_token.as_str() {
            "" => None,
            token => Some(token.parse().map_err(|_| {
                Status::aborted(format!(
                    "starting_token {token:?} is not one of this driver; start over without"
                ))
            })?),
        };
        let mut found: Vec<(VolumeHandle, Volume)> = Vec::new();
        for cluster in self.clusters.known() {
            let after_id = match &after {
                Some(after) if cluster < after.cluster => continue,
                Some(after) if cluster == after.cluster => after.volume.0,
                _ => 0,
            };
            // One more than asked for, to know whether there is a next page.
            let enough = match max_entries {
                0 => usize::MAX,
                max => max.saturating_add(1),
            };
            let mut after_id = after_id;
            while found.len() < enough {
                let limit = u32::try_from(enough - found.len()).map_or(BATCH, |missing| missing.min(BATCH));
                let batch = self.batch(&cluster, after_id, limit, deadline).await?;
                let Some(last) = batch.last() else { break };
                after_id = last.id;
                for volume in &batch {
                    let handle = VolumeHandle {
                        cluster: cluster.clone(),
                        volume: VolumeId(volume.id),
                    };
                    found.push((handle, self.volume(&cluster, volume)?));
                }
            }
            if max_entries != 0 && found.len() > max_entries {
                break;
            }
        }
        let mut next_token = String::new();
        if max_entries != 0 && found.len() > max_entries {
            found.truncate(max_entries);
            if let Some((last, _)) = found.last() {
                next_token = last.to_string();
            }
        }
        let entries = found
            .into_iter()
            .map(|(_, volume)| list_volumes_response::Entry {
                volume: Some(volume),
                status: None,
            })
            .collect();
        Ok(Response::new(ListVolumesResponse { entries, next_token }))
    }

    async fn get_capacity(
        &self,
        request: Request<GetCapacityRequest>,
    ) -> Result<Response<GetCapacityResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let request = request.into_inner();
        let parameters = Parameters::parse(&request.parameters, &self.namespace).map_err(invalid)?;
        let replication = parameters.replication.unwrap_or_default();
        let supported = request
            .volume_capabilities
            .iter()
            .all(|one| capability::check(Some(one)).is_ok());
        let mut bytes: u64 = 0;
        if supported {
            let clusters = match parameters.cluster {
                Some(cluster) => [cluster].into(),
                None => self.clusters.known(),
            };
            for cluster in clusters {
                let more = self.available(&cluster, replication, deadline).await?;
                bytes = bytes.saturating_add(more);
            }
        }
        Ok(Response::new(GetCapacityResponse {
            available_capacity: i64::try_from(bytes).unwrap_or(i64::MAX),
            maximum_volume_size: None,
            minimum_volume_size: None,
        }))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let capabilities = CAPABILITIES
            .iter()
            .map(|&rpc| ControllerServiceCapability {
                r#type: Some(Type::Rpc(controller_service_capability::Rpc { r#type: rpc.into() })),
            })
            .collect();
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<ControllerExpandVolumeRequest>,
    ) -> Result<Response<ControllerExpandVolumeResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let request = request.into_inner();
        require("volume_id", &request.volume_id)?;
        if request.capacity_range.is_none() {
            return Err(invalid("capacity_range is missing"));
        }
        if request.volume_capability.is_some() {
            capability::check(request.volume_capability.as_ref()).map_err(invalid)?;
        }
        let size = SizeRange::parse(request.capacity_range.as_ref())
            .map_err(|error| Status::out_of_range(error.to_string()))?;
        let handle = handle(&request.volume_id)?;
        let _permit = self.in_flight.enter(&request.volume_id)?;

        let mut volume = self.get(&handle, deadline).await?;
        if volume.size > size.limit {
            return Err(Status::out_of_range(format!(
                "volume has {} bytes already, over capacity_range.limit_bytes ({}); volumes cannot shrink",
                volume.size, size.limit
            )));
        }
        if volume.size < size.required {
            let (id, size) = (handle.volume.0, size.size);
            volume = self
                .clusters
                .call(&handle.cluster, deadline, |mut client| async move {
                    client.expand_volume(cluster::ExpandVolumeRequest { id, size }).await
                })
                .await?;
        }
        Ok(Response::new(ControllerExpandVolumeResponse {
            capacity_bytes: capacity(&volume)?,
            // The owner of the volume's metadata serves the quota to all nodes.
            node_expansion_required: false,
        }))
    }

    async fn controller_get_volume(
        &self,
        request: Request<ControllerGetVolumeRequest>,
    ) -> Result<Response<ControllerGetVolumeResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let handle = handle(&request.into_inner().volume_id)?;
        let volume = self.get(&handle, deadline).await?;
        Ok(Response::new(ControllerGetVolumeResponse {
            volume: Some(self.volume(&handle.cluster, &volume)?),
            status: Some(controller_get_volume_response::VolumeStatus::default()),
        }))
    }

    async fn controller_publish_volume(
        &self,
        _: Request<ControllerPublishVolumeRequest>,
    ) -> Result<Response<ControllerPublishVolumeResponse>, Status> {
        Err(unimplemented("volumes need no attaching"))
    }

    async fn controller_unpublish_volume(
        &self,
        _: Request<ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<ControllerUnpublishVolumeResponse>, Status> {
        Err(unimplemented("volumes need no attaching"))
    }

    async fn controller_modify_volume(
        &self,
        _: Request<ControllerModifyVolumeRequest>,
    ) -> Result<Response<ControllerModifyVolumeResponse>, Status> {
        Err(unimplemented("volumes cannot be modified"))
    }

    async fn controller_list_volume_health(
        &self,
        _: Request<ControllerListVolumeHealthRequest>,
    ) -> Result<Response<ControllerListVolumeHealthResponse>, Status> {
        Err(unimplemented("volume health is not served"))
    }

    async fn controller_get_volume_health(
        &self,
        _: Request<ControllerGetVolumeHealthRequest>,
    ) -> Result<Response<ControllerGetVolumeHealthResponse>, Status> {
        Err(unimplemented("volume health is not served"))
    }

    async fn create_snapshot(
        &self,
        _: Request<CreateSnapshotRequest>,
    ) -> Result<Response<CreateSnapshotResponse>, Status> {
        Err(unimplemented("there are no snapshots yet"))
    }

    async fn delete_snapshot(
        &self,
        _: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        Err(unimplemented("there are no snapshots yet"))
    }

    async fn list_snapshots(
        &self,
        _: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        Err(unimplemented("there are no snapshots yet"))
    }

    async fn get_snapshot(&self, _: Request<GetSnapshotRequest>) -> Result<Response<GetSnapshotResponse>, Status> {
        Err(unimplemented("there are no snapshots yet"))
    }
}

fn unimplemented(message: &str) -> Status {
    Status::unimplemented(message)
}

/// Why the volume is not one of the given parameters, if so.
fn mismatch(
    request: &ValidateVolumeCapabilitiesRequest,
    namespace: &str,
    handle: &VolumeHandle,
    volume: &cluster::Volume,
) -> Option<String> {
    if !request.mutable_parameters.is_empty() {
        return Some("mutable_parameters are not supported".to_owned());
    }
    let parameters = match Parameters::parse(&request.parameters, namespace) {
        Ok(parameters) => parameters,
        Err(error) => return Some(error.to_string()),
    };
    if parameters.cluster.is_some_and(|named| named != handle.cluster) {
        return Some(format!("the volume is in cluster {}", handle.cluster));
    }
    if let (Some(wanted), Some(has)) = (parameters.replication, volume.replication)
        && (wanted.copies, wanted.ack) != (has.copies, has.ack)
    {
        return Some(format!("the volume has copies {} and ack {}", has.copies, has.ack));
    }
    if parameters.chunk_size.is_some_and(|bytes| bytes != volume.chunk_size) {
        return Some(format!("the volume has chunks of {} bytes", volume.chunk_size));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacity_counts_live_nodes_and_copies() {
        let node = |live, capacity_bytes, used_bytes| cluster::NodeStatus {
            live,
            capacity_bytes,
            used_bytes,
            ..Default::default()
        };
        let status = cluster::ClusterStatus {
            nodes: vec![
                node(true, 100, 10),
                node(true, 100, 40),
                node(false, 1000, 0),
                // Overfull, as a shrunk disk may be.
                node(true, 100, 120),
            ],
            ..Default::default()
        };
        let copies = |copies| ReplicationPolicy { copies, ack: 1 };
        assert_eq!(available(&status, copies(1)), 150);
        assert_eq!(available(&status, copies(3)), 50);
        assert_eq!(available(&status, copies(4)), 0, "only three are live");
    }

    #[test]
    fn names_are_checked() {
        assert!(check_name(&"n".repeat(128)).is_ok());
        for bad in ["", "a\nb", &"n".repeat(129)] {
            assert_eq!(check_name(bad).unwrap_err().code(), Code::InvalidArgument, "{bad:?}");
        }
    }
}
