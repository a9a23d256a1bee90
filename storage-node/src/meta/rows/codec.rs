//! The bytes of rows: variable-length numbers, each key relative to the one before.

use super::{Dentry, Garbage, Held, Inode, Key, LockClass, OpResult, Part, Reach, Row, Session, Truncate};
use lazarette_proto::meta::Kind;
use lazarette_types::{ErrorCode, InodeId, NAME_MAX, SessionId};
use std::sync::Arc;

/// Longest name of an entry or extended attribute, in bytes.
pub const MAX_NAME: usize = NAME_MAX;
/// Longest value of an extended attribute, in bytes.
pub const MAX_XATTR_VALUE: usize = 64 << 10;
/// Longest text (a symlink's target, a client's name, an error message), in bytes.
const MAX_TEXT: usize = 4096;
/// Version of the rows' format, for records and pages: 2 has [`Reach`].
pub const FORMAT: u8 = 2;
/// Marks a removed row in the head byte.
const REMOVED: u8 = 0x80;

/// Stored rows could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// The bytes end within a row.
    #[error("rows are cut off")]
    CutOff,
    /// A field has a value that is never written.
    #[error("row has a bad {0}")]
    Bad(&'static str),
    /// The checksum does not match.
    #[error("checksum of rows does not match")]
    Checksum,
    /// Written by a newer version.
    #[error("rows have format {0}, this version reads up to {1}: upgrade first")]
    TooNew(u8, u8),
}

/// What became of a row: its new value, or that it was removed.
pub type Change = (Key, Option<Row>);

/// Puts a format version before and a checksum behind `body`.
pub fn seal_envelope(format: u8, body: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::with_capacity(body.len() + 5);
    sealed.push(format);
    sealed.extend_from_slice(body);
    let crc = crc(&sealed);
    sealed.extend_from_slice(&crc.to_le_bytes());
    sealed
}

/// Checks what [`seal_envelope`] made and returns the body.
pub fn open_envelope(format: u8, sealed: &[u8]) -> Result<&[u8], RowError> {
    let (rest, stored) = sealed.split_last_chunk::<4>().ok_or(RowError::CutOff)?;
    let (&found, body) = rest.split_first().ok_or(RowError::CutOff)?;
    if crc(rest) != u32::from_le_bytes(*stored) {
        return Err(RowError::Checksum);
    }
    if found == 0 || found > format {
        return Err(RowError::TooNew(found, format));
    }
    Ok(body)
}

fn crc(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// What the next key is written relative to.
#[derive(Clone, Copy, Debug, Default)]
struct Context {
    ino: u64,
    cookie: u64,
    session: u64,
    op: u64,
}

/// Writes rows one after the other. Neighbouring keys in order take the fewest bytes.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
    context: Context,
}

