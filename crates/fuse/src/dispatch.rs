//! From a request to its handler and from the handler's result to the answer.

use crate::abi::{Capabilities, OUT_HEADER, Opcode};
use crate::attributes::{put_attributes, put_entry, put_lock, put_opened, put_statfs, put_statx};
use crate::device::Channel;
use crate::directory::Listing;
use crate::errno::Errno;
use crate::filesystem::{Data, Filesystem};
use crate::header::Header;
use crate::operation::*;
use crate::request::{Active, Interrupted, Request, Verdict};
use crate::session::{Core, Shared};
use crate::wire::{Head, Malformed};
use bytes::Bytes;
use pin_project_lite::pin_project;
use rustix::io::Errno as Os;
use std::any::Any;
use std::cell::Cell;
use std::future::Future;
use std::io::IoSlice;
use std::os::unix::ffi::OsStringExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll as Progress, Waker};
use tracing::{Span, trace_span};

/// Bytes of the longest link target the kernel takes.
const LONGEST_TARGET: usize = 4095;

/// What a handler's result becomes.
pub(crate) enum Reply {
    Empty,
    Head(Head),
    Data(Data),
    Both(Head, Vec<u8>),
}

/// Why there is no such result.
enum Failure {
    Errno(Errno),
    Malformed(Malformed),
    /// The handler's answer is not one the kernel takes.
    Handler(&'static str),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<Malformed> for Failure {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

type Outcome = Result<Reply, Failure>;

fn head(build: impl FnOnce(&mut Head)) -> Outcome {
    let mut head = Head::new();
    build(&mut head);
    Ok(Reply::Head(head))
}

fn number(value: u64) -> Outcome {
    head(|head| {
        head.u64(value);
    })
}

/// `fuse_write_out`, `fuse_getxattr_out`, `fuse_poll_out`
fn half(value: u32) -> Outcome {
    head(|head| {
        head.u32(value).u32(0);
    })
}

fn value(value: Bytes, size: u32) -> Outcome {
    match size {
        0 => half(u32::try_from(value.len()).map_err(|_| Errno::E2BIG)?),
        size if value.len() > size as usize => Err(Errno::ERANGE.into()),
        _ => Ok(Reply::Data(value.into())),
    }
}

/// Sends one answer.
pub(crate) fn send(shared: &Shared, channel: &Channel, unique: u64, result: Result<&Reply, Errno>) {
    let (errno, fixed, data) = match result {
        Err(errno) => (-errno.raw(), &[][..], None),
        Ok(Reply::Empty) => (0, &[][..], None),
        Ok(Reply::Head(head)) => (0, head.as_slice(), None),
        Ok(Reply::Data(data)) => (0, &[][..], Some(data)),
        Ok(Reply::Both(head, bytes)) => {
            let mut prefix = prefix(0, head.as_slice().len() + bytes.len(), unique);
            prefix.put(head.as_slice());
            let parts = [IoSlice::new(prefix.as_slice()), IoSlice::new(bytes)];
            return report(shared, channel, unique, channel.write(&parts));
        }
    };
    let length = fixed.len() + data.map_or(0, Data::len);
    let mut first = Prefix::new(errno, length, unique);
    first.put(fixed);
    let first = IoSlice::new(first.as_slice());
    let written = match data {
        None => channel.write(&[first]),
        Some(Data::Bytes(bytes)) => channel.write(&[first, IoSlice::new(bytes)]),
        Some(Data::Buffer(buffer)) => channel.write(&[first, IoSlice::new(buffer)]),
        Some(Data::Chunks(chunks)) => {
            // The kernel's limit of parts is 1024; whoever has more has small ones.
            if chunks.len() < 1000 {
                let parts: Vec<_> = std::iter::once(first)
                    .chain(chunks.iter().map(|chunk| IoSlice::new(chunk)))
                    .collect();
                channel.write(&parts)
            } else {
                channel.write(&[first, IoSlice::new(&chunks.concat())])
            }
        }
    };
    report(shared, channel, unique, written);
}

fn report(shared: &Shared, channel: &Channel, unique: u64, written: rustix::io::Result<()>) {
    match written {
        Ok(()) => {}
        // The kernel no longer waits for it, or the connection is gone.
        Err(Os::NOENT | Os::NODEV | Os::CONNABORTED | Os::PERM) => {
            shared.statistics.unsent.fetch_add(1, Relaxed);
        }
        Err(error) => {
            shared.statistics.unsent.fetch_add(1, Relaxed);
            tracing::error!(%error, unique, "the kernel refused an answer");
            let eio = Prefix::new(-Errno::EIO.raw(), 0, unique);
            let _ = channel.write(&[IoSlice::new(eio.as_slice())]);
        }
    }
}

/// `fuse_out_header` and room for the fixed part of a reply.
struct Prefix {
    bytes: [u8; OUT_HEADER + 288],
    length: usize,
}

impl Prefix {
    fn new(error: i32, rest: usize, unique: u64) -> Self {
        let mut bytes = [0; OUT_HEADER + 288];
        bytes[..4].copy_from_slice(&((OUT_HEADER + rest) as u32).to_ne_bytes());
        bytes[4..8].copy_from_slice(&error.to_ne_bytes());
        bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
        Self {
            bytes,
            length: OUT_HEADER,
        }
    }

    /// Never more than a `Head` holds.
    fn put(&mut self, fixed: &[u8]) {
        let end = (self.length + fixed.len()).min(self.bytes.len());
        let count = end - self.length;
        self.bytes[self.length..end].copy_from_slice(&fixed[..count]);
        self.length = end;
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

fn prefix(error: i32, rest: usize, unique: u64) -> Prefix {
    Prefix::new(error, rest, unique)
}

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
fn start<Fut>(shared: &Arc<Shared>, channel: &Arc<Channel>, active: Arc<Active>, handler: Fut)
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

/// Takes up one request that was read.
pub(crate) fn dispatch<F: Filesystem>(core: &Arc<Core<F>>, channel: &Arc<Channel>, header: Header, body: Bytes) {
    let shared = &core.shared;
    let Some(opcode) = Opcode::from_raw(header.opcode) else {
        tracing::debug!(opcode = header.opcode, "a request of an unknown kind");
        return send(shared, channel, header.unique, Err(Errno::ENOSYS));
    };
    shared.statistics.request(opcode);
    if header.is_resend() {
        shared.statistics.resent.fetch_add(1, Relaxed);
    }
    let malformed = |error: Malformed| {
        shared.statistics.malformed.fetch_add(1, Relaxed);
        tracing::error!(operation = opcode.name(), unique = header.unique, %error, "the kernel sent a malformed request");
    };
    match opcode {
        Opcode::Forget | Opcode::BatchForget => {
            match parse_forgets(opcode, &header, &body) {
                Ok(forgets) => {
                    if catch_unwind(AssertUnwindSafe(|| core.filesystem.forget(&forgets))).is_err() {
                        shared.statistics.panics.fetch_add(1, Relaxed);
                        tracing::error!("forget panicked");
                    }
                }
                Err(error) => malformed(error),
            }
            return;
        }
        Opcode::Interrupt => {
            shared.statistics.interrupts.fetch_add(1, Relaxed);
            match parse_interrupt(&body) {
                Ok(unique) => {
                    if shared.in_flight.interrupt(unique) == Interrupted::Watch {
                        shared.watch_interrupted();
                    }
                }
                Err(error) => malformed(error),
            }
            return;
        }
        Opcode::NotifyReply => return shared.retrieved(header.unique, body),
        Opcode::Destroy => return send(shared, channel, header.unique, Ok(&Reply::Empty)),
        Opcode::Init => {
            malformed(Malformed::Unexpected);
            return send(shared, channel, header.unique, Err(Errno::EIO));
        }
        Opcode::SetupMapping | Opcode::RemoveMapping => {
            return send(shared, channel, header.unique, Err(Errno::ENOSYS));
        }
        _ => {}
    }
    let (body, extensions) = body.split_at_extensions(header.extensions);
    let groups = if extensions.is_empty() {
        Vec::new()
    } else {
        match parse_groups(&extensions) {
            Ok(groups) => groups,
            Err(error) => {
                malformed(error);
                return send(shared, channel, header.unique, Err(Errno::EIO));
            }
        }
    };
    let active = Active::new(header, opcode, groups);
    shared.entered(opcode);
    if shared.in_flight.enter(&active) == Some(Interrupted::Watch) {
        shared.watch_interrupted();
    }
    run(core, channel, active, body);
}

trait SplitExtensions: Sized {
    fn split_at_extensions(self, length: usize) -> (Self, Self);
}

impl SplitExtensions for Bytes {
    fn split_at_extensions(mut self, length: usize) -> (Self, Self) {
        if length == 0 {
            return (self, Bytes::new());
        }
        let extensions = self.split_off(self.len().saturating_sub(length));
        (self, extensions)
    }
}

/// Each operation's future is of its own type and size.
fn run<F: Filesystem>(core: &Arc<Core<F>>, channel: &Arc<Channel>, active: Arc<Active>, body: Bytes) {
    macro_rules! handle {
        ($operation:ty, |$filesystem:ident, $request:ident, $parsed:ident| $answer:expr) => {{
            let owner = core.clone();
            let $request = Request {
                active: active.clone(),
                shared: core.shared.clone(),
            };
            start(&core.shared, channel, active, async move {
                let $parsed = <$operation>::parse(&$request.active.header, &body)?;
                let $filesystem = &owner.filesystem;
                $answer
            })
        }};
    }
    macro_rules! empty {
        ($operation:ty, $method:ident) => {
            handle!($operation, |filesystem, request, parsed| {
                filesystem.$method(&request, parsed).await?;
                Ok(Reply::Empty)
            })
        };
    }
    macro_rules! entry {
        ($operation:ty, $method:ident) => {
            handle!($operation, |filesystem, request, parsed| {
                let entry = filesystem.$method(&request, parsed).await?;
                head(|head| put_entry(head, &entry))
            })
        };
    }
    macro_rules! attributes {
        ($operation:ty, $method:ident) => {
            handle!($operation, |filesystem, request, parsed| {
                let attributes = filesystem.$method(&request, parsed).await?;
                head(|head| put_attributes(head, &attributes))
            })
        };
    }
    macro_rules! opened {
        ($method:ident) => {
            handle!(Open, |filesystem, request, parsed| {
                let opened = filesystem.$method(&request, parsed).await?;
                head(|head| put_opened(head, &opened))
            })
        };
    }
    macro_rules! created {
        ($method:ident) => {
            handle!(Create<'_>, |filesystem, request, parsed| {
                let (entry, opened) = filesystem.$method(&request, parsed).await?;
                head(|head| {
                    put_entry(head, &entry);
                    put_opened(head, &opened);
                })
            })
        };
    }
    match active.opcode {
        Opcode::Lookup => entry!(Lookup<'_>, lookup),
        Opcode::Getattr => attributes!(Getattr, getattr),
        Opcode::Setattr => attributes!(Setattr, setattr),
        Opcode::Statx => handle!(StatxQuery, |filesystem, request, parsed| {
            let statx = filesystem.statx(&request, parsed).await?;
            head(|head| put_statx(head, &statx))
        }),
        Opcode::Readlink => handle!(Readlink, |filesystem, request, parsed| {
            let target = filesystem.readlink(&request, parsed).await?.into_vec();
            match target.len() {
                0 => Err(Failure::Handler("a link's target is empty")),
                1..=LONGEST_TARGET => Ok(Reply::Data(target.into())),
                _ => Err(Errno::ENAMETOOLONG.into()),
            }
        }),
        Opcode::Symlink => entry!(Symlink<'_>, symlink),
        Opcode::Mknod => entry!(Mknod<'_>, mknod),
        Opcode::Mkdir => entry!(Mkdir<'_>, mkdir),
        Opcode::Unlink => empty!(Remove<'_>, unlink),
        Opcode::Rmdir => empty!(Remove<'_>, rmdir),
        Opcode::Rename | Opcode::Rename2 => empty!(Rename<'_>, rename),
        Opcode::Link => entry!(Link<'_>, link),
        Opcode::Open => opened!(open),
        Opcode::Opendir => opened!(opendir),
        Opcode::Create => created!(create),
        Opcode::Tmpfile => created!(tmpfile),
        Opcode::Read => handle!(Read, |filesystem, request, parsed| {
            let size = parsed.size as usize;
            let data = filesystem.read(&request, parsed).await?;
            match data.len() {
                length if length > size => Err(Failure::Handler("more was read than asked for")),
                _ => Ok(Reply::Data(data)),
            }
        }),
        Opcode::Write => handle!(Write, |filesystem, request, parsed| {
            let size = parsed.data.len() as u32;
            match filesystem.write(&request, parsed).await? {
                written if written > size => Err(Failure::Handler("more was written than given")),
                written => half(written),
            }
        }),
        Opcode::Flush => empty!(Flush, flush),
        Opcode::Release => empty!(Release, release),
        Opcode::Releasedir => empty!(Release, releasedir),
        Opcode::Fsync => empty!(Fsync, fsync),
        Opcode::Fsyncdir => empty!(Fsync, fsyncdir),
        Opcode::Readdir | Opcode::Readdirplus => {
            let plus = active.opcode == Opcode::Readdirplus;
            handle!(Readdir, |filesystem, request, parsed| {
                let mut listing = Listing::new(parsed.size, plus);
                filesystem.readdir(&request, parsed, &mut listing).await?;
                Ok(Reply::Data(listing.into_bytes().into()))
            })
        }
        Opcode::Statfs => handle!(StatfsQuery, |filesystem, request, parsed| {
            let statfs = filesystem.statfs(&request, parsed).await?;
            head(|head| put_statfs(head, &statfs))
        }),
        Opcode::Syncfs => empty!(Syncfs, syncfs),
        Opcode::Setxattr => {
            let extended = core.shared.parameters.has(Capabilities::SETXATTR_EXT);
            let owner = core.clone();
            let request = Request {
                active: active.clone(),
                shared: core.shared.clone(),
            };
            start(&core.shared, channel, active, async move {
                let setxattr = Setxattr::parse(&request.active.header, &body, extended)?;
                owner.filesystem.setxattr(&request, setxattr).await?;
                Ok(Reply::Empty)
            })
        }
        Opcode::Getxattr => handle!(Getxattr<'_>, |filesystem, request, parsed| {
            let size = parsed.size;
            value(filesystem.getxattr(&request, parsed).await?, size)
        }),
        Opcode::Listxattr => handle!(Listxattr, |filesystem, request, parsed| {
            let size = parsed.size;
            value(filesystem.listxattr(&request, parsed).await?, size)
        }),
        Opcode::Removexattr => empty!(Removexattr<'_>, removexattr),
        Opcode::Getlk => handle!(LockRequest, |filesystem, request, parsed| {
            let lock = filesystem.getlk(&request, parsed).await?;
            head(|head| put_lock(head, &lock))
        }),
        Opcode::Setlk | Opcode::Setlkw => empty!(LockRequest, setlk),
        Opcode::Access => empty!(Access, access),
        Opcode::Bmap => handle!(Bmap, |filesystem, request, parsed| {
            number(filesystem.bmap(&request, parsed).await?)
        }),
        Opcode::Ioctl => handle!(Ioctl<'_>, |filesystem, request, parsed| {
            let size = parsed.output_size as usize;
            let reply = filesystem.ioctl(&request, parsed).await?;
            if reply.output.len() > size {
                return Err(Failure::Handler("an ioctl has more output than asked for"));
            }
            let mut head = Head::new();
            head.i32(reply.result).u32(0).u32(0).u32(0);
            Ok(Reply::Both(head, reply.output))
        }),
        Opcode::Poll => handle!(Poll, |filesystem, request, parsed| {
            half(filesystem.poll(&request, parsed).await?)
        }),
        Opcode::Fallocate => empty!(Fallocate, fallocate),
        Opcode::Lseek => handle!(Lseek, |filesystem, request, parsed| {
            number(filesystem.lseek(&request, parsed).await?)
        }),
        Opcode::CopyFileRange | Opcode::CopyFileRange64 => {
            let wide = active.opcode == Opcode::CopyFileRange64;
            handle!(CopyFileRange, |filesystem, request, parsed| {
                let length = parsed.length;
                let copied = filesystem.copy_file_range(&request, parsed).await?;
                match u32::try_from(copied) {
                    _ if copied > length => Err(Failure::Handler("more was copied than asked for")),
                    _ if wide => number(copied),
                    Ok(copied) => half(copied),
                    Err(_) => Err(Failure::Handler("more was copied than asked for")),
                }
            })
        }
        Opcode::Forget
        | Opcode::BatchForget
        | Opcode::Init
        | Opcode::Interrupt
        | Opcode::Destroy
        | Opcode::NotifyReply
        | Opcode::SetupMapping
        | Opcode::RemoveMapping => {
            // Taken up before.
            start(&core.shared, channel, active, async {
                Err(Failure::Malformed(Malformed::Unexpected))
            })
        }
    }
}
