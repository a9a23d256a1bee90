//! The shared libraries of a program.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The libraries (with the loader) that the program at `path` loads; none if it is static.
pub fn shared_libraries(path: &Path) -> Result<Vec<PathBuf>> {
    let out = std::process::Command::new("ldd")
        .arg(path)
        .output()
        .with_context(|| format!("run ldd on {}", path.display()))?;
    let text = String::from_utf8_lossy(&out.stdout);
    let complaint = String::from_utf8_lossy(&out.stderr);
    if text.contains("statically linked") || complaint.contains("not a dynamic executable") {
        return Ok(Vec::new());
    }
    if !out.status.success() {
        bail!("ldd {}: {}", path.display(), complaint.trim());
    }
    parse(&text).with_context(|| format!("libraries of {}", path.display()))
}

/// Reads lines such as `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f…)` and
/// `/lib64/ld-linux-x86-64.so.2 (0x00007f…)`.
fn parse(text: &str) -> Result<Vec<PathBuf>> {
    let mut libraries = Vec::new();
    for line in text.lines().map(str::trim) {
        let path = match line.split_once(" => ") {
            Some((name, "not found")) => bail!("{name} is not installed"),
            Some((_, path)) => path,
            // The kernel's vdso has a name but no file.
            None if !line.starts_with('/') => continue,
            None => line,
        };
        if let Some(path) = path.split_whitespace().next().filter(|p| p.starts_with('/')) {
            libraries.push(PathBuf::from(path));
        }
    }
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_output_is_understood() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f12)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f13)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(parse(text).unwrap(), expected);
        assert!(
            parse("libx.so => not found\n")
                .unwrap_err()
                .to_string()
                .contains("libx.so")
        );
    }

    #[test]
    fn real_programs() {
        assert!(
            // Not /proc/self/exe: to ldd that is another program.
            shared_libraries(&std::env::current_exe().unwrap())
                .unwrap()
                .iter()
                .any(|p| p.ends_with("libc.so.6"))
        );
    }
}
