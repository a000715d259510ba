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


"""Counterfactuals that no network made: everything in them is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from monai_jointdiff.inferers import CounterfactualRecord, CounterfactualResult


def known_result(
    images: Any,
    change: Any,
    before: Sequence[Sequence[float]] = ((0.9, 0.1),),
    after: Sequence[Sequence[float]] = ((0.2, 0.8),),
    between: Sequence[Sequence[float]] | None = None,
    target: Sequence[int] | int = 1,
    enforce: bool = True,
    reached: bool = True,
    already: bool = False,
    encoding_error: float = 0.01,
    region: Any = None,
) -> CounterfactualResult:
    """A batch whose reconstruction is the image plus a constant, and whose counterfactual adds the change.

    Args:
        images: (N, C, *spatial).
        change: broadcast to the images.
        before: probabilities of the images, (N, K), or (1, K) for all.
        after: of the counterfactuals.
        between: of the reconstructions; None: as before.
        target: of all, or of each.
        enforce: of all.
        reached: of all.
        already: whether the network gave the wanted answer to all images before.
        encoding_error: the constant.
        region: bool (N, 1, *spatial).
    """
    image = torch.as_tensor(np.asarray(images), dtype=torch.float32)
    number = len(image)
    reconstruction = image + encoding_error
    difference = torch.as_tensor(np.asarray(change), dtype=torch.float32).expand(image.shape)
    region = None if region is None else torch.as_tensor(np.asarray(region), dtype=torch.bool)

    def spread(rows: Sequence[Sequence[float]]) -> torch.Tensor:
        table = torch.tensor(rows, dtype=torch.float32)
        return table.expand(number, table.shape[1])

    return CounterfactualResult(
        image=image,
        counterfactual=reconstruction + difference,
        reconstruction=reconstruction,
        difference=difference,
        region=region,
        probabilities=spread(before),
        probabilities_reconstruction=spread(before if between is None else between),
        probabilities_counterfactual=spread(after),
        reached=torch.full((number,), reached),
        already=torch.full((number,), already),
        overshoot=torch.zeros(number),
        inversion=None,
        network_calls=120.0,
        seconds=3.0 * number,
        record=CounterfactualRecord(
            target=(target,) * number if isinstance(target, int) else tuple(target),
            enforce=(enforce,) * number,
            scale=tuple(10.0 + n for n in range(number)),
            rule="classifier",
            encoding="inversion",
            inversion_iterations=2,
            seeds=tuple(range(number)),
            timesteps=(300, 150, 0),
            alphas_cumprod=(0.3, 0.7, 0.99),
            prediction_type="v_prediction",
            probability=0.9,
            autocast_dtype=None,
            scale_factor=1.0,
            model_id=None,
            autoencoder_id=None,
            region=region,
        ),
    )
