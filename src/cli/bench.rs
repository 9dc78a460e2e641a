//! `tallyd bench`: a load of exact size at a steady pace, and with `--api` what the agent made of it.
//!
//! All packets are made before the clock starts and then sent again and again, of datagrams up to 64 by one call
//! (sendmmsg) and with `--segments` each many of them, so that the generator costs little beside what it measures. Each sender is a thread with a socket of its own: the kernel spreads sockets
//! over the workers of an agent. Counters carry the value 1, so their sum is a count of lines that the agent's tables
//! must agree with. Figures are the listener's: whoever else sends to it is counted as well.

mod api;
mod load;
mod pace;
mod popularity;
mod report;

use std::io::{self, Write};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use self::api::{Api, Figures, Reader};
use self::load::{Load, Message, Mix, SERIES_MAX};
use self::pace::{Sent, Share};
use self::popularity::{Exponent, Popularity};
use self::report::{Counted, Report};
use super::send::{self, PATIENCE, Sender, Target, Warning};
use super::{Code, Failure};
use crate::clock::Clock;
use crate::secret;
use crate::units::{Size, Time};

/// An agent publishes its counts once a second. Figures that rest for longer have arrived.
const QUIET: Duration = Duration::from_millis(1_500);

/// As clap ends for arguments that do not go together.
const USAGE: u8 = 2;

/// From one reading of the figures to the next.
const POLL: Duration = Duration::from_millis(100);

/// How long figures may take to rest, before the load and after it.
const SETTLE_MAX: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(20)];

/// Most segments of a message that every kernel takes.
const SEGMENTS_MAX: u64 = 64;

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// udp://HOST:PORT, tcp://HOST:PORT, unixgram:///PATH or unix:///PATH (packets with a length before them)
    #[arg(long, value_name = "URL", default_value = "udp://127.0.0.1:8125")]
    pub to: Target,
    /// Where the agent's API is, such as http://127.0.0.1:7000, to read back what it counted
    #[arg(long, value_name = "URL")]
    pub api: Option<Api>,
    /// File, or credential:NAME, whose first token may read there
    #[arg(long, value_name = "FILE", requires = "api")]
    pub token_file: Option<String>,
    /// Lines a second, of all senders together; 0 is as fast as possible. Datagrams that are due go by sendmmsg, up to 64 a
    /// call
    #[arg(long, value_name = "LINES", default_value_t = 100_000)]
    pub rate: u64,
    /// Ends after this time at the latest
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub time: Time,
    /// Ends after so many lines at the latest
    #[arg(long, value_name = "LINES", default_value_t = 1_000_000_000)]
    pub lines: u64,
    /// Sockets, each with a thread of its own
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1_024))]
    pub senders: u64,
    /// Different series, each sent equally often unless --zipf says otherwise
    #[arg(long, value_name = "COUNT", default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..=SERIES_MAX))]
    pub series: u64,
    /// Send series by a Zipf law, the one of rank r in proportion to r to the power of minus this
    #[arg(long, value_name = "EXPONENT")]
    pub zipf: Option<Exponent>,
    /// Shares of counters, timers, gauges and sets among the series
    #[arg(long, value_name = "TYPE=SHARE,...", default_value = "c=70,ms=20,g=8,s=2")]
    pub mix: Mix,
    /// Tags of each line
    #[arg(long, value_name = "COUNT", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=32))]
    pub tags: u64,
    /// Most bytes of lines in a packet; 1 is a line a packet
    #[arg(long, value_name = "SIZE", default_value = "1432")]
    pub packet: Size,
    /// Packets handed to the kernel as one, over UDP (UDP_SEGMENT); line ends fill them up to one size
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=SEGMENTS_MAX))]
    pub segments: u64,
    /// What the names of the series begin with
    #[arg(long, value_name = "NAME", default_value = "bench", value_parser = name)]
    pub name: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// A name that stays as it is on every way, to be found again in the scrape.
fn name(text: &str) -> Result<String, String> {
    let mut bytes = text.bytes();
    let begins = bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic());
    let goes_on = bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.');
    let is_own = !text.starts_with("tallyd") && !text.starts_with("process");
    let says = "write a letter, then letters, digits, `_` and `.`; not tallyd or process, which are the agent's own";
    if begins && goes_on && is_own { Ok(text.to_owned()) } else { Err(says.to_owned()) }
}

