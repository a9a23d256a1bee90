//! Rights of clients to use what they were told of an inode without asking again, while several have
//! the volume mounted (a delegation for reading, with recall).
//!
//! A lease covers an inode's attributes and, of a directory, its names. It is given with a reply and
//! runs out by itself. A change by another client recalls it: the holder is told through its stream
//! and confirms, and the change is not visible to anybody, its author included, before all holders
//! have confirmed or their leases have run out. Recalls go on while the record is being committed,
//! so they cost no time in the normal case.
//!
//! Replies and recalls travel on different streams and may overtake each other. So recalls to a session
//! are numbered, each reply says how many there were when it was made, and the client keeps nothing of
//! a reply that is older than a recall of the same inode.

use lazarette_proto::meta::{Attr, Recall};
use lazarette_types::{InodeId, SessionId};
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};

/// Inodes with leases at most; beyond, none are given.
const MAX_INODES: usize = 1 << 20;

/// Where a session hears of recalls and confirms them.
pub struct Stream {
    /// To the session.
    pub recalls: mpsc::UnboundedSender<Recall>,
    /// The number of the last recall that the session has confirmed.
    pub confirmed: watch::Receiver<u64>,
}

/// A session's side.
#[derive(Default)]
struct Holder {
    stream: Option<Stream>,
    /// Recalls to it so far, and changes of its own.
    count: u64,
    /// The last recall sent, and when the leases it was about have run out.
    last: Option<(u64, Instant)>,
}

impl Holder {
    /// It confirms in time: a session that does not would hold up others again and again.
    fn is_reliable(&self, now: Instant) -> bool {
        let Some(stream) = &self.stream else { return false };
        let late = |(number, until): &(u64, Instant)| *until <= now && *stream.confirmed.borrow() < *number;
        !stream.recalls.is_closed() && !self.last.as_ref().is_some_and(late)
    }
}

/// What a reply says of leases.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Grant {
    /// How long the leases hold; zero for none.
    pub(super) duration: Duration,
    /// The count of recalls to the session when the reply was made.
    pub(super) as_of: u64,
    /// What the request changed: the session's own leases on these are void.
    pub(super) changed: Vec<InodeId>,
    /// The attributes of some of these.
    pub(super) also: Vec<Attr>,
    /// The session was the only one, with the count of company.
    pub(super) sole: Option<u64>,
}

/// A recall that a change has to wait for.
pub(super) struct Pending {
    number: u64,
    confirmed: Option<watch::Receiver<u64>>,
    until: Instant,
}

impl Pending {
    /// Whatever was granted until now is void at this instant.
    pub(super) fn until(instant: Instant) -> Self {
        Self {
            number: 0,
            confirmed: None,
            until: instant,
        }
    }

    /// Resolves when the session has confirmed or its leases have run out.
    pub(super) async fn done(self) {
        if let Some(mut confirmed) = self.confirmed
            && let Ok(Ok(_)) = timeout_at(self.until, confirmed.wait_for(|number| *number >= self.number)).await
        {
            return;
        }
        tokio::time::sleep_until(self.until).await;
    }
}

/// The leases of a shard.
pub(super) struct Leases {
    epoch: u64,
    duration: Duration,
    sessions: HashMap<SessionId, Holder>,
    holders: HashMap<InodeId, Vec<(SessionId, Instant)>>,
}

impl Leases {
    /// None are given yet.
    pub(super) fn new(epoch: u64, duration: Duration) -> Self {
        Self {
            epoch,
            duration,
            sessions: HashMap::new(),
            holders: HashMap::new(),
        }
    }

    /// A session has opened its stream of recalls; an earlier one is closed.
    pub(super) fn attach(&mut self, session: SessionId, stream: Stream) {
        let holder = self.sessions.entry(session).or_default();
        holder.stream = Some(stream);
        holder.last = None;
    }

    /// Tells a session that it is not alone any more. It would hear of it with its next reply; so it may say
    /// what it has open before anybody else changes anything.
    pub(super) fn announce(&self, session: SessionId, company: u64) {
        if let Some(holder) = self.sessions.get(&session)
            && let Some(stream) = &holder.stream
        {
            let _ = stream.recalls.send(Recall {
                number: holder.count,
                inodes: Vec::new(),
                owner_epoch: self.epoch,
                company,
            });
        }
    }

    /// A session has ended.
    pub(super) fn end(&mut self, session: SessionId) {
        self.sessions.remove(&session);
    }

    /// Leases on these inodes, for a reply to a session that is made now.
    pub(super) fn grant(&mut self, session: SessionId, inodes: &[InodeId]) -> Grant {
        let now = Instant::now();
        let full = self.holders.len() >= MAX_INODES;
        // Also the changes of a session that has no stream are counted: a sole one needs none.
        let holder = self.sessions.entry(session).or_default();
        let as_of = holder.count;
        if inodes.is_empty() || full || !holder.is_reliable(now) {
            return Grant {
                as_of,
                ..Grant::default()
            };
        }
        let until = now + self.duration;
        for ino in inodes {
            let holders = self.holders.entry(*ino).or_default();
            match holders.iter_mut().find(|(holder, _)| *holder == session) {
                Some((_, known)) => *known = until,
                None => holders.push((session, until)),
            }
        }
        Grant {
            duration: self.duration,
            as_of,
            ..Grant::default()
        }
    }

