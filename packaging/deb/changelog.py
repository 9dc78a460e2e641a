#!/usr/bin/env python3
"""Writes Debian's changelog from CHANGELOG.md: `changelog.py VERSION MAINTAINER EPOCH > target/package/changelog`.

What stands under "Unreleased" is the version that is packaged, of the day of EPOCH (seconds); a released section is
headed `## 1.2.3 - 2026-01-31`.
"""

import email.utils
import pathlib
import re
import sys
import textwrap
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def sections(text):
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        items = re.findall(r"^- (.*(?:\n  .*)*)", body, flags=re.MULTILINE)
        yield head.strip(), [re.sub(r"\s+", " ", item).replace("`", "") for item in items]


def main():
    package_version, maintainer, epoch = sys.argv[1], sys.argv[2], int(sys.argv[3])
    entries = []
    for head, items in sections((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")):
        released = re.fullmatch(r"(\d\S*) - (\d{4}-\d\d-\d\d)", head)
        if not items:
            continue
        version, when = package_version, epoch
        if released:
            version, when = f"{released[1]}-1", time.mktime(time.strptime(released[2] + " 12:00", "%Y-%m-%d %H:%M"))
        elif head != "Unreleased":
            sys.exit(f"changelog.py: what is `## {head}`? Write `## Unreleased` or `## 1.2.3 - 2026-01-31`")
        lines = [textwrap.fill(item, 78, initial_indent="  * ", subsequent_indent="    ") for item in items]
        changes = "\n".join(lines)
        date = email.utils.formatdate(when)
        entries.append(f"tallyd ({version}) unstable; urgency=medium\n\n{changes}\n\n -- {maintainer}  {date}\n")
    print("\n".join(entries), end="")


main()
