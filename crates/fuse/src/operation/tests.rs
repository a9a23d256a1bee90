use super::decoders::decode_all;
use super::*;
use crate::abi::Opcode;
use crate::attributes::{LockKind, Timestamp};
use proptest::prelude::*;
use std::ffi::OsStr;

fn header(opcode: Opcode) -> Header {
    Header {
        length: 0,
        opcode: opcode as u32,
        unique: 2,
        node: 7,
        uid: 0,
        gid: 0,
        pid: 0,
        extensions: 0,
    }
}

#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }
    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }
    fn text(mut self, text: &str) -> Self {
        self.0.extend(text.as_bytes());
        self.0.push(0);
        self
    }
    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
    fn done(self) -> Bytes {
        Bytes::from(self.0)
    }
}

#[test]
fn names_are_checked() {
    let parse = |bytes: &'static [u8]| {
        let body = Bytes::from_static(bytes);
        Lookup::parse(&header(Opcode::Lookup), &body).map(|lookup| lookup.name.to_owned())
    };
    assert_eq!(parse(b"name\0"), Ok("name".into()));
    assert_eq!(parse(b"name"), Err(Malformed::Text));
    assert_eq!(parse(b"\0"), Err(Malformed::Text));
    assert_eq!(parse(b"a/b\0"), Err(Malformed::Name));
}

#[test]
fn a_write_ends_where_its_size_says() {
    let body = |size: u32| {
        Body::default()
            .u64(3)
            .u64(4096)
            .u32(size)
            .u32(2)
            .u64(99)
            .u32(1)
            .u32(0)
            .bytes(b"0123456789")
            .done()
    };
    let write = Write::parse(&header(Opcode::Write), &body(8)).unwrap();
    assert_eq!(
        (write.handle, write.offset, &write.data[..]),
        (3, 4096, &b"01234567"[..])
    );
    assert_eq!((write.lock_owner, write.from_cache), (Some(99), false));
    assert_eq!(Write::parse(&header(Opcode::Write), &body(11)), Err(Malformed::Short));
    assert_eq!(
        Write::parse(&header(Opcode::Write), &body(u32::MAX)),
        Err(Malformed::Short)
    );
}

#[test]
fn both_renames() {
    let body = Body::default().u64(9).text("old").text("new").done();
    let rename = Rename::parse(&header(Opcode::Rename), &body).unwrap();
    assert_eq!((rename.parent, rename.new_parent, rename.flags), (7, 9, 0));
    assert_eq!((rename.name, rename.new_name), (OsStr::new("old"), OsStr::new("new")));
    let body = Body::default().u64(9).u32(2).u32(0).text("old").text("new").done();
    assert_eq!(Rename::parse(&header(Opcode::Rename2), &body).unwrap().flags, 2);
}

#[test]
fn setattr_has_what_its_bits_say() {
    let build = |valid: u32, nanoseconds: u32| {
        let mut body = Body::default()
            .u32(valid)
            .u32(0)
            .u64(1)
            .u64(2)
            .u64(3)
            .u64(4)
            .u64(u64::MAX)
            .u64(6);
        body = body
            .u32(nanoseconds)
            .u32(8)
            .u32(9)
            .u32(0o600)
            .u32(0)
            .u32(11)
            .u32(12)
            .u32(0);
        body.done()
    };
    let setattr = Setattr::parse(&header(Opcode::Setattr), &build(0, u32::MAX)).unwrap();
    assert!(setattr.mode.is_none() && setattr.size.is_none() && setattr.atime.is_none() && setattr.handle.is_none());
    let all = abi::fattr::MODE | abi::fattr::SIZE | abi::fattr::ATIME | abi::fattr::MTIME | abi::fattr::UID;
    let setattr = Setattr::parse(&header(Opcode::Setattr), &build(all, 7)).unwrap();
    assert_eq!(
        (setattr.mode, setattr.size, setattr.uid, setattr.gid),
        (Some(0o600), Some(2), Some(11), None)
    );
    assert_eq!(
        setattr.atime,
        Some(SetTime::At(Timestamp {
            seconds: 4,
            nanoseconds: 7
        }))
    );
    assert_eq!(
        setattr.mtime,
        Some(SetTime::At(Timestamp {
            seconds: -1,
            nanoseconds: 8
        }))
    );
    assert_eq!(
        Setattr::parse(&header(Opcode::Setattr), &build(all, 1_000_000_000)),
        Err(Malformed::Range)
    );
    let now = abi::fattr::ATIME | abi::fattr::ATIME_NOW;
    assert_eq!(
        Setattr::parse(&header(Opcode::Setattr), &build(now, 0)).unwrap().atime,
        Some(SetTime::Now)
    );
}

