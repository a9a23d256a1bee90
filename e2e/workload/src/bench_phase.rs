use crate::latency::Latencies;
use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{Advice, Mode, OFlags};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

/// Bytes of a small file, and of one random read.
const SMALL: usize = 4096;
/// Bytes of one write or read of a stream.
const BLOCK: usize = 1 << 20;
/// What a process says once it only waits for the start.
const READY: &str = "ready";

/// One kind of operation, done again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Create an empty file that is not there.
    Create,
    /// Attributes of a file by its name.
    Stat,
    /// Attributes of a name that is not there.
    Missing,
    /// Open a file for reading and close it.
    OpenClose,
    /// The next entry of the folder and its attributes.
    ListLong,
    /// Give a file another name in its folder.
    Rename,
    /// Remove a file.
    Unlink,
    /// Remove a file whose name was listed before the start, as `rm -r` does.
    UnlinkListed,
    /// Create a folder.
    Mkdir,
    /// Remove a folder.
    Rmdir,
    /// Create a file with 4 KiB and close it.
    WriteSmall,
    /// Create a file with 4 KiB, fsync and close it.
    WriteSmallSync,
    /// Open a file, read its 4 KiB and close it.
    ReadSmall,
    /// Write 1 MiB at the end of the stream, which is created.
    StreamWrite,
    /// The same, with an fsync at the end of the phase.
    StreamWriteSync,
    /// Read the next 1 MiB of the stream.
    StreamRead,
    /// Read 4 KiB of the stream, no place twice, in no order, with the kernel told so.
    RandomRead,
    /// Write 4 KiB of the stream, no place twice, in no order, with an fsync at the end of the phase.
    RandomWrite,
    /// The same, with an fdatasync after each and none at the end.
    RandomWriteSync,
}

/// A phase in one folder: names of process N are in its folder `pN`, the stream is `stream`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Work {
    /// What is done.
    pub phase: Phase,
    /// The folder, which is there.
    pub dir: PathBuf,
    /// Processes that do it at the same time.
    pub processes: usize,
    /// Operations of each process.
    pub count: usize,
    /// With a limit a process ends also when this time is over or when there are no more names of an
    /// earlier phase, which may have had a limit itself.
    pub limit: Option<Duration>,
}

/// How long a phase took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timed {
    /// Operations of all processes.
    pub operations: usize,
    /// Nanoseconds of the monotonic clock at which the first process began.
    pub begin: u64,
    /// Nanoseconds of the monotonic clock at which the last process ended.
    pub end: u64,
    /// Of each operation, without what a phase does at its end.
    pub latencies: Latencies,
}

impl Timed {
    /// Operations a second.
    pub fn rate(&self) -> f64 {
        self.operations as f64 * 1e9 / (self.end - self.begin).max(1) as f64
    }
}

impl Work {
    /// Does the work in processes of `program`, which is this package's own, and which begin
    /// together. Fails if any operation fails.
    pub fn run(&self, program: &Path) -> Result<Timed> {
        let start = |index| Worker::start(self, program, index);
        let mut workers = (0..self.processes).map(start).collect::<Result<Vec<_>>>()?;
        workers.iter_mut().try_for_each(Worker::wait_until_ready)?;
        workers.iter_mut().try_for_each(Worker::begin)?;
        let timed = workers.into_iter().map(Worker::finish).collect::<Result<Vec<_>>>()?;
        Ok(Timed {
            operations: timed.iter().map(|timed| timed.operations).sum(),
            begin: timed.iter().map(|timed| timed.begin).min().context("no process")?,
            end: timed.iter().map(|timed| timed.end).max().context("no process")?,
            latencies: timed.iter().fold(Latencies::default(), |mut all, timed| {
                all.add(&timed.latencies);
                all
            }),
        })
    }

    /// The part of one process: prepares, says that it is ready, waits for a line of standard input,
    /// works.
    pub fn take_part(&self, index: usize) -> Result<Timed> {
        let mut part = Part::prepare(self, index)?;
        println!("{READY}");
        let mut line = String::new();
        ensure!(std::io::stdin().read_line(&mut line)? > 0, "nobody waits any more");
        part.run()
    }
}

