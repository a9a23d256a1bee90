//! Locks over nodes, and what happens to them when somebody dies.

use super::{mounted, printed};
use lazarette_e2e::local::Role;
use lazarette_e2e::story::owner_of;
use lazarette_e2e::{Deadline, wait_for};
use rustix::process::Signal;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Longer than any lock takes that can be had, also when a node dies.
const LIMIT: Duration = Duration::from_secs(120);

/// A process that takes locks on order: `OPERATION FILE KIND START LENGTH` a line.
struct Locker {
    child: Child,
    orders: ChildStdin,
    answers: mpsc::Receiver<String>,
}

const LOCKER: &str = "
import errno, fcntl, os, struct, sys
files = {}
def flock(kind, start, length, pid=0): return struct.pack('hhqqi4x', kind, 0, start, length, pid)
def open_(name):
    if name not in files: files[name] = os.open(name, os.O_RDWR | os.O_CREAT)
    return files[name]
for line in sys.stdin:
    operation, name, kind, start, length = line.split()
    kind = getattr(fcntl, kind)
    fd = open_(name)
    try:
        if operation == 'close':
            os.close(files.pop(name))
            print('ok', flush=True)
        elif operation == 'flock':
            fcntl.flock(fd, kind)
            print('ok', flush=True)
        elif operation == 'get':
            got = fcntl.fcntl(fd, fcntl.F_GETLK, flock(kind, int(start), int(length)))
            print(*struct.unpack('hhqqi4x', got), flush=True)
        else:
            fcntl.fcntl(fd, getattr(fcntl, operation), flock(kind, int(start), int(length)))
            print('ok', flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
";

impl Locker {
    fn start() -> Self {
        let mut child = Command::new("/usr/bin/python3")
            .args(["-c", LOCKER])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (orders, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, answers) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                let _ = sender.send(line.unwrap());
            }
        });
        Self { child, orders, answers }
    }

    fn order(&mut self, operation: &str, file: &Path, kind: &str, (start, length): (u64, u64)) {
        writeln!(self.orders, "{operation} {} {kind} {start} {length}", file.display()).unwrap();
    }

    fn answer(&mut self) -> String {
        self.answers.recv_timeout(LIMIT).expect("an answer in time")
    }

    fn ask(&mut self, operation: &str, file: &Path, kind: &str, range: (u64, u64)) -> String {
        self.order(operation, file, kind, range);
        self.answer()
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn locks_hold_over_nodes_and_failures() {
    let (cluster, mounts) = mounted("locks", 3).await;
    let (here, there) = (mounts.path(0, "f"), mounts.path(1, "f"));
    let (mut a, mut b) = (Locker::start(), Locker::start());

    // Ranges; F_GETLK names the process on its own node only.
    assert_eq!(a.ask("F_SETLK", &here, "F_WRLCK", (10, 10)), "ok");
    assert_eq!(b.ask("F_SETLK", &there, "F_WRLCK", (0, 10)), "ok");
    assert_eq!(b.ask("F_SETLK", &there, "F_RDLCK", (19, 1)), "EAGAIN");
    assert_eq!(b.ask("get", &there, "F_WRLCK", (15, 100)), "1 0 10 10 0");
    let mut neighbour = Locker::start();
    let pid = a.child.id();
    assert_eq!(
        neighbour.ask("get", &here, "F_WRLCK", (15, 100)),
        format!("1 0 10 10 {pid}")
    );
    assert_eq!(a.ask("get", &here, "F_WRLCK", (40, 1)).split(' ').next(), Some("2"));

    // Two that would wait for each other for ever: the one who comes second is told.
    a.order("F_SETLKW", &here, "F_WRLCK", (0, 1));
    b.order("F_SETLKW", &there, "F_WRLCK", (10, 1));
    let second = wait_for(Deadline::after(LIMIT), "a deadlock to be found", || async {
        let told = |locker: &Locker| locker.answers.try_recv().ok();
        Ok(told(&a)
            .map(|answer| (true, answer))
            .or_else(|| told(&b).map(|answer| (false, answer))))
    });
    let (is_a, answer) = second.await.unwrap();
    // As Python calls EDEADLK.
    assert_eq!(answer, "EDEADLOCK");
    if is_a {
        assert_eq!(a.ask("F_SETLK", &here, "F_UNLCK", (10, 10)), "ok");
        assert_eq!(b.answer(), "ok");
        assert_eq!(b.ask("F_SETLK", &there, "F_UNLCK", (0, 100)), "ok");
        assert_eq!(a.ask("F_SETLK", &here, "F_WRLCK", (10, 10)), "ok");
    } else {
        assert_eq!(b.ask("F_SETLK", &there, "F_UNLCK", (0, 10)), "ok");
        assert_eq!(a.answer(), "ok");
    }

    // Of an open file: it goes with the file, and the process's own locks do not.
    let (ofd, ofd_there) = (mounts.path(0, "ofd"), mounts.path(1, "ofd"));
    assert_eq!(a.ask("F_OFD_SETLK", &ofd, "F_WRLCK", (0, 0)), "ok");
    assert_eq!(b.ask("F_OFD_SETLK", &ofd_there, "F_RDLCK", (0, 0)), "EAGAIN");
    assert_eq!(a.ask("F_SETLK", &ofd, "F_RDLCK", (0, 1)), "EAGAIN");
    assert_eq!(a.ask("close", &ofd, "F_UNLCK", (0, 0)), "ok");
    assert_eq!(b.ask("F_OFD_SETLKW", &ofd_there, "F_WRLCK", (0, 0)), "ok");

    // The owner of the metadata dies: locks and those who wait for them go on at the next.
    let lock = mounts.path(0, "flock");
    assert_eq!(a.ask("flock", &lock, "LOCK_EX", (0, 0)), "ok");
    b.order("flock", &mounts.path(1, "flock"), "LOCK_EX", (0, 0));
    let owner = owner_of(&cluster.inner, "locks").await.unwrap();
    cluster.inner.node(owner).unwrap().signal(Signal::KILL).unwrap();
    let mut c = Locker::start();
    assert_eq!(c.ask("F_SETLK", &mounts.path(2, "f"), "F_RDLCK", (15, 1)), "EAGAIN");
    cluster.inner.start_node(owner).await.unwrap();

    // The node of the holder dies: its locks go with its session, not before.
    let daemons = cluster.inner.processes();
    let holder = daemons
        .iter()
        .find(|(role, name, _)| *role == Role::Mount && name.ends_with("locks-0"))
        .unwrap_or_else(|| panic!("{daemons:?}"));
    holder.2.signal(Signal::KILL).unwrap();
    assert_eq!(b.answer(), "ok");
    assert_eq!(c.ask("F_SETLKW", &mounts.path(2, "f"), "F_WRLCK", (0, 0)), "ok");
    drop((a, b, c, neighbour));
    cluster.down().await;
}

/// A waiter that is killed gives way, and one that is interrupted gets nothing later.
#[tokio::test]
async fn waiters_can_be_interrupted() {
    let (cluster, mounts) = mounted("waiters", 2).await;
    let (here, there) = (mounts.path(0, "f"), mounts.path(1, "f"));
    let mut holder = Locker::start();
    assert_eq!(holder.ask("F_SETLK", &here, "F_WRLCK", (0, 0)), "ok");
    let timed = "import fcntl, signal, sys
def late(*_): raise TimeoutError
signal.signal(signal.SIGALRM, late)
f = open(sys.argv[1], 'r+')
signal.setitimer(signal.ITIMER_REAL, 0.3)
try: fcntl.lockf(f, fcntl.LOCK_EX)
except TimeoutError: print('interrupted')";
    let script = ["-c", timed, there.to_str().unwrap()];
    assert_eq!(printed("/usr/bin/python3", &script).trim(), "interrupted");
    assert_eq!(holder.ask("F_SETLK", &here, "F_UNLCK", (0, 0)), "ok");
    let mut next = Locker::start();
    assert_eq!(next.ask("F_SETLK", &here, "F_WRLCK", (0, 0)), "ok");
    cluster.down().await;
}
