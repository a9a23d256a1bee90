use std::time::Duration;

const FIRST: Duration = Duration::from_millis(10);
const LAST: Duration = Duration::from_millis(200);

/// Exponential delays with jitter between attempts.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { next: FIRST }
    }

    /// The delay before the next attempt: half of it fixed, half at random, so that many clients
    /// that lost the same server do not come back at one instant.
    pub(crate) fn delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (delay * 2).min(LAST);
        delay / 2 + delay.mul_f64(rand::random::<f64>() / 2.0)
    }

    pub(crate) async fn wait(&mut self) {
        tokio::time::sleep(self.delay()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_bound() {
        let mut backoff = Backoff::new();
        let first = backoff.delay();
        assert!(first >= FIRST / 2 && first <= FIRST);
        for _ in 0..20 {
            backoff.delay();
        }
        let last = backoff.delay();
        assert!(last >= LAST / 2 && last <= LAST);
    }
}
