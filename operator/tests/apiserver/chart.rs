//! The chart, with the real helm.

use crate::control_plane::program;
use crate::world::{PATIENCE, RELEASE_NAMESPACE, World, rendered};
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client};
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../charts/lazarette")
}

fn helm(arguments: &[&str], settings: &[&str]) -> Output {
    let mut command = Command::new(program("LAZARETTE_HELM", "helm"));
    command.args(arguments).arg(folder());
    for setting in settings {
        command.args(["--set", setting]);
    }
    command.output().unwrap()
}

fn template(settings: &[&str]) -> Output {
    let arguments = ["template", "lazarette", "--namespace", RELEASE_NAMESPACE];
    helm(&arguments, settings)
}

/// The chart's objects.
pub(crate) fn render(settings: &[&str]) -> Vec<Value> {
    let output = template(settings);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "helm template: {errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    serde_yaml::Deserializer::from_str(&text)
        .map(|document| serde::Deserialize::deserialize(document).unwrap())
        .filter(|document: &Value| !document.is_null())
        .collect()
}

async fn apply(client: &Client, object: &Value, dry_run: bool) -> Result<(), String> {
    let text = |path: &str| {
        object
            .pointer(path)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let (group, version) = match text("/apiVersion").split_once('/') {
        Some((group, version)) => (group.to_owned(), version.to_owned()),
        None => (String::new(), text("/apiVersion")),
    };
    let kind = text("/kind");
    let plural = match kind.as_str() {
        "StorageClass" => "storageclasses".to_owned(),
        "PriorityClass" => "priorityclasses".to_owned(),
        kind => format!("{}s", kind.to_lowercase()),
    };
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(&group, &version, &kind), &plural);
    let name = text("/metadata/name");
    let api: Api<DynamicObject> = match text("/metadata/namespace").as_str() {
        "" => Api::all_with(client.clone(), &resource),
        namespace => Api::namespaced_with(client.clone(), namespace, &resource),
    };
    let mut parameters = PatchParams::apply("test").force();
    parameters.dry_run = dry_run;
    match api.patch(&name, &parameters, &Patch::Apply(object)).await {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("{kind} {name}: {error}")),
    }
}

/// Gives the service accounts of the chart their rights.
pub(crate) async fn install_rights(client: &Client) {
    for object in rendered().await {
        let group = object["apiVersion"].as_str().unwrap();
        if group.starts_with("rbac.authorization.k8s.io/") || object["kind"] == "ServiceAccount" {
            apply(client, object, false).await.unwrap();
        }
    }
}

#[tokio::test]
async fn every_object_is_accepted_by_the_api_server() {
    let world = World::new().await;
    let objects = render(&["storageCluster.create=true"]);
    let kinds: Vec<_> = objects.iter().map(|object| object["kind"].as_str().unwrap()).collect();
    for kind in [
        "Deployment",
        "DaemonSet",
        "CSIDriver",
        "StorageClass",
        "StorageCluster",
        "PriorityClass",
    ] {
        assert!(kinds.contains(&kind), "no {kind} among {kinds:?}");
    }
    let mut refused = Vec::new();
    for object in &objects {
        let applied = tokio::time::timeout(PATIENCE, apply(&world.client, object, true)).await;
        refused.extend(applied.expect("no answer").err());
    }
    assert!(refused.is_empty(), "{refused:#?}");
}

#[test]
fn lint_is_clean() {
    let output = helm(&["lint", "--strict"], &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
}

#[test]
fn unknown_and_impossible_values_are_refused() {
    for (setting, field) in [
        ("operator.replica=2", "replica"),
        ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
        ("kubeletDir=var/lib/kubelet", "/kubeletDir"),
        (
            "storageClass.parameters.chunkSize=3Mi",
            "/storageClass/parameters/chunkSize",
        ),
        ("storageClass.parameters.copys=3", "copys"),
        ("storageClass.parameters.copies=9", "/storageClass/parameters/copies"),
        ("mount.admin=7411", "/mount/admin"),
    ] {
        let output = template(&[setting]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{setting} was accepted");
        assert!(errors.contains(field), "{setting}: {errors}");
    }
}

/// Pods that mount for others are privileged; all others must not be.
#[tokio::test]
async fn only_the_node_parts_are_privileged() {
    let mut seen = 0;
    for object in rendered().await {
        let Some(pod) = object.pointer("/spec/template/spec") else {
            continue;
        };
        let daemon = object["kind"] == "DaemonSet";
        for container in pod["containers"].as_array().unwrap() {
            seen += 1;
            let security = &container["securityContext"];
            assert_eq!(security["readOnlyRootFilesystem"], true);
            assert_eq!(security["privileged"] == true, daemon, "{container}");
            if !daemon {
                assert_eq!(security["allowPrivilegeEscalation"], false);
                assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
            }
        }
    }
    assert_eq!(seen, 6);
}
