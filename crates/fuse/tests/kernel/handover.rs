//! Connections that go from one server to the next, in an orderly way or because the first is killed.

use crate::child;
use crate::journaled::{Journaled, State};
use crate::load::Load;
use crate::mounted::{Place, application, options, until};
use lazarette_fuse::abi::{Capabilities, Opcode};
use lazarette_fuse::handover::HandoverError;
use lazarette_fuse::mount::unmount;
use lazarette_fuse::{Config, Connection, End, Session, Unmount};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn journal(place: &Place) -> PathBuf {
    place.path().with_extension("journal")
}

struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Every effect once, none that nobody asked for.
fn check(journal: &Path, operations: u64) -> State {
    let state = State::read(journal);
    assert_eq!(state.effects, operations);
    state
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
    let mut load = Load::without_locks(place.path());
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
    assert_eq!(check(&journal, operations).repeats, 0);
}

/// Requests until a server of [`serve_in_turns`] hands over.
const REQUESTS_OF_A_TURN: u64 = 60;
/// Turns until one keeps the connection.
const TURNS: u8 = 20;

/// Two of these hand a connection to each other through their standard input, and so on.
pub(crate) fn serve_in_turns(journal: &str) {
    let socket = UnixStream::from(rustix::stdio::stdin().try_clone_to_owned().unwrap());
    let journal = Path::new(journal);
    child::runtime().block_on(async {
        loop {
            let (connection, extra) = match Connection::receive(&socket) {
                Err(HandoverError::Closed) => return,
                received => received.unwrap(),
            };
            let (unanswered, turn) = (extra[0] == 1, extra[1]);
            let filesystem = Journaled::open(journal);
            filesystem.begin_turn();
            let session = Session::adopt(filesystem, connection, Config::default(), unanswered)
                .await
                .unwrap();
            (&socket).write_all(b"+").unwrap();
            if turn == TURNS {
                assert_eq!(session.ended().await, End::Unmounted);
                return;
            }
            hand_over(&session, &socket, turn).await;
        }
    });
}

async fn hand_over(session: &Session<Journaled>, socket: &UnixStream, turn: u8) {
    let requests = || -> u64 { session.statistics().operations.iter().map(|one| one.requests).sum() };
    let waiting = || {
        let requests = session.in_flight();
        requests.iter().any(|request| request.opcode == Opcode::Setlkw)
    };
    until("the applications get on, and one waits for a lock", || {
        requests() >= REQUESTS_OF_A_TURN && waiting()
    })
    .await;
    // Every other time so that most requests under way move, too, not just the waits for the lock.
    let patience = Duration::from_millis(if turn.is_multiple_of(2) { 20 } else { 0 });
    let drained = session.pause(patience).await.unwrap();
    hand_to(session, socket, [u8::from(drained.unanswered), turn + 1]);
}

/// Leaves when the other has adopted the connection.
fn hand_to(session: &Session<Journaled>, socket: &UnixStream, extra: [u8; 2]) {
    session.connection().unwrap().send(socket, &extra).unwrap();
    let mut adopted = [0];
    (&mut &*socket).read_exact(&mut adopted).unwrap();
    session.leave().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_hand_over_to_each_other_unnoticed() {
    let place = Place::new();
    let journal = journal(&place);
    let _removed = Removed(journal.clone());
    let session = Session::mount(Journaled::open(&journal), place.path(), options(), Config::default())
        .await
        .unwrap();
    session.pause(Duration::ZERO).await.unwrap();
    let (left, right) = UnixStream::pair().unwrap();
    let start = |socket: UnixStream| child::start("turns", journal.to_str().unwrap(), Some(socket.into()));
    let first = start(left);
    hand_to(&session, &right, [0, 1]);
    // From here on nobody holds the connection but the two.
    drop(session);
    let servers = [first, start(right)];
    let mut load = Load::with_locks(place.path());
    for turn in 1..=TURNS {
        until("the next server's turn", || {
            State::read(&journal).turns >= u64::from(turn) || load.has_ended()
        })
        .await;
    }
    load.gets_on().await;
    let operations = load.end().await;
    let state = check(&journal, operations);
    assert_eq!((state.repeats, state.turns), (0, u64::from(TURNS)));
    let path = place.path().to_owned();
    application(move || unmount(&path, Unmount::Orderly).unwrap()).await;
    for mut server in servers {
        until("the server has ended", || server.0.try_wait().unwrap().is_some()).await;
        assert!(server.0.wait().unwrap().success());
    }
}

/// A server that a test kills: it gets its connection through its standard input.
pub(crate) fn serve_journaled(journal: &str) {
    let socket = UnixStream::from(rustix::stdio::stdin().try_clone_to_owned().unwrap());
    child::runtime().block_on(async {
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
    let mut load = Load::with_locks(place.path());
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
        assert!(!load.has_ended(), "an application met an error in round {round}");
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
    check(&journal, operations);
    session.unmount(Unmount::Orderly).await.unwrap();
    assert_eq!(session.ended().await, End::Unmounted);
}
