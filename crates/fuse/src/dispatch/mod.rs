//! From a request to its handler and from the handler's result to the answer.

mod driver;
mod reply;

use crate::abi::{Capabilities, Opcode};
use crate::attributes::{put_attributes, put_entry, put_lock, put_opened, put_statfs, put_statx};
use crate::device::Channel;
use crate::directory::Listing;
use crate::errno::Errno;
use crate::filesystem::Filesystem;
use crate::header::Header;
use crate::operation::*;
use crate::request::{Active, Interrupted, Request};
use crate::session::Core;
use crate::wire::{Head, Malformed};
use bytes::Bytes;
use driver::start;
use reply::{Failure, LONGEST_TARGET, Reply, half, head, number, send, value};
use std::os::unix::ffi::OsStringExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

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
