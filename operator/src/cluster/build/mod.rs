//! The objects that a storage cluster consists of, as a pure function of the spec and what the
//! cluster said in the dereference step.

mod etcd;
mod host_path;
mod storage;

pub(super) use host_path::persistent_volume_selector;
pub use host_path::{persistent_volume_name, pinned_node};

use super::dereference::Dereferenced;
use super::{Defaults, Etcd, ValidCluster};
use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetPersistentVolumeClaimRetentionPolicy};
use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, ConfigMap, Container, ContainerPort, EnvVar, EnvVarSource, HTTPGetAction,
    ObjectFieldSelector, PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimSpec, PodAffinityTerm,
    PodAntiAffinity, PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements, SeccompProfile,
    SecurityContext, Service, ServiceAccount, ServicePort, ServiceSpec, VolumeMount, VolumeResourceRequirements,
};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use lazarette_api::{Placement, StorageSource, component_labels, label, selector};
use std::collections::BTreeMap;

/// The user and group of processes that need not be root.
const NON_ROOT: i64 = 65532;

/// Name of the volume with a pod's data; claims are called `data-POD`.
const DATA: &str = "data";

/// A container that ends with an error leaves the end of its log in the pod's status, from where it
/// gets into the cluster's conditions.
const LAST_WORDS: &str = "FallbackToLogsOnError";

/// Everything that is to exist for a storage cluster.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Objects {
    /// Without rights; so that pods do not get those of `default`.
    pub service_accounts: Vec<ServiceAccount>,
    /// What etcd members read before they start.
    pub config_maps: Vec<ConfigMap>,
    /// Of etcd and the storage nodes.
    pub services: Vec<Service>,
    /// Who may talk to etcd.
    pub network_policies: Vec<NetworkPolicy>,
    /// One for each kind of pod that survives the loss of one.
    pub disruption_budgets: Vec<PodDisruptionBudget>,
    /// Of etcd and the storage nodes.
    pub stateful_sets: Vec<StatefulSet>,
    /// Tie pods to the nodes on which their folders are. Never changed or deleted once made.
    pub persistent_volumes: Vec<PersistentVolume>,
}

/// Builds all objects. `storage_replicas` is how many storage nodes there shall be for now, which is
/// more than the spec asks for while some hand over what they hold.
pub fn build(cluster: &ValidCluster, known: &Dereferenced, defaults: &Defaults, storage_replicas: i32) -> Objects {
    let ValidCluster { spec, .. } = cluster;
    let etcd_replicas = match (spec.stopped, known.storage_pods) {
        (false, _) => spec.etcd.members,
        // The storage nodes end first: they hand over what they own through etcd.
        (true, 0) => 0,
        (true, _) => spec.etcd.members,
    };
    let storage_replicas = if spec.stopped { 0 } else { storage_replicas };
    let mut objects = Objects {
        service_accounts: vec![service_account(cluster)],
        ..Objects::default()
    };
    if let Etcd::Own { image, .. } = &cluster.etcd {
        etcd::add(cluster, image, known, defaults, etcd_replicas, &mut objects);
    }
    storage::add(cluster, defaults, storage_replicas, &mut objects);
    objects.persistent_volumes = host_path::persistent_volumes(cluster, known);
    objects
}

/// The part of a cluster that a pod belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    /// An etcd member.
    Etcd,
    /// A storage node.
    Storage,
}

impl Component {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Etcd, Self::Storage];

    /// The value of the component label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::Storage => "storage-node",
        }
    }

    /// The end of the StatefulSet's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::Storage => "storage",
        }
    }

    /// The field that describes it.
    pub fn field(self) -> &'static str {
        match self {
            Self::Etcd => "spec.etcd",
            Self::Storage => "spec.storageNodes",
        }
    }

    /// Number of pods while the cluster is not stopped.
    pub fn pods(self, cluster: &ValidCluster) -> i32 {
        match (self, &cluster.etcd) {
            (Self::Etcd, Etcd::Own { .. }) => cluster.spec.etcd.members,
            (Self::Etcd, Etcd::External(_)) => 0,
            (Self::Storage, _) => cluster.spec.storage_nodes.count,
        }
    }

    /// Where its pods keep their data.
    pub fn storage(self, cluster: &ValidCluster) -> &StorageSource {
        match (self, &cluster.etcd) {
            (Self::Etcd, Etcd::Own { storage, .. }) => storage,
            // Without an etcd of its own nobody asks for that of its members.
            (Self::Etcd, Etcd::External(_)) | (Self::Storage, _) => &cluster.spec.storage_nodes.storage,
        }
    }

    /// Where its pods may run.
    pub fn placement(self, cluster: &ValidCluster) -> &Placement {
        match self {
            Self::Etcd => &cluster.spec.etcd.placement,
            Self::Storage => &cluster.spec.storage_nodes.placement,
        }
    }

    /// The name of a pod's claim.
    pub fn claim(self, cluster: &ValidCluster, ordinal: i32) -> String {
        format!("{DATA}-{}-{}-{ordinal}", cluster.name, self.as_str())
    }
}

