//! Pausing, handing over, dying, unmounting.

use crate::child;
use crate::journaled::Journaled;
use crate::memory::Memory;
use crate::mounted::{Place, application, mounted, options, until};
use lazarette_fuse::abi::{Capabilities, Opcode};
use lazarette_fuse::{Config, Connection, End, InterruptPolicy, Session, SessionError, Terms, Unmount};
use rustix::fs::{FlockOperation, fcntl_lock};
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Applications that create, move and remove, each effect exactly once, until told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    operations: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(path: &Path) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let operations = Arc::<AtomicU64>::default();
        let threads = (0..4).map(|thread| {
            let (stop, operations, path) = (stop.clone(), operations.clone(), path.to_owned());
            std::thread::spawn(move || {
                let mut round = 0;
                while !stop.load(Ordering::SeqCst) {
                    let (old, new) = (
                        path.join(format!("{thread}-{round}")),
                        path.join(format!("{thread}-{round}-moved")),
                    );
                    fs::create_dir(&old).unwrap();
                    operations.fetch_add(1, Ordering::SeqCst);
                    fs::rename(&old, &new).unwrap();
                    operations.fetch_add(1, Ordering::SeqCst);
                    assert!(!old.exists() && new.exists());
                    fs::remove_dir(&new).unwrap();
                    operations.fetch_add(1, Ordering::SeqCst);
                    round += 1;
                }
            })
        });
        let threads = threads.collect();
        Self {
            stop,
            operations,
            threads,
        }
    }

    fn done(&self) -> u64 {
        self.operations.load(Ordering::SeqCst)
    }

    /// Waits until the applications have got on by some operations.
    async fn gets_on(&self) {
        let goal = self.done() + 12;
        until("the applications get on", || {
            self.done() >= goal || self.threads.iter().any(JoinHandle::is_finished)
        })
        .await;
    }

    async fn end(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        application(move || {
            for thread in self.threads {
                thread.join().expect("no application met an error");
            }
            self.operations.load(Ordering::SeqCst)
        })
        .await
    }
}

fn journal(place: &Place) -> PathBuf {
    place.path().with_extension("journal")
}

struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn effects(journal: &Path) -> u64 {
    fs::read_to_string(journal).unwrap().lines().count() as u64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pauses_under_load_are_not_noticed() {
    let (place, session) = mounted(Memory::new()).await;
    let load = Load::start(place.path());
    for _ in 0..20 {
        load.gets_on().await;
        let drained = session.pause(Duration::from_secs(30)).await.unwrap();
        assert!(!drained.unanswered && session.in_flight().is_empty());
        assert!(matches!(
            session.pause(Duration::ZERO).await,
            Err(SessionError::Phase("paused"))
        ));
        session.resume().await.unwrap();
        assert!(matches!(session.resume().await, Err(SessionError::Phase("serving"))));
    }
    load.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_for_a_lock_survives_a_pause() {
    // Dropped after the mount: closing it asks the server.
    let held;
    let (place, session) = mounted(Memory::new()).await;
    let path = place.join("file");
    let copy = path.clone();
    held = application(move || {
        let file = File::create(copy).unwrap();
        fcntl_lock(&file, FlockOperation::LockExclusive).unwrap();
        file
    })
    .await;
    let mut waiter = child::start("lock", path.to_str().unwrap(), None);
    let waiting = || {
        session
            .in_flight()
            .iter()
            .any(|request| request.opcode == Opcode::Setlkw)
    };
    until("it waits for the lock", waiting).await;
    assert!(session.pause(Duration::from_millis(10)).await.unwrap().unanswered);
    assert!(session.in_flight().is_empty());
    session.resume().await.unwrap();
    until("it waits again", waiting).await;
    assert!(session.statistics().resent >= 1);
    application(move || drop(held)).await;
    until("it has got the lock", || {
        waiter.0.try_wait().unwrap().is_some_and(|status| status.success())
    })
    .await;
}

/// Sessions of one connection, one after another, by way of a socket.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hand_over_under_load_is_not_noticed() {
    let place = Place::new();
    let journal = journal(&place);
    let _removed = Removed(journal.clone());
    let mut session = Session::mount(Journaled::open(&journal), place.path(), options(), Config::default())
        .await
        .unwrap();
    let load = Load::start(place.path());
    for round in 0..10 {
        load.gets_on().await;
        // Every other time without patience: what is not beyond its point of no return comes again.
        let patience = if round % 2 == 0 {
            Duration::from_secs(30)
        } else {
            Duration::ZERO
        };
        let drained = session.pause(patience).await.unwrap();
        let (left, right) = UnixStream::pair().unwrap();
        let connection = session.connection().unwrap();
        let sender = std::thread::spawn(move || connection.send(&left, b"extra").unwrap());
        let (connection, extra) = Connection::receive(&right).unwrap();
        sender.join().unwrap();
        assert_eq!(
            (&extra[..], connection.mountpoint.as_deref()),
            (&b"extra"[..], Some(place.path()))
        );
        session.leave().unwrap();
        assert_eq!(session.ended().await, End::Left);
        drop(session);
        let next = Journaled::open(&journal);
        session = Session::adopt(next, connection, Config::default(), drained.unanswered)
            .await
            .unwrap();
    }
    load.gets_on().await;
    let operations = load.end().await;
    assert_eq!(effects(&journal), operations);
}

/// A server that a test kills: it gets its connection through its standard input.
pub(crate) fn serve_journaled(journal: &str) {
    let socket = UnixStream::from(rustix::stdio::stdin().try_clone_to_owned().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (connection, _) = Connection::receive(&socket).unwrap();
        let journaled = Journaled::open(Path::new(journal));
        let session = Session::adopt(journaled, connection, Config::default(), true)
            .await
            .unwrap();
        session.ended().await;
    });
}

