use serde::{Deserialize, Serialize};

/// Bits of a time, after its highest one, that tell buckets apart: times are known to 1/32.
const BITS: u32 = 4;

/// How long operations took: for each bucket of similar times, how many.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latencies(Vec<u64>);

impl Latencies {
    /// Takes one in, in nanoseconds.
    pub fn note(&mut self, nanoseconds: u64) {
        let bucket = bucket(nanoseconds);
        self.reach(bucket + 1);
        self.0[bucket] += 1;
    }

    /// Takes in all of another one.
    pub fn add(&mut self, other: &Self) {
        self.reach(other.0.len());
        for (count, more) in self.0.iter_mut().zip(&other.0) {
            *count += more;
        }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The time in nanoseconds that a share (0 to 1) of all does not exceed; 0 if there are none.
    pub fn quantile(&self, share: f64) -> u64 {
        let wanted = (share * self.count() as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        let found = self.0.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        found.map_or(0, middle)
    }

    fn reach(&mut self, length: usize) {
        self.0.resize(self.0.len().max(length), 0);
    }
}

fn bucket(nanoseconds: u64) -> usize {
    // Below 2^BITS every time has a bucket of its own.
    let shift = (u64::BITS - nanoseconds.leading_zeros()).saturating_sub(BITS + 1);
    ((u64::from(shift) << BITS) + (nanoseconds >> shift)) as usize
}

/// The middle of a bucket's times.
fn middle(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let shift = (bucket >> BITS).saturating_sub(1);
    let first = (bucket - (shift << BITS)) << shift;
    first + (1 << shift) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_knows_its_times() {
        for shift in 0..63 {
            for time in [1_u64 << shift, (1 << shift) + (1 << shift) / 3, (2 << shift) - 1] {
                let known = middle(bucket(time));
                assert!(known.abs_diff(time) <= time / 32 + 1, "{time} is known as {known}");
            }
        }
        assert_eq!((bucket(0), middle(0)), (0, 0));
    }

    #[test]
    fn quantiles_of_several_processes() {
        let (mut one, mut other) = (Latencies::default(), Latencies::default());
        (1..=98).for_each(|_| one.note(10));
        other.note(1_000_000);
        other.note(1_000_000);
        one.add(&other);
        assert_eq!((one.count(), one.quantile(0.5), one.quantile(0.98)), (100, 10, 10));
        assert!(one.quantile(0.99).abs_diff(1_000_000) < 32_000);
        assert_eq!(Latencies::default().quantile(0.5), 0);
    }
}