/// A process as its parent sees it. It ends by itself when the parent is gone.
struct Worker {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Worker {
    fn start(work: &Work, program: &Path, index: usize) -> Result<Self> {
        let mut child = Command::new(program)
            .args(["phase", &serde_json::to_string(work)?, &index.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let output = child.stdout.take().context("no standard output")?;
        Ok(Self {
            child,
            output: BufReader::new(output),
        })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        if line.is_empty() {
            bail!("a process ended early: {}", self.child.wait()?);
        }
        Ok(line)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let line = self.line()?;
        ensure!(line.trim() == READY, "a process said {line}");
        Ok(())
    }

    fn begin(&mut self) -> Result<()> {
        let input = self.child.stdin.as_mut().context("no standard input")?;
        Ok(input.write_all(b"\n")?)
    }

    fn finish(mut self) -> Result<Timed> {
        let timed = serde_json::from_str(&self.line()?)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "a process ended with {status}");
        Ok(timed)
    }
}

/// One process's part, ready to run.
struct Part {
    phase: Phase,
    count: usize,
    limit: Option<Duration>,
    /// The names it works on, for phases with names.
    paths: Vec<PathBuf>,
    /// The folder of those names.
    folder: PathBuf,
    /// What is left of the folder's entries, once it is open.
    entries: Option<fs::ReadDir>,
    /// The stream, for phases on it.
    stream: Option<OwnedFd>,
    /// Offsets of random reads.
    offsets: Vec<u64>,
    buffer: Vec<u8>,
}

impl Part {
    fn prepare(work: &Work, index: usize) -> Result<Self> {
        let mut part = Self {
            phase: work.phase,
            count: work.count,
            limit: work.limit,
            paths: Vec::new(),
            folder: work.dir.join(format!("p{index}")),
            entries: None,
            stream: None,
            offsets: Vec::new(),
            buffer: noise(SMALL),
        };
        let stream = work.dir.join("stream");
        match work.phase {
            Phase::StreamWrite | Phase::StreamWriteSync => {
                part.buffer = noise(BLOCK);
                part.stream = Some(open(&stream, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC)?);
            }
            Phase::StreamRead => {
                part.buffer = vec![0; BLOCK];
                part.stream = Some(open(&stream, OFlags::RDONLY)?);
            }
            Phase::RandomRead => {
                let file = open(&stream, OFlags::RDONLY)?;
                // Of the same size for every system: else read-ahead would be what is measured.
                rustix::fs::fadvise(&file, 0, None, Advice::Random)?;
                part.offsets = offsets(fs::metadata(&stream)?.len(), work, index)?;
                part.stream = Some(file);
            }
            Phase::RandomWrite | Phase::RandomWriteSync => {
                part.offsets = offsets(fs::metadata(&stream)?.len(), work, index)?;
                part.stream = Some(open(&stream, OFlags::WRONLY)?);
            }
            Phase::UnlinkListed => part.paths = listed(&part.folder)?,
            Phase::ListLong => {}
            phase => {
                if phase.makes_names() {
                    let folder = &part.folder;
                    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
                }
                part.paths = names(&part.folder, phase, work.count);
            }
        }
        Ok(part)
    }

    fn run(&mut self) -> Result<Timed> {
        let mut latencies = Latencies::default();
        let begin = now();
        let limit = self.limit.map_or(u64::MAX, |limit| begin + limit.as_nanos() as u64);
        let (mut operations, mut last) = (0, begin);
        while operations < self.count && last < limit {
            let more = self
                .operation(operations)
                .with_context(|| format!("{:?} number {operations}", self.phase))?;
            if !more {
                break;
            }
            let now = now();
            latencies.note(now - last);
            (operations, last) = (operations + 1, now);
        }
        ensure!(operations > 0, "{:?} found nothing to work on", self.phase);
        if matches!(self.phase, Phase::StreamWriteSync | Phase::RandomWrite) {
            rustix::fs::fsync(self.stream()?)?;
            last = now();
        }
        Ok(Timed {
            operations,
            begin,
            end: last,
            latencies,
        })
    }

