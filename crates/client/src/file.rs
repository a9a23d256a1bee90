use crate::inode::Inode;
use crate::metadata::{NewNode, checked_name, create};
use crate::readahead::ReadAhead;
use crate::{Entry, Error, Result, SetAttributes, Volume};
use bytes::Bytes;
use lazarette_proto::meta::{Attr, Close, Create, GetAttr, Open, request::Op};
use lazarette_types::{ErrorCode, FILE_SIZE_MAX};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::time::Instant;

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenMode {
    /// Every write goes to the end of the file, wherever that is by then: atomic over all clients,
    /// durable when it returns.
    pub append: bool,
    /// Empty the file first.
    pub truncate: bool,
}

/// An open file. Close it with [`File::close`] to learn of errors; dropping it closes it too.
pub struct File {
    pub(crate) volume: Volume,
    pub(crate) inode: Arc<Inode>,
    mode: OpenMode,
    /// Failed flushes that this handle has reported.
    reported: AtomicU64,
    closed: AtomicBool,
    ahead: ReadAhead,
}

impl Volume {
    /// Opens a file, with attributes fresh from the owner.
    pub async fn open(&self, ino: u64, mode: OpenMode) -> Result<(File, Entry)> {
        let volume = self.clone();
        // A task of its own, so that registering is not left half done by a caller that goes away.
        let task = self.inner.work.spawn(async move {
            let (file, entry) = volume.register(ino, mode).await?;
            if !mode.truncate {
                return Ok((file, entry));
            }
            let empty = SetAttributes {
                size: Some(0),
                ..SetAttributes::default()
            };
            let entry = volume.set_attr(ino, empty).await?;
            Ok((file, entry))
        });
        task.await
            .map_err(|_| Error::new(ErrorCode::Internal, "open task failed"))?
    }

    /// Creates a file and opens it. An existing one is opened, unless `exclusive`.
    pub async fn create(
        &self,
        parent: u64,
        name: &[u8],
        node: NewNode,
        exclusive: bool,
        mode: OpenMode,
    ) -> Result<(File, Entry)> {
        let name = checked_name(name)?;
        let volume = self.clone();
        let task = self.inner.work.spawn(async move {
            loop {
                let op = Op::Create(create(parent, name.clone(), node.clone(), true, true));
                match volume.inner.call(op).await {
                    Ok(response) => {
                        let entry = volume.entry(response)?;
                        let inode = volume.table_entry(entry.attr);
                        let file = volume.file(inode, mode);
                        return Ok((file, entry));
                    }
                    Err(error) if error.code() == ErrorCode::Exists && !exclusive => {}
                    Err(error) => return Err(error),
                }
                let existing = match volume.lookup(parent, &name).await {
                    Ok(entry) => volume.open(entry.attr.ino, mode).await,
                    Err(error) => Err(error),
                };
                match existing {
                    // Removed in between: create it after all.
                    Err(error) if matches!(error.code(), ErrorCode::NotFound | ErrorCode::Stale) => {}
                    done => return done,
                }
            }
        });
        task.await
            .map_err(|_| Error::new(ErrorCode::Internal, "create task failed"))?
    }

    /// Creates and opens a file without a name, which [`Volume::link`] may give it; else it goes with its
    /// last handle.
    pub async fn create_unnamed(&self, parent: u64, node: NewNode, mode: OpenMode) -> Result<(File, Entry)> {
        let volume = self.clone();
        let task = self.inner.work.spawn(async move {
            let op = Op::Create(Create {
                unnamed: true,
                ..create(parent, Bytes::new(), node, true, true)
            });
            let entry = volume.entry(volume.inner.call(op).await?)?;
            let inode = volume.table_entry(entry.attr);
            Ok((volume.file(inode, mode), entry))
        });
        task.await
            .map_err(|_| Error::new(ErrorCode::Internal, "create task failed"))?
    }

    fn table_entry(&self, attr: Attr) -> Arc<Inode> {
        let mut inodes = self.inner.inodes();
        inodes
            .entry(attr.ino)
            .or_insert_with(|| Arc::new(Inode::new(attr)))
            .clone()
    }

    fn file(&self, inode: Arc<Inode>, mode: OpenMode) -> File {
        let reported = {
            let mut state = inode.state();
            state.handles += 1;
            state.failures
        };
        File {
            volume: self.clone(),
            inode,
            mode,
            reported: AtomicU64::new(reported),
            closed: AtomicBool::new(false),
            ahead: ReadAhead::default(),
        }
    }