#[test]
fn forgets_are_counted_before_they_are_read() {
    let body = Body::default().u32(2).u32(0).u64(5).u64(1).u64(6).u64(2).done();
    let forgets = parse_forgets(Opcode::BatchForget, &header(Opcode::BatchForget), &body).unwrap();
    assert_eq!(
        forgets,
        [Forget { node: 5, lookups: 1 }, Forget { node: 6, lookups: 2 }]
    );
    let body = Body::default().u32(u32::MAX).u32(0).u64(5).u64(1).done();
    assert_eq!(
        parse_forgets(Opcode::BatchForget, &header(Opcode::BatchForget), &body),
        Err(Malformed::Short)
    );
    let body = Body::default().u64(3).done();
    let forgets = parse_forgets(Opcode::Forget, &header(Opcode::Forget), &body).unwrap();
    assert_eq!(forgets, [Forget { node: 7, lookups: 3 }]);
}

#[test]
fn setxattr_in_both_forms() {
    let body = Body::default().u32(3).u32(1).text("user.x").bytes(b"abc").done();
    let setxattr = Setxattr::parse(&header(Opcode::Setxattr), &body, false).unwrap();
    assert_eq!(
        (setxattr.name, setxattr.value, setxattr.flags),
        (OsStr::new("user.x"), &b"abc"[..], 1)
    );
    let body = Body::default()
        .u32(3)
        .u32(1)
        .u32(1)
        .u32(0)
        .text("user.x")
        .bytes(b"abc")
        .done();
    let setxattr = Setxattr::parse(&header(Opcode::Setxattr), &body, true).unwrap();
    assert!(setxattr.kill_sgid);
    let body = Body::default().u32(4).u32(1).text("user.x").bytes(b"abc").done();
    assert_eq!(
        Setxattr::parse(&header(Opcode::Setxattr), &body, false),
        Err(Malformed::Short)
    );
}

#[test]
fn groups_among_extensions() {
    let body = Body::default()
        .u32(16)
        .u32(3)
        .u64(0)
        .u32(16)
        .u32(abi::EXT_GROUPS)
        .u32(1)
        .u32(1000)
        .done();
    assert_eq!(parse_groups(&body), Ok(vec![1000]));
    assert_eq!(parse_groups(&[]), Ok(vec![]));
    let body = Body::default().u32(4).u32(abi::EXT_GROUPS).done();
    assert_eq!(parse_groups(&body), Err(Malformed::Range));
    let body = Body::default().u32(16).u32(abi::EXT_GROUPS).u32(9).u32(1).done();
    assert_eq!(parse_groups(&body), Err(Malformed::Short));
}

#[test]
fn locks_are_checked() {
    let build = |start, end, kind| {
        Body::default()
            .u64(1)
            .u64(2)
            .u64(start)
            .u64(end)
            .u32(kind)
            .u32(0)
            .u32(1)
            .u32(0)
            .done()
    };
    let lock = LockRequest::parse(&header(Opcode::Setlkw), &build(0, 9, 1)).unwrap();
    assert!(lock.wait && lock.flock && lock.lock.kind == LockKind::Exclusive);
    assert!(
        !LockRequest::parse(&header(Opcode::Setlk), &build(0, 9, 1))
            .unwrap()
            .wait
    );
    assert_eq!(
        LockRequest::parse(&header(Opcode::Setlk), &build(0, 9, 3)),
        Err(Malformed::Range)
    );
    assert_eq!(
        LockRequest::parse(&header(Opcode::Setlk), &build(9, 0, 0)),
        Err(Malformed::Range)
    );
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), opcode in 0u32..60) {
        let _ = Header::parse(&bytes);
        let header = Header { opcode, ..header(Opcode::Lookup) };
        decode_all(&header, &Bytes::from(bytes));
    }

    #[test]
    fn small_numbers_do_not_panic(bytes in proptest::collection::vec(0u8..4, 0..200)) {
        decode_all(&header(Opcode::Rename2), &Bytes::from(bytes));
    }
}
