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


"""Counterfactuals as pictures: an image, its factual reconstruction, its counterfactual, and what changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.utils import optional_import

from monai_jointdiff.inferers import CounterfactualResult
from monai_jointdiff.visualize.panels import _arrange, _with_caption, to_tile
from monai_jointdiff.visualize.plots import _new_figure

__all__ = [
    "CounterfactualCase",
    "CounterfactualTiles",
    "counterfactual_panel",
    "counterfactual_strip",
    "difference_overlay",
]

matplotlib_colors, _ = optional_import("matplotlib.colors")
matplotlib_cm, _ = optional_import("matplotlib.cm")

# diverging and safe for color-blind readers: blue is darker, red is brighter
DARKER, BRIGHTER = (22, 96, 220), (214, 39, 40)
REGION, FINDING = (0, 158, 115), (230, 159, 0)  # outlines, Okabe and Ito 2008
_STRONGEST = 0.9  # share of the color where the change is largest; some gray remains visible
_SMALLEST_SCALE = 0.05  # change at which the colors end at least: noise is not blown up to a finding
_TILE_SIDE = 256  # pixels, at least, of the longer side of a tile
_SHOWN_CLASSES = 6
_ENDS = {"reached": "", "missed": ", not reached", "already": ", was so before"}
_BARS = {"image": "#9a9a9a", "reconstruction": "#c9c9c9", "counterfactual": "#0072B2"}


@dataclass(frozen=True)
class CounterfactualTiles:
    """The pictures of one case, enlarged by a whole factor; channels other than 3 stand one below the other.

    Args:
        image: the input, uint8 (rows, columns) or (rows, columns, 3).
        reconstruction: the factual reconstruction, as the image.
        counterfactual: as the image.
        overlay: the change in color on the gray image, uint8 (rows, columns, 3), see :func:`difference_overlay`.
        limit: change at which the colors end, in units of [-1, 1].
        slice_index: of a volume the slice that is shown, along the first axis; None for 2D images.
        num_slices: of a volume the number of slices; None for 2D images.
        has_region: whether the overlay has an outline of where change was allowed.
        has_finding: whether it has an outline of the true finding.
    """

    image: np.ndarray
    reconstruction: np.ndarray
    counterfactual: np.ndarray
    overlay: np.ndarray
    limit: float
    slice_index: int | None = None
    num_slices: int | None = None
    has_region: bool = False
    has_finding: bool = False


@dataclass(frozen=True)
class CounterfactualCase:
    """What is shown and written of one image.

    Args:
        name: of the image, relative to what the user named.
        class_names: K names.
        multi_label: whether the classes are independent labels.
        target: class to move to, or label to change.
        enforce: multi-label: whether the label was to be present.
        probabilities: of the image, K.
        probabilities_reconstruction: of the factual reconstruction, K.
        probabilities_counterfactual: of the counterfactual, K.
        reached: whether the wanted answer became as probable as was asked for.
        already: whether the network gives the wanted answer to the image itself: then nothing was to be explained.
        scale: strength of the rule.
        l1_input: mean absolute difference per pixel of counterfactual and image, images in [-1, 1].
        l1_reconstruction: of counterfactual and factual reconstruction: the change itself.
        l1_encoding: of factual reconstruction and image: what encoding and decoding do alone.
        network_calls: per image, mean over its batch.
        seconds: per image, mean over its batch.
        tiles: the pictures.
        label: what is known to be true of the image, in words; None where it is not.
        remarks: what the inferer has to say against this case, see
            :meth:`~monai_jointdiff.inferers.CounterfactualResult.cautions`.
        decision: what the model's own rule, with its temperature and threshold, calls the image, in words; None: it is
            not known.
        decision_counterfactual: what it calls the counterfactual.
    """

    name: str
    class_names: tuple[str, ...]
    multi_label: bool
    target: int
    enforce: bool
    probabilities: tuple[float, ...]
    probabilities_reconstruction: tuple[float, ...]
    probabilities_counterfactual: tuple[float, ...]
    reached: bool
    already: bool
    scale: float
    l1_input: float
    l1_reconstruction: float
    l1_encoding: float
    network_calls: float
    seconds: float
    tiles: CounterfactualTiles
    label: str | None = None
    remarks: tuple[str, ...] = ()
    decision: str | None = None
    decision_counterfactual: str | None = None

    @classmethod
    def of(
        cls,
        result: CounterfactualResult,
        index: int = 0,
        class_names: Sequence[str] | None = None,
        *,
        multi_label: bool = False,
        name: str = "",
        mask: Any = None,
        label: str | None = None,
        limit: float | None = None,
        slice_index: int | None = None,
        decide: Callable[[torch.Tensor], Any] | None = None,
    ) -> CounterfactualCase:
        """One image of a batch of counterfactuals.

        Args:
            result: the batch.
            index: of the image in it.
            class_names: K names; None: "0", "1", ...
            multi_label: whether the classes are independent labels.
            name: of the image.
            mask: where the true finding is, (1, *spatial) or (*spatial), for its outline; None: unknown.
            label: what is true of the image, in words.
            limit: change at which the colors end; None: the largest change.
            slice_index: of a volume the slice to show, along its first axis; None: the one that changes most.
            decide: the model's own rule: maps probabilities (N, K) to classes (N,), or 0 and 1 of each label (N, K);
                None: it is not known.

        Returns:
            numbers and pictures of that image.

        Raises:
            ValueError: for an index beyond the batch or a wrong number of names.
        """
        size, num_classes = result.probabilities.shape
        names = tuple(map(str, range(num_classes) if class_names is None else class_names))
        if not 0 <= index < size or len(names) != num_classes:
            raise ValueError(
                f"CounterfactualCase: an index in [0, {size - 1}] and {num_classes} class names expected, got index "
                f"{index} and {len(names)} names."
            )
        parts = (result.image, result.reconstruction, result.counterfactual, result.difference)
        image, reconstruction, counterfactual, difference = (_array(part[index]) for part in parts)
        region = None if result.region is None else _array(result.region[index])
        target = int(result.record.target[index])
        stages = torch.stack([result.probabilities[index], result.probabilities_counterfactual[index]])
        called = (None, None) if decide is None else [_called(part, names, target) for part in decide(stages)]
        return cls(
            name=name,
            class_names=names,
            multi_label=multi_label,
            target=target,
            enforce=bool(result.record.enforce[index]),
            probabilities=tuple(result.probabilities[index].tolist()),
            probabilities_reconstruction=tuple(result.probabilities_reconstruction[index].tolist()),
            probabilities_counterfactual=tuple(result.probabilities_counterfactual[index].tolist()),
            reached=bool(result.reached[index]),
            already=bool(result.already[index]),
            scale=float(result.record.scale[index]),
            l1_input=_distance(counterfactual, image),
            l1_reconstruction=float(np.abs(difference).mean(dtype=np.float64)),
            l1_encoding=_distance(reconstruction, image),
            network_calls=float(result.network_calls),
            seconds=float(result.seconds) / size,
            tiles=_tiles(image, reconstruction, counterfactual, difference, region, mask, limit, slice_index),
            label=label,
            remarks=tuple(result.cautions(index)),
            decision=called[0],
            decision_counterfactual=called[1],
        )

    @classmethod
    def of_targets(
        cls,
        results: Sequence[CounterfactualResult],
        index: int = 0,
        class_names: Sequence[str] | None = None,
        **parts: Any,
    ) -> tuple[CounterfactualCase, ...]:
        """One image of a batch that was brought to several targets, with one scale of colors and one slice for all.

        Args:
            results: the same batch, once for each target.
            index: of the image in it.
            class_names: as for :meth:`of`.
            parts: further keywords of :meth:`of`.

        Returns:
            a case for each target.
        """
        differences = [np.abs(_array(result.difference[index])) for result in results]
        limit = float(max(difference.max() for difference in differences))
        total = np.sum(differences, axis=0)
        shown = {"limit": limit, "slice_index": _most_changed_slice(total) if total.ndim == 4 else None, **parts}
        return tuple(cls.of(result, index, class_names, **shown) for result in results)

    @property
    def predicted(self) -> int:
        """The most probable class of the image; multi-label: the target label."""
        return self.target if self.multi_label else int(np.argmax(self.probabilities))

    @property
    def confidence(self) -> float:
        """Probability of what the network says of the image: of the predicted class; of the target label's state."""
        probability = self.probabilities[self.predicted]
        return max(probability, 1 - probability) if self.multi_label else probability

    @property
    def answers(self) -> tuple[float, float, float]:
        """Probability of the wanted answer: of the image, the factual reconstruction and the counterfactual."""
        stages = (self.probabilities, self.probabilities_reconstruction, self.probabilities_counterfactual)
        chosen = [stage[self.target] for stage in stages]
        before, between, after = chosen if self.enforce else [1 - value for value in chosen]
        return before, between, after

    @property
    def prediction(self) -> str:
        """What the network says of the image, in words."""
        if not self.multi_label:
            return self.class_names[self.predicted]
        return _label_in_words(self.class_names[self.target], self.probabilities[self.target] >= 0.5)

    @property
    def said_of_image(self) -> str:
        """What the network says of the image whatever was asked for: the class, or the labels that are present."""
        if not self.multi_label:
            return f"{self.prediction}, probability {self.confidence:.2f}"
        present = [name for name, p in zip(self.class_names, self.probabilities, strict=True) if p >= 0.5]
        return ", ".join(present) or "none"

    @property
    def wanted(self) -> str:
        """What it was to say instead, in words."""
        name = self.class_names[self.target]
        return _label_in_words(name, self.enforce) if self.multi_label else name

    @property
    def outcome(self) -> str:
        """What became of it: `reached`, `missed`, or `already` where there was nothing to change."""
        return "already" if self.already else "reached" if self.reached else "missed"

    @property
    def cautions(self) -> list[str]:
        """Why this case should not be trusted, in words; empty when nothing speaks against it."""
        found = list(self.remarks)
        if not (self.reached or self.already):
            found.append("The requested probability was not reached: the change does not explain the other answer.")
        if self.decision not in (None, self.prediction):
            found.append(f"By its own threshold the model calls the image {self.decision}, not {self.prediction}.")
        if self.reached and self.decision_counterfactual not in (None, self.wanted):
            found.append(f"By its own threshold the model calls the counterfactual {self.decision_counterfactual}.")
        if self._says(self.probabilities) != self._says(self.probabilities_reconstruction):
            found.append("Encoding and decoding alone already change the prediction.")
        if self.l1_encoding > self.l1_reconstruction and not self.already:
            found.append("Encoding and decoding alone change the image more than the counterfactual does.")
        return found

    def _says(self, probabilities: Sequence[float]) -> int:
        return int(probabilities[self.target] >= 0.5) if self.multi_label else int(np.argmax(probabilities))

    def shown_classes(self) -> list[int]:
        """Classes worth a bar, in their order: all of a few; of many the target and the most probable ones."""
        largest = np.max(
            [self.probabilities, self.probabilities_reconstruction, self.probabilities_counterfactual], axis=0
        )
        largest[self.target] = np.inf
        return sorted(np.argsort(-largest, kind="stable")[:_SHOWN_CLASSES].tolist())


