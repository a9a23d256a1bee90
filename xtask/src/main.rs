//! The project's chores: `cargo xtask --help`.

mod lab;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The chores of the Lazarette project")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A real multi-node Kubernetes on this machine, empty
    #[command(subcommand)]
    Lab(lab::Command),
}

#[tokio::main]
async fn main() -> Result<()> {
    match Args::parse().command {
        Command::Lab(command) => lab::run(command).await,
    }
}
