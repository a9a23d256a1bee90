//! What /proc tells of the thread that waits for a reply.
//!
//! The FUSE server in use passes on neither interrupts nor whether a lock request came from
//! flock(2) or fcntl(2). Both are read here where the thread is visible: the daemon has to be in
//! the machine's pid namespace. Where it is not, a waiter can only be killed after the lock is
//! free, and flock and fcntl locks exclude each other, as on NFS.

use lazarette_client::LockKind;
use std::time::Duration;

/// How often a waiting thread is looked at.
const INTERVAL: Duration = Duration::from_millis(50);

/// Which of the two locking system calls a thread is in; None if that cannot be seen.
pub(crate) async fn lock_kind(thread: u32) -> Option<LockKind> {
    #[cfg(target_arch = "x86_64")]
    const CALLS: (u32, u32) = (73, 72);
    #[cfg(not(target_arch = "x86_64"))]
    const CALLS: (u32, u32) = (32, 25);
    /// The request may be here before the thread has gone to sleep; then there is nothing to see.
    const ATTEMPTS: u32 = 100;
    for _ in 0..ATTEMPTS {
        let line = read(thread, "syscall")?;
        let first = line.split_ascii_whitespace().next()?;
        if first == "running" {
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        }
        return match first.parse::<u32>().ok()? {
            call if call == CALLS.0 => Some(LockKind::Flock),
            call if call == CALLS.1 => Some(LockKind::Posix),
            _ => None,
        };
    }
    None
}

/// Resolves when a signal that the thread does not block or ignore waits for it.
pub(crate) async fn interrupted(thread: u32) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        if read(thread, "status").is_some_and(|status| has_signal(&status)) {
            return;
        }
    }
}

fn read(thread: u32, file: &str) -> Option<String> {
    if thread == 0 {
        return None;
    }
    std::fs::read_to_string(format!("/proc/{thread}/{file}")).ok()
}

fn has_signal(status: &str) -> bool {
    let mask = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|value| u64::from_str_radix(value.trim(), 16).ok())
            .unwrap_or(0)
    };
    let pending = mask("SigPnd") | mask("ShdPnd");
    pending & !mask("SigBlk") & !mask("SigIgn") != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(pending: u64, shared: u64, blocked: u64, ignored: u64) -> String {
        format!(
            "Name:\tx\nSigPnd:\t{pending:016x}\nShdPnd:\t{shared:016x}\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\n"
        )
    }

    #[test]
    fn only_signals_that_are_delivered_interrupt() {
        assert!(!has_signal(&status(0, 0, 0, 0)));
        assert!(has_signal(&status(0x100, 0, 0, 0)));
        assert!(has_signal(&status(0, 0x4000, 0, 0)));
        assert!(!has_signal(&status(0x100, 0, 0x100, 0)));
        assert!(!has_signal(&status(0, 0x100, 0, 0x100)));
        assert!(!has_signal("nonsense"));
    }
}
