//! The FUSE session layer beside other pass-through file systems.

use super::disk::Disk;
use super::drop_caches;
use super::rivals::{self, Control, Mounted, System};
use anyhow::{Context, Result, bail, ensure};
use lazarette_workload::{Phase, Work};
use std::fs;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Args {
    /// How often every row is measured; the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only rows whose names contain this, and those that they need files of
    #[arg(long, default_value = "")]
    only: String,
    /// Where the files live; must not exist
    #[arg(long, default_value = "/var/tmp/lazarette-bench-fuse")]
    dir: PathBuf,
}

/// What is forgotten before a row.
#[derive(Clone, Copy, PartialEq)]
enum Before {
    Nothing,
    /// The system is mounted anew: its kernel side knows no name and no data, but they are in memory
    /// on the side of the disk, so that nothing but FUSE is measured.
    Mount,
    /// That, and the data have to come from the disk.
    Disk,
}

struct Row {
    name: &'static str,
    phase: Phase,
    processes: usize,
    /// Operations of all processes.
    total: usize,
    folder: &'static str,
    before: Before,
}

impl Row {
    /// Whether its files lie in memory: making a name in a file system of a disk takes longer than all of FUSE,
    /// and in different places of it differently long.
    fn in_memory(&self) -> bool {
        !matches!(self.phase, Phase::StreamWrite | Phase::StreamRead | Phase::RandomRead)
    }
}

const fn row(
    name: &'static str,
    phase: Phase,
    processes: usize,
    total: usize,
    folder: &'static str,
    before: Before,
) -> Row {
    Row {
        name,
        phase,
        processes,
        total,
        folder,
        before,
    }
}

/// Bytes of the file systems that everything lies on.
const DISK: u64 = 8 << 30;
const MEMORY: u64 = 1 << 30;
/// Files of a row: a pass-through holds a descriptor of each, and many machines allow 20000.
const FILES: usize = 12_000;
/// Small files with content.
const SMALL: usize = 6_000;
/// MiB of the stream.
const STREAM: usize = 1024;

/// In this order: most rows need what the ones before them made.
const ROWS: [Row; 20] = [
    row("create, 1 process", Phase::Create, 1, FILES, "one", Before::Nothing),
    row(
        "stat, names not known, 1 process",
        Phase::Stat,
        1,
        FILES,
        "one",
        Before::Mount,
    ),
    row(
        "look up missing names, 1 process",
        Phase::Missing,
        1,
        FILES,
        "one",
        Before::Nothing,
    ),
    row(
        "open + close, names not known, 1 process",
        Phase::OpenClose,
        1,
        FILES,
        "one",
        Before::Mount,
    ),
    row(
        "unlink, names not known, 1 process",
        Phase::Unlink,
        1,
        FILES,
        "one",
        Before::Mount,
    ),
    row("mkdir, 1 process", Phase::Mkdir, 1, SMALL, "folders", Before::Nothing),
    row("create, 8 processes", Phase::Create, 8, FILES, "eight", Before::Nothing),
    row(
        "stat, names not known, 8 processes",
        Phase::Stat,
        8,
        FILES,
        "eight",
        Before::Mount,
    ),
    row(
        "open + close, names not known, 8 processes",
        Phase::OpenClose,
        8,
        FILES,
        "eight",
        Before::Mount,
    ),
    row(
        "unlink, names not known, 8 processes",
        Phase::Unlink,
        8,
        FILES,
        "eight",
        Before::Mount,
    ),
    row(
        "create + write 4 KiB + close, 1 process",
        Phase::WriteSmall,
        1,
        SMALL,
        "small",
        Before::Nothing,
    ),
    row(
        "create + write 4 KiB + close, 8 processes",
        Phase::WriteSmall,
        8,
        SMALL,
        "smalls",
        Before::Nothing,
    ),
    row(
        "open + read 4 KiB + close, 1 process",
        Phase::ReadSmall,
        1,
        SMALL,
        "small",
        Before::Mount,
    ),
    row(
        "open + read 4 KiB + close, 8 processes",
        Phase::ReadSmall,
        8,
        SMALL,
        "smalls",
        Before::Mount,
    ),
    row(
        "stream write, 1 MiB each",
        Phase::StreamWrite,
        1,
        STREAM,
        "stream",
        Before::Nothing,
    ),
    row(
        "stream read, 1 MiB each",
        Phase::StreamRead,
        1,
        STREAM,
        "stream",
        Before::Mount,
    ),
    row(
        "random read 4 KiB, 1 process",
        Phase::RandomRead,
        1,
        32_768,
        "stream",
        Before::Mount,
    ),
    row(
        "random read 4 KiB, 16 processes",
        Phase::RandomRead,
        16,
        65_536,
        "stream",
        Before::Mount,
    ),
    row(
        "random read 4 KiB from disk, 1 process",
        Phase::RandomRead,
        1,
        16_384,
        "stream",
        Before::Disk,
    ),
    row(
        "random read 4 KiB from disk, 16 processes",
        Phase::RandomRead,
        16,
        65_536,
        "stream",
        Before::Disk,
    ),
];