    /// Whether it was done: there may be no more names.
    fn operation(&mut self, number: usize) -> Result<bool> {
        let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        match self.phase {
            Phase::Create => drop(open(self.path(number)?, new)?),
            Phase::Stat => return self.found(rustix::fs::lstat(self.path(number)?)),
            Phase::Missing => match rustix::fs::lstat(self.path(number)?) {
                Err(Errno::NOENT) => {}
                other => bail!("{} is there: {other:?}", self.path(number)?.display()),
            },
            Phase::OpenClose => return self.found(open_existing(self.path(number)?)),
            Phase::ListLong => {
                if self.entries.is_none() {
                    self.entries = Some(fs::read_dir(&self.folder)?);
                }
                match self.entries.as_mut().and_then(Iterator::next) {
                    Some(entry) => fs::symlink_metadata(entry?.path())?,
                    None => return Ok(false),
                };
            }
            Phase::Rename => {
                let path = self.path(number)?;
                return self.found(rustix::fs::rename(path, path.with_extension("renamed")));
            }
            Phase::Unlink => return self.found(rustix::fs::unlink(self.path(number)?)),
            Phase::UnlinkListed => match self.paths.get(number) {
                Some(path) => rustix::fs::unlink(path)?,
                None => return Ok(false),
            },
            Phase::Mkdir => rustix::fs::mkdir(self.path(number)?, Mode::from_raw_mode(0o755))?,
            Phase::Rmdir => return self.found(rustix::fs::rmdir(self.path(number)?)),
            Phase::WriteSmall | Phase::WriteSmallSync => {
                let file = open(self.path(number)?, new)?;
                self.mark(number);
                all(rustix::io::write(&file, &self.buffer)?, SMALL)?;
                if self.phase == Phase::WriteSmallSync {
                    rustix::fs::fsync(&file)?;
                }
            }
            Phase::ReadSmall => match open_existing(self.path(number)?) {
                Ok(file) => all(rustix::io::read(&file, &mut self.buffer[..])?, SMALL)?,
                missing => return self.found(missing),
            },
            Phase::StreamWrite | Phase::StreamWriteSync => {
                self.mark(number);
                all(rustix::io::write(self.stream()?, &self.buffer)?, BLOCK)?;
            }
            Phase::StreamRead => {
                let file = self.stream.as_ref().context("no stream")?;
                all(rustix::io::read(file, &mut self.buffer[..])?, BLOCK)?;
            }
            Phase::RandomRead => {
                let file = self.stream.as_ref().context("no stream")?;
                let count = rustix::io::pread(file, &mut self.buffer[..], self.offsets[number])?;
                all(count, SMALL)?;
            }
            Phase::RandomWrite | Phase::RandomWriteSync => {
                self.mark(number);
                let file = self.stream()?;
                all(rustix::io::pwrite(file, &self.buffer, self.offsets[number])?, SMALL)?;
                if self.phase == Phase::RandomWriteSync {
                    rustix::fs::fdatasync(file)?;
                }
            }
        }
        Ok(true)
    }

    fn path(&self, number: usize) -> Result<&Path> {
        self.paths.get(number).map(PathBuf::as_path).context("no such name")
    }

    /// With a limit, a name that is missing is the end and no error.
    fn found<T>(&self, result: rustix::io::Result<T>) -> Result<bool> {
        match result {
            Err(Errno::NOENT) if self.limit.is_some() => Ok(false),
            other => Ok(other.map(|_| true)?),
        }
    }

    /// Makes what is written next differ from everything written before.
    fn mark(&mut self, number: usize) {
        self.buffer[..8].copy_from_slice(&(number as u64).to_le_bytes());
    }

    fn stream(&self) -> Result<&OwnedFd> {
        self.stream.as_ref().context("no stream")
    }
}

fn open(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o644))
        .with_context(|| format!("open {}", path.display()))
}

fn all(done: usize, wanted: usize) -> Result<()> {
    ensure!(done == wanted, "{done} bytes instead of {wanted}");
    Ok(())
}

fn open_existing(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

impl Phase {
    /// Whether the names are made by it, and the folder of the names with them.
    fn makes_names(self) -> bool {
        use Phase::{Create, Mkdir, WriteSmall, WriteSmallSync};
        matches!(self, Create | Mkdir | WriteSmall | WriteSmallSync)
    }
}

fn names(folder: &Path, phase: Phase, count: usize) -> Vec<PathBuf> {
    let kind = match phase {
        Phase::Missing => "missing",
        Phase::Mkdir | Phase::Rmdir => "folder",
        _ => "file",
    };
    (0..count)
        .map(|number| folder.join(format!("{kind}-{number:06}")))
        .collect()
}

fn listed(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
    Ok(entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?)
}

/// Bytes that cannot be compressed, other ones each time.
fn noise(length: usize) -> Vec<u8> {
    let mut state = now() | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..length / 8).flat_map(|_| next()).collect()
}

