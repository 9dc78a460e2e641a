#!/usr/bin/env python3
"""Writes the first inputs of each target into DIRECTORY/TARGET: the cases of tests/corpus and every key of the
configuration. They are made anew for each run and not kept."""

import base64
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def datagrams():
    for line in (ROOT / "tests/corpus/lines.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        if "input_b64" in case:
            yield case["dialect"], base64.b64decode(case["input_b64"])
        elif "chunks_b64" in case:
            yield case["dialect"], b"".join(base64.b64decode(chunk) for chunk in case["chunks_b64"])
        else:
            yield case["dialect"], case["input"].encode()


def configurations():
    defaults = (ROOT / "packaging/tallyd.toml").read_text(encoding="utf-8")
    section = ""
    for line in defaults.splitlines():
        if header := re.fullmatch(r"\[(.+)\]", line):
            section = header[1]
        elif setting := re.fullmatch(r"#(\w+) = (.+)", line):
            key = f"{section}.{setting[1]}" if section else setting[1]
            table = f"[{section}]\n" if section else ""
            yield f"{table}{setting[1]} = {setting[2]}\n".encode()
            yield f"\0{key}={setting[2]}".encode()
            yield f"\0$TALLYD_{key.upper().replace('.', '__')}={setting[2]}".encode()
    for seed in ["INGEST_PORT=1", "API_PORT=2", "STORE=redis", "REDIS_HOST=::1", "REDIS_PORT=3", "STATE_DIRECTORY=/a:/b"]:
        yield f"\0${seed}".encode()


def mappings():
    for line in (ROOT / "tests/corpus/mapping.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        names = [name.split(":")[0] for name in case.get("lines", [])]
        yield "\0".join([case["mapping"], *names]).encode()


def write(directory, inputs):
    directory.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(inputs):
        (directory / f"{number:04}").write_bytes(text)


def main(directory):
    lines = [text for _, text in datagrams()]
    bodies = [text for dialect, text in datagrams() if dialect == "json"]
    for target in ["datagram", "agree"]:
        write(directory / target, lines)
    # The last four bytes say where the stream is cut.
    write(directory / "stream", [text + cuts for text in lines for cuts in [b"\1\1\1\1", b"\x05\x10\3\x20"]])
    write(directory / "json", bodies)
    write(directory / "config", configurations())
    write(directory / "mapping", mappings())


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
