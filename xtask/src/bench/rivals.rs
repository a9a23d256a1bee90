//! The pass-through file systems that are compared, each over a folder of its own on the same disk.

use super::disk::Disk;
use anyhow::{Context, Result, ensure};
use lazarette_e2e::process::{Daemon, Process, stop};
use lazarette_e2e::{Deadline, build, cmd, debian, wait_for};
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Background requests (read-ahead, mostly) that the kernel sends at once, and from how many on it
/// holds callers back: the same for every system, whatever it asked for.
const BACKGROUND: (u32, u32) = (64, 48);
/// Processor time in /proc is in 1/100 s on every machine.
const TICK: Duration = Duration::from_millis(10);
const LIMIT: Duration = Duration::from_secs(60);

const EXAMPLES: &str = "/usr/share/doc/libfuse3-dev/examples";

/// libfuse's example keeps all inodes in one list and searches it at every look-up: with thousands of
/// files that would be all one sees. What is replaced by what, to have as many lists as inodes.
const TABLE: [(&str, &str); 4] = [
    (
        "static struct lo_inode *lo_find(",
        "#define LISTS (1 << 16)\n\
         static struct lo_inode lists[LISTS];\n\
         static struct lo_inode *list_of(ino_t number) { return lists + number % LISTS; }\n\n\
         static struct lo_inode *lo_find(",
    ),
    (
        "for (p = lo->root.next; p != &lo->root; p = p->next) {",
        "for (p = list_of(st->st_ino)->next; p != list_of(st->st_ino); p = p->next) {",
    ),
    ("prev = &lo->root;", "prev = list_of(inode->ino);"),
    (
        "pthread_mutex_init(&lo.mutex, NULL);",
        "pthread_mutex_init(&lo.mutex, NULL);\n\
         for (int i = 0; i < LISTS; i++) lists[i].next = lists[i].prev = lists + i;",
    ),
];

/// It copies and closes a descriptor at every close(2), for errors that only some file systems report
/// then. bindfs and our example do not, so that the kernel stops asking them: without this it asks
/// libfuse's neither, and what is left is a comparison of the same requests.
const NO_FLUSH: (&str, &str) = (".flush\t\t= lo_flush,", "");

/// A pass-through file system.
pub(super) struct System {
    pub(super) name: &'static str,
    /// With its version, for the record.
    pub(super) about: String,
    program: PathBuf,
    /// Arguments that show the first folder at the second.
    arguments: fn(&Path, &Path) -> Vec<OsString>,
    /// Holds the systems' logs.
    state: PathBuf,
    source: PathBuf,
    mountpoint: PathBuf,
}

/// Installs, builds and describes all of them: libfuse's as it is and without FLUSH, bindfs, ours as it
/// is and ours without FUSE_PASSTHROUGH.
pub(super) async fn all(dir: &Path, disk: &Disk) -> Result<Vec<System>> {
    debian::ensure(&["bindfs", "libfuse3-dev", "fuse3", "pkg-config", "gcc", "libc6-dev"]).await?;
    let libfuse = cmd!["pkg-config", "--modversion", "fuse3"].run().await?;
    let bindfs = cmd!["bindfs", "--version"].run().await?;
    let system = |name, about: &str, program, arguments| System {
        name,
        about: about.trim().to_owned(),
        program,
        arguments,
        state: dir.to_owned(),
        source: disk.folder().join(name),
        mountpoint: dir.join("mounted").join(name),
    };
    let ours = build_ours().await?.join("examples/passthrough");
    let passthrough_ll = |source: &Path, mountpoint: &Path| {
        let options = format!(
            "source={},cache=auto,allow_other,default_permissions,xattr",
            source.display()
        );
        vec!["-f".into(), "-o".into(), options.into(), mountpoint.into()]
    };
    Ok(vec![
        system(
            "passthrough_ll",
            &format!("passthrough_ll of libfuse {}", libfuse.trim()),
            build_passthrough_ll(dir, "passthrough_ll", &TABLE).await?,
            passthrough_ll,
        ),
        system(
            "no-flush",
            "the same, which answers no FLUSH",
            build_passthrough_ll(dir, "no-flush", &[&TABLE[..], &[NO_FLUSH]].concat()).await?,
            passthrough_ll,
        ),
        system("bindfs", &bindfs, "bindfs".into(), |source, mountpoint| {
            let options = "big_writes,attr_timeout=1,entry_timeout=1,negative_timeout=0";
            ["-f", "--multithreaded", "-o", options]
                .map(OsString::from)
                .into_iter()
                .chain([source.into(), mountpoint.into()])
                .collect()
        }),
        system(
            "lazarette-fuse",
            "the example passthrough of lazarette-fuse",
            ours.clone(),
            |source, mountpoint| vec![source.into(), mountpoint.into()],
        ),
        system(
            "served",
            "the same, with large files read and written through it, not by the kernel itself",
            ours,
            |source, mountpoint| vec![source.into(), mountpoint.into(), "--serve-all".into()],
        ),
    ])
}

/// The processes that work on the mounted folders.
pub(super) fn workload() -> PathBuf {
    build::release_dir().join("lazarette-workload")
}

