//! Seeds that are run for every change. `LAZARETTE_SEED=17 cargo test -p lazarette-simulation --test seeds` runs one,
//! and prints what happens; `LAZARETTE_SEEDS` says how many there are. `cargo xtask test` runs a thousand.

use lazarette_simulation::{Bug, runner};
use std::path::Path;
use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_lazarette-simulation");
/// How many, if nothing else is said; about a second each.
const SEEDS: u64 = 12;

#[test]
fn nothing_is_lost_or_stale_or_done_twice() {
    if let Ok(seed) = std::env::var("LAZARETTE_SEED") {
        let status = Command::new(PROGRAM)
            .args(["run", "--print", "--seed", &seed])
            .status()
            .unwrap();
        assert!(status.success(), "seed {seed}");
        return;
    }
    let seeds = std::env::var("LAZARETTE_SEEDS").map_or(SEEDS, |count| count.parse().unwrap());
    let failures = runner::run_all(Path::new(PROGRAM), 0..seeds, None, false, |_, _| {}).unwrap();
    for failure in &failures {
        println!("{}", failure.output);
    }
    let seeds: Vec<_> = failures.iter().map(|failure| failure.seed).collect();
    assert!(seeds.is_empty(), "run them one by one with LAZARETTE_SEED: {seeds:?}");
}

#[test]
fn a_seed_reproduces() {
    let runs: Vec<_> = (0..2)
        .map(|_| runner::run(Path::new(PROGRAM), 1, None).unwrap())
        .map(|run| String::from_utf8(run.stdout).unwrap())
        .collect();
    assert!(runs[0].contains("trace"), "{}", runs[0]);
    assert_eq!(runs[0], runs[1]);
}

#[test]
fn mistakes_are_found() {
    // Those that most seeds find; `docs/simulation.md` has the others.
    for bug in [Bug::PretendedChanges, Bug::NoOperationIds] {
        let failures = runner::run_all(Path::new(PROGRAM), 0..SEEDS, Some(bug), true, |_, _| {}).unwrap();
        assert!(!failures.is_empty(), "{bug:?} was not found");
    }
}
