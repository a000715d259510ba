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
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_jointdiff.metrics import CounterfactualFigures, Interval, Judgement, LocalizationReport
from monai_jointdiff.metrics.bootstrap import FEWEST_UNITS
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
.reached { color: var(--good); } .missed { color: var(--warn); } .already { color: var(--soft); }
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
.numbers.wide { grid-template-columns: minmax(0, 1fr); } .badges { display: flex; flex-wrap: wrap; gap: 4px 8px; }
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
    cases: Sequence[CounterfactualCase | Sequence[CounterfactualCase]],
    title: str = "Counterfactual explanations",
    settings: str = "",
    channel_names: Sequence[str] | None = None,
    figures: CounterfactualFigures | None = None,
    out_of: int | None = None,
) -> str:
    """One HTML page of all cases, with everything in it: it opens from a disk, a mail or a phone.

    Args:
        cases: one entry for each image: of :meth:`~monai_jointdiff.visualize.CounterfactualCase.of`, or of
            :meth:`~monai_jointdiff.visualize.CounterfactualCase.of_targets`, whose targets stand side by side.
        title: of the page.
        settings: how the counterfactuals were made, in words, for the end of the page.
        channel_names: of channels that stand one below the other in the pictures; None: they are not named.
        figures: of the run, for the head of the page; None: they were not measured.
        out_of: how many images there were, of which these are some; None: these are all.

    Returns:
        the page.

    Raises:
        ValueError: for no case.
        OptionalImportError: without Pillow.
    """
    groups = [(entry,) if isinstance(entry, CounterfactualCase) else tuple(entry) for entry in cases]
    if not groups or not all(groups):
        raise ValueError("counterfactual_report: at least one case expected.")
    flat = [case for group in groups for case in group]
    body = "\n".join(_card(number, group) for number, group in enumerate(groups))
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
<p class="soft">{_count(groups, out_of)}</p>
<h2>How to read this page</h2>
<p>{_HOW_TO_READ}</p>
<p><b>When not to trust it.</b> {_WHEN_NOT_TO_TRUST}</p>
{channels}
<h2>Summary</h2>
{_summary(flat)}
{"" if figures is None else _measured(figures)}
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


def _count(groups: Sequence[Sequence[CounterfactualCase]], out_of: int | None) -> str:
    """How many images and counterfactuals there are, and what became of those that something was asked of."""
    cases = [case for group in groups for case in group]
    asked = [case for case in cases if not case.already]
    left_out = "" if out_of is None else f" of {out_of}, evenly spread (the others are not shown)"
    parts = [f"{len(groups)} image{'s' * (len(groups) > 1)}{left_out}"]
    if len(cases) > len(groups):
        parts.append(f"{len(cases)} counterfactuals")
    parts.append(f"{sum(case.reached for case in asked)} of {len(asked)} with the requested probability reached")
    if len(asked) < len(cases):
        parts.append(f"{len(cases) - len(asked)} with the wanted answer before any change, counted apart")
    return ", ".join(parts)


def _summary(cases: Sequence[CounterfactualCase]) -> str:
    """One row for each direction of change, medians over its cases."""
    directions = sorted({(case.prediction, case.wanted) for case in cases})
    rows = []
    for prediction, wanted in directions:
        found = [case for case in cases if (case.prediction, case.wanted) == (prediction, wanted)]
        asked = [case for case in found if not case.already]
        medians = "<td>&ndash;</td>" * 3
        if asked:
            before, _, after = (
                statistics.median(stage) for stage in zip(*(case.answers for case in asked), strict=True)
            )
            change = statistics.median(case.l1_reconstruction for case in asked)
            encoding = statistics.median(case.l1_encoding for case in asked)
            medians = f"<td>{before:.2f} &rarr; {after:.2f}</td><td>{change:.3f}</td><td>{encoding:.3f}</td>"
        rows.append(
            f'<tr><th scope="row">{escape(prediction)} &rarr; {escape(wanted)}</th><td>{len(asked)}</td>'
            f"<td>{len(found) - len(asked)}</td><td>{sum(case.reached for case in asked)}</td>"
            f"<td>{sum(bool(case.cautions) for case in asked)}</td>{medians}</tr>"
        )
    heads = (
        "cases",
        "answered so before",
        "reached",
        "marked",
        "probability of the target",
        "change",
        "change by encoding alone",
    )
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="summary table"><table>'
        "<caption>Medians over the cases of each direction</caption>"
        f'<thead><tr><th scope="col">predicted &rarr; asked for</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _measured(figures: CounterfactualFigures) -> str:
    """What a judge says, how much changed, and where."""
    judge, oracle = "by the model itself", ""
    if figures.oracle is None:
        warning = "<p>No oracle was given. The model took part in the search, so its own verdict proves nothing.</p>"
    else:
        warning, oracle = "", _judgement("by the oracle", figures.oracle)
    near = [
        ("against the image", figures.to_input),
        ("against the reconstruction", figures.to_reconstruction),
    ]
    distances = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(_cell(part) for part in (found.l1, found.l2, found.ssim, found.sparsity))
        + "</tr>"
        for name, found in near
    )
    distances += f'<tr><th scope="row">encoding alone</th>{_cell(figures.composition)}{"<td></td>" * 3}</tr>'
    parts = [
        _table(
            "Judged, with 95 % intervals; cases that had the wanted answer before are left out",
            ("who judges, and what was asked for", "cases", "flipped", "gain of probability", "COUT"),
            oracle + _judgement(judge, figures.model),
        ),
        _table(
            "Size of the change, means over the same cases",
            ("counterfactual", "L1", "L2", "SSIM", "share of pixels changed"),
            distances,
        ),
    ]
    if figures.localization:
        parts.append(_localized(figures.localization))
    return "\n".join(["<h2>Figures</h2>", warning, _drawn(figures.settings), *parts])


