//! How a person writes a configuration value: `10s`, `64MiB`. Names no other part, and every part may name it.

use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A length of time: a number and a unit, as in `1s`, `250ms`, `1h 30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub Duration);

impl Time {
    /// Whole seconds.
    pub const fn secs(secs: u64) -> Self {
        Self(Duration::from_secs(secs))
    }

    /// Whole milliseconds.
    pub const fn millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// In milliseconds, rounded down.
    pub const fn as_millis(self) -> u64 {
        self.0.as_millis() as u64
    }
}

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text).map(Self).map_err(|error| format!("{error}; write a duration such as \"10s\""))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // humantime writes `1day`; what is printed here is what an operator would have typed.
        humantime::format_duration(self.0).fmt(f)
    }
}

/// A number of bytes: `512`, `64KiB`, `8MiB`, `4GiB`, or with the decimal units `kB`, `MB`, `GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// Units of [`Size`], the one that is printed before the one that is only read.
const SIZE_UNITS: [(&str, u64); 8] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("", 1),
];

impl Size {
    /// So many bytes, as the machine counts them.
    pub const fn bytes(self) -> usize {
        self.0 as usize
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let factor =
            SIZE_UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit.trim())).map(|(_, factor)| factor);
        let size = number.parse::<u64>().ok().zip(factor).and_then(|(number, factor)| number.checked_mul(*factor));
        size.map(Self).ok_or_else(|| format!("{text:?} is no size; write one such as \"64MiB\""))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = SIZE_UNITS.iter().find(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor));
        let (unit, factor) = whole.copied().unwrap_or(("B", 1));
        write!(f, "{}{unit}", self.0 / factor)
    }
}

/// Where a listener is to be, and whether it speaks TLS there: `127.0.0.1:8125`, `tls://[::]:8126`. Configurations hold it
/// as text; this is the one place that reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ListenAddress {
    /// The address, with its port.
    pub address: SocketAddr,
    /// Whether what is said there is said in TLS.
    pub tls: bool,
}

/// What stands before an address where TLS is spoken.
const TLS: &str = "tls://";

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (bare, tls) = text.strip_prefix(TLS).map_or((text, false), |bare| (bare, true));
        let wrong =
            |_| format!("{text:?} is no address with a port; write one such as \"127.0.0.1:8125\" or \"[::1]:8125\"");
        bare.parse().map(|address| Self { address, tls }).map_err(wrong)
    }
}

impl ListenAddress {
    /// How a socket speaks that somebody else opened at an address: as the configured one with its port does. Where there is
    /// none, it speaks TLS if all that are configured do; if other machines reach it, if any does, so that nobody's words
    /// cross the network by an oversight.
    pub fn of_unit(address: SocketAddr, configured: &[String]) -> Self {
        let configured: Vec<Self> = configured.iter().filter_map(|text| text.parse().ok()).collect();
        let same = configured.iter().find(|at| at.address.port() == address.port());
        let any = configured.iter().any(|at| at.tls);
        let is_public = !Self { address, tls: false }.is_local();
        let otherwise = || any && (is_public || configured.iter().all(|at| at.tls));
        Self { address, tls: same.map_or_else(otherwise, |at| at.tls) }
    }

    /// Whether only this machine reaches it.
    pub fn is_local(self) -> bool {
        self.address.ip().to_canonical().is_loopback()
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.tls { TLS } else { "" }, self.address)
    }
}

/// A user or a group, by name or by number; whether there is one only the host knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Account(pub String);

impl FromStr for Account {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The permissions of a file, as chmod writes them: `0660`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode(pub u32);

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let mode =
            u32::from_str_radix(text, 8).ok().filter(|mode| digits && *mode <= 0o777 && (3..=4).contains(&text.len()));
        mode.map(Self).ok_or_else(|| format!("{text:?} are no permissions; write some such as \"0660\""))
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

macro_rules! as_text {
    ($($unit:ty, $reader:ident, $expected:literal;)*) => {$(
        impl Serialize for $unit {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $unit {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any($reader)
            }
        }

        struct $reader;

        impl Visitor<'_> for $reader {
            type Value = $unit;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($expected)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<$unit, E> {
                text.parse().map_err(E::custom)
            }

            // What the text form would say of the bare number: a size is in bytes, a duration lacks its unit.
            fn visit_u64<E: Error>(self, number: u64) -> Result<$unit, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<$unit, E> {
                self.visit_str(&number.to_string())
            }
        }
    )*};
}

as_text! {
    Time, ReadTime, "a duration such as \"10s\"";
    Size, ReadSize, "a size such as \"64MiB\"";
    Mode, ReadMode, "permissions such as \"0660\"";
    Account, ReadAccount, "a name or a number such as \"www-data\" or 33";
}

/// For a number of bytes that a hot path reads: `#[serde(with = "units::size")]` writes and reads it as a [`Size`].
pub mod size {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Size;

    /// As `8KiB`.
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
    pub fn serialize<S: Serializer>(bytes: &usize, serializer: S) -> Result<S::Ok, S::Error> {
        Size(*bytes as u64).serialize(serializer)
    }

    /// From `8KiB` or a bare number of bytes.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
        Size::deserialize(deserializer).map(Size::bytes)
    }
}

