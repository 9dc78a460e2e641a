//! The commands and what they share: arguments, exit codes, and one way to end.
//!
//! A command writes its answer to the stream it is given and returns a [`Failure`]; only [`Failure::report`] writes to
//! standard error. A reader that went away (`tallyd check --print | head`) is no failure.

pub mod bench;
pub mod check;
pub mod explain;
mod files;
mod log;
pub mod pages;
pub mod run;
pub mod send;

use std::ffi::OsString;
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;
use std::{env, fmt, fs};

use clap::{Parser, Subcommand};

use crate::config::{Config, Loaded, Problem, Sources};
use crate::systemd;

/// A StatsD-compatible metrics agent: every dialect on one port, exact aggregates, JSON and Prometheus out.
#[derive(Debug, Parser)]
#[command(name = "tallyd", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(flatten)]
    layers: Layers,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What to do; without a word, run.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent (as does `tallyd` alone)
    Run(Layers),
    /// Say what is wrong with the configuration, each problem with file, line and key
    Check(check::Args),
    /// Show how lines are understood, or why they are rejected
    Explain(explain::Args),
    /// Send lines to an agent
    Send(send::Args),
    /// Send a load of exact size at a steady pace, and say what became of it
    Bench(bench::Args),
    /// Print a manual page, as packages install them
    Man(pages::ManArgs),
    /// Print what a shell completes the arguments by
    Completions(pages::CompletionsArgs),
}

/// The layers of the configuration that stand on the command line.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct Layers {
    /// Configuration file (TOML); none is read without it
    // Empty is none, as compose files pass on what is not set; a path argument would not take it.
    #[arg(
        long,
        env = "TALLYD_CONFIG",
        hide_env_values = true,
        value_name = "FILE",
        default_value = "",
        hide_default_value = true
    )]
    pub config: OsString,
    /// One key's value, above file and environment; may be repeated
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
}

impl Cli {
    /// The command; without a word it is `run`.
    pub fn chosen(self) -> Command {
        self.command.unwrap_or(Command::Run(self.layers))
    }
}

impl Layers {
    /// Merges all layers, and reads every file that they name: what a start needs, and says of it all that is wrong.
    pub fn load(&self) -> Result<Loaded, Failure> {
        let mut loaded = self.merge()?;
        files::read(&mut loaded).map_err(Failure::Configuration)?;
        Ok(loaded)
    }

    /// Reads as much of it as a check can; the other thing is what it could not look at.
    pub fn load_for_check(&self) -> Result<(Loaded, Vec<String>), Failure> {
        let mut loaded = self.merge()?;
        let notes = files::look(&mut loaded).map_err(Failure::Configuration)?;
        Ok((loaded, notes))
    }

    /// The same without the files of secrets and what else concerns listeners and stores: what a line needs.
    pub fn load_for_lines(&self) -> Result<Loaded, Failure> {
        let mut loaded = self.merge()?;
        files::read_mapping(&mut loaded).map_err(Failure::Configuration)?;
        Ok(loaded)
    }

    /// Reads the file and the environment and merges all layers.
    fn merge(&self) -> Result<Loaded, Failure> {
        let name = self.config.display().to_string();
        let text = if self.config.is_empty() { None } else { Some(read(Path::new(&self.config))?) };
        // What is not UTF-8 is nobody's key and no number, address or word of ours, so it is told as wrong by its key.
        let lossy = |text: OsString| text.to_string_lossy().into_owned();
        let environment: Vec<_> = env::vars_os().map(|(name, value)| (lossy(name), lossy(value))).collect();
        let file = text.as_deref().map(|text| (name.as_str(), text));
        let sources = Sources { file, environment: &environment, set: &self.set };
        Config::load(&sources).map_err(Failure::Configuration)
    }
}

fn read(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| {
        let (code, remedy) = cannot_read(&error);
        Failure::told(code, format!("{}: {error}; {remedy} with --config", path.display()))
    })
}

/// The exit code for a file that cannot be read, and the remedy.
fn cannot_read(error: &io::Error) -> (Code, &'static str) {
    let kind = error.kind();
    if kind == ErrorKind::NotFound {
        (Code::NoInput, "name an existing file")
    } else if kind == ErrorKind::PermissionDenied {
        (Code::Permission, "make it readable for this user, or name another")
    } else if kind == ErrorKind::InvalidData {
        (Code::Configuration, "write it in UTF-8, or name another")
    } else {
        (Code::Io, "name a readable file")
    }
}

/// How a command ends otherwise than well, as sysexits(3) numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The line is rejected.
    Data = 65,
    /// A named file is missing.
    NoInput = 66,
    /// A needed service or address is not there.
    Unavailable = 69,
    /// Input or output failed.
    Io = 74,
    /// The system forbids it.
    Permission = 77,
    /// The configuration is wrong.
    Configuration = 78,
}

