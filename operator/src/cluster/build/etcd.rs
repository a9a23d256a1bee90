use super::*;
use k8s_openapi::api::apps::v1::StatefulSetSpec;
use k8s_openapi::api::networking::v1::{
    NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};

const CLIENT: (&str, i32) = ("client", 2379);
const PEER: (&str, i32) = ("peer", 2380);
const METRICS: (&str, i32) = ("metrics", 2381);

/// Adds etcd's objects.
pub(super) fn add(cluster: &ValidCluster, defaults: &Defaults, replicas: i32, objects: &mut Objects) {
    let name = cluster.etcd_name();
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
    objects.stateful_sets.push(stateful_set(cluster, defaults, replicas));
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

fn stateful_set(cluster: &ValidCluster, defaults: &Defaults, replicas: i32) -> StatefulSet {
    let name = cluster.etcd_name();
    StatefulSet {
        metadata: meta(cluster, Component::Etcd, name.clone()),
        spec: Some(StatefulSetSpec {
            replicas: Some(replicas),
            service_name: Some(name),
            selector: label_selector(cluster, Component::Etcd),
            // One member alone never becomes ready: they must start together.
            pod_management_policy: Some("Parallel".to_owned()),
            persistent_volume_claim_retention_policy: Some(retain_claims()),
            volume_claim_templates: Some(vec![claim_template(cluster, Component::Etcd)]),
            template: pod_template(cluster, Component::Etcd, defaults, container(cluster)),
            ..StatefulSetSpec::default()
        }),
        ..StatefulSet::default()
    }
}

fn container(cluster: &ValidCluster) -> Container {
    let etcd = &cluster.spec.etcd;
    Container {
        name: "etcd".to_owned(),
        image: Some(cluster.etcd_image.clone()),
        image_pull_policy: Some(cluster.spec.image_pull_policy.clone()),
        command: Some(vec!["etcd".to_owned()]),
        args: Some(arguments(cluster)),
        env: Some(vec![env_from_field("POD_NAME", "metadata.name")]),
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
        volume_mounts: Some(vec![data_mount("/var/lib/etcd")]),
        security_context: Some(container_security()),
        // A member that missed much loads a snapshot first.
        startup_probe: Some(http_probe("/livez", METRICS.0, 2, 300, 5)),
        liveness_probe: Some(http_probe("/livez", METRICS.0, 10, 6, 10)),
        readiness_probe: Some(http_probe("/readyz", METRICS.0, 3, 3, 5)),
        ..Container::default()
    }
}

fn arguments(cluster: &ValidCluster) -> Vec<String> {
    let name = cluster.etcd_name();
    let initial: Vec<_> = (0..cluster.spec.etcd.members)
        .map(|ordinal| {
            let pod = format!("{name}-{ordinal}");
            format!("{pod}={}", url(cluster, &pod, PEER.1))
        })
        .collect();
    let pod = "$(POD_NAME)";
    vec![
        format!("--name={pod}"),
        // A folder of its own, as file systems put lost+found into the root.
        "--data-dir=/var/lib/etcd/data".to_owned(),
        format!("--listen-client-urls=http://0.0.0.0:{}", CLIENT.1),
        format!("--listen-peer-urls=http://0.0.0.0:{}", PEER.1),
        format!("--listen-metrics-urls=http://0.0.0.0:{}", METRICS.1),
        format!("--advertise-client-urls={}", url(cluster, pod, CLIENT.1)),
        format!("--initial-advertise-peer-urls={}", url(cluster, pod, PEER.1)),
        format!("--initial-cluster={}", initial.join(",")),
        // The same after the StorageCluster was deleted and made anew on the old claims.
        format!(
            "--initial-cluster-token=lazarette-{}-{}",
            cluster.namespace, cluster.name
        ),
        "--initial-cluster-state=new".to_owned(),
        format!("--quota-backend-bytes={}", 8_u64 << 30),
        // The journal is a stream of puts and deletes; its history is of no use.
        "--auto-compaction-mode=periodic".to_owned(),
        "--auto-compaction-retention=1m".to_owned(),
        // Journal records are large: 10,000 of them in memory would be over 1 GB.
        "--snapshot-count=2000".to_owned(),
        "--snapshot-catchup-entries=1000".to_owned(),
        "--max-request-bytes=4194304".to_owned(),
        "--max-txn-ops=1024".to_owned(),
        "--log-level=warn".to_owned(),
    ]
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
                allow(Some(vec![from(Component::Storage)]), CLIENT.1),
                allow(Some(vec![from(Component::Etcd)]), PEER.1),
                allow(None, METRICS.1),
            ]),
            ..NetworkPolicySpec::default()
        }),
    }
}
