//! The task that serves one shard: executes operations in memory, groups what they changed into
//! records, and answers when what was done and seen is committed.

use super::claim::{Claim, Recovered};
use super::fold::{Folding, PageWrite};
use super::leases::{Grant, Leases, Pending, Stream};
use super::{Gauges, Metrics, OwnerContext, Registration, Terms, Tuning, not_owner};
use crate::membership::Lease;
use crate::meta::chunks::{self, ChunkRemover};
use crate::meta::journal::{self, Fence, Journal, Lost};
use crate::meta::namespace::{Fault, Limits, Namespace, Outcome, Reply, WaiterId, Work};
use crate::meta::rows::{Key, Row, Truncate};
use futures::future::BoxFuture;
use lazarette_proto::meta::{Attr, Request, Response, request::Op};
use lazarette_types::{InodeId, SessionId, VolumeId};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

/// An open record of about this size is closed and waits for its turn.
const RECORD_BYTES: usize = 128 << 10;
/// With so many closed records waiting, no more operations are taken.
const MAX_WAITING_RECORDS: usize = 4;
/// Operations taken at once before records and replies are looked after.
const BATCH: usize = 256;
/// Files whose chunks are being removed at a time.
const MAX_REMOVALS: usize = 16;
/// How often sessions and waiters are looked at.
const TICK: Duration = Duration::from_millis(250);
/// Removals of chunks are noted with the next change, or alone after so long: nobody waits for that, and a
/// change that comes meanwhile would wait for the record.
const LAZY: Duration = Duration::from_millis(200);
/// Inodes changed by a request whose attributes are told at most: a rename changes four.
const MAX_ALSO: usize = 4;
/// Longest wait for a lock. The client then asks again.
const MAX_WAIT: Duration = Duration::from_secs(60);

type CallReply = oneshot::Sender<Result<Response, Fault>>;
/// A call that was executed and is not answered yet.
type Executed = (CallReply, Result<Reply, Fault>, Grant);
type SessionReply = oneshot::Sender<Result<Terms, Fault>>;
type Commit = BoxFuture<'static, Result<(), Lost>>;

/// One operation to execute.
pub(super) struct Call {
    pub(super) request: Request,
    pub(super) reply: CallReply,
}

/// What is looked at before operations.
pub(super) enum Control {
    OpenSession {
        session: SessionId,
        client: String,
        reply: SessionReply,
    },
    KeepAlive {
        session: SessionId,
        registration: Option<Registration>,
        reply: SessionReply,
    },
    CloseSession {
        session: SessionId,
        reply: SessionReply,
    },
    Recalls {
        session: SessionId,
        stream: Stream,
    },
    Limits(Limits),
    Stop,
}

/// An answer that may have to wait for a record.
enum Answer {
    Call(CallReply, Result<Reply, Fault>, Grant),
    /// Not before this instant.
    Session(SessionReply, Result<(), Fault>, Instant),
}

/// A closed record.
struct Record {
    lsn: u64,
    keys: BTreeSet<Key>,
    bytes: Vec<u8>,
    recalls: Vec<Pending>,
}

/// A request that waits for a lock, perhaps with repetitions of it.
struct Waiting {
    replies: Vec<CallReply>,
    deadline: Instant,
}

/// Work at the chunks that is done.
enum Finished {
    Removed(InodeId),
    Cut(InodeId, Truncate),
}

/// The state of the task.
pub(super) struct Actor {
    volume: VolumeId,
    fence: Fence,
    lease: Lease,
    journal: Journal,
    chunks: Arc<dyn ChunkRemover>,
    metrics: Arc<Metrics>,
    gauges: Arc<Gauges>,
    tuning: Tuning,
    namespace: Namespace,
    folding: Folding,
    /// The last committed record.
    committed: u64,
    closed: VecDeque<Record>,
    /// The record under way: number, keys, bytes.
    committing: Option<(u64, BTreeSet<Key>, usize)>,
    /// Answers by the record they wait for.
    answers: BTreeMap<u64, Vec<Answer>>,
    waiting: HashMap<WaiterId, Waiting>,
    deadlines: BTreeSet<(Instant, WaiterId)>,
    /// Requests that wait until a file's chunks are cut.
    held_up: HashMap<InodeId, Vec<Call>>,
    /// Answers to those whose changes need chunks to be cut, until they are.
    cutting: HashMap<InodeId, Vec<Executed>>,
    /// When each session ends unless it is renewed.
    sessions: HashMap<SessionId, Instant>,
    /// Until then a client may use cached answers.
    cached_until: Instant,
    /// How often a sole client got company, from 1 on.
    company: u64,
    leases: Leases,
    /// Until then clients may hold leases of the owner before.
    leased_before: Instant,
    /// What the record that is open now has to wait for.
    recalls: Vec<Pending>,
    /// Work at the chunks, with the record it waits for. Somebody waits for a cut, so cuts do not
    /// stand in one queue with removals, which may be stuck at a replica set that is away.
    cuts: VecDeque<(u64, InodeId)>,
    removals: VecDeque<(u64, InodeId)>,
    removing: usize,
    running: JoinSet<Finished>,
    /// There are but removals of chunks in the open record: since when, and its size.
    idle_record: Option<(Instant, usize)>,
    stopping: bool,
}

