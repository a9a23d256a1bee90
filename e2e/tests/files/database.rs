//! A database and a compiler.

use super::{mounted, printed};
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

/// Where Debian puts PostgreSQL's programs.
fn postgresql() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").unwrap();
    let mut programs: Vec<_> = versions.map(|entry| entry.unwrap().path().join("bin")).collect();
    programs.sort();
    programs.pop().unwrap()
}

/// Runs a program as the user to whom the database belongs.
fn as_postgres(args: &[&str]) -> String {
    let all = [&["-u", "postgres", "--"], args].concat();
    printed("runuser", &all)
}

struct Server<'a> {
    programs: &'a Path,
    data: &'a Path,
    socket: &'a Path,
}

impl Server<'_> {
    fn control(&self, args: &[&str]) -> String {
        let (program, data) = (self.programs.join("pg_ctl"), self.data.to_str().unwrap());
        as_postgres(&[&[program.to_str().unwrap(), "-D", data, "-w", "-t", "120"], args].concat())
    }

    fn start(&self) {
        let options = format!("-c listen_addresses='' -k {}", self.socket.display());
        let log = self.socket.join("log");
        self.control(&["-l", log.to_str().unwrap(), "-o", &options, "start"]);
    }

    fn program(&self, name: &str, args: &[&str]) -> String {
        let (program, socket) = (self.programs.join(name), self.socket.to_str().unwrap());
        as_postgres(&[&[program.to_str().unwrap(), "-h", socket], args].concat())
    }

    fn query(&self, query: &str) -> String {
        self.program("psql", &["-d", "postgres", "-AtXc", query])
            .trim()
            .to_owned()
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let pid = fs::read_to_string(self.data.join("postmaster.pid"));
        let pid = pid.ok().and_then(|text| text.lines().next()?.parse().ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::QUIT);
        }
    }
}

#[tokio::test]
async fn postgresql_survives_its_own_crash() {
    let programs = postgresql();
    let (cluster, mounts) = mounted("postgresql", 1).await;
    let data = mounts.path(0, "data");
    // Sockets are files of this machine.
    let socket = tempfile::Builder::new()
        .prefix("lazarette-pg-")
        .tempdir_in("/tmp")
        .unwrap();
    let owner = printed("id", &["-u", "postgres"]).trim().parse().unwrap();
    fs::create_dir(&data).unwrap();
    for folder in [&data, socket.path()] {
        chown(folder, Some(owner), None).unwrap();
    }
    let server = Server {
        programs: &programs,
        data: &data,
        socket: socket.path(),
    };
    let initdb = programs.join("initdb");
    as_postgres(&[
        initdb.to_str().unwrap(),
        "--data-checksums",
        "--no-instructions",
        "-D",
        data.to_str().unwrap(),
    ]);
    server.start();
    server.program("pgbench", &["-i", "-q", "-s", "1", "postgres"]);
    server.program("pgbench", &["-c", "4", "-j", "2", "-t", "50", "-n", "postgres"]);
    // Without a clean end, it goes on from its log.
    server.control(&["-m", "immediate", "stop"]);
    server.start();
    assert_eq!(server.query("select count(*) from pgbench_history"), "200");
    let balances = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history)";
    assert_eq!(server.query(balances), "t");
    server.control(&["-m", "fast", "stop"]);
    let check = programs.join("pg_checksums");
    as_postgres(&[check.to_str().unwrap(), "--check", "-D", data.to_str().unwrap()]);
    drop(server);
    cluster.down().await;
}

#[tokio::test]
async fn make_and_cargo_build() {
    let (cluster, mounts) = mounted("build", 2).await;
    let shell = |script: &str, client| printed("sh", &["-ec", script, "sh", mounts.path(client, "").to_str().unwrap()]);
    let make = "mkdir $1/c; cd $1/c
for i in 1 2 3 4 5 6 7 8; do echo \"int f$i(void) { return $i; }\" > f$i.c; done
printf '#include <stdio.h>\\nint f8(void); int main(void) { printf(\"%%d\\\\n\", f8()); }\\n' > main.c
printf 'OBJECTS = $(patsubst %%.c,%%.o,$(wildcard *.c))\\nprogram: $(OBJECTS)\\n\\t$(CC) -o $@ $^\\n' > Makefile
make -s -j2; ./program";
    assert_eq!(shell(make, 0).trim(), "8");
    // Nothing to do for the other one, which sees the same times.
    assert!(shell("make -C $1/c", 1).contains("up to date"));
    let cargo = "cd $1; cargo init -q --vcs none --name small rust; cd rust
echo '#[test] fn holds() { assert_eq!(1 + 1, 2); }' >> src/main.rs
cargo run -q --offline; cargo test -q --offline";
    let output = shell(cargo, 0);
    assert!(output.contains("Hello") && output.contains("1 passed"), "{output}");
    cluster.down().await;
}
