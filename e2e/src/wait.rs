//! Waiting for a state instead of sleeping.

use std::fmt::Display;
use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// How long to wait for a state, how often to look, and where to look when it never comes.
#[derive(Debug, Clone)]
pub struct Deadline {
    at: Instant,
    limit: Duration,
    interval: Duration,
    logs: Option<PathBuf>,
}

impl Deadline {
    /// A deadline that ends after `limit`, looking every 200 ms.
    pub fn after(limit: Duration) -> Self {
        Self {
            at: Instant::now() + limit,
            limit,
            interval: Duration::from_millis(200),
            logs: None,
        }
    }

    /// A deadline that ends after so many seconds.
    pub fn secs(secs: u64) -> Self {
        Self::after(Duration::from_secs(secs))
    }

    /// Names the folder or file that explains a time-out.
    #[must_use]
    pub fn logs(mut self, logs: impl Into<PathBuf>) -> Self {
        self.logs = Some(logs.into());
        self
    }

    /// Looks every `interval`.
    #[must_use]
    pub fn every(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }
}

/// Polls `probe` until it returns a value.
///
/// `Ok(None)` and `Err` both mean "not yet": a component that is still starting answers with
/// errors. The last one is part of the time-out's message, with the place of the logs.
pub async fn wait_for<T, F, P>(deadline: Deadline, what: impl Display, mut probe: P) -> Result<T>
where
    P: FnMut() -> F,
    F: Future<Output = Result<Option<T>>>,
{
    let mut last = "nothing".to_owned();
    loop {
        let left = deadline.at.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left.max(Duration::from_secs(1)), probe()).await {
            Ok(Ok(Some(value))) => return Ok(value),
            Ok(Ok(None)) => "not yet there".clone_into(&mut last),
            Ok(Err(error)) => last = format!("{error:#}"),
            Err(_) => "the probe itself hung".clone_into(&mut last),
        }
        if Instant::now() >= deadline.at {
            let logs = deadline
                .logs
                .as_ref()
                .map(|p| format!("; logs: {}", p.display()))
                .unwrap_or_default();
            return Err(anyhow!(
                "gave up after {:?} waiting for {what}; last seen: {last}{logs}",
                deadline.limit
            ));
        }
        tokio::time::sleep(deadline.interval).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_time_out_tells_what_was_last_seen_and_where_the_logs_are() {
        let deadline = Deadline::after(Duration::from_millis(30))
            .every(Duration::from_millis(5))
            .logs("/x/logs");
        let error = wait_for(deadline, "the moon", || async {
            Err::<Option<()>, _>(anyhow!("cloudy"))
        })
        .await
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("the moon") && error.contains("cloudy") && error.contains("/x/logs"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn the_first_value_ends_the_wait() {
        let mut left = 3;
        let value = wait_for(Deadline::secs(5).every(Duration::from_millis(1)), "zero", || {
            left -= 1;
            let done = (left == 0).then_some(42);
            async move { Ok(done) }
        })
        .await
        .unwrap();
        assert_eq!(value, 42);
    }
}
