//! What a file system tells the kernel of its own accord.

use crate::abi::notify as code;
use crate::abi::{Capabilities, NAME_MAX, OUT_HEADER};
use crate::buffer::lock;
use crate::device::Channel;
use crate::errno::{Errno, Result};
use crate::negotiation::Parameters;
use bytes::Bytes;
use rustix::io::Errno as Os;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::future::Future;
use std::io::IoSlice;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, oneshot};

/// Notifications that wait for the kernel.
const QUEUE: usize = 1024;

struct Message {
    code: i32,
    body: Vec<u8>,
    data: Bytes,
    done: oneshot::Sender<Result<()>>,
}

/// Retrieves that wait for their data.
#[derive(Default)]
pub(crate) struct Retrieves {
    waiting: Mutex<HashMap<u64, oneshot::Sender<Bytes>>>,
    next: AtomicU64,
}

impl Retrieves {
    /// Data have come: the bytes after `fuse_notify_retrieve_in`.
    pub(crate) fn answer(&self, number: u64, body: Bytes) {
        if let Some(sender) = lock(&self.waiting).remove(&number) {
            let _ = sender.send(body.slice(body.len().min(40)..));
        }
    }
}

/// Tells the kernel what has changed. Messages are written in order by a thread of their own.
///
/// The kernel may have to wait for answers before it can act (a page that is being read is dropped
/// when the read is answered): a handler that awaits one of these about its own node may wait for
/// itself. What is queued is sent even if nobody awaits it.
///
/// Results: false says that the kernel had nothing of the kind.
#[derive(Clone)]
pub struct Notifier {
    sender: mpsc::Sender<Message>,
    parameters: Parameters,
    retrieves: Arc<Retrieves>,
}

impl Notifier {
    pub(crate) fn start(channel: Arc<Channel>, parameters: Parameters) -> std::io::Result<(Self, Arc<Retrieves>)> {
        let (sender, mut receiver) = mpsc::channel::<Message>(QUEUE);
        std::thread::Builder::new().name("fuse-notify".into()).spawn(move || {
            // Ends with the last sender.
            while let Some(message) = receiver.blocking_recv() {
                let written = write(&channel, message.code, &message.body, &message.data);
                let _ = message.done.send(written.map_err(Errno::from));
            }
        })?;
        let retrieves = Arc::<Retrieves>::default();
        Ok((
            Self {
                sender,
                parameters,
                retrieves: retrieves.clone(),
            },
            retrieves,
        ))
    }

    async fn send(&self, code: i32, body: Vec<u8>, data: Bytes) -> Result<()> {
        let (done, outcome) = oneshot::channel();
        self.sender
            .send(Message { code, body, data, done })
            .await
            .map_err(|_| Errno::ENOTCONN)?;
        outcome.await.map_err(|_| Errno::ENOTCONN)?
    }

