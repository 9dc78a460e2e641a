//! The keys of `[flush]` that say which of Etsy's figures there are, and which series are left out.

use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Which figures there are, and of which series. `[flush]` has these keys beside its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The percentiles of timers; negative ones are of the top.
    pub percentiles: Vec<f64>,
    /// The figures of timers that are shown; all without an entry.
    pub timer_metrics: Vec<String>,
    /// Bins of timers.
    pub histograms: Vec<Bins>,
    /// Whether a value stands for as many as its rate says, in all figures.
    pub weight_by_rate: bool,
    /// What is done with idle series of which the next four say nothing.
    pub delete_idle_stats: bool,
    /// Whether counters are left out of a window in which nothing came.
    pub delete_counters: Left,
    /// The same for timers, histograms and distributions.
    pub delete_timers: Left,
    /// The same for sets.
    pub delete_sets: Left,
    /// The same for gauges, `gauges_max_ttl` windows after the last reading.
    pub delete_gauges: Left,
    /// In how many windows a gauge is shown, that of its last reading among them; 0 is 1.
    pub gauges_max_ttl: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            percentiles: vec![90.0],
            timer_metrics: Vec::new(),
            histograms: Vec::new(),
            weight_by_rate: false,
            delete_idle_stats: false,
            delete_counters: Left::Auto,
            delete_timers: Left::Auto,
            delete_sets: Left::Auto,
            delete_gauges: Left::Auto,
            gauges_max_ttl: 1,
        }
    }
}

impl Config {
    /// Whether the numbers can be used.
    ///
    /// # Errors
    /// The first that can't.
    pub fn check(&self) -> Result<(), Error> {
        if let Some(percent) = self.percentiles.iter().find(|percent| !(-100.0..=100.0).contains(*percent)) {
            return Err(Error::Percentile(*percent));
        }
        // `false` for one that is no number.
        let is_ascending = |bins: &&Bins| bins.bins.first().is_none_or(|bin| !bin.is_nan()) && bins.bins.is_sorted();
        match self.histograms.iter().find(|bins| !is_ascending(bins)) {
            Some(bins) => Err(Error::Bins(bins.metric.clone())),
            None => Ok(()),
        }
    }
}

/// The bins of the timers whose name has a text in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bins {
    /// The text.
    pub metric: String,
    /// Upper bounds in ascending order, which are not in their bins; the last may be infinite. Without one there is no bin.
    #[serde(deserialize_with = "bounds")]
    pub bins: Vec<f64>,
}

/// Bounds as numbers, infinity also as Etsy's StatsD spells it.
fn bounds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Number(f64),
        Text(String),
    }
    let wrong = || D::Error::custom("no bound of a bin; write numbers, and inf for the last one");
    let bound = |written| match written {
        Written::Number(number) => Ok(number),
        Written::Text(text) if text == "inf" => Ok(f64::INFINITY),
        Written::Text(_) => Err(wrong()),
    };
    Vec::<Written>::deserialize(deserializer).map_err(|_| wrong())?.into_iter().map(bound).collect()
}

/// Whether idle series are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Left {
    /// As `delete_idle_stats` has it.
    #[default]
    Auto,
    /// They are left out.
    Out,
    /// They are shown, as empty.
    In,
}

impl Left {
    /// Whether they are left out, where `by_default` is said of all kinds.
    pub const fn is_left(self, by_default: bool) -> bool {
        match self {
            Self::Auto => by_default,
            Self::Out => true,
            Self::In => false,
        }
    }
}

impl Serialize for Left {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Out => serializer.serialize_bool(true),
            Self::In => serializer.serialize_bool(false),
        }
    }
}

impl<'de> Deserialize<'de> for Left {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Flag(bool),
            Text(String),
        }
        let wrong = "write true, false, or \"auto\" for what delete_idle_stats says";
        match Written::deserialize(deserializer).map_err(|_| D::Error::custom(wrong))? {
            Written::Flag(true) => Ok(Self::Out),
            Written::Flag(false) => Ok(Self::In),
            Written::Text(text) => match text.as_str() {
                "auto" => Ok(Self::Auto),
                // Variables and arguments are texts.
                "true" => Ok(Self::Out),
                "false" => Ok(Self::In),
                _ => Err(D::Error::custom(wrong)),
            },
        }
    }
}

/// What is wrong with the numbers.
#[derive(Debug, Clone, PartialEq)]
pub enum Error {
    /// A percentile that is none.
    Percentile(f64),
    /// The bins of this text are not in ascending order, or not all numbers.
    Bins(String),
}

impl Error {
    /// The key of the number.
    pub const fn key(&self) -> &'static str {
        match self {
            Self::Percentile(_) => "flush.percentiles",
            Self::Bins(_) => "flush.histograms",
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.key();
        match self {
            Self::Percentile(percent) => write!(f, "{key} = {percent}: write numbers from -100 to 100"),
            Self::Bins(metric) => write!(f, "{key}: the bins of {metric:?}: write numbers in ascending order"),
        }
    }
}

impl std::error::Error for Error {}
