//! Puts hosts, faults and time together and runs one seed.

use crate::bugs::Bug;
use crate::client::Client;
use crate::conditions::World;
use crate::disk::Disk;
use crate::etcd::Etcd;
use crate::faults::{self, Fault, Node, Pair, Planned};
use crate::node::{Machine, keys};
use crate::system::{self, Clock, EPOCH};
use crate::workload::Shared;
use crate::{Options, Outcome};
use futures::FutureExt;
use lazarette_metastore::{MetaStore, OwnerRecord, ReplicaSetRecord, decode};
use lazarette_node::chunk::ChunkStore;
use lazarette_types::VolumeId;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use turmoil::{Builder, Sim};

const TICK: Duration = Duration::from_millis(4);
/// Faults come from when the volume is prepared, for so long.
const FAULTS: Duration = Duration::from_secs(20);
/// After that everything must be well again within this time.
const RECOVERY: Duration = Duration::from_secs(60);
const LEAST_NODES: usize = 3;
const MOST_NODES: usize = 4;
const MOST_CLIENTS: usize = 3;
const ETCD: &str = "etcd";

struct Universe {
    world: Arc<World>,
    etcd: Arc<Etcd>,
    nodes: Vec<Arc<Machine>>,
    /// The last one is the judge.
    clients: Vec<Arc<Client>>,
    rng: StdRng,
    /// Why each pair of hosts is apart.
    apart: BTreeMap<(String, String), Vec<usize>>,
    /// Of each fault under way: how it ends.
    ends: Vec<(Duration, usize, End)>,
    number: usize,
}

/// How a fault ends.
enum End {
    Start(Vec<String>),
    Reach(Vec<(String, String)>),
    Etcd(Vec<String>),
    Messages,
    EtcdOdds,
    Full(String),
    Slow(String),
}

/// Runs a seed on this thread, which nothing else must run on.
pub(crate) fn run(options: &Options) -> Result<Outcome, String> {
    system::enter(options.seed)?;
    let world = Arc::new(World::new(options.seed, options.bug, options.print));
    let mut rng = StdRng::seed_from_u64(options.seed ^ 0x5eed);
    let mut sim = Builder::new()
        .tick_duration(TICK)
        .epoch(SystemTime::UNIX_EPOCH + EPOCH)
        .simulation_duration(Duration::from_secs(100_000))
        .min_message_latency(Duration::ZERO)
        .max_message_latency(Duration::from_millis(5))
        .tcp_capacity(1 << 16)
        .rng_seed(options.seed)
        .enable_random_order()
        .build();
    let mut universe = Universe::build(&mut sim, &world, &mut rng);
    let steps = universe.play(&mut sim);
    let (hash, events) = world.trace();
    Ok(Outcome {
        violation: world.first_violation().or(steps.err()),
        hash,
        events,
        simulated: sim.elapsed(),
    })
}

fn clock(rng: &mut StdRng) -> Clock {
    Clock {
        ahead: Duration::from_millis(rng.random_range(10_000..100_000_000)),
        // What NTP corrects, twice.
        speed: 1.0 + rng.random_range(-0.001..0.001),
    }
}

/// A storage node's clock.
fn node_clock(rng: &mut StdRng, bug: Option<Bug>) -> Clock {
    let mut clock = clock(rng);
    if bug == Some(Bug::LongLeases) {
        clock.speed /= 3.0;
    }
    clock
}

