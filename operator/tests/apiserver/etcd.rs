//! etcd members on real etcds: their configuration, a lost disk, more members.

use crate::control_plane::{free_port, program};
use crate::world::{PATIENCE, sample};
use clap::Parser;
use etcd_client::{Client, ConnectOptions};
use k8s_openapi::api::core::v1::{Container, Probe};
use lazarette_api::StorageCluster;
use lazarette_operator::cluster::{Defaults, Dereferenced, build, validate};
use lazarette_operator::{EtcdMember, EtcdMemberError, prepare};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Subcommand,
}

#[derive(clap::Subcommand)]
enum Subcommand {
    EtcdMember(EtcdMember),
}

/// A pod of etcd: its containers as the operator makes them, on folders and ports of this machine.
struct Pod {
    member: EtcdMember,
    etcd: Container,
    ports: [u16; 3],
    process: Option<Running>,
}

/// The pods of one cluster, whose members are processes.
struct Pods {
    folder: tempfile::TempDir,
    /// Client, peer and metrics ports of each member.
    ports: Vec<[u16; 3]>,
    pods: Vec<Pod>,
}

impl Pods {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("state"), "new").unwrap();
        let mut pods = Self {
            folder,
            ports: (0..3).map(|_| [free_port(), free_port(), free_port()]).collect(),
            pods: Vec::new(),
        };
        pods.scale(1);
        pods
    }

    /// What the operator notes once the cluster has run.
    fn has_run(&self) {
        fs::write(self.folder.path().join("state"), "existing").unwrap();
    }

    fn data(&self, ordinal: usize) -> std::path::PathBuf {
        self.folder.path().join(ordinal.to_string())
    }

    /// Makes the pods of a cluster of so many members; processes go on.
    fn scale(&mut self, members: usize) {
        let mut object = sample("demo");
        object["metadata"]["namespace"] = json!("ns");
        object["metadata"]["uid"] = json!("4711");
        object["spec"]["etcd"]["members"] = json!(members);
        let cluster: StorageCluster = serde_json::from_value(object).unwrap();
        let defaults = Defaults {
            image: Some("x".to_owned()),
            etcd_image: Some("x".to_owned()),
            priority_class: None,
        };
        let valid = validate(&cluster, &defaults).unwrap();
        let objects = build(&valid, &Dereferenced::default(), &defaults, 3);
        let set = &objects.stateful_sets[0];
        let pod = set.spec.as_ref().unwrap().template.spec.as_ref().unwrap();
        let init = &pod.init_containers.as_ref().unwrap()[0];
        let mut processes: Vec<_> = self.pods.drain(..).map(|pod| pod.process).collect();
        processes.resize_with(members.max(processes.len()), || None);
        for (ordinal, process) in processes.into_iter().enumerate() {
            let here = |text: &String| {
                let mut text = text.replace("$(POD_NAME)", &format!("demo-etcd-{ordinal}"));
                for (other, ports) in self.ports.iter().enumerate() {
                    for (inside, outside) in [2379, 2380].into_iter().zip(ports) {
                        let name = format!("demo-etcd-{other}.demo-etcd.ns.svc:{inside}");
                        text = text.replace(&name, &format!("127.0.0.1:{outside}"));
                    }
                }
                for (inside, outside) in [2379, 2380, 2381].into_iter().zip(self.ports[ordinal]) {
                    text = text.replace(&format!("0.0.0.0:{inside}"), &format!("127.0.0.1:{outside}"));
                }
                text.replace("/var/lib/etcd", &self.data(ordinal).display().to_string())
                    .replace("/etc/lazarette/etcd", &self.folder.path().display().to_string())
            };
            fs::create_dir_all(self.data(ordinal)).unwrap();
            let arguments = init.args.iter().flatten().map(here);
            let Cli {
                command: Subcommand::EtcdMember(member),
            } = Cli::parse_from(init.command.iter().flatten().cloned().chain(arguments));
            let mut etcd = pod.containers[0].clone();
            etcd.args = Some(etcd.args.iter().flatten().map(here).collect());
            self.pods.push(Pod {
                member,
                etcd,
                ports: self.ports[ordinal],
                process,
            });
        }
    }

    /// Starts a pod as the kubelet would: the init container, then etcd.
    async fn start(&mut self, ordinal: usize) {
        let log = self.folder.path().join(format!("{ordinal}.log"));
        let pod = &mut self.pods[ordinal];
        prepare(&pod.member).await.unwrap();
        assert_eq!(pod.etcd.command.as_deref(), Some(&["etcd".to_owned()][..]));
        let etcd = Command::new(program("LAZARETTE_ETCD", "etcd"))
            .args(pod.etcd.args.as_ref().unwrap())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(log).unwrap())
            .spawn()
            .unwrap();
        pod.process = Some(Running(etcd));
    }

    async fn answers(&mut self, ordinal: usize, probe: fn(&Container) -> &Option<Probe>) {
        let log = self.folder.path().join(format!("{ordinal}.log"));
        let log = || fs::read_to_string(&log).unwrap_or_default();
        let pod = &mut self.pods[ordinal];
        let probe = probe(&pod.etcd).as_ref().unwrap().http_get.as_ref().unwrap();
        let path = probe.path.as_deref().unwrap();
        let started = Instant::now();
        loop {
            let answer = get(pod.ports[2], path).await;
            if answer.as_ref().is_ok_and(|line| line.contains(" 200 ")) {
                return;
            }
            let ended = pod.process.as_mut().unwrap().0.try_wait().unwrap();
            assert!(ended.is_none(), "etcd ended: {ended:?}: {}", log());
            assert!(started.elapsed() < PATIENCE, "{path}: {answer:?}: {}", log());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn ready(&mut self, ordinal: usize) {
        self.answers(ordinal, |etcd| &etcd.readiness_probe).await;
    }

    /// A client of one member alone.
    async fn client(&self, ordinal: usize) -> Client {
        let url = self.pods[ordinal].member.client_url.clone();
        let options = ConnectOptions::new().with_timeout(Duration::from_secs(10));
        Client::connect([url], Some(options)).await.unwrap()
    }

    /// Writes through one member; the others may have to agree on a leader first.
    async fn put(&self, ordinal: usize, key: &str) {
        let started = Instant::now();
        while let Err(error) = self.client(ordinal).await.put(key, "1", None).await {
            assert!(started.elapsed() < PATIENCE, "{key}: {error}");
        }
    }

    /// Names and ids of the members, as one of them knows them.
    async fn members(&self, asked: usize) -> Vec<(String, u64)> {
        let list = self.client(asked).await.member_list().await.unwrap();
        let mut members: Vec<_> = list.members().iter().map(|m| (m.name().to_owned(), m.id())).collect();
        members.sort();
        members
    }

    async fn three() -> Self {
        let mut pods = Self::new();
        pods.scale(3);
        for ordinal in 0..3 {
            pods.start(ordinal).await;
        }
        for ordinal in 0..3 {
            pods.ready(ordinal).await;
        }
        pods.has_run();
        pods
    }
}

/// The status line of the answer to a GET.
async fn get(port: u16, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

fn wipe(folder: &Path) {
    fs::remove_dir_all(folder).unwrap();
    fs::create_dir(folder).unwrap();
}

const NAMES: [&str; 3] = ["demo-etcd-0", "demo-etcd-1", "demo-etcd-2"];

#[tokio::test]
async fn a_member_that_lost_its_disk_gets_everything_from_the_others() {
    let mut pods = Pods::three().await;
    pods.put(0, "kept").await;
    let before = pods.members(0).await;
    assert_eq!(before.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), NAMES);

    // A restart with the disk in place changes no membership.
    pods.pods[2].process = None;
    pods.start(2).await;
    pods.ready(2).await;
    assert_eq!(pods.members(0).await, before);

    pods.pods[2].process = None;
    wipe(&pods.data(2));
    pods.put(0, "meanwhile").await;
    pods.start(2).await;
    pods.ready(2).await;
    let after = pods.members(2).await;
    assert_eq!(after[..2], before[..2]);
    assert_eq!(after[2].0, "demo-etcd-2");
    assert_ne!(after[2].1, before[2].1, "it came back under the old identity");
    for key in ["kept", "meanwhile"] {
        let found = pods.client(2).await.get(key, None).await.unwrap();
        assert_eq!(found.count(), 1, "{key} is missing");
    }
    // It counts again: another one may go.
    pods.pods[0].process = None;
    pods.put(2, "after").await;
}

#[tokio::test]
async fn without_a_majority_an_empty_member_neither_joins_nor_begins() {
    let mut pods = Pods::three().await;
    pods.pods[1].process = None;
    pods.pods[2].process = None;
    wipe(&pods.data(2));
    pods.pods[2].member.patience = Duration::from_secs(1);
    // One still answers, but cannot decide anything alone.
    let error = prepare(&pods.pods[2].member).await.unwrap_err();
    assert!(matches!(error, EtcdMemberError::Join { .. }), "{error}");
    // Nor does it begin a cluster of its own when nobody answers.
    pods.pods[0].process = None;
    let error = prepare(&pods.pods[2].member).await.unwrap_err();
    assert!(
        error.to_string().contains("a majority of the members must run"),
        "{error}"
    );
    assert!(!pods.pods[2].member.config.exists());
}

#[tokio::test]
async fn one_member_answers_the_probes_and_becomes_three() {
    let mut pods = Pods::new();
    pods.start(0).await;
    pods.answers(0, |etcd| &etcd.startup_probe).await;
    pods.answers(0, |etcd| &etcd.liveness_probe).await;
    pods.ready(0).await;
    pods.has_run();
    pods.put(0, "kept").await;

    pods.scale(3);
    // A first start that ends after joining, before etcd: the next one goes on from there.
    prepare(&pods.pods[1].member).await.unwrap();
    for ordinal in 1..3 {
        pods.start(ordinal).await;
        pods.ready(ordinal).await;
    }
    let members = pods.members(2).await;
    assert_eq!(members.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), NAMES);
    let found = pods.client(2).await.get("kept", None).await.unwrap();
    assert_eq!(found.count(), 1);
    pods.pods[0].process = None;
    pods.put(1, "after").await;
}

#[tokio::test]
async fn the_only_member_with_an_empty_disk_does_not_start() {
    let mut pods = Pods::new();
    pods.start(0).await;
    pods.ready(0).await;
    pods.has_run();
    pods.pods[0].process = None;
    wipe(&pods.data(0));
    let error = prepare(&pods.pods[0].member).await.unwrap_err();
    assert!(error.to_string().contains("bring the disk back"), "{error}");
}
