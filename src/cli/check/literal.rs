//! A literal of JavaScript, read and never evaluated: objects, lists, texts, numbers, `true`, `false`, `null`,
//! `undefined`, with comments, as configurations of the original are written. Pure.
//!
//! Every member and value has its place, since whoever converts a file must be told where. What would have to be evaluated
//! (`process.env.PORT`, `require(...)`, `'a' + b`) is an error that says so. Readers of JSON5 know neither places nor
//! expressions, and `undefined` not at all.
//!
//! Bounds: [`SIZE_MAX`], [`DEPTH_MAX`].

use std::fmt;

/// Bytes of a file.
pub(super) const SIZE_MAX: usize = 1 << 20;

/// Objects and lists inside each other.
const DEPTH_MAX: usize = 32;

/// A place in a file; both count from 1, the column in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// A value and its place.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub(super) at: Place,
    pub(super) value: Value,
}

/// What stands somewhere.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Undefined,
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Node>),
    Object(Vec<Member>),
}

impl Value {
    /// What JavaScript takes for false.
    pub(super) fn is_falsy(&self) -> bool {
        match self {
            Self::Undefined | Self::Null => true,
            Self::Bool(is) => !is,
            Self::Number(number) => *number == 0.0 || number.is_nan(),
            Self::Text(text) => text.is_empty(),
            Self::List(_) | Self::Object(_) => false,
        }
    }

    /// The text, if it is one.
    pub(super) fn text(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    /// The number, if it is one or is written as one.
    pub(super) fn number(&self) -> Option<f64> {
        if let Self::Number(number) = self { Some(*number) } else { self.text()?.trim().parse().ok() }
    }

    /// What it is, for a message.
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Undefined => "undefined",
            Self::Null => "null",
            Self::Bool(_) => "a truth value",
            Self::Number(_) => "a number",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
            Self::Object(_) => "an object",
        }
    }
}

/// A member of an object. Of several with one name the last one counts.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Member {
    pub(super) at: Place,
    pub(super) name: String,
    pub(super) node: Node,
}

/// Why a text can't be read, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Error {
    pub(super) at: Place,
    pub(super) fault: Fault,
}

/// Why a text can't be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    TooLong,
    TooDeep,
    /// Something else was to stand there.
    Expected(&'static str),
    /// This would have to be evaluated.
    Expression(String),
    OpenComment,
    OpenText,
    Number,
    Escape,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong => {
                write!(f, "the file is longer than {} KiB; leave out what is no configuration", SIZE_MAX >> 10)
            }
            Self::TooDeep => write!(f, "objects and lists are more than {DEPTH_MAX} deep; flatten them"),
            Self::Expected(what) => write!(f, "expected {what}"),
            Self::Expression(text) => {
                write!(f, "{text:?} would have to be evaluated, which is not done here; write its value in its place")
            }
            Self::OpenComment => f.write_str("this comment has no end; write */ behind it"),
            Self::OpenText => f.write_str("this text has no end; close its quote in the same line"),
            Self::Number => f.write_str("no number; write one such as 10, 0.5 or 0x1f"),
            Self::Escape => f.write_str("no escape of JavaScript; write two backslashes for one"),
        }
    }
}

/// Reads a whole file: one value, `;` behind it or not, `module.exports =` or `config =` before it or not.
///
/// # Errors
/// The first thing that can't be read.
pub(super) fn read(text: &str) -> Result<Node, Error> {
    if text.len() > SIZE_MAX {
        return Err(Error { at: Place { line: 1, column: 1 }, fault: Fault::TooLong });
    }
    let mut reader = Reader { rest: text.strip_prefix('\u{feff}').unwrap_or(text), at: Place { line: 1, column: 1 } };
    reader.assignment()?;
    let node = reader.value(0)?;
    reader.blank()?;
    while reader.take(';') {
        reader.blank()?;
    }
    if reader.rest.is_empty() { Ok(node) } else { Err(reader.unexpected("the end of the file")) }
}

struct Reader<'t> {
    rest: &'t str,
    at: Place,
}

