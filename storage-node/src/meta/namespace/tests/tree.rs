//! Names.

use super::*;

#[test]
fn a_new_volume_has_a_root_directory() {
    let mut t = tree();
    let root = t.stat(1);
    assert_eq!((root.kind(), root.nlink, root.parent), (Kind::Directory, 2, 1));
    assert_eq!(t.used(), (0, 1));
}

#[test]
fn created_things_can_be_found_with_their_attributes() {
    let mut t = tree();
    let dir = t.dir(1, "d");
    let file = t.attr(create(dir, "f", Kind::File));
    assert_eq!(t.find(dir, "f"), Ok(file.ino));
    assert_eq!((file.uid, file.gid, file.mode, file.nlink), (1000, 1000, 0o644, 1));
    assert_eq!((file.parent, file.size), (dir, 0));
    assert_eq!(t.stat(1).nlink, 3);
    assert_eq!(t.find(dir, "g"), Err(ErrorCode::NotFound));
    assert_eq!(t.find(file.ino, "g"), Err(ErrorCode::NotDirectory));
    assert_eq!(t.find(999, "g"), Err(ErrorCode::Stale));
    let link = t.make(dir, "l", Kind::Symlink);
    assert_eq!(
        t.call(Op::ReadLink(ReadLink { ino: link })),
        Ok(Reply::Bytes("t".into()))
    );
    assert_eq!(
        t.call(Op::ReadLink(ReadLink { ino: file.ino })),
        Err(ErrorCode::InvalidArgument)
    );
    assert_eq!(t.stat(link).size, 1);
}

#[test]
fn creating_an_existing_name_fails_only_when_exclusive() {
    let mut t = tree();
    let file = t.file(1, "f");
    let again = |exclusive| match create(1, "f", Kind::File) {
        Op::Create(op) => Op::Create(Create { exclusive, ..op }),
        _ => unreachable!(),
    };
    assert_eq!(t.call(again(true)), Err(ErrorCode::Exists));
    assert_eq!(t.attr(again(false)).ino, file);
    assert_eq!(t.call(create(1, "f", Kind::Directory)), Err(ErrorCode::Exists));
    t.dir(1, "d");
    let over_dir = match create(1, "d", Kind::File) {
        Op::Create(op) => Op::Create(Create { exclusive: false, ..op }),
        _ => unreachable!(),
    };
    assert_eq!(t.call(over_dir), Err(ErrorCode::IsDirectory));
}

#[test]
fn a_file_without_a_name_gets_one_or_goes() {
    let mut t = tree();
    let unnamed = |name: &str, open| match create(1, name, Kind::File) {
        Op::Create(op) => Op::Create(Create {
            unnamed: true,
            open,
            ..op
        }),
        _ => unreachable!(),
    };
    assert_eq!(t.call(unnamed("f", true)), Err(ErrorCode::InvalidArgument));
    assert_eq!(t.call(unnamed("", false)), Err(ErrorCode::InvalidArgument));
    let (kept, dropped) = (t.attr(unnamed("", true)), t.attr(unnamed("", true)));
    assert_eq!((kept.nlink, t.list(1).len(), t.used().1), (0, 0, 3));
    let link = |ino, name: &str| {
        Op::Link(Link {
            ino,
            new_parent: 1,
            new_name: name.as_bytes().to_vec().into(),
        })
    };
    assert_eq!(t.attr(link(kept.ino, "f")).nlink, 1);
    for ino in [kept.ino, dropped.ino] {
        t.close(ALICE, ino);
    }
    assert_eq!((t.find(1, "f"), t.used().1), (Ok(kept.ino), 2));
    // One that had a name and lost it gets none again.
    t.open(ALICE, kept.ino);
    let name = b"f".to_vec().into();
    t.call(Op::Unlink(Unlink { parent: 1, name })).unwrap();
    assert_eq!(t.call(link(kept.ino, "g")), Err(ErrorCode::NotFound));
}

