use super::*;
use crate::cluster::dereference::Pin;
use crate::cluster::tests::{defaults, host_path_sample, sample, valid};
use lazarette_api::StorageCluster;

fn built(cluster: &StorageCluster) -> Objects {
    let count = cluster.spec.storage_nodes.count;
    build(&valid(cluster), &Dereferenced::default(), &defaults(), count)
}

fn set(objects: &Objects, component: Component) -> &StatefulSet {
    let name = format!("demo-{}", component.as_str());
    let mut sets = objects.stateful_sets.iter();
    sets.find(|set| set.metadata.name.as_deref() == Some(&name)).unwrap()
}

fn pod(set: &StatefulSet) -> &PodSpec {
    set.spec.as_ref().unwrap().template.spec.as_ref().unwrap()
}

/// Everything that is built for the sample, as YAML.
#[test]
fn the_sample_in_full() {
    let Objects {
        service_accounts,
        config_maps,
        services,
        network_policies,
        disruption_budgets,
        stateful_sets,
        persistent_volumes,
    } = built(&sample());
    assert!(persistent_volumes.is_empty());
    insta::assert_yaml_snapshot!(
        "sample",
        (
            service_accounts,
            config_maps,
            services,
            network_policies,
            disruption_budgets,
            stateful_sets
        )
    );
}

#[test]
fn building_again_gives_the_same() {
    assert_eq!(built(&sample()), built(&sample()));
}

#[test]
fn one_etcd_member_has_no_budget_and_one_endpoint() {
    let mut cluster = sample();
    cluster.spec.etcd.members = 1;
    let objects = built(&cluster);
    let budgets: Vec<_> = objects
        .disruption_budgets
        .iter()
        .map(|budget| budget.metadata.name.as_deref().unwrap())
        .collect();
    assert_eq!(budgets, ["demo-storage"]);
    let args = pod(set(&objects, Component::Storage)).containers[0]
        .args
        .as_ref()
        .unwrap();
    let etcd = "--etcd=http://demo-etcd-0.demo-etcd.storage.svc:2379".to_owned();
    assert!(args.contains(&etcd), "{args:?}");
}

#[test]
fn stopping_ends_storage_nodes_before_etcd() {
    let mut cluster = sample();
    cluster.spec.stopped = true;
    let replicas = |storage_pods| {
        let known = Dereferenced {
            storage_pods,
            ..Dereferenced::default()
        };
        let objects = build(&valid(&cluster), &known, &defaults(), 3);
        Component::ALL.map(|c| set(&objects, c).spec.as_ref().unwrap().replicas.unwrap())
    };
    assert_eq!(replicas(3), [3, 0]);
    assert_eq!(replicas(0), [0, 0]);
}

#[test]
fn the_spec_is_carried_over() {
    let mut cluster = sample();
    cluster.spec.image = Some("registry/lazarette:1".to_owned());
    cluster.spec.image_pull_policy = "Always".to_owned();
    cluster.spec.image_pull_secrets = serde_json::from_value(serde_json::json!([{"name": "pull"}])).unwrap();
    let nodes = &mut cluster.spec.storage_nodes;
    nodes.count = 5;
    nodes.failure_domain_label = "topology.kubernetes.io/zone".to_owned();
    nodes.placement = serde_json::from_value(serde_json::json!({
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "storage", "operator": "Exists"}],
        "priorityClassName": "high",
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "rack", "labelSelector": {}},
        ]}},
    }))
    .unwrap();
    let objects = built(&cluster);
    let set = set(&objects, Component::Storage);
    assert_eq!(set.spec.as_ref().unwrap().replicas, Some(5));
    let pod = pod(set);
    let container = &pod.containers[0];
    assert_eq!(container.image.as_deref(), Some("registry/lazarette:1"));
    assert_eq!(container.image_pull_policy.as_deref(), Some("Always"));
    assert_eq!(pod.image_pull_secrets.as_ref().unwrap()[0].name, "pull");
    assert_eq!(pod.node_selector.as_ref().unwrap()["disk"], "ssd");
    assert_eq!(pod.tolerations.as_ref().unwrap().len(), 1);
    assert_eq!(pod.priority_class_name.as_deref(), Some("high"));
    let anti = pod.affinity.as_ref().unwrap().pod_anti_affinity.as_ref().unwrap();
    let keys: Vec<_> = anti
        .required_during_scheduling_ignored_during_execution
        .iter()
        .flatten()
        .map(|term| term.topology_key.as_str())
        .collect();
    assert_eq!(keys, ["rack", "kubernetes.io/hostname"]);
    let domain = container
        .env
        .iter()
        .flatten()
        .find(|e| e.name == "FAILURE_DOMAIN")
        .unwrap();
    let source = domain.value_from.as_ref().unwrap().field_ref.as_ref().unwrap();
    assert_eq!(source.field_path, "metadata.labels['topology.kubernetes.io/zone']");
    assert_eq!(
        pod.topology_spread_constraints.as_ref().unwrap()[0].topology_key,
        "topology.kubernetes.io/zone"
    );
}

#[test]
fn folders_are_tied_to_nodes() {
    let cluster = host_path_sample();
    let pin = |ordinal, hostname: &str, exists| Pin {
        component: Component::Storage,
        ordinal,
        hostname: hostname.to_owned(),
        exists,
    };
    let known = Dereferenced {
        pins: vec![pin(0, "a", true), pin(1, "b", false)],
        ..Dereferenced::default()
    };
    let objects = build(&valid(&cluster), &known, &defaults(), 3);
    insta::assert_yaml_snapshot!("host_path_volumes", objects.persistent_volumes);
    assert_eq!(pinned_node(&objects.persistent_volumes[0]), Some("b"));
    let set = set(&objects, Component::Storage);
    let claim = &set.spec.as_ref().unwrap().volume_claim_templates.as_ref().unwrap()[0];
    // The empty class, not the default one: only the volume made for the claim may bind.
    let class = claim.spec.as_ref().unwrap().storage_class_name.as_deref();
    assert_eq!(class, Some(""));
    let security = pod(set).security_context.as_ref().unwrap();
    assert_eq!((security.run_as_user, security.run_as_non_root), (Some(0), None));
}

#[test]
fn containers_have_no_privileges() {
    let objects = built(&sample());
    for component in Component::ALL {
        let pod = pod(set(&objects, component));
        let security = pod.security_context.as_ref().unwrap();
        assert_eq!(security.run_as_non_root, Some(true));
        assert_eq!(pod.automount_service_account_token, Some(false));
        let container = pod.containers[0].security_context.as_ref().unwrap();
        assert_eq!(container.allow_privilege_escalation, Some(false));
        assert_eq!(container.read_only_root_filesystem, Some(true));
        let dropped = container.capabilities.as_ref().unwrap().drop.as_deref().unwrap();
        assert_eq!(dropped, ["ALL"]);
    }
}
