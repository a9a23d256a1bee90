//! INIT: what kernel and file system agree on when a connection begins, and how it is kept.

use crate::abi::{self, Capabilities};
use crate::wire::{Head, Malformed, Reader};
use std::time::Duration;

/// Bytes of the largest write that any kernel sends with default limits: 256 pages.
pub const LARGEST_WRITE: u32 = 1 << 20;

/// What a file system asks for at INIT.
#[derive(Debug, Clone)]
pub struct Terms {
    /// Used where the kernel has them.
    pub wanted: Capabilities,
    /// A kernel without them is refused.
    pub required: Capabilities,
    /// Bytes of the largest write, a multiple of 4096 up to [`LARGEST_WRITE`].
    pub max_write: u32,
    /// Bytes the kernel may read ahead.
    pub max_readahead: u32,
    /// Background requests (read-ahead, write-back, direct asynchronous I/O) under way at once.
    pub max_background: u16,
    /// Background requests from which on the kernel holds writers back.
    pub congestion_threshold: u16,
    /// Granularity of times, nanoseconds.
    pub time_granularity: u32,
    /// After this the kernel aborts the whole connection; None leaves the machine's default.
    pub request_timeout: Option<Duration>,
    /// With `PASSTHROUGH`: how many stacked file systems a backing file may be on.
    pub max_stack_depth: u32,
}

impl Default for Terms {
    /// What a network file system wants; no write-back cache, no time-out. Not `ATOMIC_O_TRUNC`: with it the
    /// kernel has a program truncated that is being executed, when somebody opens it with O_RDONLY | O_TRUNC,
    /// before it answers ETXTBSY.
    fn default() -> Self {
        Self {
            wanted: Capabilities::ASYNC_READ
                | Capabilities::POSIX_LOCKS
                | Capabilities::FLOCK_LOCKS
                | Capabilities::BIG_WRITES
                | Capabilities::AUTO_INVAL_DATA
                | Capabilities::READDIRPLUS
                | Capabilities::READDIRPLUS_AUTO
                | Capabilities::ASYNC_DIO
                | Capabilities::NO_OPEN_SUPPORT
                | Capabilities::PARALLEL_DIROPS
                | Capabilities::ABORT_ERROR
                | Capabilities::MAX_PAGES
                | Capabilities::NO_OPENDIR_SUPPORT
                | Capabilities::INIT_EXT
                | Capabilities::CREATE_SUPP_GROUP
                | Capabilities::HAS_EXPIRE_ONLY
                | Capabilities::HAS_RESEND,
            required: Capabilities::empty(),
            max_write: LARGEST_WRITE,
            max_readahead: LARGEST_WRITE,
            max_background: 64,
            congestion_threshold: 48,
            time_granularity: 1,
            request_timeout: None,
            max_stack_depth: 0,
        }
    }
}

/// The kernel's INIT request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InitRequest {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) max_readahead: u32,
    pub(crate) flags: Capabilities,
}

impl InitRequest {
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(body);
        let (major, minor) = (reader.u32()?, reader.u32()?);
        if major != abi::MAJOR {
            // Of another major version nothing but the version is known.
            return Ok(Self {
                major,
                minor,
                max_readahead: 0,
                flags: Capabilities::empty(),
            });
        }
        let max_readahead = reader.u32()?;
        let mut flags = u64::from(reader.u32()?);
        if flags & Capabilities::INIT_EXT.bits() != 0 {
            flags |= u64::from(reader.u32()?) << 32;
        }
        Ok(Self {
            major,
            minor,
            max_readahead,
            flags: Capabilities::from_bits_retain(flags),
        })
    }
}

/// Why no connection comes about.
#[derive(Debug, thiserror::Error)]
pub enum NegotiationError {
    /// The kernel is too old.
    #[error("the kernel speaks FUSE {major}.{minor}, the oldest usable version is 7.31 (Linux 5.4)")]
    Version {
        /// The kernel's major version.
        major: u32,
        /// The kernel's minor version.
        minor: u32,
    },
    /// The kernel lacks something required.
    #[error("the kernel lacks the required capabilities {missing:?}")]
    Missing {
        /// What it lacks.
        missing: Capabilities,
    },
    /// Terms that make no sense.
    #[error("max_write of {0} bytes is not a multiple of 4096 between 4096 and 1048576")]
    MaxWrite(u32),
    /// Saved parameters that are not ours.
    #[error("saved session parameters are damaged or of an unknown version: {0}")]
    Saved(&'static str),
}

/// What kernel and file system agreed on. Serving a connection that already lives needs it: the
/// kernel tells it once only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    /// The minor version spoken.
    pub minor: u32,
    /// The kernel's own minor version.
    pub kernel_minor: u32,
    /// What the kernel has.
    pub offered: Capabilities,
    /// What is used of it.
    pub agreed: Capabilities,
    /// Bytes of the largest write.
    pub max_write: u32,
    /// Bytes the kernel may read ahead.
    pub max_readahead: u32,
    /// Background requests under way at once.
    pub max_background: u16,
    /// Background requests from which on the kernel holds writers back.
    pub congestion_threshold: u16,
    /// Granularity of times, nanoseconds.
    pub time_granularity: u32,
    /// Seconds after which the kernel aborts; 0 for the machine's default.
    pub request_timeout: u16,
    /// How many stacked file systems a backing file may be on.
    pub max_stack_depth: u32,
}