fn meta(cluster: &ValidCluster, component: Component, name: String) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(cluster.namespace.clone()),
        labels: Some(component_labels(&cluster.name, component.label())),
        owner_references: Some(vec![cluster.owner.clone()]),
        ..ObjectMeta::default()
    }
}

fn service_account_name(cluster: &ValidCluster) -> String {
    format!("{}-storage", cluster.name)
}

fn service_account(cluster: &ValidCluster) -> ServiceAccount {
    ServiceAccount {
        metadata: meta(cluster, Component::Storage, service_account_name(cluster)),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

fn disruption_budget(cluster: &ValidCluster, component: Component, name: String) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: meta(cluster, component, name),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(label_selector(cluster, component)),
            ..PodDisruptionBudgetSpec::default()
        }),
        ..PodDisruptionBudget::default()
    }
}

fn label_selector(cluster: &ValidCluster, component: Component) -> LabelSelector {
    LabelSelector {
        match_labels: Some(selector(&cluster.name, component.label())),
        ..LabelSelector::default()
    }
}

/// A Service without an address of its own, whose DNS names lead to single pods.
fn headless_service(cluster: &ValidCluster, component: Component, name: String, ports: Vec<ServicePort>) -> Service {
    Service {
        metadata: meta(cluster, component, name),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            selector: Some(selector(&cluster.name, component.label())),
            // Pods must find each other before they can become ready.
            publish_not_ready_addresses: Some(true),
            ports: Some(ports),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

fn service_port(name: &str, port: i32) -> ServicePort {
    ServicePort {
        name: Some(name.to_owned()),
        port,
        protocol: Some("TCP".to_owned()),
        target_port: Some(IntOrString::String(name.to_owned())),
        ..ServicePort::default()
    }
}

fn container_port(name: &str, port: i32) -> ContainerPort {
    ContainerPort {
        name: Some(name.to_owned()),
        container_port: port,
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    }
}

fn http_probe(path: &str, port: &str, period: i32, failures: i32, timeout: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String(port.to_owned()),
            scheme: Some("HTTP".to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        failure_threshold: Some(failures),
        timeout_seconds: Some(timeout),
        ..Probe::default()
    }
}

fn env_from_field(name: &str, field: &str) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                api_version: Some("v1".to_owned()),
                field_path: field.to_owned(),
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    }
}

fn data_mount(path: &str) -> VolumeMount {
    VolumeMount {
        name: DATA.to_owned(),
        mount_path: path.to_owned(),
        ..VolumeMount::default()
    }
}

/// A container may do nothing but what a process without privileges can.
fn container_security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        privileged: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities {
            drop: Some(vec!["ALL".to_owned()]),
            add: None,
        }),
        ..SecurityContext::default()
    }
}

/// Claims are handed to a group by the kubelet; folders of a node belong to root and stay so.
fn pod_security(storage: &StorageSource) -> PodSecurityContext {
    let seccomp_profile = Some(SeccompProfile {
        type_: "RuntimeDefault".to_owned(),
        localhost_profile: None,
    });
    if storage.host_path.is_some() {
        return PodSecurityContext {
            run_as_user: Some(0),
            run_as_group: Some(0),
            seccomp_profile,
            ..PodSecurityContext::default()
        };
    }
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(NON_ROOT),
        run_as_group: Some(NON_ROOT),
        fs_group: Some(NON_ROOT),
        // Otherwise each start of a pod would walk over all files.
        fs_group_change_policy: Some("OnRootMismatch".to_owned()),
        seccomp_profile,
        ..PodSecurityContext::default()
    }
}

