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

"""Weights w(t) of the denoising error."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["favero_weight", "min_snr_weight"]


def min_snr_weight(snr: Tensor, prediction_type: str, gamma: float = 5.0) -> Tensor:
    """Weight w(t) of the squared error of a prediction, by min-SNR.

    The error of x0 is weighted with min(SNR, gamma). Written for what the network predicts (Hang et al.,
    "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv 2303.09556, section 3.4), with
    SNR = alpha^2 / sigma^2:

    - sample: min(SNR, gamma)
    - epsilon: min(SNR, gamma) / SNR, because the error of epsilon is SNR times the error of x0
    - v_prediction: min(SNR, gamma) / (SNR + 1)

    Args:
        snr: (N,) signal-to-noise ratio of each sample's timestep, >= 0 (0 for pure noise, inf for a clean image).
        prediction_type: `epsilon`, `sample` or `v_prediction`.
        gamma: upper bound of the weight of the x0 error, > 0.

    Returns:
        (N,) weights in the dtype of `snr`.

    Raises:
        ValueError: for an unknown prediction type, a gamma that is not positive, or a negative SNR.
    """
    _check_range("min_snr_weight", snr, gamma)
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    if prediction_type == "v_prediction":
        return torch.minimum(snr / (snr + 1), gamma / (snr + 1)).nan_to_num(nan=0.0)  # inf / inf: a clean image
    raise ValueError(
        f"min_snr_weight: prediction_type must be 'epsilon', 'sample' or 'v_prediction', got {prediction_type!r}."
    )


def favero_weight(snr: Tensor, prediction_type: str, gamma: float = 5.0) -> Tensor:
    """Weight w(t) of the squared error of a prediction, as in Favero et al.'s training of diffusion classifiers.

    Their code weights the squared error of the *noise*, whatever the network predicts: with 1 / (1 + min(SNR, gamma))
    where it predicts v, with 1 / min(SNR, gamma) where it predicts epsilon. They call it min-SNR, but it is another
    weight than :func:`min_snr_weight`: for v its maximum lies at SNR 1 instead of gamma, and it does not vanish at the
    clean end. Written for what the network predicts, with SNR = alpha^2 / sigma^2:

    - epsilon: 1 / min(SNR, gamma), which has no bound at the noisy end
    - v_prediction: SNR / (1 + SNR) / (1 + min(SNR, gamma)), because epsilon = alpha v + sigma x_t makes the error of
      epsilon alpha^2 = SNR / (1 + SNR) times the error of v

    Source: Favero et al., "Conditional Diffusion Models are Medical Image Classifiers that Provide Explainability and
    Uncertainty for Free", https://arxiv.org/abs/2502.03687, and the code published with it.

    Args:
        snr: (N,) signal-to-noise ratio of each sample's timestep, >= 0 (inf for a clean image); > 0 for `epsilon`.
        prediction_type: `epsilon` or `v_prediction`.
        gamma: upper bound of the SNR in the weight, > 0.

    Returns:
        (N,) weights in the dtype of `snr`.

    Raises:
        ValueError: for another prediction type, for which no weight was published, a gamma that is not positive, or an
            SNR out of its range.
    """
    _check_range("favero_weight", snr, gamma)
    if prediction_type == "v_prediction":
        return (1 - 1 / (1 + snr)) / (1 + snr.clamp(max=gamma))  # SNR / (1 + SNR), 1 for a clean image
    if prediction_type != "epsilon":
        raise ValueError(
            f"favero_weight: prediction_type must be 'epsilon' or 'v_prediction', got {prediction_type!r}."
        )
    if bool((snr == 0).any()):
        raise ValueError("favero_weight: the weight of the error of epsilon has no bound at pure noise (SNR 0).")
    return 1 / snr.clamp(max=gamma)


def _check_range(name: str, snr: Tensor, gamma: float) -> None:
    if not gamma > 0:
        raise ValueError(f"{name}: gamma must be > 0, got {gamma}.")
    if not bool((snr >= 0).all()):
        raise ValueError(f"{name}: the SNR must be >= 0, its minimum is {float(snr.min())}.")
