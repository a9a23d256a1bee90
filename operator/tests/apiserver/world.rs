//! What a test works with: a namespace of its own on the shared API server.

use crate::chart;
use crate::control_plane::ControlPlane;
use crate::storage::FakeStorage;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Api, Client, ResourceExt};
use lazarette_api::{ConditionType, StorageCluster, condition};
use lazarette_operator::cluster::{Defaults, reconcile};
use lazarette_operator::{Context, Metrics, run};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{OnceCell, oneshot};

/// How long any state may take to come; generous, as machines differ.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// The operator's namespace, in which the chart is installed.
pub(crate) const RELEASE_NAMESPACE: &str = "lazarette";

pub(crate) struct World {
    pub(crate) plane: Arc<ControlPlane>,
    pub(crate) client: Client,
    pub(crate) namespace: String,
    pub(crate) storage: FakeStorage,
}

/// A storage cluster that the schema accepts.
pub(crate) fn sample(name: &str) -> Value {
    let claim = json!({"volumeClaimTemplate": {"spec": {
        "storageClassName": "",
        "resources": {"requests": {"storage": "10Gi"}},
    }}});
    json!({
        "apiVersion": "lazarette.io/v1alpha1",
        "kind": "StorageCluster",
        "metadata": {"name": name},
        "spec": {"etcd": {"storage": claim}, "storageNodes": {"storage": claim}},
    })
}

impl World {
    pub(crate) async fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let plane = ControlPlane::shared().await;
        let client = plane.admin();
        prepare(&client).await;
        let namespace = format!("test-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        create_namespace(&client, &namespace).await;
        Self {
            plane,
            client,
            namespace,
            storage: FakeStorage::start().await,
        }
    }

    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub(crate) fn clusters(&self) -> Api<StorageCluster> {
        self.api()
    }

    /// The operator's context: the rights of the chart's service account, and our storage nodes.
    pub(crate) fn context(&self) -> Arc<Context> {
        let client = self.plane.service_account(RELEASE_NAMESPACE, "lazarette-operator");
        let defaults = Defaults {
            image: Some("localhost/lazarette:test".to_owned()),
            etcd_image: Some("localhost/etcd:test".to_owned()),
            priority_class: None,
        };
        Arc::new(Context::new(client, defaults, Some(self.storage.address.clone())))
    }

    pub(crate) async fn create(&self, cluster: &Value) -> Result<StorageCluster, String> {
        let cluster: kube::api::DynamicObject = serde_json::from_value(cluster.clone()).unwrap();
        let kind = kube::api::ApiResource::erase::<StorageCluster>(&());
        let api = Api::<kube::api::DynamicObject>::namespaced_with(self.client.clone(), &self.namespace, &kind);
        match api.create(&PostParams::default(), &cluster).await {
            Ok(created) => Ok(self.clusters().get(&created.name_any()).await.unwrap()),
            Err(kube::Error::Api(status)) => Err(status.message.clone()),
            Err(error) => panic!("create: {error}"),
        }
    }

