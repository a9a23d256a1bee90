//! The Node service on the kernel's real mounts. Needs root.

#![allow(clippy::unwrap_used, clippy::panic)]

mod stand_in;

use lazarette_csi::context;
use lazarette_csi::node::daemon::MountDaemon;
use lazarette_csi::node::mountinfo;
use lazarette_csi::node::{NodeConfig, NodeService};
use lazarette_proto::csi::node_server::Node;
use lazarette_proto::csi::volume_capability::access_mode::Mode;
use lazarette_proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use lazarette_proto::csi::*;
use lazarette_types::VolumeId;
use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
use stand_in::{
    FakeMountDaemon, GENEROUS, Place, Serving, eventually, is_mounted, mount_dead_fuse, mount_hung_fuse, mounts_under,
};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tonic::{Code, Request, Status};

const VOLUME: &str = "default/test/7";

struct Bench {
    daemon: FakeMountDaemon,
    serving: Option<Serving>,
    service: Arc<NodeService>,
    place: Place,
}

fn service(place: &Place) -> Arc<NodeService> {
    let config = NodeConfig {
        node: "node-1".to_owned(),
        template: "http://{cluster}.{namespace}:1".parse().unwrap(),
        scratch: place.path("scratch"),
    };
    let daemon = MountDaemon::new(place.path("mount.sock"));
    Arc::new(NodeService::new(config, daemon).unwrap())
}

fn bench() -> Bench {
    let place = Place::new();
    let daemon = FakeMountDaemon::default();
    let serving = Some(daemon.serve(&place.path("mount.sock")));
    for folder in ["staging", "pods"] {
        std::fs::create_dir(place.path(folder)).unwrap();
    }
    Bench {
        serving,
        daemon,
        service: service(&place),
        place,
    }
}

fn capability(mode: Mode, flags: &[&str]) -> Option<VolumeCapability> {
    Some(VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Mount(MountVolume {
            mount_flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
            ..MountVolume::default()
        })),
    })
}

fn shared() -> Option<VolumeCapability> {
    capability(Mode::MultiNodeMultiWriter, &[])
}

impl Bench {
    fn staging_request(&self) -> NodeStageVolumeRequest {
        NodeStageVolumeRequest {
            volume_id: VOLUME.to_owned(),
            staging_target_path: self.place.text("staging"),
            volume_capability: shared(),
            volume_context: context::write("http://storage:7400".to_owned(), VolumeId(7)),
            ..NodeStageVolumeRequest::default()
        }
    }

    /// With 2 seconds of patience.
    async fn stage_as(&self, request: NodeStageVolumeRequest) -> Result<(), Status> {
        let mut request = Request::new(request);
        request.set_timeout(Duration::from_secs(2));
        self.service.node_stage_volume(request).await.map(|_| ())
    }

    async fn stage(&self) {
        self.stage_as(self.staging_request()).await.unwrap();
    }

    async fn unstage(&self) -> Result<(), Status> {
        let mut request = Request::new(NodeUnstageVolumeRequest {
            volume_id: VOLUME.to_owned(),
            staging_target_path: self.place.text("staging"),
        });
        request.set_timeout(Duration::from_secs(2));
        self.service.node_unstage_volume(request).await.map(|_| ())
    }

    fn publishing(&self, target: &str) -> NodePublishVolumeRequest {
        NodePublishVolumeRequest {
            volume_id: VOLUME.to_owned(),
            staging_target_path: self.place.text("staging"),
            target_path: self.place.text(target),
            volume_capability: shared(),
            volume_context: context::write("http://storage:7400".to_owned(), VolumeId(7)),
            ..NodePublishVolumeRequest::default()
        }
    }

    async fn publish(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        self.service
            .node_publish_volume(Request::new(request))
            .await
            .map(|_| ())
    }

    async fn unpublish(&self, target: &str) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: VOLUME.to_owned(),
            target_path: self.place.text(target),
        };
        self.service
            .node_unpublish_volume(Request::new(request))
            .await
            .map(|_| ())
    }

    async fn stats(&self, path: &str) -> Result<Vec<VolumeUsage>, Status> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: VOLUME.to_owned(),
            volume_path: self.place.text(path),
            ..NodeGetVolumeStatsRequest::default()
        };
        let response = self.service.node_get_volume_stats(Request::new(request)).await?;
        Ok(response.into_inner().usage)
    }

    fn mounted(&self) -> Vec<std::path::PathBuf> {
        mounts_under(&self.place.path(""))
    }
}

