//! Quota, holes, the largest file.

use super::{mounted, run};
use lazarette_e2e::story::Mounts;
use lazarette_proto::cluster::ExpandVolumeRequest;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::support::Cluster;

const MIB: u64 = 1 << 20;

/// Writes until the volume is full; the bytes that were taken.
fn fill(path: &Path) -> u64 {
    let mut file = File::create(path).unwrap();
    let mut taken = 0;
    loop {
        match file.write(&[7; 64 << 10]) {
            Ok(length) => taken += length as u64,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
                break;
            }
        }
    }
    // All that write(2) has taken is there.
    file.sync_all().unwrap();
    taken
}

#[tokio::test]
async fn a_volume_takes_what_its_size_allows() {
    let cluster = Cluster::up().await;
    let volume = cluster.inner.volume_of("small", 40 * MIB).await.unwrap();
    let mounts = Mounts::new(&cluster.inner, "small", 2).await.unwrap();
    let used = |client: usize| {
        let stat = rustix::fs::statvfs(mounts.path(client, "")).unwrap();
        assert_eq!(stat.f_blocks * stat.f_frsize % MIB, 0);
        (
            (stat.f_blocks - stat.f_bfree) * stat.f_frsize,
            stat.f_blocks * stat.f_frsize,
        )
    };
    // Two writers of one node are refused at the same moment, at the volume's size exactly.
    let paths = [mounts.path(0, "a"), mounts.path(0, "b")];
    let writers = paths.clone().map(|path| std::thread::spawn(move || fill(&path)));
    let taken: u64 = writers.map(|writer| writer.join().unwrap()).iter().sum();
    assert_eq!(taken, 40 * MIB);
    assert_eq!((used(0), used(1)), ((40 * MIB, 40 * MIB), (40 * MIB, 40 * MIB)));
    let full = |client, name: &str| fs::write(mounts.path(client, name), "x").unwrap_err().kind();
    assert_eq!([full(0, "c"), full(1, "c")], [ErrorKind::StorageFull; 2]);
    let file = OpenOptions::new().write(true).open(&paths[0]).unwrap();
    file.write_all_at(b"overwritten", 5).unwrap();
    file.sync_all().unwrap();
    // Freed space is there at once, on all nodes, and so is added space.
    let length = file.metadata().unwrap().len();
    file.set_len(length - MIB).unwrap();
    fs::write(mounts.path(1, "d"), vec![1; MIB as usize]).unwrap();
    assert_eq!(full(1, "e"), ErrorKind::StorageFull);
    let expand = ExpandVolumeRequest {
        id: volume.id,
        size: 48 * MIB,
    };
    cluster
        .inner
        .client()
        .await
        .unwrap()
        .expand_volume(expand)
        .await
        .unwrap();
    let deadline = lazarette_e2e::Deadline::secs(30);
    lazarette_e2e::wait_for(deadline, "the volume to be larger", || async {
        Ok((used(1).1 == 48 * MIB).then_some(()))
    })
    .await
    .unwrap();
    assert_eq!(fill(&mounts.path(1, "e")), 8 * MIB);
    drop(file);
    // Nodes that do not know of each other's unwritten bytes: what does not fit is refused at the latest
    // when it is made durable, and never counted.
    for name in ["a", "b", "d", "e"] {
        fs::remove_file(mounts.path(0, name)).ok();
    }
    let both: Vec<_> = (0..2)
        .map(|client| {
            let path = mounts.path(client, &format!("both-{client}"));
            std::thread::spawn(move || {
                let mut file = File::create(path).unwrap();
                let mut taken = 0;
                while file.write_all(&[9; 1 << 20]).is_ok() {
                    taken += MIB;
                }
                let synced = file.sync_all();
                let size = file.metadata().unwrap().len();
                assert!(synced.is_err() || size >= taken, "{size} of {taken}");
            })
        })
        .collect();
    for writer in both {
        writer.join().unwrap();
    }
    // What is refused at once is all that was unwritten of a file, 32 MiB at most.
    assert!(used(0).0 <= 48 * MIB && used(0).0 > 16 * MIB, "{:?}", used(0));
    cluster.down().await;
}

#[tokio::test]
async fn a_file_of_16_tib() {
    const LARGEST: u64 = 16 << 40;
    let cluster = Cluster::up().await;
    cluster.inner.volume_of("large", 2 * LARGEST).await.unwrap();
    let mounts = Mounts::new(&cluster.inner, "large", 2).await.unwrap();
    let file = File::create(mounts.path(0, "f")).unwrap();
    file.write_all_at(b"first", 0).unwrap();
    file.write_all_at(b"last", LARGEST - 4).unwrap();
    file.sync_all().unwrap();
    assert_eq!(file.metadata().unwrap().len(), LARGEST);
    let there = File::open(mounts.path(1, "f")).unwrap();
    let at = |offset, length| {
        let mut bytes = vec![1; length];
        there.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    };
    assert_eq!((at(0, 5), at(LARGEST - 4, 4)), (b"first".to_vec(), b"last".to_vec()));
    assert!(at(7 << 40, 1 << 20).iter().all(|byte| *byte == 0));
    let refused = file.write_all_at(b"x", LARGEST).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(27));
    assert_eq!(file.set_len(LARGEST + 1).unwrap_err().raw_os_error(), Some(27));
    drop((file, there));
    fs::remove_file(mounts.path(1, "f")).unwrap();
    cluster.down().await;
}

