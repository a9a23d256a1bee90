//! How long a call may take.

use std::time::Duration;
use tokio::time::Instant;
use tonic::metadata::MetadataMap;

/// Where the caller gives no time.
const DEFAULT: Duration = Duration::from_secs(30);

/// When to give up on a call: shortly before its caller does, so that the caller learns the
/// reason instead of seeing its own time-out.
pub fn of(metadata: &MetadataMap) -> Instant {
    let allowed = metadata
        .get("grpc-timeout")
        .and_then(|value| parse(value.to_str().ok()?))
        .unwrap_or(DEFAULT);
    // Bounded, since adding an absurd time to an instant would panic.
    Instant::now() + (allowed * 9 / 10).min(Duration::from_secs(3600))
}

/// Reads the header of the gRPC protocol: up to 8 digits and a unit.
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_read() {
        assert_eq!(parse("10S"), Some(Duration::from_secs(10)));
        assert_eq!(parse("9999m"), Some(Duration::from_millis(9999)));
        assert_eq!(parse("2M"), Some(Duration::from_secs(120)));
        for bad in ["", "S", "10", "-1S", "123456789S", "10s", "1é"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_largest_time_is_bounded() {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", "99999999H".parse().unwrap());
        assert!(of(&metadata) <= Instant::now() + Duration::from_secs(3600));
    }
}
