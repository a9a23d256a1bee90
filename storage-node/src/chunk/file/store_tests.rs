//! The store on a real folder.

use super::tests::{data, v, write};
use super::*;
use crate::chunk::{MemoryChunkStore, contract};
use lazarette_types::InodeId;
use proptest::prelude::*;
use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

const RS: ReplicaSetId = ReplicaSetId(1);

fn node(name: &str) -> NodeId {
    NodeId(name.into())
}

fn open(path: &Path) -> FileChunkStore {
    FileChunkStore::open(path, "c", &node("storage-0")).unwrap()
}

fn chunk(n: u32) -> ChunkId {
    ChunkId {
        volume: VolumeId(u64::from(n % 2)),
        ino: InodeId(7),
        index: n,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    contract::suite(&store).await;
    store.fold().await.unwrap();
    let sets = store.replica_sets().await.unwrap();
    let mut before = Vec::new();
    for &rs in &sets {
        before.push(store.list(rs).await.unwrap());
    }
    drop(store);
    let report = check(dir.path()).unwrap();
    assert_eq!(report.problems, []);
    assert_eq!(report.chunks, before.iter().map(|l| l.len() as u64).sum::<u64>());
    let store = open(dir.path());
    for (i, &rs) in sets.iter().enumerate() {
        assert_eq!(store.list(rs).await.unwrap(), before[i]);
    }
}

#[test]
fn refuses_what_is_not_this_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let message = |cluster: &str, name: &str| {
        FileChunkStore::open(dir.path(), cluster, &node(name))
            .unwrap_err()
            .to_string()
    };
    std::fs::write(dir.path().join("photo.jpg"), "x").unwrap();
    let error = message("c", "storage-0");
    assert!(error.contains("photo.jpg") && error.contains("empty folder"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    std::fs::remove_file(dir.path().join("photo.jpg")).unwrap();
    std::fs::create_dir(dir.path().join("lost+found")).unwrap();

    let store = open(dir.path());
    let disk = store.identity().disk.clone();
    let error = message("c", "storage-0");
    assert!(error.contains("another process"), "{error}");
    assert!(matches!(check(dir.path()), Err(CheckError::Open(OpenError::Locked(_)))));
    drop(store);
    assert_eq!(open(dir.path()).identity().disk, disk);

    let error = message("other", "storage-0");
    assert!(
        error.contains("\"c\"") && error.contains("\"other\"") && error.contains("cluster"),
        "{error}"
    );
    let error = message("c", "storage-1");
    assert!(
        error.contains("\"storage-0\"") && error.contains("\"storage-1\"") && error.contains("node"),
        "{error}"
    );

    let identity = dir.path().join("identity.json");
    let json = std::fs::read_to_string(&identity).unwrap();
    std::fs::write(&identity, json.replace("\"format\": 1", "\"format\": 2, \"more\": []")).unwrap();
    let error = message("c", "storage-0");
    assert!(error.contains("format 2") && error.contains("up to 1"), "{error}");
    std::fs::write(&identity, "{").unwrap();
    let error = message("c", "storage-0");
    assert!(error.contains("damaged"), "{error}");
    // The data of a store whose identity is lost are not taken for an empty folder.
    std::fs::remove_file(&identity).unwrap();
    let error = message("c", "storage-0");
    assert!(error.contains("no identity.json"), "{error}");
    std::fs::write(&identity, json).unwrap();
    open(dir.path());

    let missing = dir.path().join("missing");
    let error = FileChunkStore::open(&missing, "c", &node("storage-0")).unwrap_err();
    assert!(matches!(error, OpenError::Io { .. }), "{error}");
    let file = FileChunkStore::open(&identity, "c", &node("storage-0")).unwrap_err();
    assert!(matches!(file, OpenError::Io { .. }), "{file}");
    assert!(matches!(
        check(&dir.path().join("lost+found")),
        Err(CheckError::Empty(_))
    ));
}

#[test]
fn small_disks_get_small_logs() {
    let (small, large) = (limits(100 << 20), limits(1 << 40));
    assert_eq!((small.log, large.log), ((100 << 20) / 16, 64 << 20));
    assert!(small.headroom < 2 << 20 && large.headroom == 32 << 20);
    assert_eq!(limits(0).log % 4096, 0);
}

#[test]
fn waits_for_a_process_that_is_ending() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path());
    let path = dir.path().to_owned();
    let second = std::thread::spawn(move || open(&path).identity().clone());
    let identity = first.identity().clone();
    drop(first);
    assert_eq!(second.join().unwrap(), identity);
}

