//! Runs handlers to their answers.

use super::reply::{Failure, Outcome, send};
use crate::device::Channel;
use crate::errno::Errno;
use crate::request::{Active, Verdict};
use crate::session::Shared;
use pin_project_lite::pin_project;
use std::any::Any;
use std::cell::Cell;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll as Progress, Waker};
use tracing::{Span, trace_span};

/// Takes a request out of the table when its handler is gone, answered or not.
struct Presence {
    active: Arc<Active>,
    shared: Arc<Shared>,
    listed: Cell<bool>,
}

impl Presence {
    /// Before the answer: who has it does not find its request under way.
    fn unlist(&self) {
        if self.listed.replace(false) {
            self.shared.in_flight.leave(self.active.header.unique);
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.unlist();
        // After the answer: a drain waits for it.
        self.shared.left(self.active.opcode);
    }
}

pin_project! {
    /// Runs a handler to its answer.
    struct Driver<Fut> {
        #[pin]
        handler: Option<Fut>,
        channel: Arc<Channel>,
        span: Span,
        presence: Presence,
    }
}

impl<Fut: Future<Output = Outcome>> Future for Driver<Fut> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Progress<()> {
        let mut this = self.project();
        let _entered = this.span.enter();
        let (active, shared) = (&this.presence.active, &this.presence.shared);
        let polled = match active.verdict() {
            Verdict::Go => match this.handler.as_mut().as_pin_mut() {
                Some(handler) => catch_unwind(AssertUnwindSafe(|| handler.poll(context))),
                None => return Progress::Ready(()),
            },
            verdict => {
                // What the handler holds is given back before anybody hears that it is over.
                drop_handler(this.handler);
                this.presence.unlist();
                if verdict == Verdict::Cancel {
                    shared.statistics.cancelled.fetch_add(1, Relaxed);
                    answer(shared, this.channel, active, Err(Errno::EINTR.into()));
                } else {
                    shared.statistics.abandoned.fetch_add(1, Relaxed);
                }
                return Progress::Ready(());
            }
        };
        let outcome = match polled {
            Ok(Progress::Ready(outcome)) => outcome,
            Ok(Progress::Pending) => {
                if !context.waker().will_wake(Waker::noop()) {
                    active.set_waker(context.waker());
                    if active.verdict() != Verdict::Go {
                        context.waker().wake_by_ref();
                    }
                }
                return Progress::Pending;
            }
            Err(panic) => {
                shared.statistics.panics.fetch_add(1, Relaxed);
                tracing::error!(
                    operation = active.opcode.name(),
                    unique = active.header.unique,
                    node = active.header.node,
                    panic = text(&panic),
                    "a handler panicked"
                );
                Err(Errno::EIO.into())
            }
        };
        drop_handler(this.handler.as_mut());
        this.presence.unlist();
        // A handler that was told by commit() to give up, because another server is to do it.
        if active.verdict() == Verdict::Abandon && matches!(outcome, Err(Failure::Errno(Errno::EINTR))) {
            shared.statistics.abandoned.fetch_add(1, Relaxed);
            return Progress::Ready(());
        }
        answer(shared, this.channel, active, outcome);
        Progress::Ready(())
    }
}

/// Drops a handler; if that panics the session lives on.
fn drop_handler<Fut>(mut handler: Pin<&mut Option<Fut>>) {
    if catch_unwind(AssertUnwindSafe(|| handler.set(None))).is_err() {
        tracing::error!("a handler panicked when it was dropped");
    }
}

fn text(panic: &Box<dyn Any + Send>) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "",
    }
}

fn answer(shared: &Shared, channel: &Channel, active: &Active, outcome: Outcome) {
    let (opcode, unique) = (active.opcode, active.header.unique);
    let result = match &outcome {
        Ok(reply) => Ok(reply),
        Err(Failure::Errno(errno)) => Err(*errno),
        Err(Failure::Malformed(error)) => {
            shared.statistics.malformed.fetch_add(1, Relaxed);
            tracing::error!(operation = opcode.name(), unique, %error, "the kernel sent a malformed request");
            Err(Errno::EIO)
        }
        Err(Failure::Handler(fault)) => {
            tracing::error!(
                operation = opcode.name(),
                unique,
                fault,
                "a handler's answer is not possible"
            );
            Err(Errno::EIO)
        }
    };
    if result.is_err() {
        shared.statistics.error(opcode);
    }
    tracing::trace!(operation = opcode.name(), unique, node = active.header.node, error = ?result.err(), "answered");
    // Before the answer: who has it may ask for the figures.
    shared.statistics.latency(opcode, || active.started.elapsed());
    send(shared, channel, unique, result);
}

/// Runs a handler until it first waits, the rest of it in the runtime.
pub(super) fn start<Fut>(shared: &Arc<Shared>, channel: &Arc<Channel>, active: Arc<Active>, handler: Fut)
where
    Fut: Future<Output = Outcome> + Send + 'static,
{
    let span = trace_span!(
        "fuse",
        operation = active.opcode.name(),
        unique = active.header.unique,
        node = active.header.node,
        pid = active.header.pid
    );
    let presence = Presence {
        active,
        shared: shared.clone(),
        listed: Cell::new(true),
    };
    let mut driver = Box::pin(Driver {
        handler: Some(handler),
        channel: channel.clone(),
        span,
        presence,
    });
    if driver
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
        .is_pending()
    {
        shared.runtime.spawn(driver);
    }
}
