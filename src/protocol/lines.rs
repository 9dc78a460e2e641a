//! A datagram into lines, and what a line is by its first bytes. Nothing is copied.

/// What kind of line this is; the rest of the line decides whether it is a good one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Metric,
    Event,
    ServiceCheck,
    Json,
}

/// Tells a line's form. The line is trimmed and not empty.
pub(super) fn form(line: &str) -> Form {
    match line.as_bytes()[0] {
        b'_' if line.starts_with("_e{") => Form::Event,
        b'_' if line.starts_with("_sc|") => Form::ServiceCheck,
        b'{' => Form::Json,
        // SignalFX tags may stand at the start of a name: only what could be an array of records is JSON.
        b'[' if line[1..].trim_start_matches(is_space).starts_with(['{', '[', ']']) => Form::Json,
        _ => Form::Metric,
    }
}

/// Whether a datagram is to be read as one JSON document before it is read as lines.
#[inline]
pub(super) fn may_be_document(datagram: &[u8]) -> bool {
    match datagram.first() {
        Some(b'{' | b'[') => true,
        Some(b' ' | b'\t'..=b'\r') => {
            let start = datagram.iter().find(|byte| !matches!(byte, b' ' | b'\t'..=b'\r'));
            matches!(start, Some(b'{' | b'['))
        }
        _ => false,
    }
}

/// The first line, without its end, and what follows it.
pub(super) fn split(bytes: &[u8]) -> (&[u8], &[u8]) {
    match memchr::memchr(b'\n', bytes) {
        Some(end) => (&bytes[..end], &bytes[end + 1..]),
        None => (bytes, &[]),
    }
}

/// Without the byte order mark that some editors and shells put at the start.
#[inline]
pub(super) fn without_bom(bytes: &[u8]) -> &[u8] {
    match bytes {
        [0xef, 0xbb, 0xbf, rest @ ..] => rest,
        _ => bytes,
    }
}

/// Without blanks, carriage returns and NULs at both ends.
pub(super) fn trim(line: &[u8]) -> &[u8] {
    trim_where(line, |byte| matches!(byte, b' ' | b'\t' | b'\r' | 0))
}

/// As [`trim`], for a document, whose ends may be line ends too.
pub(super) fn trim_document(document: &[u8]) -> &[u8] {
    trim_where(document, |byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n' | 0))
}

/// Without spaces and tabs at both ends, as a field is read.
pub(super) fn trim_blanks(field: &[u8]) -> &[u8] {
    trim_where(field, |byte| matches!(byte, b' ' | b'\t'))
}

fn trim_where(bytes: &[u8], is_trimmed: impl Fn(u8) -> bool) -> &[u8] {
    let Some(start) = bytes.iter().position(|byte| !is_trimmed(*byte)) else { return &[] };
    let end = bytes.iter().rposition(|byte| !is_trimmed(*byte)).map_or(start, |last| last + 1);
    &bytes[start..end]
}

/// White space of Unicode, and the four separators of ASCII that count as such for names.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_told_by_the_first_bytes() {
        assert_eq!(form("_e{1,1}:a|b"), Form::Event);
        assert_eq!(form("_sc|a|0"), Form::ServiceCheck);
        assert_eq!(form("_sc.count:1|c"), Form::Metric);
        assert_eq!(form("[ \t]"), Form::Json);
        assert_eq!(form("[a=b]x:1|c"), Form::Metric);
        assert_eq!(form("["), Form::Metric);
    }

    #[test]
    fn ends_are_trimmed() {
        assert_eq!(trim(b"\0 a:1|c \r"), b"a:1|c");
        assert_eq!(trim(b" \r\0"), b"");
        assert_eq!(split(b"a\n\nb"), (&b"a"[..], &b"\nb"[..]));
        assert!(may_be_document(b"\n {"));
        assert!(!may_be_document(b" a"));
        assert!(!may_be_document(b" "));
    }
}
