use lazarette_types::ErrorCode;
use tonic::{Code, Status};

/// Metadata key of the numeric [`ErrorCode`] in a status.
const KEY: &str = "lazarette-code";

/// A status that carries `code`, for [`code_of`] at the other side.
pub fn status(code: ErrorCode, message: impl Into<String>) -> Status {
    let grpc = match code {
        ErrorCode::NotFound | ErrorCode::VolumeNotFound | ErrorCode::NoAttribute => Code::NotFound,
        ErrorCode::Exists | ErrorCode::VolumeExists => Code::AlreadyExists,
        ErrorCode::InvalidArgument | ErrorCode::NameTooLong => Code::InvalidArgument,
        ErrorCode::OutOfRange | ErrorCode::FileTooBig | ErrorCode::TooSmall => Code::OutOfRange,
        ErrorCode::NoSpace => Code::ResourceExhausted,
        ErrorCode::PermissionDenied | ErrorCode::NotPermitted => Code::PermissionDenied,
        ErrorCode::Unsupported => Code::Unimplemented,
        ErrorCode::WouldBlock | ErrorCode::Deadlock | ErrorCode::Interrupted => Code::Aborted,
        ErrorCode::NotDirectory
        | ErrorCode::IsDirectory
        | ErrorCode::NotEmpty
        | ErrorCode::CrossDevice
        | ErrorCode::TooManyLinks
        | ErrorCode::Stale
        | ErrorCode::Overtaken
        | ErrorCode::VolumeInUse
        | ErrorCode::InsufficientNodes
        | ErrorCode::SessionExpired => Code::FailedPrecondition,
        ErrorCode::NotOwner | ErrorCode::WrongEpoch | ErrorCode::Unavailable | ErrorCode::Late => Code::Unavailable,
        ErrorCode::Corrupt => Code::DataLoss,
        ErrorCode::Internal => Code::Internal,
    };
    let mut status = Status::new(grpc, message);
    status
        .metadata_mut()
        .insert(KEY, tonic::metadata::MetadataValue::from(code.number()));
    status
}

/// The error code of a status: the one it carries, or, where it came from the transport or
/// another server, the nearest one.
pub fn code_of(status: &Status) -> ErrorCode {
    if let Some(code) = carried(status) {
        return code;
    }
    match status.code() {
        Code::NotFound => ErrorCode::NotFound,
        Code::AlreadyExists => ErrorCode::Exists,
        Code::InvalidArgument => ErrorCode::InvalidArgument,
        Code::OutOfRange => ErrorCode::OutOfRange,
        Code::PermissionDenied | Code::Unauthenticated => ErrorCode::PermissionDenied,
        Code::Unimplemented => ErrorCode::Unsupported,
        Code::DataLoss => ErrorCode::Corrupt,
        // The transport's own failures: the peer is gone, restarting, slow, or the stream was cut.
        Code::Unavailable
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Unknown
        | Code::Aborted
        | Code::ResourceExhausted => ErrorCode::Unavailable,
        Code::Ok | Code::Internal | Code::FailedPrecondition => ErrorCode::Internal,
    }
}

/// Whether the peer itself has answered so. Otherwise the request may still be on its way.
pub fn is_answer(status: &Status) -> bool {
    carried(status).is_some()
}

fn carried(status: &Status) -> Option<ErrorCode> {
    let value = status.metadata().get(KEY)?;
    ErrorCode::from_number(value.to_str().ok()?.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_the_wire() {
        for &code in ErrorCode::ALL {
            assert_eq!(code_of(&status(code, "x")), code);
            assert!(is_answer(&status(code, "x")));
        }
    }

    #[test]
    fn transport_errors_are_retryable() {
        let refused = Status::unavailable("connection refused");
        assert!(code_of(&refused).retryable() && !is_answer(&refused));
    }
}
