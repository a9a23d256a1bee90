//! The mount on a real kernel, in front of in-memory servers. Needs root and /dev/fuse.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use lazarette_client::testing::TestCluster;
use rustix::fs::FlockOperation;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};
use support::{TestMount, blocking};

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i % 251) as u8).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_and_attributes() {
    let cluster = TestCluster::start(2).await;
    let mount = TestMount::new(&cluster).await;
    let root = mount.root();
    blocking(move || {
        fs::create_dir(root.join("dir")).unwrap();
        fs::write(root.join("dir/a"), "text").unwrap();
        assert_eq!(fs::read_to_string(root.join("dir/a")).unwrap(), "text");
        fs::rename(root.join("dir/a"), root.join("b")).unwrap();
        assert_eq!(
            fs::metadata(root.join("dir/a")).unwrap_err().kind(),
            ErrorKind::NotFound
        );
        fs::hard_link(root.join("b"), root.join("dir/c")).unwrap();
        assert_eq!(fs::metadata(root.join("b")).unwrap().nlink(), 2);
        symlink("dir/c", root.join("link")).unwrap();
        assert_eq!(fs::read_to_string(root.join("link")).unwrap(), "text");
        assert_eq!(fs::read_link(root.join("link")).unwrap(), Path::new("dir/c"));
        assert_eq!(names(&root), ["b", "dir", "link"]);
        assert_eq!(
            fs::remove_dir(root.join("dir")).unwrap_err().kind(),
            ErrorKind::DirectoryNotEmpty
        );
        fs::remove_file(root.join("dir/c")).unwrap();
        fs::remove_dir(root.join("dir")).unwrap();

        let file = File::open(root.join("b")).unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o640)).unwrap();
        let time = UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
        file.set_modified(time).unwrap();
        let found = fs::metadata(root.join("b")).unwrap();
        assert_eq!(found.mode() & 0o7777, 0o640);
        assert_eq!(found.modified().unwrap(), time);

        rustix::fs::mkfifoat(rustix::fs::CWD, root.join("fifo"), 0o600.into()).unwrap();
        assert!(fs::metadata(root.join("fifo")).unwrap().file_type().is_fifo());

        rustix::fs::setxattr(root.join("b"), "user.colour", b"blue", rustix::fs::XattrFlags::empty()).unwrap();
        let mut value = [0; 16];
        let length = rustix::fs::getxattr(root.join("b"), "user.colour", &mut value).unwrap();
        assert_eq!(&value[..length], b"blue");
        rustix::fs::removexattr(root.join("b"), "user.colour").unwrap();
        assert!(rustix::fs::getxattr(root.join("b"), "user.colour", &mut value).is_err());

        let stat = rustix::fs::statvfs(&root).unwrap();
        assert_eq!(stat.f_blocks * stat.f_frsize, 1 << 30);
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(root.join("b"))
            .unwrap_err();
    })
    .await;
    mount.unmount().await;
    assert_eq!(cluster.sessions(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_directories_are_listed_whole() {
    let cluster = TestCluster::start(1).await;
    let mount = TestMount::new(&cluster).await;
    let root = mount.root();
    blocking(move || {
        let want: Vec<String> = (0..1000).map(|i| format!("{i:04}-{}", "x".repeat(i % 100))).collect();
        for name in &want {
            File::create(root.join(name)).unwrap();
        }
        assert_eq!(names(&root), want);
        // Removing while listing is what rm -r does.
        for entry in fs::read_dir(&root).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        assert!(names(&root).is_empty());
    })
    .await;
    mount.unmount().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reading_writing_and_truncating() {
    let cluster = TestCluster::start(3).await;
    let mount = TestMount::new(&cluster).await;
    let root = mount.root();
    blocking(move || {
        let data = pattern(5_000_000);
        let path = root.join("f");
        fs::write(&path, &data).unwrap();
        assert!(fs::read(&path).unwrap() == data);
        let mut file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        file.write_all_at(b"patch", 2_000_000).unwrap();
        file.seek(SeekFrom::Start(1_999_998)).unwrap();
        let mut got = [0; 9];
        file.read_exact(&mut got).unwrap();
        assert_eq!(&got[2..7], b"patch");
        file.set_len(10).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 10);
        file.set_len(100_000).unwrap();
        let got = fs::read(&path).unwrap();
        assert!(got.len() == 100_000 && got[..10] == data[..10] && got[10..].iter().all(|byte| *byte == 0));
        // A hole far out.
        file.write_all_at(b"end", 50_000_000).unwrap();
        file.sync_all().unwrap();
        let mut got = [1; 8];
        file.read_exact_at(&mut got, 40_000_000).unwrap();
        assert_eq!(got, [0; 8]);
        assert_eq!(fs::metadata(&path).unwrap().len(), 50_000_003);
        drop(file);
        File::create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);

        // Unlinked and still open.
        fs::write(&path, "here").unwrap();
        let mut file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        file.write_all_at(b"still ", 4).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "herestill ");
    })
    .await;
    mount.unmount().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_mount_closes_another_sees() {
    let cluster = TestCluster::start(2).await;
    let one = TestMount::new(&cluster).await;
    let two = TestMount::new(&cluster).await;
    let (here, there) = (one.path("f"), two.path("f"));
    blocking(move || {
        for round in 0..20_usize {
            let text = format!("round {round} {}", "x".repeat(round * 1000 % 7919));
            fs::write(&here, &text).unwrap();
            assert_eq!(fs::read_to_string(&there).unwrap(), text);
            assert_eq!(fs::metadata(&there).unwrap().len(), text.len() as u64);
            // The same length, so that only the change itself gives it away.
            let other = text.to_uppercase();
            fs::write(&there, &other).unwrap();
            assert_eq!(fs::read_to_string(&here).unwrap(), other);
        }
        fs::remove_file(&there).unwrap();
        assert!(!here.exists());
    })
    .await;
    one.unmount().await;
    two.unmount().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_from_two_mounts_are_exact() {
    let cluster = TestCluster::start(2).await;
    let mounts = [TestMount::new(&cluster).await, TestMount::new(&cluster).await];
    let mut writers = Vec::new();
    for (i, mount) in mounts.iter().enumerate() {
        for half in 0..2 {
            let path = mount.path("log");
            writers.push(blocking(move || {
                let mut log = OpenOptions::new().append(true).create(true).open(path).unwrap();
                for line in 0..25 {
                    let text = format!("mount {i} half {half} line {line} {}\n", "y".repeat(line * 11));
                    log.write_all(text.as_bytes()).unwrap();
                }
            }));
        }
    }
    for writer in writers {
        writer.await;
    }
    let path = mounts[0].path("log");
    let text = blocking(move || fs::read_to_string(path).unwrap()).await;
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    let mut want: Vec<String> = (0..2)
        .flat_map(|i| (0..2).map(move |half| (i, half)))
        .flat_map(|(i, half)| {
            (0..25).map(move |line| format!("mount {i} half {half} line {line} {}", "y".repeat(line * 11)))
        })
        .collect();
    want.sort_unstable();
    assert_eq!(lines, want);
    for mount in mounts {
        mount.unmount().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_counter_under_flock_and_under_fcntl_locks() {
    let cluster = TestCluster::start(2).await;
    let mounts = [TestMount::new(&cluster).await, TestMount::new(&cluster).await];
    for posix in [false, true] {
        let mut writers = Vec::new();
        for mount in &mounts {
            let path = mount.path(if posix { "posix" } else { "flock" });
            writers.push(blocking(move || {
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(path)
                    .unwrap();
                let lock = |operation| {
                    if posix {
                        rustix::fs::fcntl_lock(&file, operation).unwrap();
                    } else {
                        rustix::fs::flock(&file, operation).unwrap();
                    }
                };
                for _ in 0..25 {
                    lock(FlockOperation::LockExclusive);
                    let mut text = [0; 16];
                    let length = file.read_at(&mut text, 0).unwrap();
                    let count: u64 = std::str::from_utf8(&text[..length]).unwrap().parse().unwrap_or(0);
                    file.write_all_at((count + 1).to_string().as_bytes(), 0).unwrap();
                    lock(FlockOperation::Unlock);
                }
            }));
        }
        for writer in writers {
            writer.await;
        }
        let path = mounts[1].path(if posix { "posix" } else { "flock" });
        assert_eq!(blocking(move || fs::read_to_string(path).unwrap()).await, "50");
    }
    for mount in mounts {
        mount.unmount().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_end_with_their_files_and_their_waiters() {
    let cluster = TestCluster::start(1).await;
    let one = TestMount::new(&cluster).await;
    let two = TestMount::new(&cluster).await;
    let (here, there) = (one.path("f"), two.path("f"));
    let ino = blocking(move || {
        let file = File::create(&here).unwrap();
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        // The two kinds do not know of each other.
        rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        let other = OpenOptions::new().write(true).open(&there).unwrap();
        let refused = rustix::fs::flock(&other, FlockOperation::NonBlockingLockShared);
        assert_eq!(refused, Err(rustix::io::Errno::WOULDBLOCK));

        // A waiter can be killed.
        let mut waiter = Command::new("flock")
            .arg(&there)
            .arg("true")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert!(waiter.try_wait().unwrap().is_none(), "it waits");
        waiter.kill().unwrap();
        waiter.wait().unwrap();

        drop(file);
        rustix::fs::flock(&other, FlockOperation::LockExclusive).unwrap();
        rustix::fs::fcntl_lock(&other, FlockOperation::LockExclusive).unwrap();
        fs::metadata(&here).unwrap().ino()
    })
    .await;
    for _ in 0..1000 {
        if cluster.locks(ino) == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(cluster.locks(ino), 0);
    one.unmount().await;
    two.unmount().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_mappings_reach_the_other_mount() {
    let cluster = TestCluster::start(2).await;
    let one = TestMount::new(&cluster).await;
    let two = TestMount::new(&cluster).await;
    let (here, there) = (one.path("f"), two.path("f"));
    blocking(move || {
        fs::write(&here, vec![b'.'; 10_000]).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&here).unwrap();
        map(&file, 10_000, |bytes| bytes[5000..5005].copy_from_slice(b"hello"));
        drop(file);
        let got = fs::read(&there).unwrap();
        assert_eq!(got.len(), 10_000);
        assert_eq!(&got[4999..5006], b".hello.");
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .custom_flags(0)
            .open(&there)
            .unwrap();
        map(&file, 10_000, |bytes| bytes[..3].copy_from_slice(b"abc"));
        drop(file);
        let got = fs::read(&here).unwrap();
        assert_eq!((got.len(), &got[..4]), (10_000, &b"abc."[..]));
    })
    .await;
    one.unmount().await;
    two.unmount().await;
}

/// Maps a file shared, lets `change` at it, syncs and unmaps.
#[allow(unsafe_code)]
fn map(file: &File, length: usize, change: impl FnOnce(&mut [u8])) {
    use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};
    // SAFETY: a new mapping at an address that the kernel chooses, of a file that nothing shrinks
    // while it is mapped, gone before the function returns.
    unsafe {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let address = rustix::mm::mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, file, 0).unwrap();
        change(std::slice::from_raw_parts_mut(address.cast(), length));
        rustix::mm::msync(address, length, MsyncFlags::SYNC).unwrap();
        rustix::mm::munmap(address, length).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn set_id_bits_go_when_another_writes() {
    let cluster = TestCluster::start(1).await;
    let mount = TestMount::new(&cluster).await;
    let path = mount.path("f");
    blocking(move || {
        fs::write(&path, "x").unwrap();
        let set_id = || fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
        let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
        set_id();
        std::os::unix::fs::chown(&path, Some(1), Some(1)).unwrap();
        assert_eq!(mode(), 0o755);
        set_id();
        assert_eq!(mode(), 0o6755);
        fs::set_permissions(path.parent().unwrap(), fs::Permissions::from_mode(0o777)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
        let done = Command::new("setpriv")
            .args([
                "--reuid=2",
                "--regid=2",
                "--clear-groups",
                "sh",
                "-c",
                "echo y >> \"$0\"",
            ])
            .arg(&path)
            .status()
            .unwrap();
        assert!(done.success());
        assert_eq!(mode(), 0o777);
    })
    .await;
    mount.unmount().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applications_do_not_notice_a_dying_node() {
    let cluster = TestCluster::start(3).await;
    let mount = TestMount::new(&cluster).await;
    let path = mount.path("f");
    let data = pattern(8_000_000);
    let want = data.clone();
    let writer = tokio::spawn(blocking(move || {
        let mut file = File::create(&path).unwrap();
        for part in data.chunks(50_000) {
            file.write_all(part).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        file.sync_all().unwrap();
        path
    }));
    tokio::time::sleep(Duration::from_millis(50)).await;
    cluster.kill(0, 1).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    cluster.move_owner(2, true);
    cluster.move_primaries(2, false);
    let path = writer.await.unwrap();
    assert!(blocking(move || fs::read(path).unwrap()).await == want);
    mount.unmount().await;
}
