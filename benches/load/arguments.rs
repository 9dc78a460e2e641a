//! The arguments that all benches take: `cargo bench --bench NAME -- [--quick] [--series N,...] [WORD...]`.

/// Which rows are measured, and how thoroughly.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Fewer and shorter rounds, for a look
    #[arg(long)]
    pub(crate) quick: bool,
    /// Numbers of series in place of the default ones
    #[arg(long, value_name = "COUNT,...", value_delimiter = ',', value_parser = series)]
    series: Vec<usize>,
    /// Only rows whose names hold all of these words, as in `mixed 1000 zipf`
    #[arg(value_name = "WORD")]
    words: Vec<String>,
    /// What `cargo bench` passes to every bench
    #[arg(long, hide = true)]
    bench: bool,
}

/// These arguments alone.
#[derive(Debug, clap::Parser)]
struct Alone {
    #[command(flatten)]
    arguments: Arguments,
}

impl Arguments {
    /// Those of this process. Wrong ones end it, with the reason.
    pub(crate) fn read() -> Self {
        <Alone as clap::Parser>::parse().arguments
    }

    /// The numbers of series that were asked for, or else these.
    pub(crate) fn series(&self, default: &[usize]) -> Vec<usize> {
        if self.series.is_empty() { default.to_vec() } else { self.series.clone() }
    }

    /// Whether a row of this name is asked for.
    pub(crate) fn want(&self, name: &str) -> bool {
        self.words.iter().all(|word| name.split([' ', ',']).any(|part| part == word))
    }

    /// One of two numbers of rounds.
    pub(crate) fn rounds(&self, thorough: usize, quick: usize) -> usize {
        if self.quick { quick } else { thorough }
    }
}

/// At least one, and no more than have names of one length.
fn series(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| (1..=10_000_000).contains(count)).ok_or("write 1 to 10000000".to_owned())
}
