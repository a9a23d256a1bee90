//! What a session tells of itself.

use crate::child;
use crate::memory::Memory;
use crate::mounted::{DEADLINE, Place, application, mounted_with, options, until};
use lazarette_fuse::abi::Opcode;
use lazarette_fuse::{Config, Session, Unmount};
use std::fmt::Debug;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_to_the_answer_are_counted_when_wanted() {
    for histograms in [false, true] {
        let config = Config {
            histograms,
            ..Config::default()
        };
        let (place, session) = mounted_with(Memory::new(), config).await;
        let file = place.join("file");
        application(move || {
            fs::write(&file, b"content").unwrap();
            assert!(fs::create_dir(&file).is_err());
        })
        .await;
        let statistics = session.statistics();
        let write = statistics.operations.iter().find(|one| one.opcode == Opcode::Write);
        let write = write.unwrap();
        let counted = write.latency.map(|buckets| buckets.iter().sum::<u64>());
        assert_eq!(counted, histograms.then_some(write.requests));
        assert_eq!(write.total.is_zero(), !histograms);
        assert_eq!((write.requests, write.errors), (1, 0));
    }
}

/// Remembers the spans of requests as "operation node".
static SPANS: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Recorder(AtomicU64);

#[derive(Default)]
struct Fields {
    operation: String,
    node: u64,
    pid: u64,
}

impl Visit for Fields {
    fn record_debug(&mut self, _field: &Field, _value: &dyn Debug) {}

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "operation" {
            value.clone_into(&mut self.operation);
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "node" => self.node = value,
            "pid" => self.pid = value,
            _ => {}
        }
    }
}

impl Subscriber for Recorder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("lazarette_fuse")
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut fields = Fields::default();
        span.record(&mut fields);
        if span.metadata().name() == "fuse" && fields.pid != 0 {
            let text = format!("{} {}", fields.operation, fields.node);
            SPANS.lock().unwrap().push(text);
        }
        Id::from_u64(self.0.fetch_add(1, Ordering::Relaxed))
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, _event: &Event<'_>) {}

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

/// A process in which spans are recorded.
pub(crate) fn trace(place: &str) {
    tracing::subscriber::set_global_default(Recorder(AtomicU64::new(1))).unwrap();
    child::runtime().block_on(async {
        let session = Session::mount(Memory::new(), place, options(), Config::default())
            .await
            .unwrap();
        let folder = Path::new(place).join("folder");
        application(move || {
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("file"), b"content").unwrap();
        })
        .await;
        session.unmount(Unmount::Orderly).await.unwrap();
        tokio::time::timeout(DEADLINE, session.ended()).await.unwrap();
    });
    let spans = SPANS.lock().unwrap();
    for expected in ["mkdir 1", "create 2", "write 3"] {
        assert!(spans.iter().any(|span| span == expected), "no {expected} in {spans:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_spans() {
    let place = Place::new();
    let mut process = child::start("trace", place.path().to_str().unwrap(), None);
    until("it has traced", || process.0.try_wait().unwrap().is_some()).await;
    assert!(process.0.wait().unwrap().success());
}
