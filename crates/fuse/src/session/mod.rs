//! A connection being served: from mounting or adopting it to its end.

mod handshake;
mod pause;
mod shared;

use crate::buffer::{Pool, lock};
use crate::device::{self, Channel};
use crate::errno::Errno;
use crate::filesystem::Filesystem;
use crate::handover::Connection;
use crate::mount::{self, MountError, MountOptions, Unmount};
use crate::negotiation::{NegotiationError, Parameters, Terms};
use crate::notify::{self, Notifier};
use crate::reader::read_requests;
use crate::request::{InFlight, InterruptPolicy, RequestSnapshot};
use crate::statistics::{Snapshot, Statistics};
use crate::wake;
use crate::wire::Malformed;
use handshake::handshake;
pub use pause::Drained;
pub(crate) use shared::{Core, Shared};
use shared::{Phase, Reader};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Condvar, Mutex};
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};

/// How a session is served.
#[derive(Debug, Clone)]
pub struct Config {
    /// What to agree on with the kernel; without effect on a connection that already lives.
    pub terms: Terms,
    /// Threads that read requests, each with a descriptor of its own (adopted connections keep
    /// theirs). Handlers run on them until they first wait: have more for handlers that block.
    pub readers: usize,
    /// Requests under way at once, waits for locks not counted; more wait in the kernel.
    pub max_requests: usize,
    /// Bytes that data of requests under way may take; more wait in the kernel.
    pub max_memory: usize,
    /// What interrupts do.
    pub interrupts: InterruptPolicy,
    /// Measure the time to each answer.
    pub histograms: bool,
}

impl Default for Config {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(2, usize::from);
        Self {
            terms: Terms::default(),
            readers: cpus.clamp(2, 8),
            max_requests: 4096,
            max_memory: 64 << 20,
            interrupts: InterruptPolicy::default(),
            histograms: false,
        }
    }
}

/// Why a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The file system was unmounted.
    Unmounted,
    /// The connection was aborted: by an administrator, or because a request timed out.
    Aborted,
    /// Another process serves it, or will: [`Session::leave`].
    Left,
    /// The device failed.
    Failed(Errno),
}