#[tokio::test(flavor = "multi_thread")]
async fn drops_leave_no_folders_and_damage_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for n in 0..4 {
        store
            .apply(RS, chunk(n), Version::NONE, v(1), write(0, data(100, 1)))
            .await
            .unwrap();
    }
    store.fold().await.unwrap();
    let set = dir.path().join("chunks/00000001");
    let folders = || std::fs::read_dir(&set).map_or(0, |names| names.count());
    assert_eq!(folders(), 2);
    // The last chunk of a volume, then the volume: its folder was empty.
    for n in [0, 2] {
        store.apply(RS, chunk(n), v(1), v(2), Change::Delete).await.unwrap();
    }
    store.drop_volume(VolumeId(0)).await.unwrap();
    assert_eq!(folders(), 1);

    let [file] = &std::fs::read_dir(set.join("0000000000000001"))
        .unwrap()
        .take(1)
        .collect::<Vec<_>>()[..]
    else {
        panic!("no chunk file");
    };
    let path = file.as_ref().unwrap().path();
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    for n in [1, 3] {
        let _ = store.fetch(RS, chunk(n)).await;
    }
    assert_eq!(store.stats().damaged, 1);
    store.drop_replica_set(RS).await.unwrap();
    assert!(!set.exists());
    assert_eq!(std::fs::read_dir(dir.path().join("trash")).unwrap().count(), 0);
    store.fold().await.unwrap();
    assert_eq!(store.stats().log_bytes, 0);
}

/// A dropped call still happens as a whole or not at all.
#[tokio::test(flavor = "multi_thread")]
async fn dropped_calls_leave_whole_changes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut version = Version::NONE;
    for n in 1..=200u64 {
        let whole = data(5000, n);
        let change = Change::write([
            (0, whole.slice(..100)),
            (100, whole.slice(100..4500)),
            (4500, whole.slice(4500..)),
        ]);
        let call = store.apply(RS, chunk(0), version, v(n), change);
        let pause = Duration::from_micros(n * 13 % 700);
        let _ = tokio::time::timeout(pause, call).await;
        let whole = store.fetch(RS, chunk(0)).await.unwrap();
        if whole.version != Version::NONE {
            assert_eq!(whole.data, data(5000, whole.version.sequence));
        }
        // Where the call was only late, the next one finds another version and fails.
        version = whole.version;
    }
    // The first one at least was made, if only now.
    while store.version(RS, chunk(0)).await.unwrap() == Version::NONE {
        tokio::task::yield_now().await;
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(u32, u32, usize),
    /// Parts after gaps.
    Scatter(u32, Vec<(u32, usize)>),
    Truncate(u32, u32),
    Delete(u32),
    Install(u32, usize),
    /// With a version that is not present.
    Stale(u32),
    DropVolume(u64),
    Read(u32, u32, u32),
    Fold,
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    let n = 0..6u32;
    let size = prop_oneof![1..9000usize, 60_000..200_000usize];
    prop_oneof![
        6 => (n.clone(), 0..300_000u32, size.clone()).prop_map(|(n, o, s)| Op::Write(n, o, s)),
        4 => (n.clone(), proptest::collection::vec((0..50_000u32, 1..60_000usize), 1..8))
            .prop_map(|(n, parts)| Op::Scatter(n, parts)),
        2 => (n.clone(), 0..300_000u32).prop_map(|(n, l)| Op::Truncate(n, l)),
        1 => n.clone().prop_map(Op::Delete),
        2 => (n.clone(), size).prop_map(|(n, s)| Op::Install(n, s)),
        1 => n.clone().prop_map(Op::Stale),
        1 => (0..2u64).prop_map(Op::DropVolume),
        4 => (n, 0..300_000u32, any::<u32>()).prop_map(|(n, o, l)| Op::Read(n, o, l)),
        1 => Just(Op::Fold),
        1 => Just(Op::Reopen),
    ]
}

