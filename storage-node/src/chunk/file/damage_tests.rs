//! Disks that lie: rotten blocks, headers and logs, files that vanish; and many threads at once.

use super::check::check_disk;
use super::disk::{Disk, Mode};
use super::format::{CHUNKS, HEADER_BYTES, block_offset, table_offset};
use super::log::LOG;
use super::simulation::SimDisk;
use super::tests::{SMALL, assert_clean, data, key, node, start, v, write};
use super::*;
use crate::chunk::{BLOCK_SIZE, DAMAGED, MAX_CHUNK_LENGTH, crc32c};
use lazarette_types::ErrorCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

type Key = (ReplicaSetId, ChunkId);

/// A store with one chunk of this many bytes, folded into its file; returns the file's path.
fn with_chunk(disk: &SimDisk, length: usize) -> (Engine, Key, String) {
    let engine = start(disk);
    let key = key(0);
    engine
        .apply(key, Version::NONE, v(1), write(0, data(length, 1)))
        .unwrap();
    engine.checkpoint().unwrap();
    let files: Vec<_> = disk.files().into_iter().filter(|f| f.starts_with(CHUNKS)).collect();
    assert_eq!(files.len(), 1);
    (engine, key, files[0].clone())
}

fn assert_corrupt<T: std::fmt::Debug>(result: Result<T, ChunkError>, key: Key) {
    match result {
        Err(ChunkError::Corrupt { chunk, .. }) if chunk == key.1 => {}
        other => panic!("{other:?}"),
    }
}

fn problems(disk: &SimDisk) -> Vec<Problem> {
    check_disk(Arc::new(disk.clone())).unwrap().problems
}

#[test]
fn a_rotten_block_is_never_served() {
    let disk = SimDisk::default();
    let (engine, key, path) = with_chunk(&disk, 9000);
    disk.rot(&path, block_offset(1) as usize + 17, b"!");
    assert_corrupt(engine.read(key, 0, 9000), key);
    assert_corrupt(engine.read(key, 5000, 1), key);
    assert_eq!(engine.read(key, 0, 4096).unwrap().data, data(9000, 1)[..4096]);
    // Neither is a checksum put on it.
    let error = engine.apply(key, v(1), v(2), write(4100, data(3, 2))).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Corrupt);
    assert_corrupt(engine.apply(key, v(1), v(2), Change::Truncate(5000)), key);
    assert_eq!(engine.version(key).unwrap(), v(1));
    assert!(matches!(&problems(&disk)[..], [Problem::Damaged { chunk, .. }] if *chunk == key.1));
    // Overwriting the whole block does away with it.
    engine.apply(key, v(1), v(2), write(4096, data(4096, 2))).unwrap();
    assert_eq!(engine.read(key, 4096, 4096).unwrap().data, data(4096, 2));
    engine.checkpoint().unwrap();
    assert_clean(&disk);
}

#[test]
fn a_rotten_checksum_table_is_noticed() {
    let disk = SimDisk::default();
    let (engine, key, path) = with_chunk(&disk, 9000);
    disk.rot(&path, table_offset(2) as usize, &[1, 2, 3, 4]);
    assert_corrupt(engine.read(key, 8999, 1), key);
    engine
        .install(key, v(1), &data(9000, 1), crc32c(&data(9000, 1)))
        .unwrap();
    assert_eq!(engine.read(key, 0, 9000).unwrap().data, data(9000, 1));
    engine.checkpoint().unwrap();
    assert_clean(&disk);
}

#[test]
fn a_damaged_header_is_told_from_a_missing_chunk() {
    let disk = SimDisk::default();
    let (engine, key, path) = with_chunk(&disk, 9000);
    drop(engine);
    disk.rot(&path, 30, &[0xff, 0xfe]);
    assert!(matches!(&problems(&disk)[..], [Problem::Damaged { .. }]));
    let engine = start(&disk);
    assert_corrupt(engine.read(key, 0, 1), key);
    assert_corrupt(engine.version(key), key);
    assert_corrupt(engine.apply(key, Version::NONE, v(2), write(0, data(1, 1))), key);
    let listed = engine.list(key.0).unwrap();
    assert_eq!((listed.len(), listed[0].chunk, listed[0].version), (1, key.1, DAMAGED));
    engine.install(key, v(7), &data(10, 7), crc32c(&data(10, 7))).unwrap();
    drop(engine);
    let engine = start(&disk.after_kill());
    assert_eq!(engine.read(key, 0, 10).unwrap().data, data(10, 7));
    assert_clean(&disk);
}

