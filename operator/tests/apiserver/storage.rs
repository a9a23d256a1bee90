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
    /// Why no node may leave.
    pub(crate) refusal: Option<String>,
    /// What was asked about nodes, such as `drain demo-storage-3`.
    pub(crate) asked: Vec<String>,
}

impl Answers {
    /// Changes what is said of a node.
    pub(crate) fn node(&mut self, id: &str, change: impl FnOnce(&mut NodeStatus)) {
        let mut nodes = self.status.iter_mut().flat_map(|status| &mut status.nodes);
        change(nodes.find(|node| node.id == id).unwrap());
    }
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

    /// What was asked about nodes since the last time.
    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.answers.lock().unwrap().asked)
    }

    /// Live storage nodes of the StorageCluster `demo`.
    pub(crate) fn nodes(&self, count: u32) {
        self.healthy(&["v1"]);
        self.set(|answers| {
            let status = answers.status.as_mut().unwrap();
            let node = status.nodes[0].clone();
            status.nodes = (0..count)
                .map(|ordinal| NodeStatus {
                    id: format!("demo-storage-{ordinal}"),
                    ..node.clone()
                })
                .collect();
        });
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

    async fn drain_node(&self, request: Request<DrainNodeRequest>) -> Result<Response<DrainNodeResponse>, Status> {
        let node = request.into_inner().node;
        let mut answers = self.0.lock().unwrap();
        answers.asked.push(format!("drain {node}"));
        if let Some(reason) = &answers.refusal {
            return Err(Status::resource_exhausted(reason.clone()));
        }
        answers.node(&node, |node| node.draining = true);
        Ok(Response::new(DrainNodeResponse {}))
    }

    async fn undrain_node(
        &self,
        request: Request<UndrainNodeRequest>,
    ) -> Result<Response<UndrainNodeResponse>, Status> {
        let node = request.into_inner().node;
        let mut answers = self.0.lock().unwrap();
        answers.asked.push(format!("undrain {node}"));
        answers.node(&node, |node| (node.draining, node.safe_to_remove) = (false, false));
        Ok(Response::new(UndrainNodeResponse {}))
    }

    async fn forget_node(&self, request: Request<ForgetNodeRequest>) -> Result<Response<ForgetNodeResponse>, Status> {
        let node = request.into_inner().node;
        let mut answers = self.0.lock().unwrap();
        answers.asked.push(format!("forget {node}"));
        let status = answers.status.as_mut().unwrap();
        status.nodes.retain(|one| one.id != node);
        Ok(Response::new(ForgetNodeResponse {}))
    }

    async fn get_map(&self, _: Request<GetMapRequest>) -> Result<Response<VolumeMap>, Status> {
        unused()
    }

    async fn watch_map(&self, _: Request<GetMapRequest>) -> Result<Response<Self::WatchMapStream>, Status> {
        unused()
    }
}
