//! Getting a thread out of a read that blocks.
//!
//! A reader blocks in read(2) on the device, where nothing but a request or a signal ends its wait.
//! Waiting for readiness instead would cost every request one or two system calls more, only so that
//! a session can pause.

#![allow(unsafe_code)]

use std::os::unix::thread::JoinHandleExt;
use std::sync::OnceLock;
use std::thread::JoinHandle;

/// Ignored unless somebody handles it, so a stray one does no harm.
const SIGNAL: libc::c_int = libc::SIGURG;

extern "C" fn nothing(_signal: libc::c_int) {}

/// Gives the signal a handler that does nothing, unless it has one: an ignored signal ends no read.
/// A handler that another part of the process installed serves as well if it was installed without
/// `SA_RESTART`.
fn install() -> bool {
    // SAFETY: sigaction(2) is given pointers to structures that live through the calls; a zeroed
    // `sigaction` is a valid one (SIG_DFL, no flags, an empty mask), and the handler is a function of
    // the type that goes with flags without SA_SIGINFO. It does nothing, which is safe in a handler.
    unsafe {
        let mut known: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(SIGNAL, std::ptr::null(), &mut known) != 0 {
            return false;
        }
        if known.sa_sigaction != libc::SIG_DFL && known.sa_sigaction != libc::SIG_IGN {
            return known.sa_flags & libc::SA_RESTART == 0;
        }
        let mut ours: libc::sigaction = std::mem::zeroed();
        ours.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigemptyset(&mut ours.sa_mask);
        libc::sigaction(SIGNAL, &ours, std::ptr::null_mut()) == 0
    }
}

/// Prepares the process; false if its threads cannot be woken.
pub(crate) fn prepare() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(install)
}

/// Lets the calling thread be woken, whatever signal mask it has inherited.
pub(crate) fn accept() {
    // SAFETY: both calls are given a set that lives through them; sigemptyset(3) initializes it before
    // it is read.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, SIGNAL);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
}

/// Ends a read that the thread is blocked in, if it is in one.
pub(crate) fn wake(thread: &JoinHandle<()>) {
    if thread.is_finished() {
        return;
    }
    // SAFETY: the thread is neither joined nor detached as long as its `JoinHandle` exists, so its
    // pthread_t is valid, even if it has ended since the look above.
    unsafe {
        libc::pthread_kill(thread.as_pthread_t() as libc::pthread_t, SIGNAL);
    }
}