def _localized(reports: Mapping[str, LocalizationReport]) -> str:
    """The change against masks, a row for each direction: the mask of a finding cannot hold the one that comes."""
    threshold = next(iter(reports.values())).threshold
    columns = ("auprc", "iou", "iou_best", "dice", "pointing", "inside", "outside")
    return _table(
        "Change against the masks of the findings that are there before; IoU and Dice of changes above "
        f"{threshold:g}, IoU at best with the threshold that suits these very images",
        (
            "predicted and asked for",
            "masks",
            "AUPRC",
            "IoU",
            "IoU at best",
            "Dice",
            "pointing game",
            "change inside",
            "change outside",
        ),
        "".join(
            f'<tr><th scope="row">{escape(direction)}</th><td>{found.count}</td>'
            f"{''.join(_cell(getattr(found, column)) for column in columns)}</tr>"
            for direction, found in reports.items()
        ),
    )


def _drawn(settings: Mapping[str, Any]) -> str:
    """What the images are, if that limits what the figures say, and what the intervals are over."""
    texts = [f"The images: {settings['images']}."] if "images" in settings else []
    if settings["drawn"] == "groups":
        texts.append(
            f"Intervals are over {settings['units']} groups of counterfactuals that belong together: of one patient, "
            "or of one image."
        )
    texts.append(f"Means over fewer than {FEWEST_UNITS} have no interval.")
    return f"<p>{escape(' '.join(texts))}</p>"


def _judgement(name: str, judgement: Judgement) -> str:
    """A row for each direction, the score of all of them in the first."""
    directions = judgement.flips.directions
    return "".join(
        f'<tr><th scope="row">{name}: {escape(direction)}</th><td>{found.count}</td>{_cell(found.rate)}'
        f"{_cell(found.gain)}{_cell(judgement.cout) if number == 0 else '<td></td>'}</tr>"
        for number, (direction, found) in enumerate(directions.items())
    )


def _cell(figure: Interval) -> str:
    if figure.value is None:
        return f'<td title="{escape(figure.reason)}">&ndash;</td>'
    known = figure.low is not None and figure.high is not None and figure.low < figure.high  # one image has no spread
    spread = "" if not known else f' <span class="soft">({figure.low:.3f} to {figure.high:.3f})</span>'
    return f"<td>{figure.value:.3f}{spread}</td>"


def _table(caption: str, heads: Sequence[str], rows: str) -> str:
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


_STATES = {"reached": "target reached", "missed": "not reached", "already": "answered so before"}


def _card(number: int, cases: Sequence[CounterfactualCase]) -> str:
    """One image."""
    first = cases[0]
    confidence = min(case.confidence for case in cases)  # of several labels each has its own
    name = escape(first.name or f"image {number}")
    badges = "".join(_badge(case, len(cases) > 1) for case in cases)
    truth = "" if first.label is None else f" <span class='soft'>(true: {escape(first.label)})</span>"
    if len(cases) == 1:
        before, _, after = first.answers
        verdict = (
            f"{escape(first.prediction)}{truth} &rarr; <b>{escape(first.wanted)}</b>: probability {before:.2f} &rarr; "
            f"{after:.2f}"
        )
        numbers = f"{_probabilities(cases)}\n{_figures(first)}"
    else:
        verdict = f"{escape(first.said_of_image)}{truth}"
        numbers = f"{_probabilities(cases)}\n{_figures_of_targets(cases)}"
    texts = [
        f"{escape(case.wanted)}: {escape(text)}" if len(cases) > 1 else escape(text)
        for case in cases
        for text in case.cautions
    ]
    warning = f'<ul class="cautions">{"".join(f"<li>{text}</li>" for text in texts)}</ul>' if texts else ""
    return f"""<li class="case" data-number="{number}" data-name="{name}" data-confidence="{confidence:.6f}" \
data-change="{min(case.l1_reconstruction for case in cases):.6f}">
<div class="head"><h3>{name}{_slice_in_words(first)}</h3><span class="badges">{badges}</span></div>
<p class="verdict">{verdict}</p>
{_pictures(cases, name)}
<div class="numbers{" wide" if len(cases) > 1 else ""}">
{numbers}
</div>
{warning}
</li>"""


