//! What clients do, and what they check while they do it. Each mount runs all of these side by side.

use crate::bugs::Bug;
use crate::conditions::World;
use crate::model::{Model, Register, UNKNOWN, judge};
use lazarette_client::{
    Error, File, Found, Kind, LockKind, LockMode, LockRange, NewNode, OpenMode, SetAttributes, Volume,
};
use lazarette_types::{ErrorCode, ROOT_INODE};
use rand::Rng;
use rand::rngs::StdRng;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep};

const ROOT: u64 = ROOT_INODE.0;
/// Bytes of a number in a file.
const NUMBER: usize = 600;
/// Bytes of a record in the log.
const RECORD: usize = 32;
/// Chunks of the volume.
pub(crate) const CHUNK: u64 = 1 << 20;
/// Places for numbers in a file: in different chunks, and across the blocks of one.
const PLACES: [u64; 4] = [0, CHUNK + 3900, 2 * CHUNK + 100, 4000];
/// Files whose numbers are changed under a lock.
const COUNTERS: [&str; 2] = ["counter-a", "counter-b"];
const LOG: &str = "log";
/// When names are raced for.
const RACE_EVERY: Duration = Duration::from_secs(2);

/// What all clients share.
pub(crate) struct Shared {
    pub(crate) world: Arc<World>,
    model: Mutex<Model>,
}

impl Shared {
    pub(crate) fn new(world: &Arc<World>) -> Arc<Self> {
        Arc::new(Self {
            world: Arc::clone(world),
            model: Mutex::default(),
        })
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One mount of the volume.
#[derive(Clone)]
pub(crate) struct Mount {
    pub(crate) shared: Arc<Shared>,
    pub(crate) volume: Volume,
    /// The machine and which of its mounts this is.
    pub(crate) name: String,
    /// Of the machine.
    pub(crate) number: u64,
    /// It changes nothing. Of a storage node with a change that it cannot commit, nobody learns anything; so only
    /// who changes nothing could be told something stale.
    pub(crate) only_looks: bool,
    /// When it unmounts by itself.
    pub(crate) until: Instant,
}

/// Why work ends before the faults do: the session is lost.
type Work = Result<(), Error>;

fn new_file() -> NewNode {
    NewNode::new(Kind::File, 0o644)
}

/// A number, as it stands in a file.
fn number_text(file: &str, place: u64, number: u64) -> Vec<u8> {
    let mut text = format!("{file}@{place}={number:010};")
        .repeat(NUMBER / 20 + 1)
        .into_bytes();
    text.truncate(NUMBER);
    text
}

/// The number that stands there: 0 if nothing was ever written.
fn number_of(file: &str, place: u64, bytes: &[u8]) -> Result<u64, String> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    let text = String::from_utf8_lossy(bytes);
    let number = text.split_once('=').and_then(|(_, rest)| rest.get(..10)?.parse().ok());
    match number {
        Some(number) if number_text(file, place, number) == bytes => Ok(number),
        _ => Err(format!("{} bytes are no number: {text:.80?}", bytes.len())),
    }
}

/// Makes what all clients share.
pub(crate) async fn prepare(shared: &Arc<Shared>, volume: &Volume) -> Work {
    for file in COUNTERS.iter().chain([&LOG]) {
        let (file, _) = volume
            .create(ROOT, file.as_bytes(), new_file(), true, OpenMode::default())
            .await?;
        file.close().await?;
    }
    let mut model = shared.model();
    for counter in COUNTERS {
        model.counters.insert(counter.to_owned(), Default::default());
    }
    Ok(())
}

impl Mount {
    fn world(&self) -> &World {
        &self.shared.world
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.shared.model()
    }

    fn moment(&self) -> u64 {
        self.world().moment()
    }

    fn going_on(&self) -> bool {
        !self.world().conditions().ending && Instant::now() < self.until
    }

    fn random<T>(&self, draw: impl FnOnce(&mut StdRng) -> T) -> T {
        draw(&mut self.world().rng())
    }

    async fn pause(&self, most: u64) {
        let time = self.world().some_ms(most);
        sleep(time).await;
    }

    fn note(&self, what: impl std::fmt::Display) {
        self.world().note(&self.name, what);
    }

    fn judge(&self, what: impl std::fmt::Display, result: Result<(), String>) {
        judge(self.world(), &self.name, what, result);
    }

