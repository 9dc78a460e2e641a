//! What a value in the journal's file looks like: a header with magic bytes, version, length and CRC-32, then postcard.
//!
//! A record says by itself what it is and which of two is newer, so that [`super::salvage`] can take it from the bytes of
//! a file that the database no longer opens. Nothing here reads or writes a file.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{AgentId, Error};
use crate::aggregate::Aggregate;
use crate::aggregate::ledger::Total;
use crate::aggregate::meter::Rates;
use crate::receipt::Receipt;
use crate::sample::{Kind, Marks, SeriesKey};
use crate::store::{Batch, Operation, Partition};

/// The first bytes of a record. They are no UTF-8, so no series key can contain them.
pub(super) const MAGIC: [u8; 3] = [0xf7, b't', b'j'];

/// The version of all that follows the magic bytes.
const VERSION: u8 = 1;

/// Magic bytes, version, length of the payload, CRC-32 of version, length and payload; numbers little-endian.
pub(super) const HEADER: usize = 12;

/// Nothing that is written is longer; a length beyond it is damage.
pub(super) const PAYLOAD_MAX: usize = 1 << 30;

/// Where a series' total stands in the table of totals: 128 bits of its kind and key. The record holds the key itself and
/// is asked for it, so two series that met in one place would be told apart, and the later would win the place.
pub(super) type Place = [u8; 16];

pub(super) fn place(kind: Kind, key: &str) -> Place {
    twox_hash::XxHash3_128::oneshot_with_seed(kind as u64, key.as_bytes()).to_be_bytes()
}

/// What a record is, in front of its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Content {
    Agent,
    Position,
    Total,
    /// A batch as it was written before its samples were counted.
    Uncounted,
    Receipt,
    Batch,
    Marks,
}

/// In front of every payload: what it is, and the number of the transaction that wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    pub(super) content: Content,
    pub(super) revision: u64,
}

/// The agent as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Agent {
    pub(super) id: AgentId,
    pub(super) flush: u64,
    pub(super) owners: Vec<String>,
}

/// Where a partition's outbox stands: it holds the batches `dropped + 1 ..= last`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Position {
    pub(super) dropped: u64,
    pub(super) last: u64,
    pub(super) acknowledged: u64,
    pub(super) sent: u64,
    /// The samples in the batches up to `dropped`, under the agent's present name, but for those that the store lost.
    pub(super) samples: u64,
}

/// What a record of a total says before its aggregate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TotalHead<'a> {
    pub(super) kind: Kind,
    pub(super) key: &'a str,
    pub(super) start_ms: u64,
    pub(super) update_ms: u64,
}

/// What a record of a batch says before its operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct BatchHead {
    pub(super) partition: Partition,
    pub(super) sequence: u64,
    pub(super) flush: u64,
    pub(super) operations: u32,
}

/// An [`Operation`] that is borrowed, and encoded alike.
#[derive(Serialize)]
pub(super) struct OperationRef<'a> {
    pub(super) kind: Kind,
    pub(super) key: &'a SeriesKey,
    pub(super) start_ms: u64,
    pub(super) update_ms: u64,
    pub(super) delta: &'a Aggregate,
    pub(super) rates: Option<&'a Rates>,
}

/// Writes one record into a buffer, replacing what it held.
pub(super) fn write(
    out: &mut Vec<u8>,
    stamp: Stamp,
    payload: impl FnOnce(&mut Vec<u8>) -> Result<(), Error>,
) -> Result<(), Error> {
    out.clear();
    out.extend_from_slice(&MAGIC);
    out.push(VERSION);
    out.extend_from_slice(&[0; HEADER - 4]);
    put(out, &stamp)?;
    payload(out)?;
    let length = out.len() - HEADER;
    if length > PAYLOAD_MAX {
        return Err(Error::Record);
    }
    out[4..8].copy_from_slice(&(length as u32).to_le_bytes());
    let crc = crc(&out[3..8], &out[HEADER..]);
    out[8..HEADER].copy_from_slice(&crc.to_le_bytes());
    Ok(())
}

/// Appends a value to a payload.
pub(super) fn put(out: &mut Vec<u8>, value: &impl Serialize) -> Result<(), Error> {
    postcard::to_io(value, out).map(drop).map_err(|_| Error::Record)
}

pub(super) fn write_total(
    out: &mut Vec<u8>,
    revision: u64,
    kind: Kind,
    key: &SeriesKey,
    total: &Total,
) -> Result<(), Error> {
    let head = TotalHead { kind, key: key.as_str(), start_ms: total.start_ms, update_ms: total.update_ms };
    write(out, Stamp { content: Content::Total, revision }, |out| {
        put(out, &head)?;
        put(out, &total.aggregate)?;
        put(out, &total.rates)
    })
}

pub(super) fn write_batch(
    out: &mut Vec<u8>,
    revision: u64,
    head: &BatchHead,
    operations: &[u8],
    samples: u32,
) -> Result<(), Error> {
    write(out, Stamp { content: Content::Batch, revision }, |out| {
        put(out, head)?;
        out.extend_from_slice(operations);
        // At the end and of one length, so that it is read without the operations.
        out.extend_from_slice(&samples.to_le_bytes());
        Ok(())
    })
}