/// `text` as it may be shown: the password of a URL in it, if there is one, is replaced by `***`.
pub fn without_password(text: &str) -> Cow<'_, str> {
    let Some((scheme, rest)) = text.split_once("://") else { return Cow::Borrowed(text) };
    // In the URL of a unix socket it is an argument, and what follows may belong to it.
    if let Some((before, _)) = text.split_once("pass=").filter(|(before, _)| before.ends_with(['?', '&'])) {
        return Cow::Owned(format!("{before}pass=***"));
    }
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    // A password may hold a raw `/`, which ends the authority too early: the last `@` of all decides then.
    let end = authority.rfind('@').or_else(|| rest.rfind('@'));
    let Some((user, _)) = end.and_then(|end| rest[..end].split_once(':')) else { return Cow::Borrowed(text) };
    Cow::Owned(format!("{scheme}://{user}:***{}", end.map_or("", |end| &rest[end..])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_read_as_they_are_printed() {
        for text in ["0B", "1B", "512B", "64KiB", "8MiB", "4GiB", "1500B"] {
            assert_eq!(text.parse::<Size>().map(|size| size.to_string()), Ok(text.to_owned()));
        }
        for text in ["1s", "250ms", "1h 30m"] {
            assert_eq!(text.parse::<Time>().map(|time| time.to_string()), Ok(text.to_owned()));
        }
        assert_eq!("1 MB".parse(), Ok(Size(1_000_000)));
        assert!("-1".parse::<Size>().is_err());
        assert!("99999999999GiB".parse::<Size>().is_err());
        assert!("10".parse::<Time>().is_err());
        assert_eq!("0660".parse(), Ok(Mode(0o660)));
        assert_eq!(Mode(0o60).to_string().parse(), Ok(Mode(0o60)));
        for text in ["0888", "rw-", "1777", "", "6", "+660"] {
            assert!(text.parse::<Mode>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_address_says_whether_it_speaks_tls() {
        for (text, tls) in [("127.0.0.1:8125", false), ("tls://127.0.0.1:8125", true), ("tls://[::]:0", true)] {
            let read: ListenAddress = text.parse().unwrap();
            assert_eq!((read.tls, read.to_string()), (tls, text.to_owned()));
        }
        for text in ["", "tls://", "tls://tls://127.0.0.1:1", "TLS://127.0.0.1:1", "https://127.0.0.1:1", "localhost:1"]
        {
            assert!(text.parse::<ListenAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_socket_of_a_unit_speaks_as_the_configured_address_of_its_port() {
        let tls = |address: &str, configured: &[&str]| {
            let configured: Vec<_> = configured.iter().map(|text| (*text).to_owned()).collect();
            ListenAddress::of_unit(address.parse().unwrap(), &configured).tls
        };
        for at in ["0.0.0.0:7443", "127.0.0.1:7443", "[::1]:7443"] {
            assert!(tls(at, &["127.0.0.1:1", "tls://[::]:7443"]) && tls(at, &["tls://[::]:1"]), "{at}");
            assert!(!tls(at, &["tls://[::]:1", "[::]:7443"]) && !tls(at, &["[::]:1"]) && !tls(at, &[]), "{at}");
        }
        assert!(
            tls("0.0.0.0:7443", &["tls://[::]:1", "[::]:2"]) && !tls("127.0.0.1:7443", &["tls://[::]:1", "[::]:2"])
        );
    }

    #[test]
    fn an_account_is_a_name_or_a_number() {
        #[derive(Debug, Deserialize)]
        struct List {
            all: Vec<Account>,
        }
        let list: List = toml::from_str("all = [1000, 'www-data']").unwrap();
        assert_eq!(list.all, [Account("1000".to_owned()), Account("www-data".to_owned())]);
        assert!(toml::from_str::<List>("all = [1.5]").unwrap_err().message().contains("www-data"));
    }

    #[test]
    fn a_bare_number_is_a_size_but_no_time() {
        #[derive(Debug, Deserialize)]
        struct Both {
            size: Option<Size>,
            time: Option<Time>,
        }
        let both: Both = toml::from_str("size = 4096\ntime = '10s'").unwrap();
        assert_eq!((both.size, both.time), (Some(Size(4096)), Some(Time::secs(10))));
        assert!(toml::from_str::<Both>("time = 10").unwrap_err().message().contains("\"10s\""));
        assert!(toml::from_str::<Both>("size = -1").unwrap_err().message().contains("\"64MiB\""));
    }

    #[test]
    fn a_password_is_never_shown() {
        for (url, shown) in [
            ("redis://127.0.0.1:6379", "redis://127.0.0.1:6379"),
            ("redis://user@host/1", "redis://user@host/1"),
            ("redis://user:secret@host:6379/1", "redis://user:***@host:6379/1"),
            ("redis://:s@e:c@host", "redis://:***@host"),
            ("redis://:se/cret@host", "redis://:***@host"),
            ("unix:///run/redis.sock?user=u&pass=a&db=1", "unix:///run/redis.sock?user=u&pass=***"),
            ("no url: a@b", "no url: a@b"),
        ] {
            assert_eq!(without_password(url), shown);
        }
    }
}
