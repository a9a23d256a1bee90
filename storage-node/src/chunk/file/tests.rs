//! The store against a model, with kills, power cuts and failing disks in between.

use super::engine::{Engine, Limits};
use super::record::{ChangeRecord, Record};
use super::simulation::SimDisk;
use super::*;
use crate::chunk::{MAX_CHUNK_LENGTH, crc32c};
use lazarette_types::{ErrorCode, InodeId};
use proptest::prelude::*;
use std::collections::BTreeMap;

type Key = (ReplicaSetId, ChunkId);
type Model = BTreeMap<Key, (Version, Vec<u8>)>;

pub(super) const SMALL: Limits = Limits {
    log: 256 << 10,
    direct: 16 << 10,
    headroom: 0,
};

pub(super) fn node() -> NodeId {
    NodeId("storage-0".into())
}

pub(super) fn key(n: u8) -> Key {
    let chunk = ChunkId {
        volume: VolumeId(u64::from(n % 2)),
        ino: InodeId(u64::from(n / 4)),
        index: u32::from(n),
    };
    (ReplicaSetId(u32::from(n / 2 % 2)), chunk)
}

pub(super) fn v(sequence: u64) -> Version {
    Version { epoch: 1, sequence }
}

pub(super) fn start(disk: &SimDisk) -> Engine {
    prepare(Arc::new(disk.clone()), SMALL, "c", &node()).unwrap().1
}

pub(super) fn data(length: usize, seed: u64) -> Bytes {
    let byte = |i: usize| (seed.wrapping_mul(31).wrapping_add(i as u64 / 3) % 251) as u8;
    (0..length).map(byte).collect::<Vec<_>>().into()
}

pub(super) fn write(offset: u32, data: Bytes) -> Change {
    Change::write([(offset, data)])
}

fn contents(engine: &Engine) -> Model {
    let mut model = Model::new();
    for rs in engine.replica_sets().unwrap() {
        for summary in engine.list(rs).unwrap() {
            let key = (rs, summary.chunk);
            let whole = engine.read(key, 0, MAX_CHUNK_LENGTH).unwrap();
            assert_eq!(whole.version, summary.version);
            assert_eq!(whole.data.len(), summary.length as usize);
            model.insert(key, (whole.version, whole.data.to_vec()));
        }
    }
    model
}

pub(super) fn assert_clean(disk: &SimDisk) {
    let report = check::check_disk(Arc::new(disk.clone())).unwrap();
    assert_eq!(report.problems, []);
}

/// For comparisons that print no megabytes.
fn outline(model: &Model) -> Vec<(Key, Version, usize, u32)> {
    let line = |(key, (version, data)): (&Key, &(Version, Vec<u8>))| (*key, *version, data.len(), crc32c(data));
    model.iter().map(line).collect()
}

#[derive(Clone, Debug)]
enum Op {
    Write(u8, u32, usize),
    /// Behind the chunk's end, this far.
    Append(u8, u32, usize),
    /// From an offset, parts after gaps.
    Scatter(u8, u32, Vec<(u32, usize)>),
    Truncate(u8, u32),
    Delete(u8),
    Install(u8, Option<usize>),
    DropVolume(u8),
    DropReplicaSet(u8),
    Checkpoint,
    Kill,
    /// During the next operations, after so many steps of the disk.
    PowerCut(u64, u64),
    /// After so many more syncs one fails; then the process restarts.
    BadSync(u64),
    /// Bytes that the disk has free from now on.
    Free(Option<u64>),
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![1..300usize, 4000..9000usize, 12_000..60_000usize]
}

/// Between the parts of a write.
fn gap() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), 1..300u32, Just(4096), 1..20_000u32]
}

fn op() -> impl Strategy<Value = Op> {
    let k = 0..8u8;
    prop_oneof![
        6 => (k.clone(), 0..100_000u32, size()).prop_map(|(k, o, n)| Op::Write(k, o, n)),
        6 => (k.clone(), prop_oneof![Just(0), 0..9000u32], size())
            .prop_map(|(k, o, n)| Op::Append(k, o, n)),
        6 => (k.clone(), 0..100_000u32, proptest::collection::vec((gap(), size()), 2..12))
            .prop_map(|(k, o, parts)| Op::Scatter(k, o, parts)),
        3 => (k.clone(), 0..100_000u32).prop_map(|(k, n)| Op::Truncate(k, n)),
        1 => k.clone().prop_map(|k| Op::Truncate(k, 0)),
        2 => k.clone().prop_map(Op::Delete),
        3 => (k.clone(), proptest::option::weighted(0.8, prop_oneof![Just(0), size()]))
            .prop_map(|(k, n)| Op::Install(k, n)),
        1 => (0..2u8).prop_map(Op::DropVolume),
        1 => (0..2u8).prop_map(Op::DropReplicaSet),
        3 => Just(Op::Checkpoint),
        2 => Just(Op::Kill),
        5 => (0..30u64, any::<u64>()).prop_map(|(n, seed)| Op::PowerCut(n, seed)),
        1 => (0..10u64).prop_map(Op::BadSync),
        1 => (0..300_000u64).prop_map(|n| Op::Free(Some(n))),
        2 => Just(Op::Free(None)),
    ]
}

