"""Everything that `DogStatsd` of the client `datadog` of PyPI sends: datadog_client.py TRANSPORT ADDRESS, of udp, unixgram
and unixstream. A third argument is the agent's `protocol.gauge_sign`."""

import asyncio
import os
import random
import sys
import time

import datadog
from datadog.dogstatsd import base, context, context_async, max_sample_metric, max_sample_metric_context
from datadog.dogstatsd.base import DogStatsd
from datadog.dogstatsd.context import DistributedContextManagerDecorator, TimedContextManagerDecorator

from expected import Clock, Expected, Watched

context.monotonic = context_async.monotonic = Clock()
# What is sampled is always sent.
base.random = lambda: 0.0
random.random = lambda: 0.0

TELEMETRY = (
    "metrics events service_checks bytes_sent bytes_dropped bytes_dropped_queue bytes_dropped_writer packets_sent "
    "packets_dropped packets_dropped_queue packets_dropped_writer"
).split()
# What a container or an orchestrator says about itself, from which the client takes tags and fields.
ENVIRONMENT = {
    "DD_ENTITY_ID": "04652bb7-19b7-11e9-9cc6-42010a9c016d",
    "DD_ENV": "prod",
    "DD_SERVICE": "shop",
    "DD_VERSION": "1.2",
    "DATADOG_TAGS": "team:a,canary",
    "DD_EXTERNAL_ENV": "it-false,cn-web,pu-75a2",
    "DD_CARDINALITY": "low",
}


class Sender:
    """Makes clients of one transport."""

    def __init__(self, transport, address, want):
        self.want = want
        self.telemetry = {}
        if transport == "udp":
            host, port = address.rsplit(":", 1)
            self.to = {"host": host.strip("[]"), "port": int(port)}
            self.url = f"udp://{address}"
        else:
            self.to = {"socket_path": f"{transport}://{address}"}
            self.url = self.to["socket_path"]
        sender = self
        formatted = DogStatsd._flush_telemetry

        def counted(client):
            sender.sent(client)
            return formatted(client)

        DogStatsd._flush_telemetry = counted

    def client(self, **options):
        # A socket of datagrams holds few of them, and a client that does not wait would drop the others.
        options = {"socket_timeout": 10, "disable_telemetry": True, "origin_detection_enabled": False, **options}
        return Watched(DogStatsd(**{**self.to, **options}), self.want.called)

    def sent(self, client):
        """Adds up what a client is about to say about itself."""
        dropped = ("queue", "writer")
        totals = {
            "metrics": client.metrics_count,
            "events": client.events_count,
            "service_checks": client.service_checks_count,
            "bytes_sent": client.bytes_sent,
            "packets_sent": client.packets_sent,
            **{f"{unit}_dropped{kind}": 0 for unit in ("bytes", "packets") for kind in ("", *(f"_{k}" for k in dropped))},
        }
        assert set(totals) == set(TELEMETRY)
        tags = tuple([f"client_transport:{client._transport}", *client.constant_tags])
        of_tags = self.telemetry.setdefault(tags, dict.fromkeys(TELEMETRY, 0))
        for name, value in totals.items():
            of_tags[name] += value


def parsed(tags):
    """Tags as JSON has them: a bare one is an empty text."""
    return dict(tag.split(":", 1) if ":" in tag else (tag, "") for tag in tags)


def each_type(c, want, prefix, constant=(), namespace="", aggregated=False):
    """Each type, with tags and without. Where the client adds up, a fall may not show."""
    own = ["host:web1", "flag", "url:http://a.example/b"]
    for suffix, tags in (("", None), (".tagged", own)):
        given = {} if tags is None else {"tags": tags}
        all_tags = parsed([*(tags or []), *constant])
        name = f"{prefix}{{}}{suffix}".format
        full = lambda kind: f"{namespace}{name(kind)}"
        c.gauge(name("gauge"), 3, **given)
        c.gauge(name("gauge"), 123.5, **given)
        want.gauge(full("gauge"), 123.5, all_tags)
        c.count(name("count"), 123, **given)
        c.count(name("count"), -3, **given)
        if aggregated:
            want.metric("COUNTER", full("count"), all_tags, value=120)
        else:
            want.counter(full("count"), 123, 3, all_tags)
        c.increment(name("increment"), **given)
        c.increment(name("increment"), 2.5, **given)
        want.counter(full("increment"), 3.5, 0, all_tags)
        c.decrement(name("decrement"), **given)
        c.decrement(name("decrement"), 4, **given)
        want.counter(full("decrement"), 0, 5, all_tags)
        for member in ("ann", "bob", "ann", 999):
            c.set(name("set"), member, **given)
        want.set(full("set"), 3, all_tags)
        for kind, send in (("HISTOGRAM", c.histogram), ("DISTRIBUTION", c.distribution), ("TIMER", c.timing)):
            send(name(kind.lower()), 26, **given)
            send(name(kind.lower()), 14.25, **given)
            want.observed(kind, full(kind.lower()), [26, 14.25], tags=all_tags)


