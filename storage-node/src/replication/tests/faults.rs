use crate::chunk::{Change, ChunkError, ChunkStore, ChunkSummary, Contents, Usage};
use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use lazarette_metastore::{KeyValue, LeaseId, MetaStore, Revision, StoreError, Txn, TxnOutcome, WatchStream};
use lazarette_types::{ChunkId, ReplicaSetId, Version, VolumeId};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A node's way to the metadata store, which can be cut.
pub(super) struct CutStore {
    pub(super) inner: Arc<dyn MetaStore>,
    pub(super) cut: Arc<AtomicBool>,
}

impl CutStore {
    fn check(&self) -> Result<(), StoreError> {
        if self.cut.load(Ordering::Acquire) {
            return Err(StoreError::Unavailable("cut off by the test".into()));
        }
        Ok(())
    }
}

#[async_trait]
impl MetaStore for CutStore {
    async fn get(&self, key: &[u8]) -> Result<Option<KeyValue>, StoreError> {
        self.check()?;
        self.inner.get(key).await
    }

    async fn range(&self, prefix: &[u8]) -> Result<(Vec<KeyValue>, Revision), StoreError> {
        self.check()?;
        self.inner.range(prefix).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.check()?;
        self.inner.txn(txn).await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.check()?;
        self.inner.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.check()?;
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.check()?;
        self.inner.revoke(lease).await
    }

    async fn watch(&self, prefix: &[u8], from: Revision) -> Result<WatchStream, StoreError> {
        self.check()?;
        let stream = self.inner.watch(prefix, from).await?;
        let cut = Arc::clone(&self.cut);
        // Nothing comes through a cut, not even its end.
        Ok(Box::pin(stream.then(move |item| {
            let cut = Arc::clone(&cut);
            async move {
                if cut.load(Ordering::Acquire) {
                    std::future::pending().await
                } else {
                    item
                }
            }
        })))
    }
}

/// One process's chunk store over a disk that outlives it.
pub(super) struct FaultyChunks {
    pub(super) disk: Arc<dyn ChunkStore>,
    /// The process was killed: nothing reaches the disk any more.
    pub(super) dead: AtomicBool,
    /// The disk takes no more data.
    pub(super) full: AtomicBool,
    /// Milliseconds that each change takes.
    pub(super) delay: AtomicU64,
}

impl FaultyChunks {
    /// `grows`: the change needs space.
    async fn before_change(&self, grows: bool) -> Result<(), ChunkError> {
        let delay = self.delay.load(Ordering::Relaxed);
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        self.alive()?;
        if grows && self.full.load(Ordering::Relaxed) {
            return Err(ChunkError::NoSpace);
        }
        Ok(())
    }

    fn alive(&self) -> Result<(), ChunkError> {
        if self.dead.load(Ordering::Acquire) {
            return Err(ChunkError::Io("the process was killed".into()));
        }
        Ok(())
    }
}

#[async_trait]
impl ChunkStore for FaultyChunks {
    async fn apply(
        &self,
        rs: ReplicaSetId,
        chunk: ChunkId,
        previous: Version,
        version: Version,
        change: Change,
    ) -> Result<(), ChunkError> {
        self.before_change(matches!(change, Change::Write(_))).await?;
        self.disk.apply(rs, chunk, previous, version, change).await
    }

    async fn read(&self, rs: ReplicaSetId, chunk: ChunkId, offset: u32, length: u32) -> Result<Contents, ChunkError> {
        self.alive()?;
        self.disk.read(rs, chunk, offset, length).await
    }

    async fn version(&self, rs: ReplicaSetId, chunk: ChunkId) -> Result<Version, ChunkError> {
        self.alive()?;
        self.disk.version(rs, chunk).await
    }

    async fn list(&self, rs: ReplicaSetId) -> Result<Vec<ChunkSummary>, ChunkError> {
        self.alive()?;
        self.disk.list(rs).await
    }

    async fn install(
        &self,
        rs: ReplicaSetId,
        chunk: ChunkId,
        version: Version,
        data: Bytes,
        crc: u32,
    ) -> Result<(), ChunkError> {
        self.before_change(!data.is_empty()).await?;
        self.disk.install(rs, chunk, version, data, crc).await
    }

    async fn drop_volume(&self, volume: VolumeId) -> Result<(), ChunkError> {
        self.alive()?;
        self.disk.drop_volume(volume).await
    }

    async fn drop_replica_set(&self, rs: ReplicaSetId) -> Result<(), ChunkError> {
        self.alive()?;
        self.disk.drop_replica_set(rs).await
    }

    async fn volumes(&self) -> Result<Vec<VolumeId>, ChunkError> {
        self.disk.volumes().await
    }

    async fn replica_sets(&self) -> Result<Vec<ReplicaSetId>, ChunkError> {
        self.disk.replica_sets().await
    }

    async fn usage(&self) -> Result<Usage, ChunkError> {
        self.disk.usage().await
    }

    fn health(&self) -> Result<(), ChunkError> {
        self.alive()
    }
}

/// What a link does with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkState {
    /// Forwards.
    Up,
    /// Keeps connections and forwards nothing.
    Paused,
    /// Ends connections.
    Cut,
}

/// One direction between two nodes, as a proxy in front of the target.
pub(super) struct Link {
    pub(super) address: SocketAddr,
    pub(super) state: watch::Sender<LinkState>,
    /// Where it leads; a change ends the connections to the former target.
    pub(super) target: watch::Sender<Option<SocketAddr>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Link {
    pub(super) async fn open() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = watch::Sender::new(LinkState::Up);
        let target = watch::Sender::new(None);
        let (states, targets) = (state.subscribe(), target.subscribe());
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let Ok((inbound, _)) = listener.accept().await else {
                    return;
                };
                let (mut state, mut targets) = (states.clone(), targets.clone());
                let Some(target) = *targets.borrow_and_update() else {
                    continue;
                };
                if *state.borrow() == LinkState::Cut {
                    continue;
                }
                connections.spawn(async move {
                    let Ok(outbound) = TcpStream::connect(target).await else {
                        return;
                    };
                    let _ = inbound.set_nodelay(true);
                    let _ = outbound.set_nodelay(true);
                    let ((ir, iw), (or, ow)) = (inbound.into_split(), outbound.into_split());
                    tokio::select! {
                        () = forward(ir, ow, state.clone()) => {}
                        () = forward(or, iw, state.clone()) => {}
                        _ = state.wait_for(|s| *s == LinkState::Cut) => {}
                        _ = targets.changed() => {}
                    }
                });
            }
        });
        Self {
            address,
            state,
            target,
            task,
        }
    }
}

async fn forward(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut state: watch::Receiver<LinkState>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(n @ 1..) = from.read(&mut buffer).await else {
            return;
        };
        if state.wait_for(|s| *s != LinkState::Paused).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}
