//! What is measured, in this order: most rows need what the ones before them made.

use super::cost::{self, Cost, Memory, Since};
use super::source::Source;
use super::system::{Forget, System};
use anyhow::{Context, Result, ensure};
use lazarette_e2e::cmd;
use lazarette_e2e::command::Cmd;
use lazarette_workload::{Phase, Timed, Work};
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Groups of rows that can be measured alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Part {
    /// Names and attributes
    Meta,
    /// Files of 4 KiB
    Small,
    /// One large file
    Stream,
    /// Programs that people use
    Real,
}

/// How much is done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Amount {
    /// Of a phase with many operations.
    pub(super) limit: Duration,
    /// MiB, a power of two.
    pub(super) stream: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Unit {
    #[serde(rename = "/s")]
    PerSecond,
    #[serde(rename = "MB/s")]
    Megabytes,
    #[serde(rename = "s")]
    Seconds,
}

/// One row of one turn.
#[derive(Debug, Serialize)]
pub(super) struct Sample {
    pub(super) row: String,
    pub(super) unit: Unit,
    pub(super) value: f64,
    pub(super) operations: usize,
    pub(super) cost: Cost,
    /// Microseconds that half and 99 % of the operations did not exceed.
    pub(super) latency: Option<(f64, f64)>,
}

/// What one turn of a system has given.
#[derive(Debug, Default, Serialize)]
pub(super) struct Turn {
    pub(super) samples: Vec<Sample>,
    pub(super) failures: Vec<String>,
    pub(super) memory: Memory,
    pub(super) seconds: f64,
    /// Processors that others used meanwhile.
    pub(super) others: f64,
    /// Of the whole turn, after the start of the system.
    pub(super) cost: Cost,
    /// Processor time after each part, before the system rested.
    pub(super) left_over: Vec<(Part, Duration)>,
}

impl Serialize for Part {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{self:?}"))
    }
}

pub(super) struct Bench<'a> {
    pub(super) system: &'a System,
    pub(super) source: &'a Source,
    pub(super) workload: PathBuf,
    pub(super) amount: Amount,
    pub(super) turn: Turn,
}

/// Below the 20000 open files that many machines allow: pass-throughs hold one for each name.
const NAMES: usize = 15_000;
const SMALL: usize = 9_000;