#[tokio::test]
async fn a_volume_from_staging_to_unstaging_over_restarts() {
    let mut bench = bench();
    for _ in 0..2 {
        bench.stage().await;
    }
    let asked = &bench.daemon.mounts()[0];
    assert_eq!((asked.volume, asked.read_only), (7, false));
    assert_eq!(asked.endpoints, ["http://storage:7400"]);
    // A restart of the plugin between any two calls changes nothing.
    bench.service = service(&bench.place);
    for pod in ["pods/a", "pods/b", "pods/a"] {
        bench.publish(bench.publishing(pod)).await.unwrap();
    }
    bench.service = service(&bench.place);
    bench.publish(bench.publishing("pods/a")).await.unwrap();
    std::fs::write(bench.place.path("pods/a/file"), "seen by both").unwrap();
    assert_eq!(std::fs::read(bench.place.path("pods/b/file")).unwrap(), b"seen by both");
    assert_eq!(bench.mounted().len(), 3);

    let usage = bench.stats("pods/a").await.unwrap();
    assert_eq!(usage[0].unit, i32::from(volume_usage::Unit::Bytes));
    assert_eq!(usage[0].total, 64 << 20, "the tmpfs's size");
    assert!(usage[0].used > 0 && usage[0].used + usage[0].available <= usage[0].total);
    assert_eq!(usage[1].unit, i32::from(volume_usage::Unit::Inodes));
    assert_eq!(usage[1].used, 2, "the root and the file");

    for pod in ["pods/a", "pods/a", "pods/b"] {
        bench.unpublish(pod).await.unwrap();
    }
    assert!(!bench.place.path("pods/a").exists(), "the target must go");
    bench.service = service(&bench.place);
    for _ in 0..2 {
        bench.unstage().await.unwrap();
    }
    assert!(bench.mounted().is_empty());
    assert!(bench.daemon.mounts().is_empty());
    assert!(bench.place.path("staging").exists(), "the kubelet's to remove");
    assert_eq!(bench.stats("pods/a").await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_read_only_target_is_so_in_every_mount_namespace() {
    let bench = bench();
    // As in a cluster: the kubelet's folder is shared, and others hold copies of its mounts.
    let kubelet = bench.place.path("");
    mount_bind(&kubelet, &kubelet).unwrap();
    mount_change(&kubelet, MountPropagationFlags::SHARED).unwrap();
    let elsewhere = Place::new();
    let copy = elsewhere.path("copy");
    std::fs::create_dir(&copy).unwrap();
    mount_bind(&kubelet, &copy).unwrap();

    bench.stage().await;
    let mut request = bench.publishing("pods/a");
    request.readonly = true;
    bench.publish(request.clone()).await.unwrap();
    bench.publish(request).await.unwrap();
    std::fs::write(bench.place.path("staging/file"), "data").unwrap();
    for root in [kubelet.as_path(), copy.as_path()] {
        let target = root.join("pods/a");
        assert_eq!(std::fs::read(target.join("file")).unwrap(), b"data", "{target:?}");
        let error = std::fs::write(target.join("file"), "x").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{target:?}");
    }
    assert_eq!(
        mounts_under(&bench.place.path("scratch")),
        Vec::<std::path::PathBuf>::new(),
        "left in scratch"
    );
    let error = bench.publish(bench.publishing("pods/a")).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error}");
    bench.unpublish("pods/a").await.unwrap();
    assert!(!is_mounted(copy.join("pods/a").to_str().unwrap()));
    bench.unstage().await.unwrap();
}

#[tokio::test]
async fn mount_options_hold_at_the_target() {
    let bench = bench();
    bench.stage().await;
    let mut request = bench.publishing("pods/a");
    request.volume_capability = capability(Mode::MultiNodeMultiWriter, &["noexec", "nodev"]);
    bench.publish(request).await.unwrap();
    let mounts = mountinfo::read().unwrap();
    let mount = mountinfo::at(&mounts, &bench.place.path("pods/a")).unwrap();
    for option in ["rw", "noexec", "nodev", "nosuid"] {
        assert!(mount.has_option(option), "{option}: {mount:?}");
    }
    bench.unpublish("pods/a").await.unwrap();
    bench.unstage().await.unwrap();
}

#[tokio::test]
async fn a_volume_for_readers_is_mounted_for_readers() {
    let bench = bench();
    let mut request = bench.staging_request();
    request.volume_capability = capability(Mode::MultiNodeReaderOnly, &[]);
    request.volume_context.clear();
    bench.stage_as(request).await.unwrap();
    let asked = &bench.daemon.mounts()[0];
    assert!(asked.read_only);
    assert_eq!(asked.endpoints, ["http://test.default:1"], "from the template");
    let mut request = bench.publishing("pods/a");
    request.volume_capability = capability(Mode::MultiNodeReaderOnly, &[]);
    bench.publish(request).await.unwrap();
    assert!(std::fs::write(bench.place.path("pods/a/file"), "x").is_err());
    bench.unpublish("pods/a").await.unwrap();
    bench.unstage().await.unwrap();
}

#[tokio::test]
async fn one_pod_only_means_one_target() {
    let mut bench = bench();
    let once = || capability(Mode::SingleNodeSingleWriter, &[]);
    let mut request = bench.staging_request();
    request.volume_capability = once();
    bench.stage_as(request).await.unwrap();
    let publishing = |bench: &Bench, target| NodePublishVolumeRequest {
        volume_capability: once(),
        ..bench.publishing(target)
    };
    bench.publish(publishing(&bench, "pods/a")).await.unwrap();
    bench.publish(publishing(&bench, "pods/a")).await.unwrap();
    // The kubelet shows parts of a volume to containers by bind mounts of its own.
    let part = bench.place.path("pods/volume-subpaths");
    std::fs::create_dir(&part).unwrap();
    mount_bind(bench.place.path("pods/a"), &part).unwrap();
    bench.service = service(&bench.place);
    let error = bench.publish(publishing(&bench, "pods/b")).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("pods/a"), "{error}");
    assert!(!bench.place.path("pods/b").exists());
    bench.unpublish("pods/a").await.unwrap();
    bench.publish(publishing(&bench, "pods/b")).await.unwrap();
    bench.unpublish("pods/b").await.unwrap();
}

