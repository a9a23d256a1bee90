//! Handlers that fail, and many requests at once.

use crate::child;
use crate::mounted::{Place, application, mounted, mounted_with, options, until};
use lazarette_fuse::operation::*;
use lazarette_fuse::*;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;
use tokio::sync::Notify;

/// Fails in the way that a file's name says.
#[derive(Default)]
struct Faulty {
    gate: Notify,
    open: std::sync::atomic::AtomicBool,
}

fn attributes(node: u64) -> Attributes {
    let mode = match node {
        1 => 0o040_755,
        LINK => 0o120_777,
        _ => 0o100_644,
    };
    Attributes {
        attr: Attr {
            ino: node,
            mode,
            nlink: 1,
            size: 4096,
            ..Attr::default()
        },
        ttl: Duration::ZERO,
    }
}

const PANIC: u64 = 2;
const LATE_PANIC: u64 = 3;
const TOO_MUCH: u64 = 4;
const WAIT: u64 = 5;
const LINK: u64 = 6;
const FINE: u64 = 7;

impl Filesystem for Faulty {
    async fn lookup(&self, _request: &Request, lookup: Lookup<'_>) -> Result<Entry> {
        let node = match lookup.name.to_str() {
            Some("panic") => PANIC,
            Some("late panic") => LATE_PANIC,
            Some("too much") => TOO_MUCH,
            Some("link") => LINK,
            Some("fine") => FINE,
            Some("wait") => WAIT,
            _ => return Err(Errno::ENOENT),
        };
        Ok(Entry {
            node,
            attr: attributes(node).attr,
            ..Entry::default()
        })
    }

    fn forget(&self, _forgets: &[Forget]) {
        panic!("forget");
    }

    async fn getattr(&self, _request: &Request, getattr: Getattr) -> Result<Attributes> {
        Ok(attributes(getattr.node))
    }

    async fn open(&self, _request: &Request, _open: Open) -> Result<Opened> {
        Ok(Opened {
            flags: abi::OpenReplyFlags::DIRECT_IO,
            ..Opened::default()
        })
    }

    async fn readlink(&self, _request: &Request, _readlink: Readlink) -> Result<OsString> {
        Ok("x".repeat(5000).into())
    }

    async fn read(&self, _request: &Request, read: Read) -> Result<Data> {
        match read.node {
            PANIC => panic!("at once"),
            LATE_PANIC => {
                tokio::time::sleep(Duration::from_millis(1)).await;
                panic!("later");
            }
            TOO_MUCH => Ok(vec![0; read.size as usize + 1].into()),
            WAIT => {
                let opened = self.gate.notified();
                if !self.open.load(std::sync::atomic::Ordering::SeqCst) {
                    opened.await;
                }
                Ok(Data::Bytes(Vec::new().into()))
            }
            _ if read.offset > 0 => Ok(Data::Bytes(Vec::new().into())),
            _ => Ok(Data::Chunks(vec!["fi".into(), "ne".into()])),
        }
    }

    async fn write(&self, _request: &Request, write: Write) -> Result<u32> {
        Ok(write.data.len() as u32 + 1)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_fails_fails_alone() {
    let (place, session) = mounted(Faulty::default()).await;
    let path = place.path().to_owned();
    application(move || {
        let errno = |name: &str| fs::read(path.join(name)).unwrap_err().raw_os_error();
        for _ in 0..3 {
            assert_eq!(errno("panic"), Some(Errno::EIO.raw()));
            assert_eq!(errno("late panic"), Some(Errno::EIO.raw()));
            assert_eq!(errno("too much"), Some(Errno::EIO.raw()));
            assert_eq!(fs::read(path.join("fine")).unwrap(), b"fine");
        }
        let file = File::options().write(true).open(path.join("fine")).unwrap();
        assert_eq!((&file).write(b"x").unwrap_err().raw_os_error(), Some(Errno::EIO.raw()));
        let error = fs::read_link(path.join("link")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::ENAMETOOLONG.raw()));
        // What has no handler.
        let error = fs::set_permissions(path.join("fine"), fs::Permissions::from_mode(0o600)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::ENOSYS.raw()));
    })
    .await;
    assert!(session.statistics().panics >= 6);
    // The kernel forgets, which panics, too.
    session
        .notifier()
        .inval_entry(abi::ROOT, std::ffi::OsStr::new("fine"))
        .await
        .unwrap();
    let path = place.join("fine");
    application(move || assert_eq!(fs::read(path).unwrap(), b"fine")).await;
}

/// Threads that each read a file once.
pub(crate) fn many_requests(argument: &str) {
    let (count, path) = argument.split_once(' ').unwrap();
    let path = Path::new(path);
    std::thread::scope(|scope| {
        for _ in 0..count.parse().unwrap() {
            let thread = std::thread::Builder::new().stack_size(64 << 10);
            thread
                .spawn_scoped(scope, || assert!(fs::read(path).unwrap().is_empty()))
                .unwrap();
        }
    });
}

/// Bytes of memory that this process has.
fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// A process that serves many requests at once, and nothing else that takes memory.
pub(crate) fn serve_many(place: &str) {
    const COUNT: usize = 10_000;
    let config = Config {
        max_requests: COUNT,
        ..Config::default()
    };
    child::runtime().block_on(async {
        let session = Session::mount(Faulty::default(), place, options(), config)
            .await
            .unwrap();
        let before = resident();
        let argument = format!("{COUNT} {}", Path::new(place).join("wait").display());
        let mut applications = child::start("many", &argument, None);
        until("all wait", || session.in_flight().len() == COUNT).await;
        let each = (resident().saturating_sub(before)) / COUNT as u64;
        assert!(each < 8192, "{each} bytes for each request");
        let_through(&session, &mut applications).await;
        session.unmount(Unmount::Orderly).await.unwrap();
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_requests_take_little_memory() {
    let place = Place::new();
    let mut server = child::start("serve many", place.path().to_str().unwrap(), None);
    until("it has served all", || server.0.try_wait().unwrap().is_some()).await;
    assert!(server.0.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_requests_than_wanted_wait_in_the_kernel() {
    let (place, session) = mounted_with(
        Faulty::default(),
        Config {
            max_requests: 10,
            ..Config::default()
        },
    )
    .await;
    let argument = format!("200 {}", place.join("wait").display());
    let mut applications = child::start("many", &argument, None);
    // Each reader may have let one more through.
    until("the limit is reached", || session.in_flight().len() >= 10).await;
    for _ in 0..50 {
        assert!(session.in_flight().len() <= 10 + 8);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let_through(&session, &mut applications).await;
}

/// Answers all that wait; their application then ends.
async fn let_through(session: &Session<Faulty>, applications: &mut child::Process) {
    session
        .filesystem()
        .open
        .store(true, std::sync::atomic::Ordering::SeqCst);
    session.filesystem().gate.notify_waiters();
    until("all have ended", || {
        applications
            .0
            .try_wait()
            .unwrap()
            .is_some_and(|status| status.success())
    })
    .await;
}
