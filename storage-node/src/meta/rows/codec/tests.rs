use super::*;
use proptest::prelude::*;

fn inode() -> impl Strategy<Value = Inode> {
    let numbers = (
        any::<u32>(),
        prop_oneof![Just(1), any::<u32>()],
        any::<u32>(),
        any::<u32>(),
    );
    let times = (any::<i64>(), any::<i64>(), any::<i64>());
    let rest = (
        any::<u32>(),
        any::<u32>(),
        any::<u64>(),
        any::<u64>(),
        any::<u64>(),
        any::<u64>(),
    );
    let target = proptest::collection::vec(any::<u8>(), 0..40);
    (1..=7, numbers, times, rest, target).prop_map(
        |(kind, (mode, nlink, uid, gid), (atime, mtime, ctime), (rdev, seed, size, change, parent, cookie), target)| {
            let kind = Kind::try_from(kind).unwrap();
            Inode {
                kind,
                mode,
                nlink,
                uid,
                gid,
                size,
                atime,
                mtime,
                ctime,
                rdev,
                seed,
                change,
                parent: InodeId(parent),
                next_cookie: if kind == Kind::Directory { cookie } else { 0 },
                target: if kind == Kind::Symlink {
                    target.into()
                } else {
                    Box::default()
                },
            }
        },
    )
}

fn held() -> impl Strategy<Value = Held> {
    let class = prop_oneof![Just(LockClass::Flock), Just(LockClass::Posix), Just(LockClass::Append)];
    (
        class,
        any::<bool>(),
        any::<u64>(),
        any::<u64>(),
        any::<u64>(),
        any::<u64>(),
        any::<u32>(),
    )
        .prop_map(|(class, exclusive, session, owner, start, end, pid)| Held {
            class,
            exclusive,
            session: SessionId(session),
            owner,
            start,
            end,
            pid,
        })
}

