//! `tallyd check`: what is wrong with the configuration and the mapping file that it names, or what it comes to. It binds
//! and writes nothing.

use std::io::Write;

use super::{Failure, Layers};
use crate::config::Config;

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
}

/// Writes what was asked for to `out`; a wrong configuration is a failure with all its problems.
pub fn run(args: &Args, out: &mut impl Write) -> Result<(), Failure> {
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
