use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{Advice, AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

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
    /// Remove a file.
    Unlink,
    /// Create a folder.
    Mkdir,
    /// Create a file with 4 KiB and close it.
    WriteSmall,
    /// Open a file, read its 4 KiB and close it.
    ReadSmall,
    /// Write 1 MiB at the end of the stream, which is created.
    StreamWrite,
    /// Read the next 1 MiB of the stream.
    StreamRead,
    /// Read 4 KiB of the stream, no place twice, in no order, with the kernel told so.
    RandomRead,
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
}

/// How long a phase took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timed {
    /// Operations of all processes.
    pub operations: usize,
    /// Nanoseconds of the monotonic clock at which the first process began.
    pub begin: u64,
    /// Nanoseconds of the monotonic clock at which the last process ended.
    pub end: u64,
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
    /// The names it works on, for phases with names.
    paths: Vec<PathBuf>,
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
            paths: Vec::new(),
            stream: None,
            offsets: Vec::new(),
            buffer: vec![0x5a; SMALL],
        };
        let stream = work.dir.join("stream");
        match work.phase {
            Phase::StreamWrite => {
                part.buffer = vec![0x5a; BLOCK];
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
            phase => part.paths = names(&work.dir.join(format!("p{index}")), phase, work.count)?,
        }
        Ok(part)
    }

    fn run(&mut self) -> Result<Timed> {
        let begin = now();
        for number in 0..self.count {
            self.operation(number)
                .with_context(|| format!("{:?} number {number}", self.phase))?;
        }
        Ok(Timed {
            operations: self.count,
            begin,
            end: now(),
        })
    }

    fn operation(&mut self, number: usize) -> Result<()> {
        let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        match self.phase {
            Phase::Create => drop(open(&self.paths[number], new)?),
            Phase::Stat => {
                rustix::fs::lstat(&self.paths[number])?;
            }
            Phase::Missing => match rustix::fs::lstat(&self.paths[number]) {
                Err(Errno::NOENT) => {}
                other => bail!("{} is there: {other:?}", self.paths[number].display()),
            },
            Phase::OpenClose => drop(open(&self.paths[number], OFlags::RDONLY)?),
            Phase::Unlink => rustix::fs::unlinkat(CWD, &self.paths[number], AtFlags::empty())?,
            Phase::Mkdir => rustix::fs::mkdir(&self.paths[number], Mode::from_raw_mode(0o755))?,
            Phase::WriteSmall => all(
                rustix::io::write(&open(&self.paths[number], new)?, &self.buffer)?,
                SMALL,
            )?,
            Phase::ReadSmall => {
                let file = open(&self.paths[number], OFlags::RDONLY)?;
                all(rustix::io::read(&file, &mut self.buffer[..])?, SMALL)?;
            }
            Phase::StreamWrite => all(rustix::io::write(self.stream()?, &self.buffer)?, BLOCK)?,
            Phase::StreamRead => {
                let file = self.stream.as_ref().context("no stream")?;
                all(rustix::io::read(file, &mut self.buffer[..])?, BLOCK)?;
            }
            Phase::RandomRead => {
                let file = self.stream.as_ref().context("no stream")?;
                let count = rustix::io::pread(file, &mut self.buffer[..], self.offsets[number])?;
                all(count, SMALL)?;
            }
        }
        Ok(())
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

fn names(folder: &Path, phase: Phase, count: usize) -> Result<Vec<PathBuf>> {
    // By the first phase in a folder; the others find it.
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let kind = match phase {
        Phase::Missing => "missing",
        Phase::Mkdir => "folder",
        _ => "file",
    };
    Ok((0..count)
        .map(|number| folder.join(format!("{kind}-{number:06}")))
        .collect())
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
            Phase::Mkdir,
            Phase::Unlink,
            Phase::WriteSmall,
            Phase::ReadSmall,
            Phase::StreamWrite,
            Phase::StreamRead,
            Phase::RandomRead,
        ];
        for phase in phases {
            let timed = run(dir.path(), phase, 4).unwrap();
            assert_eq!(timed.operations, 4);
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
    fn random_reads_meet_no_block_twice() {
        for size in [1, 2, 256, 1 << 17] {
            let met: HashSet<_> = (0..size).map(|number| shuffled(number, size)).collect();
            assert_eq!(met.len() as u64, size);
            assert!(met.iter().all(|block| *block < size));
        }
    }
}