/// Why a session does not come about or an operation on it is not possible.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// It could not be mounted or unmounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// Kernel and file system do not agree.
    #[error(transparent)]
    Negotiation(#[from] NegotiationError),
    /// A message was not what the protocol says.
    #[error("the kernel sent a malformed message: {0}")]
    Malformed(#[from] Malformed),
    /// The system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A descriptor that is not of a FUSE connection.
    #[error("descriptor {0} of the connection is not one of /dev/fuse")]
    NotFuse(usize),
    /// A connection without descriptors.
    #[error("the connection has no descriptors")]
    NoDescriptors,
    /// The session has ended.
    #[error("the session has ended")]
    Ended,
    /// The session is not paused, or not serving.
    #[error("the session is {0}")]
    Phase(&'static str),
    /// Where it is mounted is not known.
    #[error("the mount point is not known")]
    NoMountpoint,
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> SessionError {
    move |source| SessionError::Io { what, source }
}

/// A connection that is served. Clones are handles to the same session; dropping them does not end
/// it.
pub struct Session<F> {
    core: Arc<Core<F>>,
}

impl<F> Clone for Session<F> {
    fn clone(&self) -> Self {
        Self {
            core: self.core.clone(),
        }
    }
}

impl<F: Filesystem> Session<F> {
    /// Mounts a file system and serves it. Needs a tokio runtime with time enabled, in which
    /// handlers run once they wait.
    pub async fn mount(
        filesystem: F,
        mountpoint: impl Into<PathBuf>,
        options: MountOptions,
        config: Config,
    ) -> Result<Self, SessionError> {
        let mountpoint = mountpoint.into();
        let place = mountpoint.clone();
        let device = blocking(move || mount::mount(&place, &options).map_err(SessionError::from)).await?;
        let started = Self::start(filesystem, device, Some(mountpoint.clone()), config).await;
        if started.is_err() {
            // Nobody will answer: leave no dead mount behind.
            let _ = blocking(move || mount::unmount(&mountpoint, Unmount::Detach).map_err(SessionError::from)).await;
        }
        started
    }

    /// Serves a connection that was mounted just now by somebody else and whose first request is
    /// INIT.
    pub async fn start(
        filesystem: F,
        device: OwnedFd,
        mountpoint: Option<PathBuf>,
        config: Config,
    ) -> Result<Self, SessionError> {
        let terms = config.terms.clone();
        let readers = config.readers.max(1);
        let connection = blocking(move || {
            check_device(0, &device)?;
            let channel = Channel::new(device.try_clone().map_err(io_error("cannot duplicate a descriptor"))?)
                .map_err(io_error("cannot use the connection"))?;
            let parameters = handshake(&channel, &terms)?;
            let mut descriptors = vec![device];
            for _ in 1..readers {
                let clone = device::clone(descriptors[0].as_fd()).map_err(io_error("cannot clone the connection"))?;
                descriptors.push(clone);
            }
            Ok(Connection {
                parameters,
                descriptors,
                mountpoint,
            })
        })
        .await?;
        Self::serve(filesystem, connection, config)
    }

    /// Serves a connection that already lives: another process served it, and it paused or died.
    /// With `resend` the kernel sends again what that one did not answer; those requests say so
    /// ([`crate::Request::is_resend`]). Nobody else may read from the connection.
    pub async fn adopt(
        filesystem: F,
        connection: Connection,
        config: Config,
        resend: bool,
    ) -> Result<Self, SessionError> {
        for (index, descriptor) in connection.descriptors.iter().enumerate() {
            check_device(index, descriptor)?;
        }
        if resend {
            let first = connection.descriptors.first().ok_or(SessionError::NoDescriptors)?;
            let first = first.try_clone().map_err(io_error("cannot duplicate a descriptor"))?;
            let channel = Channel::new(first).map_err(io_error("cannot use the connection"))?;
            blocking(move || {
                notify::resend(&channel).map_err(|error| io_error("cannot have requests sent again")(error.into()))
            })
            .await?;
        }
        Self::serve(filesystem, connection, config)
    }

    fn serve(filesystem: F, connection: Connection, config: Config) -> Result<Self, SessionError> {
        let channels = connection
            .descriptors
            .into_iter()
            .map(|descriptor| Channel::new(descriptor).map(Arc::new));
        let channels: Vec<_> = channels
            .collect::<io::Result<_>>()
            .map_err(io_error("cannot use the connection"))?;
        let first = channels.first().ok_or(SessionError::NoDescriptors)?.clone();
        let parameters = connection.parameters;
        let (notifier, retrieves) =
            Notifier::start(first, parameters).map_err(io_error("cannot start a thread for notifications"))?;
        let readers = config.readers.max(channels.len());
        let shared = Arc::new(Shared {
            parameters,
            pool: Pool::new(parameters.max_write as usize, readers + 4, config.max_memory),
            in_flight: InFlight::new(config.interrupts),
            statistics: Statistics::new(config.histograms),
            runtime: Handle::current(),
            channels,
            mountpoint: connection.mountpoint,
            notifier,
            retrieves,
            max_requests: config.max_requests.max(1),
            readers,
            threads: Mutex::default(),
            requests: AtomicUsize::new(0),
            limited: AtomicUsize::new(0),
            admission: Mutex::new(()),
            admitted: Condvar::new(),
            stopping: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            owes_resend: AtomicBool::new(false),
            drained: Notify::new(),
            watching: AtomicBool::new(false),
            phase: Mutex::new(Phase::Serving),
            reading: watch::Sender::new(0),
            end: watch::Sender::new(None),
        });
        fault_in(&shared.pool, shared.readers);
        let session = Self {
            core: Arc::new(Core { shared, filesystem }),
        };
        session.start_readers()?;
        Ok(session)
    }

    fn start_readers(&self) -> Result<(), SessionError> {
        let shared = &self.core.shared;
        if !wake::prepare() {
            tracing::warn!("SIGURG has a handler with SA_RESTART: pauses wait for the next request");
        }
        for index in 0..shared.readers {
            let core = self.core.clone();
            let channel = shared.channels[index % shared.channels.len()].clone();
            shared.reading.send_modify(|count| *count += 1);
            let blocked = Arc::<AtomicBool>::default();
            let flag = blocked.clone();
            let started = std::thread::Builder::new()
                .name(format!("fuse-{index}"))
                .spawn(move || {
                    wake::accept();
                    let read = catch_unwind(AssertUnwindSafe(|| read_requests(&core, &channel, &flag)));
                    let shared = &core.shared;
                    let end = read.unwrap_or_else(|_| {
                        tracing::error!("a thread that reads requests panicked");
                        Some(End::Failed(Errno::EIO))
                    });
                    if let Some(end) = end {
                        shared.set_stopping(true);
                        // What is under way has nobody to answer to.
                        shared.abandon_all();
                        shared.finish(end);
                    }
                    shared.reading.send_modify(|count| *count -= 1);
                });
            match started {
                Ok(thread) => lock(&shared.threads).push(Reader { thread, blocked }),
                Err(source) => {
                    shared.reading.send_modify(|count| *count -= 1);
                    if index == 0 {
                        return Err(SessionError::Io {
                            what: "cannot start a thread for requests",
                            source,
                        });
                    }
                    tracing::warn!(error = %source, index, "fewer threads read requests than wanted");
                    break;
                }
            }
        }
        Ok(())
    }

    /// The file system.
    pub fn filesystem(&self) -> &F {
        &self.core.filesystem
    }

    /// What was agreed on with the kernel.
    pub fn parameters(&self) -> &Parameters {
        &self.core.shared.parameters
    }

    /// Where it is mounted, if known.
    pub fn mountpoint(&self) -> Option<&Path> {
        self.core.shared.mountpoint.as_deref()
    }

    /// Tells the kernel what has changed.
    pub fn notifier(&self) -> Notifier {
        self.core.shared.notifier.clone()
    }

    /// Counters.
    pub fn statistics(&self) -> Snapshot {
        self.core.shared.statistics.snapshot()
    }

    /// Requests under way, the oldest first.
    pub fn in_flight(&self) -> Vec<RequestSnapshot> {
        let mut requests: Vec<_> = self
            .core
            .shared
            .in_flight
            .all()
            .iter()
            .map(|active| RequestSnapshot::of(active))
            .collect();
        requests.sort_by_key(|request| std::cmp::Reverse(request.age));
        requests
    }

    /// The connection, for another process to hold or to serve.
    pub fn connection(&self) -> Result<Connection, SessionError> {
        let shared = &self.core.shared;
        let descriptors = shared
            .channels
            .iter()
            .map(|channel| channel.as_fd().try_clone_to_owned());
        Ok(Connection {
            parameters: shared.parameters,
            descriptors: descriptors
                .collect::<io::Result<_>>()
                .map_err(io_error("cannot duplicate a descriptor"))?,
            mountpoint: shared.mountpoint.clone(),
        })
    }

    /// Resolves when the session has ended, and says why.
    pub async fn ended(&self) -> End {
        let mut end = self.core.shared.end.subscribe();
        match end.wait_for(Option::is_some).await.map(|end| end.clone()) {
            Ok(Some(end)) => end,
            // The sender lives in this session.
            _ => End::Failed(Errno::EIO),
        }
    }

    /// Unmounts. An orderly unmount fails while the file system is in use.
    pub async fn unmount(&self, how: Unmount) -> Result<(), SessionError> {
        let mountpoint = self.core.shared.mountpoint.clone().ok_or(SessionError::NoMountpoint)?;
        blocking(move || mount::unmount(&mountpoint, how).map_err(SessionError::from)).await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SessionError> + Send + 'static,
) -> Result<T, SessionError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(SessionError::Io {
            what: "a thread ended early",
            source: io::Error::other(error),
        }),
    }
}

/// Gives the readers' first buffers memory. A process that dies gets no more of it, and a request
/// that the kernel cannot copy to its reader fails with EIO, although the next server could serve it.
fn fault_in(pool: &Arc<Pool>, readers: usize) {
    let mut buffers: Vec<_> = (0..readers).map(|_| pool.request()).collect();
    for buffer in &mut buffers {
        // Zeros are there already, but not in memory of its own.
        std::hint::black_box(buffer.room()).fill(0);
    }
}

fn check_device(index: usize, descriptor: &OwnedFd) -> Result<(), SessionError> {
    let stat = rustix::fs::fstat(descriptor).map_err(|error| io_error("cannot look at a descriptor")(error.into()))?;
    let number = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
    if kind != rustix::fs::FileType::CharacterDevice || number != (10, 229) {
        return Err(SessionError::NotFuse(index));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
