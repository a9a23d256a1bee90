//! The Meta service: finds the shard of a request.

use super::namespace::Fault;
use super::owner::{Registration, SESSION_TTL, Shard, Stream, Terms, not_owner};
use futures::StreamExt;
use futures::stream::BoxStream;
use lazarette_proto::meta::{
    CloseSessionRequest, CloseSessionResponse, Confirm, KeepAliveRequest, KeepAliveResponse, OpenSessionRequest,
    OpenSessionResponse, Recall, Request as Operation, Response as Answer, meta_server,
};
use lazarette_types::{SessionId, VolumeId};
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// The shards that this node owns and serves.
#[derive(Default)]
pub struct Shards {
    by_volume: RwLock<HashMap<VolumeId, Shard>>,
}

impl Shards {
    /// The shard of a volume, if this node serves it.
    pub fn get(&self, volume: VolumeId) -> Option<Shard> {
        let shards = self.by_volume.read().unwrap_or_else(PoisonError::into_inner);
        shards.get(&volume).cloned()
    }

    /// All shards.
    pub fn all(&self) -> Vec<Shard> {
        let shards = self.by_volume.read().unwrap_or_else(PoisonError::into_inner);
        shards.values().cloned().collect()
    }

    /// Begins to route requests to a shard.
    pub fn insert(&self, shard: Shard) {
        let mut shards = self.by_volume.write().unwrap_or_else(PoisonError::into_inner);
        shards.insert(shard.volume(), shard);
    }

    /// Routes no more requests to a shard.
    pub fn remove(&self, volume: VolumeId) -> Option<Shard> {
        let mut shards = self.by_volume.write().unwrap_or_else(PoisonError::into_inner);
        shards.remove(&volume)
    }

    /// Ends serving all shards and gives them up, so that other nodes take over at once.
    pub async fn resign_all(&self) {
        let shards = self.all();
        futures::future::join_all(shards.iter().map(Shard::resign)).await;
        for shard in shards {
            self.remove(shard.volume());
        }
    }
}

/// Serves [`meta_server::Meta`] from [`Shards`].
#[derive(Clone)]
pub struct MetaService {
    shards: Arc<Shards>,
}

impl MetaService {
    /// A service over these shards.
    pub fn new(shards: Arc<Shards>) -> Self {
        Self { shards }
    }

    fn shard(&self, volume: u64) -> Result<Shard, Status> {
        self.shards.get(VolumeId(volume)).ok_or_else(|| status(not_owner()))
    }
}

fn status(fault: Fault) -> Status {
    lazarette_proto::status(fault.code, fault.message)
}

#[tonic::async_trait]
impl meta_server::Meta for MetaService {
    async fn open_session(
        &self,
        request: Request<OpenSessionRequest>,
    ) -> Result<Response<OpenSessionResponse>, Status> {
        let request = request.into_inner();
        let shard = self.shard(request.volume)?;
        let opened = shard.open_session(SessionId(request.session), request.client).await;
        let terms = opened.map_err(status)?;
        Ok(Response::new(OpenSessionResponse {
            ttl_ms: SESSION_TTL.as_millis() as u32,
            owner_epoch: terms.epoch,
            company: terms.company,
        }))
    }

    async fn keep_alive(&self, request: Request<KeepAliveRequest>) -> Result<Response<KeepAliveResponse>, Status> {
        let request = request.into_inner();
        let shard = self.shard(request.volume)?;
        let registration = request.complete.then(|| Registration {
            terms: Terms {
                epoch: request.owner_epoch,
                company: request.company,
            },
            handles: request.handles.unwrap_or_default(),
        });
        let renewed = shard.keep_alive(SessionId(request.session), registration).await;
        let terms = renewed.map_err(status)?;
        Ok(Response::new(KeepAliveResponse {
            owner_epoch: terms.epoch,
            company: terms.company,
        }))
    }

    async fn close_session(
        &self,
        request: Request<CloseSessionRequest>,
    ) -> Result<Response<CloseSessionResponse>, Status> {
        let request = request.into_inner();
        let shard = self.shard(request.volume)?;
        let closed = shard.close_session(SessionId(request.session)).await;
        closed.map_err(status)?;
        Ok(Response::new(CloseSessionResponse {}))
    }

    type RecallsStream = BoxStream<'static, Result<Recall, Status>>;

    async fn recalls(&self, request: Request<Streaming<Confirm>>) -> Result<Response<Self::RecallsStream>, Status> {
        let mut confirms = request.into_inner();
        let first = confirms.message().await?;
        let first = first.ok_or_else(|| Status::invalid_argument("the first message names the session"))?;
        let shard = self.shard(first.volume)?;
        let (sender, recalls) = mpsc::unbounded_channel();
        let (confirmed, receiver) = watch::channel(0);
        let stream = Stream {
            recalls: sender,
            confirmed: receiver,
        };
        shard.recalls(SessionId(first.session), stream).map_err(status)?;
        tokio::spawn(async move {
            while let Ok(Some(confirm)) = confirms.message().await {
                confirmed.send_replace(confirm.number);
            }
        });
        let recalls = UnboundedReceiverStream::new(recalls).map(Ok);
        // A client must learn that the shard is served elsewhere.
        let ended = async move { shard.ended().await };
        Ok(Response::new(recalls.take_until(ended).boxed()))
    }

    async fn call(&self, request: Request<Operation>) -> Result<Response<Answer>, Status> {
        let request = request.into_inner();
        let shard = self.shard(request.volume)?;
        shard.call(request).await.map(Response::new).map_err(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lazarette_proto::code_of;
    use lazarette_types::ErrorCode;
    use meta_server::Meta;

    #[tokio::test]
    async fn a_node_that_does_not_own_the_volume_says_so() {
        let service = MetaService::new(Arc::default());
        let call = service.call(Request::new(Operation::default())).await.unwrap_err();
        let keep = service
            .keep_alive(Request::new(KeepAliveRequest::default()))
            .await
            .unwrap_err();
        let open = service
            .open_session(Request::new(OpenSessionRequest::default()))
            .await
            .unwrap_err();
        let close = service
            .close_session(Request::new(CloseSessionRequest::default()))
            .await
            .unwrap_err();
        for status in [call, keep, open, close] {
            assert_eq!(code_of(&status), ErrorCode::NotOwner);
        }
    }
}
