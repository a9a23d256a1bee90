use super::{Replicas, ReplicationError, wire};
use crate::chunk::{Change, MAX_CHUNK_LENGTH, crc32c};
use futures::stream::BoxStream;
use lazarette_proto::chunk as pb;
use lazarette_proto::chunk::chunk_server::Chunk;
use lazarette_proto::chunk::replica_server::Replica;
use lazarette_proto::clock::boot_ms;
use lazarette_types::{ErrorCode, NodeId, ReplicaSetId};
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Chunks in one message of a list.
const LIST_PART: usize = 4096;

/// The Chunk service: what clients ask of a primary.
#[derive(Clone)]
pub struct ChunkService {
    replicas: Replicas,
    /// Names this process's clock: another process does not know what was sent to this one.
    clock: u64,
}

impl ChunkService {
    pub(crate) fn new(replicas: Replicas) -> Self {
        let clock = rand::random();
        Self { replicas, clock }
    }

    async fn change(
        &self,
        set: u32,
        epoch: u64,
        chunk: Option<pb::ChunkId>,
        change: Change,
        until: Option<u64>,
    ) -> Result<(), ReplicationError> {
        let chunk = wire::chunk_from(chunk)?;
        let tenure = self.replicas.leader_of(ReplicaSetId(set), epoch).await?;
        tenure.change(chunk, change, until).await
    }

    /// Until when, on this machine's clock, a change may be begun.
    fn until(&self, deadline: Option<pb::Deadline>) -> Result<u64, ReplicationError> {
        match deadline {
            Some(deadline) if deadline.clock == self.clock => Ok(deadline.at_ms),
            Some(_) => Err(ReplicationError::Late),
            None => Err(ReplicationError::Malformed("a change without a deadline")),
        }
    }

    fn counted<T>(&self, result: Result<T, ReplicationError>) -> Result<Response<T>, Status> {
        count(&self.replicas, result)
    }
}

fn count<T>(replicas: &Replicas, result: Result<T, ReplicationError>) -> Result<Response<T>, Status> {
    result.map(Response::new).map_err(|error| {
        match error.code() {
            ErrorCode::InvalidArgument => replicas.ctx.counters.malformed_requests.inc(),
            ErrorCode::WrongEpoch => replicas.ctx.counters.stale_requests.inc(),
            _ => {}
        }
        Status::from(error)
    })
}

fn check_range(offset: u32, length: usize) -> Result<(), ReplicationError> {
    if u64::from(offset) + length as u64 > u64::from(MAX_CHUNK_LENGTH) {
        return Err(ReplicationError::Malformed(
            "offset and length go beyond the longest chunk of 64 MiB",
        ));
    }
    Ok(())
}

#[tonic::async_trait]
impl Chunk for ChunkService {
    async fn write(&self, request: Request<pb::WriteRequest>) -> Result<Response<pb::WriteResponse>, Status> {
        let request = request.into_inner();
        let result = async {
            let change = Change::Write(wire::parts_from(request.parts)?);
            let until = self.until(request.deadline)?;
            self.change(request.replica_set, request.epoch, request.chunk, change, Some(until))
                .await
        };
        self.counted(result.await.map(|()| pb::WriteResponse {}))
    }

    async fn read(&self, request: Request<pb::ReadRequest>) -> Result<Response<pb::ReadResponse>, Status> {
        let request = request.into_inner();
        let result = async {
            let chunk = wire::chunk_from(request.chunk)?;
            check_range(request.offset, request.length as usize)?;
            let set = ReplicaSetId(request.replica_set);
            let tenure = self.replicas.leader_of(set, request.epoch).await?;
            let contents = tenure.read(chunk, request.offset, request.length).await?;
            Ok(pb::ReadResponse {
                data: contents.data,
                crc: contents.crc,
            })
        };
        self.counted(result.await)
    }

    async fn truncate(&self, request: Request<pb::TruncateRequest>) -> Result<Response<pb::TruncateResponse>, Status> {
        let request = request.into_inner();
        let result = async {
            check_range(request.length, 0)?;
            let until = self.until(request.deadline)?;
            let change = Change::Truncate(request.length);
            self.change(request.replica_set, request.epoch, request.chunk, change, Some(until))
                .await
        };
        self.counted(result.await.map(|()| pb::TruncateResponse {}))
    }

    async fn clock(&self, _: Request<pb::ClockRequest>) -> Result<Response<pb::ClockResponse>, Status> {
        Ok(Response::new(pb::ClockResponse {
            clock: self.clock,
            now_ms: boot_ms(),
        }))
    }

    // Needs no deadline: the file is gone for good, and its number is never used again.
    async fn delete(&self, request: Request<pb::DeleteRequest>) -> Result<Response<pb::DeleteResponse>, Status> {
        let request = request.into_inner();
        let result = self
            .change(request.replica_set, request.epoch, request.chunk, Change::Delete, None)
            .await;
        self.counted(result.map(|()| pb::DeleteResponse {}))
    }
}

/// The Replica service: what a primary asks of the members.
///
/// Each request runs in a task of its own: a primary that hangs up does not stop a change half
/// way, and the promise of an epoch waits for it.
#[derive(Clone)]
pub struct ReplicaService {
    replicas: Replicas,
}