/// First bytes of saved parameters.
const MAGIC: &[u8; 8] = b"lzfuse\0\x01";
const SAVED: usize = 8 + 4 + 4 + 8 + 8 + 4 + 4 + 2 + 2 + 4 + 2 + 2 + 4;

impl Parameters {
    /// What comes out of the kernel's offer and the file system's terms.
    pub(crate) fn negotiate(request: &InitRequest, terms: &Terms) -> Result<Self, NegotiationError> {
        if request.major != abi::MAJOR || request.minor < abi::OLDEST_MINOR {
            return Err(NegotiationError::Version {
                major: request.major,
                minor: request.minor,
            });
        }
        if terms.max_write < 4096 || terms.max_write > LARGEST_WRITE || !terms.max_write.is_multiple_of(4096) {
            return Err(NegotiationError::MaxWrite(terms.max_write));
        }
        let missing = terms.required - request.flags;
        if !missing.is_empty() {
            return Err(NegotiationError::Missing { missing });
        }
        let mut agreed = (terms.wanted | terms.required) & request.flags;
        // Both ride on others.
        if terms.max_write > 32 * 4096 {
            agreed |= Capabilities::MAX_PAGES & request.flags;
        }
        agreed |= (Capabilities::BIG_WRITES | Capabilities::INIT_EXT) & request.flags;
        if terms.request_timeout.is_some() {
            agreed |= Capabilities::REQUEST_TIMEOUT & request.flags;
        }
        let without_pages = 32 * 4096;
        let max_write = match agreed.contains(Capabilities::MAX_PAGES) {
            true => terms.max_write,
            false => terms.max_write.min(without_pages),
        };
        let seconds = terms
            .request_timeout
            .map_or(0, |timeout| timeout.as_secs().clamp(1, u64::from(u16::MAX)));
        Ok(Self {
            minor: request.minor.min(abi::MINOR),
            kernel_minor: request.minor,
            offered: request.flags,
            agreed,
            max_write,
            max_readahead: terms.max_readahead.min(request.max_readahead),
            max_background: terms.max_background.max(1),
            congestion_threshold: terms.congestion_threshold.clamp(1, terms.max_background.max(1)),
            time_granularity: terms.time_granularity.clamp(1, 1_000_000_000),
            request_timeout: seconds as u16,
            max_stack_depth: if agreed.contains(Capabilities::PASSTHROUGH) {
                terms.max_stack_depth.max(1)
            } else {
                0
            },
        })
    }

    /// `fuse_init_out`
    pub(crate) fn reply(&self) -> Head {
        let mut head = Head::new();
        let flags = self.agreed.bits();
        head.u32(abi::MAJOR)
            .u32(self.minor)
            .u32(self.max_readahead)
            .u32(flags as u32);
        head.u16(self.max_background)
            .u16(self.congestion_threshold)
            .u32(self.max_write);
        head.u32(self.time_granularity)
            .u16((self.max_write / 4096) as u16)
            .u16(0);
        head.u32((flags >> 32) as u32)
            .u32(self.max_stack_depth)
            .u16(self.request_timeout)
            .zeros(22);
        head
    }

    /// Bytes that [`Parameters::from_bytes`] of this and later versions reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.minor.to_le_bytes());
        bytes.extend(self.kernel_minor.to_le_bytes());
        bytes.extend(self.offered.bits().to_le_bytes());
        bytes.extend(self.agreed.bits().to_le_bytes());
        bytes.extend(self.max_write.to_le_bytes());
        bytes.extend(self.max_readahead.to_le_bytes());
        bytes.extend(self.max_background.to_le_bytes());
        bytes.extend(self.congestion_threshold.to_le_bytes());
        bytes.extend(self.time_granularity.to_le_bytes());
        bytes.extend(self.request_timeout.to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(self.max_stack_depth.to_le_bytes());
        bytes
    }

