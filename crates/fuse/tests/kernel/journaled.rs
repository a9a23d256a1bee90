//! A file system of directories whose every effect is in a journal, so that its server can be
//! killed at any moment and no effect is lost or happens twice.

use lazarette_fuse::abi::UNIQUE_RESEND;
use lazarette_fuse::operation::*;
use lazarette_fuse::*;
use std::collections::{BTreeMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

struct State {
    journal: File,
    names: BTreeMap<OsString, u64>,
    /// Requests whose effects are in the journal.
    done: HashSet<u64>,
    next: u64,
}

impl State {
    fn apply(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        self.done.insert(words[0].parse().unwrap());
        match words[1..] {
            ["mkdir", name] => {
                self.next += 1;
                let fresh = self.names.insert(name.into(), self.next).is_none();
                assert!(fresh, "created twice: {line}");
            }
            ["rmdir", name] => assert!(self.names.remove(OsStr::new(name)).is_some(), "removed twice: {line}"),
            ["rename", from, to] => {
                let node = self
                    .names
                    .remove(OsStr::new(from))
                    .unwrap_or_else(|| panic!("moved twice: {line}"));
                self.names.insert(to.into(), node);
            }
            _ => panic!("{line}"),
        }
    }

    fn find(&self, name: &OsStr) -> Result<u64> {
        self.names.get(name).copied().ok_or(Errno::ENOENT)
    }
}

pub(crate) struct Journaled {
    state: Mutex<State>,
}

impl Journaled {
    pub(crate) fn open(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap_or_default();
        let journal = OpenOptions::new().append(true).create(true).open(path).unwrap();
        let mut state = State {
            journal,
            names: BTreeMap::new(),
            done: HashSet::new(),
            next: 1,
        };
        for line in text.lines() {
            state.apply(line);
        }
        Self {
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has an effect, once however often the request comes.
    async fn effect(
        &self,
        request: &Request,
        words: &[&OsStr],
        check: impl FnOnce(&State) -> Result<()>,
    ) -> Result<()> {
        // So that some are not yet done when the server is killed...
        tokio::time::sleep(Duration::from_micros(300)).await;
        let number = request.unique() & !UNIQUE_RESEND;
        {
            let mut state = self.state();
            if !state.done.contains(&number) {
                check(&state)?;
                request.commit()?;
                let words: Vec<&str> = words.iter().map(|word| word.to_str().unwrap()).collect();
                let line = format!("{number} {}", words.join(" "));
                // One write: a kill does not tear it.
                state.journal.write_all(format!("{line}\n").as_bytes()).unwrap();
                state.apply(&line);
            }
        }
        // ... and others are done, but not answered.
        tokio::time::sleep(Duration::from_micros(300)).await;
        Ok(())
    }
}

fn entry(node: u64) -> Entry {
    Entry {
        node,
        attr: attr(node),
        ..Entry::default()
    }
}

fn attr(node: u64) -> Attr {
    Attr {
        ino: node,
        mode: 0o040_777,
        nlink: 2,
        ..Attr::default()
    }
}

impl Filesystem for Journaled {
    async fn lookup(&self, _request: &Request, lookup: Lookup<'_>) -> Result<Entry> {
        self.state().find(lookup.name).map(entry)
    }

    async fn getattr(&self, _request: &Request, getattr: Getattr) -> Result<Attributes> {
        Ok(Attributes {
            attr: attr(getattr.node),
            ttl: Duration::ZERO,
        })
    }

    async fn mkdir(&self, request: &Request, mkdir: Mkdir<'_>) -> Result<Entry> {
        self.effect(request, &[OsStr::new("mkdir"), mkdir.name], |state| {
            match state.find(mkdir.name) {
                Ok(_) => Err(Errno::EEXIST),
                Err(_) => Ok(()),
            }
        })
        .await?;
        self.state().find(mkdir.name).map(entry)
    }

    async fn rmdir(&self, request: &Request, remove: Remove<'_>) -> Result<()> {
        let words = [OsStr::new("rmdir"), remove.name];
        self.effect(request, &words, |state| state.find(remove.name).map(|_| ()))
            .await
    }

    async fn rename(&self, request: &Request, rename: Rename<'_>) -> Result<()> {
        let words = [OsStr::new("rename"), rename.name, rename.new_name];
        self.effect(request, &words, |state| state.find(rename.name).map(|_| ()))
            .await
    }

    async fn readdir(&self, _request: &Request, readdir: Readdir, listing: &mut Listing) -> Result<()> {
        let state = self.state();
        let mut entries: Vec<_> = state.names.iter().filter(|(_, node)| **node > readdir.offset).collect();
        entries.sort_by_key(|(_, node)| **node);
        for (name, node) in entries {
            assert!(!name.as_bytes().is_empty());
            if listing.add_plus(&entry(*node), *node, name) == Listed::Full {
                break;
            }
        }
        Ok(())
    }
}