impl ReplicaService {
    pub(crate) fn new(replicas: Replicas) -> Self {
        Self { replicas }
    }

    async fn member(&self, set: u32, name: &str) -> Result<Arc<super::Member>, ReplicationError> {
        if name != self.replicas.ctx.node.0 {
            return Err(ReplicationError::WrongNode(NodeId(name.to_owned())));
        }
        // Without a lease this node may have been given up, and its disk exchanged.
        if !self.replicas.ctx.lease.valid() {
            return Err(ReplicationError::NoLease);
        }
        let set = self.replicas.member_of(ReplicaSetId(set)).await?;
        Ok(Arc::clone(&set.member))
    }

    fn counted<T>(&self, result: Result<T, ReplicationError>) -> Result<Response<T>, Status> {
        count(&self.replicas, result)
    }
}

/// Runs to its end even if the caller leaves.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, ReplicationError>> + Send + 'static,
) -> Result<T, ReplicationError> {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|error| Err(ReplicationError::Internal(error.to_string())))
}

#[tonic::async_trait]
impl Replica for ReplicaService {
    async fn prepare(&self, request: Request<pb::PrepareRequest>) -> Result<Response<pb::PrepareResponse>, Status> {
        let request = request.into_inner();
        let result = async {
            let member = self.member(request.replica_set, &request.member).await?;
            member.prepare(request.epoch).await
        };
        self.counted(result.await.map(|()| pb::PrepareResponse {}))
    }

    async fn apply(&self, request: Request<pb::ApplyRequest>) -> Result<Response<pb::ApplyResponse>, Status> {
        let request = request.into_inner();
        let result = async {
            let chunk = wire::chunk_from(request.chunk)?;
            let change = wire::change_from(request.change)?;
            let previous = wire::version_from(request.previous);
            let version = wire::version_from(request.version);
            let member = self.member(request.replica_set, &request.member).await?;
            to_the_end(async move { member.apply(request.epoch, chunk, previous, version, change).await }).await
        };
        self.counted(result.await.map(|present| pb::ApplyResponse {
            present: wire::version_to(present),
        }))
    }

    type ListStream = BoxStream<'static, Result<pb::ListResponse, Status>>;

    async fn list(&self, request: Request<pb::ListRequest>) -> Result<Response<Self::ListStream>, Status> {
        let request = request.into_inner();
        let result: Result<Self::ListStream, ReplicationError> = async {
            let member = self.member(request.replica_set, &request.member).await?;
            let all = member.list(request.epoch).await?;
            let parts = all.len().div_ceil(LIST_PART);
            Ok(Box::pin(futures::stream::iter((0..parts).map(move |part| {
                let from = part * LIST_PART;
                let chunks = all[from..(from + LIST_PART).min(all.len())]
                    .iter()
                    .map(wire::summary_to)
                    .collect();
                Ok(pb::ListResponse { chunks })
            }))) as Self::ListStream)
        }
        .await;
        self.counted(result)
    }

    async fn fetch(&self, request: Request<pb::FetchRequest>) -> Result<Response<pb::FetchResponse>, Status> {
        let request = request.into_inner();
        let result = async {
            let chunk = wire::chunk_from(request.chunk)?;
            let member = self.member(request.replica_set, &request.member).await?;
            let contents = member.fetch(request.epoch, chunk).await?;
            Ok(pb::FetchResponse {
                version: wire::version_to(contents.version),
                data: contents.data,
                crc: contents.crc,
            })
        };
        self.counted(result.await)
    }

    async fn install(&self, request: Request<pb::InstallRequest>) -> Result<Response<pb::InstallResponse>, Status> {
        let request = request.into_inner();
        let result = async {
            let chunk = wire::chunk_from(request.chunk)?;
            let previous = wire::version_from(request.previous);
            let version = wire::version_from(request.version);
            if crc32c(&request.data) != request.crc {
                return Err(ReplicationError::NotNow {
                    set: ReplicaSetId(request.replica_set),
                    reason: "the chunk was damaged on its way",
                });
            }
            let member = self.member(request.replica_set, &request.member).await?;
            to_the_end(async move {
                member
                    .install(request.epoch, chunk, previous, version, request.data, request.crc)
                    .await
            })
            .await
        };
        self.counted(result.await.map(|present| pb::InstallResponse {
            present: wire::version_to(present),
        }))
    }

    async fn restore(&self, request: Request<pb::RestoreRequest>) -> Result<Response<pb::RestoreResponse>, Status> {
        let request = request.into_inner();
        let result = async {
            let chunk = wire::chunk_from(request.chunk)?;
            if request.member != self.replicas.ctx.node.0 {
                return Err(ReplicationError::WrongNode(NodeId(request.member)));
            }
            let set = ReplicaSetId(request.replica_set);
            let tenure = self.replicas.leader_of(set, request.epoch).await?;
            tenure.restore(&NodeId(request.damaged), chunk).await
        };
        self.counted(result.await.map(|()| pb::RestoreResponse {}))
    }
}