impl Writer {
    /// Appends a number.
    pub fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }

    fn signed(&mut self, value: i64) {
        self.number(((value << 1) ^ (value >> 63)) as u64);
    }

    fn delta(&mut self, value: u64, base: u64) {
        self.signed(value.wrapping_sub(base) as i64);
    }

    fn time(&mut self, value: i64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    fn blob(&mut self, value: &[u8]) {
        self.number(value.len() as u64);
        self.bytes.extend_from_slice(value);
    }

    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// All bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Appends a key alone.
    pub fn key(&mut self, key: &Key) {
        self.head(key, 0);
    }

    /// Appends a row, or that it was removed.
    pub fn change(&mut self, key: &Key, row: Option<&Row>) {
        self.head(key, if row.is_none() { REMOVED } else { 0 });
        if let Some(row) = row {
            self.row(row);
        }
    }

    fn head(&mut self, key: &Key, flag: u8) {
        let mut context = self.context;
        match key {
            Key::Counters => self.bytes.push(1 | flag),
            Key::Session(session) => {
                self.bytes.push(2 | flag);
                self.session(&mut context, *session);
            }
            Key::Acked(session) => {
                self.bytes.push(3 | flag);
                self.session(&mut context, *session);
            }
            Key::Result(session, op) => {
                self.bytes.push(4 | flag);
                self.session(&mut context, *session);
                self.delta(*op, context.op);
                context.op = *op;
            }
            Key::Garbage(ino) => {
                self.bytes.push(5 | flag);
                self.ino(&mut context, *ino);
            }
            Key::Truncate(ino) => {
                self.bytes.push(6 | flag);
                self.ino(&mut context, *ino);
            }
            Key::Inode(ino, part) => {
                let number = match part {
                    Part::Attributes => 7,
                    Part::Locks => 8,
                    Part::Reach => 11,
                    Part::Xattr(_) => 9,
                    Part::Dentry(_) => 10,
                };
                self.bytes.push(number | flag);
                self.ino(&mut context, *ino);
                match part {
                    Part::Attributes | Part::Locks | Part::Reach => {}
                    Part::Xattr(name) => self.blob(name),
                    Part::Dentry(cookie) => {
                        self.delta(*cookie, context.cookie);
                        context.cookie = *cookie;
                    }
                }
            }
        }
        self.context = context;
    }

    fn session(&mut self, context: &mut Context, session: SessionId) {
        self.delta(session.0, context.session);
        context.session = session.0;
    }

    fn ino(&mut self, context: &mut Context, ino: InodeId) {
        self.delta(ino.0, context.ino);
        if context.ino != ino.0 {
            context.ino = ino.0;
            context.cookie = 0;
        }
    }

    fn row(&mut self, row: &Row) {
        match row {
            Row::Counters { next_inode } => self.number(*next_inode),
            Row::Session(session) => self.blob(session.client.as_bytes()),
            Row::Acked(below) => self.number(*below),
            Row::Result(result) => self.result(result),
            Row::Garbage(Garbage { seed, chunks }) => {
                self.number((*seed).into());
                self.number((*chunks).into());
            }
            Row::Truncate(Truncate { seed, from, to }) => {
                self.number((*seed).into());
                self.number(*from);
                self.number(*to);
            }
            Row::Inode(inode) => self.inode(self.context.ino, inode),
            Row::Locks(held) => {
                self.number(held.len() as u64);
                for lock in held.iter() {
                    self.held(lock);
                }
            }
            Row::Reach(Reach { end, cut }) => {
                self.number(*end);
                self.number(*cut);
            }
            Row::Xattr(value) => self.blob(value),
            Row::Dentry(Dentry { name, ino }) => {
                self.blob(name);
                self.delta(ino.0, self.context.ino);
            }
        }
    }

    fn result(&mut self, result: &OpResult) {
        match result {
            OpResult::Done => self.bytes.push(1),
            OpResult::Attr(ino, inode) => {
                self.bytes.push(2);
                self.number(ino.0);
                self.inode(ino.0, inode);
            }
            OpResult::Turn { offset, change } => {
                self.bytes.push(5);
                self.number(*offset);
                self.number(*change);
            }
            OpResult::Failed(code, message) => {
                self.bytes.push(4);
                self.number(code.number().into());
                self.blob(message.as_bytes());
            }
        }
    }

    fn inode(&mut self, ino: u64, inode: &Inode) {
        let rare = [
            inode.nlink != 1,
            inode.seed != 0,
            inode.rdev != 0,
            inode.atime != inode.mtime,
            inode.ctime != inode.mtime,
        ];
        let flags = rare.iter().rev().fold(0u8, |flags, set| flags << 1 | u8::from(*set));
        self.bytes.push(inode.kind as u8 | flags << 3);
        self.number(inode.mode.into());
        self.number(inode.uid.into());
        self.number(inode.gid.into());
        self.number(inode.size);
        self.time(inode.mtime);
        self.number(inode.change);
        self.delta(inode.parent.0, ino);
        if rare[0] {
            self.number(inode.nlink.into());
        }
        if rare[1] {
            self.bytes.extend_from_slice(&inode.seed.to_le_bytes());
        }
        if rare[2] {
            self.number(inode.rdev.into());
        }
        if rare[3] {
            self.signed(inode.atime.wrapping_sub(inode.mtime));
        }
        if rare[4] {
            self.signed(inode.ctime.wrapping_sub(inode.mtime));
        }
        match inode.kind {
            Kind::Directory => self.number(inode.next_cookie),
            Kind::Symlink => self.blob(&inode.target),
            _ => {}
        }
    }

    fn held(&mut self, lock: &Held) {
        let class = match lock.class {
            LockClass::Flock => 1,
            LockClass::Posix => 2,
            LockClass::Append => 3,
        };
        self.bytes.push(class | u8::from(lock.exclusive) << 3);
        self.bytes.extend_from_slice(&lock.session.0.to_le_bytes());
        self.number(lock.owner);
        self.number(lock.start);
        self.number(lock.end);
        self.number(lock.pid.into());
    }
}