    pub(crate) async fn patch(&self, name: &str, patch: Value) -> Result<StorageCluster, String> {
        let patched = self
            .clusters()
            .patch(name, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        match patched {
            Ok(cluster) => Ok(cluster),
            Err(kube::Error::Api(status)) => Err(status.message.clone()),
            Err(error) => panic!("patch: {error}"),
        }
    }

    /// Reconciles once, as the controller would.
    pub(crate) async fn reconcile(&self, context: &Arc<Context>, name: &str) -> Result<(), String> {
        let cluster = self.clusters().get(name).await.unwrap();
        let result = reconcile(Arc::new(cluster), Arc::clone(context)).await;
        result.map(|_| ()).map_err(|error| error.to_string())
    }

    /// The condition as `Status:Reason`, and its message.
    pub(crate) async fn condition(&self, name: &str, kind: ConditionType) -> (String, String) {
        let cluster = self.clusters().get(name).await.unwrap();
        let conditions = cluster.status.unwrap_or_default().conditions;
        condition(&conditions, kind).map_or_else(Default::default, |c| {
            (format!("{}:{}", c.status, c.reason), c.message.clone())
        })
    }

    /// Waits until a condition reads `Status:Reason`.
    pub(crate) async fn wait_condition(&self, name: &str, kind: ConditionType, wanted: &str) {
        let started = Instant::now();
        loop {
            let (found, message) = self.condition(name, kind).await;
            if found == wanted {
                return;
            }
            assert!(
                started.elapsed() < PATIENCE,
                "{kind:?} is {found} ({message}), not {wanted}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub(crate) async fn wait_deleted(&self, name: &str, uid: &str) {
        let gone = await_condition(self.clusters(), name, conditions::is_deleted(uid));
        let waited = tokio::time::timeout(PATIENCE, gone).await;
        waited.expect("the StorageCluster is still there").unwrap();
    }

    /// Names and resource versions of everything that the operator may have written.
    pub(crate) async fn versions(&self) -> BTreeMap<String, String> {
        use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
        use k8s_openapi::api::networking::v1::NetworkPolicy;
        use k8s_openapi::api::policy::v1::PodDisruptionBudget;
        let mut versions = BTreeMap::new();
        macro_rules! add {
            ($($kind:ty),*) => {$(
                for object in self.api::<$kind>().list_metadata(&ListParams::default()).await.unwrap() {
                    let kind = <$kind as kube::Resource>::kind(&());
                    let version = object.resource_version().unwrap();
                    versions.insert(format!("{kind}/{}", object.name_any()), version);
                }
            )*};
        }
        add!(
            StorageCluster,
            StatefulSet,
            ConfigMap,
            Service,
            ServiceAccount,
            NetworkPolicy,
            PodDisruptionBudget
        );
        versions
    }

    /// The sample on the nodes that [`World::create_nodes`] makes.
    pub(crate) fn on_own_nodes(&self) -> Value {
        let mut cluster = sample("demo");
        for role in ["etcd", "storageNodes"] {
            cluster["spec"][role]["nodeSelector"] = json!({"test": self.namespace});
        }
        cluster
    }

    /// Makes ready Kubernetes nodes for this test alone: they have the label `test` with the
    /// namespace's name.
    pub(crate) async fn create_nodes(&self, count: u32) -> Vec<String> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let names: Vec<_> = (1..=count).map(|n| format!("{}-node-{n}", self.namespace)).collect();
        for name in &names {
            let node: Node = serde_json::from_value(json!({"metadata": {
                "name": name,
                "labels": {"kubernetes.io/hostname": name, "test": self.namespace},
            }}))
            .unwrap();
            nodes.create(&PostParams::default(), &node).await.unwrap();
            let status = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
            nodes
                .patch_status(name, &PatchParams::default(), &Patch::Merge(status))
                .await
                .unwrap();
        }
        names
    }

    /// Plays the StatefulSet controller: all pods are there and ready.
    pub(crate) async fn make_ready(&self, name: &str) {
        for component in ["etcd", "storage"] {
            self.set_ready(&format!("{name}-{component}"), 3).await;
        }
    }

    pub(crate) async fn set_ready(&self, name: &str, ready: i32) {
        let sets = self.api::<StatefulSet>();
        let set = sets.get(name).await.unwrap();
        let replicas = set.spec.as_ref().unwrap().replicas;
        let status = json!({"status": {
            "observedGeneration": set.metadata.generation,
            "replicas": replicas, "readyReplicas": ready, "updatedReplicas": replicas,
            "currentRevision": "r1", "updateRevision": "r1",
        }});
        sets.patch_status(name, &PatchParams::default(), &Patch::Merge(status))
            .await
            .unwrap();
    }

    /// Plays the StatefulSet controller: makes a pod of a component, created a moment or long ago.
    pub(crate) async fn make_pod(&self, component: &str, ordinal: u32, revision: &str, ready: bool) {
        let pods = self.api::<Pod>();
        let label = if component == "storage" {
            "storage-node"
        } else {
            component
        };
        let name = format!("demo-{component}-{ordinal}");
        let mut labels = lazarette_api::component_labels("demo", label);
        labels.insert("controller-revision-hash".to_owned(), revision.to_owned());
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": labels},
            "spec": {"containers": [{"name": "main", "image": "x"}], "terminationGracePeriodSeconds": 0},
        }))
        .unwrap();
        pods.create(&PostParams::default(), &pod).await.unwrap();
        let status = if ready { "True" } else { "False" };
        let status = json!({"status": {"conditions": [{"type": "Ready", "status": status}]}});
        pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
            .await
            .unwrap();
    }

    pub(crate) async fn pod_names(&self) -> Vec<String> {
        let pods = self.api::<Pod>().list_metadata(&ListParams::default()).await.unwrap();
        pods.iter().map(ResourceExt::name_any).collect()
    }

    /// Reconciles a new StorageCluster `demo`: the first time adds the finalizer, the second the objects.
    pub(crate) async fn start(&self, cluster: &Value) -> Arc<Context> {
        self.create(cluster).await.unwrap();
        let context = self.context();
        for _ in 0..2 {
            self.reconcile(&context, "demo").await.unwrap();
        }
        context
    }

    pub(crate) async fn replicas(&self, name: &str) -> Option<i32> {
        self.api::<StatefulSet>().get(name).await.unwrap().spec?.replicas
    }

    /// The events of a storage cluster as `Type Reason`, in any order.
    pub(crate) async fn events(&self, name: &str) -> Vec<String> {
        let events = self.api::<Event>().list(&ListParams::default()).await.unwrap();
        events
            .into_iter()
            .filter(|event| event.regarding.as_ref().and_then(|r| r.name.as_deref()) == Some(name))
            .map(|event| {
                format!(
                    "{} {}",
                    event.type_.unwrap_or_default(),
                    event.reason.unwrap_or_default()
                )
            })
            .collect()
    }

    /// Runs the whole control loop.
    pub(crate) fn operate(&self) -> Operator {
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async move {
            let _ = stopped.await;
        };
        let shared = futures::FutureExt::shared(stopped);
        let task = tokio::spawn(run(
            self.context(),
            Some(self.namespace.clone()),
            Metrics::default(),
            shared,
        ));
        Operator { stop, task }
    }
}

