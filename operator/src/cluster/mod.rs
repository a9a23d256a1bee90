//! Reconciles a storage cluster: dereference → validate → build → apply → status. The steps
//! `validate`, `build` and `status` are pure.

mod apply;
pub mod build;
mod deletion;
mod dereference;
mod rolling;
mod scaling;
mod status;
mod storage;
mod validate;

pub use apply::{ApplyError, FIELD_MANAGER};
pub use build::build;
pub use deletion::FINALIZER;
pub use dereference::{Dereferenced, Pin};
pub use validate::{Etcd, Invalid, Repair, ValidCluster, validate};

use crate::context::Context;
use apply::{apply, mark_etcd_has_run, offer_again};
use build::Component;
use deletion::{Decision, decide, is_forced};
use dereference::{Rollout, Unsatisfied, dereference, rollout, update_revision};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use kube::runtime::controller::Action;
use kube::runtime::events::{Event, EventType};
use kube::{Api, Resource, ResourceExt};
use lazarette_api::{ConditionType, StorageCluster, StorageClusterStatus, condition, label};
use rolling::{Rolling, Step};
use scaling::Plan;
use serde_json::json;
use status::{Seen, is_unsettled, pod_problems};
use std::sync::Arc;
use std::time::Duration;

/// Until the next look while something is under way or wrong.
const UNSETTLED: Duration = Duration::from_secs(5);

/// Until the next look at a healthy cluster; most changes are told by watches before.
const SETTLED: Duration = Duration::from_secs(30);

/// What the operator was installed with and a spec may leave open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Defaults {
    /// Image of the storage nodes.
    pub image: Option<String>,
    /// Image of etcd.
    pub etcd_image: Option<String>,
    /// PriorityClass of both.
    pub priority_class: Option<String>,
}