#[test]
fn bad_names_change_nothing() {
    let mut t = tree();
    for name in ["", ".", "..", "a/b", "a\0b"] {
        assert_eq!(
            t.call(create(1, name, Kind::File)),
            Err(ErrorCode::InvalidArgument),
            "{name:?}"
        );
    }
    let long = "x".repeat(256);
    assert_eq!(t.call(create(1, &long, Kind::File)), Err(ErrorCode::NameTooLong));
    t.file(1, &long[1..]);
    assert_eq!(t.list(1).len(), 1);
    assert_eq!(
        t.call(create(1, "k", Kind::Unspecified)),
        Err(ErrorCode::InvalidArgument)
    );
}

#[test]
fn a_setgid_directory_hands_its_group_down() {
    let mut t = tree();
    let dir = t.dir(1, "d");
    t.attr(Op::SetAttr(SetAttr {
        ino: dir,
        mode: Some(0o2775),
        gid: Some(77),
        ..SetAttr::default()
    }));
    let file = t.attr(create(dir, "f", Kind::File));
    assert_eq!((file.gid, file.mode), (77, 0o644));
    let below = t.attr(create(dir, "s", Kind::Directory));
    assert_eq!((below.gid, below.mode), (77, 0o2755));
}

#[test]
fn unlink_and_rmdir_check_what_they_remove() {
    let mut t = tree();
    let dir = t.dir(1, "d");
    t.file(dir, "f");
    assert_eq!(t.call(unlink(1, "d")), Err(ErrorCode::IsDirectory));
    assert_eq!(t.call(rm_dir(1, "d")), Err(ErrorCode::NotEmpty));
    assert_eq!(t.call(rm_dir(dir, "f")), Err(ErrorCode::NotDirectory));
    assert_eq!(t.call(unlink(dir, "x")), Err(ErrorCode::NotFound));
    t.call(unlink(dir, "f")).unwrap();
    t.call(rm_dir(1, "d")).unwrap();
    assert_eq!(t.stat(1).nlink, 2);
    assert_eq!(t.used(), (0, 1));
    assert_eq!(t.call(create(dir, "f", Kind::File)), Err(ErrorCode::Stale));
}

#[test]
fn inode_numbers_are_never_reused() {
    let mut t = tree();
    let first = t.file(1, "f");
    t.call(unlink(1, "f")).unwrap();
    assert!(t.file(1, "f") > first);
}

#[test]
fn hard_links_count() {
    let mut t = tree();
    let file = t.file(1, "a");
    let dir = t.dir(1, "d");
    assert_eq!(t.attr(link(file, dir, "b")).nlink, 2);
    assert_eq!(t.call(link(file, dir, "b")), Err(ErrorCode::Exists));
    assert_eq!(t.call(link(dir, 1, "e")), Err(ErrorCode::NotPermitted));
    t.call(unlink(1, "a")).unwrap();
    assert_eq!(t.stat(file).nlink, 1);
    assert_eq!(t.find(dir, "b"), Ok(file));
    t.call(unlink(dir, "b")).unwrap();
    assert_eq!(t.garbage(), [file]);
}

#[test]
fn rename_moves_and_replaces() {
    let mut t = tree();
    let (a, b) = (t.dir(1, "a"), t.dir(1, "b"));
    let file = t.file(a, "f");
    assert_eq!(t.attr(rename(a, "f", b, "g")).parent, b);
    assert_eq!(t.find(a, "f"), Err(ErrorCode::NotFound));
    assert_eq!(t.find(b, "g"), Ok(file));
    let other = t.file(b, "h");
    t.call(rename(b, "g", b, "h")).unwrap();
    assert_eq!(t.find(b, "h"), Ok(file));
    assert_eq!(t.list(b), ["h"]);
    assert_eq!(t.garbage(), [other]);
    assert_eq!(t.call(rename(b, "x", b, "h")), Err(ErrorCode::NotFound));
}

