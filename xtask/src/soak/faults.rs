//! `cargo xtask soak faults`.

use anyhow::Result;
use lazarette_e2e::debian;
use lazarette_e2e::faults::{Arena, Fault};
use lazarette_e2e::local::LocalCluster;
use lazarette_e2e::story::Narrator;
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub(crate) struct Faults {
    /// How long
    #[arg(long, default_value_t = 30)]
    minutes: u64,
    /// Decides which faults come and what the verifier does [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Where the cluster's state lives; deleted at the end unless something was wrong
    #[arg(long, default_value = "/var/tmp/lazarette-soak")]
    dir: PathBuf,
}

pub(crate) async fn run(faults: Faults) -> Result<()> {
    let Faults { minutes, seed, dir } = faults;
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 16 | u64::from(chance()));
    play(Duration::from_secs(60 * minutes), seed, dir).await
}

/// Something that no run has in common with another.
fn chance() -> u16 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| (now.subsec_nanos() >> 4) as u16)
}

/// Faults between two comparisons of the volume with the model.
const ROUND: usize = 6;

async fn play(time: Duration, seed: u64, dir: PathBuf) -> Result<()> {
    debian::ensure(debian::LAB_PACKAGES).await?;
    let begun = Instant::now();
    let teller = Teller(begun);
    println!("seed {seed}; state and logs in {}", dir.display());
    let cluster = LocalCluster::up_as(&dir, Arena::EVERYTHING).await?;
    let result = async {
        let mut arena = Arena::new(&cluster, seed, &teller).await?;
        for (number, fault) in Fault::at_random(seed).enumerate() {
            if begun.elapsed() >= time {
                break;
            }
            arena.inflict(fault).await?;
            if (number + 1) % ROUND == 0 {
                arena.judge_and_go_on().await?;
            }
        }
        arena.finish().await
    }
    .await;
    match result {
        Ok(()) => cluster.wipe().await,
        Err(error) => {
            cluster.down().await?;
            Err(error.context(format!("seed {seed}; state and logs are kept in {}", dir.display())))
        }
    }
}

struct Teller(Instant);

impl Narrator for Teller {
    fn step(&self, line: &str) {
        println!("{:>6.0} s  {line}", self.0.elapsed().as_secs_f32());
    }

    fn fact(&self, line: &str) {
        println!("{:>8}  {line}", "");
    }
}
