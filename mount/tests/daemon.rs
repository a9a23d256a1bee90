//! The daemon through its socket, and the processes. Needs root and /dev/fuse.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use hyper_util::rt::TokioIo;
use lazarette_client::testing::{TestCluster, VOLUME};
use lazarette_mount::Daemon;
use lazarette_proto::mount::mount_client::MountClient;
use lazarette_proto::mount::{ListMountsRequest, MountVolumeRequest, UnmountVolumeRequest};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::{Folder, blocking};
use tokio::sync::oneshot;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

struct Served {
    client: MountClient<Channel>,
    stop: Option<oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
    _dir: tempfile::TempDir,
}

async fn connect(socket: PathBuf) -> MountClient<Channel> {
    loop {
        let socket = socket.clone();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://daemon");
        if let Ok(channel) = endpoint.connect_with_connector(connector).await {
            return MountClient::new(channel);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn serve() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("run/mount.sock");
    let (stop, stopped) = oneshot::channel::<()>();
    let path = socket.clone();
    let task = tokio::spawn(async move {
        let stop = async {
            let _ = stopped.await;
        };
        Daemon::default().serve(&path, stop).await
    });
    Served {
        client: connect(socket).await,
        stop: Some(stop),
        task,
        _dir: dir,
    }
}

impl Served {
    async fn mount(&mut self, cluster: &TestCluster, target: &Path) -> Result<(), tonic::Status> {
        self.mount_as(cluster, VOLUME.0, target, false).await
    }

    async fn mount_as(
        &mut self,
        cluster: &TestCluster,
        volume: u64,
        target: &Path,
        read_only: bool,
    ) -> Result<(), tonic::Status> {
        let request = MountVolumeRequest {
            endpoints: cluster.endpoints(),
            volume,
            target: target.to_str().unwrap().into(),
            read_only,
        };
        self.client.mount_volume(request).await.map(|_| ())
    }

    async fn unmount(&mut self, target: &Path, force: bool) -> Result<(), tonic::Status> {
        let request = UnmountVolumeRequest {
            target: target.to_str().unwrap().into(),
            force,
        };
        self.client.unmount_volume(request).await.map(|_| ())
    }

    async fn mounts(&mut self) -> Vec<String> {
        let reply = self.client.list_mounts(ListMountsRequest {}).await.unwrap();
        reply
            .into_inner()
            .mounts
            .into_iter()
            .map(|mount| mount.target)
            .collect()
    }
}

fn code(result: Result<(), tonic::Status>) -> Code {
    result.map_or_else(|status| status.code(), |()| Code::Ok)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mounting_and_unmounting_are_idempotent() {
    let cluster = TestCluster::start(1).await;
    let mut daemon = serve().await;
    let (one, two) = (Folder::new(), Folder::new());
    for _ in 0..2 {
        daemon.mount(&cluster, one.path()).await.unwrap();
    }
    daemon.mount_as(&cluster, VOLUME.0, two.path(), true).await.unwrap();
    assert_eq!(daemon.mounts().await.len(), 2);
    let other = daemon.mount_as(&cluster, 2, one.path(), false).await;
    assert_eq!(code(other), Code::AlreadyExists);
    let other = daemon.mount_as(&cluster, VOLUME.0, one.path(), true).await;
    assert_eq!(code(other), Code::AlreadyExists);

    let (here, there) = (one.path().join("f"), two.path().join("f"));
    let open = blocking(move || {
        fs::write(&here, "text").unwrap();
        assert_eq!(fs::read_to_string(&there).unwrap(), "text");
        assert!(fs::write(&there, "no").is_err(), "mounted for reading only");
        File::open(&here).unwrap()
    })
    .await;
    assert_eq!(code(daemon.unmount(one.path(), false).await), Code::FailedPrecondition);
    assert_eq!(daemon.mounts().await.len(), 2, "in use, so nothing has changed");
    daemon.unmount(one.path(), true).await.unwrap();
    drop(open);
    for _ in 0..2 {
        daemon.unmount(one.path(), false).await.unwrap();
        daemon.unmount(two.path(), false).await.unwrap();
    }
    assert!(daemon.mounts().await.is_empty());
    daemon.mount(&cluster, one.path()).await.unwrap();
    daemon.unmount(one.path(), false).await.unwrap();
    for _ in 0..1000 {
        if cluster.sessions() == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(cluster.sessions(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_name_what_is_wrong() {
    let cluster = TestCluster::start(1).await;
    let mut daemon = serve().await;
    let folder = Folder::new();
    let relative = daemon.mount(&cluster, Path::new("relative")).await.unwrap_err();
    assert_eq!(relative.code(), Code::InvalidArgument);
    assert!(relative.message().contains("target"), "{}", relative.message());
    let missing = daemon.mount(&cluster, &folder.path().join("missing")).await;
    assert_eq!(code(missing), Code::NotFound);
    let unknown = daemon.mount_as(&cluster, 99, folder.path(), false).await;
    assert_eq!(code(unknown), Code::NotFound);
    let request = MountVolumeRequest {
        volume: 1,
        target: folder.path().to_str().unwrap().into(),
        ..MountVolumeRequest::default()
    };
    let nowhere = daemon.client.mount_volume(request).await.unwrap_err();
    assert_eq!(nowhere.code(), Code::InvalidArgument);
    assert!(nowhere.message().contains("endpoints"), "{}", nowhere.message());
    daemon.unmount(&folder.path().join("missing"), false).await.unwrap();
    assert!(daemon.mounts().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_the_daemon_flushes_and_unmounts() {
    let cluster = TestCluster::start(1).await;
    let mut daemon = serve().await;
    let folder = Folder::new();
    daemon.mount(&cluster, folder.path()).await.unwrap();
    let path = folder.path().join("f");
    // In use, and not flushed.
    let file = blocking(move || {
        let mut file = File::create(path).unwrap();
        file.write_all(b"written").unwrap();
        file
    })
    .await;
    let ino = 2;
    daemon.stop.take().unwrap().send(()).unwrap();
    daemon.task.await.unwrap().unwrap();
    assert_eq!(cluster.stored_size(ino), Some(7));
    assert_eq!(cluster.sessions(), 0);
    assert!(fs::read_dir(folder.path()).unwrap().next().is_none(), "unmounted");
    drop(file);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mount_whose_session_has_ended_joins_the_volume_anew() {
    let cluster = TestCluster::start(1).await;
    cluster.set_session_ttl_ms(300);
    let mut daemon = serve().await;
    let folder = Folder::new();
    daemon.mount(&cluster, folder.path()).await.unwrap();
    let (path, new) = (folder.path().join("f"), folder.path().join("new"));
    let mut file = blocking({
        let path = path.clone();
        move || {
            fs::write(&path, "durable").unwrap();
            let mut file = File::options().write(true).open(&path).unwrap();
            file.write_all(b"LOST").unwrap();
            file
        }
    })
    .await;
    cluster.expire_sessions();
    blocking(move || {
        let deadline = Instant::now() + Duration::from_secs(60);
        let works = || fs::write(&new, "new").is_ok() && fs::read_to_string(&path).is_ok_and(|text| text == "durable");
        while !works() {
            assert!(Instant::now() < deadline, "{:?}", fs::read_to_string(&path));
            std::thread::sleep(Duration::from_millis(10));
        }
        // What was opened before may rely on locks that others have now.
        let refused = |error: std::io::Error| error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error());
        assert!(refused(file.write_all(b"late").unwrap_err()));
        assert!(refused(file.set_len(0).unwrap_err()));
        assert!(refused(file.sync_all().unwrap_err()));
        drop(file);
        assert_eq!(fs::read_to_string(path).unwrap(), "durable");
    })
    .await;
    daemon.unmount(folder.path(), false).await.unwrap();
    assert_eq!(cluster.sessions(), 0);
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn run_mount(cluster: &TestCluster, target: &Path) -> Running {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lazarette-mount"));
    command
        .args(["mount", "--volume", "test", "--foreground", "--endpoint"])
        .arg(cluster.endpoint(0))
        .arg("--target")
        .arg(target)
        .stdout(Stdio::piped());
    let mut child = Running(command.spawn().unwrap());
    let stdout = child.0.stdout.take().unwrap();
    let line = blocking(move || {
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        line
    });
    assert_eq!(line.await, "mounted\n");
    child
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_process_leaves_a_dead_mount_that_the_next_one_clears() {
    let cluster = TestCluster::start(1).await;
    let folder = Folder::new();
    let mut first = run_mount(&cluster, folder.path()).await;
    let path = folder.path().join("f");
    let write = path.clone();
    blocking(move || fs::write(write, "text").unwrap()).await;
    first.0.kill().unwrap();
    first.0.wait().unwrap();
    let dead = folder.path().to_path_buf();
    let error = blocking(move || fs::metadata(dead).unwrap_err()).await;
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::NOTCONN.raw_os_error()));

    let mut second = run_mount(&cluster, folder.path()).await;
    assert_eq!(blocking(move || fs::read_to_string(path).unwrap()).await, "text");
    let sessions = cluster.sessions();
    let id = rustix::process::Pid::from_child(&second.0);
    rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
    let status = blocking(move || {
        let status = second.0.wait().unwrap();
        (status, second)
    });
    assert!(status.await.0.success());
    assert_eq!(cluster.sessions(), sessions - 1, "its session is closed");
    assert!(fs::read_dir(folder.path()).unwrap().next().is_none(), "unmounted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unmounting_by_hand_ends_the_process() {
    let cluster = TestCluster::start(1).await;
    let folder = Folder::new();
    let mut child = run_mount(&cluster, folder.path()).await;
    rustix::mount::unmount(folder.path(), rustix::mount::UnmountFlags::empty()).unwrap();
    let status = blocking(move || child.0.wait().unwrap()).await;
    assert!(status.success());
    assert_eq!(cluster.sessions(), 0);
}
