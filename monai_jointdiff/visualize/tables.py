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

"""Rows as aligned text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

__all__ = ["format_table"]


def format_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, style: str = "plain") -> str:
    """Rows as text with aligned columns: text to the left, numbers to the right.

    Args:
        rows: one mapping a row; a missing key or None is shown as "-".
        columns: keys to show, in order; None: all, in order of first appearance.
        style: `"plain"` for a terminal, `"markdown"` for documents.

    Returns:
        the table, without a newline at its end. Floating-point numbers are shown with four significant digits.

    Raises:
        ValueError: for no rows or another style.
    """
    if not rows or style not in ("plain", "markdown"):
        raise ValueError(
            f"format_table: rows and style 'plain' or 'markdown' expected, got {len(rows)} rows, {style!r}."
        )
    keys = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else list(columns)
    values = [[row.get(key) for row in rows] for key in keys]
    right = [all(value is None or _is_number(value) for value in column) for column in values]
    cells = [[str(key), *map(_cell, column)] for key, column in zip(keys, values, strict=True)]
    if style == "markdown":
        cells = [[text.replace("|", "\\|") for text in column] for column in cells]
    widths = [max(3, *map(len, column)) for column in cells]
    rules = ["-" * (w - 1) + ":" if r and style == "markdown" else "-" * w for w, r in zip(widths, right, strict=True)]
    header, *body = (
        [text.rjust(w) if r else text.ljust(w) for text, w, r in zip(line, widths, right, strict=True)]
        for line in zip(*cells, strict=True)
    )
    lines = [header, rules, *body]
    if style == "markdown":
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not _is_number(value) or isinstance(value, Integral):
        return str(value)
    number = float(value)
    return f"{number:.4g}" if abs(number) >= 1e-4 or number == 0 else f"{number:.2e}"
