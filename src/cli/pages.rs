//! `tallyd man` and `tallyd completions`: the manual pages tallyd(1) and tallyd.toml(5), and what shells complete by.
//!
//! Packages print them from the executable that they install. Options come from the commands' own arguments, keys with
//! their defaults from the configuration's table, exit codes from [`Code`], so that none of it can go stale. What no
//! table knows stands here: files, signals, examples. Nothing is read, and nothing but the page is written.

use std::io::{self, Write};

use clap::{CommandFactory, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, roman};

use super::{Cli, Code, Failure};
use crate::config::{Config, Key, Reload, SEED};

/// Arguments of `man`.
#[derive(Debug, clap::Args)]
pub struct ManArgs {
    /// The page
    #[arg(value_enum, value_name = "PAGE", default_value_t = Page::Tallyd)]
    pub page: Page,
    /// The day that the page is of; packages name that of their release
    #[arg(long, value_name = "YYYY-MM-DD", default_value = "", hide_default_value = true)]
    pub date: String,
}

/// A manual page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Page {
    /// The program, section 1
    #[value(name = "tallyd")]
    Tallyd,
    /// The configuration file, section 5
    #[value(name = "tallyd.toml")]
    Configuration,
}

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: Shell,
}

/// Writes a manual page to `out`, for man(1) to show.
pub fn man(args: &ManArgs, out: &mut impl Write) -> Result<(), Failure> {
    let page = match args.page {
        Page::Tallyd => program(&args.date)?,
        Page::Configuration => configuration(&args.date)?,
    };
    out.write_all(tidy(&page).as_bytes())?;
    Ok(())
}

/// Writes to `out` what a shell completes tallyd's arguments by.
pub fn completions(args: &CompletionsArgs, out: &mut impl Write) -> Result<(), Failure> {
    // Its generator ends the process where it can't write.
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "tallyd", &mut text);
    out.write_all(&text)?;
    Ok(())
}

/// The exit codes, in the order of their numbers.
const CODES: [Code; 6] =
    [Code::Data, Code::NoInput, Code::Unavailable, Code::Io, Code::Permission, Code::Configuration];

fn meaning(code: Code) -> &'static str {
    match code {
        Code::Data => "`tallyd explain`: a line is rejected.",
        Code::NoInput => "A file that was named is missing.",
        Code::Unavailable => "An address is in use or not of this host, or another process has the state directory.",
        Code::Io => "Input or output failed.",
        Code::Permission => "The system forbids it.",
        Code::Configuration => "The configuration is wrong. The unit does not start tallyd again until somebody does.",
    }
}

const SIGNALS: [(&str, &str); 3] = [
    (
        "SIGTERM, SIGINT",
        "Stop: what the kernel holds is read, the last flush is written, and requests end, within `limits.stop`.",
    ),
    (
        "SIGHUP",
        "Read the configuration and the files that it names again. What is wrong, or needs a restart, is refused as a \
         whole and logged, and the agent goes on as before.",
    ),
    (
        "SIGUSR2",
        "Hand over to the executable that now stands at the path which was resolved at the start, on the same sockets, \
         so that an upgrade loses no datagram. If the new one dies before it is ready, the old one goes on.",
    ),
];

const FILES: [(&str, &str); 4] = [
    ("/etc/tallyd/tallyd.toml", "The configuration that the packaged unit names; see tallyd.toml(5)."),
    ("/etc/default/tallyd", "Variables of the packaged unit."),
    (
        "/var/lib/tallyd",
        "The state directory of the packaged unit, with the journal. Whoever starts tallyd by hand without \
         `state_dir` gets ./tallyd-data.",
    ),
    ("/usr/share/doc/tallyd/examples", "A dashboard for Grafana, and the kernel's settings for large receive buffers."),
];

const SYSTEMD: [(&str, &str); 3] = [
    ("STATE_DIRECTORY", "Its first entry is the state directory unless `state_dir` is set."),
    ("LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES", "Sockets that are handed over."),
    ("NOTIFY_SOCKET, WATCHDOG_USEC", "Where readiness and progress are told."),
];

const EXAMPLES: [(&str, &[&str]); 6] = [
    (
        "Send a line, and read back what became of it:",
        &["tallyd send 'page.views:3|c'", "curl http://localhost:7000/data/metrics/page.views"],
    ),
    ("Ask what a line means, or why it is rejected:", &["tallyd explain 'api.latency:12.5|ms|@0.5|#env:prod'"]),
    (
        "Check the configuration before a reload:",
        &["tallyd check --config /etc/tallyd/tallyd.toml", "systemctl reload tallyd"],
    ),
    ("See every key's value and where it comes from:", &["tallyd check --config /etc/tallyd/tallyd.toml --print"]),
    (
        "Run a second agent, which keeps nothing, on ports of its own:",
        &[
            "tallyd --set store.kind=memory --set listen.udp=127.0.0.1:9125 --set listen.tcp= \\",
            "  --set http.ingest=127.0.0.1:9000 --set http.api=127.0.0.1:9001",
        ],
    ),
    (
        "Measure what the way to the agent loses:",
        &["tallyd bench --rate 100000 --time 10s --api http://127.0.0.1:7000"],
    ),
];

