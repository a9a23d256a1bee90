//! The CSI driver's binary: parses its flags and runs the controller or the node plugin.

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use lazarette_csi::cluster::{EndpointTemplate, parse_cluster};
use lazarette_csi::handle::ClusterRef;
use lazarette_csi::run::{self, ControllerOptions, NodeOptions};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Gives Kubernetes volumes of Lazarette.
#[derive(Debug, Parser)]
#[command(version)]
struct Flags {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves the provisioner and the resizer: one for a Kubernetes cluster.
    Controller(ControllerFlags),
    /// Serves a kubelet: one on each machine.
    Node(NodeFlags),
}

#[derive(Debug, Args)]
struct Shared {
    /// Unix socket to serve CSI on.
    #[arg(long, env = "LAZARETTE_CSI_SOCKET")]
    csi_socket: PathBuf,
    /// URL of a cluster's storage nodes, with {cluster} and {namespace}.
    #[arg(long, env = "LAZARETTE_ENDPOINT_TEMPLATE", default_value = lazarette_csi::DEFAULT_ENDPOINT_TEMPLATE)]
    endpoint_template: EndpointTemplate,
    /// Address of /livez, /readyz and /metrics.
    #[arg(long, env = "LAZARETTE_ADMIN", default_value = "0.0.0.0:7401")]
    admin: SocketAddr,
}

#[derive(Debug, Args)]
struct ControllerFlags {
    #[command(flatten)]
    shared: Shared,
    /// Namespace of StorageClusters where a StorageClass names none.
    #[arg(long, env = "POD_NAMESPACE")]
    namespace: String,
    /// A StorageCluster whose volumes are listed, as NAMESPACE/NAME; may be repeated. Clusters that
    /// calls name are added by themselves.
    #[arg(long = "cluster", value_parser = parse_cluster)]
    clusters: Vec<ClusterRef>,
}

#[derive(Debug, Args)]
struct NodeFlags {
    #[command(flatten)]
    shared: Shared,
    /// The CSI socket as the kubelet sees it, if it differs.
    #[arg(long)]
    kubelet_csi_socket: Option<PathBuf>,
    /// The kubelet's folder.
    #[arg(long, default_value = "/var/lib/kubelet")]
    kubelet_dir: PathBuf,
    /// This machine's name in Kubernetes.
    #[arg(long, env = "NODE_NAME", value_parser = node_name)]
    node: String,
    /// Unix socket of the mount daemon.
    #[arg(long, env = "LAZARETTE_MOUNT_SOCKET")]
    mount_socket: PathBuf,
}

fn node_name(text: &str) -> Result<String, String> {
    lazarette_csi::node::check_node(text).map(|()| text.to_owned())
}

fn main() -> Result<()> {
    lazarette_telemetry::init("csi");
    let flags = Flags::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Two threads are plenty, and each costs memory. Blocking ones come and go; there is at
        // most one for each volume whose file system hangs.
        .worker_threads(2)
        .max_blocking_threads(128)
        .thread_keep_alive(Duration::from_secs(2))
        .enable_all()
        .build()?;
    let ended = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        match flags.command {
            Command::Controller(flags) => {
                run::controller(
                    ControllerOptions {
                        csi_socket: flags.shared.csi_socket,
                        namespace: flags.namespace,
                        template: flags.shared.endpoint_template,
                        clusters: flags.clusters,
                        admin: flags.shared.admin,
                    },
                    stop,
                )
                .await?
            }
            Command::Node(flags) => {
                let kubelet_csi_socket = flags
                    .kubelet_csi_socket
                    .unwrap_or_else(|| flags.shared.csi_socket.clone());
                run::node(
                    NodeOptions {
                        kubelet_csi_socket,
                        csi_socket: flags.shared.csi_socket,
                        kubelet_dir: flags.kubelet_dir,
                        mount_socket: flags.mount_socket,
                        node: flags.node,
                        template: flags.shared.endpoint_template,
                        admin: flags.shared.admin,
                    },
                    stop,
                )
                .await?;
            }
        }
        anyhow::Ok(())
    });
    // A thread that hangs in a file system must not keep the process from ending.
    runtime.shutdown_background();
    ended
}
