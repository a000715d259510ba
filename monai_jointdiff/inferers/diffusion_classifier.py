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
"""Classification by a class-conditional diffusion network: the class that explains the noise best."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from monai.utils import optional_import
from torch import nn

from monai_jointdiff.schedulers import GridScheduler

from .denoiser import Denoiser, at_least_float32, autocast, evaluation_mode, plain, without_ddp
from .draws import DRAWS, NoiseDraws, stratified_timesteps
from .latent import LatentSpace
from .voting import AGGREGATIONS, aggregate, count_votes, flip_probability, mean_errors, variance_of_draws

__all__ = ["HEAD_ROLES", "DiffusionClassifierInferer", "DiffusionClassifierResult", "replay"]

tqdm, _ = optional_import("tqdm", name="tqdm")
stdtrit, _ = optional_import("scipy.special", name="stdtrit")

HEAD_ROLES = ("ignore", "nominate", "prior")

_LOOK_GROWTH = 1.25  # number of draws from one look of the stopping test to the next


@dataclass(frozen=True)
class DiffusionClassifierResult:
    """Answers of a diffusion classifier for N images and K classes.

    A multi-label network answers one binary question per label: does the image look more like one with this label alone
    (present, 1) or more like one without any (absent, 0)?

    Args:
        prediction: class (N,) int64; multi-label (N, K) of 0 and 1.
        probabilities: of the classes, or of the presence of the labels, (N, K): shares of the votes (``majority``),
            softmax of the errors (``mean``), either with the head as ``prior``; the head's own where it answered alone.
        votes: votes for the class, or for the presence of the label, (N, K) float64.
        logits: what probabilities can be calibrated from (see :meth:`calibrated`), (N, K); multi-label (N, K, 2), of
            absence and presence. ``majority``: logarithms of the shares of the votes, with one vote more for each
            class; ``mean``: minus the mean error divided by the temperature, but for a constant; with the head as
            ``prior`` plus the logarithms of its probabilities. Minus infinity for an answer that the head did not
            nominate.
        errors: mean over the draws of the sum of squared errors of the noise, (N, K); multi-label (N, K, 2), of absence
            and presence; infinite where there was no draw.
        num_draws: draws made for the image (N,), or the label (N, K).
        network_calls: evaluations of the network per image (N,): image x draw x class, and one if the head was asked.
        decided: (N,), multi-label (N, K): whether the answer was given before all draws were made, by the stopping
            test, by the stages, or by the head alone.
        draw_errors: errors draw by draw, (N, K, D), multi-label (N, K, 2, D); NaN where a class was not evaluated.
        head_probabilities: of the head (N, K), None if it was not asked.
        evidence: where the answer explains the image better than the runner-up does, (N, 1, *spatial); multi-label
            (N, K, *spatial): squared error of the runner-up minus that of the answer, mean over the draws, sum over the
            channels; of a network on latents they are interpolated. None unless asked for.
        seconds: for the batch.
        timesteps: of the draws in their order (D,), where they were stratified; None: they were independent.
    """

    prediction: torch.Tensor
    probabilities: torch.Tensor
    votes: torch.Tensor
    logits: torch.Tensor
    errors: torch.Tensor
    num_draws: torch.Tensor
    network_calls: torch.Tensor
    decided: torch.Tensor
    draw_errors: torch.Tensor
    head_probabilities: torch.Tensor | None
    evidence: torch.Tensor | None
    seconds: float
    timesteps: torch.Tensor | None = None

    @property
    def multi_label(self) -> bool:
        """Whether there is one binary question per label."""
        return self.prediction.ndim == 2

    @property
    def vote_share(self) -> torch.Tensor:
        """Share of the votes that the answer got, (N,) or (N, K); NaN where the head answered alone."""
        return count_votes(self.draw_errors).gather(-1, self.prediction[..., None])[..., 0] / self.num_draws

    @property
    def uncertainty(self) -> torch.Tensor:
        """Variance p (1 - p) of a vote, with the share p of the class that got most votes, (N,) or (N, K).

        Of two classes, 0 where all agree and .25 where the votes are evenly split; NaN where the head answered alone.
        Of more than two a small p makes it small again, and the head is left out of it: order images by 1 -
        :attr:`confidence` or by :attr:`entropy`.
        """
        p = count_votes(self.draw_errors).amax(dim=-1) / self.num_draws
        return p * (1 - p)

    @property
    def confidence(self) -> torch.Tensor:
        """Probability of the answer, by votes or head or both, as in :attr:`probabilities`; (N,) or (N, K)."""
        p = self.probabilities.double()
        if self.multi_label:
            return torch.where(self.prediction == 1, p, 1 - p)
        return p.gather(1, self.prediction[:, None])[:, 0]

    def calibrated(self, temperature: float) -> torch.Tensor:
        """Probabilities from :attr:`logits` divided by a temperature; the answers stay what they are.

        Guo et al., ICML 2017, equation 9, with a temperature that
        :func:`~monai_jointdiff.metrics.fit_temperature` finds from the logits of validation images. Where the head
        nominated, the classes that it left out keep its probability, the others share the rest: an answer that the
        head gave alone keeps its own.

        Args:
            temperature: > 0.

        Returns:
            (N, K), of the classes or of the presence of the labels, float64.

        Raises:
            ValueError: for a temperature that is not positive.
        """
        if not temperature > 0:
            raise ValueError(f"DiffusionClassifierResult: temperature must be positive, got {temperature}.")
        logits = self.logits.double()
        p = (logits / temperature).softmax(dim=-1)
        if self.head_probabilities is not None:
            head = self.head_probabilities.double()
            head = torch.stack([1 - head, head], dim=-1) if self.multi_label else head
            left_out = logits.isneginf()
            p = torch.where(left_out, head, p * (1 - (head * left_out).sum(dim=-1, keepdim=True)))
        return p[..., 1] if self.multi_label else p

    @property
    def entropy(self) -> torch.Tensor:
        """Entropy of the probabilities in nats, (N,), or (N, K) of each label's presence."""
        p = self.probabilities.double()
        if self.multi_label:
            return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
        return -torch.xlogy(p, p).sum(dim=-1)

    @property
    def margin(self) -> torch.Tensor:
        """Mean paired difference of the errors, runner-up minus answer, (N,) or (N, K); NaN without draws."""
        return self._paired_differences().nanmean(dim=-1)

    def margin_interval(self, confidence: float = 0.95) -> tuple[torch.Tensor, torch.Tensor]:
        """Student's t interval of :attr:`margin` over the draws.

        Of stratified draws it takes what differs within a noise level alone for uncertain, see
        :func:`~monai_jointdiff.inferers.variance_of_draws`. An image that was stopped for its large margin has a margin
        that is too large.

        Args:
            confidence: of the interval, in (0, 1).

        Returns:
            lower and upper end, each (N,) or (N, K); NaN with fewer than two draws.

        Raises:
            ValueError: when the confidence is not in (0, 1).
        """
        if not 0 < confidence < 1:
            raise ValueError(f"DiffusionClassifierResult: confidence must lie in (0, 1), got {confidence}.")
        differences = self._paired_differences()
        n = (~differences.isnan()).sum(dim=-1)
        mean = differences.nanmean(dim=-1)
        variance, degrees = variance_of_draws(differences, self.timesteps)
        quantile = torch.as_tensor(stdtrit(degrees.numpy(), 0.5 + confidence / 2))
        half = torch.where(n > 1, quantile * (variance / n).sqrt(), torch.nan)
        return mean - half, mean + half

    def _paired_differences(self) -> torch.Tensor:
        """Differences (N, D) or (N, K, D) on the draws in which both were evaluated."""
        answer = self.prediction[..., None, None]
        runner_up = runners_up(self.draw_errors, self.prediction)[..., None, None]
        shape = (*self.prediction.shape, 1, self.draw_errors.shape[-1])
        errors = self.draw_errors.double()
        difference = errors.gather(-2, runner_up.expand(shape)) - errors.gather(-2, answer.expand(shape))
        return difference[..., 0, :]


