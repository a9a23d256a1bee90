use super::*;
use lazarette_proto::meta::{Create, DirEntry, GetAttr, Lookup, Missing, ReadDir, ReadDirReply, Unlink};

const DIR: u64 = 1;
const TTL: u32 = 600_000;

fn name(name: &'static str) -> Bytes {
    Bytes::from_static(name.as_bytes())
}

/// A reply with a lease.
fn leased(ino: u64, as_of: u64, changed: Vec<u64>) -> Response {
    Response {
        lease_ms: TTL,
        as_of,
        changed,
        owner_epoch: 1,
        company: 1,
        result: Some(response::Result::Attr(Attr {
            ino,
            nlink: 1,
            ..Attr::default()
        })),
        ..Response::default()
    }
}

/// A reply to a sole client.
fn sole(ino: u64, as_of: u64, changed: Vec<u64>) -> Response {
    Response {
        lease_ms: 0,
        cache_ttl_ms: TTL,
        ..leased(ino, as_of, changed)
    }
}

fn missing(as_of: u64) -> Response {
    Response {
        result: Some(response::Result::Missing(Missing {})),
        ..sole(0, as_of, Vec::new())
    }
}

fn lookup(of: &'static str) -> Op {
    let (parent, name) = (DIR, name(of));
    Op::Lookup(Lookup { parent, name })
}

fn unlink(of: &'static str) -> Op {
    let (parent, name) = (DIR, name(of));
    Op::Unlink(Unlink { parent, name })
}

fn create(of: &'static str, kind: Kind) -> Op {
    Op::Create(Create {
        parent: DIR,
        name: name(of),
        kind: kind.into(),
        ..Create::default()
    })
}

fn learn(cache: &Cache, op: &Op, response: &Response) {
    cache.learn(op, response, Instant::now(), false);
}

fn look_up(cache: &Cache, name: &'static str, ino: u64, as_of: u64) {
    learn(cache, &lookup(name), &leased(ino, as_of, Vec::new()));
}

fn recall(cache: &Cache, number: u64, inodes: &[u64]) {
    cache.recall(&Recall {
        number,
        inodes: inodes.to_vec(),
        owner_epoch: 1,
        company: 0,
    });
}

/// Where a name leads to; 0 if it is known to be missing.
fn found(cache: &Cache, name: &str) -> Option<u64> {
    cache.lookup(DIR, name.as_bytes()).map(|named| match named {
        Named::Attr(attr, _) => attr.ino,
        Named::Missing(_) => 0,
    })
}

#[test]
fn names_and_attributes_are_known_until_recalled() {
    let cache = Cache::default();
    look_up(&cache, "f", 7, 0);
    assert_eq!(found(&cache, "f"), Some(7));
    assert_eq!((found(&cache, "g"), cache.attr(8)), (None, None));
    recall(&cache, 1, &[7]);
    assert_eq!((found(&cache, "f"), cache.attr(7)), (None, None));
    look_up(&cache, "f", 7, 1);
    recall(&cache, 2, &[DIR]);
    assert_eq!(found(&cache, "f"), None);
    assert!(cache.attr(7).is_some());
}

#[test]
fn a_reply_that_a_recall_overtook_is_not_kept() {
    let cache = Cache::default();
    recall(&cache, 5, &[7]);
    look_up(&cache, "f", 7, 4);
    assert_eq!((found(&cache, "f"), cache.attr(7)), (None, None));
    look_up(&cache, "f", 7, 5);
    assert!(found(&cache, "f").is_some());
}

#[test]
fn ones_own_change_makes_older_replies_void() {
    let cache = Cache::default();
    look_up(&cache, "f", 7, 0);
    let op = Op::GetAttr(GetAttr { ino: 7 });
    learn(&cache, &op, &leased(7, 1, vec![7, DIR]));
    assert_eq!(found(&cache, "f"), None);
    assert!(cache.attr(7).is_some(), "what the change itself said");
    look_up(&cache, "f", 7, 0);
    assert_eq!(found(&cache, "f"), None);
}

