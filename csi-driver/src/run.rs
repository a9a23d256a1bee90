//! The two servers, from their configuration to their end.

use crate::cluster::{Clusters, EndpointTemplate};
use crate::controller::{Always, ControllerService};
use crate::handle::ClusterRef;
use crate::identity::IdentityService;
use crate::metrics::CallMetrics;
use crate::node::daemon::MountDaemon;
use crate::node::mounts::MountError;
use crate::node::{DaemonAnswers, NodeConfig, NodeService};
use crate::registration::{self, RegistrationService};
use crate::server::{GRACE, Socket, SocketError, listen};
use lazarette_proto::csi::controller_server::ControllerServer;
use lazarette_proto::csi::identity_server::IdentityServer;
use lazarette_proto::csi::node_server::NodeServer;
use lazarette_proto::registration::registration_server::RegistrationServer;
use lazarette_telemetry::Registry;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tonic::transport::Server;

/// Between two questions to a mount daemon that answered.
const CALM: Duration = Duration::from_secs(5);
/// And to one that did not.
const ALERT: Duration = Duration::from_millis(500);

/// What a controller needs to know.
#[derive(Clone, Debug)]
pub struct ControllerOptions {
    /// Where to serve CSI.
    pub csi_socket: PathBuf,
    /// Where clusters are looked for if a StorageClass does not say.
    pub namespace: String,
    /// Where clusters are reached.
    pub template: EndpointTemplate,
    /// Clusters that listing covers from the start.
    pub clusters: Vec<ClusterRef>,
    /// Where to serve `/livez`, `/readyz` and `/metrics`.
    pub admin: SocketAddr,
}

/// What a node plugin needs to know.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Where to serve CSI.
    pub csi_socket: PathBuf,
    /// The same socket as the kubelet sees it.
    pub kubelet_csi_socket: PathBuf,
    /// The kubelet's folder.
    pub kubelet_dir: PathBuf,
    /// Where the mount daemon listens.
    pub mount_socket: PathBuf,
    /// This machine's name in Kubernetes.
    pub node: String,
    /// Where clusters are reached if a PersistentVolume does not say.
    pub template: EndpointTemplate,
    /// Where to serve `/livez`, `/readyz` and `/metrics`.
    pub admin: SocketAddr,
}

/// Why a server did not start or ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A Unix socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The admin server.
    #[error(transparent)]
    Admin(#[from] lazarette_telemetry::AdminError),
    /// The gRPC server.
    #[error("serving failed: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// Tidying up before the start.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A path that gRPC cannot carry.
    #[error("{0:?} is not UTF-8; use another path")]
    Path(PathBuf),
}

/// Runs the controller until `stop` completes.
pub async fn controller(
    options: ControllerOptions,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), RunError> {
    let mut registry = Registry::default();
    let metrics = CallMetrics::register(&mut registry);
    let clusters = Arc::new(Clusters::new(options.template, options.clusters));
    let controller = ControllerService::new(clusters, options.namespace);
    let (socket, incoming) = listen(&options.csi_socket)?;
    lazarette_telemetry::admin(options.admin, registry, || true).await?;
    tracing::info!(socket = %options.csi_socket.display(), "serving the controller");
    let (stopped, server) = stoppable(stop);
    let serve = Server::builder()
        .layer(metrics)
        .add_service(IdentityServer::new(IdentityService::new(Always)))
        .add_service(ControllerServer::new(controller))
        .serve_with_incoming_shutdown(incoming, server);
    finish(serve, stopped, [socket]).await
}

/// Runs the node plugin until `stop` completes.
pub async fn node(options: NodeOptions, stop: impl Future<Output = ()> + Send + 'static) -> Result<(), RunError> {
    let endpoint = options
        .kubelet_csi_socket
        .to_str()
        .ok_or_else(|| RunError::Path(options.kubelet_csi_socket.clone()))?
        .to_owned();
    let mut registry = Registry::default();
    let metrics = CallMetrics::register(&mut registry);
    let daemon = MountDaemon::new(options.mount_socket);
    let scratch = options.csi_socket.with_file_name("scratch");
    let config = NodeConfig {
        node: options.node,
        template: options.template,
        scratch,
    };
    let node = NodeService::new(config, daemon.clone())?;
    let registration = RegistrationService::new(endpoint);

    let registered = registration.clone();
    let answers = watch_daemon(daemon.clone());
    lazarette_telemetry::admin(options.admin, registry, move || {
        registered.registered() && *answers.borrow()
    })
    .await?;

    let (csi_socket, csi_incoming) = listen(&options.csi_socket)?;
    // Only now, since the kubelet calls the CSI socket as soon as it finds the other one.
    let registration_path = registration::socket(&options.kubelet_dir);
    let (registration_socket, registration_incoming) = listen(&registration_path)?;
    tracing::info!(
        socket = %options.csi_socket.display(),
        registration = %registration_path.display(),
        "serving the node"
    );
    let (stopped, csi_server) = stoppable(stop);
    let registration_server = wait(stopped.clone());
    let csi = Server::builder()
        .layer(metrics)
        .add_service(IdentityServer::new(IdentityService::new(DaemonAnswers(daemon))))
        .add_service(NodeServer::new(node))
        .serve_with_incoming_shutdown(csi_incoming, csi_server);
    let register = Server::builder()
        .add_service(RegistrationServer::new(registration))
        .serve_with_incoming_shutdown(registration_incoming, registration_server);
    let both = async { tokio::try_join!(csi, register).map(|_| ()) };
    finish(both, stopped, [registration_socket, csi_socket]).await
}

/// Whether the mount daemon answers, asked now and then.
fn watch_daemon(daemon: MountDaemon) -> watch::Receiver<bool> {
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        while !sender.is_closed() {
            let answers = daemon.answers(Duration::from_secs(1)).await;
            if sender.send_replace(answers) != answers {
                tracing::info!(answers, "mount daemon");
            }
            tokio::time::sleep(if answers { CALM } else { ALERT }).await;
        }
    });
    receiver
}

/// Turns a signal to stop into one that several can wait for, and a first waiter.
fn stoppable(
    stop: impl Future<Output = ()> + Send + 'static,
) -> (watch::Receiver<bool>, impl Future<Output = ()> + Send + 'static) {
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        stop.await;
        sender.send_replace(true);
        // The value outlives the sender.
    });
    (receiver.clone(), wait(receiver))
}

async fn wait(mut stopped: watch::Receiver<bool>) {
    // The sender goes only after it has sent.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Serves to the end, but not much longer than until the signal to stop: callers keep their
/// connections open. The sockets go first, so that nobody finds them any more.
async fn finish<const N: usize>(
    serve: impl Future<Output = Result<(), tonic::transport::Error>>,
    stopped: watch::Receiver<bool>,
    sockets: [Socket; N],
) -> Result<(), RunError> {
    let mut serve = std::pin::pin!(serve);
    tokio::select! {
        ended = &mut serve => return Ok(ended?),
        () = wait(stopped) => tracing::info!("stopping"),
    }
    drop(sockets);
    match tokio::time::timeout(GRACE, serve).await {
        Ok(ended) => Ok(ended?),
        Err(_) => {
            tracing::warn!("calls under way were cut off");
            Ok(())
        }
    }
}