    fn found(result: Result<()>) -> Result<bool> {
        match result {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn name(name: &OsStr) -> Result<&[u8]> {
        match name.as_bytes() {
            name if name.is_empty() || name.contains(&b'/') || name.contains(&0) => Err(Errno::EINVAL),
            name if name.len() > NAME_MAX => Err(Errno::ENAMETOOLONG),
            name => Ok(name),
        }
    }

    /// Forget a node's attributes, and its data from `offset` on for `length` bytes (0: to the end).
    /// A negative offset keeps the data. Written data that are not yet sent are sent first.
    pub fn inval_inode(&self, node: u64, offset: i64, length: i64) -> impl Future<Output = Result<bool>> + Send + '_ {
        let body = [node.to_ne_bytes(), offset.to_ne_bytes(), length.to_ne_bytes()].concat();
        async move { Self::found(self.send(code::INVAL_INODE, body, Bytes::new()).await) }
    }

    async fn entry(&self, parent: u64, name: &OsStr, flags: u32) -> Result<bool> {
        let name = Self::name(name)?;
        let mut body = parent.to_ne_bytes().to_vec();
        body.extend((name.len() as u32).to_ne_bytes());
        body.extend(flags.to_ne_bytes());
        body.extend(name);
        body.push(0);
        Self::found(self.send(code::INVAL_ENTRY, body, Bytes::new()).await)
    }

    /// Forget a name of a directory.
    pub async fn inval_entry(&self, parent: u64, name: &OsStr) -> Result<bool> {
        self.entry(parent, name, 0).await
    }

    /// Look a name of a directory up again at its next use, without dropping what is mounted or
    /// open below it. Kernels without `HAS_EXPIRE_ONLY` forget it.
    pub async fn expire_entry(&self, parent: u64, name: &OsStr) -> Result<bool> {
        let expire = self.parameters.offered.contains(Capabilities::HAS_EXPIRE_ONLY);
        self.entry(parent, name, if expire { code::EXPIRE_ONLY } else { 0 })
            .await
    }

    /// A name was removed: tells those who watch the directory, too.
    pub async fn delete(&self, parent: u64, child: u64, name: &OsStr) -> Result<bool> {
        let name = Self::name(name)?;
        let mut body = [parent.to_ne_bytes(), child.to_ne_bytes()].concat();
        body.extend((name.len() as u32).to_ne_bytes());
        body.extend([0; 4]);
        body.extend(name);
        body.push(0);
        Self::found(self.send(code::DELETE, body, Bytes::new()).await)
    }

    /// Puts data into the kernel's cache of a file.
    pub async fn store(&self, node: u64, offset: u64, data: Bytes) -> Result<bool> {
        for (index, piece) in pieces(&data, self.parameters.max_write as usize).enumerate() {
            let at = offset + index as u64 * u64::from(self.parameters.max_write);
            let mut body = [node.to_ne_bytes(), at.to_ne_bytes()].concat();
            body.extend((piece.len() as u32).to_ne_bytes());
            body.extend([0; 4]);
            if !Self::found(self.send(code::STORE, body, piece).await)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Data of a file from the kernel's cache: from `offset` on, up to the first byte that is not
    /// cached, at most `size` and at most one largest write. None if it does not know the node.
    pub async fn retrieve(&self, node: u64, offset: u64, size: u32) -> Result<Option<Bytes>> {
        // The bit keeps the numbers apart from those of requests.
        let number = self.retrieves.next.fetch_add(1, Ordering::Relaxed) | 1 << 62;
        let (sender, receiver) = oneshot::channel();
        lock(&self.retrieves.waiting).insert(number, sender);
        let forget = Forgetting {
            retrieves: &self.retrieves,
            number,
        };
        let body = retrieve_body(number, node, offset, size.min(self.parameters.max_write));
        if !Self::found(self.send(code::RETRIEVE, body, Bytes::new()).await)? {
            return Ok(None);
        }
        let data = receiver.await.map_err(|_| Errno::ENOTCONN)?;
        drop(forget);
        Ok(Some(data))
    }

    /// A file that a poll was asked about is ready.
    pub async fn poll_wakeup(&self, waiter: u64) -> Result<bool> {
        Self::found(self.send(code::POLL, waiter.to_ne_bytes().to_vec(), Bytes::new()).await)
    }

    /// All cached names are to be looked up again at their next use (7.44 and newer; else ENOSYS).
    pub async fn increment_epoch(&self) -> Result<()> {
        self.since(44)?;
        self.send(code::INC_EPOCH, Vec::new(), Bytes::new()).await
    }

    /// Drop unused nodes from the cache (7.45 and newer; else ENOSYS).
    pub async fn prune(&self, nodes: &[u64]) -> Result<()> {
        self.since(45)?;
        for nodes in nodes.chunks(1024) {
            let mut body = (nodes.len() as u32).to_ne_bytes().to_vec();
            body.extend([0; 12]);
            body.extend(nodes.iter().flat_map(|node| node.to_ne_bytes()));
            self.send(code::PRUNE, body, Bytes::new()).await?;
        }
        Ok(())
    }

    fn since(&self, minor: u32) -> Result<()> {
        if self.parameters.minor < minor {
            Err(Errno::ENOSYS)
        } else {
            Ok(())
        }
    }
}

impl std::fmt::Debug for Notifier {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Notifier")
    }
}

/// Takes a retrieve that nobody awaits any more out of the table.
struct Forgetting<'a> {
    retrieves: &'a Retrieves,
    number: u64,
}

impl Drop for Forgetting<'_> {
    fn drop(&mut self) {
        lock(&self.retrieves.waiting).remove(&self.number);
    }
}

fn pieces(data: &Bytes, size: usize) -> impl Iterator<Item = Bytes> + '_ {
    (0..data.len())
        .step_by(size.max(1))
        .map(move |start| data.slice(start..data.len().min(start + size)))
}

fn retrieve_body(number: u64, node: u64, offset: u64, size: u32) -> Vec<u8> {
    let mut body = [number.to_ne_bytes(), node.to_ne_bytes(), offset.to_ne_bytes()].concat();
    body.extend(size.to_ne_bytes());
    body.extend([0; 4]);
    body
}

fn write(channel: &Channel, code: i32, body: &[u8], data: &[u8]) -> rustix::io::Result<()> {
    let mut header = [0; OUT_HEADER];
    header[..4].copy_from_slice(&((OUT_HEADER + body.len() + data.len()) as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&code.to_ne_bytes());
    channel.write(&[IoSlice::new(&header), IoSlice::new(body), IoSlice::new(data)])
}

/// Has the kernel send all requests again that it sent and that were not answered.
pub(crate) fn resend(channel: &Channel) -> rustix::io::Result<()> {
    match write(channel, code::RESEND, &[], &[]) {
        // Kernels before 6.9 do not know it; their requests in flight wait for the abort.
        Err(Os::INVAL) => Err(Os::OPNOTSUPP),
        other => other,
    }
}
