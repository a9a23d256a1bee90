//! `cargo xtask local`.

use anyhow::Result;
use clap::{Args, Subcommand};
use lazarette_e2e::local::LocalCluster;
use std::path::PathBuf;

#[derive(Args)]
pub(crate) struct Dir {
    /// Where the cluster's state lives
    #[arg(long, default_value = "/var/tmp/lazarette-local")]
    dir: PathBuf,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Start what is not running; data that is there stays
    Up {
        /// Number of storage nodes: of a new cluster [default: 3], or to be added to until there are so many
        #[arg(long)]
        nodes: Option<usize>,
        #[command(flatten)]
        dir: Dir,
    },
    /// Mount a volume at a folder, making both if need be
    Mount {
        volume: String,
        mountpoint: PathBuf,
        #[command(flatten)]
        dir: Dir,
    },
    /// Flush and unmount
    Umount {
        mountpoint: PathBuf,
        #[command(flatten)]
        dir: Dir,
    },
    /// Print a line for each running process: role and pid
    Pids {
        #[command(flatten)]
        dir: Dir,
    },
    /// Print the cluster's state
    Status {
        #[command(flatten)]
        dir: Dir,
    },
    /// Unmount everything and stop all processes
    Down {
        /// Delete the data too
        #[arg(long)]
        wipe: bool,
        #[command(flatten)]
        dir: Dir,
    },
}

pub(crate) async fn run(command: Command) -> Result<()> {
    match command {
        Command::Up { nodes, dir } => {
            let cluster = LocalCluster::up(&dir.dir, nodes).await?;
            println!("{} storage nodes at {}", cluster.nodes(), cluster.endpoints().join(" "));
            println!(
                "etcd at {}; logs in {}",
                cluster.etcd(),
                cluster.dir().join("logs").display()
            );
        }
        Command::Mount {
            volume,
            mountpoint,
            dir,
        } => {
            LocalCluster::open(&dir.dir)?.mount(&volume, &mountpoint).await?;
            println!("{volume} is mounted at {}", mountpoint.display());
        }
        Command::Umount { mountpoint, dir } => LocalCluster::open(&dir.dir)?.umount(&mountpoint).await?,
        Command::Pids { dir } => {
            for (role, _, process) in LocalCluster::open(&dir.dir)?.processes() {
                println!("{} {}", role.name(), process.pid);
            }
        }
        Command::Status { dir } => status(&LocalCluster::open(&dir.dir)?).await?,
        // Nothing there is what `down` is to achieve.
        Command::Down { dir, .. } if !dir.dir.join("local.json").exists() => {}
        Command::Down { wipe: true, dir } => LocalCluster::open(&dir.dir)?.wipe().await?,
        Command::Down { wipe: false, dir } => LocalCluster::open(&dir.dir)?.down().await?,
    }
    Ok(())
}

async fn status(cluster: &LocalCluster) -> Result<()> {
    let status = cluster.status().await?;
    println!(
        "volumes {} (without owner {}), replica sets {} (degraded {}, unavailable {}), coordinator {}",
        status.volumes,
        status.ownerless_volumes,
        status.replica_sets,
        status.degraded_replica_sets,
        status.unavailable_replica_sets,
        status.coordinator
    );
    println!(
        "copies missing {}, replica sets moving {}, {} MiB still to be copied",
        status.missing_copies,
        status.moving_replica_sets,
        status.repair_bytes >> 20
    );
    for node in status.nodes {
        println!(
            "{} {} {}{}: owner of {} volumes, in {} replica sets, primary of {}, {} of {} MiB used",
            node.id,
            node.address,
            if node.live { "live" } else { "away" },
            match (node.draining, node.safe_to_remove) {
                (_, true) => ", drained",
                (true, false) => ", draining",
                _ => "",
            },
            node.owned_volumes,
            node.replica_sets,
            node.primary_replica_sets,
            node.used_bytes >> 20,
            node.capacity_bytes >> 20
        );
    }
    Ok(())
}