/// `FUSE_TEST_KILLS` sets the number of rounds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_servers_are_not_noticed() {
    let rounds = std::env::var("FUSE_TEST_KILLS").map_or(50, |number| number.parse().unwrap());
    let place = Place::new();
    let journal = journal(&place);
    let _removed = Removed(journal.clone());
    let session = Session::mount(Journaled::open(&journal), place.path(), options(), Config::default())
        .await
        .unwrap();
    if !session.parameters().has(Capabilities::HAS_RESEND) {
        panic!("the kernel is older than 6.9: it cannot send requests again");
    }
    session.pause(Duration::ZERO).await.unwrap();
    // This process is the custodian: it holds all descriptors and reads from none.
    let custody = session.connection().unwrap();
    session.leave().unwrap();
    let load = Load::start(place.path());
    let mut server = None;
    for round in 0..rounds {
        let (left, right) = UnixStream::pair().unwrap();
        drop(server.take());
        server = Some(child::start(
            "serve",
            journal.to_str().unwrap(),
            Some(OwnedFd::from(right)),
        ));
        custody.send(&left, &[]).unwrap();
        load.gets_on().await;
        assert!(
            !load.threads.iter().any(JoinHandle::is_finished),
            "an application met an error in round {round}"
        );
        // At another moment each time.
        tokio::time::sleep(Duration::from_micros(round * 137 % 2000)).await;
        if let Some(server) = &mut server {
            server.0.kill().unwrap();
        }
    }
    drop(server.take());
    let session = Session::adopt(Journaled::open(&journal), custody, Config::default(), true)
        .await
        .unwrap();
    let operations = load.end().await;
    assert_eq!(effects(&journal), operations);
    session.unmount(Unmount::Orderly).await.unwrap();
    assert_eq!(session.ended().await, End::Unmounted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orderly_unmount_waits_for_users_to_go() {
    let file;
    let (place, session) = mounted(Memory::new()).await;
    file = File::create(place.join("file")).unwrap();
    let error = session.unmount(Unmount::Orderly).await.unwrap_err().to_string();
    assert!(error.contains("busy"), "{error}");
    application(move || drop(file)).await;
    session.unmount(Unmount::Orderly).await.unwrap();
    assert_eq!(session.ended().await, End::Unmounted);
    assert!(matches!(session.pause(Duration::ZERO).await, Err(SessionError::Ended)));
    assert!(session.in_flight().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forced_unmount_ends_what_waits() {
    let held;
    let (place, session) = mounted(Memory::new()).await;
    let path = place.join("file");
    held = File::create(&path).unwrap();
    fcntl_lock(&held, FlockOperation::LockExclusive).unwrap();
    let mut waiter = child::start("lock", path.to_str().unwrap(), None);
    let waiting = || {
        session
            .in_flight()
            .iter()
            .any(|request| request.opcode == Opcode::Setlkw)
    };
    until("it waits for the lock", waiting).await;
    session.unmount(Unmount::Force).await.unwrap();
    let end = session.ended().await;
    assert!(matches!(end, End::Unmounted | End::Aborted), "{end:?}");
    until("it has failed", || {
        waiter.0.try_wait().unwrap().is_some_and(|status| !status.success())
    })
    .await;
    until("its handler is gone", || session.in_flight().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_is_told_apart() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let (place, session) = mounted(Memory::new()).await;
    let device = rustix::fs::minor(rustix::fs::stat(place.path()).unwrap().st_dev);
    let control = Place::new();
    rustix::mount::mount(
        "none",
        control.path(),
        "fusectl",
        rustix::mount::MountFlags::empty(),
        None,
    )
    .unwrap();
    fs::write(control.join(&format!("{device}/abort")), "1").unwrap();
    assert_eq!(session.ended().await, End::Aborted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_connections_are_adopted() {
    let (_place, session) = mounted(Memory::new()).await;
    let mut connection = session.connection().unwrap();
    assert_eq!(
        connection.try_clone().unwrap().descriptors.len(),
        connection.descriptors.len()
    );
    connection
        .descriptors
        .push(File::open("/dev/null").unwrap().as_fd().try_clone_to_owned().unwrap());
    let wrong = connection.descriptors.len() - 1;
    let result = Session::adopt(Memory::new(), connection, Config::default(), false).await;
    assert!(matches!(result.map(|_| ()), Err(SessionError::NotFuse(index)) if index == wrong));
    let none = Connection {
        parameters: *session.parameters(),
        descriptors: Vec::new(),
        mountpoint: None,
    };
    let result = Session::adopt(Memory::new(), none, Config::default(), true).await;
    assert!(matches!(result.map(|_| ()), Err(SessionError::NoDescriptors)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kernel_that_lacks_something_required_is_refused() {
    let place = Place::new();
    let terms = Terms {
        required: Capabilities::from_bits_retain(1 << 62),
        ..Terms::default()
    };
    let config = Config {
        terms,
        interrupts: InterruptPolicy::Any,
        ..Config::default()
    };
    let result = Session::mount(Memory::new(), place.path(), options(), config).await;
    assert!(matches!(result.map(|_| ()), Err(SessionError::Negotiation(_))));
    // No dead mount is left behind.
    assert!(fs::read_dir(place.path()).unwrap().next().is_none());
}
