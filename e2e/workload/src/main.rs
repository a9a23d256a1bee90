//! The workload as a program, for pods. Each command ends with a line of JSON.

use anyhow::{Result, ensure};
use clap::Parser;
use lazarette_workload::verifier;
use std::path::PathBuf;

#[derive(Parser)]
enum Command {
    /// Copy a folder
    Copy { from: PathBuf, to: PathBuf },
    /// Print the number of files and one sum over all files' sums and names
    Hash { dir: PathBuf },
    /// Append numbered lines to a shared log under flock
    Append { log: PathBuf, writer: String, lines: u64 },
    /// Check a log that several writers appended to
    CheckAppended { log: PathBuf, writers: u64, lines: u64 },
    /// Write and fsync records until a file appears
    Steady {
        dir: PathBuf,
        #[arg(long)]
        until: PathBuf,
    },
    /// Check that acknowledged records are there
    Verify { dir: PathBuf, acknowledged: u64 },
    /// One process of a benchmark's phase, which is given as JSON; starts at a line of input
    Phase { work: String, index: usize },
    /// Random operations on several mounts of one volume, told what to do by lines of input
    Verifier {
        /// A folder where the volume is mounted; may be given several times
        #[arg(long = "mount", required = true)]
        mounts: Vec<PathBuf>,
        /// A folder outside the volume that remembers what must be there
        #[arg(long)]
        model: PathBuf,
        /// Decides what is done
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Number of this process's first worker; others may have other numbers
        #[arg(long, default_value_t = 0)]
        first_worker: u32,
        /// Workers of this process
        #[arg(long, default_value_t = 4)]
        workers: u32,
        /// Bytes of the volume's chunks
        #[arg(long, default_value_t = 4 << 20)]
        chunk: u64,
        /// The storage nodes' disks may get full
        #[arg(long)]
        full_disks: bool,
    },
    /// Compare a volume with the verifier's model
    Check {
        mount: PathBuf,
        model: PathBuf,
        /// Bytes of the volume's chunks
        #[arg(long, default_value_t = 4 << 20)]
        chunk: u64,
    },
    /// Do nothing until stopped
    Idle,
}

fn main() -> Result<()> {
    let answer = match Command::parse() {
        Command::Copy { from, to } => serde_json::json!({ "files": lazarette_workload::copy_tree(&from, &to)? }),
        Command::Hash { dir } => {
            use sha2::{Digest, Sha256};
            let sums = lazarette_workload::hash_tree(&dir)?;
            ensure!(!sums.is_empty(), "{} has no files", dir.display());
            let mut all = Sha256::new();
            for (name, sum) in &sums {
                all.update(format!("{sum}  {}\n", name.display()));
            }
            let all: String = all.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            serde_json::json!({ "files": sums.len(), "sum": all })
        }
        Command::Append { log, writer, lines } => {
            lazarette_workload::append(&log, &writer, lines)?;
            serde_json::json!({ "lines": lines })
        }
        Command::CheckAppended { log, writers, lines } => {
            serde_json::to_value(lazarette_workload::check_appended(&log, writers, lines)?)?
        }
        Command::Steady { dir, until } => serde_json::to_value(lazarette_workload::steady(&dir, || until.exists())?)?,
        Command::Verify { dir, acknowledged } => {
            lazarette_workload::verify(&dir, acknowledged)?;
            serde_json::json!({ "verified": acknowledged })
        }
        Command::Phase { work, index } => {
            let work: lazarette_workload::Work = serde_json::from_str(&work)?;
            serde_json::to_value(work.take_part(index)?)?
        }
        Command::Verifier {
            mounts,
            model,
            seed,
            first_worker,
            workers,
            chunk,
            full_disks,
        } => {
            let mut plan = verifier::Plan::new(mounts, model, seed);
            plan.first_worker = first_worker;
            plan.workers = workers;
            plan.chunk = chunk;
            plan.full_disks = full_disks;
            serde_json::to_value(verifier::obey(plan.start()?)?)?
        }
        Command::Check { mount, model, chunk } => serde_json::to_value(verifier::check(&mount, &model, chunk)?)?,
        Command::Idle => loop {
            std::thread::park();
        },
    };
    println!("{answer}");
    Ok(())
}
