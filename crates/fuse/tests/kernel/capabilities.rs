//! What kernel and file system agree on, each by what it changes.

use crate::child::{self, NOBODY};
use crate::memory::Memory;
use crate::mounted::{Place, application, count, mounted, mounted_with, options, until};
use crate::probe::{FILE, Note, OpenReplyFlags, Probe};
use lazarette_fuse::abi::{self, Capabilities, Opcode};
use lazarette_fuse::{Config, MountOptions, Session, Terms};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

/// Of a directory, and of one of nobody's groups.
const GROUP: u32 = 4242;

fn with(capabilities: Capabilities) -> Config {
    let terms = Terms {
        wanted: Terms::default().wanted | capabilities,
        required: capabilities,
        ..Terms::default()
    };
    Config {
        terms,
        ..Config::default()
    }
}

/// Open for everybody, as far as the mount itself goes.
async fn mounted_for_all(probe: Probe, config: Config) -> (Place, Session<Probe>) {
    let place = Place::new();
    fs::set_permissions(place.path(), Permissions::from_mode(0o755)).unwrap();
    let options = MountOptions {
        allow_other: true,
        ..options()
    };
    let session = Session::mount(probe, place.path(), options, config).await.unwrap();
    (place, session)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newest_version_and_all_that_is_wanted_are_agreed_on() {
    let (_place, session) = mounted(Memory::new()).await;
    let parameters = session.parameters();
    assert_eq!(parameters.minor, parameters.kernel_minor.min(abi::MINOR));
    let wanted = Terms::default().wanted;
    assert_eq!(parameters.agreed, wanted & parameters.offered);
    if parameters.kernel_minor <= abi::MINOR {
        let unknown = parameters.offered - Capabilities::all();
        assert!(
            unknown.is_empty(),
            "the kernel offers what has no name here: {unknown:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn opening_may_need_no_request() {
    for (unopened, expected, used) in [(false, [3, 3, 3, 3], 7), (true, [1, 1, 0, 0], 0)] {
        let probe = Probe {
            unopened,
            ..Probe::default()
        };
        probe.change(b"content");
        let (place, session) = mounted(probe).await;
        let path = place.path().to_owned();
        application(move || {
            for _ in 0..3 {
                assert_eq!(fs::read(path.join("file")).unwrap(), b"content");
                assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
            }
        })
        .await;
        let asked = [Opcode::Open, Opcode::Opendir, Opcode::Release, Opcode::Releasedir];
        // Closing is told after close(2).
        until("all are opened and closed", || {
            asked.map(|opcode| count(&session, opcode)) == expected
        })
        .await;
        let notes = session.filesystem().notes();
        let as_opened = |note: &Note| matches!(note, Note::Read { handle, .. } if *handle == used);
        assert!(!notes.is_empty() && notes.iter().all(as_opened));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn opening_truncates_in_the_same_request() {
    for (config, setattrs) in [(with(Capabilities::ATOMIC_O_TRUNC), 0), (Config::default(), 1)] {
        let (place, session) = mounted_with(Memory::new(), config).await;
        let path = place.join("file");
        application(move || {
            fs::write(&path, b"content").unwrap();
            let file = File::options().write(true).truncate(true).open(&path).unwrap();
            assert_eq!(file.metadata().unwrap().len(), 0);
        })
        .await;
        assert_eq!(count(&session, Opcode::Setattr), setattrs);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_of_one_directory_are_looked_up_at_the_same_time() {
    let (place, session) = mounted(Probe::default()).await;
    session.filesystem().gate.send_replace(false);
    let look_up = |name: &str| {
        let path = place.join(name);
        tokio::spawn(application(move || fs::metadata(path).unwrap()))
    };
    let both = [look_up("a"), look_up("b")];
    until("both are looked up", || {
        let requests = session.in_flight();
        requests.iter().filter(|one| one.opcode == Opcode::Lookup).count() == 2
    })
    .await;
    session.filesystem().gate.send_replace(true);
    for one in both {
        one.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_kernel_keeps_what_is_written() {
    let (place, session) = mounted_with(Probe::default(), with(Capabilities::WRITEBACK_CACHE)).await;
    let path = place.join("file");
    application(move || {
        let mut file = OpenOptions::new().write(true).open(&path).unwrap();
        for number in 0..8192u32 {
            file.write_all(&[number as u8]).unwrap();
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 8192, "the kernel knows the size");
        file.sync_all().unwrap();
    })
    .await;
    let notes = session.filesystem().notes();
    let writes: Vec<_> = notes.iter().filter(|note| matches!(note, Note::Write { .. })).collect();
    assert!((1..=10).contains(&writes.len()), "{writes:?}");
    assert!(
        writes
            .iter()
            .all(|note| matches!(note, Note::Write { from_cache: true, .. }))
    );
    // The kernel's times, too.
    assert!(count(&session, Opcode::Setattr) > 0);
    session.notifier().inval_inode(FILE, 0, 0).await.unwrap();
    let path = place.join("file");
    let content = application(move || fs::read(path).unwrap()).await;
    assert!(content.iter().enumerate().all(|(index, byte)| *byte == index as u8));
}

async fn content(path: &Path) -> Vec<u8> {
    let path = path.to_owned();
    application(move || fs::read(path).unwrap()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cached_data_go_by_themselves_or_when_told_so() {
    let explicit = Capabilities::EXPLICIT_INVAL_DATA;
    let told = Terms {
        wanted: (Terms::default().wanted - Capabilities::AUTO_INVAL_DATA) | explicit,
        required: explicit,
        ..Terms::default()
    };
    for terms in [Terms::default(), told] {
        let probe = Probe {
            opened: OpenReplyFlags::KEEP_CACHE,
            ..Probe::default()
        };
        probe.change(b"old");
        let config = Config {
            terms,
            ..Config::default()
        };
        let (place, session) = mounted_with(probe, config).await;
        let file = place.join("file");
        assert_eq!(content(&file).await, b"old");
        session.filesystem().change(b"new");
        if session.parameters().has(explicit) {
            assert_eq!(content(&file).await, b"old");
            assert_eq!(session.notifier().inval_inode(FILE, 0, 0).await, Ok(true));
        }
        assert_eq!(content(&file).await, b"new");
    }
}

/// The system calls of an NFS server, for which there is no safe form.
#[allow(unsafe_code)]
mod handle {
    use std::ffi::CString;
    use std::fs::File;
    use std::io::{Error, Result};
    use std::os::fd::{AsRawFd, FromRawFd};
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    /// `struct file_handle` with room for any.
    #[repr(C)]
    pub(super) struct Handle {
        bytes: u32,
        kind: i32,
        content: [u8; 128],
    }

    pub(super) fn of(path: &Path) -> Result<Handle> {
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        let mut handle = Handle {
            bytes: 128,
            kind: 0,
            content: [0; 128],
        };
        let mut mount = 0i32;
        // SAFETY: the path is terminated, the handle has the room that it says, the mount id is an int.
        let done = unsafe {
            let call = libc::SYS_name_to_handle_at;
            libc::syscall(call, libc::AT_FDCWD, path.as_ptr(), &mut handle, &mut mount, 0)
        };
        if done == 0 {
            Ok(handle)
        } else {
            Err(Error::last_os_error())
        }
    }

    pub(super) fn open(mount: &File, handle: &Handle) -> Result<File> {
        // SAFETY: the handle is as the kernel filled it; a result that is not negative is a
        // descriptor that nobody else has.
        unsafe {
            let call = libc::SYS_open_by_handle_at;
            match libc::syscall(call, mount.as_raw_fd(), handle, libc::O_RDONLY) {
                number if number < 0 => Err(Error::last_os_error()),
                number => Ok(File::from_raw_fd(number as i32)),
            }
        }
    }
}

/// As for an NFS client that comes back with a handle of a file that the kernel has forgotten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handles_of_files_outlive_the_cache() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let (place, session) = mounted_with(Memory::new(), with(Capabilities::EXPORT_SUPPORT)).await;
    let path = place.path().to_owned();
    let (mount, handle) = application(move || {
        fs::create_dir_all(path.join("a/b")).unwrap();
        fs::write(path.join("a/b/file"), b"content").unwrap();
        (File::open(&path).unwrap(), handle::of(&path.join("a/b/file")).unwrap())
    })
    .await;
    session.notifier().inval_entry(abi::ROOT, "a".as_ref()).await.unwrap();
    until("the kernel has forgotten the file", || {
        count(&session, Opcode::Forget) + count(&session, Opcode::BatchForget) > 0
    })
    .await;
    let before = count(&session, Opcode::Lookup);
    application(move || {
        let mut text = String::new();
        let mut file = handle::open(&mount, &handle).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
    })
    .await;
    assert!(count(&session, Opcode::Lookup) > before);
}

/// A process that is nobody reads and is refused.
pub(crate) fn read_as_nobody(path: &str) {
    child::become_nobody(&[]);
    match fs::read(path) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::PermissionDenied => std::process::exit(13),
        Err(error) => panic!("{error}"),
    }
}

/// A process that is nobody, but in the directory's group.
pub(crate) fn create_in_group(path: &str) {
    child::become_nobody(&[GROUP]);
    File::create_new(path).unwrap();
}

/// A list of access rights: the owner everything, one more user reading, nobody else anything.
fn rights(user: u32) -> Vec<u8> {
    let entry = |tag: u16, rights: u16, id: u32| {
        let mut bytes = tag.to_le_bytes().to_vec();
        bytes.extend(rights.to_le_bytes());
        bytes.extend(id.to_le_bytes());
        bytes
    };
    const NO_ID: u32 = u32::MAX;
    let entries = [
        entry(0x01, 6, NO_ID),
        entry(0x02, 4, user),
        entry(0x04, 0, NO_ID),
        entry(0x10, 4, NO_ID),
        entry(0x20, 0, NO_ID),
    ];
    [2u32.to_le_bytes().to_vec(), entries.concat()].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_kernel_keeps_to_lists_of_access_rights() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    for (user, refused) in [(NOBODY, None), (1, Some(13))] {
        let probe = Probe {
            mode: 0o640,
            rights: rights(user),
            ..Probe::default()
        };
        let (place, session) = mounted_for_all(probe, with(Capabilities::POSIX_ACL)).await;
        let mut reader = child::start("read as nobody", place.join("file").to_str().unwrap(), None);
        until("it has read", || reader.0.try_wait().unwrap().is_some()).await;
        let code = reader.0.wait().unwrap().code();
        assert_eq!(code, Some(refused.unwrap_or(0)));
        assert!(count(&session, Opcode::Getxattr) > 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn creations_tell_the_group_that_lets_them() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let probe = Probe {
        owner: (0, GROUP),
        ..Probe::default()
    };
    let (place, session) = mounted_for_all(probe, with(Capabilities::CREATE_SUPP_GROUP)).await;
    let mut creator = child::start("create in group", place.join("new").to_str().unwrap(), None);
    until("it has created a file", || creator.0.try_wait().unwrap().is_some()).await;
    assert!(creator.0.wait().unwrap().success());
    let created = Note::Created(vec![GROUP]);
    assert!(session.filesystem().notes().contains(&created));
}

/// The kernel goes on by itself while nobody serves, and the next server takes over what is open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_the_kernel_reads_itself_moves_with_the_connection() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut source = tempfile::tempfile().unwrap();
    source.write_all(b"content").unwrap();
    let probe = || {
        let probe = Probe {
            backing: Some(source.try_clone().unwrap()),
            ..Probe::default()
        };
        probe.change(b"not this");
        probe
    };
    let mut config = with(Capabilities::PASSTHROUGH);
    config.terms.max_stack_depth = 1;
    // Dropped after the mount: closing it asks the server.
    let open;
    let (place, first) = mounted_with(probe(), config).await;
    let path = place.join("file");
    open = application(move || File::options().read(true).write(true).open(path).unwrap()).await;
    let at = |offset| {
        let open = open.try_clone().unwrap();
        application(move || {
            let mut part = [0; 4];
            open.read_exact_at(&mut part, offset).unwrap();
            part
        })
    };
    assert_eq!(at(0).await, *b"cont");
    first.pause(std::time::Duration::ZERO).await.unwrap();
    assert_eq!(at(2).await, *b"nten");
    let connection = first.connection().unwrap();
    first.leave().unwrap();
    let second = Session::adopt(probe(), connection, Config::default(), false)
        .await
        .unwrap();
    let writer = open.try_clone().unwrap();
    application(move || writer.write_all_at(b"C", 0).unwrap()).await;
    assert_eq!(at(0).await, *b"Cont");
    for session in [&first, &second] {
        assert_eq!([Opcode::Read, Opcode::Write].map(|one| count(session, one)), [0, 0]);
    }
    application(move || drop(open)).await;
    until("it is closed", || {
        count(&second, Opcode::Release) == 1 && second.in_flight().is_empty()
    })
    .await;
    assert_eq!(second.statistics().panics, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_carries_a_mebibyte() {
    const SIZE: usize = 1 << 20;
    let probe = Probe {
        opened: OpenReplyFlags::DIRECT_IO,
        ..Probe::default()
    };
    let (place, session) = mounted(probe).await;
    let path = place.join("file");
    application(move || {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        // From a page's beginning on, or it would touch one page more than a request has.
        let mut memory = vec![7; SIZE + 4096];
        let start = memory.as_ptr().align_offset(4096);
        let data = &mut memory[start..start + SIZE];
        file.write_all_at(data, 0).unwrap();
        data.fill(0);
        file.read_exact_at(data, 0).unwrap();
        assert!(data.iter().all(|byte| *byte == 7));
    })
    .await;
    let written = Note::Write {
        offset: 0,
        length: SIZE,
        from_cache: false,
        aligned: true,
    };
    let read = Note::Read {
        handle: 7,
        size: SIZE as u32,
    };
    assert_eq!(session.filesystem().notes(), [written, read]);
}
