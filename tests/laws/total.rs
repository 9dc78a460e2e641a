//! Of any bytes that claim to be an agent's total of a series, as a topic that others write may hold them, what is read is
//! of its kind, adds up with others and has figures.

use tallyd::aggregate::Aggregate;
use tallyd::sample::{Kind, SeriesKey};
use tallyd::store::journal::read_total;

/// What stands before the payload of a record: magic bytes and the version.
const BEGIN: [u8; 4] = [0xf7, b't', b'j', 1];

/// What a payload begins with: that it is a total, of the transaction 0.
const STAMP: [u8; 2] = [2, 0];

/// Bytes are what stands in a record behind its stamp: kind, key, times, figures. Answers whether they are a total.
pub fn total(bytes: &[u8]) -> bool {
    let record = record(bytes);
    let Some((_, kind, key, total)) = read_total(&record) else { return false };
    let key = SeriesKey::from_canonical(key);
    let _parts = (key.name(), key.tags().count());
    let mut sum = Aggregate::new(kind);
    let is_added = sum.merge(&total.aggregate, 0);
    // A gauge that was set and changed to beyond the floats alone is not.
    assert!(is_added || kind == Kind::Gauge, "{kind:?} has {:?}", total.aggregate);
    // Sums that do not stay finite are refused, and change nothing.
    let before = sum.clone();
    if !sum.merge(&total.aggregate, 0) {
        assert_eq!(sum, before);
    }
    let _figures = (sum.samples(), sum.memory(), sum.is_empty());
    match &sum {
        Aggregate::Observed(observed) => {
            for q in [0.0, 0.5, 1.0] {
                assert!(observed.quantile(q).is_none_or(|value| !value.is_nan()));
            }
        }
        Aggregate::Gauge(gauge) => assert!(gauge.value().is_finite()),
        Aggregate::Counter(_) | Aggregate::Set(_) | Aggregate::Meter(_) => {}
    }
    if let Some(mut rates) = total.rates {
        let parts = rates.parts();
        rates.add(&rates.clone(), parts.tick_ms);
        assert!(rates.at(u64::MAX).iter().all(|rate| rate.is_finite()));
    }
    true
}

/// A record whose header is right, whatever stands behind it.
fn record(bytes: &[u8]) -> Vec<u8> {
    let length = ((STAMP.len() + bytes.len()) as u32).to_le_bytes();
    let mut crc = crc32fast::Hasher::new();
    [&BEGIN[3..], &length, &STAMP, bytes].into_iter().for_each(|part| crc.update(part));
    [&BEGIN, &length[..], &crc.finalize().to_le_bytes(), &STAMP, bytes].concat()
}