/// A reconciliation failed and is tried again.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// The API server refused or did not answer.
    #[error("{0}: {1}")]
    Kube(&'static str, #[source] Box<kube::Error>),
    /// Objects could not be written; the status says so too.
    #[error(transparent)]
    Apply(#[from] ApplyError),
}

impl ReconcileError {
    fn at(step: &'static str) -> impl FnOnce(kube::Error) -> Self {
        move |error| Self::Kube(step, Box::new(error))
    }
}

/// Brings the world towards what the storage cluster asks for, and its status up to date.
pub async fn reconcile(cluster: Arc<StorageCluster>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    let deleting = cluster.metadata.deletion_timestamp.is_some();
    let held = cluster.finalizers().iter().any(|f| f == FINALIZER);
    if deleting && !held {
        return Ok(Action::await_change());
    }
    if !held {
        add_finalizer(&cluster, &context).await?;
        // The change itself brings us back, with the new object.
        return Ok(Action::await_change());
    }
    let mut seen = bring_about(&cluster, &context).await;
    observe(&cluster, &context, &mut seen).await?;
    if deleting {
        let volumes = if is_forced(&cluster) {
            Ok(Vec::new())
        } else {
            let namespace = cluster.namespace().unwrap_or_default();
            storage::volumes(&context.storage_address(&namespace, &cluster.name_any())).await
        };
        match decide(&cluster, seen.seen.storage.ready, volumes) {
            Decision::Release(why) => {
                let kind = if is_forced(&cluster) {
                    EventType::Warning
                } else {
                    EventType::Normal
                };
                publish(&context, &cluster, kind, "Deleting", why).await;
                remove_finalizer(&cluster, &context).await?;
                return Ok(Action::await_change());
            }
            Decision::Hold(hold) => seen.seen.hold = Some(hold),
        }
    }
    let status = status::status(&cluster, &seen.seen, Timestamp::now());
    write_status(&cluster, &context, &status).await?;
    match seen.error {
        Some(error) => Err(error),
        None if is_unsettled(&status) || deleting => Ok(Action::requeue(UNSETTLED)),
        None => Ok(Action::requeue(SETTLED)),
    }
}

/// What was seen, and the error that ends the reconciliation after the status was written.
struct Outcome {
    seen: Seen,
    /// What the pods shall be like, as far as the StatefulSet controller knows it.
    revisions: Vec<(Component, String)>,
    plan: Option<Plan>,
    error: Option<ReconcileError>,
}

/// The steps that change things. Their failures belong into the status.
async fn bring_about(cluster: &StorageCluster, context: &Context) -> Outcome {
    let mut outcome = Outcome {
        seen: Seen {
            mistakes: Vec::new(),
            apply_error: None,
            unsatisfied: Vec::new(),
            etcd: Rollout::default(),
            storage: Rollout::default(),
            pod_problems: Vec::new(),
            view: Err("not asked".to_owned()),
            waiting: None,
            hold: None,
        },
        revisions: Vec::new(),
        plan: None,
        error: None,
    };
    let valid = match validate(cluster, &context.defaults) {
        Ok(valid) => valid,
        Err(mistakes) => {
            outcome.seen.mistakes = mistakes.iter().map(ToString::to_string).collect();
            return outcome;
        }
    };
    if cluster.spec.paused {
        return outcome;
    }
    if let Err(error) = dereference_and_apply(&valid, context, &mut outcome).await {
        outcome.seen.apply_error = Some(error.to_string());
        outcome.error = Some(error);
    }
    outcome
}

async fn dereference_and_apply(
    valid: &ValidCluster,
    context: &Context,
    outcome: &mut Outcome,
) -> Result<(), ReconcileError> {
    let client = &context.client;
    let known = dereference(client, valid)
        .await
        .map_err(ReconcileError::at("read the cluster"))?;
    outcome.seen.unsatisfied.clone_from(&known.unsatisfied);
    // Before there are pods, asking would only take time.
    if known.storage_pods > 0 {
        outcome.seen.view = ask(context, &valid.namespace, &valid.name).await;
    }
    let plan = scaling::plan(
        &valid.storage_name(),
        valid.spec.storage_nodes.count,
        known.storage_replicas,
        outcome.seen.view.as_ref().ok(),
    );
    let objects = build(valid, &known, &context.defaults, plan.replicas);
    outcome.plan = Some(plan).filter(|_| !valid.spec.stopped);
    let applied = apply(client, valid, &objects).await?;
    for set in &applied.stateful_sets {
        let name = set.name_any();
        let component = if name == valid.etcd_name() {
            outcome.seen.etcd = rollout(Some(set));
            Component::Etcd
        } else {
            outcome.seen.storage = rollout(Some(set));
            Component::Storage
        };
        outcome
            .revisions
            .extend(update_revision(set).map(|revision| (component, revision)));
    }
    // A member is ready only when most are: the cluster has begun.
    if outcome.seen.etcd.ready > 0 {
        for claim in &known.etcd_claims_unmarked {
            mark_etcd_has_run(client, &valid.namespace, claim).await?;
        }
    }
    for volume in &known.released {
        offer_again(client, volume).await?;
    }
    Ok(())
}

async fn ask(
    context: &Context,
    namespace: &str,
    name: &str,
) -> Result<lazarette_proto::cluster::ClusterStatus, String> {
    let answer = storage::status(&context.storage_address(namespace, name)).await;
    answer.map_err(|error| error.to_string())
}

/// Looks at pods and at what the storage nodes said, and takes the next steps of scaling in and of
/// bringing new templates to pods.
async fn observe(
    cluster: &StorageCluster,
    context: &Context,
    Outcome {
        seen, revisions, plan, ..
    }: &mut Outcome,
) -> Result<(), ReconcileError> {
    let namespace = cluster.namespace().unwrap_or_default();
    let name = cluster.name_any();
    if !seen.storage.exists {
        // Not applied this time: look at what is there.
        let sets = Api::<StatefulSet>::namespaced(context.client.clone(), &namespace);
        let read = async |component: Component| {
            let set = sets.get_opt(&format!("{name}-{}", component.as_str())).await;
            set.map(|set| rollout(set.as_ref()))
        };
        seen.etcd = read(Component::Etcd).await.map_err(ReconcileError::at("read etcd"))?;
        seen.storage = read(Component::Storage)
            .await
            .map_err(ReconcileError::at("read the storage nodes"))?;
    }
    let selector = format!("{}=lazarette,{}={name}", label::NAME, label::INSTANCE);
    let pods = Api::<Pod>::namespaced(context.client.clone(), &namespace)
        .list(&ListParams::default().labels(&selector))
        .await
        .map_err(ReconcileError::at("read the pods"))?;
    seen.pod_problems = pod_problems(&pods.items, Timestamp::now());
    if seen.view.is_err() {
        seen.view = ask(context, &namespace, &name).await;
    }
    if let Some(plan) = plan {
        scale(cluster, context, plan, seen).await;
    }
    roll(cluster, context, &pods.items, revisions, seen).await
}

/// Tells the storage nodes who leaves and who stays. What they refuse belongs into the status.
async fn scale(cluster: &StorageCluster, context: &Context, plan: &Plan, seen: &mut Seen) {
    let Ok(view) = &seen.view else { return };
    let address = context.storage_address(&cluster.namespace().unwrap_or_default(), &cluster.name_any());
    let draining = |name: &String| view.nodes.iter().any(|node| node.id == *name && node.draining);
    let mut problems = Vec::new();
    for node in plan.drain.iter().filter(|node| !draining(node)) {
        match storage::drain(&address, node).await {
            Ok(()) => {
                let note = format!("storage node {node} hands over its copies before it is removed");
                publish(context, cluster, EventType::Normal, "StorageNodeDraining", &note).await;
            }
            Err(error) => {
                problems.push(Unsatisfied {
                    reason: "ScaleInRefused",
                    message: format!(
                        "spec.storageNodes.count is {}, but storage node {node} cannot be removed: {error}; raise the \
                         count again, or add storage nodes",
                        cluster.spec.storage_nodes.count
                    ),
                });
                // Those before it are of no use as long as it stays.
                break;
            }
        }
    }
    for node in &plan.undrain {
        if let Err(error) = storage::undrain(&address, node).await {
            tracing::warn!(node, %error, "storage node not told to stay; trying again");
        }
    }
    for node in &plan.forget {
        match storage::forget(&address, node).await {
            Ok(()) => {
                let note = format!("storage node {node} is removed");
                publish(context, cluster, EventType::Normal, "StorageNodeRemoved", &note).await;
            }
            Err(error) => tracing::info!(node, %error, "storage node not forgotten yet"),
        }
    }
    seen.unsatisfied.extend(problems);
}

/// Brings new templates to the pods: deletes one if it is outdated and may go now. etcd comes first.
async fn roll(
    cluster: &StorageCluster,
    context: &Context,
    pods: &[Pod],
    revisions: &[(Component, String)],
    seen: &mut Seen,
) -> Result<(), ReconcileError> {
    for (component, revision) in revisions {
        let of_kind = |pod: &&Pod| {
            let found = pod.labels().get(label::COMPONENT);
            found.is_some_and(|found| found == component.label())
        };
        let pods: Vec<Pod> = pods.iter().filter(of_kind).cloned().collect();
        let (wanted, obstacle) = match component {
            Component::Etcd => (cluster.spec.etcd.members, None),
            Component::Storage => {
                let wanted = cluster.spec.storage_nodes.count;
                (wanted, rolling::obstacle(seen.view.as_ref().ok(), wanted))
            }
        };
        let rolling = Rolling {
            pods: &pods,
            revision,
            wanted,
            obstacle,
            majority: *component == Component::Etcd,
        };
        match rolling.next(Timestamp::now()) {
            Step::Done => {}
            Step::Renew(pod) => return renew(cluster, context, pod).await,
            Step::Wait(why) => {
                seen.waiting = Some(why);
                return Ok(());
            }
            Step::Stopped(why) => {
                seen.waiting = Some(why.clone());
                seen.unsatisfied.push(Unsatisfied {
                    reason: "RolloutStopped",
                    message: why,
                });
                return Ok(());
            }
        }
    }
    Ok(())
}

async fn renew(cluster: &StorageCluster, context: &Context, pod: &Pod) -> Result<(), ReconcileError> {
    let name = pod.name_any();
    let note = format!("pod {name} is started anew with the new template");
    publish(context, cluster, EventType::Normal, "PodRestarting", &note).await;
    let parameters = DeleteParams {
        preconditions: Some(Preconditions {
            uid: pod.uid(),
            // Nothing must have happened to it since we looked.
            resource_version: pod.resource_version(),
        }),
        ..DeleteParams::default()
    };
    let api = Api::<Pod>::namespaced(context.client.clone(), &cluster.namespace().unwrap_or_default());
    match api.delete(&name, &parameters).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Ok(()),
        Err(error) => Err(ReconcileError::at("delete an outdated pod")(error)),
    }
}

