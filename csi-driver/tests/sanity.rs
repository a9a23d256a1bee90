//! The CSI project's own conformance tests, run against the driver's two real processes.
//!
//! By default the cluster and the mount daemon behind them are stand-ins. Set
//! `LAZARETTE_TEST_ENDPOINT` (the URL of a storage node of at least three) and
//! `LAZARETTE_TEST_MOUNT_SOCKET` to test the whole. Needs root, for mounting.

#![allow(clippy::unwrap_used, clippy::panic)]

mod stand_in;

use stand_in::{FakeCluster, FakeMountDaemon, GENEROUS, Place, driver, eventually, mounts_under};
use std::path::PathBuf;

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

fn csi_sanity() -> PathBuf {
    let folder = |name| std::env::var_os(name).map(PathBuf::from);
    let path = folder("LAZARETTE_CSI_SANITY").unwrap_or_else(|| {
        folder("LAZARETTE_CACHE")
            .or_else(|| folder("XDG_CACHE_HOME"))
            .or_else(|| folder("HOME").map(|home| home.join(".cache")))
            .unwrap_or_default()
            .join("lazarette/bin/csi-sanity")
    });
    assert!(
        path.exists(),
        "csi-sanity is not at {}: run `cargo xtask tools` to build it, or set LAZARETTE_CSI_SANITY",
        path.display()
    );
    path
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn csi_sanity_passes() {
    let csi_sanity = csi_sanity();
    let place = Place::new();
    let cluster = FakeCluster::default();
    let daemon = FakeMountDaemon::default();
    let endpoint = match std::env::var("LAZARETTE_TEST_ENDPOINT") {
        Ok(endpoint) => endpoint,
        Err(_) => cluster.serve().await,
    };
    let (mount_socket, _daemon) = match std::env::var("LAZARETTE_TEST_MOUNT_SOCKET") {
        Ok(socket) => (socket, None),
        Err(_) => {
            let socket = place.text("mount.sock");
            let serving = daemon.serve(socket.as_ref());
            (socket, Some(serving))
        }
    };
    let controller_socket = place.text("controller.sock");
    let node_socket = place.text("plugins/csi.lazarette.io/csi.sock");
    let _controller = driver(&[
        "controller",
        "--csi-socket",
        &controller_socket,
        "--namespace",
        "default",
        "--endpoint-template",
        &endpoint,
        "--cluster",
        "default/sanity",
        "--admin",
        "127.0.0.1:0",
    ]);
    let kubelet_dir = place.text("");
    let _node = driver(&[
        "node",
        "--csi-socket",
        &node_socket,
        "--kubelet-dir",
        &kubelet_dir,
        "--node",
        "node-1",
        "--mount-socket",
        &mount_socket,
        "--admin",
        "127.0.0.1:0",
    ]);
    for socket in [&controller_socket, &node_socket] {
        eventually("listening", || std::path::Path::new(socket).exists()).await;
    }

    // A real cluster may not be up, which csi-sanity would find out anew for each test.
    let address = endpoint.trim_start_matches("http://").to_owned();
    eventually("the cluster's listening", || {
        std::net::TcpStream::connect(&address).is_ok()
    })
    .await;

    let parameters = place.path("parameters.yaml");
    std::fs::write(&parameters, "cluster: sanity\n").unwrap();
    let report = place.path("report.json");
    let mut command = tokio::process::Command::new(csi_sanity);
    command
        .args(["--csi.endpoint", &node_socket])
        .args(["--csi.controllerendpoint", &controller_socket])
        .args(["--csi.mountdir", &place.text("target")])
        .args(["--csi.stagingdir", &place.text("staging")])
        .args(["--csi.testvolumeparameters", parameters.to_str().unwrap()])
        .args(["--ginkgo.json-report", report.to_str().unwrap()])
        .arg("--ginkgo.no-color")
        .kill_on_drop(true);
    let status = tokio::time::timeout(GENEROUS * 5, command.status())
        .await
        .unwrap()
        .unwrap();
    assert!(status.success(), "csi-sanity failed");

    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
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
    assert_eq!(mounts_under(&place.path("")), Vec::<PathBuf>::new(), "left mounted");
    assert!(cluster.volumes().is_empty(), "left behind: {:?}", cluster.volumes());
}
