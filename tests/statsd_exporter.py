#!/usr/bin/env python3
"""tallyd beside statsd_exporter: both get the same mapping file and the same lines, both are scraped, and every series of
clients must be the same, but for the differences in DIFFERENCES, each of which is meant and must be met at least once.

    statsd_exporter.py TALLYD STATSD_EXPORTER [SEED]

Lines: those of corpus/lines.jsonl, each under a prefix of its own, so that a difference is blamed on its line; those of
corpus/mapping.jsonl with their mapping files; 10,000 random ones, whose names say what may differ; and a thousand over
TCP; and observations shown as native histograms, in protobuf. Numbers are compared as numbers. Quantiles and buckets are held against the values that were sent: tallyd's must be
right, statsd_exporter's need not be. Families of the servers themselves are left out.
"""

import base64
import itertools
import json
import math
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
PATIENCE = 20.0
RANDOM_LINES = 10_000
STREAM_LINES = 1_000
# What tallyd promises of a quantile, and how wide the buckets are in which it keeps values.
QUANTILE_ERROR, BUCKET_WIDTH = 0.01, 2 ** (1 / 64) - 1

# What differs on purpose: statsd_exporter | tallyd | why.
DIFFERENCES = {
    "set": ("drops `\\|s`", "a gauge of the distinct values in a window", "StatsD has sets"),
    "meter": ("drops `\\|m`", "`name_total` and `name_rate`", "meters are one of our types"),
    "kv": ("drops `\\|kv`", "a gauge", "statsite's type"),
    "absolute": ("drops `\\|C`", "a counter of the differences", "brubeck's type"),
    "packed": ("drops a line of packed values unless of `ms`, `h`, `d`", "takes `1:2:3\\|c` and `\\|g`", "DogStatsD has them"),
    "rate": ("repeats an observation int(1 / rate) times", "weighs it with 1 / rate", "`@0.3` stands for 3.33, not for 3"),
    "rates": ("of two rates, the product", "the last one", "as DogStatsD's server"),
    "bad_rate": ("a rate of 0, above 1, or no number: takes the value, even so divided", "refuses and counts the line",
                 "nobody can say how many it stands for"),
    "decrement": ("no series for a counter that was only decremented", "0", "it is there; decrements are counted in "
                  "`tallyd_scrape_partial`"),
    "not_finite": ("takes NaN and Inf, which spoil sum and quantiles for ever", "refuses and counts the line", "StatsD has no such values"),
    "digits": ("reads numbers as Go does: `1_0`, `0x10`", "refuses and counts the line", "StatsD has no such numbers"),
    "negative_timer": ("takes a negative time", "refuses and counts the line", "clocks that step back make them"),
    "type_clash": ("of several types of one name the first; drops the samples of the others",
                   "all; the later ones get their type behind the name", "nothing is lost; `GET /data/conflicts` lists them"),
    "same_tag": ("of a tag given twice the last value", "both, joined by a comma", "nothing is lost"),
    "equal_gauges": ("gauges whose names become equal are one that all of them change", "the newest of them is shown",
                     "they stay apart in JSON, where none changes another"),
    "reserved_label": ("a tag `le` is the label `le`", "`exported_le`", "it is the label of buckets, and Prometheus' own"),
    "container": ("`\\|c:ID` is the label `container_id`; refuses it without an ID", "read, and no label", "a series for each "
                  "container would be another identity than the client gave"),
    "field": ("drops a line with a field it does not know, such as `\\|e:`, `\\|card:`, or an empty one", "leaves the field out",
              "DogStatsD's clients send them"),
    "timestamp": ("does not read `\\|T`", "refuses one that is no time", "what it says cannot be right"),
    "two_dialects": ("drops a line with tags of two dialects", "takes both", "nothing is ambiguous about it"),
    "graphite": ("`name;tag=value`: one long name", "tags", "Graphite's dialect; see `protocol.tag_dialects`"),
    "half_bracket": ("`tag]name` is a name", "refuses and counts the line", "tags that were cut off"),
    "blank": ("blanks around a value, `\\r\\n` in datagrams: drops the line", "does not mind", "they mean nothing"),
    "odd_line": ("a name with a tab or `\\|`, events and byte-order marks as names", "refuses the name, takes the event, skips the mark",
                 "no client means such a name"),
    "quantiles": ("within a rank error of 5, 1, 0.1 %, over 10 minutes that age by 2", "within 1 % of the exact value, over the last closed "
                  "and the current window", "exactness"),
    "buckets": ("exact", "a value less than 1.1 % above a bound may count below it", "any bounds can be asked for afterwards"),
    "native_times": ("exact", "of a native histogram of times, a value within 0.54 % of a bound may be on its other side",
                     "times are kept in milliseconds, whose buckets are not those of seconds"),
    "one_letter": ("refuses labels of one letter in a mapping file", "takes them", "Prometheus takes them"),
}
# Families of the servers themselves, and the line that says that all before it was read.
OWN = re.compile(r"(tallyd|process|go|promhttp|statsd_exporter|statsd_metric_mapper)_|sync$")


