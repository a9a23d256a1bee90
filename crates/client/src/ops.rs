use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// Hands out operation ids and knows which of them may still be repeated.
#[derive(Debug)]
pub(crate) struct Ops {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    next: u64,
    outstanding: BTreeSet<u64>,
}

/// An id in use. Dropping it (also by cancelling the operation) promises not to repeat it.
#[derive(Debug)]
pub(crate) struct OpId<'a> {
    ops: &'a Ops,
    id: u64,
}

impl Ops {
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                next: 1,
                outstanding: BTreeSet::new(),
            }),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begin(&self) -> OpId<'_> {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        state.outstanding.insert(id);
        OpId { ops: self, id }
    }

    /// No id below this will be sent (again).
    pub(crate) fn ack_below(&self) -> u64 {
        let state = self.state();
        state.outstanding.first().copied().unwrap_or(state.next)
    }
}

impl OpId<'_> {
    pub(crate) fn get(&self) -> u64 {
        self.id
    }
}

impl Drop for OpId<'_> {
    fn drop(&mut self) {
        self.ops.state().outstanding.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledges_below_the_oldest_outstanding() {
        let ops = Ops::new();
        let one = ops.begin();
        let two = ops.begin();
        assert_eq!((one.get(), two.get()), (1, 2));
        assert_eq!(ops.ack_below(), 1);
        drop(one);
        assert_eq!(ops.ack_below(), 2);
        let three = ops.begin();
        drop(two);
        assert_eq!(ops.ack_below(), 3);
        drop(three);
        assert_eq!(ops.ack_below(), 4);
    }
}
