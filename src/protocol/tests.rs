//! The parser's limits, one by one. Its laws stand in `tests/properties.rs`.

use super::*;
use crate::sample::Identity;

/// Counts samples and keeps the reasons of rejects.
#[derive(Debug, Default)]
struct Record {
    samples: usize,
    rejects: Vec<Reason>,
}

impl Sink for Record {
    fn sample(&mut self, _sample: &Sample<'_>) {
        self.samples += 1;
    }
    fn event(&mut self, _event: &Event<'_>) {}
    fn service_check(&mut self, _check: &ServiceCheck<'_>) {}
    fn reject(&mut self, reject: &Reject<'_>) {
        self.rejects.push(reject.reason);
    }
    fn bad_tags(&mut self, _count: u32) {}
    fn line_end(&mut self) {}
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
    // Found by fuzz/json: a separator is white space, but not one that lines are trimmed of.
    assert_eq!(body(format!("{record}\n{record}\n\u{1e}")), (Body::TooMany(3), 0));
    assert_eq!(body("[]".to_owned()), (Body::Array(0), 0));
    assert_eq!(body("{}".to_owned()), (Body::Object, 0));
    assert_eq!(body("{".to_owned()), (Body::Invalid, 0));
    let lines = |text: String| {
        let mut found = Record::default();
        let body = Parser::new(&Config::default(), &limits).body_of_lines(text.as_bytes(), &mut found);
        (body, found.samples)
    };
    assert_eq!(lines(format!("\u{feff}{record}\n\nx\n")), (Body::Lines(2), 1));
    assert_eq!(lines(format!("{record}\nx\n{record}")), (Body::TooMany(3), 0));
    assert_eq!(lines(format!("[\n{record},\n{record},\n{record}]")), (Body::TooMany(3), 0));
    assert_eq!(lines("\n\r\n".to_owned()), (Body::Invalid, 0));
}

#[test]
fn bytes_are_printed_so_that_a_person_can_read_them() {
    assert_eq!(printable(b"{\"a\":'b'}"), "{\"a\":'b'}");
    assert_eq!(printable(b"\\\t\xff\n\x1b[0m"), "\\\\\\t\\xff\\n\\x1b[0m");
}