impl Actor {
    pub(super) fn new(
        context: &OwnerContext,
        claim: &Claim,
        recovered: Recovered,
        gauges: Arc<Gauges>,
        tuning: Tuning,
    ) -> Self {
        let now = Instant::now();
        let ends = now + tuning.session_ttl;
        let namespace = recovered.namespace;
        let sessions: HashMap<_, _> = namespace.state().sessions().map(|session| (session, ends)).collect();
        // The owner before may have let a sole client cache until now.
        let cached_until = if sessions.is_empty() {
            now
        } else {
            now + tuning.cache_ttl
        };
        // With several sessions it gave leases instead.
        let leased_before = if sessions.len() > 1 {
            now + tuning.cache_ttl
        } else {
            now
        };
        let journal = Journal::new(
            context.store.clone(),
            context.keys.shard(claim.volume),
            claim.fence.clone(),
        );
        let mut actor = Self {
            volume: claim.volume,
            fence: claim.fence.clone(),
            lease: context.lease.clone(),
            journal,
            chunks: Arc::clone(&context.chunks),
            metrics: Arc::clone(&context.metrics),
            gauges,
            tuning,
            namespace,
            folding: Folding::new(recovered.pages, recovered.page_store, recovered.records, tuning),
            committed: recovered.last,
            closed: VecDeque::new(),
            committing: None,
            answers: BTreeMap::new(),
            waiting: HashMap::new(),
            deadlines: BTreeSet::new(),
            held_up: HashMap::new(),
            cutting: HashMap::new(),
            sessions,
            cached_until,
            company: 1,
            leases: Leases::new(claim.fence.epoch, tuning.cache_ttl),
            leased_before,
            recalls: Vec::new(),
            cuts: VecDeque::new(),
            removals: VecDeque::new(),
            removing: 0,
            running: JoinSet::new(),
            idle_record: None,
            stopping: false,
        };
        actor.after_execution();
        actor
    }

    /// Serves until the ownership ends or is to be given up. All that is not answered by then is
    /// answered `NotOwner`, as the senders of the answers are dropped.
    pub(super) async fn run(mut self, mut calls: mpsc::Receiver<Call>, mut control: mpsc::UnboundedReceiver<Control>) {
        let lease = self.lease.clone();
        let mut lease_ended = std::pin::pin!(lease.ended());
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut commit: Option<Commit> = None;
        let mut write: Option<PageWrite> = None;
        loop {
            if write.is_none() && !self.stopping {
                write = self.folding.step(&mut self.namespace, self.committed, &self.metrics);
            }
            if commit.is_none() {
                commit = self.next_commit();
            }
            if self.stopping && commit.is_none() && write.is_none() {
                return;
            }
            self.start_chunk_work();
            self.publish();
            let next_deadline = self.deadlines.first().map(|(deadline, _)| *deadline);
            let lost = tokio::select! {
                biased;
                () = &mut lease_ended => Some(Lost("the lease has ended".into())),
                result = poll(&mut commit) => {
                    commit = None;
                    result.map(|()| self.record_committed()).err()
                }
                (page_store, result) = poll(&mut write) => {
                    write = None;
                    result.map(|checkpoint| self.folding.written(page_store, checkpoint)).err()
                }
                Some(message) = control.recv() => {
                    self.control(message);
                    None
                }
                Some(Ok(finished)) = self.running.join_next(), if !self.running.is_empty() => {
                    self.chunk_work_done(finished);
                    None
                }
                _ = tick.tick() => {
                    while let Ok(message) = control.try_recv() {
                        self.control(message);
                    }
                    self.tick();
                    None
                }
                () = sleep_until(next_deadline) => {
                    self.time_out_waiters();
                    None
                }
                call = calls.recv(), if self.takes_calls() => {
                    let Some(call) = call else { return };
                    self.take_calls(call, &mut calls);
                    None
                }
            };
            if let Some(lost) = lost {
                Metrics::add(&self.metrics.losses, 1);
                tracing::warn!(volume = %self.volume, epoch = self.fence.epoch, reason = %lost, "shard is not served any more");
                return;
            }
        }
    }

