//! Brings the built objects into the cluster and removes those that are no longer wanted.

use super::ValidCluster;
use super::build::Objects;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolume, PersistentVolumeClaim, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client, Resource, ResourceExt};
use lazarette_api::{annotation, cluster_labels};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;
use std::fmt::Debug;

/// The field manager of everything that the operator writes.
pub const FIELD_MANAGER: &str = "lazarette-operator";

/// An object could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The API server refused or did not answer.
    #[error("{action} {kind} {name}: {source}")]
    Refused {
        /// `apply`, `delete` and so on.
        action: &'static str,
        /// The object's kind.
        kind: String,
        /// The object's name.
        name: String,
        /// What the API server said.
        #[source]
        source: Box<kube::Error>,
    },
    /// The name is taken by an object that is not of this storage cluster.
    #[error(
        "{kind} {name} exists and is not of this StorageCluster: delete it, or give the StorageCluster another name"
    )]
    Foreign {
        /// The object's kind.
        kind: String,
        /// The object's name.
        name: String,
    },
    /// The object is on its way out.
    #[error("{kind} {name} of a StorageCluster that was deleted is still there: it is being removed")]
    Leftover {
        /// The object's kind.
        kind: String,
        /// The object's name.
        name: String,
    },
}

/// What the API server made of the StatefulSets.
#[derive(Clone, Debug, Default)]
pub(super) struct Applied {
    /// With their status.
    pub stateful_sets: Vec<StatefulSet>,
}

/// Applies all objects, then deletes the cluster's objects of the same kinds that are not among
/// them. Does the same again without any effect.
pub(super) async fn apply(client: &Client, cluster: &ValidCluster, objects: &Objects) -> Result<Applied, ApplyError> {
    // A new field must be handled here.
    let Objects {
        service_accounts,
        config_maps,
        services,
        network_policies,
        disruption_budgets,
        stateful_sets,
        persistent_volumes,
    } = objects;
    for volume in persistent_volumes {
        create(client, volume).await?;
    }
    apply_all(client, cluster, service_accounts).await?;
    apply_all(client, cluster, config_maps).await?;
    apply_all(client, cluster, services).await?;
    apply_all(client, cluster, network_policies).await?;
    apply_all(client, cluster, disruption_budgets).await?;
    let stateful_sets = apply_all(client, cluster, stateful_sets).await?;

    delete_orphans::<StatefulSet>(client, cluster, &stateful_sets).await?;
    delete_orphans::<PodDisruptionBudget>(client, cluster, disruption_budgets).await?;
    delete_orphans::<NetworkPolicy>(client, cluster, network_policies).await?;
    delete_orphans::<ConfigMap>(client, cluster, config_maps).await?;
    delete_orphans::<Service>(client, cluster, services).await?;
    delete_orphans::<ServiceAccount>(client, cluster, service_accounts).await?;
    Ok(Applied { stateful_sets })
}

/// Objects that the operator makes within the cluster's namespace.
pub(super) trait Owned:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned
{
}

impl<K> Owned for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned
{
}

async fn apply_all<K: Owned>(client: &Client, cluster: &ValidCluster, objects: &[K]) -> Result<Vec<K>, ApplyError> {
    let api = Api::<K>::namespaced(client.clone(), &cluster.namespace);
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    let mut applied = Vec::with_capacity(objects.len());
    for object in objects {
        let name = object.name_any();
        let found = api.get_metadata_opt(&name).await;
        let found = found.map_err(|source| error::<K>("read", name.clone(), source))?;
        // To apply would make it ours, and later delete it with the cluster.
        if let Some(found) = found.filter(|object| !is_ours(&object.metadata, cluster)) {
            let kind = K::kind(&()).into_owned();
            return Err(if is_leftover(&found.metadata, cluster) {
                ApplyError::Leftover { kind, name }
            } else {
                ApplyError::Foreign { kind, name }
            });
        }
        let result = api.patch(&name, &parameters, &Patch::Apply(object)).await;
        applied.push(result.map_err(|source| error::<K>("apply", name, source))?);
    }
    Ok(applied)
}

fn is_ours(metadata: &ObjectMeta, cluster: &ValidCluster) -> bool {
    let mut owners = metadata.owner_references.iter().flatten();
    owners.any(|owner| owner.uid == cluster.uid)
}

/// Whether it is of a storage cluster of the same name, before ours; the garbage collector removes it.
fn is_leftover(metadata: &ObjectMeta, cluster: &ValidCluster) -> bool {
    let mut owners = metadata.owner_references.iter().flatten();
    owners.any(|owner| owner.kind == cluster.owner.kind && owner.name == cluster.name)
}

/// A PersistentVolume is written once: from then on it belongs to Kubernetes' volume controller.
async fn create(client: &Client, volume: &PersistentVolume) -> Result<(), ApplyError> {
    let api = Api::<PersistentVolume>::all(client.clone());
    let parameters = PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    };
    match api.create(&parameters, volume).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(source) => Err(error::<PersistentVolume>("create", volume.name_any(), source)),
    }
}

/// Lets a PersistentVolume bind to the next claim of the name that it names.
pub(super) async fn offer_again(client: &Client, name: &str) -> Result<(), ApplyError> {
    let api = Api::<PersistentVolume>::all(client.clone());
    let patch = serde_json::json!({"spec": {"claimRef": {"uid": null, "resourceVersion": null}}});
    let parameters = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    match api.patch(name, &parameters, &Patch::Merge(patch)).await {
        Ok(_) => Ok(()),
        Err(source) => Err(error::<PersistentVolume>("patch", name.to_owned(), source)),
    }
}

/// Notes on a claim that etcd has run on it or beside it.
pub(super) async fn mark_etcd_has_run(client: &Client, namespace: &str, claim: &str) -> Result<(), ApplyError> {
    let api = Api::<PersistentVolumeClaim>::namespaced(client.clone(), namespace);
    let patch = serde_json::json!({"metadata": {"annotations": {annotation::ETCD_HAS_RUN: "true"}}});
    let parameters = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    match api.patch_metadata(claim, &parameters, &Patch::Merge(patch)).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(source) => Err(error::<PersistentVolumeClaim>("patch", claim.to_owned(), source)),
    }
}

async fn delete_orphans<K: Owned>(client: &Client, cluster: &ValidCluster, wanted: &[K]) -> Result<(), ApplyError> {
    let api = Api::<K>::namespaced(client.clone(), &cluster.namespace);
    let wanted: BTreeSet<String> = wanted.iter().map(ResourceExt::name_any).collect();
    let selector = cluster_labels(&cluster.name);
    let found = api
        .list_metadata(&ListParams::default().labels(&selector))
        .await
        .map_err(|source| error::<K>("list", selector.clone(), source))?;
    for object in found.items {
        let name = object.name_any();
        let ours = is_ours(&object.metadata, cluster);
        if wanted.contains(&name) || !ours || object.metadata.deletion_timestamp.is_some() {
            continue;
        }
        let parameters = DeleteParams::background().preconditions(Preconditions {
            uid: object.uid(),
            resource_version: None,
        });
        match api.delete(&name, &parameters).await {
            Ok(_) => tracing::info!(kind = %K::kind(&()), name, "deleted an object that is no longer wanted"),
            Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => {}
            Err(source) => return Err(error::<K>("delete", name, source)),
        }
    }
    Ok(())
}

fn error<K: Resource<DynamicType = ()>>(action: &'static str, name: String, source: kube::Error) -> ApplyError {
    ApplyError::Refused {
        action,
        kind: K::kind(&()).into_owned(),
        name,
        source: Box::new(source),
    }
}
