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

"""Draws the pictures of the README: `python docs/make_figures.py build/demo/output` after `make demo`.

A second argument, the output of `counterfactual.json`, draws the picture of counterfactuals from its first cases.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_jointdiff.data import CHEST_CLASSES, ChestPhantoms
from monai_jointdiff.visualize import save_figure

FIGURES = Path(__file__).resolve().parent / "figures"
SIZE, COLUMNS, ZOOM = 96, 6, 2
RED = (230, 60, 40)


def phantom_tile(phantoms: ChestPhantoms, index: int, label: int) -> Image.Image:
    """One phantom with the outline of its finding."""
    phantom = phantoms(index, label)
    picture = np.repeat(np.repeat(phantom.image[0], ZOOM, 0), ZOOM, 1)
    mask = np.repeat(np.repeat(phantom.mask[0], ZOOM, 0), ZOOM, 1)
    inner = mask.copy()
    for axis in (0, 1):
        for shift in (-1, 1):
            inner &= np.roll(mask, shift, axis)
    colored = np.repeat(picture[..., None], 3, axis=2)
    colored[mask & ~inner] = RED
    return Image.fromarray(colored)


def draw_phantoms(path: Path) -> None:
    """Rows: normal, opacity, effusion; every column is one chest."""
    phantoms = ChestPhantoms(image_size=SIZE, seed=3)
    side, head = SIZE * ZOOM, 80
    sheet = Image.new("RGB", (head + COLUMNS * (side + 4), len(CHEST_CLASSES) * (side + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(CHEST_CLASSES):
        pen.text((8, row * (side + 4) + side // 2), name, fill="black", font_size=16)
        for column in range(COLUMNS):
            sheet.paste(phantom_tile(phantoms, column, row), (head + column * (side + 4), row * (side + 4)))
    sheet.save(path, optimize=True)


def draw_progress(output: Path, path: Path) -> None:
    """Validation curves over the epochs, and the same eight starting noises after each epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    sheets = sorted((output / "training").glob("samples_epoch*.png"))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 1 + len(sheets), width_ratios=[2.2, *[1] * len(sheets)])
    for row, (tag, title) in enumerate([("val_auc", "validation AUC"), ("val_denoising", "denoising error")]):
        axes = figure.add_subplot(grid[row, 0])
        curve = events.Scalars(tag)
        axes.plot([point.step for point in curve], [point.value for point in curve], marker="o")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch" if row else "")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#e6e6e6")
    for column, sheet in enumerate(sheets, start=1):
        axes = figure.add_subplot(grid[:, column])
        picture = np.asarray(Image.open(sheet))
        axes.imshow(picture[:, : picture.shape[1] // 2], cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"epoch {column}", fontsize=10)
        axes.set_axis_off()
    save_figure(figure, path)


def draw_counterfactuals(output: Path, path: Path, count: int = 2) -> None:
    """The panels of the first cases, one below the other."""
    panels = [Image.open(file).convert("RGB") for file in sorted(output.glob("cases/**/panel.png"))[:count]]
    sheet = Image.new("RGB", (max(panel.width for panel in panels), sum(panel.height for panel in panels)), "white")
    top = 0
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height
    sheet.thumbnail((1400, 1400))
    sheet.quantize(128).save(path, optimize=True)


def main() -> None:
    """Draw all figures from the output of the demo."""
    output = Path(sys.argv[1])
    FIGURES.mkdir(exist_ok=True)
    if len(sys.argv) > 2:
        draw_counterfactuals(Path(sys.argv[2]), FIGURES / "counterfactual.png")
    draw_phantoms(FIGURES / "phantoms.png")
    draw_progress(output, FIGURES / "training.png")
    Image.open(output / "real_and_generated.png").save(FIGURES / "real_and_generated.png", optimize=True)


if __name__ == "__main__":
    main()
