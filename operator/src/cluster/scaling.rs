//! Storage nodes in: the last ones hand over what they hold before their pods go.
//!
//! What is known of the nodes is asked of them each time, so that a restart of the operator, a
//! change of mind or a stop in between lose nothing.

use lazarette_proto::cluster::{ClusterStatus, NodeStatus};

/// What is to be done about storage nodes beyond those that the spec asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Storage nodes that shall run.
    pub replicas: i32,
    /// Nodes that shall hand over what they hold, the last first.
    pub drain: Vec<String>,
    /// Nodes that were to go and shall stay.
    pub undrain: Vec<String>,
    /// Nodes that are gone and hold nothing.
    pub forget: Vec<String>,
}

/// Plans from what the storage nodes say. `set` is the name of their StatefulSet, `wanted` the
/// spec's count, `present` how many the StatefulSet asks for.
pub(super) fn plan(set: &str, wanted: i32, present: Option<i32>, view: Option<&ClusterStatus>) -> Plan {
    let Some(view) = view else {
        // Nobody goes as long as nobody knows what is on it.
        return Plan {
            replicas: present.unwrap_or(wanted).max(wanted),
            ..Plan::default()
        };
    };
    let mut nodes: Vec<(i32, &NodeStatus)> = view
        .nodes
        .iter()
        .filter_map(|node| Some((ordinal(set, &node.id)?, node)))
        .collect();
    nodes.sort_unstable_by_key(|(ordinal, _)| std::cmp::Reverse(*ordinal));
    let names = |condition: &dyn Fn(i32, &NodeStatus) -> bool| -> Vec<String> {
        let chosen = nodes.iter().filter(|(ordinal, node)| condition(*ordinal, node));
        chosen.map(|(_, node)| node.id.clone()).collect()
    };
    let holding = nodes.iter().filter(|(_, node)| !node.safe_to_remove);
    let last = holding.map(|(ordinal, _)| *ordinal).max();
    // Pods go from the last, so one that may go waits for those after it.
    let replicas = last.map_or(wanted, |last| wanted.max(last.saturating_add(1)));
    Plan {
        replicas,
        drain: names(&|ordinal, node| ordinal >= wanted && !node.safe_to_remove),
        undrain: names(&|ordinal, node| ordinal < wanted && node.draining),
        forget: names(&|ordinal, node| ordinal >= replicas && node.safe_to_remove && !node.live),
    }
}

/// The number of a pod of this StatefulSet.
fn ordinal(set: &str, node: &str) -> Option<i32> {
    node.strip_prefix(set)?.strip_prefix('-')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `h`: holds something, `d`: the same and draining, `s`: safe to remove, `g`: that and gone.
    fn view(states: &str) -> ClusterStatus {
        let node = |(ordinal, state)| NodeStatus {
            id: format!("demo-storage-{ordinal}"),
            live: state != 'g',
            draining: state != 'h',
            safe_to_remove: state == 's' || state == 'g',
            ..NodeStatus::default()
        };
        ClusterStatus {
            nodes: states.chars().enumerate().map(node).collect(),
            ..ClusterStatus::default()
        }
    }

    fn planned(wanted: i32, states: &str) -> (i32, String, String, String) {
        let present = i32::try_from(states.len()).ok();
        let plan = plan("demo-storage", wanted, present, Some(&view(states)));
        let short = |names: Vec<String>| -> String { names.iter().filter_map(|name| name.chars().last()).collect() };
        (
            plan.replicas,
            short(plan.drain),
            short(plan.undrain),
            short(plan.forget),
        )
    }

    fn expected(replicas: i32, drain: &str, undrain: &str, forget: &str) -> (i32, String, String, String) {
        (replicas, drain.to_owned(), undrain.to_owned(), forget.to_owned())
    }

    #[test]
    fn nodes_come_at_once_and_go_when_they_hold_nothing() {
        assert_eq!(planned(5, "hhh"), expected(5, "", "", ""));
        assert_eq!(planned(3, "hhhhh"), expected(5, "43", "", ""));
        assert_eq!(planned(3, "hhhhd"), expected(5, "43", "", ""));
        // The last may go first only.
        assert_eq!(planned(3, "hhhsd"), expected(5, "4", "", ""));
        assert_eq!(planned(3, "hhhds"), expected(4, "3", "", ""));
        assert_eq!(planned(3, "hhhss"), expected(3, "", "", ""));
        assert_eq!(planned(3, "hhhsg"), expected(3, "", "", "4"));
    }

    #[test]
    fn a_change_of_mind_keeps_them() {
        assert_eq!(planned(5, "hhhds"), expected(5, "", "43", ""));
        assert_eq!(planned(4, "hhhdd"), expected(5, "4", "3", ""));
    }

    #[test]
    fn nobody_goes_unasked() {
        assert_eq!(plan("demo-storage", 3, Some(4), None).replicas, 4);
        assert_eq!(plan("demo-storage", 3, None, None).replicas, 3);
        // After a stop the StatefulSet asks for none: the one that was being emptied must run again.
        let resumed = plan("demo-storage", 3, Some(0), Some(&view("hhhd")));
        assert_eq!((resumed.replicas, resumed.drain.len()), (4, 1));
        // A node of another name is none of ours.
        let mut foreign = view("hhh");
        foreign.nodes[0].id = "demo-storage-x".to_owned();
        foreign.nodes[1].id = "other-7".to_owned();
        assert_eq!(plan("demo-storage", 1, Some(1), Some(&foreign)).replicas, 3);
    }
}
