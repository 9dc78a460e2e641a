//! What a client is told when its request is not answered as asked: `application/problem+json` (RFC 9457).
//!
//! The type is `about:blank`, so the title is the phrase of the status and `detail` says what was wrong with this request
//! and what to do instead. Members beyond the RFC's stand behind its own. Never holds a stack trace or a path of this host.

use hyper::header::{ALLOW, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde_json::Value;

use super::server::{Body, full};
use crate::sample::Reason;

/// A problem on its way to the client.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// The status of the answer.
    pub status: StatusCode,
    detail: String,
    members: Vec<(&'static str, Value)>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Problem {
    /// A problem in one sentence.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), members: Vec::new(), headers: Vec::new() }
    }

    /// A request that makes no sense as it was sent.
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    /// A limit that is shared and used up for now; asking again in a second makes sense.
    pub fn busy(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, detail).header(RETRY_AFTER, HeaderValue::from_static("1"))
    }

    /// A method that the resource does not have; `allow` are those it has.
    pub fn method(allow: &str) -> Self {
        let problem = Self::new(StatusCode::METHOD_NOT_ALLOWED, format!("this resource answers {allow}"));
        match HeaderValue::from_str(allow) {
            Ok(allow) => problem.header(ALLOW, allow),
            Err(_) => problem,
        }
    }

    /// With the reason for which a sample was rejected.
    #[must_use]
    pub fn reason(self, reason: Reason) -> Self {
        self.member("reason", Value::from(reason.name()))
    }

    /// With a member that the RFC does not name.
    #[must_use]
    pub fn member(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.members.push((name, value.into()));
        self
    }

    /// With a header.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// The JSON text.
    pub fn text(&self) -> String {
        let mut text = String::from("{\"type\":\"about:blank\"");
        let title = Value::from(self.status.canonical_reason().unwrap_or_default());
        let members = [("title", title), ("status", Value::from(self.status.as_u16()))];
        let detail = [("detail", Value::from(self.detail.as_str()))];
        for (name, value) in members.into_iter().chain(detail).chain(self.members.iter().cloned()) {
            text.push_str(&format!(",\"{name}\":{value}"));
        }
        text.push_str("}\n");
        text
    }

    /// The whole answer as bytes, for a connection that is closed behind it.
    pub fn last_words(&self) -> Vec<u8> {
        let text = self.text();
        let phrase = self.status.canonical_reason().unwrap_or_default();
        let mut answer =
            format!("HTTP/1.1 {} {phrase}\r\ncontent-type: application/problem+json\r\n", self.status.as_u16());
        for (name, value) in &self.headers {
            answer.push_str(&format!("{name}: {}\r\n", value.to_str().unwrap_or_default()));
        }
        answer.push_str(&format!("content-length: {}\r\nconnection: close\r\n\r\n{text}", text.len()));
        answer.into_bytes()
    }
}

impl From<Problem> for Response<Body> {
    fn from(problem: Problem) -> Self {
        let mut response = Self::new(full(problem.text()));
        *response.status_mut() = problem.status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        response.headers_mut().extend(problem.headers);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_json_with_the_members_of_the_rfc() {
        let problem = Problem::bad_request("a \"quoted\"\nword").reason(Reason::BadJson).member("line", 3);
        let json: Value = serde_json::from_str(&problem.text()).unwrap();
        assert_eq!(json["type"], "about:blank");
        assert_eq!(json["title"], "Bad Request");
        assert_eq!(json["status"], 400);
        assert_eq!(json["detail"], "a \"quoted\"\nword");
        assert_eq!(json["reason"], "bad_json");
        assert_eq!(json["line"], 3);
    }

    #[test]
    fn last_words_say_their_own_length() {
        let words = String::from_utf8(Problem::busy("too many").last_words()).unwrap();
        let (head, body) = words.split_once("\r\n\r\n").unwrap();
        assert!(head.contains("retry-after: 1"));
        assert!(head.contains(&format!("content-length: {}", body.len())));
    }
}
