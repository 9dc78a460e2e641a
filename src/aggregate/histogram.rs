//! Exponential histograms: weights by bucket, each bucket's bounds in the ratio `base = 2^(2^-scale)`.
//!
//! The layout is OpenTelemetry's exponential histogram (Metrics Data Model, "ExponentialHistogram"): bucket `i` of the
//! positive range holds the values in `(base^i, base^(i+1)]`, the negative range the same of their magnitudes, and zero
//! has a bucket of its own. A Prometheus native histogram with `schema = scale` has the same buckets and calls bucket
//! `i` by its upper bound: `i + 1`.
//!
//! At scale 6 a value is known to 0.54 %. Past `limits.buckets` occupied buckets the scale falls by one and neighbours
//! join, which doubles the error; the bound counts both ranges and no gaps. Adding is all that merging is, so whole
//! weights (while their sums stay below 2^53) give the same histogram in any order, others the same up to rounding.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The scale of a histogram that was never halved: 64 buckets to each power of two.
pub const SCALE_MAX: i8 = 6;

/// The smallest scale: a bucket to 16 powers of two. Prometheus knows no smaller one, and all floats fit into
/// 264 buckets here, fewer than the smallest bound.
pub const SCALE_MIN: i8 = -4;

/// How many buckets a histogram has at most, unless told otherwise.
pub const BUCKETS_MAX: usize = 2_048;

/// What the bound on buckets may be set to; outside of it the nearer end counts.
const BUCKETS_MAX_RANGE: (usize, usize) = (320, 32_768);

/// Weights by bucket. It keeps nothing on the heap until something is recorded, and 8 bytes outside of it.
#[derive(Clone, Default)]
pub struct Histogram(Option<Box<Buckets>>);

impl Histogram {
    /// Adds a value that stands for `weight` observations, with the default bound. What is not finite, and a weight
    /// that is not above 0, adds nothing.
    pub fn record(&mut self, value: f64, weight: f64) {
        self.record_within(value, weight, BUCKETS_MAX);
    }

    /// [`Histogram::record`] with a bound on the buckets (`limits.buckets`), taken to be within 320 and 32,768.
    pub fn record_within(&mut self, value: f64, weight: f64, buckets_max: usize) {
        if !value.is_finite() || !is_weight(weight) {
            return;
        }
        let buckets = self.0.get_or_insert_default();
        if value == 0.0 {
            buckets.zero = plus(buckets.zero, weight);
            return;
        }
        let index = index_at(value.abs(), buckets.scale);
        buckets.add(Key::new(index, value < 0.0), weight);
        buckets.halve_to(buckets_max);
    }

    /// Adds another's weights, with the default bound; of two scales the smaller one stays.
    pub fn merge(&mut self, other: &Self) {
        self.merge_within(other, BUCKETS_MAX);
    }

    /// [`Histogram::merge`] with a bound on the buckets (`limits.buckets`), taken to be within 320 and 32,768.
    pub fn merge_within(&mut self, other: &Self, buckets_max: usize) {
        let Some(theirs) = other.0.as_deref() else { return };
        let Some(ours) = self.0.as_deref_mut() else {
            let mut copy = theirs.clone();
            copy.halve_to(buckets_max);
            self.0 = Some(Box::new(copy));
            return;
        };
        ours.zero = plus(ours.zero, theirs.zero);
        if theirs.scale < ours.scale {
            *ours = ours.at_scale(theirs.scale);
        }
        for (key, weight) in theirs.iter() {
            ours.add(key.coarser(theirs.scale - ours.scale), weight);
            ours.halve_to(buckets_max);
        }
    }

    /// Joins neighbouring buckets once, to save memory at twice the error. `false` at the smallest scale.
    pub fn halve(&mut self) -> bool {
        match self.0.as_deref_mut() {
            Some(buckets) if buckets.scale > SCALE_MIN => {
                *buckets = buckets.at_scale(buckets.scale - 1);
                true
            }
            Some(_) | None => false,
        }
    }

    /// Whether nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// The sum of the weights.
    pub fn count(&self) -> f64 {
        self.ascending().map(|(_, weight)| weight).sum()
    }

    /// The number of occupied buckets of both ranges: what the bound is about.
    pub fn occupied(&self) -> usize {
        self.0.as_ref().map_or(0, |buckets| buckets.weights.len())
    }

    /// The scale, [`SCALE_MIN`] ..= [`SCALE_MAX`].
    pub fn scale(&self) -> i8 {
        self.0.as_ref().map_or(SCALE_MAX, |buckets| buckets.scale)
    }

    /// How often the scale fell.
    pub fn halvings(&self) -> u32 {
        u32::from((SCALE_MAX - self.scale()).unsigned_abs())
    }

    /// The largest relative error of a value read from it: half of the bucket's width by its middle, 0.0054 at scale 6.
    pub fn error(&self) -> f64 {
        let base = base(self.scale());
        (base - 1.0) / (base + 1.0)
    }

    /// The weight of zeros.
    pub fn zero(&self) -> f64 {
        self.0.as_ref().map_or(0.0, |buckets| buckets.zero)
    }

