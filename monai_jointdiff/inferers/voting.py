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

__all__ = ["AGGREGATIONS", "aggregate", "count_votes", "flip_probability", "mean_errors", "variance_of_draws"]

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
    return _cast_votes(errors).sum(dim=-1)


def _cast_votes(errors: torch.Tensor) -> torch.Tensor:
    """The part of each draw's vote that each class gets (..., K, D)."""
    finite = torch.where(errors.isnan(), torch.inf, errors)
    best = (finite == finite.amin(dim=-2, keepdim=True)) & ~errors.isnan()
    return best / best.sum(dim=-2, keepdim=True).clamp(min=1).double()


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


def variance_of_draws(
    differences: torch.Tensor, timesteps: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Variance of the draws of one quantity, without what differs between their noise levels where these are spread.

    How much the quantity differs between noise levels does not make the mean over evenly spread ones uncertain, what it
    differs within a level does. With one draw of a level that is estimated from neighbours (collapsed strata; Wolter,
    "Introduction to Variance Estimation", chapter on systematic samples), n draws d in the order of their timesteps:

    .. math:: s_w^2 = \frac{1}{2 (n - 1)} \sum_i (d_{i+1} - d_i)^2

    which is right where the mean of a level varies slowly from one neighbour to the next, and too large otherwise. Of
    normal draws it has the variance :math:`\sigma^4 (3n - 4) / (n - 1)^2` (von Neumann et al., "The Mean Square
    Successive Difference", Ann. Math. Statist. 12, 1941), that of a chi-square of :math:`2 (n - 1)^2 / (3n - 4)`
    degrees of freedom.

    Args:
        differences: (..., n), NaN where there is none.
        timesteps: (n,) of the draws, if they were spread over the noise levels. None: independent draws.

    Returns:
        variance and its degrees of freedom, each (...) float64; of independent draws the sample variance and n - 1.

    Raises:
        ValueError: when there are not as many timesteps as draws.
    """
    if timesteps is not None and timesteps.shape != differences.shape[-1:]:
        raise ValueError(
            f"variance_of_draws: timesteps must have shape {tuple(differences.shape[-1:])}, one for each draw, got "
            f"{tuple(timesteps.shape)}."
        )
    differences = differences.double()
    n = (~differences.isnan()).sum(dim=-1).double()
    squares = _about_mean(differences) if timesteps is None else _between_neighbors(differences, timesteps)
    degrees = n - 1 if timesteps is None else 2 * (n - 1) ** 2 / (3 * n - 4)
    return squares / (n - 1).clamp(min=1), degrees.clamp(min=1)


def _about_mean(values: torch.Tensor) -> torch.Tensor:
    """Sum of squares (...) of the differences of (..., n) from their mean."""
    return ((values - values.nanmean(dim=-1, keepdim=True)) ** 2).nansum(dim=-1)


def _between_neighbors(values: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Half the sum of squares (...) of the steps of (..., n) between neighboring timesteps, of those that there are."""
    order = torch.where(values.isnan(), torch.inf, timesteps.to(values)).argsort(dim=-1, stable=True)
    return (values.gather(-1, order).diff(dim=-1) ** 2).nansum(dim=-1) / 2


def flip_probability(
    errors: torch.Tensor, num_draws: int, rule: str, timesteps: torch.Tensor | None = None
) -> torch.Tensor:
    r"""How probable it is that a class overtakes the leading one before all draws are made.

    The predictive distribution of the R draws to come, given the n that were made, N = n + R in all:

    - ``majority``: with a votes for the leader, b for the other class and a uniform prior on the share of the votes,
      the further votes for the other class are beta-binomial; it overtakes when it gets at least (R + a - b) / 2 of
      them (a tie counts against the leader). Votes for third classes leave fewer to overtake with; since an odd number
      may suit the one behind better, the larger of the probabilities for R and R - 1 is taken then.
    - ``mean``: the paired differences d of the two errors are taken for normal with unknown mean and variance
      (Jeffreys prior), which gives Student's t for the mean of those to come and
      :math:`P = T_{n-1}(-\bar d / s \cdot \sqrt{n N / R})`.

    That is for independent draws. Where the timesteps are spread evenly over the noise levels (stratified), only what
    draws differ *within* a level is uncertain (:func:`variance_of_draws`):

    - ``majority``: a vote counts as 1 / q independent ones, a, b and R alike, with the design effect q <= 1 (Kish,
      "Survey Sampling", 1965; the intervals of Korn and Graubard, Survey Methodology 24, 1998, count so too), the ratio
      of the two variances of the votes with one more for each of the two classes. Unanimous votes count as they are.
    - ``mean``: with :math:`s_w` and its degrees of freedom. The levels to come are predicted from their neighbors
      among those made, by linear interpolation, since the first n are spread unevenly and the difference may have a
      trend: draw i stands for m_i of the R to come, and
      :math:`P = T_\nu(-\sum_i (1 + m_i) d_i / (s_w \sqrt{R + \sum_i m_i^2}))`; with equal m_i that is the above.

    A Bayesian predictive probability may be looked at as often as one likes: **over the prior**, the answers of races
    that are stopped when it is at most q are other than those of all draws in a share of at most q. It is no promise
    for races of one kind: of those whose true shares lie between 45 % and 55 %, more flip. Of stratified draws both
    forms are approximations, which keep it in simulations as long as neighboring levels resemble each other; where the
    profile of the differences over the levels is finer than the draws made so far, more flip.

    Args:
        errors: (Q, K, n) of the draws so far, NaN where a class was not evaluated.
        num_draws: N.
        rule: ``majority`` or ``mean``.
        timesteps: (N,) of all draws in their order, when they are stratified: the same for all images. None: the draws
            are independent.

    Returns:
        (Q, K) float64: 1 for the leader, 0 for a class that is out of the race.

    Raises:
        ValueError: for another rule, and when there are not as many timesteps as draws.
    """
    if timesteps is not None and timesteps.shape != (num_draws,):
        raise ValueError(
            f"flip_probability: timesteps must be those of all draws, shape ({num_draws},), got "
            f"{tuple(timesteps.shape)}."
        )
    errors = errors.detach().cpu()
    scores = aggregate(errors, rule)
    leader = scores.argmax(dim=1, keepdim=True)  # (Q, 1)
    made = int((~errors.isnan()).any(dim=1).sum(dim=1).max()) if errors.shape[-1] else 0
    left = num_draws - made
    if left <= 0:
        flips = torch.zeros_like(scores)
    elif rule == "majority":
        cast = _cast_votes(errors)
        votes = cast.sum(dim=-1)
        ahead = votes.gather(1, leader).expand_as(votes)
        effect = torch.ones_like(votes)
        if timesteps is not None:
            effect = _design_effect((_of(cast, leader) - cast)[:, :, :made], timesteps[:made].cpu())
        flips = _overtaken_in_votes(ahead, votes, left, effect)
        if errors.shape[1] > 2:
            flips = torch.maximum(flips, _overtaken_in_votes(ahead, votes, left - 1, effect))
    else:
        differences = errors.double() - _of(errors.double(), leader)
        if timesteps is None:
            flips = _overtaken_in_mean(differences, left)
        else:
            flips = _overtaken_in_spread_mean(differences[:, :, :made], timesteps.cpu())
    flips = torch.where(scores.isinf(), 0.0, flips)
    return flips.scatter(1, leader, 1.0)


def _of(values: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Values (Q, 1, n) of one class (Q, 1) each, of (Q, K, n)."""
    return values.gather(1, which[..., None].expand(-1, 1, values.shape[-1]))


def _design_effect(differences: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Variance within noise levels over variance (Q, K), at most 1, of differences (Q, K, n) of votes of two classes.

    With one more vote for each of the two, whose squares add up to 2. Evenly spread draws are no worse than independent
    ones, so that a larger estimate is chance.
    """
    order = timesteps.argsort(stable=True)  # sums that do not depend on the order of the draws
    ordered, levels = differences[..., order], timesteps[order]
    return ((_between_neighbors(ordered, levels) + 2) / (_about_mean(ordered) + 2)).clamp(max=1)


def _overtaken_in_votes(ahead: torch.Tensor, behind: torch.Tensor, left: int, effect: torch.Tensor) -> torch.Tensor:
    """P(behind + X >= ahead + left - X) for the beta-binomial number X of further votes for the one behind."""
    races = torch.stack([ahead / effect, behind / effect, (left / effect).round()], dim=-1)
    different, which = races.reshape(-1, 3).unique(dim=0, return_inverse=True)  # few: mostly whole numbers
    overtaken = [_draws_level(a, b, int(r)) for a, b, r in different.tolist()]
    return torch.tensor(overtaken, dtype=torch.float64)[which].reshape(ahead.shape)


def _draws_level(a: float, b: float, left: int) -> float:
    x = np.arange(left + 1)
    log_choose = -np.log1p(left) - special.betaln(left - x + 1, x + 1)
    log_mass = log_choose + special.betaln(x + b + 1, left - x + a + 1) - special.betaln(b + 1, a + 1)
    return float(np.sum(np.exp(log_mass) * (2 * x >= left + a - b)))


def _overtaken_in_mean(differences: torch.Tensor, left: int) -> torch.Tensor:
    """P(mean over all draws < 0) of differences (Q, K, n) with NaN where there is none."""
    n = (~differences.isnan()).sum(dim=-1).double()  # (Q, K)
    variance, degrees = variance_of_draws(differences)
    statistic = differences.nanmean(dim=-1) / variance.sqrt() * (n * (n + left) / left).sqrt()
    return _below(statistic, degrees, undecided=(n < 2) | (variance <= 0))


def _overtaken_in_spread_mean(differences: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """P(mean over all draws < 0) of differences (Q, K, n) at the first n of the spread timesteps (N,)."""
    n, left = differences.shape[-1], len(timesteps) - differences.shape[-1]
    variance, degrees = variance_of_draws(differences, timesteps[:n])
    stands_for = _draws_it_stands_for(timesteps, n)
    total = (differences * (1 + stands_for)).sum(dim=-1)  # (Q, K), NaN where a class was not evaluated to the end
    statistic = total / (variance * (left + (stands_for**2).sum())).sqrt()
    return _below(statistic, degrees, undecided=total.isnan() | (variance <= 0))


def _draws_it_stands_for(timesteps: torch.Tensor, made: int) -> torch.Tensor:
    """Weights (made,) that predict the sum over the draws to come: interpolation between the noise levels made."""
    known, order = timesteps[:made].sort(stable=True)
    place = np.interp(timesteps[made:], known, np.arange(made))  # of the levels to come among those made
    below = place.astype(int)
    above = np.minimum(below + 1, made - 1)
    weights = np.bincount(below, 1 + below - place, made) + np.bincount(above, place - below, made)
    return torch.zeros(made, dtype=torch.float64).scatter(0, order, torch.as_tensor(weights))


def _below(statistic: torch.Tensor, degrees: torch.Tensor, undecided: torch.Tensor) -> torch.Tensor:
    """P(T <= -statistic) of Student's t, one half where the draws do not say."""
    flips = torch.as_tensor(special.stdtr(degrees.numpy(), -statistic.numpy()))
    return torch.where(undecided, 0.5, flips)
