//! A store that answers badly.

use async_trait::async_trait;
use lazarette_metastore::{
    KeyValue, LeaseId, MemoryStore, MetaStore, Op, Revision, StoreError, Txn, TxnOutcome, WatchStream,
};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;

/// In memory; while it fails, transactions are made or not without an answer that says which, and
/// reads fail. Leases are not touched.
pub(super) struct FlakyStore {
    inner: MemoryStore,
    period: u64,
    failing: AtomicBool,
    calls: AtomicU64,
    failures: AtomicU64,
    /// While set, journal records wait for a permit.
    gated: AtomicBool,
    pub(super) gate: Semaphore,
    /// Answers the next transaction with `Ambiguous` and keeps it.
    keep_next: AtomicBool,
    kept: Mutex<Option<Txn>>,
}

impl FlakyStore {
    /// Of `period` calls four fail.
    pub(super) fn new(period: u64) -> Self {
        Self {
            inner: MemoryStore::new(),
            period,
            failing: AtomicBool::default(),
            calls: AtomicU64::default(),
            failures: AtomicU64::default(),
            gated: AtomicBool::default(),
            gate: Semaphore::new(0),
            keep_next: AtomicBool::default(),
            kept: Mutex::default(),
        }
    }

    pub(super) fn set_failing(&self, failing: bool) {
        self.failing.store(failing, Ordering::SeqCst);
    }

    pub(super) fn failures(&self) -> u64 {
        self.failures.load(Ordering::SeqCst)
    }

    pub(super) fn set_gated(&self, gated: bool) {
        self.gated.store(gated, Ordering::SeqCst);
    }

    pub(super) fn keep_next(&self) {
        self.keep_next.store(true, Ordering::SeqCst);
    }

    /// Makes the transaction that was kept.
    pub(super) async fn make_kept(&self) -> TxnOutcome {
        let txn = self.kept.lock().unwrap().take().expect("a kept transaction");
        self.inner.txn(txn).await.unwrap()
    }

    /// How this call fails, 1 to 4, or 0.
    fn mood(&self) -> u64 {
        if !self.failing.load(Ordering::SeqCst) {
            return 0;
        }
        let mood = self.calls.fetch_add(1, Ordering::SeqCst) % self.period;
        let mood = if mood > 4 { 0 } else { mood };
        if mood > 0 {
            self.failures.fetch_add(1, Ordering::SeqCst);
        }
        mood
    }
}

#[async_trait]
impl MetaStore for FlakyStore {
    async fn get(&self, key: &[u8]) -> Result<Option<KeyValue>, StoreError> {
        match self.mood() {
            1 => Err(StoreError::Unavailable("in a bad mood".into())),
            _ => self.inner.get(key).await,
        }
    }

    async fn range(&self, prefix: &[u8]) -> Result<(Vec<KeyValue>, Revision), StoreError> {
        self.inner.range(prefix).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        if self.keep_next.swap(false, Ordering::SeqCst) {
            *self.kept.lock().unwrap() = Some(txn);
            return Err(StoreError::Ambiguous("kept".into()));
        }
        let is_record = |op: &Op| matches!(op, Op::Put { key, .. } if key.windows(3).any(|part| part == b"/j/"));
        if self.gated.load(Ordering::SeqCst) && txn.then.iter().any(is_record) {
            self.gate.acquire().await.unwrap().forget();
        }
        match self.mood() {
            1 => Err(StoreError::Unavailable("in a bad mood".into())),
            2 => {
                self.inner.txn(txn).await?;
                Err(StoreError::Ambiguous("made".into()))
            }
            3 => Err(StoreError::Ambiguous("not made".into())),
            4 => {
                // Made later, when the caller has perhaps tried again.
                let inner = self.inner.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(3)).await;
                    let _ = inner.txn(txn).await;
                });
                Err(StoreError::Ambiguous("made late".into()))
            }
            _ => self.inner.txn(txn).await,
        }
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.inner.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.revoke(lease).await
    }

    async fn watch(&self, prefix: &[u8], from: Revision) -> Result<WatchStream, StoreError> {
        self.inner.watch(prefix, from).await
    }
}
