//! What the kernel is told.

use crate::memory::Memory;
use crate::mounted::{application, count, mounted};
use bytes::Bytes;
use lazarette_fuse::Errno;
use lazarette_fuse::abi::Opcode;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_invalidated_is_asked_for_again() {
    let (place, session) = mounted(Memory::new()).await;
    let notifier = session.notifier();
    let file = place.join("file");
    let stat = || {
        let file = file.clone();
        application(move || fs::metadata(file).unwrap())
    };
    let content = || {
        let file = file.clone();
        application(move || fs::read(file).unwrap())
    };
    fs::write(&file, b"content").unwrap();
    let node = stat().await.ino();
    let before = count(&session, Opcode::Lookup);
    stat().await;
    assert_eq!(count(&session, Opcode::Lookup), before, "names are cached");
    for expire in [false, true] {
        let before = count(&session, Opcode::Lookup);
        let name = OsStr::new("file");
        let known = if expire {
            notifier.expire_entry(1, name).await
        } else {
            notifier.inval_entry(1, name).await
        };
        assert_eq!(known, Ok(true));
        stat().await;
        assert_eq!(count(&session, Opcode::Lookup), before + 1);
    }
    content().await;
    let before = (count(&session, Opcode::Read), count(&session, Opcode::Getattr));
    content().await;
    assert_eq!(count(&session, Opcode::Read), before.0, "data are cached");
    assert_eq!(notifier.inval_inode(node, 0, 0).await, Ok(true));
    assert_eq!(content().await, b"content");
    assert!(count(&session, Opcode::Read) > before.0);
    assert!(count(&session, Opcode::Getattr) > before.1);
    // What the kernel does not know is no error.
    assert_eq!(notifier.inval_inode(99_999, 0, 0).await, Ok(false));
    assert_eq!(notifier.inval_entry(1, OsStr::new("nothing")).await, Ok(false));
    assert_eq!(notifier.inval_entry(1, OsStr::new("a/b")).await, Err(Errno::EINVAL));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_are_stored_and_retrieved() {
    let (place, session) = mounted(Memory::new()).await;
    let notifier = session.notifier();
    let file = place.join("file");
    fs::write(&file, vec![b'a'; 3 << 20]).unwrap();
    let node = fs::metadata(&file).unwrap().ino();
    // More than one message takes.
    assert_eq!(
        notifier.store(node, 4096, Bytes::from(vec![b'b'; 2 << 20])).await,
        Ok(true)
    );
    let copy = file.clone();
    let content = application(move || fs::read(copy).unwrap()).await;
    assert!(content[4096..4096 + (2 << 20)].iter().all(|byte| *byte == b'b'));
    let retrieved = notifier.retrieve(node, 4096, 100).await.unwrap().unwrap();
    assert_eq!(&retrieved[..], [b'b'; 100]);
    assert_eq!(notifier.retrieve(99_999, 0, 10).await, Ok(None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_elsewhere_is_seen() {
    let (place, session) = mounted(Memory::new()).await;
    let file = place.join("file");
    fs::write(&file, b"x").unwrap();
    let node = fs::metadata(&file).unwrap().ino();
    assert_eq!(session.notifier().delete(1, node, OsStr::new("file")).await, Ok(true));
    assert_eq!(session.notifier().delete(1, node, OsStr::new("file")).await, Ok(false));
    if session.parameters().minor >= 44 {
        session.notifier().increment_epoch().await.unwrap();
    }
    if session.parameters().minor >= 45 {
        session.notifier().prune(&[node, 77]).await.unwrap();
    }
}
