//! The gRPC services of one node.

use super::namespace::Effect;
use super::{At, CHUNK_SIZE, Fault, Shared, World};
use crate::flush::crc32c;
use bytes::Bytes;
use futures::Stream;
use futures::stream::StreamExt;
use lazarette_proto::chunk::{self, chunk_server::Chunk};
use lazarette_proto::cluster::{self, cluster_server::Cluster};
use lazarette_proto::meta::{self, meta_server::Meta, request::Op};
use lazarette_proto::status;
use lazarette_types::ErrorCode;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tonic::{Request, Response, Status};

#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) shared: Arc<Shared>,
    pub(crate) node: usize,
}

type Answer<T> = Result<Response<T>, Status>;

fn refuse<T>(code: ErrorCode) -> Answer<T> {
    Err(status(code, format!("{code:?}")))
}

impl Node {
    fn fault(&self, at: At) -> Option<Fault> {
        let mut world = self.shared.world();
        *world.counts.entry(at).or_insert(0) += 1;
        world.faults.get_mut(&at)?.pop_front()
    }

    /// Serves, or lets the next fault of this kind have the request.
    async fn serve<T>(&self, at: At, serve: impl Future<Output = Answer<T>>) -> Answer<T> {
        meet(self.fault(at), serve).await
    }

    fn primary(&self, world: &World, set: u32, epoch: u64) -> Result<(), Status> {
        match world.sets.get(&set) {
            Some(&(present, primary)) if present == epoch && primary == self.node => Ok(()),
            _ => Err(status(ErrorCode::WrongEpoch, "not the primary of this epoch")),
        }
    }

    fn owner(&self, world: &World, volume: u64) -> Result<(), Status> {
        if volume != world.volume.id {
            return Err(status(ErrorCode::VolumeNotFound, "no such volume"));
        }
        if world.owner == self.node {
            Ok(())
        } else {
            Err(status(ErrorCode::NotOwner, "another node owns the volume"))
        }
    }
}

async fn meet<T>(fault: Option<Fault>, serve: impl Future<Output = Answer<T>>) -> Answer<T> {
    match fault {
        Some(Fault::Refuse(code)) => refuse(code),
        Some(Fault::LoseReply) => {
            let _ = serve.await;
            Err(Status::unavailable("connection lost"))
        }
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Damage) | None => serve.await,
    }
}

#[tonic::async_trait]
impl Cluster for Node {
    type WatchMapStream = Pin<Box<dyn Stream<Item = Result<cluster::VolumeMap, Status>> + Send>>;

    async fn create_volume(&self, request: Request<cluster::CreateVolumeRequest>) -> Answer<cluster::Volume> {
        let world = self.shared.world();
        if request.into_inner().name == world.volume.name {
            return Ok(Response::new(world.volume.clone()));
        }
        refuse(ErrorCode::InsufficientNodes)
    }

    async fn delete_volume(&self, _: Request<cluster::DeleteVolumeRequest>) -> Answer<cluster::DeleteVolumeResponse> {
        refuse(ErrorCode::VolumeInUse)
    }

    async fn expand_volume(&self, request: Request<cluster::ExpandVolumeRequest>) -> Answer<cluster::Volume> {
        let mut world = self.shared.world();
        let size = request.into_inner().size;
        if size < world.volume.size {
            return refuse(ErrorCode::OutOfRange);
        }
        world.volume.size = size;
        Ok(Response::new(world.volume.clone()))
    }

    async fn get_volume(&self, request: Request<cluster::GetVolumeRequest>) -> Answer<cluster::Volume> {
        let world = self.shared.world();
        let request = request.into_inner();
        if request.id == world.volume.id || request.id == 0 && request.name == world.volume.name {
            return Ok(Response::new(world.volume.clone()));
        }
        refuse(ErrorCode::VolumeNotFound)
    }

    async fn list_volumes(&self, _: Request<cluster::ListVolumesRequest>) -> Answer<cluster::ListVolumesResponse> {
        Ok(Response::new(cluster::ListVolumesResponse {
            volumes: vec![self.shared.world().volume.clone()],
        }))
    }

    async fn get_status(&self, _: Request<cluster::GetStatusRequest>) -> Answer<cluster::ClusterStatus> {
        Ok(Response::new(cluster::ClusterStatus {
            cluster_id: "test".into(),
            volumes: 1,
            ..cluster::ClusterStatus::default()
        }))
    }

    async fn get_map(&self, request: Request<cluster::GetMapRequest>) -> Answer<cluster::VolumeMap> {
        let world = self.shared.world();
        if request.into_inner().volume != world.volume.id {
            return refuse(ErrorCode::VolumeNotFound);
        }
        Ok(Response::new(world.map()))
    }

    async fn watch_map(&self, _: Request<cluster::GetMapRequest>) -> Answer<Self::WatchMapStream> {
        let shared = self.shared.clone();
        let versions = tokio_stream::wrappers::WatchStream::new(self.shared.map.subscribe());
        Ok(Response::new(Box::pin(versions.map(move |_| Ok(shared.world().map())))))
    }
}

#[tonic::async_trait]
impl Meta for Node {
    type RecallsStream = tokio_stream::Empty<Result<meta::Recall, Status>>;

    /// No leases are given here.
    async fn recalls(&self, _: Request<tonic::Streaming<meta::Confirm>>) -> Answer<Self::RecallsStream> {
        Err(Status::unimplemented("no leases"))
    }

