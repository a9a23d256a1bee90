//! The gRPC services of one node.

use super::namespace::Effect;
use super::{At, CHUNK_SIZE, Fault, Shared, World};
use crate::flush::crc32c;
use bytes::Bytes;
use futures::Stream;
use futures::stream::StreamExt;
use lazarette_proto::chunk::{self, chunk_server::Chunk};
use lazarette_proto::clock::boot_ms;
use lazarette_proto::cluster::{self, cluster_server::Cluster};
use lazarette_proto::meta::{self, meta_server::Meta, request::Op};
use lazarette_proto::{MAX_WRITE_PARTS, status};
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

    /// The clock's number is the node's.
    fn in_time(&self, deadline: Option<chunk::Deadline>) -> Result<(), Status> {
        match deadline {
            Some(at) if at.clock == self.node as u64 && boot_ms() < at.at_ms => Ok(()),
            Some(_) => Err(status(ErrorCode::Late, "too late")),
            None => Err(status(ErrorCode::InvalidArgument, "no deadline")),
        }
    }

    fn write_now(&self, request: &chunk::WriteRequest) -> Answer<chunk::WriteResponse> {
        let mut world = self.shared.world();
        self.primary(&world, request.replica_set, request.epoch)?;
        self.in_time(request.deadline)?;
        let mut end = 0;
        for part in &request.parts {
            if part.data.is_empty() || crc32c(&part.data) != part.crc || (part.offset as usize) < end {
                return refuse(ErrorCode::InvalidArgument);
            }
            end = part.offset as usize + part.data.len();
        }
        if !(1..=MAX_WRITE_PARTS).contains(&request.parts.len()) || end > CHUNK_SIZE as usize {
            return refuse(ErrorCode::InvalidArgument);
        }
        let chunk = world.chunks.entry(key(request.chunk)?).or_default();
        chunk.resize(chunk.len().max(end), 0);
        for part in &request.parts {
            chunk[part.offset as usize..][..part.data.len()].copy_from_slice(&part.data);
        }
        Ok(Response::new(chunk::WriteResponse {}))
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
        Some(Fault::Damage | Fault::ComeLate(_)) | None => serve.await,
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

    async fn drain_node(&self, _: Request<cluster::DrainNodeRequest>) -> Answer<cluster::DrainNodeResponse> {
        refuse(ErrorCode::Unsupported)
    }

    async fn undrain_node(&self, _: Request<cluster::UndrainNodeRequest>) -> Answer<cluster::UndrainNodeResponse> {
        refuse(ErrorCode::Unsupported)
    }

    async fn forget_node(&self, _: Request<cluster::ForgetNodeRequest>) -> Answer<cluster::ForgetNodeResponse> {
        refuse(ErrorCode::Unsupported)
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
        let (reply, not_before) = {
            let mut world = self.shared.world();
            self.owner(&world, request.volume)?;
            let not_before = world.namespace.open_session(request.session);
            let reply = meta::OpenSessionResponse {
                ttl_ms: world.ttl_ms,
                owner_epoch: world.owner_epoch,
                company: world.namespace.company,
            };
            (reply, not_before)
        };
        if self.shared.world().namespace.sessions() > 1 {
            tokio::time::sleep_until(not_before).await;
        }
        Ok(Response::new(reply))
    }

    async fn keep_alive(&self, request: Request<meta::KeepAliveRequest>) -> Answer<meta::KeepAliveResponse> {
        let request = request.into_inner();
        let serve = async {
            let mut world = self.shared.world();
            self.owner(&world, request.volume)?;
            if !world.namespace.has_session(request.session) {
                return refuse(ErrorCode::SessionExpired);
            }
            let terms = (world.owner_epoch, world.namespace.company);
            if request.complete && (request.owner_epoch, request.company) == terms {
                let handles = request.handles.unwrap_or_default();
                world.namespace.note_handles(request.session, &handles, true);
                world.registrations.push(handles.opened);
            }
            Ok(Response::new(meta::KeepAliveResponse {
                owner_epoch: terms.0,
                company: terms.1,
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
                        let owner_epoch = world.owner_epoch;
                        let sign = |response: meta::Response| meta::Response {
                            owner_epoch,
                            ..response
                        };
                        return result.map(|response| Response::new(sign(response))).or_else(refuse);
                    }
                }
                if tokio::time::timeout_at(deadline, changed).await.is_err() {
                    return refuse(ErrorCode::WouldBlock);
                }
            }
        };
        let at = match &request.op {
            Some(Op::Report(_)) => At::Report,
            _ => At::Call,
        };
        self.serve(at, serve).await
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
        let fault = self.fault(At::Write);
        if let Some(Fault::ComeLate(delay)) = fault {
            let node = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                let done = node.write_now(&request);
                node.shared.world().came_late.push(done.is_ok());
            });
            return Err(Status::unavailable("connection lost"));
        }
        meet(fault, async { self.write_now(&request) }).await
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

    async fn truncate(&self, request: Request<chunk::TruncateRequest>) -> Answer<chunk::TruncateResponse> {
        let request = request.into_inner();
        let mut world = self.shared.world();
        self.primary(&world, request.replica_set, request.epoch)?;
        self.in_time(request.deadline)?;
        if let Some(data) = world.chunks.get_mut(&key(request.chunk)?) {
            data.truncate(request.length as usize);
        }
        Ok(Response::new(chunk::TruncateResponse {}))
    }

    async fn clock(&self, _: Request<chunk::ClockRequest>) -> Answer<chunk::ClockResponse> {
        Ok(Response::new(chunk::ClockResponse {
            clock: self.node as u64,
            now_ms: boot_ms(),
        }))
    }

    async fn delete(&self, _: Request<chunk::DeleteRequest>) -> Answer<chunk::DeleteResponse> {
        refuse(ErrorCode::Unsupported)
    }
}
