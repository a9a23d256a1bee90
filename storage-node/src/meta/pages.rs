//! Pages: the rows in packed, contiguous pieces, so that the journal can be kept short.

mod store;

pub use store::{EtcdPages, PageBatch, PageStore};

use super::rows::{FORMAT, Key, Reader, Row, RowError, Writer, open_envelope, seal_envelope};
use super::state::State;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

/// How large pages and batches get, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// A page that grows over this is split, into pages of about the target.
    pub max: usize,
    /// See `max`.
    pub target: usize,
    /// A page that shrinks below this is joined with its neighbour if both fit into the target.
    pub min: usize,
    /// Pages of one transaction at most; a page or two more than this still fit.
    pub batch: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            max: 32 << 10,
            target: 24 << 10,
            min: 6 << 10,
            batch: 704 << 10,
        }
    }
}

/// Pages of one transaction at most, besides those of one run.
const BATCH_PAGES: usize = 56;
/// Neighbours joined at once.
const MAX_JOINED: usize = 16;

/// A page's contents.
#[derive(Clone, Debug, PartialEq)]
pub struct Page {
    /// The rows are as they were after this record. Redoing it or an earlier one changes nothing
    /// in the end.
    pub lsn: u64,
    /// The first key that belongs here.
    pub low: Key,
    /// The first key that does not, `None` if all do.
    pub high: Option<Key>,
    /// In order.
    pub rows: Vec<(Key, Row)>,
}

/// Stored pages do not make up a shard.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// A page could not be read.
    #[error("page {0}: {1}")]
    Unreadable(u64, RowError),
    /// Two pages overlap, or one is missing between them.
    #[error("page {0} does not begin where the page before it ends")]
    Gap(u64),
}

/// Reads a page.
pub fn decode(bytes: &[u8]) -> Result<Page, RowError> {
    let mut reader = Reader::new(open_envelope(FORMAT, bytes)?);
    let lsn = reader.number()?;
    let low = reader.key()?;
    let high = match reader.number()? {
        0 => None,
        1 => Some(reader.key()?),
        _ => return Err(RowError::Bad("page end")),
    };
    let mut rows: Vec<(Key, Row)> = Vec::new();
    while !reader.is_empty() {
        let (key, row) = reader.change()?;
        let row = row.ok_or(RowError::Bad("removed row in a page"))?;
        let in_order = rows.last().is_none_or(|(last, _)| *last < key);
        if !in_order || key < low || high.as_ref().is_some_and(|high| key >= *high) {
            return Err(RowError::Bad("place in a page"));
        }
        rows.push((key, row));
    }
    Ok(Page { lsn, low, high, rows })
}

fn encode<'a>(lsn: u64, low: &Key, high: Option<&Key>, rows: impl Iterator<Item = (&'a Key, &'a Row)>) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.number(lsn);
    writer.key(low);
    match high {
        None => writer.number(0),
        Some(high) => {
            writer.number(1);
            writer.key(high);
        }
    }
    for (key, row) in rows {
        writer.change(key, Some(row));
    }
    seal_envelope(FORMAT, &writer.into_bytes())
}

/// Which page holds which keys. The pages' ranges tile the whole key space.
#[derive(Debug, Default)]
pub struct PageMap {
    /// By lowest key.
    pages: BTreeMap<Key, Slot>,
    next_id: u64,
    sizes: Sizes,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    id: u64,
    bytes: usize,
}

/// The range of keys that some neighbouring pages hold.
#[derive(Debug)]
struct Run {
    low: Key,
    high: Option<Key>,
    ids: Vec<u64>,
}

impl PageMap {
    /// Puts stored pages together and hands their rows to `load`. The order of `stored` does not
    /// matter.
    pub fn load(stored: Vec<(u64, Vec<u8>)>, mut load: impl FnMut(Key, Row)) -> Result<Self, PageError> {
        let mut map = Self::default();
        let mut found = BTreeMap::new();
        for (id, bytes) in stored {
            let page = decode(&bytes).map_err(|error| PageError::Unreadable(id, error))?;
            map.next_id = map.next_id.max(id + 1);
            let slot = Slot { id, bytes: bytes.len() };
            if found.insert(page.low.clone(), (slot, page)).is_some() {
                return Err(PageError::Gap(id));
            }
        }
        let mut expected = Some(Key::Counters);
        for (low, (slot, page)) in found {
            if expected.as_ref() != Some(&low) {
                return Err(PageError::Gap(slot.id));
            }
            expected = page.high;
            for (key, row) in page.rows {
                load(key, row);
            }
            map.pages.insert(low, slot);
        }
        match (expected, map.pages.values().next_back()) {
            (Some(_), Some(last)) => Err(PageError::Gap(last.id)),
            _ => Ok(map),
        }
    }

    /// Makes pages of other sizes from here on.
    pub fn set_sizes(&mut self, sizes: Sizes) {
        self.sizes = sizes;
    }

    /// The number of pages.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether there are no pages.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// The next page gets this number; all pages have lower ones.
    pub fn next_id(&self) -> u64 {
        self.next_id
    }

