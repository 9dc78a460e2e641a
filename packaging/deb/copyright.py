#!/usr/bin/env python3
"""Writes the machine-readable copyright file (DEP-5) of the executable: tallyd, and every crate that is linked into it.

Crates and licences come from `cargo metadata`, holders and texts from the crates' own files, so that the list is the one
of Cargo.lock. A licence without a text, or a crate without a holder, is an error and not an omission.

    copyright.py FEATURES > target/package/copyright
    copyright.py --spdx FEATURES                            # all licences as one SPDX expression, for an .rpm
"""

import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# Names that DEP-5 has for licences that SPDX calls otherwise.
SHORT = {
    "MIT": "Expat",
    "BSD-2-Clause": "BSD-2-clause",
    "BSD-3-Clause": "BSD-3-clause",
    "Apache-2.0 WITH LLVM-exception": "Apache-2.0 with LLVM exception",
}

# Where the text of a licence stands: a crate of ours and a file in it.
TEXTS = {
    "Apache-2.0 with LLVM exception": ("rustix", "LICENSE-Apache-2.0_WITH_LLVM-exception"),
    "0BSD": ("adler2", "LICENSE-0BSD"),
    "BSD-2-clause": ("zerocopy", "LICENSE-BSD"),
    "BSD-3-clause": ("encoding_rs", "LICENSE-WHATWG"),
    "BSL-1.0": ("ryu", "LICENSE-BOOST"),
    "CDLA-Permissive-2.0": ("webpki-roots", "LICENSE"),
    "ISC": ("untrusted", "LICENSE.txt"),
    "Unicode-3.0": ("zerovec", "LICENSE"),
    "Unlicense": ("memchr", "UNLICENSE"),
    "Zlib": ("foldhash", "LICENSE"),
}

# The licence's own text, which Debian has in one place.
APACHE_TEXT = re.compile(r" *Apache License\n *Version 2\.0.*?END OF TERMS AND CONDITIONS\n", re.DOTALL)

APACHE = """Licensed under the Apache License, Version 2.0; on Debian systems its text stands in
/usr/share/common-licenses/Apache-2.0."""

HOLDER = re.compile(r"^[\s*#/;%-]*(?:(?:\(c\)|©)\s+(?=\d)|copyright[:\s]+(?:\(c\)|©)?\s*)(.*\S)", re.IGNORECASE)
NO_HOLDER = re.compile(
    r"\[yyyy\]|\{yyyy\}|notice|owner|licen[cs]e|holder|disclaimer|statement|^law|^interest|^(?:and|or|in|to) ", re.IGNORECASE
)
LICENCE_FILE = re.compile(r"^(licen[cs]e|copying|copyright|notice|unlicense)", re.IGNORECASE)


def linked(features):
    """The packages whose code is in the executable: no tools of the build, no macros, no tests."""
    command = ["cargo", "metadata", "--format-version=1", "--locked", f"--features={features}"]
    host = re.search(r"host: (\S+)", subprocess.run(["rustc", "-vV"], capture_output=True, text=True, check=True).stdout)[1]
    output = subprocess.run([*command, f"--filter-platform={host}"], cwd=ROOT, capture_output=True, check=True)
    metadata = json.loads(output.stdout)
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    found, waiting = {}, [metadata["resolve"]["root"]]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = packages[name]
        for dependency in nodes[name]["deps"]:
            is_normal = any(kind["kind"] is None for kind in dependency["dep_kinds"])
            is_macro = any("proc-macro" in target["kind"] for target in packages[dependency["pkg"]]["targets"])
            if is_normal and not is_macro:
                waiting.append(dependency["pkg"])
    root = found.pop(metadata["resolve"]["root"])
    return root, sorted(found.values(), key=lambda package: (package["name"], package["version"]))


def folder(package):
    return pathlib.Path(package["manifest_path"]).parent


def licence_files(directory):
    depth = [path for pattern in ("*", "*/*") for path in directory.glob(pattern)]
    return sorted(path for path in depth if path.is_file() and LICENCE_FILE.match(path.name) and path.suffix != ".rs")


def holders(directory):
    """Who says in a licence file that the copyright is theirs, each once."""
    found = []
    for path in licence_files(directory):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            match = HOLDER.match(line)
            # A holder begins with a year or a name, and a sentence of a licence does not.
            if match and not NO_HOLDER.search(match[1]) and re.match(r"[\dA-Z]", match[1]) and match[1] not in found:
                found.append(match[1])
    return found