class DiffusionClassifierInferer(Inferer):
    """Classifies with the conditional denoiser: noise is added, and the class under which it is predicted best wins.

    Favero et al., "Conditional Diffusion Models are Medical Image Classifiers that Provide Explainability and
    Uncertainty for Free" (https://arxiv.org/abs/2502.03687)::

        e[c, n] = || epsilon(x_t, t, c) - epsilon ||^2      for draws (t, epsilon) n = 1..N that all classes share
        majority: argmax_c #{n : c = argmin_c' e[c', n]}            mean: argmin_c mean_n e[c, n]

    Their classifier is ``DiffusionClassifierInferer(scheduler, num_draws=501, draws="random")``, and needs N x K
    evaluations of the network for an image. What makes it cheap:

    - evaluations of all images, draws and classes go through the network in batches of ``max_batch``;
    - ``draws="stratified"`` spreads the noise levels evenly, of which the stopping test makes use, and
      ``timestep_range`` leaves out levels that do not tell;
    - ``error_rate``: an image is done when the answer of all N draws is known well enough
      (:func:`~monai_jointdiff.inferers.voting.flip_probability`). With the rule ``mean`` a class is dropped before that
      when its probability to overtake the leader is at most ``error_rate / (K - 1)``; a vote needs all classes to the
      end, since the votes of a class that is dropped would go to its rivals;
    - ``stages``: after so many draws the so many best classes stay (Li et al., https://arxiv.org/abs/2303.16203); with
      ``majority`` that is a run-off, whose answer may be another than that of a vote on all classes;
    - ``head="nominate"``: the head of the same network, in one call, names the smallest set of classes that holds
      ``trust`` of its probability, and draws are made for these only; a single class needs none.

    With ``head="prior"`` the head's probabilities are multiplied with those of the draws (vote shares with one vote
    more for each class). Sums of squared errors differ by many units, so that their softmax is 0 or 1 unless
    ``temperature`` has been fitted (:func:`~monai_jointdiff.metrics.fit_temperature` on validation images). Shares of
    votes are no calibrated probabilities either: :meth:`DiffusionClassifierResult.calibrated` makes such of both.

    Args:
        scheduler: the noise process of the training.
        num_draws: N.
        draws: ``stratified`` or ``random``, see :class:`~monai_jointdiff.inferers.NoiseDraws`.
        rule: ``majority`` or ``mean``.
        timestep_range: part of the training timesteps that is drawn from, 0 <= low < high <= 1.
        error_rate: predictive probability of another answer of all draws at which an image is stopped, in (0, 1); see
            :func:`~monai_jointdiff.inferers.voting.flip_probability` for what it promises. None: all draws are made.
        min_draws: draws before the first look at the stopping test.
        stages: pairs of (draws, classes to keep), both in order: draws rising, classes falling.
        head: ``ignore``, ``nominate`` or ``prior``.
        trust: probability that the classes nominated by the head must hold, in (0, 1).
        temperature: ``mean``: the logits are minus the mean error divided by it, > 0.
        head_temperature: the logits of the head are divided by it, > 0: its own calibration.
        max_batch: evaluations in one call of the network, the memory budget; take a small number for volumes.
        autocast_dtype: type to run the network in under autocast; None for its own precision.
        autoencoder: an ``AutoencoderKL``, when the network works on its latents.
        scale_factor: factor of the latents that the network was trained with.

    Raises:
        ValueError: when an argument is out of its range, or arguments exclude each other.

    Example:

    .. code-block:: python

        inferer = DiffusionClassifierInferer(scheduler, num_draws=51, error_rate=0.01, head="nominate")
        result = inferer(images, network)
        print(result.prediction, result.uncertainty, result.network_calls.mean())
    """

    def __init__(
        self,
        scheduler: GridScheduler,
        num_draws: int = 51,
        draws: str = "stratified",
        rule: str = "majority",
        timestep_range: tuple[float, float] = (0.0, 1.0),
        error_rate: float | None = None,
        min_draws: int = 5,
        stages: Sequence[tuple[int, int]] = (),
        head: str = "ignore",
        trust: float = 0.99,
        temperature: float = 1.0,
        head_temperature: float = 1.0,
        max_batch: int = 256,
        autocast_dtype: torch.dtype | None = None,
        autoencoder: Any = None,
        scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        low, high = timestep_range
        _require(num_draws >= 1, "num_draws must be at least 1", num_draws)
        _require(draws in DRAWS, f"draws must be one of {DRAWS}", draws)
        _require(rule in AGGREGATIONS, f"rule must be one of {AGGREGATIONS}", rule)
        _require(head in HEAD_ROLES, f"head must be one of {HEAD_ROLES}", head)
        _require(0 <= low < high <= 1, "timestep_range must be 0 <= low < high <= 1", timestep_range)
        _require(error_rate is None or 0 < error_rate < 1, "error_rate must lie in (0, 1)", error_rate)
        _require(min_draws >= 1, "min_draws must be at least 1", min_draws)
        _require(0 < trust < 1, "trust must lie in (0, 1)", trust)
        _require(temperature > 0, "temperature must be positive", temperature)
        _require(head_temperature > 0, "head_temperature must be positive", head_temperature)
        _require(max_batch >= 1, "max_batch must be at least 1", max_batch)
        _require(
            head != "prior" or (error_rate is None and not stages),
            "head='prior' needs all draws: the stopping test and stages look at the draws alone; error_rate, stages",
            (error_rate, stages),
        )
        _check_stages(stages, num_draws)
        self.scheduler = scheduler
        self.num_draws = num_draws
        self.draws = draws
        self.rule = rule
        last = scheduler.num_train_timesteps - 1
        self.timesteps = (round(low * last), round(high * last))
        self.error_rate = error_rate
        self.min_draws = min_draws
        self.stages = tuple((int(n), int(keep)) for n, keep in stages)
        self.head = head
        self.trust = trust
        self.temperature = temperature
        self.head_temperature = head_temperature
        self.max_batch = max_batch
        self.autocast_dtype = autocast_dtype
        self.space = LatentSpace(autoencoder, scale_factor)

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: nn.Module,
        *,
        seed: int | Sequence[int] = 0,
        maps: bool = False,
        progress: bool = False,
    ) -> DiffusionClassifierResult:
        """Classifies images.

        Args:
            inputs: images (N, C, *spatial) in [-1, 1].
            network: a class-conditional joint network; its mode is restored.
            seed: of the draws, one per image, or the first of N consecutive ones.
            maps: make the maps of evidence; a class is then never dropped before its image is done, so that both
                errors come from the same draws.
            progress: show a progress bar over the evaluations, out of those without stopping.

        Returns:
            The answers, on the CPU.

        Raises:
            TypeError: when the network is not class-conditional.
            ValueError: when the inputs are no batch of images, the seeds do not fit, maps are asked of stages, or the
                error of an image is not finite.
        """
        if inputs.ndim < 3 or not len(inputs):
            raise ValueError(
                f"DiffusionClassifierInferer: inputs must have shape (N, C, *spatial), got {tuple(inputs.shape)}."
            )
        if maps and self.stages:
            raise ValueError(
                "DiffusionClassifierInferer: maps need the same draws of all classes, stages drop classes."
            )
        seeds = tuple(range(seed, seed + len(inputs))) if isinstance(seed, int) else tuple(map(int, seed))
        if len(seeds) != len(inputs):
            raise ValueError(f"DiffusionClassifierInferer: {len(seeds)} seeds for {len(inputs)} images.")
        network = without_ddp(network)
        started = time.perf_counter()
        with torch.no_grad(), evaluation_mode(network):
            return _DrawnRace(self, inputs, network, seeds, maps, progress).run(started)

    @property
    def shared_timesteps(self) -> torch.Tensor | None:
        """Timesteps (num_draws,) of stratified draws in their order, the same for all images; None: random draws."""
        return stratified_timesteps(self.num_draws, *self.timesteps) if self.draws == "stratified" else None

    def looks(self) -> list[int]:
        """Numbers of draws after which the race is looked at, the last being all of them."""
        if self.error_rate is None:
            looks = {self.num_draws}
        else:
            looks, n = {self.num_draws}, min(self.min_draws, self.num_draws)
            while n < self.num_draws:
                looks.add(n)
                n = max(n + 1, int(n * _LOOK_GROWTH))
        return sorted(looks | {n for n, _ in self.stages})

    def still_running(self, errors: torch.Tensor, whole: bool = False) -> torch.Tensor:
        """Which classes go on after the draws made so far; an image with only one is done.

        Args:
            errors: (Q, K, n) of the draws so far, NaN where a class was not evaluated.
            whole: keep every class of an image that is not done; a vote always does.

        Returns:
            (Q, K) bool.
        """
        made = errors.shape[-1]
        scores = aggregate(errors, self.rule)
        running = ~scores.isinf()
        for n, keep in self.stages:
            if n == made:
                rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
                running &= rank < keep
        if self.error_rate is None or made < min(self.min_draws, self.num_draws):
            return running
        flips = flip_probability(errors, self.num_draws, self.rule, self.shared_timesteps)
        if whole or self.rule == "majority":
            done = (flips.sum(dim=1, keepdim=True) - 1) <= self.error_rate
            leads = flips == flips.amax(dim=1, keepdim=True)
            return running & (~done | leads)
        return running & (flips > self.error_rate / max(1, errors.shape[1] - 1))


