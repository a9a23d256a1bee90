//! The metadata owner's state: one namespace, its sessions, results and locks.

use bytes::Bytes;
use lazarette_proto::meta::{
    AppendTurn, Attr, Create, DirEntry, Done, Extend, Handles, Kind, LockKind, LockMode, LockRange, Missing,
    ReadDirReply, Rename, Request, Response, SetAttr, StatFsReply, XattrNames, request::Op, response::Result as Reply,
};
use lazarette_types::ErrorCode;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

type Outcome = Result<Reply, ErrorCode>;

struct Node {
    attr: Attr,
    entries: BTreeMap<Bytes, (u64, u64)>,
    next_cookie: u64,
    target: Bytes,
    xattrs: BTreeMap<Bytes, Bytes>,
    /// The change that last cut its chunks.
    cut: u64,
    opens: HashSet<u64>,
}

pub(crate) struct Namespace {
    nodes: HashMap<u64, Node>,
    next: u64,
    sessions: HashSet<u64>,
    results: HashMap<(u64, u64), Result<Response, ErrorCode>>,
    acknowledged: HashMap<u64, u64>,
    locks: HashMap<u64, Vec<(u64, LockRange)>>,
    appending: HashMap<u64, u64>,
    /// The number of each session's newest report.
    reported: HashMap<u64, u64>,
    /// Sessions that have yet to say what they hold open.
    pub(crate) unregistered: HashSet<u64>,
    pub(crate) cache_ttl: Duration,
    /// Until then a sole client may use what it was told.
    pub(crate) cached_until: Instant,
    pub(crate) company: u64,
    /// Counts changes.
    changes: u64,
    touched: BTreeSet<u64>,
}

/// What an operation wants of the chunks.
pub(crate) enum Effect {
    None,
    Truncate(u64, u64),
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_nanos() as i64)
}

impl Namespace {
    pub(crate) fn new() -> Self {
        let mut namespace = Self {
            nodes: HashMap::new(),
            next: 1,
            sessions: HashSet::new(),
            results: HashMap::new(),
            acknowledged: HashMap::new(),
            locks: HashMap::new(),
            appending: HashMap::new(),
            reported: HashMap::new(),
            unregistered: HashSet::new(),
            cache_ttl: Duration::from_secs(1),
            cached_until: Instant::now(),
            company: 1,
            changes: 0,
            touched: BTreeSet::new(),
        };
        let root = Create {
            kind: Kind::Directory.into(),
            mode: 0o755,
            ..Create::default()
        };
        namespace.add(&root, 1);
        namespace
    }

    fn add(&mut self, create: &Create, parent: u64) -> u64 {
        let ino = self.next;
        self.next += 1;
        let time = now();
        let attr = Attr {
            ino,
            kind: create.kind,
            mode: create.mode & 0o7777,
            nlink: if create.kind() == Kind::Directory { 2 } else { 1 },
            uid: create.uid,
            gid: create.gid,
            size: create.target.len() as u64,
            atime: time,
            mtime: time,
            ctime: time,
            rdev: create.rdev,
            seed: ino as u32,
            change: 1,
            parent,
        };
        let node = Node {
            attr,
            entries: BTreeMap::new(),
            next_cookie: 1,
            target: create.target.clone(),
            xattrs: BTreeMap::new(),
            cut: 0,
            opens: HashSet::new(),
        };
        self.nodes.insert(ino, node);
        self.touched.insert(ino);
        ino
    }

    /// Gives until when the session must not be served.
    pub(crate) fn open_session(&mut self, session: u64) -> Instant {
        if let Some(sole) = self.sessions.iter().next()
            && self.sessions.len() == 1
            && *sole != session
        {
            self.company += 1;
            self.unregistered.insert(*sole);
        }
        self.sessions.insert(session);
        self.cached_until
    }

    /// What is only in the owner's memory is lost.
    pub(crate) fn change_owner(&mut self) {
        self.company = 1;
        self.reported.clear();
        self.unregistered = self.sessions.clone();
        for node in self.nodes.values_mut() {
            node.opens.clear();
        }
    }

    /// What a session has opened and closed.
    pub(crate) fn note_handles(&mut self, session: u64, handles: &Handles, everything: bool) {
        let reported = self.reported.entry(session).or_default();
        if handles.number <= *reported && !everything {
            return;
        }
        *reported = handles.number.max(*reported);
        for ino in &handles.opened {
            if let Some(node) = self.nodes.get_mut(ino) {
                node.opens.insert(session);
            }
        }
        for ino in &handles.closed {
            if let Some(node) = self.nodes.get_mut(ino) {
                node.opens.remove(&session);
            }
        }
        if everything {
            self.unregistered.remove(&session);
        }
        self.reap();
    }

