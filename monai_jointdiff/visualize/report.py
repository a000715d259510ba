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


"""All counterfactuals of a run on one page that needs nothing but a browser."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_jointdiff.visualize.counterfactual import BRIGHTER, DARKER, FINDING, REGION, CounterfactualCase, signed

__all__ = ["counterfactual_report", "png_bytes"]

pil_image, _ = optional_import("PIL.Image")

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1c2126; --soft: #5b6570; --line: #dde1e6;
  --track: #e8ebef; --before: #8b939c; --between: #b9c0c8; --after: #0072b2; --good: #0b6e4f; --warn: #8a4b00;
  --warn-back: #fff4e0; --focus: #0b63ce; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1e2226; --text: #e6e9ec; --soft: #a3adb8;
  --line: #333a41; --track: #30363c; --before: #8b939c; --between: #5f6972; --after: #4aa8e0; --good: #5cc9a0;
  --warn: #ffc46b; --warn-back: #3a2d16; --focus: #7ab8ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 32px 0 8px; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 8px 0; max-width: 75ch; }
.soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 4px; }
th, td { padding: 4px 16px 4px 0; text-align: right; white-space: nowrap; font-weight: normal; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7rem; overflow-wrap: break-word; }
thead th { color: var(--soft); border-bottom: 1px solid var(--line); }
.tools { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; margin: 12px 0 16px; }
.tools[hidden] { display: none; }
select, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 6px 12px; min-height: 40px; }
button { cursor: pointer; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
#cases { list-style: none; margin: 0; padding: 0; display: grid; gap: 20px; }
.case { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; }
.head { display: flex; flex-wrap: wrap; gap: 4px 16px; justify-content: space-between; align-items: baseline; }
.badge { font-size: .85rem; border: 1px solid currentColor; border-radius: 999px; padding: 1px 10px; }
.reached { color: var(--good); } .missed { color: var(--warn); }
.verdict { margin: 2px 0 12px; }
.pictures { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 12px; align-items: start; }
figure { margin: 0; }
figcaption { font-size: .85rem; color: var(--soft); margin-top: 4px; }
img { display: block; width: 100%; height: auto; border-radius: 4px; image-rendering: pixelated; background: #000; }
.scale { height: 10px; border-radius: 3px; margin-top: 6px; }
.ends { display: flex; justify-content: space-between; font-size: .8rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 12px; height: 12px; border: 3px solid; margin-right: 6px; vertical-align: -1px; }
.numbers { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 12px 32px; margin-top: 14px; }
.probabilities { width: 100%; } .probabilities td { width: 26%; padding-right: 12px; }
.probabilities th:first-child { width: 22%; }
.bar { display: block; height: 6px; border-radius: 3px; background: var(--track); overflow: hidden; }
.bar i { display: block; height: 100%; }
.before { background: var(--before); } .between { background: var(--between); } .after { background: var(--after); }
.wanted th:first-child { font-weight: 600; }
dl { display: grid; grid-template-columns: auto auto; gap: 2px 16px; margin: 0; font-size: .9rem;
  align-content: start; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.cautions { margin: 12px 0 0; padding: 8px 12px 8px 30px; border-radius: 6px; color: var(--warn);
  background: var(--warn-back); }
footer { margin-top: 32px; font-size: .85rem; color: var(--soft); }
@media (max-width: 700px) { main { padding: 16px 12px 32px; } .case { padding: 12px; }
  .pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); } .numbers { grid-template-columns: minmax(0, 1fr); }
  .tools > * { flex: 1 1 100%; } .tools label { display: flex; gap: 8px; align-items: center; } select { flex: 1; }
  th, td { padding-right: 10px; } }
@media print { .tools { display: none; } .case { break-inside: avoid; } }
"""

_SCRIPT = """
"use strict";
(function () {
  var list = document.getElementById("cases"), by = document.getElementById("by");
  var turn = document.getElementById("turn"), said = document.getElementById("said"), descending = false;
  function sort() {
    var key = by.value, items = Array.prototype.slice.call(list.children);
    items.sort(function (a, b) {
      var one = a.dataset[key], two = b.dataset[key];
      var order = key === "name" ? one.localeCompare(two, undefined, { numeric: true }) : Number(one) - Number(two);
      return (descending ? -order : order) || Number(a.dataset.number) - Number(b.dataset.number);
    });
    items.forEach(function (item) { list.appendChild(item); });
    var order = descending ? "descending" : "ascending";
    turn.textContent = "order: " + order;
    said.textContent = "Sorted by " + by.options[by.selectedIndex].text + ", " + order + ".";
  }
  by.addEventListener("change", function () {
    descending = by.value === "confidence" || by.value === "change";
    sort();
  });
  turn.addEventListener("click", function () { descending = !descending; sort(); });
  document.getElementById("tools").hidden = false;
})();
"""

