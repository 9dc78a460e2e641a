//! The rules, by example and by law.

use proptest::prelude::*;

use super::*;

fn mapping(text: &str) -> Mapping {
    Mapping::parse(text).unwrap_or_else(|problems| panic!("{}", problems[0]))
}

/// Name and labels that a counter of this name gets.
fn shown(mapping: &Mapping, name: &str) -> Option<String> {
    let found = mapping.find(Metric::Counter, name)?;
    let labels: Vec<String> = found.labels().map(|(label, value)| format!("{label}={value}")).collect();
    Some([vec![found.name()], labels].concat().join(";"))
}

#[test]
fn globs_come_before_regexes_and_regexes_in_their_order() {
    let mapping = mapping(
        "mappings:\n- {match: 'oo', match_type: regex, name: hit}\n- {match: 'f(.*)', match_type: regex, name: '${1}'}\n\
         - {match: foo.*, name: glob}\n- {match: ., match_type: regex, name: all, action: drop}\n",
    );
    assert_eq!(shown(&mapping, "foo.bar").as_deref(), Some("glob"));
    assert_eq!(shown(&mapping, "foo.bar.baz").as_deref(), Some("hit"));
    assert_eq!(shown(&mapping, "fan").as_deref(), Some("an"));
    assert_eq!(shown(&mapping, "x").as_deref(), Some("all"));
    assert_eq!(shown(&mapping, ""), None);
    assert!(mapping.drops(Kind::Set, "x") && !mapping.drops(Kind::Set, "fan"));
}

#[test]
fn a_regex_of_another_metric_type_is_passed_over() {
    let mapping = mapping(
        "mappings:\n- {match: a, match_type: regex, match_metric_type: gauge, name: g}\n- {match: a, match_type: regex, name: any}\n",
    );
    let name = |kind| mapping.find(Metric::of(kind), "xax").map(|found| found.name());
    assert_eq!(name(Kind::Set).as_deref(), Some("g"));
    assert_eq!(name(Kind::Meter).as_deref(), Some("any"));
}

#[test]
fn a_rule_has_what_defaults_say_where_it_says_nothing() {
    let mapping = mapping(
        "defaults:\n  observer_type: histogram\n  ttl: 1m\n  histogram_options: {buckets: [1, 2]}\n\
         \x20 summary_options: {quantiles: [{quantile: 0.5}]}\n\
         mappings:\n- {match: a, name: a}\n- {match: b, name: b, observer_type: summary, ttl: 5s}\n\
         - {match: c, name: c, histogram_options: {buckets: [3]}}\n",
    );
    let [a, b, c] = mapping.rules() else { panic!() };
    assert_eq!(a.style, *mapping.defaults());
    assert_eq!((b.style.observer_type, b.style.ttl), (Some(ObserverType::Summary), Duration::from_secs(5)));
    assert_eq!(b.style.quantiles, Some(vec![0.5]));
    assert_eq!(c.style.buckets, Some(vec![3.0]));
}

#[test]
fn rules_that_never_match_are_noted() {
    let mapping = mapping(
        "mappings:\n- {match: 'a.*', name: a}\n- {match: a.b, name: b}\n- {match: '*.b', name: c}\n\
         - {match: 'x.y', name: d, match_metric_type: gauge}\n- {match: 'x.y', name: e}\n",
    );
    let notes: Vec<String> = mapping.notes().iter().map(|note| format!("{} {note}", note.at.line)).collect();
    assert_eq!(notes, ["3 mappings[1].match: never matches: the rule on line 2 comes first"]);
}

#[test]
fn go_regexes_mean_what_they_mean_in_go() {
    for (go, ours) in [
        (r"\d+\.(\w*)", r"[0-9]+\.([0-9A-Za-z_]*)"),
        (r"[\d.]", "[[0-9].]"),
        ("[a[b&&c]", r"[a\[b\&\&c]"),
        ("[]x]", r"[\]x]"),
        ("[^]x]", r"[^\]x]"),
        ("[[:alpha:]_]", "[[:alpha:]_]"),
        ("[-a]--[a-]", r"[\-a]--[a-]"),
        (r"\Qa.b\E.", r"a\.b."),
        (r"\bx\\", r"(?-u:\b)x\\"),
    ] {
        assert_eq!(translated(go), ours);
        Regex::new(ours).unwrap();
    }
    let mapping = mapping("mappings:\n- {match: '^(\\w+)$', match_type: regex, name: word}\n");
    assert_eq!(shown(&mapping, "abc").as_deref(), Some("word"));
    assert_eq!(shown(&mapping, "añb"), None, "Go's \\w is ASCII");
}

#[test]
fn a_regex_that_is_none_is_told_with_its_place() {
    let problems = Mapping::parse("mappings:\n- match_type: regex\n  match: 'a['\n  name: n\n").unwrap_err();
    assert_eq!(problems[0].to_string(), "mappings[0].match: no regex: \"a[\": unclosed character class");
    assert_eq!((problems[0].at.line, problems[0].at.column), (3, 10));
    let huge = "mappings:\n- {match_type: regex, match: '(\\pL{1000}){1000}', name: n}\n";
    assert!(matches!(Mapping::parse(huge).unwrap_err()[0].fault, Fault::Regex(_)));
}

#[test]
fn ten_thousand_rules_are_read_and_found() {
    let mut text = "mappings:\n".to_owned();
    for rule in 0..10_000 {
        text.push_str(&format!("- {{match: app.s{rule}.*, name: 's{rule}', labels: {{x: $1}}}}\n"));
    }
    assert_eq!(shown(&mapping(&text), "app.s9999.v").as_deref(), Some("s9999;x=v"));
}

proptest! {
    #[test]
    fn whatever_the_file_and_the_name_there_is_an_answer(text in "(mappings:\n)?(- match: ['*a.]{0,5}\n|  name: [$1a{}]{0,4}\n|  [a-z_]{0,9}: .{0,5}\n){0,6}", name in ".{0,12}") {
        if let Ok(mapping) = Mapping::parse(&text) {
            shown(&mapping, &name);
        }
    }
}