#[test]
fn a_damaged_chunk_can_be_deleted() {
    let disk = SimDisk::default();
    let (engine, key, path) = with_chunk(&disk, 9000);
    drop(engine);
    disk.rot(&path, 0, b"x");
    let engine = start(&disk);
    engine.apply(key, v(1), v(2), Change::Delete).unwrap();
    assert_eq!(engine.version(key).unwrap(), Version::NONE);
    drop(engine);
    assert_eq!(start(&disk.after_kill()).list(key.0).unwrap(), []);
}

#[test]
fn a_lost_file_is_noticed() {
    let disk = SimDisk::default();
    let (engine, key, path) = with_chunk(&disk, 9000);
    disk.delete(&path);
    assert_corrupt(engine.read(key, 0, 1), key);
    // A change in the log still needs the file.
    engine.apply(key, v(1), v(2), write(0, data(4096, 2))).unwrap();
    drop(engine);
    let disk = disk.after_kill();
    assert!(matches!(&problems(&disk)[..], [Problem::Damaged { .. }]));
    assert_corrupt(start(&disk).read(key, 0, 1), key);
}

/// Offsets of the frames in the log.
fn frames(disk: &SimDisk) -> Vec<usize> {
    let log = disk.bytes(LOG);
    (0..log.len())
        .step_by(4096)
        .filter(|at| log[*at..].starts_with(b"LZCHFRM1"))
        .collect()
}

/// Several blocks of one write are in one record: whichever sector of it is torn, all of them are as before.
#[test]
fn a_torn_write_of_parts_is_not_made_in_part() {
    let disk = SimDisk::default();
    let (engine, key, _) = with_chunk(&disk, 50_000);
    let before = frames(&disk).len();
    let parts = [(100, data(10, 2)), (9000, data(5000, 3)), (40_960, data(4096, 4))];
    engine.apply(key, v(1), v(2), Change::write(parts)).unwrap();
    drop(engine);
    let frames = frames(&disk);
    assert_eq!(frames.len(), before + 1, "one record");
    let start_of = frames[before];
    // Its header and four blocks.
    for sector in 0..(48 + 4 * 4096) / 512 {
        let torn = disk.after_kill();
        torn.rot(LOG, start_of + sector * 512, &[0xaa; 512]);
        let engine = start(&torn);
        let read = engine.read(key, 0, 50_000).unwrap();
        assert_eq!(read.version, v(1), "sector {sector}");
        assert!(read.data == data(50_000, 1), "sector {sector}");
        assert_clean(&torn);
    }
    let engine = start(&disk.after_kill());
    assert_eq!(engine.version(key).unwrap(), v(2));
}

#[test]
fn a_torn_tail_is_cut_and_damage_in_the_middle_is_not() {
    let disk = SimDisk::default();
    let engine = start(&disk);
    for n in 1..=4 {
        engine
            .apply(
                key(0),
                if n == 1 { Version::NONE } else { v(n - 1) },
                v(n),
                write(0, data(10, n)),
            )
            .unwrap();
    }
    drop(engine);
    let frames = frames(&disk);
    assert_eq!(frames.len(), 4);

    let torn = disk.after_kill();
    torn.rot(LOG, frames[3] + 60, &[0xaa; 20]);
    assert_clean(&torn);
    let engine = start(&torn);
    assert_eq!(engine.version(key(0)).unwrap(), v(3));
    engine.apply(key(0), v(3), v(9), write(0, data(10, 9))).unwrap();
    drop(engine);
    assert_eq!(start(&torn.after_kill()).version(key(0)).unwrap(), v(9));

    for (frame, offset) in [(0, 60), (1, 0), (2, 17)] {
        let damaged = disk.after_kill();
        damaged.rot(LOG, frames[frame] + offset, &[0xaa]);
        let found = problems(&damaged);
        assert!(matches!(&found[..], [Problem::Log(_)]), "{found:?}");
        let before = damaged.bytes(LOG);
        let error = prepare(Arc::new(damaged.clone()), SMALL, "c", &node()).err().unwrap();
        let message = error.at(Path::new("/data")).to_string();
        let place = format!("damaged in the middle: no valid frame at byte {}", frames[frame]);
        assert!(
            message.contains(&place) && message.contains("empty folder"),
            "{message}"
        );
        assert!(damaged.bytes(LOG) == before);
    }
}

