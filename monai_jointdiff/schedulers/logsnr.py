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

"""Log-SNR: the shifted schedule, and grids that are uniform in it."""

from __future__ import annotations

import math

import torch
from monai.networks.schedulers import NoiseSchedules
from torch import Tensor

LOGSNR_BOUND = 15.0
"""Log-SNR at the two ends of the unshifted schedule, as in Favero et al. and simple diffusion."""

NOISY_END = -10.2
"""Log-SNR below which a sample is taken for pure noise: ``2 lambda_min`` of Lu et al. (alpha is .006 there)."""


@NoiseSchedules.add_def("shifted_logsnr", "Cosine schedule in log-SNR, shifted for the image size")
def shifted_logsnr(
    num_train_timesteps: int = 1000, noise_d: float = 64.0, image_d: float = 256.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Shifted log-SNR cosine schedule of Favero et al., sampled at ``t_i = i / (num_train_timesteps - 1)``.

    With ``b = log(noise_d / image_d)``, in the authors' form (the bounds move by ``b``, the curve by ``2 b``)::

        t_min     = atan(exp(-(15 + b) / 2)),   t_max = atan(exp(-(-15 + b) / 2))
        log_snr_t = -2 log(tan(t_min + t (t_max - t_min))) + 2 b,   t in [0, 1]
        alpha_bar = sigmoid(log_snr)

    A larger image hides less under the same noise per pixel, so ``image_d > noise_d`` moves the whole schedule to
    more noise; equal sizes give the unshifted cosine schedule. Hoogeboom et al., "simple diffusion"
    (https://arxiv.org/abs/2301.11093), is the source of the shift.

    Args:
        num_train_timesteps: number of timesteps, at least 2.
        noise_d: image side in pixels for which the unshifted schedule is meant.
        image_d: side of the images in pixels; 256 is the authors' value, whatever the size their network sees.

    Returns:
        ``(betas, alphas, alphas_cumprod)``, each of shape (num_train_timesteps,) in float64.

    Raises:
        ValueError: when there are fewer than 2 timesteps or a size is not positive.
    """
    if num_train_timesteps < 2:
        raise ValueError(f"shifted_logsnr: num_train_timesteps must be at least 2, got {num_train_timesteps}.")
    if noise_d <= 0 or image_d <= 0:
        raise ValueError(f"shifted_logsnr: noise_d and image_d must be positive, got {noise_d} and {image_d}.")
    shift = math.log(noise_d / image_d)
    t_min = math.atan(math.exp(-0.5 * (LOGSNR_BOUND + shift)))
    t_max = math.atan(math.exp(-0.5 * (-LOGSNR_BOUND + shift)))
    angle = torch.linspace(t_min, t_max, num_train_timesteps, dtype=torch.float64)
    log_snr = -2.0 * torch.log(torch.tan(angle)) + 2.0 * shift
    alphas_cumprod = torch.sigmoid(log_snr)
    alphas = alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return 1.0 - alphas, alphas, alphas_cumprod


def logsnr_timesteps(alphas_cumprod: Tensor, num_inference_steps: int) -> Tensor:
    """Integer timesteps whose log-SNR is as near to uniformly spaced as distinct integers allow.

    The grid runs from the noisy end to timestep 0, so the step after its last point goes to the clean sample. The
    noisy end is the last timestep of the table, or the one nearest to a log-SNR of -10.2 where the table goes further
    down (cosine schedules do): beyond it no sampler has anything to do, and steps spent there are missing elsewhere.
    Where the table is coarser than the spacing, neighbors are pushed apart by one timestep each.

    Args:
        alphas_cumprod: (T,) float64, strictly decreasing, in (0, 1).
        num_inference_steps: number of grid points, 1 to T.

    Returns:
        (num_inference_steps,) int64, strictly decreasing, in [0, T).
    """
    log_snr = torch.logit(alphas_cumprod)  # (T,) decreasing
    noisy_end = max(float(log_snr[-1]), NOISY_END)
    wanted = torch.linspace(noisy_end, float(log_snr[0]), num_inference_steps, dtype=torch.float64).flip(0)
    above = torch.searchsorted(-log_snr, -wanted).clamp(max=len(log_snr) - 1)
    below = (above - 1).clamp(min=0)
    is_below = (log_snr[below] - wanted).abs() <= (log_snr[above] - wanted).abs()
    nearest = torch.where(is_below, below, above)  # (n,) ascending timesteps, perhaps repeated
    rank = torch.arange(num_inference_steps)
    distinct = torch.cummax(nearest - rank, dim=0).values + rank  # each at least one above the one before
    room = len(alphas_cumprod) - num_inference_steps + rank  # what leaves room for those after
    return torch.minimum(distinct, room).flip(0)
