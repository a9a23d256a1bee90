use super::*;
use k8s_openapi::api::apps::v1::{StatefulSetSpec, StatefulSetUpdateStrategy};
use k8s_openapi::api::core::v1::{
    KeyToPath, ProjectedVolumeSource, SecretProjection, TopologySpreadConstraint, Volume, VolumeProjection,
};
use lazarette_api::{ADMIN_PORT, EtcdTls, STORAGE_PORT, SecretKey};

const DATA_DIR: &str = "/var/lib/lazarette";
const GRPC: &str = "grpc";
const ADMIN: &str = "admin";
const HOSTNAME: &str = "kubernetes.io/hostname";
/// Certificates for an external etcd: the volume and where it is mounted.
const CERTIFICATES: &str = "etcd-certificates";
const CERTIFICATES_DIR: &str = "/etc/lazarette/etcd";

/// Adds the storage nodes' objects.
pub(super) fn add(cluster: &ValidCluster, defaults: &Defaults, replicas: i32, objects: &mut Objects) {
    let name = cluster.storage_name();
    objects.services.push(headless_service(
        cluster,
        Component::Storage,
        headless_name(cluster),
        vec![service_port(GRPC, STORAGE_PORT), service_port(ADMIN, ADMIN_PORT)],
    ));
    // Clients start here and then go to single nodes by the addresses in the map.
    objects.services.push(Service {
        metadata: meta(cluster, Component::Storage, name.clone()),
        spec: Some(ServiceSpec {
            selector: Some(selector(&cluster.name, Component::Storage.label())),
            ports: Some(vec![service_port(GRPC, STORAGE_PORT)]),
            type_: Some("ClusterIP".to_owned()),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    });
    objects
        .disruption_budgets
        .push(disruption_budget(cluster, Component::Storage, name.clone()));
    objects.stateful_sets.push(StatefulSet {
        metadata: meta(cluster, Component::Storage, name),
        spec: Some(StatefulSetSpec {
            replicas: Some(replicas),
            service_name: Some(headless_name(cluster)),
            selector: label_selector(cluster, Component::Storage),
            pod_management_policy: Some("Parallel".to_owned()),
            // See `rolling`.
            update_strategy: Some(StatefulSetUpdateStrategy {
                type_: Some("OnDelete".to_owned()),
                ..StatefulSetUpdateStrategy::default()
            }),
            persistent_volume_claim_retention_policy: Some(retain_claims()),
            volume_claim_templates: Some(vec![claim_template(cluster, Component::Storage)]),
            template: template(cluster, defaults),
            ..StatefulSetSpec::default()
        }),
        ..StatefulSet::default()
    });
}

fn headless_name(cluster: &ValidCluster) -> String {
    format!("{}-storage-nodes", cluster.name)
}

fn template(cluster: &ValidCluster, defaults: &Defaults) -> PodTemplateSpec {
    let mut template = pod_template(cluster, Component::Storage, defaults, container(cluster));
    let label = &cluster.spec.storage_nodes.failure_domain_label;
    if let Some(pod) = template.spec.as_mut().filter(|_| label != HOSTNAME) {
        pod.topology_spread_constraints = Some(vec![TopologySpreadConstraint {
            max_skew: 1,
            topology_key: label.clone(),
            when_unsatisfiable: "ScheduleAnyway".to_owned(),
            label_selector: Some(label_selector(cluster, Component::Storage)),
            ..TopologySpreadConstraint::default()
        }]);
    }
    if let (Some(pod), Some(tls)) = (template.spec.as_mut(), tls(cluster)) {
        pod.volumes = Some(vec![certificates(tls)]);
    }
    template
}

fn tls(cluster: &ValidCluster) -> Option<&EtcdTls> {
    match &cluster.etcd {
        Etcd::Own { .. } => None,
        Etcd::External(external) => external.tls.as_ref(),
    }
}

/// Flag of the storage node, name of the file, and where its text is.
fn certificate_files(tls: &EtcdTls) -> Vec<(&'static str, &'static str, &SecretKey)> {
    // A new field must be handled here.
    let EtcdTls {
        ca,
        certificate,
        private_key,
    } = tls;
    [
        ("etcd-ca", "ca.crt", Some(ca)),
        ("etcd-cert", "tls.crt", certificate.as_ref()),
        ("etcd-key", "tls.key", private_key.as_ref()),
    ]
    .into_iter()
    .filter_map(|(flag, file, secret)| Some((flag, file, secret?)))
    .collect()
}

fn certificates(tls: &EtcdTls) -> Volume {
    let source = |(_, file, secret): (&str, &str, &SecretKey)| VolumeProjection {
        secret: Some(SecretProjection {
            name: secret.secret_name.clone(),
            items: Some(vec![KeyToPath {
                key: secret.key.clone(),
                path: file.to_owned(),
                mode: None,
            }]),
            optional: None,
        }),
        ..VolumeProjection::default()
    };
    Volume {
        name: CERTIFICATES.to_owned(),
        projected: Some(ProjectedVolumeSource {
            sources: Some(certificate_files(tls).into_iter().map(source).collect()),
            default_mode: Some(0o440),
        }),
        ..Volume::default()
    }
}

fn container(cluster: &ValidCluster) -> Container {
    let nodes = &cluster.spec.storage_nodes;
    let failure_domain = if nodes.failure_domain_label == HOSTNAME {
        "spec.nodeName".to_owned()
    } else {
        // The API server copies these labels from the node when the pod is bound.
        format!("metadata.labels['{}']", nodes.failure_domain_label)
    };
    Container {
        name: "storage-node".to_owned(),
        image: Some(cluster.image.clone()),
        image_pull_policy: Some(cluster.spec.image_pull_policy.clone()),
        command: Some(vec!["lazarette-node".to_owned()]),
        args: Some(arguments(cluster)),
        env: Some(vec![
            env_from_field("POD_NAME", "metadata.name"),
            env_from_field("POD_IP", "status.podIP"),
            env_from_field("FAILURE_DOMAIN", &failure_domain),
        ]),
        ports: Some(vec![
            container_port(GRPC, STORAGE_PORT),
            container_port(ADMIN, ADMIN_PORT),
        ]),
        resources: Some(
            nodes
                .resources
                .clone()
                .unwrap_or_else(|| default_resources("100m", "256Mi")),
        ),
        volume_mounts: Some(mounts(cluster)),
        security_context: Some(container_security()),
        termination_message_policy: Some(LAST_WORDS.to_owned()),
        startup_probe: Some(http_probe("/livez", ADMIN, 2, 150, 5)),
        liveness_probe: Some(http_probe("/livez", ADMIN, 10, 6, 5)),
        readiness_probe: Some(http_probe("/readyz", ADMIN, 2, 2, 2)),
        ..Container::default()
    }
}

fn mounts(cluster: &ValidCluster) -> Vec<VolumeMount> {
    let certificates = tls(cluster).map(|_| VolumeMount {
        name: CERTIFICATES.to_owned(),
        mount_path: CERTIFICATES_DIR.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    });
    [data_mount(DATA_DIR)].into_iter().chain(certificates).collect()
}

fn arguments(cluster: &ValidCluster) -> Vec<String> {
    let (prefix, etcd) = match &cluster.etcd {
        Etcd::Own { .. } => (cluster.name.clone(), etcd::endpoints(cluster)),
        // Others of the same name may share it.
        Etcd::External(external) => (
            format!("{}/{}", cluster.namespace, cluster.name),
            external.endpoints.join(","),
        ),
    };
    let repair = &cluster.repair;
    let certificates = tls(cluster).map(certificate_files).unwrap_or_default();
    let certificates = certificates
        .into_iter()
        .map(|(flag, file, _)| (flag, format!("{CERTIFICATES_DIR}/{file}")));
    [
        ("cluster", prefix),
        ("node", "$(POD_NAME)".to_owned()),
        ("etcd", etcd),
        ("data-dir", DATA_DIR.to_owned()),
        ("listen", format!("0.0.0.0:{STORAGE_PORT}")),
        ("advertise", format!("$(POD_IP):{STORAGE_PORT}")),
        ("admin", format!("0.0.0.0:{ADMIN_PORT}")),
        ("failure-domain", "$(FAILURE_DOMAIN)".to_owned()),
        ("copies", cluster.spec.replication.copies.to_string()),
        ("ack", cluster.spec.replication.ack.to_string()),
        ("replace-after", repair.replace_after.clone()),
        ("repair-rate", repair.rate.to_string()),
        ("scrub-rate", repair.scrub_rate.to_string()),
        ("scrub-every", repair.scrub_every.clone()),
    ]
    .into_iter()
    .chain(certificates)
    .fold(vec!["serve".to_owned()], |mut arguments, (flag, value)| {
        arguments.push(format!("--{flag}={value}"));
        arguments
    })
}