#[tokio::test]
async fn a_dead_mount_is_replaced() {
    let bench = bench();
    let staging = bench.place.path("staging");
    mount_dead_fuse(&staging);
    bench.stage().await;
    assert_eq!(bench.mounted(), std::slice::from_ref(&staging));

    // The daemon dies under a published volume: both mounts are dead.
    bench.publish(bench.publishing("pods/a")).await.unwrap();
    for path in [bench.place.path("pods/a"), staging.clone()] {
        rustix::mount::unmount(&path, rustix::mount::UnmountFlags::DETACH).unwrap();
        mount_dead_fuse(&path);
    }
    let error = bench.stats("pods/a").await.unwrap_err();
    assert_eq!(error.code(), Code::Internal, "{error}");
    // Another pod comes, for which the kubelet does not stage again.
    bench.publish(bench.publishing("pods/b")).await.unwrap();
    std::fs::write(bench.place.path("pods/b/file"), "alive").unwrap();
    // The first is published anew, in the place of its dead mount.
    bench.publish(bench.publishing("pods/a")).await.unwrap();
    assert_eq!(std::fs::read(bench.place.path("pods/a/file")).unwrap(), b"alive");
    for pod in ["pods/a", "pods/b"] {
        bench.unpublish(pod).await.unwrap();
    }
    bench.unstage().await.unwrap();
    assert!(bench.mounted().is_empty());
}

