//! Folding the journal into pages, in the background and step by step.

use crate::meta::journal::Lost;
use crate::meta::namespace::Namespace;
use crate::meta::owner::{Metrics, Tuning};
use crate::meta::pages::{PageBatch, PageMap, PageStore};
use crate::meta::rows::Key;
use futures::future::BoxFuture;
use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;
use tokio::time::Instant;

/// Any journal is folded after so long, so that a quiet shard is recovered from pages alone.
const FOLD_AFTER: Duration = Duration::from_secs(30);
/// A journal of this size takes no more operations before it was folded: what recovery has to
/// redo is bounded.
const CAP_BYTES: usize = 24 << 20;
const CAP_RECORDS: usize = 6144;

/// The write of a batch; returns the page store to its place.
pub(super) type PageWrite = BoxFuture<'static, (Box<dyn PageStore>, Result<Option<u64>, Lost>)>;

/// The journal's length, the pages, and the present pass of folding one into the other.
pub(super) struct Folding {
    /// Records beyond the checkpoint: number and bytes.
    records: VecDeque<(u64, usize)>,
    bytes: usize,
    pages: PageMap,
    /// Away while a batch is written.
    page_store: Option<Box<dyn PageStore>>,
    pass: Option<Pass>,
    last_pass: Instant,
    tuning: Tuning,
}

/// One pass: when all its rows are in pages, the records up to `goal` can go.
struct Pass {
    goal: u64,
    rows: BTreeSet<Key>,
    /// Images that wait for the record whose effects they show.
    ready: Option<(u64, PageBatch)>,
}

impl Folding {
    pub(super) fn new(
        pages: PageMap,
        page_store: Box<dyn PageStore>,
        records: VecDeque<(u64, usize)>,
        tuning: Tuning,
    ) -> Self {
        Self {
            bytes: records.iter().map(|(_, bytes)| bytes).sum(),
            records,
            pages,
            page_store: Some(page_store),
            pass: None,
            last_pass: Instant::now(),
            tuning,
        }
    }

    /// A record was committed.
    pub(super) fn committed(&mut self, lsn: u64, bytes: usize) {
        self.records.push_back((lsn, bytes));
        self.bytes += bytes;
    }

    /// Whether the journal is as long as it may get.
    pub(super) fn is_full(&self) -> bool {
        self.bytes >= CAP_BYTES || self.records.len() >= CAP_RECORDS
    }

    fn is_due(&self) -> bool {
        let old = !self.records.is_empty() && self.last_pass.elapsed() >= FOLD_AFTER;
        self.bytes >= self.tuning.fold_bytes || self.records.len() >= self.tuning.fold_records || old
    }

    /// Takes the next step if there is one: begins a pass, makes images, or starts a write.
    pub(super) fn step(&mut self, namespace: &mut Namespace, committed: u64, metrics: &Metrics) -> Option<PageWrite> {
        self.page_store.as_ref()?;
        if self.pass.is_none() {
            if !self.is_due() {
                return None;
            }
            self.pass = Some(Pass {
                // More may come into the open record: it is for the next pass.
                goal: namespace.state().open_record() - 1,
                rows: namespace.state_mut().take_dirty(),
                ready: None,
            });
        }
        let pass = self.pass.as_mut()?;
        if pass.ready.is_none() {
            let newest = namespace.newest_record();
            let batch = self.pages.fold(namespace.state(), &mut pass.rows, newest);
            pass.ready = Some((newest, batch));
        }
        if pass.ready.as_ref().is_none_or(|(shown, _)| *shown > committed) {
            return None;
        }
        let (_, batch) = pass.ready.take()?;
        let checkpoint = pass.rows.is_empty().then_some(pass.goal);
        let images = batch.writes.values().flatten();
        let (count, bytes) = images.fold((0, 0), |(count, bytes), image| (count + 1, bytes + image.len() as u64));
        Metrics::add(&metrics.pages, count);
        Metrics::add(&metrics.page_bytes, bytes);
        let mut page_store = self.page_store.take()?;
        Some(Box::pin(async move {
            let written = page_store.write(batch, checkpoint).await;
            (page_store, written.map(|()| checkpoint))
        }))
    }

    /// A write is done; with `checkpoint` it was the pass's last.
    pub(super) fn written(&mut self, page_store: Box<dyn PageStore>, checkpoint: Option<u64>) {
        self.page_store = Some(page_store);
        let Some(checkpoint) = checkpoint else { return };
        self.pass = None;
        self.last_pass = Instant::now();
        while let Some((lsn, bytes)) = self.records.front().copied()
            && lsn <= checkpoint
        {
            self.records.pop_front();
            self.bytes -= bytes;
        }
    }
}
