//! The control loop around the reconciliation.

use crate::cluster::{ReconcileError, reconcile};
use crate::context::Context;
use futures::StreamExt;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::runtime::controller::{Action, Config};
use kube::runtime::{Controller, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use lazarette_api::{StorageCluster, label};
use lazarette_telemetry::Registry;
use lazarette_telemetry::metrics::{counter::Counter, gauge::Gauge};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// What the operator counts.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// Reconciliations that came to their end.
    pub reconciles: Counter,
    /// Reconciliations that failed and are tried again.
    pub failures: Counter,
    /// 1 while this process is the leader.
    pub leader: Gauge,
}

impl Metrics {
    /// Metrics that are part of `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let Self {
            reconciles,
            failures,
            leader,
        } = metrics.clone();
        registry.register(
            "lazarette_operator_reconciles",
            "Reconciliations that came to their end",
            reconciles,
        );
        registry.register(
            "lazarette_operator_reconcile_failures",
            "Reconciliations that failed and are tried again",
            failures,
        );
        registry.register(
            "lazarette_operator_leader",
            "1 while this process is the leader",
            leader,
        );
        metrics
    }
}

/// Reconciles all storage clusters, or those of one namespace, until `shutdown` is ready; what is
/// under way is finished first.
pub async fn run(
    context: Arc<Context>,
    namespace: Option<String>,
    metrics: Metrics,
    shutdown: impl Future<Output = ()> + Send + Sync + 'static,
) {
    let client = context.client.clone();
    let within = namespace.as_deref();
    let owned = || watcher::Config::default().labels(&format!("{}=lazarette-operator", label::MANAGED_BY));
    Controller::new(scoped::<StorageCluster>(&client, within), watcher::Config::default())
        // A rollout makes many changes at once.
        .with_config(Config::default().debounce(Duration::from_millis(200)).concurrency(4))
        .owns(scoped::<StatefulSet>(&client, within), owned())
        .owns(scoped::<ConfigMap>(&client, within), owned())
        .owns(scoped::<Service>(&client, within), owned())
        .owns(scoped::<ServiceAccount>(&client, within), owned())
        .owns(scoped::<NetworkPolicy>(&client, within), owned())
        .owns(scoped::<PodDisruptionBudget>(&client, within), owned())
        .graceful_shutdown_on(shutdown)
        .run(
            move |cluster, context: Arc<Context>| {
                let metrics = metrics.clone();
                async move {
                    let result = reconcile(Arc::clone(&cluster), Arc::clone(&context)).await;
                    match &result {
                        Ok(_) => {
                            context.succeeded(&cluster);
                            metrics.reconciles.inc();
                        }
                        Err(_) => {
                            metrics.failures.inc();
                        }
                    }
                    result
                }
            },
            failed,
            context,
        )
        .for_each(|result| async move {
            // Failed reconciliations are logged where they are handled; this is about watches.
            if let Err(
                error @ (kube::runtime::controller::Error::QueueError(_)
                | kube::runtime::controller::Error::RunnerError(_)),
            ) = result
            {
                tracing::warn!(%error, "a watch failed and is tried again");
            }
        })
        .await;
}

fn scoped<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

fn failed(cluster: Arc<StorageCluster>, error: &ReconcileError, context: Arc<Context>) -> Action {
    let wait = context.failed(&cluster);
    tracing::warn!(
        namespace = cluster.namespace().unwrap_or_default(),
        cluster = cluster.name_any(),
        error = error as &dyn std::error::Error,
        retry_in = ?wait,
        "reconciliation failed"
    );
    Action::requeue(wait)
}
