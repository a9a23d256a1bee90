//! The lab itself: is it a Kubernetes, do its faults fault, does it leave nothing behind?
//!
//! Needs root. A lab that runs already is reused and kept; the teardown test has one of its own.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{Api, DeleteParams, ListParams};
use lazarette_e2e::lab::{Lab, LabConfig};
use lazarette_e2e::{Deadline, wait_for};

const NAMESPACE: &str = "lab-test";

const MANIFESTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: lab-test}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: web, namespace: lab-test}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: web
          image: localhost/busybox:1
          imagePullPolicy: IfNotPresent
          command: [sh, -c, 'hostname > /tmp/index.html; echo started; exec httpd -f -p 8080 -h /tmp']
          ports: [{containerPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: lab-test}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: disk, namespace: lab-test}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: lab-disk
  resources: {requests: {storage: 1Gi}}
---
# Mounts something below the kubelet's folder, as a CSI node plugin does …
apiVersion: v1
kind: Pod
metadata: {name: mounter, namespace: lab-test}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 0
  containers:
    - name: mounter
      image: localhost/busybox:1
      imagePullPolicy: IfNotPresent
      command: [sleep, infinity]
      securityContext: {privileged: true}
      volumeMounts: [{name: kubelet, mountPath: /var/lib/kubelet, mountPropagation: Bidirectional}]
  volumes:
    - {name: kubelet, hostPath: {path: /var/lib/kubelet}}
---
# … and this one sees it.
apiVersion: v1
kind: Pod
metadata: {name: observer, namespace: lab-test}
spec:
  nodeSelector: {kubernetes.io/hostname: node1}
  terminationGracePeriodSeconds: 0
  containers:
    - name: observer
      image: localhost/busybox:1
      imagePullPolicy: IfNotPresent
      command: [sleep, infinity]
      volumeMounts:
        - {name: kubelet, mountPath: /host, mountPropagation: HostToContainer}
        - {name: disk, mountPath: /disk}
  volumes:
    - {name: kubelet, hostPath: {path: /var/lib/kubelet}}
    - {name: disk, persistentVolumeClaim: {claimName: disk}}
"#;

/// The pods of the test, by name, with node and address.
async fn running_pods(lab: &Lab, count: usize) -> Result<Vec<(String, String, String)>> {
    let pods = Api::<Pod>::namespaced(lab.client().await?, NAMESPACE);
    wait_for(
        Deadline::secs(60).logs(lab.config().logs()),
        "the test's pods",
        || async {
            let mut found = Vec::new();
            for pod in pods.list(&ListParams::default()).await? {
                let name = pod.metadata.name.context("name")?;
                let status = pod.status.context("status")?;
                let ready = status
                    .container_statuses
                    .iter()
                    .flatten()
                    .all(|container| container.ready);
                ensure!(
                    ready && status.phase.as_deref() == Some("Running"),
                    "{name}: {:?}",
                    status.phase
                );
                let node = pod.spec.and_then(|spec| spec.node_name).context("node")?;
                found.push((name, node, status.pod_ip.context("address")?));
            }
            ensure!(found.len() == count, "{} of {count} pods", found.len());
            Ok(Some(found))
        },
    )
    .await
}

/// Asks a web server; busybox's own wget dies resolving names.
fn fetch(address: &str, port: u16) -> String {
    format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {address} {port} | tail -n 1")
}