fn api(cluster: &StorageCluster, context: &Context) -> Api<StorageCluster> {
    Api::namespaced(context.client.clone(), &cluster.namespace().unwrap_or_default())
}

async fn add_finalizer(cluster: &StorageCluster, context: &Context) -> Result<(), ReconcileError> {
    let mut finalizers = cluster.finalizers().to_vec();
    finalizers.push(FINALIZER.to_owned());
    patch_finalizers(cluster, context, &finalizers)
        .await
        .map_err(ReconcileError::at("add the finalizer"))
}

async fn remove_finalizer(cluster: &StorageCluster, context: &Context) -> Result<(), ReconcileError> {
    let mut finalizers = cluster.finalizers().to_vec();
    finalizers.retain(|f| f != FINALIZER);
    match patch_finalizers(cluster, context, &finalizers).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other.map_err(ReconcileError::at("remove the finalizer")),
    }
}

/// The resource version makes the server refuse if someone else changed the list meanwhile.
async fn patch_finalizers(
    cluster: &StorageCluster,
    context: &Context,
    finalizers: &[String],
) -> Result<(), kube::Error> {
    let patch = json!({"metadata": {
        "resourceVersion": cluster.resource_version(),
        "finalizers": finalizers,
    }});
    let parameters = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    api(cluster, context)
        .patch(&cluster.name_any(), &parameters, &Patch::Merge(patch))
        .await
        .map(|_| ())
}