/// tallyd(1).
fn program(date: &str) -> io::Result<String> {
    let mut page = Text::new("TALLYD", "1", date, "User Commands");
    let bare = Cli::command().disable_help_flag(true).disable_version_flag(true).disable_help_subcommand(true);
    let commands: Vec<_> = bare
        .get_subcommands()
        .map(|command| {
            let name = format!("tallyd {}", command.get_name());
            command.clone().disable_help_flag(true).bin_name(&name).display_name(name)
        })
        .collect();
    let about = bare.get_about().map(ToString::to_string).unwrap_or_default();
    page.section("NAME").text(&format!("tallyd - {about}"));
    page.section("SYNOPSIS")
        .generated(|out| Man::new(bare.clone().subcommand_value_name("command")).render_synopsis_section(out))?;
    for command in &commands {
        page.control("br").generated(|out| Man::new(command.clone()).render_synopsis_section(out))?;
    }
    page.section("DESCRIPTION");
    page.text(
        "tallyd takes StatsD and DogStatsD lines by UDP, TCP and unix sockets, and JSON by HTTP, counts them exactly, \
         keeps the totals in an embedded journal, in Redis or in Kafka, and shows them as JSON and to Prometheus. \
         Without a command it runs the agent. It needs no configuration: it listens on the loopback addresses, on port \
         8125 for lines, 8000 for JSON and 7000 for whoever reads.",
    );
    page.section("OPTIONS")
        .generated(|out| Man::new(Cli::command().disable_help_subcommand(true)).render_options_section(out))?;
    page.section("COMMANDS");
    for command in &commands {
        let name = command.get_bin_name().unwrap_or_default();
        page.subsection(name).text(&format!("{}.", command.get_about().map(ToString::to_string).unwrap_or_default()));
        page.generated(|out| Man::new(command.clone()).render_options_section(out))?;
    }
    page.section("ENVIRONMENT");
    page.entry("TALLYD_CONFIG", "The configuration file, unless `--config` names one.");
    variables(&mut page);
    SYSTEMD.iter().for_each(|(name, text)| page.entry(name, &format!("Set by systemd. {text}")));
    page.section("FILES").entries(&FILES);
    page.section("SIGNALS").entries(&SIGNALS);
    page.section("EXIT STATUS").entry("0", "Stopped as asked, or done.");
    page.entry("2", "Wrong usage.");
    CODES.iter().for_each(|code| page.entry(&u8::from(*code).to_string(), meaning(*code)));
    page.section("EXAMPLES").examples(&EXAMPLES);
    page.section("SEE ALSO").text("`tallyd.toml`(5), `systemctl`(1), `journalctl`(1), `nc`(1), `udp`(7)");
    page.text("/usr/share/doc/tallyd/README.md.gz is the manual; `GET /openapi.json` describes the API.");
    Ok(page.0)
}

/// What of the environment sets keys.
fn variables(page: &mut Text) {
    page.entry(
        "TALLYD_SECTION__KEY",
        "The key of that section; two underscores stand for each dot of a key's name. `TALLYD_STORE__KIND=redis` sets \
         `store.kind`. Lists are separated by commas. An empty variable sets nothing, but for a list, which it empties.",
    );
    for (name, key) in SEED {
        page.entry(name, &format!("Sets `{key}`, where `{}` does not.", variable(key)));
    }
}

/// The variable that sets a key.
fn variable(key: &str) -> String {
    format!("TALLYD_{}", key.to_uppercase().replace('.', "__"))
}

const VALUES: [(&str, &str); 4] = [
    ("times", "A number and a unit, as in `250ms`, `10s`, `1h 30m`, in quotation marks."),
    ("sizes", "Bytes, as in `512`, `8MiB`, `4GB`, in quotation marks."),
    ("addresses", "An address and a port, as in `127.0.0.1:8125`, `[::1]:8125`. Port 0 picks a free one."),
    ("lists", "As in TOML; in a variable and behind `--set` also separated by commas."),
];

