//! A real etcd for tests.

use lazarette_metastore::{EtcdConfig, EtcdStore, MetaStore};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// Stopped when dropped.
pub(super) struct Etcd {
    child: Child,
    client: String,
    _dir: tempfile::TempDir,
}

impl Etcd {
    pub(super) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (client, peer) = (free_url(), free_url());
        let child = Command::new(binary())
            .args(["--name=test", "--log-level=error", "--unsafe-no-fsync"])
            .arg(format!("--data-dir={}", dir.path().join("data").display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=test={peer}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            child,
            client,
            _dir: dir,
        }
    }

    pub(super) async fn store(&self) -> Arc<dyn MetaStore> {
        let connecting = async {
            loop {
                let config = EtcdConfig::new(vec![self.client.clone()]);
                if let Ok(store) = EtcdStore::connect(&config).await
                    && store.get(b"x").await.is_ok()
                {
                    return Arc::new(store) as Arc<dyn MetaStore>;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(super::DEADLINE, connecting)
            .await
            .expect("etcd answers")
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("LAZARETTE_ETCD") {
        return path.into();
    }
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set"));
    let cache = std::env::var_os("LAZARETTE_CACHE")
        .or_else(|| std::env::var_os("XDG_CACHE_HOME"))
        .map_or_else(|| home().join(".cache"), PathBuf::from);
    let path = cache.join("lazarette/bin/etcd");
    assert!(
        path.exists(),
        "no etcd at {}: run `cargo xtask tools`, or set LAZARETTE_ETCD",
        path.display()
    );
    path
}

fn free_url() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}
