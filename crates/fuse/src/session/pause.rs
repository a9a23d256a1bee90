//! Pausing, resuming, leaving.

use super::shared::{Phase, Shared};
use super::{End, Session, SessionError, blocking, io_error};
use crate::buffer::lock;
use crate::filesystem::Filesystem;
use crate::{notify, wake};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// What a pause left over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Requests that were dropped without an answer; whoever serves next has to have them sent
    /// again.
    pub unanswered: bool,
}

impl<F: Filesystem> Session<F> {
    fn change(&self, from: Phase, to: Phase) -> Result<(), SessionError> {
        let mut phase = lock(&self.core.shared.phase);
        match *phase {
            Phase::Ended => Err(SessionError::Ended),
            now if now != from => Err(SessionError::Phase(match now {
                Phase::Serving => "serving",
                Phase::Paused => "paused",
                _ => "being paused",
            })),
            _ => {
                *phase = to;
                Ok(())
            }
        }
    }

    /// Stops reading requests and waits for those under way. After `patience` the ones that are not
    /// beyond their point of no return (waits for locks, mostly) are dropped without an answer; the
    /// others are waited for. The kernel keeps new requests until somebody serves again.
    ///
    /// If the future is dropped the session stays as it is then: call again or [`Session::resume`].
    pub async fn pause(&self, patience: Duration) -> Result<Drained, SessionError> {
        let shared = &self.core.shared;
        self.change(Phase::Serving, Phase::Changing)?;
        shared.set_stopping(true);
        let guard = Changing { shared };
        self.stop_readers().await;
        shared.draining.store(true, Ordering::SeqCst);
        if tokio::time::timeout(patience, self.drained()).await.is_err() {
            shared.abandon_all();
            self.drained().await;
        }
        drop(guard);
        if shared.end.borrow().is_some() {
            return Err(SessionError::Ended);
        }
        Ok(Drained {
            unanswered: shared.owes_resend.load(Ordering::SeqCst),
        })
    }

    async fn drained(&self) {
        let shared = &self.core.shared;
        loop {
            let notified = shared.drained.notified();
            if shared.requests.load(Ordering::SeqCst) == 0 {
                return;
            }
            notified.await;
        }
    }

    async fn stop_readers(&self) {
        let shared = &self.core.shared;
        let mut reading = shared.reading.subscribe();
        let mut patience = Duration::from_millis(1);
        while *reading.borrow_and_update() > 0 {
            // A signal may come just before the read that it is to end: send them until all are out.
            for reader in lock(&shared.threads).iter() {
                if reader.blocked.load(Ordering::SeqCst) {
                    wake::wake(&reader.thread);
                }
            }
            let _ = tokio::time::timeout(patience, reading.wait_for(|count| *count == 0)).await;
            patience = (patience * 2).min(Duration::from_millis(20));
        }
        lock(&shared.threads).clear();
    }

    /// Serves on after a pause. What was left unanswered comes again.
    pub async fn resume(&self) -> Result<(), SessionError> {
        let shared = &self.core.shared;
        self.change(Phase::Paused, Phase::Changing)?;
        let guard = Changing { shared };
        // None is left but after a pause that was given up half-way.
        self.stop_readers().await;
        if shared.owes_resend.swap(false, Ordering::SeqCst) {
            let channel = shared.channels[0].clone();
            let resent = blocking(move || Ok(notify::resend(&channel))).await?;
            if let Err(error) = resent {
                shared.note_abandoned();
                return Err(io_error("cannot have requests sent again")(error.into()));
            }
        }
        shared.draining.store(false, Ordering::SeqCst);
        shared.set_stopping(false);
        std::mem::forget(guard);
        {
            let mut phase = lock(&shared.phase);
            if *phase == Phase::Ended {
                return Err(SessionError::Ended);
            }
            *phase = Phase::Serving;
        }
        self.start_readers()
    }

    /// Ends a paused session without unmounting: another process has the connection.
    pub fn leave(&self) -> Result<(), SessionError> {
        self.change(Phase::Paused, Phase::Ended)?;
        self.core.shared.finish(End::Left);
        Ok(())
    }
}

/// Whatever happens, a session that is changing becomes paused.
struct Changing<'a> {
    shared: &'a Shared,
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        let mut phase = lock(&self.shared.phase);
        if *phase == Phase::Changing {
            *phase = Phase::Paused;
        }
    }
}
