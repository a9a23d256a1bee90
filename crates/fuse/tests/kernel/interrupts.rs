//! Signals reach those who wait.

use crate::child::{self, Process};
use crate::memory::Memory;
use crate::mounted::{application, mounted, mounted_with, until};
use lazarette_fuse::abi::Opcode;
use lazarette_fuse::operation::*;
use lazarette_fuse::*;
use rustix::fs::{FlockOperation, fcntl_lock, flock};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{File, OpenOptions};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

fn open(path: &str) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

pub(crate) fn wait_for_lock(path: &str) {
    fcntl_lock(open(path), FlockOperation::LockExclusive).unwrap();
}

pub(crate) fn wait_for_flock(path: &str) {
    flock(open(path), FlockOperation::LockExclusive).unwrap();
}

fn send(process: &Process, signal: Signal) {
    kill_process(Pid::from_child(&process.0), signal).unwrap();
}

async fn ends(process: &mut Process) {
    until("the process has ended", || process.0.try_wait().unwrap().is_some()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_ends_a_wait_for_a_lock() {
    // Dropped after the mount: closing it asks the server.
    let held;
    let (place, session) = mounted(Memory::new()).await;
    let path = place.join("file").to_str().unwrap().to_owned();
    let copy = path.clone();
    held = application(move || {
        let file = File::create(copy).unwrap();
        fcntl_lock(&file, FlockOperation::LockExclusive).unwrap();
        flock(&file, FlockOperation::LockExclusive).unwrap();
        file
    })
    .await;
    for role in ["lock", "flock"] {
        let mut waiter = child::start(role, &path, None);
        let waiting = || {
            session
                .in_flight()
                .iter()
                .any(|request| request.opcode == Opcode::Setlkw)
        };
        until("it waits for the lock", waiting).await;
        send(&waiter, Signal::KILL);
        ends(&mut waiter).await;
        until("nobody waits any more", || !waiting()).await;
    }
    assert_eq!(session.statistics().cancelled, 2);
    // A lock given to nobody can be had.
    application(move || drop(held)).await;
    let mut next = child::start("lock", &path, None);
    until("it has got the lock", || {
        next.0.try_wait().unwrap().is_some_and(|status| status.success())
    })
    .await;
}

/// Reads never end, unless `release` is set; those of `committed` are beyond the point of no return.
#[derive(Default)]
struct Stuck {
    release: AtomicBool,
    committed: bool,
    dropped: Arc<AtomicBool>,
}

struct Dropped(Arc<AtomicBool>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Filesystem for Stuck {
    async fn lookup(&self, _request: &Request, _lookup: Lookup<'_>) -> Result<Entry> {
        let attr = Attr {
            ino: 2,
            mode: 0o100_644,
            nlink: 1,
            size: 100,
            ..Attr::default()
        };
        Ok(Entry {
            node: 2,
            attr,
            ..Entry::default()
        })
    }

    async fn getattr(&self, _request: &Request, getattr: Getattr) -> Result<Attributes> {
        let mode = if getattr.node == 1 { 0o040_755 } else { 0o100_644 };
        Ok(Attributes {
            attr: Attr {
                ino: getattr.node,
                mode,
                nlink: 1,
                size: 100,
                ..Attr::default()
            },
            ttl: Duration::ZERO,
        })
    }

    async fn open(&self, _request: &Request, _open: Open) -> Result<Opened> {
        // So that the caller itself waits for the read.
        Ok(Opened {
            flags: abi::OpenReplyFlags::DIRECT_IO,
            ..Opened::default()
        })
    }

    async fn read(&self, request: &Request, _read: Read) -> Result<Data> {
        let _dropped = Dropped(self.dropped.clone());
        if self.committed {
            request.commit()?;
        }
        while !self.release.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(Data::from(vec![b'x'; 10]))
    }
}

fn reading(session: &Session<Stuck>) -> bool {
    session.in_flight().iter().any(|request| request.opcode == Opcode::Read)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_ends_a_read_that_hangs() {
    let dropped = Arc::<AtomicBool>::default();
    let (place, session) = mounted(Stuck {
        dropped: dropped.clone(),
        ..Stuck::default()
    })
    .await;
    let mut reader = child::start("read", place.join("file").to_str().unwrap(), None);
    until("it reads", || reading(&session)).await;
    send(&reader, Signal::KILL);
    ends(&mut reader).await;
    assert!(
        dropped.load(Ordering::SeqCst),
        "the handler is dropped before the answer"
    );
    assert_eq!(session.statistics().cancelled, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beyond_the_point_of_no_return_a_handler_runs_to_its_end() {
    let (place, session) = mounted(Stuck {
        committed: true,
        ..Stuck::default()
    })
    .await;
    let mut reader = child::start("read", place.join("file").to_str().unwrap(), None);
    until("it reads", || {
        session.in_flight().iter().any(|request| request.committed)
    })
    .await;
    send(&reader, Signal::KILL);
    until("the interrupt has come", || {
        session.in_flight().iter().any(|request| request.interrupted)
    })
    .await;
    assert_eq!(session.statistics().cancelled, 0);
    assert!(reading(&session));
    session.filesystem().release.store(true, Ordering::SeqCst);
    ends(&mut reader).await;
    assert_eq!(session.statistics().cancelled, 0);
}

/// When so much is under way that nothing more is read, interrupts are not either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_ends_requests_that_fill_the_session() {
    let config = Config {
        max_requests: 1,
        ..Config::default()
    };
    let (place, session) = mounted_with(Stuck::default(), config).await;
    let path = place.join("file").to_str().unwrap().to_owned();
    let mut readers: Vec<Process> = (0..6).map(|_| child::start("read", &path, None)).collect();
    until("they read", || reading(&session)).await;
    for reader in &readers {
        send(reader, Signal::KILL);
    }
    for reader in &mut readers {
        ends(reader).await;
    }
}
