//! No configuration brings the reader down, and one that is accepted is read back from what is printed of it.

use tallyd::config::{Config, Loaded, Sources};

/// Text is a file; what stands behind a NUL in it is a variable, `NAME=value`, when it begins with `$`, else a `--set`.
pub fn config(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let mut parts = text.split('\0');
    let file = parts.next().unwrap_or_default();
    let (variables, set): (Vec<_>, Vec<_>) = parts.partition(|part| part.starts_with('$'));
    let pair = |part: &str| part[1..].split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    let environment: Vec<_> = variables.into_iter().filter_map(pair).collect();
    let set: Vec<_> = set.into_iter().map(str::to_owned).collect();
    let sources = Sources { file: Some(("file.toml", file)), environment: &environment, set: &set };
    match Config::load(&sources) {
        Ok(loaded) => is_read_back(&loaded),
        Err(problems) => {
            assert!(!problems.is_empty());
            assert!(problems.iter().all(|problem| !problem.to_string().is_empty()));
        }
    }
}

fn is_read_back(loaded: &Loaded) {
    let (written, printed) = (loaded.config.to_toml(), loaded.print());
    let again = load(&printed);
    assert_eq!(values(&again.print()), values(&printed));
    // Texts are compared, since a number may be none. Passwords are printed as stars; what is written has them.
    if again.config.to_toml() != written {
        assert!(printed.contains("***"));
        assert_eq!(load(&written).config.to_toml(), written);
    }
}

fn load(file: &str) -> Loaded {
    let sources = Sources { file: Some(("printed.toml", file)), ..Sources::default() };
    Config::load(&sources).unwrap_or_else(|problems| panic!("{file}\n{problems:?}"))
}

/// The printed lines without the origins behind them.
fn values(printed: &str) -> Vec<&str> {
    printed.lines().map(|line| line.rsplit_once("  # ").map_or(line, |(value, _)| value)).collect()
}
