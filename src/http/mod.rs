//! Requests in, pages out.

pub mod scrape;
