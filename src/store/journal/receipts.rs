//! Receipts: what requests were told under their `Idempotency-Key`, oldest first under rising numbers, each written by
//! the transaction that has its request's samples.
//!
//! No more than `limits.idempotency_keys`, 24 hours and 32 MiB; the oldest go with the next that come.

use std::collections::VecDeque;

use redb::{ReadTransaction, ReadableTable, WriteTransaction};

use super::record::{self, Content, Stamp};
use super::{Error, Journal, RECEIPTS, count_damaged};
use crate::receipt::{BYTES_MAX, Receipt};

/// Which receipts are in the file.
#[derive(Debug, Default)]
pub(super) struct Receipts {
    /// The number of the oldest.
    first: u64,
    /// When each was given, and the bytes of its key and text.
    held: VecDeque<(u64, usize)>,
    bytes: usize,
}

impl Receipts {
    pub(super) fn load(transaction: &ReadTransaction) -> Result<Self, Error> {
        let mut receipts = Self::default();
        for entry in transaction.open_table(RECEIPTS)?.iter()? {
            let (number, value) = entry?;
            // What is damaged is as good as old.
            let (at_ms, bytes) = record::read_receipt(value.value()).map_or((0, 0), |r| (r.at_ms, r.bytes()));
            if receipts.held.is_empty() {
                receipts.first = number.value();
            }
            // A number that is missing holds a place, so that those after it keep theirs.
            let place = (number.value() - receipts.first) as usize;
            receipts.held.resize(place, (0, 0));
            receipts.push(at_ms, bytes);
        }
        Ok(receipts)
    }

    fn push(&mut self, at_ms: u64, bytes: usize) {
        self.held.push_back((at_ms, bytes));
        self.bytes += bytes;
    }

    /// How many of the oldest have to go when others come.
    fn surplus(&self, new: &[Receipt], now_ms: u64, max: usize) -> usize {
        let mut bytes = self.bytes + new.iter().map(Receipt::bytes).sum::<usize>();
        let mut count = self.held.len() + new.len();
        let mut gone = 0;
        for (at_ms, size) in &self.held {
            if count <= max && bytes <= BYTES_MAX && !Receipt::is_old(*at_ms, now_ms) {
                break;
            }
            (count, bytes, gone) = (count - 1, bytes - size, gone + 1);
        }
        gone
    }

    /// Writes new ones and removes the oldest beyond the bounds. Answers how many are removed, for [`Receipts::settle`].
    pub(super) fn write(
        &self,
        transaction: &WriteTransaction,
        revision: u64,
        new: &[Receipt],
        now_ms: u64,
        max: usize,
    ) -> Result<usize, Error> {
        if new.is_empty() {
            return Ok(0);
        }
        let gone = self.surplus(new, now_ms, max);
        let mut table = transaction.open_table(RECEIPTS)?;
        if gone > 0 {
            table.retain_in(self.first..self.first + gone as u64, |_, _| false)?;
        }
        let mut out = Vec::new();
        for (number, receipt) in (self.first + self.held.len() as u64..).zip(new) {
            let stamp = Stamp { content: Content::Receipt, revision };
            record::write(&mut out, stamp, |out| record::put_receipt(out, receipt))?;
            table.insert(number, out.as_slice())?;
        }
        Ok(gone)
    }

    /// Takes note of what was written, once it is committed.
    pub(super) fn settle(&mut self, new: &[Receipt], gone: usize) {
        self.first += gone as u64;
        self.bytes -= self.held.drain(..gone).map(|(_, bytes)| bytes).sum::<usize>();
        new.iter().for_each(|receipt| self.push(receipt.at_ms, receipt.bytes()));
    }
}

impl Journal {
    /// What requests were told under their keys, oldest first. Damaged records are left out and counted.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn receipts(&self) -> Result<Vec<Receipt>, Error> {
        let collect = |transaction: &ReadTransaction| {
            let mut receipts = Vec::new();
            for entry in transaction.open_table(RECEIPTS)?.iter()? {
                match record::read_receipt(entry?.1.value()) {
                    Some(receipt) => receipts.push(receipt),
                    None => count_damaged("receipt"),
                }
            }
            Ok(receipts)
        };
        self.database.read(collect).map_err(Error::counted)
    }

    /// Of receipts that wait to be written, leaves no more than would be kept.
    pub fn trim_receipts(&self, waiting: &mut Vec<Receipt>) {
        let surplus = waiting.len().saturating_sub(self.limits.receipts);
        waiting.drain(..surplus);
    }
}
