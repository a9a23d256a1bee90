use super::*;
use k8s_openapi::api::apps::v1::{StatefulSetSpec, StatefulSetUpdateStrategy};
use k8s_openapi::api::core::v1::{ConfigMapVolumeSource, Volume};
use k8s_openapi::api::networking::v1::{
    NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};

const CLIENT: (&str, i32) = ("client", 2379);
const PEER: (&str, i32) = ("peer", 2380);
const METRICS: (&str, i32) = ("metrics", 2381);

const DATA_DIR: &str = "/var/lib/etcd";
/// Written by the init container, read by etcd.
const CONFIG: &str = "/var/lib/etcd/etcd.json";
/// The ConfigMap's volume and where it is mounted.
const STATE: &str = "state";
const STATE_DIR: &str = "/etc/lazarette/etcd";

/// Adds the objects of an etcd of the cluster's own.
pub(super) fn add(
    cluster: &ValidCluster,
    image: &str,
    known: &Dereferenced,
    defaults: &Defaults,
    replicas: i32,
    objects: &mut Objects,
) {
    let name = cluster.etcd_name();
    objects.config_maps.push(ConfigMap {
        metadata: meta(cluster, Component::Etcd, name.clone()),
        data: Some(
            [(
                STATE.to_owned(),
                if known.etcd_has_run { "existing" } else { "new" }.to_owned(),
            )]
            .into(),
        ),
        ..ConfigMap::default()
    });
    objects.services.push(headless_service(
        cluster,
        Component::Etcd,
        name.clone(),
        [CLIENT, PEER, METRICS]
            .map(|(name, port)| service_port(name, port))
            .into(),
    ));
    objects.network_policies.push(network_policy(cluster, name.clone()));
    if cluster.spec.etcd.members > 1 {
        objects
            .disruption_budgets
            .push(disruption_budget(cluster, Component::Etcd, name));
    }
    objects
        .stateful_sets
        .push(stateful_set(cluster, image, defaults, replicas));
}

/// The URL of a member's client or peer port.
fn url(cluster: &ValidCluster, pod: &str, port: i32) -> String {
    let ValidCluster { namespace, .. } = cluster;
    format!("http://{pod}.{}.{namespace}.svc:{port}", cluster.etcd_name())
}

/// The members' client URLs, separated by commas.
pub(super) fn endpoints(cluster: &ValidCluster) -> String {
    let name = cluster.etcd_name();
    let urls: Vec<_> = (0..cluster.spec.etcd.members)
        .map(|ordinal| url(cluster, &format!("{name}-{ordinal}"), CLIENT.1))
        .collect();
    urls.join(",")
}

fn stateful_set(cluster: &ValidCluster, image: &str, defaults: &Defaults, replicas: i32) -> StatefulSet {
    let name = cluster.etcd_name();
    let mut template = pod_template(cluster, Component::Etcd, defaults, container(cluster, image));
    if let Some(pod) = template.spec.as_mut() {
        pod.init_containers = Some(vec![member(cluster)]);
        pod.volumes = Some(vec![Volume {
            name: STATE.to_owned(),
            config_map: Some(ConfigMapVolumeSource {
                name: name.clone(),
                ..ConfigMapVolumeSource::default()
            }),
            ..Volume::default()
        }]);
    }
    StatefulSet {
        metadata: meta(cluster, Component::Etcd, name.clone()),
        spec: Some(StatefulSetSpec {
            replicas: Some(replicas),
            service_name: Some(name),
            selector: label_selector(cluster, Component::Etcd),
            // One member alone never becomes ready: they must start together.
            pod_management_policy: Some("Parallel".to_owned()),
            // See `rolling`.
            update_strategy: Some(StatefulSetUpdateStrategy {
                type_: Some("OnDelete".to_owned()),
                ..StatefulSetUpdateStrategy::default()
            }),
            persistent_volume_claim_retention_policy: Some(retain_claims()),
            volume_claim_templates: Some(vec![claim_template(cluster, Component::Etcd)]),
            template,
            ..StatefulSetSpec::default()
        }),
        ..StatefulSet::default()
    }
}