#[test]
fn forgetting_single_recalls_forgets_nothing_stale() {
    let cache = Cache::default();
    recall(&cache, 1, &[7]);
    for number in 2..2 * MAX_RECALLED as u64 {
        recall(&cache, number, &[1_000_000 + number]);
    }
    look_up(&cache, "f", 7, 0);
    assert_eq!(cache.attr(7), None);
    assert!(cache.state().recalled.len() <= MAX_RECALLED);
}

#[test]
fn leases_run_out_and_a_new_owner_counts_anew() {
    let cache = Cache::default();
    let past = Instant::now() - Duration::from_secs(601);
    let op = Op::GetAttr(GetAttr { ino: 7 });
    cache.learn(&op, &leased(7, 3, Vec::new()), past, false);
    assert_eq!(cache.attr(7), None);
    recall(&cache, 9, &[7]);
    let of_next = |as_of| Response {
        owner_epoch: 2,
        ..leased(7, as_of, Vec::new())
    };
    learn(&cache, &lookup("f"), &of_next(0));
    assert_eq!(found(&cache, "f"), Some(7));
    // The owner before says nothing any more.
    look_up(&cache, "g", 8, 20);
    recall(&cache, 10, &[7]);
    assert_eq!((found(&cache, "g"), found(&cache, "f")), (None, Some(7)));
    // The first word of an owner may be a recall; what it is about may come later.
    cache.recall(&Recall {
        number: 4,
        inodes: vec![7],
        owner_epoch: 3,
        company: 0,
    });
    assert_eq!(found(&cache, "f"), None);
    let late = Response {
        owner_epoch: 3,
        ..leased(7, 3, Vec::new())
    };
    learn(&cache, &lookup("f"), &late);
    assert_eq!(found(&cache, "f"), None);
}

#[test]
fn a_sole_client_knows_until_it_gets_company() {
    let cache = Cache::default();
    learn(&cache, &lookup("f"), &sole(7, 0, Vec::new()));
    learn(&cache, &lookup("g"), &missing(0));
    assert_eq!((found(&cache, "f"), found(&cache, "g")), (Some(7), Some(0)));
    assert!(cache.open(7).is_some() && cache.sole() > Duration::ZERO);
    let company = Response {
        cache_ttl_ms: 0,
        company: 2,
        ..leased(9, 0, Vec::new())
    };
    learn(&cache, &lookup("h"), &company);
    assert_eq!((found(&cache, "f"), found(&cache, "g")), (None, None));
    assert_eq!(found(&cache, "h"), Some(9));
    // A lease is not a reason to open a file without a word.
    assert_eq!((cache.open(9), cache.sole()), (None, Duration::ZERO));
    // A reply from before is too late.
    learn(&cache, &lookup("f"), &sole(7, 0, Vec::new()));
    assert_eq!((found(&cache, "f"), cache.sole()), (None, Duration::ZERO));
}

#[test]
fn company_may_be_announced() {
    let cache = Cache::default();
    learn(&cache, &lookup("f"), &sole(7, 3, Vec::new()));
    cache.recall(&Recall {
        number: 0,
        inodes: Vec::new(),
        owner_epoch: 1,
        company: 2,
    });
    assert_eq!((found(&cache, "f"), cache.sole()), (None, Duration::ZERO));
    assert_eq!(cache.terms(), Terms { epoch: 1, company: 2 });
}

#[test]
fn what_a_sole_client_knew_is_good_again_when_it_hears_that_it_was_alone_all_the_time() {
    let cache = Cache::default();
    let past = Instant::now() - Duration::from_secs(601);
    cache.learn(&lookup("f"), &sole(7, 0, Vec::new()), past, false);
    assert_eq!((found(&cache, "f"), cache.open(7)), (None, None));
    learn(&cache, &Op::GetAttr(GetAttr { ino: 8 }), &sole(8, 0, Vec::new()));
    assert_eq!(found(&cache, "f"), Some(7));
}