def _label_in_words(name: str, present: bool) -> str:
    return f"{name}: {'yes' if present else 'no'}"


def _called(decided: Any, names: Sequence[str], target: int) -> str:
    """A class, or what was decided of the target label (K,), in words."""
    return names[int(decided)] if np.ndim(decided) == 0 else _label_in_words(names[target], bool(decided[target]))


def difference_overlay(
    image: Any,
    difference: Any,
    limit: float,
    region: Any = None,
    mask: Any = None,
    magnification: int = 1,
) -> np.ndarray:
    """A signed change in color on the gray image: red where it became brighter, blue where it became darker.

    The share of the color is proportional to the change, up to `limit`; where nothing changed the image stays gray.

    Args:
        image: (rows, columns) in [-1, 1]; values beyond are cut.
        difference: (rows, columns), signed.
        limit: change at which the colors end, > 0.
        region: (rows, columns) bool, outlined in green; None: no outline.
        mask: (rows, columns) bool, outlined in orange; None: no outline.
        magnification: whole factor by which pixels are enlarged.

    Returns:
        uint8 (magnification * rows, magnification * columns, 3).

    Raises:
        ValueError: for arrays of different shapes, or a limit or magnification that is not positive.
    """
    parts = [np.asarray(part) for part in (image, difference, region, mask) if part is not None]
    if len({part.shape for part in parts}) > 1 or parts[0].ndim != 2 or not limit > 0 or magnification < 1:
        raise ValueError(
            f"difference_overlay: arrays (rows, columns) of one shape, limit > 0 and magnification >= 1 expected, got "
            f"{[part.shape for part in parts]}, {limit}, {magnification}."
        )
    gray = (np.asarray(image, dtype=np.float64).clip(-1, 1)[..., None] + 1) * 127.5
    share = (np.asarray(difference, dtype=np.float64) / limit).clip(-1, 1)[..., None]
    weight = _STRONGEST * np.abs(share)
    colored = (1 - weight) * gray + weight * np.where(share > 0, BRIGHTER, DARKER)
    picture = _enlarge(np.round(colored).astype(np.uint8), magnification)
    for outlined, color in ((region, REGION), (mask, FINDING)):
        if outlined is not None:
            picture[_outline(_enlarge(np.asarray(outlined, dtype=bool), magnification), magnification)] = color
    return picture


