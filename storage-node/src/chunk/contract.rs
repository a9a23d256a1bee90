//! What every [`ChunkStore`] must do, run on each implementation.

use super::*;
use lazarette_types::{ErrorCode, InodeId};

const RS: ReplicaSetId = ReplicaSetId(3);

fn chunk(volume: u64, ino: u64, index: u32) -> ChunkId {
    ChunkId {
        volume: VolumeId(volume),
        ino: InodeId(ino),
        index,
    }
}

fn v(epoch: u64, sequence: u64) -> Version {
    Version { epoch, sequence }
}

fn write(offset: u32, data: impl Into<Bytes>) -> Change {
    Change::write([(offset, data)])
}

/// Like [`Change::write`], with a wrong checksum of the last part.
fn damaged_write(parts: &[(u32, &'static [u8])]) -> Change {
    let mut list: Vec<Part> = match Change::write(parts.iter().copied()) {
        Change::Write(parts) => parts.to_vec(),
        other => panic!("{other:?}"),
    };
    list.last_mut().unwrap().crc ^= 1;
    Change::Write(Parts::new(list).unwrap())
}

async fn install(store: &dyn ChunkStore, id: ChunkId, version: Version, data: &[u8]) {
    let data = Bytes::copy_from_slice(data);
    let crc = crc32c(&data);
    store.install(RS, id, version, data, crc).await.unwrap();
}

async fn contents(store: &dyn ChunkStore, id: ChunkId) -> (Version, Bytes) {
    let whole = store.fetch(RS, id).await.unwrap();
    assert_eq!(whole.crc, crc32c(&whole.data));
    assert_eq!(store.version(RS, id).await.unwrap(), whole.version);
    (whole.version, whole.data)
}

/// The whole suite on an empty store.
pub(crate) async fn suite(store: &dyn ChunkStore) {
    writes_and_reads(store).await;
    writes_of_parts(store).await;
    versions(store).await;
    bad_changes(store).await;
    truncates(store).await;
    deletes(store).await;
    installs(store).await;
    big_writes(store).await;
    drops(store).await;
    store.health().unwrap();
    let usage = store.usage().await.unwrap();
    assert!(usage.capacity > 0 && usage.available <= usage.capacity);
}

async fn writes_and_reads(store: &dyn ChunkStore) {
    let id = chunk(1, 10, 0);
    assert_eq!(contents(store, id).await, (Version::NONE, Bytes::new()));
    let steps: [(u32, &[u8]); 4] = [(5, b"hello"), (0, b"12345"), (8, b"XYZ"), (5000, b"tail")];
    let mut expected = Vec::new();
    let mut at = Version::NONE;
    for (i, (offset, data)) in steps.into_iter().enumerate() {
        let next = v(1, i as u64 + 1);
        store.apply(RS, id, at, next, write(offset, data)).await.unwrap();
        at = next;
        let end = offset as usize + data.len();
        if expected.len() < end {
            expected.resize(end, 0);
        }
        expected[offset as usize..end].copy_from_slice(data);
        assert_eq!(contents(store, id).await, (at, expected.clone().into()));
    }
    for (offset, length) in [(0, 3), (3, 5000), (4999, 100), (5004, 1), (9000, u32::MAX), (0, 0)] {
        let got = store.read(RS, id, offset, length).await.unwrap();
        let start = (offset as usize).min(expected.len());
        let end = (offset as usize).saturating_add(length as usize).min(expected.len());
        assert_eq!(got.data, expected[start..end], "{offset}+{length}");
        assert_eq!(got.crc, crc32c(&got.data));
    }
}

async fn writes_of_parts(store: &dyn ChunkStore) {
    let id = chunk(1, 17, 0);
    // Several in a block, over the ends of blocks, touching, apart; some grow the chunk, with gaps.
    let steps: [&[(u32, usize)]; 9] = [
        &[(5, 10), (20, 1), (4000, 200), (4200, 50), (20_000, 3)],
        &[(0, 5), (15, 5), (4090, 8), (19_999, 2), (20_003, 1), (30_000, 1)],
        &[(4096, 4096), (8192, 100), (8292, 8092)],
        &[(0, 4096), (8192, 4096), (28_672, 4096)],
        // Long enough for the ways that do not log all bytes: behind the end, and all over.
        &[(32_768, 100_000), (132_768, 65_536), (198_304, 1)],
        &[(198_305, 70_000), (300_000, 70_000)],
        &[(1, 100_000), (100_001, 99_999), (200_002, 169_998)],
        &[(0, 200_000), (200_000, 170_000)],
        &[(0, 65_536), (69_632, 65_536), (139_264, 65_536), (400_000, 5)],
    ];
    let mut expected = Vec::new();
    let mut at = Version::NONE;
    for (i, step) in steps.into_iter().enumerate() {
        let data = |n: usize, length: usize| (0..length).map(|b| (b / 3 + n * 7 + i * 31) as u8).collect::<Vec<_>>();
        let parts: Vec<_> = step.iter().enumerate().map(|(n, (o, l))| (*o, data(n, *l))).collect();
        let next = v(1, i as u64 + 1);
        store
            .apply(RS, id, at, next, Change::write(parts.clone()))
            .await
            .unwrap();
        for (offset, data) in parts {
            let end = offset as usize + data.len();
            expected.resize(expected.len().max(end), 0);
            expected[offset as usize..end].copy_from_slice(&data);
        }
        at = next;
        assert!(contents(store, id).await == (at, expected.clone().into()), "step {i}");
    }
}

async fn versions(store: &dyn ChunkStore) {
    let id = chunk(1, 11, 0);
    let first = write(0, "a");
    store
        .apply(RS, id, Version::NONE, v(1, 1), first.clone())
        .await
        .unwrap();
    // Repeated, although something else is given: the version is the identity.
    store.apply(RS, id, Version::NONE, v(1, 1), first).await.unwrap();
    let error = store.apply(RS, id, v(1, 7), v(1, 8), write(0, "b")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::WrongEpoch);
    match error {
        ChunkError::VersionMismatch { chunk, present } => {
            assert_eq!((chunk, present), (id, v(1, 1)));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(contents(store, id).await, (v(1, 1), "a".into()));
    // Another replica set's chunk of the same id is another chunk.
    let other = ReplicaSetId(4);
    assert_eq!(store.version(other, id).await.unwrap(), Version::NONE);
    store
        .apply(other, id, Version::NONE, v(9, 1), write(0, "z"))
        .await
        .unwrap();
    assert_eq!(contents(store, id).await, (v(1, 1), "a".into()));
    assert_eq!(
        store.list(other).await.unwrap(),
        [ChunkSummary {
            chunk: id,
            version: v(9, 1),
            length: 1
        }]
    );
    store.drop_replica_set(other).await.unwrap();
}

async fn bad_changes(store: &dyn ChunkStore) {
    let id = chunk(1, 12, 0);
    let cases = [
        (v(1, 1), v(1, 1), write(0, "x"), ErrorCode::InvalidArgument),
        (v(1, 2), v(1, 1), write(0, "x"), ErrorCode::InvalidArgument),
        (Version::NONE, DAMAGED, write(0, "x"), ErrorCode::InvalidArgument),
        (
            Version::NONE,
            v(1, 1),
            Change::Truncate(MAX_CHUNK_LENGTH + 1),
            ErrorCode::InvalidArgument,
        ),
        (
            Version::NONE,
            v(1, 1),
            damaged_write(&[(0, b"x")]),
            ErrorCode::Unavailable,
        ),
        (
            Version::NONE,
            v(1, 1),
            damaged_write(&[(0, b"good"), (9000, b"bad")]),
            ErrorCode::Unavailable,
        ),
    ];
    for (previous, version, change, code) in cases {
        let error = store.apply(RS, id, previous, version, change).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }
    let bad_crc = store.install(RS, id, v(1, 1), "x".into(), 7).await.unwrap_err();
    assert_eq!(bad_crc.code(), ErrorCode::Unavailable);
    let no_version = store
        .install(RS, id, Version::NONE, "x".into(), crc32c(b"x"))
        .await
        .unwrap_err();
    assert_eq!(no_version.code(), ErrorCode::InvalidArgument);
    assert_eq!(contents(store, id).await, (Version::NONE, Bytes::new()));
}

async fn truncates(store: &dyn ChunkStore) {
    let id = chunk(1, 13, 0);
    store
        .apply(RS, id, Version::NONE, v(1, 1), write(0, vec![7; 10_000]))
        .await
        .unwrap();
    store
        .apply(RS, id, v(1, 1), v(1, 2), Change::Truncate(5000))
        .await
        .unwrap();
    assert_eq!(contents(store, id).await, (v(1, 2), vec![7; 5000].into()));
    // What was cut off does not come back when the chunk grows again.
    store.apply(RS, id, v(1, 2), v(1, 3), write(12_000, "x")).await.unwrap();
    let mut expected = vec![7; 5000];
    expected.resize(12_000, 0);
    expected.push(b'x');
    assert_eq!(contents(store, id).await, (v(1, 3), expected.into()));
    // Longer than the chunk: the length stays, the version moves.
    store
        .apply(RS, id, v(1, 3), v(1, 4), Change::Truncate(1 << 20))
        .await
        .unwrap();
    assert_eq!(contents(store, id).await.1.len(), 12_001);
    store
        .apply(RS, id, v(1, 4), v(1, 5), Change::Truncate(0))
        .await
        .unwrap();
    assert_eq!(contents(store, id).await, (v(1, 5), Bytes::new()));
    let never_written = chunk(1, 13, 1);
    store
        .apply(RS, never_written, Version::NONE, v(2, 1), Change::Truncate(9))
        .await
        .unwrap();
    assert_eq!(contents(store, never_written).await, (v(2, 1), Bytes::new()));
    let listed = store.list(RS).await.unwrap();
    for (chunk, version) in [(id, v(1, 5)), (never_written, v(2, 1))] {
        assert!(listed.contains(&ChunkSummary {
            chunk,
            version,
            length: 0
        }));
    }
}

async fn deletes(store: &dyn ChunkStore) {
    let id = chunk(1, 14, 0);
    store
        .apply(RS, id, Version::NONE, v(1, 1), write(0, vec![9; 9000]))
        .await
        .unwrap();
    let error = store
        .apply(RS, id, Version::NONE, v(1, 2), Change::Delete)
        .await
        .unwrap_err();
    assert!(matches!(error, ChunkError::VersionMismatch { .. }));
    for _ in 0..2 {
        store.apply(RS, id, v(1, 1), v(1, 2), Change::Delete).await.unwrap();
        assert_eq!(contents(store, id).await, (Version::NONE, Bytes::new()));
    }
    assert!(store.list(RS).await.unwrap().iter().all(|c| c.chunk != id));
    // A new one has nothing of the old.
    store
        .apply(RS, id, Version::NONE, v(1, 3), write(4096, "n"))
        .await
        .unwrap();
    let mut expected = vec![0; 4096];
    expected.push(b'n');
    assert_eq!(contents(store, id).await, (v(1, 3), expected.into()));
}

async fn installs(store: &dyn ChunkStore) {
    let id = chunk(1, 15, 2);
    for size in [1, 70_000, 300_000, 5000, 0] {
        // Versions go down as well: the caller knows.
        let version = v(3, 500_000 - size as u64);
        let data: Vec<u8> = (0..size).map(|i| (i / 7) as u8).collect();
        install(store, id, version, &data).await;
        assert_eq!(contents(store, id).await, (version, data.into()));
    }
    store
        .apply(RS, id, v(3, 500_000), v(4, 1), write(1, "ab"))
        .await
        .unwrap();
    assert_eq!(contents(store, id).await, (v(4, 1), "\0ab".into()));
    for _ in 0..2 {
        install(store, id, Version::NONE, b"").await;
        assert_eq!(contents(store, id).await, (Version::NONE, Bytes::new()));
    }
}

async fn big_writes(store: &dyn ChunkStore) {
    let id = chunk(1, 16, 0);
    let mut expected = Vec::new();
    let mut at = Version::NONE;
    // Appends, aligned and not; gaps; overwrites of a part and of everything.
    let steps = [
        (0, 100_000),
        (100_000, 200_000),
        (300_000, 28_000),
        (327_680, 131_072),
        (700_000, 70_000),
        (4096, 8192),
        (1000, 500_000),
        (0, 1_500_000),
        (1_499_136, 65_536),
        (10, 10),
    ];
    for (i, (offset, length)) in steps.into_iter().enumerate() {
        let data: Vec<u8> = (0..length).map(|n| (n * (i + 3) / 5) as u8).collect();
        let next = v(1, i as u64 + 1);
        store
            .apply(RS, id, at, next, write(offset, data.clone()))
            .await
            .unwrap();
        at = next;
        let (start, end) = (offset as usize, offset as usize + length);
        if expected.len() < end {
            expected.resize(end, 0);
        }
        expected[start..end].copy_from_slice(&data);
        assert!(contents(store, id).await == (at, expected.clone().into()), "step {i}");
    }
}

async fn drops(store: &dyn ChunkStore) {
    for (volume, rs) in [(50, 7), (50, 8), (51, 7)] {
        store
            .apply(
                ReplicaSetId(rs),
                chunk(volume, 1, 0),
                Version::NONE,
                v(1, 1),
                write(0, "d"),
            )
            .await
            .unwrap();
    }
    let sets = store.replica_sets().await.unwrap();
    assert!(sets.contains(&ReplicaSetId(7)) && sets.contains(&ReplicaSetId(8)));
    store.drop_volume(VolumeId(50)).await.unwrap();
    let volumes = store.volumes().await.unwrap();
    assert!(volumes.contains(&VolumeId(51)) && !volumes.contains(&VolumeId(50)));
    assert!(store.list(ReplicaSetId(8)).await.unwrap().is_empty());
    assert_eq!(store.list(ReplicaSetId(7)).await.unwrap().len(), 1);
    store.drop_replica_set(ReplicaSetId(7)).await.unwrap();
    assert!(!store.volumes().await.unwrap().contains(&VolumeId(51)));
    assert!(store.list(ReplicaSetId(7)).await.unwrap().is_empty());
    let kept = store.read(ReplicaSetId(8), chunk(50, 1, 0), 0, 10).await.unwrap();
    assert_eq!(kept.version, Version::NONE);
}

#[tokio::test]
async fn memory() {
    suite(&MemoryChunkStore::new()).await;
}

#[tokio::test]
async fn memory_runs_full_and_is_damaged() {
    let store = MemoryChunkStore::with_capacity(10);
    let id = chunk(1, 1, 0);
    store
        .apply(RS, id, Version::NONE, v(1, 1), write(0, "12345678"))
        .await
        .unwrap();
    let error = store
        .apply(RS, id, v(1, 1), v(1, 2), write(8, "90ab"))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::NoSpace);
    assert_eq!(contents(&store, id).await, (v(1, 1), "12345678".into()));
    assert!(store.damage(RS, id));
    let error = store.read(RS, id, 0, 1).await.unwrap_err();
    assert!(matches!(error, ChunkError::Corrupt { chunk, .. } if chunk == id));
    install(&store, id, v(1, 1), b"ok").await;
    assert_eq!(contents(&store, id).await, (v(1, 1), "ok".into()));
}
