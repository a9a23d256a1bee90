use std::time::Duration;

/// Limits and times of replication. The defaults suit a cluster whose node lease is 3 s.
#[derive(Clone, Debug)]
pub struct ReplicationConfig {
    /// Bytes that may be on their way to one backup node beyond what is acknowledged; then new
    /// writes wait for it.
    pub debt_bytes: usize,
    /// How old a change on its way to a backup may grow; then new writes wait for it.
    pub debt_age: Duration,
    /// How long a running backup may leave a change unanswered before it is ejected, if enough
    /// other members remain to acknowledge.
    pub eject_slow: Duration,
    /// The same for a backup whose node is dead.
    pub eject_dead: Duration,
    /// How long a backup's node may be dead before it is ejected though nothing waits for it.
    pub dead_grace: Duration,
    /// Longest time for one small request between members.
    pub call_timeout: Duration,
    /// Longest time for one request between members that carries a whole chunk or a list.
    pub bulk_timeout: Duration,
    /// How long a client's request waits for the replica set to become able to serve it.
    pub patience: Duration,
    /// Chunks that this node copies at once to members that come back.
    pub repair_in_flight: usize,
    /// Rate of that copying, bytes a second.
    pub repair_rate: u64,
    /// How long a set must be whole before it is handed back to its first member.
    pub hand_back_after: Duration,
    /// Rate at which copies are read to verify them, bytes a second; 0 verifies none.
    pub scrub_rate: u64,
    /// How long after the beginning of a verification of all copies the next one begins.
    pub scrub_every: Duration,
    /// How often chunks that nobody needs any more are looked for.
    pub sweep_every: Duration,
}

impl Default for ReplicationConfig {
    fn default() -> Self {
        Self {
            debt_bytes: 64 << 20,
            debt_age: Duration::from_secs(2),
            eject_slow: Duration::from_secs(4),
            eject_dead: Duration::from_millis(500),
            dead_grace: Duration::from_secs(5),
            call_timeout: Duration::from_secs(2),
            bulk_timeout: Duration::from_secs(15),
            patience: Duration::from_secs(5),
            repair_in_flight: 4,
            repair_rate: 200 << 20,
            hand_back_after: Duration::from_secs(15),
            scrub_rate: 16 << 20,
            scrub_every: Duration::from_secs(7 * 24 * 3600),
            sweep_every: Duration::from_secs(30),
        }
    }
}
