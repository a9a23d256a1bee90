//! Sessions whose kernel is the test: messages that no real kernel sends.

use super::*;
use crate::abi::{Capabilities, IN_HEADER, MINOR};
use crate::filesystem::Data;
use crate::negotiation::InitRequest;
use crate::operation::{Lookup, Read, Write};
use crate::request::Request;
use crate::{Entry, Errno, Result};
use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// Takes whatever comes.
struct Accepting;

impl Filesystem for Accepting {
    async fn lookup(&self, _request: &Request, _lookup: Lookup<'_>) -> Result<Entry> {
        Ok(Entry {
            node: 2,
            ..Entry::default()
        })
    }

    async fn read(&self, request: &Request, read: Read) -> Result<Data> {
        Ok(request.buffer(read.size.min(1 << 16) as usize).into())
    }

    async fn write(&self, request: &Request, write: Write) -> Result<u32> {
        request.commit()?;
        tokio::task::yield_now().await;
        Ok(write.data.len() as u32)
    }
}

fn parameters() -> Parameters {
    let request = InitRequest {
        major: 7,
        minor: MINOR,
        max_readahead: 1 << 20,
        flags: Capabilities::all(),
    };
    Parameters::negotiate(&request, &Terms::default()).unwrap()
}

/// A session and the kernel's end of its device.
fn pretended(config: Config) -> (Session<Accepting>, OwnedFd) {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let connection = Connection {
        parameters: parameters(),
        descriptors: vec![ours],
        mountpoint: None,
    };
    (Session::serve(Accepting, connection, config).unwrap(), theirs)
}

fn message(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(IN_HEADER + body.len());
    bytes.extend(((IN_HEADER + body.len()) as u32).to_ne_bytes());
    bytes.extend(opcode.to_ne_bytes());
    bytes.extend(unique.to_ne_bytes());
    bytes.extend(1u64.to_ne_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

/// The next reply's error and body, for the request that is expected.
fn reply_to(kernel: &OwnedFd, unique: u64) -> (i32, Vec<u8>) {
    let mut buffer = vec![0; 2 << 20];
    let length = rustix::io::read(kernel, &mut buffer).unwrap();
    let number = |at: usize| u32::from_ne_bytes(buffer[at..at + 4].try_into().unwrap());
    assert_eq!(number(0) as usize, length, "the length is the message's");
    assert_eq!(u64::from_ne_bytes(buffer[8..16].try_into().unwrap()), unique);
    (number(4) as i32, buffer[16..length].to_vec())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

#[test]
fn what_is_malformed_is_refused_and_counted() {
    let runtime = runtime();
    let _entered = runtime.enter();
    let (session, kernel) = pretended(Config {
        readers: 1,
        ..Config::default()
    });
    let send = |bytes: &[u8]| rustix::io::write(&kernel, bytes).unwrap();
    // Not even a header: nobody to answer to.
    send(b"short");
    let mut wrong_length = message(1, 2, b"name\0");
    wrong_length[0] += 1;
    send(&wrong_length);
    for (number, body) in [&b""[..], b"unterminated", b"\0", b"a/b\0"].iter().enumerate() {
        let unique = 10 + 2 * number as u64;
        send(&message(1, unique, body));
        assert_eq!(reply_to(&kernel, unique).0, -Errno::EIO.raw());
    }
    // A write that claims more than it carries.
    let mut write = [0; 40];
    write[16..20].copy_from_slice(&1000u32.to_ne_bytes());
    send(&message(16, 20, &write));
    assert_eq!(reply_to(&kernel, 20).0, -Errno::EIO.raw());
    // A second INIT, and what is not known at all.
    send(&message(26, 22, &[0; 64]));
    assert_eq!(reply_to(&kernel, 22).0, -Errno::EIO.raw());
    send(&message(4095, 24, b""));
    assert_eq!(reply_to(&kernel, 24).0, -Errno::ENOSYS.raw());
    send(&message(1, 26, b"name\0"));
    assert_eq!(reply_to(&kernel, 26).1.len(), 128);
    assert_eq!(session.statistics().malformed, 8);
    drop(kernel);
    assert!(matches!(runtime.block_on(session.ended()), End::Failed(_)));
}

#[test]
fn large_writes_are_held_back() {
    let runtime = runtime();
    let _entered = runtime.enter();
    let (session, kernel) = pretended(Config {
        readers: 2,
        max_memory: 1,
        ..Config::default()
    });
    let mut body = vec![7; 40 + (100 << 10)];
    body[16..20].copy_from_slice(&(100u32 << 10).to_ne_bytes());
    for round in 0..20u64 {
        rustix::io::write(&kernel, &message(16, 100 + 2 * round, &body)).unwrap();
        let (error, reply) = reply_to(&kernel, 100 + 2 * round);
        assert_eq!(
            (error, u32::from_ne_bytes(reply[..4].try_into().unwrap())),
            (0, 100 << 10)
        );
    }
    drop(kernel);
    runtime.block_on(session.ended());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever comes, the session answers the next request.
    #[test]
    fn no_message_ends_a_session(
        messages in proptest::collection::vec((0u32..60, proptest::collection::vec(any::<u8>(), 0..200), any::<bool>()), 1..20),
    ) {
        let runtime = runtime();
        let _entered = runtime.enter();
        let (session, kernel) = pretended(Config { readers: 2, ..Config::default() });
        for (index, (opcode, body, raw)) in messages.iter().enumerate() {
            let bytes = if *raw { body.clone() } else { message(*opcode, 100 + 2 * index as u64, body) };
            if !bytes.is_empty() {
                rustix::io::write(&kernel, &bytes).unwrap();
            }
        }
        rustix::io::write(&kernel, &message(1, 2, b"name\0")).unwrap();
        let mut buffer = vec![0; 2 << 20];
        loop {
            let length = rustix::io::read(&kernel, &mut buffer).unwrap();
            prop_assert_eq!(u32::from_ne_bytes(buffer[..4].try_into().unwrap()) as usize, length);
            if u64::from_ne_bytes(buffer[8..16].try_into().unwrap()) == 2 {
                break;
            }
        }
        prop_assert_eq!(session.statistics().panics, 0);
        drop(kernel);
        runtime.block_on(session.ended());
    }
}
