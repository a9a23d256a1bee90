//! ext4 as the measure.

use lazarette_e2e::cmd;
use lazarette_e2e::posix::{Verdict, Verdicts};
use rustix::mount::{UnmountFlags, unmount};
use std::fs;
use std::path::{Path, PathBuf};

/// Not tried on any FUSE file system: the C library knows the most links of a file from the file
/// system's type.
const UNTRIED: &str = "link::link_count_max";

/// A new file system, mounted as long as this lives.
pub(crate) struct Disk(pub(crate) PathBuf);

impl Disk {
    pub(crate) async fn ext4(dir: &Path) -> Self {
        let (image, mountpoint) = (dir.join("ext4.image"), dir.join("ext4"));
        fs::create_dir(&mountpoint).unwrap();
        fs::File::create_new(&image).unwrap().set_len(1 << 30).unwrap();
        cmd!["mkfs.ext4", "-q", &image].run().await.unwrap();
        cmd!["mount", "-o", "loop", &image, &mountpoint].run().await.unwrap();
        Self(mountpoint)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// What passes on ext4 has to pass here.
pub(crate) fn compare(name: &str, ours: &Verdicts, ext4: &Verdicts) {
    let passed = |case: &&String| ext4[*case] == Verdict::Passed && *case != UNTRIED;
    let cases: Vec<_> = ext4.keys().filter(passed).collect();
    assert!(cases.len() > 380, "only {} cases pass on ext4", cases.len());
    let worse: Vec<_> = cases
        .iter()
        .map(|case| (case, ours.get(*case)))
        .filter(|(_, verdict)| *verdict != Some(&Verdict::Passed))
        .collect();
    assert!(worse.is_empty(), "on {name} but not on ext4: {worse:#?}");
}
