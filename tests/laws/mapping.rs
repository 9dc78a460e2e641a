//! No mapping file brings its reader down, and a glob that is found is one that matches by the obvious reading.

use tallyd::mapping::{Mapping, MatchType, Metric};

/// Text is a mapping file; behind each NUL in it stands a name that is looked for.
pub fn mapping(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let (file, names) = text.split_once('\0').unwrap_or((text, "a.b.c"));
    let mapping = match Mapping::parse(file) {
        Ok(mapping) => mapping,
        Err(problems) => {
            assert!(!problems.is_empty());
            assert!(problems.iter().all(|problem| !problem.to_string().is_empty()));
            return;
        }
    };
    for name in names.split('\0') {
        for found in Metric::ALL.into_iter().filter_map(|metric| mapping.find(metric, name)) {
            let is_glob = found.rule.match_type == MatchType::Glob;
            assert!(!is_glob || matches(&found.rule.pattern, name), "{} and {name}", found.rule.pattern);
            // To fill in the captures must not fail either, whatever comes of it.
            let _filled = (found.name(), found.labels().count());
        }
    }
}

fn matches(glob: &str, name: &str) -> bool {
    let (globs, parts) = (glob.split('.'), name.split('.'));
    globs.clone().count() == parts.clone().count() && globs.zip(parts).all(|(glob, part)| glob == "*" || glob == part)
}