#[test]
fn ones_own_changes_are_known_in_whatever_order_their_replies_come() {
    let cache = Cache::default();
    let done = |as_of| Response {
        result: None,
        ..sole(0, as_of, vec![DIR, 7])
    };
    learn(&cache, &create("f", Kind::File), &sole(7, 1, vec![DIR, 7]));
    learn(&cache, &create("g", Kind::File), &sole(8, 3, vec![DIR, 8]));
    learn(&cache, &unlink("f"), &done(2));
    assert_eq!((found(&cache, "f"), found(&cache, "g")), (Some(0), Some(8)));
    assert_eq!(cache.attr(7), None);
    // Seen before it was unlinked, heard after.
    learn(&cache, &lookup("f"), &sole(7, 1, Vec::new()));
    assert_eq!((found(&cache, "f"), cache.attr(7)), (Some(0), None));
    learn(&cache, &unlink("g"), &done(5));
    learn(&cache, &create("g", Kind::File), &sole(9, 6, vec![DIR, 9]));
    learn(&cache, &create("f", Kind::File), &sole(10, 4, vec![DIR, 10]));
    assert_eq!((found(&cache, "f"), found(&cache, "g")), (Some(10), Some(9)));
}

fn rename(from: &'static str, to: &'static str, exchange: bool) -> Op {
    Op::Rename(Rename {
        parent: DIR,
        name: name(from),
        new_parent: DIR,
        new_name: name(to),
        exchange,
        ..Rename::default()
    })
}

#[test]
fn a_rename_moves_a_name() {
    let cache = Cache::default();
    learn(&cache, &create("f", Kind::File), &sole(7, 1, vec![DIR, 7]));
    learn(&cache, &create("g", Kind::File), &sole(8, 2, vec![DIR, 8]));
    learn(&cache, &rename("f", "g", false), &sole(7, 3, vec![DIR, 7, 8]));
    assert_eq!((found(&cache, "f"), found(&cache, "g")), (Some(0), Some(7)));
    assert_eq!(cache.attr(8), None);
    // Names of one inode: nothing is done, and nothing reported as changed.
    learn(&cache, &create("h", Kind::File), &sole(7, 4, vec![DIR, 7]));
    learn(&cache, &rename("h", "g", false), &sole(7, 4, Vec::new()));
    assert_eq!((found(&cache, "h"), found(&cache, "g")), (Some(7), Some(7)));
    learn(&cache, &create("i", Kind::File), &sole(9, 5, vec![DIR, 9]));
    learn(&cache, &rename("h", "i", true), &sole(7, 6, vec![DIR, 7, 9]));
    assert_eq!((found(&cache, "h"), found(&cache, "i")), (None, Some(7)));
}

