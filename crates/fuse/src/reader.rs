//! The threads that read requests.
//!
//! They block in read(2) instead of waiting for readiness in the runtime: the kernel wakes one blocked
//! reader for a request, but all that wait for readiness, which is one or two system calls more for
//! each request; and a handler that blocks its thread keeps no worker from the runtime. What this is
//! worth in processor time has not been measured. What has been, with the pass-through example and 8
//! processes creating files on 2 processors: 10 readers switch 2.9 times for a create and take 45 µs
//! of processor time, 2 readers 2.1 times and 40 µs. The kernel gives requests to idle readers in
//! turn, so more of them than handlers need to wait is a loss.

use crate::abi::{IN_HEADER, Opcode, WRITE_IN};
use crate::buffer::{Buffer, Copied, Held};
use crate::device::Channel;
use crate::dispatch::dispatch;
use crate::errno::Errno;
use crate::filesystem::Filesystem;
use crate::header::Header;
use crate::session::{Core, End};
use bytes::Bytes;
use rustix::io::Errno as Os;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Duration;

/// Messages up to here are copied, and the buffer used again; from here on it goes with the request.
const COPY_BELOW: usize = 64 << 10;
/// Messages up to here are not counted against the memory of requests.
const FREE_OF_CHARGE: usize = 4 << 10;
/// Unexpected errors in a row after which reading is given up.
const ATTEMPTS: u32 = 100;

/// Reads until the session stops or ends. Returns why it ended.
pub(crate) fn read_requests<F: Filesystem>(
    core: &Arc<Core<F>>,
    channel: &Arc<Channel>,
    blocked: &AtomicBool,
) -> Option<End> {
    let shared = &core.shared;
    let _runtime = shared.runtime.enter();
    let mut buffer = shared.pool.request();
    let mut failures = 0;
    loop {
        // Whoever sees this false lets the thread be; the order makes sure that it stops if so.
        blocked.store(true, SeqCst);
        if !shared.admit() {
            return None;
        }
        let read = channel.read(buffer.room());
        blocked.store(false, SeqCst);
        let length = match read {
            // Not a FUSE device's: the other end of something else is closed.
            Ok(0) => return Some(End::Failed(Errno::EPROTO)),
            Ok(length) => length,
            // A request that was interrupted before it could be read.
            Err(Os::NOENT | Os::INTR) => continue,
            Err(Os::NODEV) => return Some(End::Unmounted),
            Err(Os::CONNABORTED) => return Some(End::Aborted),
            Err(error) => {
                failures += 1;
                tracing::error!(%error, "cannot read requests");
                if failures == ATTEMPTS {
                    return Some(End::Failed(error.into()));
                }
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        failures = 0;
        let header = match Header::parse(buffer.message(length)) {
            Ok(header) => header,
            Err(error) => {
                shared.statistics.malformed.fetch_add(1, Relaxed);
                tracing::error!(%error, length, "the kernel sent a malformed message");
                continue;
            }
        };
        let Some((body, next)) = detach(core, buffer, length, header.opcode) else {
            // Stopped while it waited for memory: the request stays unanswered, for the next server.
            shared.statistics.abandoned.fetch_add(1, Relaxed);
            shared.note_abandoned();
            return None;
        };
        buffer = next;
        dispatch(core, channel, header, body);
    }
}

/// Takes a message's body out of the reader's buffer.
fn detach<F: Filesystem>(core: &Core<F>, buffer: Buffer, length: usize, opcode: u32) -> Option<(Bytes, Buffer)> {
    let pool = &core.shared.pool;
    let full = || core.shared.in_flight.cancel_all_dying();
    if length < FREE_OF_CHARGE || opcode == Opcode::BatchForget as u32 {
        return Some((Bytes::copy_from_slice(&buffer.message(length)[IN_HEADER..]), buffer));
    }
    if length < COPY_BELOW + IN_HEADER + WRITE_IN {
        let charge = pool.charge(length, full)?;
        let bytes = Box::from(&buffer.message(length)[IN_HEADER..]);
        return Some((Bytes::from_owner(Copied { bytes, _charge: charge }), buffer));
    }
    let charge = pool.charge(length, full)?;
    let bytes = Bytes::from_owner(Held {
        buffer,
        length,
        _charge: charge,
    });
    Some((bytes.slice(IN_HEADER..), pool.request()))
}