async fn write_status(
    cluster: &StorageCluster,
    context: &Context,
    status: &StorageClusterStatus,
) -> Result<(), ReconcileError> {
    if cluster.status.as_ref() == Some(status) {
        return Ok(());
    }
    let patch = json!({
        "apiVersion": StorageCluster::api_version(&()),
        "kind": StorageCluster::kind(&()),
        "metadata": {"name": cluster.name_any(), "uid": cluster.uid()},
        "status": status,
    });
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    api(cluster, context)
        .patch_status(&cluster.name_any(), &parameters, &Patch::Apply(patch))
        .await
        .map_err(ReconcileError::at("write the status"))?;
    for (kind, reason, note) in transitions(cluster.status.as_ref(), status) {
        publish(context, cluster, kind, &reason, &note).await;
    }
    Ok(())
}

/// The events that tell of the changes between two statuses.
fn transitions(old: Option<&StorageClusterStatus>, new: &StorageClusterStatus) -> Vec<(EventType, String, String)> {
    let mut events = Vec::new();
    for kind in ConditionType::ALL {
        let Some(now) = condition(&new.conditions, kind) else {
            continue;
        };
        let before = old.and_then(|status| condition(&status.conditions, kind));
        let changed = match before {
            Some(before) => before.status != now.status || before.reason != now.reason,
            // The first status of a new cluster tells only what is so, not what is not.
            None => now.status == "True",
        };
        if !changed {
            continue;
        }
        let bad = match kind {
            ConditionType::Available => now.status != "True" && now.reason != "Stopped",
            ConditionType::Degraded => now.status == "True",
            ConditionType::Progressing => now.reason.starts_with("Deletion"),
            ConditionType::Paused => false,
        };
        let event_type = if bad { EventType::Warning } else { EventType::Normal };
        events.push((event_type, now.reason.clone(), now.message.clone()));
    }
    events
}

/// Events are a courtesy: failing to write one is only logged.
async fn publish(context: &Context, cluster: &StorageCluster, type_: EventType, reason: &str, note: &str) {
    let event = Event {
        type_,
        reason: reason.to_owned(),
        note: Some(note.to_owned()),
        action: "Reconcile".to_owned(),
        secondary: None,
    };
    if let Err(error) = context.recorder.publish(&event, &cluster.object_ref(&())).await {
        tracing::warn!(%error, reason, "could not write an event");
    }
}

#[cfg(test)]
mod tests;