    /// Inodes have changed: recalls all leases on them but those of the session that changed them.
    pub(super) fn recall(&mut self, inodes: &BTreeSet<InodeId>, by: Option<SessionId>) -> Vec<Pending> {
        let now = Instant::now();
        let mut recalled: HashMap<SessionId, (Vec<u64>, Instant)> = HashMap::new();
        for ino in inodes {
            for (session, until) in self.holders.remove(ino).unwrap_or_default() {
                if until <= now || Some(session) == by {
                    continue;
                }
                let entry = recalled.entry(session).or_insert_with(|| (Vec::new(), until));
                entry.0.push(ino.0);
                entry.1 = entry.1.max(until);
            }
        }
        if let Some(session) = by {
            self.sessions.entry(session).or_default().count += 1;
        }
        let pending = recalled.into_iter().filter_map(|(session, (inodes, until))| {
            // A session that has ended uses nothing any more.
            let holder = self.sessions.get_mut(&session)?;
            holder.count += 1;
            holder.last = Some((holder.count, until));
            let stream = holder.stream.as_ref()?;
            let _ = stream.recalls.send(Recall {
                number: holder.count,
                inodes,
                owner_epoch: self.epoch,
                company: 0,
            });
            Some(Pending {
                number: holder.count,
                confirmed: Some(stream.confirmed.clone()),
                until,
            })
        });
        pending.collect()
    }

    /// Forgets leases that have run out.
    pub(super) fn tidy(&mut self) {
        let now = Instant::now();
        self.holders.retain(|_, holders| {
            holders.retain(|(_, until)| *until > now);
            !holders.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);
    const FILE: InodeId = InodeId(7);

    struct Client {
        recalls: mpsc::UnboundedReceiver<Recall>,
        confirmed: watch::Sender<u64>,
    }

    fn attach(leases: &mut Leases, session: SessionId) -> Client {
        let (sender, recalls) = mpsc::unbounded_channel();
        let (confirmed, receiver) = watch::channel(0);
        leases.attach(
            session,
            Stream {
                recalls: sender,
                confirmed: receiver,
            },
        );
        Client { recalls, confirmed }
    }

    /// Longer than any test.
    const LONG: Duration = Duration::from_secs(600);
    const SHORT: Duration = Duration::from_millis(50);

    async fn all(pending: Vec<Pending>) {
        futures::future::join_all(pending.into_iter().map(Pending::done)).await;
    }

    #[tokio::test]
    async fn a_change_waits_until_the_holder_confirms() {
        let mut leases = Leases::new(1, LONG);
        let (_a, mut b) = (attach(&mut leases, A), attach(&mut leases, B));
        let grant = leases.grant(B, &[FILE]);
        assert_eq!((grant.duration, grant.as_of), (LONG, 0));
        let waiting = tokio::spawn(all(leases.recall(&BTreeSet::from([FILE]), Some(A))));
        let recall = b.recalls.recv().await.unwrap();
        assert_eq!((recall.number, recall.inodes), (1, vec![FILE.0]));
        assert!(!waiting.is_finished());
        b.confirmed.send_replace(1);
        waiting.await.unwrap();
        assert_eq!(leases.grant(B, &[]).as_of, 1);
        assert!(leases.recall(&BTreeSet::from([FILE]), Some(A)).is_empty());
    }

    #[tokio::test]
    async fn a_silent_holder_delays_once_and_gets_nothing_more() {
        let mut leases = Leases::new(1, SHORT);
        let (_a, b) = (attach(&mut leases, A), attach(&mut leases, B));
        leases.grant(B, &[FILE]);
        let start = Instant::now();
        all(leases.recall(&BTreeSet::from([FILE]), Some(A))).await;
        assert!(start.elapsed() >= SHORT);
        assert_eq!(leases.grant(B, &[FILE]).duration, Duration::ZERO);
        assert!(leases.recall(&BTreeSet::from([FILE]), Some(A)).is_empty());
        b.confirmed.send_replace(1);
        assert_ne!(leases.grant(B, &[FILE]).duration, Duration::ZERO);
    }

    #[tokio::test]
    async fn a_broken_stream_is_waited_out_and_a_new_one_gets_leases() {
        let mut leases = Leases::new(1, SHORT);
        let (_a, b) = (attach(&mut leases, A), attach(&mut leases, B));
        leases.grant(B, &[FILE]);
        drop(b);
        assert_eq!(leases.grant(B, &[InodeId(8)]).duration, Duration::ZERO);
        let start = Instant::now();
        all(leases.recall(&BTreeSet::from([FILE, InodeId(8)]), Some(A))).await;
        assert!(start.elapsed() >= SHORT);
        let _again = attach(&mut leases, B);
        let grant = leases.grant(B, &[FILE]);
        assert_eq!((grant.duration, grant.as_of), (SHORT, 1));
    }

    #[tokio::test]
    async fn ones_own_changes_are_counted_and_not_waited_for() {
        let mut leases = Leases::new(1, SHORT);
        let mut a = attach(&mut leases, A);
        leases.grant(A, &[FILE]);
        assert!(leases.recall(&BTreeSet::from([FILE]), Some(A)).is_empty());
        assert!(a.recalls.try_recv().is_err());
        assert_eq!(leases.grant(A, &[FILE]).as_of, 1);
        tokio::time::sleep(SHORT).await;
        assert!(leases.recall(&BTreeSet::from([FILE]), Some(B)).is_empty());
        leases.grant(A, &[FILE]);
        leases.end(A);
        assert!(leases.recall(&BTreeSet::from([FILE]), Some(B)).is_empty());
        leases.tidy();
        assert!(leases.holders.is_empty());
    }
}
