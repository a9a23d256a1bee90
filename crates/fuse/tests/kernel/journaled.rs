//! A file system whose every effect is in a journal, so that its server can be killed or replaced at
//! any moment and no effect is lost or happens twice.

use lazarette_fuse::abi::{Opcode, OpenReplyFlags, UNIQUE_RESEND};
use lazarette_fuse::attributes::LockKind;
use lazarette_fuse::operation::*;
use lazarette_fuse::*;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// Far more requests than are ever under way: what was done before them is not asked for again.
const REMEMBERED: usize = 1000;
/// Lines from which on a journal is put together anew.
const LONG: usize = 4000;

#[derive(Clone, Default)]
struct Node {
    directory: bool,
    data: String,
    /// Who has the lock of flock(2).
    locked: Option<u64>,
}

/// What a journal comes to.
#[derive(Default)]
pub(crate) struct State {
    names: BTreeMap<String, u64>,
    nodes: BTreeMap<u64, Node>,
    next: u64,
    /// The last requests whose effects are in the journal.
    done: VecDeque<u64>,
    /// All effects there ever were.
    pub(crate) effects: u64,
    /// Requests that came again although they had had their effects.
    pub(crate) repeats: u64,
    /// Servers so far, where they say so.
    pub(crate) turns: u64,
}

fn text(name: &OsStr) -> &str {
    name.to_str().unwrap()
}

impl State {
    pub(crate) fn read(path: &Path) -> Self {
        let mut state = Self {
            next: 1,
            ..Self::default()
        };
        let text = fs::read_to_string(path).unwrap_or_default();
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            state.apply(line);
        }
        state
    }

    /// An effect begins with the number of its request, what is kept of others with a 0.
    fn apply(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |index: usize| -> u64 { words[index].parse().unwrap() };
        match number(0) {
            0 => return self.apply_kept(&words[1..]),
            request => {
                assert!(!self.done.contains(&request), "done twice: {line}");
                self.done.push_back(request);
                self.effects += 1;
            }
        }
        if self.done.len() > REMEMBERED {
            self.done.pop_front();
        }
        match words[1..] {
            ["mkdir" | "create", name] => {
                self.next += 1;
                let fresh = self.names.insert(name.into(), self.next).is_none();
                assert!(fresh, "created twice: {line}");
                let node = Node {
                    directory: words[1] == "mkdir",
                    ..Node::default()
                };
                self.nodes.insert(self.next, node);
            }
            ["remove", name] => {
                let node = self.names.remove(name);
                self.nodes
                    .remove(&node.unwrap_or_else(|| panic!("removed twice: {line}")));
            }
            ["rename", from, to] => {
                let node = self.names.remove(from);
                let node = node.unwrap_or_else(|| panic!("moved twice: {line}"));
                self.names.insert(to.into(), node);
            }
            ["write", _, _, data] => {
                let start = number(3) as usize;
                let old = &mut self.nodes.get_mut(&number(2)).unwrap().data;
                old.extend(std::iter::repeat_n('.', start.saturating_sub(old.len())));
                let end = old.len().min(start + data.len());
                old.replace_range(start..end, data);
            }
            ["lock", _, _] => {
                let locked = &mut self.nodes.get_mut(&number(2)).unwrap().locked;
                assert!(locked.is_none(), "locked twice: {line}");
                *locked = Some(number(3));
            }
            ["unlock", _, _] => {
                let locked = self.nodes.get_mut(&number(2)).unwrap().locked.take();
                assert_eq!(locked, Some(number(3)), "unlocked twice: {line}");
            }
            _ => panic!("{line}"),
        }
    }

    fn apply_kept(&mut self, words: &[&str]) {
        let number = |index: usize| -> u64 { words[index].parse().unwrap() };
        match words[0] {
            "repeat" => self.repeats += 1,
            "turn" => self.turns += 1,
            "counts" => {
                (self.next, self.effects, self.repeats, self.turns) = (number(1), number(2), number(3), number(4))
            }
            "done" => self.done.push_back(number(1)),
            "name" => drop(self.names.insert(words[1].into(), number(2))),
            "node" => {
                let node = Node {
                    directory: words[2] == "true",
                    locked: words[3].parse().ok(),
                    data: words[4].into(),
                };
                self.nodes.insert(number(1), node);
            }
            _ => panic!("{words:?}"),
        }
    }

    /// A short journal that comes to the same.
    fn kept(&self) -> String {
        let (next, effects, repeats, turns) = (self.next, self.effects, self.repeats, self.turns);
        let mut text = format!("0 counts {next} {effects} {repeats} {turns}\n");
        for request in &self.done {
            writeln!(text, "0 done {request}").unwrap();
        }
        for (name, node) in &self.names {
            writeln!(text, "0 name {name} {node}").unwrap();
        }
        for (number, node) in &self.nodes {
            let locked = node.locked.map_or("-".to_owned(), |owner| owner.to_string());
            writeln!(text, "0 node {number} {} {locked} {}", node.directory, node.data).unwrap();
        }
        text
    }

    fn find(&self, name: &OsStr) -> Result<u64> {
        self.names.get(text(name)).copied().ok_or(Errno::ENOENT)
    }

    fn node(&self, number: u64) -> Result<&Node> {
        self.nodes.get(&number).ok_or(Errno::ESTALE)
    }

    fn attr(&self, number: u64) -> Result<Attr> {
        let root = Node {
            directory: true,
            ..Node::default()
        };
        let node = if number == abi::ROOT { &root } else { self.node(number)? };
        Ok(Attr {
            ino: number,
            mode: if node.directory { 0o040_777 } else { 0o100_666 },
            nlink: 1 + u32::from(node.directory),
            size: node.data.len() as u64,
            ..Attr::default()
        })
    }

    fn entry(&self, name: &OsStr) -> Result<Entry> {
        let node = self.find(name)?;
        Ok(Entry {
            node,
            attr: self.attr(node)?,
            ..Entry::default()
        })
    }
}

