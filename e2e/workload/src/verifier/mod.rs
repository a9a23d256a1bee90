//! The verifier: random operations on several mounts of one volume, and exact knowledge of what must
//! be there, may be there and must not be there afterwards, whatever has failed in between.
//!
//! Each worker has names and data files that only it changes, so that each of its operations has one
//! right outcome; every worker reads all data files of its process, through every mount, while they
//! are written. Two logs are shared by all workers: one is appended to with O_APPEND, the other under
//! flock. A journal outside the volume ([`journal`]) holds what was issued and answered.
//!
//! What is demanded of the volume: a change of a name or a size is seen by all mounts when it is
//! answered; a write is seen on its own mount at once, by the others and for ever after fsync, or once
//! another mount has seen it. Appended records are whole, in order, none twice. An operation that
//! failed or was not answered has happened as a whole or not at all; writes that were not made durable
//! may be there in parts.

mod check;
mod content;
mod control;
mod data;
mod files;
mod journal;
mod logs;
mod names;
mod random;
mod stalls;
#[cfg(test)]
mod tests;
mod worker;

pub use check::{Checked, check};
pub use control::{Order, obey};
pub use random::Random;
pub use stalls::{Failure, Kind, Stalls};

use anyhow::{Context, Result, bail};
use journal::{Journal, Model, replay};
use serde::{Deserialize, Serialize};
use stalls::Clock;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use worker::Worker;

/// Problems that are kept; one is enough to fail.
const PROBLEMS: usize = 100;

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The folders where the volume is mounted.
    pub mounts: Vec<PathBuf>,
    /// A folder outside the volume. What it knows from an earlier run still holds.
    pub model: PathBuf,
    /// The same seed gives each worker the same operations, as long as they have the same outcomes.
    pub seed: u64,
    /// Workers of this process; each is at home on one mount.
    pub workers: u32,
    /// Number of the first one, if several processes share volume and model.
    pub first_worker: u32,
    /// Bytes of the volume's chunks.
    pub chunk: u64,
    /// Writes that were answered but not yet made durable may be lost, also while their mount lives: a
    /// disk that is full shows only when they are sent.
    pub full_disks: bool,
    /// A worker rests so long after each operation.
    pub rest: Duration,
}

impl Plan {
    /// Four workers on a volume with chunks of 4 MiB.
    pub fn new(mounts: Vec<PathBuf>, model: PathBuf, seed: u64) -> Self {
        Self {
            mounts,
            model,
            seed,
            workers: 4,
            first_worker: 0,
            chunk: 4 << 20,
            full_disks: false,
            rest: Duration::from_millis(2),
        }
    }

    /// Starts the workers.
    pub fn start(self) -> Result<Running> {
        let first = self.mounts.first().context("no mounts")?;
        logs::prepare(first, self.first_worker, self.chunk)?;
        let numbers = self.first_worker..self.first_worker + self.workers;
        let models = numbers
            .clone()
            .map(|number| Ok(Mutex::new(replay(&self.model, number, self.chunk)?)));
        let shared = Arc::new(Shared {
            models: models.collect::<Result<_>>()?,
            locked: Mutex::default(),
            clock: Clock::default(),
            problems: Mutex::default(),
            isolated: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            plan: self,
        });
        let threads = numbers.map(|number| {
            let journal = Journal::open(&shared.plan.model, number)?;
            let worker = Worker::new(Arc::clone(&shared), number, journal)?;
            let name = format!("verifier-{number}");
            Ok(std::thread::Builder::new().name(name).spawn(move || worker.run())?)
        });
        let threads = threads.collect::<Result<_>>()?;
        Ok(Running { shared, threads })
    }
}

/// What all workers of a process share.
#[derive(Debug)]
struct Shared {
    plan: Plan,
    models: Vec<Mutex<Model>>,
    locked: Mutex<logs::Locked>,
    clock: Clock,
    problems: Mutex<Vec<String>>,
    /// A bit for each mount that only its own workers use.
    isolated: AtomicU64,
    stop: AtomicBool,
}

impl Shared {
    fn model(&self, index: usize) -> MutexGuard<'_, Model> {
        lock(&self.models[index])
    }

    fn problem(&self, problem: String) {
        let mut problems = lock(&self.problems);
        if problems.len() < PROBLEMS {
            problems.push(problem);
        }
    }

    fn is_isolated(&self, mount: usize) -> bool {
        self.isolated.load(Ordering::Relaxed) & 1 << mount != 0
    }

    fn mount(&self, mount: usize) -> &Path {
        &self.plan.mounts[mount]
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a run amounts to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// What was found to be wrong while running.
    pub problems: Vec<String>,
    /// Since the last look.
    pub stalls: Stalls,
}

/// Workers at work. Dropped, they are told to stop, but not waited for.
#[derive(Debug)]
pub struct Running {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Running {
    /// Stalls and failures since the last call.
    pub fn stalls(&self) -> Stalls {
        self.shared.clock.take()
    }

    /// Operations that succeeded through a mount since the start.
    pub fn operations(&self, mount: usize) -> u64 {
        self.shared.clock.ended(mount)
    }

    /// What was found to be wrong so far.
    pub fn problems(&self) -> Vec<String> {
        lock(&self.shared.problems).clone()
    }

    /// Lets only a mount's own workers use it, and these only it, until [`Self::join_all`]: before it
    /// is cut off.
    pub fn isolate(&self, mount: usize) {
        self.shared.isolated.fetch_or(1 << mount, Ordering::Relaxed);
    }

    /// Ends [`Self::isolate`].
    pub fn join_all(&self) {
        self.shared.isolated.store(0, Ordering::Relaxed);
    }

    /// Makes everything durable and ends. An error means that the verifier itself could not work.
    pub fn stop(mut self) -> Result<Report> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(result) => result?,
                Err(_) => bail!("a worker of the verifier panicked"),
            }
        }
        Ok(Report {
            problems: self.problems(),
            stalls: self.stalls(),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}
