//! The Cluster service: volume administration and maps, answered by any storage node from etcd.

mod nodes;
mod report;

use crate::coordinator::{PlacementError, ensure_table};
use crate::membership::ClusterView;
use futures::stream::BoxStream;
use lazarette_metastore::{
    ClusterRecord, Condition, KeyValue, Keys, MetaStore, Op, RecordError, StoreError, Txn, UsageRecord, VolumeRecord,
    VolumeState, decode, encode,
};
use lazarette_proto::cluster::{self as pb, cluster_server::Cluster};
use lazarette_proto::status;
use lazarette_types::{DEFAULT_CHUNK_SIZE, ErrorCode, Layout, NodeId, ReplicaSetId, ReplicationPolicy, VolumeId};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::watch;
use tokio_stream::{StreamExt, wrappers::WatchStream};
use tonic::{Request, Response, Status};

/// Longest volume name in bytes.
const NAME_MAX: usize = 128;

/// Answers for the whole cluster from this node's view of it; changes are compare-and-swaps.
#[derive(Clone)]
pub struct ClusterService {
    store: Arc<dyn MetaStore>,
    keys: Keys,
    cluster_id: String,
    view: watch::Receiver<Arc<ClusterView>>,
    /// For volumes whose creator does not say it.
    replication: ReplicationPolicy,
}

impl ClusterService {
    /// A service over the store. `replication` is for volumes whose creator does not say it.
    pub fn new(
        store: Arc<dyn MetaStore>,
        keys: Keys,
        cluster_id: String,
        view: watch::Receiver<Arc<ClusterView>>,
        replication: ReplicationPolicy,
    ) -> Self {
        Self {
            store,
            keys,
            cluster_id,
            view,
            replication,
        }
    }

    async fn volume(&self, id: VolumeId) -> Result<Option<(VolumeRecord, KeyValue)>, Status> {
        let Some(kv) = self.store.get(&self.keys.volume(id)).await.map_err(unavailable)? else {
            return Ok(None);
        };
        Ok(Some((decode(&kv.value).map_err(damaged)?, kv)))
    }

    async fn id_of(&self, name: &str) -> Result<Option<VolumeId>, Status> {
        let Some(kv) = self
            .store
            .get(&self.keys.volume_name(name))
            .await
            .map_err(unavailable)?
        else {
            return Ok(None);
        };
        let id = std::str::from_utf8(&kv.value).ok().and_then(|text| text.parse().ok());
        id.map(|id| Some(VolumeId(id)))
            .ok_or_else(|| status(ErrorCode::Internal, format!("name record of volume {name} is damaged")))
    }

    async fn usage(&self, id: VolumeId) -> Result<UsageRecord, Status> {
        let kv = self.store.get(&self.keys.usage(id)).await.map_err(unavailable)?;
        kv.map_or(Ok(UsageRecord::default()), |kv| decode(&kv.value).map_err(damaged))
    }

    /// The volume's record under its present revision, or VolumeNotFound.
    async fn existing(&self, id: u64) -> Result<(VolumeRecord, KeyValue), Status> {
        match self.volume(VolumeId(id)).await? {
            Some((record, kv)) if record.state == VolumeState::Ready => Ok((record, kv)),
            _ => Err(status(ErrorCode::VolumeNotFound, format!("there is no volume {id}"))),
        }
    }

    /// Replaces a volume's record. False: someone else changed it, look again.
    async fn swap(&self, kv: &KeyValue, record: &VolumeRecord) -> Result<bool, Status> {
        let txn = Txn {
            conditions: vec![Condition::ModRevision(kv.key.clone(), kv.mod_revision)],
            then: vec![Op::put(kv.key.clone(), encode(record))],
        };
        match self.store.txn(txn).await {
            Ok(outcome) => Ok(outcome.succeeded),
            Err(StoreError::Ambiguous(_)) => Ok(false),
            Err(error) => Err(unavailable(error)),
        }
    }