    async fn open_session(&self, request: Request<meta::OpenSessionRequest>) -> Answer<meta::OpenSessionResponse> {
        let request = request.into_inner();
        let mut world = self.shared.world();
        self.owner(&world, request.volume)?;
        world.namespace.open_session(request.session);
        Ok(Response::new(meta::OpenSessionResponse {
            ttl_ms: world.ttl_ms,
            owner_epoch: world.owner_epoch,
        }))
    }

    async fn keep_alive(&self, request: Request<meta::KeepAliveRequest>) -> Answer<meta::KeepAliveResponse> {
        let request = request.into_inner();
        let serve = async {
            let mut world = self.shared.world();
            self.owner(&world, request.volume)?;
            if !world.namespace.has_session(request.session) {
                return refuse(ErrorCode::SessionExpired);
            }
            if request.complete {
                world.registrations.push(request.open_inodes);
            }
            Ok(Response::new(meta::KeepAliveResponse {
                owner_epoch: world.owner_epoch,
            }))
        };
        self.serve(At::KeepAlive, serve).await
    }

    async fn close_session(&self, request: Request<meta::CloseSessionRequest>) -> Answer<meta::CloseSessionResponse> {
        let request = request.into_inner();
        let mut world = self.shared.world();
        self.owner(&world, request.volume)?;
        world.namespace.close_session(request.session);
        self.shared.changed.notify_waiters();
        Ok(Response::new(meta::CloseSessionResponse {}))
    }

    async fn call(&self, request: Request<meta::Request>) -> Answer<meta::Response> {
        let request = request.into_inner();
        let wait_ms = match &request.op {
            Some(Op::Lock(lock)) => lock.wait_ms,
            Some(Op::AppendBegin(begin)) => begin.wait_ms,
            _ => 0,
        };
        let serve = async {
            let deadline = tokio::time::Instant::now() + Duration::from_millis(u64::from(wait_ms));
            loop {
                let changed = self.shared.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                {
                    let mut world = self.shared.world();
                    self.owner(&world, request.volume)?;
                    let quota = world.volume.size;
                    if let Some((result, effect)) = world.namespace.call(&request, quota) {
                        if let Effect::Truncate(ino, size) = effect {
                            truncate(&mut world, ino, size);
                        }
                        self.shared.changed.notify_waiters();
                        return result.map(Response::new).or_else(refuse);
                    }
                }
                if tokio::time::timeout_at(deadline, changed).await.is_err() {
                    return refuse(ErrorCode::WouldBlock);
                }
            }
        };
        self.serve(At::Call, serve).await
    }
}

fn truncate(world: &mut World, ino: u64, size: u64) {
    let chunk_size = u64::from(CHUNK_SIZE);
    world.chunks.retain(|(chunk, index), data| {
        if *chunk != ino {
            return true;
        }
        let keep = size.saturating_sub(u64::from(*index) * chunk_size);
        data.truncate(keep as usize);
        keep > 0
    });
}

fn key(chunk: Option<chunk::ChunkId>) -> Result<(u64, u32), Status> {
    let chunk = chunk.ok_or_else(|| status(ErrorCode::InvalidArgument, "chunk is missing"))?;
    Ok((chunk.ino, chunk.index))
}

#[tonic::async_trait]
impl Chunk for Node {
    async fn write(&self, request: Request<chunk::WriteRequest>) -> Answer<chunk::WriteResponse> {
        let request = request.into_inner();
        let serve = async {
            let mut world = self.shared.world();
            self.primary(&world, request.replica_set, request.epoch)?;
            if crc32c(&request.data) != request.crc {
                return refuse(ErrorCode::InvalidArgument);
            }
            let end = request.offset as usize + request.data.len();
            if end > CHUNK_SIZE as usize {
                return refuse(ErrorCode::InvalidArgument);
            }
            let chunk = world.chunks.entry(key(request.chunk)?).or_default();
            if chunk.len() < end {
                chunk.resize(end, 0);
            }
            chunk[request.offset as usize..end].copy_from_slice(&request.data);
            Ok(Response::new(chunk::WriteResponse {}))
        };
        self.serve(At::Write, serve).await
    }

    async fn read(&self, request: Request<chunk::ReadRequest>) -> Answer<chunk::ReadResponse> {
        let request = request.into_inner();
        let fault = self.fault(At::Read);
        let serve = async {
            let world = self.shared.world();
            self.primary(&world, request.replica_set, request.epoch)?;
            let chunk = world.chunks.get(&key(request.chunk)?).map_or(&[][..], Vec::as_slice);
            let from = (request.offset as usize).min(chunk.len());
            let to = (from + request.length as usize).min(chunk.len());
            let mut data = chunk[from..to].to_vec();
            let crc = crc32c(&data);
            if fault == Some(Fault::Damage)
                && let Some(byte) = data.first_mut()
            {
                *byte ^= 1;
            }
            let data = Bytes::from(data);
            Ok(Response::new(chunk::ReadResponse { data, crc }))
        };
        meet(fault, serve).await
    }

    async fn truncate(&self, _: Request<chunk::TruncateRequest>) -> Answer<chunk::TruncateResponse> {
        refuse(ErrorCode::Unsupported)
    }

    async fn delete(&self, _: Request<chunk::DeleteRequest>) -> Answer<chunk::DeleteResponse> {
        refuse(ErrorCode::Unsupported)
    }
}