class Server:
    """A process that takes lines and is scraped."""

    def __init__(self, command, lines, scrape, log):
        self.lines, self.url = ("127.0.0.1", lines), f"http://127.0.0.1:{scrape}/metrics"
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.log = log
        with open(log, "wb") as to:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=to, stderr=to)

    def scrape(self):
        with urllib.request.urlopen(self.url, timeout=PATIENCE) as answer:
            return exposition(answer.read().decode())

    def wait_for(self, what, condition):
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                if condition(self.scrape()):
                    return
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None:
                    sys.exit(f"a server ended: {Path(self.log).read_text()}")
            time.sleep(0.01)
        sys.exit(f"waited {PATIENCE:.0f} s for {what} of {self.url}:\n{Path(self.log).read_text()[-2000:]}")

    def native_histograms(self):
        """By name and labels, of protobuf: schema, zero's count, count, sum, buckets below and above zero."""
        request = urllib.request.Request(self.url, headers={"Accept": PROTOBUF})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return dict(native_histograms(answer.read()))

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.socket.close()


LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)",?')


def exposition(text):
    """Name, labels in order -> value; types as `# TYPE`."""
    series = {}
    for line in text.split("\n"):
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            series[name, "# TYPE"] = kind
        elif line.startswith("# HELP "):
            _, _, name, text = line.split(" ", 3)
            # Both make up a text where a rule gives none.
            if "autogenerated by" not in text and not text.endswith("received by tallyd.") and "in a window" not in text:
                series[name, "# HELP"] = text
        elif line:
            head, value = line.rsplit(" ", 1)
            name, _, labels = head.partition("{")
            series[name, tuple(sorted(LABEL.findall(labels[:-1])))] = float(value)
    return {key: value for key, value in series.items() if not OWN.match(key[0])}, series


PROTOBUF = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"


def varint(data, at):
    number = shift = 0
    while True:
        number |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return number, at


def fields(data):
    """The fields of a message: number -> values."""
    found, at = defaultdict(list), 0
    while at < len(data):
        tag, at = varint(data, at)
        if tag & 7 == 0:
            value, at = varint(data, at)
        elif tag & 7 == 1:
            value, at = struct.unpack("<d", data[at:at + 8])[0], at + 8
        else:
            length, at = varint(data, at)
            value, at = data[at:at + length], at + length
        found[tag >> 3].append(value)
    return found


def native_histograms(data):
    at = 0
    while at < len(data):
        length, at = varint(data, at)
        family, at = fields(data[at:at + length]), at + length
        if OWN.match(family[1][0].decode()) or family[3] != [4]:
            continue
        for metric in map(fields, family[4]):
            labels = tuple(sorted((one[1][0].decode(), one[2][0].decode()) for one in map(fields, metric[1])))
            one = fields(metric[7][0])
            if 5 in one:
                yield (family[1][0].decode(), labels), (signed(one[5][0]), one[7][0], one[1][0], one[2][0],
                                                        buckets(one, 9, 10), buckets(one, 12, 13))


