//! What a process takes from its system: random numbers and clocks. On the thread of a simulation they are
//! made from the seed and the simulated time, for everything in the process: `HashMap`, `rand::random`, tokio's
//! `select!` and `SystemTime::now` among them.
//!
//! The functions have the names of libc's, which the standard library and the crate `getrandom` call, so the
//! linker takes these. Other threads get what libc would give them.

use libc::{c_int, c_long, c_uint, c_void, clockid_t, size_t, ssize_t, timespec};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;
use tokio::runtime;

/// When a simulation begins, since 1970.
pub(crate) const EPOCH: Duration = Duration::from_secs(1_700_000_000);

thread_local! {
    /// The state of the generator; None on threads that simulate nothing.
    static RANDOM: Cell<Option<u64>> = const { Cell::new(None) };
    static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    /// The clocks of the machines, by the runtimes of their processes.
    static CLOCKS: RefCell<HashMap<runtime::Id, Clock>> = RefCell::default();
}

/// A machine's own clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    /// How long before the simulation the machine was booted.
    pub(crate) ahead: Duration,
    /// Seconds that it shows to have passed for each that does.
    pub(crate) speed: f64,
}

/// Makes this thread that of a simulation.
///
/// # Errors
/// If the standard library does not take its random numbers from here: nothing would be reproducible.
pub(crate) fn enter(seed: u64) -> Result<(), String> {
    std::hint::black_box(getrandom as *const c_void);
    RANDOM.set(Some(seed));
    let before = RANDOM.get();
    // The keys are drawn once for a thread.
    RandomState::new().hash_one(0);
    if RANDOM.get() == before {
        return Err("the standard library does not use this program's getrandom".into());
    }
    lazarette_proto::clock::simulate(boot);
    Ok(())
}

/// Sets the time since the simulation's start.
pub(crate) fn set_now(now: Duration) {
    NOW.set(now);
}

/// Gives the process that runs on the present runtime its machine's clock.
pub(crate) fn set_clock(clock: Clock) {
    let id = runtime::Handle::current().id();
    CLOCKS.with_borrow_mut(|clocks| clocks.insert(id, clock));
}

/// What the present machine's clock shows.
fn boot() -> Duration {
    let now = turmoil::sim_elapsed().unwrap_or_else(|| NOW.get());
    let clock = runtime::Handle::try_current()
        .ok()
        .and_then(|runtime| CLOCKS.with_borrow(|clocks| clocks.get(&runtime.id()).copied()));
    clock.map_or(now, |clock| clock.ahead + now.mul_f64(clock.speed))
}

/// The next number of a generator (splitmix64).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// libc's `getrandom`.
///
/// # Safety
/// `buffer` has room for `length` bytes.
#[allow(unsafe_code)]
// SAFETY: the name and the signature are libc's.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, length: size_t, flags: c_uint) -> ssize_t {
    let Some(mut state) = RANDOM.try_with(Cell::get).ok().flatten() else {
        // SAFETY: the kernel's call of that name, with the caller's arguments.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) as ssize_t };
    };
    if length == 0 {
        return 0;
    }
    // SAFETY: the caller promises that there is room; it is not read, and no one else has it.
    let bytes = unsafe {
        buffer.cast::<u8>().write_bytes(0, length);
        std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length)
    };
    for part in bytes.chunks_mut(8) {
        part.copy_from_slice(&next(&mut state).to_le_bytes()[..part.len()]);
    }
    let _ = RANDOM.try_with(|random| random.set(Some(state)));
    length as ssize_t
}

/// libc's `clock_gettime`.
///
/// # Safety
/// `time` may be written to.
#[allow(unsafe_code)]
// SAFETY: the name and the signature are libc's.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    let simulated = RANDOM.try_with(Cell::get).ok().flatten().is_some();
    let start = match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => EPOCH,
        libc::CLOCK_MONOTONIC | libc::CLOCK_MONOTONIC_RAW | libc::CLOCK_MONOTONIC_COARSE | libc::CLOCK_BOOTTIME => {
            Duration::from_secs(1000)
        }
        _ => Duration::ZERO,
    };
    if !simulated || start.is_zero() {
        // SAFETY: the kernel's call of that name, with the caller's arguments.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as c_int };
    }
    let now = start + NOW.try_with(Cell::get).unwrap_or_default();
    // SAFETY: the caller promises that it may be written to.
    unsafe {
        time.write(timespec {
            tv_sec: now.as_secs() as libc::time_t,
            tv_nsec: now.subsec_nanos() as c_long,
        });
    }
    0
}