_HOW_TO_READ = (
    "Each case shows what would have to change in an image for the network to give another answer. The <b>factual "
    "reconstruction</b> is the image sent through the same chain without any push: what differs between it and the "
    "image is lost in encoding and is no finding. The <b>change</b> is the counterfactual minus that reconstruction: "
    "red where the image would have to be brighter, blue where darker, gray where nothing changes."
)
_WHEN_NOT_TO_TRUST = (
    "A counterfactual tells what this network reacts to, not what a disease looks like, and the network may react to "
    "something that has nothing to do with it. Do not rely on a case whose probability was not reached, whose "
    "reconstruction already looks different or is answered differently (such cases are marked), or whose image is "
    "unlike those the network was trained on."
)


def png_bytes(picture: np.ndarray) -> bytes:
    """A picture as the content of a PNG file.

    Args:
        picture: uint8 (rows, columns) or (rows, columns, 3).

    Returns:
        the content.

    Raises:
        OptionalImportError: without Pillow.
    """
    stream = io.BytesIO()
    pil_image.fromarray(picture).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def counterfactual_report(
    cases: Sequence[CounterfactualCase],
    title: str = "Counterfactual explanations",
    settings: str = "",
    channel_names: Sequence[str] | None = None,
) -> str:
    """One HTML page of all cases, with everything in it: it opens from a disk, a mail or a phone.

    Args:
        cases: of :meth:`~monai_jointdiff.visualize.CounterfactualCase.of`.
        title: of the page.
        settings: how the counterfactuals were made, in words, for the end of the page.
        channel_names: of channels that stand one below the other in the pictures; None: they are not named.

    Returns:
        the page.

    Raises:
        ValueError: for no case.
        OptionalImportError: without Pillow.
    """
    if not cases:
        raise ValueError("counterfactual_report: at least one case expected.")
    count = f"{len(cases)} image{'s' * (len(cases) > 1)}"
    body = "\n".join(_card(number, case) for number, case in enumerate(cases))
    footer = f"{escape(settings)}<br>" if settings else ""
    channels = (
        f"<p>In each picture, from top to bottom: {escape(', '.join(channel_names))}.</p>" if channel_names else ""
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="soft">{count}, {sum(case.reached for case in cases)} with the requested probability reached</p>
<h2>How to read this page</h2>
<p>{_HOW_TO_READ}</p>
<p><b>When not to trust it.</b> {_WHEN_NOT_TO_TRUST}</p>
{channels}
<h2>Summary</h2>
{_summary(cases)}
<h2 id="list">Cases</h2>
<div class="tools" id="tools" hidden>
<label>Sort by <select id="by"><option value="number">order of the run</option><option value="confidence">confidence \
of the prediction</option><option value="change">size of the change</option><option value="name">name</option>\
</select></label>
<button type="button" id="turn">order: ascending</button>
<span class="soft" id="said" role="status"></span>
</div>
<ol id="cases" aria-labelledby="list">
{body}
</ol>
<footer>{footer}Probabilities are those of the network's head, not calibrated. Changes are mean absolute differences \
per pixel of images in [&minus;1, 1]. Not for clinical use.</footer>
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _summary(cases: Sequence[CounterfactualCase]) -> str:
    """One row for each direction of change, medians over its cases."""
    directions = sorted({(case.prediction, case.wanted) for case in cases})
    rows = []
    for prediction, wanted in directions:
        found = [case for case in cases if (case.prediction, case.wanted) == (prediction, wanted)]
        before, _, after = (statistics.median(stage) for stage in zip(*(case.answers for case in found), strict=True))
        change = statistics.median(case.l1_reconstruction for case in found)
        encoding = statistics.median(case.l1_encoding for case in found)
        marked = sum(bool(case.cautions) for case in found)
        rows.append(
            f'<tr><th scope="row">{escape(prediction)} &rarr; {escape(wanted)}</th><td>{len(found)}</td>'
            f"<td>{sum(case.reached for case in found)}</td><td>{marked}</td><td>{before:.2f} &rarr; {after:.2f}</td>"
            f"<td>{change:.3f}</td><td>{encoding:.3f}</td></tr>"
        )
    heads = ("cases", "reached", "marked", "probability of the target", "change", "change by encoding alone")
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="summary table"><table>'
        "<caption>Medians over the cases of each direction</caption>"
        f'<thead><tr><th scope="col">predicted &rarr; asked for</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _card(number: int, case: CounterfactualCase) -> str:
    """One case."""
    before, _, after = case.answers
    name = escape(case.name or f"image {number}")
    state, words = ("reached", "target reached") if case.reached else ("missed", "not reached")
    truth = "" if case.label is None else f" <span class='soft'>(true: {escape(case.label)})</span>"
    cautions = "".join(f"<li>{escape(text)}</li>" for text in case.cautions)
    warning = f'<ul class="cautions">{cautions}</ul>' if cautions else ""
    return f"""<li class="case" data-number="{number}" data-name="{name}" data-confidence="{case.confidence:.6f}" \
data-change="{case.l1_reconstruction:.6f}">
<div class="head"><h3>{name}{_slice_in_words(case)}</h3><span class="badge {state}">{words}</span></div>
<p class="verdict">{escape(case.prediction)}{truth} &rarr; <b>{escape(case.wanted)}</b>: probability {before:.2f} \
&rarr; {after:.2f}</p>
{_pictures(case, name)}
<div class="numbers">
{_probabilities(case)}
{_figures(case)}
</div>
{warning}
</li>"""


def _slice_in_words(case: CounterfactualCase) -> str:
    if case.tiles.slice_index is None or case.tiles.num_slices is None:
        return ""
    return f" <span class='soft'>slice {case.tiles.slice_index + 1} of {case.tiles.num_slices}</span>"


def _pictures(case: CounterfactualCase, name: str) -> str:
    tiles = case.tiles
    wanted = escape(case.wanted)
    parts = [
        ("image", "image", tiles.image),
        ("factual reconstruction", "factual reconstruction", tiles.reconstruction),
        ("counterfactual", f"counterfactual toward {wanted}", tiles.counterfactual),
    ]
    shown = [
        f"<figure>{_image(picture, f'{name}: {description}')}<figcaption>{title}</figcaption></figure>"
        for title, description, picture in parts
    ]
    end = signed(tiles.limit)
    overlay = _image(tiles.overlay, f"{name}: change toward {wanted}, in color on the gray image, up to {end}")
    keys = "".join(
        f'<br><span class="key" style="border-color:{_css(color)}"></span>{text}'
        for drawn, color, text in (
            (tiles.has_region, REGION, "change was allowed inside"),
            (tiles.has_finding, FINDING, "true finding"),
        )
        if drawn
    )
    shown.append(
        f'<figure>{overlay}<div class="scale" aria-hidden="true" style="background:linear-gradient(90deg,'
        f'{_css(DARKER)},#fff,{_css(BRIGHTER)})"></div><div class="ends"><span>{signed(-tiles.limit)}</span>'
        f"<span>0</span><span>{end}</span></div><figcaption>change{keys}</figcaption></figure>"
    )
    return f'<div class="pictures">{"".join(shown)}</div>'


def _image(picture: np.ndarray, description: str) -> str:
    """An embedded picture; the description is escaped already."""
    rows, columns = picture.shape[:2]
    content = base64.b64encode(png_bytes(picture)).decode("ascii")
    return f'<img src="data:image/png;base64,{content}" alt="{description}" width="{columns}" height="{rows}">'


def _css(color: Any) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _probabilities(case: CounterfactualCase) -> str:
    """A row for each class, a column for each stage."""
    stages = {
        "before": case.probabilities,
        "between": case.probabilities_reconstruction,
        "after": case.probabilities_counterfactual,
    }
    rows = []
    for k in case.shown_classes():
        cells = "".join(
            f'<td>{stage[k]:.3f}<span class="bar" aria-hidden="true"><i class="{name}" '
            f'style="width:{100 * stage[k]:.1f}%"></i></span></td>'
            for name, stage in stages.items()
        )
        wanted = ' class="wanted"' if k == case.target else ""
        rows.append(f'<tr{wanted}><th scope="row">{escape(case.class_names[k])}</th>{cells}</tr>')
    left_out = len(case.class_names) - len(rows)
    caption = f"<caption>The {len(rows)} most probable of {len(case.class_names)} classes</caption>" if left_out else ""
    return (
        f'<div class="scroll"><table class="probabilities">{caption}<thead><tr><th scope="col">probability of</th>'
        '<th scope="col">image</th><th scope="col">reconstruction</th><th scope="col">counterfactual</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figures(case: CounterfactualCase) -> str:
    figures = [
        ("confidence of the prediction", f"{case.confidence:.3f}"),
        ("change against the reconstruction", f"{case.l1_reconstruction:.4f}"),
        ("change against the image", f"{case.l1_input:.4f}"),
        ("change by encoding alone", f"{case.l1_encoding:.4f}"),
        ("strength of the rule", f"{case.scale:.4g}"),
        ("network calls", f"{case.network_calls:.0f}"),
        ("seconds", f"{case.seconds:.2f}"),
    ]
    return "<dl>" + "".join(f"<dt>{term}</dt><dd>{value}</dd>" for term, value in figures) + "</dl>"