def signed(number):
    return number >> 1 ^ -(number & 1)


def buckets(histogram, span, delta):
    """Index -> count, of spans and of differences that are packed in one field or stand in one each."""
    deltas = []
    for value in histogram[delta]:
        at = 0
        while isinstance(value, bytes) and at < len(value):
            one, at = varint(value, at)
            deltas.append(signed(one))
        deltas += [] if isinstance(value, bytes) else [signed(value)]
    counts, index, found = iter(itertools.accumulate(deltas)), 0, {}
    for one in map(fields, histogram[span]):
        index += signed(one[1][0]) if one[1] else 0
        for _ in range(one[2][0]):
            found[index] = next(counts)
            index += 1
    # Both may fill small gaps with empty buckets.
    return {index: count for index, count in found.items() if count}


class Pair:
    """tallyd and statsd_exporter with one mapping file."""

    marks = itertools.count(1)

    def __init__(self, programs, mapping):
        self.directory = tempfile.TemporaryDirectory()
        path = Path(self.directory.name)
        rules = path / "mapping.yml"
        # A rule of its own, since some files drop what no rule matches.
        head = "" if "mappings:\n" in mapping else "mappings:\n"
        rules.write_text(f"{mapping}{head}- {{match: sync, name: sync}}\n")
        tallyd, exporter = programs
        lines, scrape, other_lines, other_scrape = free_ports(4)
        settings = {"listen.udp": f"127.0.0.1:{lines}", "listen.tcp": f"127.0.0.1:{lines}", "http.ingest": "127.0.0.1:0",
                    "http.api": f"127.0.0.1:{scrape}", "listen.workers": 1, "store.kind": "memory",
                    "state_dir": path / "state", "mapping.file": rules,
                    # As statsd_exporter: names as sent, and quantiles of all that this sends.
                    "protocol.name_policy": "none", "flush.window": "10m"}
        ours = [tallyd, "run"] + [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        theirs = [exporter, f"--statsd.listen-udp=127.0.0.1:{other_lines}", f"--statsd.listen-tcp=127.0.0.1:{other_lines}",
                  f"--web.listen-address=127.0.0.1:{other_scrape}", f"--statsd.mapping-config={rules}",
                  "--statsd.event-flush-interval=5ms"]
        self.servers = (Server(ours, lines, scrape, path / "ours"), Server(theirs, other_lines, other_scrape, path / "theirs"))

    def __enter__(self):
        for server in self.servers:
            server.wait_for("an answer", lambda _: True)
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.stop()
        self.directory.cleanup()

    def send(self, datagrams):
        """Sends to both, no more at once than a receive buffer holds, and waits until all is counted."""
        for number, datagram in enumerate(datagrams, 1):
            for server in self.servers:
                server.socket.sendto(datagram, server.lines)
            if number % 50 == 0:
                self.settle()
        self.settle()

    def send_stream(self, lines):
        data = b"\r\n".join(lines)
        for server in self.servers:
            with socket.create_connection(server.lines) as stream:
                stream.sendall(data + b"\r\nsync.stream:1|c\n")
            server.wait_for("a stream", lambda seen: ("sync_stream", ()) in seen[1])

    def settle(self):
        """What comes after all else is seen: so is all else."""
        mark = next(self.marks)
        for server in self.servers:
            server.socket.sendto(b"sync:%d|g" % mark, server.lines)
            server.wait_for("the last line", lambda seen: seen[1].get(("sync", ())) == mark)

    def scrapes(self):
        return [server.scrape()[0] for server in self.servers]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Report:
    """What was compared, and what came of it."""

    def __init__(self):
        self.compared, self.equal, self.by_class, self.outside = 0, 0, Counter(), []

    def compare(self, ours, theirs, excuse, truth=None):
        """`excuse` says which difference a series may show, if any; `truth` has the values of observed series."""
        for key in sorted(ours.keys() | theirs.keys(), key=str):
            self.compared += 1
            a, b = ours.get(key), theirs.get(key)
            if truth is not None and isinstance(a, float) and not self.is_true(key, a, truth):
                self.outside.append((key, a, b, "tallyd is wrong by what was sent"))
            elif is_same(key, a, b):
                self.equal += 1
            else:
                self.blame(key, a, b, excuse(key) or (a is not None and b is not None and estimate(key)))

    def blame(self, key, a, b, why):
        if why:
            self.by_class[why] += 1
        else:
            self.outside.append((key, a, b, ""))

    @staticmethod
    def is_true(key, value, truth):
        labels = dict(key[1])
        rest = tuple(pair for pair in key[1] if pair[0] not in ("quantile", "le"))
        if "quantile" in labels and (key[0], rest) in truth:
            return is_near(value, nearest_rank(truth[key[0], rest], float(labels["quantile"])), QUANTILE_ERROR)
        if "le" in labels and (key[0].removesuffix("_bucket"), rest) in truth:
            values, bound = truth[key[0].removesuffix("_bucket"), rest], float(labels["le"])
            least = sum(weight for one, weight in values if one <= bound)
            most = sum(weight for one, weight in values if one <= bound + abs(bound) * BUCKET_WIDTH)
            return least - 1e-6 <= value <= most + 1e-6
        return True

    def print(self):
        print(f"series compared: {self.compared}, equal: {self.equal}, different: {self.compared - self.equal}")
        for why, (theirs, ours, reason) in DIFFERENCES.items():
            print(f"  {self.by_class[why]:6} {why}: {theirs} | {ours} | {reason}".replace("\\|", "|"))
        for key, a, b, note in self.outside[:50]:
            print(f"OUTSIDE OF THE TABLE: {key}: tallyd {a}, statsd_exporter {b} {note}")
        unmet = [why for why in DIFFERENCES if not self.by_class[why]]
        if unmet:
            print(f"in the table, but not met: {', '.join(unmet)}")
        return not self.outside and not unmet


def is_near(a, b, share):
    return a == b or abs(a - b) <= share * max(abs(a), abs(b)) or (math.isnan(a) and math.isnan(b))


def is_same(key, a, b):
    if not isinstance(a, float) or not isinstance(b, float):
        return a == b
    share = QUANTILE_ERROR if "quantile" in dict(key[1]) else 1e-9
    return is_near(a, b, share) or abs(a - b) < 1e-9


def estimate(key):
    """Which figures are estimates in one of the two."""
    labels = dict(key[1]) if isinstance(key[1], tuple) else {}
    return "quantiles" if "quantile" in labels else "buckets" if "le" in labels else None


def nearest_rank(values, share):
    values = sorted(values)
    rank, below = share * sum(weight for _, weight in values) * (1 - 1e-12), 0.0
    for value, weight in values:
        below += weight
        if below >= rank:
            return value
    return values[-1][0]


# Which difference a line of the corpus shows: the first that fits.
LINES = [
    ("odd_line", r"^L\d+\.a\t|^L\d+\.\w+\|\w+:|^L\d+\.\|"),
    ("set", r"^[^|]*\|s(\||\n|$)"),
    ("kv", r"\|kv$"),
    ("negative_timer", r":-[1-9][\d.]*(:[^|]*)?\|ms"),
    ("not_finite", r"(?i):[+-]?(nan|inf)[:|]"),
    ("bad_rate", r"\|@(0|2|1\.5|-0\.5|foo|inf|)(\||$)"),
    ("rates", r"\|@[\d.]+\|@"),
    ("rate", r"\|ms\|@0\.3"),
    ("two_dialects", r"[,#]\w+=[^:]*:.*\|#"),
    ("type_clash", r"\|c:.*\|ms"),
    ("same_tag", r"#k:v1,k:v2"),
    ("reserved_label", r"#le:"),
    ("packed", r":[^|:]+:[^|]*\|[cg]"),
    ("field", r"\|\||\|:|\|$|\|e:|\|card:|\|#k:a\|b|\|\S:"),
    ("container", r"\|c:"),
    ("timestamp", r"\|T"),
    ("graphite", r"^[^:]*;"),
    ("half_bracket", r"^[^\[:]*\]"),
    ("decrement", r":-\d+\|c"),
    ("blank", r": |\s$|^\s"),
]


def corpus_lines(report, programs):
    prefixed, plain = [], []
    for row in (CORPUS / "lines.jsonl").read_text().splitlines():
        case = json.loads(row)
        data = base64.b64decode(case["input_b64"]) if "input_b64" in case else case["input"].encode()
        if case["dialect"] == "json" or b'{"' in data or "framing" in case.get("config", {}) or len(data) > 9000:
            continue
        begins_otherwise = data.startswith((b"_e{", b"_sc|", b"\xef\xbb\xbf", b"[", b"|"))
        (plain if begins_otherwise or not data.strip() else prefixed).append(data)
    datagrams = [b"\n".join(line and b"L%d." % number + line for line in data.split(b"\n")) for number, data in enumerate(prefixed)]

    def excuse(key):
        found = re.search(r"L(\d+)_", key[0])
        if not found:
            return "odd_line"
        text = datagrams[int(found[1])].decode(errors="replace")
        return next((why for why, pattern in LINES if re.search(pattern, text)), None)

    with Pair(programs, "") as pair:
        pair.send(datagrams + plain)
        report.compare(*pair.scrapes(), excuse)
    return len(datagrams) + len(plain)


def corpus_mappings(report, programs):
    tallyd, exporter = programs
    cases = [json.loads(row) for row in (CORPUS / "mapping.jsonl").read_text().splitlines()]
    for case in cases:
        if "config_error" in case:
            refused = []
            for command in ([tallyd, "check", "--set", "mapping.file={}"], [exporter, "--check-config", "--statsd.mapping-config={}"]):
                with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
                    file.write(case["mapping"])
                    file.flush()
                    command = [part.format(file.name) for part in command]
                    refused.append(subprocess.run(command, capture_output=True, check=False).returncode != 0)
            report.compare({(case["id"], "refused"): refused[0]}, {(case["id"], "refused"): refused[1]},
                           lambda key: "one_letter" if "one-letter" in key[0] else None)
            continue
        if case["id"] == "map-label-le":
            continue  # A case of ours alone: tests/it/mapping.rs has it.
        with Pair(programs, case["mapping"]) as pair:
            datagram = "\n".join(case["lines"]).encode()
            pair.send([datagram])
            report.compare(*pair.scrapes(), lambda _: None)
    return sum(len(case["lines"]) for case in cases)


MAPPING = r"""
defaults:
  ttl: 1h
  summary_options:
    quantiles: [{quantile: 0.5, error: 0.05}, {quantile: 0.9, error: 0.01}, {quantile: 0.99, error: 0.001}]
mappings:
- {match: plain.route.*.*, name: "plain_routed_$1", help: "Routed: $1", labels: {code: "$2", host: rule}}
- {match: plain.honor.*, name: plain_honored, honor_labels: true, labels: {host: rule, number: "$1"}}
- {match: plain.drop.*, name: plain_dropped, action: drop}
- {match: plain.scale.*, name: "plain_scaled_$1", scale: 0.25}
- match: plain.buckets.*
  name: plain_in_buckets
  observer_type: histogram
  labels: {number: "$1"}
  histogram_options: {buckets: [0.01, 0.1, 0.5, 1, 2.5, 10]}
- {match: 'plain\.regex\.(\w+)-(\d+)', match_type: regex, name: "plain_${1}_regex", labels: {number: "$2", whole: "$0"}}
- {match: plain.kind.*, match_metric_type: counter, name: plain_kind_counter, labels: {number: "$1"}}
- {match: plain.kind.*, match_metric_type: observer, name: plain_kind_observer, labels: {number: "$1"}}
"""


class Lines:
    """Random lines: all types, tags of all dialects, rates, odd names, bad lines, names that rules match. What a name has
    before its first dot says what may differ. The values of observations are kept, as shown."""

    def __init__(self, seed):
        self.random, self.truth = random.Random(seed), defaultdict(list)
        plain = [self.counter, self.gauge, self.observation, self.ruled, self.bad, self.merged_counters, self.event]
        odd = [self.odd] * 2
        self.makers = plain * 4 + odd

    def next(self):
        return self.random.choice(self.makers)()

    def number(self, low=0.0):
        kind = self.random.randrange(4)
        if kind == 0:
            return str(self.random.randint(int(low), 5000))
        if kind == 1:
            return f"{self.random.uniform(low, 100):.3f}"
        if kind == 2:
            return f"{self.random.randint(1, 99)}e{self.random.randint(-2, 2)}"
        return f"{self.random.lognormvariate(4, 1):.6f}"

    def name(self, kind):
        """Of each number one spelling alone, so that no two names become equal."""
        number = self.random.randrange(40)
        odd = ["a.b", "dash-ed", "two--dashes", "sp ace", "sl/ash", "\u00fcml\u00e4ut", "dol$lar", "UPPER", "9digit", "par(en)"]
        return f"plain.{kind}{number}.{odd[number % len(odd)]}"

    def tags(self):
        """Tags, and a form that puts a name and tags before a value, and behind a type."""
        count = self.random.choice([0, 0, 1, 2, 3])
        keys = self.random.sample(["env", "host.name", "region", "9th", "da-sh", "ver"], count)
        tags = [(key, self.random.choice(["a", "b c", "x/y", "\u00e9t\u00e9", "v-1", 'qu"ote', "back\\slash", "d=e"])) for key in keys]
        form = self.random.choice(["dogstatsd", "influx", "librato", "signalfx"]) if tags else "none"
        joined = ",".join(f"{key}={value}" for key, value in tags)
        before = {"influx": "," + joined, "librato": "#" + joined, "signalfx": f"[{joined}]"}.get(form, "")
        behind = "|#" + ",".join(f"{key}:{value}" for key, value in tags) if form == "dogstatsd" else ""
        return tags, before, behind

    def rate(self, rates):
        rate = self.random.choice([None, None, *rates])
        return (1.0, "") if rate is None else (1 / float(rate), f"|@{rate}")

    def counter(self):
        tags, before, behind = self.tags()
        _, rate = self.rate(["0.1", "0.5", "0.3", "1", "1e-2"])
        value = self.number(low=-50) if self.random.random() < 0.2 else self.number()
        # One that only falls would not be there for statsd_exporter.
        first = f"{self.name('c')}{before}:0|c{behind}\n" if value.startswith("-") else ""
        return first + f"{first.split(':0|c')[0] or self.name('c') + before}:{value}|c{rate}{behind}"

    def merged_counters(self):
        number = self.random.randrange(20)
        return f"plain.merged{number}{self.random.choice('._-/ ')}x:{self.number()}|c"

    def gauge(self):
        tags, before, behind = self.tags()
        sign = self.random.choice(["", "", "+", "-"])
        return f"{self.name('g')}{before}:{sign}{self.number()}|g{behind}"

    def observation(self):
        tags, before, behind = self.tags()
        weight, rate = self.rate(["0.1", "0.5", "0.25", "1"])
        name = "plain.often" if self.random.random() < 0.4 else self.name("o")
        kind = "h" if "\u00fc" in name else "d" if "$" in name else "ms"
        values = [self.number(low=0) for _ in range(self.random.choice([1, 1, 1, 3]))]
        self.keep(name, tags, values, kind, weight)
        return f"{name}{before}:{':'.join(values)}|{kind}{rate}{behind}"

    def keep(self, name, tags, values, kind, weight):
        labels = tuple(sorted((escaped(key), value.replace("\\", "\\\\").replace('"', '\\"')) for key, value in tags))
        divisor = 1000 if kind == "ms" else 1
        self.truth[escaped(name), labels] += [(float(value) / divisor, weight) for value in values]

    def ruled(self):
        rule, number = self.random.randrange(8), str(self.random.randrange(9))
        value = self.number()
        if rule == 0:
            return f"plain.route.r{number}.{self.random.choice([200, 404])}:{value}|c|#host:line,env:x"
        if rule == 1:
            return f"plain.honor.{number}:{value}|c" + self.random.choice(["", "|#host:line"])
        if rule == 2:
            return f"plain.drop.{number}:{value}|{self.random.choice(['c', 'g', 'ms'])}"
        if rule == 3:
            return f"plain.scale.s{number}:{value}|g"
        if rule == 4:
            # Some stand just above a bound.
            value = self.random.choice([value, value, "100.4", "505", "2500"])
            self.keep("plain_in_buckets", [("number", number)], [value], "ms", 1.0)
            return f"plain.buckets.{number}:{value}|ms"
        if rule == 5:
            return f"plain.regex.re-{number}:{value}|c"
        if rule == 6:
            return f"plain.kind.{number}:{value}|c"
        self.keep("plain_kind_observer", [("number", number)], [value], "ms", 1.0)
        return f"plain.kind.{number}:{value}|ms"

    def bad(self):
        number = self.random.randrange(1000)
        return self.random.choice([f"plain.bad{number}", f"plain.bad{number}:|c", f"plain.bad{number}:1", f"plain.bad{number}:x|c", ":1|c",
                                   f"plain.bad{number}:1|z", f"plain.bad{number}:1|c|0.1", "", "|", ":::",
                                   f"plain.bad{number}:1|C|@", f"plain.bad{number}:--1|g"])

    def event(self):
        return self.random.choice(["_e{5,4}:title|text", "_sc|plain.check|0|m:fine"])

    def odd(self):
        number, value = self.random.randrange(5), self.random.randint(1, 99)
        return self.random.choice([
            f"set.{number}:{value}|s", f"meter.{number}:{value}|m", f"kv.{number}:{value}|kv", f"absolute.{number}:{value}|C",
            f"packed.{number}:{value}:2:3|c", f"rate.{number}:{value}|ms|@0.3", f"digits.{number}:1_{value}|c", f"rates.{number}:{value}|c|@0.5|@0.1",
            f"bad_rate.{number}:{value}|c|@2", f"decrement.{number}:-{value}|c", f"not_finite.{number}:nan|ms",
            f"negative_timer.{number}:-{value}|ms", f"type_clash.{number}:{value}|c\ntype_clash.{number}:{value}|g\ntype_clash.{number}:{value}|ms",
            f"same_tag.{number}:{value}|c|#k:1,k:2", f"equal_gauges.{number}.x:{value}|g\nequal_gauges.{number}_x:+{value}|g",
            f"reserved_label.{number}:{value}|ms|#le:x", f"container.{number}:{value}|c|#a:b|c:abc", f"field.{number}:{value}|c|card:low",
            f"timestamp.{number}:{value}|c|T0", f"two_dialects.{number},a=b:{value}|c|#c:d", f"graphite.{number};a=b:{value}|c",
            f"half_bracket.{number}a=b]x:{value}|c", f"blank.{number}: {value}|c"])


def escaped(name):
    name = re.sub("-+", "-", name)
    return ("_" if name[:1].isdigit() else "") + re.sub("[^a-zA-Z0-9_]", "_", name)


def random_lines(report, programs, seed):
    lines = Lines(seed)
    sent = [lines.next() for _ in range(RANDOM_LINES)]
    stream = [lines.next().replace("\n", "\r\n") for _ in range(STREAM_LINES)]
    datagrams, size = [[]], 0
    for line in sent:
        size += len(line.encode()) + 1
        if size > 1400:
            datagrams.append([])
            size = len(line.encode()) + 1
        datagrams[-1].append(line)

    def excuse(key):
        first = key[0].lstrip("_")
        return next((why for why in sorted(DIFFERENCES, key=len, reverse=True) if first.startswith(why)), None)

    with Pair(programs, MAPPING) as pair:
        pair.send("\n".join(datagram).encode() for datagram in datagrams)
        pair.send_stream(line.encode() for line in stream)
        report.compare(*pair.scrapes(), excuse, lines.truth)
    return RANDOM_LINES + STREAM_LINES


NATIVE = """
defaults: {observer_type: histogram}
mappings:
- {match: fine.*, name: fine, histogram_options: {native_histogram_bucket_factor: 1.02, native_histogram_max_buckets: 5000}}
- {match: few.*, name: few, histogram_options: {native_histogram_max_buckets: 20}}
- {match: scaled.*, name: scaled, scale: 0.25}
- {match: none.*, name: none, histogram_options: {native_histogram_bucket_factor: 1}}
"""


def observations(report, programs, seed):
    """The same observations as native histograms: bucket by bucket, but for times."""
    chance, lines, times = random.Random(seed), [], []
    for _ in range(3_000):
        value, wide = chance.lognormvariate(3, 1), chance.lognormvariate(0, 8) * chance.choice([-1, 1])
        lines += [f"{name}.x:{value!r}|h" for name in ("fine", "few", "scaled", "none")]
        lines += [f"usual:{chance.choice([value, -value, 0, 1, 2, 4])!r}|h", f"wide:{wide!r}|d", f"times:{value!r}|ms"]
        times.append(value / 1000)
    with Pair(programs, NATIVE) as pair:
        pair.send("\n".join(lines[at:at + 20]).encode() for at in range(0, len(lines), 20))
        ours, theirs = (server.native_histograms() for server in pair.servers)
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        report.compared += 1
        if a and b and a[:3] == b[:3] and is_near(a[3], b[3], 1e-9) and a[4:] == b[4:]:
            report.equal += 1
        elif key[0] == "times" and a and b and a[:3] == b[:3] and is_near(a[3], b[3], 1e-9) and are_true(a, times):
            report.by_class["native_times"] += 1
        else:
            report.outside.append((key, a, b, ""))
    if len(theirs) < 6:
        report.outside.append(("native histograms", len(ours), len(theirs), "too few"))
    return len(lines)


def are_true(histogram, values):
    """Whether each bucket has as many values as there are within its bounds, give or take those next to a bound."""
    schema, found = histogram[0], histogram[5]
    for index in range(min(found), max(found) + 1):
        low, high = (2 ** (one * 2.0 ** -schema) for one in (index - 1, index))
        least = sum(low * 1.0055 < value <= high / 1.0055 for value in values)
        most = sum(low / 1.0055 < value <= high * 1.0055 for value in values)
        if not least <= found.get(index, 0) <= most:
            return False
    return True


def main():
    programs, seed = sys.argv[1:3], int(sys.argv[3]) if len(sys.argv) > 3 else 1
    report = Report()
    begun = time.monotonic()
    sent = (corpus_lines(report, programs), corpus_mappings(report, programs), random_lines(report, programs, seed),
            observations(report, programs, seed))
    print(f"lines sent to both: {sent[0]} of the corpus, {sent[1]} with its mappings, {sent[2]} random of seed {seed}, {sent[3]} observed; "
          f"{time.monotonic() - begun:.0f} s")
    sys.exit(0 if report.print() else 1)


main()