impl Universe {
    fn build(sim: &mut Sim<'_>, world: &Arc<World>, rng: &mut StdRng) -> Self {
        let etcd = Etcd::new();
        let host = Arc::clone(&etcd);
        sim.host(ETCD, move || Arc::clone(&host).serve());
        // One more than copies, now and then: then others take the place of nodes that stay away.
        let count = if rng.random_bool(0.25) { MOST_NODES } else { LEAST_NODES };
        let names: Vec<String> = (0..count).map(|number| format!("node-{number}")).collect();
        let mut nodes = Vec::new();
        for name in &names {
            let machine = Arc::new(Machine {
                name: name.clone(),
                world: Arc::clone(world),
                etcd: Arc::clone(&etcd),
                disk: Disk::new(world, name),
                clock: node_clock(rng, world.bug),
                ended: AtomicBool::new(false),
            });
            nodes.push(Arc::clone(&machine));
            sim.host(name.as_str(), move || Arc::clone(&machine).run());
        }
        let shared = Shared::new(world);
        let prepared = watch::Sender::new(None);
        let count = rng.random_range(1..=MOST_CLIENTS);
        let mut client = |number: u64, host: &str| {
            Arc::new(Client {
                host: host.to_owned(),
                number,
                shared: Arc::clone(&shared),
                clock: clock(rng),
                nodes: names.clone(),
                prepared: prepared.clone(),
                mounts: AtomicU64::new(0),
                done: AtomicBool::new(false),
            })
        };
        let mut clients = Vec::new();
        for number in 0..count {
            let client = client(number as u64, &format!("client-{number}"));
            clients.push(Arc::clone(&client));
            sim.host(client.host.clone(), move || Arc::clone(&client).run());
        }
        let judge = client(count as u64, "judge");
        clients.push(Arc::clone(&judge));
        sim.host("judge", move || {
            let judge = Arc::clone(&judge);
            async move {
                // The first time for the preparation, started anew for the last look.
                match judge.mounts.load(Ordering::Relaxed) {
                    0 => judge.prepare().await,
                    _ => judge.finally().await,
                }
            }
        });
        Self {
            world: Arc::clone(world),
            etcd,
            nodes,
            clients,
            rng: rng.clone(),
            apart: BTreeMap::new(),
            ends: Vec::new(),
            number: 0,
        }
    }

    fn judge(&self) -> &Arc<Client> {
        &self.clients[self.clients.len() - 1]
    }

    fn play(&mut self, sim: &mut Sim<'_>) -> Result<(), String> {
        self.until(sim, "prepared", RECOVERY, |universe| {
            universe.judge().done.load(Ordering::Relaxed)
        })?;
        let from = sim.elapsed();
        let plan = faults::plan(
            &mut self.rng,
            self.nodes.len(),
            self.clients.len() - 1,
            from,
            from + FAULTS,
        );
        for planned in plan {
            let at = planned.at;
            self.step_until(sim, |_, sim| sim.elapsed() >= at)?;
            self.begin(sim, planned);
        }
        self.step_until(sim, |universe, sim| {
            sim.elapsed() >= from + FAULTS && universe.ends.is_empty()
        })?;
        self.world.conditions().ending = true;
        self.world.note_at(sim.elapsed(), "world", "no more faults");
        self.until(sim, "unmounted", RECOVERY, |universe| {
            universe
                .clients
                .iter()
                .all(|client| client.done.load(Ordering::Relaxed))
        })?;
        self.until(sim, "whole", RECOVERY, Self::whole)?;
        self.judge().done.store(false, Ordering::Relaxed);
        sim.bounce("judge");
        self.until(sim, "looked at", RECOVERY, |universe| {
            universe.judge().done.load(Ordering::Relaxed)
        })?;
        self.until(sim, "equal", RECOVERY, Self::equal)
    }

    /// Goes on until something is so, which it must be in time.
    fn until(
        &mut self,
        sim: &mut Sim<'_>,
        what: &str,
        time: Duration,
        is: impl Fn(&Self) -> bool,
    ) -> Result<(), String> {
        let deadline = sim.elapsed() + time;
        let mut late = false;
        self.step_until(sim, |universe, sim| {
            late = sim.elapsed() > deadline;
            late || is(universe)
        })?;
        match late {
            true => Err(format!("not {what} within {time:?}")),
            false => Ok(()),
        }
    }