    async fn register(&self, ino: u64, mode: OpenMode) -> Result<(File, Entry)> {
        loop {
            // In the table before the owner is asked, so that a new owner hears of it.
            let inode = self.table_entry(Attr { ino, ..Attr::default() });
            let opening = inode.opening.lock().await;
            let (gone, first) = {
                let state = inode.state();
                (state.gone, state.handles == 0)
            };
            if gone {
                continue;
            }
            let op = if first {
                Op::Open(Open { ino })
            } else {
                Op::GetAttr(GetAttr { ino })
            };
            match self.inner.call(op).await.and_then(|response| self.entry(response)) {
                Ok(entry) => {
                    let file = self.file(inode.clone(), mode);
                    return Ok((file, entry));
                }
                Err(error) => {
                    if first {
                        self.forget(&inode);
                    }
                    drop(opening);
                    return Err(error);
                }
            }
        }
    }

    fn forget(&self, inode: &Inode) {
        inode.state().gone = true;
        self.inner.inodes().remove(&inode.ino);
    }

    /// One handle less; with the last one the owner is told.
    async fn release(&self, inode: Arc<Inode>) {
        let _opening = inode.opening.lock().await;
        let last = {
            let mut state = inode.state();
            state.handles = state.handles.saturating_sub(1);
            state.handles == 0
        };
        if !last {
            return;
        }
        let closed = self.inner.call(Op::Close(Close { ino: inode.ino })).await;
        if let Err(error) = closed
            && self.inner.lease.check().is_ok()
        {
            tracing::warn!(%error, ino = inode.ino, "cannot close an inode at its owner");
        }
        self.forget(&inode);
    }
}

impl File {
    /// The inode number.
    pub fn ino(&self) -> u64 {
        self.inode.ino
    }

    /// The volume it belongs to.
    pub fn volume(&self) -> &Volume {
        &self.volume
    }

    /// Whether every write goes to the end of the file.
    pub fn appends(&self) -> bool {
        self.mode.append
    }

    /// The attributes as last known here, with local writes.
    pub fn attr(&self) -> Attr {
        self.inode.state().view()
    }

    /// Reads `length` bytes from `offset`, fewer at the end of the file. Holes are zeros.
    pub async fn read(&self, offset: u64, length: u32) -> Result<Bytes> {
        let end = offset.saturating_add(u64::from(length));
        let (size, stale) = {
            let state = self.inode.state();
            (state.view().size, Instant::now() > state.fresh_until)
        };
        let size = if end > size && stale {
            self.volume.get_attr(self.ino()).await?.attr.size
        } else {
            size
        };
        let inner = &self.volume.inner;
        inner.lease.check()?;
        let end = end.min(size);
        if end <= offset {
            return Ok(Bytes::new());
        }
        match self.ahead.read(inner, &self.inode, offset, end).await {
            Some(data) => Ok(data),
            None => inner.read(&self.inode, offset, length).await,
        }
    }

    /// Writes at `offset` (or, opened to append, at the end of the file) and returns where the
    /// bytes went. They are in the buffer then, or, appended, durable and part of the file.
    pub async fn write(&self, offset: u64, data: &[u8]) -> Result<u64> {
        if self.mode.append {
            return self.append(Bytes::copy_from_slice(data)).await;
        }
        self.write_at(offset, data).await?;
        Ok(offset)
    }

    /// Writes at `offset` also through a handle that appends: pages of a shared mapping go where
    /// they belong whichever handle brings them.
    pub async fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        if offset.saturating_add(data.len() as u64) > FILE_SIZE_MAX {
            return Err(Error::new(
                ErrorCode::FileTooBig,
                format!("at most {FILE_SIZE_MAX} bytes"),
            ));
        }
        self.volume.inner.buffer(&self.inode, offset, data).await
    }

    /// Returns when everything written to the file by this client is durable and part of the
    /// file, or with the error that a flush met since this handle last reported one.
    pub async fn fsync(&self) -> Result<()> {
        // Its error is among those that are reported.
        let _ = self.volume.inner.flush(&self.inode).await;
        self.report()
    }

    fn report(&self) -> Result<()> {
        let state = self.inode.state();
        if state.failures > self.reported.swap(state.failures, Ordering::Relaxed)
            && let Some(error) = &state.failure
        {
            return Err(error.clone());
        }
        self.volume.check()
    }

    /// Flushes and closes. The handle is closed whatever the result.
    pub async fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let result = self.fsync().await;
        self.volume.release(self.inode.clone()).await;
        result
    }
}

impl Drop for File {
    fn drop(&mut self) {
        if self.closed.swap(true, Ordering::Relaxed) {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let volume = self.volume.clone();
        let inode = self.inode.clone();
        let tracker = volume.inner.work.clone();
        tracker.spawn_on(
            async move {
                let _ = volume.inner.flush(&inode).await;
                volume.release(inode).await;
            },
            &runtime,
        );
    }
}