#[tokio::test]
async fn holes_and_copies() {
    let (cluster, mounts) = mounted("holes", 2).await;
    let open = |client, name: &str| {
        let options = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .clone();
        options.open(mounts.path(client, name)).unwrap()
    };
    let file = open(0, "f");
    let mut want = vec![5_u8; 10 << 20];
    file.write_all_at(&want, 0).unwrap();
    let keep = FallocateFlags::KEEP_SIZE;
    let check = |want: &[u8]| assert!(fs::read(mounts.path(1, "f")).unwrap() == want);

    fallocate(&file, keep | FallocateFlags::PUNCH_HOLE, 3 * MIB, 6 * MIB).unwrap();
    want[3 << 20..9 << 20].fill(0);
    check(&want);
    fallocate(&file, keep | FallocateFlags::ZERO_RANGE, 100, 1000).unwrap();
    want[100..1100].fill(0);
    check(&want);
    fallocate(&file, FallocateFlags::ZERO_RANGE, (10 << 20) - 5, 1000).unwrap();
    want[(10 << 20) - 5..].fill(0);
    want.resize((10 << 20) + 995, 0);
    check(&want);
    fallocate(&file, FallocateFlags::empty(), 0, (10 << 20) + 2000).unwrap();
    want.resize((10 << 20) + 2000, 0);
    check(&want);
    fallocate(&file, keep, 0, 5 << 20).unwrap();
    // Nothing is promised beyond the end, nor moved about.
    let unsupported = Err(rustix::io::Errno::OPNOTSUPP);
    assert_eq!(fallocate(&file, keep, 0, 1 << 30), unsupported);
    assert_eq!(fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, 4096), unsupported);
    check(&want);

    // All is data up to the end, as POSIX allows.
    assert_eq!(seek(&file, SeekFrom::Data(4 << 20)).unwrap(), 4 << 20);
    assert_eq!(seek(&file, SeekFrom::Hole(0)).unwrap(), want.len() as u64);
    assert_eq!(seek(&file, SeekFrom::Data(1 << 30)), Err(rustix::io::Errno::NXIO));

    // What was written and is not flushed is copied, too.
    let copy = open(0, "copy");
    file.write_all_at(b"fresh", 7).unwrap();
    want[7..12].copy_from_slice(b"fresh");
    let (mut from, mut to) = (0, 0);
    while from < want.len() as u64 {
        let left = want.len() - from as usize;
        let copied = rustix::fs::copy_file_range(&file, Some(&mut from), &copy, Some(&mut to), left).unwrap();
        assert!(copied > 0);
    }
    drop(copy);
    assert!(fs::read(mounts.path(1, "copy")).unwrap() == want);
    let sparse = run(
        "cp",
        &[
            "--sparse=always",
            mounts.path(1, "f").to_str().unwrap(),
            mounts.path(0, "cp").to_str().unwrap(),
        ],
    );
    assert!(sparse.status.success(), "{sparse:?}");
    drop(file);
    assert!(fs::read(mounts.path(1, "cp")).unwrap() == want);
    cluster.down().await;
}

#[tokio::test]
async fn extended_attributes_by_their_kinds() {
    use rustix::fs::{XattrFlags, getxattr, listxattr, setxattr};
    let (cluster, mounts) = mounted("xattrs", 1).await;
    let path = mounts.path(0, "f");
    fs::write(&path, "#!/bin/sh\n").unwrap();
    let set = |name: &str, value: &[u8]| setxattr(&path, name, value, XattrFlags::empty());
    for name in ["user.a", "trusted.b", "security.c"] {
        set(name, b"value").unwrap();
        let mut value = [0; 10];
        assert_eq!(getxattr(&path, name, &mut value), Ok(5));
    }
    // Access control lists are refused, not ignored.
    let entries = [(1_u8, 7_u8), (4, 4), (0x20, 4)].map(|(tag, rights)| [tag, 0, rights, 0, 255, 255, 255, 255]);
    let acl = [&[2, 0, 0, 0][..], &entries.concat()].concat();
    assert_eq!(set("system.posix_acl_access", &acl), Err(rustix::io::Errno::OPNOTSUPP));
    assert_eq!(set("user.large", &vec![1; 65536]), Ok(()));
    assert_eq!(set("user.larger", &vec![1; 65537]), Err(rustix::io::Errno::TOOBIG));
    let mut names = vec![0; 1000];
    let length = listxattr(&path, &mut names).unwrap();
    let names = String::from_utf8(names[..length].to_vec()).unwrap();
    for name in ["user.a", "trusted.b", "security.c"] {
        assert!(names.split('\0').any(|listed| listed == name), "{names:?}");
    }
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let others = run(
        "setpriv",
        &[
            "--reuid=2",
            "--regid=2",
            "--clear-groups",
            "/usr/bin/python3",
            "-c",
            "import os,sys; print(os.listxattr(sys.argv[1]))",
            path.to_str().unwrap(),
        ],
    );
    let listed = String::from_utf8(others.stdout).unwrap();
    assert!(
        listed.contains("user.a") && !listed.contains("trusted"),
        "{listed} {:?}",
        others.stderr
    );
    // A program that is changed has no capabilities any more.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    set("security.capability", &capability).unwrap();
    let mut value = [0; 100];
    assert_eq!(getxattr(&path, "security.capability", &mut value), Ok(20));
    OpenOptions::new()
        .append(true)
        .open(&path)
        .unwrap()
        .write_all(b"true\n")
        .unwrap();
    assert_eq!(
        getxattr(&path, "security.capability", &mut value),
        Err(rustix::io::Errno::NODATA)
    );
    cluster.down().await;
}
