//! Deadlines on the clock of whoever carries a request out.
//!
//! A change that a stopped process or the network has held back must not be made after its sender has lost the
//! right to it (the lease of its session, of its node), nor after the sender has given it up and sent something
//! else. The sender cannot know when it arrives, so it says until when it is good. Two machines' clocks show
//! different times but run at nearly the same speed: if the receiver's showed `then` before the sender's showed
//! `seen`, it shows `then + (until - seen)` before the sender's shows `until`.

use crate::chunk::chunk_client::ChunkClient;
use crate::chunk::{ClockRequest, Deadline};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tonic::Status;
use tonic::transport::Channel;

/// Milliseconds after which a clock is read again, so that a difference in speed does not add up.
const FRESH_MS: u64 = 30_000;
/// Milliseconds that two clocks may differ in that time: ten times what NTP corrects.
const MARGIN_MS: u64 = 150;

/// What shows the time instead of the machine's clock.
static SIMULATED: OnceLock<fn() -> Duration> = OnceLock::new();

/// From now on [`boot`] of this process shows what `clock` does: for a simulation, in which many machines
/// share a process. The first call counts.
pub fn simulate(clock: fn() -> Duration) {
    let _ = SIMULATED.set(clock);
}

/// Time since this machine's boot, suspended time included.
pub fn boot() -> Duration {
    if let Some(clock) = SIMULATED.get() {
        return clock();
    }
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// [`boot`] in milliseconds.
pub fn boot_ms() -> u64 {
    boot().as_millis() as u64
}

/// What a peer's clock showed.
#[derive(Clone, Copy)]
struct Reading {
    clock: u64,
    then: u64,
    /// On our clock, later.
    seen: u64,
}

impl Reading {
    fn deadline(self, until: u64) -> Deadline {
        let left = until.saturating_sub(self.seen + MARGIN_MS);
        Deadline {
            clock: self.clock,
            at_ms: self.then + left,
        }
    }
}

/// The clocks of the processes that requests are sent to.
#[derive(Default)]
pub struct Clocks {
    known: Mutex<HashMap<String, Reading>>,
}

impl Clocks {
    fn known(&self) -> MutexGuard<'_, HashMap<String, Reading>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The deadline for a request to `peer`, whom `client` reaches, that is not to be begun when our
    /// [`boot_ms`] is `until` or more. Asks the peer if its clock has not been read lately.
    ///
    /// # Errors
    /// The peer's answer to that.
    pub async fn deadline(
        &self,
        peer: &str,
        client: &mut ChunkClient<Channel>,
        until: u64,
    ) -> Result<Deadline, Status> {
        let known = self.known().get(peer).copied();
        if let Some(reading) = known
            && boot_ms() < reading.seen + FRESH_MS
        {
            return Ok(reading.deadline(until));
        }
        let answer = client.clock(ClockRequest {}).await?.into_inner();
        let reading = Reading {
            clock: answer.clock,
            then: answer.now_ms,
            seen: boot_ms(),
        };
        self.known().insert(peer.to_owned(), reading);
        Ok(reading.deadline(until))
    }

    /// The peer has found a request too late: it may be another process by now.
    pub fn forget(&self, peer: &str) {
        self.known().remove(peer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_never_later_than_the_sender_means() {
        // The receiver is 900 s behind; its answer took 20 s to arrive.
        let behind = 900_000;
        let asked_at = 1_000_000;
        let reading = Reading {
            clock: 7,
            then: asked_at - behind,
            seen: asked_at + 20_000,
        };
        let until = asked_at + 26_000;
        let deadline = reading.deadline(until);
        assert_eq!(deadline.clock, 7);
        assert!(deadline.at_ms + behind < until);
        assert_eq!(deadline.at_ms, reading.then + 6_000 - MARGIN_MS);
        // What is over already stays so.
        assert_eq!(reading.deadline(asked_at).at_ms, reading.then);
    }
}
