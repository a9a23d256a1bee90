//! Runs many seeds, each in a process of its own, as many at a time as there are processors.

use crate::Bug;
use std::io;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// A seed that did not end well.
#[derive(Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// What its process printed.
    pub output: String,
}

/// Runs one seed with the program of this crate.
///
/// # Errors
/// If that cannot be started.
pub fn run(program: &Path, seed: u64, bug: Option<Bug>) -> io::Result<Output> {
    let mut command = Command::new(program);
    command.args(["run", "--seed", &seed.to_string()]);
    if let Some(name) = bug.as_ref().and_then(clap::ValueEnum::to_possible_value) {
        command.args(["--bug", name.get_name()]);
    }
    command.output()
}

/// Runs seeds, and tells of each whether it went well. With `first_only`, stops soon after the first failure.
///
/// # Errors
/// If the program cannot be started.
pub fn run_all(
    program: &Path,
    seeds: impl Iterator<Item = u64> + Send,
    bug: Option<Bug>,
    first_only: bool,
    told: impl Fn(u64, bool) + Sync,
) -> io::Result<Vec<Failure>> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let (seeds, failures) = (Mutex::new(seeds), Mutex::new(Vec::new()));
    let enough = AtomicBool::new(false);
    let next = || match enough.load(Ordering::Relaxed) {
        true => None,
        false => seeds.lock().ok()?.next(),
    };
    let work = || -> io::Result<()> {
        while let Some(seed) = next() {
            let output = run(program, seed, bug)?;
            told(seed, output.status.success());
            if !output.status.success() {
                enough.fetch_or(first_only, Ordering::Relaxed);
                let printed = [output.stdout, output.stderr].concat();
                let output = String::from_utf8_lossy(&printed).into_owned();
                if let Ok(mut failures) = failures.lock() {
                    failures.push(Failure { seed, output });
                }
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let jobs: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        jobs.into_iter().try_for_each(|job| {
            job.join()
                .unwrap_or_else(|_| Err(io::Error::other("a thread has panicked")))
        })
    })?;
    Ok(failures.into_inner().unwrap_or_default())
}
