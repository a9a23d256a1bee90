//! From a requested capacity range to a volume's size.

use lazarette_proto::csi::CapacityRange;

/// Volumes have whole numbers of this many bytes.
pub const UNIT: u64 = 1 << 20;

/// Size where nothing was asked for, in bytes.
pub const DEFAULT: u64 = 1 << 30;

/// A range of sizes in bytes, consistent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SizeRange {
    /// The size to make: the smallest allowed, in whole units.
    pub size: u64,
    /// The smallest that will do.
    pub required: u64,
    /// The largest allowed.
    pub limit: u64,
}

/// What is wrong with a range; the message names field and remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// A negative number.
    #[error("capacity_range.{field} is {value}; use 0 or more bytes")]
    Negative {
        /// Which.
        field: &'static str,
        /// As given.
        value: i64,
    },
    /// A range that asks for nothing.
    #[error("capacity_range asks for 0 bytes; set required_bytes or limit_bytes, or leave capacity_range out")]
    Zero,
    /// Limit below the requirement.
    #[error("capacity_range.limit_bytes ({limit}) is below required_bytes ({required}); raise the limit")]
    Empty {
        /// As given.
        required: u64,
        /// As given.
        limit: u64,
    },
    /// Whole units do not fit.
    #[error(
        "volumes have whole MiB, and the next such size ({size} bytes) exceeds capacity_range.limit_bytes ({limit}); raise the limit"
    )]
    Unit {
        /// The smallest size possible.
        size: u64,
        /// As given.
        limit: u64,
    },
}

impl SizeRange {
    /// Reads a range; an absent one asks for [`DEFAULT`].
    pub fn parse(range: Option<&CapacityRange>) -> Result<Self, SizeError> {
        // The specification: at least one of the two fields must be there, and 0 is not there.
        if range.is_some_and(|range| range.required_bytes == 0 && range.limit_bytes == 0) {
            return Err(SizeError::Zero);
        }
        let range = range.copied().unwrap_or_default();
        let bytes = |field, value: i64| u64::try_from(value).map_err(|_| SizeError::Negative { field, value });
        let required = bytes("required_bytes", range.required_bytes)?;
        let limit = match bytes("limit_bytes", range.limit_bytes)? {
            0 => u64::MAX,
            limit => limit,
        };
        if limit < required {
            return Err(SizeError::Empty { required, limit });
        }
        let size = match required {
            0 => DEFAULT.min(limit / UNIT * UNIT).max(UNIT),
            // Cannot overflow: `required` came from an i64.
            required => required.div_ceil(UNIT) * UNIT,
        };
        if size > limit || i64::try_from(size).is_err() {
            return Err(SizeError::Unit { size, limit });
        }
        Ok(Self { size, required, limit })
    }

    /// Whether an existing volume of this size will do.
    pub fn contains(&self, size: u64) -> bool {
        (self.required..=self.limit).contains(&size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(required_bytes: i64, limit_bytes: i64) -> Result<u64, SizeError> {
        SizeRange::parse(Some(&CapacityRange {
            required_bytes,
            limit_bytes,
        }))
        .map(|range| range.size)
    }

    #[test]
    fn sizes_are_whole_units_in_the_range() {
        assert_eq!(SizeRange::parse(None).map(|r| r.size), Ok(DEFAULT));
        assert_eq!(parse(1, 0), Ok(UNIT));
        assert_eq!(parse(10 << 30, 0), Ok(10 << 30));
        assert_eq!(parse((10 << 30) + 1, 0), Ok((10 << 30) + UNIT));
        assert_eq!(parse(10 << 30, 10 << 30), Ok(10 << 30));
        // Only a limit: as near to the default as it allows.
        assert_eq!(parse(0, 5 * (1 << 20) + 7), Ok(5 << 20));
        assert_eq!(parse(0, 100 << 30), Ok(DEFAULT));
    }

    #[test]
    fn impossible_ranges_are_refused() {
        for (required, limit, word) in [
            (0, 0, "0 bytes"),
            (-1, 0, "required_bytes is -1"),
            (0, -5, "limit_bytes is -5"),
            (2 << 20, 1 << 20, "below required_bytes"),
            (1, 2, "whole MiB"),
            ((1 << 20) + 1, (1 << 20) + 2, "whole MiB"),
            (0, 7, "whole MiB"),
            (i64::MAX, 0, "whole MiB"),
        ] {
            let text = parse(required, limit).unwrap_err().to_string();
            assert!(text.contains(word), "{required}..{limit}: {text}");
        }
    }

    #[test]
    fn an_existing_size_is_compared_with_the_range() {
        let range = |required_bytes, limit_bytes| {
            SizeRange::parse(Some(&CapacityRange {
                required_bytes,
                limit_bytes,
            }))
            .unwrap()
        };
        assert!(range(10 << 20, 10 << 20).contains(10 << 20));
        assert!(!range(20 << 20, 20 << 20).contains(10 << 20));
        assert!(!range(20 << 20, 0).contains(10 << 20));
        assert!(!range(1 << 20, 5 << 20).contains(10 << 20));
        assert!(range(1 << 20, 0).contains(10 << 20));
    }
}
