//! Brings a new pod template to the storage nodes, one after the other.
//!
//! Kubernetes would go on as soon as a pod is ready. But a storage node that is ready may still
//! fetch what it missed, and taking the next one away would leave data with too few copies. So the
//! StatefulSet's strategy is OnDelete, and the operator deletes the pods.

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use lazarette_proto::cluster::ClusterStatus;

const REVISION: &str = "controller-revision-hash";

/// Whether every storage node is live and every copy is there.
pub(super) fn is_whole(view: &ClusterStatus, wanted: i32) -> bool {
    let wanted = usize::try_from(wanted).unwrap_or_default();
    let live = view.nodes.iter().filter(|node| node.live).count();
    live >= wanted
        && view.nodes.iter().all(|node| node.live)
        && view.degraded_replica_sets == 0
        && view.unavailable_replica_sets == 0
        && view.ownerless_volumes == 0
}

/// The pod to delete next so that it comes back with the template's `revision`, if that harms
/// nobody now. `pods` are those of the storage nodes, `wanted` is how many there shall be, `whole`
/// whether all data has all copies.
pub(super) fn next<'a>(pods: &'a [Pod], revision: &str, wanted: i32, whole: bool) -> Option<&'a Pod> {
    let outdated = || {
        pods.iter()
            .filter(|pod| pod.metadata.deletion_timestamp.is_none())
            .filter(|pod| pod.labels().get(REVISION).is_some_and(|found| found != revision))
    };
    // One that does not serve is no loss, and the new template may be what repairs it.
    if let Some(pod) = outdated().find(|pod| !is_ready(pod)) {
        return Some(pod);
    }
    let complete = usize::try_from(wanted).is_ok_and(|wanted| pods.len() == wanted) && pods.iter().all(is_ready);
    if !whole || !complete {
        return None;
    }
    outdated().max_by_key(|pod| ordinal(pod))
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
    use lazarette_proto::cluster::NodeStatus;
    use serde_json::json;

    fn pod(ordinal: u32, revision: &str, ready: bool) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": format!("demo-storage-{ordinal}"), "labels": {REVISION: revision}},
            "status": {"conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]},
        }))
        .unwrap()
    }

    fn chosen(pods: &[Pod], whole: bool) -> Option<String> {
        next(pods, "new", 3, whole).map(ResourceExt::name_any)
    }

    #[test]
    fn one_after_the_other_from_the_last_while_all_is_whole() {
        let mut pods = vec![pod(0, "old", true), pod(2, "old", true), pod(1, "old", true)];
        assert_eq!(chosen(&pods, true).as_deref(), Some("demo-storage-2"));
        assert_eq!(chosen(&pods, false), None);
        pods[1] = pod(2, "new", true);
        assert_eq!(chosen(&pods, true).as_deref(), Some("demo-storage-1"));
        let done = [0, 1, 2].map(|ordinal| pod(ordinal, "new", true));
        assert_eq!(chosen(&done, true), None);
    }

    #[test]
    fn nobody_goes_while_another_is_away() {
        let restarting = [pod(0, "old", true), pod(1, "old", true), pod(2, "new", false)];
        assert_eq!(chosen(&restarting, true), None);
        assert_eq!(chosen(&restarting[..2], true), None);
        let mut terminating = restarting.clone();
        terminating[2] = serde_json::from_value(json!({
            "metadata": {"name": "demo-storage-2", "deletionTimestamp": "2026-01-01T00:00:00Z"},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        }))
        .unwrap();
        assert_eq!(chosen(&terminating, true), None);
    }

    #[test]
    fn one_that_does_not_serve_goes_at_any_time() {
        let pods = [pod(0, "old", false), pod(1, "old", true), pod(2, "new", true)];
        assert_eq!(chosen(&pods, false).as_deref(), Some("demo-storage-0"));
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
        assert!(is_whole(&view, 3));
        assert!(!is_whole(&view, 4));
        let changed = |change: fn(&mut ClusterStatus)| {
            let mut view = view.clone();
            change(&mut view);
            is_whole(&view, 3)
        };
        assert!(!changed(|view| view.nodes[0].live = false));
        assert!(!changed(|view| view.degraded_replica_sets = 1));
        assert!(!changed(|view| view.unavailable_replica_sets = 1));
        assert!(!changed(|view| view.ownerless_volumes = 1));
    }
}
