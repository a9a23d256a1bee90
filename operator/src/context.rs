//! What every reconciliation needs.

use crate::cluster::Defaults;
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::ObjectRef;
use lazarette_api::{StorageCluster, storage_endpoint};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// First wait after a failure; doubled by each further one.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);

/// Longest wait after a failure.
const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// Shared by all reconciliations.
pub struct Context {
    /// To the API server.
    pub client: Client,
    /// Writes events.
    pub recorder: Recorder,
    /// For what a spec leaves open.
    pub defaults: Defaults,
    /// Where all storage clusters are asked, in place of their Services; for tests and for an
    /// operator outside of the cluster.
    pub storage_address: Option<String>,
    failures: Mutex<HashMap<ObjectRef<StorageCluster>, u32>>,
}

impl Context {
    /// A context with nothing known of failures.
    pub fn new(client: Client, defaults: Defaults, storage_address: Option<String>) -> Self {
        let reporter = Reporter {
            controller: "lazarette-operator".to_owned(),
            instance: std::env::var("POD_NAME").ok(),
        };
        Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            defaults,
            storage_address,
            failures: Mutex::default(),
        }
    }

    /// The `host:port` where a cluster's storage nodes are asked.
    pub fn storage_address(&self, namespace: &str, cluster: &str) -> String {
        self.storage_address
            .clone()
            .unwrap_or_else(|| storage_endpoint(namespace, cluster))
    }

    /// Counts a failure and says how long to wait.
    pub fn failed(&self, cluster: &StorageCluster) -> Duration {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry(ObjectRef::from_obj(cluster)).or_default();
        *count = count.saturating_add(1);
        backoff(*count)
    }

    /// Forgets the failures.
    pub fn succeeded(&self, cluster: &StorageCluster) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.remove(&ObjectRef::from_obj(cluster));
    }
}

fn backoff(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    BACKOFF_FIRST.saturating_mul(1 << doublings).min(BACKOFF_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_a_limit() {
        let seconds = [1, 2, 3, 6, 7, 8, u32::MAX].map(|n| backoff(n).as_secs());
        assert_eq!(seconds, [1, 2, 4, 32, 60, 60, 60]);
    }
}