    /// An error that is not the loss of the session.
    fn unexpected(&self, what: impl std::fmt::Display, error: Error) -> Work {
        match error.code() {
            ErrorCode::SessionExpired | ErrorCode::Stale => Err(error),
            code => {
                self.world().violation(&self.name, format!("{what}: {code:?}: {error}"));
                Ok(())
            }
        }
    }

    /// All of it, until the faults end or the session is lost.
    pub(crate) async fn work(&self) -> Work {
        if self.only_looks {
            return self.look().await;
        }
        let (names, numbers, counters, log) = (self.names(), self.numbers(), self.counters(), self.append());
        let (looks, races, orphans) = (self.look(), self.race(), self.orphans());
        futures::try_join!(names, numbers, counters, log, looks, races, orphans).map(drop)
    }

    /// Names that only this mount changes: each change succeeds, once.
    async fn names(&self) -> Work {
        let mut made = 0;
        let mut mine: Vec<String> = Vec::new();
        while self.going_on() {
            self.pause(120).await;
            let choice = self.random(|rng| rng.random_range(0..10));
            let some = |count: usize| self.random(|rng| rng.random_range(0..count));
            if mine.is_empty() || (choice < 4 && mine.len() < 12) {
                made += 1;
                let name = format!("{}-{made}", self.name);
                self.model().names.insert(name.clone(), Register::new(None));
                self.create(&name).await?;
                mine.push(name);
            } else if choice < 6 {
                let name = mine[some(mine.len())].clone();
                match self.model().names.get(&name).map(Register::last) {
                    Some((Some(_), true)) => {}
                    _ => continue,
                }
                self.unlink(&name).await?;
            } else if choice < 7 {
                let name = mine[some(mine.len())].clone();
                match self.model().names.get(&name).map(Register::last) {
                    Some((None, true)) => {}
                    _ => continue,
                }
                self.create(&name).await?;
            } else {
                let (from, to) = (mine[some(mine.len())].clone(), mine[some(mine.len())].clone());
                if from != to {
                    self.rename(&from, &to).await?;
                }
            }
        }
        Ok(())
    }

    async fn create(&self, name: &str) -> Work {
        self.begin(name, Some(UNKNOWN));
        let result = self
            .volume
            .create(ROOT, name.as_bytes(), new_file(), true, OpenMode::default())
            .await;
        self.note(format_args!(
            "create {name}: {:?}",
            result.as_ref().map(|(file, _)| file.ino()).map_err(Error::code)
        ));
        match result {
            Ok((file, entry)) => {
                self.end_as(name, Some(entry.attr.ino));
                if self.random(|rng| rng.random_bool(0.7)) {
                    file.close().await.or_else(|error| self.unexpected("close", error))?;
                }
                Ok(())
            }
            Err(error) => self.unexpected(format_args!("create {name}, which is not there"), error),
        }
    }

    async fn unlink(&self, name: &str) -> Work {
        self.begin(name, None);
        let result = self.volume.unlink(ROOT, name.as_bytes()).await;
        self.note(format_args!(
            "unlink {name}: {:?}",
            result.as_ref().map_err(Error::code)
        ));
        match result {
            Ok(()) => {
                self.end(name);
                Ok(())
            }
            Err(error) => self.unexpected(format_args!("unlink {name}, which is there"), error),
        }
    }

    async fn rename(&self, from: &str, to: &str) -> Work {
        let (ino, target) = {
            let model = self.model();
            match (model.names[from].last(), model.names[to].last()) {
                ((Some(ino), true), (target, true)) => (ino, target),
                _ => return Ok(()),
            }
        };
        let exchange = target.is_some() && self.random(|rng| rng.random_bool(0.4));
        self.begin(from, target.filter(|_| exchange));
        self.begin(to, Some(ino));
        let result = self
            .volume
            .rename((ROOT, from.as_bytes()), (ROOT, to.as_bytes()), false, exchange)
            .await;
        self.note(format_args!(
            "rename {from} {to} {exchange}: {:?}",
            result.as_ref().map_err(Error::code)
        ));
        match result {
            Ok(()) => {
                self.end(from);
                self.end(to);
                Ok(())
            }
            Err(error) => self.unexpected(format_args!("rename {from}, which is there, to {to}"), error),
        }
    }

    fn begin(&self, name: &str, value: Option<u64>) {
        let now = self.moment();
        if let Some(register) = self.model().names.get_mut(name) {
            register.begin(now, value);
        }
    }

    fn end(&self, name: &str) {
        let now = self.moment();
        if let Some(register) = self.model().names.get_mut(name) {
            register.end(now);
        }
    }