/// Makes the operation in the model and on the engine.
fn perform(engine: &Engine, model: &mut Model, op: &Op, n: u64) -> Result<(), ChunkError> {
    let mut apply = |key: Key, change: Change| {
        let (previous, mut bytes) = model.get(&key).cloned().unwrap_or_default();
        match &change {
            Change::Write(parts) => {
                bytes.resize(bytes.len().max(parts.end() as usize), 0);
                for part in parts.iter() {
                    bytes[part.offset as usize..part.end() as usize].copy_from_slice(&part.data);
                }
                model.insert(key, (v(n), bytes));
            }
            Change::Truncate(length) => {
                bytes.truncate(*length as usize);
                model.insert(key, (v(n), bytes));
            }
            Change::Delete => {
                model.remove(&key);
            }
        }
        engine.apply(key, previous, v(n), change)
    };
    match *op {
        Op::Write(k, offset, length) => apply(key(k), write(offset, data(length, n))),
        Op::Append(k, gap, length) => {
            let end = engine.list(key(k).0)?;
            let end = end.iter().find(|s| s.chunk == key(k).1);
            let offset = end.map_or(0, |s| s.length) + gap;
            apply(key(k), write(offset, data(length, n)))
        }
        Op::Scatter(k, start, ref list) => {
            let mut at = start;
            let mut parts = Vec::new();
            for (i, (gap, length)) in (0..).zip(list) {
                at += gap;
                parts.push((at, data(*length, n * 16 + i)));
                at += *length as u32;
            }
            apply(key(k), Change::write(parts))
        }
        Op::Truncate(k, length) => apply(key(k), Change::Truncate(length)),
        Op::Delete(k) => apply(key(k), Change::Delete),
        Op::Install(k, Some(length)) => {
            let bytes = data(length, n);
            model.insert(key(k), (v(n), bytes.to_vec()));
            engine.install(key(k), v(n), &bytes, crc32c(&bytes))
        }
        Op::Install(k, None) => {
            model.remove(&key(k));
            engine.install(key(k), Version::NONE, &Bytes::new(), crc32c(b""))
        }
        Op::DropVolume(n) => {
            let volume = VolumeId(u64::from(n));
            model.retain(|(_, chunk), _| chunk.volume != volume);
            engine.drop_volume(volume)
        }
        Op::DropReplicaSet(n) => {
            let rs = ReplicaSetId(u32::from(n));
            model.retain(|(of, _), _| *of != rs);
            engine.drop_replica_set(rs)
        }
        // A store that was full learns so that it is not any more.
        Op::Checkpoint | Op::Free(None) => engine.checkpoint(),
        Op::Kill | Op::PowerCut(..) | Op::BadSync(_) | Op::Free(Some(_)) => Ok(()),
    }
}

/// Runs the operations. Whenever the power is cut or a sync fails, what is found after the restart
/// must be what was acknowledged, with or without the one operation that was under way. A full
/// disk changes nothing.
fn run(ops: &[Op]) {
    let mut disk = SimDisk::default();
    let mut engine = start(&disk);
    let mut model = Model::new();
    let mut cut = None;
    let mut full = false;
    for (n, op) in (1..).zip(ops) {
        match op {
            Op::Kill if cut.is_none() => {
                drop(engine);
                disk = disk.after_kill();
                assert_clean(&disk);
                engine = start(&disk);
                assert_eq!(outline(&contents(&engine)), outline(&model));
                continue;
            }
            Op::PowerCut(after, seed) if cut.is_none() => {
                disk.cut_after(*after);
                cut = Some(*seed);
                continue;
            }
            Op::BadSync(after) if cut.is_none() => disk.fail_sync_after(*after),
            Op::Free(free) => {
                full = free.is_some();
                disk.set_capacity(free.map(|free| disk.used() + free));
            }
            _ => {}
        }
        let before = model.clone();
        let outcome = perform(&engine, &mut model, op, n);
        let seed = match outcome {
            Ok(()) => continue,
            Err(ChunkError::NoSpace) if full => {
                model = before;
                assert_eq!(outline(&contents(&engine)), outline(&model));
                continue;
            }
            Err(error) if cut.is_none() => {
                assert!(matches!(error, ChunkError::Poisoned(_)), "{op:?}: {error}");
                assert_eq!(engine.poison.check().unwrap_err().code(), ErrorCode::Unavailable);
                assert!(engine.read(key(0), 0, 1).is_err());
                assert!(perform(&engine, &mut model.clone(), &Op::Truncate(0, 0), n + 1).is_err());
                None
            }
            Err(_) => cut.take(),
        };
        drop(engine);
        match seed {
            // What the failed sync lost still shows; the restarted store must not build on it.
            None => {
                disk = disk.after_kill();
                disk.set_capacity(None);
                let found = contents(&start(&disk));
                disk = disk.after_power_cut(n);
                engine = start(&disk);
                assert_eq!(outline(&contents(&engine)), outline(&found));
            }
            Some(seed) => {
                disk = disk.after_power_cut(seed);
                disk.set_capacity(None);
                disk = recover_interrupted(disk, seed);
                engine = start(&disk);
            }
        }
        full = false;
        let found = contents(&engine);
        if found == before {
            model = before;
        } else {
            assert_eq!(outline(&found), outline(&model), "{op:?}");
        }
    }
    if let Some(seed) = cut {
        drop(engine);
        engine = start(&disk.after_power_cut(seed));
    }
    assert_eq!(outline(&contents(&engine)), outline(&model));
}

