//! The arguments that the operator gives to etcd, given to a real etcd.

use crate::control_plane::{free_port, program};
use crate::world::{PATIENCE, sample};
use lazarette_api::StorageCluster;
use lazarette_operator::cluster::{Defaults, Dereferenced, build, validate};
use serde_json::json;
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

/// The status line of the answer to a GET.
async fn get(port: u16, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn etcd_takes_its_arguments_and_answers_the_probes() {
    let mut object = sample("demo");
    object["metadata"]["namespace"] = json!("ns");
    object["metadata"]["uid"] = json!("4711");
    object["spec"]["etcd"]["members"] = json!(1);
    let cluster: StorageCluster = serde_json::from_value(object).unwrap();
    let defaults = Defaults {
        image: Some("x".to_owned()),
        etcd_image: Some("x".to_owned()),
        priority_class: None,
    };
    let valid = validate(&cluster, &defaults).unwrap();
    let objects = build(&valid, &Dereferenced::default(), &defaults);
    let set = &objects.stateful_sets[0];
    let pod = set.spec.as_ref().unwrap().template.spec.as_ref().unwrap();
    let container = &pod.containers[0];
    assert_eq!(container.command.as_deref(), Some(&["etcd".to_owned()][..]));

    let folder = tempfile::tempdir().unwrap();
    let ports = [2379, 2380, 2381].map(|inside| (inside, free_port()));
    let arguments = container.args.as_ref().unwrap().iter().map(|argument| {
        let mut argument = argument
            .replace("$(POD_NAME)", "demo-etcd-0")
            .replace("demo-etcd-0.demo-etcd.ns.svc", "127.0.0.1")
            .replace("0.0.0.0", "127.0.0.1")
            .replace("/var/lib/etcd", &folder.path().display().to_string());
        for (inside, outside) in ports {
            argument = argument.replace(&format!(":{inside}"), &format!(":{outside}"));
        }
        argument
    });
    let etcd = Command::new(program("LAZARETTE_ETCD", "etcd"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut etcd = Running(etcd);
    let probes = [
        &container.liveness_probe,
        &container.readiness_probe,
        &container.startup_probe,
    ];
    for probe in probes {
        let path = probe.as_ref().unwrap().http_get.as_ref().unwrap().path.clone().unwrap();
        let started = Instant::now();
        loop {
            let answer = get(ports[2].1, &path).await;
            if answer.as_ref().is_ok_and(|line| line.contains(" 200 ")) {
                break;
            }
            let ended = etcd.0.try_wait().unwrap();
            assert!(ended.is_none(), "etcd ended: {ended:?}");
            assert!(started.elapsed() < PATIENCE, "{path}: {answer:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}