    fn takes_calls(&self) -> bool {
        !self.stopping && self.closed.len() < MAX_WAITING_RECORDS && !self.folding.is_full()
    }

    fn take_calls(&mut self, first: Call, calls: &mut mpsc::Receiver<Call>) {
        self.call(first);
        for _ in 1..BATCH {
            if !self.takes_calls() {
                return;
            }
            match calls.try_recv() {
                Ok(call) => self.call(call),
                Err(_) => return,
            }
        }
    }

    /// The next record to commit, if any.
    fn next_commit(&mut self) -> Option<Commit> {
        if self.closed.is_empty() && self.namespace.state().changed_bytes() > 0 && !self.may_wait() {
            self.close_record();
        }
        let record = self.closed.pop_front()?;
        Metrics::add(&self.metrics.records, 1);
        Metrics::add(&self.metrics.record_bytes, record.bytes.len() as u64);
        self.committing = Some((record.lsn, record.keys, record.bytes.len()));
        let commit = self.journal.clone().commit(record.lsn, record.bytes);
        let recalls = futures::future::join_all(record.recalls.into_iter().map(Pending::done));
        Some(Box::pin(async move {
            let (committed, _) = tokio::join!(commit, recalls);
            committed
        }))
    }

    /// Whether the open record has nothing in it that anybody waits for.
    fn may_wait(&self) -> bool {
        let state = self.namespace.state();
        let idle = |(since, bytes): (Instant, usize)| bytes == state.changed_bytes() && since.elapsed() < LAZY;
        !self.stopping
            && self.idle_record.is_some_and(idle)
            && self.answers.range(state.open_record()..).next().is_none()
    }

    fn close_record(&mut self) {
        self.idle_record = None;
        let (lsn, keys) = self.namespace.state_mut().cut();
        let bytes = journal::encode(&self.fence, lsn, self.namespace.state(), &keys);
        self.closed.push_back(Record {
            lsn,
            keys,
            bytes,
            recalls: std::mem::take(&mut self.recalls),
        });
    }

    fn record_committed(&mut self) {
        let Some((lsn, keys, bytes)) = self.committing.take() else {
            return;
        };
        self.committed = lsn;
        self.folding.committed(lsn, bytes);
        self.namespace.state_mut().committed(lsn, &keys);
        let later = self.answers.split_off(&(lsn + 1));
        for answer in std::mem::replace(&mut self.answers, later).into_values().flatten() {
            self.send(answer);
        }
    }

    fn call(&mut self, call: Call) {
        // The caller may have gone while the request was in the queue; it repeats it if it cares.
        if call.reply.is_closed() {
            return;
        }
        if let Some(ino) = self.namespace.held_up_by(&call.request) {
            self.held_up.entry(ino).or_default().push(call);
            return;
        }
        let Call { request, reply } = call;
        let closes = request
            .handles
            .as_ref()
            .is_some_and(|handles| !handles.closed.is_empty());
        if closes || matches!(&request.op, Some(Op::Lock(_) | Op::AppendBegin(_) | Op::AppendEnd(_))) {
            // One who does not wait any more neither gets a lock nor is part of a deadlock.
            self.drop_cancelled();
        }
        if let Some(ends) = self.sessions.get_mut(&SessionId(request.session)) {
            *ends = Instant::now() + self.tuning.session_ttl;
        }
        Metrics::add(&self.metrics.operations, 1);
        let executed = self.namespace.execute(&request, now());
        match executed.outcome {
            Outcome::Reply(result) => {
                if result.is_err() {
                    Metrics::add(&self.metrics.failures, 1);
                }
                let told = result.as_ref().ok().filter(|_| !executed.repeated);
                let grant = self.grant(&request, told);
                match self.left_to_cut(&request) {
                    Some(ino) => self.cutting.entry(ino).or_default().push((reply, result, grant)),
                    None => self.answer(executed.after, Answer::Call(reply, result, grant)),
                }
            }
            Outcome::Wait { waiter, wait_ms } => {
                let deadline = Instant::now() + Duration::from_millis(wait_ms.into()).min(MAX_WAIT);
                let waiting = self.waiting.entry(waiter).or_insert_with(|| Waiting {
                    replies: Vec::new(),
                    deadline,
                });
                self.deadlines.remove(&(waiting.deadline, waiter));
                waiting.deadline = deadline;
                waiting.replies.push(reply);
                self.deadlines.insert((deadline, waiter));
            }
        }
        self.after_execution();
    }