const CONFIGURATIONS: [(&str, &[&str]); 3] = [
    (
        "Lines from other machines, in a buffer that holds a burst:",
        &["[listen]", "udp = [\"0.0.0.0:8125\", \"[::]:8125\"]", "receive_buffer = \"32MiB\""],
    ),
    (
        "Totals shared by many agents in a Redis:",
        &["[store]", "kind = \"redis\"", "[store.redis]", "url = \"rediss://tallyd:secret@redis.example:6380/2\""],
    ),
    (
        "The names that statsd_exporter's rules give, on a listener of their own for Prometheus:",
        &["[mapping]", "file = \"/etc/tallyd/mapping.yml\"", "[http]", "scrape = [\"0.0.0.0:9102\"]"],
    ),
];

/// tallyd.toml(5).
fn configuration(date: &str) -> io::Result<String> {
    let mut page = Text::new("TALLYD.TOML", "5", date, "File Formats");
    page.section("NAME").text("tallyd.toml - configuration of tallyd, the metrics agent");
    page.section("SYNOPSIS").text("`/etc/tallyd/tallyd.toml`, or what `--config` or `TALLYD_CONFIG` names");
    page.section("DESCRIPTION");
    page.text(
        "A TOML file of sections and keys. Every key has a default, so the file may be empty or missing. An unknown key, \
         and a value that does not fit, is an error with its place in the file and a remedy; `tallyd check` tells all \
         of them at once, and changes nothing.",
    );
    page.text("A value comes from the highest of these layers that has one:");
    page.entry("1.", "`--set section.key=value` on the command line, the last one of a key.");
    page.entry("2.", "The environment: `TALLYD_SECTION__KEY`, then the names under ENVIRONMENT.");
    page.entry("3.", "The file.");
    page.entry("4.", "What is built in: the defaults below.");
    page.text("`tallyd check --print` shows the result, and which layer each value comes from, without passwords.");
    page.text(
        "SIGHUP, `systemctl reload tallyd` and `POST /-/reload` read it again. Keys that are marked with `reload` \
         change at once; with a change of any other key the reload is refused as a whole, and takes a restart.",
    );
    page.section("VALUES").entries(&VALUES);
    page.section("KEYS");
    Config::described().for_each(|(key, default)| described(&mut page, key, default));
    page.section("ENVIRONMENT");
    variables(&mut page);
    page.section("FILES");
    page.entry(
        "/etc/tallyd/tallyd.toml",
        "As installed it has every key, commented out, with its default: what `tallyd check --print-defaults` prints.",
    );
    page.section("EXAMPLES").examples(&CONFIGURATIONS);
    page.section("SEE ALSO").text("`tallyd`(1)");
    Ok(page.0)
}

/// A section or a key: what it does, its default, its variable, and whether a reload may change it.
fn described(page: &mut Text, key: &Key, default: Option<String>) {
    let Some(default) = default else {
        page.subsection(&format!("[{}]", key.name)).text(key.help);
        return;
    };
    let name = key.name.rsplit('.').next().unwrap_or(key.name);
    let reload = match key.reload {
        Reload::Now => "; `reload`",
        Reload::Restart => "",
    };
    page.entry_of(
        &[bold(name), roman(format!(" = {default}"))],
        &format!("{} ({}{reload})", key.help, variable(key.name)),
    );
}

/// A page under way, as roff; in texts what stands between backquotes is bold.
struct Text(String);

impl Text {
    fn new(title: &str, section: &str, date: &str, manual: &str) -> Self {
        let source = concat!("tallyd ", env!("CARGO_PKG_VERSION"));
        let mut head = Roff::new();
        head.control("TH", [title, section, date, source, manual]);
        Self(head.render())
    }

    fn put(&mut self, fill: impl FnOnce(&mut Roff) -> &mut Roff) -> &mut Self {
        let mut part = Roff::new();
        fill(&mut part);
        self.0 += &part.render();
        self
    }

    fn control(&mut self, name: &str) -> &mut Self {
        self.put(|roff| roff.control(name, []))
    }

    fn section(&mut self, name: &str) -> &mut Self {
        self.put(|roff| roff.control("SH", [name]))
    }

    fn subsection(&mut self, name: &str) -> &mut Self {
        self.put(|roff| roff.control("SS", [name]))
    }

    /// A paragraph.
    fn text(&mut self, text: &str) {
        self.put(|roff| roff.control("PP", []).text(inlines(text)));
    }

    /// A term and what it means.
    fn entry(&mut self, term: &str, text: &str) {
        self.entry_of(&[bold(term)], text);
    }

    fn entry_of(&mut self, term: &[Inline], text: &str) {
        self.put(|roff| roff.control("TP", []).text(term).text(inlines(text)));
    }

    fn entries(&mut self, entries: &[(&str, &str)]) {
        entries.iter().for_each(|(term, text)| self.entry(term, text));
    }

