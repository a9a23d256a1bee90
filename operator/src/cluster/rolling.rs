//! Brings a new pod template to etcd members and storage nodes, one pod after the other.
//!
//! Kubernetes would go on as soon as a pod is ready. But a storage node that is ready may still
//! fetch what it missed, and taking the next one away would leave data with too few copies. So the
//! StatefulSets' strategy is OnDelete, and the operator deletes the pods. It does not go on while a
//! pod with the new template is not ready: a template that does not work costs one pod, not all.

use super::status::pod_problems;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use lazarette_proto::cluster::{ClusterStatus, NodeStatus};

const REVISION: &str = "controller-revision-hash";

/// Seconds that a pod may take to become ready, from its creation; after that it is said to fail.
const PATIENCE: i64 = 180;

/// Seconds after which etcd members that are all not ready are believed to need the new template.
const OUTAGE: i64 = 60;

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step<'a> {
    /// All pods have the template.
    Done,
    /// Start this pod anew.
    Renew(&'a Pod),
    /// Others must come first.
    Wait(String),
    /// A pod with the new template does not become ready.
    Stopped(String),
}

/// One kind of pods, and what may be done to them.
pub(super) struct Rolling<'a> {
    /// All pods of the kind.
    pub pods: &'a [Pod],
    /// What they shall be like.
    pub revision: &'a str,
    /// How many there shall be.
    pub wanted: i32,
    /// Why none may be taken away now, if so.
    pub obstacle: Option<String>,
    /// None of them serves unless most do, so that if none is ready, none is worth keeping.
    pub majority: bool,
}

/// A storage node that was told to leave and may be gone.
pub(super) fn has_left(node: &NodeStatus) -> bool {
    node.safe_to_remove && !node.live
}

/// Why no storage node may be taken away: someone is missing, or a copy is.
pub(super) fn obstacle(view: Option<&ClusterStatus>, wanted: i32) -> Option<String> {
    let Some(view) = view else {
        return Some("the storage nodes cannot be asked".to_owned());
    };
    let nodes = || view.nodes.iter().filter(|node| !has_left(node));
    let live = nodes().filter(|node| node.live).count();
    if live < usize::try_from(wanted).unwrap_or_default() || nodes().any(|node| !node.live) {
        return Some(format!("{live} of {wanted} storage nodes are live"));
    }
    for (count, what) in [
        (view.degraded_replica_sets, "replica sets lack copies"),
        (view.unavailable_replica_sets, "replica sets cannot take writes"),
        (view.ownerless_volumes, "volumes have no owner"),
    ] {
        if count > 0 {
            return Some(format!("{count} {what}"));
        }
    }
    None
}

impl<'a> Rolling<'a> {
    /// The step that harms nobody now.
    pub(super) fn next(&self, now: Timestamp) -> Step<'a> {
        let has_template = |pod: &&Pod| pod.labels().get(REVISION).is_none_or(|found| found == self.revision);
        let outdated = || {
            let pods = self.pods.iter().filter(move |pod| !has_template(pod));
            pods.filter(|pod| pod.metadata.deletion_timestamp.is_none())
        };
        if outdated().next().is_none() {
            return Step::Done;
        }
        let age = |pod: &Pod| {
            let created = pod.metadata.creation_timestamp.as_ref();
            created.map_or(0, |created| now.as_second() - created.0.as_second())
        };
        let down = self.majority && self.pods.iter().all(|pod| !is_ready(pod) && age(pod) > OUTAGE);
        if down && let Some(pod) = outdated().next() {
            return Step::Renew(pod);
        }
        if let Some(pod) = self.pods.iter().filter(has_template).find(|pod| !is_ready(pod)) {
            let name = pod.name_any();
            let problems = pod_problems(std::slice::from_ref(pod), now);
            let problem = problems.into_iter().map(|problem| problem.message).next();
            let late = (age(pod) > PATIENCE).then(|| format!("pod {name} did not become ready in {PATIENCE} s"));
            return if let Some(problem) = problem.or(late) {
                Step::Stopped(format!(
                    "the new template does not work: {problem}; the other pods keep the old one: correct the spec"
                ))
            } else {
                Step::Wait(format!("pod {name} has the new template and is not ready yet"))
            };
        }
        // One that does not serve is no loss, and the new template may be what repairs it.
        if let Some(pod) = outdated().find(|pod| !is_ready(pod)) {
            return Step::Renew(pod);
        }
        let ready = self.pods.iter().filter(|pod| is_ready(pod)).count();
        if ready != self.pods.len() || usize::try_from(self.wanted).is_ok_and(|wanted| ready < wanted) {
            return Step::Wait(format!("{ready} of {} pods are ready", self.wanted));
        }
        if let Some(obstacle) = &self.obstacle {
            return Step::Wait(obstacle.clone());
        }
        outdated()
            .max_by_key(|pod| ordinal(pod))
            .map_or(Step::Done, Step::Renew)
    }
}