    /// Recalls what others know of that a request has changed, and gives leases on what its reply says.
    fn grant(&mut self, request: &Request, reply: Option<&Reply>) -> Grant {
        let session = SessionId(request.session);
        if !self.sessions.contains_key(&session) {
            return Grant::default();
        }
        let changed = self.recall(Some(session));
        // A sole client and its kernel may cache everything anyway.
        let inodes = match (&request.op, reply) {
            (Some(op), Some(reply)) if self.sessions.len() > 1 => told(op, reply),
            _ => Vec::new(),
        };
        let grant = self.leases.grant(session, &inodes);
        let sole = (self.sessions.len() == 1).then_some(self.company);
        let also = reply.map_or_else(Vec::new, |reply| self.also(&changed, reply));
        Grant {
            changed: changed.into_iter().collect(),
            also,
            sole,
            ..grant
        }
    }

    /// Attributes of inodes that a request has changed without being answered with them.
    fn also(&self, changed: &BTreeSet<InodeId>, reply: &Reply) -> Vec<Attr> {
        let told = match reply {
            Reply::Attr(attr) => attr.ino,
            _ => 0,
        };
        let state = self.namespace.state();
        // What is being cut is told to nobody yet.
        let others = changed
            .iter()
            .filter(|ino| ino.0 != told && state.truncate(**ino).is_none());
        let known = others.filter_map(|ino| Some(state.inode(*ino)?.attr(*ino)));
        known.take(MAX_ALSO).collect()
    }

    /// Recalls leases on what has changed since the last call, for the record that is open.
    fn recall(&mut self, by: Option<SessionId>) -> BTreeSet<InodeId> {
        let touched = self.namespace.state_mut().take_touched();
        if touched.is_empty() {
            return touched;
        }
        self.recalls.extend(self.leases.recall(&touched, by));
        if Instant::now() < self.leased_before {
            self.recalls.push(Pending::until(self.leased_before));
        }
        touched
    }

    /// The file whose chunks a request has left to be cut, and which waits for that.
    fn left_to_cut(&self, request: &Request) -> Option<InodeId> {
        let ino = match &request.op {
            Some(Op::SetAttr(op)) => InodeId(op.ino),
            Some(Op::Reserve(op)) => InodeId(op.ino),
            _ => return None,
        };
        self.namespace.state().truncate(ino).map(|_| ino)
    }

    /// Looks after what an execution brought about besides its answer.
    fn after_execution(&mut self) {
        self.recall(None);
        let newest = self.namespace.newest_record();
        for finished in self.namespace.take_finished() {
            let Some(waiting) = self.waiting.remove(&finished.waiter) else {
                continue;
            };
            self.deadlines.remove(&(waiting.deadline, finished.waiter));
            for reply in waiting.replies {
                self.answer(newest, Answer::Call(reply, finished.result.clone(), Grant::default()));
            }
        }
        for work in self.namespace.take_work() {
            match work {
                Work::Remove(ino) => self.removals.push_back((newest, ino)),
                Work::Cut(ino) => self.cuts.push_back((newest, ino)),
            }
        }
        if self.namespace.state().changed_bytes() >= RECORD_BYTES {
            self.close_record();
        }
    }

    fn answer(&mut self, after: u64, answer: Answer) {
        if after <= self.committed {
            self.send(answer);
        } else {
            self.answers.entry(after).or_default().push(answer);
        }
    }

    /// Sends an answer, if this node is provably the owner still: what it says was then true.
    fn send(&mut self, answer: Answer) {
        let valid = self.lease.valid();
        match answer {
            Answer::Call(reply, result, grant) => {
                let answer = if valid {
                    result.map(|reply| Response {
                        cache_ttl_ms: self.cache_ttl_ms(grant.sole),
                        free_bytes: self.namespace.free_bytes(),
                        owner_epoch: self.fence.epoch,
                        company: self.company,
                        ..response(reply, grant)
                    })
                } else {
                    Err(not_owner())
                };
                let _ = reply.send(answer);
            }
            Answer::Session(reply, result, not_before) => {
                let result = if valid {
                    result.map(|()| self.terms())
                } else {
                    Err(not_owner())
                };
                if not_before <= Instant::now() {
                    let _ = reply.send(result);
                } else {
                    tokio::spawn(async move {
                        tokio::time::sleep_until(not_before).await;
                        let _ = reply.send(result);
                    });
                }
            }
        }
    }

