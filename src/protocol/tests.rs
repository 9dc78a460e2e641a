//! Laws of the parser: the fast path is the plain grammar, what is printed is read back, every line ends in one of the
//! sink's hands, and no line changes what its neighbours mean.

use proptest::prelude::*;

use super::*;
use crate::sample::{Identity, Kind, Value, WireType};

/// Writes down all that it is given.
#[derive(Debug, Default, PartialEq)]
struct Record {
    calls: Vec<String>,
    samples: usize,
    rejects: Vec<Reason>,
    lines: usize,
    /// Whether each line that ended had brought something.
    spoken: bool,
    silent_lines: usize,
}

impl Record {
    fn call(&mut self, what: &impl std::fmt::Debug) {
        self.calls.push(format!("{what:?}"));
        self.spoken = true;
    }
}

impl Sink for Record {
    fn sample(&mut self, sample: &Sample<'_>) {
        self.samples += 1;
        self.call(sample);
    }
    fn event(&mut self, event: &Event<'_>) {
        self.call(event);
    }
    fn service_check(&mut self, check: &ServiceCheck<'_>) {
        self.call(check);
    }
    fn reject(&mut self, reject: &Reject<'_>) {
        assert!(reject.column <= reject.bytes.len(), "{reject:?}");
        self.rejects.push(reject.reason);
        self.call(reject);
    }
    fn bad_tags(&mut self, count: u32) {
        self.call(&count);
    }
    fn line_end(&mut self) {
        self.lines += 1;
        self.silent_lines += usize::from(!std::mem::take(&mut self.spoken));
    }
}

fn parser(sign: GaugeSign) -> Parser {
    parser_with(sign, 4)
}

fn parser_with(sign: GaugeSign, values: usize) -> Parser {
    let limits = Limits { line: 120, values, set_member: 12, ..Limits::default() };
    Parser::new(&Config { gauge_sign: sign, ..Config::default() }, &limits)
}

fn read(bytes: &[u8]) -> Record {
    let mut record = Record::default();
    parser(GaugeSign::Relative).datagram(bytes, &mut record);
    record
}

/// Lines as clients send them, and nearly so.
fn line() -> impl Strategy<Value = String> {
    let name = "[a-z._/ \\[#;,=é]{0,8}([a-z.]{10,60})?";
    let number = "[+-]?[0-9]{0,20}(\\.[0-9]{0,3})?(e[0-9])?|nan|-0|[a-z]{1,14}";
    let value = format!("({number}|({number}):({number})|[0-9](:[0-9]){{0,5}})");
    let wire = "(c|g|ms|h|d|s|m|kv|C|x|mss|ms |)";
    let field = "(\\|@(0\\.[0-9]{1,3}|1|0|2|1e-7|)|\\|#[a-z:,|]{0,12}|\\|c:[a-z0-9]{0,4}|\\|e:[a-z]|\\|T[0-9]{0,4}|\\|card:low|\\||\\|:|:[0-9]\\|c| )";
    let line = format!("{name}:{value}\\|{wire}({field}){{0,4}}[ \t\r\0]{{0,1}}");
    proptest::string::string_regex(&line).unwrap()
}

fn other_line() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        "\\PC{0,20}",
        "_e\\{[0-9],[0-9]\\}:[a-z|]{0,12}",
        "_sc\\|[a-z]{0,2}\\|[0-4]\\|?[#mdh:a-z]{0,4}",
        "\\{\"name\":\"[a-z]?\",\"type\":\"(g|c|SET|x)\",\"value\":[0-9]{0,2}\\}",
        "\\[[\\[\\{\\}\\],1a]{0,5}",
    ]
}

fn datagram() -> impl Strategy<Value = Vec<u8>> {
    let lines = proptest::collection::vec(prop_oneof![4 => line(), 1 => other_line()], 0..6);
    let change = proptest::option::weighted(0.3, (any::<prop::sample::Index>(), any::<u8>()));
    (lines, change).prop_map(|(lines, change)| {
        let mut bytes = lines.join("\n").into_bytes();
        if let Some((at, byte)) = change.filter(|_| !bytes.is_empty()) {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes
    })
}

fn wire_letters(wire: WireType) -> &'static str {
    match wire {
        WireType::Plain(kind) => kind.letter(),
        WireType::KeyValue => "kv",
        WireType::AbsoluteCounter => "C",
    }
}