    /// The buckets above zero: OpenTelemetry's index and weight, by ascending index.
    pub fn positive(&self) -> impl Iterator<Item = (i32, f64)> + '_ {
        self.keys().filter(|(key, _)| !key.is_negative()).map(|(key, weight)| (key.index(), weight))
    }

    /// The buckets below zero: OpenTelemetry's index of the magnitude and weight, by ascending index.
    pub fn negative(&self) -> impl Iterator<Item = (i32, f64)> + '_ {
        self.keys().rev().filter(|(key, _)| key.is_negative()).map(|(key, weight)| (key.index(), weight))
    }

    /// The reverse of [`Histogram::scale`], [`Histogram::zero`], [`Histogram::positive`] and [`Histogram::negative`],
    /// for a store that reads buckets back. They may come in any order, and repeated ones add up; more than 32,768 are
    /// joined as by [`Histogram::halve`]. The error names what cannot be part of a histogram.
    pub fn from_parts(
        scale: i8,
        zero: f64,
        positive: impl IntoIterator<Item = (i32, f64)>,
        negative: impl IntoIterator<Item = (i32, f64)>,
    ) -> Result<Self, Malformed> {
        let mut buckets = Buckets::new(scale, zero)?;
        let positive = positive.into_iter().map(|(index, weight)| (index, false, weight));
        let negative = negative.into_iter().map(|(index, weight)| (index, true, weight));
        for (index, is_negative, weight) in positive.chain(negative) {
            let key = Key::checked(index, is_negative, scale)?;
            buckets.add(key.coarser(scale - buckets.scale), checked_weight(weight)?);
            buckets.halve_to(BUCKETS_MAX_RANGE.1);
        }
        Ok(buckets.into())
    }

    /// The occupied buckets by ascending value: lower bound, upper bound, weight. A bound is the float nearest to the
    /// exact one. A positive bucket holds its upper bound, a negative one its lower bound; for zero both are 0.
    pub fn buckets(&self) -> impl Iterator<Item = (f64, f64, f64)> + '_ {
        let scale = self.scale();
        self.ascending().map(move |(place, weight)| {
            let (lower, upper) = place.map_or((0.0, 0.0), |key| key.bounds(scale));
            (lower, upper, weight)
        })
    }

    /// The value at the share `q` of the weight (nearest rank: the smallest value such that it and those below carry
    /// at least that share), within [`Histogram::error`]. `None` when empty or when `q` is NaN.
    ///
    /// Of the values in a bucket it is the one whose largest relative distance to the others is least: with the bounds
    /// l and u that is `2 l u / (l + u)`, and the distance `(u - l) / (u + l)` (Masson, Rim and Lee, DDSketch, VLDB
    /// 2019, lemma 2). Below 2e-322 floats themselves stand further apart than that.
    pub fn quantile(&self, q: f64) -> Option<f64> {
        if q.is_nan() {
            return None;
        }
        // Weights such as 1 / 0.3 do not add up exactly; a rank that they miss by rounding is reached.
        let rank = q.clamp(0.0, 1.0) * self.count() * (1.0 - 1e-12);
        let scale = self.scale();
        let mut below = 0.0;
        let mut last = None;
        for (place, weight) in self.ascending() {
            last = Some(place);
            below += weight;
            if below >= rank {
                break;
            }
        }
        last.map(|place| place.map_or(0.0, |key| key.middle(scale)))
    }

    /// The weight of the values up to a bound, for classic `le` buckets. The bucket in which the bound lies counts by
    /// the share of its width below the bound (linear interpolation), so at most that bucket's weight is misplaced.
    pub fn count_at_most(&self, bound: f64) -> f64 {
        let share = |lower: f64, upper: f64| {
            if bound >= upper { 1.0 } else { ((bound - lower) / (upper - lower)).max(0.0) }
        };
        self.buckets()
            .take_while(|(lower, _, _)| *lower <= bound)
            .map(|(lower, upper, weight)| weight * share(lower, upper))
            .sum()
    }

    /// How many bytes it holds on the heap.
    pub fn memory(&self) -> usize {
        self.0.as_ref().map_or(0, |buckets| {
            size_of::<Buckets>() + buckets.blocks.capacity() * size_of::<Block>() + buckets.weights.memory()
        })
    }

    fn keys(&self) -> impl DoubleEndedIterator<Item = (Key, f64)> + '_ {
        self.0.iter().flat_map(|buckets| buckets.iter())
    }

    /// Everything by ascending value; zero has no key.
    fn ascending(&self) -> impl Iterator<Item = (Option<Key>, f64)> + '_ {
        let some = |(key, weight)| (Some(key), weight);
        let negative = self.keys().take_while(|(key, _)| key.is_negative()).map(some);
        let positive = self.keys().filter(|(key, _)| !key.is_negative()).map(some);
        let zero = Some((None, self.zero())).filter(|(_, weight)| *weight > 0.0);
        negative.chain(zero).chain(positive)
    }
}

impl From<Buckets> for Histogram {
    fn from(buckets: Buckets) -> Self {
        let empty = buckets.zero == 0.0 && buckets.blocks.is_empty();
        Self((!empty).then(|| Box::new(buckets)))
    }
}

impl PartialEq for Histogram {
    fn eq(&self, other: &Self) -> bool {
        self.scale() == other.scale() && self.zero() == other.zero() && self.keys().eq(other.keys())
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Histogram(scale {}) ", self.scale())?;
        f.debug_list().entries(self.buckets()).finish()
    }
}