    fn terms(&self) -> Terms {
        Terms {
            epoch: self.fence.epoch,
            company: self.company,
        }
    }

    /// A sole client may cache: nobody else can change anything without opening a session first,
    /// and that waits until the cached answers are out of date. It must have been alone since the answer was
    /// made, too: `sole` is the count of company then.
    fn cache_ttl_ms(&mut self, sole: Option<u64>) -> u32 {
        if self.sessions.len() != 1 || sole != Some(self.company) {
            return 0;
        }
        self.cached_until = Instant::now() + self.tuning.cache_ttl;
        self.tuning.cache_ttl.as_millis() as u32
    }

    fn control(&mut self, message: Control) {
        match message {
            Control::OpenSession { session, client, reply } => {
                let result = self.namespace.open_session(session, &client);
                let now = Instant::now();
                let mut not_before = now;
                if result.is_ok() {
                    if !self.sessions.contains_key(&session) {
                        self.end_solitude();
                    }
                    self.sessions.insert(session, now + self.tuning.session_ttl);
                    if self.sessions.len() > 1 {
                        not_before = self.cached_until;
                    }
                }
                let after = self.namespace.newest_record();
                self.answer(after, Answer::Session(reply, result, not_before));
            }
            Control::KeepAlive {
                session,
                registration,
                reply,
            } => {
                let result = match registration {
                    Some(registration) if registration.terms == self.terms() => {
                        self.namespace.register(session, &registration.handles)
                    }
                    _ => self.namespace.check_session(session),
                };
                if result.is_ok() {
                    self.sessions.insert(session, Instant::now() + self.tuning.session_ttl);
                }
                self.answer(0, Answer::Session(reply, result, Instant::now()));
            }
            Control::CloseSession { session, reply } => {
                self.end_session(session);
                let after = self.namespace.newest_record();
                self.answer(after, Answer::Session(reply, Ok(()), Instant::now()));
            }
            Control::Recalls { session, stream } => {
                if self.sessions.contains_key(&session) {
                    self.leases.attach(session, stream);
                }
            }
            Control::Limits(limits) => self.namespace.set_limits(limits),
            Control::Stop => self.stopping = true,
        }
        self.after_execution();
    }

    /// Another session comes. A sole one may have opened files without a word: nothing of them is given up
    /// until it has said which, and that it does so no more.
    fn end_solitude(&mut self) {
        let mut sessions = self.sessions.keys();
        if let (Some(sole), None) = (sessions.next(), sessions.next()) {
            self.company += 1;
            self.namespace.doubt(*sole);
            self.leases.announce(*sole, self.company);
        }
    }

    fn end_session(&mut self, session: SessionId) {
        self.drop_cancelled();
        self.sessions.remove(&session);
        self.leases.end(session);
        self.namespace.end_session(session);
        self.after_execution();
    }

    fn tick(&mut self) {
        let now = Instant::now();
        let overdue = self.sessions.iter().filter(|(_, ends)| **ends <= now);
        let overdue: Vec<SessionId> = overdue.map(|(session, _)| *session).collect();
        for session in overdue {
            Metrics::add(&self.metrics.expired_sessions, 1);
            tracing::warn!(volume = %self.volume, session = session.0, "session was not renewed and ends");
            self.end_session(session);
        }
        self.drop_cancelled();
        self.leases.tidy();
        self.namespace.collect_orphans();
        self.after_execution();
    }

    /// Forgets waiting requests whose callers have gone.
    fn drop_cancelled(&mut self) {
        let gone = |waiting: &Waiting| waiting.replies.iter().all(oneshot::Sender::is_closed);
        let cancelled = self.waiting.iter().filter(|(_, waiting)| gone(waiting));
        let cancelled: Vec<(WaiterId, Instant)> = cancelled.map(|(id, waiting)| (*id, waiting.deadline)).collect();
        for (waiter, deadline) in cancelled {
            self.namespace.cancel(waiter);
            self.waiting.remove(&waiter);
            self.deadlines.remove(&(deadline, waiter));
        }
    }

    fn time_out_waiters(&mut self) {
        let now = Instant::now();
        while let Some((deadline, waiter)) = self.deadlines.first().copied()
            && deadline <= now
        {
            self.deadlines.remove(&(deadline, waiter));
            self.namespace.time_out(waiter);
        }
        self.after_execution();
    }

