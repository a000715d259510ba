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

"""Where the answer of a diffusion classifier explains an image better than its runner-up, in color on the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from monai_jointdiff.visualize.counterfactual import (
    _array,
    _in_color,
    _most_changed_slice,
    _stack,
    difference_overlay,
)
from monai_jointdiff.visualize.panels import _arrange, _with_caption

__all__ = ["evidence_panel"]

_TILE_SIDE = 256  # pixels, at least, of the longer side of a tile
_COLUMNS = 4
_SHARE = 0.995  # of the pixels whose evidence lies within the colors: a single bright pixel does not fade the others


def evidence_panel(image: Any, evidence: Any, captions: Sequence[str], mask: Any = None) -> np.ndarray:
    """The image, and beside it one map of evidence for each question on the gray image.

    Red: there the answer predicts the noise better than the runner-up does, which speaks for it; blue: there the
    runner-up does. Each map has colors of its own that end at the 99.5th percentile of its amount, which its caption
    tells. Of a volume the slice with most evidence is shown.

    Args:
        image: (C, *spatial) in [-1, 1]; three channels are colors, others stand one below the other.
        evidence: (M, *spatial), signed, such as :class:`~monai_jointdiff.inferers.DiffusionClassifierResult` has.
        captions: of the image and of each map, 1 + M texts.
        mask: where the true finding is, (1, *spatial) or (*spatial), for its outline; None: unknown.

    Returns:
        uint8 (rows, columns, 3).

    Raises:
        ValueError: for arrays that do not fit each other, or another number of captions.
        OptionalImportError: without Pillow.
    """
    pixels, maps = _array(image), _array(evidence)
    if maps.shape[1:] != pixels.shape[1:] or pixels.ndim not in (3, 4) or len(captions) != 1 + len(maps):
        raise ValueError(
            f"evidence_panel: an image (C, *spatial), evidence (M, *spatial) and 1 + M captions expected, got "
            f"{pixels.shape}, {maps.shape} and {len(captions)} captions."
        )
    finding = None if mask is None else _array(mask).reshape(pixels.shape[1:]) > 0.5
    where = ""
    if pixels.ndim == 4:
        index = _most_changed_slice(maps)
        where = f" (slice {index + 1} of {pixels.shape[1]})"
        pixels, maps = pixels[:, index], maps[:, index]
        finding = None if finding is None else finding[index]
    factor = max(1, math.ceil(_TILE_SIDE / max(pixels.shape[1:])))
    shown = _stack(pixels, factor)
    tiles = [_with_caption(_in_color(shown), captions[0] + where)]
    gray = pixels.mean(axis=0, keepdims=True) if len(pixels) == 3 else pixels
    for values, caption in zip(maps, captions[1:], strict=True):
        limit = float(np.quantile(np.abs(values), _SHARE)) or 1.0  # nothing anywhere: the image stays gray
        overlays = [difference_overlay(channel, values, limit, None, finding, factor) for channel in gray]
        tiles.append(_with_caption(np.concatenate(overlays), f"{caption}  \N{PLUS-MINUS SIGN}{limit:.2g}"))
    return _arrange(tiles, min(_COLUMNS, len(tiles)))