/// A running control loop.
pub(crate) struct Operator {
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

impl Operator {
    /// Ends it as SIGTERM would.
    pub(crate) async fn stop(self) {
        let _ = self.stop.send(());
        let ended = tokio::time::timeout(PATIENCE, self.task).await;
        ended.expect("the control loop did not end").unwrap();
    }
}

async fn create_namespace(client: &Client, name: &str) {
    let namespace = Namespace {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            ..ObjectMeta::default()
        },
        ..Namespace::default()
    };
    let created = Api::all(client.clone())
        .create(&PostParams::default(), &namespace)
        .await;
    match created {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        Err(error) => panic!("create namespace: {error}"),
    }
}

/// Once for each API server: the definitions and the chart's rights.
async fn prepare(client: &Client) {
    static ONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _one = ONE.lock().await;
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    for crd in lazarette_api::crds() {
        let name = crd.name_any();
        let parameters = PatchParams::apply("test").force();
        crds.patch(&name, &parameters, &Patch::Apply(&crd)).await.unwrap();
        let established = await_condition(crds.clone(), &name, conditions::is_crd_established());
        let waited = tokio::time::timeout(PATIENCE, established).await;
        waited.expect("the definition is not established").unwrap();
    }
    create_namespace(client, RELEASE_NAMESPACE).await;
    chart::install_rights(client).await;
}

/// The chart's manifests, rendered once.
pub(crate) async fn rendered() -> &'static [Value] {
    static RENDERED: OnceCell<Vec<Value>> = OnceCell::const_new();
    RENDERED.get_or_init(async || chart::render(&[])).await
}
