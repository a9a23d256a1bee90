//! A file system in memory: `memfs MOUNTPOINT`.

mod locks;
mod memory;
mod tree;

use lazarette_fuse::abi::Capabilities;
use lazarette_fuse::{Config, MountOptions, Session, Terms, Unmount};
use memory::Memory;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mountpoint = std::env::args().nth(1).ok_or("usage: memfs MOUNTPOINT")?;
    let root = rustix::process::geteuid().is_root();
    let options = MountOptions {
        source: "memfs".into(),
        subtype: "memfs".into(),
        allow_other: root,
        suid: root,
        devices: root,
        ..MountOptions::default()
    };
    let mut terms = Terms::default();
    terms.wanted |= Capabilities::CACHE_SYMLINKS | Capabilities::EXPORT_SUPPORT;
    let session = Session::mount(
        Memory::new(),
        mountpoint,
        options,
        Config {
            terms,
            ..Config::default()
        },
    )
    .await?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        end = session.ended() => println!("ended: {end:?}"),
        _ = tokio::signal::ctrl_c() => session.unmount(Unmount::Detach).await?,
        _ = terminate.recv() => session.unmount(Unmount::Detach).await?,
    }
    Ok(())
}