    /// The opposite of [`Parameters::to_bytes`]. Whatever is not exactly such bytes is an error.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NegotiationError> {
        let content = bytes
            .strip_prefix(MAGIC)
            .ok_or(NegotiationError::Saved("unknown beginning"))?;
        if bytes.len() != SAVED {
            return Err(NegotiationError::Saved("wrong length"));
        }
        let mut fields = Fields(content);
        let parameters = Self {
            minor: fields.u32(),
            kernel_minor: fields.u32(),
            offered: Capabilities::from_bits_retain(fields.u64()),
            agreed: Capabilities::from_bits_retain(fields.u64()),
            max_write: fields.u32(),
            max_readahead: fields.u32(),
            max_background: fields.u16(),
            congestion_threshold: fields.u16(),
            time_granularity: fields.u32(),
            request_timeout: {
                let seconds = fields.u16();
                fields.u16();
                seconds
            },
            max_stack_depth: fields.u32(),
        };
        if parameters.max_write < 4096
            || parameters.max_write > LARGEST_WRITE
            || !parameters.max_write.is_multiple_of(4096)
        {
            return Err(NegotiationError::Saved("max_write is out of range"));
        }
        if !(abi::OLDEST_MINOR..=abi::MINOR).contains(&parameters.minor) {
            return Err(NegotiationError::Saved("the protocol's minor version is out of range"));
        }
        Ok(parameters)
    }

    /// Is this agreed?
    pub fn has(&self, capability: Capabilities) -> bool {
        self.agreed.contains(capability)
    }
}

/// Little-endian numbers of bytes whose length was checked; past their end come zeros.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((taken, rest)) => {
                self.0 = rest;
                *taken
            }
            None => [0; N],
        }
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(minor: u32) -> InitRequest {
        InitRequest {
            major: 7,
            minor,
            max_readahead: 131_072,
            flags: Capabilities::all(),
        }
    }

    fn offer(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn offers_of_old_and_new_kernels() {
        let old = InitRequest::parse(&offer(&[7, 31, 65536, 0x3ff])).unwrap();
        assert_eq!((old.minor, old.flags.bits()), (31, 0x3ff));
        let new = InitRequest::parse(&offer(&[7, 45, 65536, 1 << 30, 0x5fd])).unwrap();
        assert!(new.flags.contains(Capabilities::HAS_RESEND));
        assert_eq!(
            InitRequest::parse(&offer(&[7, 45, 65536, 1 << 30])),
            Err(Malformed::Short)
        );
        assert_eq!(InitRequest::parse(&offer(&[8, 1])).unwrap().major, 8);
    }

    #[test]
    fn the_smaller_minor_is_spoken() {
        assert_eq!(
            Parameters::negotiate(&request(31), &Terms::default()).unwrap().minor,
            31
        );
        assert_eq!(
            Parameters::negotiate(&request(99), &Terms::default()).unwrap().minor,
            abi::MINOR
        );
        assert!(matches!(
            Parameters::negotiate(&request(30), &Terms::default()),
            Err(NegotiationError::Version { minor: 30, .. })
        ));
    }

    #[test]
    fn nothing_is_agreed_that_is_not_offered() {
        let mut old = request(31);
        old.flags = Capabilities::ASYNC_READ | Capabilities::BIG_WRITES;
        let parameters = Parameters::negotiate(&old, &Terms::default()).unwrap();
        assert_eq!(parameters.agreed, old.flags);
        assert_eq!(parameters.max_write, 131_072);
        let terms = Terms {
            required: Capabilities::HAS_RESEND,
            ..Terms::default()
        };
        let error = Parameters::negotiate(&old, &terms).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel lacks the required capabilities Capabilities(HAS_RESEND)"
        );
        let terms = Terms {
            max_write: 5000,
            ..Terms::default()
        };
        assert!(matches!(
            Parameters::negotiate(&old, &terms),
            Err(NegotiationError::MaxWrite(5000))
        ));
    }

    #[test]
    fn the_reply_is_as_long_as_the_kernels_structure() {
        let parameters = Parameters::negotiate(&request(45), &Terms::default()).unwrap();
        assert_eq!(parameters.reply().as_slice().len(), 64);
    }

    proptest! {
        #[test]
        fn saved_parameters_come_back(write in 1u32..=256, flags: u64, minor in 31u32..=45, odd: u16) {
            let parameters = Parameters {
                minor, kernel_minor: 50, offered: Capabilities::from_bits_retain(flags),
                agreed: Capabilities::from_bits_retain(flags / 2), max_write: write * 4096, max_readahead: 9,
                max_background: odd, congestion_threshold: 3, time_granularity: 1, request_timeout: odd,
                max_stack_depth: 1,
            };
            let bytes = parameters.to_bytes();
            prop_assert_eq!(Parameters::from_bytes(&bytes).unwrap(), parameters);
            for cut in 0..bytes.len() {
                prop_assert!(Parameters::from_bytes(&bytes[..cut]).is_err());
            }
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = InitRequest::parse(&bytes);
            let _ = Parameters::from_bytes(&bytes);
            let _ = Parameters::from_bytes(&[&MAGIC[..], &bytes].concat());
        }
    }
}
