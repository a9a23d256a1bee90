//! At most one operation per volume at a time, as the CSI specification advises: a second one is
//! told to come back (ABORTED) instead of queueing behind a stuck one.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use tonic::Status;

/// The volumes (or names of volumes to be) with an operation under way.
#[derive(Clone, Debug, Default)]
pub struct InFlight {
    keys: Arc<Mutex<HashSet<String>>>,
}

/// Holds a key until the last clone is dropped. Move a clone into blocking work, so that the key
/// stays taken while a system call hangs even if the caller has gone.
#[derive(Clone, Debug)]
pub struct Permit(#[expect(dead_code, reason = "held for its Drop")] Arc<Held>);

#[derive(Debug)]
struct Held {
    keys: Arc<Mutex<HashSet<String>>>,
    key: String,
}

impl InFlight {
    /// Takes a key, or fails with ABORTED.
    pub fn enter(&self, key: &str) -> Result<Permit, Status> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if !keys.insert(key.to_owned()) {
            return Err(Status::aborted(format!(
                "another operation on {key:?} is under way; try again later"
            )));
        }
        Ok(Permit(Arc::new(Held {
            keys: Arc::clone(&self.keys),
            key: key.to_owned(),
        })))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.keys
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    #[test]
    fn one_at_a_time_per_key() {
        let in_flight = InFlight::default();
        let permit = in_flight.enter("a").unwrap();
        assert_eq!(in_flight.enter("a").unwrap_err().code(), Code::Aborted);
        let _other = in_flight.enter("b").unwrap();
        let clone = permit.clone();
        drop(permit);
        assert!(in_flight.enter("a").is_err(), "a clone still holds the key");
        drop(clone);
        assert!(in_flight.enter("a").is_ok());
    }
}
