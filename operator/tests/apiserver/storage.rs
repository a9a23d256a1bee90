//! Storage nodes that say what a test tells them.

use lazarette_proto::cluster::cluster_server::{Cluster, ClusterServer};
use lazarette_proto::cluster::*;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio_stream::Stream;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// What the storage nodes say; `None`: they fail.
#[derive(Default)]
pub(crate) struct Answers {
    pub(crate) status: Option<ClusterStatus>,
    pub(crate) volumes: Option<Vec<Volume>>,
}

/// A server on a port of its own, until it is dropped.
pub(crate) struct FakeStorage {
    answers: Arc<Mutex<Answers>>,
    pub(crate) address: String,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for FakeStorage {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeStorage {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let answers = Arc::<Mutex<Answers>>::default();
        let service = ClusterServer::new(Service(Arc::clone(&answers)));
        let task = tokio::spawn(async move {
            let server = tonic::transport::Server::builder().add_service(service);
            server
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
                .unwrap();
        });
        Self { answers, address, task }
    }

    pub(crate) fn set(&self, change: impl FnOnce(&mut Answers)) {
        change(&mut self.answers.lock().unwrap());
    }

    /// Three live storage nodes with these volumes.
    pub(crate) fn healthy(&self, volumes: &[&str]) {
        let node = |id: &str| NodeStatus {
            id: id.to_owned(),
            live: true,
            capacity_bytes: 10 << 30,
            used_bytes: 1 << 30,
            ..NodeStatus::default()
        };
        let volumes: Vec<Volume> = (1..)
            .zip(volumes)
            .map(|(id, name)| Volume {
                id,
                name: (*name).to_owned(),
                ..Volume::default()
            })
            .collect();
        self.set(|answers| {
            answers.status = Some(ClusterStatus {
                cluster_id: "c1".to_owned(),
                nodes: ["a", "b", "c"].map(node).into(),
                replica_sets: 8,
                volumes: u32::try_from(volumes.len()).unwrap(),
                ..ClusterStatus::default()
            });
            answers.volumes = Some(volumes);
        });
    }
}

struct Service(Arc<Mutex<Answers>>);

fn unused<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("the operator does not call this"))
}

#[tonic::async_trait]
impl Cluster for Service {
    type WatchMapStream = Pin<Box<dyn Stream<Item = Result<VolumeMap, Status>> + Send>>;

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<ClusterStatus>, Status> {
        let status = self.0.lock().unwrap().status.clone();
        status.map(Response::new).ok_or_else(|| Status::unavailable("starting"))
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let ListVolumesRequest { after_id, limit } = request.into_inner();
        let volumes = self.0.lock().unwrap().volumes.clone();
        let mut volumes = volumes.ok_or_else(|| Status::unavailable("starting"))?;
        volumes.retain(|volume| volume.id > after_id);
        if limit > 0 {
            volumes.truncate(limit as usize);
        }
        Ok(Response::new(ListVolumesResponse { volumes }))
    }

    async fn create_volume(&self, _: Request<CreateVolumeRequest>) -> Result<Response<Volume>, Status> {
        unused()
    }

    async fn delete_volume(&self, _: Request<DeleteVolumeRequest>) -> Result<Response<DeleteVolumeResponse>, Status> {
        unused()
    }

    async fn expand_volume(&self, _: Request<ExpandVolumeRequest>) -> Result<Response<Volume>, Status> {
        unused()
    }

    async fn get_volume(&self, _: Request<GetVolumeRequest>) -> Result<Response<Volume>, Status> {
        unused()
    }

    async fn get_map(&self, _: Request<GetMapRequest>) -> Result<Response<VolumeMap>, Status> {
        unused()
    }

    async fn watch_map(&self, _: Request<GetMapRequest>) -> Result<Response<Self::WatchMapStream>, Status> {
        unused()
    }
}