fn print(sample: &Sample<'_>) -> Vec<u8> {
    let Identity::Line { name, tags } = sample.identity else { panic!("no line") };
    let value = match sample.value {
        Value::Numbers(numbers) => numbers.iter().map(f64::to_string).collect::<Vec<_>>().join(":"),
        Value::Changes(numbers) => numbers.iter().map(|number| format!("{number:+}")).collect::<Vec<_>>().join(":"),
        Value::Member(member) => String::from_utf8(member.to_vec()).unwrap(),
    };
    let name = str::from_utf8(name).unwrap();
    let tags = str::from_utf8(tags).unwrap();
    let tags = if tags.is_empty() { String::new() } else { format!("|#{tags}") };
    let time = if sample.timestamp > 0 { format!("|T{}", sample.timestamp) } else { String::new() };
    format!("{name}:{value}|{}|@{}{tags}{time}", wire_letters(sample.wire), sample.rate).into_bytes()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]

    #[test]
    fn the_fast_path_is_the_plain_grammar(bytes in datagram(), relative in any::<bool>(), values in 0..5_usize) {
        let sign = if relative { GaugeSign::Relative } else { GaugeSign::Absolute };
        let (mut fast, mut plain) = (Record::default(), Record::default());
        parser_with(sign, values).datagram(&bytes, &mut fast);
        parser_with(sign, values).datagram_plainly(&bytes, &mut plain);
        prop_assert_eq!(fast, plain);
    }

    #[test]
    fn of_a_stream_too_the_fast_path_is_the_plain_grammar(mut bytes in datagram()) {
        // A line comes without its end, but a line feed further in is none.
        while bytes.pop_if(|last| *last == b'\n').is_some() {}
        let (mut fast, mut plain) = (Record::default(), Record::default());
        parser(GaugeSign::Relative).line(&bytes, 2, &mut fast);
        parser(GaugeSign::Relative).any_line(&bytes, 2, &mut plain);
        prop_assert_eq!(fast, plain);
    }

    #[test]
    fn every_line_is_accepted_or_rejected(bytes in datagram()) {
        let record = read(&bytes);
        prop_assert_eq!(record.silent_lines, 0, "{:?}", record);
        if !lines::may_be_document(&bytes) && !bytes.contains(&b'[') {
            let spoken = bytes.split(|byte| *byte == b'\n').filter(|line| !lines::trim(line).is_empty()).count();
            prop_assert_eq!(record.lines, spoken);
        }
    }

    #[test]
    fn a_line_means_the_same_among_others(lines in proptest::collection::vec(line(), 1..6)) {
        // As part of a datagram that is no document, and without the byte order mark that only the first line may have.
        let together = read(format!("a:1|c\n{}", lines.join("\n")).as_bytes());
        let alone = lines.iter().map(|line| {
            let mut record = Record::default();
            parser(GaugeSign::Relative).line(line.as_bytes(), 2, &mut record);
            (record.samples, record.rejects)
        });
        let (samples, rejects): (Vec<_>, Vec<_>) = alone.unzip();
        prop_assert_eq!(together.samples, samples.iter().sum::<usize>() + 1);
        prop_assert_eq!(together.rejects, rejects.concat());
    }

    #[test]
    fn what_is_printed_is_read_back(
        name in "[a-zA-Z0-9_.-]{1,30}",
        tags in "([a-z]{1,5}(:[a-z0-9:]{0,5})?(,[a-z]{1,3}){0,3})?",
        wire in prop::sample::select(Kind::ALL.map(WireType::Plain).into_iter()
            .chain([WireType::KeyValue, WireType::AbsoluteCounter]).collect::<Vec<_>>()),
        numbers in proptest::collection::vec(0.0..1e9_f64, 1..4),
        change in -1e9..1e9_f64,
        member in "[a-z:#@]{1,12}",
        rate in 1e-6..=1.0_f64,
        timestamp in 0..2_000_000_000_u64,
    ) {
        let change = [change + 0.0];
        let value = match wire {
            WireType::Plain(Kind::Set) => Value::Member(member.as_bytes()),
            WireType::Plain(Kind::Gauge) if numbers.len() == 1 => Value::Changes(&change),
            WireType::Plain(_) | WireType::KeyValue | WireType::AbsoluteCounter => Value::Numbers(&numbers),
        };
        let timestamp = if matches!(wire, WireType::Plain(Kind::Counter | Kind::Gauge)) { timestamp } else { 0 };
        let identity = Identity::Line { name: name.as_bytes(), tags: tags.as_bytes() };
        let sample = Sample { wire, identity, value, rate, timestamp, fields: b"" };
        let printed = print(&sample);
        let mut record = Record::default();
        Parser::new(&Config::default(), &Limits::default()).line(&printed, 1, &mut record);
        prop_assert_eq!(record.samples, 1, "{} {:?}", String::from_utf8_lossy(&printed), record);
        // The fields stand behind all else that is printed of a sample.
        let told = |text: &str| text.split(", fields:").next().unwrap().to_owned();
        prop_assert_eq!(told(&record.calls[0]), told(&format!("{sample:?}")));
    }

    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut record = Record::default();
        let mut parser = parser(GaugeSign::Relative);
        parser.datagram(&bytes, &mut record);
        parser.body(&bytes, &mut record);
        prop_assert_eq!(record.silent_lines, 0);
    }

    #[test]
    fn a_key_does_not_depend_on_the_order_of_its_tags(
        mut tags in proptest::collection::vec("[a-z]{1,3}(:[a-z]{0,3})?", 0..6),
    ) {
        let (config, limits) = (Config::default(), Limits::default());
        let key = |tags: &[String]| {
            let tags = tags.join(",");
            series_key(&Identity::Line { name: b"a", tags: tags.as_bytes() }, &config, &limits)
        };
        let before = key(&tags);
        tags.reverse();
        prop_assert_eq!(key(&tags), before);
    }
}