async fn perform(store: &dyn ChunkStore, op: &Op, n: u64) -> Result<Contents, String> {
    let apply = async |index, change| {
        let previous = store.version(RS, chunk(index)).await?;
        store.apply(RS, chunk(index), previous, v(n), change).await
    };
    let outcome = match *op {
        Op::Write(index, offset, size) => apply(index, write(offset, data(size, n))).await,
        Op::Scatter(index, ref list) => {
            let mut at = 0;
            let parts = list.iter().map(|(gap, size)| {
                let offset = at + gap;
                at = offset + *size as u32;
                (offset, data(*size, n + u64::from(offset)))
            });
            apply(index, Change::write(parts)).await
        }
        Op::Truncate(index, length) => apply(index, Change::Truncate(length)).await,
        Op::Delete(index) => apply(index, Change::Delete).await,
        Op::Install(index, size) => {
            let whole = Contents::new(v(n), data(size, n));
            store
                .install(RS, chunk(index), whole.version, whole.data, whole.crc)
                .await
        }
        Op::Stale(index) => {
            let previous = Version {
                epoch: 1,
                sequence: 1 << 40,
            };
            let version = Version { epoch: 2, sequence: 0 };
            store
                .apply(RS, chunk(index), previous, version, Change::Truncate(0))
                .await
        }
        Op::DropVolume(volume) => store.drop_volume(VolumeId(volume)).await,
        Op::Read(index, offset, length) => {
            let read = store.read(RS, chunk(index), offset, length).await;
            return read.map_err(|error| error.to_string());
        }
        Op::Fold | Op::Reopen => Ok(()),
    };
    outcome.map_err(|error| error.to_string())?;
    Ok(Contents::new(Version::NONE, Bytes::new()))
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(12),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn files_and_memory_do_the_same(ops in proptest::collection::vec(op(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let memory = MemoryChunkStore::new();
            let mut store = open(dir.path());
            for (n, op) in (1..).zip(&ops) {
                match op {
                    Op::Fold => store.fold().await.unwrap(),
                    Op::Reopen => {
                        drop(store);
                        store = open(dir.path());
                    }
                    _ => {}
                }
                assert_eq!(perform(&store, op, n).await, perform(&memory, op, n).await, "{op:?}");
                assert_eq!(store.list(RS).await.unwrap(), memory.list(RS).await.unwrap());
                assert_eq!(store.volumes().await.unwrap(), memory.volumes().await.unwrap());
            }
            drop(store);
            assert_eq!(check(dir.path()).unwrap().problems, []);
        });
    }
}

const CHILD_DIR: &str = "LAZARETTE_TEST_CHUNK_DIR";

/// Changes one chunk for ever; prints each change once it is acknowledged.
async fn change_on(store: Arc<FileChunkStore>, n: u32) {
    let mut previous = store.version(RS, chunk(n)).await.unwrap();
    loop {
        let next = v(previous.sequence + 1);
        let size = 1 + (next.sequence as usize * 7919) % 150_000;
        // In one part, or in three.
        let whole = data(size, next.sequence);
        let cuts = if next.sequence.is_multiple_of(2) {
            [0, size / 3, size / 2, size]
        } else {
            [0, 0, 0, size]
        };
        let parts = cuts.windows(2).filter(|cut| cut[0] < cut[1]);
        let parts = parts.map(|cut| (cut[0] as u32, whole.slice(cut[0]..cut[1])));
        let change = Change::write(parts);
        store.apply(RS, chunk(n), previous, next, change).await.unwrap();
        println!("acknowledged {n} {}", next.sequence);
        previous = next;
    }
}

/// The process that [`survives_sigkill`] kills; nothing when run on its own.
#[tokio::test(flavor = "multi_thread")]
async fn sigkill_child() {
    let Ok(dir) = std::env::var(CHILD_DIR) else {
        return;
    };
    let store = Arc::new(open(Path::new(&dir)));
    let writers: Vec<_> = (0..4).map(|n| tokio::spawn(change_on(Arc::clone(&store), n))).collect();
    for writer in writers {
        writer.await.unwrap();
    }
}

#[test]
fn survives_sigkill() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged: HashMap<u32, u64> = HashMap::new();
    for round in 0..4 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--nocapture", "--exact"])
            .arg(format!("{}::sigkill_child", module_path!().split_once("::").unwrap().1))
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut seen = 0;
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            // The test harness prints its own words on the first line.
            let Some(at) = line.find("acknowledged ") else {
                continue;
            };
            let mut words = line[at..].split(' ').skip(1);
            let n: u32 = words.next().unwrap().parse().unwrap();
            let sequence: u64 = words.next().unwrap().parse().unwrap();
            let last = acknowledged.entry(n).or_default();
            *last = sequence.max(*last);
            seen += 1;
            if seen == 40 + round * 13 {
                // What is in the pipe by now still counts.
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(seen >= 40, "the child ended by itself after {seen} changes");
        assert_eq!(check(dir.path()).unwrap().problems, []);
        let store = open(dir.path());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for (n, sequence) in &acknowledged {
            let whole = runtime.block_on(store.fetch(RS, chunk(*n))).unwrap();
            let found = whole.version.sequence;
            assert!(
                found == *sequence || found == sequence + 1,
                "chunk {n}: {found} after {sequence}"
            );
            let size = 1 + (found as usize * 7919) % 150_000;
            assert_eq!(whole.data.slice(..size), data(size, found));
        }
    }
}
