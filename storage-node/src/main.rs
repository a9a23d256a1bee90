//! `lazarette-node`: the storage node.

use anyhow::{Context, Result, bail};
use clap::Parser;
use lazarette_node::chunk;
use lazarette_node::node::{self, Ended, NodeConfig};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command as Process;

#[derive(Parser)]
#[command(name = "lazarette-node", version, about = "Lazarette's storage node")]
enum Command {
    /// Serve until stopped
    Serve(Box<NodeConfig>),
    /// Verify every byte of a stopped storage node's disk
    Fsck {
        /// The node's data folder
        data_dir: PathBuf,
    },
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Serve(config) => serve(*config),
        Command::Fsck { data_dir } => fsck(&data_dir),
    }
}

fn serve(config: NodeConfig) -> Result<()> {
    lazarette_telemetry::init("storage-node");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(node::run(config));
    // Tasks of this incarnation must not outlive it.
    runtime.shutdown_background();
    match ended.inspect_err(|error| tracing::error!(%error, "the storage node cannot serve"))? {
        Ended::Asked => Ok(()),
        Ended::DiskFailed => bail!("the disk has failed; see the log"),
        Ended::LeaseLost => {
            tracing::warn!("starting anew after the loss of the lease");
            let error = Process::new("/proc/self/exe").args(std::env::args_os().skip(1)).exec();
            Err(error).context("start anew")
        }
    }
}

fn fsck(data_dir: &std::path::Path) -> Result<()> {
    let report = chunk::check(data_dir)?;
    println!(
        "disk {} of node {}: {} chunks, {} bytes, {} log records, {} leftovers",
        report.identity.disk, report.identity.node, report.chunks, report.bytes, report.log_records, report.leftovers
    );
    for problem in &report.problems {
        println!("{problem}");
    }
    if !report.problems.is_empty() {
        bail!("{} problems", report.problems.len());
    }
    Ok(())
}
