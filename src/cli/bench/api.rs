//! What an agent counted, read from its `GET /metrics`. HTTP/1.0, so that the answer ends with the connection; the page
//! is read line by line, since it has every series of the agent.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use crate::cli::send::{self, PATIENCE};
use crate::clock::Clock;
use crate::secret::Secret;
use crate::telemetry;

/// Most bytes of a page.
const PAGE_MAX: u64 = 4 << 30;

/// Until a busy agent is asked again.
const BUSY: Duration = Duration::from_millis(20);

/// The processor time of the agent's process.
const CPU: &str = "process_cpu_seconds_total";

/// Its memory.
const RESIDENT: &str = "process_resident_memory_bytes";

/// Where an agent's API is: `host:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Api(String);

impl FromStr for Api {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let host = text.strip_prefix("http://").map(|host| host.strip_suffix('/').unwrap_or(host));
        let has_port = |host: &&str| host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let is_host = |host: &&str| !host.contains(|c: char| c == '/' || c == '@' || c.is_whitespace());
        let host = host.filter(has_port).filter(is_host);
        host.map(|host| Self(host.to_owned())).ok_or_else(|| "write http://HOST:PORT".to_owned())
    }
}

impl std::fmt::Display for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "http://{}", self.0)
    }
}

/// What an agent had counted at one moment since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Figures {
    /// Datagrams read by the listener.
    pub(super) datagrams: u64,
    /// Datagrams dropped by the kernel, of all sockets.
    pub(super) kernel_drops: u64,
    /// Lines read by the listener, and what became of them.
    pub(super) lines: u64,
    pub(super) accepted: u64,
    pub(super) rejected: u64,
    /// Sum of the load's counters.
    pub(super) counters: u64,
    /// Processor time, where the system tells.
    pub(super) cpu_seconds: Option<f64>,
    /// Memory at that moment, where the system tells.
    pub(super) resident_bytes: Option<u64>,
}

impl Figures {
    /// What was added since an earlier reading; nothing where the agent was started again in between. Memory is not
    /// counted up, and stays as it is.
    pub(super) fn since(&self, before: &Self) -> Self {
        Self {
            datagrams: self.datagrams.saturating_sub(before.datagrams),
            kernel_drops: self.kernel_drops.saturating_sub(before.kernel_drops),
            lines: self.lines.saturating_sub(before.lines),
            accepted: self.accepted.saturating_sub(before.accepted),
            rejected: self.rejected.saturating_sub(before.rejected),
            counters: self.counters.saturating_sub(before.counters),
            cpu_seconds: self.cpu_seconds.zip(before.cpu_seconds).map(|(now, before)| now - before),
            resident_bytes: self.resident_bytes,
        }
    }
}

/// What is looked for in a page.
pub(super) struct Reader<'a> {
    api: &'a Api,
    /// The header that says who asks, where the agent wants to know.
    authorization: String,
    /// A label of the listener's metrics.
    listener: String,
    /// What the names of the load's counters begin with.
    counters: String,
}

impl<'a> Reader<'a> {
    /// Reads figures of a listener and of the counters that are called `name.c.NUMBER`.
    pub(super) fn new(api: &'a Api, token: Option<&Secret>, listener: &str, name: &str) -> Self {
        let header = |token: &Secret| format!("Authorization: Bearer {}\r\n", token.reveal());
        let authorization = token.map(header).unwrap_or_default();
        Self {
            api,
            authorization,
            listener: format!("listener=\"{listener}\""),
            counters: format!("{}_c_", name.replace('.', "_")),
        }
    }

    /// Reads the page as it is now. An agent makes few pages at a time, and tells who is too many to come again.
    pub(super) fn read(&self) -> io::Result<Figures> {
        let clock = Clock::default();
        loop {
            match self.read_once() {
                Err(error) if error.kind() == ErrorKind::ResourceBusy && clock.monotonic() < PATIENCE => {
                    thread::sleep(BUSY);
                }
                result => return result,
            }
        }
    }

    fn read_once(&self) -> io::Result<Figures> {
        let mut stream = send::connect(&self.api.0)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let Self { api, authorization, .. } = self;
        write!(stream, "GET /metrics HTTP/1.0\r\nHost: {}\r\n{authorization}Accept: text/plain\r\n\r\n", api.0)?;
        self.page(BufReader::with_capacity(1 << 16, stream.take(PAGE_MAX)))
    }