/// One row of one system in one round.
#[derive(Clone, Copy)]
struct Sample {
    /// Operations a second.
    rate: f64,
    /// Microseconds of the server's processor time for one operation.
    processor: f64,
}

/// One system's results.
#[derive(Default)]
struct Results {
    /// For each row, the rounds.
    samples: [Vec<Sample>; ROWS.len()],
    /// Bytes.
    peak_memory: u64,
}

pub(super) async fn run(args: Args) -> Result<()> {
    let dir = &args.dir;
    ensure!(
        !dir.exists(),
        "{} exists; delete it or use another --dir",
        dir.display()
    );
    fs::create_dir_all(dir)?;
    let done = prepare_and_measure(&args).await;
    let cleaned = fs::remove_dir_all(dir).with_context(|| format!("delete {}", dir.display()));
    done.and(cleaned)
}

async fn prepare_and_measure(args: &Args) -> Result<()> {
    super::allow_many_files()?;
    let places = [
        (true, Disk::in_memory(&args.dir, MEMORY)?),
        (false, Disk::mount(&args.dir, DISK).await?),
    ];
    let control = Control::mount(args.dir.join("connections"))?;
    let mut results = Vec::new();
    let mut systems = Vec::new();
    for (in_memory, place) in &places {
        systems = rivals::all(&args.dir, place).await?;
        results.resize_with(systems.len(), Results::default);
        let measured = tokio::select! {
            measured = measure(&systems, &control, args, *in_memory, &mut results) => measured,
            signal = tokio::signal::ctrl_c() => signal.context("wait for signals").and_then(|()| bail!("interrupted")),
        };
        for system in &systems {
            system.unmount().await?;
        }
        measured?;
    }
    print(&systems, &results, args.rounds)
}

/// Systems take turns at every row, each round with another one first.
async fn measure(
    systems: &[System],
    control: &Control,
    args: &Args,
    in_memory: bool,
    results: &mut [Results],
) -> Result<()> {
    let rounds = args.rounds;
    for round in 0..rounds as usize {
        let mut mounted = Vec::new();
        for system in systems {
            system.empty()?;
            mounted.push(system.mount(control).await?);
        }
        for (number, row) in ROWS.iter().enumerate() {
            let mut later = ROWS[number..].iter().filter(|later| later.folder == row.folder);
            if row.in_memory() != in_memory || !later.any(|later| later.name.contains(&args.only)) {
                continue;
            }
            eprintln!("round {} of {rounds}: {}", round + 1, row.name);
            for turn in 0..systems.len() {
                let turn = (turn + round) % systems.len();
                let (system, server, result) = (&systems[turn], &mut mounted[turn], &mut results[turn]);
                if row.before != Before::Nothing {
                    result.note_memory(server)?;
                    system.unmount().await?;
                    *server = system.mount(control).await?;
                }
                match row.before {
                    Before::Disk => drop_caches("3")?,
                    _ => rustix::fs::sync(),
                }
                result.samples[number].push(sample(system, server, row).await?);
            }
        }
        for ((system, server), result) in systems.iter().zip(&mounted).zip(&mut *results) {
            result.note_memory(server)?;
            system.unmount().await?;
        }
    }
    Ok(())
}

