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

"""Images as pictures: grids, denoising strips, PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import optional_import

__all__ = ["denoising_strip", "image_grid", "save_png", "to_tile"]

pil_image, _ = optional_import("PIL.Image")
pil_draw, _ = optional_import("PIL.ImageDraw")
pil_font, _ = optional_import("PIL.ImageFont")

_BACKGROUND = 255
_SMALLEST_TILE = 112  # pixels; smaller images are enlarged by a whole factor
_GAP = 4
_CAPTION_SIZE = 13


def to_tile(image: Any) -> np.ndarray:
    """One image as a picture: a volume shows its central slice, channels other than 1 or 3 stand side by side.

    Args:
        image: (C, rows, columns) or (C, depth, rows, columns) in [-1, 1]; values beyond are cut.

    Returns:
        (rows, columns) or (rows, columns, 3) uint8; -1 is black, 1 is white.

    Raises:
        ValueError: for another number of axes, or values that are not finite.
    """
    values = _to_array(image)
    if values.ndim not in (3, 4) or not np.isfinite(values).all():
        raise ValueError(
            f"to_tile: a finite image (C, *spatial) with 2 or 3 spatial axes expected, got {values.shape}."
        )
    if values.ndim == 4:
        values = values[:, values.shape[1] // 2]
    gray_values = np.round((values.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    return np.moveaxis(gray_values, 0, -1) if len(gray_values) == 3 else np.concatenate(list(gray_values), axis=1)


def image_grid(
    images: Any, columns: int | None = None, captions: Sequence[str] | None = None, magnification: int | None = None
) -> np.ndarray:
    """Images side by side, in reading order.

    Args:
        images: (N, C, *spatial) tensor or array in [-1, 1], 2D or 3D (central slice along the first spatial axis).
        columns: images in a row; None: about as many as rows.
        captions: N texts, written below the images (needs Pillow).
        magnification: whole factor by which pixels are enlarged; None: until tiles have at least 112 rows and columns.

    Returns:
        (rows, columns) or (rows, columns, 3) uint8 picture on white.

    Raises:
        ValueError: for no image, a wrong number of columns or captions, or images that :func:`to_tile` refuses.
    """
    tiles = [to_tile(image) for image in _to_array(images)]
    if not tiles or (columns is not None and columns < 1) or (captions is not None and len(captions) != len(tiles)):
        raise ValueError(
            f"image_grid: at least one image and column, and one caption for each image expected, got {len(tiles)} "
            f"images, columns={columns}, {len(captions) if captions is not None else 'no'} captions."
        )
    factor = magnification or max(1, math.ceil(_SMALLEST_TILE / min(tiles[0].shape[:2])))
    tiles = [tile.repeat(factor, 0).repeat(factor, 1) for tile in tiles]
    if captions is not None:
        tiles = [_with_caption(tile, caption) for tile, caption in zip(tiles, captions, strict=True)]
    return _arrange(tiles, columns or math.ceil(math.sqrt(len(tiles))))


def denoising_strip(
    intermediates: Sequence[Any], rows: int = 4, columns: int = 8, captions: Sequence[str] | None = None
) -> np.ndarray:
    """How samples arise from noise: one sample a row, time from left to right.

    Args:
        intermediates: S arrays (N, C, *spatial), from noise to image.
        rows: samples to show, at most N.
        columns: steps to show, spread evenly; the first and the last are always among them.
        captions: S texts such as timesteps, written below the last row (needs Pillow).

    Returns:
        uint8 picture as from :func:`image_grid`.

    Raises:
        ValueError: for fewer than two steps, rows or columns that cannot be shown, or another number of captions.
    """
    steps = [_to_array(step) for step in intermediates]
    if len(steps) < 2 or rows < 1 or columns < 2 or (captions is not None and len(captions) != len(steps)):
        raise ValueError(
            f"denoising_strip: at least two steps, one row and two columns, and a caption for each step expected, got "
            f"{len(steps)} steps, rows={rows}, columns={columns}, "
            f"{len(captions) if captions is not None else 'no'} captions."
        )
    shown = np.unique(np.linspace(0, len(steps) - 1, min(columns, len(steps))).round().astype(int))
    count = min(rows, len(steps[0]))
    images = np.stack([steps[step][row] for row in range(count) for step in shown])
    texts = None
    if captions is not None:
        texts = [""] * (len(shown) * (count - 1)) + [captions[step] for step in shown]
    return image_grid(images, columns=len(shown), captions=texts)


def save_png(array: np.ndarray, path: str | Path) -> None:
    """Write a picture; missing folders are made.

    Args:
        array: (rows, columns) or (rows, columns, 3) uint8.
        path: file name that ends in `.png`.

    Raises:
        ValueError: for another array or ending.
        OptionalImportError: without Pillow.
    """
    target = Path(path)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(
            f"save_png: uint8 (rows, columns) or (rows, columns, 3) expected, got {array.dtype} {array.shape}."
        )
    if target.suffix.lower() != ".png":
        raise ValueError(f"save_png: a file name that ends in .png expected, got {str(path)!r}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    pil_image.fromarray(array).save(target, format="PNG")


def _to_array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().float().numpy()
    return np.asarray(values, dtype=np.float32)


def _with_caption(tile: np.ndarray, text: str) -> np.ndarray:
    """The tile with a line of text below; empty text adds no line. Text that is too wide is cut."""
    if not text:
        return tile
    font = pil_font.load_default(size=_CAPTION_SIZE)
    width = tile.shape[1]
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "\u2026" if text.endswith("\u2026") else text[:-1] + "\u2026"
    line = pil_image.new("L", (width, _CAPTION_SIZE + 7), _BACKGROUND)
    pil_draw.Draw(line).text((width / 2, 2), text, fill=30, font=font, anchor="ma")
    strip = np.asarray(line)
    return np.concatenate([tile, strip if tile.ndim == 2 else np.repeat(strip[..., None], 3, axis=2)])


def _arrange(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Tiles of equal width on a white sheet; a row is as high as its highest tile."""
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(len(tile) for tile in row) for row in rows]
    width = max(tile.shape[1] for tile in tiles)
    across = min(columns, len(tiles))
    shape = (sum(heights) + _GAP * (len(rows) + 1), across * width + _GAP * (across + 1), *tiles[0].shape[2:])
    sheet = np.full(shape, _BACKGROUND, dtype=np.uint8)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for number, tile in enumerate(row):
            left = _GAP + number * (width + _GAP)
            sheet[top : top + len(tile), left : left + tile.shape[1]] = tile
        top += height + _GAP
    return sheet
