//! What several clients do to the same files and directories.

use super::{mounted, operations};
use lazarette_e2e::story::{Mounts, owner_of};
use lazarette_e2e::{Deadline, wait_for};
use rustix::process::Signal;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

/// Random numbers that follow from a seed (xorshift).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }
}

/// Mounts change one file in turns, each opening and closing it: what one has closed the other one finds.
#[tokio::test]
async fn two_mounts_change_one_file_in_turns() {
    const LARGEST: u64 = 9 << 20;
    let (cluster, mounts) = mounted("turns", 2).await;
    let mut dice = Dice(7);
    let mut model = Vec::new();
    File::create(mounts.path(0, "f")).unwrap();
    for turn in 0..operations(600) {
        let client = dice.roll(2) as usize;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(mounts.path(client, "f"))
            .unwrap();
        for _ in 0..=dice.roll(3) {
            let (at, length) = (dice.roll(LARGEST), dice.roll(100_000) as usize);
            let end = at as usize + length;
            match dice.roll(6) {
                0..=2 => {
                    let data = vec![turn as u8 | 1; length];
                    file.write_all_at(&data, at).unwrap();
                    if length > 0 && model.len() < end {
                        model.resize(end, 0);
                    }
                    if length > 0 {
                        model[at as usize..end].copy_from_slice(&data);
                    }
                }
                3 => {
                    file.set_len(at).unwrap();
                    model.resize(at as usize, 0);
                }
                4 => {
                    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                    rustix::fs::fallocate(&file, flags, at, length as u64 + 1).unwrap();
                    let (from, to) = ((at as usize).min(model.len()), (end + 1).min(model.len()));
                    model[from..to].fill(0);
                }
                _ => {
                    let mut got = Vec::new();
                    file.seek(SeekFrom::Start(at)).unwrap();
                    Read::by_ref(&mut file)
                        .take(length as u64)
                        .read_to_end(&mut got)
                        .unwrap();
                    let from = (at as usize).min(model.len());
                    let want = &model[from..end.min(model.len()).max(from)];
                    assert!(
                        got == want,
                        "turn {turn}: client {client} reads {} bytes at {at}",
                        got.len()
                    );
                }
            }
        }
        assert_eq!(file.metadata().unwrap().len(), model.len() as u64, "turn {turn}");
    }
    for client in 0..2 {
        assert!(fs::read(mounts.path(client, "f")).unwrap() == model);
    }
    cluster.down().await;
}

fn kill_owner_by(signal: Signal, cluster: &lazarette_e2e::local::LocalCluster, owner: usize) {
    cluster.node(owner).unwrap().signal(signal).unwrap();
}

