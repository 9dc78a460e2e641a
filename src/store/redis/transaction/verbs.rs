//! The verbs of `apply.lua` in Rust: which fields of a hash an operation reads, and what it then writes.
//!
//! Pure: it takes the fields as they were read and answers commands. What the script finds out while it writes is found out
//! here before anything is written, so an operation that can't be applied changes nothing.

use std::collections::HashMap;

use redis::Pipeline;

/// What an operation does to its hash, one step after the other.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Operation<'a> {
    start_ms: &'a str,
    update_ms: &'a str,
    verbs: Vec<Verb<'a>>,
}

/// See `apply.lua` for what each means.
#[derive(Debug, Clone, PartialEq)]
enum Verb<'a> {
    Add { field: &'a str, number: &'a str },
    AddFloat { field: &'a str, number: &'a str },
    Least { field: &'a str, number: &'a str },
    Greatest { field: &'a str, number: &'a str },
    Replace { field: &'a str, value: &'a str },
    Latest { value: &'a str, time: &'a str },
    Gauge(Gauge<'a>),
    Members { most: usize, members: Vec<Member<'a>> },
    Registers(Vec<(&'a str, &'a str)>),
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Gauge<'a> {
    value: &'a str,
    time: &'a str,
    changed: &'a str,
    whole: (&'a str, &'a str),
    fraction: (&'a str, &'a str),
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Member<'a> {
    hash: &'a str,
    register: &'a str,
    rank: &'a str,
}

/// Why an operation can't be applied, as the server would say it.
pub(super) type Refusal = String;

fn not_a_float() -> Refusal {
    "ERR hash value is not a float".to_owned()
}

/// The words of an operation, taken one after the other.
struct Words<'w, 'a>(std::slice::Iter<'w, &'a str>);

impl<'a> Words<'_, 'a> {
    fn next(&mut self) -> Result<&'a str, Refusal> {
        self.0.next().copied().ok_or_else(|| "ERR the operation has too few words".to_owned())
    }

    fn pair(&mut self) -> Result<(&'a str, &'a str), Refusal> {
        Ok((self.next()?, self.next()?))
    }

    fn count(&mut self) -> Result<usize, Refusal> {
        self.next()?.parse().map_err(|_| "ERR a count of the operation is none".to_owned())
    }

    fn gauge(&mut self) -> Result<Gauge<'a>, Refusal> {
        let (value, time) = self.pair()?;
        Ok(Gauge { value, time, changed: self.next()?, whole: self.pair()?, fraction: self.pair()? })
    }

    fn members(&mut self) -> Result<Vec<Member<'a>>, Refusal> {
        let member = |words: &mut Self| {
            let hash = words.next()?;
            let (register, rank) = words.pair()?;
            Ok(Member { hash, register, rank })
        };
        (0..self.count()?).map(|_| member(self)).collect()
    }

    fn verb(&mut self) -> Result<Option<Verb<'a>>, Refusal> {
        let Some(name) = self.0.next() else { return Ok(None) };
        let field_and = |words: &mut Self| words.pair();
        Ok(Some(match *name {
            "i" => field_and(self).map(|(field, number)| Verb::Add { field, number })?,
            "f" => field_and(self).map(|(field, number)| Verb::AddFloat { field, number })?,
            "<" => field_and(self).map(|(field, number)| Verb::Least { field, number })?,
            ">" => field_and(self).map(|(field, number)| Verb::Greatest { field, number })?,
            "=" => field_and(self).map(|(field, value)| Verb::Replace { field, value })?,
            "l" => self.pair().map(|(value, time)| Verb::Latest { value, time })?,
            "g" => Verb::Gauge(self.gauge()?),
            "h" => Verb::Members { most: self.count()?, members: self.members()? },
            "r" => Verb::Registers((0..self.count()?).map(|_| self.pair()).collect::<Result<_, _>>()?),
            other => return Err(format!("ERR no verb {other}")),
        }))
    }
}

