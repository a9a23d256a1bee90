use lazarette_proto::code_of;
use lazarette_types::ErrorCode;

/// What a call came to: a code that maps to an errno, and a message for people.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    code: ErrorCode,
    message: String,
}

/// The result of this crate's calls.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with this code.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// The code, for decisions.
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// What an application sees.
    pub fn errno(&self) -> i32 {
        self.code.errno()
    }

    /// Whether asking again may help.
    pub(crate) fn retryable(&self) -> bool {
        self.code.retryable()
    }

    /// A server's answer that the protocol does not allow.
    pub(crate) fn malformed(what: &str) -> Self {
        Self::new(ErrorCode::Internal, format!("malformed reply: {what}"))
    }
}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        let code = code_of(&status);
        let message = if status.message().is_empty() {
            format!("{code:?}")
        } else {
            status.message().to_string()
        };
        Self { code, message }
    }
}
