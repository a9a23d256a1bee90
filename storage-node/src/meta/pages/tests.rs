//! What is recovered from pages and journal is what was committed, wherever it was interrupted.

use super::*;
use crate::meta::journal::{self, Fence};
use crate::meta::namespace::{Limits, Namespace, Work};
use lazarette_proto::meta::{
    Create, Kind, Lock, LockKind, LockMode, LockRange, Rename, Request, RmDir, SetAttr, SetXattr, Unlink, request::Op,
};
use lazarette_types::{InodeId, SessionId};
use proptest::prelude::*;

const SMALL: Sizes = Sizes {
    max: 900,
    target: 600,
    min: 200,
    batch: 2000,
};
const LIMITS: Limits = Limits {
    size: 1 << 40,
    chunk_size: 1 << 20,
};

/// What the metadata store holds.
#[derive(Clone, Default)]
struct Stored {
    pages: BTreeMap<u64, Vec<u8>>,
    journal: BTreeMap<u64, Vec<u8>>,
    checkpoint: u64,
}

impl Stored {
    fn write(&mut self, batch: PageBatch) {
        for (id, image) in batch.writes {
            match image {
                Some(image) => self.pages.insert(id, image),
                None => self.pages.remove(&id),
            };
        }
    }

    fn recover(&self) -> (State, PageMap) {
        let mut state = State::new(0);
        let stored = self.pages.iter().map(|(id, image)| (*id, image.clone()));
        let mut map = PageMap::load(stored.collect(), |key, row| state.load_page_row(key, row)).unwrap();
        map.set_sizes(SMALL);
        let mut last = self.checkpoint;
        for (lsn, bytes) in self.journal.range(self.checkpoint + 1..) {
            assert_eq!(*lsn, last + 1);
            last = *lsn;
            for (key, row) in journal::decode(bytes).unwrap().changes {
                state.redo(key, row);
            }
        }
        state.set_open_record(last + 1);
        (state, map)
    }
}

/// A pass of folding; `ready` are images that wait for the record that they show.
struct Pass {
    goal: u64,
    rows: BTreeSet<Key>,
    ready: Option<PageBatch>,
}

/// An owner that commits and folds when it is told to.
struct Owner {
    ns: Namespace,
    map: PageMap,
    stored: Stored,
    committed: BTreeMap<Key, Row>,
    pass: Option<Pass>,
    op: u64,
}

impl Owner {
    fn new(stored: Stored, op: u64) -> Self {
        let (state, map) = stored.recover();
        Self {
            committed: state.rows().clone(),
            ns: Namespace::new(state, LIMITS, 1),
            map,
            stored,
            pass: None,
            op,
        }
    }

    fn commit(&mut self) {
        if self.ns.state().changed_bytes() == 0 {
            return;
        }
        let fence = Fence {
            key: vec![],
            create_revision: 1,
            epoch: 1,
        };
        let (lsn, keys) = self.ns.state_mut().cut();
        let bytes = journal::encode(&fence, lsn, self.ns.state(), &keys);
        self.ns.state_mut().committed(lsn, &keys);
        self.stored.journal.insert(lsn, bytes);
        self.committed = self.ns.state().rows().clone();
    }

    /// Makes a batch of images, perhaps of a record that is still open.
    fn image(&mut self) {
        if self.pass.is_none() {
            self.commit();
            self.pass = Some(Pass {
                goal: self.ns.state().open_record() - 1,
                rows: self.ns.state_mut().take_dirty(),
                ready: None,
            });
        }
        if let Some(pass) = &mut self.pass
            && pass.ready.is_none()
        {
            let newest = self.ns.newest_record();
            pass.ready = Some(self.map.fold(self.ns.state(), &mut pass.rows, newest));
        }
    }

    /// Writes a batch of pages, and with the last one of a pass the checkpoint.
    fn fold(&mut self) {
        self.image();
        self.commit();
        let Some(mut pass) = self.pass.take() else { return };
        self.stored.write(pass.ready.take().unwrap_or_default());
        if pass.rows.is_empty() {
            self.stored.checkpoint = pass.goal;
            self.stored.journal.retain(|lsn, _| *lsn > pass.goal);
        } else {
            self.pass = Some(pass);
        }
    }