def rates(c, want):
    c.gauge("rate.gauge", 5, sample_rate=0.5)
    want.gauge("rate.gauge", 5)
    c.count("rate.count", 3, sample_rate=0.1)
    want.counter("rate.count", 30)
    c.increment("rate.increment", sample_rate=0.5)
    want.counter("rate.increment", 2)
    c.decrement("rate.decrement", sample_rate=0.25)
    want.counter("rate.decrement", 0, 4)
    c.set("rate.set", "ann", sample_rate=0.5)
    want.set("rate.set", 1)
    for kind, send in (("HISTOGRAM", c.histogram), ("DISTRIBUTION", c.distribution), ("TIMER", c.timing)):
        send(f"rate.{kind.lower()}", 7, sample_rate=0.5)
        want.observed(kind, f"rate.{kind.lower()}", [7], rate=0.5)


def negative_gauge(c, want, sign):
    """The client means a value; with Etsy's servers, and here by default, it is a change."""
    c.gauge("below.zero", 10)
    c.gauge("below.zero", -4)
    want.gauge("below.zero", {"relative": 6, "absolute": -4}[sign])


def timestamps(c, want):
    now = int(time.time())
    c.gauge_with_timestamp("at.gauge", 17, now)
    want.gauge("at.gauge", 17)
    c.gauge_with_timestamp("at.gauge.tagged", 18, now, tags=["a:b"], cardinality="high")
    want.gauge("at.gauge.tagged", 18, {"a": "b"})
    c.count_with_timestamp("at.count", 124, timestamp=now)
    c.count_with_timestamp("at.count", 1, now, sample_rate=0.5)
    want.counter("at.count", 126)
    # Long ago: no window has it, and the total has.
    c.count_with_timestamp("at.count.past", 9, 1_713_804_588, tags=["a:b"])
    want.counter("at.count.past", 9, 0, {"a": "b"})
    want.unplaced += 1


def timers(c, want):
    for kind, method, seconds in (("TIMER", c.timed, "timed"), ("DISTRIBUTION", c.distributed, "distributed")):
        with method(seconds):
            pass
        want.observed(kind, seconds, [0.25])

        @method(f"{seconds}.decorator", tags=["a:b"], sample_rate=0.5, use_ms=True)
        def function():
            return 7

        assert function() == 7
        want.observed(kind, f"{seconds}.decorator", [250], rate=0.5, tags={"a": "b"})

        @method(f"{seconds}.async", use_ms=True)
        async def coroutine():
            return 8

        assert asyncio.run(coroutine()) == 8
        want.observed(kind, f"{seconds}.async", [250])

        def without_name():
            return 9

        method()(without_name)()
        want.observed(kind, "__main__.without_name", [0.25])
        steps = Watched(method(f"{seconds}.steps"), want.called)
        steps.start()
        steps.stop()
        want.observed(kind, f"{seconds}.steps", [0.25])


def events(c, want, title):
    c.event(f"{title} bare", "text")
    want.event(f"{title} bare", "text")
    c.event(
        f"{title} gr\u00f6\u00dfe",
        "two\nlines | with: bars",
        alert_type="error",
        aggregation_key="deploys",
        source_type_name="jenkins",
        date_happened=1_713_804_588,
        priority="low",
        tags=["env:prod", "canary"],
        hostname="web1",
        cardinality="high",
    )
    want.event(
        f"{title} gr\u00f6\u00dfe",
        "two\nlines | with: bars",
        alert_type="error",
        aggregation_key="deploys",
        source_type="jenkins",
        timestamp=1_713_804_588,
        priority="low",
        tags=["canary", "env:prod"],
        host="web1",
    )
    for severity in ("info", "success", "warning"):
        c.event(f"{title} {severity}", "", alert_type=severity, priority="normal")
        want.event(f"{title} {severity}", "", alert_type=severity)


