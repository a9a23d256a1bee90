//! What several test files use.

use lazarette_e2e::local::{LocalCluster, Shape};

/// A cluster in a temporary folder, stopped also when the test fails.
pub(crate) struct Cluster {
    pub(crate) inner: LocalCluster,
    dir: Option<tempfile::TempDir>,
}

impl Cluster {
    #[allow(dead_code)]
    pub(crate) async fn up() -> Self {
        Self::up_as(Shape::default()).await
    }

    pub(crate) async fn up_as(shape: Shape) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("lazarette-local-")
            .tempdir_in("/var/tmp")
            .unwrap();
        let inner = LocalCluster::up_as(dir.path(), shape).await.unwrap();
        Self { inner, dir: Some(dir) }
    }

    pub(crate) async fn down(mut self) {
        self.inner.wipe().await.unwrap();
        self.dir.take();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let Some(dir) = self.dir.take() else { return };
        // The test has failed: stop everything, keep the logs.
        let inner = self.inner.clone();
        let stopping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(inner.down())
        });
        eprintln!(
            "stopped: {:?}; logs are in {}",
            stopping.join(),
            dir.keep().join("logs").display()
        );
    }
}
