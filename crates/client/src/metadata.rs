//! Operations on names and attributes.

use crate::cache::Named;
use crate::{Error, Result, Volume};
use bytes::Bytes;
use lazarette_proto::meta::{
    Attr, Create, DirEntry, GetAttr, GetXattr, Kind, Link, ListXattr, Lookup, ReadDir, ReadLink, RemoveXattr, Rename,
    Response, RmDir, SetAttr, SetXattr, StatFs, StatFsReply, Unlink, request::Op, response,
};
use lazarette_types::{ErrorCode, FILE_SIZE_MAX, NAME_MAX};
use std::time::Duration;

/// An inode's attributes, and how long they (and the name that led to them) hold without asking
/// again: zero while other clients have the volume mounted.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// As seen on this client: size and times include writes that are not flushed yet.
    pub attr: Attr,
    /// Until when caches may use them.
    pub ttl: Duration,
}

/// What a name leads to.
#[derive(Clone, Copy, Debug)]
pub enum Found {
    /// An inode.
    Entry(Entry),
    /// Nothing, which caches may remember for so long.
    Missing(Duration),
}

/// What [`Volume::make`] creates.
#[derive(Clone, Debug)]
pub struct NewNode {
    /// File, directory, symbolic link or special file.
    pub kind: Kind,
    /// Permission bits, the umask applied.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group (of a directory with set-gid, the owner of the metadata gives that one's instead).
    pub gid: u32,
    /// Of a device file.
    pub rdev: u32,
    /// Of a symbolic link.
    pub target: Bytes,
}

impl NewNode {
    /// A node of root's.
    pub fn new(kind: Kind, mode: u32) -> Self {
        Self {
            kind,
            mode,
            uid: 0,
            gid: 0,
            rdev: 0,
            target: Bytes::new(),
        }
    }
}

/// Changes of attributes; what is None stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttributes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes: truncates or extends with zeros.
    pub size: Option<u64>,
    /// Nanoseconds since the Unix epoch.
    pub atime: Option<i64>,
    /// Nanoseconds since the Unix epoch.
    pub mtime: Option<i64>,
    /// Nanoseconds since the Unix epoch.
    pub ctime: Option<i64>,
    /// Drop the set-id bits of a file, as a change by another than root does.
    pub drop_privileges: bool,
}

/// Whether an extended attribute may, must or must not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrMode {
    /// Create or replace.
    Set,
    /// Fail if it exists.
    Create,
    /// Fail if it does not.
    Replace,
}

fn check_length(name: &[u8]) -> Result<()> {
    if name.len() > NAME_MAX {
        return Err(Error::new(
            ErrorCode::NameTooLong,
            format!("name of {} bytes; at most {NAME_MAX}", name.len()),
        ));
    }
    Ok(())
}

pub(crate) fn checked_name(name: &[u8]) -> Result<Bytes> {
    check_length(name)?;
    Ok(Bytes::copy_from_slice(name))
}

pub(crate) fn ttl(response: &Response) -> Duration {
    Duration::from_millis(u64::from(response.cache_ttl_ms))
}

impl Volume {
    /// The entry of a reply that carries attributes, in the local view.
    pub(crate) fn entry(&self, response: Response) -> Result<Entry> {
        let ttl = self.kernel_ttl(&response);
        let Some(response::Result::Attr(attr)) = response.result else {
            return Err(Error::malformed("no attributes"));
        };
        let attr = match self.inner.inode(attr.ino) {
            Some(inode) => inode.state().learn(attr, ttl),
            None => attr,
        };
        Ok(Entry { attr, ttl })
    }

    /// For how long the kernel may use what a reply says: no longer than this client is surely alone.
    fn kernel_ttl(&self, response: &Response) -> Duration {
        match ttl(response) {
            Duration::ZERO => Duration::ZERO,
            ttl => ttl.min(self.inner.cache.sole()),
        }
    }

    /// What the cache tells, in the local view. The kernel must ask each time for what is leased: only this
    /// client hears of recalls.
    pub(crate) fn known(&self, (attr, ttl): (Attr, Duration)) -> Result<Entry> {
        self.check()?;
        let attr = match self.inner.inode(attr.ino) {
            Some(inode) => inode.state().learn(attr, ttl),
            None => attr,
        };
        Ok(Entry { attr, ttl })
    }

    /// Finds a name. One that is not there is an error.
    pub async fn lookup(&self, parent: u64, name: &[u8]) -> Result<Entry> {
        match self.find(parent, name).await? {
            Found::Entry(entry) => Ok(entry),
            Found::Missing(_) => Err(Error::new(ErrorCode::NotFound, "no such entry")),
        }
    }