/// Reads and writes come here, none are cached.
fn opened() -> Opened {
    Opened {
        flags: OpenReplyFlags::DIRECT_IO,
        ..Opened::default()
    }
}

pub(crate) struct Journaled {
    state: Mutex<(State, File)>,
    unlocked: Notify,
}

impl Journaled {
    pub(crate) fn open(path: &Path) -> Self {
        let state = State::read(path);
        let text = fs::read_to_string(path).unwrap_or_default();
        // A kill may have torn the last line: it has had no effect.
        if text.lines().count() > LONG || !(text.is_empty() || text.ends_with('\n')) {
            let fresh = path.with_extension("fresh");
            fs::write(&fresh, state.kept()).unwrap();
            fs::rename(&fresh, path).unwrap();
        }
        let journal = OpenOptions::new().append(true).create(true).open(path).unwrap();
        Self {
            state: Mutex::new((state, journal)),
            unlocked: Notify::new(),
        }
    }

    /// Notes that another server has begun.
    pub(crate) fn begin_turn(&self) {
        note(&mut self.state(), "0 turn");
    }

    fn state(&self) -> MutexGuard<'_, (State, File)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has an effect, once however often the request comes.
    async fn effect(&self, request: &Request, line: String, check: impl Fn(&State) -> Result<()>) -> Result<()> {
        let number = request.unique() & !UNIQUE_RESEND;
        // So that some are not yet begun when the server is killed...
        tokio::time::sleep(Duration::from_micros(300)).await;
        // (There is no return from here, so a lock that another may get first is not waited for.)
        if request.opcode() != Opcode::Setlkw {
            request.commit()?;
            // ... some begun, but not done, a few for longer than a hand-over takes...
            let long = number.is_multiple_of(32);
            tokio::time::sleep(Duration::from_micros(if long { 20_000 } else { 300 })).await;
        }
        {
            let mut guard = self.state();
            if guard.0.done.contains(&number) {
                note(&mut guard, "0 repeat");
            } else {
                check(&guard.0)?;
                request.commit()?;
                note(&mut guard, &format!("{number} {line}"));
            }
        }
        // ... and others are done, but not answered.
        tokio::time::sleep(Duration::from_micros(300)).await;
        Ok(())
    }

    async fn make(&self, request: &Request, what: &str, name: &OsStr) -> Result<Entry> {
        let line = format!("{what} {}", text(name));
        self.effect(request, line, |state| match state.find(name) {
            Ok(_) => Err(Errno::EEXIST),
            Err(_) => Ok(()),
        })
        .await?;
        self.state().0.entry(name)
    }