    /// Makes images of some of the pages in which `dirty` rows are, and takes those rows out of
    /// `dirty`. The images show the rows after record `lsn`, so they must not be written before
    /// that record is committed. Call again while `dirty` is not empty.
    pub fn fold(&mut self, state: &State, dirty: &mut BTreeSet<Key>, lsn: u64) -> PageBatch {
        let mut batch = PageBatch::default();
        let mut bytes = 0;
        while bytes < self.sizes.batch && batch.writes.len() < BATCH_PAGES {
            let Some(first) = dirty.first() else { break };
            let mut run = self.run_of(first);
            let budget = self.sizes.batch - bytes;
            let mut plan = plan(state, &run, budget, self.sizes);
            // Neighbours may have become small, too, since they were last looked at.
            for _ in 0..MAX_JOINED {
                let small = plan.bytes < self.sizes.min && plan.rest.is_none();
                if !small || !self.join_neighbour(&mut run, plan.bytes) {
                    break;
                }
                plan = self::plan(state, &run, budget + self.sizes.max, self.sizes);
            }
            bytes += self.rewrite(state, dirty, lsn, run, plan, &mut batch);
        }
        batch
    }

    fn run_of(&self, key: &Key) -> Run {
        match self.pages.range(..=key).next_back() {
            Some((low, slot)) => Run {
                low: low.clone(),
                high: self.after(low),
                ids: vec![slot.id],
            },
            None => Run {
                low: Key::Counters,
                high: None,
                ids: vec![],
            },
        }
    }

    fn after(&self, low: &Key) -> Option<Key> {
        let beyond = (Bound::Excluded(low), Bound::Unbounded);
        self.pages.range(beyond).next().map(|(key, _)| key.clone())
    }

    /// Adds the neighbour on the right, or else on the left, if both fit into one page.
    fn join_neighbour(&self, run: &mut Run, bytes: usize) -> bool {
        let fits = |slot: &Slot| slot.bytes + bytes <= self.sizes.target;
        if let Some(high) = &run.high
            && let Some(slot) = self.pages.get(high).filter(|slot| fits(slot))
        {
            run.ids.push(slot.id);
            run.high = self.after(high);
            return true;
        }
        let left = self.pages.range(..&run.low).next_back();
        if let Some((low, slot)) = left.filter(|(_, slot)| fits(slot)) {
            run.ids.push(slot.id);
            run.low = low.clone();
            return true;
        }
        false
    }

    /// Makes the images of a run and returns their size.
    fn rewrite(
        &mut self,
        state: &State,
        dirty: &mut BTreeSet<Key>,
        lsn: u64,
        run: Run,
        plan: Plan,
        batch: &mut PageBatch,
    ) -> usize {
        let from_low = self.pages.range(&run.low..).map(|(low, _)| low);
        let within = from_low.take_while(|low| run.high.as_ref().is_none_or(|high| *low < high));
        for low in within.cloned().collect::<Vec<Key>>() {
            self.pages.remove(&low);
        }
        let mut ids = run.ids.into_iter();
        let mut bytes = 0;
        let end = if plan.rest.is_some() { &plan.rest } else { &run.high };
        let lows: Vec<&Key> = [&run.low].into_iter().chain(&plan.bounds).collect();
        for (index, low) in lows.iter().enumerate() {
            let high = lows.get(index + 1).copied().or(end.as_ref());
            let image = encode(lsn, low, high, state.range(low, high));
            bytes += self.place(ids.next(), low, image, batch);
        }
        while dirty
            .first()
            .is_some_and(|first| end.as_ref().is_none_or(|end| first < end))
        {
            dirty.pop_first();
        }
        if let Some(rest) = &plan.rest {
            // The batch is full. What is left of the run gets a page with only those of its rows
            // that pages have had before; the others are in the journal and stay dirty.
            let clean = state
                .range(rest, run.high.as_ref())
                .filter(|(key, _)| !dirty.contains(*key) && !state.is_dirty(key));
            let image = encode(lsn, rest, run.high.as_ref(), clean);
            bytes += self.place(ids.next(), rest, image, batch);
        }
        batch.writes.extend(ids.map(|id| (id, None)));
        bytes
    }

    fn place(&mut self, id: Option<u64>, low: &Key, image: Vec<u8>, batch: &mut PageBatch) -> usize {
        let id = id.unwrap_or_else(|| {
            self.next_id += 1;
            self.next_id - 1
        });
        let bytes = image.len();
        self.pages.insert(low.clone(), Slot { id, bytes });
        batch.writes.insert(id, Some(image));
        bytes
    }
}

/// How a run is divided into pages.
#[derive(Debug)]
struct Plan {
    /// Of all rows up to `rest`.
    bytes: usize,
    /// The lowest keys of the pages after the first.
    bounds: Vec<Key>,
    /// From here on the rows are too many for this batch.
    rest: Option<Key>,
}

fn plan(state: &State, run: &Run, budget: usize, sizes: Sizes) -> Plan {
    let mut writer = Writer::default();
    let mut starts = Vec::new();
    let mut rest = None;
    for (key, row) in state.range(&run.low, run.high.as_ref()) {
        if writer.len() >= budget {
            rest = Some(key.clone());
            break;
        }
        starts.push((key, writer.len()));
        writer.change(key, Some(row));
    }
    let bytes = writer.len();
    let mut bounds = Vec::new();
    if bytes > sizes.max {
        let each = bytes.div_ceil(bytes.div_ceil(sizes.target));
        for (key, start) in starts.into_iter().skip(1) {
            if start >= each * (bounds.len() + 1) {
                bounds.push(key.clone());
            }
        }
    }
    Plan { bytes, bounds, rest }
}

#[cfg(test)]
mod tests;