def counterfactual_panel(
    case: CounterfactualCase | Sequence[CounterfactualCase], channel_names: Sequence[str] | None = None
) -> np.ndarray:
    """One image as a picture for reports and papers: the four pictures side by side, and the probabilities.

    Args:
        case: of :meth:`CounterfactualCase.of`; or several of one image that was brought to several targets, of
            :meth:`CounterfactualCase.of_targets`: each has a column with its counterfactual above the change.
        channel_names: written beside channels that stand one below the other; None: nothing.

    Returns:
        uint8 (rows, columns, 3).

    Raises:
        ValueError: for no case.
        OptionalImportError: without matplotlib.
    """
    cases = (case,) if isinstance(case, CounterfactualCase) else tuple(case)
    if not cases:
        raise ValueError("counterfactual_panel: at least one case expected.")
    figure = _panel_of_one(cases[0], channel_names) if len(cases) == 1 else _panel_of_targets(cases, channel_names)
    figure.set_dpi(120)
    figure.canvas.draw()
    return np.ascontiguousarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])


def _panel_of_one(case: CounterfactualCase, channel_names: Sequence[str] | None) -> Any:
    """Image, factual reconstruction, counterfactual and change in a row, then the probabilities."""
    tiles = case.tiles
    width, height = _tile_inches(tiles)
    shown = case.shown_classes()
    figure = _new_figure(4 * width + 4.1, max(height, 0.5 + 0.42 * len(shown)) + 1.1)
    grid = figure.add_gridspec(1, 5, width_ratios=(width, width, width, width, 2.5))
    titles = ("image", "factual reconstruction", "counterfactual", "change")
    pictures = (tiles.image, tiles.reconstruction, tiles.counterfactual, tiles.overlay)
    for column, (title, picture) in enumerate(zip(titles, pictures, strict=True)):
        axes = _show(figure.add_subplot(grid[0, column]), picture, title)
        if column == 0 and channel_names is not None:
            _name_channels(axes, channel_names, tiles.image.shape[0])
        if column == 3:
            _write_legend(axes, tiles)
            _color_bar(figure, axes, tiles.limit)
    _draw_probabilities(figure.add_subplot(grid[0, 4]), case, shown)
    before, _, after = case.answers
    verdict = (
        f"{case.prediction}{_truth(case)}  \N{RIGHTWARDS ARROW}  {case.wanted}:  probability {before:.2f} "
        f"\N{RIGHTWARDS ARROW} {after:.2f}{_ENDS[case.outcome]}"
    )
    figure.suptitle("\n".join(filter(None, (_heading(case), verdict))), fontsize=11, parse_math=False)
    return figure