#[test]
fn one_of_the_logs_slots_is_enough() {
    let disk = SimDisk::default();
    let (engine, key, _) = with_chunk(&disk, 100);
    drop(engine);
    for slot in [0, 1] {
        let disk = disk.after_kill();
        disk.rot(LOG, slot * 4096 + 20, &[0xaa; 4]);
        assert_clean(&disk);
        assert_eq!(start(&disk).read(key, 0, 100).unwrap().data, data(100, 1));
        disk.rot(LOG, (1 - slot) * 4096 + 20, &[0xaa; 4]);
        disk.rot(LOG, slot * 4096 + 20, &[0xaa; 4]);
        assert!(matches!(&problems(&disk)[..], [Problem::Log(_)]));
    }
}

#[test]
fn an_interrupted_initialisation_is_done_again() {
    for n in 0..40 {
        let disk = SimDisk::default();
        disk.cut_after(n);
        let first = prepare(Arc::new(disk.clone()), SMALL, "c", &node());
        let disk = disk.after_power_cut(n);
        let engine = start(&disk);
        engine
            .apply(key(0), Version::NONE, v(1), write(0, data(10, 1)))
            .unwrap();
        drop((first, engine));
        assert_clean(&disk);
    }
}

#[test]
fn unknown_files_are_left_alone_and_reported() {
    let disk = SimDisk::default();
    let (engine, _, path) = with_chunk(&disk, 100);
    drop(engine);
    let odd = [format!("{CHUNKS}/README"), format!("{path}.bak"), "staging/x".into()];
    for path in &odd {
        disk.open(path, Mode::Create).unwrap();
    }
    let expected: Vec<_> = odd.iter().cloned().map(Problem::Unknown).collect();
    let mut found = problems(&disk);
    found.sort_by_key(|p| expected.iter().position(|e| e == p));
    assert_eq!(found, expected);
    start(&disk);
    assert!(odd.iter().all(|path| disk.files().contains(path)));
}

#[test]
fn deleting_frees_a_full_disk() {
    let disk = SimDisk::default();
    let engine = start(&disk);
    disk.set_capacity(Some(disk.used() + (1 << 20)));
    let mut sizes = Vec::new();
    let full = loop {
        let n = sizes.len() as u8;
        let length = 10_000 + usize::from(n) * 1000;
        match engine.apply(key(n), Version::NONE, v(1), write(0, data(length, n.into()))) {
            Ok(()) => sizes.push(length),
            Err(error) => break error,
        }
    };
    assert_eq!(full.code(), ErrorCode::NoSpace);
    assert!(sizes.len() > 20, "{}", sizes.len());
    let usage = engine.usage().unwrap();
    assert!(usage.used <= usage.capacity && usage.available < 64 << 10, "{usage:?}");
    let last = sizes.len() as u8;
    assert_eq!(engine.version(key(last)).unwrap(), Version::NONE);
    for n in 0..last / 2 {
        engine.apply(key(n), v(1), v(2), Change::Delete).unwrap();
    }
    engine.checkpoint().unwrap();
    engine
        .apply(key(last), Version::NONE, v(1), write(0, data(20_000, 9)))
        .unwrap();
    drop(engine);
    let disk = disk.after_power_cut(3);
    assert_clean(&disk);
    let engine = start(&disk);
    for n in last / 2..last {
        let whole = engine.read(key(n), 0, MAX_CHUNK_LENGTH).unwrap();
        assert_eq!(whole.data, data(sizes[usize::from(n)], n.into()));
    }
}

