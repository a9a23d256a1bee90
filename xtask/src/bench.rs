//! `cargo xtask bench`: speed, always as a ratio to something else measured in the same run.

mod compare;
mod disk;
mod fuse;
mod rivals;

use anyhow::Result;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs;

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    compare: compare::Args,
}

#[derive(clap::Subcommand)]
enum What {
    /// Lazarette beside MooseFS, GlusterFS, CephFS, FUSE pass-throughs and the local disk, which is
    /// also what happens without a command; needs root
    Compare(compare::Args),
    /// The FUSE session layer, as a pass-through file system, beside libfuse's passthrough_ll and
    /// bindfs; needs root
    Fuse(fuse::Args),
}

pub(crate) async fn run(args: Args) -> Result<()> {
    match args.what {
        None => compare::run(args.compare).await,
        Some(What::Compare(args)) => compare::run(args).await,
        Some(What::Fuse(args)) => fuse::run(args).await,
    }
}

/// Writes back what is dirty and drops what /proc/sys/vm/drop_caches calls `which`.
fn drop_caches(which: &str) -> Result<()> {
    rustix::fs::sync();
    Ok(fs::write("/proc/sys/vm/drop_caches", which)?)
}

/// A pass-through holds descriptors of the files that the kernel knows.
fn allow_many_files() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    Ok(setrlimit(Resource::Nofile, raised)?)
}
