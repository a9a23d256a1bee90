//! `lazarette-simulation`: runs seeds.

use anyhow::{Context, Result, bail};
use clap::Parser;
use lazarette_simulation::{Bug, Options, runner, simulate};
use std::time::Instant;

#[derive(Parser)]
#[command(version, about = "Simulates a cluster under faults")]
enum Command {
    /// Run one seed
    Run {
        /// Determines everything
        #[arg(long)]
        seed: u64,
        /// A mistake to make, which should be found
        #[arg(long)]
        bug: Option<Bug>,
        /// Print what happens
        #[arg(long)]
        print: bool,
    },
    /// Run many seeds, on all processors
    Soak {
        /// The first seed
        #[arg(long, default_value_t = 0)]
        from: u64,
        /// How many
        #[arg(long, default_value_t = 1000)]
        seeds: u64,
        /// A mistake to make, which should be found
        #[arg(long)]
        bug: Option<Bug>,
    },
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Run { seed, bug, print } => run(Options { seed, bug, print }),
        Command::Soak { from, seeds, bug } => soak(from, seeds, bug),
    }
}

fn run(options: Options) -> Result<()> {
    let seed = options.seed;
    if std::env::var_os("RUST_LOG").is_some() {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .without_time()
            .with_ansi(false)
            .init();
    }
    let outcome = simulate(options).map_err(anyhow::Error::msg)?;
    println!(
        "seed {seed}: {} events in {:.1} s, trace {:016x}",
        outcome.events,
        outcome.simulated.as_secs_f32(),
        outcome.hash
    );
    match outcome.violation {
        Some(violation) => bail!("seed {seed}: {violation}"),
        None => Ok(()),
    }
}

fn soak(from: u64, seeds: u64, bug: Option<Bug>) -> Result<()> {
    let program = std::env::current_exe().context("find this program")?;
    let started = Instant::now();
    let told = |seed: u64, well: bool| {
        if !well {
            println!("seed {seed} failed");
        } else if seed % 100 == 99 {
            println!("seed {seed}, {:.0} s", started.elapsed().as_secs_f32());
        }
    };
    let failures = runner::run_all(&program, from..from + seeds, bug, false, told)?;
    let seconds = started.elapsed().as_secs_f32();
    for failure in &failures {
        println!("{}", failure.output.trim_end());
    }
    println!(
        "{seeds} seeds in {seconds:.0} s, {:.2} a second",
        seeds as f32 / seconds
    );
    if !failures.is_empty() {
        bail!("{} of {seeds} seeds failed", failures.len());
    }
    Ok(())
}