def crate_holders(package):
    found = holders(folder(package))
    if not found:
        found = [re.sub(r"\s*<.*?>", "", author) for author in package["authors"]]
    if not found:
        where = package["repository"] or package["homepage"]
        found = [f"the authors of {package['name']}" + (f", {where}" if where else "")]
    return found


def expression(spdx):
    """An SPDX expression as DEP-5 writes it, and the licences that it names."""
    spdx = spdx.replace("/", " OR ")
    names = []

    def short(match):
        name = SHORT.get(match[0], match[0])
        if name not in names:
            names.append(name)
        return name

    text = re.sub(r"[\w.-]+ WITH [\w.-]+|(?<!\w)(?!(?:OR|AND)\b)\w[\w.+-]*", short, spdx)
    grouped = re.fullmatch(r"\((.*)\) AND (.*)", text)
    text = f"{grouped[1]}, AND {grouped[2]}" if grouped else text
    return text.replace(" OR ", " or ").replace(" AND ", " and "), names


def indented(text):
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    return "\n".join(f" {line}" if line.strip() else " ." for line in lines)


def stanza(files, people, licence, comment=None):
    people = f"\n{' ' * 11}".join(people)
    parts = [f"Files: {files}", f"Copyright: {people}", f"License: {licence}"]
    return "\n".join(parts + ([f"Comment:\n{indented(comment)}"] if comment else [])) + "\n"


def text_of(name, packages):
    if name == "Apache-2.0":
        return APACHE
    if name == "Expat":
        own = (ROOT / "LICENSE").read_text(encoding="utf-8")
        return own[own.index("Permission is hereby granted") : own.index("\n\n-----", own.index("Permission is"))]
    crate, file = TEXTS.get(name) or sys.exit(f"copyright.py: no text for the licence {name}: add it to TEXTS")
    package = next((package for package in packages if package["name"] == crate), None)
    path = folder(package) / file if package else None
    if not path or not path.exists():
        sys.exit(f"copyright.py: {crate} has no {file}: name another place for the text of {name} in TEXTS")
    text = path.read_text(encoding="utf-8")
    text = APACHE_TEXT.sub(lambda _: APACHE + "\n", text)
    # The holders stand with each crate.
    return "\n".join(line for line in text.splitlines() if not HOLDER.match(line) or NO_HOLDER.search(line))


def librdkafka(packages):
    """rdkafka-sys carries the sources of librdkafka, which have licences of their own."""
    package = next((package for package in packages if package["name"] == "rdkafka-sys"), None)
    if not package:
        return
    sources = folder(package) / "librdkafka"
    name = f"rdkafka-sys-{package['version']}/librdkafka"
    yield stanza(f"crates/{name}/*", holders(sources), "librdkafka", "The parts and their licences are named in its text.")
    text = (sources / "LICENSES.txt").read_text(encoding="utf-8")
    yield "License: librdkafka\n" + indented(APACHE_TEXT.sub(lambda _: APACHE + "\n", text)) + "\n"


def spdx(root, packages):
    terms = {"BSD-2-Clause"} if any(package["name"] == "rdkafka-sys" for package in packages) else set()
    for package in [root, *packages]:
        for term in re.sub(r"[()]", "", package["license"].replace("/", " OR ")).split(" AND "):
            terms.add(" OR ".join(sorted(term.split(" OR "))))
    return " AND ".join(f"({term})" if " OR " in term else term for term in sorted(terms))


def main():
    root, packages = linked(sys.argv[-1])
    if sys.argv[1] == "--spdx":
        print(spdx(root, packages))
        return
    text, names = expression(root["license"])
    print(
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n"
        "Upstream-Name: tallyd\n"
        "Comment:\n The executable is linked statically from tallyd, Rust's standard library and the crates that are named\n"
        " below as crates/NAME-VERSION, each as its authors published that version of it.\n"
    )
    own = re.search(r"^Copyright \(c\) (.*)", (ROOT / "LICENSE").read_text(encoding="utf-8"), re.MULTILINE)[1]
    print(stanza("*", [own], text))
    print(stanza("rust/library/*", ["The Rust Project Contributors"], "Expat or Apache-2.0"))
    for package in packages:
        if not package["license"]:
            sys.exit(f"copyright.py: {package['name']} names no licence")
        text, more = expression(package["license"])
        names += [name for name in more if name not in names]
        print(stanza(f"crates/{package['name']}-{package['version']}/*", crate_holders(package), text))
    for part in librdkafka(packages):
        print(part)
    for name in sorted(names):
        print(f"License: {name}\n{indented(text_of(name, packages))}\n")


main()