impl Bench<'_> {
    /// Measures the parts. What fails is noted, and does not keep the rest from being measured.
    pub(super) async fn run(mut self, parts: &[Part]) -> Result<Turn> {
        let started = Instant::now();
        let since = Since::now(&self.system.place)?;
        for part in parts {
            match part {
                Part::Meta => {
                    self.meta(1).await;
                    self.meta(8).await;
                }
                Part::Small => {
                    self.small(1).await;
                    self.small(8).await;
                }
                Part::Stream => self.stream().await,
                Part::Real => self.real().await,
            }
            let after = Since::now(&self.system.place)?;
            cost::wait_until_idle(&self.system.place).await?;
            let left_over = after.cost(&self.system.place)?.system;
            self.turn.left_over.push((*part, left_over));
            self.turn.memory.look(&self.system.place);
        }
        self.turn.cost = since.cost(&self.system.place)?;
        self.turn.seconds = started.elapsed().as_secs_f64();
        self.turn.others = self.turn.cost.others.as_secs_f64() / self.turn.seconds;
        Ok(self.turn)
    }

    async fn meta(&mut self, processes: usize) {
        let folder = format!("names-{processes}");
        let count = NAMES / processes;
        for (row, phase, forget) in [
            ("create", Phase::Create, Forget::Nothing),
            ("stat, cold", Phase::Stat, Forget::Names),
            ("ls -l, cold", Phase::ListLong, Forget::Names),
            ("stat, warm", Phase::Stat, Forget::Nothing),
            ("open + close", Phase::OpenClose, Forget::Nothing),
            ("rename", Phase::Rename, Forget::Nothing),
            ("unlink", Phase::UnlinkListed, Forget::Nothing),
            ("mkdir", Phase::Mkdir, Forget::Nothing),
            ("rmdir", Phase::Rmdir, Forget::Nothing),
        ] {
            self.rate(row, phase, &folder, (processes, count), forget).await;
        }
    }

    async fn small(&mut self, processes: usize) {
        let (plain, synced) = (format!("small-{processes}"), format!("synced-{processes}"));
        let count = SMALL / processes;
        for (row, phase, folder, forget) in [
            ("write 4 KiB file", Phase::WriteSmall, &plain, Forget::Nothing),
            (
                "write 4 KiB file + fsync",
                Phase::WriteSmallSync,
                &synced,
                Forget::Nothing,
            ),
            ("read 4 KiB file, cold", Phase::ReadSmall, &plain, Forget::All),
            ("read 4 KiB file, warm", Phase::ReadSmall, &plain, Forget::Nothing),
        ] {
            self.rate(row, phase, folder, (processes, count), forget).await;
        }
    }

    async fn stream(&mut self) {
        for (row, phase, forget) in [
            ("stream write + fsync", Phase::StreamWriteSync, Forget::Nothing),
            ("stream read, cold", Phase::StreamRead, Forget::All),
            ("stream read, again", Phase::StreamRead, Forget::Nothing),
        ] {
            // Whole, because the rows after it need a file of a known size.
            let work = self.work(phase, "stream", (1, self.amount.stream), None);
            self.phase(row.into(), Unit::Megabytes, work, forget).await;
        }
        let blocks = self.amount.stream << 8;
        for (row, phase, processes, forget) in [
            ("random read 4 KiB, cold", Phase::RandomRead, 1, Forget::All),
            ("random read 4 KiB, cold", Phase::RandomRead, 16, Forget::All),
            (
                "random write 4 KiB + fdatasync",
                Phase::RandomWriteSync,
                1,
                Forget::Nothing,
            ),
            ("random write 4 KiB, fsync last", Phase::RandomWrite, 1, Forget::Nothing),
        ] {
            let amount = (processes, blocks / 4 / processes);
            self.rate(row, phase, "stream", amount, forget).await;
        }
    }

    fn work(&self, phase: Phase, folder: &str, (processes, count): (usize, usize), limit: Option<Duration>) -> Work {
        Work {
            phase,
            dir: self.system.folder().join(folder),
            processes,
            count,
            limit,
        }
    }

    async fn rate(&mut self, row: &str, phase: Phase, folder: &str, amount: (usize, usize), forget: Forget) {
        let row = match amount.0 {
            1 => format!("{row}, 1 process"),
            processes => format!("{row}, {processes} processes"),
        };
        let work = self.work(phase, folder, amount, Some(self.amount.limit));
        self.phase(row, Unit::PerSecond, work, forget).await;
    }

    async fn phase(&mut self, row: String, unit: Unit, work: Work, forget: Forget) {
        let program = self.workload.clone();
        let run = async || -> Result<Timed> {
            fs::create_dir_all(&work.dir)?;
            let work = work.clone();
            tokio::task::spawn_blocking(move || work.run(&program)).await?
        };
        let result = self.charged(forget, run).await.map(|(timed, cost)| Sample {
            row: row.clone(),
            unit,
            value: match unit {
                Unit::Megabytes => timed.rate() * f64::from(1 << 20) / 1e6,
                Unit::PerSecond | Unit::Seconds => timed.rate(),
            },
            operations: timed.operations,
            cost,
            latency: Some((
                timed.latencies.quantile(0.5) as f64 / 1e3,
                timed.latencies.quantile(0.99) as f64 / 1e3,
            )),
        });
        self.note(&row, result);
    }

    async fn real(&mut self) {
        let folder = self.system.folder().join("real");
        let source = self.source;
        let (tree, clone) = (folder.join(Source::FOLDER), folder.join("clone"));
        let git = || cmd!["git", "-c", "safe.directory=*"];
        let search = || cmd!["grep", "--recursive", "--count", "no such word in any file", &tree];
        for (row, command, forget) in [
            (
                "untar",
                cmd![
                    "tar",
                    "--extract",
                    "--no-same-owner",
                    "--file",
                    &source.archive,
                    "--directory",
                    &folder
                ],
                Forget::Nothing,
            ),
            ("find, cold", cmd!["find", &tree], Forget::All),
            ("find, warm", cmd!["find", &tree], Forget::Nothing),
            ("grep -r, cold", search(), Forget::All),
            ("grep -r, warm", search(), Forget::Nothing),
            ("rm -r", cmd!["rm", "--recursive", &tree], Forget::Nothing),
            (
                "git clone",
                git()
                    .args(["clone", "--quiet", "--no-hardlinks"])
                    .arg(&source.repository)
                    .arg(&clone),
                Forget::Nothing,
            ),
            (
                "git status, cold",
                git().arg("-C").arg(&clone).args(["status", "--porcelain"]),
                Forget::All,
            ),
            (
                "git status, warm",
                git().arg("-C").arg(&clone).args(["status", "--porcelain"]),
                Forget::Nothing,
            ),
        ] {
            self.program(row, command, &folder, forget).await;
        }
        self.sqlite(&folder).await;
    }

    async fn program(&mut self, row: &str, command: Cmd, folder: &Path, forget: Forget) {
        let run = async || -> Result<f64> {
            fs::create_dir_all(folder)?;
            let started = Instant::now();
            let output = command.clone().limit(Duration::from_secs(300)).output().await?;
            let seconds = started.elapsed().as_secs_f64();
            // grep says 1 if nothing is found, which is so.
            let nothing_found = row.starts_with("grep") && output.code == Some(1);
            ensure!(output.code == Some(0) || nothing_found, "{}", output.stderr);
            let listed = output.stdout.lines().count();
            let wanted = self.source.names;
            ensure!(
                !row.starts_with("find") || listed == wanted,
                "{listed} names instead of {wanted}"
            );
            Ok(seconds)
        };
        let result = self.charged(forget, run).await.map(|(seconds, cost)| Sample {
            row: row.to_owned(),
            unit: Unit::Seconds,
            value: seconds,
            operations: self.source.names,
            cost,
            latency: None,
        });
        self.note(row, result);
    }

    async fn sqlite(&mut self, folder: &Path) {
        const ROW: &str = "sqlite transaction";
        const SCRIPT: &str = "\
import sqlite3, sys, time
base = sqlite3.connect(sys.argv[1], isolation_level=None)
base.execute('create table t (a integer primary key, b text)')
times, start = [], time.monotonic()
while len(times) < 1000 and time.monotonic() - start < float(sys.argv[2]):
    before = time.monotonic()
    base.execute('insert into t (b) values (?)', ('x' * 100,))
    times.append(time.monotonic() - before)
seconds = time.monotonic() - start
assert base.execute('select count(*) from t').fetchone()[0] == len(times)
times.sort()
print(len(times), seconds, times[len(times) // 2] * 1e6, times[len(times) * 99 // 100] * 1e6)
";
        let limit = 2.0 * self.amount.limit.as_secs_f64();
        let run = async || -> Result<Vec<f64>> {
            let base = folder.join("base.sqlite");
            let said = cmd!["python3", "-c", SCRIPT, base, limit.to_string()].run().await?;
            Ok(said.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
        };
        let result = self.charged(Forget::Nothing, run).await.and_then(|(said, cost)| {
            let [count, seconds, median, most] = said[..] else {
                anyhow::bail!("unexpected: {said:?}");
            };
            Ok(Sample {
                row: ROW.into(),
                unit: Unit::PerSecond,
                value: count / seconds,
                operations: count as usize,
                cost,
                latency: Some((median, most)),
            })
        });
        self.note(ROW, result);
    }

    /// Runs something and says what it has cost, what it left to be written included.
    async fn charged<T>(&mut self, forget: Forget, run: impl AsyncFnOnce() -> Result<T>) -> Result<(T, Cost)> {
        let place = &self.system.place;
        self.turn.memory.look(place);
        self.system.forget(forget).await.context("forget")?;
        let since = Since::now(place)?;
        let result = run().await?;
        rustix::fs::sync();
        Ok((result, since.cost(place)?))
    }

    fn note(&mut self, row: &str, result: Result<Sample>) {
        match result {
            Ok(sample) => self.turn.samples.push(sample),
            Err(error) => {
                eprintln!("failed: {row}: {error:#}");
                self.turn.failures.push(format!("{row}: {error:#}"));
            }
        }
    }
}
