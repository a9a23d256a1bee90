//! The program and a real etcd, as processes.

use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long any state may take to come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A process; stopped when dropped.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn etcd_binary() -> PathBuf {
    let set = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("LAZARETTE_ETCD").unwrap_or_else(|| {
        let cache = set("LAZARETTE_CACHE").or_else(|| set("XDG_CACHE_HOME"));
        let cache = cache.unwrap_or_else(|| set("HOME").unwrap().join(".cache"));
        cache.join("lazarette/bin/etcd")
    })
}

/// An etcd of one member and its URL; `options` are about clients.
pub(crate) fn etcd(dir: &Path, scheme: &str, options: &[String]) -> (Running, String) {
    let client = format!("{scheme}://{}", free_address());
    let peer = format!("http://{}", free_address());
    let child = Command::new(etcd_binary())
        .args(["--name=test", "--log-level=error", "--unsafe-no-fsync"])
        .arg(format!("--data-dir={}", dir.display()))
        .args([
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
        ])
        .args([
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
        ])
        .arg(format!("--initial-cluster=test={peer}"))
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("start etcd: {error}; `cargo xtask tools` builds it"));
    (Running(child), client)
}

/// A storage node.
pub(crate) fn node(cluster: &str, name: &str, etcd: &str, disk: &Path, options: &[String]) -> Running {
    let child = Command::new(env!("CARGO_BIN_EXE_lazarette-node"))
        .arg("serve")
        .env_remove("RUST_BACKTRACE")
        .args(["--cluster", cluster, "--node", name, "--etcd", etcd])
        .args(["--listen=127.0.0.1:0", "--admin=127.0.0.1:0", "--advertise=127.0.0.1:1"])
        .arg("--data-dir")
        .arg(disk)
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    Running(child)
}

/// Waits for the end of a storage node that must not serve; returns what it said, too.
pub(crate) fn refusal(mut node: Running) -> (ExitStatus, String) {
    let started = Instant::now();
    let status = loop {
        if let Some(status) = node.0.try_wait().unwrap() {
            break status;
        }
        assert!(started.elapsed() < PATIENCE, "it serves");
        std::thread::sleep(Duration::from_millis(50));
    };
    let mut said = String::new();
    node.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (status, said)
}

/// Waits until a storage node has made the disk its own, for which it needs etcd.
pub(crate) fn wait_initialised(node: &mut Running, disk: &Path) {
    let started = Instant::now();
    while !disk.join("identity.json").exists() {
        let ended = node.0.try_wait().unwrap();
        assert!(ended.is_none(), "it ended: {ended:?}");
        assert!(started.elapsed() < PATIENCE, "the disk was not initialised");
        std::thread::sleep(Duration::from_millis(50));
    }
}