/// Why a command could not do its work.
#[derive(Debug)]
pub enum Failure {
    /// An exit code and the one line that explains it, with the remedy.
    Told(u8, String),
    /// What is wrong with the configuration; never empty.
    Configuration(Vec<Problem>),
    /// The answer could not be written.
    Output(io::Error),
}

impl From<Code> for u8 {
    fn from(code: Code) -> Self {
        code as Self
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl Failure {
    /// A failure and the one line that explains it.
    pub fn told(code: impl Into<u8>, line: impl Into<String>) -> Self {
        Self::Told(code.into(), line.into())
    }

    /// The code that the process ends with.
    pub fn code(&self) -> u8 {
        match self {
            Self::Told(code, _) => *code,
            // Of several the first decides, as it is the one that a start tells.
            Self::Configuration(problems) => problems.first().map_or(Code::Configuration.into(), Problem::exit_code),
            Self::Output(error) if error.kind() == ErrorKind::BrokenPipe => 0,
            Self::Output(_) => Code::Io.into(),
        }
    }

    /// Each problem in a line of its own.
    pub fn lines(self) -> Vec<String> {
        match self {
            Self::Configuration(problems) => problems.iter().map(Problem::to_string).collect(),
            Self::Told(..) | Self::Output(_) => vec![self.to_string()],
        }
    }

    /// The same in one line, for a start in a service's journal.
    pub fn brief(self) -> Self {
        match self {
            Self::Configuration(_) => Self::told(self.code(), self.to_string()),
            Self::Told(..) | Self::Output(_) => self,
        }
    }

    /// Explains itself on `stderr`, in one line unless each of several problems has its own.
    pub fn report(&self, stderr: &mut impl Write) -> ExitCode {
        // The priority of a line in systemd's journal; who reads it elsewhere is not bothered with that.
        let priority = if systemd::stderr_is_journal() { "<3>" } else { "" };
        let written = match self {
            Self::Configuration(problems) => {
                problems.iter().try_for_each(|problem| writeln!(stderr, "{priority}tallyd: {problem}"))
            }
            Self::Output(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            Self::Told(..) | Self::Output(_) => writeln!(stderr, "{priority}tallyd: {self}"),
        };
        // With standard error gone as well, the code is all that is left to say.
        drop(written);
        ExitCode::from(self.code())
    }
}

/// In one line: of several problems the first.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Told(_, line) => f.write_str(line),
            Self::Configuration(problems) => match problems.as_slice() {
                [] => f.write_str("the configuration is wrong"),
                [problem] => problem.fmt(f),
                [problem, others @ ..] => write!(f, "{problem} (and {} more: see `tallyd check`)", others.len()),
            },
            Self::Output(error) => write!(f, "cannot write the answer: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn layers(arguments: &[&str]) -> Layers {
        let command = Cli::try_parse_from(arguments).unwrap().chosen();
        let Command::Run(layers) = command else { panic!("{command:?}") };
        layers
    }

    fn failure(path: &Path) -> (u8, String) {
        let layers = Layers { config: path.into(), set: Vec::new() };
        let failure = layers.load().unwrap_err();
        let mut stderr = Vec::new();
        failure.report(&mut stderr);
        (failure.code(), String::from_utf8(stderr).unwrap())
    }

    #[test]
    fn without_a_word_the_agent_runs() {
        Cli::command().debug_assert();
        let expected = Layers { config: "f".into(), set: vec!["a=1".to_owned(), "b=2".to_owned()] };
        assert_eq!(layers(&["tallyd", "--config", "f", "--set", "a=1", "--set", "b=2"]), expected);
        assert_eq!(layers(&["tallyd", "run", "--set", "a=1", "--set", "b=2", "--config", "f"]), expected);
        assert!(Cli::try_parse_from(["tallyd", "--set", "a=1", "send", "line"]).is_err());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named_with_the_code_for_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tallyd.toml");
        let (code, line) = failure(&path);
        assert!(code == 66 && line.contains("tallyd.toml: ") && line.lines().count() == 1, "{line}");
        fs::write(&path, b"[log]\nlevel = '\xff'").unwrap();
        assert_eq!(failure(&path).0, 78);
        fs::write(&path, "[log]\nlevel = 'loud'\nlvl = ''").unwrap();
        let (code, lines) = failure(&path);
        assert!(code == 78 && lines.lines().count() == 2, "{lines}");
        assert!(lines.contains("tallyd.toml:2:9: log.level = \"loud\": "), "{lines}");
        assert_eq!(failure(directory.path()).0, 74);
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure() {
        let mut stderr = Vec::new();
        let gone = Failure::from(io::Error::from(ErrorKind::BrokenPipe));
        gone.report(&mut stderr);
        assert!(gone.code() == 0 && stderr.is_empty());
        assert_eq!(Failure::from(io::Error::from(ErrorKind::StorageFull)).code(), 74);
    }
}