#[test]
fn rename_of_directories_keeps_counts_and_parents() {
    let mut t = tree();
    let (a, b) = (t.dir(1, "a"), t.dir(1, "b"));
    let d = t.dir(a, "d");
    t.call(rename(a, "d", b, "d")).unwrap();
    assert_eq!((t.stat(a).nlink, t.stat(b).nlink, t.stat(d).parent), (2, 3, b));
    let empty = t.dir(a, "e");
    t.call(rename(b, "d", a, "e")).unwrap();
    assert_eq!((t.stat(a).nlink, t.stat(b).nlink), (3, 2));
    assert_eq!(t.find(a, "e"), Ok(d));
    assert_eq!(t.call(Op::GetAttr(GetAttr { ino: empty })), Err(ErrorCode::Stale));
    t.file(d, "f");
    t.dir(b, "x");
    assert_eq!(t.call(rename(b, "x", a, "e")), Err(ErrorCode::NotEmpty));
    t.file(b, "file");
    assert_eq!(t.call(rename(b, "file", b, "x")), Err(ErrorCode::IsDirectory));
    assert_eq!(t.call(rename(b, "x", b, "file")), Err(ErrorCode::NotDirectory));
    // Within one directory counts stay.
    t.call(rename(b, "x", b, "y")).unwrap();
    assert_eq!(t.stat(b).nlink, 3);
}

#[test]
fn a_directory_cannot_move_below_itself() {
    let mut t = tree();
    let a = t.dir(1, "a");
    let b = t.dir(a, "b");
    let c = t.dir(b, "c");
    assert_eq!(t.call(rename(1, "a", c, "x")), Err(ErrorCode::InvalidArgument));
    assert_eq!(t.call(rename(1, "a", a, "x")), Err(ErrorCode::InvalidArgument));
    assert_eq!(t.call(exchange(1, "a", b, "c")), Err(ErrorCode::InvalidArgument));
    t.file(1, "f");
    assert_eq!(t.call(exchange(b, "c", 1, "a")), Err(ErrorCode::InvalidArgument));
    assert_eq!(t.call(rename(b, "c", 1, "a")), Err(ErrorCode::NotEmpty));
}

#[test]
fn rename_flags() {
    let mut t = tree();
    let d = t.dir(1, "d");
    let (f, g, s) = (t.file(1, "f"), t.file(d, "g"), t.dir(d, "s"));
    let no_replace = Op::Rename(Rename {
        no_replace: true,
        ..rename_op(1, "f", d, "g")
    });
    assert_eq!(t.call(no_replace), Err(ErrorCode::Exists));
    assert_eq!(t.call(exchange(1, "f", d, "none")), Err(ErrorCode::NotFound));
    t.call(exchange(1, "f", d, "g")).unwrap();
    assert_eq!((t.find(1, "f"), t.find(d, "g")), (Ok(g), Ok(f)));
    // A file against a directory in another directory.
    t.call(exchange(1, "f", d, "s")).unwrap();
    assert_eq!((t.find(1, "f"), t.find(d, "s")), (Ok(s), Ok(g)));
    assert_eq!((t.stat(1).nlink, t.stat(d).nlink, t.stat(s).parent), (4, 2, 1));
}

#[test]
fn renaming_onto_the_same_inode_does_nothing() {
    let mut t = tree();
    let file = t.file(1, "a");
    t.call(link(file, 1, "b")).unwrap();
    t.call(rename(1, "a", 1, "b")).unwrap();
    assert_eq!(
        (t.find(1, "a"), t.find(1, "b"), t.stat(file).nlink),
        (Ok(file), Ok(file), 2)
    );
}

#[test]
fn cookies_stay_while_entries_come_and_go() {
    let mut t = tree();
    for i in 0..10 {
        t.file(1, &format!("f{i}"));
    }
    let page = |t: &mut Tree, after| match t
        .call(Op::ReadDir(ReadDir {
            ino: 1,
            after,
            limit: 4,
        }))
        .unwrap()
    {
        Reply::ReadDir(reply) => reply,
        other => panic!("{other:?}"),
    };
    let first = page(&mut t, 0);
    assert!(!first.end && first.entries.len() == 4);
    let after = first.entries[3].cookie;
    t.call(unlink(1, "f0")).unwrap();
    t.call(unlink(1, "f3")).unwrap();
    t.call(unlink(1, "f5")).unwrap();
    t.file(1, "new");
    let mut names = Vec::new();
    let mut at = after;
    loop {
        let reply = page(&mut t, at);
        for entry in &reply.entries {
            assert_eq!(entry.attr.as_ref().map(|attr| attr.nlink), Some(1));
            names.push(String::from_utf8(entry.name.to_vec()).unwrap());
            at = entry.cookie;
        }
        if reply.end {
            break;
        }
    }
    assert_eq!(names, ["f4", "f6", "f7", "f8", "f9", "new"]);
}
