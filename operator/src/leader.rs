//! Leader election on a Lease of coordination.k8s.io.
//!
//! Our own, as it is little code and the crate for it knows no compare-and-swap on the resource
//! version, and judges other holders' clocks by our own. Here, a holder is taken for dead when its
//! Lease has not *changed* for the Lease's duration by our clock, as client-go does.
//!
//! Two leaders at once would do no harm, only work: all writes are idempotent.

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// A candidate or the leader.
pub struct Leadership {
    api: Api<Lease>,
    name: String,
    identity: String,
    timing: Timing,
    /// The Lease's state as last seen, and when it was first seen so.
    observed: Option<(LeaseSpec, Instant)>,
    /// When the last successful renewal was *sent*.
    renewed: Instant,
}

/// The times of an election.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Others may take over when the Lease did not change for so long.
    pub duration: Duration,
    /// The leader gives up if it could not renew for so long. Less than `duration`.
    pub deadline: Duration,
    /// Between two attempts.
    pub retry: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(15),
            deadline: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        }
    }
}

impl Leadership {
    /// A candidate. `identity` is unique among the candidates.
    pub fn new(client: Client, namespace: &str, name: &str, identity: String, timing: Timing) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            name: name.to_owned(),
            identity,
            timing,
            observed: None,
            renewed: Instant::now(),
        }
    }

    /// Waits until this candidate is the leader.
    pub async fn acquire(&mut self) {
        loop {
            match self.attempt().await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "leader election: the Lease could not be read or written"),
            }
            sleep(self.timing.retry).await;
        }
    }

    /// Renews until that fails for too long. When this returns, another may be the leader.
    pub async fn hold(&mut self) {
        loop {
            sleep(self.timing.retry).await;
            let rest = self.timing.deadline.saturating_sub(self.renewed.elapsed());
            match timeout(rest, self.attempt()).await {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => return,
                Ok(Err(error)) => tracing::warn!(%error, "leader election: the Lease could not be renewed"),
                Err(_) => return,
            }
            if self.renewed.elapsed() >= self.timing.deadline {
                return;
            }
        }
    }

    /// Lets another candidate take over at once. Best effort.
    pub async fn release(&mut self) {
        let result = async {
            let Some(mut lease) = self.api.get_opt(&self.name).await? else {
                return Ok(());
            };
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() == Some(&self.identity) {
                spec.holder_identity = None;
                spec.renew_time = Some(MicroTime(Timestamp::now()));
                self.api.replace(&self.name, &PostParams::default(), &lease).await?;
            }
            Ok::<_, kube::Error>(())
        };
        if let Ok(Err(error)) = timeout(self.timing.retry, result).await {
            tracing::warn!(%error, "leader election: the Lease could not be released");
        }
    }

    /// Takes or renews the Lease if that is allowed; says whether it is ours.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let sent = Instant::now();
        let written = match self.api.get_opt(&self.name).await? {
            None => {
                let lease = Lease {
                    metadata: ObjectMeta {
                        name: Some(self.name.clone()),
                        ..ObjectMeta::default()
                    },
                    spec: Some(self.claim(None)),
                };
                self.api.create(&PostParams::default(), &lease).await
            }
            Some(mut lease) => {
                let spec = lease.spec.clone().unwrap_or_default();
                if !self.may_take(&spec) {
                    return Ok(false);
                }
                lease.spec = Some(self.claim(Some(&spec)));
                // Carries the resource version: refused if another candidate was quicker.
                self.api.replace(&self.name, &PostParams::default(), &lease).await
            }
        };
        match written {
            Ok(_) => {
                self.renewed = sent;
                Ok(true)
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn may_take(&mut self, spec: &LeaseSpec) -> bool {
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if holder.is_empty() || holder == self.identity {
            return true;
        }
        let unchanged = match &self.observed {
            Some((seen, since)) if seen == spec => since.elapsed(),
            _ => {
                self.observed = Some((spec.clone(), Instant::now()));
                Duration::ZERO
            }
        };
        let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
        let duration = seconds.map_or(self.timing.duration, Duration::from_secs);
        unchanged >= duration.max(self.timing.duration)
    }

    fn claim(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let ours = before.is_some_and(|b| b.holder_identity.as_deref() == Some(&self.identity));
        let transitions = before.and_then(|b| b.lease_transitions).unwrap_or_default();
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(self.timing.duration.as_secs()).ok(),
            acquire_time: if ours {
                before.and_then(|b| b.acquire_time.clone())
            } else {
                Some(now.clone())
            },
            renew_time: Some(now),
            lease_transitions: Some(if ours {
                transitions
            } else {
                transitions.saturating_add(1)
            }),
            ..LeaseSpec::default()
        }
    }
}
