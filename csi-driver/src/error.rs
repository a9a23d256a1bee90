//! From Lazarette's error codes to the codes that the CSI specification names.

use lazarette_types::ErrorCode;
use tonic::{Code, Status};

/// The gRPC code by which a CSI caller knows this error.
///
/// CREATE's RESOURCE_EXHAUSTED is the specification's code for "cannot be provisioned there now":
/// the provisioner reports it as an event and tries again with back-off, which is right for too
/// few storage nodes and for full ones.
pub fn csi_code(code: ErrorCode) -> Code {
    match code {
        ErrorCode::NotFound | ErrorCode::VolumeNotFound | ErrorCode::NoAttribute => Code::NotFound,
        ErrorCode::Exists | ErrorCode::VolumeExists => Code::AlreadyExists,
        ErrorCode::VolumeInUse
        | ErrorCode::NotEmpty
        | ErrorCode::NotDirectory
        | ErrorCode::IsDirectory
        | ErrorCode::TooManyLinks => Code::FailedPrecondition,
        ErrorCode::InsufficientNodes | ErrorCode::NoSpace => Code::ResourceExhausted,
        ErrorCode::OutOfRange | ErrorCode::FileTooBig | ErrorCode::TooSmall => Code::OutOfRange,
        ErrorCode::InvalidArgument | ErrorCode::NameTooLong | ErrorCode::CrossDevice => Code::InvalidArgument,
        ErrorCode::NotPermitted | ErrorCode::PermissionDenied => Code::PermissionDenied,
        ErrorCode::Unsupported => Code::Unimplemented,
        ErrorCode::WouldBlock | ErrorCode::Deadlock | ErrorCode::Interrupted => Code::Aborted,
        ErrorCode::NotOwner
        | ErrorCode::WrongEpoch
        | ErrorCode::Late
        | ErrorCode::Overtaken
        | ErrorCode::Unavailable
        | ErrorCode::SessionExpired
        | ErrorCode::Stale => Code::Unavailable,
        ErrorCode::Corrupt | ErrorCode::Internal => Code::Internal,
    }
}

/// The status for a CSI caller of a status that a storage node or the mount daemon sent.
pub fn csi_status(status: &Status) -> Status {
    let code = match (lazarette_proto::code_of(status), status.code()) {
        // Without a code of Lazarette's, this one says more than "internal".
        (ErrorCode::Internal, Code::FailedPrecondition) => Code::FailedPrecondition,
        (code, _) => csi_code(code),
    };
    Status::new(code, status.message())
}

/// A refused request: the message names field and remedy.
pub fn invalid(error: impl std::fmt::Display) -> Status {
    Status::invalid_argument(error.to_string())
}

/// Fails with INVALID_ARGUMENT if a required string is empty.
pub fn require<'a>(field: &str, value: &'a str) -> Result<&'a str, Status> {
    if value.is_empty() {
        Err(invalid(format!("{field} is missing")))
    } else {
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn every_error_has_its_csi_code() {
        let table: HashMap<ErrorCode, Code> = [
            (ErrorCode::NotFound, Code::NotFound),
            (ErrorCode::Exists, Code::AlreadyExists),
            (ErrorCode::NotDirectory, Code::FailedPrecondition),
            (ErrorCode::IsDirectory, Code::FailedPrecondition),
            (ErrorCode::NotEmpty, Code::FailedPrecondition),
            (ErrorCode::NameTooLong, Code::InvalidArgument),
            (ErrorCode::InvalidArgument, Code::InvalidArgument),
            (ErrorCode::NotPermitted, Code::PermissionDenied),
            (ErrorCode::PermissionDenied, Code::PermissionDenied),
            (ErrorCode::CrossDevice, Code::InvalidArgument),
            (ErrorCode::TooManyLinks, Code::FailedPrecondition),
            (ErrorCode::NoSpace, Code::ResourceExhausted),
            (ErrorCode::FileTooBig, Code::OutOfRange),
            (ErrorCode::Stale, Code::Unavailable),
            (ErrorCode::WouldBlock, Code::Aborted),
            (ErrorCode::Deadlock, Code::Aborted),
            (ErrorCode::Interrupted, Code::Aborted),
            (ErrorCode::NoAttribute, Code::NotFound),
            (ErrorCode::Unsupported, Code::Unimplemented),
            (ErrorCode::TooSmall, Code::OutOfRange),
            (ErrorCode::OutOfRange, Code::OutOfRange),
            (ErrorCode::VolumeNotFound, Code::NotFound),
            (ErrorCode::VolumeExists, Code::AlreadyExists),
            (ErrorCode::VolumeInUse, Code::FailedPrecondition),
            (ErrorCode::InsufficientNodes, Code::ResourceExhausted),
            (ErrorCode::NotOwner, Code::Unavailable),
            (ErrorCode::WrongEpoch, Code::Unavailable),
            (ErrorCode::Late, Code::Unavailable),
            (ErrorCode::Overtaken, Code::Unavailable),
            (ErrorCode::Unavailable, Code::Unavailable),
            (ErrorCode::SessionExpired, Code::Unavailable),
            (ErrorCode::Corrupt, Code::Internal),
            (ErrorCode::Internal, Code::Internal),
        ]
        .into();
        for &code in ErrorCode::ALL {
            assert_eq!(Some(&csi_code(code)), table.get(&code), "{code:?}");
        }
    }

    #[test]
    fn what_can_be_retried_stays_so() {
        for &code in ErrorCode::ALL {
            if code.retryable() {
                assert_eq!(csi_code(code), Code::Unavailable, "{code:?}");
            }
        }
    }

    #[test]
    fn the_message_survives() {
        let status = lazarette_proto::status(ErrorCode::InsufficientNodes, "3 copies, 2 nodes");
        let got = csi_status(&status);
        assert_eq!(got.code(), Code::ResourceExhausted);
        assert_eq!(got.message(), "3 copies, 2 nodes");
        let got = csi_status(&Status::failed_precondition("busy"));
        assert_eq!((got.code(), got.message()), (Code::FailedPrecondition, "busy"));
    }
}
