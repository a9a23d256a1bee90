//! The driver's processes: sockets, registration with the kubelet, readiness, restarts.
#![allow(clippy::unwrap_used, clippy::panic)]

mod stand_in;

use hyper_util::rt::TokioIo;
use lazarette_proto::csi::identity_client::IdentityClient;
use lazarette_proto::csi::{GetPluginInfoRequest, ProbeRequest};
use lazarette_proto::registration::registration_client::RegistrationClient;
use lazarette_proto::registration::{InfoRequest, RegistrationStatus};
use rustix::process::{Pid, Signal, kill_process};
use stand_in::{FakeMountDaemon, GENEROUS, Place, Process, driver, eventually};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tonic::transport::{Channel, Endpoint};

/// Connects as the kubelet does: its gRPC library makes the authority from the socket's path, and
/// escapes it.
async fn kubelet(socket: &Path) -> Channel {
    let authority = socket.to_str().unwrap().replace('/', "%2F");
    let path = socket.to_owned();
    Endpoint::try_from(format!("http://{authority}"))
        .expect("the authority must be one that HTTP/2 libraries accept")
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
        .unwrap()
}

async fn local(socket: &Path) -> Channel {
    let path = socket.to_owned();
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
        .unwrap()
}

async fn http(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

struct Node {
    process: Process,
    csi: PathBuf,
    registration: PathBuf,
    port: u16,
}

async fn node(place: &Place) -> Node {
    let csi = place.path("plugins/csi.lazarette.io/csi.sock");
    let registration = place.path("plugins_registry/csi.lazarette.io@reg.sock");
    let port = free_port();
    let process = driver(&[
        "node",
        "--csi-socket",
        csi.to_str().unwrap(),
        "--kubelet-csi-socket",
        "/as/the/kubelet/sees/it.sock",
        "--kubelet-dir",
        &place.text(""),
        "--node",
        "node-1",
        "--mount-socket",
        &place.text("mount.sock"),
        "--admin",
        &format!("127.0.0.1:{port}"),
    ]);
    let node = Node {
        process,
        csi,
        registration,
        port,
    };
    // A stale socket may be there, so connect.
    eventually("listening", || {
        std::os::unix::net::UnixStream::connect(&node.registration).is_ok()
    })
    .await;
    node
}

async fn until_ready(port: u16, wanted: bool) {
    let start = Instant::now();
    while http(port, "/readyz").await.starts_with("HTTP/1.1 200") != wanted {
        assert!(start.elapsed() < GENEROUS, "ready never became {wanted}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_kubelet_registers_the_node() {
    let place = Place::new();
    let daemon = FakeMountDaemon::default();
    let serving = daemon.serve(&place.path("mount.sock"));
    let node = node(&place).await;
    assert!(http(node.port, "/livez").await.starts_with("HTTP/1.1 200"));
    until_ready(node.port, false).await;

    let mut client = RegistrationClient::new(kubelet(&node.registration).await);
    let info = client.get_info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.r#type, "CSIPlugin");
    assert_eq!(info.name, "csi.lazarette.io");
    assert_eq!(info.endpoint, "/as/the/kubelet/sees/it.sock");
    assert_eq!(info.supported_versions, ["1.0.0"]);
    for (plugin_registered, error) in [(true, ""), (false, "no"), (true, "")] {
        let status = RegistrationStatus {
            plugin_registered,
            error: error.to_owned(),
        };
        client.notify_registration_status(status).await.unwrap();
        until_ready(node.port, plugin_registered).await;
    }

    let mut identity = IdentityClient::new(local(&node.csi).await);
    let probe = identity.probe(ProbeRequest {}).await.unwrap().into_inner();
    assert_eq!(probe.ready, Some(true));
    let metrics = http(node.port, "/metrics").await;
    assert!(
        metrics.contains("lazarette_csi_calls_total{method=\"Probe\",code=\"Ok\"} 1"),
        "{metrics}"
    );
    drop(serving);
    let probe = identity.probe(ProbeRequest {}).await.unwrap().into_inner();
    assert_eq!(probe.ready, Some(false), "no mounts without the mount daemon");
    until_ready(node.port, false).await;
}

#[tokio::test]
async fn a_killed_node_starts_again_on_its_old_sockets() {
    let place = Place::new();
    let mut first = node(&place).await;
    first.process.0.kill().unwrap();
    first.process.0.wait().unwrap();
    assert!(first.csi.exists() && first.registration.exists());
    let mut second = node(&place).await;
    let mut identity = IdentityClient::new(local(&second.csi).await);
    identity.get_plugin_info(GetPluginInfoRequest {}).await.unwrap();

    // Told to end, it ends in order although a caller holds a connection open.
    let pid = Pid::from_child(&second.process.0);
    kill_process(pid, Signal::TERM).unwrap();
    let mut status = None;
    eventually("ending", || {
        status = second.process.0.try_wait().unwrap();
        status.is_some()
    })
    .await;
    assert!(status.unwrap().success(), "{status:?}");
    assert!(!second.csi.exists() && !second.registration.exists());
}

#[test]
fn bad_flags_are_refused_by_name() {
    let place = Place::new();
    let csi = place.text("csi.sock");
    for (arguments, words) in [
        (
            vec!["controller", "--csi-socket", &csi, "--namespace", "n", "--cluster", "x"],
            "<namespace>/<name>",
        ),
        (
            vec![
                "controller",
                "--csi-socket",
                &csi,
                "--namespace",
                "n",
                "--endpoint-template",
                "http://{name}:1",
            ],
            "placeholder",
        ),
        (
            vec!["node", "--csi-socket", &csi, "--mount-socket", "m", "--node", ""],
            "node name has 0 bytes",
        ),
    ] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_lazarette-csi"))
            .args(&arguments)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && text.contains(words),
            "{arguments:?}: {text}"
        );
    }
    assert!(!Path::new(&csi).exists());
}
