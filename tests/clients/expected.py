"""What a script expects tallyd to have after it has sent all it has to send, as JSON on standard output.

A script calls every public method of its client through `Watched`, and says beside each call what it should come to. Which
methods there are is asked of the classes themselves, so that a new one fails the test until it is called here.
"""

import inspect
import json
import math


class Clock:
    """Goes on by a quarter of a second each time it is asked, so that what a client times is known."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        self.now += 0.25
        return self.now


class Watched:
    """A client whose methods are noted when a script calls them; what they call themselves is not."""

    def __init__(self, client, called):
        object.__setattr__(self, "_client", client)
        object.__setattr__(self, "_called", called)

    def __getattr__(self, name):
        found = getattr(self._client, name)
        if callable(found):
            self._called.add((type(self._client).__name__, name))
        return found

    def __setattr__(self, name, value):
        setattr(self._client, name, value)

    def __enter__(self):
        return Watched(self._client.__enter__(), self._called)

    def __exit__(self, *error):
        return self._client.__exit__(*error)


def public_methods(kind):
    """The names of all that can be called of a class."""
    members = inspect.getmembers(kind, lambda member: callable(member))
    return {name for name, _ in members if not name.startswith("_")}


class Expected:
    """Series, events and service checks, each with the fields that are to be there exactly."""

    def __init__(self):
        self.metrics = []
        self.events = []
        self.checks = []
        self.called = set()
        self.unplaced = 0

    def metric(self, kind, name, tags=None, **fields):
        self.metrics.append({"type": kind, "name": name, "tags": tags or {}, "fields": fields})

    def counter(self, name, increments, decrements=0, tags=None):
        fields = {"value": increments - decrements, "increments": increments, "decrements": decrements}
        self.metric("COUNTER", name, tags, **fields)

    def gauge(self, name, value, tags=None):
        self.metric("GAUGE", name, tags, value=value)

    def set(self, name, value, tags=None):
        self.metric("SET", name, tags, value=value)

    def observed(self, kind, name, values, rate=1, tags=None):
        """A timer, histogram or distribution. The rate weighs the count and not the sum, as with Etsy's server."""
        total = math.fsum(values)
        fields = {"count": len(values) / rate, "sum": total, "mean": total / len(values)}
        fields.update(min=min(values), max=max(values))
        self.metric(kind, name, tags, value=values[-1], **fields)

    def event(self, title, text, priority="normal", alert_type="info", **fields):
        self.events.append({"title": title, "text": text, "priority": priority, "alert_type": alert_type, **fields})

    def check(self, name, status, **fields):
        self.checks.append({"name": name, "status": status, **fields})

    def finish(self, kinds, but):
        """Prints all of it; fails where a method of these classes was not called. `but` says of a `Class.method` why not."""
        there = {f"{kind.__name__}.{name}" for kind in kinds for name in public_methods(kind)}
        called = {f"{kind}.{name}" for kind, name in self.called}
        missing = sorted(there - called - set(but))
        if missing:
            raise SystemExit(f"never called: {', '.join(missing)}")
        stale = sorted(name for name in but if name not in there or name in called)
        if stale:
            raise SystemExit(f"left out, but called or not there: {', '.join(stale)}")
        said = {"metrics": self.metrics, "events": self.events, "checks": self.checks, "unplaced": self.unplaced}
        print(json.dumps({**said, "methods": sorted(there - set(but))}))