    /// Looks whether a name is there.
    pub async fn find(&self, parent: u64, name: &[u8]) -> Result<Found> {
        check_length(name)?;
        match self.inner.cache.lookup(parent, name) {
            Some(Named::Attr(attr, ttl)) => return Ok(Found::Entry(self.known((attr, ttl))?)),
            Some(Named::Missing(ttl)) => {
                self.check()?;
                return Ok(Found::Missing(ttl));
            }
            None => {}
        }
        let name = checked_name(name)?;
        let response = self.inner.call(Op::Lookup(Lookup { parent, name })).await?;
        match response.result {
            Some(response::Result::Missing(_)) => Ok(Found::Missing(self.kernel_ttl(&response))),
            _ => Ok(Found::Entry(self.entry(response)?)),
        }
    }

    /// An inode's attributes, asked from the owner unless they are known.
    pub async fn get_attr(&self, ino: u64) -> Result<Entry> {
        if let Some(found) = self.inner.cache.attr(ino) {
            return self.known(found);
        }
        self.entry(self.inner.call(Op::GetAttr(GetAttr { ino })).await?)
    }

    /// Changes attributes. A new size or modification time applies after everything written
    /// before, which is flushed first.
    pub async fn set_attr(&self, ino: u64, set: SetAttributes) -> Result<Entry> {
        if set.size.is_some_and(|size| size > FILE_SIZE_MAX) {
            return Err(Error::new(
                ErrorCode::FileTooBig,
                format!("at most {FILE_SIZE_MAX} bytes"),
            ));
        }
        let op = SetAttr {
            ino,
            mode: set.mode,
            uid: set.uid,
            gid: set.gid,
            size: set.size,
            atime: set.atime,
            mtime: set.mtime,
            ctime: set.ctime,
            drop_privileges: set.drop_privileges,
            extend: None,
        };
        let inode = match self.inner.inode(ino) {
            Some(inode) if set.size.is_some() || set.mtime.is_some() => inode,
            _ => return self.entry(self.change(Op::SetAttr(op)).await?),
        };
        // On a task of its own: cancelled half-way, a truncation must not let a flush through that
        // would bring the bytes back.
        let volume = self.clone();
        let task = self.inner.work.spawn(async move {
            let _turn = inode.turn.clone().lock_owned().await;
            if let Some(size) = set.size {
                volume.inner.discard_from(&inode, size);
            }
            let mut op = Some(op);
            if set.size.is_some() {
                volume.inner.flush_in_turn(&inode).await;
            } else {
                volume.inner.flush_and_set(&inode, &mut op).await;
            }
            let response = match op {
                Some(op) => Some(volume.inner.call(Op::SetAttr(op)).await?),
                None => None,
            };
            let attr = {
                let mut state = inode.state();
                state.content += 1;
                state.reserved = 0;
                state.view()
            };
            let ttl = volume.inner.cache.sole();
            response.map_or(Ok(Entry { attr, ttl }), |response| volume.entry(response))
        });
        task.await
            .map_err(|_| Error::new(ErrorCode::Internal, "set-attributes task failed"))?
    }

    /// A symbolic link's target.
    pub async fn read_link(&self, ino: u64) -> Result<Bytes> {
        match self.inner.call(Op::ReadLink(ReadLink { ino })).await?.result {
            Some(response::Result::Bytes(target)) => Ok(target),
            _ => Err(Error::malformed("no link target")),
        }
    }

    /// Entries after the cookie (0: from the start; "." and ".." are not listed), at most `limit`,
    /// and whether they are the last. Their attributes hold for the duration.
    pub async fn read_dir(&self, ino: u64, after: u64, limit: u32) -> Result<(Vec<DirEntry>, bool, Duration)> {
        let response = self.inner.call(Op::ReadDir(ReadDir { ino, after, limit })).await?;
        let ttl = self.kernel_ttl(&response);
        let Some(response::Result::ReadDir(mut listing)) = response.result else {
            return Err(Error::malformed("no directory listing"));
        };
        for entry in &mut listing.entries {
            if let Some(attr) = entry.attr
                && let Some(inode) = self.inner.inode(attr.ino)
            {
                entry.attr = Some(inode.state().learn(attr, ttl));
            }
        }
        Ok((listing.entries, listing.end, ttl))
    }

    /// Creates something that is not opened. An existing name is an error.
    pub async fn make(&self, parent: u64, name: &[u8], node: NewNode) -> Result<Entry> {
        let op = Op::Create(create(parent, checked_name(name)?, node, true, false));
        self.entry(self.change(op).await?)
    }

