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
"""Counterfactual images: what would have to change in an image for the network to say something else."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.utils import optional_import
from torch import nn

from monai_jointdiff.schedulers import DDIMGridScheduler, DDIMInverter, InversionResult

from .chain import ReverseChain
from .denoiser import Denoiser, evaluation_mode, plain, without_ddp
from .explanation import CounterfactualQuestion, CounterfactualRecord, CounterfactualResult
from .guidance import ClassifierGuidance, Guidance, RepresentationGuidance
from .latent import LatentSpace

__all__ = ["ENCODINGS", "RULES", "CounterfactualInferer"]

tqdm, _ = optional_import("tqdm", name="tqdm")

RULES = ("classifier", "representation", "class_free")
ENCODINGS = ("inversion", "noise")

_HEAD_RULES: dict[str, type[Guidance]] = {"classifier": ClassifierGuidance, "representation": RepresentationGuidance}
_FIRST_SCALE = {"classifier": 3.0, "representation": 100.0, "class_free": 2.0}
_ALPHA_BAR = 0.115  # of T', where none is given
_GROWTH = 3.0  # of the strength while the answer is not reached
_PATIENCE = 2  # larger strengths in a row that do not bring the answer closer, before smaller ones are tried
_SAME_LEVEL = 1e-6  # relative difference of alpha_bar that single precision makes
_SMOOTHING = 3  # pixels over which a difference is averaged before the region is drawn around it


class CounterfactualInferer(Inferer):
    """Counterfactuals by going part of the way to noise and coming back toward another answer.

    1. Encode: go from the image x to x_T' at an intermediate timestep T', by fixed-point DDIM inversion (which knows
       the way back to x) or by adding noise, the same for all chains.
    2. Factual reconstruction: come back by DDIM without guidance.
    3. Counterfactual: come back by DDIM with a rule that leads toward the target. With ``probability`` each image gets
       the smallest strength, to within ``precision``, that makes the target as probable as asked for: 0, the factual
       reconstruction itself, where that is enough. The search takes it that the probability rises with the strength;
       where it does not, smaller ones are tried, and in the end the one that came closest is taken.
    4. With ``region_fraction``, the part of the image that this changes most is kept as a region, and 3 is repeated
       with everything else held, at every step, on the path of the factual reconstruction. In latent space the decoded
       image outside the region is that of the reconstruction, too, since a decoder spreads a change over its
       neighbourhood.

    What is delivered is what is judged: images decoded and cut to [-1, 1]; in latent space they are encoded again for
    the head.

    The rules:

    ================== ===================================================================== =======================
    ``rule``           what leads                                                            network
    ================== ===================================================================== =======================
    ``classifier``     gradient of the head on x0_hat (:py:class:`ClassifierGuidance`)       any joint network
    ``representation`` gradient of the head on the encoder's maps                            ``head="mediffusion"``
                       (:py:class:`RepresentationGuidance`)                                  (not ``standardized``)
    ``class_free``     condition against null class, ``null + scale (target - null)``        ``class_conditional``
    ================== ===================================================================== =======================

    Everything is deterministic, and the images of a batch do not feel each other, up to rounding.

    Sources: Kaleta et al., "Mediffusion", https://arxiv.org/abs/2411.09434 (classifier); Deja, Trzcinski, Tomczak,
    "Learning Data Representations with Joint Diffusion Models", https://arxiv.org/abs/2301.13622 (representation);
    Favero et al., "Conditional Diffusion Models are Medical Image Classifiers that Provide Explainability and
    Uncertainty for Free", https://arxiv.org/abs/2502.03687 (class_free); Pan et al.,
    https://arxiv.org/abs/2309.04907 (fixed-point inversion).

    Args:
        scheduler: DDIM with the noise levels of the training, deterministic; its grid is replaced by one from T'.
        rule: one of ``RULES``.
        encoding: one of ``ENCODINGS``.
        timestep: T'. The larger, the larger the structures that may change. None: the timestep at which ``alpha_bar``
            is nearest to 0.115, which makes images of all noise levels equally noisy: 500 of the bundles' default
            levels, 900 of those that ``train_conditional.json`` shifts for 28 pixels.
        num_inference_steps: steps from T' back to the image, at most T' + 1.
        inversion_iterations: calls of the network per step of the inversion; 1 is naive inversion.
        scale: strength of the rule, or with ``probability`` the first one to try; None for the default of the rule.
        probability: how probable the target has to become, in (0, 1); None: take ``scale`` as it is.
        precision: ratio, above 1, between a strength that reaches the probability and one that does not.
        max_trials: strengths to try per image.
        region_fraction: share of the pixels that may change, in (0, 1); None: all.
        autocast_dtype: type to run the network in under autocast; None for its own precision.
        autoencoder: an ``AutoencoderKL``, when the network works on its latents.
        scale_factor: factor of the latents that the network was trained with.
        model_id: identity of the network's weights, for the record, such as their hash; None: not known.
        autoencoder_id: identity of the autoencoder's weights, for the record; None: not known, or none.

    Raises:
        TypeError: when the scheduler is another one.
        ValueError: when an argument is out of its range, or the scheduler adds noise or clips.

    Example:

    .. code-block:: python

        inferer = CounterfactualInferer(DDIMGridScheduler(prediction_type="v_prediction"), probability=0.9)
        result = inferer(images, network, target=0)
        print(result.probabilities_counterfactual[:, 0], result.difference.abs().mean())
    """

    def __init__(
        self,
        scheduler: DDIMGridScheduler,
        rule: str = "classifier",
        encoding: str = "inversion",
        timestep: int | None = None,
        num_inference_steps: int = 20,
        inversion_iterations: int = 2,
        scale: float | None = None,
        probability: float | None = 0.97,
        precision: float = 1.5,
        max_trials: int = 8,
        region_fraction: float | None = None,
        autocast_dtype: torch.dtype | None = None,
        autoencoder: Any = None,
        scale_factor: float = 1.0,
        model_id: str | None = None,
        autoencoder_id: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(scheduler, DDIMGridScheduler):
            raise TypeError(
                f"CounterfactualInferer: scheduler must be a DDIMGridScheduler, got {type(scheduler).__name__}."
            )
        for name, value, known in (("rule", rule, RULES), ("encoding", encoding, ENCODINGS)):
            if value not in known:
                raise ValueError(f"CounterfactualInferer: {name} must be one of {known}, got {value!r}.")
        timestep = _as_noisy_as(_ALPHA_BAR, scheduler.alphas_cumprod) if timestep is None else timestep
        last = scheduler.num_train_timesteps - 1
        _require(1 <= timestep <= last, f"timestep must lie in [1, {last}]", timestep)
        _require(
            2 <= num_inference_steps <= timestep + 1, f"steps must lie in [2, {timestep + 1}]", num_inference_steps
        )
        _require(inversion_iterations >= 1, "inversion_iterations must be at least 1", inversion_iterations)
        _require(scale is None or scale > 0, "scale must be positive", scale)
        _require(probability is None or 0 < probability < 1, "probability must lie in (0, 1)", probability)
        _require(precision > 1, "precision must be above 1", precision)
        _require(max_trials >= 1, "max_trials must be at least 1", max_trials)
        _require(region_fraction is None or 0 < region_fraction < 1, "region_fraction in (0, 1)", region_fraction)
        self.scheduler = _from_intermediate(scheduler, timestep, num_inference_steps)
        self.inverter = DDIMInverter(self.scheduler, max_iterations=inversion_iterations)
        self.rule = rule
        self.encoding = encoding
        self.scale = _FIRST_SCALE[rule] if scale is None else scale
        self.probability = probability
        self.precision = precision
        self.max_trials = max_trials
        self.region_fraction = region_fraction
        self.autocast_dtype = autocast_dtype
        self.space = LatentSpace(autoencoder, scale_factor)
        self.model_id = model_id
        self.autoencoder_id = autoencoder_id

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: nn.Module,
        target: int | Sequence[int] | torch.Tensor | None = None,
        enforce: bool | Sequence[bool] | torch.Tensor | None = True,
        *,
        seed: int | Sequence[int] = 0,
        progress: bool = False,
        callback: Callable[[int, torch.Tensor], None] | None = None,
    ) -> CounterfactualResult:
        """Makes a counterfactual of each image.

        Args:
            inputs: images (N, C, *spatial) in [-1, 1].
            network: the joint network; its mode is restored.
            target: class to move to or label to change, one or one per image; None: the most probable class other than
                the predicted one.
            enforce: multi-label: True makes the label present, False absent, None the opposite of what it is now.
                Multi-class: False asks for the most probable class but the target.
            seed: of the noise, one per image, or the first of N consecutive ones. Only ``noise`` encoding uses it.
            progress: show a progress bar.
            callback: called after every step of every chain with its timestep and the sample.

        Returns:
            The counterfactuals, with all that belongs to them.

        Raises:
            ValueError: when inputs or targets do not fit the network, or its head not the rule.
            TypeError: when the network lacks what the rule needs.
            RuntimeError: when a rule needs gradients within ``torch.inference_mode``.
        """
        with self._walk(inputs, network, seed, progress, callback) as walk:
            question = CounterfactualQuestion.of(walk.probabilities, target, enforce, walk.denoiser.multi_label)
            return self._answer(walk, question)

    def every_answer(
        self,
        inputs: torch.Tensor,
        network: nn.Module,
        enforce: bool | None = True,
        *,
        seed: int | Sequence[int] = 0,
        progress: bool = False,
        callback: Callable[[int, torch.Tensor], None] | None = None,
    ) -> tuple[CounterfactualResult, ...]:
        """Makes counterfactuals of each image toward all other answers, from one encoding, so that they compare.

        Args:
            inputs: images (N, C, *spatial) in [-1, 1].
            network: the joint network; its mode is restored.
            enforce: multi-label: True makes each label present in turn, False absent, None the opposite of what it is.
            seed: of the noise, as for a call.
            progress: show a progress bar.
            callback: as for a call.

        Returns:
            One result an answer. Multi-class: K - 1, of each image the classes other than the predicted one, the most
            probable first. Multi-label: K, the labels in turn. Each is what a call with its targets gives.

        Raises:
            ValueError, TypeError, RuntimeError: as a call; and when classes that exclude each other are to be absent.
        """
        with self._walk(inputs, network, seed, progress, callback) as walk:
            questions = CounterfactualQuestion.every(walk.probabilities, enforce, walk.denoiser.multi_label)
            return tuple(self._answer(walk, question, len(questions)) for question in questions)

    def replay(self, inputs: torch.Tensor, network: nn.Module, record: CounterfactualRecord) -> CounterfactualResult:
        """Makes the counterfactuals of a batch again.

        Args:
            inputs: the same images.
            network: the same network.
            record: of the result. Rule, encoding, grid, precision and probability are taken from it.

        Returns:
            The same images: bit for bit for the same batch in the same order on the same machine, else to within
            rounding. Fewer calls, since no strength is searched for.

        Raises:
            ValueError: when the batch has another size than the record, or noise levels, prediction type, scale factor
                or identities of the weights are others than this inferer's.
        """
        if len(inputs) != len(record.target):
            raise ValueError(
                f"CounterfactualInferer: the record is of {len(record.target)} images, got a batch of {len(inputs)}."
            )
        self._check_record(record)
        inferer = CounterfactualInferer(
            self.scheduler,
            rule=record.rule,
            encoding=record.encoding,
            timestep=record.timesteps[0],
            num_inference_steps=len(record.timesteps),
            inversion_iterations=record.inversion_iterations,
            probability=record.probability,
            autocast_dtype=None if record.autocast_dtype is None else getattr(torch, record.autocast_dtype),
            autoencoder=self.space.autoencoder,
            scale_factor=self.space.scale_factor,
            model_id=self.model_id,
            autoencoder_id=self.autoencoder_id,
        )
        inferer.scheduler.set_grid(record.timesteps)
        with inferer._walk(inputs, network, record.seeds) as walk:
            device = walk.probabilities.device
            target, enforce = torch.tensor(record.target), torch.tensor(record.enforce)
            question = CounterfactualQuestion(target.to(device), enforce.to(device), walk.denoiser.multi_label)
            scale = torch.tensor(record.scale, dtype=torch.float64)
            return walk.result(question, scale, None if record.region is None else record.region.to(device))

    def _check_record(self, record: CounterfactualRecord) -> None:
        """Refuse to replay what another model, or the same one over other noise levels, has made."""
        own = {
            "prediction_type": self.scheduler.prediction_type,
            "scale_factor": self.space.scale_factor,
            "model_id": self.model_id,
            "autoencoder_id": self.autoencoder_id,
        }
        for name, value in own.items():
            recorded = getattr(record, name)
            _require(recorded == value, f"the record is of {name} {recorded!r}", repr(value))
        known = [t for t in record.timesteps if t < self.scheduler.num_train_timesteps]
        levels = _levels(self.scheduler, known)
        same = len(levels) == len(record.timesteps) and all(
            math.isclose(a, b, rel_tol=_SAME_LEVEL) for a, b in zip(levels, record.alphas_cumprod, strict=True)
        )
        _require(same, f"the record is of alphas_cumprod {record.alphas_cumprod} at its timesteps", levels)

    @contextmanager
    def _walk(
        self,
        inputs: torch.Tensor,
        network: nn.Module,
        seed: int | Sequence[int],
        progress: bool = False,
        callback: Callable[[int, torch.Tensor], None] | None = None,
    ) -> Iterator[_Walk]:
        """The chains of a batch; within, gradients are off and the network is in evaluation mode."""
        steps = tqdm(desc="steps of counterfactual chains", unit="", disable=not progress)
        with torch.no_grad(), evaluation_mode(without_ddp(network)), steps as bar:
            yield _Walk(self, inputs, network, seed, bar, callback)

    def _answer(self, walk: _Walk, question: CounterfactualQuestion, sharing: int = 1) -> CounterfactualResult:
        """The counterfactuals of a question, one of so many that share the encoding."""
        scale, region = self._strength(walk, question, None), None
        if self.region_fraction is not None:
            difference = walk.guided(question, scale) - walk.factual[-1]
            region = most_changed(difference, self.region_fraction) & walk.each(scale > 0)
            scale = self._strength(walk, question, region)
        return walk.result(question, scale, region, sharing)

    def _strength(self, walk: _Walk, question: CounterfactualQuestion, region: torch.Tensor | None) -> torch.Tensor:
        """The strength of each image, (N,)."""
        number = len(walk.latents)
        if self.probability is None:
            return torch.full((number,), self.scale, dtype=torch.float64)
        factual = question.probability(walk.probabilities_reconstruction).double().cpu()
        search = _SmallestScale(factual, self.probability, self.scale, self.precision)
        for _ in range(self.max_trials):
            active = search.active
            if not bool(active.any()):
                break
            some = active.to(walk.latents.device)
            confined = None if region is None else region[some]
            sample = walk.descend(question.select(some), search.scale[active], confined, some)[-1]
            answers = walk.judge(walk.decode(sample, confined, some))
            search.tell(question.select(some).probability(answers).double().cpu())
        return search.best


@dataclass(frozen=True)
class _Cost:
    """What has been spent on a batch: evaluations of the network, and seconds."""

    evaluations: float
    seconds: float

    def __sub__(self, before: _Cost) -> _Cost:
        return _Cost(self.evaluations - before.evaluations, self.seconds - before.seconds)

    def with_share(self, common: _Cost, sharing: int) -> _Cost:
        """Together with an equal part of what several have in common."""
        return _Cost(self.evaluations + common.evaluations / sharing, self.seconds + common.seconds / sharing)


class _Walk:
    """The chains of one batch, from one encoding: what they share is computed once.

    Without gradients and with the network in evaluation mode, for which :py:meth:`CounterfactualInferer._walk` cares.
    """

    def __init__(
        self,
        inferer: CounterfactualInferer,
        inputs: torch.Tensor,
        network: nn.Module,
        seed: int | Sequence[int],
        bar: Any,
        callback: Callable[[int, torch.Tensor], None] | None = None,
    ) -> None:
        if inputs.ndim < 3:
            raise ValueError(
                f"CounterfactualInferer: inputs must have shape (N, C, *spatial), got {tuple(inputs.shape)}."
            )
        seeds = tuple(range(seed, seed + len(inputs))) if isinstance(seed, int) else tuple(seed)
        if len(seeds) != len(inputs):
            raise ValueError(f"CounterfactualInferer: {len(seeds)} seeds for {len(inputs)} images.")
        self.inferer = inferer
        self.inputs = inputs
        self.network = without_ddp(network)
        self.seeds = seeds
        self.callback = callback
        self.bar = bar
        self.denoiser = Denoiser(self.network, inferer.autocast_dtype)
        self.started = time.perf_counter()
        self.clean = inferer.space.encode(plain(inputs))
        self._check()
        self.probabilities = self.classify(self.clean)
        self.inversion: InversionResult | None = None
        self.latents = self._encode()
        self.factual = self.descend()
        self.reconstruction = self.decode(self.factual[-1])
        self.probabilities_reconstruction = self.judge(self.reconstruction)
        self.encoding_cost = self.accounted = self._spent()

    def _spent(self) -> _Cost:
        """Since the beginning."""
        return _Cost(self.denoiser.evaluations, time.perf_counter() - self.started)

    def _check(self) -> None:
        """Refuse early what the rule cannot do with this network."""
        name = type(self.denoiser.bare).__name__
        if self.denoiser.num_classes is None:
            raise TypeError(f"CounterfactualInferer: the network has no classes (JointDiffusionUNet has), got {name}.")
        if self.inferer.rule == "class_free":
            if not getattr(self.denoiser.bare, "class_conditional", False):
                raise TypeError(
                    f"CounterfactualInferer: rule 'class_free' needs a class-conditional network, got {name}."
                )
        else:
            self.denoiser.check_guidance(len(self.clean), 1.0, _HEAD_RULES[self.inferer.rule](0))

    def classify(self, clean: torch.Tensor) -> torch.Tensor:
        """Probabilities (N, K) of clean images or latents."""
        logits = self.denoiser.classify(clean)
        return logits.sigmoid() if self.denoiser.multi_label else logits.softmax(1)

    def judge(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities (N, K) of images (N, C, *spatial) as they are delivered, cut to [-1, 1]."""
        return self.classify(self.inferer.space.encode(_cut(images)))

    def decode(
        self, samples: torch.Tensor, region: torch.Tensor | None = None, some: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Images (N, C, *spatial) at the ends of chains, not cut; outside the region they are the reconstruction."""
        images = self.inferer.space.decode(samples)
        if region is None:
            return images
        held = self.reconstruction if some is None else self.reconstruction[some]
        return torch.where(_resize_mask(region, images.shape[2:]), images, held)

    def _encode(self) -> torch.Tensor:
        """x_T'."""
        scheduler = self.inferer.scheduler
        first = int(scheduler.timesteps[0])
        if self.inferer.encoding == "noise":
            noise = torch.stack([_noise(seed, self.clean[0]) for seed in self.seeds])
            return scheduler.add_noise(self.clean, noise, torch.full((len(noise),), first, device=noise.device))

        def predict(sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return self.denoiser.predict(sample, int(timesteps[0]))  # one timestep for the whole batch

        self.inversion = self.inferer.inverter(self.clean, predict)
        return self.inversion.latents

    def descend(
        self,
        question: CounterfactualQuestion | None = None,
        scale: torch.Tensor | None = None,
        region: torch.Tensor | None = None,
        some: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """A chain from x_T' to the image; without a question the factual one.

        Args:
            question: for each image of the chain.
            scale: strength for each image of the chain.
            region: where the chain may leave the path of the factual one.
            some: mask (N,) of the images of the chain; None: all.

        Returns:
            The samples after each step.
        """
        latents = self.latents if some is None else self.latents[some]
        guidance, guidance_scale = self._guide(question, scale, len(latents), latents.device)
        chain = ReverseChain(self.inferer.scheduler)
        sample, path = latents, []
        for i in range(len(chain)):
            output = self.denoiser(chain, i, sample, guidance_scale, guidance)
            sample, _ = chain.step(i, output, sample)
            if region is not None:
                held = self.factual[i] if some is None else self.factual[i][some]
                sample = torch.where(region, sample, held)
            path.append(sample)
            self.bar.update()
            if self.callback is not None:
                self.callback(int(chain.timesteps[i]), sample)
        return path

    def _guide(
        self, question: CounterfactualQuestion | None, scale: torch.Tensor | None, number: int, device: torch.device
    ) -> tuple[Guidance | None, float | torch.Tensor]:
        """The rule and the scale of classifier-free guidance; the labels are set in the denoiser."""
        self.denoiser.set_condition(number, device)
        if question is None or scale is None:
            return None, 1.0
        if self.inferer.rule == "class_free":
            labels = question.class_labels(self.probabilities.shape[1])
            self.denoiser.set_condition(number, device, labels)
            return None, scale
        return _HEAD_RULES[self.inferer.rule](question.target, scale, question.enforce), 1.0

    def guided(
        self, question: CounterfactualQuestion, scale: torch.Tensor, region: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The end of each image's chain (N, C, *spatial): the factual one's where the strength is 0."""
        if not bool((scale > 0).any()):
            return self.factual[-1]
        # the whole batch: what becomes of an image does not depend, in its last bits, on how many others have 0
        return torch.where(self.each(scale > 0), self.descend(question, scale, region)[-1], self.factual[-1])

    def each(self, values: torch.Tensor) -> torch.Tensor:
        """One value per image (N,) beside the samples: (N, 1, ...)."""
        return values.to(self.latents.device).reshape(-1, *[1] * (self.latents.ndim - 1))

    def result(
        self,
        question: CounterfactualQuestion,
        scale: torch.Tensor,
        region: torch.Tensor | None,
        sharing: int = 1,
    ) -> CounterfactualResult:
        """The final chain, and all that belongs to it; so many results share the encoding."""
        inferer, probability = self.inferer, self.inferer.probability
        decoded = self.decode(self.guided(question, scale, region), region)
        after = self.judge(decoded)
        counterfactual, reconstruction = _cut(decoded), _cut(self.reconstruction)
        timesteps = inferer.scheduler.timesteps.tolist()
        record = CounterfactualRecord(
            target=tuple(question.target.tolist()),
            enforce=tuple(question.enforce.tolist()),
            scale=tuple(scale.tolist()),
            rule=inferer.rule,
            encoding=inferer.encoding,
            inversion_iterations=inferer.inverter.max_iterations,
            seeds=self.seeds,
            timesteps=tuple(timesteps),
            alphas_cumprod=_levels(inferer.scheduler, timesteps),
            prediction_type=inferer.scheduler.prediction_type,
            probability=probability,
            autocast_dtype=None if inferer.autocast_dtype is None else str(inferer.autocast_dtype).split(".")[-1],
            scale_factor=inferer.space.scale_factor,
            model_id=inferer.model_id,
            autoencoder_id=inferer.autoencoder_id,
            region=region,
        )
        found = CounterfactualResult(
            image=self.inputs,
            counterfactual=counterfactual,
            reconstruction=reconstruction,
            difference=counterfactual - reconstruction,
            region=None if region is None else _resize_mask(region, counterfactual.shape[2:]),
            probabilities=self.probabilities,
            probabilities_reconstruction=self.probabilities_reconstruction,
            probabilities_counterfactual=after,
            reached=question.probability(after).double() >= (0.5 if probability is None else probability),
            already=question.answered(self.probabilities),
            overshoot=(decoded - counterfactual).abs().flatten(1).amax(1),
            inversion=self.inversion,
            network_calls=0.0,
            seconds=0.0,
            record=record,
        )
        spent = self._spent()
        cost = (spent - self.accounted).with_share(self.encoding_cost, sharing)
        self.accounted = spent
        calls = cost.evaluations / len(self.clean)
        return replace(_with_meta(found, self.inputs), network_calls=calls, seconds=cost.seconds)


@dataclass
class _SmallestScale:
    """Search, for each image, of the smallest strength that reaches a probability.

    The strength grows until it does, then the logarithm is bisected. Where growth does not bring the answer closer,
    since a strong pull can leave the images that the network knows, smaller strengths are tried.

    Args:
        factual: probabilities without guidance, (N,). Where they reach the requested one the strength is 0.
        probability: that is requested.
        first: strength to begin with.
        precision: ratio at which the search of an image ends.
    """

    factual: torch.Tensor
    probability: float
    first: float
    precision: float

    def __post_init__(self) -> None:
        number = len(self.factual)
        self.scale = torch.full((number,), self.first, dtype=torch.float64)
        self.lower = torch.zeros(number, dtype=torch.float64)
        done = self.factual >= self.probability
        self.upper = torch.full((number,), math.inf, dtype=torch.float64).masked_fill(done, 0.0)
        self.highest = self.factual.clone()  # probability so far
        self.most_probable = torch.zeros(number, dtype=torch.float64)  # where it was
        self.stalled = torch.zeros(number, dtype=torch.long)  # strengths in a row that did not raise it

    @property
    def active(self) -> torch.Tensor:
        """Images (N,) whose bracket is still too wide."""
        return ~(self.upper <= self.lower * self.precision)

    @property
    def best(self) -> torch.Tensor:
        """Smallest strength known to reach the probability; where none does, the one that came closest, maybe 0."""
        return torch.where(self.upper.isfinite(), self.upper, self.most_probable)

    def tell(self, answers: torch.Tensor) -> None:
        """Narrow the brackets by the probabilities of the active images at their present strengths."""
        active, bracketed, growing = self.active, self.upper.isfinite(), self.stalled < _PATIENCE
        answer = torch.full_like(self.scale, -1.0).masked_scatter(active, answers)
        better = active & (answer > self.highest)
        self.highest = torch.where(better, answer, self.highest)
        self.most_probable = torch.where(better, self.scale, self.most_probable)
        self.stalled = torch.where(better & growing, 0, self.stalled + (active & ~better & ~bracketed))
        self.upper = torch.where(active & (answer >= self.probability), self.scale, self.upper)
        self.lower = torch.where(active & (answer < self.probability), self.scale, self.lower)
        falling = ~self.upper.isfinite() & (self.stalled >= _PATIENCE)
        # strengths that were too large say nothing of how small one may be
        self.lower = torch.where(falling | (self.lower > self.upper), 0.0, self.lower)
        middle = torch.where(self.lower > 0, (self.lower * self.upper).sqrt(), self.upper / _GROWTH)
        smaller = torch.where(growing, self.first, self.scale) / _GROWTH
        following = torch.where(falling, smaller, self.scale * _GROWTH)
        self.scale = torch.where(self.active, torch.where(self.upper.isfinite(), middle, following), self.scale)


def most_changed(difference: torch.Tensor, fraction: float) -> torch.Tensor:
    """The pixels that change most, after averaging over their neighbours.

    Args:
        difference: (N, C, *spatial).
        fraction: share of the pixels, in (0, 1).

    Returns:
        bool (N, 1, *spatial), True for at least that share of each image.
    """
    spatial_dims = difference.ndim - 2
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[spatial_dims]
    changed = difference.abs().mean(dim=1, keepdim=True)
    amount = pool(changed, _SMOOTHING, stride=1, padding=_SMOOTHING // 2, count_include_pad=False)
    flat = amount.flatten(1)
    count = max(1, round(fraction * flat.shape[1]))
    threshold = flat.topk(count, dim=1).values[:, -1]
    return amount >= threshold.reshape(-1, *[1] * (difference.ndim - 1))


def _from_intermediate(scheduler: DDIMGridScheduler, timestep: int, num_inference_steps: int) -> DDIMGridScheduler:
    """A copy of the scheduler whose grid goes from the timestep to 0."""
    partial = copy.deepcopy(scheduler)
    grid = torch.linspace(timestep, 0, num_inference_steps, dtype=torch.float64).round().long()
    partial.set_grid(grid.tolist())
    return partial


def _as_noisy_as(alpha_bar: float, alphas_cumprod: torch.Tensor) -> int:
    """The timestep whose log-SNR is nearest to that of alpha_bar, and at least 1."""
    log_snr = torch.logit(alphas_cumprod[1:].double())
    return 1 + int((log_snr - math.log(alpha_bar / (1 - alpha_bar))).abs().argmin())


def _noise(seed: int, like: torch.Tensor) -> torch.Tensor:
    """Standard normal noise of an image, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)


def _levels(scheduler: DDIMGridScheduler, timesteps: Sequence[int]) -> tuple[float, ...]:
    """alpha_bar at these timesteps."""
    return tuple(float(scheduler.alphas_cumprod[t]) for t in timesteps)


def _cut(images: torch.Tensor) -> torch.Tensor:
    """Images as they are delivered: in [-1, 1]."""
    return images.clamp(-1.0, 1.0)


def _resize_mask(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """A mask on the grid of the images."""
    return mask if mask.shape[2:] == tuple(size) else F.interpolate(mask.float(), size=tuple(size)) > 0.5


def _with_meta(result: CounterfactualResult, inputs: torch.Tensor) -> CounterfactualResult:
    """Images as MetaTensors with the meta data of the inputs, if those are."""
    if not isinstance(inputs, MetaTensor):
        return result
    names = ("counterfactual", "reconstruction", "difference")
    return replace(result, **{name: MetaTensor(getattr(result, name)).copy_meta_from(inputs) for name in names})


def _require(holds: bool, right: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"CounterfactualInferer: {right}, got {got}.")
