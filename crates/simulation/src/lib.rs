//! The whole storage system on simulated machines: storage nodes, clients and an etcd with a simulated network,
//! time and disks, under faults, on one thread, and all of it determined by a seed. `docs/simulation.md` tells
//! how it works and how to reproduce a seed.

mod bugs;
mod client;
mod conditions;
mod disk;
mod etcd;
mod faults;
mod messages;
mod model;
mod network;
mod node;
pub mod runner;
mod system;
mod universe;
mod workload;

pub use bugs::Bug;

use std::sync::OnceLock;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// Bytes of the stack on which a simulation runs: futures of builds without optimisation are large.
const STACK: usize = 64 << 20;

/// A run takes a second or two.
const PATIENCE: Duration = Duration::from_secs(600);

/// What to simulate.
#[derive(Clone, Debug)]
pub struct Options {
    /// Determines everything.
    pub seed: u64,
    /// A mistake to make.
    pub bug: Option<Bug>,
    /// Print what happens.
    pub print: bool,
}

/// How it went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The first thing that was not as it must be.
    pub violation: Option<String>,
    /// Of everything that happened: the same for the same seed.
    pub hash: u64,
    /// How much that was.
    pub events: u64,
    /// How long it took in the simulation.
    pub simulated: Duration,
}

static PANIC: OnceLock<String> = OnceLock::new();

/// What the first task has said that has panicked.
fn panicked() -> Option<&'static String> {
    PANIC.get()
}

/// Runs one seed. Only once in a process: what is left of a run would show in the next one.
///
/// # Errors
/// If it cannot be simulated.
pub fn simulate(options: Options) -> Result<Outcome, String> {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let _ = PANIC.set(info.to_string());
        print(info);
    }));
    let thread = std::thread::Builder::new().stack_size(STACK);
    let (sender, outcome) = mpsc::channel();
    let run = move || sender.send(universe::run(&options));
    thread.spawn(run).map_err(|error| error.to_string())?;
    outcome.recv_timeout(PATIENCE).map_err(|error| match error {
        RecvTimeoutError::Timeout => format!("not done within {PATIENCE:?}: it does not go on"),
        RecvTimeoutError::Disconnected => "the simulation has panicked".to_owned(),
    })?
}
