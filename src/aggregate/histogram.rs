//! Exponential histograms.

use serde::{Deserialize, Serialize};

/// Weights by exponential bucket.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Histogram {
    weights: Vec<(f64, f64)>,
}

impl Histogram {
    /// Adds a value that stands for `weight` observations.
    pub fn record(&mut self, value: f64, weight: f64) {
        self.weights.push((value, weight));
    }

    /// Adds another's weights.
    pub fn merge(&mut self, other: &Self) {
        self.weights.extend_from_slice(&other.weights);
    }

    /// Whether nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty()
    }

    /// The value at the share `q` of the weight.
    pub fn quantile(&self, q: f64) -> Option<f64> {
        let mut sorted = self.weights.clone();
        sorted.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let rank = q * sorted.iter().map(|pair| pair.1).sum::<f64>();
        let mut below = 0.0;
        sorted
            .iter()
            .find(|pair| {
                below += pair.1;
                below >= rank
            })
            .map(|pair| pair.0)
    }
}