/// A file without a name lives as long as somebody has it open, also when the owner of its metadata dies.
#[tokio::test]
async fn unlinked_files_outlive_the_owner_and_go_with_their_last_user() {
    let (cluster, mounts) = mounted("orphans", 2).await;
    let here = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(mounts.path(0, "f"))
        .unwrap();
    let content = vec![3; 5 << 20];
    here.write_all_at(&content, 0).unwrap();
    here.sync_all().unwrap();
    let there = File::open(mounts.path(1, "f")).unwrap();
    fs::remove_file(mounts.path(1, "f")).unwrap();
    let used = || {
        let stat = rustix::fs::statvfs(mounts.path(0, "")).unwrap();
        (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    };
    assert_eq!(used(), 5 << 20);

    let owner = owner_of(&cluster.inner, "orphans").await.unwrap();
    kill_owner_by(Signal::KILL, &cluster.inner, owner);
    let mut got = vec![0; content.len()];
    there.read_exact_at(&mut got, 0).unwrap();
    assert!(got == content);
    here.write_all_at(b"still writable", 0).unwrap();
    here.sync_all().unwrap();
    assert_eq!(there.metadata().unwrap().nlink(), 0);
    drop(here);
    got.resize(14, 0);
    there.read_exact_at(&mut got[..14], 0).unwrap();
    assert_eq!(&got[..14], b"still writable");
    drop(there);
    let deadline = Deadline::secs(60).logs(cluster.inner.dir().join("logs"));
    wait_for(deadline, "the file to be gone", || async {
        Ok((used() == 0).then_some(()))
    })
    .await
    .unwrap();
    cluster.inner.start_node(owner).await.unwrap();
    cluster.down().await;
}

/// Names come and go while another client lists: those that stay are listed once.
#[tokio::test]
async fn listings_are_stable_while_names_come_and_go() {
    let (cluster, mounts) = mounted("listing", 2).await;
    fs::create_dir(mounts.path(0, "d")).unwrap();
    let stays = |i| format!("stays-{i:04}");
    for i in 0..700 {
        File::create(mounts.path(0, &format!("d/{}", stays(i)))).unwrap();
        File::create(mounts.path(0, &format!("d/goes-{i}"))).unwrap();
    }
    let mut seen = Vec::new();
    for (i, entry) in fs::read_dir(mounts.path(0, "d")).unwrap().enumerate() {
        seen.push(entry.unwrap().file_name().into_string().unwrap());
        if i < 700 {
            fs::remove_file(mounts.path(1, &format!("d/goes-{i}"))).unwrap();
            File::create(mounts.path(1, &format!("d/comes-{i}"))).unwrap();
        }
    }
    seen.sort();
    let kept: Vec<_> = seen.iter().filter(|name| name.starts_with("stays")).collect();
    assert!(kept.iter().map(|name| name.as_str()).eq((0..700).map(stays)));
    assert!(seen.windows(2).all(|pair| pair[0] != pair[1]));
    cluster.down().await;
}

/// A listing that was begun before says nothing of a file that is older than what was done to it since.
#[tokio::test]
async fn a_listing_does_not_bring_old_sizes_back() {
    for clients in [1, 2] {
        let (cluster, mounts) = mounted(&format!("sizes-{clients}"), clients).await;
        for i in 0..200 {
            File::create(mounts.path(0, &format!("{i:03}"))).unwrap();
        }
        let mut written = 0;
        for entry in fs::read_dir(mounts.path(0, "")).unwrap() {
            let entry = entry.unwrap();
            // All that come later have something in them by then.
            for i in written..200.min(written + 20) {
                OpenOptions::new()
                    .append(i % 2 == 0)
                    .write(true)
                    .open(mounts.path(0, &format!("{i:03}")))
                    .unwrap()
                    .write_all(b"now")
                    .unwrap();
            }
            written = 200.min(written + 20);
            let number: usize = entry.file_name().to_str().unwrap().parse().unwrap();
            let want = if number < written { 3 } else { 0 };
            assert_eq!(entry.metadata().unwrap().len(), want, "{number} of {written}");
            assert_eq!(fs::read(entry.path()).unwrap().len() as u64, want, "{number}");
        }
        cluster.down().await;
    }
}

/// Names of 255 bytes, and paths that only fit into PATH_MAX.
#[tokio::test]
async fn long_names_and_long_paths() {
    let (cluster, mounts) = mounted("names", 2).await;
    let longest = "\u{e9}".repeat(127) + "x";
    assert_eq!(longest.len(), 255);
    fs::write(mounts.path(0, &longest), "named").unwrap();
    assert_eq!(fs::read_to_string(mounts.path(1, &longest)).unwrap(), "named");
    let error = fs::write(mounts.path(0, &format!("{longest}y")), "").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(36));

    let mut path = mounts.path(0, "");
    while path.as_os_str().len() + 202 < 4095 {
        path.push("p".repeat(200));
    }
    fs::create_dir_all(&path).unwrap();
    let name = "n".repeat(4094 - path.as_os_str().len());
    fs::write(path.join(&name), "deep").unwrap();
    assert_eq!(fs::read_to_string(path.join(&name)).unwrap(), "deep");
    let error = fs::read(path.join(name + "n")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(36));
    let target = "t".repeat(4095);
    std::os::unix::fs::symlink(&target, mounts.path(0, "s")).unwrap();
    assert_eq!(fs::read_link(mounts.path(1, "s")).unwrap().to_str().unwrap(), target);
    fs::remove_dir_all(mounts.path(1, &"p".repeat(200))).unwrap();
    cluster.down().await;
}

/// The current directory of a process may be removed under it.
#[tokio::test]
async fn a_removed_directory_that_is_in_use() {
    let (cluster, mounts) = mounted("removed", 1).await;
    let path = mounts.path(0, "d");
    fs::create_dir(&path).unwrap();
    let open = File::open(&path).unwrap();
    fs::remove_dir(&path).unwrap();
    let attributes = open.metadata().unwrap();
    assert!(attributes.is_dir());
    assert_eq!(attributes.nlink(), 0);
    cluster.down().await;
}

/// Appends of several nodes while another one truncates: each is whole, and none is lost that was made after
/// the last truncation.
#[tokio::test]
async fn appends_and_truncations_from_several_nodes() {
    const LINES: usize = 60;
    let (cluster, mounts) = mounted("appends", 3).await;
    File::create(mounts.path(0, "log")).unwrap();
    let append = |mounts: &Mounts, client: usize| {
        let path = mounts.path(client, "log");
        std::thread::spawn(move || {
            let mut log = OpenOptions::new().append(true).open(path).unwrap();
            for line in 0..LINES {
                // In one write.
                let text = format!("{client} {line} {}\n", "x".repeat(line * 37));
                log.write_all(text.as_bytes()).unwrap();
            }
        })
    };
    let writers = [append(&mounts, 0), append(&mounts, 1)];
    let truncated = mounts.path(2, "log");
    let truncations = std::thread::spawn(move || {
        for _ in 0..10 {
            OpenOptions::new().write(true).truncate(true).open(&truncated).unwrap();
            std::thread::sleep(Duration::from_millis(30));
        }
    });
    for thread in writers.into_iter().chain([truncations]) {
        thread.join().unwrap();
    }
    append(&mounts, 2).join().unwrap();
    let text = fs::read_to_string(mounts.path(1, "log")).unwrap();
    let mut last = 0;
    for line in text.lines() {
        let mut words = line.split(' ');
        let (client, number) = (words.next().unwrap(), words.next().unwrap().parse::<usize>().unwrap());
        assert_eq!(words.next().unwrap_or_default(), "x".repeat(number * 37), "{line}");
        if client == "2" {
            assert_eq!(number, last);
            last += 1;
        }
    }
    assert_eq!(last, LINES);
    cluster.down().await;
}
