//! Which faults come when, drawn from the seed.

use crate::conditions::Odds;
use rand::Rng;
use rand::rngs::StdRng;
use std::time::Duration;

/// A fault and its end.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub(crate) at: Duration,
    pub(crate) until: Duration,
    pub(crate) fault: Fault,
}

/// Which storage node.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Node {
    /// By number.
    Number(usize),
    /// The one that owns the volume when the fault comes.
    Owner,
}

/// What goes wrong.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// A process is killed and started again at the end.
    Kill(Node),
    /// A machine loses power: nobody hears of it.
    PowerOff(Node),
    /// All storage nodes lose power at once.
    Blackout,
    /// A storage node does not reach etcd.
    WithoutEtcd(Node),
    /// Nobody reaches etcd.
    EtcdAway,
    /// A storage node and a client reach each other and nobody else, not even etcd.
    Island(Node, usize),
    /// Two hosts do not reach each other: what is on its way is lost, or held back.
    Apart {
        lost: bool,
        pair: Pair,
    },
    /// Requests to storage nodes, or to etcd, get lost, come late, and so on.
    Messages(Odds),
    Etcd(Odds),
    /// A disk takes no more data, is slow, or fails at once.
    Full(Node),
    Slow(Node),
    DiskFails(Node),
    /// A client is killed; another process takes its place at the end.
    KillClient(usize),
    /// A client reaches no storage node.
    ClientAlone(usize),
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Pair {
    Nodes(usize, usize),
    NodeAndClient(Node, usize),
}

/// Faults until the given time; they come one by one and may overlap.
pub(crate) fn plan(rng: &mut StdRng, nodes: usize, clients: usize, from: Duration, to: Duration) -> Vec<Planned> {
    let mut at = from;
    let mut planned = Vec::new();
    // Seeds differ in how busy they are.
    let pause = rng.random_range(800..6000);
    loop {
        at += Duration::from_millis(rng.random_range(100..=pause));
        if at >= to {
            return planned;
        }
        let fault = draw(rng, nodes, clients);
        // What tells two owners of a volume, or two primaries, apart must outlast their leases.
        let about_leases = matches!(fault, Fault::Island(..) | Fault::WithoutEtcd(_));
        let long = rng.random_bool(if about_leases { 0.8 } else { 0.2 });
        let time = Duration::from_millis(rng.random_range(if long { 3000..9000 } else { 100..3000 }));
        let until = (at + time).min(to);
        planned.push(Planned { at, until, fault });
    }
}

fn draw(rng: &mut StdRng, nodes: usize, clients: usize) -> Fault {
    let node = match rng.random_bool(0.4) {
        true => Node::Owner,
        false => Node::Number(rng.random_range(0..nodes)),
    };
    let client = rng.random_range(0..clients);
    match rng.random_range(0..100) {
        0..12 => Fault::Kill(node),
        12..17 => Fault::PowerOff(node),
        17..20 => Fault::Blackout,
        20..30 => Fault::WithoutEtcd(node),
        30..33 => Fault::EtcdAway,
        33..43 => Fault::Island(node, client),
        43..55 => {
            let other = rng.random_range(0..nodes);
            let pair = match rng.random_range(0..nodes) {
                one if one != other && rng.random_bool(0.6) => Pair::Nodes(one, other),
                _ => Pair::NodeAndClient(node, client),
            };
            let lost = rng.random();
            Fault::Apart { lost, pair }
        }
        55..68 => Fault::Messages(odds(rng)),
        68..76 => Fault::Etcd(odds(rng)),
        76..79 => Fault::Full(node),
        79..84 => Fault::Slow(node),
        84..87 => Fault::DiskFails(node),
        87..95 => Fault::KillClient(client),
        _ => Fault::ClientAlone(client),
    }
}

fn odds(rng: &mut StdRng) -> Odds {
    let most = if rng.random_bool(0.3) { 200 } else { 50 };
    Odds {
        lost: rng.random_range(0..most),
        answer_lost: rng.random_range(0..most),
        late: rng.random_range(0..most),
        ghost: rng.random_range(0..most),
        twice: rng.random_range(0..most),
    }
}