fn container(cluster: &ValidCluster, image: &str) -> Container {
    let etcd = &cluster.spec.etcd;
    Container {
        name: "etcd".to_owned(),
        image: Some(image.to_owned()),
        image_pull_policy: Some(cluster.spec.image_pull_policy.clone()),
        command: Some(vec!["etcd".to_owned()]),
        args: Some(vec![format!("--config-file={CONFIG}")]),
        ports: Some(
            [CLIENT, PEER, METRICS]
                .map(|(name, port)| container_port(name, port))
                .into(),
        ),
        resources: Some(
            etcd.resources
                .clone()
                .unwrap_or_else(|| default_resources("100m", "256Mi")),
        ),
        volume_mounts: Some(vec![data_mount(DATA_DIR)]),
        security_context: Some(container_security()),
        termination_message_policy: Some(LAST_WORDS.to_owned()),
        // A member that missed much loads a snapshot first.
        startup_probe: Some(http_probe("/livez", METRICS.0, 2, 300, 5)),
        liveness_probe: Some(http_probe("/livez", METRICS.0, 10, 6, 10)),
        readiness_probe: Some(http_probe("/readyz", METRICS.0, 3, 3, 5)),
        ..Container::default()
    }
}

/// Settles how the member starts, see `etcd_member`.
fn member(cluster: &ValidCluster) -> Container {
    Container {
        name: "member".to_owned(),
        image: Some(cluster.image.clone()),
        image_pull_policy: Some(cluster.spec.image_pull_policy.clone()),
        command: Some(vec!["lazarette-operator".to_owned()]),
        args: Some(arguments(cluster)),
        env: Some(vec![env_from_field("POD_NAME", "metadata.name")]),
        resources: Some(default_resources("10m", "32Mi")),
        volume_mounts: Some(vec![
            data_mount(DATA_DIR),
            VolumeMount {
                name: STATE.to_owned(),
                mount_path: STATE_DIR.to_owned(),
                read_only: Some(true),
                ..VolumeMount::default()
            },
        ]),
        security_context: Some(container_security()),
        termination_message_policy: Some(LAST_WORDS.to_owned()),
        ..Container::default()
    }
}

fn arguments(cluster: &ValidCluster) -> Vec<String> {
    let name = cluster.etcd_name();
    let members: Vec<_> = (0..cluster.spec.etcd.members)
        .map(|ordinal| {
            let pod = format!("{name}-{ordinal}");
            format!("{pod}={}", url(cluster, &pod, PEER.1))
        })
        .collect();
    let pod = "$(POD_NAME)";
    let listen = |port| format!("http://0.0.0.0:{port}");
    [
        ("name", pod.to_owned()),
        ("peer-url", url(cluster, pod, PEER.1)),
        ("client-url", url(cluster, pod, CLIENT.1)),
        ("members", members.join(",")),
        ("endpoints", endpoints(cluster)),
        // The same after the StorageCluster was deleted and made anew on the old claims.
        ("token", format!("lazarette-{}-{}", cluster.namespace, cluster.name)),
        ("listen-client", listen(CLIENT.1)),
        ("listen-peer", listen(PEER.1)),
        ("listen-metrics", listen(METRICS.1)),
        // A folder of its own, as file systems put lost+found into the root.
        ("data-dir", format!("{DATA_DIR}/data")),
        ("config", CONFIG.to_owned()),
        ("state", format!("{STATE_DIR}/{STATE}")),
    ]
    .into_iter()
    .fold(vec!["etcd-member".to_owned()], |mut arguments, (flag, value)| {
        arguments.push(format!("--{flag}={value}"));
        arguments
    })
}

/// Where the network plugin enforces it, only storage nodes and members reach etcd.
fn network_policy(cluster: &ValidCluster, name: String) -> NetworkPolicy {
    let from = |component| NetworkPolicyPeer {
        pod_selector: Some(label_selector(cluster, component)),
        ..NetworkPolicyPeer::default()
    };
    let port = |port: i32| NetworkPolicyPort {
        port: Some(IntOrString::Int(port)),
        protocol: Some("TCP".to_owned()),
        ..NetworkPolicyPort::default()
    };
    let allow = |from: Option<Vec<NetworkPolicyPeer>>, to: i32| NetworkPolicyIngressRule {
        from,
        ports: Some(vec![port(to)]),
    };
    NetworkPolicy {
        metadata: meta(cluster, Component::Etcd, name),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(label_selector(cluster, Component::Etcd)),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(vec![
                // Members talk to the others as clients before they start.
                allow(Some(vec![from(Component::Storage), from(Component::Etcd)]), CLIENT.1),
                allow(Some(vec![from(Component::Etcd)]), PEER.1),
                allow(None, METRICS.1),
            ]),
            ..NetworkPolicySpec::default()
        }),
    }
}
