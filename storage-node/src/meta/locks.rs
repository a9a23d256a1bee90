//! What it means to hold a lock: conflicts, and splitting and merging of ranges. Pure functions
//! over the list of locks that are held on one inode.

use super::rows::{Held, LockClass};

/// The last byte of a lock without end.
pub const END_OF_FILE: u64 = i64::MAX as u64;

/// Whether two locks belong to the same holder.
fn same_holder(a: &Held, b: &Held) -> bool {
    // Every turn to append is exclusive, also within a session.
    a.class == b.class && a.class != LockClass::Append && a.session == b.session && a.owner == b.owner
}

fn overlap(a: &Held, b: &Held) -> bool {
    a.start <= b.end && b.start <= a.end
}

/// Whether `wanted` cannot be granted while `held` is there.
pub fn conflicts(held: &Held, wanted: &Held) -> bool {
    held.class == wanted.class
        && (held.exclusive || wanted.exclusive)
        && overlap(held, wanted)
        && !same_holder(held, wanted)
}

/// The first lock that stands in the way of `wanted`.
pub fn conflict<'a>(table: &'a [Held], wanted: &Held) -> Option<&'a Held> {
    table.iter().find(|held| conflicts(held, wanted))
}

/// Whether the holder of `wanted` has any lock of its class that overlaps it.
pub fn holds(table: &[Held], wanted: &Held) -> bool {
    table
        .iter()
        .any(|held| same_holder(held, wanted) && overlap(held, wanted))
}

/// The table after the holder of `range` gave up that range.
pub fn release(table: &[Held], range: &Held) -> Vec<Held> {
    let mut left = Vec::with_capacity(table.len() + 1);
    for held in table {
        if !same_holder(held, range) || !overlap(held, range) {
            left.push(held.clone());
            continue;
        }
        if held.start < range.start {
            let end = range.start - 1;
            left.push(Held { end, ..held.clone() });
        }
        if held.end > range.end {
            let start = range.end + 1;
            left.push(Held { start, ..held.clone() });
        }
    }
    left
}

/// The table after `granted`, which conflicts with nothing, was granted. It replaces what its
/// holder had in that range and joins what the holder has beside it in the same mode.
pub fn grant(table: &[Held], granted: &Held) -> Vec<Held> {
    let mut merged = granted.clone();
    let mut table = release(table, granted);
    table.retain(|held| {
        let joins = same_holder(held, &merged)
            && held.exclusive == merged.exclusive
            && (held.end.checked_add(1) == Some(merged.start) || merged.end.checked_add(1) == Some(held.start));
        if joins {
            merged.start = merged.start.min(held.start);
            merged.end = merged.end.max(held.end);
        }
        !joins
    });
    table.push(merged);
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use lazarette_types::SessionId;
    use proptest::prelude::*;

    fn posix(owner: u64, exclusive: bool, start: u64, end: u64) -> Held {
        Held {
            class: LockClass::Posix,
            exclusive,
            session: SessionId(1),
            owner,
            start,
            end,
            pid: 1,
        }
    }

    #[test]
    fn releasing_the_middle_splits() {
        let table = grant(&[], &posix(1, true, 0, 99));
        let table = release(&table, &posix(1, true, 40, 59));
        let ranges: Vec<_> = table.iter().map(|held| (held.start, held.end)).collect();
        assert_eq!(ranges, [(0, 39), (60, 99)]);
    }

    #[test]
    fn neighbours_of_one_mode_merge_and_others_do_not() {
        let table = grant(&[], &posix(1, true, 0, 9));
        let table = grant(&table, &posix(1, true, 20, 29));
        let table = grant(&table, &posix(1, true, 10, 19));
        assert_eq!(table, [posix(1, true, 0, 29)]);
        let table = grant(&table, &posix(1, false, 10, 19));
        assert_eq!(table.len(), 3);
    }

    #[test]
    fn shared_locks_coexist_and_classes_ignore_each_other() {
        let shared = posix(1, false, 0, 9);
        assert!(!conflicts(&shared, &posix(2, false, 0, 9)));
        assert!(conflicts(&shared, &posix(2, true, 9, 9)));
        assert!(!conflicts(&shared, &posix(2, true, 10, 10)));
        assert!(!conflicts(&shared, &posix(1, true, 0, 9)));
        let flock = Held {
            class: LockClass::Flock,
            ..posix(2, true, 0, END_OF_FILE)
        };
        assert!(!conflicts(&shared, &flock));
    }

    #[test]
    fn two_turns_to_append_conflict_within_a_session() {
        let turn = Held {
            class: LockClass::Append,
            ..posix(0, true, 0, END_OF_FILE)
        };
        assert!(conflicts(&turn, &turn));
    }

    proptest! {
        /// The table against a byte-by-byte model of who holds what.
        #[test]
        fn ranges_match_a_model(steps in proptest::collection::vec((1u64..3, 0u8..3, 0u64..16, 0u64..16), 0..40)) {
            let mut table = Vec::new();
            let mut model = [[None::<bool>; 16]; 3];
            for (owner, mode, a, b) in steps {
                let (start, end) = (a.min(b), a.max(b));
                let range = posix(owner, mode == 1, start, end);
                if mode == 2 {
                    table = release(&table, &range);
                } else if conflict(&table, &range).is_none() {
                    table = grant(&table, &range);
                } else {
                    continue;
                }
                for byte in start..=end {
                    model[owner as usize][byte as usize] = (mode != 2).then_some(mode == 1);
                }
            }
            for owner in 1..3 {
                for byte in 0..16 {
                    let held: Vec<_> = table
                        .iter()
                        .filter(|held| held.owner == owner && held.start <= byte && byte <= held.end)
                        .map(|held| held.exclusive)
                        .collect();
                    prop_assert_eq!(held, model[owner as usize][byte as usize].into_iter().collect::<Vec<_>>());
                }
            }
        }
    }
}