def checks(c, want, name):
    for status in (c.OK, c.WARNING, c.CRITICAL, c.UNKNOWN):
        c.service_check(f"{name}.{status}", status)
        want.check(f"{name}.{status}", status)
    c.service_check(
        f"{name}.full",
        c.CRITICAL,
        tags=["b", "a:1"],
        timestamp=1_713_804_588,
        hostname="db1",
        message="no m: answer\nat all",
        cardinality="low",
    )
    want.check(
        f"{name}.full",
        2,
        tags=["a:1", "b"],
        timestamp=1_713_804_588,
        host="db1",
        message="no m: answer\nat all",
    )


def buffers(sender, want):
    c = sender.client(namespace="buffered", constant_tags=["region:eu"])
    with c as batch:
        each_type(batch, want, "with.", ["region:eu"], "buffered.")
    c.open_buffer()
    for number in range(500):
        c.increment("opened", tags=[f"part:{number % 2}"])
    c.close_buffer()
    for part in "01":
        want.counter("buffered.opened", 250, 0, {"region": "eu", "part": part})
    c.stop()
    c = sender.client(disable_buffering=False, flush_interval=0.05)
    c.increment("flushed")
    assert c.flush()
    c.increment("flushed", 10)
    c.gauge_with_timestamp("flushed.at", 4, int(time.time()))
    assert c.flush_buffered_metrics()
    c.increment("flushed", 100)
    c.disable_buffering = True
    c.increment("flushed", 1000)
    c.close_socket()
    c.increment("flushed", 10000)
    c.stop()
    want.counter("flushed", 11111)
    want.gauge("flushed.at", 4)


def aggregation(sender, want):
    c = sender.client(disable_aggregation=False, flush_interval=0.05)
    each_type(c, want, "aggregated.", aggregated=True)
    # The latest of a series wins, and counts add up; what has a timestamp keeps it.
    c.count_with_timestamp("aggregated.at", 5, int(time.time()))
    want.counter("aggregated.at", 5)
    for cardinality in (None, "low", "high"):
        c.count("aggregated.card", 3, cardinality=cardinality)
    want.counter("aggregated.card", 9)
    assert c.flush_aggregated_metrics()
    c.disable_aggregation()
    c.increment("aggregated.not")
    c.enable_aggregation(0.05)
    c.increment("aggregated.not", 10)
    c.stop()
    want.counter("aggregated.not", 11)


def sampled_aggregation(sender, want):
    c = sender.client(disable_aggregation=False, flush_interval=0, max_metric_samples_per_context=2)
    # The first two of four are kept, and each stands for two.
    random.randint = lambda low, high: high
    for kind, send in (("HISTOGRAM", c.histogram), ("DISTRIBUTION", c.distribution), ("TIMER", c.timing)):
        for value in (3, 5, 7, 9):
            send(f"sampled.{kind.lower()}", value, tags=["a:b"])
        want.observed(kind, f"sampled.{kind.lower()}", [3, 5], rate=0.5, tags={"a": "b"})
    assert c.flush_aggregated_metrics()
    c.stop()


def background(sender, want):
    c = sender.client(disable_background_sender=False, sender_queue_size=0, sender_queue_timeout=10)
    for _ in range(50):
        c.increment("background")
    assert c.wait_for_pending(20)
    c.disable_background_sender()
    c.increment("background", 100)
    c.enable_background_sender(sender_queue_timeout=10)
    c.increment("background", 1000)
    assert c.stop(20)
    want.counter("background", 1150)


def forks(sender, want):
    c = sender.client(disable_buffering=False, flush_interval=0.05, disable_background_sender=False, track_instance=False)
    c.increment("forked")
    c.pre_fork()
    child = os.fork()
    if child == 0:
        c.post_fork_child()
        c.increment("forked", 10)
        os._exit(0 if c.stop(20) else 1)
    c.post_fork_parent()
    assert os.waitpid(child, 0)[1] == 0
    # The child has noted it where nobody looks.
    want.called.add(("DogStatsd", "post_fork_child"))
    c.increment("forked", 100)
    assert c.stop(20)
    want.counter("forked", 111)