    fn map(view: &ClusterView, id: VolumeId) -> Option<pb::VolumeMap> {
        let volume = view.volumes.get(&id).filter(|v| v.state == VolumeState::Ready)?;
        let owner = view.owners.get(&id);
        Some(pb::VolumeMap {
            volume: Some(volume_message(volume, &UsageRecord::default())),
            owner_address: owner.map(|owner| owner.address.clone()).unwrap_or_default(),
            owner_epoch: owner.map(|owner| owner.epoch).unwrap_or_default(),
            replica_sets: volume
                .replica_sets
                .iter()
                .filter_map(|&set| replica_set_message(view, set))
                .collect(),
        })
    }
}

fn unavailable(error: StoreError) -> Status {
    let code = match error {
        StoreError::Full(_) => ErrorCode::NoSpace,
        StoreError::Refused(_) => ErrorCode::Internal,
        _ => ErrorCode::Unavailable,
    };
    status(code, error.to_string())
}

fn damaged(error: RecordError) -> Status {
    status(ErrorCode::Internal, error.to_string())
}

fn invalid(message: impl Into<String>) -> Status {
    status(ErrorCode::InvalidArgument, message)
}

fn volume_message(record: &VolumeRecord, usage: &UsageRecord) -> pb::Volume {
    pb::Volume {
        id: record.id.0,
        name: record.name.clone(),
        size: record.size,
        replication: Some(pb::ReplicationPolicy {
            copies: record.replication.copies,
            ack: record.replication.ack,
        }),
        chunk_size: record.chunk_size,
        replica_sets: record.replica_sets.iter().map(|id| id.0).collect(),
        labels: record.labels.clone().into_iter().collect(),
        used_bytes: usage.used_bytes,
        used_inodes: usage.used_inodes,
        sessions: usage.sessions,
    }
}

fn replica_set_message(view: &ClusterView, id: ReplicaSetId) -> Option<pb::ReplicaSet> {
    let set = &view.replica_sets.get(&id)?.record;
    let address = |node: &NodeId| view.live.get(node).map(|live| live.address.clone()).unwrap_or_default();
    Some(pb::ReplicaSet {
        id: id.0,
        epoch: set.epoch,
        primary_address: address(&set.primary),
        members: set
            .members
            .iter()
            .map(|node| pb::Member {
                node: node.0.clone(),
                address: address(node),
                in_sync: set.in_sync.contains(node),
            })
            .collect(),
    })
}