/// Sends the load and writes to `out` what was sent, and what was counted. Warnings go to `warnings`.
pub fn run(args: &Args, out: &mut impl Write, warnings: &mut impl Write) -> Result<(), Failure> {
    if args.segments > 1 && !matches!(args.to, Target::Udp(_)) {
        return Err(Failure::told(USAGE, format!("--segments {}: only UDP has them; leave it out", args.segments)));
    }
    let token = args.token_file.as_deref().map(secret::token).transpose().map_err(|error| {
        let file = args.token_file.as_deref().unwrap_or_default();
        Failure::told(error.exit_code(), format!("--token-file {file}: {error}"))
    })?;
    let reader = args.api.as_ref().map(|api| Reader::new(api, token.as_ref(), listener(&args.to), &args.name));
    let popularity = match args.zipf {
        Some(exponent) => Popularity::zipf(args.series, exponent),
        None => Popularity::even(args.series),
    };
    let load = Load {
        name: &args.name,
        series: args.series,
        popularity: &popularity,
        mix: &args.mix,
        tags: args.tags,
        bytes_max: args.packet.bytes(),
        segments: args.segments,
        target: &args.to,
    };
    let messages = load.messages().map_err(|error| send::broken(&args.to, &error))?;
    let connect = |_| Sender::connect(&args.to).and_then(|sender| sender.limit_writes(PATIENCE).map(|()| sender));
    let senders: io::Result<Vec<_>> = (0..args.senders).map(connect).collect();
    let senders = senders.map_err(|error| send::unreachable(&args.to, &error))?;
    let before = reader.as_ref().map(before).transpose().map_err(|error| unread(args, &error))?;
    let (sent, warning) = send_all(args, senders, &load, &messages).map_err(|error| send::broken(&args.to, &error))?;
    if let Some(warning) = warning {
        warning.tell(&args.to, warnings)?;
    }
    let read_back = reader.as_ref().zip(before);
    let counted = read_back.map(|(reader, before)| after(reader, &args.to, &before, sent)).transpose();
    let report = Report::new(&args.to, sent, counted.map_err(|error| unread(args, &error))?);
    if args.json {
        report.json(out)?
    } else {
        report.text(out)?
    }
    Ok(out.flush()?)
}

/// The listener's name in an agent's metrics.
const fn listener(target: &Target) -> &'static str {
    match target {
        Target::Udp(_) => "udp",
        Target::Tcp(_) => "tcp",
        Target::Unixgram(_) => "unixgram",
        Target::Unix(_) => "unix",
    }
}

fn unread(args: &Args, error: &io::Error) -> Failure {
    let api = args.api.as_ref().map(ToString::to_string).unwrap_or_default();
    Failure::told(Code::Unavailable, format!("--api {api}: {error}; name the API of a running agent"))
}

/// Lets all senders begin together, and waits until the other side has taken what streams carry.
fn send_all(
    args: &Args,
    senders: Vec<Sender>,
    load: &Load<'_>,
    messages: &[Message],
) -> io::Result<(Sent, Option<Warning>)> {
    let start = Barrier::new(senders.len());
    let one = |number: usize, mut sender: Sender| {
        let share = Share::new(number as u64, args.senders, args.rate, args.lines, args.time.0);
        let ring = messages.iter().cycle().skip(number * messages.len() / args.senders as usize);
        start.wait();
        let sent = pace::send(&mut sender, load, ring, share)?;
        Ok((sent, sender.finish()?))
    };
    thread::scope(|scope| {
        let one = &one;
        let threads: Vec<_> =
            senders.into_iter().enumerate().map(|(number, sender)| scope.spawn(move || one(number, sender))).collect();
        threads.into_iter().try_fold((Sent::default(), None), |(sum, warned), thread| {
            let ended = thread.join().unwrap_or_else(|_| Err(io::Error::other("a sender panicked")));
            ended.map(|(sent, warning)| (sum.and(sent), warned.or(warning)))
        })
    })
}

/// The figures before the load, when what others sent has been counted.
fn before(reader: &Reader<'_>) -> io::Result<Figures> {
    settle(reader, SETTLE_MAX[0], |_| false)
}