/// The payload of a receipt.
pub(super) fn put_receipt(out: &mut Vec<u8>, receipt: &Receipt) -> Result<(), Error> {
    let Receipt { key, is_json, text, at_ms } = receipt;
    put(out, &(at_ms, is_json, &key[..], &text[..]))
}

pub(super) fn read_receipt(record: &[u8]) -> Option<Receipt> {
    let (_, payload) = open_as(record, Content::Receipt)?;
    let (at_ms, is_json, key, text): (u64, bool, Vec<u8>, Vec<u8>) = postcard::from_bytes(payload).ok()?;
    Some(Receipt { key: key.into(), is_json, text: text.into(), at_ms })
}

/// The span of the payload of a record that begins here, if its header may be one.
pub(super) fn span(header: &[u8]) -> Option<Range<usize>> {
    if header.len() < HEADER || header[..3] != MAGIC || header[3] != VERSION {
        return None;
    }
    let length = u32::from_le_bytes(header[4..8].try_into().ok()?) as usize;
    (length <= PAYLOAD_MAX).then_some(HEADER..HEADER + length)
}

/// Stamp and payload of a whole record; none when a byte of it is not as it was written.
pub(super) fn open(record: &[u8]) -> Option<(Stamp, &[u8])> {
    let payload = record.get(span(record)?)?;
    let written = u32::from_le_bytes(record[8..HEADER].try_into().ok()?);
    if crc(&record[3..8], payload) != written {
        return None;
    }
    postcard::take_from_bytes(payload).ok()
}

fn open_as(record: &[u8], content: Content) -> Option<(u64, &[u8])> {
    let (stamp, payload) = open(record)?;
    (stamp.content == content).then_some((stamp.revision, payload))
}

pub(super) fn read_agent(record: &[u8]) -> Option<(u64, Agent)> {
    let (revision, payload) = open_as(record, Content::Agent)?;
    Some((revision, postcard::from_bytes(payload).ok()?))
}

pub(super) fn read_marks(record: &[u8]) -> Option<Marks> {
    let (_, payload) = open_as(record, Content::Marks)?;
    postcard::from_bytes(payload).ok()
}

/// Revision, kind, key and total.
pub(super) fn read_stamped_total(record: &[u8]) -> Option<(u64, Kind, &str, Total)> {
    let (revision, _) = open_as(record, Content::Total)?;
    read_total(record).map(|(kind, key, total)| (revision, kind, key, total))
}

/// The transaction that wrote a total, without a look at it.
pub(super) fn read_total_revision(record: &[u8]) -> Option<u64> {
    open_as(record, Content::Total).map(|(revision, _)| revision)
}

/// Revision, partition and position.
pub(super) fn read_position(record: &[u8]) -> Option<(u64, Partition, Position)> {
    let (revision, payload) = open_as(record, Content::Position)?;
    let (partition, rest): (Partition, _) = postcard::take_from_bytes(payload).ok()?;
    let position = postcard::from_bytes(rest).ok().or_else(|| {
        // As it was written before samples were counted.
        let (dropped, last, acknowledged, sent) = postcard::from_bytes(rest).ok()?;
        Some(Position { dropped, last, acknowledged, sent, samples: 0 })
    })?;
    Some((revision, partition, position))
}

/// Kind, key and times of a total, without its aggregate.
pub(super) fn read_total_head(record: &[u8]) -> Option<TotalHead<'_>> {
    let (_, payload) = open_as(record, Content::Total)?;
    postcard::take_from_bytes(payload).ok().map(|(head, _)| head)
}

pub(super) fn read_total(record: &[u8]) -> Option<(Kind, &str, Total)> {
    let (_, payload) = open_as(record, Content::Total)?;
    let (head, rest): (TotalHead<'_>, _) = postcard::take_from_bytes(payload).ok()?;
    let (aggregate, rates): (Aggregate, Option<Rates>) = postcard::from_bytes(rest).ok()?;
    // Records come from a topic too, where others write.
    if !aggregate.is_sound(head.kind) {
        return None;
    }
    let total = Total { start_ms: head.start_ms, update_ms: head.update_ms, aggregate, rates };
    Some((head.kind, head.key, total))
}

/// Head and encoded operations of a batch, and its samples.
pub(super) fn read_batch_parts(record: &[u8]) -> Option<(BatchHead, &[u8], u32)> {
    let (payload, samples) = match open_as(record, Content::Batch) {
        Some((_, counted)) => counted.split_last_chunk()?,
        None => (open_as(record, Content::Uncounted)?.1, &[0; 4]),
    };
    let (head, operations) = postcard::take_from_bytes(payload).ok()?;
    Some((head, operations, u32::from_le_bytes(*samples)))
}

pub(super) fn read_batch(record: &[u8]) -> Option<Batch> {
    let (head, mut rest, samples) = read_batch_parts(record)?;
    let mut operations = Vec::new();
    for _ in 0..head.operations {
        let (operation, after): (Operation, _) = postcard::take_from_bytes(rest).ok()?;
        operations.push(operation);
        rest = after;
    }
    let BatchHead { partition, sequence, flush, .. } = head;
    Some(Batch { partition, sequence, flush, samples: samples.into(), operations })
}

fn crc(head: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(payload);
    hasher.finalize()
}