/// What a pod is given where the spec says nothing: enough to be counted by the scheduler and not
/// to be the first that is killed when memory runs out.
fn default_resources(cpu: &str, memory: &str) -> ResourceRequirements {
    ResourceRequirements {
        requests: Some(
            [("cpu", cpu), ("memory", memory)]
                .map(|(name, amount)| (name.to_owned(), Quantity(amount.to_owned())))
                .into(),
        ),
        ..ResourceRequirements::default()
    }
}

/// The user's rules, and that two pods of a kind never share a node: a node's loss shall take one.
fn affinity(cluster: &ValidCluster, component: Component) -> Affinity {
    let mut affinity = component.placement(cluster).affinity.clone().unwrap_or_default();
    let anti = affinity.pod_anti_affinity.get_or_insert_with(PodAntiAffinity::default);
    let required = &mut anti.required_during_scheduling_ignored_during_execution;
    required.get_or_insert_with(Vec::new).push(PodAffinityTerm {
        label_selector: Some(label_selector(cluster, component)),
        topology_key: "kubernetes.io/hostname".to_owned(),
        ..PodAffinityTerm::default()
    });
    affinity
}

/// The claim template of a StatefulSet. With host paths, the claims bind to the PersistentVolumes
/// that the operator makes for them.
fn claim_template(cluster: &ValidCluster, component: Component) -> PersistentVolumeClaim {
    let labels = component_labels(&cluster.name, component.label());
    let Some(template) = &component.storage(cluster).volume_claim_template else {
        return host_path::claim_template(labels);
    };
    let metadata = template.metadata.clone().unwrap_or_default();
    let mut spec = template.spec.clone();
    spec.access_modes
        .get_or_insert_with(|| vec!["ReadWriteOnce".to_owned()]);
    claim(merged(metadata.labels, labels), metadata.annotations, spec)
}

fn claim(
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    spec: PersistentVolumeClaimSpec,
) -> PersistentVolumeClaim {
    PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some(DATA.to_owned()),
            labels: Some(labels),
            annotations: Some(annotations).filter(|a| !a.is_empty()),
            ..ObjectMeta::default()
        },
        spec: Some(spec),
        ..PersistentVolumeClaim::default()
    }
}

/// `ours` win.
fn merged(mut theirs: BTreeMap<String, String>, ours: BTreeMap<String, String>) -> BTreeMap<String, String> {
    theirs.extend(ours);
    theirs
}

fn size_request(size: &str) -> VolumeResourceRequirements {
    VolumeResourceRequirements {
        requests: Some([("storage".to_owned(), Quantity(size.to_owned()))].into()),
        ..VolumeResourceRequirements::default()
    }
}

/// The claims outlive the StatefulSet: deleting a StorageCluster deletes no data.
fn retain_claims() -> StatefulSetPersistentVolumeClaimRetentionPolicy {
    StatefulSetPersistentVolumeClaimRetentionPolicy {
        when_deleted: Some("Retain".to_owned()),
        when_scaled: Some("Retain".to_owned()),
    }
}

/// A pod with one container, as far as it is the same for both components.
fn pod_template(
    cluster: &ValidCluster,
    component: Component,
    defaults: &Defaults,
    container: Container,
) -> PodTemplateSpec {
    let spec = &cluster.spec;
    let placement = component.placement(cluster);
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(component_labels(&cluster.name, component.label())),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            service_account_name: Some(service_account_name(cluster)),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            image_pull_secrets: Some(spec.image_pull_secrets.clone()).filter(|s| !s.is_empty()),
            node_selector: Some(placement.node_selector.clone()).filter(|s| !s.is_empty()),
            tolerations: Some(placement.tolerations.clone()).filter(|t| !t.is_empty()),
            affinity: Some(affinity(cluster, component)),
            priority_class_name: placement
                .priority_class_name
                .clone()
                .or_else(|| defaults.priority_class.clone()),
            security_context: Some(pod_security(component.storage(cluster))),
            termination_grace_period_seconds: Some(30),
            containers: vec![container],
            ..PodSpec::default()
        }),
    }
}

/// The label selector of the pods of a component, as a string.
pub fn pod_selector(cluster: &str, component: Component) -> String {
    format!(
        "{}=lazarette,{}={cluster},{}={}",
        label::NAME,
        label::INSTANCE,
        label::COMPONENT,
        component.label()
    )
}

#[cfg(test)]
mod tests;