/// Threads change chunks of their own while another folds the log; then the power goes.
#[test]
fn threads_lose_nothing_in_a_power_cut() {
    for seed in 0..30u64 {
        let disk = SimDisk::default();
        let engine = start(&disk);
        engine.background.store(true, Ordering::Release);
        let sequence = AtomicU64::new(1);
        disk.cut_after(300 + seed * 41);
        // For each thread's chunk: the acknowledged state, and the one under way.
        let states = std::thread::scope(|scope| {
            let folding = scope.spawn(|| engine.fold_in_background(Duration::from_millis(1)));
            let threads: Vec<_> = (0..4u8)
                .map(|n| {
                    let (engine, sequence) = (&engine, &sequence);
                    scope.spawn(move || {
                        let (mut version, mut bytes) = (Version::NONE, Vec::new());
                        loop {
                            let next = sequence.fetch_add(1, Ordering::Relaxed);
                            let mut new = bytes.clone();
                            let change = if next.is_multiple_of(7) {
                                new.truncate(new.len() / 3);
                                Change::Truncate(new.len() as u32)
                            } else {
                                let offset = (next * 7919 % 30_000) as usize;
                                let part = data((next * 977 % 40_000) as usize + 1, next);
                                new.resize(new.len().max(offset + part.len()), 0);
                                new[offset..offset + part.len()].copy_from_slice(&part);
                                write(offset as u32, part)
                            };
                            let done = engine.apply(key(n), version, v(next), change);
                            if done.is_err() {
                                return ((version, bytes), (v(next), new));
                            }
                            (version, bytes) = (v(next), new);
                            match engine.read(key(n), 0, MAX_CHUNK_LENGTH) {
                                Ok(whole) => assert!(whole.version == version && whole.data == bytes),
                                // The power is off.
                                Err(_) => return ((version, bytes.clone()), (version, bytes)),
                            }
                        }
                    })
                })
                .collect();
            let states: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
            engine.wake.lock().unwrap().stop = true;
            engine.woken.notify_all();
            folding.join().unwrap();
            states
        });
        drop(engine);
        let disk = disk.after_power_cut(seed);
        assert_clean(&disk);
        let engine = start(&disk);
        for (n, (acknowledged, under_way)) in (0..).zip(states) {
            let whole = engine.read(key(n), 0, MAX_CHUNK_LENGTH).unwrap();
            let found = (whole.version, whole.data.to_vec());
            assert!(
                found == acknowledged || found == under_way,
                "seed {seed}: found {:?}, acknowledged {:?}, under way {:?}",
                found.0,
                acknowledged.0,
                under_way.0
            );
        }
    }
}

/// Blocks are overwritten in place while they are read.
#[test]
fn readers_see_whole_changes_while_the_log_is_folded() {
    const CHANGES: u64 = 1000;
    let disk = SimDisk::default();
    let engine = start(&disk);
    disk.slow_reads(Duration::from_micros(200));
    engine
        .apply(key(0), Version::NONE, v(1), write(0, data(8192, 1)))
        .unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let folding = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                engine.checkpoint().unwrap();
            }
        });
        let reading = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                let whole = engine.read(key(0), 0, 8192).unwrap();
                assert!(whole.data == data(8192, whole.version.sequence));
            }
        });
        for n in 2..CHANGES {
            engine.apply(key(0), v(n - 1), v(n), write(0, data(8192, n))).unwrap();
        }
        done.store(true, Ordering::Release);
        folding.join().unwrap();
        reading.join().unwrap();
    });
}

#[test]
fn headers_take_what_the_format_says() {
    let disk = SimDisk::default();
    let (_, _, path) = with_chunk(&disk, 9000);
    let bytes = disk.bytes(&path);
    assert_eq!(bytes.len() as u64, block_offset(3));
    let table = &bytes[HEADER_BYTES..HEADER_BYTES + 12];
    let zeros = crc32c(&[0; BLOCK_SIZE as usize]);
    for (block, entry) in table.chunks(4).enumerate() {
        let at = block_offset(block as u32) as usize;
        let crc = crc32c(&bytes[at..at + BLOCK_SIZE as usize]);
        assert_eq!(entry, (crc ^ zeros).to_le_bytes());
    }
}