    pub(crate) fn open_inodes(&self) -> Vec<u64> {
        let open = self.nodes.iter().filter(|(_, node)| !node.opens.is_empty());
        let mut open: Vec<u64> = open.map(|(ino, _)| *ino).collect();
        open.sort_unstable();
        open
    }

    pub(crate) fn has_session(&self, session: u64) -> bool {
        self.sessions.contains(&session)
    }

    pub(crate) fn close_session(&mut self, session: u64) {
        self.sessions.remove(&session);
        self.unregistered.remove(&session);
        for locks in self.locks.values_mut() {
            locks.retain(|(holder, _)| *holder != session);
        }
        self.appending.retain(|_, holder| *holder != session);
        for node in self.nodes.values_mut() {
            node.opens.remove(&session);
        }
        self.reap();
    }

    pub(crate) fn expire_sessions(&mut self) {
        for session in self.sessions.clone() {
            self.close_session(session);
        }
    }

    pub(crate) fn sessions(&self) -> usize {
        self.sessions.len()
    }

    pub(crate) fn size(&self, ino: u64) -> Option<u64> {
        self.nodes.get(&ino).map(|node| node.attr.size)
    }

    pub(crate) fn locks(&self, ino: u64) -> usize {
        self.locks.get(&ino).map_or(0, Vec::len)
    }

    fn reap(&mut self) {
        if !self.unregistered.is_empty() {
            return;
        }
        self.nodes
            .retain(|_, node| node.attr.nlink > 0 || !node.opens.is_empty());
    }

    pub(crate) fn used(&self) -> u64 {
        self.nodes.values().map(|node| node.attr.size).sum()
    }

    /// An operation, at most once per id. None: it has to wait (locks and appends).
    pub(crate) fn call(&mut self, request: &Request, quota: u64) -> Option<(Result<Response, ErrorCode>, Effect)> {
        if !self.sessions.contains(&request.session) {
            return Some((Err(ErrorCode::SessionExpired), Effect::None));
        }
        if let Some(handles) = &request.handles {
            self.note_handles(request.session, handles, false);
        }
        let below = self.acknowledged.entry(request.session).or_insert(0);
        *below = (*below).max(request.ack_below);
        let below = *below;
        let key = (request.session, request.op_id);
        if request.op_id > 0 {
            if let Some(result) = self.results.get(&key) {
                let result = result.clone().map(|response| self.sign(response));
                return Some((result, Effect::None));
            }
            assert!(request.op_id >= below, "a repeated id was acknowledged before");
            self.results
                .retain(|(session, id), _| *session != request.session || *id >= below);
        }
        let mut effect = Effect::None;
        self.touched.clear();
        let outcome = self.execute(request, quota, &mut effect)?;
        let touched = std::mem::take(&mut self.touched);
        self.changes += u64::from(!touched.is_empty());
        let also = touched.iter().filter_map(|ino| Some(self.nodes.get(ino)?.attr));
        let also = also.collect();
        let result = outcome.map(|result| Response {
            result: Some(result),
            also,
            changed: touched.into_iter().collect(),
            free_bytes: quota.saturating_sub(self.used()),
            ..Response::default()
        });
        let result = result.map(|response| self.sign(response));
        if request.op_id > 0 {
            self.results.insert(key, result.clone());
        }
        Some((result, effect))
    }

    /// Adds what every reply says.
    fn sign(&mut self, response: Response) -> Response {
        let sole = self.sessions.len() == 1;
        if sole {
            self.cached_until = Instant::now() + self.cache_ttl;
        }
        Response {
            cache_ttl_ms: if sole { self.cache_ttl.as_millis() as u32 } else { 0 },
            as_of: self.changes,
            company: self.company,
            ..response
        }
    }

    fn node(&mut self, ino: u64) -> Result<&mut Node, ErrorCode> {
        self.nodes.get_mut(&ino).ok_or(ErrorCode::Stale)
    }

    fn child(&mut self, parent: u64, name: &Bytes) -> Result<u64, ErrorCode> {
        let node = self.node(parent)?;
        if node.attr.kind() != Kind::Directory {
            return Err(ErrorCode::NotDirectory);
        }
        node.entries.get(name).map(|(ino, _)| *ino).ok_or(ErrorCode::NotFound)
    }

