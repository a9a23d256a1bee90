macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $errno:literal, $retry:literal;)*) => {
        /// The closed list of errors that cross a process boundary. Numbers are part of the wire
        /// and journal formats: never reuse one.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ErrorCode {
            $($(#[$doc])* $name,)*
        }

        impl ErrorCode {
            /// All codes.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The number on the wire.
            pub fn number(self) -> u32 {
                match self { $(Self::$name => $number,)* }
            }

            /// The code of a number on the wire, if known to this version.
            pub fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }

            /// The Linux errno that an application sees.
            pub fn errno(self) -> i32 {
                match self { $(Self::$name => $errno,)* }
            }

            /// Whether the same request may succeed later or elsewhere without the caller
            /// changing it. Retryable errors never reach an application.
            pub fn retryable(self) -> bool {
                match self { $(Self::$name => $retry,)* }
            }
        }
    };
}

codes! {
    /// No such file or directory.
    NotFound = 1, 2, false;
    /// The name exists.
    Exists = 2, 17, false;
    /// A component is not a directory.
    NotDirectory = 3, 20, false;
    /// The target is a directory.
    IsDirectory = 4, 21, false;
    /// The directory has entries.
    NotEmpty = 5, 39, false;
    /// A name over NAME_MAX bytes.
    NameTooLong = 6, 36, false;
    /// A malformed request or one that makes no sense.
    InvalidArgument = 7, 22, false;
    /// Operation not permitted (EPERM).
    NotPermitted = 8, 1, false;
    /// Access denied (EACCES).
    PermissionDenied = 9, 13, false;
    /// Crosses volumes.
    CrossDevice = 10, 18, false;
    /// Link count overflow.
    TooManyLinks = 11, 31, false;
    /// The volume's quota or the disks are full.
    NoSpace = 12, 28, false;
    /// Beyond the largest file size.
    FileTooBig = 13, 27, false;
    /// The inode is gone.
    Stale = 14, 116, false;
    /// A lock is held by another owner.
    WouldBlock = 15, 11, false;
    /// Waiting for the lock would never end.
    Deadlock = 16, 35, false;
    /// Cancelled by a signal.
    Interrupted = 17, 4, false;
    /// No such extended attribute.
    NoAttribute = 18, 61, false;
    /// Not supported.
    Unsupported = 19, 95, false;
    /// The buffer is too small for the value.
    TooSmall = 20, 34, false;
    /// A value out of its range, such as shrinking a volume.
    OutOfRange = 21, 34, false;
    /// What was written may have been cut before it became part of the file: write again. For clients,
    /// never for applications.
    Overtaken = 22, 5, false;
    /// The volume does not exist.
    VolumeNotFound = 30, 2, false;
    /// The volume exists with other parameters.
    VolumeExists = 31, 17, false;
    /// The volume is mounted.
    VolumeInUse = 32, 16, false;
    /// Fewer storage nodes than the policy needs.
    InsufficientNodes = 33, 28, false;
    /// This storage node does not own the volume's metadata (any more).
    NotOwner = 40, 5, true;
    /// This storage node is not the primary, or the configuration has changed.
    WrongEpoch = 41, 5, true;
    /// The service cannot answer now: starting, failing over, or the network failed.
    Unavailable = 42, 5, true;
    /// The owner has ended the client's session.
    SessionExpired = 43, 5, false;
    /// The request came after its deadline, or is of the clock of a process that is gone. For clients, never
    /// for applications.
    Late = 44, 5, true;
    /// Stored data failed its checksum and no good copy was found.
    Corrupt = 50, 5, false;
    /// A bug or an I/O error on a server.
    Internal = 51, 5, false;
}

#[cfg(test)]
mod tests {
    use super::ErrorCode;
    use std::collections::HashSet;

    #[test]
    fn numbers_are_unique_and_round_trip() {
        let numbers: HashSet<_> = ErrorCode::ALL.iter().map(|c| c.number()).collect();
        assert_eq!(numbers.len(), ErrorCode::ALL.len());
        for &code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_number(code.number()), Some(code));
        }
        assert_eq!(ErrorCode::from_number(0), None);
    }
}