def replay(
    draw_errors: torch.Tensor, inferer: DiffusionClassifierInferer, head_logits: torch.Tensor | None = None
) -> DiffusionClassifierResult:
    """The answers of an inferer whose draws had these errors, without the network.

    Errors that were recorded once, with all draws of all classes, show what any rule, stopping test, stages or role of
    the head would have answered, and at how many calls. Only errors that the inferer would have asked for are used.

    Args:
        draw_errors: (N, K, D), multi-label (N, K, 2, D), of D >= ``inferer.num_draws`` draws, of which the first count.
        inferer: the classifier; its kind of draws and noise levels should be those of the recording, and if it stops
            stratified draws, their number, too, on which their noise levels depend.
        head_logits: of the head (N, K), before its temperature; needed where the inferer asks the head.

    Returns:
        The answers, without maps of evidence; `seconds` is the time of the replay.

    Raises:
        ValueError: when the recording has another shape, too few draws, no error where one is asked for, or the logits
            of the head are missing or do not fit.
    """
    multi_label = draw_errors.ndim == 4
    if draw_errors.ndim not in (3, 4) or (multi_label and draw_errors.shape[2] != 2) or not len(draw_errors):
        raise ValueError(
            f"replay: draw_errors must have shape (N, K, D), multi-label (N, K, 2, D), got {tuple(draw_errors.shape)}."
        )
    if draw_errors.shape[-1] < inferer.num_draws:
        raise ValueError(f"replay: {draw_errors.shape[-1]} draws were recorded, the inferer makes {inferer.num_draws}.")
    if inferer.head == "ignore":
        head_logits = None
    elif head_logits is None or head_logits.shape != draw_errors.shape[:2]:
        shape = None if head_logits is None else tuple(head_logits.shape)
        raise ValueError(
            f"replay: head={inferer.head!r} needs head_logits of shape {tuple(draw_errors.shape[:2])}, got {shape}."
        )
    started = time.perf_counter()
    return _RecordedRace(inferer, draw_errors.detach().cpu(), multi_label, head_logits).run(started)


