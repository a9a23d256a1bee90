use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use tokio::sync::Notify;

/// Ids from the oldest outstanding one to the newest: the owner keeps the results of all of them,
/// and refuses to keep more than about twice this.
const WINDOW: u64 = 1 << 15;

/// Hands out operation ids and knows which of them may still be repeated.
#[derive(Debug)]
pub(crate) struct Ops {
    state: Mutex<State>,
    /// The oldest outstanding id has ended.
    moved: Notify,
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
            moved: Notify::new(),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new id. Waits while an operation that was begun long ago is still not done.
    pub(crate) async fn begin(&self) -> OpId<'_> {
        loop {
            let moved = self.moved.notified();
            tokio::pin!(moved);
            moved.as_mut().enable();
            if let Some(id) = self.try_begin() {
                return id;
            }
            moved.await;
        }
    }

    fn try_begin(&self) -> Option<OpId<'_>> {
        let mut state = self.state();
        let id = state.next;
        if id - state.outstanding.first().copied().unwrap_or(id) >= WINDOW {
            return None;
        }
        state.next += 1;
        state.outstanding.insert(id);
        Some(OpId { ops: self, id })
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
        let oldest = {
            let mut state = self.ops.state();
            let oldest = state.outstanding.first() == Some(&self.id);
            state.outstanding.remove(&self.id);
            oldest
        };
        if oldest {
            self.ops.moved.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waits_for_the_oldest_when_far_ahead() {
        let ops = Ops::new();
        let oldest = ops.begin().await;
        while let Some(id) = ops.try_begin() {
            drop(id);
        }
        assert_eq!(ops.state().next, 1 + WINDOW);
        let next = ops.begin();
        tokio::pin!(next);
        tokio::select! {
            biased;
            _ = &mut next => panic!("the oldest is outstanding"),
            () = std::future::ready(()) => {}
        }
        drop(oldest);
        assert_eq!(next.await.get(), 1 + WINDOW);
    }

    #[tokio::test]
    async fn acknowledges_below_the_oldest_outstanding() {
        let ops = Ops::new();
        let one = ops.begin().await;
        let two = ops.begin().await;
        assert_eq!((one.get(), two.get()), (1, 2));
        assert_eq!(ops.ack_below(), 1);
        drop(one);
        assert_eq!(ops.ack_below(), 2);
        let three = ops.begin().await;
        drop(two);
        assert_eq!(ops.ack_below(), 3);
        drop(three);
        assert_eq!(ops.ack_below(), 4);
    }
}