    async fn remove(&self, request: &Request, name: &OsStr) -> Result<()> {
        let line = format!("remove {}", text(name));
        self.effect(request, line, |state| state.find(name).map(drop)).await
    }

    async fn lock(&self, request: &Request, node: u64, owner: u64, wait: bool) -> Result<()> {
        let free = |state: &State| match state.node(node)?.locked {
            None => Ok(()),
            Some(_) => Err(Errno::EAGAIN),
        };
        loop {
            let unlocked = self.unlocked.notified();
            match self.effect(request, format!("lock {node} {owner}"), free).await {
                Err(Errno::EAGAIN) if wait => unlocked.await,
                other => return other,
            }
        }
    }

    async fn unlock(&self, request: &Request, node: u64, owner: u64) -> Result<()> {
        let held = self.state().0.node(node).is_ok_and(|node| node.locked == Some(owner));
        if held {
            let line = format!("unlock {node} {owner}");
            self.effect(request, line, |state| state.node(node).map(drop)).await?;
            self.unlocked.notify_waiters();
        }
        Ok(())
    }
}

fn note((state, journal): &mut (State, File), line: &str) {
    // In one go: few kills tear it.
    journal.write_all(format!("{line}\n").as_bytes()).unwrap();
    state.apply(line);
}

impl Filesystem for Journaled {
    async fn lookup(&self, _request: &Request, lookup: Lookup<'_>) -> Result<Entry> {
        self.state().0.entry(lookup.name)
    }

    async fn getattr(&self, _request: &Request, getattr: Getattr) -> Result<Attributes> {
        Ok(Attributes {
            attr: self.state().0.attr(getattr.node)?,
            ttl: Duration::ZERO,
        })
    }

    async fn mkdir(&self, request: &Request, mkdir: Mkdir<'_>) -> Result<Entry> {
        self.make(request, "mkdir", mkdir.name).await
    }

    async fn create(&self, request: &Request, create: Create<'_>) -> Result<(Entry, Opened)> {
        let entry = self.make(request, "create", create.name).await?;
        Ok((entry, opened()))
    }

    async fn unlink(&self, request: &Request, remove: Remove<'_>) -> Result<()> {
        self.remove(request, remove.name).await
    }

    async fn rmdir(&self, request: &Request, remove: Remove<'_>) -> Result<()> {
        self.remove(request, remove.name).await
    }

    async fn rename(&self, request: &Request, rename: Rename<'_>) -> Result<()> {
        let line = format!("rename {} {}", text(rename.name), text(rename.new_name));
        self.effect(request, line, |state| state.find(rename.name).map(drop))
            .await
    }

    async fn open(&self, _request: &Request, _open: Open) -> Result<Opened> {
        Ok(opened())
    }

    async fn read(&self, _request: &Request, read: Read) -> Result<Data> {
        let guard = self.state();
        let data = guard.0.node(read.node)?.data.as_bytes();
        let start = data.len().min(read.offset as usize);
        let end = data.len().min(start + read.size as usize);
        Ok(data[start..end].to_vec().into())
    }

    async fn write(&self, request: &Request, write: Write) -> Result<u32> {
        let data = std::str::from_utf8(&write.data).unwrap();
        let line = format!("write {} {} {data}", write.node, write.offset);
        self.effect(request, line, |state| state.node(write.node).map(drop))
            .await?;
        Ok(data.len() as u32)
    }

    async fn setlk(&self, request: &Request, lock: LockRequest) -> Result<()> {
        match lock.lock.kind {
            LockKind::Unlock => self.unlock(request, lock.node, lock.owner).await,
            _ => self.lock(request, lock.node, lock.owner, lock.wait).await,
        }
    }

    async fn release(&self, request: &Request, release: Release) -> Result<()> {
        self.unlock(request, release.node, release.lock_owner).await
    }

    async fn readdir(&self, _request: &Request, readdir: Readdir, listing: &mut Listing) -> Result<()> {
        let guard = self.state();
        let state = &guard.0;
        let mut entries: Vec<_> = state.names.iter().filter(|(_, node)| **node > readdir.offset).collect();
        entries.sort_by_key(|(_, node)| **node);
        for (name, node) in entries {
            let name = OsStr::new(name);
            if listing.add_plus(&state.entry(name)?, *node, name) == Listed::Full {
                break;
            }
        }
        Ok(())
    }
}