def _panel_of_targets(cases: Sequence[CounterfactualCase], channel_names: Sequence[str] | None) -> Any:
    """A column with the image above its factual reconstruction, then one with counterfactual and change per target."""
    first = cases[0]
    width, height = _tile_inches(first.tiles)
    figure = _new_figure((1 + len(cases)) * (width + 0.15) + 1.0, 2 * height + 1.9)
    grid = figure.add_gridspec(2, 1 + len(cases))
    image = _show(figure.add_subplot(grid[0, 0]), first.tiles.image, "image")
    reconstruction = _show(figure.add_subplot(grid[1, 0]), first.tiles.reconstruction, "factual reconstruction")
    if channel_names is not None:
        for axes in (image, reconstruction):
            _name_channels(axes, channel_names, first.tiles.image.shape[0])
    for column, case in enumerate(cases, start=1):
        before, _, after = case.answers
        numbers = f"{before:.2f} \N{RIGHTWARDS ARROW} {after:.2f}{_ENDS[case.outcome]}"
        title = f"to {_shortened(case.wanted)}\n{numbers}"
        _show(figure.add_subplot(grid[0, column]), case.tiles.counterfactual, title)
        change = _show(figure.add_subplot(grid[1, column]), case.tiles.overlay, f"change {case.l1_reconstruction:.3f}")
        _write_legend(change, case.tiles)
    _color_bar(figure, change, first.tiles.limit)
    said = f"{first.said_of_image}{_truth(first)}"
    figure.suptitle("\n".join(filter(None, (_heading(first), said))), fontsize=11, parse_math=False)
    return figure