impl<'a> Operation<'a> {
    /// Reads the words of an operation as `encode` wrote them.
    pub(super) fn read(words: &[&'a str]) -> Result<Self, Refusal> {
        let mut words = Words(words.iter());
        let (start_ms, update_ms) = words.pair()?;
        let mut verbs = Vec::new();
        while let Some(verb) = words.verb()? {
            verbs.push(verb);
        }
        Ok(Self { start_ms, update_ms, verbs })
    }

    /// The fields whose values decide what is written.
    pub(super) fn fields(&self) -> Vec<String> {
        let mut fields: Vec<_> = ["startTime", "updateTime"].map(str::to_owned).into();
        for verb in &self.verbs {
            match verb {
                Verb::Add { field, .. } | Verb::AddFloat { field, .. } => fields.push((*field).to_owned()),
                Verb::Least { field, .. } | Verb::Greatest { field, .. } => fields.push((*field).to_owned()),
                Verb::Replace { .. } => {}
                Verb::Latest { .. } => fields.push("valueTime".to_owned()),
                Verb::Gauge(gauge) => {
                    let read = ["valueTime", "valueAgent", "changeTime", gauge.whole.0, gauge.fraction.0];
                    fields.extend(read.map(str::to_owned));
                }
                Verb::Members { members, .. } => {
                    fields.push("members".to_owned());
                    fields.extend(members.iter().map(|member| format!("m:{}", member.hash)));
                    fields.extend(members.iter().map(|member| format!("r:{}", member.register)));
                }
                Verb::Registers(ranks) => fields.extend(ranks.iter().map(|(register, _)| format!("r:{register}"))),
            }
        }
        fields
    }

    /// What is to be written to a hash that has these fields.
    ///
    /// # Errors
    /// When a field that is to be added to or compared is no number, or a sum would not stay finite.
    pub(super) fn effects(&self, agent: &str, fields: HashMap<String, String>) -> Result<Vec<Effect>, Refusal> {
        let mut hash = Hash { fields, effects: Vec::new() };
        hash.times(self.start_ms, self.update_ms)?;
        for verb in &self.verbs {
            match verb {
                Verb::Add { field, number } => hash.add(field, number)?,
                Verb::AddFloat { field, number } => hash.add_float(field, number)?,
                Verb::Least { field, number } => hash.keep(field, number, |new, old| new < old)?,
                Verb::Greatest { field, number } => hash.keep(field, number, |new, old| new > old)?,
                Verb::Replace { field, value } => hash.set(field, value),
                Verb::Latest { value, time } => hash.latest(value, time)?,
                Verb::Gauge(gauge) => hash.gauge(agent, gauge)?,
                Verb::Members { most, members } => hash.members(*most, members)?,
                Verb::Registers(ranks) => hash.raise(ranks)?,
            }
        }
        Ok(hash.effects)
    }
}

/// One write to a hash.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Effect {
    Set(Vec<(String, String)>),
    Remove(Vec<&'static str>),
    Add(String, String),
    AddFloat(String, String),
}

impl Effect {
    /// The command that does it.
    pub(super) fn add_to(&self, pipe: &mut Pipeline, key: &str) {
        match self {
            Self::Set(pairs) => pipe.cmd("HSET").arg(key).arg(pairs),
            Self::Remove(fields) => pipe.cmd("HDEL").arg(key).arg(fields),
            Self::Add(field, number) => pipe.cmd("HINCRBY").arg(key).arg(field).arg(number),
            Self::AddFloat(field, number) => pipe.cmd("HINCRBYFLOAT").arg(key).arg(field).arg(number),
        };
    }
}

/// A hash as it will be, and what makes it so.
struct Hash {
    fields: HashMap<String, String>,
    effects: Vec<Effect>,
}

fn number(text: &str) -> Result<f64, Refusal> {
    text.parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(not_a_float)
}

impl Hash {
    fn text(&self, field: &str) -> Option<&str> {
        self.fields.get(field).map(String::as_str)
    }

    fn number(&self, field: &str) -> Result<Option<f64>, Refusal> {
        self.text(field).map(number).transpose()
    }

    fn set(&mut self, field: &str, value: &str) {
        self.fields.insert(field.to_owned(), value.to_owned());
        let pair = (field.to_owned(), value.to_owned());
        match self.effects.last_mut() {
            Some(Effect::Set(pairs)) => pairs.push(pair),
            Some(_) | None => self.effects.push(Effect::Set(vec![pair])),
        }
    }

