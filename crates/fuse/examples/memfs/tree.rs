//! Nodes in memory.

use crate::locks::Locks;
use lazarette_fuse::{Attr, Errno, Kind, Result, Timestamp};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};

pub(crate) const PAGE: u64 = 4096;

/// A file's bytes, holes left out.
#[derive(Debug, Default)]
pub(crate) struct Pages(BTreeMap<u64, Box<[u8]>>);

impl Pages {
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) {
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let count = (PAGE as usize - within).min(into.len() - done);
            match self.0.get(&(at / PAGE)) {
                Some(page) => into[done..done + count].copy_from_slice(&page[within..within + count]),
                None => into[done..done + count].fill(0),
            }
            done += count;
        }
    }

    pub(crate) fn write(&mut self, offset: u64, from: &[u8]) {
        let mut done = 0;
        while done < from.len() {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let count = (PAGE as usize - within).min(from.len() - done);
            let page = self.0.entry(at / PAGE).or_insert_with(|| vec![0; PAGE as usize].into());
            page[within..within + count].copy_from_slice(&from[done..done + count]);
            done += count;
        }
    }

    /// Zeroes a range and gives whole pages of it back.
    pub(crate) fn clear(&mut self, start: u64, end: u64) {
        let first = start / PAGE;
        let touched: Vec<u64> = self
            .0
            .range(first..)
            .map(|(number, _)| *number)
            .take_while(|n| n * PAGE < end)
            .collect();
        for number in touched {
            let from = start.max(number * PAGE);
            let to = end.min((number + 1) * PAGE);
            if to - from == PAGE {
                self.0.remove(&number);
            } else if let Some(page) = self.0.get_mut(&number) {
                page[(from % PAGE) as usize..][..(to - from) as usize].fill(0);
            }
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.len() as u64
    }

    /// The first byte from `offset` on that is data, or a hole.
    pub(crate) fn seek(&self, offset: u64, size: u64, data: bool) -> Result<u64> {
        if offset >= size {
            return Err(Errno::ENXIO);
        }
        let mut number = offset / PAGE;
        while number * PAGE < size {
            if self.0.contains_key(&number) == data {
                return Ok(offset.max(number * PAGE));
            }
            number += 1;
        }
        if data { Err(Errno::ENXIO) } else { Ok(size) }
    }
}

#[derive(Debug)]
pub(crate) enum Content {
    File(Pages),
    Directory {
        entries: BTreeMap<OsString, u64>,
        parent: u64,
    },
    Symlink(OsString),
    Special,
}

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) attr: Attr,
    pub(crate) born: Timestamp,
    pub(crate) content: Content,
    pub(crate) xattrs: BTreeMap<OsString, Vec<u8>>,
    pub(crate) locks: Locks,
    /// References of the kernel: lookups and open files.
    pub(crate) references: u64,
}

impl Node {
    pub(crate) fn is_directory(&self) -> bool {
        matches!(self.content, Content::Directory { .. })
    }

    pub(crate) fn attr(&self) -> Attr {
        let blocks = match &self.content {
            Content::File(pages) => pages.count() * 8,
            _ => 0,
        };
        Attr {
            blocks,
            blksize: PAGE as u32,
            ..self.attr
        }
    }
}

#[derive(Debug)]
pub(crate) struct Tree {
    nodes: HashMap<u64, Node>,
    next: u64,
}

impl Tree {
    pub(crate) fn new(root: Attr) -> Self {
        let content = Content::Directory {
            entries: BTreeMap::new(),
            parent: 1,
        };
        let root = Node {
            attr: root,
            born: root.ctime,
            content,
            xattrs: BTreeMap::new(),
            locks: Locks::default(),
            references: 1,
        };
        Self {
            nodes: HashMap::from([(1, root)]),
            next: 1,
        }
    }

    pub(crate) fn node(&self, number: u64) -> Result<&Node> {
        self.nodes.get(&number).ok_or(Errno::ESTALE)
    }

    pub(crate) fn node_mut(&mut self, number: u64) -> Result<&mut Node> {
        self.nodes.get_mut(&number).ok_or(Errno::ESTALE)
    }

