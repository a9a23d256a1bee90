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

/// A second release by another name, so that it does not meet what the other tests installed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn helm_installs_and_uninstalls_it() {
    let world = World::new().await;
    let flags = world.plane.helm_flags();
    let run = |arguments: &[&str]| {
        let home = tempfile::tempdir().unwrap();
        let output = Command::new(program("LAZARETTE_HELM", "helm"))
            .args(arguments)
            .args(&flags)
            .args(["--namespace", &world.namespace])
            .envs(["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"].map(|v| (v, home.path())))
            .env_remove("KUBECONFIG")
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "helm {arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    };
    let chart = folder().display().to_string();
    let install = [
        "install",
        "other",
        &chart,
        "--set",
        "storageCluster.create=true,storageClass.name=other",
    ];
    let notes = tokio::task::block_in_place(|| run(&install));
    assert!(notes.contains("The StorageCluster lazarette starts now"), "{notes}");
    assert!(world.clusters().get_opt("lazarette").await.unwrap().is_some());

    tokio::task::block_in_place(|| run(&["uninstall", "other"]));
    let deployments = world.api::<k8s_openapi::api::apps::v1::Deployment>();
    assert!(deployments.list(&Default::default()).await.unwrap().items.is_empty());
    // Volumes may be on it.
    assert!(world.clusters().get_opt("lazarette").await.unwrap().is_some());
}

#[test]
fn the_definitions_are_in_the_chart() {
    let output = helm(&["show", "crds"], &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    for crd in lazarette_api::render().unwrap().values() {
        let body = crd.split_once("---\n").unwrap().1;
        assert!(text.contains(body.trim()), "{}", &text[..text.len().min(500)]);
    }
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

#[tokio::test]
async fn no_right_is_a_wildcard() {
    let mut roles = 0;
    for object in rendered().await {
        let Some(rules) = object["rules"].as_array() else {
            continue;
        };
        roles += 1;
        for rule in rules {
            for field in ["apiGroups", "resources", "verbs"] {
                let values = rule[field].as_array().unwrap();
                assert!(!values.is_empty() && !values.contains(&"*".into()), "{rule}");
            }
        }
    }
    assert_eq!(roles, 4);
}