/// Why parts make no histogram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// A scale outside of [`SCALE_MIN`] ..= [`SCALE_MAX`].
    Scale,
    /// The index of a bucket in which no float lies, or indexes that do not ascend.
    Index,
    /// A weight that is not finite or not above zero.
    Weight,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scale => "histogram scale out of range",
            Self::Index => "histogram bucket out of range or order",
            Self::Weight => "histogram weight not above zero or not finite",
        })
    }
}

impl std::error::Error for Malformed {}

fn is_weight(weight: f64) -> bool {
    weight > 0.0 && weight.is_finite()
}

fn checked_weight(weight: f64) -> Result<f64, Malformed> {
    if is_weight(weight) { Ok(weight) } else { Err(Malformed::Weight) }
}

/// A sum of weights; it stops at the largest float.
fn plus(a: f64, b: f64) -> f64 {
    (a + b).min(f64::MAX)
}

/// The occupied buckets, in the order of their values.
///
/// Keys are grouped in blocks of 64. A block has a bit for each occupied bucket, and the weights stand side by side in
/// the order of the keys, so a bucket costs its weight alone, one byte while that is a whole number up to 255, and a
/// block 12 bytes. Looking one up is a search among a few blocks and a count of bits.
#[derive(Clone)]
struct Buckets {
    blocks: Vec<Block>,
    weights: Weights,
    zero: f64,
    scale: i8,
}

impl Default for Buckets {
    fn default() -> Self {
        Self { blocks: Vec::new(), weights: Weights::default(), zero: 0.0, scale: SCALE_MAX }
    }
}

impl Buckets {
    fn new(scale: i8, zero: f64) -> Result<Self, Malformed> {
        if !(SCALE_MIN..=SCALE_MAX).contains(&scale) {
            return Err(Malformed::Scale);
        }
        if zero != 0.0 {
            checked_weight(zero)?;
        }
        Ok(Self { zero, scale, ..Self::default() })
    }

    fn add(&mut self, key: Key, weight: f64) {
        let (number, bit) = key.place();
        let at = self.blocks.partition_point(|block| block.number < number);
        if self.blocks.get(at).is_none_or(|block| block.number != number) {
            let start = self.blocks.get(at).map_or(self.weights.len() as u16, |next| next.start);
            insert_tight(&mut self.blocks, at, Block { number, start, occupied: [0; 2] });
        }
        let block = &mut self.blocks[at];
        let place = block.start_of(bit);
        if block.occupied() & bit != 0 {
            self.weights.add(place, weight);
            return;
        }
        block.occupy(bit);
        self.weights.insert(place, weight);
        for later in &mut self.blocks[at + 1..] {
            later.start += 1;
        }
    }

    fn iter(&self) -> impl DoubleEndedIterator<Item = (Key, f64)> + '_ {
        self.blocks.iter().flat_map(move |block| {
            block.bits().map(move |bit| {
                let key = Key((i32::from(block.number) << 6) | bit as i32);
                (key, self.weights.get(block.start_of(1 << bit)))
            })
        })
    }

    /// The same weights at a scale that is smaller or equal.
    fn at_scale(&self, scale: i8) -> Self {
        let mut coarse = Self { zero: self.zero, scale, ..Self::default() };
        for (key, weight) in self.iter() {
            coarse.add(key.coarser(self.scale - scale), weight);
        }
        coarse
    }

    /// Halves the scale until there are no more buckets than that.
    fn halve_to(&mut self, buckets_max: usize) {
        let buckets_max = buckets_max.clamp(BUCKETS_MAX_RANGE.0, BUCKETS_MAX_RANGE.1);
        while self.weights.len() > buckets_max && self.scale > SCALE_MIN {
            *self = self.at_scale(self.scale - 1);
        }
    }
}

/// 64 neighbouring buckets.
#[derive(Clone, Copy)]
struct Block {
    /// The upper bits of their keys.
    number: i16,
    /// How many buckets are occupied in the blocks before.
    start: u16,
    /// A bit for each occupied bucket; two halves, so that a block takes 12 bytes and not 16.
    occupied: [u32; 2],
}

impl Block {
    fn occupied(&self) -> u64 {
        u64::from(self.occupied[0]) | u64::from(self.occupied[1]) << 32
    }

    fn occupy(&mut self, bit: u64) {
        let occupied = self.occupied() | bit;
        self.occupied = [occupied as u32, (occupied >> 32) as u32];
    }

    /// Where the weight of the bucket with this bit stands, or would.
    fn start_of(&self, bit: u64) -> usize {
        usize::from(self.start) + (self.occupied() & (bit - 1)).count_ones() as usize
    }

    fn bits(&self) -> Bits {
        Bits(self.occupied())
    }
}

/// The numbers of the bits that are set.
struct Bits(u64);

impl Iterator for Bits {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let bit = (self.0 != 0).then(|| self.0.trailing_zeros())?;
        self.0 &= self.0 - 1;
        Some(bit)
    }
}

impl DoubleEndedIterator for Bits {
    fn next_back(&mut self) -> Option<u32> {
        let bit = (self.0 != 0).then(|| 63 - self.0.leading_zeros())?;
        self.0 &= !(1 << bit);
        Some(bit)
    }
}

