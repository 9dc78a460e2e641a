//! Arguments in, exit code out; what happens between stands in the library.

use std::io;
use std::process::ExitCode;

use clap::Parser;
use tallyd::cli::{Cli, Command, bench, check, explain, pages, run, send};

fn main() -> ExitCode {
    let result = match Cli::parse().chosen() {
        Command::Run(layers) => run::run(&layers),
        Command::Check(args) => check::run(&args, &mut io::stdout().lock(), &mut io::stderr()),
        Command::Explain(args) => explain::run(&args, io::stdin().lock(), &mut io::stdout().lock()),
        Command::Bench(args) => bench::run(&args, &mut io::stdout().lock(), &mut io::stderr()),
        Command::Send(args) => send::run(&args, io::stdin().lock(), &mut io::stderr()),
        Command::Man(args) => pages::man(&args, &mut io::stdout().lock()),
        Command::Completions(args) => pages::completions(&args, &mut io::stdout().lock()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(&mut io::stderr()),
    }
}
