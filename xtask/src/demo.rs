//! `cargo xtask demo`: the main job, shown to a person.

use anyhow::Result;
use lazarette_e2e::local::LocalCluster;
use lazarette_e2e::story::{self, Narrator};
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Without Kubernetes: etcd, storage nodes and mounts as plain processes
    #[arg(long)]
    local: bool,
    /// Remove every trace of an earlier demo
    #[arg(long)]
    down: bool,
    /// Where the local demo's state lives
    #[arg(long, default_value = "/var/tmp/lazarette-demo")]
    dir: PathBuf,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    if args.local {
        return local(&args).await;
    }
    anyhow::bail!("not yet")
}

async fn local(args: &Args) -> Result<()> {
    if args.dir.join("local.json").exists() && args.down {
        return LocalCluster::open(&args.dir)?.wipe().await;
    }
    if args.down {
        return Ok(());
    }
    let teller = Teller::new();
    teller.step("building the programs and starting etcd and three storage nodes");
    let cluster = LocalCluster::up(&args.dir, Some(3)).await?;
    let result = story::play(&cluster, &teller).await;
    if result.is_err() {
        eprintln!("logs are in {}", cluster.dir().join("logs").display());
    }
    result?;
    println!();
    println!("The cluster is still up. To go on:");
    println!("  cargo xtask local mount demo /tmp/demo --dir {}", args.dir.display());
    println!("  cargo xtask local status --dir {}", args.dir.display());
    println!("  cargo xtask demo --local --down");
    Ok(())
}

/// Prints the story with times, and a spinner while a step lasts.
pub(crate) struct Teller {
    started: Instant,
    spinner: indicatif::ProgressBar,
}

impl Teller {
    pub(crate) fn new() -> Self {
        let spinner = indicatif::ProgressBar::new_spinner();
        spinner.enable_steady_tick(Duration::from_millis(120));
        Self {
            started: Instant::now(),
            spinner,
        }
    }

    fn print(&self, line: &str) {
        let line = format!("{:6.1} s  {line}", self.started.elapsed().as_secs_f32());
        // Without a terminal the spinner is hidden, and so would be what it prints.
        if self.spinner.is_hidden() {
            println!("{line}");
        } else {
            self.spinner.println(line);
        }
    }
}

impl Narrator for Teller {
    fn step(&self, line: &str) {
        self.print(&format!("… {line}"));
        self.spinner.set_message(line.to_owned());
    }

    fn fact(&self, line: &str) {
        self.print(&format!("✓ {line}"));
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        self.spinner.finish_and_clear();
    }
}