async fn remove_namespace(lab: &Lab) -> Result<()> {
    let namespaces = Api::<Namespace>::all(lab.client().await?);
    if namespaces.get_opt(NAMESPACE).await?.is_some() {
        // May be going already.
        namespaces.delete(NAMESPACE, &DeleteParams::default()).await.ok();
    }
    wait_for(Deadline::secs(60), "the test's namespace to go", || async {
        Ok(namespaces.get_opt(NAMESPACE).await?.is_none().then_some(()))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_a_kubernetes_and_its_faults_fault() -> Result<()> {
    let lab = Lab::up(LabConfig::default().progress(|line| eprintln!("{line}"))).await?;
    let nodes = lab.config().node_names();
    lab.wait_nodes(&nodes, true, Duration::from_secs(60)).await?;
    remove_namespace(&lab).await?;
    lab.offer_disks().await?;
    lab.apply(MANIFESTS).await?;
    let pods = running_pods(&lab, nodes.len() + 2).await?;
    let web: Vec<_> = pods.iter().filter(|(name, ..)| name.starts_with("web-")).collect();

    // A pod on every node, and each talks to each.
    for node in &nodes {
        ensure!(web.iter().any(|(_, on, _)| on == node), "no pod on {node}");
    }
    for (from, ..) in &web {
        for (to, _, address) in &web {
            let answer = lab.exec(NAMESPACE, from, &fetch(address, 8080)).await?;
            ensure!(answer.trim() == to, "{from} asked {to} and got {answer:?}");
        }
    }

    // Names and Services. The web pods' resolver configuration is what the kubelet wrote.
    let (first, ..) = web.first().context("a pod")?;
    let name = format!("web.{NAMESPACE}.svc.cluster.local");
    let lookup = lab.exec(NAMESPACE, first, &format!("nslookup {name}")).await?;
    let service = lab
        .kubectl([
            "get",
            "service",
            "-n",
            NAMESPACE,
            "web",
            "-o",
            "jsonpath={.spec.clusterIP}",
        ])
        .run()
        .await?;
    ensure!(lookup.contains(&service), "{name} should be {service}: {lookup}");
    let answer = lab.exec(NAMESPACE, first, &fetch(&service, 80)).await?;
    ensure!(
        web.iter().any(|(name, ..)| name == answer.trim()),
        "the Service answered {answer:?}"
    );
    let answer = lab
        .on_node("node2", "sh")?
        .args(["-c", &fetch(&service, 80)])
        .run()
        .await;
    ensure!(answer.is_ok(), "a node itself reaches no Service: {answer:?}");

    // Logs, devices, propagation, disks.
    let log = lab.kubectl(["logs", "-n", NAMESPACE, first]).run().await?;
    ensure!(log.trim() == "started", "{log:?}");
    let mount = "test -c /dev/fuse && mkdir -p /var/lib/kubelet/lz-test && mount -t tmpfs lz /var/lib/kubelet/lz-test \
                 && echo seen > /var/lib/kubelet/lz-test/file";
    lab.exec(NAMESPACE, "mounter", mount).await?;
    let seen = lab
        .exec(NAMESPACE, "observer", "cat /host/lz-test/file; echo data > /disk/file")
        .await?;
    ensure!(seen.trim() == "seen", "{seen:?}");
    lab.exec(NAMESPACE, "mounter", "umount /var/lib/kubelet/lz-test")
        .await?;

    // A killed process is seen by nobody but the kubelet, which restarts it.
    lab.kill(NAMESPACE, first, "httpd").await?;
    let restarts = [
        "get",
        "pod",
        "-n",
        NAMESPACE,
        first,
        "-o",
        "jsonpath={.status.containerStatuses[0].restartCount}",
    ];
    wait_for(Deadline::secs(60), "the container to restart", || async {
        let count = lab.kubectl(restarts).run().await?;
        ensure!(count == "1", "restarts: {count}");
        Ok(Some(()))
    })
    .await?;
    running_pods(&lab, nodes.len() + 2).await?;

    // A cable is pulled and plugged in again.
    let last = nodes.last().context("a node")?.clone();
    let other = web
        .iter()
        .find(|(_, node, _)| *node == last)
        .context("a pod on the last node")?;
    lab.cut(&last).await?;
    let answer = lab.exec(NAMESPACE, first, &fetch(&other.2, 8080)).await;
    ensure!(
        answer.as_deref().is_ok_and(|text| text.trim().is_empty()) || answer.is_err(),
        "{answer:?} got through"
    );
    lab.wait_nodes(std::slice::from_ref(&last), false, Duration::from_secs(60))
        .await?;
    lab.heal(&last).await?;
    lab.wait_nodes(std::slice::from_ref(&last), true, Duration::from_secs(60))
        .await?;
    let answer = lab.exec(NAMESPACE, first, &fetch(&other.2, 8080)).await?;
    ensure!(answer.trim() == other.0, "after healing: {answer:?}");

    // A node loses power and comes back with its disk.
    lab.stop_node("node1").await?;
    lab.wait_nodes(&["node1".to_owned()], false, Duration::from_secs(60))
        .await?;
    lab.start_node("node1").await?;
    // The API server still shows the pods as they were before; ask the node.
    let deadline = Deadline::secs(90).logs(lab.config().logs());
    wait_for(deadline, "node1's pods to be back with their disk", || async {
        let data = lab.exec(NAMESPACE, "observer", "cat /disk/file").await?;
        ensure!(data.trim() == "data", "{data:?}");
        Ok(Some(()))
    })
    .await?;

    remove_namespace(&lab).await?;
    lab.offer_disks().await
}

#[tokio::test(flavor = "multi_thread")]
async fn it_survives_interruptions_and_leaves_nothing() -> Result<()> {
    let config = LabConfig::numbered(9).nodes(1);
    Lab::down(&config).await?;
    // Wherever the start is interrupted, the next one works.
    for millis in [150, 700, 2500] {
        let up = Lab::up(config.clone());
        let done = tokio::time::timeout(Duration::from_millis(millis), up).await;
        ensure!(done.is_err(), "the lab cannot start within {millis} ms");
    }
    let lab = Lab::up(config.clone()).await?;
    lab.wait_nodes(&["node1".to_owned()], true, Duration::from_secs(60))
        .await?;

    // Up on a running lab keeps it.
    let before = Lab::status(&config).await?;
    let started = Instant::now();
    Lab::up(config.clone()).await?;
    ensure!(
        started.elapsed() < Duration::from_secs(20),
        "a running lab should be found quickly"
    );
    let after = Lab::status(&config).await?;
    ensure!(
        before.daemons == after.daemons,
        "{:?} became {:?}",
        before.daemons,
        after.daemons
    );

    // An interrupted end is continued by the next.
    let down = tokio::time::timeout(Duration::from_millis(60), Lab::down(&config)).await;
    drop(down);
    Lab::down(&config).await?;
    let left = Lab::leftovers(&config)?;
    ensure!(left.is_empty(), "left behind: {left:?}");
    Lab::down(&config).await
}
