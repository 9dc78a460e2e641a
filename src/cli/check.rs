//! `tallyd check`: what is wrong with the configuration and the mapping file that it names, or what it comes to; or the
//! configuration of another program as one of ours. It binds and writes nothing.

mod draft;
mod etsy;
mod literal;
mod relay;
mod statsd_exporter;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use super::{Code, Failure, Layers, cannot_read};
use crate::config::Config;
use draft::Draft;

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The configuration to check.
    #[command(flatten)]
    pub layers: Layers,
    /// Print the merged configuration and where each value comes from, without passwords
    #[arg(long, conflicts_with = "print_defaults")]
    pub print: bool,
    /// Print a configuration file with every key and its default
    #[arg(long)]
    pub print_defaults: bool,
    /// Print the configuration that does what this configuration of Etsy's StatsD does (config.js), with what differs
    #[arg(long, value_name = "FILE", conflicts_with_all = ["print", "print_defaults", "config", "set"])]
    pub from_etsy: Option<OsString>,
    /// Print the configuration that does what these flags of statsd_exporter do, all of them as one argument
    #[arg(
        long,
        value_name = "FLAGS",
        allow_hyphen_values = true,
        conflicts_with_all = ["print", "print_defaults", "config", "set", "from_etsy"]
    )]
    pub from_statsd_exporter: Option<String>,
}

/// Writes what was asked for to `out`, and what a person should look at to `notes`; a wrong configuration is a failure with
/// all its problems.
pub fn run(args: &Args, out: &mut impl Write, notes: &mut impl Write) -> Result<(), Failure> {
    if let Some(file) = &args.from_etsy {
        let name = file.display().to_string();
        let draft = etsy::convert(&name, &read(Path::new(file))?)?;
        return write_draft(&draft, &format!("{name} of Etsy's StatsD"), out, notes);
    }
    if let Some(flags) = &args.from_statsd_exporter {
        let draft = statsd_exporter::convert(flags)?;
        return write_draft(&draft, "flags of statsd_exporter", out, notes);
    }
    if args.print_defaults {
        write!(out, "{}", Config::defaults())?;
        return Ok(());
    }
    let (loaded, unseen) = args.layers.load_for_check()?;
    if args.print {
        write!(out, "{}", loaded.print())?;
    } else {
        loaded.notes().iter().chain(&unseen).try_for_each(|note| writeln!(out, "{note}"))?;
        writeln!(out, "the configuration is valid")?;
    }
    Ok(())
}

fn write_draft(draft: &Draft, of: &str, out: &mut impl Write, notes: &mut impl Write) -> Result<(), Failure> {
    draft.warnings.iter().chain(&draft.refusals()).try_for_each(|warning| writeln!(notes, "tallyd: {warning}"))?;
    write!(out, "{}", draft.print(of))?;
    Ok(())
}

/// The text of a file. Of one that is too long only as much is read as shows that.
fn read(path: &Path) -> Result<String, Failure> {
    let told = |error: &io::Error| {
        let (code, remedy) = cannot_read(error);
        Failure::told(code, format!("{}: {error}; {remedy} with --from-etsy", path.display()))
    };
    let mut bytes = Vec::new();
    let limit = literal::SIZE_MAX as u64 + 1;
    File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes)).map_err(|error| told(&error))?;
    if bytes.len() > literal::SIZE_MAX {
        let fault = literal::Fault::TooLong;
        return Err(Failure::told(Code::Configuration, format!("{}: {fault}", path.display())));
    }
    // The same error as of a file that is read as text.
    String::from_utf8(bytes).map_err(|error| told(&io::Error::new(io::ErrorKind::InvalidData, error)))
}
