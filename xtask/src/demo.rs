//! `cargo xtask demo`: the main job, shown to a person.

use anyhow::{Context, Result, ensure};
use lazarette_e2e::kubernetes::{self, Installation};
use lazarette_e2e::lab::{Lab, LabConfig};
use lazarette_e2e::local::LocalCluster;
use lazarette_e2e::story::{self, Narrator};
use lazarette_e2e::tools;
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
    on_kubernetes(&args).await
}

async fn on_kubernetes(args: &Args) -> Result<()> {
    let config = LabConfig::default();
    if args.down {
        Lab::down(&config).await?;
        let left = Lab::leftovers(&config)?;
        ensure!(left.is_empty(), "left behind: {}", left.join(", "));
        return Ok(());
    }
    let teller = Teller::new();
    teller.step("a Kubernetes of three nodes on this machine (the first time it is built, about 20 minutes)");
    let started = Instant::now();
    let lab = Lab::up(config.clone()).await?;
    teller.fact(&format!(
        "Kubernetes is up after {:.0} s",
        started.elapsed().as_secs_f32()
    ));
    let logs = config.logs();
    let result = async {
        let installation = Installation::up(lab, &teller).await?;
        kubernetes::play(&installation, &teller).await
    };
    result
        .await
        .with_context(|| format!("logs are in {}", logs.display()))?;
    println!();
    println!("The cluster is still up. To look around:");
    println!("  export KUBECONFIG={}", config.kubeconfig().display());
    println!("  export PATH={}:$PATH", tools::bin_dir().display());
    println!("  kubectl get storageclusters,pods -n {}", kubernetes::NAMESPACE);
    println!("  cargo xtask demo --down       # removes every trace");
    Ok(())
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