/// A checked CreateVolumeRequest.
fn validate(request: &pb::CreateVolumeRequest, default: ReplicationPolicy) -> Result<(ReplicationPolicy, u32), Status> {
    let name = &request.name;
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(allowed) {
        return Err(invalid(format!(
            "name is {name:?}; use 1 to {NAME_MAX} letters, digits, '-', '_' or '.'"
        )));
    }
    if request.size == 0 {
        return Err(invalid("size is 0 bytes; use at least 1"));
    }
    let policy = request.replication.map_or(default, |policy| ReplicationPolicy {
        copies: policy.copies,
        ack: policy.ack,
    });
    let policy = policy.validate().map_err(|error| invalid(error.to_string()))?;
    let chunk_size = match request.chunk_size {
        0 => DEFAULT_CHUNK_SIZE,
        bytes => Layout::validate_chunk_size(bytes).map_err(|error| invalid(error.to_string()))?,
    };
    Ok((policy, chunk_size))
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn create_volume(&self, request: Request<pb::CreateVolumeRequest>) -> Result<Response<pb::Volume>, Status> {
        let request = request.into_inner();
        let (replication, chunk_size) = validate(&request, self.replication)?;
        // A repeated request without a policy must not fail because the default was changed.
        let asked = request.replication.map(|_| replication);
        loop {
            if let Some(id) = self.id_of(&request.name).await? {
                let Some((record, _)) = self.volume(id).await? else {
                    // Deleted between the two reads.
                    continue;
                };
                if record.state == VolumeState::Deleting {
                    let message = format!("volume {} is being deleted; try again", request.name);
                    return Err(status(ErrorCode::Unavailable, message));
                }
                if record.size != request.size
                    || asked.is_some_and(|asked| record.replication != asked)
                    || record.chunk_size != chunk_size
                {
                    let message = format!(
                        "volume {} exists with size {}, copies {}, ack {}, chunk size {}",
                        request.name, record.size, record.replication.copies, record.replication.ack, record.chunk_size
                    );
                    return Err(status(ErrorCode::VolumeExists, message));
                }
                return Ok(Response::new(volume_message(&record, &UsageRecord::default())));
            }

            let replica_sets = ensure_table(&*self.store, &self.keys, replication)
                .await
                .map_err(placement)?;
            let cluster_key = self.keys.cluster();
            let kv = self.store.get(&cluster_key).await.map_err(unavailable)?;
            let kv = kv.ok_or_else(|| status(ErrorCode::Internal, "the cluster has no record"))?;
            let mut cluster: ClusterRecord = decode(&kv.value).map_err(damaged)?;
            let id = VolumeId(cluster.next_volume);
            cluster.next_volume += 1;
            let record = VolumeRecord {
                id,
                name: request.name.clone(),
                size: request.size,
                replication,
                chunk_size,
                replica_sets,
                labels: request.labels.clone().into_iter().collect(),
                state: VolumeState::Ready,
            };
            let txn = Txn {
                conditions: vec![
                    Condition::ModRevision(cluster_key.clone(), kv.mod_revision),
                    Condition::absent(self.keys.volume_name(&request.name)),
                ],
                then: vec![
                    Op::put(cluster_key, encode(&cluster)),
                    Op::put(self.keys.volume(id), encode(&record)),
                    Op::put(self.keys.volume_name(&request.name), id.to_string()),
                ],
            };
            match self.store.txn(txn).await {
                Ok(outcome) if outcome.succeeded => {
                    tracing::info!(volume = %id, name = record.name, "volume created");
                    return Ok(Response::new(volume_message(&record, &UsageRecord::default())));
                }
                // Someone else was first, or perhaps it was made: the name tells.
                Ok(_) | Err(StoreError::Ambiguous(_)) => {}
                Err(error) => return Err(unavailable(error)),
            }
        }
    }

    async fn delete_volume(
        &self,
        request: Request<pb::DeleteVolumeRequest>,
    ) -> Result<Response<pb::DeleteVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = VolumeId(request.id);
        loop {
            let Some((mut record, kv)) = self.volume(id).await? else {
                return Ok(Response::new(pb::DeleteVolumeResponse {}));
            };
            if record.state == VolumeState::Deleting {
                return Ok(Response::new(pb::DeleteVolumeResponse {}));
            }
            let sessions = self.usage(id).await?.sessions;
            if sessions > 0 && !request.force {
                let message = format!(
                    "volume {} is mounted by {sessions} client(s); unmount it first",
                    record.name
                );
                return Err(status(ErrorCode::VolumeInUse, message));
            }
            record.state = VolumeState::Deleting;
            if self.swap(&kv, &record).await? {
                tracing::info!(volume = %id, name = record.name, "volume deleted");
                return Ok(Response::new(pb::DeleteVolumeResponse {}));
            }
        }
    }

    async fn expand_volume(&self, request: Request<pb::ExpandVolumeRequest>) -> Result<Response<pb::Volume>, Status> {
        let request = request.into_inner();
        loop {
            let (mut record, kv) = self.existing(request.id).await?;
            if request.size < record.size {
                let message = format!(
                    "size is {}, less than the present {}; volumes cannot shrink",
                    request.size, record.size
                );
                return Err(status(ErrorCode::OutOfRange, message));
            }
            let usage = self.usage(record.id).await?;
            if request.size == record.size {
                return Ok(Response::new(volume_message(&record, &usage)));
            }
            record.size = request.size;
            if self.swap(&kv, &record).await? {
                return Ok(Response::new(volume_message(&record, &usage)));
            }
        }
    }

    async fn get_volume(&self, request: Request<pb::GetVolumeRequest>) -> Result<Response<pb::Volume>, Status> {
        let request = request.into_inner();
        let id = match request.id {
            0 => {
                self.id_of(&request.name)
                    .await?
                    .ok_or_else(|| {
                        let message = format!("there is no volume named {:?}", request.name);
                        status(ErrorCode::VolumeNotFound, message)
                    })?
                    .0
            }
            id => id,
        };
        let (record, _) = self.existing(id).await?;
        let usage = self.usage(record.id).await?;
        Ok(Response::new(volume_message(&record, &usage)))
    }

    async fn list_volumes(
        &self,
        request: Request<pb::ListVolumesRequest>,
    ) -> Result<Response<pb::ListVolumesResponse>, Status> {
        let request = request.into_inner();
        let (found, _) = self.store.range(&self.keys.volumes()).await.map_err(unavailable)?;
        let (usages, _) = self.store.range(&self.keys.usages()).await.map_err(unavailable)?;
        let mut volumes = Vec::new();
        for kv in found {
            let record: VolumeRecord = decode(&kv.value).map_err(damaged)?;
            if record.state != VolumeState::Ready || record.id.0 <= request.after_id {
                continue;
            }
            if request.limit > 0 && volumes.len() == request.limit as usize {
                break;
            }
            let key = self.keys.usage(record.id);
            let usage = usages.iter().find(|kv| kv.key == key);
            let usage = usage.and_then(|kv| decode(&kv.value).ok()).unwrap_or_default();
            volumes.push(volume_message(&record, &usage));
        }
        Ok(Response::new(pb::ListVolumesResponse { volumes }))
    }

    async fn get_status(&self, _: Request<pb::GetStatusRequest>) -> Result<Response<pb::ClusterStatus>, Status> {
        let view = self.view.borrow().clone();
        let (found, _) = self.store.range(&self.keys.activities()).await.map_err(unavailable)?;
        let mut activities = BTreeMap::new();
        for kv in found {
            if let Some(node) = Keys::suffix(&kv.key, &self.keys.activities()) {
                activities.insert(NodeId(node.to_owned()), decode(&kv.value).map_err(damaged)?);
            }
        }
        Ok(Response::new(report::status(&view, &self.cluster_id, &activities)))
    }

    async fn drain_node(
        &self,
        request: Request<pb::DrainNodeRequest>,
    ) -> Result<Response<pb::DrainNodeResponse>, Status> {
        self.set_draining(&NodeId(request.into_inner().node), true).await?;
        Ok(Response::new(pb::DrainNodeResponse {}))
    }

    async fn undrain_node(
        &self,
        request: Request<pb::UndrainNodeRequest>,
    ) -> Result<Response<pb::UndrainNodeResponse>, Status> {
        self.set_draining(&NodeId(request.into_inner().node), false).await?;
        Ok(Response::new(pb::UndrainNodeResponse {}))
    }

    async fn forget_node(
        &self,
        request: Request<pb::ForgetNodeRequest>,
    ) -> Result<Response<pb::ForgetNodeResponse>, Status> {
        self.forget(&NodeId(request.into_inner().node)).await?;
        Ok(Response::new(pb::ForgetNodeResponse {}))
    }

    async fn get_map(&self, request: Request<pb::GetMapRequest>) -> Result<Response<pb::VolumeMap>, Status> {
        let id = request.into_inner().volume;
        if let Some(map) = Self::map(&self.view.borrow(), VolumeId(id)) {
            return Ok(Response::new(map));
        }
        // The view may lag behind a volume made a moment ago; only etcd can say that there is none.
        self.existing(id).await?;
        Err(status(
            ErrorCode::Unavailable,
            format!("volume {id} is not yet known here"),
        ))
    }

    type WatchMapStream = BoxStream<'static, Result<pb::VolumeMap, Status>>;

    async fn watch_map(&self, request: Request<pb::GetMapRequest>) -> Result<Response<Self::WatchMapStream>, Status> {
        let id = VolumeId(request.into_inner().volume);
        self.existing(id.0).await?;
        let mut last = None;
        let mut seen = false;
        // Ends when a volume that was there is gone; until this node has seen it, it waits.
        let maps = WatchStream::new(self.view.clone())
            .map(move |view| Self::map(&view, id))
            .take_while(move |map| {
                seen |= map.is_some();
                map.is_some() || !seen
            })
            .filter_map(move |map| {
                let map = map?;
                if last.as_ref() == Some(&map) {
                    return None;
                }
                last = Some(map.clone());
                Some(Ok(map))
            });
        Ok(Response::new(Box::pin(maps)))
    }
}

fn placement(error: PlacementError) -> Status {
    status(error.code(), error.to_string())
}

#[cfg(test)]
mod tests;
