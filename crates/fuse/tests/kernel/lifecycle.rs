//! Pausing and unmounting.

use crate::child;
use crate::load::Load;
use crate::memory::Memory;
use crate::mounted::{Place, application, mounted, options, until};
use lazarette_fuse::abi::{Capabilities, Opcode};
use lazarette_fuse::{Config, Connection, End, InterruptPolicy, MountOptions, Session, SessionError, Terms, Unmount};
use rustix::fs::{FlockOperation, fcntl_lock};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pauses_under_load_are_not_noticed() {
    let (place, session) = mounted(Memory::new()).await;
    let mut load = Load::without_locks(place.path());
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

/// In a namespace of this thread and those that it starts: everybody may use /dev/fuse, as on most
/// machines.
#[allow(unsafe_code)]
fn open_the_device(place: &str) {
    use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // SAFETY: no descriptors come to be shared or unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS).unwrap() };
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    let node = format!("{place}/device");
    let kind = rustix::fs::FileType::CharacterDevice;
    let number = rustix::fs::makedev(10, 229);
    rustix::fs::mknodat(rustix::fs::CWD, &node, kind, rustix::fs::Mode::empty(), number).unwrap();
    fs::set_permissions(&node, fs::Permissions::from_mode(0o666)).unwrap();
    mount_bind(&node, "/dev/fuse").unwrap();
}

/// A process without rights mounts, uses and unmounts.
pub(crate) fn mount_as_nobody(place: &str) {
    open_the_device(place);
    child::become_nobody(&[]);
    child::runtime().block_on(async {
        let options = MountOptions {
            source: "a name, with a comma".into(),
            subtype: "lazarette-test".into(),
            ..MountOptions::default()
        };
        let mount = async || Session::mount(Memory::new(), place, options.clone(), Config::default()).await;
        for how in [Unmount::Orderly, Unmount::Detach] {
            let session = mount().await.unwrap();
            let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let line = mounts
                .lines()
                .find(|line| line.contains(&format!(" {place} ")))
                .unwrap();
            assert!(
                line.contains("fuse.lazarette-test a\\040name,\\040with\\040a\\040comma"),
                "{line}"
            );
            assert!(line.contains("nosuid,nodev"), "{line}");
            let path = Path::new(place).join("file");
            let open = application(move || {
                fs::write(&path, b"content").unwrap();
                assert_eq!(fs::read(&path).unwrap(), b"content");
                File::open(&path).unwrap()
            })
            .await;
            let error = session.unmount(Unmount::Orderly).await.unwrap_err().to_string();
            assert!(error.contains("busy"), "{error}");
            match how {
                Unmount::Orderly => {
                    application(move || drop(open)).await;
                    session.unmount(how).await.unwrap();
                }
                _ => {
                    session.unmount(how).await.unwrap();
                    // Still of use to whom has it.
                    application(move || assert_eq!(open.metadata().unwrap().len(), 7)).await;
                }
            }
            assert_eq!(session.ended().await, End::Unmounted);
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fusermount_mounts_for_those_without_rights() {
    if !rustix::process::geteuid().is_root() {
        // Then every other test is this one.
        return;
    }
    let place = Place::new();
    std::os::unix::fs::chown(place.path(), Some(child::NOBODY), Some(child::NOBODY)).unwrap();
    let mut process = child::start("mount as nobody", place.path().to_str().unwrap(), None);
    until("it has mounted and unmounted", || {
        process.0.try_wait().unwrap().is_some()
    })
    .await;
    assert!(process.0.wait().unwrap().success());
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
