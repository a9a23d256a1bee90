//! A worker: chooses operations, carries them out, tells the model, and looks around.

use super::content::{Place, SLOT, bytes, record, record_of, small};
use super::data::{DataFile, SLOTS, end_of_write, offset};
use super::files::{data_folder, look, names_folder, path_of_data, path_of_log, read_at, shared_folder};
use super::journal::{Journal, Step};
use super::logs::{APPENDED, LOCKED, count, locked_place};
use super::names::{Entry, Found, inside};
use super::random::Random;
use super::stalls::Kind;
use super::{Shared, lock};
use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Data files that a worker has at the same time.
const DATA_FILES: usize = 3;
/// Names in a folder.
const NAMES: u64 = 8;
/// Levels of folders.
const LEVELS: usize = 3;
/// A failed operation is followed by a rest, lest the model fills with doubts.
const AFTER_FAILURE: Duration = Duration::from_millis(100);
/// What a mount answers that has died.
const DEAD: [i32; 4] = [
    rustix::io::Errno::NOTCONN.raw_os_error(),
    rustix::io::Errno::CONNABORTED.raw_os_error(),
    rustix::io::Errno::STALE.raw_os_error(),
    rustix::io::Errno::IO.raw_os_error(),
];

/// An open file: of a worker's data file, or of a log (no id).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Handle {
    Data(u32, u64),
    Appended,
    Locked,
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    number: u32,
    /// In `shared.models`.
    index: usize,
    home: usize,
    random: Random,
    journal: Journal,
    next: u64,
    open: BTreeMap<(Handle, usize), Arc<File>>,
    /// Mounts that have died and not come back.
    lost: BTreeSet<usize>,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, number: u32, journal: Journal) -> Result<Self> {
        let plan = &shared.plan;
        let index = (number - plan.first_worker) as usize;
        let home = number as usize % plan.mounts.len();
        for folder in [
            data_folder(shared.mount(home), number),
            names_folder(shared.mount(home), number),
        ] {
            fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        }
        // Ids differ among workers, and from those of an earlier run.
        let next = shared.model(index).last.max(u64::from(number + 1) << 40) + 1;
        Ok(Self {
            number,
            index,
            home,
            random: Random::new(plan.seed ^ next << 8),
            journal,
            next,
            open: BTreeMap::new(),
            lost: BTreeSet::new(),
            shared,
        })
    }

    pub(super) fn run(mut self) -> Result<()> {
        // What an earlier run left open is closed, and may be lost.
        for mount in 0..self.shared.plan.mounts.len() {
            self.tell(&Step::Lost { mount }, Ok(0))?;
        }
        while !self.stopped() {
            if self.ready(self.home) {
                self.act()?;
            }
            std::thread::sleep(self.shared.plan.rest);
        }
        for id in self.data_files(|_| true) {
            self.step(Kind::Fsync, Step::Sync { id })?;
        }
        for mount in self.mounts() {
            self.step(Kind::Fsync, Step::SyncLog { mount })?;
        }
        Ok(())
    }

    fn stopped(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }

    /// Whether a mount can be used; one that has died may be back.
    fn ready(&mut self, mount: usize) -> bool {
        if self.lost.contains(&mount) {
            if fs::metadata(shared_folder(self.shared.mount(mount))).is_err() {
                std::thread::sleep(AFTER_FAILURE);
                return false;
            }
            self.lost.remove(&mount);
        }
        true
    }

    /// Mounts that this worker uses now: its home, and the others unless one of both is isolated.
    fn mounts(&self) -> Vec<usize> {
        let all = 0..self.shared.plan.mounts.len();
        let may_use = |mount: &usize| {
            *mount == self.home
                || !(self.shared.is_isolated(*mount) || self.shared.is_isolated(self.home) || self.lost.contains(mount))
        };
        all.filter(may_use).collect()
    }

    /// Home most of the time.
    fn some_mount(&mut self) -> usize {
        if self.random.once_in(3) {
            self.any_mount()
        } else {
            self.home
        }
    }

    fn any_mount(&mut self) -> usize {
        let mounts = self.mounts();
        self.random.pick(&mounts).unwrap_or(self.home)
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// This worker's data files that are there for certain and that it may write now.
    fn data_files(&self, wanted: impl Fn(&DataFile) -> bool) -> Vec<u64> {
        let mounts = self.mounts();
        let model = self.shared.model(self.index);
        let there = model
            .data
            .iter()
            .filter(|(_, file)| file.exists == Some(true) && mounts.contains(&file.mount));
        there.filter(|(_, file)| wanted(file)).map(|(id, _)| *id).collect()
    }

    fn act(&mut self) -> Result<()> {
        match self.random.below(100) {
            0..24 => self.write(),
            24..32 => self.on_data(Kind::Fsync, |id, _| Step::Sync { id }),
            32..36 => self.truncate(),
            36..39 => {
                let mount = self.any_mount();
                self.on_data(Kind::Fsync, |id, _| Step::HandOver { id, mount })
            }
            39..41 => self.replace_data(),
            41..50 => self.append(),
            50..53 => self.sync_log(),
            53..56 => self.append_locked(),
            56..72 => self.change_names(),
            72..78 => self.look_at_names(),
            78..82 => self.list(),
            _ => self.read(),
        }
    }

    // Data files

    fn on_data(&mut self, kind: Kind, step: impl FnOnce(u64, &mut Self) -> Step) -> Result<()> {
        let files = self.data_files(|_| true);
        match self.random.pick(&files) {
            Some(id) => {
                let step = step(id, self);
                self.step(kind, step)
            }
            None => self.make_data(),
        }
    }

    fn write(&mut self) -> Result<()> {
        if self.data_files(|_| true).len() < DATA_FILES {
            self.make_data()?;
        }
        self.on_data(Kind::Write, |id, me| {
            let first = me.random.below(u64::from(SLOTS)) as u32;
            let wanted = if me.random.once_in(4) {
                1 + me.random.below(12)
            } else {
                1
            };
            Step::Write {
                id,
                first,
                end: end_of_write(first, wanted as u32),
                seq: me.number(),
            }
        })
    }

    fn make_data(&mut self) -> Result<()> {
        let (id, mount) = (self.number(), self.some_mount());
        self.step(Kind::Create, Step::Make { id, mount })
    }

    fn truncate(&mut self) -> Result<()> {
        // What is cut in the middle must be known.
        let files = self.data_files(DataFile::is_settled);
        let Some(id) = self.random.pick(&files) else {
            return self.on_data(Kind::Fsync, |id, _| Step::Sync { id });
        };
        let slot = self.random.below(u64::from(SLOTS)) as u32;
        let size = offset(self.shared.plan.chunk, slot) + 8 * self.random.below(SLOT as u64 / 8);
        self.step(Kind::Truncate, Step::Truncate { id, size })
    }

    fn replace_data(&mut self) -> Result<()> {
        let files = self.data_files(|_| true);
        if files.len() >= DATA_FILES
            && let Some(id) = self.random.pick(&files)
        {
            self.step(Kind::Unlink, Step::Drop { id })?;
            self.open
                .retain(|(handle, _), _| *handle != Handle::Data(self.number, id));
        }
        self.make_data()
    }

    /// Reads some slots of any worker's data file through any mount.
    fn read(&mut self) -> Result<()> {
        let index = self.random.below(self.shared.models.len() as u64) as usize;
        let mount = self.any_mount();
        let worker = self.shared.plan.first_worker + index as u32;
        let first = self.random.below(u64::from(SLOTS)) as u32;
        let slots = first..end_of_write(first, 1 + self.random.below(4) as u32);
        // Drawn whatever the others have done so far: the seed decides what this worker does next.
        let (which, as_newcomer) = (self.random.below(1 << 32), self.random.once_in(2));
        let (id, floors) = {
            let model = self.shared.model(index);
            let there: Vec<_> = model
                .data
                .iter()
                .filter(|(_, file)| file.exists == Some(true))
                .collect();
            let at = (which as usize).checked_rem(there.len()).unwrap_or(0);
            let Some((id, file)) = there.get(at) else { return Ok(()) };
            let id = **id;
            let buffered = !self.shared.plan.full_disks;
            (id, file.floors(slots.clone(), mount == file.mount, buffered))
        };
        let handle = Handle::Data(worker, id);
        // Sometimes as a newcomer, sometimes with what is known from before.
        // Not in place of the one that writes: what its close says would be lost, and the next fsync would
        // know nothing of writes that failed before.
        if as_newcomer && !(index == self.index && floors.beside_writer()) {
            self.open.remove(&(handle, mount));
        }
        let start = offset(self.shared.plan.chunk, slots.start);
        let length = slots.len() * SLOT;
        let found = self
            .watch(Kind::Open, mount, |me| me.file(handle, mount))
            .and_then(|file| self.watch(Kind::Read, mount, |_| read_at(&file, start, length)));
        let mut model = self.shared.model(index);
        let Some(file) = model.data.get_mut(&id).filter(|file| file.exists == Some(true)) else {
            // Removed meanwhile.
            drop(model);
            self.open.remove(&(handle, mount));
            return Ok(());
        };
        let wrong = match found {
            Ok(found) => file.judge(id, &floors, &found).err(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some("lost".to_owned()),
            Err(error) => {
                drop(model);
                return self.failed(mount, &error);
            }
        };
        drop(model);
        if let Some(wrong) = wrong {
            self.problem(mount, &format!("data file {id} of worker {worker}: {wrong}"));
        }
        Ok(())
    }

    // Logs

    fn append(&mut self) -> Result<()> {
        let (seq, mount) = (self.number(), self.some_mount());
        self.step(Kind::Append, Step::Append { seq, mount })
    }

    fn sync_log(&mut self) -> Result<()> {
        let mount = self.some_mount();
        self.step(Kind::Fsync, Step::SyncLog { mount })
    }

    fn append_locked(&mut self) -> Result<()> {
        let (seq, mount) = (self.number(), self.some_mount());
        // What a full disk has refused is told by fsync; the lock goes to the next one all the same.
        let synced = self.random.once_in(2) || self.shared.plan.full_disks;
        let step = Step::Locked { seq };
        self.begin(&step)?;
        let result = self.watch(Kind::LockedAppend, mount, |me| {
            let file = me.file(Handle::Locked, mount)?;
            let known = lock(&me.shared.locked).count;
            flock(&file, FlockOperation::LockExclusive)?;
            let place = me.append_under_lock(&file, mount, seq, known);
            let place = place.and_then(|place| {
                if synced {
                    file.sync_all().map(|()| place)
                } else {
                    Ok(place)
                }
            });
            let unlocked = flock(&file, FlockOperation::Unlock);
            let place = place?;
            unlocked?;
            Ok(place)
        });
        if let Ok(place) = result {
            let acknowledged = lock(&self.shared.locked).acknowledged(place, self.number, seq);
            if let Err(problem) = acknowledged {
                self.problem(mount, &problem);
            }
        }
        self.end(&step, mount, result)
    }

    fn append_under_lock(&self, file: &File, mount: usize, seq: u64, known: u64) -> io::Result<u64> {
        let chunk = self.shared.plan.chunk;
        let place = count(file)?;
        if place < known {
            self.problem(
                mount,
                &format!("locked log: {place} records under the lock, {known} are acknowledged"),
            );
        }
        if let Some(last) = place.checked_sub(1) {
            let found = read_at(file, locked_place(chunk, last), super::content::RECORD)?;
            if let Err(wrong) = record_of(&found) {
                self.problem(mount, &format!("locked log: record {last} under the lock is {wrong}"));
            }
        }
        file.write_all_at(&record(u64::from(self.number) + 1, seq), locked_place(chunk, place))?;
        // The count must not become durable before the record.
        file.sync_all()?;
        file.write_all_at(&(place + 1).to_le_bytes(), 0)?;
        Ok(place)
    }

    // Names

    fn change_names(&mut self) -> Result<()> {
        let choice = self.random.below(16);
        let files = self.names(|entry| !entry.folder);
        let folders = self.names(|entry| entry.folder);
        let free = self.free_name();
        let (kind, step) = match choice {
            0..5 => {
                let Some(path) = free else { return Ok(()) };
                (
                    Kind::Create,
                    Step::Create {
                        path,
                        id: self.number(),
                    },
                )
            }
            5..7 => {
                let Some(path) = free.filter(|path| path.matches('/').count() < LEVELS) else {
                    return Ok(());
                };
                (
                    Kind::Mkdir,
                    Step::Mkdir {
                        path,
                        id: self.number(),
                    },
                )
            }
            7 => {
                let (Some(from), Some(to)) = (self.random.pick(&files), free) else {
                    return Ok(());
                };
                (Kind::Link, Step::Link { from, to })
            }
            8..10 => {
                let movable = if choice == 8 { &files } else { &folders };
                let (Some(from), Some(to)) = (self.random.pick(movable), free) else {
                    return Ok(());
                };
                if inside(&to, &from) || self.has_doubts_inside(&from) {
                    return Ok(());
                }
                (Kind::Rename, Step::Rename { from, to })
            }
            10..12 => {
                // Replaces.
                let (Some(from), Some(to)) = (self.random.pick(&files), self.random.pick(&files)) else {
                    return Ok(());
                };
                (Kind::Rename, Step::Rename { from, to })
            }
            12..15 => {
                let Some(path) = self.random.pick(&files) else {
                    return Ok(());
                };
                (Kind::Unlink, Step::Unlink { path })
            }
            _ => {
                let empty: Vec<String> = folders.iter().filter(|path| self.is_empty(path)).cloned().collect();
                let Some(path) = self.random.pick(&empty) else {
                    return Ok(());
                };
                (Kind::Rmdir, Step::Rmdir { path })
            }
        };
        let changed = match &step {
            Step::Rename { from, to } => vec![from.clone(), to.clone()],
            Step::Link { to, .. } => vec![to.clone()],
            Step::Create { path, .. } | Step::Mkdir { path, .. } | Step::Unlink { path } | Step::Rmdir { path } => {
                vec![path.clone()]
            }
            _ => Vec::new(),
        };
        self.step(kind, step)?;
        for path in changed {
            let mount = self.any_mount();
            self.look_at(&path, mount)?;
        }
        Ok(())
    }

    /// Certain names without doubtful ones above or below.
    fn names(&self, wanted: impl Fn(&Entry) -> bool) -> Vec<String> {
        let model = self.shared.model(self.index);
        let names = model.tree.names.iter().filter(|(_, entry)| wanted(entry));
        names.map(|(path, _)| path.clone()).collect()
    }

    fn free_name(&mut self) -> Option<String> {
        let mut folders = self.names(|entry| entry.folder);
        folders.push(String::new());
        let folder = self.random.pick(&folders)?;
        let name = format!("n{}", self.random.below(NAMES));
        let path = if folder.is_empty() {
            name
        } else {
            format!("{folder}/{name}")
        };
        let model = self.shared.model(self.index);
        (!model.tree.names.contains_key(&path) && !model.tree.doubtful(&path)).then_some(path)
    }

    fn has_doubts_inside(&self, folder: &str) -> bool {
        self.shared.model(self.index).tree.doubtful(folder)
    }

    fn is_empty(&self, folder: &str) -> bool {
        let model = self.shared.model(self.index);
        model.tree.children(folder).next().is_none() && !model.tree.doubtful(folder)
    }

    fn look_at_names(&mut self) -> Result<()> {
        let mount = self.any_mount();
        let mut paths = self.names(|_| true);
        paths.extend(self.free_name());
        match self.random.pick(&paths) {
            Some(path) => self.look_at(&path, mount),
            None => Ok(()),
        }
    }

    /// Compares what is under a name with the model.
    fn look_at(&mut self, path: &str, mount: usize) -> Result<()> {
        let (expected, links) = {
            let model = self.shared.model(self.index);
            if model.tree.doubtful(path) {
                return Ok(());
            }
            let expected = model.tree.names.get(path).copied();
            let certain = model.tree.doubts.is_empty();
            (
                expected,
                expected
                    .filter(|entry| certain && !entry.folder)
                    .map(|entry| model.tree.links(entry.id)),
            )
        };
        let at = self.path(path, mount);
        let found = self.watch(Kind::Stat, mount, |_| {
            let found = look(&at)?;
            Ok((found, fs::symlink_metadata(&at)?.nlink()))
        });
        let wrong = match (found, expected) {
            (Err(error), None) if error.kind() == io::ErrorKind::NotFound => None,
            (Err(error), Some(_)) if error.kind() == io::ErrorKind::NotFound => Some("is lost".to_owned()),
            (Err(error), _) => return self.failed(mount, &error),
            (Ok(_), None) => Some("is there and must not be".to_owned()),
            (Ok((Found::Folder, _)), Some(Entry { folder: true, .. })) => None,
            (Ok((Found::File(id), found)), Some(entry)) if id == entry.id => links
                .filter(|links| *links as u64 != found)
                .map(|links| format!("has {found} names, expected {links}")),
            (Ok((found, _)), Some(entry)) => Some(format!("is {found:?}, expected {entry:?}")),
        };
        if let Some(wrong) = wrong {
            self.problem(mount, &format!("{path} {wrong}"));
        }
        Ok(())
    }

    /// Compares a folder's listing with the model.
    fn list(&mut self) -> Result<()> {
        let mount = self.any_mount();
        let mut folders = self.names(|entry| entry.folder);
        folders.push(String::new());
        let Some(folder) = self.random.pick(&folders) else {
            return Ok(());
        };
        let at = self.path(&folder, mount);
        let found = self.watch(Kind::List, mount, |_| {
            let names = fs::read_dir(&at)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
            names.collect::<io::Result<BTreeSet<String>>>()
        });
        let found = match found {
            Ok(found) => found,
            Err(error) => return self.failed(mount, &error),
        };
        let wrong = {
            let model = self.shared.model(self.index);
            let expected: BTreeSet<String> = model.tree.children(&folder).map(|(name, _)| name.to_owned()).collect();
            let doubtful = |name: &&String| {
                let path = if folder.is_empty() {
                    (*name).clone()
                } else {
                    format!("{folder}/{name}")
                };
                model.tree.doubtful(&path)
            };
            let wrong: Vec<_> = found
                .symmetric_difference(&expected)
                .filter(|name| !doubtful(name))
                .collect();
            (!wrong.is_empty()).then(|| format!("listing of {folder:?}: lists {found:?}, expected {expected:?}"))
        };
        if let Some(wrong) = wrong {
            self.problem(mount, &wrong);
        }
        Ok(())
    }

    fn path(&self, path: &str, mount: usize) -> PathBuf {
        names_folder(self.shared.mount(mount), self.number).join(path)
    }

    // Carrying out

    /// An open file of this mount.
    fn file(&mut self, handle: Handle, mount: usize) -> io::Result<Arc<File>> {
        if let Some(file) = self.open.get(&(handle, mount)) {
            return Ok(Arc::clone(file));
        }
        let folder = self.shared.mount(mount);
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true);
        let file = match handle {
            Handle::Data(worker, id) => options.open(path_of_data(folder, worker, id))?,
            Handle::Appended => options.append(true).open(path_of_log(folder, APPENDED))?,
            Handle::Locked => options.open(path_of_log(folder, LOCKED))?,
        };
        let file = Arc::new(file);
        self.open.insert((handle, mount), Arc::clone(&file));
        Ok(file)
    }

    /// Carries a step out, between two entries of the journal.
    fn step(&mut self, kind: Kind, step: Step) -> Result<()> {
        let mount = self.mount_of(&step);
        self.begin(&step)?;
        let result = self.watch(kind, mount, |me| me.carry_out(&step, mount));
        self.end(&step, mount, result.map(|()| 0))
    }

    /// Through which mount a step goes.
    fn mount_of(&mut self, step: &Step) -> usize {
        let of_file = |me: &Self, id: &u64| me.shared.model(me.index).data.get(id).map(|file| file.mount);
        match step {
            Step::Make { mount, .. } | Step::Append { mount, .. } | Step::SyncLog { mount } | Step::Lost { mount } => {
                *mount
            }
            Step::Write { id, .. } | Step::Sync { id } | Step::HandOver { id, .. } | Step::Truncate { id, .. } => {
                of_file(self, id).unwrap_or(self.home)
            }
            _ => self.some_mount(),
        }
    }

    fn carry_out(&mut self, step: &Step, mount: usize) -> io::Result<()> {
        let folder = self.shared.mount(mount).to_owned();
        match step {
            Step::Make { id, .. } => {
                let path = path_of_data(&folder, self.number, *id);
                let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
                self.open
                    .insert((Handle::Data(self.number, *id), mount), Arc::new(file));
            }
            Step::Write { id, first, end, seq } => {
                let content = (*first..*end).flat_map(|slot| bytes(Place { file: *id, slot }, *seq, SLOT));
                let content: Vec<u8> = content.collect();
                let file = self.file(Handle::Data(self.number, *id), mount)?;
                file.write_all_at(&content, offset(self.shared.plan.chunk, *first))?;
            }
            Step::Sync { id } | Step::HandOver { id, .. } => {
                self.file(Handle::Data(self.number, *id), mount)?.sync_all()?;
            }
            Step::Truncate { id, size } => self.file(Handle::Data(self.number, *id), mount)?.set_len(*size)?,
            Step::Drop { id } => fs::remove_file(path_of_data(&folder, self.number, *id))?,
            Step::Append { seq, .. } => {
                let file = self.file(Handle::Appended, mount)?;
                let record = record(u64::from(self.number) + 1, *seq);
                let written = (&*file).write(&record)?;
                if written < record.len() {
                    return Err(io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error()));
                }
            }
            Step::SyncLog { .. } => self.file(Handle::Appended, mount)?.sync_data()?,
            Step::Create { path, id } => {
                let file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .open(self.path(path, mount))?;
                (&file).write_all(&small(*id))?;
                file.sync_all()?;
            }
            Step::Mkdir { path, .. } => fs::create_dir(self.path(path, mount))?,
            Step::Unlink { path } => fs::remove_file(self.path(path, mount))?,
            Step::Rmdir { path } => fs::remove_dir(self.path(path, mount))?,
            Step::Rename { from, to } => fs::rename(self.path(from, mount), self.path(to, mount))?,
            Step::Link { from, to } => fs::hard_link(self.path(from, mount), self.path(to, mount))?,
            Step::Locked { .. } | Step::Lost { .. } => {}
        }
        Ok(())
    }

    /// Measures an operation.
    fn watch<T>(&mut self, kind: Kind, mount: usize, work: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        self.shared.clock.begin(self.number, kind, mount);
        let result = work(self);
        // That a name is not there is an answer like another; whether it is right is judged apart.
        let failed = result
            .as_ref()
            .err()
            .filter(|error| error.kind() != io::ErrorKind::NotFound);
        self.shared.clock.end(self.number, failed.map(errno));
        result
    }

    fn begin(&mut self, step: &Step) -> Result<()> {
        self.journal.begin(step)?;
        self.shared.model(self.index).begin(step);
        Ok(())
    }

    fn end(&mut self, step: &Step, mount: usize, result: io::Result<u64>) -> Result<()> {
        let outcome = result.as_ref().map(|place| *place).map_err(errno);
        self.journal.end(outcome)?;
        self.shared.model(self.index).end(step, outcome.ok());
        match result {
            Ok(_) => Ok(()),
            Err(error) => {
                if error.kind() == io::ErrorKind::NotFound {
                    self.problem(mount, &format!("{step:?} found nothing"));
                }
                self.failed(mount, &error)
            }
        }
    }

    /// A step that is no operation.
    fn tell(&mut self, step: &Step, outcome: Result<u64, i32>) -> Result<()> {
        self.begin(step)?;
        self.journal.end(outcome)?;
        self.shared.model(self.index).end(step, outcome.ok());
        Ok(())
    }

    /// After a failure: if the mount has died, all that it has not made durable is in doubt.
    fn failed(&mut self, mount: usize, error: &io::Error) -> Result<()> {
        if DEAD.contains(&errno(error)) {
            self.tell(&Step::Lost { mount }, Ok(0))?;
            self.open.retain(|(_, of), _| *of != mount);
            self.lost.insert(mount);
        }
        std::thread::sleep(AFTER_FAILURE);
        Ok(())
    }

    fn problem(&self, mount: usize, what: &str) {
        self.shared
            .problem(format!("worker {}, mount {mount}: {what}", self.number));
    }
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(rustix::io::Errno::IO.raw_os_error())
}