/// The part of process `index` of all blocks of the stream in a random order.
fn offsets(bytes: u64, work: &Work, index: usize) -> Result<Vec<u64>> {
    let blocks = bytes / SMALL as u64;
    ensure!(
        blocks.is_power_of_two() && blocks >= (work.processes * work.count) as u64,
        "the stream's {blocks} blocks are not a power of two or too few"
    );
    let first = (index * work.count) as u64;
    Ok((first..first + work.count as u64)
        .map(|number| shuffled(number, blocks) * SMALL as u64)
        .collect())
}

/// Maps each number below `size`, a power of two, to another one, so that neighbours lie far apart:
/// both steps can be undone, so no two numbers meet.
fn shuffled(number: u64, size: u64) -> u64 {
    let half = size.trailing_zeros().div_ceil(2);
    let mut mixed = number;
    for factor in [0x9e37_79b9, 0x85eb_ca6b, 0xc2b2_ae35] {
        mixed = mixed.wrapping_mul(factor) % size;
        mixed ^= mixed >> half;
    }
    mixed
}

fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn run(dir: &Path, phase: Phase, count: usize) -> Result<Timed> {
        let work = Work {
            phase,
            dir: dir.into(),
            processes: 1,
            count,
            limit: None,
        };
        Part::prepare(&work, 0)?.run()
    }

    #[test]
    fn phases_follow_one_another() {
        let dir = tempfile::tempdir().unwrap();
        let phases = [
            Phase::Create,
            Phase::Stat,
            Phase::Missing,
            Phase::OpenClose,
            Phase::ListLong,
            Phase::Rename,
            Phase::UnlinkListed,
            Phase::WriteSmallSync,
            Phase::Unlink,
            Phase::Mkdir,
            Phase::Rmdir,
            Phase::WriteSmall,
            Phase::ReadSmall,
            Phase::StreamWrite,
            Phase::StreamWriteSync,
            Phase::StreamRead,
            Phase::RandomRead,
            Phase::RandomWrite,
            Phase::RandomWriteSync,
        ];
        for phase in phases {
            let timed = run(dir.path(), phase, 4).unwrap();
            assert_eq!((timed.operations, timed.latencies.count()), (4, 4));
            assert!(timed.rate() > 0.0);
        }
        assert_eq!(fs::metadata(dir.path().join("stream")).unwrap().len(), 4 << 20);
    }

    #[test]
    fn what_does_not_work_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        run(dir.path(), Phase::Create, 2).unwrap();
        assert!(run(dir.path(), Phase::Create, 2).is_err());
        assert!(run(dir.path(), Phase::ReadSmall, 1).is_err());
        assert!(run(dir.path(), Phase::Stat, 3).is_err());
        assert!(run(dir.path(), Phase::RandomRead, 1).is_err());
    }

    #[test]
    fn a_limit_ends_a_phase_and_so_does_the_last_name() {
        let dir = tempfile::tempdir().unwrap();
        let run = |phase, count, limit| {
            let work = Work {
                phase,
                dir: dir.path().into(),
                processes: 1,
                count,
                limit: Some(limit),
            };
            Part::prepare(&work, 0)?.run()
        };
        let long = Duration::from_secs(600);
        assert_eq!(run(Phase::Create, 1000, Duration::from_nanos(1)).unwrap().operations, 1);
        for phase in [
            Phase::Stat,
            Phase::OpenClose,
            Phase::ListLong,
            Phase::Rename,
            Phase::UnlinkListed,
        ] {
            assert_eq!(run(phase, 1000, long).unwrap().operations, 1, "{phase:?}");
        }
        assert!(run(Phase::Stat, 1000, long).is_err());
        assert!(run(Phase::ListLong, 1000, long).is_err());
    }

    #[test]
    fn random_reads_meet_no_block_twice() {
        for size in [1, 2, 256, 1 << 17] {
            let met: HashSet<_> = (0..size).map(|number| shuffled(number, size)).collect();
            assert_eq!(met.len() as u64, size);
            assert!(met.iter().all(|block| *block < size));
        }
    }
}