#[tokio::test]
async fn dead_mounts_go_even_without_the_daemon() {
    let mut bench = bench();
    bench.serving = None;
    let mut users = Vec::new();
    for path in ["staging", "pods/a"] {
        let path = bench.place.path(path);
        std::fs::create_dir_all(&path).unwrap();
        mount_dead_fuse(&path);
        // In use, as by a process that has not noticed yet.
        users.push(rustix::fs::open(&path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap());
    }
    bench.unpublish("pods/a").await.unwrap();
    assert!(!bench.place.path("pods/a").exists());
    bench.unstage().await.unwrap();
    assert!(bench.mounted().is_empty());
    bench.unstage().await.unwrap();
}

#[tokio::test]
async fn a_living_mount_waits_for_the_daemon() {
    let mut bench = bench();
    bench.stage().await;
    std::fs::write(bench.place.path("staging/file"), "not yet flushed").unwrap();
    bench.serving = None;
    let error = bench.unstage().await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert!(bench.place.path("staging/file").exists(), "unmounted without flushing");
    bench.serving = Some(bench.daemon.serve(&bench.place.path("mount.sock")));
    bench.unstage().await.unwrap();
    assert!(bench.mounted().is_empty());
}

#[tokio::test]
async fn what_can_never_be_flushed_is_given_up() {
    let bench = bench();
    bench.stage().await;
    bench.daemon.ended.store(true, Ordering::SeqCst);
    bench.unstage().await.unwrap();
    assert!(bench.mounted().is_empty() && bench.daemon.mounts().is_empty());
}

#[tokio::test]
async fn a_target_in_use_is_kept() {
    let bench = bench();
    bench.stage().await;
    bench.publish(bench.publishing("pods/a")).await.unwrap();
    let open = std::fs::File::create(bench.place.path("pods/a/file")).unwrap();
    let error = bench.unpublish("pods/a").await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(bench.place.path("pods/a/file").exists());
    drop(open);
    bench.unpublish("pods/a").await.unwrap();
    bench.unstage().await.unwrap();
}

#[tokio::test]
async fn what_is_in_the_way_is_left_alone() {
    let bench = bench();
    let request = bench.publishing("pods/a");
    let error = bench.publish(request.clone()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "not staged: {error}");
    bench.stage().await;

    // Another file system at the target.
    let target = bench.place.path("pods/a");
    std::fs::create_dir(&target).unwrap();
    rustix::mount::mount("other", &target, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    std::fs::write(target.join("file"), "precious").unwrap();
    let error = bench.publish(request).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error}");
    assert!(target.join("file").exists());

    // Files in a target where nothing is mounted.
    let target = bench.place.path("pods/b");
    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("file"), "precious").unwrap();
    assert_eq!(bench.unpublish("pods/b").await.unwrap_err().code(), Code::Internal);
    assert!(target.join("file").exists());

    // The staging path of another volume.
    let mut request = bench.staging_request();
    request.volume_id = "default/test/8".to_owned();
    request.volume_context.clear();
    let error = bench.stage_as(request).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error}");
}

#[tokio::test]
async fn bad_requests_are_refused_by_name() {
    let bench = bench();
    let stage = |change: fn(&mut NodeStageVolumeRequest)| {
        let mut request = bench.staging_request();
        change(&mut request);
        bench.stage_as(request)
    };
    let block = |request: &mut NodeStageVolumeRequest| {
        if let Some(capability) = &mut request.volume_capability {
            capability.access_type = Some(AccessType::Block(BlockVolume {}));
        }
    };
    let invalid = Code::InvalidArgument;
    for (result, code, words) in [
        (stage(|r| r.volume_id.clear()).await, invalid, "volume_id is missing"),
        (
            stage(|r| r.volume_id = "x".into()).await,
            Code::NotFound,
            "not of the form",
        ),
        (
            stage(|r| r.volume_id = "default/test/8".into()).await,
            invalid,
            "volume_context",
        ),
        (
            stage(|r| r.staging_target_path.clear()).await,
            invalid,
            "staging_target_path",
        ),
        (
            stage(|r| r.staging_target_path = "a/b".into()).await,
            invalid,
            "absolute",
        ),
        (
            stage(|r| r.staging_target_path = "/a/../b".into()).await,
            invalid,
            "absolute",
        ),
        (
            stage(|r| r.volume_capability = None).await,
            invalid,
            "volume_capability",
        ),
        (stage(block).await, Code::FailedPrecondition, "block volumes"),
    ] {
        let error = result.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(words), "{error}");
    }
    let mut request = bench.publishing("pods/a");
    request.staging_target_path.clear();
    let error = bench.publish(request).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(bench.mounted().is_empty() && bench.daemon.mounts().is_empty());
}

#[tokio::test]
async fn a_second_call_while_one_is_under_way_is_aborted() {
    let bench = bench();
    let closed = bench.daemon.gate.lock().await;
    let service = Arc::clone(&bench.service);
    let request = bench.staging_request();
    let first = tokio::spawn(async move { service.node_stage_volume(Request::new(request)).await });
    eventually("the first call", || bench.daemon.calls.load(Ordering::SeqCst) == 1).await;
    for error in [
        bench.stage_as(bench.staging_request()).await.unwrap_err(),
        bench.publish(bench.publishing("pods/a")).await.unwrap_err(),
        bench.unstage().await.unwrap_err(),
    ] {
        assert_eq!(error.code(), Code::Aborted, "{error}");
    }
    drop(closed);
    first.await.unwrap().unwrap();
    bench.unstage().await.unwrap();
}