/// Weights in the narrowest form that holds them all exactly.
#[derive(Clone)]
enum Weights {
    U8(Vec<u8>),
    U16(Vec<u16>),
    U32(Vec<u32>),
    F64(Vec<f64>),
}

impl Default for Weights {
    fn default() -> Self {
        Self::U8(Vec::new())
    }
}

impl Weights {
    fn len(&self) -> usize {
        match self {
            Self::U8(weights) => weights.len(),
            Self::U16(weights) => weights.len(),
            Self::U32(weights) => weights.len(),
            Self::F64(weights) => weights.len(),
        }
    }

    fn memory(&self) -> usize {
        match self {
            Self::U8(weights) => weights.capacity(),
            Self::U16(weights) => weights.capacity() * 2,
            Self::U32(weights) => weights.capacity() * 4,
            Self::F64(weights) => weights.capacity() * 8,
        }
    }

    fn get(&self, at: usize) -> f64 {
        match self {
            Self::U8(weights) => weights[at].into(),
            Self::U16(weights) => weights[at].into(),
            Self::U32(weights) => weights[at].into(),
            Self::F64(weights) => weights[at],
        }
    }

    fn add(&mut self, at: usize, weight: f64) {
        let sum = plus(self.get(at), weight);
        self.widen_for(sum);
        match self {
            Self::U8(weights) => weights[at] = sum as u8,
            Self::U16(weights) => weights[at] = sum as u16,
            Self::U32(weights) => weights[at] = sum as u32,
            Self::F64(weights) => weights[at] = sum,
        }
    }

    fn insert(&mut self, at: usize, weight: f64) {
        self.widen_for(weight);
        match self {
            Self::U8(weights) => insert_tight(weights, at, weight as u8),
            Self::U16(weights) => insert_tight(weights, at, weight as u16),
            Self::U32(weights) => insert_tight(weights, at, weight as u32),
            Self::F64(weights) => insert_tight(weights, at, weight),
        }
    }

    fn widen_for(&mut self, weight: f64) {
        while !self.holds(weight) {
            *self = match self {
                Self::U8(weights) => Self::U16(weights.iter().map(|&weight| weight.into()).collect()),
                Self::U16(weights) => Self::U32(weights.iter().map(|&weight| weight.into()).collect()),
                Self::U32(weights) => Self::F64(weights.iter().map(|&weight| weight.into()).collect()),
                Self::F64(_) => return,
            };
        }
    }

    fn holds(&self, weight: f64) -> bool {
        let most = match self {
            Self::U8(_) => u8::MAX.into(),
            Self::U16(_) => u16::MAX.into(),
            Self::U32(_) => u32::MAX.into(),
            Self::F64(_) => return true,
        };
        weight <= most && weight.fract() == 0.0
    }
}

/// Inserts with little room to spare: a series' buckets come at first and seldom later, and there are many series.
fn insert_tight<T>(items: &mut Vec<T>, at: usize, item: T) {
    if items.len() == items.capacity() {
        items.reserve_exact(1 + items.len() / 8);
    }
    items.insert(at, item);
}

/// A bucket as a number that ascends with its values, at whatever scale: an index of the positive range is moved above
/// zero, one of the negative range likewise and then inverted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Key(i32);

/// What makes every index positive: the smallest is -68,737, that of 2^-1074 at scale 6.
const KEY_OFFSET: i32 = 1_075 * 64;

impl Key {
    const MIN: i32 = !(INDEX_RANGE.1 + KEY_OFFSET);

    fn new(index: i32, negative: bool) -> Self {
        let key = index + KEY_OFFSET;
        Self(if negative { !key } else { key })
    }

    fn checked(index: i32, negative: bool, scale: i8) -> Result<Self, Malformed> {
        let shift = SCALE_MAX - scale;
        let range = (INDEX_RANGE.0 >> shift)..=(INDEX_RANGE.1 >> shift);
        if range.contains(&index) { Ok(Self::new(index, negative)) } else { Err(Malformed::Index) }
    }

    fn is_negative(self) -> bool {
        self.0 < 0
    }

    fn index(self) -> i32 {
        (if self.is_negative() { !self.0 } else { self.0 }) - KEY_OFFSET
    }

    /// The number of its block and its bit in it.
    fn place(self) -> (i16, u64) {
        ((self.0 >> 6) as i16, 1 << (self.0 & 63))
    }

    /// The bucket that holds it when the scale falls by so much.
    fn coarser(self, halvings: i8) -> Self {
        Self::new(self.index() >> halvings, self.is_negative())
    }

    fn bounds(self, scale: i8) -> (f64, f64) {
        let bound = |index: i32| {
            let (fraction, exponent) = power(index, scale);
            scaled(fraction, exponent).min(f64::MAX)
        };
        let (inner, outer) = (bound(self.index()), bound(self.index() + 1));
        if self.is_negative() { (-outer, -inner) } else { (inner, outer) }
    }

    fn middle(self, scale: i8) -> f64 {
        let (fraction, exponent) = power(self.index(), scale);
        let base = base(scale);
        let middle = scaled(fraction * (2.0 * base / (1.0 + base)), exponent);
        if self.is_negative() { -middle } else { middle }
    }
}

/// The ratio of a bucket's bounds.
fn base(scale: i8) -> f64 {
    (-f64::from(scale)).exp2().exp2()
}