fn listing(names: &[(&'static str, u64)], as_of: u64, end: bool) -> Response {
    let entries = names.iter().map(|(of, ino)| DirEntry {
        name: name(of),
        cookie: *ino,
        attr: Some(Attr {
            ino: *ino,
            ..Attr::default()
        }),
    });
    let entries = entries.collect();
    Response {
        result: Some(response::Result::ReadDir(ReadDirReply { entries, end })),
        ..sole(0, as_of, Vec::new())
    }
}

#[test]
fn what_is_not_in_a_whole_listing_or_a_new_directory_is_missing() {
    let cache = Cache::default();
    let list = Op::ReadDir(ReadDir {
        ino: DIR,
        ..ReadDir::default()
    });
    learn(&cache, &create("stale", Kind::File), &sole(5, 1, vec![DIR, 5]));
    learn(&cache, &list, &listing(&[("f", 7)], 2, false));
    assert_eq!((found(&cache, "f"), found(&cache, "x")), (Some(7), None));
    learn(&cache, &list, &listing(&[("f", 7)], 3, true));
    assert_eq!((found(&cache, "f"), found(&cache, "x")), (Some(7), Some(0)));
    assert_eq!(found(&cache, "stale"), Some(0));
    // The reply to a change that the listing shows already.
    learn(&cache, &create("y", Kind::File), &sole(8, 2, vec![DIR, 8]));
    assert_eq!(found(&cache, "y"), Some(0));
    let made = Response {
        result: Some(response::Result::Attr(Attr {
            ino: 20,
            kind: Kind::Directory.into(),
            ..Attr::default()
        })),
        ..sole(20, 4, vec![DIR, 20])
    };
    learn(&cache, &create("d", Kind::Directory), &made);
    assert!(matches!(cache.lookup(20, b"x"), Some(Named::Missing(_))));
    assert_eq!(found(&cache, "d"), Some(20));
}

#[test]
fn nothing_is_opened_without_asking_while_a_name_may_go() {
    let cache = Cache::default();
    learn(&cache, &lookup("f"), &sole(7, 0, Vec::new()));
    let removal = cache.removal();
    assert_eq!(cache.open(7), None);
    drop(removal);
    assert!(cache.open(7).is_some());
    // The last name is gone, the file is open yet.
    let nameless = Attr {
        ino: 7,
        ..Attr::default()
    };
    let done = Response {
        result: None,
        also: vec![nameless],
        ..sole(0, 1, vec![DIR, 7])
    };
    learn(&cache, &unlink("f"), &done);
    assert!(cache.attr(7).is_some());
    assert_eq!(cache.open(7), None);
}

#[test]
fn a_repeated_request_may_have_been_executed_before_others() {
    let cache = Cache::default();
    learn(&cache, &lookup("f"), &sole(7, 3, Vec::new()));
    cache.learn(&unlink("f"), &sole(0, 5, Vec::new()), Instant::now(), true);
    assert_eq!(found(&cache, "f"), None);
    learn(&cache, &lookup("f"), &sole(7, 4, Vec::new()));
    assert_eq!(found(&cache, "f"), None);
    learn(&cache, &lookup("f"), &sole(8, 5, Vec::new()));
    assert_eq!(found(&cache, "f"), Some(8));
}

#[test]
fn a_full_cache_forgets_without_learning_old_things() {
    let cache = Cache::default();
    learn(&cache, &create("f", Kind::File), &sole(7, 9, vec![DIR, 7]));
    for ino in 0..2 * MAX_INODES as u64 {
        learn(
            &cache,
            &Op::GetAttr(GetAttr { ino: 100 + ino }),
            &sole(100 + ino, 9, Vec::new()),
        );
    }
    assert!(cache.state().inodes.len() <= MAX_INODES);
    learn(&cache, &lookup("f"), &missing(8));
    assert_eq!(found(&cache, "f"), None);
}

#[test]
fn what_a_failed_change_met_is_asked_for() {
    let cache = Cache::default();
    let list = Op::ReadDir(ReadDir {
        ino: DIR,
        ..ReadDir::default()
    });
    learn(&cache, &list, &listing(&[("f", 7)], 3, true));
    assert_eq!((found(&cache, "f"), found(&cache, "g")), (Some(7), Some(0)));
    // "f" is gone and "g" is there, by changes of this client whose replies are on their way.
    cache.failed(&create("g", Kind::File));
    cache.failed(&unlink("f"));
    assert_eq!((found(&cache, "f"), found(&cache, "g")), (None, None));
    assert_eq!(found(&cache, "h"), Some(0));
    learn(&cache, &create("g", Kind::File), &sole(8, 4, vec![DIR, 8]));
    learn(&cache, &lookup("f"), &missing(5));
    assert_eq!((found(&cache, "f"), found(&cache, "g")), (Some(0), Some(8)));
}
