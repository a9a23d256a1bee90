//! The CSI project's own conformance tests, run against both processes of the driver, a mount daemon
//! and a local cluster. Needs root, for mounting.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use lazarette_e2e::process::Daemon;
use lazarette_e2e::tools::{self, Tool};
use lazarette_e2e::{Deadline, build, cmd, wait_for};
use lazarette_proto::cluster::ListVolumesRequest;
use std::fs;
use std::path::Path;
use std::time::Duration;
use support::Cluster;

/// Why csi-sanity may skip a test: the driver does not say that it can do that. Any other reason
/// fails this test, and so does a skipped test of something that the driver says it can do.
const MAY_SKIP: &[&str] = &[
    "Snapshot not supported",
    "Volume Cloning not supported",
    "Modify volume not supported",
    "Modify Volume not supported",
    "ControllerPublishVolume not supported",
    "ControllerUnpublishVolume not supported",
    "Controller Publish, UnpublishVolume not supported",
    "ListSnapshots not supported",
    "GetSnapshot not supported",
    "CreateSnapshot not supported",
    "DeleteSnapshot not supported",
    "ControllerModifyVolume not supported",
    "ControllerGetVolumeHealth not supported",
    "ControllerListVolumeHealth not supported",
    "NodeGetVolumeHealth not supported",
    "NodeGetStorageHealth not supported",
    "GroupControllerService not supported",
];

/// Switched off by csi-sanity itself, for all drivers.
const PENDING: &str = "pagination should detect volumes added between pages and accept tokens when the last volume from a page is deleted";

/// Starts one of the driver's processes, or the mount daemon, and waits for its socket.
async fn start(daemon: Daemon, socket: &str) {
    let log = daemon.log();
    let process = daemon.arg("--admin=127.0.0.1:0").start().await.unwrap();
    wait_for(Deadline::secs(60).logs(&log), socket, || async {
        assert!(process.is_running(), "ended; see {}", log.display());
        Ok(Path::new(socket).exists().then_some(()))
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn csi_sanity_passes() {
    let csi_sanity = tools::ensure(&[Tool::CsiSanity]).await.unwrap().remove(0);
    build::all().await.unwrap();
    let cluster = Cluster::up().await;
    let dir = cluster.inner.dir().to_owned();
    let path = |name: &str| dir.join(name).display().to_string();
    let mount_socket = path("mount.sock");
    let controller_socket = path("controller.sock");
    let node_socket = path("kubelet/plugins/csi.lazarette.io/csi.sock");
    let kubelet = path("kubelet");
    fs::create_dir_all(&kubelet).unwrap();
    let endpoint = cluster.inner.endpoints().remove(0);
    let driver = |name: &str, role: &str, socket: &str| {
        Daemon::new(name, &dir, build::release_dir().join(build::CSI)).args([
            role,
            "--csi-socket",
            socket,
            "--endpoint-template",
            &endpoint,
        ])
    };

    let daemon = Daemon::new("mount-daemon", &dir, build::release_dir().join(build::MOUNT));
    start(daemon.args(["serve", "--socket", &mount_socket]), &mount_socket).await;
    let controller = driver("csi-controller", "controller", &controller_socket);
    let controller = controller.args(["--namespace", "default", "--cluster", "default/sanity"]);
    start(controller, &controller_socket).await;
    let node = driver("csi-node", "node", &node_socket);
    let node = node.args([
        "--node",
        "node-1",
        "--kubelet-dir",
        &kubelet,
        "--mount-socket",
        &mount_socket,
    ]);
    start(node, &node_socket).await;

    fs::write(dir.join("parameters.yaml"), "cluster: sanity\n").unwrap();
    cmd![&csi_sanity]
        .args(["--csi.endpoint", &node_socket])
        .args(["--csi.controllerendpoint", &controller_socket])
        .args(["--csi.mountdir", &path("kubelet/target")])
        .args(["--csi.stagingdir", &path("kubelet/staging")])
        .args(["--csi.testvolumeparameters", &path("parameters.yaml")])
        .args(["--ginkgo.json-report", &path("report.json"), "--ginkgo.no-color"])
        .limit(Duration::from_secs(600))
        .run()
        .await
        .unwrap();

    let report: serde_json::Value = serde_json::from_slice(&fs::read(dir.join("report.json")).unwrap()).unwrap();
    let (mut passed, mut skipped) = (0, 0);
    for spec in report[0]["SpecReports"].as_array().unwrap() {
        if spec["LeafNodeType"] != "It" {
            continue;
        }
        let name = spec["LeafNodeText"].as_str().unwrap();
        let whole = format!("{} {name}", spec["ContainerHierarchyTexts"]);
        match spec["State"].as_str().unwrap() {
            "passed" => passed += 1,
            "pending" => assert_eq!(name, PENDING),
            "skipped" => {
                let reason = spec["Failure"]["Message"].as_str().unwrap_or_default();
                assert!(MAY_SKIP.contains(&reason), "{whole}: skipped since {reason:?}");
                skipped += 1;
            }
            state => panic!("{whole}: {state}"),
        }
    }
    println!("csi-sanity: {passed} passed, {skipped} skipped for what the driver does not offer");
    assert!(passed >= 45, "only {passed} tests of csi-sanity ran");
    let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounted.contains(&kubelet), "left mounted: {mounted}");
    let mut client = cluster.inner.client().await.unwrap();
    let left = client.list_volumes(ListVolumesRequest::default()).await.unwrap();
    let left = left.into_inner().volumes;
    assert!(left.is_empty(), "left behind: {left:?}");
    cluster.down().await;
}