/// The indexes at scale 6 of the smallest float above zero and of the largest.
const INDEX_RANGE: (i32, i32) = (-1_074 * 64 - 1, 1_023 * 64 + 63);

/// The fraction bits of 2^(j/64), each the float nearest to it, as Prometheus' own table has them.
#[rustfmt::skip]
const FRACTIONS: [u64; 64] = [
    0x0_0000_0000_0000, 0x0_2c9a_3e77_8061, 0x0_59b0_d315_8574, 0x0_8745_1875_9bc8,
    0x0_b558_6cf9_890f, 0x0_e3ec_32d3_d1a2, 0x1_1301_d012_5b51, 0x1_429a_aea9_2de0,
    0x1_72b8_3c7d_517b, 0x1_a35b_eb6f_cb75, 0x1_d487_3168_b9aa, 0x2_063b_8862_8cd6,
    0x2_387a_6e75_6238, 0x2_6b45_65e2_7cdd, 0x2_9e9d_f51f_dee1, 0x2_d285_a6e4_030b,
    0x3_06fe_0a31_b715, 0x3_3c08_b264_16ff, 0x3_71a7_373a_a9cb, 0x3_a7db_34e5_9ff7,
    0x3_dea6_4c12_3422, 0x4_160a_21f7_2e2a, 0x4_4e08_6061_892d, 0x4_86a2_b5c1_3cd0,
    0x4_bfda_d536_2a27, 0x4_f9b2_769d_2ca7, 0x5_342b_569d_4f82, 0x5_6f47_36b5_27da,
    0x5_ab07_dd48_5429, 0x5_e76f_15ad_2148, 0x6_247e_b03a_5585, 0x6_6238_8255_2225,
    0x6_a09e_667f_3bcd, 0x6_dfb2_3c65_1a2f, 0x7_1f75_e8ec_5f74, 0x7_5feb_5642_67c9,
    0x7_a114_73eb_0187, 0x7_e2f3_36cf_4e62, 0x8_2589_994c_ce13, 0x8_68d9_9b44_92ed,
    0x8_ace5_422a_a0db, 0x8_f1ae_9915_7736, 0x9_3737_b0cd_c5e5, 0x9_7d82_9fde_4e50,
    0x9_c491_82a3_f090, 0xa_0c66_7b5d_e565, 0xa_5503_b23e_255d, 0xa_9e6b_5579_fdbf,
    0xa_e89f_995a_d3ad, 0xb_33a2_b84f_15fb, 0xb_7f76_f2fb_5e47, 0xb_cc1e_904b_c1d2,
    0xc_199b_dd85_529c, 0xc_67f1_2e57_d14b, 0xc_b720_dcef_9069, 0xd_072d_4a07_897c,
    0xd_5818_dcfb_a487, 0xd_a9e6_03db_3285, 0xd_fc97_337b_9b5f, 0xe_502e_e78b_3ff6,
    0xe_a4af_a2a4_90da, 0xe_fa1b_ee61_5a27, 0xf_5076_5b6e_4540, 0xf_a7c1_819e_90d8,
];

/// How many of [`FRACTIONS`] lie below the smallest fraction with these upper six bits.
const BELOW: [u8; 64] = {
    let mut below = [0; 64];
    let mut upper = 1;
    while upper < 64 {
        let mut count = below[upper - 1];
        while (count as usize) < 64 && FRACTIONS[count as usize] < (upper as u64) << 46 {
            count += 1;
        }
        below[upper] = count;
        upper += 1;
    }
    below
};

/// The index of the bucket of a finite value above zero, as OpenTelemetry counts them, at a scale of ours.
pub fn index_at(value: f64, scale: i8) -> i32 {
    index_of(value) >> (SCALE_MAX - scale)
}

/// The index at scale 6 of a finite value above zero: `ceil(64 log2(value)) - 1`, from its bits. A value that equals
/// a bound (the float nearest to it) lies below that bound, as in OpenTelemetry and Prometheus.
fn index_of(value: f64) -> i32 {
    let bits = value.to_bits();
    let (exponent, fraction) = match bits >> 52 {
        0 => {
            // Subnormal: no implied one, so its first bit takes that place.
            let shift = bits.leading_zeros() - 11;
            (-1_022 - shift as i32, bits << shift)
        }
        biased => (biased as i32 - 1_023, bits),
    };
    let fraction = fraction & ((1 << 52) - 1);
    let mut below = usize::from(BELOW[(fraction >> 46) as usize]);
    while below < 64 && FRACTIONS[below] < fraction {
        below += 1;
    }
    exponent * 64 + below as i32 - 1
}

/// `base^index` as a fraction in [1, 2) and a power of two.
fn power(index: i32, scale: i8) -> (f64, i32) {
    let index = index << (SCALE_MAX - scale);
    (f64::from_bits(1_023 << 52 | FRACTIONS[(index & 63) as usize]), index >> 6)
}

/// `fraction * 2^exponent`, rounded once: into subnormals and to 0 below, to infinity above.
fn scaled(fraction: f64, exponent: i32) -> f64 {
    let power = |exponent: i32| f64::from_bits(((exponent + 1_023) as u64) << 52);
    match exponent {
        ..-2_044 => 0.0,
        -2_044..-1_022 => fraction * power(-1_022) * power(exponent + 1_022),
        -1_022..=1_023 => fraction * power(exponent),
        1_024.. => f64::INFINITY,
    }
}

