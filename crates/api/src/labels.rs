use std::collections::BTreeMap;

/// Labels on the objects of a cluster.
pub mod label {
    /// The application: `lazarette`.
    pub const NAME: &str = "app.kubernetes.io/name";
    /// The storage cluster's name.
    pub const INSTANCE: &str = "app.kubernetes.io/instance";
    /// The part: `etcd` or `storage-node`.
    pub const COMPONENT: &str = "app.kubernetes.io/component";
    /// Who made the object: `lazarette-operator`.
    pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
    /// The storage cluster's namespace, on objects without a namespace of their own.
    pub const NAMESPACE: &str = "lazarette.io/namespace";
}

/// Annotations.
pub mod annotation {
    /// `"true"` on the PersistentVolumeClaims of etcd members once their cluster has run: from then
    /// on a member with an empty disk has lost it, and must not begin a cluster of its own.
    pub const ETCD_HAS_RUN: &str = "lazarette.io/etcd-has-run";

    /// `"true"` on a storage cluster allows its deletion although volumes exist or the storage
    /// nodes cannot be asked. Data stays on the PersistentVolumeClaims.
    pub const FORCE_DELETE: &str = "lazarette.io/force-delete";
}

/// The labels by which a component's pods are selected. They never change.
pub fn selector(cluster: &str, component: &str) -> BTreeMap<String, String> {
    [
        (label::NAME, "lazarette"),
        (label::INSTANCE, cluster),
        (label::COMPONENT, component),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

/// All labels of a component's objects.
pub fn component_labels(cluster: &str, component: &str) -> BTreeMap<String, String> {
    let mut labels = selector(cluster, component);
    labels.insert(label::MANAGED_BY.to_owned(), "lazarette-operator".to_owned());
    labels
}

/// The label selector for everything that the operator made for a cluster, as a string.
pub fn cluster_labels(cluster: &str) -> String {
    format!(
        "{}=lazarette-operator,{}=lazarette,{}={cluster}",
        label::MANAGED_BY,
        label::NAME,
        label::INSTANCE
    )
}