/// What the load added to the figures, when all of it has been counted or nothing comes any more.
fn after(reader: &Reader<'_>, target: &Target, before: &Figures, sent: Sent) -> io::Result<Counted> {
    let settled = settle(reader, SETTLE_MAX[1], |now| report::is_accounted(target, sent, &now.since(before)))?;
    // Its own metrics may be younger than the series on the same page, so the sums are those of the next one. Processor
    // time is the earlier page's: reading costs the agent some as well.
    let figures = Figures { cpu_seconds: settled.cpu_seconds, ..reader.read()? };
    Ok(Counted::new(target, sent, &figures.since(before)))
}

/// Reads the figures until they are as wanted, or rest, or have taken too long.
fn settle(reader: &Reader<'_>, time: Duration, wanted: impl Fn(&Figures) -> bool) -> io::Result<Figures> {
    let clock = Clock::default();
    let (mut last, mut changed) = (reader.read()?, clock.monotonic());
    while !wanted(&last) && clock.monotonic() < time && clock.monotonic() - changed < QUIET {
        thread::sleep(POLL);
        let now = reader.read()?;
        // Reading costs processor time and memory, which therefore never rest.
        if (Figures { cpu_seconds: last.cpu_seconds, resident_bytes: last.resident_bytes, ..now }) != last {
            changed = clock.monotonic();
        }
        last = now;
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Alone {
        #[command(flatten)]
        args: Args,
    }

    fn args(words: &[&str]) -> Args {
        Alone::try_parse_from([&["bench"], words].concat()).unwrap().args
    }

    fn bench(words: &[&str]) -> Result<(serde_json::Value, String), Failure> {
        let (mut out, mut warnings) = (Vec::new(), Vec::new());
        run(&args(&[&["--json"], words].concat()), &mut out, &mut warnings)?;
        Ok((serde_json::from_slice(&out).unwrap(), String::from_utf8(warnings).unwrap()))
    }

    #[test]
    fn exactly_so_many_lines_are_sent() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let to = format!("udp://{}", socket.local_addr().unwrap());
        let (report, warnings) =
            bench(&["--to", &to, "--lines", "101", "--senders", "3", "--packet", "200", "--rate", "0"]).unwrap();
        assert_eq!((report["lines"].as_u64(), warnings.as_str()), (Some(101), ""));
        let mut buffer = [0; 1 << 16];
        let (mut lines, mut bytes, mut counters) = (0, 0, 0);
        for _ in 0..report["packets"].as_u64().unwrap() {
            let length = socket.recv(&mut buffer).unwrap();
            let text = std::str::from_utf8(&buffer[..length]).unwrap();
            bytes += length;
            lines += text.lines().count();
            counters += text.lines().filter(|line| line.ends_with(":1|c")).count();
        }
        assert_eq!((lines, Some(bytes as u64)), (101, report["bytes"].as_u64()));
        assert_eq!(report["counters"].as_u64(), Some(counters as u64));
        assert!(report["agent"].is_null());
    }

    #[test]
    fn where_nobody_listens_is_a_warning_and_where_nothing_can_be_reached_a_failure() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = format!("udp://{}", socket.local_addr().unwrap());
        drop(socket);
        assert!(bench(&["--to", &to, "--lines", "9", "--packet", "1"]).unwrap().1.contains("refused"));
        let tcp = to.replace("udp", "tcp");
        assert_eq!(bench(&["--to", &tcp, "--lines", "9", "--segments", "2"]).unwrap_err().code(), 2);
        assert_eq!(bench(&["--to", &tcp, "--lines", "9"]).unwrap_err().code(), 69);
        let api = to.replace("udp", "http");
        let failure = bench(&["--to", &to, "--lines", "9", "--api", &api]).unwrap_err();
        assert!(failure.code() == 69 && failure.to_string().contains("--api http://127.0.0.1:"), "{failure}");
    }

    #[test]
    fn a_load_is_bounded_without_a_word() {
        let args = args(&[]);
        assert_eq!((args.time, args.lines, args.rate), (Time::secs(10), 1_000_000_000, 100_000));
        assert!(name("a.b_9").is_ok());
        for wrong in ["", "9a", "a-b", "tallyd.x", "processes"] {
            assert!(name(wrong).is_err(), "{wrong}");
        }
    }
}
