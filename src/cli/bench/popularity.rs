//! Which series a line is of: each in turn, or by a Zipf law, as names in the field are. A function of the line's number,
//! without a state: a packet can be made again, and the load is the same in every run.

use std::str::FromStr;

/// Steeper laws leave nothing but the first series.
const EXPONENT_MAX: f64 = 10.0;

/// The exponent of a Zipf law.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exponent(f64);

impl FromStr for Exponent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let exponent = text.parse().ok().filter(|exponent| *exponent > 0.0 && *exponent <= EXPONENT_MAX);
        exponent.map(Self).ok_or_else(|| format!("write a number above 0 and up to {EXPONENT_MAX}, such as 1.1"))
    }
}

/// How often each of some series is sent.
#[derive(Debug)]
pub(super) enum Popularity {
    /// Of so many series each once in a round.
    Even(u64),
    /// The sums of the weights of all series up to each: 8 bytes a series, 160 MB at most.
    Zipf(Box<[f64]>),
}

impl Popularity {
    /// Each equally often.
    pub(super) const fn even(series: u64) -> Self {
        Self::Even(series)
    }

    /// Series number `rank`, counted from 1, in proportion to `rank` to the power of minus the exponent.
    pub(super) fn zipf(series: u64, Exponent(exponent): Exponent) -> Self {
        let weight = |rank: u64| (rank as f64).powf(-exponent);
        let sums = (1..=series).scan(0.0, |sum, rank| {
            *sum += weight(rank);
            Some(*sum)
        });
        Self::Zipf(sums.collect())
    }

    /// The series of the line with this number, from 0 for the most popular one.
    pub(super) fn rank(&self, number: u64) -> u64 {
        match self {
            Self::Even(series) => number % series,
            Self::Zipf(sums) => {
                let total = sums.last().copied().unwrap_or_default();
                let at = unit(number) * total;
                // Rounding may carry it to the total itself.
                sums.partition_point(|sum| *sum <= at).min(sums.len() - 1) as u64
            }
        }
    }
}

/// A number from 0 up to 1 for a line: the output function of SplitMix64 (Steele, Lea and Flood, 2014).
fn unit(number: u64) -> f64 {
    let mut bits = number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^= bits >> 31;
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often each of so many series is chosen in so many lines.
    fn chosen(popularity: &Popularity, series: usize, lines: u64) -> Vec<u64> {
        let mut times = vec![0; series];
        (0..lines).for_each(|number| times[popularity.rank(number) as usize] += 1);
        times
    }

    #[test]
    fn each_in_turn_is_each_equally_often() {
        assert_eq!(chosen(&Popularity::even(7), 7, 70), [10; 7]);
    }

    /// Pearson's test: the sum of squares stays below what it exceeds once in a million draws. The draws never change.
    #[test]
    fn a_zipf_law_is_kept() {
        const LINES: u64 = 1_000_000;
        for exponent in ["0.5", "1", "1.1", "2"] {
            let law = exponent.parse().unwrap();
            let times = chosen(&Popularity::zipf(100, law), 100, LINES);
            let weights: Vec<f64> = (1..=100).map(|rank| f64::from(rank).powf(-law.0)).collect();
            let total: f64 = weights.iter().sum();
            let squares = times.iter().zip(weights).map(|(times, weight)| {
                let expected = LINES as f64 * weight / total;
                (*times as f64 - expected).powi(2) / expected
            });
            let squares: f64 = squares.sum();
            assert!(squares < 180.0, "{exponent}: {squares} with 99 degrees of freedom");
        }
    }

    #[test]
    fn one_series_has_all_and_the_steepest_law_ends_in_range() {
        assert_eq!(chosen(&Popularity::zipf(1, "1".parse().unwrap()), 1, 100), [100]);
        let times = chosen(&Popularity::zipf(3, "10".parse().unwrap()), 3, 10_000);
        assert!(times[0] > 9_900 && times.iter().sum::<u64>() == 10_000, "{times:?}");
        for wrong in ["0", "-1", "10.1", "nan", "inf", "x", ""] {
            assert!(wrong.parse::<Exponent>().is_err(), "{wrong}");
        }
    }
}