    fn touch(&mut self, ino: u64) -> Result<Reply, ErrorCode> {
        let node = self.node(ino)?;
        node.attr.change += 1;
        node.attr.ctime = now();
        let attr = node.attr;
        self.touched.insert(ino);
        Ok(Reply::Attr(attr))
    }

    fn note_cut(&mut self, ino: u64) -> Result<(), ErrorCode> {
        let node = self.node(ino)?;
        node.attr.change += 1;
        node.cut = node.attr.change;
        self.touched.insert(ino);
        Ok(())
    }

    fn attach(&mut self, parent: u64, name: Bytes, ino: u64) -> Result<(), ErrorCode> {
        let node = self.node(parent)?;
        let cookie = node.next_cookie;
        node.next_cookie += 1;
        node.entries.insert(name, (ino, cookie));
        node.attr.mtime = now();
        self.touch(parent)?;
        Ok(())
    }

    fn detach(&mut self, parent: u64, name: &Bytes) -> Result<(), ErrorCode> {
        let ino = self.child(parent, name)?;
        self.node(parent)?.entries.remove(name);
        self.node(parent)?.attr.mtime = now();
        self.touch(parent)?;
        let node = self.node(ino)?;
        node.attr.nlink = if node.attr.kind() == Kind::Directory {
            0
        } else {
            node.attr.nlink - 1
        };
        self.touch(ino)?;
        self.reap();
        Ok(())
    }

    fn execute(&mut self, request: &Request, quota: u64, effect: &mut Effect) -> Option<Outcome> {
        let Some(op) = &request.op else {
            return Some(Err(ErrorCode::InvalidArgument));
        };
        match op {
            Op::Lock(lock) => {
                let Some(range) = &lock.range else {
                    return Some(Err(ErrorCode::InvalidArgument));
                };
                if range.mode() != LockMode::Unlock && self.conflict(lock.ino, request.session, range).is_some() {
                    return None;
                }
                self.set_lock(lock.ino, request.session, range);
                Some(Ok(Reply::Done(Done {})))
            }
            Op::AppendBegin(begin) => {
                if self
                    .appending
                    .get(&begin.ino)
                    .is_some_and(|holder| *holder != request.session)
                {
                    return None;
                }
                let turn = match self.node(begin.ino) {
                    Ok(node) => AppendTurn {
                        offset: node.attr.size,
                        change: node.attr.change,
                    },
                    Err(code) => return Some(Err(code)),
                };
                self.appending.insert(begin.ino, request.session);
                Some(Ok(Reply::AppendTurn(turn)))
            }
            op => Some(self.apply(op, request.session, quota, effect)),
        }
    }