    /// Removes a name of anything but a directory.
    pub async fn unlink(&self, parent: u64, name: &[u8]) -> Result<()> {
        let name = checked_name(name)?;
        self.remove(Op::Unlink(Unlink { parent, name })).await
    }

    /// A change, on a task of its own: what is known here of the volume is updated by its answer, also if the
    /// caller goes away.
    async fn change(&self, op: Op) -> Result<Response> {
        let volume = self.clone();
        let task = self.inner.work.spawn(async move { volume.inner.call(op).await });
        task.await
            .map_err(|_| Error::new(ErrorCode::Internal, "task of a change failed"))?
    }

    /// The same of an operation that may take an inode's last name. While the owner may execute it nothing is
    /// opened without asking.
    async fn remove(&self, op: Op) -> Result<()> {
        let volume = self.clone();
        let task = self.inner.work.spawn(async move {
            let _removal = volume.inner.cache.removal();
            volume.inner.call(op).await.map(|_| ())
        });
        task.await
            .map_err(|_| Error::new(ErrorCode::Internal, "task of a removal failed"))?
    }

    /// Removes an empty directory. Gives its last attributes, for those who have it open.
    pub async fn rmdir(&self, parent: u64, name: &[u8]) -> Result<Attr> {
        let name = checked_name(name)?;
        let entry = self.entry(self.change(Op::RmDir(RmDir { parent, name })).await?)?;
        Ok(entry.attr)
    }

    /// Renames, replacing what is there unless `no_replace`; `exchange` swaps the two.
    pub async fn rename(&self, from: (u64, &[u8]), to: (u64, &[u8]), no_replace: bool, exchange: bool) -> Result<()> {
        let op = Op::Rename(Rename {
            parent: from.0,
            name: checked_name(from.1)?,
            new_parent: to.0,
            new_name: checked_name(to.1)?,
            no_replace,
            exchange,
        });
        self.remove(op).await
    }

    /// Adds a name to an inode.
    pub async fn link(&self, ino: u64, new_parent: u64, new_name: &[u8]) -> Result<Entry> {
        let op = Op::Link(Link {
            ino,
            new_parent,
            new_name: checked_name(new_name)?,
        });
        self.entry(self.change(op).await?)
    }

    /// The volume's size and use.
    pub async fn stat_fs(&self) -> Result<StatFsReply> {
        match self.inner.call(Op::StatFs(StatFs {})).await?.result {
            Some(response::Result::StatFs(reply)) => Ok(reply),
            _ => Err(Error::malformed("no file system statistics")),
        }
    }

    /// An extended attribute's value.
    pub async fn get_xattr(&self, ino: u64, name: &[u8]) -> Result<Bytes> {
        let name = checked_name(name)?;
        match self.inner.call(Op::GetXattr(GetXattr { ino, name })).await?.result {
            Some(response::Result::Bytes(value)) => Ok(value),
            _ => Err(Error::malformed("no attribute value")),
        }
    }

    /// The names of an inode's extended attributes.
    pub async fn list_xattr(&self, ino: u64) -> Result<Vec<Bytes>> {
        match self.inner.call(Op::ListXattr(ListXattr { ino })).await?.result {
            Some(response::Result::XattrNames(reply)) => Ok(reply.names),
            _ => Err(Error::malformed("no attribute names")),
        }
    }

    /// Sets an extended attribute.
    pub async fn set_xattr(&self, ino: u64, name: &[u8], value: &[u8], mode: XattrMode) -> Result<()> {
        let op = Op::SetXattr(SetXattr {
            ino,
            name: checked_name(name)?,
            value: Bytes::copy_from_slice(value),
            create_only: mode == XattrMode::Create,
            replace_only: mode == XattrMode::Replace,
        });
        self.change(op).await?;
        Ok(())
    }

    /// Removes an extended attribute.
    pub async fn remove_xattr(&self, ino: u64, name: &[u8]) -> Result<()> {
        let name = checked_name(name)?;
        self.change(Op::RemoveXattr(RemoveXattr { ino, name })).await?;
        Ok(())
    }
}

pub(crate) fn create(parent: u64, name: Bytes, node: NewNode, exclusive: bool, open: bool) -> Create {
    Create {
        parent,
        name,
        kind: node.kind.into(),
        mode: node.mode,
        uid: node.uid,
        gid: node.gid,
        rdev: node.rdev,
        target: node.target,
        exclusive,
        open,
        unnamed: false,
    }
}