    fn examples(&mut self, examples: &[(&str, &[&str])]) {
        for (text, lines) in examples {
            self.text(text);
            self.put(|roff| {
                roff.control("PP", []).control("RS", ["4"]).control("nf", []);
                lines.iter().fold(roff, |roff, line| roff.text([roman(*line)])).control("fi", []).control("RE", [])
            });
        }
    }

    /// What clap_mangen writes, without the heading: ours stands there already.
    fn generated(&mut self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
        let mut text = Vec::new();
        write(&mut text)?;
        let text = String::from_utf8_lossy(&text).into_owned();
        text.lines().filter(|line| !line.starts_with(".SH ")).for_each(|line| self.0 += &format!("{line}\n"));
        Ok(())
    }
}

fn inlines(text: &str) -> Vec<Inline> {
    let part = |(at, part): (usize, &str)| if at % 2 == 1 { bold(part) } else { roman(part) };
    text.split('`').enumerate().map(part).collect()
}

/// Longest line of a page's source, as man pages have them.
const WIDTH: usize = 79;

/// The parts put together: one preamble, no blank lines nor blanks at the ends of lines, no break where there is one, long
/// lines of running text wrapped.
fn tidy(page: &str) -> String {
    let mut out = String::with_capacity(page.len());
    let (mut is_first, mut is_filled, mut last) = (true, true, "");
    for line in page.lines().map(str::trim_end).filter(|line| !line.is_empty()) {
        let is_preamble = line.starts_with(".ie \\n(.g") || line.starts_with(".el .ds Aq");
        let is_begun = last.starts_with(".SH") || last.starts_with(".SS");
        if is_preamble && !is_first || line == ".PP" && is_begun || line == ".br" && last == line {
            continue;
        }
        (is_first, last) = (is_first && is_preamble, line);
        is_filled = line != ".nf" && (is_filled || line == ".fi");
        if is_filled && !line.starts_with('.') { wrap(line, &mut out) } else { out += &format!("{line}\n") }
    }
    out
}

/// Breaks a line at blanks, but where what follows would be taken for a macro.
fn wrap(line: &str, out: &mut String) {
    let mut width = 0;
    for word in line.split(' ') {
        let breaks = width > 0 && width + word.len() >= WIDTH && !word.starts_with(['.', '\'']) && !word.is_empty();
        if width > 0 {
            out.push(if breaks { '\n' } else { ' ' });
        }
        width = if breaks { 0 } else { width } + word.len() + 1;
        out.push_str(word);
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(page: Page) -> String {
        let mut out = Vec::new();
        man(&ManArgs { page, date: "2026-01-31".to_owned() }, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn every_key_stands_in_the_page_with_its_default_and_its_variable() {
        let text = page(Page::Configuration).replace("\\-", "-").replace('\n', " ").replace("\\*(Aq", "'");
        let mut keys = 0;
        for (key, default) in Config::described() {
            let Some(default) = default else {
                assert!(text.contains(&format!(".SS [{}] ", key.name)), "[{}]", key.name);
                continue;
            };
            keys += 1;
            let name = key.name.rsplit('.').next().unwrap();
            assert!(text.contains(&format!("\\fB{name}\\fR = {default} ")), "{} = {default}\n{text}", key.name);
            let (_, after) = text.split_once(&format!("({}", variable(key.name))).unwrap();
            assert_eq!(after.starts_with("; \\fBreload\\fR)"), key.reload == Reload::Now, "{}", key.name);
        }
        assert!(keys > 50);
    }

    #[test]
    fn the_program_s_page_has_every_command_option_and_exit_code() {
        let text = page(Page::Tallyd).replace("\\-", "-");
        for command in Cli::command().get_subcommands() {
            assert!(text.contains(&format!(".SS \"tallyd {}\"", command.get_name())), "{}", command.get_name());
            for option in command.get_arguments().filter_map(clap::Arg::get_long) {
                assert!(text.contains(&format!("\\fB--{option}\\fR")), "{} --{option}", command.get_name());
            }
        }
        for code in CODES {
            assert!(text.contains(&format!("\\fB{}\\fR\n", u8::from(code))), "{code:?}");
        }
        for section in ["FILES", "ENVIRONMENT", "SIGNALS", "\"EXIT STATUS\"", "EXAMPLES", "\"SEE ALSO\""] {
            assert!(text.contains(&format!("\n.SH {section}\n")), "{section}");
        }
    }

    #[test]
    fn wrapping_keeps_the_text_and_makes_no_macro_of_it() {
        let line = format!("{} .el 'x {}", "word ".repeat(15).trim_end(), "word ".repeat(15).trim_end());
        let mut out = String::new();
        wrap(&line, &mut out);
        assert_eq!(out.replace('\n', " ").trim_end(), line);
        assert!(out.lines().count() > 1 && out.lines().all(|line| !line.starts_with(['.', '\''])), "{out}");
    }
}