fn reasons(line: &str) -> Vec<Reason> {
    let mut record = Record::default();
    Parser::new(&Config::default(), &Limits::default()).line(line.as_bytes(), 1, &mut record);
    record.rejects
}

fn key_of(name: &str, tags: &str) -> Result<String, Reason> {
    let identity = Identity::Line { name: name.as_bytes(), tags: tags.as_bytes() };
    series_key(&identity, &Config::default(), &Limits::default()).map(|(key, _)| key.as_str().to_owned())
}

#[test]
fn past_a_limit_a_line_is_rejected_for_it() {
    let long = "a".repeat(600);
    assert_eq!(key_of(&long, ""), Err(Reason::NameTooLong));
    assert_eq!(key_of("a", &long), Err(Reason::TagTooLong));
    assert_eq!(key_of("a", &format!("k:{long}")), Err(Reason::TagTooLong));
    let many: Vec<String> = (0..33).map(|number| format!("t{number}")).collect();
    assert_eq!(key_of("a", &many.join(",")), Err(Reason::TooManyTags));
    let wide: Vec<String> = (0..30).map(|number| format!("t{number}:{}", "v".repeat(200))).collect();
    assert_eq!(key_of("a", &wide.join(",")), Err(Reason::NameTooLong));
    assert_eq!(reasons(&format!("a:{long}|s")), [Reason::MemberTooLong]);
    assert_eq!(reasons(&format!("a{}|c", ":1".repeat(1_025))), [Reason::TooManyValues]);
    assert_eq!(reasons(&format!("a{}|c", ":1".repeat(1_024))), []);
    assert_eq!(reasons("a:1|c|@1e-7"), [Reason::BadSampleRate]);
    assert_eq!(reasons("a:1|c|@0.0000001"), [Reason::BadSampleRate]);
    assert_eq!(reasons(&format!("a:1|c|#{}", "t,".repeat(4_100))), [Reason::LineTooLong]);
    let nested = |depth| {
        let (open, close) = ("[".repeat(depth), "]".repeat(depth));
        format!("{{\"name\":\"a\",\"type\":\"c\",\"value\":1,\"x\":{open}{close}}}")
    };
    assert_eq!(reasons(&nested(16)), [Reason::BadJson]);
    assert_eq!(reasons(&nested(15)), []);
}

#[test]
fn a_byte_that_is_not_ascii_is_seen_wherever_it_stands() {
    for length in 0..=100 {
        let mut bytes = vec![b'a'; length];
        assert!(is_ascii(&bytes), "{length}");
        for at in 0..length {
            bytes[at] = 0x80;
            assert!(!is_ascii(&bytes), "{at} of {length}");
            bytes[at] = b'a';
        }
    }
}

#[test]
fn a_bad_identity_is_said_once_a_line() {
    assert_eq!(reasons("$$$:1|c:2|c:x|g"), [Reason::EmptyName]);
    assert_eq!(reasons("$$$:x|c"), [Reason::EmptyName]);
    let long = "a".repeat(600);
    assert_eq!(reasons(&format!("{long}:1|c:x|g:2|c")), [Reason::BadValue, Reason::NameTooLong]);
    // One good sample is the sink's to look at: it knows the identity, or asks for its key.
    assert_eq!(reasons("$$$:1|c"), []);
    assert_eq!(key_of("$$$", ""), Err(Reason::EmptyName));
}

#[test]
fn too_many_records_are_not_begun() {
    let limits = Limits { samples: 2, ..Limits::default() };
    let record = "{\"name\":\"a\",\"type\":\"c\",\"value\":1}";
    let body = |text: String| {
        let mut found = Record::default();
        let body = Parser::new(&Config::default(), &limits).body(text.as_bytes(), &mut found);
        (body, found.samples)
    };
    assert_eq!(body(record.to_owned()), (Body::Object, 1));
    assert_eq!(body(format!("[{record},{record}]")), (Body::Array(2), 2));
    assert_eq!(body(format!("[{record},{record},{record}]")), (Body::TooMany(3), 0));
    assert_eq!(body(format!("{record}\n\n{record}\n")), (Body::Lines(2), 2));
    assert_eq!(body(format!("{record}\n{record}\n{record}")), (Body::TooMany(3), 0));
    assert_eq!(body("[]".to_owned()), (Body::Array(0), 0));
    assert_eq!(body("{}".to_owned()), (Body::Object, 0));
    assert_eq!(body("{".to_owned()), (Body::Invalid, 0));
}