def origins(sender, want):
    """Containers, orchestrators and cardinality: they say where a sample comes from, and make no series of its own."""
    c = sender.client(container_id="ci-8f7d", constant_tags=["region:eu"])
    c.increment("origin.container", cardinality="none")
    c.event("origin container", "text")
    c.service_check("origin.container", c.OK)
    c.stop()
    want.counter("origin.container", 1, 0, {"region": "eu"})
    want.event("origin container", "text", container_id="ci-8f7d", tags=["region:eu"])
    want.check("origin.container", 0, container_id="ci-8f7d", tags=["region:eu"])
    c = sender.client(origin_detection_enabled=True, cardinality="orchestrator")
    each_type(c, want, "origin.detected.")
    c.stop()
    os.environ.update(ENVIRONMENT)
    # Its URL too comes by the environment.
    os.environ["DD_DOGSTATSD_URL"] = sender.url
    c = Watched(DogStatsd(socket_timeout=10, disable_telemetry=True, constant_tags=["own:1"]), want.called)
    constant = [
        "own:1",
        "team:a",
        "canary",
        f"dd.internal.entity_id:{ENVIRONMENT['DD_ENTITY_ID']}",
        "env:prod",
        "service:shop",
        "version:1.2",
    ]
    each_type(c, want, "origin.environment.", constant)
    c.stop()
    for name in [*ENVIRONMENT, "DD_DOGSTATSD_URL"]:
        del os.environ[name]


def telemetry(sender, want):
    """What the client says about itself, with each packet."""
    c = sender.client(disable_telemetry=False, telemetry_min_flush_interval=-1, constant_tags=["team:a"])
    c.increment("telemetry")
    c.event("telemetry", "text")
    c.service_check("telemetry", c.WARNING)
    c.disable_telemetry()
    c.increment("telemetry", 10)
    c.enable_telemetry()
    c.increment("telemetry", 100)
    c.stop()
    want.counter("telemetry", 111, 0, {"team": "a"})
    want.event("telemetry", "text", tags=["team:a"])
    want.check("telemetry", 1, tags=["team:a"])
    assert sender.telemetry
    for tags, totals in sender.telemetry.items():
        all_tags = parsed([*tags, "client:py", f"client_version:{datadog.__version__}"])
        for name, value in totals.items():
            want.counter(f"datadog.dogstatsd.client.{name}", value, 0, all_tags)


def initialized(sender, want):
    """The client that is there for all of a process."""
    to = {f"statsd_{key}": value for key, value in sender.to.items()}
    datadog.initialize(
        hostname_from_config=False, host_name="none", statsd_constant_tags=["a:b"], statsd_namespace="process", **to
    )
    datadog.statsd.socket_timeout = 10
    datadog.statsd.disable_telemetry()
    datadog.statsd.increment("all")
    datadog.statsd.set_socket_timeout(10)
    datadog.statsd.increment("all", 10)
    datadog.statsd.stop()
    want.counter("process.all", 11, 0, {"a": "b"})


BUT = {
    "DogStatsd.get_socket": "it connects, as the first send does",
    "DogStatsd.resolve_host": "it looks an address up",
    "DogStatsd.set_socket_timeout": "it sets an option",
}


def main():
    transport, address, sign = sys.argv[1:]
    want = Expected()
    sender = Sender(transport, address, want)
    c = sender.client()
    each_type(c, want, "")
    for exercise in (rates, timestamps, timers):
        exercise(c, want)
    negative_gauge(c, want, sign)
    events(c, want, "plain")
    checks(c, want, "plain")
    c.stop()
    c = sender.client(namespace="shop", constant_tags=["region:eu", "canary"], default_sample_rate=0.5, use_ms=True)
    c.increment("default.rate")
    want.counter("shop.default.rate", 2, 0, {"region": "eu", "canary": ""})
    with c.timed("default.ms"):
        pass
    want.observed("TIMER", "shop.default.ms", [250], rate=0.5, tags={"region": "eu", "canary": ""})
    c.constant_tags.append("later:1")
    c.increment("default.tags")
    want.counter("shop.default.tags", 2, 0, {"region": "eu", "canary": "", "later": "1"})
    c.stop()
    for exercise in (buffers, aggregation, sampled_aggregation, background, forks, origins, telemetry, initialized):
        exercise(sender, want)
    want.finish([DogStatsd, TimedContextManagerDecorator, DistributedContextManagerDecorator], BUT)


main()