async fn sample(system: &System, server: &Mounted, row: &Row) -> Result<Sample> {
    let dir = system.mountpoint().join(row.folder);
    if !dir.exists() {
        fs::create_dir(&dir)?;
    }
    let work = Work {
        phase: row.phase,
        dir,
        processes: row.processes,
        count: row.total / row.processes,
        limit: None,
    };
    server.settle().await?;
    let before = server.processor()?;
    let timed = tokio::task::spawn_blocking(move || work.run(&rivals::workload()))
        .await?
        .with_context(|| format!("{}: {}", system.name, row.name))?;
    server.settle().await?;
    let processor = server.processor()? - before;
    Ok(Sample {
        rate: timed.rate(),
        processor: processor.as_secs_f64() * 1e6 / timed.operations as f64,
    })
}

impl Results {
    fn note_memory(&mut self, server: &Mounted) -> Result<()> {
        self.peak_memory = self.peak_memory.max(server.peak_memory()?);
        Ok(())
    }

    fn median(&self, row: usize, value: fn(&Sample) -> f64) -> f64 {
        let mut values: Vec<_> = self.samples[row].iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        match values.len() % 2 {
            0 => (values[middle - 1] + values[middle]) / 2.0,
            _ => values[middle],
        }
    }

    /// How many times the other's rate: of the medians, and the extremes of single rounds.
    fn ratio(&self, other: &Self, row: usize) -> String {
        let rounds = self.samples[row].iter().zip(&other.samples[row]);
        let ratios = rounds.map(|(own, other)| own.rate / other.rate);
        let (least, most) = ratios.fold((f64::MAX, 0.0_f64), |(least, most), ratio| {
            (least.min(ratio), most.max(ratio))
        });
        let medians = self.median(row, |sample| sample.rate) / other.median(row, |sample| sample.rate);
        format!("{medians:.2} ({least:.2}–{most:.2})")
    }
}

/// Whose rate is divided by whose, by the places of the systems.
const RATIOS: [(usize, usize); 4] = [(3, 0), (3, 1), (3, 2), (4, 1)];

fn print(systems: &[System], results: &[Results], rounds: u32) -> Result<()> {
    let load = fs::read_to_string("/proc/loadavg")?;
    println!("{rounds} rounds; load average at the end {}", load.trim());
    for (system, result) in systems.iter().zip(results) {
        let memory = result.peak_memory as f64 / f64::from(1 << 20);
        println!("- {}: {}; at most {memory:.1} MiB resident", system.name, system.about);
    }
    let names = |what: &str| {
        systems
            .iter()
            .map(|system| format!(" {}{what} |", system.name))
            .collect::<String>()
    };
    let ratios: String = RATIOS
        .map(|(one, other)| format!(" {} to {} |", systems[one].name, systems[other].name))
        .concat();
    println!("\n| row |{}{ratios}{}", names(", /s"), names(", CPU µs"));
    println!("|---|{}", "--:|".repeat(2 * systems.len() + RATIOS.len()));
    for (number, row) in ROWS.iter().enumerate() {
        if results[0].samples[number].is_empty() {
            continue;
        }
        let rates = results
            .iter()
            .map(|result| format!(" {:.0} |", result.median(number, |sample| sample.rate)));
        let ratios = RATIOS.map(|(one, other)| format!(" {} |", results[one].ratio(&results[other], number)));
        let costs = results
            .iter()
            .map(|result| format!(" {:.1} |", result.median(number, |sample| sample.processor)));
        println!(
            "| {} |{}",
            row.name,
            rates.chain(ratios).chain(costs).collect::<String>()
        );
    }
    Ok(())
}
