//! Developer commands: `cargo xtask <command>`.

mod bench;
mod crds;
mod demo;
mod lab;
mod local;
mod soak;
mod test;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Lazarette's developer commands")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show the main job: shared storage that survives the loss of any storage node
    Demo(demo::Args),
    /// Run every test: unit, contract, local cluster, CSI and Kubernetes
    Test(test::Args),
    /// Measure speed beside the local disk
    Bench(bench::Args),
    /// Run tests for much longer than at every change
    #[command(subcommand)]
    Soak(soak::Soak),
    /// A cluster of plain processes, without Kubernetes
    #[command(subcommand)]
    Local(local::Command),
    /// A bare Kubernetes of several nodes on this machine
    #[command(subcommand)]
    Lab(lab::Command),
    /// Write the generated custom resource definitions to crds/ and the chart
    Crds,
    /// Build the programs that tests and the lab need (etcd, Kubernetes, …) into the cache
    Tools,
}

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("LAZARETTE_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .with_writer(std::io::stderr)
        .init();
    match run(Cli::parse().command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Without a backtrace, which would bury it in a log of which only the end is seen.
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> Result<()> {
    match command {
        Command::Demo(args) => demo::run(args).await,
        Command::Test(args) => test::run(args).await,
        Command::Bench(args) => bench::run(args).await,
        Command::Soak(what) => soak::run(what).await,
        Command::Local(command) => local::run(command).await,
        Command::Lab(command) => lab::run(command).await,
        Command::Crds => crds::write(),
        Command::Tools => test::build_tools().await,
    }
}
