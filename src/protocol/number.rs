//! Numbers of a line: `[+-]digits[.digits][e[+-]digits]`, finite, never `-0`.
//!
//! [`read`] takes what stands at the front of the bytes and handles what nearly every client sends, digits with at most
//! one dot, exactly and without a call; [`parse`] takes any spelling the rules allow and is what `read` falls back to.
//! [`read_whole`] is `read` for the most common of all, a few digits.

use crate::sample::Reason;

/// Whole numbers up to here are exact in an `f64`.
const EXACT_MAX: u64 = 1 << 53;

/// Powers of ten that are exact in an `f64`: a quotient or product of two exact numbers is correctly rounded.
const POWERS: [f64; 23] = [
    1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20,
    1e21, 1e22,
];

/// Reads the number at the front of `bytes`: its value and how many bytes it took. `None` when there is none, or when it
/// is one for [`parse`]: an exponent behind it, or more digits than are exact.
#[inline]
pub(super) fn read(bytes: &[u8]) -> Option<(f64, usize)> {
    let (negative, sign) = match bytes.first() {
        Some(b'-') => (true, 1),
        Some(b'+') => (false, 1),
        _ => (false, 0),
    };
    let (whole, mut at) = digits(bytes, sign, 0);
    let mut value = whole;
    let mut digit_count = at - sign;
    let mut scale = 0;
    if bytes.get(at) == Some(&b'.') {
        let dot = at;
        (value, at) = digits(bytes, dot + 1, whole);
        scale = at - dot - 1;
        digit_count += scale;
    }
    // Nineteen digits may not fit, and wrapped numbers must not pass for exact ones.
    if digit_count == 0 || digit_count > 18 || value > EXACT_MAX {
        return None;
    }
    let magnitude = if scale == 0 { value as f64 } else { value as f64 / POWERS[scale] };
    Some((if negative && value != 0 { -magnitude } else { magnitude }, at))
}

/// So many digits are exact in an `f64` whichever they are.
pub(super) const WHOLE_DIGITS: usize = 15;

/// Reads the digits at the front of `bytes`: their number, and how many they are. Beyond [`WHOLE_DIGITS`] the number may
/// be wrong, as it is where something follows that belongs to it.
#[inline]
pub(super) fn read_whole(bytes: &[u8]) -> (u64, usize) {
    digits(bytes, 0, 0)
}

/// Goes over the digits from `at` on and appends them to `number`, which wraps when there are too many.
#[inline]
fn digits(bytes: &[u8], mut at: usize, mut number: u64) -> (u64, usize) {
    while let Some(digit) = bytes.get(at).map(|byte| byte.wrapping_sub(b'0')).filter(|digit| *digit < 10) {
        number = number.wrapping_mul(10).wrapping_add(u64::from(digit));
        at += 1;
    }
    (number, at)
}

/// A whole field as a number. Blanks around it do not count.
///
/// # Errors
/// [`Reason::NonFinite`] for what is written or read as infinite or NaN, else [`Reason::BadValue`].
pub(super) fn parse(field: &[u8]) -> Result<f64, Reason> {
    let field = super::lines::trim_blanks(field);
    if let Some((value, length)) = read(field)
        && length == field.len()
    {
        return Ok(value);
    }
    if is_non_finite(field) {
        return Err(Reason::NonFinite);
    }
    if !super::grammar::is_number(field) {
        return Err(Reason::BadValue);
    }
    let value = str::from_utf8(field).ok().and_then(|text| text.parse::<f64>().ok()).ok_or(Reason::BadValue)?;
    match value {
        value if !value.is_finite() => Err(Reason::NonFinite),
        0.0 => Ok(0.0),
        value => Ok(value),
    }
}

/// A whole field as a sample rate in (0, 1].
///
/// # Errors
/// [`Reason::BadSampleRate`].
pub(super) fn parse_rate(field: &[u8]) -> Result<f64, Reason> {
    match parse(field) {
        Ok(rate) if rate > 0.0 && rate <= 1.0 => Ok(rate),
        Ok(_) | Err(_) => Err(Reason::BadSampleRate),
    }
}

/// A whole field of ASCII digits; what is beyond `u64` becomes its largest.
pub(super) fn parse_whole(field: &[u8]) -> Option<u64> {
    let add = |number: u64, byte: &u8| number.saturating_mul(10).saturating_add(u64::from(byte - b'0'));
    let all_digits = !field.is_empty() && field.iter().all(u8::is_ascii_digit);
    all_digits.then(|| field.iter().fold(0, add))
}

fn is_non_finite(field: &[u8]) -> bool {
    let word = field.strip_prefix(b"+").or_else(|| field.strip_prefix(b"-")).unwrap_or(field);
    [&b"nan"[..], b"inf", b"infinity"].iter().any(|name| word.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn reads_what_the_standard_library_reads(text in "[+-]?[0-9]{0,20}(\\.[0-9]{0,20})?") {
            if let Some((value, length)) = read(text.as_bytes()) {
                prop_assert_eq!(length, text.len());
                let expected: f64 = text.parse().unwrap();
                prop_assert_eq!(value.to_bits(), (expected + 0.0).to_bits());
            }
        }

        #[test]
        fn whole_numbers_are_those_of_the_longer_way(digits in "[0-9]{1,15}", after in "[|:\n]?") {
            let text = format!("{digits}{after}");
            let (number, length) = read_whole(text.as_bytes());
            prop_assert_eq!(Some((number as f64, length)), read(text.as_bytes()));
        }

        #[test]
        fn parses_what_is_printed(value in proptest::num::f64::NORMAL | proptest::num::f64::ZERO) {
            prop_assert_eq!(parse(value.to_string().as_bytes()), Ok(value));
            prop_assert_eq!(parse(format!("{value:e}").as_bytes()), Ok(value));
        }

        #[test]
        fn integers_take_the_short_way(value in -(1i64 << 53)..(1i64 << 53)) {
            let text = format!("{value}|c");
            prop_assert_eq!(read(text.as_bytes()), Some((value as f64, text.len() - 2)));
        }
    }

    #[test]
    fn spellings_are_told_apart() {
        for (text, value) in
            [("1", 1.0), ("5.", 5.0), (".5", 0.5), ("+4", 4.0), ("1e2", 100.0), ("2.5E-1", 0.25), (" 1\t", 1.0)]
        {
            assert_eq!(parse(text.as_bytes()), Ok(value), "{text}");
        }
        assert_eq!(parse(b"-0").map(f64::to_bits), Ok(0));
        assert_eq!(parse(b"-0e9").map(f64::to_bits), Ok(0));
        for text in ["", "+", ".", "1e", "--1", "+-1", "1,5", "1 5", "0x10", "1_000", "1f", "e5", "\u{661}"] {
            assert_eq!(parse(text.as_bytes()), Err(Reason::BadValue), "{text}");
        }
        for text in ["nan", "-Inf", "+INFINITY", "1e400", "-1e999"] {
            assert_eq!(parse(text.as_bytes()), Err(Reason::NonFinite), "{text}");
        }
    }
}
