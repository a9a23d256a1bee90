//! `cargo xtask bench`: speed, always as a ratio to something else measured in the same run.

mod cluster;
mod fuse;
mod rivals;

use anyhow::Result;
use std::fs;

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    cluster: cluster::Args,
}

#[derive(clap::Subcommand)]
enum What {
    /// The FUSE session layer, as a pass-through file system, beside libfuse's passthrough_ll and
    /// bindfs; needs root
    Fuse(fuse::Args),
}

pub(crate) async fn run(args: Args) -> Result<()> {
    match args.what {
        None => cluster::run(args.cluster).await,
        Some(What::Fuse(args)) => fuse::run(args).await,
    }
}

/// Writes back what is dirty and drops what /proc/sys/vm/drop_caches calls `which`.
fn drop_caches(which: &str) -> Result<()> {
    rustix::fs::sync();
    Ok(fs::write("/proc/sys/vm/drop_caches", which)?)
}
