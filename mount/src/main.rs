//! `lazarette-mount`: mounts volumes on this machine.

use anyhow::Context;
use clap::{Parser, Subcommand};
use lazarette_client::Cluster;
use lazarette_mount::{Daemon, Mount};
use lazarette_telemetry::Registry;
use lazarette_types::VolumeId;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
#[command(version, about = "Mounts Lazarette volumes on this machine")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the control socket, through which volumes are mounted and unmounted.
    Serve {
        /// Path of the Unix socket.
        #[arg(long, env = "LAZARETTE_SOCKET")]
        socket: PathBuf,
        /// Address of the admin HTTP server (/livez, /readyz, /metrics).
        #[arg(long, env = "LAZARETTE_ADMIN")]
        admin: Option<SocketAddr>,
    },
    /// Mount one volume, print `mounted`, and serve it until it is unmounted or a signal comes.
    Mount {
        /// `http://host:port` of a storage node; may be given several times.
        #[arg(long = "endpoint", required = true)]
        endpoints: Vec<String>,
        /// The volume's name.
        #[arg(long)]
        volume: String,
        /// An existing folder.
        #[arg(long)]
        target: PathBuf,
        /// Mount for reading only.
        #[arg(long)]
        read_only: bool,
        /// Stay in the foreground, which is the only way there is.
        #[arg(long)]
        foreground: bool,
    },
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    lazarette_telemetry::init("mount");
    // Few threads: each has its own arena of memory, and the work is waiting, mostly.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        match cli.command {
            Command::Serve { socket, admin } => serve(socket, admin).await,
            Command::Mount {
                endpoints,
                volume,
                target,
                read_only,
                foreground: _,
            } => mount(endpoints, &volume, target, read_only).await,
        }
    })
}

/// Resolves when the process is asked to end.
async fn asked_to_end() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("ending");
    Ok(())
}

async fn serve(socket: PathBuf, admin: Option<SocketAddr>) -> anyhow::Result<()> {
    let daemon = Daemon::default();
    let ready = Arc::new(AtomicBool::new(true));
    if let Some(address) = admin {
        let ready = ready.clone();
        let mut registry = Registry::default();
        daemon.register_metrics(&mut registry);
        lazarette_telemetry::admin(address, registry, move || ready.load(Ordering::Relaxed)).await?;
    }
    let stop = async {
        if let Err(error) = asked_to_end().await {
            tracing::error!(%error, "ending");
        }
        ready.store(false, Ordering::Relaxed);
    };
    daemon.serve(&socket, stop).await.context("the control socket failed")
}

async fn mount(endpoints: Vec<String>, name: &str, target: PathBuf, read_only: bool) -> anyhow::Result<()> {
    let cluster = Cluster::connect(endpoints)?;
    let volume = cluster
        .get_volume_by_name(name)
        .await
        .with_context(|| format!("volume {name:?}"))?;
    let target = std::path::absolute(&target).context("target")?;
    let mount = Mount::new(&cluster, VolumeId(volume.id), &target, read_only).await?;
    println!("mounted");
    tokio::select! {
        () = mount.ended() => {}
        asked = asked_to_end() => {
            asked?;
            mount.shut_down().await;
        }
    }
    Ok(())
}