    fn apply(&mut self, op: &Op, session: u64, quota: u64, effect: &mut Effect) -> Outcome {
        let done = Ok(Reply::Done(Done {}));
        match op {
            Op::Lookup(lookup) => match self.child(lookup.parent, &lookup.name) {
                Ok(ino) => Ok(Reply::Attr(self.node(ino)?.attr)),
                Err(ErrorCode::NotFound) => Ok(Reply::Missing(Missing {})),
                Err(code) => Err(code),
            },
            Op::GetAttr(get) => Ok(Reply::Attr(self.node(get.ino)?.attr)),
            Op::ReadLink(read) => Ok(Reply::Bytes(self.node(read.ino)?.target.clone())),
            Op::ReadDir(read) => self.read_dir(read.ino, read.after, read.limit),
            Op::StatFs(_) => Ok(Reply::StatFs(StatFsReply {
                size_bytes: quota,
                used_bytes: self.used(),
                used_inodes: self.nodes.len() as u64,
                inodes: 1 << 20,
            })),
            Op::GetXattr(get) => {
                let value = self.node(get.ino)?.xattrs.get(&get.name).cloned();
                value.map(Reply::Bytes).ok_or(ErrorCode::NoAttribute)
            }
            Op::ListXattr(list) => Ok(Reply::XattrNames(XattrNames {
                names: self.node(list.ino)?.xattrs.keys().cloned().collect(),
            })),
            Op::TestLock(test) => match test
                .range
                .as_ref()
                .and_then(|range| self.conflict(test.ino, session, range))
            {
                Some(conflict) => Ok(Reply::Conflict(conflict)),
                None => done,
            },
            Op::Report(_) => done,
            Op::Create(create) => {
                let ino = match self.child(create.parent, &create.name) {
                    Ok(_) if create.exclusive => return Err(ErrorCode::Exists),
                    Ok(ino) => ino,
                    Err(ErrorCode::NotFound) => {
                        let ino = self.add(create, create.parent);
                        self.attach(create.parent, create.name.clone(), ino)?;
                        ino
                    }
                    Err(code) => return Err(code),
                };
                let node = self.node(ino)?;
                if create.open {
                    node.opens.insert(session);
                }
                Ok(Reply::Attr(node.attr))
            }
            Op::Unlink(unlink) => {
                let ino = self.child(unlink.parent, &unlink.name)?;
                if self.node(ino)?.attr.kind() == Kind::Directory {
                    return Err(ErrorCode::IsDirectory);
                }
                self.detach(unlink.parent, &unlink.name)?;
                done
            }
            Op::RmDir(rmdir) => {
                let ino = self.child(rmdir.parent, &rmdir.name)?;
                let node = self.node(ino)?;
                if node.attr.kind() != Kind::Directory {
                    return Err(ErrorCode::NotDirectory);
                }
                if !node.entries.is_empty() {
                    return Err(ErrorCode::NotEmpty);
                }
                let attr = Attr { nlink: 0, ..node.attr };
                self.detach(rmdir.parent, &rmdir.name)?;
                Ok(Reply::Attr(attr))
            }
            Op::Rename(rename) => self.rename(rename),
            Op::Link(link) => {
                if self.child(link.new_parent, &link.new_name).is_ok() {
                    return Err(ErrorCode::Exists);
                }
                self.node(link.ino)?.attr.nlink += 1;
                self.attach(link.new_parent, link.new_name.clone(), link.ino)?;
                self.touch(link.ino)
            }
            Op::SetAttr(set) => self.set_attr(set, quota, effect),
            Op::Reserve(reserve) => {
                let size = self.node(reserve.ino)?.attr.size;
                if self.used() + reserve.end.saturating_sub(size) > quota {
                    return Err(ErrorCode::NoSpace);
                }
                if reserve.holes && reserve.end > size {
                    *effect = Effect::Truncate(reserve.ino, size);
                    self.note_cut(reserve.ino)?;
                }
                Ok(Reply::Attr(self.node(reserve.ino)?.attr))
            }
            Op::Extend(extend) => self.extend(extend, quota),
            Op::SetXattr(set) => {
                let xattrs = &mut self.node(set.ino)?.xattrs;
                match xattrs.contains_key(&set.name) {
                    true if set.create_only => return Err(ErrorCode::Exists),
                    false if set.replace_only => return Err(ErrorCode::NoAttribute),
                    _ => xattrs.insert(set.name.clone(), set.value.clone()),
                };
                self.touch(set.ino)?;
                done
            }
            Op::RemoveXattr(remove) => {
                let removed = self.node(remove.ino)?.xattrs.remove(&remove.name);
                removed.ok_or(ErrorCode::NoAttribute)?;
                self.touch(remove.ino)?;
                done
            }
            Op::AppendEnd(end) => {
                if self.appending.remove(&end.ino) != Some(session) {
                    return Err(ErrorCode::InvalidArgument);
                }
                if self.node(end.ino)?.cut > end.since {
                    return Err(ErrorCode::Overtaken);
                }
                let node = self.node(end.ino)?;
                assert_eq!(node.attr.size, end.offset, "appends are serialized");
                node.attr.size = end.offset + end.length;
                node.attr.mtime = end.mtime;
                self.touch(end.ino)
            }
            Op::Lock(_) | Op::AppendBegin(_) => Err(ErrorCode::Internal),
        }
    }

    fn read_dir(&mut self, ino: u64, after: u64, limit: u32) -> Outcome {
        let node = self.node(ino)?;
        if node.attr.kind() != Kind::Directory {
            return Err(ErrorCode::NotDirectory);
        }
        let mut listed: Vec<(u64, Bytes, u64)> = node
            .entries
            .iter()
            .filter(|(_, (_, cookie))| *cookie > after)
            .map(|(name, (ino, cookie))| (*cookie, name.clone(), *ino))
            .collect();
        listed.sort_unstable_by_key(|(cookie, ..)| *cookie);
        let end = listed.len() <= limit as usize;
        listed.truncate(limit as usize);
        let entries = listed
            .into_iter()
            .map(|(cookie, name, ino)| DirEntry {
                name,
                cookie,
                attr: self.nodes.get(&ino).map(|node| node.attr),
            })
            .collect();
        Ok(Reply::ReadDir(ReadDirReply { entries, end }))
    }

