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
"""From the denoising errors of the classes to an answer, and when enough draws have been made."""

from __future__ import annotations

import numpy as np
import torch
from monai.utils import optional_import

__all__ = ["AGGREGATIONS", "aggregate", "count_votes", "flip_probability", "mean_errors"]

special, _ = optional_import("scipy.special")

AGGREGATIONS = ("majority", "mean")

_TIE_BREAK = 1e-9  # far below the smallest difference between two numbers of votes


def count_votes(errors: torch.Tensor) -> torch.Tensor:
    """Votes of the classes: each draw votes for the class with the smallest error.

    Favero et al., https://arxiv.org/abs/2502.03687: ``vote_n = argmin_c e[c, n]``. Classes with the same error share
    the vote: an argmin would give it to the first, and a network that does not know the classes would be unanimous.

    Args:
        errors: (..., K, D), NaN where a class was not evaluated.

    Returns:
        number of votes (..., K), float64. A draw without any evaluated class does not vote.
    """
    finite = torch.where(errors.isnan(), torch.inf, errors)
    best = (finite == finite.amin(dim=-2, keepdim=True)) & ~errors.isnan()
    return (best / best.sum(dim=-2, keepdim=True).clamp(min=1).double()).sum(dim=-1)


def mean_errors(errors: torch.Tensor) -> torch.Tensor:
    """Mean errors (..., K) over the draws in which a class was evaluated; infinite for a class without any."""
    mean = errors.double().nanmean(dim=-1)
    return torch.where(mean.isnan(), torch.inf, mean)


def aggregate(errors: torch.Tensor, rule: str) -> torch.Tensor:
    """Scores of the classes, the largest of which is the answer.

    A class that was dropped on the way has fewer draws than those that stayed; it is not compared with them.

    Args:
        errors: (..., K, D), NaN where a class was not evaluated.
        rule: ``majority``: votes, of classes with equally many that with the smallest mean error a little more than it
            has. ``mean``: minus the mean error.

    Returns:
        (..., K), float64; minus infinity for a class that is out of the race.

    Raises:
        ValueError: for another rule.
    """
    if rule not in AGGREGATIONS:
        raise ValueError(f"aggregate: rule must be one of {AGGREGATIONS}, got {rule!r}.")
    draws = (~errors.isnan()).sum(dim=-1)  # (..., K)
    in_race = (draws == draws.amax(dim=-1, keepdim=True)) & (draws > 0)
    scores = -mean_errors(errors)
    if rule == "majority":
        rank = (scores[..., None, :] < scores[..., :, None]).sum(dim=-1)  # how many have a larger mean error
        scores = count_votes(errors) + _TIE_BREAK * rank
    return torch.where(in_race, scores, -torch.inf)


def flip_probability(errors: torch.Tensor, num_draws: int, rule: str) -> torch.Tensor:
    r"""How probable it is that a class overtakes the leading one before all draws are made.

    The predictive distribution of the R draws to come, given the n that were made, N = n + R in all:

    - ``majority``: with a votes for the leader, b for the other class and a uniform prior on the share of the votes,
      the further votes for the other class are beta-binomial; it overtakes when it gets at least (R + a - b) / 2 of
      them (a tie counts against the leader). Votes for third classes leave fewer to overtake with; since an odd number
      may suit the one behind better, the larger of the probabilities for R and R - 1 is taken then.
    - ``mean``: the paired differences d of the two errors are taken for normal with unknown mean and variance
      (Jeffreys prior), which gives Student's t for the mean of those to come and
      :math:`P = T_{n-1}(-\bar d / s \cdot \sqrt{n N / R})`.

    A Bayesian predictive probability may be looked at as often as one likes: **over the prior**, the answers of races
    that are stopped when it is at most q are other than those of all draws in a share of at most q. It is no promise
    for races of one kind: of those whose true shares lie between 45 % and 55 %, more flip.

    Args:
        errors: (Q, K, n) of the draws so far, NaN where a class was not evaluated.
        num_draws: N.
        rule: ``majority`` or ``mean``.

    Returns:
        (Q, K) float64: 1 for the leader, 0 for a class that is out of the race.
    """
    errors = errors.detach().cpu()
    scores = aggregate(errors, rule)
    leader = scores.argmax(dim=1, keepdim=True)  # (Q, 1)
    made = int((~errors.isnan()).any(dim=1).sum(dim=1).max()) if errors.shape[-1] else 0
    left = num_draws - made
    if left <= 0:
        flips = torch.zeros_like(scores)
    elif rule == "majority":
        votes = count_votes(errors)
        ahead = votes.gather(1, leader).expand_as(votes)
        flips = _overtaken_in_votes(ahead, votes, left)
        if errors.shape[1] > 2:
            flips = torch.maximum(flips, _overtaken_in_votes(ahead, votes, left - 1))
    else:
        leading = errors.double().gather(1, leader[..., None].expand(-1, 1, errors.shape[-1]))
        flips = _overtaken_in_mean(errors.double() - leading, left)
    flips = torch.where(scores.isinf(), 0.0, flips)
    return flips.scatter(1, leader, 1.0)


def _overtaken_in_votes(ahead: torch.Tensor, behind: torch.Tensor, left: int) -> torch.Tensor:
    """P(behind + X >= ahead + left - X) for the beta-binomial number X of further votes for the one behind."""
    pairs = torch.stack([ahead, behind], dim=-1)
    different, which = pairs.reshape(-1, 2).unique(dim=0, return_inverse=True)  # few: votes are whole numbers
    a, b = different.numpy()[:, :1], different.numpy()[:, 1:]
    x = np.arange(left + 1)
    log_choose = -np.log1p(left) - special.betaln(left - x + 1, x + 1)
    log_mass = log_choose + special.betaln(x + b + 1, left - x + a + 1) - special.betaln(b + 1, a + 1)
    overtaken = np.sum(np.exp(log_mass) * (2 * x >= left + a - b), axis=1)
    return torch.as_tensor(overtaken)[which].reshape(ahead.shape)


def _overtaken_in_mean(differences: torch.Tensor, left: int) -> torch.Tensor:
    """P(mean over all draws < 0) of differences (Q, K, n) with NaN where there is none."""
    n = (~differences.isnan()).sum(dim=-1).double()  # (Q, K)
    mean = differences.nanmean(dim=-1)
    variance = ((differences - mean[..., None]) ** 2).nansum(dim=-1) / (n - 1).clamp(min=1)
    statistic = mean / variance.sqrt() * (n * (n + left) / left).sqrt()
    flips = torch.as_tensor(special.stdtr((n - 1).clamp(min=1).numpy(), -statistic.numpy()))
    return torch.where((n > 1) & (variance > 0), flips, 0.5)
