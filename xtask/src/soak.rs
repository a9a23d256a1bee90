//! `cargo xtask soak`: tests that also run for every change, for much longer.

mod faults;

use anyhow::{Result, ensure};
use lazarette_e2e::{build, posix};
use std::time::Instant;

#[derive(clap::Subcommand)]
pub(crate) enum Soak {
    /// The FUSE session layer: servers that are killed, files under fsx; needs root
    Fuse(Fuse),
    /// Random faults, one after the other, on a local cluster on which the verifier runs; needs root
    Faults(faults::Faults),
    /// Seeds of the simulation, an optimised build of it
    Simulation {
        /// The first seed
        #[arg(long, default_value_t = 0)]
        from: u64,
        /// How many
        #[arg(long, default_value_t = 2000)]
        seeds: u64,
    },
    /// Files of the local cluster under fsx, on one mount and on two; needs root
    Files {
        /// Operations of fsx on each mount
        #[arg(long, default_value_t = 1_000_000)]
        operations: u64,
    },
}

#[derive(clap::Args)]
pub(crate) struct Fuse {
    /// Servers to kill; 0 to leave that out
    #[arg(long, default_value_t = 10_000)]
    kills: u64,
    /// Operations of fsx on each example; 0 to leave that out
    #[arg(long, default_value_t = 1_000_000)]
    operations: u64,
    /// Seconds for which its decoders get random messages; 0 to leave that out. Needs a nightly toolchain
    #[arg(long, default_value_t = 600)]
    fuzz: u64,
}

pub(crate) async fn run(soak: Soak) -> Result<()> {
    let Fuse {
        kills,
        operations,
        fuzz,
    } = match soak {
        Soak::Fuse(fuse) => fuse,
        Soak::Faults(faults) => return faults::run(faults).await,
        Soak::Simulation { from, seeds } => return simulation(from, seeds),
        Soak::Files { operations } => {
            posix::ensure().await?;
            build::storage().await?;
            return repeat("files", "hold_what_is_written", "FILES_TEST_OPERATIONS", operations);
        }
    };
    posix::ensure().await?;
    if kills > 0 {
        repeat("kernel", "killed_servers_are_not_noticed", "FUSE_TEST_KILLS", kills)?;
    }
    if operations > 0 {
        repeat("posix", "hold_what_is_written", "POSIX_TEST_OPERATIONS", operations)?;
    }
    if fuzz > 0 {
        fuzz_decoders(fuzz)?;
    }
    Ok(())
}

/// Runs the fuzz target of the FUSE session layer, compiled as cargo-fuzz does.
fn fuzz_decoders(seconds: u64) -> Result<()> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares -Zsanitizer=address -Cdebug-assertions \
        -Ccodegen-units=1 --cfg=fuzzing";
    eprintln!("== random messages for {seconds} s");
    let folder = build::workspace_root().join("crates/fuse/fuzz");
    let built = build::release_dir().with_file_name("fuzz");
    let status = build::cargo_command()
        // Of another toolchain than the one that runs this.
        .env_remove("RUSTUP_TOOLCHAIN")
        .args(["+nightly", "build", "--release", "--target", TARGET, "--bin", "decode"])
        .args(["--target-dir".as_ref(), built.as_os_str()])
        .env("RUSTFLAGS", FLAGS)
        .current_dir(&folder)
        .status()?;
    ensure!(status.success(), "the fuzz target does not build");
    // What has led to new code is kept, and tried first the next time.
    let corpus = built.join("corpus");
    std::fs::create_dir_all(&corpus)?;
    let status = std::process::Command::new(built.join(TARGET).join("release/decode"))
        .arg(format!("-max_total_time={seconds}"))
        .args(["-max_len=8192", "-print_final_stats=1"])
        .arg(format!("-artifact_prefix={}/", built.display()))
        .arg(&corpus)
        .status()?;
    ensure!(
        status.success(),
        "the message that a decoder fails on is in {}",
        built.display()
    );
    Ok(())
}

fn simulation(from: u64, seeds: u64) -> Result<()> {
    let status = build::cargo_command()
        .args(["run", "--release", "--package", "lazarette-simulation", "--", "soak"])
        .args([format!("--from={from}"), format!("--seeds={seeds}")])
        .current_dir(build::workspace_root())
        .status()?;
    ensure!(status.success(), "the simulation has failed");
    Ok(())
}

/// Runs tests of one test program whose names contain `filter`, `count` times what they do otherwise.
fn repeat(program: &str, filter: &str, variable: &str, count: u64) -> Result<()> {
    eprintln!("== {filter}, {count} times");
    let started = Instant::now();
    // Selected as in `cargo xtask test`: nothing is compiled anew.
    let status = build::cargo_command()
        .args([
            "test",
            "--workspace",
            "--features=lazarette-e2e/machine",
            "--test",
            program,
        ])
        .args(["--", "--nocapture", filter])
        .env(variable, count.to_string())
        .current_dir(build::workspace_root())
        .status()?;
    ensure!(status.success(), "{filter} failed with {variable}={count}");
    eprintln!("== {filter} took {:.0} s", started.elapsed().as_secs_f32());
    Ok(())
}