    /// Starts work whose record is committed.
    fn start_chunk_work(&mut self) {
        if self.stopping {
            return;
        }
        while let Some(ino) = next_due(&mut self.cuts, self.committed) {
            let (chunks, volume) = (Arc::clone(&self.chunks), self.volume);
            let chunk_size = self.namespace.limits().chunk_size;
            match self.namespace.state().truncate(ino) {
                Some(cut) => {
                    self.running.spawn(async move {
                        chunks::cut(chunks, volume, ino, cut, chunk_size).await;
                        Finished::Cut(ino, cut)
                    });
                }
                None => self.cut_done(ino),
            }
        }
        while self.removing < MAX_REMOVALS
            && let Some(ino) = next_due(&mut self.removals, self.committed)
        {
            let (chunks, volume) = (Arc::clone(&self.chunks), self.volume);
            if let Some(Row::Garbage(garbage)) = self.namespace.state().get(&Key::Garbage(ino)) {
                let garbage = *garbage;
                self.removing += 1;
                self.running.spawn(async move {
                    chunks::remove(chunks, volume, ino, garbage).await;
                    Finished::Removed(ino)
                });
            }
        }
    }

    fn chunk_work_done(&mut self, finished: Finished) {
        match finished {
            Finished::Removed(ino) => {
                Metrics::add(&self.metrics.removed_files, 1);
                self.removing -= 1;
                let fresh = self.namespace.state().changed_bytes() == 0;
                let idle = fresh || self.may_wait();
                let since = self
                    .idle_record
                    .filter(|_| !fresh)
                    .map_or_else(Instant::now, |(since, _)| since);
                self.namespace.removed(ino);
                self.idle_record = idle.then(|| (since, self.namespace.state().changed_bytes()));
            }
            Finished::Cut(ino, cut) => {
                self.namespace.cut(ino, cut);
                self.cut_done(ino);
            }
        }
        self.after_execution();
    }

    /// A file's chunks are cut, or the file is gone. Those who wait for it hear of it when it is
    /// committed: a later owner must not cut again what was written since.
    fn cut_done(&mut self, ino: InodeId) {
        let newest = self.namespace.newest_record();
        for (reply, result, grant) in self.cutting.remove(&ino).unwrap_or_default() {
            self.answer(newest, Answer::Call(reply, result, grant));
        }
        for call in self.held_up.remove(&ino).unwrap_or_default() {
            self.call(call);
        }
    }

    fn publish(&self) {
        let usage = self.namespace.state().usage();
        self.gauges.bytes.store(usage.bytes, Ordering::Relaxed);
        self.gauges.inodes.store(usage.inodes, Ordering::Relaxed);
        self.gauges
            .sessions
            .store(self.sessions.len() as u64, Ordering::Relaxed);
    }
}

/// The inodes of which a reply tells the attributes, or names.
fn told(op: &Op, reply: &Reply) -> Vec<InodeId> {
    let looked_into = match op {
        Op::Lookup(op) => Some(op.parent),
        Op::Create(op) => Some(op.parent),
        Op::Link(op) => Some(op.new_parent),
        Op::ReadDir(op) => Some(op.ino),
        _ => None,
    };
    let mut inodes: Vec<_> = looked_into.into_iter().map(InodeId).collect();
    match reply {
        Reply::Attr(attr) => inodes.push(InodeId(attr.ino)),
        Reply::ReadDir(listing) => {
            let attributes = listing.entries.iter().filter_map(|entry| entry.attr.as_ref());
            inodes.extend(attributes.map(|attr| InodeId(attr.ino)));
        }
        _ => {}
    }
    inodes
}

/// The response of a reply: its result, and the client's leases.
fn response(reply: Reply, grant: Grant) -> Response {
    Response {
        lease_ms: grant.duration.as_millis() as u32,
        as_of: grant.as_of,
        changed: grant.changed.into_iter().map(|ino| ino.0).collect(),
        also: grant.also,
        result: Some(reply),
        ..Response::default()
    }
}

/// Takes the first in the queue whose record is committed.
fn next_due(queue: &mut VecDeque<(u64, InodeId)>, committed: u64) -> Option<InodeId> {
    let (after, ino) = *queue.front()?;
    if after > committed {
        return None;
    }
    queue.pop_front();
    Some(ino)
}

/// Polls a future that may not be there.
async fn poll<T>(future: &mut Option<BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Nanoseconds since the Unix epoch.
pub(super) fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as i64)
}