    fn end_as(&self, name: &str, value: Option<u64>) {
        let now = self.moment();
        if let Some(register) = self.model().names.get_mut(name) {
            register.end_as(now, value);
        }
    }

    fn numbers_name(&self) -> String {
        format!("numbers-{}", self.name)
    }

    /// Numbers in a file that only this mount writes.
    async fn numbers(&self) -> Work {
        let name = self.numbers_name();
        let created = self
            .volume
            .create(ROOT, name.as_bytes(), new_file(), true, OpenMode::default())
            .await;
        let file = match created {
            Ok((file, _)) => file,
            Err(error) => return self.unexpected("create numbers", error),
        };
        for place in PLACES {
            self.model().slots.insert((name.clone(), place), Register::new(0));
        }
        let mut number = 0;
        while self.going_on() {
            self.pause(200).await;
            let place = PLACES[self.random(|rng| rng.random_range(0..PLACES.len()))];
            number += 1;
            let slot = (name.clone(), place);
            let now = self.moment();
            if let Some(register) = self.model().slots.get_mut(&slot) {
                register.begin(now, number);
            }
            let written = file.write(place, &number_text(&name, place, number)).await;
            let result = match written {
                Ok(_) => self.fsync(&file).await,
                Err(error) => Err(error),
            };
            self.note(format_args!(
                "write {name} {place} {number}: {:?}",
                result.as_ref().map_err(Error::code)
            ));
            match result {
                Ok(()) => {
                    let now = self.moment();
                    if let Some(register) = self.model().slots.get_mut(&slot) {
                        register.end(now);
                    }
                }
                Err(error) if error.code() == ErrorCode::NoSpace => {}
                Err(error) => self.unexpected("write and fsync", error)?,
            }
        }
        // Its error was told by fsync.
        let _ = file.close().await;
        Ok(())
    }

    async fn fsync(&self, file: &File) -> Work {
        match file.fsync().await {
            Err(error) if self.world().bug == Some(Bug::IgnoredFlushErrors) => {
                self.note(format_args!("fsync: {error}"));
                Ok(())
            }
            result => result,
        }
    }

    async fn open(&self, name: &str, mode: OpenMode) -> Result<File, Error> {
        let entry = self.volume.lookup(ROOT, name.as_bytes()).await?;
        let (file, _) = self.volume.open(entry.attr.ino, mode).await?;
        Ok(file)
    }

    /// Numbers in files that all change, under a lock.
    async fn counters(&self) -> Work {
        while self.going_on() {
            self.pause(400).await;
            let name = COUNTERS[self.random(|rng| rng.random_range(0..COUNTERS.len()))];
            let file = match self.open(name, OpenMode::default()).await {
                Ok(file) => file,
                Err(error) => {
                    self.unexpected(format_args!("open {name}"), error)?;
                    continue;
                }
            };
            let done = self.count(name, &file).await;
            let closed = file.close().await;
            match done.and(closed) {
                Ok(()) => {}
                Err(error) if error.code() == ErrorCode::NoSpace => {}
                Err(error) => self.unexpected(format_args!("count in {name}"), error)?,
            }
        }
        Ok(())
    }

    async fn count(&self, name: &str, file: &File) -> Work {
        let lock = |mode: LockMode| LockRange {
            kind: LockKind::Flock.into(),
            mode: mode.into(),
            owner: self.number,
            start: 0,
            end: i64::MAX as u64,
            pid: 1,
        };
        file.lock(lock(LockMode::Exclusive), true).await?;
        let length = NUMBER as u32;
        let bytes = file.read(0, length).await?;
        let read = number_of(name, 0, &bytes).and_then(|number| self.counter(name, |counter| counter.read(number)));
        self.judge(format_args!("counter {name}"), read);
        let number = self.counter(name, |counter| counter.next());
        if self.random(|rng| rng.random_bool(0.2)) {
            self.counter(name, |counter| counter.begin(0));
            let empty = SetAttributes {
                size: Some(0),
                ..SetAttributes::default()
            };
            self.volume.set_attr(file.ino(), empty).await?;
            self.counter(name, |counter| counter.end(0));
        }
        self.counter(name, |counter| counter.begin(number));
        file.write(0, &number_text(name, 0, number)).await?;
        let result = self.fsync(file).await;
        self.note(format_args!(
            "count {name} {number}: {:?}",
            result.as_ref().map_err(Error::code)
        ));
        if result.is_ok() {
            self.counter(name, |counter| counter.end(number));
        }
        file.lock(lock(LockMode::Unlock), false).await?;
        result
    }

