//! Attributes, sizes, quota, extended attributes.

use super::*;

#[test]
fn attributes_follow_posix() {
    let mut t = tree();
    let ino = t.file(1, "f");
    let before = t.stat(ino);
    let mode = |mode| SetAttr {
        ino,
        mode: Some(mode),
        ..SetAttr::default()
    };
    let after = t.attr(Op::SetAttr(mode(0o6755)));
    assert_eq!((after.mode, after.mtime), (0o6755, before.mtime));
    assert!(after.ctime > before.ctime && after.change > before.change);
    // A new owner clears set-id bits, unless the mode is given with it.
    let chown = SetAttr {
        ino,
        uid: Some(5),
        ..SetAttr::default()
    };
    assert_eq!(t.attr(Op::SetAttr(chown)).mode, 0o755);
    let both = SetAttr {
        uid: Some(6),
        ..mode(0o4755)
    };
    assert_eq!(t.attr(Op::SetAttr(both)).mode, 0o4755);
    let times = SetAttr {
        ino,
        atime: Some(3),
        mtime: Some(4),
        ..SetAttr::default()
    };
    let after = t.attr(Op::SetAttr(times));
    assert_eq!((after.atime, after.mtime), (3, 4));
    let sized = t.attr(truncate(ino, 10));
    assert_eq!(sized.size, 10);
    assert!(sized.mtime > 4);
    assert_eq!(t.call(truncate(1, 10)), Err(ErrorCode::IsDirectory));
    assert_eq!(t.call(truncate(ino, FILE_TOO_BIG)), Err(ErrorCode::FileTooBig));
}

const FILE_TOO_BIG: u64 = lazarette_types::FILE_SIZE_MAX + 1;

#[test]
fn shrinking_leaves_the_chunks_to_be_cut_and_holds_others_up() {
    let mut t = tree();
    let ino = t.file(1, "f");
    t.extend(ino, 5 << 20).unwrap();
    t.ns.take_work();
    t.attr(truncate(ino, 3));
    let cut = t.ns.state().truncate(InodeId(ino)).unwrap();
    assert_eq!((cut.from, cut.to), (5 << 20, 3));
    assert_eq!(t.ns.take_work(), [Work::Cut(InodeId(ino))]);
    let held_up = |t: &Tree, op: Op| {
        let request = Request {
            op: Some(op),
            ..Request::default()
        };
        t.ns.held_up_by(&request).is_some()
    };
    let name = || "f".into();
    assert!(held_up(&t, Op::GetAttr(GetAttr { ino })));
    assert!(held_up(
        &t,
        Op::Lookup(Lookup {
            parent: 1,
            name: name()
        })
    ));
    assert!(held_up(&t, truncate(ino, 9)));
    assert!(!held_up(&t, Op::GetAttr(GetAttr { ino: 1 })));
    t.ns.cut(InodeId(ino), cut);
    assert!(!held_up(&t, Op::GetAttr(GetAttr { ino })));
    // A file that goes while it is cut takes all its chunks along.
    t.attr(truncate(ino, 0));
    t.extend(ino, 3 << 20).unwrap();
    t.attr(truncate(ino, 1));
    t.call(unlink(1, "f")).unwrap();
    let (_, garbage) = t.ns.state().garbage().next().unwrap();
    assert_eq!(garbage.chunks, 3);
    assert_eq!(t.ns.state().truncates().count(), 0);
}

#[test]
fn the_quota_counts_file_sizes() {
    let mut t = tree();
    let (a, b) = (t.file(1, "a"), t.file(1, "b"));
    t.extend(a, 60 << 20).unwrap();
    assert_eq!(t.extend(b, 41 << 20), Err(ErrorCode::NoSpace));
    t.extend(b, 40 << 20).unwrap();
    assert_eq!(t.used(), (100 << 20, 3));
    assert_eq!(t.call(truncate(a, 61 << 20)), Err(ErrorCode::NoSpace));
    // Overwriting within the file is always possible.
    t.extend(a, 10 << 20).unwrap();
    assert_eq!(t.stat(a).size, 60 << 20);
    t.call(unlink(1, "b")).unwrap();
    assert_eq!(t.used(), (60 << 20, 2));
    t.ns.set_limits(Limits {
        size: 200 << 20,
        chunk_size: CHUNK,
    });
    t.extend(a, 190 << 20).unwrap();
}

#[test]
fn extended_attributes() {
    let mut t = tree();
    let ino = t.file(1, "f");
    let name = || "user.a".into();
    let set = |value: &'static str, create_only, replace_only| {
        Op::SetXattr(SetXattr {
            ino,
            name: name(),
            value: value.into(),
            create_only,
            replace_only,
        })
    };
    let get = || Op::GetXattr(GetXattr { ino, name: name() });
    assert_eq!(t.call(get()), Err(ErrorCode::NoAttribute));
    assert_eq!(t.call(set("1", false, true)), Err(ErrorCode::NoAttribute));
    t.call(set("1", true, false)).unwrap();
    assert_eq!(t.call(set("2", true, false)), Err(ErrorCode::Exists));
    t.call(set("3", false, true)).unwrap();
    assert_eq!(t.call(get()), Ok(Reply::Bytes("3".into())));
    match t.call(Op::ListXattr(ListXattr { ino })).unwrap() {
        Reply::XattrNames(names) => assert_eq!(names.names, ["user.a"]),
        other => panic!("{other:?}"),
    }
    let big = Op::SetXattr(SetXattr {
        ino,
        name: name(),
        value: vec![0; (64 << 10) + 1].into(),
        ..SetXattr::default()
    });
    assert_eq!(t.call(big), Err(ErrorCode::OutOfRange));
    t.call(Op::RemoveXattr(RemoveXattr { ino, name: name() })).unwrap();
    assert_eq!(
        t.call(Op::RemoveXattr(RemoveXattr { ino, name: name() })),
        Err(ErrorCode::NoAttribute)
    );
    t.call(set("4", false, false)).unwrap();
    t.call(unlink(1, "f")).unwrap();
    assert!(t.ns.state().get(&Key::xattr(InodeId(ino), b"user.a")).is_none());
}
