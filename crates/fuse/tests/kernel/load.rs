//! Applications at work while something happens to the server.

use crate::child::{self, Process};
use crate::mounted::until;
use lazarette_fuse::Unmount;
use lazarette_fuse::mount::unmount;
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tempfile::NamedTempFile;

/// A process that makes, moves, writes, reads, locks and removes until told to stop. Any error, or
/// anything that is not as it left it, ends it with a panic.
///
/// Not in the tests' own process: a process that it starts closes its files when it becomes another
/// program, which waits for the server, which may be the very program.
pub(crate) struct Load {
    place: PathBuf,
    process: Process,
    stop: UnixStream,
    operations: NamedTempFile,
}

impl Drop for Load {
    fn drop(&mut self) {
        if !self.has_ended() {
            // The test has failed. What waits for a server that is gone cannot be killed.
            let _ = unmount(&self.place, Unmount::Force);
        }
    }
}

impl Load {
    /// Without waits for locks, which outlast any patience.
    pub(crate) fn without_locks(place: &Path) -> Self {
        Self::start("load", place)
    }

    pub(crate) fn with_locks(place: &Path) -> Self {
        Self::start("load with locks", place)
    }

    fn start(role: &str, place: &Path) -> Self {
        let operations = NamedTempFile::new().unwrap();
        let (stop, theirs) = UnixStream::pair().unwrap();
        let argument = format!("{} {}", place.display(), operations.path().display());
        Self {
            place: place.to_owned(),
            process: child::start(role, &argument, Some(theirs.into())),
            stop,
            operations,
        }
    }

    fn done(&self) -> u64 {
        let mut number = [0; 8];
        // Nothing yet is none.
        let _ = self.operations.as_file().read_at(&mut number, 0).unwrap();
        u64::from_ne_bytes(number)
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.process.0.try_wait().unwrap().is_some()
    }

    /// Waits until the applications have got on by some operations.
    pub(crate) async fn gets_on(&mut self) {
        let goal = self.done() + 12;
        until("the applications get on", || self.done() >= goal || self.has_ended()).await;
    }

    /// Stops the applications; how many operations they did that had an effect.
    pub(crate) async fn end(mut self) -> u64 {
        self.stop.shutdown(std::net::Shutdown::Both).unwrap();
        until("the applications have ended", || self.has_ended()).await;
        let status = self.process.0.wait().unwrap();
        assert!(status.success(), "an application met an error");
        self.done()
    }
}

/// The process.
pub(crate) fn work(argument: &str, locks: bool) {
    let (place, report) = argument.split_once(' ').unwrap();
    let stop = AtomicBool::new(false);
    let operations = AtomicU64::new(0);
    let report = OpenOptions::new().write(true).open(report).unwrap();
    std::thread::scope(|scope| {
        let stop = &stop;
        scope.spawn(|| {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            stop.store(true, Ordering::SeqCst);
        });
        let worker = |number| Worker {
            place: Path::new(place),
            number,
            operations: &operations,
            report: &report,
        };
        let threads: Vec<_> = (0..4)
            .map(|number| {
                scope.spawn(move || {
                    // One that fails does not leave the others at work.
                    let work = catch_unwind(|| worker(number).work(stop, locks));
                    work.unwrap_or_else(|_| std::process::exit(1))
                })
            })
            .collect();
        let rounds: u64 = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
        if locks {
            let counted = fs::read_to_string(Path::new(place).join("counter")).unwrap();
            assert_eq!(counted.parse::<u64>().unwrap(), rounds, "the lock kept the others out");
        }
        report
            .write_all_at(&operations.load(Ordering::SeqCst).to_ne_bytes(), 0)
            .unwrap();
    });
}

struct Worker<'a> {
    place: &'a Path,
    number: u64,
    operations: &'a AtomicU64,
    report: &'a File,
}

impl Worker<'_> {
    fn work(&self, stop: &AtomicBool, locks: bool) -> u64 {
        let counter = locks.then(|| self.counter());
        let mut round = 0;
        while !stop.load(Ordering::SeqCst) {
            self.directory(round);
            self.file(round);
            if let Some(counter) = &counter {
                self.count(counter);
            }
            round += 1;
        }
        round
    }

    /// Counts what had an effect.
    fn did<T>(&self, result: std::io::Result<T>) -> T {
        let value = result.unwrap();
        let done = self.operations.fetch_add(1, Ordering::SeqCst) + 1;
        self.report.write_all_at(&done.to_ne_bytes(), 0).unwrap();
        value
    }

    fn name(&self, round: u64, what: &str) -> PathBuf {
        self.place.join(format!("{}-{round}-{what}", self.number))
    }

    fn directory(&self, round: u64) {
        let (old, new) = (self.name(round, "old"), self.name(round, "new"));
        self.did(fs::create_dir(&old));
        self.did(fs::rename(&old, &new));
        assert!(!old.exists() && new.exists());
        self.did(fs::remove_dir(&new));
    }

    fn file(&self, round: u64) {
        let path = self.name(round, "file");
        let file = self.did(File::create_new(&path));
        let text = format!("{}-{round};", self.number).repeat(20);
        self.did(file.write_all_at(text.as_bytes(), 0));
        self.did(file.write_all_at(text.as_bytes(), text.len() as u64));
        assert_eq!(fs::read_to_string(&path).unwrap(), text.repeat(2));
        drop(file);
        self.did(fs::remove_file(&path));
    }

    fn counter(&self) -> File {
        let path = self.place.join("counter");
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        match options.clone().create_new(true).open(&path) {
            Ok(file) => {
                self.did(Ok(()));
                file
            }
            // Another thread was the first.
            Err(_) => options.open(&path).unwrap(),
        }
    }

    /// Only one at a time can do this.
    fn count(&self, counter: &File) {
        self.did(flock(counter, FlockOperation::LockExclusive).map_err(Into::into));
        let mut digits = [0; 10];
        let length = counter.read_at(&mut digits, 0).unwrap();
        let text = std::str::from_utf8(&digits[..length]).unwrap();
        let next = format!("{:010}", text.parse::<u64>().unwrap_or(0) + 1);
        self.did(counter.write_all_at(next.as_bytes(), 0));
        self.did(flock(counter, FlockOperation::Unlock).map_err(Into::into));
    }
}