    fn crash(self) -> Self {
        let Self {
            stored, committed, op, ..
        } = self;
        let next = Self::new(stored, op);
        assert_eq!(next.committed, committed);
        next
    }

    fn execute(&mut self, session: u64, op: Op) {
        let _ = self.ns.open_session(SessionId(session), "s");
        self.op += 1;
        let request = Request {
            volume: 1,
            session,
            op_id: self.op,
            ack_below: if self.op.is_multiple_of(3) { self.op - 2 } else { 0 },
            handles: None,
            op: Some(op),
        };
        self.ns.execute(&request, self.op as i64);
        for work in self.ns.take_work() {
            if let (Work::Remove(ino), true) = (work, self.op.is_multiple_of(2)) {
                self.ns.removed(ino);
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Create(u8, bool, u8),
    Remove(u8, u8),
    Rename(u8, u8, u8, u8),
    Truncate(u8, u32),
    Xattr(u8, u16),
    Lock(u8, u8, u8),
    EndSession(u8),
    Commit,
    Image,
    Fold,
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0u8..6, any::<bool>(), 0u8..40).prop_map(|(dir, is_dir, name)| Step::Create(dir, is_dir, name)),
        4 => (0u8..6, 0u8..40).prop_map(|(dir, name)| Step::Remove(dir, name)),
        3 => (0u8..6, 0u8..40, 0u8..6, 0u8..40).prop_map(|(a, b, c, d)| Step::Rename(a, b, c, d)),
        2 => (0u8..60, any::<u32>()).prop_map(|(ino, size)| Step::Truncate(ino, size)),
        2 => (0u8..60, 0u16..1200).prop_map(|(ino, length)| Step::Xattr(ino, length)),
        2 => (0u8..60, 0u8..3, 0u8..3).prop_map(|(ino, owner, mode)| Step::Lock(ino, owner, mode)),
        1 => (0u8..3).prop_map(Step::EndSession),
        4 => Just(Step::Commit),
        4 => Just(Step::Image),
        4 => Just(Step::Fold),
        1 => Just(Step::Crash),
    ]
}

fn name(number: u8) -> bytes::Bytes {
    format!("name-{number}").into_bytes().into()
}

fn play(mut owner: Owner, step: Step) -> Owner {
    match step {
        Step::Create(parent, is_dir, number) => owner.execute(
            1 + u64::from(number % 3),
            Op::Create(Create {
                parent: parent.into(),
                name: name(number),
                kind: if is_dir { Kind::Directory } else { Kind::File }.into(),
                mode: 0o755,
                exclusive: true,
                ..Create::default()
            }),
        ),
        Step::Remove(parent, number) => {
            let (parent, name) = (parent.into(), name(number));
            let op = Unlink {
                parent,
                name: name.clone(),
            };
            owner.execute(1, Op::Unlink(op));
            owner.execute(2, Op::RmDir(RmDir { parent, name }));
        }
        Step::Rename(parent, number, new_parent, new_number) => owner.execute(
            1,
            Op::Rename(Rename {
                parent: parent.into(),
                name: name(number),
                new_parent: new_parent.into(),
                new_name: name(new_number),
                no_replace: false,
                exchange: number % 4 == 0,
            }),
        ),
        Step::Truncate(ino, size) => owner.execute(
            1,
            Op::SetAttr(SetAttr {
                ino: ino.into(),
                size: Some(size.into()),
                ..SetAttr::default()
            }),
        ),
        Step::Xattr(ino, length) => owner.execute(
            1,
            Op::SetXattr(SetXattr {
                ino: ino.into(),
                name: format!("user.{}", length % 3).into(),
                value: vec![7; length.into()].into(),
                ..SetXattr::default()
            }),
        ),
        Step::Lock(ino, number, mode) => {
            let range = LockRange {
                kind: LockKind::Flock.into(),
                mode: [LockMode::Shared, LockMode::Exclusive, LockMode::Unlock][usize::from(mode)].into(),
                owner: number.into(),
                ..LockRange::default()
            };
            let op = Lock {
                ino: ino.into(),
                range: Some(range),
                wait_ms: 0,
            };
            owner.execute(1 + u64::from(number), Op::Lock(op));
        }
        Step::EndSession(number) => owner.ns.end_session(SessionId(1 + u64::from(number))),
        Step::Commit => owner.commit(),
        Step::Image => owner.image(),
        Step::Fold => owner.fold(),
        Step::Crash => return owner.crash(),
    }
    owner
}

/// The indexes that follow from the rows are those that a fresh load makes.
fn check_indexes(state: &State) {
    let mut fresh = State::new(1);
    for (key, row) in state.rows() {
        fresh.load_page_row(key.clone(), row.clone());
    }
    assert_eq!(fresh.usage(), state.usage());
    assert_eq!(fresh.orphans(), state.orphans());
    for (key, row) in state.rows() {
        if let (Key::Inode(dir, _), Row::Dentry(dentry)) = (key, row) {
            assert_eq!(state.entry(*dir, &dentry.name), fresh.entry(*dir, &dentry.name));
            assert!(state.entry(*dir, &dentry.name).is_some());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn recovery_brings_back_what_was_committed(steps in proptest::collection::vec(step(), 0..150)) {
        let mut owner = Owner::new(Stored::default(), 10);
        for step in steps {
            owner = play(owner, step);
        }
        check_indexes(owner.ns.state());
        owner.commit();
        let owner = owner.crash();
        check_indexes(owner.ns.state());
    }
}

#[test]
fn pages_are_split_and_joined() {
    let mut owner = Owner::new(Stored::default(), 10);
    let create = |number| Step::Create(1, false, number);
    for number in 0..200 {
        owner = play(owner, create(number));
    }
    owner.fold();
    while owner.pass.is_some() {
        owner.fold();
    }
    let many = owner.map.len();
    assert!(many > 5, "{many} pages");
    assert_eq!(owner.map.len(), owner.stored.pages.len());
    assert!(owner.stored.pages.values().all(|image| image.len() < SMALL.max + 100));
    for number in 0..200 {
        owner = play(owner, Step::Remove(1, number));
    }
    for work in 0..500 {
        owner.ns.removed(InodeId(work));
    }
    owner.ns.end_session(SessionId(1));
    owner.ns.end_session(SessionId(2));
    owner.ns.end_session(SessionId(3));
    owner.fold();
    while owner.pass.is_some() {
        owner.fold();
    }
    let few = owner.map.len();
    assert!(few <= 3, "{few} pages");
    assert_eq!(few, owner.stored.pages.len());
    assert!(owner.stored.journal.is_empty());
    owner.crash();
}

#[test]
fn missing_and_damaged_pages_are_noticed() {
    let mut owner = Owner::new(Stored::default(), 10);
    for number in 0..100 {
        owner = play(owner, Step::Create(1, false, number));
    }
    owner.fold();
    while owner.pass.is_some() {
        owner.fold();
    }
    let load = |pages: &BTreeMap<u64, Vec<u8>>| PageMap::load(pages.clone().into_iter().collect(), |_, _| {});
    assert!(load(&owner.stored.pages).is_ok());
    for id in owner.stored.pages.keys() {
        let mut pages = owner.stored.pages.clone();
        pages.remove(id);
        assert!(matches!(load(&pages), Err(PageError::Gap(_))), "without page {id}");
        let mut pages = owner.stored.pages.clone();
        pages.get_mut(id).unwrap()[9] ^= 4;
        assert!(
            matches!(load(&pages), Err(PageError::Unreadable(..))),
            "page {id} damaged"
        );
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_page_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode(&bytes);
        let _ = decode(&seal_envelope(FORMAT, &bytes));
        let _ = journal::decode(&seal_envelope(1, &bytes));
    }
}