    pub(crate) fn len(&self) -> u64 {
        self.nodes.len() as u64
    }

    pub(crate) fn entries(&self, directory: u64) -> Result<&BTreeMap<OsString, u64>> {
        match &self.node(directory)?.content {
            Content::Directory { entries, .. } => Ok(entries),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn entries_mut(&mut self, directory: u64) -> Result<&mut BTreeMap<OsString, u64>> {
        let now = Timestamp::now();
        let node = self.node_mut(directory)?;
        node.attr.mtime = now;
        node.attr.ctime = now;
        match &mut node.content {
            Content::Directory { entries, .. } => Ok(entries),
            _ => Err(Errno::ENOTDIR),
        }
    }

    pub(crate) fn find(&self, directory: u64, name: &OsStr) -> Result<u64> {
        if name.len() > 255 {
            return Err(Errno::ENAMETOOLONG);
        }
        self.entries(directory)?.get(name).copied().ok_or(Errno::ENOENT)
    }

    /// As `find`, and the two names that come when a node is opened by its file handle.
    pub(crate) fn look_up(&self, node: u64, name: &OsStr) -> Result<u64> {
        match (name.as_encoded_bytes(), &self.node(node)?.content) {
            (b".", _) => Ok(node),
            (b"..", Content::Directory { parent, .. }) => Ok(*parent),
            _ => self.find(node, name),
        }
    }

    /// A new node without a name.
    pub(crate) fn create(&mut self, parent: u64, attr: Attr, content: Content) -> Result<u64> {
        let directory = &self.node(parent)?.attr;
        let (inherit, gid, gone) = (directory.mode & 0o2000 != 0, directory.gid, directory.nlink == 0);
        if gone {
            return Err(Errno::ENOENT);
        }
        self.next += 1;
        let number = self.next;
        let now = Timestamp::now();
        let mut attr = Attr {
            ino: number,
            atime: now,
            mtime: now,
            ctime: now,
            ..attr
        };
        if inherit {
            attr.gid = gid;
            if Kind::of_mode(attr.mode) == Some(Kind::Directory) {
                attr.mode |= 0o2000;
            }
        }
        let node = Node {
            attr,
            born: now,
            content,
            xattrs: BTreeMap::new(),
            locks: Locks::default(),
            references: 0,
        };
        self.nodes.insert(number, node);
        Ok(number)
    }

    /// Gives a node a name that is free.
    pub(crate) fn enter(&mut self, directory: u64, name: &OsStr, number: u64) -> Result<()> {
        self.entries_mut(directory)?.insert(name.to_owned(), number);
        let node = self.node_mut(number)?;
        node.attr.ctime = Timestamp::now();
        if let Content::Directory { parent, .. } = &mut node.content {
            *parent = directory;
            self.node_mut(directory)?.attr.nlink += 1;
        } else {
            node.attr.nlink += 1;
        }
        Ok(())
    }

    /// Takes a name away; the node's link count goes down.
    pub(crate) fn remove(&mut self, directory: u64, name: &OsStr) -> Result<()> {
        let number = self.find(directory, name)?;
        self.entries_mut(directory)?.remove(name);
        let node = self.node_mut(number)?;
        node.attr.ctime = Timestamp::now();
        if node.is_directory() {
            node.attr.nlink = 0;
            self.node_mut(directory)?.attr.nlink -= 1;
        } else {
            node.attr.nlink -= 1;
        }
        self.drop_unused(number);
        Ok(())
    }

    /// Takes a name away that the node gets elsewhere.
    pub(crate) fn detach(&mut self, directory: u64, name: &OsStr) -> Result<u64> {
        let number = self.find(directory, name)?;
        self.entries_mut(directory)?.remove(name);
        let node = self.node_mut(number)?;
        if node.is_directory() {
            self.node_mut(directory)?.attr.nlink -= 1;
        } else {
            node.attr.nlink -= 1;
        }
        Ok(number)
    }

    pub(crate) fn drop_unused(&mut self, number: u64) {
        if self
            .nodes
            .get(&number)
            .is_some_and(|node| node.attr.nlink == 0 && node.references == 0)
        {
            self.nodes.remove(&number);
        }
    }
}
