//! The workload as a program, for pods. Each command ends with a line of JSON.

use anyhow::{Result, ensure};
use clap::Parser;
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
        Command::Idle => loop {
            std::thread::park();
        },
    };
    println!("{answer}");
    Ok(())
}