/// Builds the example and the workload, optimised; returns the folder they are in.
pub(super) async fn build_ours() -> Result<PathBuf> {
    let packages = ["--package", "lazarette-fuse", "--package", "lazarette-workload"];
    let targets = ["--example", "passthrough", "--bin", "lazarette-workload"];
    build::release(packages.into_iter().chain(targets)).await
}

/// Builds libfuse's example under that name, with what is known in its source replaced by what is wanted.
async fn build_passthrough_ll(dir: &Path, name: &str, changes: &[(&str, &str)]) -> Result<PathBuf> {
    let original = Path::new(EXAMPLES).join("passthrough_ll.c");
    let mut text = fs::read_to_string(&original).with_context(|| format!("read {}", original.display()))?;
    for (known, wanted) in changes {
        ensure!(
            text.matches(*known).count() == 1,
            "{} is not as expected: `{known}` is not in it exactly once",
            original.display()
        );
        text = text.replace(known, wanted);
    }
    let (source, program) = (dir.join(name).with_extension("c"), dir.join(name).with_extension("bin"));
    fs::write(&source, text)?;
    let flags = cmd!["pkg-config", "--cflags", "--libs", "fuse3"].run().await?;
    cmd!["gcc", "-O2", "-I", EXAMPLES, "-o", &program, &source]
        .args(flags.split_whitespace())
        .run()
        .await?;
    Ok(program)
}

/// A system that is mounted.
pub(super) struct Mounted {
    process: Process,
    /// Its folder among the kernel's FUSE connections.
    connection: PathBuf,
}

impl System {
    pub(super) fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// A new and empty folder to show.
    pub(super) fn empty(&self) -> Result<()> {
        fs::create_dir_all(&self.mountpoint)?;
        if self.source.exists() {
            fs::remove_dir_all(&self.source)?;
        }
        Ok(fs::create_dir_all(&self.source)?)
    }

    /// Starts the process.
    pub(super) async fn mount(&self, control: &Control) -> Result<Mounted> {
        let before = fs::metadata(&self.mountpoint)?.dev();
        let process = Daemon::new(self.name, &self.state, &self.program)
            .args((self.arguments)(&self.source, &self.mountpoint))
            .start()
            .await?;
        let log = lazarette_e2e::process::log_path(&self.state, self.name);
        let deadline = Deadline::after(LIMIT).every(Duration::from_millis(10)).logs(log);
        let device = wait_for(deadline, format!("{} to be mounted", self.name), || async {
            let device = fs::metadata(&self.mountpoint)?.dev();
            Ok((device != before).then_some(device))
        })
        .await?;
        let connection = control.folder.join(rustix::fs::minor(device).to_string());
        let (most, congested) = BACKGROUND;
        fs::write(connection.join("max_background"), most.to_string())?;
        fs::write(connection.join("congestion_threshold"), congested.to_string())?;
        Ok(Mounted { process, connection })
    }

    /// Unmounts and waits for the process to end. A system that is not mounted is no error.
    pub(super) async fn unmount(&self) -> Result<()> {
        // What is in use goes away all the same: this is also how a run is ended that failed.
        let _ = rustix::mount::unmount(&self.mountpoint, UnmountFlags::DETACH);
        if let Some(process) = lazarette_e2e::process::find(&self.state, self.name) {
            // Whoever made a mount namespace meanwhile has a copy of the mount, which keeps it alive.
            let _ = process.wait(Duration::from_secs(1)).await;
        }
        stop(&self.state, self.name, Duration::from_secs(10)).await
    }
}

impl Mounted {
    pub(super) fn process(&self) -> &Process {
        &self.process
    }

    /// Waits until every request is answered: closing a file is so only after close(2) has returned.
    pub(super) async fn settle(&self) -> Result<()> {
        let deadline = Deadline::after(LIMIT).every(Duration::from_millis(1));
        wait_for(deadline, "the requests under way", || async {
            let waiting = fs::read_to_string(self.connection.join("waiting"))?;
            Ok((waiting.trim() == "0").then_some(()))
        })
        .await
    }

    /// Processor time so far.
    pub(super) fn processor(&self) -> Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.pid))?;
        // The name in parentheses may hold anything; what follows it begins with the third field.
        let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
        let mut fields = fields.split_whitespace().skip(11);
        let mut ticks = || anyhow::Ok(fields.next().context("stat is short")?.parse::<u32>()?);
        Ok(TICK * (ticks()? + ticks()?))
    }

    /// Most resident memory so far, bytes.
    pub(super) fn peak_memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.pid))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line
            .and_then(|line| line.split_whitespace().next())
            .context("no VmHWM")?;
        Ok(kib.parse::<u64>()? << 10)
    }
}

/// The kernel's FUSE connections, shown in a folder of our own as long as this lives.
pub(super) struct Control {
    folder: PathBuf,
}

impl Control {
    pub(super) fn mount(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder)?;
        rustix::mount::mount("fusectl", &folder, "fusectl", MountFlags::empty(), None)
            .context("show the kernel's FUSE connections; this needs root")?;
        Ok(Self { folder })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.folder, UnmountFlags::DETACH);
    }
}