    fn rename(&mut self, rename: &Rename) -> Outcome {
        let ino = self.child(rename.parent, &rename.name)?;
        let target = self.child(rename.new_parent, &rename.new_name).ok();
        if rename.exchange {
            let other = target.ok_or(ErrorCode::NotFound)?;
            self.attach(rename.parent, rename.name.clone(), other)?;
            self.attach(rename.new_parent, rename.new_name.clone(), ino)?;
            return self.touch(ino);
        }
        if let Some(target) = target {
            if rename.no_replace {
                return Err(ErrorCode::Exists);
            }
            if target == ino {
                return Ok(Reply::Attr(self.node(ino)?.attr));
            }
            if !self.node(target)?.entries.is_empty() {
                return Err(ErrorCode::NotEmpty);
            }
            self.detach(rename.new_parent, &rename.new_name)?;
        }
        self.node(rename.parent)?.entries.remove(&rename.name);
        self.touch(rename.parent)?;
        self.attach(rename.new_parent, rename.new_name.clone(), ino)?;
        self.node(ino)?.attr.parent = rename.new_parent;
        self.touch(ino)
    }

    fn extend(&mut self, extend: &Extend, quota: u64) -> Outcome {
        if self.node(extend.ino)?.cut > extend.since {
            return Err(ErrorCode::Overtaken);
        }
        let grown = extend.end.saturating_sub(self.node(extend.ino)?.attr.size);
        if self.used() + grown > quota {
            return Err(ErrorCode::NoSpace);
        }
        let node = self.node(extend.ino)?;
        node.attr.size = node.attr.size.max(extend.end);
        node.attr.mtime = extend.mtime;
        self.touch(extend.ino)
    }

    fn set_attr(&mut self, set: &SetAttr, quota: u64, effect: &mut Effect) -> Outcome {
        if let Some(extend) = &set.extend {
            self.extend(extend, quota)?;
        }
        if let Some(size) = set.size {
            let old = self.node(set.ino)?.attr.size;
            if size != old {
                *effect = Effect::Truncate(set.ino, size.min(old));
                self.note_cut(set.ino)?;
            }
            let attr = &mut self.node(set.ino)?.attr;
            attr.size = size;
            attr.mtime = now();
        }
        let attr = &mut self.node(set.ino)?.attr;
        if set.drop_privileges || set.uid.is_some() || set.gid.is_some() {
            attr.mode &= if attr.mode & 0o010 != 0 { !0o6000 } else { !0o4000 };
        }
        attr.mode = set.mode.unwrap_or(attr.mode);
        attr.uid = set.uid.unwrap_or(attr.uid);
        attr.gid = set.gid.unwrap_or(attr.gid);
        attr.atime = set.atime.unwrap_or(attr.atime);
        attr.mtime = set.mtime.unwrap_or(attr.mtime);
        self.touch(set.ino)
    }

    fn conflict(&self, ino: u64, session: u64, range: &LockRange) -> Option<LockRange> {
        self.locks
            .get(&ino)?
            .iter()
            .find(|(holder, held)| {
                held.kind == range.kind
                    && (*holder, held.owner) != (session, range.owner)
                    && held.start <= range.end
                    && range.start <= held.end
                    && (held.mode() == LockMode::Exclusive || range.mode() == LockMode::Exclusive)
            })
            .map(|(_, held)| *held)
    }

    fn set_lock(&mut self, ino: u64, session: u64, range: &LockRange) {
        let locks = self.locks.entry(ino).or_default();
        let mut after = Vec::new();
        for (holder, held) in locks.drain(..) {
            let same = holder == session && held.owner == range.owner && held.kind == range.kind;
            let apart = held.end < range.start || held.start > range.end;
            if !same || apart {
                after.push((holder, held));
                continue;
            }
            if held.start < range.start {
                let mut left = held;
                left.end = range.start - 1;
                after.push((holder, left));
            }
            if held.end > range.end && range.kind() != LockKind::Flock {
                let mut right = held;
                right.start = range.end + 1;
                after.push((holder, right));
            }
        }
        if range.mode() != LockMode::Unlock {
            after.push((session, *range));
        }
        *locks = after;
    }
}
