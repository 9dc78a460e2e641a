"""Everything that the client `statsd` of PyPI sends: statsd_client.py TRANSPORT ADDRESS, of udp, tcp and unix."""

import asyncio
import functools
import random
import sys
from datetime import timedelta

import statsd
from statsd.client import stream, timer, udp

from expected import Clock, Expected, Watched

timer.time_now = Clock()
# What is sampled is always sent.
random.random = lambda: 0.0


def client(transport, address, prefix):
    if transport == "unix":
        return statsd.UnixSocketStatsClient(address, prefix=prefix, timeout=10)
    host, port = address.rsplit(":", 1)
    kind = {"udp": statsd.StatsClient, "tcp": statsd.TCPStatsClient}[transport]
    more = {"timeout": 10} if transport == "tcp" else {"maxudpsize": 64}
    return kind(host.strip("[]"), int(port), prefix=prefix, ipv6=host.startswith("["), **more)


def counters(c, want):
    c.incr("incr")
    c.incr("incr", 4)
    c.incr("incr", count=2.5)
    want.counter("py.incr", 7.5)
    c.incr("incr.rate", 3, rate=0.1)
    want.counter("py.incr.rate", 30)
    c.decr("decr")
    c.decr("decr", 9)
    c.decr("decr", -2)
    want.counter("py.decr", 2, 10)
    c.decr("decr.rate", 1, rate=0.5)
    want.counter("py.decr.rate", 0, 2)


def gauges(c, want):
    c.gauge("gauge", 7)
    c.gauge("gauge", 5.5)
    want.gauge("py.gauge", 5.5)
    c.gauge("gauge.delta", 10)
    c.gauge("gauge.delta", 5, delta=True)
    c.gauge("gauge.delta", -3, delta=True)
    want.gauge("py.gauge.delta", 12)
    # It sets zero first, since a sign changes.
    c.gauge("gauge.negative", 70)
    c.gauge("gauge.negative", -7)
    want.gauge("py.gauge.negative", -7)
    c.gauge("gauge.rate", 3, rate=0.5)
    want.gauge("py.gauge.rate", 3)
    c.gauge("gauge.rate.negative", -3, rate=0.5)
    want.gauge("py.gauge.rate.negative", -3)


def sets(c, want):
    for member in ("ann", "bob", "ann", 3, 3.5):
        c.set("set", member)
    want.set("py.set", 4)
    c.set("set.rate", "ann", rate=0.5)
    want.set("py.set.rate", 1)


def timings(c, want):
    c.timing("timing", 320)
    c.timing("timing", 12.345678)
    c.timing("timing", timedelta(seconds=1, microseconds=500))
    want.observed("TIMER", "py.timing", [320, 12.345678, 1000.5])
    c.timing("timing.rate", 4, rate=0.25)
    want.observed("TIMER", "py.timing.rate", [4], rate=0.25)


def timers(c, want):
    with c.timer("timer.with"):
        pass
    want.observed("TIMER", "py.timer.with", [250])

    @c.timer("timer.decorator", rate=0.5)
    def timed():
        return 7

    assert (timed(), timed()) == (7, 7)
    want.observed("TIMER", "py.timer.decorator", [250, 250], rate=0.5)

    @c.timer("timer.async")
    async def coroutine():
        return 8

    assert asyncio.run(coroutine()) == 8
    want.observed("TIMER", "py.timer.async", [250])
    assert c.timer("timer.partial")(functools.partial(max, 1))(2) == 2
    want.observed("TIMER", "py.timer.partial", [250])
    t = Watched(c.timer("timer.steps"), want.called).start()
    t = Watched(t, want.called)
    t.stop(send=False)
    assert t.ms == 250
    t.send()
    t.start()
    t.stop()
    want.observed("TIMER", "py.timer.steps", [250, 250])


def pipelines(c, want):
    with c.pipeline() as pipe:
        for _ in range(100):
            pipe.incr("pipe.with")
        pipe.gauge("pipe.gauge", -4)
        pipe.gauge("pipe.gauge", 3, delta=True)
        pipe.decr("pipe.decr", 2)
        pipe.timing("pipe.timing", 8)
        pipe.set("pipe.set", "x")
        with pipe.timer("pipe.timer"):
            pass
    want.counter("py.pipe.with", 100)
    want.gauge("py.pipe.gauge", -1)
    want.counter("py.pipe.decr", 0, 2)
    want.observed("TIMER", "py.pipe.timing", [8])
    want.set("py.pipe.set", 1)
    want.observed("TIMER", "py.pipe.timer", [250])
    pipe = Watched(c.pipeline(), want.called)
    pipe.incr("pipe.send")
    with pipe.pipeline() as inner:
        inner.incr("pipe.send", 10)
    pipe.send()
    pipe.send()
    want.counter("py.pipe.send", 11)


def main():
    transport, address = sys.argv[1:]
    want = Expected()
    plain = client(transport, address, "py")
    c = Watched(plain, want.called)
    for exercise in (counters, gauges, sets, timings, timers):
        exercise(c, want)
    pipelines(c, want)
    with Watched(plain.pipeline(), want.called) as pipe:
        for exercise in (counters, gauges, sets, timings):
            # The same by a pipeline, under another prefix.
            piped = Expected()
            pipe._prefix = "py.piped"
            exercise(pipe, piped)
            for metric in piped.metrics:
                metric["name"] = metric["name"].replace("py.", "py.piped.", 1)
            want.metrics += piped.metrics
        pipe.timer("timer")(lambda: None)()
        want.observed("TIMER", "py.piped.timer", [250])
    if transport != "udp":
        c.reconnect()
        c.connect()
        c.incr("reconnected")
        want.counter("py.reconnected", 1)
    c.close()
    none = client(transport, address, None)
    none.incr("without.prefix")
    none.close()
    want.counter("without.prefix", 1)
    pipeline = udp.Pipeline if transport == "udp" else stream.StreamPipeline
    but = {f"{pipeline.__name__}.close": "it is only named by the base class, and raises NotImplementedError"}
    want.finish([type(plain), pipeline, timer.Timer], but)


main()