class _Race:
    """The race of the classes of one batch. A case is an image, or in a multi-label network one label of an image.

    Where the errors come from is left to the subclasses.
    """

    def __init__(
        self,
        inferer: DiffusionClassifierInferer,
        number: int,
        num_classes: int,
        multi_label: bool,
        head_logits: torch.Tensor | None,
        progress: bool = False,
    ) -> None:
        self.inferer = inferer
        self.number, self.num_classes, self.multi_label = number, num_classes, multi_label
        self.head_logits: torch.Tensor | None = None
        if head_logits is not None:
            self.head_logits = head_logits.detach().double().cpu() / inferer.head_temperature
        self.progress = progress
        questions, answers = (num_classes, 2) if multi_label else (1, num_classes)
        self.image = torch.arange(number).repeat_interleave(questions)  # (Q,), of each case
        self.running = torch.ones(len(self.image), answers, dtype=torch.bool)
        if inferer.head == "nominate":
            self.running = smallest_set(self._head().exp(), inferer.trust)
        self.nominated = self.running.clone()
        self.alone = self.running.sum(dim=1) == 1  # the head nominated one answer
        self.errors = torch.full((len(self.image), answers, inferer.num_draws), torch.nan)
        self.maps: torch.Tensor | None = None
        self.evaluations = torch.zeros(number)

    def _evaluate(self, begin: int, end: int, bar: Any) -> None:
        """Errors of draws begin..end-1 for all cases and answers that are running."""
        raise NotImplementedError

    def _head(self) -> torch.Tensor:
        """The head's log-probabilities (Q, answers)."""
        logits = self.head_logits
        assert logits is not None
        if not self.multi_label:
            return logits.log_softmax(dim=1)
        return nn.functional.logsigmoid(torch.stack([-logits, logits], dim=2)).flatten(0, 1)

    def run(self, started: float) -> DiffusionClassifierResult:
        """All draws that are needed, and the answers; ``started`` on the clock of ``time.perf_counter``."""
        most = int(self.running.sum()) * self.inferer.num_draws
        made = 0
        with tqdm(total=most, desc="evaluations", unit="", disable=not self.progress) as bar:
            for look in self.inferer.looks():
                self.running &= self.running.sum(dim=1, keepdim=True) > 1  # one answer left: the case is done
                if not bool(self.running.any()):
                    break
                self._evaluate(made, look, bar)
                made = look
                active = self.running.any(dim=1)
                keep = self.inferer.still_running(self.errors[active][:, :, :made], whole=self.maps is not None)
                self.running[active] &= keep
        return self._result(started)

    def _check_finite(self, errors: torch.Tensor, image: torch.Tensor) -> None:
        """NaN stands for "not evaluated" here, so an error that is no number must not pass for that."""
        bad = sorted(set(image[~errors.isfinite()].tolist()))
        if bad:
            raise ValueError(
                f"DiffusionClassifierInferer: the errors of images {bad} of the batch are not finite: the image, the "
                "network's prediction or the recording holds NaN or infinite values."
            )

    def _result(self, started: float) -> DiffusionClassifierResult:
        """The answers from the errors."""
        inferer = self.inferer
        errors, draws = mean_errors(self.errors), (~self.errors.isnan()).any(dim=1).sum(dim=1)
        scores = aggregate(self.errors, inferer.rule)
        votes = count_votes(self.errors)
        logits = self._logits(votes, draws, scores)
        if inferer.head == "prior":
            logits = logits + self._head()
            scores, probabilities = logits, logits.softmax(dim=1)
        elif inferer.rule == "mean":
            probabilities = (scores / inferer.temperature).softmax(dim=1)
        else:
            probabilities = votes / draws.clamp(min=1)[:, None]
        prediction = scores.argmax(dim=1)
        if self.head_logits is not None:
            head = self._head()
            prediction = torch.where(self.alone, head.argmax(dim=1), prediction)
            probabilities = torch.where(self.alone[:, None], head.exp(), probabilities)
        cases = (self.number, self.num_classes) if self.multi_label else (self.number,)
        present = (slice(None), slice(None), 1) if self.multi_label else (slice(None),)
        return DiffusionClassifierResult(
            prediction=prediction.reshape(cases),
            probabilities=probabilities.reshape(*cases, -1)[present],
            votes=votes.reshape(*cases, -1)[present],
            logits=logits.reshape(*cases, -1),
            errors=errors.reshape(*cases, -1),
            num_draws=draws.reshape(cases),
            network_calls=self.evaluations + float(self.head_logits is not None),
            decided=(draws < inferer.num_draws).reshape(cases),
            draw_errors=self.errors.reshape(*cases, *self.errors.shape[1:]),
            head_probabilities=self._head_probabilities(),
            evidence=self._evidence(prediction, draws),
            seconds=time.perf_counter() - started,
            timesteps=inferer.shared_timesteps,
        )

    def _head_probabilities(self) -> torch.Tensor | None:
        if self.head_logits is None:
            return None
        return self.head_logits.sigmoid() if self.multi_label else self.head_logits.softmax(dim=1)

    def _logits(self, votes: torch.Tensor, draws: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits (Q, answers) of the draws alone, finite for all answers that the head nominated."""
        if self.inferer.rule == "mean":
            logits = self._differences(scores.argmax(dim=1)) / self.inferer.temperature
        else:
            logits = ((votes + 1) / (draws + self.nominated.sum(dim=1))[:, None]).log()
        return torch.where(self.nominated, logits, -torch.inf)

    def _differences(self, leader: torch.Tensor) -> torch.Tensor:
        """Mean paired differences (Q, answers) of the leader's error minus each answer's, 0 without draws.

        On the draws in which an answer was evaluated: one that was dropped early is compared on those. It is not the
        answer even where the leader of all draws did worse on them, hence no difference above 0.
        """
        errors = self.errors.double()
        leading = errors.gather(1, leader[:, None, None].expand(-1, 1, errors.shape[2]))
        return (leading - errors).nanmean(dim=2).nan_to_num(nan=0.0).clamp(max=0)

    def _evidence(self, prediction: torch.Tensor, draws: torch.Tensor) -> torch.Tensor | None:
        """Maps of the runner-up's error minus the answer's, where maps were made."""
        return None


class _RecordedRace(_Race):
    """A race whose errors (N, K, D), multi-label (N, K, 2, D), were recorded."""

    def __init__(
        self,
        inferer: DiffusionClassifierInferer,
        recorded: torch.Tensor,
        multi_label: bool,
        head_logits: torch.Tensor | None,
    ) -> None:
        super().__init__(inferer, recorded.shape[0], recorded.shape[1], multi_label, head_logits)
        self.recorded = recorded.flatten(0, 1) if multi_label else recorded  # (Q, answers, D)

    def _evaluate(self, begin: int, end: int, bar: Any) -> None:
        case, answer = self.running.nonzero(as_tuple=True)
        errors = self.recorded[case, answer, begin:end].float()
        self._check_finite(errors.sum(dim=1), self.image[case])
        self.errors[case, answer, begin:end] = errors
        self.evaluations.index_add_(0, self.image[case], torch.full((len(case),), float(end - begin)))
        bar.update(errors.numel())


class _DrawnRace(_Race):
    """A race whose errors are made by the network."""

    def __init__(
        self,
        inferer: DiffusionClassifierInferer,
        inputs: torch.Tensor,
        network: nn.Module,
        seeds: tuple[int, ...],
        maps: bool,
        progress: bool,
    ) -> None:
        self.network = network
        self.denoiser = Denoiser(network, inferer.autocast_dtype)
        if not getattr(self.denoiser.bare, "class_conditional", False):
            raise TypeError(
                "DiffusionClassifierInferer: the network must be class-conditional "
                f"(JointDiffusionUNet(class_conditional=True)), got {self.denoiser.name} that is not."
            )
        self.image_size = inputs.shape[2:]
        parts = [inferer.space.encode(part) for part in plain(inputs).split(inferer.max_batch)]
        self.clean = torch.cat(parts)
        self.draws = NoiseDraws(seeds, self.clean.shape[1:], inferer.num_draws, *inferer.timesteps, kind=inferer.draws)
        head_logits = None  # by the encoder alone
        if inferer.head != "ignore":
            head_logits = torch.cat([self.denoiser.classify(part) for part in parts])
        num_classes = int(self.denoiser.num_classes or 0)
        super().__init__(inferer, len(inputs), num_classes, self.denoiser.multi_label, head_logits, progress)
        if maps:
            self.maps = torch.zeros(*self.running.shape, *self.clean.shape[2:])

    def _evaluate(self, begin: int, end: int, bar: Any) -> None:
        """Errors of draws begin..end-1 for all cases and answers that are running."""
        case, answer = self.running.nonzero(as_tuple=True)  # ordered by case, hence by image
        draws = torch.arange(begin, end)
        unit_draw = draws.repeat(len(case))
        unit_case, unit_answer = case.repeat_interleave(len(draws)), answer.repeat_interleave(len(draws))
        order = (self.image[unit_case] * self.inferer.num_draws + unit_draw).argsort(stable=True)  # by image and draw
        noise = self._noises(self.image[unit_case][order].tolist(), unit_draw[order].tolist())
        for units in order.split(self.inferer.max_batch):
            drawn = torch.stack([next(noise) for _ in range(len(units))])
            squared = self._squared_errors(unit_case[units], unit_answer[units], unit_draw[units], drawn)
            where = (unit_case[units], unit_answer[units])
            errors = squared.flatten(1).sum(dim=1).float().cpu()
            self._check_finite(errors, self.image[unit_case[units]])
            self.errors[(*where, unit_draw[units])] = errors
            if self.maps is not None:
                self.maps.index_put_(where, squared.sum(dim=1).float().cpu(), accumulate=True)
            self.evaluations.index_add_(0, self.image[unit_case[units]], torch.ones(len(units)))
            bar.update(len(units))

    def _noises(self, images: list[int], draws: list[int]) -> Iterator[torch.Tensor]:
        """The noise of each evaluation: consecutive ones of the same image and draw share theirs."""
        last, noise = None, torch.empty(0)
        for here in zip(images, draws, strict=True):
            if here != last:
                last, noise = here, self.draws.noise(here[0])
            yield noise

    def _squared_errors(
        self, case: torch.Tensor, answer: torch.Tensor, draw: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Squared errors (B, C, *spatial) of the predicted noise."""
        image, device = self.image[case], self.clean.device
        clean, noise = self.clean[image.to(device)], noise.to(self.clean)
        timesteps = self.draws.timesteps[image, draw].to(device)
        noisy = self.inferer.scheduler.add_noise(clean, noise, timesteps)
        with autocast(noisy, self.inferer.autocast_dtype):
            output = self.network(noisy, timesteps, class_labels=self._condition(case, answer).to(device))
        predicted = self.inferer.scheduler.predict_epsilon(at_least_float32(output), timesteps, noisy)
        squared: torch.Tensor = (predicted - noise) ** 2
        return squared

    def _condition(self, case: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """Class labels of the network: the class (B,), or (B, K) with the label in question and the others unknown.

        Beside a known label the network takes an unknown one for absent, hence the binary question in the result.
        """
        if not self.multi_label:
            return answer
        labels = torch.full((len(case), self.num_classes), -1.0)
        return labels.scatter(1, (case % self.num_classes)[:, None], answer[:, None].float())

    def _evidence(self, prediction: torch.Tensor, draws: torch.Tensor) -> torch.Tensor | None:
        """Maps of the runner-up's error minus the answer's; zero where the head answered alone."""
        if self.maps is None:
            return None
        rows = torch.arange(len(prediction))
        difference = self.maps[rows, runners_up(self.errors, prediction)] - self.maps[rows, prediction]
        shape = (-1, *[1] * (difference.ndim - 1))
        mean = difference / draws.clamp(min=1).reshape(shape) * (draws > 0).reshape(shape)
        maps = mean.reshape(self.number, -1, *difference.shape[1:])
        if maps.shape[2:] == self.image_size:
            return maps
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(self.image_size)]
        return F.interpolate(maps, size=self.image_size, mode=mode)


def runners_up(errors: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """The best answer but the given one, of those that were compared on most draws.

    Args:
        errors: (..., K, D), NaN where an answer was not evaluated.
        prediction: (...).

    Returns:
        (...) int64.
    """
    mean, draws = mean_errors(errors), (~errors.isnan()).sum(dim=-1)
    other = torch.ones_like(draws, dtype=torch.bool).scatter(-1, prediction[..., None], False)
    draws = torch.where(other, draws, -1)
    longest = other & (draws == draws.amax(dim=-1, keepdim=True))
    return torch.where(longest, -mean, -torch.inf).argmax(dim=-1)


def smallest_set(probabilities: torch.Tensor, trust: float) -> torch.Tensor:
    """The most probable answers that together hold a probability of at least ``trust``, at least one.

    Args:
        probabilities: (Q, K).
        trust: in (0, 1).

    Returns:
        (Q, K) bool.
    """
    ordered, order = probabilities.double().sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(dim=1) - ordered  # held by the more probable ones
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, order, before < trust)


def _check_stages(stages: Sequence[tuple[int, int]], num_draws: int) -> None:
    pairs = not isinstance(stages, str) and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in stages)
    draws, kept = ([pair[k] for pair in stages] if pairs else [] for k in (0, 1))
    in_order = draws == sorted(set(draws)) and kept == sorted(set(kept), reverse=True)
    if not (pairs and in_order and all(1 <= n < num_draws for n in draws) and all(keep >= 1 for keep in kept)):
        raise ValueError(
            f"DiffusionClassifierInferer: stages must be pairs (draws, classes to keep) with draws rising below "
            f"num_draws={num_draws} and classes falling to 1 or more, got {stages!r}."
        )


def _require(condition: bool, rule: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"DiffusionClassifierInferer: {rule}, got {value!r}.")