    /// Reads an answer.
    fn page(&self, mut answer: impl BufRead) -> io::Result<Figures> {
        let mut line = String::new();
        answer.read_line(&mut line)?;
        let status = line.split(' ').nth(1);
        if status == Some("401") {
            let remedy = "GET /metrics needs a token with the right to read; name its file with --token-file";
            return Err(io::Error::new(ErrorKind::PermissionDenied, remedy));
        }
        if status != Some("200") {
            let kind = if status == Some("503") { ErrorKind::ResourceBusy } else { ErrorKind::Other };
            return Err(io::Error::new(kind, format!("GET /metrics was answered {:?}", line.trim_end())));
        }
        let mut figures = Figures::default();
        let mut is_whole = false;
        loop {
            line.clear();
            if answer.read_line(&mut line)? == 0 {
                break;
            }
            is_whole |= line.starts_with(telemetry::BUILD_INFO.name);
            self.add(&line, &mut figures);
        }
        // An agent's own metrics stand behind its clients' series.
        let cut = || io::Error::new(ErrorKind::InvalidData, "GET /metrics is not the whole page of a tallyd");
        is_whole.then_some(figures).ok_or_else(cut)
    }

    fn add(&self, line: &str, figures: &mut Figures) {
        let Some((series, value)) = line.trim_end().rsplit_once(' ') else { return };
        let Ok(value) = value.parse::<f64>() else { return };
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let is_ours = labels.contains(&self.listener);
        if name.starts_with(&self.counters) {
            figures.counters += value as u64;
        } else if name == CPU {
            figures.cpu_seconds = Some(value);
        } else if name == RESIDENT {
            figures.resident_bytes = Some(value as u64);
        } else if name == telemetry::KERNEL_DROPS.name {
            figures.kernel_drops += value as u64;
        } else if name == telemetry::DATAGRAMS.name && is_ours {
            figures.datagrams += value as u64;
        } else if name == telemetry::LINES.name && is_ours {
            figures.lines += value as u64;
        } else if name == telemetry::LINES_ACCEPTED.name && is_ours {
            figures.accepted += value as u64;
        } else if name == telemetry::LINES_REJECTED.name && is_ours {
            figures.rejected += value as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\n\
        # HELP bench_c_0 Metric autogenerated by 3\n# TYPE bench_c_0 counter\nbench_c_0 3\nbench_c_1{a=\"b c\"} 1e3\n\
        bench_g_2 7\nbenched_c_1 9\ntallyd_build_info{version=\"0\"} 1\n\
        tallyd_datagrams_total{listener=\"udp\"} 12\ntallyd_datagrams_total{listener=\"unixgram\"} 5\n\
        tallyd_kernel_drops_total{socket=\"127.0.0.1:1#0\"} 2\ntallyd_kernel_drops_total{socket=\"[::1]:1#0\"} 3\n\
        tallyd_lines_total{listener=\"udp\"} 20\ntallyd_lines_accepted_total{listener=\"udp\"} 16\n\
        tallyd_lines_rejected_total{listener=\"udp\",reason=\"a\"} 3\n\
        tallyd_lines_rejected_total{listener=\"udp\",reason=\"b\"} 1\nprocess_cpu_seconds_total 1.25\n\
        process_resident_memory_bytes 4096\n";

    fn read(page: &str) -> io::Result<Figures> {
        let api = "http://localhost:7000/".parse().unwrap();
        Reader::new(&api, None, "udp", "bench").page(page.as_bytes())
    }

    #[test]
    fn a_page_is_read_for_one_listener_and_one_load() {
        let figures = Figures {
            datagrams: 12,
            kernel_drops: 5,
            lines: 20,
            accepted: 16,
            rejected: 4,
            counters: 1_003,
            cpu_seconds: Some(1.25),
            resident_bytes: Some(4_096),
        };
        assert_eq!(read(PAGE).unwrap(), figures);
        assert_eq!(
            figures.since(&figures),
            Figures { cpu_seconds: Some(0.0), resident_bytes: Some(4_096), ..Figures::default() }
        );
    }

    #[test]
    fn an_answer_that_is_no_whole_page_is_an_error() {
        let error = |page: &str| read(page).unwrap_err().to_string();
        assert!(error("HTTP/1.0 403 Forbidden\r\n\r\n").contains("403 Forbidden"));
        assert_eq!(read("HTTP/1.0 503 Busy\r\n\r\n").unwrap_err().kind(), ErrorKind::ResourceBusy);
        assert!(error("").contains("\"\""));
        assert!(error(&PAGE[..PAGE.find("tallyd_build").unwrap()]).contains("whole"));
    }

    #[test]
    fn an_api_is_a_host_and_a_port() {
        for text in ["http://127.0.0.1:7000", "http://[::1]:7000", "http://localhost:80"] {
            assert_eq!(text.parse::<Api>().unwrap().to_string(), text);
        }
        for text in ["localhost:7000", "https://localhost:1", "http://localhost", "http://a:1/data", "http://u@a:1"] {
            assert!(text.parse::<Api>().is_err(), "{text}");
        }
    }
}
