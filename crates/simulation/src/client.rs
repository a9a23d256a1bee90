//! The machines that mount the volume, and the one that prepares it and has the last look.

use crate::conditions::World;
use crate::network::{self, PORT};
use crate::system::{self, Clock};
use crate::workload::{CHUNK, Mount, Shared, prepare};
use lazarette_client::{Cluster, CreateVolumeRequest, Volume, VolumeOptions};
use lazarette_proto::cluster::ReplicationPolicy;
use lazarette_types::VolumeId;
use rand::Rng;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Bytes that the volume may hold: no workload comes near.
const QUOTA: u64 = 1 << 30;

/// How long a volume is mounted, and then not.
const LEAST_MOUNTED: Duration = Duration::from_secs(3);
/// Milliseconds.
const MOST_MOUNTED: u64 = 20_000;
const MOST_AWAY: u64 = 4_000;

/// Which volume it is, once it is prepared.
pub(crate) type Prepared = watch::Sender<Option<u64>>;

/// A machine that mounts the volume, again and again if need be.
pub(crate) struct Client {
    pub(crate) host: String,
    pub(crate) number: u64,
    pub(crate) shared: Arc<Shared>,
    pub(crate) clock: Clock,
    pub(crate) nodes: Vec<String>,
    pub(crate) prepared: Prepared,
    /// Mounts so far.
    pub(crate) mounts: AtomicU64,
    /// Has unmounted at the end.
    pub(crate) done: AtomicBool,
}

impl Client {
    fn world(&self) -> &World {
        &self.shared.world
    }

    fn cluster(&self) -> Result<Cluster, lazarette_client::Error> {
        let endpoints = self.nodes.iter().map(|node| format!("http://{node}:{PORT}"));
        Cluster::connect_by(endpoints, network::dial_of_client())
    }

    async fn mount(&self, cluster: &Cluster, volume: u64) -> Result<Mount, lazarette_client::Error> {
        let mount = self.mounts.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}.{mount}", self.host);
        let options = VolumeOptions {
            client: name.clone(),
            ..VolumeOptions::default()
        };
        let volume = Volume::mount(cluster, VolumeId(volume), options).await?;
        let only_looks = self.world().rng().random_bool(0.3);
        self.world()
            .note(&name, format_args!("mounted, session {}", volume.session()));
        Ok(Mount {
            shared: Arc::clone(&self.shared),
            volume,
            name,
            number: self.number,
            only_looks,
            until: Instant::now() + LEAST_MOUNTED + self.world().some_ms(MOST_MOUNTED),
        })
    }

    async fn volume(&self) -> u64 {
        let mut prepared = self.prepared.subscribe();
        loop {
            let volume = *prepared.borrow_and_update();
            if let Some(volume) = volume {
                return volume;
            }
            // The sender is in here.
            let _ = prepared.changed().await;
        }
    }

    /// A process, which works until the faults end.
    pub(crate) async fn run(self: Arc<Self>) -> turmoil::Result {
        system::set_clock(self.clock);
        let cluster = self.cluster()?;
        let volume = self.volume().await;
        while !self.world().conditions().ending {
            let mount = self.mount(&cluster, volume).await?;
            match mount.work().await {
                Ok(()) => {
                    let closed = mount.volume.close().await;
                    self.world().note(&mount.name, format_args!("unmounted: {closed:?}"));
                    let away = self.world().some_ms(MOST_AWAY);
                    tokio::time::sleep(away).await;
                }
                Err(error) => {
                    self.world().note(&mount.name, format_args!("session lost: {error}"));
                    mount.volume.abort();
                }
            }
        }
        self.done.store(true, Ordering::Relaxed);
        std::future::pending().await
    }

    /// Makes the volume and what is in it from the beginning.
    pub(crate) async fn prepare(self: Arc<Self>) -> turmoil::Result {
        system::set_clock(self.clock);
        let cluster = self.cluster()?;
        let request = CreateVolumeRequest {
            name: "volume".into(),
            size: QUOTA,
            replication: Some(ReplicationPolicy { copies: 3, ack: 2 }),
            chunk_size: CHUNK as u32,
            ..CreateVolumeRequest::default()
        };
        let volume = loop {
            match cluster.create_volume(request.clone()).await {
                Ok(volume) => break volume.id,
                // Until enough nodes have joined.
                Err(error) => self.world().note(&self.host, format_args!("no volume yet: {error}")),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        let mount = self.mount(&cluster, volume).await?;
        prepare(&self.shared, &mount.volume).await?;
        mount.volume.close().await?;
        self.world().note(&self.host, "prepared");
        self.prepared.send_replace(Some(volume));
        self.done.store(true, Ordering::Relaxed);
        std::future::pending().await
    }

    /// Looks at everything once more.
    pub(crate) async fn finally(self: Arc<Self>) -> turmoil::Result {
        system::set_clock(self.clock);
        let cluster = self.cluster()?;
        let mount = self.mount(&cluster, self.volume().await).await?;
        mount.finally().await?;
        mount.volume.close().await?;
        self.done.store(true, Ordering::Relaxed);
        std::future::pending().await
    }
}