impl<'t> Reader<'t> {
    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let mut chars = self.rest.chars();
        let next = chars.next()?;
        self.rest = chars.as_str();
        self.at = match next {
            '\n' => Place { line: self.at.line + 1, column: 1 },
            _ => Place { column: self.at.column + 1, ..self.at },
        };
        Some(next)
    }

    fn skip(&mut self, count: usize) {
        for _ in 0..count {
            self.next();
        }
    }

    fn take(&mut self, wanted: char) -> bool {
        let is_there = self.peek() == Some(wanted);
        if is_there {
            self.next();
        }
        is_there
    }

    fn take_while(&mut self, is_wanted: impl Fn(char) -> bool) -> &'t str {
        let length = self.rest.find(|c| !is_wanted(c)).unwrap_or(self.rest.len());
        let taken = &self.rest[..length];
        self.skip(taken.chars().count());
        taken
    }

    fn fail<T>(&self, at: Place, fault: Fault) -> Result<T, Error> {
        Err(Error { at, fault })
    }

    /// Passes over blanks and comments.
    fn blank(&mut self) -> Result<(), Error> {
        loop {
            self.take_while(|c| c.is_whitespace() || c == '\u{feff}');
            if self.rest.starts_with("//") {
                self.take_while(|c| c != '\n');
            } else if self.rest.starts_with("/*") {
                let (at, end) = (self.at, self.rest[2..].find("*/"));
                let Some(end) = end else { return self.fail(at, Fault::OpenComment) };
                let after = self.rest.len() - (end + 4);
                while self.rest.len() > after {
                    self.next();
                }
            } else {
                return Ok(());
            }
        }
    }

    /// Passes over `module.exports =`, or what else the value is assigned to.
    fn assignment(&mut self) -> Result<(), Error> {
        self.blank()?;
        let before = (self.rest, self.at);
        let is_name = self.peek().is_some_and(|c| is_word(c) && !c.is_ascii_digit());
        let name = if is_name { self.take_while(is_path) } else { "" };
        self.blank()?;
        let is_assigned = !name.is_empty() && self.rest.starts_with('=') && !self.rest.starts_with("==");
        if is_assigned {
            self.next();
        } else if name == "module.exports" {
            return Err(self.unexpected("\"=\" behind module.exports"));
        } else {
            (self.rest, self.at) = before;
        }
        Ok(())
    }

    fn value(&mut self, depth: usize) -> Result<Node, Error> {
        self.blank()?;
        let at = self.at;
        if depth > DEPTH_MAX {
            return self.fail(at, Fault::TooDeep);
        }
        let value = match self.peek() {
            Some('{') => self.object(depth)?,
            Some('[') => self.list(depth)?,
            Some('\'' | '"' | '`') => Value::Text(self.text()?),
            Some('0'..='9' | '.' | '+' | '-') => Value::Number(self.number()?),
            Some('(') => {
                self.next();
                let inner = self.value(depth + 1)?;
                self.blank()?;
                if !self.take(')') {
                    return Err(self.unexpected("\")\""));
                }
                inner.value
            }
            Some(c) if is_path(c) => self.word()?,
            Some(_) | None => return Err(self.unexpected("a value")),
        };
        Ok(Node { at, value })
    }

    fn word(&mut self) -> Result<Value, Error> {
        let (at, rest) = (self.at, self.rest);
        let word = self.take_while(is_path);
        match word {
            "true" => Ok(Value::Bool(true)),
            "false" => Ok(Value::Bool(false)),
            "null" => Ok(Value::Null),
            "undefined" => Ok(Value::Undefined),
            "NaN" => Ok(Value::Number(f64::NAN)),
            "Infinity" => Ok(Value::Number(f64::INFINITY)),
            _ => self.fail(at, Fault::Expression(beginning(rest))),
        }
    }

    fn object(&mut self, depth: usize) -> Result<Value, Error> {
        self.next();
        let mut members = Vec::new();
        loop {
            self.blank()?;
            if self.take('}') {
                return Ok(Value::Object(members));
            }
            let at = self.at;
            let name = self.member_name()?;
            self.blank()?;
            if !self.take(':') {
                return Err(self.unexpected("\":\" behind the name"));
            }
            members.push(Member { at, name, node: self.value(depth + 1)? });
            self.blank()?;
            if !self.take(',') && self.peek() != Some('}') {
                return Err(self.unexpected("\",\" or \"}\""));
            }
        }
    }

    fn member_name(&mut self) -> Result<String, Error> {
        match self.peek() {
            Some('\'' | '"') => self.text(),
            Some('0'..='9') => Ok(self.number()?.to_string()),
            Some(c) if is_word(c) => Ok(self.take_while(is_word).to_owned()),
            Some(_) | None => Err(self.unexpected("a name or \"}\"")),
        }
    }

    /// A place without a value is one that is undefined, as in `[1,,2]`.
    fn list(&mut self, depth: usize) -> Result<Value, Error> {
        self.next();
        let mut nodes = Vec::new();
        loop {
            self.blank()?;
            let at = self.at;
            if self.take(']') {
                return Ok(Value::List(nodes));
            }
            if self.take(',') {
                nodes.push(Node { at, value: Value::Undefined });
                continue;
            }
            nodes.push(self.value(depth + 1)?);
            self.blank()?;
            if !self.take(',') && self.peek() != Some(']') {
                return Err(self.unexpected("\",\" or \"]\""));
            }
        }
    }

    fn number(&mut self) -> Result<f64, Error> {
        let at = self.at;
        let sign = match self.take_while(|c| c == '+' || c == '-') {
            "" | "+" => 1.0,
            "-" => -1.0,
            _ => return self.fail(at, Fault::Number),
        };
        if self.peek().is_some_and(|c| c.is_whitespace()) {
            self.blank()?;
        }
        let rest = self.rest;
        let mut digits = self.take_while(|c| c.is_ascii_alphanumeric() || c == '.' || c == '_');
        // The sign of an exponent.
        if self.peek().is_some_and(|c| c == '+' || c == '-')
            && digits.ends_with(['e', 'E'])
            && !digits.starts_with("0x")
        {
            self.next();
            let exponent = self.take_while(|c| c.is_ascii_digit());
            digits = &rest[..digits.len() + 1 + exponent.len()];
        }
        match digits {
            "Infinity" => Ok(sign * f64::INFINITY),
            _ if digits.starts_with(|c: char| c.is_ascii_alphabetic()) => {
                self.fail(at, Fault::Expression(beginning(rest)))
            }
            _ => parsed(digits).map(|number| sign * number).ok_or(Error { at, fault: Fault::Number }),
        }
    }

    fn text(&mut self) -> Result<String, Error> {
        let at = self.at;
        let Some(quote) = self.next() else { return self.fail(at, Fault::OpenText) };
        let mut text = String::new();
        loop {
            let here = self.at;
            match self.next() {
                Some(c) if c == quote => return Ok(text),
                Some('\\') => self.escaped(here, &mut text)?,
                Some('$') if quote == '`' && self.peek() == Some('{') => {
                    return self.fail(here, Fault::Expression(beginning(&format!("${}", self.rest))));
                }
                Some('\n') if quote != '`' => return self.fail(at, Fault::OpenText),
                Some(c) => text.push(c),
                None => return self.fail(at, Fault::OpenText),
            }
        }
    }

    fn escaped(&mut self, at: Place, text: &mut String) -> Result<(), Error> {
        let code = match self.next() {
            Some('n') => '\n'.into(),
            Some('t') => '\t'.into(),
            Some('r') => '\r'.into(),
            Some('b') => 8,
            Some('f') => 12,
            Some('v') => 11,
            Some('0') => 0,
            Some('x') => self.hex(2),
            Some('u') => self.unicode(),
            // A line that goes on.
            Some('\n') => return Ok(()),
            Some('\r') => {
                self.take('\n');
                return Ok(());
            }
            Some(c) => c.into(),
            None => return self.fail(at, Fault::Escape),
        };
        let letter = match code {
            0xd800..=0xdfff => self.surrogate(code),
            _ => char::from_u32(code).ok_or(Error { at, fault: Fault::Escape })?,
        };
        text.push(letter);
        Ok(())
    }

    /// What stands behind `\u`; what is none gives no letter.
    fn unicode(&mut self) -> u32 {
        if !self.take('{') {
            return self.hex(4);
        }
        let digits = self.take_while(|c| c.is_ascii_hexdigit());
        let code = u32::from_str_radix(digits, 16).unwrap_or(u32::MAX);
        if self.take('}') { code } else { u32::MAX }
    }

    /// A letter in two halves. A half by itself is written as U+FFFD by the original too.
    fn surrogate(&mut self, high: u32) -> char {
        let before = (self.rest, self.at);
        if high < 0xdc00 && self.take('\\') && self.take('u') {
            let low = self.unicode();
            if let Some(letter) =
                (0xdc00..=0xdfff).contains(&low).then(|| 0x10000 + ((high & 0x3ff) << 10) + (low & 0x3ff))
            {
                return char::from_u32(letter).unwrap_or(char::REPLACEMENT_CHARACTER);
            }
        }
        (self.rest, self.at) = before;
        char::REPLACEMENT_CHARACTER
    }

    /// So many hexadecimal digits; what is none gives no letter either.
    fn hex(&mut self, count: usize) -> u32 {
        let digits = self.rest.get(..count).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let code = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        self.skip(digits.map_or(0, str::len));
        code.unwrap_or(u32::MAX)
    }

    /// That something else was to come: where an operator stands, that there is an expression.
    fn unexpected(&self, wanted: &'static str) -> Error {
        let is_operator = self.peek().is_some_and(|c| "+-*/%?|&=<>.(![^~".contains(c) || is_word(c));
        let fault = if is_operator { Fault::Expression(beginning(self.rest)) } else { Fault::Expected(wanted) };
        Error { at: self.at, fault }
    }
}

