//! What `explain` prints for a person.

use std::io::{self, Write};

use super::{Found, KeptCheck, KeptEvent, Metric, Number, Rejected, Rule};
use crate::protocol;

/// Longest part of a line that is shown around the place of an error.
const SHOWN: usize = 60;

/// Writes all that was found in some bytes.
pub(super) fn write(found: &Found, bytes: &[u8], out: &mut impl Write) -> io::Result<()> {
    found.metrics.iter().try_for_each(|metric| write_metric(metric, out))?;
    found.events.iter().try_for_each(|event| write_event(event, out))?;
    found.service_checks.iter().try_for_each(|check| write_check(check, out))?;
    found.errors.iter().try_for_each(|rejected| write_rejected(rejected, out))?;
    if found.tag_errors > 0 {
        let what = if found.tag_errors == 1 { "tag has" } else { "tags have" };
        writeln!(out, "{} {what} no name or no value and was dropped", found.tag_errors)?;
    }
    if *found == Found::default() && !bytes.is_empty() {
        writeln!(out, "nothing: blanks only")?;
    }
    Ok(())
}

fn row(out: &mut impl Write, what: &str, text: &str) -> io::Result<()> {
    writeln!(out, "  {what:<10} {text}")
}

fn write_metric(metric: &Metric, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "{} {}", metric.wire, metric.name)?;
    if let Some(level) = &metric.level {
        row(out, "level", level)?;
    }
    let numbers: Vec<String> = metric.values.iter().map(|Number(value)| value.to_string()).collect();
    let (what, text) = match (metric.relative, metric.set_values.first()) {
        (_, Some(member)) => ("member", member.clone()),
        (true, None) => ("change", numbers.join(", ")),
        (false, None) => ("value", numbers.join(", ")),
    };
    row(out, what, &text)?;
    let Number(rate) = metric.rate;
    if rate < 1.0 {
        row(out, "rate", &format!("{rate}: each value stands for {}", 1.0 / rate))?;
    }
    if let Some(timestamp) = metric.timestamp {
        row(out, "timestamp", &timestamp.to_string())?;
    }
    if !metric.tags.is_empty() {
        row(out, "tags", &metric.tags.join(", "))?;
    }
    let extras = [
        ("container", metric.container_id.as_deref()),
        ("external", metric.external_data.as_deref()),
        ("card", metric.cardinality),
    ];
    for (what, text) in extras {
        if let Some(text) = text {
            row(out, what, text)?;
        }
    }
    row(out, "series", &metric.series)?;
    if let Some(rule) = &metric.mapping {
        row(out, "mapping", &rule_text(rule))?;
    }
    metric.prometheus.iter().try_for_each(|shown| row(out, "prometheus", shown))
}

/// `line 12: test.*.*, mappings[3]`
fn rule_text(rule: &Rule) -> String {
    let Rule { rule: Some(number), line: Some(line), pattern: Some(pattern), .. } = rule else {
        return "no rule matches".to_owned();
    };
    let what = match (rule.action, rule.prometheus.is_empty()) {
        (Some("drop"), _) => "; it drops the series",
        (_, true) => "; it gives an empty name, so a scrape does not show the series",
        (_, false) => "",
    };
    format!("line {line}: {pattern}, mappings[{number}]{what}")
}

fn write_event(event: &KeptEvent, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "event {}", event.title.escape_debug())?;
    row(out, "text", &event.text.escape_debug().to_string())?;
    row(out, "type", &format!("{}, priority {}", event.alert_type, event.priority))?;
    optional(out, &[("host", &event.host), ("key", &event.aggregation_key), ("source", &event.source_type)])?;
    said(out, event.timestamp, event.tags.as_deref())
}

fn write_check(check: &KeptCheck, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "service check {}", check.name)?;
    let status = ["ok", "warning", "critical", "unknown"].get(usize::from(check.status)).copied().unwrap_or_default();
    row(out, "status", &format!("{} ({status})", check.status))?;
    optional(out, &[("host", &check.host), ("message", &check.message)])?;
    said(out, check.timestamp, check.tags.as_deref())
}

fn optional(out: &mut impl Write, rows: &[(&str, &Option<String>)]) -> io::Result<()> {
    for (what, text) in rows {
        if let Some(text) = text {
            row(out, what, &text.escape_debug().to_string())?;
        }
    }
    Ok(())
}

fn said(out: &mut impl Write, timestamp: Option<u64>, tags: Option<&[String]>) -> io::Result<()> {
    if let Some(timestamp) = timestamp {
        row(out, "timestamp", &timestamp.to_string())?;
    }
    match tags {
        Some(tags) if !tags.is_empty() => row(out, "tags", &tags.join(", ")),
        Some(_) | None => Ok(()),
    }
}

/// The reason, the line with a mark under the byte that is it, and the hint.
fn write_rejected(rejected: &Rejected, out: &mut impl Write) -> io::Result<()> {
    let Rejected { line, reason, column, bytes, hint } = rejected;
    writeln!(out, "rejected: {reason} (line {line}, column {})", column + 1)?;
    let column = (*column).min(bytes.len());
    let start = column.saturating_sub(SHOWN / 2).min(bytes.len().saturating_sub(SHOWN));
    let end = bytes.len().min(start + SHOWN);
    let before = protocol::printable(&bytes[start..column]);
    let after = protocol::printable(&bytes[column..end.max(column)]);
    writeln!(out, "  {before}{after}")?;
    writeln!(out, "  {:1$}^", "", before.len())?;
    match hint {
        Some(hint) => writeln!(out, "  {hint}"),
        None => Ok(()),
    }
}