/// Cuts the power a few times while the store recovers.
fn recover_interrupted(mut disk: SimDisk, mut seed: u64) -> SimDisk {
    loop {
        assert_clean(&disk);
        seed = seed.rotate_left(7) ^ 0x9e37;
        if seed.is_multiple_of(3) {
            return disk;
        }
        disk.cut_after(seed % 13);
        let again = prepare(Arc::new(disk.clone()), SMALL, "c", &node());
        if let Ok((_, engine)) = again {
            let _ = engine.checkpoint();
        }
        disk = disk.after_power_cut(seed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(150),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn nothing_acknowledged_is_lost(ops in proptest::collection::vec(op(), 1..60)) {
        run(&ops);
    }
}

/// A checkpoint may end between making files durable and letting the log forget why.
#[test]
fn a_file_made_by_the_log_keeps_what_was_put_into_it_later() {
    let disk = SimDisk::default();
    let engine = start(&disk);
    let mut expected = data(5000, 1).to_vec();
    engine
        .apply(key(0), Version::NONE, v(1), write(0, data(5000, 1)))
        .unwrap();
    engine.fold().unwrap();
    // Goes to the file, with only its first block in the log.
    engine.apply(key(0), v(1), v(2), write(5000, data(40_000, 2))).unwrap();
    expected.extend_from_slice(&data(40_000, 2));
    for disk in [disk.after_kill(), disk.after_power_cut(1)] {
        assert_clean(&disk);
        let engine = start(&disk);
        engine.checkpoint().unwrap();
        drop(engine);
        let engine = start(&disk.after_power_cut(2));
        assert!(engine.read(key(0), 0, MAX_CHUNK_LENGTH).unwrap().data == expected);
    }
}

/// A record is durable a moment before its effects are visible; a checkpoint may fall into it.
#[test]
fn a_checkpoint_keeps_records_that_are_not_visible_yet() {
    let disk = SimDisk::default();
    let engine = start(&disk);
    let record = Record::Change(ChangeRecord {
        key: key(0),
        version: v(1),
        length: 0,
        previous_length: 0,
        file: 77,
        fresh: true,
        blocks: Vec::new(),
    });
    let durable = engine.log.append(&record).unwrap();
    engine
        .apply(key(1), Version::NONE, v(1), write(0, data(10, 1)))
        .unwrap();
    engine.checkpoint().unwrap();
    drop(durable);
    drop(engine);
    let engine = start(&disk.after_power_cut(0));
    assert_eq!(engine.version(key(0)).unwrap(), v(1));
    assert_eq!(engine.version(key(1)).unwrap(), v(1));
}

/// Names that a killed process changed may not be durable; the log must not forget why before.
#[test]
fn a_restarted_process_makes_names_durable() {
    for seed in 0..10 {
        let disk = SimDisk::default();
        let engine = start(&disk);
        let big = data(30_000, 1);
        engine.install(key(0), v(1), &big, crc32c(&big)).unwrap();
        engine.install(key(2), v(1), &big, crc32c(&big)).unwrap();
        engine.checkpoint().unwrap();
        engine.install(key(0), v(2), &big, crc32c(&big)).unwrap();
        engine.apply(key(2), v(1), v(2), Change::Delete).unwrap();
        drop(engine);
        let disk = disk.after_kill();
        start(&disk).checkpoint().unwrap();
        let engine = start(&disk.after_power_cut(seed));
        assert_eq!(engine.version(key(0)).unwrap(), v(2));
        assert_eq!(engine.version(key(2)).unwrap(), Version::NONE);
    }
}

#[test]
fn a_checkpoint_makes_new_names_durable() {
    for seed in 0..10 {
        let disk = SimDisk::default();
        let engine = start(&disk);
        let big = data(30_000, 1);
        // The second in the same folder as the first.
        for key in [key(0), key(4)] {
            engine.install(key, v(1), &big, crc32c(&big)).unwrap();
            engine.checkpoint().unwrap();
        }
        drop(engine);
        let engine = start(&disk.after_power_cut(seed));
        for key in [key(0), key(4)] {
            assert_eq!(engine.version(key).unwrap(), v(1), "seed {seed}");
        }
    }
}