def _badge(case: CounterfactualCase, named: bool) -> str:
    target = f"{escape(case.wanted)}: " if named else ""
    return f'<span class="badge {case.outcome}">{target}{_STATES[case.outcome]}</span>'


def _slice_in_words(case: CounterfactualCase) -> str:
    if case.tiles.slice_index is None or case.tiles.num_slices is None:
        return ""
    return f" <span class='soft'>slice {case.tiles.slice_index + 1} of {case.tiles.num_slices}</span>"


def _pictures(cases: Sequence[CounterfactualCase], name: str) -> str:
    """The image and its reconstruction, then counterfactual and change of each target; the name is escaped already."""
    first = cases[0].tiles
    shown = [
        f"<figure>{_image(picture, f'{name}: {title}')}<figcaption>{title}</figcaption></figure>"
        for title, picture in (("image", first.image), ("factual reconstruction", first.reconstruction))
    ]
    for case in cases:
        wanted = escape(case.wanted)
        toward = f" toward {wanted}" if len(cases) > 1 else ""
        picture = _image(case.tiles.counterfactual, f"{name}: counterfactual toward {wanted}")
        shown.append(f"<figure>{picture}<figcaption>counterfactual{toward}</figcaption></figure>")
        shown.append(_change(case, name, toward))
    return f'<div class="pictures">{"".join(shown)}</div>'


def _change(case: CounterfactualCase, name: str, toward: str) -> str:
    """The change in color, with its scale and the meaning of the outlines."""
    tiles = case.tiles
    end = signed(tiles.limit)
    description = f"{name}: change toward {escape(case.wanted)}, in color on the gray image, up to {end}"
    overlay = _image(tiles.overlay, description)
    keys = "".join(
        f'<br><span class="key" style="border-color:{_css(color)}"></span>{text}'
        for drawn, color, text in (
            (tiles.has_region, REGION, "change was allowed inside"),
            (tiles.has_finding, FINDING, "true finding"),
        )
        if drawn
    )
    return (
        f'<figure>{overlay}<div class="scale" aria-hidden="true" style="background:linear-gradient(90deg,'
        f'{_css(DARKER)},#fff,{_css(BRIGHTER)})"></div><div class="ends"><span>{signed(-tiles.limit)}</span>'
        f"<span>0</span><span>{end}</span></div><figcaption>change{toward}{keys}</figcaption></figure>"
    )


def _image(picture: np.ndarray, description: str) -> str:
    """An embedded picture; the description is escaped already."""
    rows, columns = picture.shape[:2]
    content = base64.b64encode(png_bytes(picture)).decode("ascii")
    return f'<img src="data:image/png;base64,{content}" alt="{description}" width="{columns}" height="{rows}">'


def _css(color: Any) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _probabilities(cases: Sequence[CounterfactualCase]) -> str:
    """A row for each class, a column for each stage."""
    first = cases[0]
    named = len(cases) > 1
    stages = [
        ("image", "before", first.probabilities),
        ("reconstruction", "between", first.probabilities_reconstruction),
    ]
    for case in cases:
        title = f"to {escape(case.wanted)}" if named else "counterfactual"
        stages.append((title, "after", case.probabilities_counterfactual))
    shown = sorted({k for case in cases for k in case.shown_classes()})
    targets = {case.target for case in cases}
    rows = []
    for k in shown:
        cells = "".join(
            f'<td>{stage[k]:.3f}<span class="bar" aria-hidden="true"><i class="{name}" '
            f'style="width:{100 * stage[k]:.1f}%"></i></span></td>'
            for _, name, stage in stages
        )
        wanted = ' class="wanted"' if k in targets and not named else ""
        rows.append(f'<tr{wanted}><th scope="row">{escape(first.class_names[k])}</th>{cells}</tr>')
    left_out = len(first.class_names) - len(rows)
    caption = (
        f"<caption>The {len(rows)} most probable of {len(first.class_names)} classes</caption>" if left_out else ""
    )
    heads = "".join(f'<th scope="col">{title}</th>' for title, _, _ in stages)
    return (
        f'<div class="scroll"><table class="probabilities">{caption}<thead><tr><th scope="col">probability of</th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figures_of_targets(cases: Sequence[CounterfactualCase]) -> str:
    """A row for each target."""
    rows = "".join(
        f'<tr><th scope="row">to {escape(case.wanted)}</th><td>{case.l1_reconstruction:.4f}</td>'
        f"<td>{case.l1_input:.4f}</td><td>{case.scale:.4g}</td><td>{case.network_calls:.0f}</td>"
        f"<td>{case.seconds:.2f}</td></tr>"
        for case in cases
    )
    heads = ("", "change against the reconstruction", "against the image", "strength of the rule", "calls", "seconds")
    return _table(f"Change by encoding alone: {cases[0].l1_encoding:.4f}", heads, rows)


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