def _tile_inches(tiles: CounterfactualTiles) -> tuple[float, float]:
    """Width and height of a picture; the titles need 1.7."""
    rows, columns = tiles.image.shape[:2]
    width = min(2.3, max(1.7, 2.3 * columns / rows))
    return width, min(7.0, width * rows / columns)


def _show(axes: Any, picture: np.ndarray, title: str) -> Any:
    """A picture without axes."""
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes


def _heading(case: CounterfactualCase) -> str:
    shown = case.tiles
    place = "" if shown.slice_index is None else f"(slice {shown.slice_index + 1} of {shown.num_slices})"
    return "   ".join(filter(None, (case.name, place)))


def _truth(case: CounterfactualCase) -> str:
    return "" if case.label is None else f" (true: {case.label})"


def counterfactual_strip(cases: Sequence[CounterfactualCase]) -> np.ndarray:
    """Several cases in one picture without matplotlib, one a row, for the log of a training.

    Args:
        cases: at least one, of images of one size.

    Returns:
        uint8 (rows, columns, 3): image, factual reconstruction, counterfactual, change; below each what the network
        says of it, below the change what was asked for and where the colors end.

    Raises:
        ValueError: for no case.
        OptionalImportError: without Pillow.
    """
    if not cases:
        raise ValueError("counterfactual_strip: at least one case expected.")
    tiles = []
    for case in cases:
        stages = (case.probabilities, case.probabilities_reconstruction, case.probabilities_counterfactual)
        pictures = (case.tiles.image, case.tiles.reconstruction, case.tiles.counterfactual)
        for picture, probabilities in zip(pictures, stages, strict=True):
            best = case.target if case.multi_label else int(np.argmax(probabilities))
            tiles.append(_with_caption(_in_color(picture), f"{case.class_names[best]} {probabilities[best]:.2f}"))
        tiles.append(_with_caption(case.tiles.overlay, f"to {case.wanted}, \N{PLUS-MINUS SIGN}{case.tiles.limit:.2f}"))
    return _arrange(tiles, 4)


def _tiles(
    image: np.ndarray,
    reconstruction: np.ndarray,
    counterfactual: np.ndarray,
    difference: np.ndarray,
    region: np.ndarray | None,
    mask: Any,
    limit: float | None,
    slice_index: int | None,
) -> CounterfactualTiles:
    """The pictures of one case; all arrays (C, *spatial), the region (1, *spatial)."""
    spatial = image.shape[1:]
    finding = None if mask is None else _array(mask).reshape(spatial) > 0.5
    allowed = None if region is None else region.reshape(spatial) > 0.5
    found = float(np.abs(difference).max()) if limit is None else limit
    limit = max(found, _SMALLEST_SCALE)
    index, count = None, None
    if len(spatial) == 3:
        count = spatial[0]
        index = _most_changed_slice(difference) if slice_index is None else slice_index
        image, reconstruction, counterfactual, difference = (
            volume[:, index] for volume in (image, reconstruction, counterfactual, difference)
        )
        finding = None if finding is None else finding[index]
        allowed = None if allowed is None else allowed[index]
    factor = max(1, math.ceil(_TILE_SIDE / max(image.shape[1:])))
    colored = len(image) == 3
    gray = image.mean(axis=0, keepdims=True) if colored else image
    change = _strongest_channel(difference) if colored else difference
    overlays = [
        difference_overlay(*channel, limit, allowed, finding, factor) for channel in zip(gray, change, strict=True)
    ]
    return CounterfactualTiles(
        image=_stack(image, factor),
        reconstruction=_stack(reconstruction, factor),
        counterfactual=_stack(counterfactual, factor),
        overlay=np.concatenate(overlays, axis=0),
        limit=limit,
        slice_index=index,
        num_slices=count,
        has_region=allowed is not None,
        has_finding=finding is not None and bool(finding.any()),
    )


