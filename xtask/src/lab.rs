//! `cargo xtask lab`: the bare Kubernetes lab.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use lazarette_e2e::lab::{Lab, LabConfig};
use lazarette_e2e::{image, tools};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start the lab, or repair the one that runs
    Up {
        #[command(flatten)]
        place: Place,
        /// How many worker nodes
        #[arg(long, default_value_t = 3)]
        nodes: u8,
    },
    /// Remove every trace of the lab
    Down {
        #[command(flatten)]
        place: Place,
    },
    /// Show what runs
    Status {
        #[command(flatten)]
        place: Place,
    },
    /// Import all images of the chart into the lab's nodes, with Lazarette's from release binaries
    Load {
        #[command(flatten)]
        place: Place,
        /// Folder with the release binaries
        #[arg(long, default_value = "target/release")]
        binaries: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Place {
    /// Where the lab's state and logs live [default: /var/lib/lazarette-lab]
    #[arg(long, env = "LAZARETTE_LAB_DIR")]
    dir: Option<PathBuf>,
    /// Number of the lab, if several run at the same time
    #[arg(long, env = "LAZARETTE_LAB_INSTANCE", default_value_t = 0)]
    instance: u8,
}

impl Place {
    fn config(self) -> LabConfig {
        let started = Instant::now();
        let mut config =
            LabConfig::default().progress(move |line| eprintln!("[{:5.1} s] {line}", started.elapsed().as_secs_f32()));
        if let Some(dir) = self.dir {
            config.dir = dir;
        }
        config
    }
}

pub(crate) async fn run(command: Command) -> Result<()> {
    match command {
        Command::Up { place, nodes } => {
            let started = Instant::now();
            let lab = Lab::up(place.config().nodes(nodes)).await?;
            eprintln!(
                "the lab is up after {:.0} s; to use it:",
                started.elapsed().as_secs_f32()
            );
            println!("export KUBECONFIG={}", lab.config().kubeconfig().display());
            println!("export PATH={}:$PATH", tools::bin_dir().display());
        }
        Command::Down { place } => {
            let config = place.config();
            Lab::down(&config).await?;
            let left = Lab::leftovers(&config)?;
            if !left.is_empty() {
                bail!("left behind: {}", left.join(", "));
            }
            eprintln!("nothing of the lab is left");
        }
        Command::Status { place } => status(place.config()).await?,
        Command::Load { place, binaries } => {
            let lab = Lab::attach(place.config()).await?;
            lab.load(&image::chart(&binaries).await?).await?;
        }
    }
    Ok(())
}

async fn status(config: LabConfig) -> Result<()> {
    let status = Lab::status(&config).await?;
    if status.daemons.is_empty() {
        bail!("no lab is running in {}", config.dir.display());
    }
    for (name, pid) in &status.daemons {
        println!("{name:<32} {pid}");
    }
    for (name, ready) in &status.nodes {
        println!("{name:<32} {}", if *ready { "Ready" } else { "NotReady" });
    }
    if let Some(problem) = &status.problem {
        println!("Kubernetes: {problem}");
    }
    if !status.complete {
        println!("the lab was not started completely");
    }
    Ok(())
}
