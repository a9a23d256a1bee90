//! Lazarette on the local cluster beside the local disk.

use super::drop_caches;
use anyhow::{Result, ensure};
use lazarette_e2e::local::LocalCluster;
use lazarette_workload::{Amount, Row, measure};
use std::path::PathBuf;

#[derive(clap::Args)]
// The arguments that it is part of are called the same.
#[group(skip)]
pub(super) struct Args {
    /// A first table in about a minute
    #[arg(long)]
    quick: bool,
    /// Where the cluster and the local disk's files live; must not exist
    #[arg(long, default_value = "/var/tmp/lazarette-bench-quick")]
    dir: PathBuf,
}

pub(super) async fn run(args: Args) -> Result<()> {
    let amount = if args.quick {
        Amount {
            files: 800,
            stream: 256 << 20,
            threads: 8,
        }
    } else {
        Amount {
            files: 8000,
            stream: 2 << 30,
            threads: 8,
        }
    };
    ensure!(
        !args.dir.exists(),
        "{} exists; delete it or use another --dir",
        args.dir.display()
    );
    let cluster = LocalCluster::up(&args.dir, Some(3)).await?;
    let result = measure_both(&cluster, &args, amount).await;
    cluster.wipe().await?;
    let (disk, mounted) = result?;
    println!("| row | local disk | Lazarette, 3 copies | ratio |");
    println!("|---|--:|--:|--:|");
    for (disk, mounted) in disk.iter().zip(&mounted) {
        println!(
            "| {} | {:.0} {unit} | {:.0} {unit} | {:.3} |",
            disk.name,
            disk.rate,
            mounted.rate,
            mounted.rate / disk.rate,
            unit = disk.unit
        );
    }
    Ok(())
}

async fn measure_both(cluster: &LocalCluster, args: &Args, amount: Amount) -> Result<(Vec<Row>, Vec<Row>)> {
    let local = args.dir.join("local-disk");
    let disk = tokio::task::spawn_blocking(move || measure(&local, amount, &mut || drop_caches("3"))).await??;
    let target = args.dir.join("mnt");
    cluster.mount("bench", &target).await?;
    let runtime = tokio::runtime::Handle::current();
    let remount = cluster.clone();
    let mounted = tokio::task::spawn_blocking(move || {
        // A fresh client has no caches; the servers' page cache goes with the kernel's.
        let mut cold = || {
            runtime.block_on(async {
                remount.umount(&target).await?;
                remount.mount("bench", &target).await
            })?;
            drop_caches("3")
        };
        measure(&target.join("work"), amount, &mut cold)
    })
    .await??;
    Ok((disk, mounted))
}