def _most_changed_slice(difference: np.ndarray) -> int:
    """Along the first spatial axis; the middle one where nothing changed."""
    amount = np.abs(difference).sum(axis=(0, 2, 3))
    return int(amount.argmax()) if amount.any() else difference.shape[1] // 2


def _strongest_channel(difference: np.ndarray) -> np.ndarray:
    """(1, rows, columns) of (C, rows, columns): at each pixel the change that is largest, with its sign."""
    return np.take_along_axis(difference, np.abs(difference).argmax(axis=0, keepdims=True), axis=0)


def _stack(image: np.ndarray, factor: int) -> np.ndarray:
    """(C, rows, columns) as a picture: three channels are colors, others stand one below the other."""
    if len(image) == 3:
        return _enlarge(to_tile(image), factor)
    return np.concatenate([_enlarge(to_tile(channel[None]), factor) for channel in image], axis=0)


def _enlarge(picture: np.ndarray, factor: int) -> np.ndarray:
    return picture.repeat(factor, 0).repeat(factor, 1)


def _outline(mask: np.ndarray, factor: int) -> np.ndarray:
    """The pixels of a mask along its border, two wide where an enlarged pixel has as many, wider where it is large."""
    inner = mask
    for _ in range(min(factor, max(2, factor // 4))):
        padded = np.pad(inner, 1, constant_values=False)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _in_color(picture: np.ndarray) -> np.ndarray:
    return picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().float().numpy()
    return np.asarray(values, dtype=np.float32)


def _distance(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.abs(one.astype(np.float64) - two).mean())


def _name_channels(axes: Any, names: Sequence[str], rows: int) -> None:
    """The names of the channels at the middles of their tiles."""
    middles = (np.arange(len(names)) + 0.5) * rows / len(names)
    axes.set_yticks(middles, list(names), rotation=90, va="center", fontsize=9)
    axes.tick_params(length=0)


def _write_legend(axes: Any, tiles: CounterfactualTiles) -> None:
    """What the outlines are."""
    lines = [
        (tiles.has_region, "change was allowed here", REGION),
        (tiles.has_finding, "true finding", FINDING),
    ]
    for row, (_, text, color) in enumerate(line for line in lines if line[0]):
        axes.annotate(
            text,
            (0.5, 0),
            xytext=(0, -4 - 11 * row),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
            color=np.divide(color, 255),
            fontweight="bold",
        )


def _color_bar(figure: Any, axes: Any, limit: float) -> None:
    """From darker over no change to brighter, with numbers."""
    ends = [np.divide(color, 255) for color in (DARKER, BRIGHTER)]
    colors = matplotlib_colors.LinearSegmentedColormap.from_list("change", [ends[0], (1, 1, 1), ends[1]])
    mappable = matplotlib_cm.ScalarMappable(matplotlib_colors.Normalize(-limit, limit), colors)
    ticks = [-limit, -limit / 2, 0, limit / 2, limit]
    bar = figure.colorbar(mappable, cax=axes.inset_axes([1.04, 0, 0.055, 1]), ticks=ticks)
    bar.ax.set_yticklabels([signed(value) for value in ticks])
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)


def signed(value: float) -> str:
    """A change in words: two digits, with a sign unless it is zero."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _draw_probabilities(axes: Any, case: CounterfactualCase, shown: Sequence[int]) -> None:
    """A group of three bars for each class, the first class at the top."""
    stages = {
        "image": case.probabilities,
        "reconstruction": case.probabilities_reconstruction,
        "counterfactual": case.probabilities_counterfactual,
    }
    for number, (name, probabilities) in enumerate(stages.items()):
        places = np.arange(len(shown)) + (number - 1) * 0.27
        values = [probabilities[k] for k in shown]
        axes.barh(places, values, height=0.25, color=_BARS[name], label=name)
        for place, value in zip(places, values, strict=True):
            axes.text(value + 0.02, place, f"{value:.2f}", va="center", fontsize=7.5, color="#333333")
    labels = [_shortened(case.class_names[k]) for k in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=9)
    for label, k in zip(axes.get_yticklabels(), shown, strict=True):
        label.set_parse_math(False)
        label.set_fontweight("bold" if k == case.target else "normal")
    axes.set(xlim=(0, 1.18), ylim=(len(shown) - 0.45, -0.55), xticks=[])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("probabilities", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.42, 0.0), ncols=3, fontsize=7, frameon=False, handlelength=1)


def _shortened(text: str, length: int = 18) -> str:
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"
