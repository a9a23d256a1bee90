//! Lazarette beside other shared file systems, pass-throughs and the local disk.

mod cephfs;
mod cost;
mod glusterfs;
mod moosefs;
mod place;
mod rows;
mod source;
mod system;
mod table;

use super::disk::Disk;
use super::rivals;
use anyhow::{Context, Result, bail, ensure};
use lazarette_e2e::{cmd, debian};
use rows::{Amount, Bench, Part, Turn};
use rustix::fs::{FlockOperation, flock};
use source::Source;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use system::{Kind, System};
use table::Results;
use tokio::signal::unix::{SignalKind, signal};

#[derive(clap::Args)]
// The arguments that it is part of are called the same.
#[group(skip)]
pub(super) struct Args {
    /// What is compared, in this order in every round
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Kind::Local, Kind::Lazarette])]
    systems: Vec<Kind>,
    /// What the others are compared with [default: the first one]
    #[arg(long, value_enum)]
    baseline: Option<Kind>,
    /// How often everything is measured; medians count
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// What is measured
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Part::Meta, Part::Small, Part::Stream, Part::Real])]
    parts: Vec<Part>,
    /// Longest time of a phase with many operations, seconds
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// MiB of the large file, a power of two
    #[arg(long, default_value_t = 512)]
    stream: usize,
    /// GiB of the disk that all data lies on, and of all OSDs of CephFS together
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    disk: u64,
    /// Longest wait for others to leave the processors alone before a turn, seconds
    #[arg(long, default_value_t = 300)]
    patience: u64,
    /// Very little work, to see that everything runs; the numbers mean nothing
    #[arg(long)]
    quick: bool,
    /// Where the tables and every single result go as well
    #[arg(long)]
    out: Option<PathBuf>,
    /// Where everything lives; must not exist, or be left behind by an earlier run
    #[arg(long, default_value = "/var/tmp/lazarette-bench")]
    dir: PathBuf,
}

/// Tells a folder of the benchmark's from any other, and is locked while it is in use.
const MARK: &str = "this-is-deleted-by-the-benchmark";
/// What is kept of a system that failed.
const LOGS: &str = "logs";
/// Longest time of one turn.
const TURN: Duration = Duration::from_secs(1800);

pub(super) async fn run(mut args: Args) -> Result<()> {
    args.systems.dedup();
    let baseline = args.baseline.unwrap_or(args.systems[0]);
    let base = args.systems.iter().position(|kind| *kind == baseline);
    let base = base.with_context(|| format!("--baseline {} is not among the --systems", baseline.name()))?;
    ensure!(
        args.stream.is_power_of_two(),
        "--stream is {}; use a power of two",
        args.stream
    );
    if args.quick {
        (args.seconds, args.stream) = (0.3, 32);
    }
    ensure!(
        args.seconds > 0.0 && args.seconds <= 600.0,
        "--seconds is {}; use more than 0 and at most 600",
        args.seconds
    );
    let _lock = take_over(&args.dir)?;
    place::clean(&args.dir).await?;
    empty(&args.dir, None)?;
    let mut terminated = signal(SignalKind::terminate())?;
    let measured = tokio::select! {
        measured = measure(&args) => measured,
        signal = tokio::signal::ctrl_c() => signal.context("wait for signals").and_then(|()| bail!("interrupted")),
        _ = terminated.recv() => Err(anyhow::anyhow!("terminated")),
    };
    place::clean(&args.dir).await?;
    if measured.is_err() {
        empty(&args.dir, Some(LOGS))?;
    }
    let logs = || format!("logs, if any, are in {}", args.dir.join(LOGS).display());
    let (results, source) = measured.with_context(logs)?;
    let text = format!("{}\n{}", head(&args, &source), table::markdown(&results, base));
    fs::remove_dir_all(&args.dir).with_context(|| format!("delete {}", args.dir.display()))?;
    if let Some(out) = &args.out {
        fs::write(out.join("compare.md"), &text)?;
    }
    print!("{text}");
    Ok(())
}

