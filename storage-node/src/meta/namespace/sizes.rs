//! Sizes of files, and what the chunks hold beyond them.
//!
//! Clients write chunks first and make the bytes part of the file when they are durable. So there may be
//! bytes beyond a file's end, of a client that died in between for example, which must not show when the
//! file grows over them. The owner knows how far they can reach: to the end of the chunk in which the file
//! ends, and further only where a client has reserved it. They are cut before a hole comes about.
//!
//! A cut, like a shrinking of the file, also takes what others are just writing. They notice: they say
//! since when they have been writing, and if a cut came later, they write again.

use super::{Fault, Namespace, invalid};
use crate::meta::rows::{Inode, Key, OpResult, Reach, Row, Truncate};
use lazarette_proto::meta::{Extend, Kind, Reserve};
use lazarette_types::{ErrorCode, FILE_SIZE_MAX, InodeId, SessionId};

/// A client that writes in a stream asks at most so far ahead of what it has, in bytes.
const MAX_AHEAD: u64 = 1 << 30;
/// The attribute that gives a program privileges; it does not survive a change of the program.
const CAPABILITY: &[u8] = b"security.capability";

impl Namespace {
    /// Whether a file may change its size from `old` to `new`.
    pub(super) fn check_size(&self, old: u64, new: u64) -> Result<(), Fault> {
        if new > FILE_SIZE_MAX {
            return Err(Fault::new(ErrorCode::FileTooBig, "size is over 16 TiB"));
        }
        if new.saturating_sub(old) > self.free_bytes() {
            return Err(Fault::new(ErrorCode::NoSpace, "volume is full"));
        }
        Ok(())
    }

    /// Bytes by which files may grow.
    pub fn free_bytes(&self) -> u64 {
        self.limits.size.saturating_sub(self.state.usage().bytes)
    }

    fn file(&self, ino: InodeId) -> Result<&Inode, Fault> {
        let inode = self.inode(ino)?;
        match inode.kind {
            Kind::File => Ok(inode),
            Kind::Directory => Err(Fault::new(ErrorCode::IsDirectory, "a directory has no size")),
            _ => Err(invalid("only files have a size that can be changed")),
        }
    }

    /// Gives a file a size, for a session that is not writing to it at the moment.
    pub(super) fn resize(&mut self, session: SessionId, ino: InodeId, size: u64) -> Result<(), Fault> {
        let old = self.file(ino)?.size;
        self.check_size(old, size)?;
        if size != old {
            self.cut_from(Some(session), ino, old.min(size));
        }
        self.state.update(ino, |inode| inode.size = size);
        Ok(())
    }

    /// Where the chunks of a file end that may hold anything.
    fn reach(&self, ino: InodeId, size: u64) -> u64 {
        self.state.reach(ino).end.max(self.free_reach(size))
    }

    /// How far the chunks of a file of this size may be written without a reservation.
    fn free_reach(&self, size: u64) -> u64 {
        size.max(1).next_multiple_of(self.limits.chunk_size.into())
    }

    /// Has everything from `to` on cut at the chunks, before anybody is told of it: what was there, and
    /// what others are just writing. `by` is a session that is not writing.
    fn cut_from(&mut self, by: Option<SessionId>, ino: InodeId, to: u64) {
        let Some(inode) = self.state.inode(ino) else { return };
        let (seed, size) = (inode.seed, inode.size);
        let mut cut = Truncate {
            seed,
            from: self.reach(ino, size),
            to,
        };
        let pending = self.state.truncate(ino);
        if pending.is_none() && cut.from <= to {
            // The file ends with a chunk and nothing beyond was reserved.
            return;
        }
        if let Some(pending) = pending {
            cut.from = cut.from.max(pending.from);
            cut.to = cut.to.min(pending.to);
        }
        self.state.put(Key::Truncate(ino), Row::Truncate(cut));
        self.work.push(super::Work::Cut(ino));
        self.state.update(ino, |_| {});
        let change = self.state.inode(ino).map_or(0, |inode| inode.change);
        // What others have under way may arrive after the cut.
        let end = match by {
            Some(session) if self.is_sole_user(session, ino) => 0,
            _ => self.state.reach(ino).end,
        };
        let reach = Reach { end, cut: change };
        self.state.put(Key::reach(ino), Row::Reach(reach));
    }

    /// Chunks may have bytes up to `end` from now on.
    fn reach_to(&mut self, ino: InodeId, size: u64, end: u64) {
        let reach = self.state.reach(ino);
        if end > self.reach(ino, size) {
            self.state.put(Key::reach(ino), Row::Reach(Reach { end, ..reach }));
        }
    }

    pub(super) fn reserve(&mut self, session: SessionId, op: &Reserve) -> Result<OpResult, Fault> {
        let ino = InodeId(op.ino);
        let size = self.file(ino)?.size;
        self.check_size(size, op.end)?;
        if op.reach < op.end || op.reach - op.end > MAX_AHEAD {
            return Err(invalid("reach is below end or over 1 GiB beyond it"));
        }
        if op.holes && op.end > size {
            self.cut_from(Some(session), ino, size);
        }
        self.reach_to(ino, size, op.reach);
        self.attr_result(ino)
    }

    /// Notes that a session has got the turn to append and will write so many bytes.
    pub(super) fn begin_append(&mut self, ino: InodeId, length: u64) -> OpResult {
        let (offset, change) = self.state.inode(ino).map_or((0, 0), |inode| (inode.size, inode.change));
        let end = offset.saturating_add(length).min(FILE_SIZE_MAX);
        self.reach_to(ino, offset, end);
        OpResult::Turn { offset, change }
    }

    pub(super) fn extend(&mut self, op: &Extend, now: i64) -> Result<OpResult, Fault> {
        let ino = InodeId(op.ino);
        self.extend_to(ino, op.end, op.since, op.mtime, now)?;
        self.attr_result(ino)
    }

    /// Data up to `end`, written since the inode's change `since`, is durable: makes the file at least so
    /// long.
    pub(super) fn extend_to(&mut self, ino: InodeId, end: u64, since: u64, mtime: i64, now: i64) -> Result<(), Fault> {
        let size = self.file(ino)?.size;
        if self.state.reach(ino).cut > since {
            return Err(Fault::new(
                ErrorCode::Overtaken,
                "chunks were cut meanwhile; write again",
            ));
        }
        if let Err(fault) = self.check_size(size, end) {
            // The disks are not to be filled by what does not count.
            self.cut_from(None, ino, size);
            return Err(fault);
        }
        self.state.update(ino, |inode| {
            inode.size = inode.size.max(end);
            inode.mtime = if mtime == 0 { now } else { mtime };
            inode.ctime = now;
        });
        self.drop_capability(ino);
        Ok(())
    }

    /// The file's contents or owner have changed.
    pub(super) fn drop_capability(&mut self, ino: InodeId) {
        self.state.remove(Key::xattr(ino, CAPABILITY));
    }

    /// One past the last chunk that an inode may have.
    pub(super) fn chunks_of(&self, ino: InodeId, size: u64) -> u32 {
        let pending = self.state.truncate(ino).map_or(0, |cut| cut.from);
        let end = self.reach(ino, size).max(pending).min(FILE_SIZE_MAX);
        end.div_ceil(self.limits.chunk_size.into()) as u32
    }
}