    fn step_until(&mut self, sim: &mut Sim<'_>, mut is: impl FnMut(&Self, &Sim<'_>) -> bool) -> Result<(), String> {
        while !is(self, sim) {
            system::set_now(sim.elapsed());
            self.end_faults(sim);
            self.restart(sim);
            sim.step().map_err(|error| format!("a host has failed: {error}"))?;
            if let Some(panic) = crate::panicked() {
                return Err(format!("panicked: {panic}"));
            }
            if let Some(violation) = self.world.first_violation() {
                return Err(violation);
            }
        }
        Ok(())
    }

    /// Processes that have ended by themselves.
    fn restart(&mut self, sim: &mut Sim<'_>) {
        for machine in &self.nodes {
            if machine.ended.swap(false, Ordering::Relaxed) {
                let _ = machine.disk.crash().now_or_never();
                sim.bounce(machine.name.as_str());
            }
        }
    }

    fn node(&self, node: Node) -> &Arc<Machine> {
        match node {
            Node::Number(number) => &self.nodes[number],
            Node::Owner => {
                let owner = self.owner();
                let found = self.nodes.iter().find(|machine| Some(&machine.name) == owner.as_ref());
                found.unwrap_or(&self.nodes[0])
            }
        }
    }

    fn owner(&self) -> Option<String> {
        let volume = VolumeId((*self.judge().prepared.borrow())?);
        let key = keys().owner(volume);
        let found = self.etcd.store.get(&key).now_or_never()?.ok()??;
        let owner: OwnerRecord = decode(&found.value).ok()?;
        Some(owner.node.0)
    }

    fn begin(&mut self, sim: &mut Sim<'_>, planned: Planned) {
        let Planned { until, fault, .. } = planned;
        let name = |node| self.node(node).name.clone();
        let all = || {
            self.nodes
                .iter()
                .map(|machine| machine.name.clone())
                .collect::<Vec<_>>()
        };
        let client = |number: usize| self.clients[number].host.clone();
        let note = format!("{fault:?} until {:.3}", until.as_secs_f64());
        self.world.note_at(sim.elapsed(), "world", note);
        let ends = match fault {
            Fault::Kill(node) => {
                let name = name(node);
                self.kill(sim, &name);
                vec![End::Start(vec![name])]
            }
            Fault::PowerOff(node) => {
                let name = name(node);
                let pairs = self.pairs(std::slice::from_ref(&name));
                self.part(sim, &pairs, true);
                self.kill(sim, &name);
                vec![End::Reach(pairs), End::Start(vec![name])]
            }
            Fault::Blackout => {
                let names = all();
                let pairs = self.pairs(&names);
                self.part(sim, &pairs, true);
                for name in &names {
                    self.kill(sim, name);
                }
                vec![End::Reach(pairs), End::Start(names)]
            }
            Fault::WithoutEtcd(node) => {
                let names = vec![name(node)];
                self.cut_etcd(&names);
                vec![End::Etcd(names)]
            }
            Fault::EtcdAway => {
                let names = all();
                self.cut_etcd(&names);
                vec![End::Etcd(names)]
            }
            Fault::Island(node, number) => {
                let (name, client) = (name(node), client(number));
                let names = vec![name.clone()];
                let pairs = self.pairs(&[name, client]);
                self.cut_etcd(&names);
                self.part(sim, &pairs, true);
                vec![End::Etcd(names), End::Reach(pairs)]
            }
            Fault::Apart { lost, pair } => {
                let pair = match pair {
                    Pair::Nodes(one, other) => ordered(&self.nodes[one].name, &self.nodes[other].name),
                    Pair::NodeAndClient(node, number) => ordered(&name(node), &client(number)),
                };
                let pairs = vec![pair];
                self.part(sim, &pairs, lost);
                vec![End::Reach(pairs)]
            }
            Fault::Messages(odds) => {
                self.world.conditions().messages = odds;
                vec![End::Messages]
            }
            Fault::Etcd(odds) => {
                self.world.conditions().etcd = odds;
                vec![End::EtcdOdds]
            }
            Fault::Full(node) => {
                let name = name(node);
                self.world.conditions().full.insert(name.clone());
                vec![End::Full(name)]
            }
            Fault::Slow(node) => {
                let name = name(node);
                self.world.conditions().slow.insert(name.clone());
                vec![End::Slow(name)]
            }
            Fault::DiskFails(node) => {
                let _ = self.node(node).disk.fail().now_or_never();
                vec![]
            }
            Fault::KillClient(number) => {
                let name = client(number);
                self.kill(sim, &name);
                vec![End::Start(vec![name])]
            }
            Fault::ClientAlone(number) => {
                let pairs = self.pairs(&[client(number)]);
                self.part(sim, &pairs, true);
                vec![End::Reach(pairs)]
            }
        };
        for end in ends {
            self.ends.push((until, self.number, end));
        }
        self.number += 1;
    }

    /// Pairs of these hosts and all others.
    fn pairs(&self, hosts: &[String]) -> Vec<(String, String)> {
        let nodes = self.nodes.iter().map(|machine| &machine.name);
        let others: Vec<_> = nodes
            .chain(self.clients.iter().map(|client| &client.host))
            .filter(|other| !hosts.contains(other))
            .collect();
        let pairs = hosts
            .iter()
            .flat_map(|host| others.iter().map(move |other| (host.clone(), (*other).clone())));
        pairs.collect()
    }

    fn kill(&mut self, sim: &mut Sim<'_>, name: &str) {
        if sim.is_host_running(name) {
            sim.crash(name);
            if let Some(machine) = self.nodes.iter().find(|machine| machine.name == name) {
                machine.ended.store(false, Ordering::Relaxed);
                let _ = machine.disk.crash().now_or_never();
            }
        }
    }

    fn cut_etcd(&self, names: &[String]) {
        let mut conditions = self.world.conditions();
        conditions.without_etcd.extend(names.iter().cloned());
    }

    fn part(&mut self, sim: &Sim<'_>, pairs: &[(String, String)], lost: bool) {
        for pair in pairs {
            let reasons = self.apart.entry(pair.clone()).or_default();
            if reasons.is_empty() {
                let (one, other) = (pair.0.as_str(), pair.1.as_str());
                if lost {
                    sim.partition(one, other);
                } else {
                    sim.hold(one, other);
                }
            }
            reasons.push(self.number);
        }
    }

    fn end_faults(&mut self, sim: &mut Sim<'_>) {
        let now = sim.elapsed();
        let (over, ends) = std::mem::take(&mut self.ends)
            .into_iter()
            .partition(|(until, ..)| *until <= now);
        self.ends = ends;
        let over: Vec<_> = over;
        for (_, number, end) in over {
            match end {
                End::Start(names) => {
                    for name in names {
                        if !sim.is_host_running(name.as_str()) {
                            self.world.note_at(now, "world", format_args!("{name} starts"));
                            sim.bounce(name.as_str());
                        }
                    }
                }
                End::Reach(pairs) => {
                    for pair in pairs {
                        let reasons = self.apart.entry(pair.clone()).or_default();
                        reasons.retain(|reason| *reason != number);
                        if reasons.is_empty() {
                            sim.release(pair.0.as_str(), pair.1.as_str());
                        }
                    }
                }
                // Others that are under way end with it.
                End::Etcd(names) => {
                    let mut conditions = self.world.conditions();
                    for name in names {
                        conditions.without_etcd.remove(&name);
                    }
                }
                End::Messages => self.world.conditions().messages = Default::default(),
                End::EtcdOdds => self.world.conditions().etcd = Default::default(),
                End::Full(name) => {
                    self.world.conditions().full.remove(&name);
                }
                End::Slow(name) => {
                    self.world.conditions().slow.remove(&name);
                }
            }
        }
    }

    fn sets(&self) -> Option<Vec<ReplicaSetRecord>> {
        let prefix = keys().replica_sets();
        let (found, _) = self.etcd.store.range(&prefix).now_or_never()?.ok()?;
        found.iter().map(|kv| decode(&kv.value).ok()).collect()
    }

    /// All copies of everything are there.
    fn whole(&self) -> bool {
        let whole =
            |set: &ReplicaSetRecord| !set.recovering && set.members.iter().all(|member| set.in_sync.contains(member));
        self.sets().is_some_and(|sets| sets.iter().all(whole))
    }

    /// All copies are the same.
    fn equal(&self) -> bool {
        let Some(sets) = self.sets() else { return false };
        sets.iter().all(|set| {
            let mut copies = self
                .nodes
                .iter()
                .filter(|machine| set.in_sync.iter().any(|node| node.0 == machine.name))
                .map(|machine| copy(machine, set));
            let first = copies.next();
            copies.all(|copy| Some(&copy) == first.as_ref())
        })
    }
}

fn ordered(one: &str, other: &str) -> (String, String) {
    (one.min(other).to_owned(), one.max(other).to_owned())
}

/// All chunks that a node has of a set: which, and their contents.
fn copy(
    machine: &Machine,
    set: &ReplicaSetRecord,
) -> Option<Vec<(lazarette_types::ChunkId, lazarette_node::chunk::Contents)>> {
    let disk = machine.disk.contents();
    let listed = disk.list(set.id).now_or_never()?.ok()?;
    let contents = listed.into_iter().map(|summary| {
        let contents = disk.fetch(set.id, summary.chunk).now_or_never()?.ok()?;
        Some((summary.chunk, contents))
    });
    contents.collect()
}
