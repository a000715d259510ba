# Copyright (c) MONAI-JointDiff Contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Render the tables of the README files from ``benchmarks/results/*.json``.

A document holds a pair of markers, and what stands between them is replaced by the table of that name::

    <!-- table:speed -->
    <!-- end:speed -->

The table ``summary`` has no results file: it holds the targets of all of them, what was asked for and what was found,
in the order in which their tables stand in ``benchmarks/README.md``.

Run ``python -m benchmarks.render`` to write, with ``--check`` to fail when a table is not what its results say. Only
the standard library is needed.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Target

__all__ = ["format_value", "load_results", "main", "render_document", "render_table", "summary"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NOT_MEASURED = "Not measured yet."
INDEX = ROOT / "benchmarks" / "README.md"  # every table stands here, in the order of the summary
DOCUMENTS = (
    INDEX,
    ROOT / "README.md",
    ROOT / "docs" / "diffusion_classifier.md",
    ROOT / "docs" / "few_labels.md",
)

MARKER = re.compile(r"^<!-- (table|end):([\w.-]+) -->[ \t]*$", re.M)
HEADING = re.compile(r"^#+ +(.+?) *$", re.M)
SCRIPT = re.compile(r"`python -m benchmarks\.(\w+)`")  # within a heading


def decimals(*values: float) -> int:
    """Decimals that show three significant digits of the largest of the values, at most six."""
    largest = max(map(abs, values))
    return min(max(2 - math.floor(math.log10(largest)), 0), 6) if largest else 0


def format_number(value: float, digits: int | None = None) -> str:
    """A number with fixed decimals; one too small for six of them in scientific notation.

    Args:
        value: the number; an int stays an int when ``digits`` is None.
        digits: decimals; None chooses by magnitude.

    Returns:
        The text.
    """
    if digits is None and isinstance(value, int):
        return f"{value:,}"
    if digits is None and 0 < abs(value) < 1e-4:
        return f"{value:.2g}"
    return f"{value:,.{decimals(value) if digits is None else digits}f}"


def format_value(value: Any, digits: int | None = None) -> str:
    """One cell of a table.

    Args:
        value: text, bool, number, None, or a mapping with ``mean`` and optional ``low`` and ``high``, which become
            ``mean [low, high]`` with the same number of decimals.
        digits: decimals of numbers; None chooses by magnitude.

    Returns:
        Markdown of the cell.

    Raises:
        TypeError: for any other value.
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return format_number(value, digits)
    if isinstance(value, str):
        return value.replace("|", "\\|").replace("\n", " ")
    if isinstance(value, Mapping) and "mean" in value:
        mean, low, high = value["mean"], value.get("low"), value.get("high")
        if low is None or high is None:
            return format_number(mean, digits)
        shown = decimals(mean, low, high) if digits is None else digits
        return f"{format_number(mean, shown)} [{format_number(low, shown)}, {format_number(high, shown)}]"
    raise TypeError(f"format_value: got {value!r}, expected text, a number, None, or a mapping with 'mean'.")


def format_environment(environment: Mapping[str, Any]) -> str:
    """The line below a table: machine, threads, versions, commit, date."""
    machine = environment.get("gpu") or environment.get("cpu")
    threads = environment.get("threads")
    parts = [
        machine and f"Measured on {machine}",
        threads and f"{threads} thread{'s' if threads != 1 else ''}",
        environment.get("python") and f"Python {environment['python']}",
        *(f"{name} {version}" for name, version in environment.get("versions", {}).items()),
        environment.get("commit") and f"commit {environment['commit']}",
        environment.get("date"),
    ]
    return ", ".join(str(part) for part in parts if part)


def render_table(result: Mapping[str, Any]) -> str:
    """Markdown of one result: title, table, targets, notes, environment.

    Args:
        result: content of a results file; columns are the keys of the rows in the order of their first appearance.

    Returns:
        Markdown without a final newline.

    Raises:
        ValueError: when there are no rows.
    """
    rows = result["rows"]
    if not rows:
        raise ValueError(f"render_table: result {result['name']!r} has no rows.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    digits = result.get("digits", {})
    numeric = {c for c in columns if all(not isinstance(row.get(c), str) for row in rows)}
    lines = [
        "| " + " | ".join(format_value(column) for column in columns) + " |",
        "|" + "|".join("---:" if column in numeric else "---" for column in columns) + "|",
        *("| " + " | ".join(format_value(row.get(c), digits.get(c)) for c in columns) + " |" for row in rows),
    ]
    judged = [f"- {target.sentence()}" for target in targets_of(result)]
    targets = ["Asked for, and found:\n\n" + "\n".join(judged)] if judged else []
    notes = result.get("notes") or []
    environment = format_environment(result.get("environment") or {})
    blocks = [f"**{result['title']}**", "\n".join(lines), *targets, *([notes] if isinstance(notes, str) else notes)]
    return "\n\n".join([*blocks, *([f"*{environment}*"] if environment else [])])


def targets_of(result: Mapping[str, Any]) -> list[Target]:
    """The targets of a result, in its order.

    Raises:
        ValueError: when one is not a target.
    """
    try:
        return [Target(**target) for target in result.get("targets", ())]
    except (TypeError, ValueError) as error:
        raise ValueError(f"result {result['name']!r} has a wrong target: {error}") from error


def sections(index: str) -> dict[str, str]:
    """The heading above each marked table of a document, in the order of the document."""
    headings = [(match.start(), match[1]) for match in HEADING.finditer(index)]
    return {
        marker[2]: next((text for start, text in reversed(headings) if start < marker.start()), "")
        for marker in MARKER.finditer(index)
        if marker[1] == "table"
    }


def anchor(heading: str) -> str:
    """The name by which a heading is linked to, as GitHub makes it: letters, digits, ``_`` and ``-``."""
    return re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")


def summary(results: Mapping[str, Mapping[str, Any]], index: str) -> dict[str, Any]:
    """What was asked for and what was found, of all results.

    Args:
        results: results by name.
        index: text of ``benchmarks/README.md``, which decides the order and where the links lead.

    Returns:
        A result with a row for each target. A table of the index without results is a target that was not run. Links
        are those of a document in the repository's root.

    Raises:
        ValueError: when a result with targets has no table in the index.
    """
    places = sections(index)
    lost = sorted(name for name in results if results[name].get("targets") and name not in places)
    if lost:
        raise ValueError(f"summary: the targets of {', '.join(lost)} have no table in {INDEX.name} of the benchmarks.")
    rows = []
    for name, heading in places.items():
        unknown = [Target(f"the table `{name}`", "measured", "", None)]
        script = SCRIPT.search(heading)
        link = f"[{script[1] if script else heading}](benchmarks/README.md#{anchor(heading)})"
        rows += [
            {
                "what": target.figure,
                "asked for": target.asked,
                "measured": target.details or None,
                "verdict": target.verdict,
                "where": link,
            }
            for target in (targets_of(results[name]) if name in results else unknown)
        ]
    counts = [sum(row["verdict"] == verdict for row in rows) for verdict in ("met", "MISSED", "not run")]
    title = "Of {} targets {} are met, {} MISSED, {} not run".format(len(rows), *counts)
    return {"name": "summary", "title": title, "rows": rows}


def load_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """All results of a folder by name; subfolders (the cells) are not looked at.

    Args:
        folder: folder of ``<name>.json`` files.

    Returns:
        Content by name.

    Raises:
        ValueError: when a file is not a result, its name is not that of the file, or a target of it is wrong.
    """
    results = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = {"name", "title", "rows"} - set(content)
        if missing or content["name"] != path.stem:
            raise ValueError(f"load_results: {path.name} lacks {sorted(missing)} or its 'name' is not {path.stem!r}.")
        targets_of(content)
        results[path.stem] = content
    return results


def marked_spans(text: str, document: str) -> list[tuple[str, int, int]]:
    """Name, start and end of what stands between each pair of markers.

    Args:
        text: the document.
        document: its name, for messages.

    Returns:
        The spans in the order of the text.

    Raises:
        ValueError: when a marker has no partner.
    """
    markers = list(MARKER.finditer(text))
    pairs = list(zip(markers[::2], markers[1::2], strict=False))
    matched = all((a[1], b[1], a[2]) == ("table", "end", b[2]) for a, b in pairs)
    if len(markers) % 2 or not matched:
        found = ", ".join(f"{m[1]}:{m[2]}" for m in markers)
        raise ValueError(f"{document}: markers come in pairs table:NAME, end:NAME; found {found}.")
    return [(a[2], a.end(), b.start()) for a, b in pairs]


def render_document(text: str, results: Mapping[str, Mapping[str, Any]], document: str = "document") -> str:
    """A document with every marked table rendered anew.

    Args:
        text: the document.
        results: results by name.
        document: its name, for messages.

    Returns:
        The new text; rendering it again changes nothing. A table without results says that it has not been measured.

    Raises:
        ValueError: when a marker has no partner.
    """
    for name, start, end in reversed(marked_spans(text, document)):
        table = render_table(results[name]) if name in results else NOT_MEASURED
        text = f"{text[:start]}\n{table}\n{text[end:]}"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Render all documents; return 1 when ``--check`` finds one out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description="Render the benchmark tables.")
    parser.add_argument("documents", nargs="*", type=Path, help="documents (default: README.md, benchmarks/README.md)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    parser.add_argument("--check", action="store_true", help="write nothing, fail when a table is out of date")
    options = parser.parse_args(arguments)
    results = load_results(options.results)
    results["summary"] = summary(results, INDEX.read_text(encoding="utf-8"))
    stale = False
    for path in options.documents or [document for document in DOCUMENTS if document.is_file()]:
        old = path.read_text(encoding="utf-8")
        new = render_document(old, results, path.name)
        if new == old:
            continue
        stale = True
        if options.check:
            change = difflib.unified_diff(old.splitlines(), new.splitlines(), str(path), "rendered", lineterm="", n=0)
            print(f"{path} is out of date; run 'make tables'", *change, sep="\n", file=sys.stderr)
        else:
            path.write_text(new, encoding="utf-8")
            print(f"rendered {path}")
    return int(options.check and stale)


if __name__ == "__main__":
    sys.exit(main())