/// Reads what a [`Writer`] wrote.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    context: Context,
}

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            context: Context::default(),
        }
    }

    /// Whether everything is read.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Reads a number.
    pub fn number(&mut self) -> Result<u64, RowError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let part = u64::from(byte & 0x7f);
            if shift == 63 && part > 1 {
                return Err(RowError::Bad("number"));
            }
            value |= part << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(RowError::Bad("number"))
    }

    fn byte(&mut self) -> Result<u8, RowError> {
        let (&byte, rest) = self.bytes.split_first().ok_or(RowError::CutOff)?;
        self.bytes = rest;
        Ok(byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], RowError> {
        let (array, rest) = self.bytes.split_first_chunk::<N>().ok_or(RowError::CutOff)?;
        self.bytes = rest;
        Ok(*array)
    }

    fn small(&mut self) -> Result<u32, RowError> {
        self.number()?.try_into().map_err(|_| RowError::Bad("number"))
    }

    fn signed(&mut self) -> Result<i64, RowError> {
        let value = self.number()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    fn delta(&mut self, base: u64) -> Result<u64, RowError> {
        Ok(base.wrapping_add(self.signed()? as u64))
    }

    fn blob(&mut self, least: usize, most: usize, what: &'static str) -> Result<&'a [u8], RowError> {
        let length = self.number()?;
        if length < least as u64 || length > most as u64 {
            return Err(RowError::Bad(what));
        }
        let (blob, rest) = self.bytes.split_at_checked(length as usize).ok_or(RowError::CutOff)?;
        self.bytes = rest;
        Ok(blob)
    }

    fn text(&mut self, what: &'static str) -> Result<String, RowError> {
        let bytes = self.blob(0, MAX_TEXT, what)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| RowError::Bad(what))
    }

    /// Reads a key alone.
    pub fn key(&mut self) -> Result<Key, RowError> {
        let head = self.byte()?;
        self.key_of(head)
    }

    /// Reads a row, or that it was removed.
    pub fn change(&mut self) -> Result<Change, RowError> {
        let head = self.byte()?;
        let key = self.key_of(head & !REMOVED)?;
        if head & REMOVED != 0 {
            return Ok((key, None));
        }
        let row = self.row(&key)?;
        Ok((key, Some(row)))
    }

    fn key_of(&mut self, head: u8) -> Result<Key, RowError> {
        Ok(match head {
            1 => Key::Counters,
            2 => Key::Session(self.session()?),
            3 => Key::Acked(self.session()?),
            4 => {
                let session = self.session()?;
                self.context.op = self.delta(self.context.op)?;
                Key::Result(session, self.context.op)
            }
            5 => Key::Garbage(self.ino()?),
            6 => Key::Truncate(self.ino()?),
            7 => Key::Inode(self.ino()?, Part::Attributes),
            8 => Key::Inode(self.ino()?, Part::Locks),
            9 => {
                let ino = self.ino()?;
                Key::xattr(ino, self.blob(1, MAX_NAME, "attribute name")?)
            }
            10 => {
                let ino = self.ino()?;
                self.context.cookie = self.delta(self.context.cookie)?;
                Key::dentry(ino, self.context.cookie)
            }
            11 => Key::Inode(self.ino()?, Part::Reach),
            _ => return Err(RowError::Bad("type")),
        })
    }

    fn session(&mut self) -> Result<SessionId, RowError> {
        self.context.session = self.delta(self.context.session)?;
        Ok(SessionId(self.context.session))
    }

    fn ino(&mut self) -> Result<InodeId, RowError> {
        let ino = self.delta(self.context.ino)?;
        if self.context.ino != ino {
            self.context.ino = ino;
            self.context.cookie = 0;
        }
        Ok(InodeId(ino))
    }

    fn row(&mut self, key: &Key) -> Result<Row, RowError> {
        Ok(match key {
            Key::Counters => Row::Counters {
                next_inode: self.number()?,
            },
            Key::Session(_) => Row::Session(Box::new(Session {
                client: self.text("client")?,
            })),
            Key::Acked(_) => Row::Acked(self.number()?),
            Key::Result(..) => Row::Result(Box::new(self.result()?)),
            Key::Garbage(_) => Row::Garbage(Garbage {
                seed: self.small()?,
                chunks: self.small()?,
            }),
            Key::Truncate(_) => Row::Truncate(Truncate {
                seed: self.small()?,
                from: self.number()?,
                to: self.number()?,
            }),
            Key::Inode(ino, Part::Attributes) => Row::Inode(Box::new(self.inode(ino.0)?)),
            Key::Inode(_, Part::Locks) => {
                let count = self.number()?;
                // A lock takes at least 13 bytes, so a wrong count cannot make this allocate much.
                if count == 0 || count > (self.bytes.len() / 13) as u64 {
                    return Err(RowError::Bad("number of locks"));
                }
                let held: Result<Vec<_>, _> = (0..count).map(|_| self.held()).collect();
                Row::Locks(Box::new(held?))
            }
            Key::Inode(_, Part::Reach) => Row::Reach(Reach {
                end: self.number()?,
                cut: self.number()?,
            }),
            Key::Inode(_, Part::Xattr(_)) => Row::Xattr(self.blob(0, MAX_XATTR_VALUE, "attribute value")?.into()),
            Key::Inode(dir, Part::Dentry(_)) => {
                let name = Arc::from(self.blob(1, MAX_NAME, "name")?);
                let ino = InodeId(self.delta(dir.0)?);
                Row::Dentry(Dentry { name, ino })
            }
        })
    }

    fn result(&mut self) -> Result<OpResult, RowError> {
        Ok(match self.byte()? {
            1 => OpResult::Done,
            2 => {
                let ino = self.number()?;
                OpResult::Attr(InodeId(ino), Box::new(self.inode(ino)?))
            }
            // As format 1 has it: whoever has this turn begins again if the file was ever cut.
            3 => OpResult::Turn {
                offset: self.number()?,
                change: 0,
            },
            5 => OpResult::Turn {
                offset: self.number()?,
                change: self.number()?,
            },
            4 => {
                let code = ErrorCode::from_number(self.small()?).ok_or(RowError::Bad("error code"))?;
                OpResult::Failed(code, self.text("message")?)
            }
            _ => return Err(RowError::Bad("result")),
        })
    }

    fn inode(&mut self, ino: u64) -> Result<Inode, RowError> {
        let head = self.byte()?;
        let kind = Kind::try_from(i32::from(head & 7)).map_err(|_| RowError::Bad("kind"))?;
        if kind == Kind::Unspecified {
            return Err(RowError::Bad("kind"));
        }
        let rare = |bit: u8| head & (8 << bit) != 0;
        let mode = self.small()?;
        let uid = self.small()?;
        let gid = self.small()?;
        let size = self.number()?;
        let mtime = i64::from_le_bytes(self.array()?);
        let change = self.number()?;
        let parent = InodeId(self.delta(ino)?);
        let nlink = if rare(0) { self.small()? } else { 1 };
        let seed = if rare(1) { u32::from_le_bytes(self.array()?) } else { 0 };
        let rdev = if rare(2) { self.small()? } else { 0 };
        let atime = mtime.wrapping_add(if rare(3) { self.signed()? } else { 0 });
        let ctime = mtime.wrapping_add(if rare(4) { self.signed()? } else { 0 });
        let next_cookie = if kind == Kind::Directory { self.number()? } else { 0 };
        let target = if kind == Kind::Symlink {
            self.blob(0, MAX_TEXT, "target")?.into()
        } else {
            Box::default()
        };
        Ok(Inode {
            kind,
            mode,
            nlink,
            uid,
            gid,
            size,
            atime,
            mtime,
            ctime,
            rdev,
            seed,
            change,
            parent,
            next_cookie,
            target,
        })
    }

    fn held(&mut self) -> Result<Held, RowError> {
        let head = self.byte()?;
        let class = match head & 7 {
            1 => LockClass::Flock,
            2 => LockClass::Posix,
            3 => LockClass::Append,
            _ => return Err(RowError::Bad("lock kind")),
        };
        if head & !0xf != 0 {
            return Err(RowError::Bad("lock kind"));
        }
        Ok(Held {
            class,
            exclusive: head & 8 != 0,
            session: SessionId(u64::from_le_bytes(self.array()?)),
            owner: self.number()?,
            start: self.number()?,
            end: self.number()?,
            pid: self.small()?,
        })
    }
}

#[cfg(test)]
mod tests;