    fn remove(&mut self, fields: &[&'static str]) {
        for field in fields {
            self.fields.remove(*field);
        }
        self.effects.push(Effect::Remove(fields.to_vec()));
    }

    fn times(&mut self, start_ms: &str, update_ms: &str) -> Result<(), Refusal> {
        let (start, update) = (number(start_ms)?, number(update_ms)?);
        if self.number("startTime")?.is_none_or(|old| start < old) {
            self.set("startTime", start_ms);
        }
        if self.number("updateTime")?.is_none_or(|old| update > old) {
            self.set("updateTime", update_ms);
        }
        Ok(())
    }

    fn add(&mut self, field: &str, text: &str) -> Result<(), Refusal> {
        let whole = |text: &str| text.parse::<i64>().map_err(|_| "ERR hash value is not an integer".to_owned());
        let (old, more) = (self.text(field).map_or(Ok(0), whole)?, whole(text)?);
        // What 64 bits can't hold goes on in the fraction, as a float.
        let Some(sum) = old.checked_add(more) else { return self.add_float(&format!("{field}frac"), text) };
        self.fields.insert(field.to_owned(), sum.to_string());
        self.effects.push(Effect::Add(field.to_owned(), text.to_owned()));
        Ok(())
    }

    fn add_float(&mut self, field: &str, text: &str) -> Result<(), Refusal> {
        let sum = self.number(field)?.unwrap_or(0.0) + number(text)?;
        if !sum.is_finite() {
            return Err("ERR increment would produce NaN or Infinity".to_owned());
        }
        self.fields.insert(field.to_owned(), sum.to_string());
        self.effects.push(Effect::AddFloat(field.to_owned(), text.to_owned()));
        Ok(())
    }

    fn keep(&mut self, field: &str, text: &str, wins: impl Fn(f64, f64) -> bool) -> Result<(), Refusal> {
        let new = number(text)?;
        if self.number(field)?.is_none_or(|old| wins(new, old)) {
            self.set(field, text);
        }
        Ok(())
    }

    fn latest(&mut self, value: &str, time: &str) -> Result<(), Refusal> {
        let new = number(time)?;
        if self.number("valueTime")?.is_none_or(|old| new >= old) {
            self.set("value", value);
            self.set("valueTime", time);
        }
        Ok(())
    }

    fn gauge(&mut self, agent: &str, gauge: &Gauge<'_>) -> Result<(), Refusal> {
        let set_at = if gauge.time.is_empty() { None } else { Some(number(gauge.time)?) };
        let changed = number(gauge.changed)?;
        let old_set_at = self.number("valueTime")?;
        let mut old_changed = self.number("changeTime")?.unwrap_or(0.0);
        let is_same_agent = self.text("valueAgent") == Some(agent);
        let is_later_name = agent >= self.text("valueAgent").unwrap_or_default();
        let mut counts = changed > 0.0;
        let wins = |at: f64| old_set_at.is_none_or(|old| is_same_agent || at > old || at == old && is_later_name);
        if let Some(at) = set_at.filter(|at| wins(*at)) {
            self.set("value", gauge.value);
            self.set("valueTime", gauge.time);
            self.set("valueAgent", agent);
            if old_changed <= at || old_set_at.is_some_and(|old| at < old) {
                self.remove(&["change", "changefrac", "changeTime"]);
                old_changed = 0.0;
            }
        } else if let Some(old) = old_set_at {
            counts = counts && (changed > old || is_same_agent || set_at.is_none() && changed == old);
        }
        if counts {
            self.add(gauge.whole.0, gauge.whole.1)?;
            self.add_float(gauge.fraction.0, gauge.fraction.1)?;
            if changed > old_changed {
                self.set("changeTime", gauge.changed);
            }
        }
        Ok(())
    }

    fn members(&mut self, most: usize, members: &[Member<'_>]) -> Result<(), Refusal> {
        let before = self.number("members")?.unwrap_or(0.0) as usize;
        let mut count = before;
        let mut surplus = Vec::new();
        let new: Vec<_> = members.iter().filter(|member| self.text(&format!("m:{}", member.hash)).is_none()).collect();
        for member in new {
            if count < most {
                count += 1;
                self.set(&format!("m:{}", member.hash), "");
            } else {
                surplus.push((member.register, member.rank));
            }
        }
        if count > before {
            self.set("members", &count.to_string());
        }
        self.raise(&surplus)
    }

    fn raise(&mut self, ranks: &[(&str, &str)]) -> Result<(), Refusal> {
        ranks.iter().try_for_each(|(register, rank)| {
            let field = format!("r:{register}");
            let new = number(rank)?;
            if new > self.number(&field)?.unwrap_or(0.0) {
                self.set(&field, rank);
            }
            Ok(())
        })
    }
}
