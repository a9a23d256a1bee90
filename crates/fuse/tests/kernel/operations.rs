//! Every operation, through the system calls that cause it.

use crate::memory::Memory;
use crate::mounted::{Place, application, count, mounted, mounted_with, options};
use lazarette_fuse::abi::{Capabilities, Opcode};
use lazarette_fuse::{Config, MountOptions, Session, Terms};
use rustix::fs::{self as sys, Access, AtFlags, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags, XattrFlags};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

/// Fails unless each of these was asked for.
fn assert_asked(session: &Session<Memory>, operations: &[Opcode]) {
    let statistics = session.statistics();
    for operation in operations {
        let found = statistics
            .operations
            .iter()
            .any(|one| one.opcode == *operation && one.requests > 0);
        assert!(found, "the kernel never asked for {operation:?}");
    }
    assert_eq!((statistics.malformed, statistics.panics), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_and_their_data() {
    let (place, session) = mounted(Memory::new()).await;
    let path = place.path().to_owned();
    application(move || {
        let file = path.join("file");
        fs::write(&file, b"hello").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"hello");
        assert_eq!(
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(&file)
                .unwrap_err()
                .kind(),
            ErrorKind::AlreadyExists
        );
        let mut open = OpenOptions::new().read(true).append(true).open(&file).unwrap();
        open.write_all(b" world").unwrap();
        open.sync_all().unwrap();
        open.sync_data().unwrap();
        let mut text = String::new();
        open.seek(SeekFrom::Start(6)).unwrap();
        open.read_to_string(&mut text).unwrap();
        assert_eq!(text, "world");
        // Larger than one request, at odd places.
        let big: Vec<u8> = (0..5_000_003u32).map(|number| (number * 7 % 251) as u8).collect();
        let large = path.join("large");
        fs::write(&large, &big).unwrap();
        assert!(fs::read(&large).unwrap() == big);
        let reader = File::open(&large).unwrap();
        let mut part = vec![0; 1_000_001];
        reader.read_exact_at(&mut part, 3_333_333).unwrap();
        assert!(part == big[3_333_333..][..1_000_001]);
        // Opening truncates in one operation.
        File::create(&large).unwrap();
        assert_eq!(fs::metadata(&large).unwrap().len(), 0);
        let sparse = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&large)
            .unwrap();
        sparse.write_all_at(b"x", 1 << 20).unwrap();
        assert_eq!(sys::seek(&sparse, sys::SeekFrom::Data(0)).unwrap(), 1 << 20);
        assert_eq!(sys::seek(&sparse, sys::SeekFrom::Hole(1 << 20)).unwrap(), (1 << 20) + 1);
        sys::fallocate(
            &sparse,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            1 << 20,
            1,
        )
        .unwrap();
        sys::fallocate(&sparse, FallocateFlags::empty(), 0, 2 << 20).unwrap();
        assert_eq!(sparse.metadata().unwrap().len(), 2 << 20);
        let source = File::open(&file).unwrap();
        let mut from = 6;
        let mut to = 10;
        assert_eq!(
            sys::copy_file_range(&source, Some(&mut from), &sparse, Some(&mut to), 5).unwrap(),
            5
        );
        let mut copied = [0; 5];
        sparse.read_exact_at(&mut copied, 10).unwrap();
        assert_eq!(&copied, b"world");
        sys::syncfs(&sparse).unwrap();
        sparse.set_len(3).unwrap();
        assert_eq!(sparse.metadata().unwrap().len(), 3);
        fs::remove_file(&file).unwrap();
        // Unlinked, still open.
        let mut byte = [0; 1];
        source.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(&byte, b"h");
    })
    .await;
    let mut asked = vec![
        Opcode::Lookup,
        Opcode::Create,
        Opcode::Open,
        Opcode::Read,
        Opcode::Write,
        Opcode::Setattr,
    ];
    asked.extend([
        Opcode::Fsync,
        Opcode::Release,
        Opcode::Unlink,
        Opcode::Lseek,
        Opcode::Fallocate,
    ]);
    // The newer form came with 7.45.
    asked.push(match session.parameters().kernel_minor {
        ..=44 => Opcode::CopyFileRange,
        _ => Opcode::CopyFileRange64,
    });
    assert_asked(&session, &asked);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_and_directories() {
    let (place, session) = mounted(Memory::new()).await;
    let path = place.path().to_owned();
    application(move || {
        let directory = path.join("directory");
        fs::create_dir(&directory).unwrap();
        let names: Vec<String> = (0..1000)
            .map(|number| format!("a somewhat longer name {number:04}"))
            .collect();
        for name in &names {
            File::create(directory.join(name)).unwrap();
        }
        let mut listed: Vec<_> = fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        listed.sort();
        assert_eq!(listed, names);
        assert_eq!(
            fs::remove_dir(&directory).unwrap_err().kind(),
            ErrorKind::DirectoryNotEmpty
        );
        File::open(&directory).unwrap().sync_all().unwrap();
        let moved = path.join("moved");
        fs::rename(directory.join(&names[0]), &moved).unwrap();
        assert!(!directory.join(&names[0]).exists() && moved.exists());
        let cwd = sys::CWD;
        let other = directory.join(&names[1]);
        let refused = sys::renameat_with(cwd, &moved, cwd, &other, RenameFlags::NOREPLACE).unwrap_err();
        assert_eq!(refused, rustix::io::Errno::EXIST);
        let (before, after) = (fs::metadata(&moved).unwrap().ino(), fs::metadata(&other).unwrap().ino());
        sys::renameat_with(cwd, &moved, cwd, &other, RenameFlags::EXCHANGE).unwrap();
        assert_eq!(
            (fs::metadata(&other).unwrap().ino(), fs::metadata(&moved).unwrap().ino()),
            (before, after)
        );
        fs::hard_link(&moved, path.join("second")).unwrap();
        assert_eq!(fs::metadata(&moved).unwrap().nlink(), 2);
        symlink("moved", path.join("symbolic")).unwrap();
        assert_eq!(fs::read_link(path.join("symbolic")).unwrap().to_str(), Some("moved"));
        assert_eq!(fs::metadata(path.join("symbolic")).unwrap().ino(), after);
        sys::mknodat(cwd, path.join("pipe"), sys::FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert_eq!(fs::metadata(path.join("pipe")).unwrap().mode(), 0o010_700);
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(fs::metadata(&directory).unwrap_err().kind(), ErrorKind::NotFound);
        let long = path.join("x".repeat(256));
        assert_eq!(fs::metadata(&long).unwrap_err().raw_os_error(), Some(36));
    })
    .await;
    let mut asked = vec![
        Opcode::Mkdir,
        Opcode::Rmdir,
        Opcode::Rename2,
        Opcode::Link,
        Opcode::Symlink,
    ];
    asked.extend([
        Opcode::Readlink,
        Opcode::Mknod,
        Opcode::Readdirplus,
        Opcode::Fsyncdir,
        Opcode::Opendir,
    ]);
    assert_asked(&session, &asked);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attributes() {
    let (place, session) = mounted(Memory::new()).await;
    let path = place.path().to_owned();
    application(move || {
        let file = path.join("file");
        File::create(&file).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o4751)).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().mode(), 0o104_751);
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&file, Some(12), Some(34)).unwrap();
            let metadata = fs::metadata(&file).unwrap();
            assert_eq!((metadata.uid(), metadata.gid(), metadata.mode()), (12, 34, 0o100_751));
        }
        let times = sys::Timestamps {
            last_access: sys::Timespec { tv_sec: -5, tv_nsec: 7 },
            last_modification: sys::Timespec {
                tv_sec: 1 << 33,
                tv_nsec: 999_999_999,
            },
        };
        sys::utimensat(sys::CWD, &file, &times, AtFlags::empty()).unwrap();
        let metadata = fs::metadata(&file).unwrap();
        assert_eq!((metadata.atime(), metadata.atime_nsec()), (-5, 7));
        assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (1 << 33, 999_999_999));
        sys::setxattr(&file, "user.name", b"value", XattrFlags::empty()).unwrap();
        let mut value = [0; 100];
        let length = sys::getxattr(&file, "user.name", &mut value[..]).unwrap();
        assert_eq!(&value[..length], b"value");
        assert_eq!(sys::getxattr_query(&file, "user.name").unwrap(), 5);
        assert_eq!(
            sys::getxattr(&file, "user.name", &mut [0; 4][..]).unwrap_err(),
            rustix::io::Errno::RANGE
        );
        let length = sys::listxattr(&file, &mut value[..]).unwrap();
        assert_eq!(&value[..length], b"user.name\0");
        let again = sys::setxattr(&file, "user.name", b"", XattrFlags::CREATE).unwrap_err();
        assert_eq!(again, rustix::io::Errno::EXIST);
        sys::removexattr(&file, "user.name").unwrap();
        assert_eq!(sys::listxattr(&file, &mut value[..]).unwrap(), 0);
        let large = vec![7; 60_000];
        sys::setxattr(&file, "user.large", &large, XattrFlags::empty()).unwrap();
        let mut value = vec![0; 65_536];
        assert_eq!(sys::getxattr(&file, "user.large", &mut value[..]).unwrap(), 60_000);
        let figures = sys::statvfs(&path).unwrap();
        assert_eq!((figures.f_blocks, figures.f_namemax), (1 << 30, 255));
        // A terminal it is not.
        let open = File::open(&file).unwrap();
        assert_eq!(rustix::termios::tcgetattr(&open).unwrap_err(), rustix::io::Errno::NOTTY);
    })
    .await;
    let mut asked = vec![
        Opcode::Setattr,
        Opcode::Setxattr,
        Opcode::Getxattr,
        Opcode::Listxattr,
        Opcode::Removexattr,
    ];
    asked.extend([Opcode::Statfs, Opcode::Ioctl]);
    assert_asked(&session, &asked);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_without_a_name() {
    let (place, session) = mounted(Memory::new()).await;
    let path = place.path().to_owned();
    application(move || {
        let file = sys::open(&path, OFlags::TMPFILE | OFlags::RDWR, Mode::RUSR | Mode::WUSR).unwrap();
        rustix::io::write(&file, b"secret").unwrap();
        assert_eq!(sys::fstat(&file).unwrap().st_nlink, 0);
        let number = file.as_raw_fd();
        let from = format!("/proc/self/fd/{number}");
        sys::linkat(sys::CWD, from, sys::CWD, path.join("named"), AtFlags::SYMLINK_FOLLOW).unwrap();
        assert_eq!(fs::read(path.join("named")).unwrap(), b"secret");
    })
    .await;
    assert_asked(&session, &[Opcode::Tmpfile, Opcode::Link]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_of_both_kinds() {
    let (place, session) = mounted(Memory::new()).await;
    let path = place.path().to_owned();
    application(move || {
        let open = || {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options.open(path.join("file")).unwrap()
        };
        let (first, second) = (open(), open());
        let lock = |file: &File, how| sys::flock(file, how);
        lock(&first, FlockOperation::NonBlockingLockShared).unwrap();
        lock(&second, FlockOperation::NonBlockingLockShared).unwrap();
        let refused = lock(&second, FlockOperation::NonBlockingLockExclusive);
        assert_eq!(refused, Err(rustix::io::Errno::AGAIN));
        lock(&first, FlockOperation::Unlock).unwrap();
        lock(&second, FlockOperation::LockExclusive).unwrap();
        // fcntl(2) knows two owners in one process: the process, and an open file.
        assert_eq!(in_the_way(&first, 10, 20), None);
        lock_of_open_file(&second, 15, 30);
        assert_eq!(in_the_way(&first, 10, 20), Some((15, 16)));
        assert_eq!(in_the_way(&first, 31, 40), None);
        // With the last descriptor its locks go.
        drop(second);
        assert_eq!(in_the_way(&first, 10, 20), None);
        lock(&first, FlockOperation::NonBlockingLockExclusive).unwrap();
    })
    .await;
    assert_asked(&session, &[Opcode::Getlk, Opcode::Setlk, Opcode::Setlkw, Opcode::Flush]);
}

#[allow(unsafe_code)]
fn range(start: i64, end: i64) -> libc::flock {
    // SAFETY: all its fields are numbers.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = libc::F_WRLCK as i16;
    range.l_start = start;
    range.l_len = end - start + 1;
    range
}

/// Start and length of a lock that keeps this process from an exclusive one.
#[allow(unsafe_code)]
fn in_the_way(file: &File, start: i64, end: i64) -> Option<(i64, i64)> {
    let mut range = range(start, end);
    // SAFETY: the command reads and writes the structure whose address it gets.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &mut range) }, 0);
    (range.l_type != libc::F_UNLCK as i16).then_some((range.l_start, range.l_len))
}

#[allow(unsafe_code)]
fn lock_of_open_file(file: &File, start: i64, end: i64) {
    let range = range(start, end);
    // SAFETY: the command reads the structure whose address it gets.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &range) }, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_time_of_creation() {
    let (place, session) = mounted(Memory::new()).await;
    let path = place.join("file");
    application(move || {
        fs::write(&path, b"content").unwrap();
        let created = fs::metadata(&path).unwrap().created().unwrap();
        fs::write(&path, b"more").unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.created().unwrap(), created);
        assert!(metadata.modified().unwrap() > created);
        assert_eq!((metadata.len(), metadata.mode() & 0o170_000), (4, 0o100_000));
    })
    .await;
    assert_asked(&session, &[Opcode::Statx]);
}

/// By older kernels, and mounts that check permissions themselves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listings_without_attributes_and_checks_of_permissions() {
    let place = Place::new();
    let options = MountOptions {
        default_permissions: false,
        ..options()
    };
    let terms = Terms {
        wanted: Terms::default().wanted - Capabilities::READDIRPLUS - Capabilities::READDIRPLUS_AUTO,
        ..Terms::default()
    };
    let config = Config {
        terms,
        ..Config::default()
    };
    let session = Session::mount(Memory::new(), place.path(), options, config)
        .await
        .unwrap();
    let path = place.path().to_owned();
    application(move || {
        for number in 0..300 {
            File::create(path.join(number.to_string())).unwrap();
        }
        assert_eq!(fs::read_dir(&path).unwrap().count(), 300);
        sys::access(path.join("7"), Access::READ_OK | Access::WRITE_OK).unwrap();
        fs::rename(path.join("7"), path.join("seven")).unwrap();
    })
    .await;
    assert_asked(&session, &[Opcode::Readdir, Opcode::Access, Opcode::Rename]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_removed_is_forgotten() {
    let (place, session) = mounted(Memory::new()).await;
    let path = place.path().to_owned();
    application(move || {
        for number in 0..500 {
            let file = path.join(number.to_string());
            fs::write(&file, b"x").unwrap();
            fs::remove_file(&file).unwrap();
        }
    })
    .await;
    crate::mounted::until("nothing is left but the root", || {
        session.filesystem().nodes() == 1 && session.in_flight().is_empty()
    })
    .await;
    assert!(count(&session, Opcode::Forget) + count(&session, Opcode::BatchForget) > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parallel_use_by_one_reader_and_by_many() {
    for readers in [1, 6] {
        let (place, session) = mounted_with(
            Memory::new(),
            Config {
                readers,
                ..Config::default()
            },
        )
        .await;
        let path = place.path().to_owned();
        application(move || {
            std::thread::scope(|scope| {
                for thread in 0..8 {
                    let path = &path;
                    scope.spawn(move || {
                        for round in 0..50 {
                            let file = path.join(format!("{thread}-{round}"));
                            fs::write(&file, vec![thread as u8; 10_000]).unwrap();
                            assert_eq!(fs::read(&file).unwrap(), vec![thread as u8; 10_000]);
                            fs::rename(&file, path.join(format!("{thread}"))).unwrap();
                        }
                    });
                }
            });
            assert_eq!(fs::read_dir(&path).unwrap().count(), 8);
        })
        .await;
        until_idle(&session).await;
    }
}

async fn until_idle(session: &Session<Memory>) {
    crate::mounted::until("nothing is under way", || session.in_flight().is_empty()).await;
}
