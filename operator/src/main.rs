//! The operator's binary: parses its flags and wires the parts.

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use kube::Client;
use lazarette_operator::cluster::Defaults;
use lazarette_operator::{Context, EtcdMember, Leadership, Metrics, Timing, prepare, run};
use lazarette_telemetry::Registry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Keeps etcd, storage nodes and everything around them as StorageClusters ask.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: Flags,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Settles how an etcd member starts, before it does; for the init container of etcd's pods
    EtcdMember(EtcdMember),
}

#[derive(Debug, clap::Args)]
struct Flags {
    /// Image of the storage nodes where a StorageCluster names none.
    #[arg(long, env = "LAZARETTE_IMAGE")]
    image: Option<String>,
    /// Image of etcd where a StorageCluster names none.
    #[arg(long, env = "LAZARETTE_ETCD_IMAGE")]
    etcd_image: Option<String>,
    /// PriorityClass of etcd and the storage nodes where a StorageCluster names none.
    #[arg(long, env = "LAZARETTE_PRIORITY_CLASS")]
    priority_class: Option<String>,
    /// The operator's own namespace, for its Lease.
    #[arg(long, env = "POD_NAMESPACE", default_value = "default")]
    namespace: String,
    /// Looks after the StorageClusters of this namespace only.
    #[arg(long)]
    watch_namespace: Option<String>,
    /// Unique among the operator's replicas.
    #[arg(long, env = "POD_NAME", default_value = "lazarette-operator")]
    identity: String,
    /// Address of /livez, /readyz and /metrics.
    #[arg(long, env = "LAZARETTE_ADMIN", default_value = "0.0.0.0:7401")]
    admin: SocketAddr,
    /// Asks this host:port in place of the storage clusters' Services; for an operator that runs
    /// outside of Kubernetes.
    #[arg(long, hide = true)]
    storage_address: Option<String>,
}

// Two threads are plenty, and each costs memory.
#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let Cli { command, flags } = Cli::parse();
    if let Some(Command::EtcdMember(member)) = command {
        lazarette_telemetry::init("etcd-member");
        return Ok(prepare(&member).await?);
    }
    lazarette_telemetry::init("operator");
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let ready = Arc::new(AtomicBool::new(false));
    let is_ready = Arc::clone(&ready);
    lazarette_telemetry::admin(flags.admin, registry, move || is_ready.load(Ordering::Relaxed)).await?;

    let client = Client::try_default()
        .await
        .context("no access to the Kubernetes API: run in a pod or set KUBECONFIG")?;
    let version = client.apiserver_version().await.context("ask the API server")?;
    tracing::info!(kubernetes = %version.git_version, "connected");
    // A candidate that waits is ready too: a Deployment counts it.
    ready.store(true, Ordering::Relaxed);

    let mut leadership = Leadership::new(
        client.clone(),
        &flags.namespace,
        "lazarette-operator",
        flags.identity,
        Timing::default(),
    );
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = leadership.acquire() => {}
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    }
    tracing::info!("leading");
    metrics.leader.set(1);

    let defaults = Defaults {
        image: flags.image,
        etcd_image: flags.etcd_image,
        priority_class: flags.priority_class,
    };
    let context = Arc::new(Context::new(client, defaults, flags.storage_address));
    let (stop, mut stopped) = watch::channel(false);
    let mut controller = tokio::spawn(run(context, flags.watch_namespace, metrics, async move {
        let _ = stopped.wait_for(|stop| *stop).await;
    }));
    tokio::select! {
        () = leadership.hold() => bail!("leadership was lost: starting anew"),
        ended = &mut controller => bail!("the control loop ended: {ended:?}"),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    stop.send_replace(true);
    controller.await?;
    leadership.release().await;
    Ok(())
}
