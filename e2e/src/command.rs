//! Running short-lived programs, with errors that show what they said.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::AsyncWriteExt;

/// A program to run to its end.
#[derive(Debug, Clone)]
pub struct Cmd {
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    cwd: Option<OsString>,
    stdin: Option<Vec<u8>>,
    limit: Duration,
}

/// What a program printed and how it ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// Standard output, lossily decoded.
    pub stdout: String,
    /// Standard error, lossily decoded.
    pub stderr: String,
    /// The exit code; `None` after a signal.
    pub code: Option<i32>,
}

impl Cmd {
    /// A program without arguments yet; it may run for two minutes.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            cwd: None,
            stdin: None,
            limit: Duration::from_secs(120),
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn cwd(mut self, dir: impl AsRef<Path>) -> Self {
        self.cwd = Some(dir.as_ref().as_os_str().to_owned());
        self
    }

    /// Feeds standard input.
    #[must_use]
    pub fn stdin(mut self, data: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(data.into());
        self
    }

    /// Kills the program after `limit`.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs to the end; an exit code other than zero is not an error here.
    pub async fn output(self) -> Result<Output> {
        let line = self.line();
        let mut command = tokio::process::Command::new(&self.program);
        command
            .args(&self.args)
            .envs(self.env.iter().map(|(k, v)| (k, v)))
            .stdin(if self.stdin.is_some() {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if let Some(cwd) = &self.cwd {
            command.current_dir(cwd);
        }
        let mut child = command.spawn().with_context(|| format!("start `{line}`"))?;
        let stdin = child.stdin.take();
        let feed = async {
            if let (Some(mut pipe), Some(data)) = (stdin, &self.stdin) {
                // A program may end without reading its input; its exit code tells the story.
                let _ = pipe.write_all(data).await;
            }
        };
        let run = async { tokio::join!(feed, child.wait_with_output()).1 };
        let out = tokio::time::timeout(self.limit, run)
            .await
            .with_context(|| format!("`{line}` did not end within {:?}", self.limit))?
            .with_context(|| format!("run `{line}`"))?;
        Ok(Output {
            stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
            code: out.status.code(),
        })
    }

    /// Runs to the end and returns standard output; anything but exit code zero is an error that
    /// quotes what the program said.
    pub async fn run(self) -> Result<String> {
        let line = self.line();
        let out = self.output().await?;
        if out.code != Some(0) {
            let code = out.code.map_or("a signal".to_owned(), |c| format!("exit code {c}"));
            bail!(
                "`{line}` ended with {code}: {}",
                tail(&format!("{}{}", out.stdout, out.stderr))
            );
        }
        Ok(out.stdout)
    }

    fn line(&self) -> String {
        let mut words = vec![self.program.to_string_lossy()];
        words.extend(self.args.iter().map(|a| a.to_string_lossy()));
        let line = words.join(" ");
        if line.chars().count() > 300 {
            line.chars().take(300).chain("…".chars()).collect()
        } else {
            line
        }
    }
}

/// The end of a long text, where programs put the reason.
fn tail(text: &str) -> String {
    let text = text.trim();
    let skip = text.chars().count().saturating_sub(2000);
    text.chars().skip(skip).collect()
}

/// `cmd!["ip", "link", "show"]`: a [`Cmd`] from words of mixed string types.
#[macro_export]
macro_rules! cmd {
    ($program:expr $(, $arg:expr)* $(,)?) => {
        $crate::command::Cmd::new($program)$(.arg($arg))*
    };
}

#[cfg(test)]
mod tests {
    #[tokio::test]
    async fn failures_quote_the_program() {
        let error = cmd!["sh", "-c", "echo told you >&2; exit 3"]
            .run()
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("exit code 3") && error.contains("told you"), "{error}");
    }

    #[tokio::test]
    async fn input_reaches_the_program() {
        let big = "x".repeat(1 << 20);
        assert_eq!(cmd!["cat"].stdin(big.clone()).run().await.unwrap(), big);
    }
}