#[tokio::test]
async fn a_daemon_that_restarts_is_waited_for() {
    let mut bench = bench();
    bench.serving = None;
    let request = bench.staging_request();
    let service = Arc::clone(&bench.service);
    let staging = tokio::spawn(async move { service.node_stage_volume(Request::new(request)).await });
    tokio::task::yield_now().await;
    bench.serving = Some(bench.daemon.serve(&bench.place.path("mount.sock")));
    staging.await.unwrap().unwrap();
    bench.unstage().await.unwrap();
}

#[tokio::test]
async fn a_hanging_file_system_holds_up_nobody_else() {
    let bench = bench();
    bench.stage().await;
    let target = bench.place.path("pods/hung");
    std::fs::create_dir(&target).unwrap();
    let device = mount_hung_fuse(&target);
    let ask = || {
        let mut request = Request::new(NodeGetVolumeStatsRequest {
            volume_id: VOLUME.to_owned(),
            volume_path: bench.place.text("pods/hung"),
            ..NodeGetVolumeStatsRequest::default()
        });
        request.set_timeout(Duration::from_millis(200));
        bench.service.node_get_volume_stats(request)
    };
    let error = ask().await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    // The first question still hangs; a second would only waste another thread.
    assert_eq!(ask().await.unwrap_err().code(), Code::Aborted);
    let mut request = Request::new(bench.publishing("pods/hung"));
    request.set_timeout(Duration::from_millis(200));
    let error = bench.service.node_publish_volume(request).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    let error = bench.publish(bench.publishing("pods/a")).await.unwrap_err();
    assert_eq!(error.code(), Code::Aborted, "the publishing still hangs: {error}");
    assert!(bench.stats("staging").await.is_ok());
    // Once it is over, everything goes on.
    drop(device);
    let start = std::time::Instant::now();
    while let Err(error) = bench.publish(bench.publishing("pods/hung")).await {
        assert_eq!(error.code(), Code::Aborted, "{error}");
        assert!(start.elapsed() < GENEROUS);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(bench.stats("pods/hung").await.is_ok());
    bench.unpublish("pods/hung").await.unwrap();
    bench.unstage().await.unwrap();
}

#[tokio::test]
async fn links_in_the_kubelets_path_are_followed() {
    let bench = bench();
    std::os::unix::fs::symlink(bench.place.path(""), bench.place.path("link")).unwrap();
    let mut request = bench.staging_request();
    request.staging_target_path = bench.place.text("link/staging");
    bench.stage_as(request).await.unwrap();
    let mut request = bench.publishing("link/pods/a");
    request.staging_target_path = bench.place.text("link/staging");
    bench.publish(request.clone()).await.unwrap();
    bench.publish(request).await.unwrap();
    assert_eq!(bench.mounted().len(), 2, "{:?}", bench.mounted());
    assert!(bench.stats("link/pods/a").await.is_ok());
    bench.unpublish("link/pods/a").await.unwrap();
    let request = NodeUnstageVolumeRequest {
        volume_id: VOLUME.to_owned(),
        staging_target_path: bench.place.text("link/staging"),
    };
    bench.service.node_unstage_volume(Request::new(request)).await.unwrap();
    assert!(bench.mounted().is_empty());
}

#[tokio::test]
async fn leftovers_of_a_killed_predecessor_are_removed() {
    let bench = bench();
    bench.stage().await;
    let leftover = bench.place.path("scratch/1-0");
    std::fs::create_dir_all(&leftover).unwrap();
    mount_bind(bench.place.path("staging"), &leftover).unwrap();
    let _successor = service(&bench.place);
    assert!(!leftover.exists());
    assert_eq!(bench.mounted(), [bench.place.path("staging")]);
    assert!(Path::new(&bench.place.path("scratch")).exists());
    bench.unstage().await.unwrap();
}

#[tokio::test]
async fn expanding_needs_a_mounted_volume_and_nothing_else() {
    let bench = bench();
    let request = NodeExpandVolumeRequest {
        volume_id: VOLUME.to_owned(),
        volume_path: bench.place.text("staging"),
        capacity_range: Some(CapacityRange {
            required_bytes: 5,
            limit_bytes: 0,
        }),
        ..NodeExpandVolumeRequest::default()
    };
    let error = bench
        .service
        .node_expand_volume(Request::new(request.clone()))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    bench.stage().await;
    let got = bench.service.node_expand_volume(Request::new(request)).await.unwrap();
    assert_eq!(got.into_inner().capacity_bytes, 5);
    bench.unstage().await.unwrap();
}