/// The form of a histogram in the journal and in batches: the first bucket's distance from the smallest key, then each
/// one's from its neighbour, with its weight.
#[derive(Serialize, Deserialize)]
enum Encoded {
    Empty,
    Whole { scale: i8, zero: u64, buckets: Vec<(u32, u64)> },
    Real { scale: i8, zero: f64, buckets: Vec<(u32, f64)> },
}

impl Serialize for Histogram {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Encoded::from(self).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Histogram {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Encoded::deserialize(deserializer)?.decode().map_err(serde::de::Error::custom)
    }
}

impl From<&Histogram> for Encoded {
    fn from(histogram: &Histogram) -> Self {
        let Some(buckets) = histogram.0.as_deref() else { return Self::Empty };
        let whole = |weight: f64| weight.fract() == 0.0 && weight < 9_007_199_254_740_992.0;
        let mut before = Key::MIN - 1;
        let gaps = buckets.iter().map(|(key, weight)| {
            let gap = key.0.abs_diff(before);
            before = key.0;
            (gap, weight)
        });
        let (scale, zero) = (buckets.scale, buckets.zero);
        if whole(zero) && buckets.iter().all(|(_, weight)| whole(weight)) {
            Self::Whole { scale, zero: zero as u64, buckets: gaps.map(|(gap, weight)| (gap, weight as u64)).collect() }
        } else {
            Self::Real { scale, zero, buckets: gaps.collect() }
        }
    }
}

impl Encoded {
    fn decode(self) -> Result<Histogram, Malformed> {
        match self {
            Self::Empty => Ok(Histogram::default()),
            Self::Whole { scale, zero, buckets } => {
                decode(scale, zero as f64, buckets.into_iter().map(|(gap, weight)| (gap, weight as f64)))
            }
            Self::Real { scale, zero, buckets } => decode(scale, zero, buckets.into_iter()),
        }
    }
}