/// Digits of any form that JavaScript knows.
fn parsed(written: &str) -> Option<f64> {
    let digits = joined(written)?;
    let radix = |digits: &str, radix| u64::from_str_radix(digits, radix).ok().map(|number| number as f64);
    let lower = digits.to_ascii_lowercase();
    match lower.as_bytes() {
        [b'0', b'x', ..] => radix(&lower[2..], 16),
        [b'0', b'o', ..] => radix(&lower[2..], 8),
        [b'0', b'b', ..] => radix(&lower[2..], 2),
        // As in file modes.
        [b'0', rest @ ..] if !rest.is_empty() && rest.iter().all(|byte| (b'0'..=b'7').contains(byte)) => {
            radix(&lower, 8)
        }
        _ => {
            let is_decimal = lower.bytes().all(|byte| byte.is_ascii_digit() || b".e+-".contains(&byte));
            let has_digit = lower.starts_with(|c: char| c.is_ascii_digit() || c == '.');
            lower.parse().ok().filter(|number: &f64| is_decimal && has_digit && number.is_finite())
        }
    }
}

/// Digits without the `_` between them; nothing where one stands elsewhere, or in a number that begins with 0.
fn joined(written: &str) -> Option<String> {
    let bytes = written.as_bytes();
    let is_digit = |place: Option<usize>| place.and_then(|at| bytes.get(at)).is_some_and(u8::is_ascii_hexdigit);
    let is_between = |at: usize| is_digit(at.checked_sub(1)) && is_digit(at.checked_add(1));
    let is_old_octal = matches!(bytes, [b'0', b'0'..=b'9' | b'_', ..]);
    let mut places = written.match_indices('_').peekable();
    if is_old_octal && places.peek().is_some() || !places.all(|(at, _)| is_between(at)) {
        return None;
    }
    Some(written.replace('_', ""))
}

