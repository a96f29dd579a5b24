//! One self-contained source of the portable kernels and a dialect.

use std::collections::HashSet;
use std::fmt::Write as _;

/// Files by name. A name may occur in a dialect's folder and in the portable one.
pub(crate) type Files<'a> = &'a [(&'a str, &'a str)];

/// Where the kernels are.
pub(crate) const ROOT: &str = "portable.cu";

/// The root with every file it includes in its place. A dialect's file wins over a portable one of its name.
///
/// # Errors
/// The file that is missing.
pub(crate) fn self_contained(dialect: Files<'_>, portable: Files<'_>) -> Result<String, String> {
    let mut writer =
        Writer { folders: [dialect, portable], done: HashSet::new(), within: Vec::new(), text: String::new() };
    writer.insert(ROOT, false)?;
    Ok(writer.text)
}

struct Writer<'a> {
    folders: [Files<'a>; 2],
    /// Files that stand in the text whatever the conditions come to.
    done: HashSet<&'a str>,
    /// Files that are being inserted.
    within: Vec<&'a str>,
    text: String,
}

impl Writer<'_> {
    /// Inserts a file, once. Inside a condition (`conditional`) it may be left out by the compiler, so it is inserted
    /// again where it is included next; a guard keeps it from counting twice.
    fn insert(&mut self, name: &str, conditional: bool) -> Result<(), String> {
        let found = self.folders.iter().find_map(|files| files.iter().find(|(n, _)| *n == name));
        let (name, source) = *found.ok_or_else(|| format!("kernel source {name} is missing"))?;
        if self.done.contains(name) || self.within.contains(&name) {
            return Ok(());
        }
        if !conditional {
            self.done.insert(name);
        }
        self.within.push(name);
        let guard: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let _ = writeln!(self.text, "#ifndef POLYMLA_FILE_{guard}\n#define POLYMLA_FILE_{guard}\n#line 1 \"{name}\"");
        let mut depth = 0usize;
        for (number, line) in source.lines().enumerate() {
            let directive = line.trim_start();
            if directive.starts_with("#if") {
                depth += 1;
            } else if directive.starts_with("#endif") {
                depth = depth.saturating_sub(1);
            }
            if directive.starts_with("#pragma once") {
                self.text.push('\n');
            } else if let Some(rest) = directive.strip_prefix("#include \"") {
                self.insert(rest.split('"').next().unwrap_or_default(), conditional || depth > 0)?;
                let _ = writeln!(self.text, "#line {} \"{name}\"", number + 2);
            } else {
                self.text.push_str(line);
                self.text.push('\n');
            }
        }
        self.text.push_str("#endif\n");
        self.within.pop();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORTABLE: Files<'static> = &[
        (ROOT, "#include \"dialect.h\"\n#include \"a.h\"\nroot\n"),
        ("a.h", "#pragma once\n#include \"dialect.h\"\nportable a\n"),
        ("dialect.h", "never\n"),
    ];

    fn plain(text: &str) -> Vec<&str> {
        text.lines().filter(|l| !l.is_empty() && !l.starts_with('#')).collect()
    }

    #[test]
    fn files_are_included_once_and_the_dialect_wins() {
        let text = self_contained(&[("dialect.h", "#pragma once\ndialect\n")], PORTABLE).expect("complete");
        assert_eq!(plain(&text), ["dialect", "portable a", "root"]);
        assert!(text.contains("#line 3 \"portable.cu\""), "{text}");
    }

    /// What a condition may leave out stands again where it is included without one.
    #[test]
    fn files_in_conditions_do_not_count_as_included() {
        let dialect: Files<'_> = &[("dialect.h", "#pragma once\n#if SOME\n#include \"a.h\"\n#endif\ndialect\n")];
        let text = self_contained(dialect, PORTABLE).expect("complete");
        assert_eq!(plain(&text), ["portable a", "dialect", "portable a", "root"]);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = self_contained(&[], &[(ROOT, "#include \"gone.h\"\n")]).expect_err("it is not there");
        assert!(error.contains("gone.h"), "{error}");
    }
}