fn ordinal(pod: &Pod) -> Option<u32> {
    pod.name_any().rsplit_once('-')?.1.parse().ok()
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    pod.metadata.deletion_timestamp.is_none()
        && conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(ordinal: u32, revision: &str, ready: bool) -> Pod {
        serde_json::from_value(json!({
            "metadata": {
                "name": format!("demo-storage-{ordinal}"),
                "labels": {REVISION: revision},
                "creationTimestamp": "1970-01-01T00:00:00Z",
            },
            "status": {"conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]},
        }))
        .unwrap()
    }

    fn step(pods: &[Pod], change: impl FnOnce(&mut Rolling<'_>), second: i64) -> String {
        let mut rolling = Rolling {
            pods,
            revision: "new",
            wanted: 3,
            obstacle: None,
            majority: false,
        };
        change(&mut rolling);
        match rolling.next(Timestamp::from_second(second).unwrap()) {
            Step::Done => "done".to_owned(),
            Step::Renew(pod) => pod.name_any(),
            Step::Wait(why) => format!("wait: {why}"),
            Step::Stopped(why) => format!("stopped: {why}"),
        }
    }

    fn chosen(pods: &[Pod]) -> String {
        step(pods, |_| {}, 10)
    }

    #[test]
    fn one_after_the_other_from_the_last_while_all_is_whole() {
        let mut pods = vec![pod(0, "old", true), pod(2, "old", true), pod(1, "old", true)];
        assert_eq!(chosen(&pods), "demo-storage-2");
        let obstacle = |rolling: &mut Rolling<'_>| rolling.obstacle = Some("a copy is missing".to_owned());
        assert_eq!(step(&pods, obstacle, 10), "wait: a copy is missing");
        pods[1] = pod(2, "new", true);
        assert_eq!(chosen(&pods), "demo-storage-1");
        let done = [0, 1, 2].map(|ordinal| pod(ordinal, "new", true));
        assert_eq!(chosen(&done), "done");
    }

    #[test]
    fn nobody_goes_while_another_is_away() {
        let restarting = [pod(0, "old", true), pod(1, "old", true), pod(2, "new", false)];
        assert_eq!(
            chosen(&restarting),
            "wait: pod demo-storage-2 has the new template and is not ready yet"
        );
        assert_eq!(chosen(&restarting[..2]), "wait: 2 of 3 pods are ready");
        let mut terminating = restarting.clone();
        terminating[2] = serde_json::from_value(json!({
            "metadata": {"name": "demo-storage-2", "deletionTimestamp": "2026-01-01T00:00:00Z"},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        }))
        .unwrap();
        assert!(chosen(&terminating).starts_with("wait: "));
    }

    #[test]
    fn a_template_that_does_not_work_costs_one_pod() {
        // The one that was renewed fails, and another of the old ones too: it is not renewed as well.
        let pods = [pod(0, "old", false), pod(1, "old", true), pod(2, "new", false)];
        assert!(step(&pods, |_| {}, PATIENCE).starts_with("wait: "));
        let stopped = step(&pods, |_| {}, PATIENCE + 1);
        assert!(
            stopped.starts_with("stopped: the new template does not work: pod demo-storage-2 did not become ready"),
            "{stopped}"
        );
        // A third template replaces the one that failed first.
        let third = |rolling: &mut Rolling<'_>| rolling.revision = "third";
        let pods = [pod(0, "old", true), pod(1, "old", true), pod(2, "new", false)];
        assert_eq!(step(&pods, third, 10), "demo-storage-2");
    }

    #[test]
    fn one_that_does_not_serve_goes_at_any_time() {
        let pods = [pod(0, "old", false), pod(1, "old", true), pod(2, "new", true)];
        let obstacle = |rolling: &mut Rolling<'_>| rolling.obstacle = Some("a copy is missing".to_owned());
        assert_eq!(step(&pods, obstacle, 10), "demo-storage-0");
    }

    #[test]
    fn members_that_need_a_majority_are_renewed_together_if_none_is_ready() {
        let pods = [pod(0, "old", false), pod(1, "old", false), pod(2, "new", false)];
        let majority = |rolling: &mut Rolling<'_>| rolling.majority = true;
        assert!(step(&pods, majority, OUTAGE).starts_with("wait: "));
        assert_eq!(step(&pods, majority, OUTAGE + 1), "demo-storage-0");
        assert!(step(&pods, |_| {}, OUTAGE + 1).starts_with("wait: "));
    }

    #[test]
    fn whole_means_all_live_and_all_copies() {
        let node = |live| NodeStatus {
            live,
            ..NodeStatus::default()
        };
        let view = ClusterStatus {
            nodes: vec![node(true); 3],
            ..ClusterStatus::default()
        };
        assert_eq!(obstacle(Some(&view), 3), None);
        assert!(obstacle(Some(&view), 4).is_some());
        assert!(obstacle(None, 3).is_some());
        let changed = |change: fn(&mut ClusterStatus)| {
            let mut view = view.clone();
            change(&mut view);
            obstacle(Some(&view), 3)
        };
        assert!(changed(|view| view.nodes[0].live = false).is_some());
        assert!(changed(|view| view.degraded_replica_sets = 1).is_some());
        assert!(changed(|view| view.unavailable_replica_sets = 1).is_some());
        assert!(changed(|view| view.ownerless_volumes = 1).is_some());
        let left = changed(|view| {
            view.nodes.push(NodeStatus {
                draining: true,
                safe_to_remove: true,
                ..NodeStatus::default()
            });
        });
        assert_eq!(left, None);
    }
}