    fn counter<R>(&self, name: &str, act: impl FnOnce(&mut crate::model::Counter) -> R) -> R {
        act(self.model().counters.entry(name.to_owned()).or_default())
    }

    /// Records that all append to one file.
    async fn append(&self) -> Work {
        let mode = OpenMode {
            append: true,
            truncate: false,
        };
        let file = match self.open(LOG, mode).await {
            Ok(file) => file,
            Err(error) => return self.unexpected("open the log", error),
        };
        let mut number = 0;
        while self.going_on() {
            self.pause(500).await;
            number += 1;
            let record = format!("{:>width$}", format!("{}:{number};", self.name), width = RECORD);
            self.model().log.begin(&record);
            let result = file.write(0, record.as_bytes()).await;
            self.note(format_args!(
                "append {number}: {:?}",
                result.as_ref().map_err(Error::code)
            ));
            match result {
                Ok(offset) => {
                    let now = self.moment();
                    let ended = self.model().log.end(now, &record, offset);
                    self.judge("append", ended);
                }
                Err(error) if error.code() == ErrorCode::NoSpace => {}
                Err(error) => self.unexpected("append", error)?,
            }
            if self.random(|rng| rng.random_bool(0.3)) {
                match self.read_log().await {
                    Ok(()) => {}
                    Err(error) => self.unexpected("read the log", error)?,
                }
            }
        }
        // Nothing is buffered.
        let _ = file.close().await;
        Ok(())
    }

    async fn read_log(&self) -> Work {
        let from = self.moment();
        let file = self.open(LOG, OpenMode::default()).await?;
        let content = file.read(0, 1 << 20).await?;
        file.close().await?;
        let read = self.model().log.read(from, &content, RECORD);
        self.judge("log", read);
        Ok(())
    }

    /// Looks at what others change.
    async fn look(&self) -> Work {
        while self.going_on() {
            self.pause(60).await;
            let done = match self.random(|rng| rng.random_range(0..10)) {
                0 => self.list().await,
                1..=3 => {
                    let slots: Vec<_> = self.model().slots.keys().cloned().collect();
                    match self.pick(&slots) {
                        Some((file, place)) => self.read_number(file, *place).await,
                        None => Ok(()),
                    }
                }
                _ => {
                    let names: Vec<_> = self.model().names.keys().cloned().collect();
                    match self.pick(&names) {
                        Some(name) => self.find(name).await,
                        None => Ok(()),
                    }
                }
            };
            done.or_else(|error| self.unexpected("look", error))?;
        }
        Ok(())
    }

