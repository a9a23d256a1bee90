//! Operations that few files have: waiting for readiness, device control, block devices.

#![allow(unsafe_code)]

use crate::memory::Memory;
use crate::mounted::{DEADLINE, Place, application, count, mounted, until};
use crate::probe::{FILE, Note, OpenReplyFlags, Probe};
use lazarette_fuse::abi::Opcode;
use lazarette_fuse::{Config, End, Session, Unmount};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_polls_is_woken() {
    let (place, session) = mounted(Probe::default()).await;
    let path = place.join("file");
    let waits = tokio::spawn(application(move || {
        let file = File::open(path).unwrap();
        let mut waited = [PollFd::new(&file, PollFlags::IN)];
        let limit = Timespec::try_from(DEADLINE).unwrap();
        let count = poll(&mut waited, Some(&limit)).unwrap();
        (count, waited[0].revents())
    }));
    let mut waiter = session.filesystem().waiter.subscribe();
    let waiter = waiter.wait_for(Option::is_some).await.unwrap().unwrap();
    session.filesystem().ready.store(true, Ordering::SeqCst);
    assert_eq!(session.notifier().poll_wakeup(waiter).await, Ok(true));
    assert_eq!(waits.await.unwrap(), (1, PollFlags::IN));
    assert!(count(&session, Opcode::Poll) >= 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn device_control_takes_and_gives() {
    /// `_IOWR('x', 1, [u8; 8])`
    const REVERSE: libc::c_ulong = 3 << 30 | 8 << 16 | (b'x' as libc::c_ulong) << 8 | 1;
    let (place, session) = mounted(Probe::default()).await;
    let path = place.join("file");
    application(move || {
        let file = File::open(path).unwrap();
        let mut bytes = *b"12345678";
        // SAFETY: the command says that it reads and writes eight bytes, which is what there is.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), REVERSE, &mut bytes) };
        assert_eq!((result, &bytes), (5, b"87654321"));
    })
    .await;
    assert_eq!(count(&session, Opcode::Ioctl), 1);
}

/// A handler's task tells the kernel to drop the very page that it is waiting for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_may_invalidate_what_it_reads() {
    let probe = Probe {
        opened: OpenReplyFlags::KEEP_CACHE,
        ..Probe::default()
    };
    probe.change(&vec![7; 100_000]);
    let (place, session) = mounted(probe).await;
    *session.filesystem().notifier.lock().unwrap() = Some(session.notifier());
    let path = place.join("file");
    let reads = || {
        let notes = session.filesystem().notes();
        notes.iter().filter(|note| matches!(note, Note::Read { .. })).count()
    };
    // A quick application may find the page before it is dropped.
    let deadline = Instant::now() + Duration::from_secs(60);
    while reads() < 20 {
        assert!(Instant::now() < deadline, "{} reads", reads());
        let path = path.clone();
        let content = application(move || fs::read(path).unwrap()).await;
        assert_eq!(content.len(), 100_000);
    }
    assert_eq!(session.notifier().inval_inode(FILE, 0, 0).await, Ok(true));
}

/// A file as a block device.
struct Loop {
    device: String,
    _file: tempfile::NamedTempFile,
}

impl Loop {
    fn new() -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file.path())
            .output()
            .expect("losetup");
        assert!(output.status.success(), "{output:?}");
        Self {
            device: String::from_utf8(output.stdout).unwrap().trim().into(),
            _file: file,
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

fn mount_block_device(device: &str, place: &Path) -> OwnedFd {
    let connection = OwnedFd::from(File::options().read(true).write(true).open("/dev/fuse").unwrap());
    let number = connection.as_raw_fd();
    let options = format!("fd={number},rootmode=40000,user_id=0,group_id=0,blksize=4096");
    let options = std::ffi::CString::new(options).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount(device, place, "fuseblk", flags, options.as_c_str()).unwrap();
    connection
}

/// Only such mounts are asked to make everything durable (Linux 6.18), for a block's number, and told
/// that they go away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_system_of_a_block_device() {
    const FIBMAP: libc::c_ulong = 1;
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let device = Loop::new();
    let place = Place::new();
    // INIT is sent by mount(2), which does not wait for the answer.
    let connection = mount_block_device(&device.device, place.path());
    let mountpoint = Some(place.path().to_owned());
    let session = Session::start(Memory::new(), connection, mountpoint, Config::default())
        .await
        .unwrap();
    let path = place.join("file");
    application(move || {
        fs::write(&path, b"content").unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        file.write_all_at(b"more", 100).unwrap();
        rustix::fs::syncfs(&file).unwrap();
        let mut block = 0i32;
        // SAFETY: the command reads and writes the int whose address it gets.
        let found = unsafe { libc::ioctl(file.as_raw_fd(), FIBMAP, &mut block) };
        // Which it has no answer to: then the kernel says "no block" or that it knows no such call.
        assert!(found == 0 && block == 0 || found < 0, "{found}");
    })
    .await;
    assert_eq!(count(&session, Opcode::Bmap), 1);
    if session.parameters().kernel_minor >= 45 {
        assert!(count(&session, Opcode::Syncfs) >= 1);
    }
    session.unmount(Unmount::Orderly).await.unwrap();
    assert_eq!(session.ended().await, End::Unmounted);
    until("it is told that it goes away", || count(&session, Opcode::Destroy) == 1).await;
}