fn result() -> impl Strategy<Value = OpResult> {
    prop_oneof![
        Just(OpResult::Done),
        (any::<u64>(), inode()).prop_map(|(ino, inode)| OpResult::Attr(InodeId(ino), Box::new(inode))),
        (any::<u64>(), any::<u64>()).prop_map(|(offset, change)| OpResult::Turn { offset, change }),
        (0..ErrorCode::ALL.len(), ".{0,60}").prop_map(|(i, text)| OpResult::Failed(ErrorCode::ALL[i], text)),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    let session = any::<u64>().prop_map(SessionId);
    let ino = any::<u64>().prop_map(InodeId);
    let bytes = |range| proptest::collection::vec(any::<u8>(), range);
    let row = prop_oneof![
        any::<u64>().prop_map(|next_inode| (Key::Counters, Row::Counters { next_inode })),
        (session.clone(), ".{0,30}")
            .prop_map(|(id, client)| (Key::Session(id), Row::Session(Box::new(Session { client })))),
        (session.clone(), any::<u64>()).prop_map(|(id, below)| (Key::Acked(id), Row::Acked(below))),
        (session, any::<u64>(), result())
            .prop_map(|(id, op, result)| (Key::Result(id, op), Row::Result(Box::new(result)))),
        (ino.clone(), any::<u32>(), any::<u32>())
            .prop_map(|(ino, seed, chunks)| (Key::Garbage(ino), Row::Garbage(Garbage { seed, chunks }))),
        (ino.clone(), any::<u32>(), any::<u64>(), any::<u64>())
            .prop_map(|(ino, seed, from, to)| (Key::Truncate(ino), Row::Truncate(Truncate { seed, from, to }))),
        (ino.clone(), inode()).prop_map(|(ino, inode)| (Key::attributes(ino), Row::Inode(Box::new(inode)))),
        (ino.clone(), proptest::collection::vec(held(), 1..5))
            .prop_map(|(ino, held)| (Key::locks(ino), Row::Locks(Box::new(held)))),
        (ino.clone(), any::<u64>(), any::<u64>())
            .prop_map(|(ino, end, cut)| (Key::reach(ino), Row::Reach(Reach { end, cut }))),
        (ino.clone(), bytes(1..255), bytes(0..300))
            .prop_map(|(ino, name, value)| (Key::xattr(ino, &name), Row::Xattr(value.into()))),
        (ino, any::<u64>(), bytes(1..255), any::<u64>()).prop_map(|(dir, cookie, name, child)| {
            let (name, ino) = (name.into(), InodeId(child));
            (Key::dentry(dir, cookie), Row::Dentry(Dentry { name, ino }))
        }),
    ];
    (row, any::<bool>()).prop_map(|((key, row), keep)| (key, keep.then_some(row)))
}

fn read_all(bytes: &[u8]) -> Result<Vec<Change>, RowError> {
    let mut reader = Reader::new(bytes);
    let mut changes = Vec::new();
    while !reader.is_empty() {
        changes.push(reader.change()?);
    }
    Ok(changes)
}

proptest! {
    #[test]
    fn rows_round_trip(changes in proptest::collection::vec(change(), 0..20)) {
        let mut writer = Writer::default();
        for (key, row) in &changes {
            writer.change(key, row.as_ref());
        }
        prop_assert_eq!(read_all(&writer.into_bytes()).unwrap(), changes);
    }

    #[test]
    fn damaged_rows_are_errors(changes in proptest::collection::vec(change(), 1..5), cut in any::<prop::sample::Index>()) {
        let mut writer = Writer::default();
        for (key, row) in &changes {
            writer.change(key, row.as_ref());
        }
        let bytes = writer.into_bytes();
        // Any prefix reads as some of the rows, or is an error; it never panics.
        if let Ok(read) = read_all(&bytes[..cut.index(bytes.len())]) {
            prop_assert!(read.len() < changes.len());
        }
    }

    #[test]
    fn any_bytes_are_rows_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = read_all(&bytes);
        let _ = open_envelope(1, &bytes);
    }

    #[test]
    fn a_flipped_bit_is_noticed(body in proptest::collection::vec(any::<u8>(), 0..50), bit in any::<prop::sample::Index>()) {
        let mut sealed = seal_envelope(1, &body);
        prop_assert_eq!(open_envelope(1, &sealed).unwrap(), &body[..]);
        let bit = bit.index(sealed.len() * 8);
        sealed[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(open_envelope(1, &sealed).is_err());
    }
}

#[test]
fn a_file_takes_less_than_100_bytes() {
    let now = 1_795_000_000_000_000_000;
    let mut writer = Writer::default();
    let files = 1000;
    for ino in 0..files {
        let inode = Inode {
            kind: Kind::File,
            mode: 0o644,
            nlink: 1,
            uid: 1000,
            gid: 1000,
            size: 12_345,
            atime: now,
            mtime: now,
            ctime: now + 3_000_000,
            rdev: 0,
            seed: 0x1234_5678,
            change: 3,
            parent: InodeId(77),
            next_cookie: 0,
            target: Box::default(),
        };
        writer.change(
            &Key::attributes(InodeId(100_000 + ino)),
            Some(&Row::Inode(Box::new(inode))),
        );
    }
    for ino in 0..files {
        let dentry = Dentry {
            name: Arc::from(&b"a_source_file.rs"[..]),
            ino: InodeId(100_000 + ino),
        };
        writer.change(&Key::dentry(InodeId(77), 1 + ino), Some(&Row::Dentry(dentry)));
    }
    let each = writer.len() / files as usize;
    assert!(each < 70, "{each} bytes");
}

#[test]
fn newer_formats_are_refused_and_older_ones_read() {
    let sealed = seal_envelope(FORMAT + 1, b"x");
    assert_eq!(
        open_envelope(FORMAT, &sealed),
        Err(RowError::TooNew(FORMAT + 1, FORMAT))
    );
    assert_eq!(open_envelope(FORMAT, &seal_envelope(1, b"x")), Ok(&b"x"[..]));
    // A turn to append as format 1 had it.
    let mut writer = Writer::default();
    writer.key(&Key::Result(SessionId(1), 2));
    let mut bytes = writer.into_bytes();
    bytes.extend([3, 77]);
    let turn = OpResult::Turn { offset: 77, change: 0 };
    assert_eq!(
        read_all(&bytes).unwrap(),
        [(Key::Result(SessionId(1), 2), Some(Row::Result(Box::new(turn))))]
    );
}