/// Makes the folder or takes the one of a run that has ended.
fn take_over(dir: &Path) -> Result<File> {
    let mark = dir.join(MARK);
    ensure!(
        !dir.exists() || mark.exists(),
        "{} is not this benchmark's; delete it or use another --dir",
        dir.display()
    );
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let file = File::create(&mark).with_context(|| format!("create {}", mark.display()))?;
    let locked = flock(&file, FlockOperation::NonBlockingLockExclusive);
    locked.with_context(|| format!("another run uses {}", dir.display()))?;
    Ok(file)
}

/// Deletes all but the mark, and what is to be kept.
fn empty(dir: &Path, kept: Option<&str>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.ends_with(MARK) || kept.is_some_and(|kept| path.ends_with(kept)) {
            continue;
        }
        let deleted = match path.is_dir() {
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        };
        deleted.with_context(|| format!("delete {}", path.display()))?;
    }
    Ok(())
}

async fn measure(args: &Args) -> Result<(Vec<Results>, Source)> {
    debian::ensure(&["iproute2", "util-linux"]).await?;
    let workload = rivals::build_ours().await?.join("lazarette-workload");
    super::allow_many_files()?;
    let mut results = Vec::new();
    for kind in &args.systems {
        kind.prepare().await?;
        results.push(Results {
            name: kind.name(),
            about: kind.about().await?,
            turns: Vec::new(),
        });
    }
    if let Some(out) = &args.out {
        fs::create_dir_all(out).with_context(|| format!("create {}", out.display()))?;
    }
    let source = Source::make(&args.dir).await?;
    place::loopback("add").run().await?;
    for round in 1..=args.rounds {
        for (kind, results) in args.systems.iter().zip(&mut results) {
            let name = kind.name();
            let waited = cost::wait_until_quiet(Duration::from_secs(args.patience)).await?;
            let started = Instant::now();
            let disk = Disk::mount(&args.dir, args.disk << 30).await?;
            let turn = tokio::time::timeout(TURN, turn(args, *kind, &disk, &source, &workload))
                .await
                .unwrap_or_else(|_| bail!("a turn took longer than {TURN:?}"));
            if turn.is_err() {
                keep_logs(args, name).await?;
            }
            place::end(&args.dir).await?;
            let turn = turn.with_context(|| format!("round {round}, {name}"))?;
            eprintln!(
                "round {round} of {}: {name}: waited {:.0} s for a quiet machine, took {:.0} s, \
                 others used {:.2} processors, {} rows failed",
                args.rounds,
                waited.as_secs_f64(),
                started.elapsed().as_secs_f64(),
                turn.others,
                turn.failures.len()
            );
            if let Some(out) = &args.out {
                fs::write(
                    out.join(format!("{round}-{name}.json")),
                    serde_json::to_vec_pretty(&turn)?,
                )?;
            }
            results.turns.push(turn);
        }
    }
    Ok((results, source))
}

/// One system from its start to the last measurement.
async fn turn(args: &Args, kind: Kind, disk: &Disk, source: &Source, workload: &Path) -> Result<Turn> {
    let system = System::start(kind, &args.dir, disk).await.context("start")?;
    let bench = Bench {
        system: &system,
        source,
        workload: workload.to_owned(),
        amount: Amount {
            limit: Duration::from_secs_f64(args.seconds),
            stream: args.stream,
        },
        turn: Turn::default(),
    };
    bench.run(&args.parts).await
}

async fn keep_logs(args: &Args, name: &str) -> Result<()> {
    let logs = args.dir.join("disk").join(name).join(LOGS);
    let kept = args.dir.join(LOGS);
    if logs.exists() {
        cmd!["cp", "--recursive", "--no-target-directory", logs, kept]
            .run()
            .await?;
    }
    Ok(())
}

fn head(args: &Args, source: &Source) -> String {
    let command: Vec<_> = std::env::args().skip(1).collect();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "`cargo xtask {}`: {} rounds, systems in turns, each new and empty; phases of at most {} s; \
         a large file of {} MiB; a source tree of {} files and folders, {:.1} MB; {processors} processors, \
         Linux {}, one XFS on a loop device.{}\n",
        command.join(" "),
        args.rounds,
        args.seconds,
        args.stream,
        source.names,
        source.bytes as f64 / 1e6,
        kernel.trim(),
        if args.quick {
            " **Quick: the numbers mean nothing.**"
        } else {
            ""
        }
    )
}