/// The beginning of an expression, to know it by.
fn beginning(text: &str) -> String {
    let end = text.find(['\n', ',', ';', '}']).unwrap_or(text.len());
    let line = text[..end].trim();
    let short: String = line.chars().take(40).collect();
    if short.len() < line.len() { short + "..." } else { short }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '$'
}

fn is_path(c: char) -> bool {
    is_word(c) || c == '.'
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The value as JSON, numbers as they are.
    fn plain(node: &Node) -> String {
        match &node.value {
            Value::Undefined => "undefined".to_owned(),
            Value::Null => "null".to_owned(),
            Value::Bool(is) => is.to_string(),
            Value::Number(number) => number.to_string(),
            Value::Text(text) => format!("{text:?}"),
            Value::List(nodes) => format!("[{}]", nodes.iter().map(plain).collect::<Vec<_>>().join(",")),
            Value::Object(members) => {
                let each = members.iter().map(|member| format!("{}:{}", member.name, plain(&member.node)));
                format!("{{{}}}", each.collect::<Vec<_>>().join(","))
            }
        }
    }

    fn value(text: &str) -> String {
        read(text).map_or_else(|error| format!("{} {}", error.at, error.fault), |node| plain(&node))
    }

    #[test]
    fn literals_are_read_as_javascript_has_them() {
        let cases = [
            ("{}", "{}"),
            ("/* a */ { a: 1 // b\n, 'b': \"c\", } ; // d", "{a:1,b:\"c\"}"),
            ("module.exports = { a: 'x' };", "{a:\"x\"}"),
            ("({a: (1)})", "{a:1}"),
            (
                "[1, 0x1F, 0o17, 0b11, 0755, -4.5, +2, .5, 5., 1e3, 1E-3, -Infinity, 08]",
                "[1,31,15,3,493,-4.5,2,0.5,5,1000,0.001,-inf,8]",
            ),
            ("[10_000, 1_0.2_5e1_0, 0xF_F, 1e1_0]", "[10000,102500000000,255,10000000000]"),
            (
                r"['\ud83d\ude00', '\u{d83d}\u{de00}', '\ud83dx', '\ude00']",
                "[\"😀\",\"😀\",\"\u{fffd}x\",\"\u{fffd}\"]",
            ),
            ("config = { a: 1 };", "{a:1}"),
            ("[1,,2,]", "[1,undefined,2]"),
            ("[true,false,null,undefined,NaN]", "[true,false,null,undefined,NaN]"),
            ("{$a_1: {\"b c\": {}}, 1: [[]]}", "{$a_1:{b c:{}},1:[[]]}"),
            (
                r#"['it\'s', "\x41\u0042\u{43}\n\\", 'a\
b', `c
d`]"#,
                r#"["it's","ABC\n\\","ab","c\nd"]"#,
            ),
            ("\u{feff}{ a:'ä' }", "{a:\"ä\"}"),
        ];
        for (text, want) in cases {
            assert_eq!(value(text), want, "{text}");
        }
    }

    #[test]
    fn what_is_no_literal_is_named_with_its_place() {
        let expression = |text: &str| {
            format!("{text:?} would have to be evaluated, which is not done here; write its value in its place")
        };
        let cases = [
            ("{\n  host: process.env.HOST,\n}", format!("2:9 {}", expression("process.env.HOST"))),
            ("{ a: require('os').hostname() }", format!("1:6 {}", expression("require('os').hostname()"))),
            ("{ a: 'x' + 'y' }", format!("1:10 {}", expression("+ 'y'"))),
            ("{ a: 10 * 1000 }", format!("1:9 {}", expression("* 1000"))),
            ("{ a: `x${b}` }", format!("1:8 {}", expression("${b"))),
            ("{ a: -b }", format!("1:6 {}", expression("b"))),
            ("{ a() { } }", format!("1:4 {}", expression("() {"))),
            ("{ a: 1 b: 2 }", format!("1:8 {}", expression("b: 2"))),
            ("{ a: 1", "1:7 expected \",\" or \"}\"".to_owned()),
            ("{ a 1", format!("1:5 {}", expression("1"))),
            ("{ : 1 }", "1:3 expected a name or \"}\"".to_owned()),
            ("", "1:1 expected a value".to_owned()),
            ("{} }", "1:4 expected the end of the file".to_owned()),
            ("{ a: 'b\n' }", "1:6 this text has no end; close its quote in the same line".to_owned()),
            ("{ /* a", "1:3 this comment has no end; write */ behind it".to_owned()),
            ("[1x]", "1:2 no number; write one such as 10, 0.5 or 0x1f".to_owned()),
            ("[1__0]", "1:2 no number; write one such as 10, 0.5 or 0x1f".to_owned()),
            ("[10_]", "1:2 no number; write one such as 10, 0.5 or 0x1f".to_owned()),
            ("[0_10]", "1:2 no number; write one such as 10, 0.5 or 0x1f".to_owned()),
            ("config", format!("1:1 {}", expression("config"))),
            ("a == {}", format!("1:1 {}", expression("a == {"))),
            ("['\\xzz']", "1:3 no escape of JavaScript; write two backslashes for one".to_owned()),
        ];
        for (text, want) in cases {
            assert_eq!(value(text), want, "{text}");
        }
        let deep = "[".repeat(100_000);
        assert!(value(&deep).starts_with("1:34 objects and lists are more than 32 deep"));
        let long = " ".repeat(SIZE_MAX + 1);
        assert!(value(&long).starts_with("1:1 the file is longer than 1024 KiB"));
    }

    proptest! {
        #[test]
        fn no_text_brings_the_reader_down(text in any::<String>()) {
            let _ = read(&text);
        }

        #[test]
        fn no_text_of_its_own_signs_does_either(text in "[-{}\\[\\](),:;'\"`a0x.e+$/*\\\\ \n\u{e4}]{0,60}") {
            if let Err(error) = read(&text) {
                prop_assert!(error.at.line <= text.lines().count() + 1);
            }
        }
    }
}