    fn pick<'a, T>(&self, all: &'a [T]) -> Option<&'a T> {
        if all.is_empty() {
            return None;
        }
        all.get(self.random(|rng| rng.random_range(0..all.len())))
    }

    async fn find(&self, name: &str) -> Work {
        let from = self.moment();
        let found = match self.volume.find(ROOT, name.as_bytes()).await? {
            Found::Entry(entry) => Some(entry.attr.ino),
            Found::Missing(_) => None,
        };
        let to = self.moment();
        let read = self
            .model()
            .names
            .get_mut(name)
            .map(|register| register.read_name(from, to, found));
        self.note(format_args!("find {name}: {found:?}"));
        self.judge(format_args!("name {name}"), read.unwrap_or(Ok(())));
        Ok(())
    }

    /// All names at once.
    async fn list(&self) -> Work {
        let from = self.moment();
        let known: Vec<_> = self.model().names.keys().cloned().collect();
        let mut found = std::collections::BTreeMap::new();
        let mut after = 0;
        loop {
            let (entries, last, _) = self.volume.read_dir(ROOT, after, 1000).await?;
            after = entries.last().map_or(after, |entry| entry.cookie);
            for entry in entries {
                let ino = entry.attr.map_or(0, |attr| attr.ino);
                found.insert(String::from_utf8_lossy(&entry.name).into_owned(), ino);
            }
            if last {
                break;
            }
        }
        let to = self.moment();
        for name in known {
            let read = self
                .model()
                .names
                .get_mut(&name)
                .map(|register| register.read_name(from, to, found.get(&name).copied()));
            self.judge(format_args!("list {name}"), read.unwrap_or(Ok(())));
        }
        Ok(())
    }

    async fn read_number(&self, name: &str, place: u64) -> Work {
        let from = self.moment();
        let file = self.open(name, OpenMode::default()).await?;
        let bytes = file.read(place, NUMBER as u32).await?;
        let to = self.moment();
        let number = number_of(name, place, &bytes);
        self.note(format_args!("read {name} {place}: {number:?}"));
        let read = number.and_then(|number| {
            let mut model = self.model();
            let register = model.slots.get_mut(&(name.to_owned(), place));
            match register {
                Some(register) if name == self.numbers_name() => register.check(from, to, &number).map(drop),
                Some(register) => register.read(from, to, &number),
                None => Ok(()),
            }
        });
        self.judge(format_args!("number in {name} at {place}"), read);
        let closed = file.close().await;
        match closed {
            // Of what the writer on this mount has written.
            Err(error) if error.code() == ErrorCode::NoSpace => Ok(()),
            closed => closed,
        }
    }

    /// Files that are used after their last name is gone.
    async fn orphans(&self) -> Work {
        let mut made = 0;
        while self.going_on() {
            self.pause(2500).await;
            made += 1;
            let name = format!("orphan-{}-{made}", self.name);
            match self.orphan(&name).await {
                Ok(()) => {}
                Err(error) if error.code() == ErrorCode::NoSpace => {}
                Err(error) => self.unexpected(&name, error)?,
            }
        }
        Ok(())
    }

    async fn orphan(&self, name: &str) -> Work {
        let (file, _) = self
            .volume
            .create(ROOT, name.as_bytes(), new_file(), true, OpenMode::default())
            .await?;
        let place = PLACES[self.random(|rng| rng.random_range(0..PLACES.len()))];
        file.write(place, &number_text(name, place, 1)).await?;
        file.fsync().await?;
        self.volume.unlink(ROOT, name.as_bytes()).await?;
        self.pause(2000).await;
        let bytes = file.read(place, NUMBER as u32).await?;
        let number = number_of(name, place, &bytes);
        self.note(format_args!("{name}: {number:?}"));
        let right = number.and_then(|number| match number {
            1 => Ok(()),
            _ => Err(format!("{number} was read after the last name was gone")),
        });
        self.judge(name, right);
        file.close().await
    }

    /// Names that all clients create at the same time.
    async fn race(&self) -> Work {
        let mut round = 0;
        while self.going_on() {
            sleep(RACE_EVERY).await;
            // About the same on all machines.
            let now = turmoil::sim_elapsed().unwrap_or_default();
            let next = now.as_secs() / RACE_EVERY.as_secs();
            if next == round {
                continue;
            }
            round = next;
            self.pause(30).await;
            let name = format!("race-{round}");
            self.model().races.entry(name.clone()).or_default().begin();
            let result = self
                .volume
                .create(ROOT, name.as_bytes(), new_file(), true, OpenMode::default())
                .await;
            self.note(format_args!(
                "{name}: {:?}",
                result.as_ref().map(|(file, _)| file.ino()).map_err(Error::code)
            ));
            match result {
                Ok((file, entry)) => {
                    let won = self.race_of(&name, |race| race.won(&self.name, entry.attr.ino));
                    self.judge(&name, won);
                    file.close().await.or_else(|error| self.unexpected("close", error))?;
                }
                Err(error) if error.code() == ErrorCode::Exists => self.race_of(&name, |race| race.lost()),
                Err(error) => self.unexpected(&name, error)?,
            }
        }
        Ok(())
    }

    fn race_of<R>(&self, name: &str, act: impl FnOnce(&mut crate::model::Race) -> R) -> R {
        act(self.model().races.entry(name.to_owned()).or_default())
    }

    /// Everything is looked at once more when all others have ended.
    pub(crate) async fn finally(&self) -> Work {
        self.list().await?;
        let names: Vec<_> = self.model().names.keys().cloned().collect();
        for name in names {
            self.find(&name).await?;
        }
        let slots: Vec<_> = self.model().slots.keys().cloned().collect();
        for (file, place) in slots {
            self.read_number(&file, place).await?;
        }
        for name in COUNTERS {
            let file = self.open(name, OpenMode::default()).await?;
            self.count(name, &file).await?;
            file.close().await?;
        }
        self.read_log().await?;
        let races: Vec<_> = self.model().races.keys().cloned().collect();
        for name in races {
            let found = match self.volume.find(ROOT, name.as_bytes()).await? {
                Found::Entry(entry) => Some(entry.attr.ino),
                Found::Missing(_) => None,
            };
            let right = self.race_of(&name, |race| race.finally(found));
            self.judge(&name, right);
        }
        Ok(())
    }
}