fn decode(scale: i8, zero: f64, gaps: impl Iterator<Item = (u32, f64)>) -> Result<Histogram, Malformed> {
    let mut buckets = Buckets::new(scale, zero)?;
    let mut key = Key::MIN - 1;
    for (gap, weight) in gaps {
        if gap == 0 || buckets.weights.len() > BUCKETS_MAX_RANGE.1 {
            return Err(Malformed::Index);
        }
        key = key.checked_add_unsigned(gap).ok_or(Malformed::Index)?;
        let place = Key::checked(Key(key).index(), key < 0, scale)?;
        buckets.add(place, checked_weight(weight)?);
    }
    Ok(buckets.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Readings over the whole range of floats, with the plain ones most often; weights whole, so that sums are exact.
    fn reading() -> impl Strategy<Value = (f64, f64)> {
        let value = prop_oneof![
            4 => (0..100_000_u32).prop_map(|n| f64::from(n) / 64.0),
            2 => (-1_000..1_000_i32).prop_map(f64::from),
            2 => any::<f64>().prop_filter("finite", |value| value.is_finite()),
            1 => (1..10_000_u64, any::<bool>()).prop_map(|(bits, up)| if up { f64::from_bits(bits) } else { -f64::from_bits(bits) }),
            1 => Just(0.0),
        ];
        (value, prop_oneof![8 => 1..300_u32, 1 => 1..=u32::MAX].prop_map(f64::from))
    }

    fn readings() -> impl Strategy<Value = Vec<(f64, f64)>> {
        prop::collection::vec(reading(), 1..900)
    }

    /// The bound at which the laws are checked: small enough that most of the inputs above pass it.
    const FEW: usize = 320;

    fn record(readings: &[(f64, f64)], buckets_max: usize) -> Histogram {
        let mut histogram = Histogram::default();
        for (value, weight) in readings {
            histogram.record_within(*value, *weight, buckets_max);
        }
        histogram
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn merging_parts_in_any_order_is_recording_all(readings in readings(), seed in any::<u64>()) {
            let whole = record(&readings, FEW);
            let mut parts = vec![Histogram::default(); 5];
            let mut random = seed;
            for (value, weight) in &readings {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                parts[(random >> 33) as usize % 5].record_within(*value, *weight, FEW);
            }
            let forward = parts.iter().fold(Histogram::default(), |mut sum, part| {
                sum.merge_within(part, FEW);
                sum
            });
            let mut backward = parts[4].clone();
            backward.merge_within(&parts[3], FEW);
            let mut rest = parts[2].clone();
            rest.merge_within(&parts[0], FEW);
            rest.merge_within(&parts[1], FEW);
            rest.merge_within(&backward, FEW);
            prop_assert_eq!(&forward, &whole);
            prop_assert_eq!(&rest, &whole);
            prop_assert!(whole.occupied() <= FEW);
        }

        #[test]
        fn the_count_is_the_sum_of_the_weights(readings in readings()) {
            let histogram = record(&readings, FEW);
            prop_assert_eq!(histogram.count(), readings.iter().map(|reading| reading.1).sum::<f64>());
            prop_assert_eq!(histogram.count_at_most(f64::INFINITY), histogram.count());
            prop_assert_eq!(histogram.is_empty(), readings.is_empty());
        }

        #[test]
        fn a_quantile_is_near_the_sample_of_that_rank(
            readings in readings(),
            rate in 0.01..1.0_f64,
            q in prop_oneof![0.0..=1.0_f64, Just(0.0), Just(0.5), Just(1.0)],
            buckets_max in prop_oneof![Just(FEW), Just(BUCKETS_MAX)],
        ) {
            let mut sorted: Vec<_> = readings.iter().map(|(value, weight)| (*value, weight / rate)).collect();
            let histogram = record(&sorted, buckets_max);
            let error = histogram.error() * (1.0 + 1e-9);
            prop_assert!(histogram.halvings() > 0 || error < 0.005_42);
            prop_assert!(histogram.halvings() == 0 || buckets_max == FEW);
            sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
            let total: f64 = sorted.iter().map(|reading| reading.1).sum();
            let ranked = |rank: f64| {
                let mut below = 0.0;
                let found = sorted.iter().find(|(_, weight)| {
                    below += weight;
                    below >= rank
                });
                found.or(sorted.last()).map_or(f64::NAN, |(value, _)| *value)
            };
            // Sums of such weights depend on their order by rounding; so may the rank.
            let exact = (ranked(q * total * (1.0 - 1e-9)), ranked(q * total * (1.0 + 1e-9)));
            let answer = histogram.quantile(q).unwrap();
            let grain = f64::from_bits(1);
            let near = |value: f64, sign: f64| value + sign * (value.abs() * error + grain);
            prop_assert!(near(exact.0, -1.0) <= answer && answer <= near(exact.1, 1.0), "{answer} is not near {exact:?}");
        }

        #[test]
        fn halving_commutes_with_merging(a in readings(), b in readings()) {
            let (mut a, mut b) = (record(&a, FEW), record(&b, FEW));
            let mut late = a.clone();
            late.merge_within(&b, FEW);
            let halved = late.halve();
            let scale = late.scale();
            while a.scale() > scale && a.halve() {}
            while b.scale() > scale && b.halve() {}
            a.merge_within(&b, FEW);
            prop_assert!(halved);
            prop_assert_eq!(a, late);
        }

        #[test]
        fn a_histogram_is_read_from_what_it_wrote(readings in readings(), rate in prop_oneof![Just(1.0), 0.1..1.0_f64]) {
            let sampled: Vec<_> = readings.iter().map(|(value, weight)| (*value, weight / rate)).collect();
            let histogram = record(&sampled, FEW);
            let bytes = postcard::to_stdvec(&histogram).unwrap();
            prop_assert_eq!(&postcard::from_bytes::<Histogram>(&bytes).unwrap(), &histogram);
            let (scale, zero) = (histogram.scale(), histogram.zero());
            let again = Histogram::from_parts(scale, zero, histogram.positive(), histogram.negative());
            prop_assert_eq!(&again.unwrap(), &histogram);
            let ascends = |indexes: Vec<i32>| indexes.is_sorted_by(|a, b| a < b);
            prop_assert!(ascends(histogram.positive().map(|bucket| bucket.0).collect()));
            prop_assert!(ascends(histogram.negative().map(|bucket| bucket.0).collect()));
        }

        #[test]
        fn spoilt_bytes_are_refused_or_a_histogram(
            readings in prop::collection::vec(reading(), 0..40),
            spoilt in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            noise in prop::collection::vec(any::<u8>(), 0..60),
        ) {
            let mut bytes = postcard::to_stdvec(&record(&readings, FEW)).unwrap();
            for (at, byte) in spoilt {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            for bytes in [bytes, noise] {
                if let Ok(mut histogram) = postcard::from_bytes::<Histogram>(&bytes) {
                    histogram.record(1.5, 2.0);
                    histogram.merge(&histogram.clone());
                    prop_assert!(histogram.count() >= 4.0);
                    prop_assert!(histogram.quantile(0.5).is_some());
                }
            }
        }

        #[test]
        fn the_index_names_the_bucket_that_holds_the_value(bits in 1..f64::INFINITY.to_bits(), scale in SCALE_MIN..=SCALE_MAX) {
            let value = f64::from_bits(bits);
            let key = Key::new(index_of(value) >> (SCALE_MAX - scale), false);
            let (lower, upper) = key.bounds(scale);
            prop_assert!(value <= upper && (lower < value || !value.is_normal() && lower == value));
            prop_assert_eq!(Key::checked(key.index(), false, scale), Ok(key));
            let off = value.log2() * 64.0 - f64::from(index_of(value)) - 0.5;
            prop_assert!(off.abs() <= 0.5 + 1e-9);
        }

        #[test]
        fn a_cumulative_count_misplaces_at_most_one_bucket(readings in readings(), bound in reading()) {
            let histogram = record(&readings, FEW);
            let bound = bound.0;
            let exact: f64 = readings.iter().filter(|reading| reading.0 <= bound).map(|reading| reading.1).sum();
            let cut: f64 = histogram.buckets().filter(|b| b.0 <= bound && bound <= b.1).map(|b| b.2).sum();
            prop_assert!((histogram.count_at_most(bound) - exact).abs() <= cut * (1.0 + 1e-9));
            prop_assert!(histogram.count_at_most(bound.next_down()) <= histogram.count_at_most(bound));
        }
    }

    #[test]
    fn the_bounds_are_the_powers() {
        for (j, fraction) in FRACTIONS.into_iter().enumerate() {
            let bound = f64::from_bits(1_023 << 52 | fraction);
            let power = (j as f64 / 64.0).exp2();
            assert!((bound - power).abs() <= f64::EPSILON, "{j}: {bound} is not {power}");
        }
    }

    #[test]
    fn a_bound_belongs_to_the_bucket_below_it() {
        for exponent in -1_022..=1_023 {
            for j in 0..64 {
                let index = exponent * 64 + j;
                let (fraction, exponent) = power(index, SCALE_MAX);
                let bound = scaled(fraction, exponent);
                assert_eq!(index_of(bound), index - 1);
                assert_eq!(index_of(bound.next_up()), index);
                assert_eq!(index_of(bound.next_down()), index - 1);
            }
        }
        for exponent in 0..52 {
            assert_eq!(index_of(f64::from_bits(1 << exponent)), (exponent - 1_074) * 64 - 1);
        }
        assert_eq!((index_of(f64::from_bits(1)), index_of(f64::MAX)), INDEX_RANGE);
    }

    #[test]
    fn it_has_opentelemetrys_indexes() {
        // From the data model: at scale 0 the bucket 0 is (1, 2], at scale 3 base^8 is 2.
        let at_scale = |value: f64, scale: i8| index_of(value) >> (SCALE_MAX - scale);
        assert_eq!((at_scale(1.0, 0), at_scale(1.5, 0), at_scale(2.0, 0), at_scale(2.1, 0)), (-1, 0, 0, 1));
        assert_eq!((at_scale(2.0, 3), at_scale(4.0, 3), at_scale(4.1, 3)), (7, 15, 16));
    }

    #[test]
    fn what_is_no_number_adds_nothing() {
        let mut histogram = Histogram::default();
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            histogram.record(value, 1.0);
            histogram.record(1.0, value);
        }
        histogram.record(1.0, 0.0);
        histogram.record(1.0, -1.0);
        assert!(histogram.is_empty());
        assert_eq!((histogram.quantile(0.5), histogram.memory()), (None, 0));
        histogram.record(1.0, f64::MAX);
        histogram.record(1.0, f64::MAX);
        assert_eq!(histogram.positive().collect::<Vec<_>>(), [(-1, f64::MAX)]);
        assert_eq!(histogram.quantile(f64::NAN), None);
    }

    #[test]
    fn parts_that_cannot_be_are_refused() {
        let parts = |scale, zero, bucket| Histogram::from_parts(scale, zero, [bucket], []);
        assert_eq!(parts(7, 0.0, (0, 1.0)), Err(Malformed::Scale));
        assert_eq!(parts(-5, 0.0, (0, 1.0)), Err(Malformed::Scale));
        assert_eq!(parts(6, -1.0, (0, 1.0)), Err(Malformed::Weight));
        assert_eq!(parts(6, f64::NAN, (0, 1.0)), Err(Malformed::Weight));
        assert_eq!(parts(6, 0.0, (0, 0.0)), Err(Malformed::Weight));
        assert_eq!(parts(6, 0.0, (65_536, 1.0)), Err(Malformed::Index));
        assert_eq!(parts(-4, 0.0, (64, 1.0)), Err(Malformed::Index));
        assert!(parts(-4, 0.0, (63, 1.0)).is_ok());
        assert_eq!(Histogram::from_parts(2, 0.0, [], []), Ok(Histogram::default()));
        let all =
            Histogram::from_parts(6, 1.0, (-68_737..=65_535).map(|i| (i, 1.0)), (-9..9).map(|i| (i, 1.0))).unwrap();
        assert!(all.occupied() <= BUCKETS_MAX_RANGE.1);
        assert_eq!(all.count(), 134_292.0);
    }

    #[test]
    fn every_float_fits_into_the_smallest_bound() {
        let mut histogram = Histogram::default();
        for exponent in 1..2_047_u64 {
            histogram.record_within(f64::from_bits(exponent << 52 | 1), 1.0, 0);
            histogram.record_within(-f64::from_bits(exponent << 52 | 1), 1.0, 0);
        }
        histogram.record_within(f64::from_bits(1), 1.0, 0);
        histogram.record_within(f64::MAX, 1.0, 0);
        assert_eq!((histogram.scale(), histogram.halvings(), histogram.count()), (SCALE_MIN, 10, 4_094.0));
        assert!(histogram.occupied() <= BUCKETS_MAX_RANGE.0);
        assert!(!histogram.halve());
    }

    #[test]
    fn a_bucket_costs_little() {
        assert_eq!(size_of::<Histogram>(), 8);
        // A timer's life: 300 observations about 20 ms, in some hundred buckets over four powers of two.
        let mut histogram = Histogram::default();
        let mut random = 1_u64;
        let mut grown = Vec::new();
        for _ in 0..300 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            histogram.record(20.0 * (2.0 * (random >> 11) as f64 / (1_u64 << 53) as f64 - 1.0).exp2().powi(2), 1.0);
            grown.push((histogram.occupied(), histogram.memory()));
        }
        let (occupied, memory) = grown[299];
        assert!(occupied > 100, "{occupied}");
        assert!(memory <= 72 + 3 * occupied, "{memory} bytes for {occupied} buckets");
    }
}
