use crate::flush::Scope;
use crate::inode::Inode;
use crate::metadata::{NewNode, checked_name, create};
use crate::readahead::ReadAhead;
use crate::volume::Inner;
use crate::{Entry, Error, Result, SetAttributes, Volume};
use bytes::Bytes;
use lazarette_proto::meta::{Attr, Create, GetAttr, Report, request::Op};
use lazarette_types::{ErrorCode, FILE_SIZE_MAX};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
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
    /// Tells the handles of a file apart.
    pub(crate) id: u64,
}

impl Volume {
    /// Opens a file, with its present attributes.
    pub async fn open(&self, ino: u64, mode: OpenMode) -> Result<(File, Entry)> {
        // Noted before anything is asked, so that a request that could take its last name says so.
        let (inode, open_there) = self.hold(Attr { ino, ..Attr::default() }, false);
        let known = self.known_to_open(ino, open_there);
        if let Some(known) = known
            && !mode.truncate
        {
            return self.opened(inode, self.known(known), mode);
        }
        let volume = self.clone();
        // A task of its own, so that registering is not left half done by a caller that goes away.
        let task = self.inner.work.spawn(async move {
            let entry = match known {
                Some(known) => volume.known(known),
                None => {
                    let response = volume.inner.call(Op::GetAttr(GetAttr { ino })).await;
                    response.and_then(|response| volume.entry(response))
                }
            };
            let (file, entry) = volume.opened(inode, entry, mode)?;
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
                        let (inode, _) = volume.hold(entry.attr, true);
                        return Ok((volume.file(inode, mode), entry));
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
            let (inode, _) = volume.hold(entry.attr, true);
            Ok((volume.file(inode, mode), entry))
        });
        task.await
            .map_err(|_| Error::new(ErrorCode::Internal, "create task failed"))?
    }

    /// One handle more of an inode. `created`: the owner has it as open already. Gives whether the owner
    /// surely does.
    fn hold(&self, attr: Attr, created: bool) -> (Arc<Inode>, bool) {
        let mut inodes = self.inner.inodes();
        let inode = inodes
            .entry(attr.ino)
            .or_insert_with(|| Arc::new(Inode::new(attr, self.inner.totals.clone())))
            .clone();
        let mut state = inode.state();
        state.handles += 1;
        let registry = &self.inner.registry;
        let known = match (created, state.handles) {
            (true, _) => {
                registry.created(attr.ino);
                true
            }
            (false, 1) => registry.opened(attr.ino),
            (false, _) => registry.is_known(attr.ino),
        };
        drop(state);
        (inode, known)
    }

    /// One handle less. With the last one the inode is closed, of which the owner hears with the next request.
    fn release(&self, inode: &Inode) -> bool {
        let mut inodes = self.inner.inodes();
        let mut state = inode.state();
        state.handles = state.handles.saturating_sub(1);
        let last = state.handles == 0;
        if last {
            inodes.remove(&inode.ino);
            self.inner.registry.closed(inode.ino);
        }
        last
    }

    /// The same. What has no name any more is given up with its last handle, so the owner is told at once.
    async fn release_and_report(&self, inode: &Inode) {
        let nameless = inode.state().attr().nlink == 0;
        if self.release(inode)
            && nameless
            && let Err(error) = self.inner.call(Op::Report(Report {})).await
            && self.inner.lease.check().is_ok()
        {
            tracing::warn!(%error, ino = inode.ino, "cannot close an inode at its owner");
        }
    }

    fn file(&self, inode: Arc<Inode>, mode: OpenMode) -> File {
        let reported = inode.state().failures;
        File {
            volume: self.clone(),
            inode,
            mode,
            reported: AtomicU64::new(reported),
            closed: AtomicBool::new(false),
            ahead: ReadAhead::default(),
            id: self.inner.handles.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Attributes with which a file may be opened without asking the owner: if it has the file as open already,
    /// or waits to hear of it before it gives the file up.
    fn known_to_open(&self, ino: u64, open_there: bool) -> Option<(Attr, Duration)> {
        match open_there {
            true => self.inner.cache.attr(ino),
            false => self.inner.cache.open(ino),
        }
    }

    /// What came of opening an inode that is held.
    fn opened(&self, inode: Arc<Inode>, entry: Result<Entry>, mode: OpenMode) -> Result<(File, Entry)> {
        match entry {
            Ok(entry) => Ok((self.file(inode, mode), entry)),
            Err(error) => {
                self.release(&inode);
                Err(error)
            }
        }
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

    /// Makes the file at least so long; what is new is zeros.
    pub async fn grow(&self, size: u64) -> Result<()> {
        if size > FILE_SIZE_MAX {
            return Err(Error::new(
                ErrorCode::FileTooBig,
                format!("at most {FILE_SIZE_MAX} bytes"),
            ));
        }
        self.in_turn(move |inner, inode| async move { inner.grow_in_turn(&inode, size).await })
            .await
    }

    /// Zeros a range, as far as the file goes. Whole chunks take no space then.
    pub async fn zero(&self, offset: u64, length: u64) -> Result<()> {
        let end = offset.saturating_add(length);
        self.in_turn(move |inner, inode| async move { inner.zero_in_turn(&inode, offset, end).await })
            .await
    }

    /// Runs a change after everything written before, to its end even if the caller goes away.
    async fn in_turn<F>(&self, change: impl FnOnce(Arc<Inner>, Arc<Inode>) -> F + Send + 'static) -> Result<()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let (inner, inode) = (self.volume.inner.clone(), self.inode.clone());
        let task = self.volume.inner.work.spawn(async move {
            let _turn = inode.turn.clone().lock_owned().await;
            inner.flush_in_turn(&inode).await;
            change(inner.clone(), inode.clone()).await
        });
        task.await
            .map_err(|_| Error::new(ErrorCode::Internal, "task of a change failed"))?
    }

    /// Returns when everything written to the file by this client is durable and part of the
    /// file, or with the error that a flush met since this handle last reported one.
    pub async fn fsync(&self) -> Result<()> {
        self.sync(Scope::All).await
    }

    /// The same but for the time of a write that does not make the file longer, which may be durable later: at
    /// the latest soon, or when [`Self::fsync`] or [`Self::close`] returns.
    pub async fn sync_data(&self) -> Result<()> {
        self.sync(Scope::Data).await
    }

    async fn sync(&self, scope: Scope) -> Result<()> {
        if !self.inode.state().is_clean() {
            // Its error is among those that are reported.
            let _ = self.volume.inner.flush(&self.inode, scope).await;
        }
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

    /// Flushes, releases the locks that were taken through this handle last, and closes. The handle is
    /// closed whatever the result.
    pub async fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let result = self.fsync().await;
        self.unlock_own().await;
        self.volume.release_and_report(&self.inode).await;
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
                let _ = volume.inner.flush(&inode, Scope::All).await;
                volume.release_and_report(&inode).await;
            },
            &runtime,
        );
    }
}
