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
"""The inferer of a joint diffusion network: the forward of a training step, classification, sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.utils import optional_import
from torch import nn

from monai_jointdiff.networks import HeadFeatures, JointOutput

from .chain import ReverseChain
from .denoiser import (
    Denoiser,
    at_least_float32,
    autocast,
    classify,
    evaluation_mode,
    given,
    plain,
    unwrap,
    without_ddp,
)
from .guidance import Guidance
from .latent import LatentSpace

__all__ = ["JointDiffusionInferer", "SampleResult", "StepInfo"]

tqdm, _ = optional_import("tqdm", name="tqdm")


@dataclass(frozen=True)
class SampleResult:
    """Images from a reverse chain.

    Args:
        image: samples (N, C, *spatial), float32 (float64 from float64 noise); a MetaTensor if the noise was one. Of a
            network on latents they are decoded.
        intermediates: the chain after every ``intermediate_steps``-th step and after the last one, each as ``image``;
            empty if none were asked for.
        network_calls: how often the network, or its encoder alone, was called; a batch of conditional and
            unconditional images is one call.
    """

    image: torch.Tensor
    intermediates: tuple[torch.Tensor, ...]
    network_calls: int


class StepInfo(TypedDict):
    """What a callback gets after every step.

    Args:
        step: which step, counted from 0.
        num_steps: number of steps of the chain.
        timestep: where the step started.
        next_timestep: where it ended, -1 for the clean image.
        sample: x (N, C, *spatial) after the step, of a network on latents the latents; not to be changed in place.
        original: estimate of the clean image (N, C, *spatial) from which the step was made, None if the scheduler
            gives none.
    """

    step: int
    num_steps: int
    timestep: int | float
    next_timestep: int | float
    sample: torch.Tensor
    original: torch.Tensor | None


class JointDiffusionInferer(Inferer):
    """Asks a joint diffusion network everything it can answer.

    ================================================================ =================================================
    call                                                             returns
    ================================================================ =================================================
    ``inferer(x, network)``                                          logits (N, K)
    ``inferer(x, network, noise, timesteps)``                        prediction (N, C, *spatial) for the noisy x
    ``inferer(x, network, noise, timesteps, clean=x_0)``             :py:class:`JointOutput`, for training
    ``inferer.classify(x, network)``                                 logits (N, K), in evaluation mode
    ``inferer.features(x, network)``                                 :py:class:`HeadFeatures`, in evaluation mode
    ``inferer.sample(noise, network, scheduler)``                    :py:class:`SampleResult`
    ================================================================ =================================================

    It is called by MONAI's ``SupervisedTrainer`` and ``SupervisedEvaluator`` as any inferer, with what the
    ``prepare_batch`` of the engine adds as keywords. Mixed precision lives here and not in the engine: the network
    runs under autocast, every result is float32 (float64 for float64 inputs), and so is the loss.

    With an autoencoder the network works on latents (Rombach et al., https://arxiv.org/abs/2112.10752), and images
    remain images: those that come in are encoded, samples are decoded. What is only noise, or predicted of it, has the
    shape of the latents. The autoencoder runs in its own precision and learns nothing. A training whose
    ``prepare_batch`` delivers latents, since the target of a prediction may depend on them, needs an inferer without.

    Args:
        scheduler: adds the noise in training, and makes the steps in ``sample`` if no other is given.
        autocast_dtype: ``torch.bfloat16`` or ``torch.float16`` to run the network under autocast on the device of the
            inputs; None for the precision of the network.
        autoencoder: an ``AutoencoderKL``, when the network works on its latents.
        scale_factor: factor of the latents that the network was trained with.

    Example:

    .. code-block:: python

        scheduler = make_scheduler("dpm_solver")
        inferer = JointDiffusionInferer(scheduler, autocast_dtype=torch.bfloat16)
        probabilities = inferer.classify(images, network).softmax(dim=1)
        scheduler.set_timesteps(20)
        samples = inferer.sample(torch.randn(8, 1, 32, 32), network, class_labels=1, guidance_scale=3.0).image
    """

    def __init__(
        self,
        scheduler: Any,
        autocast_dtype: torch.dtype | None = None,
        autoencoder: Any = None,
        scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if autocast_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                "JointDiffusionInferer: autocast_dtype must be torch.bfloat16, torch.float16 or None, "
                f"got {autocast_dtype}."
            )
        self.scheduler = scheduler
        self.autocast_dtype = autocast_dtype
        self.space = LatentSpace(autoencoder, scale_factor)

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: nn.Module,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        clean: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
    ) -> Any:
        """The forward of a training or validation step. Mode and gradients of the network are left as they are.

        Args:
            inputs: images (N, C, *spatial) in [-1, 1].
            network: the joint network, also inside DistributedDataParallel or ``torch.compile``.
            noise: standard normal noise (N, C, *spatial) to add, of the shape of the latents if there are any; None to
                classify ``inputs``.
            timesteps: timesteps (N,) in [0, T), integers.
            clean: images (M, C, *spatial) to classify in the same call, for example an augmented view of ``inputs``.
            class_labels: condition of the noisy images, (N,) or multi-hot (N, K); None for the null class.
            condition: context (N, L, D) of the noisy images for cross-attention.

        Returns:
            Logits (N, K) without noise, the prediction (N, C, *spatial) without ``clean``, else both as
            :py:class:`JointOutput`; plain tensors.

        Raises:
            ValueError: when noise and timesteps do not come together, or have the wrong shape.
        """
        if noise is None:
            if any(v is not None for v in (timesteps, clean, class_labels, condition)):
                raise ValueError(
                    "JointDiffusionInferer: without noise the inputs are classified; timesteps, clean, class_labels "
                    "and condition need noise."
                )
            return classify(self.space.encode(plain(inputs)), network, self.autocast_dtype)

        images, noise = self._encode(inputs), plain(noise)
        timesteps = self._check_noise(images, noise, timesteps)
        noisy = self.scheduler.add_noise(original_samples=images, noise=noise, timesteps=timesteps)
        condition = condition if condition is None else plain(condition)
        clean = clean if clean is None else self._encode(clean)
        arguments = given(context=condition, class_labels=unwrap(class_labels), clean=clean)
        with autocast(images, self.autocast_dtype):
            output = network(noisy, unwrap(timesteps), **arguments)
        if clean is None:
            return at_least_float32(output)
        logits, prediction = output
        return JointOutput(at_least_float32(logits), at_least_float32(prediction))

    def classify(self, inputs: torch.Tensor, network: nn.Module) -> torch.Tensor:
        """Logits of clean images, by the encoder alone.

        The network runs in evaluation mode and gets its mode back. Gradients flow as the caller has set them.

        Args:
            inputs: images (N, C, *spatial) in [-1, 1].
            network: the joint network.

        Returns:
            Logits (N, K), float32.
        """
        with evaluation_mode(network):
            return classify(self.space.encode(plain(inputs)), without_ddp(network), self.autocast_dtype)

    @torch.no_grad()
    def features(self, inputs: torch.Tensor, network: nn.Module) -> HeadFeatures:
        """What the last layer of the head sees of clean images, and the logits, by the encoder alone.

        The network runs in evaluation mode and gets its mode back.

        Args:
            inputs: images (N, C, *spatial) in [-1, 1].
            network: the joint network.

        Returns:
            Features (N, F) and logits (N, K), float32, without gradients.
        """
        bare: Any = without_ddp(network)
        images = self.space.encode(plain(inputs))
        with evaluation_mode(network), autocast(images, self.autocast_dtype):
            found = bare.features(images)
        return HeadFeatures(at_least_float32(found.features), at_least_float32(found.logits))

    @torch.no_grad()
    def sample(
        self,
        input_noise: torch.Tensor,
        network: nn.Module,
        scheduler: Any = None,
        *,
        class_labels: int | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance: Guidance | None = None,
        guidance_interval: tuple[float, float] | None = None,
        context: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        callback: Callable[[StepInfo], None] | None = None,
        intermediate_steps: int = 0,
    ) -> SampleResult:
        """Runs the reverse chain over the time grid of the scheduler.

        Classifier-free guidance predicts ``null + guidance_scale (conditional - null)`` (Ho and Salimans,
        https://arxiv.org/abs/2207.12598), both halves in one call of the network; a scale of 1 (conditional) or 0
        (null class) needs one half only. A guidance rule may be added to it. The network runs in evaluation mode and
        gets its mode back. The scheduler is not changed: the chain runs on a copy of it.

        Args:
            input_noise: where the chain starts, (N, C, *spatial), of the shape of the latents if there are any:
                standard normal noise for a full grid.
            network: the joint network, or any network called as ``network(x, timesteps)``.
            scheduler: makes the steps, with its time grid set: this package's, MONAI's or diffusers'. None: the
                inferer's.
            class_labels: class of all images, or classes (N,) in [0, K], K for the null class; or multi-hot (N, K)
                for a multi-label network, where -1 is unknown. None for the null class.
            guidance_scale: scale of classifier-free guidance, which needs ``class_labels``.
            guidance: rule that moves the chain toward a class by the network's own head.
            guidance_interval: first and last timestep (low, high), both included, at which classifier-free guidance
                and the rule act; elsewhere the conditional prediction is taken as it is (Kynkaanniemi et al.,
                https://arxiv.org/abs/2404.07724). None: everywhere.
            context: context (N, L, D) for cross-attention.
            generator: source of the noise that a stochastic scheduler adds.
            progress: show a progress bar.
            callback: called after every step with a :py:class:`StepInfo`.
            intermediate_steps: keep the chain after every so many steps, and after the last; 0 keeps nothing.

        Returns:
            The samples, what was kept of the chain, and the number of network calls.

        Raises:
            ValueError: when the noise has no image axes, labels or targets do not fit the network, the interval is
                empty, or guidance is asked of a scheduler that has no noise levels.
            TypeError: when the network lacks what a guidance needs.
            RuntimeError: when a rule needs gradients within ``torch.inference_mode``.
        """
        if input_noise.ndim < 3:
            raise ValueError(
                f"JointDiffusionInferer: input_noise must have shape (N, C, *spatial), got {tuple(input_noise.shape)}."
            )
        if intermediate_steps < 0:
            raise ValueError(f"JointDiffusionInferer: intermediate_steps must be 0 or more, got {intermediate_steps}.")
        low, high = _check_interval(guidance_interval)
        chain = ReverseChain(self.scheduler if scheduler is None else scheduler, generator)
        sample = chain.start(plain(input_noise))
        denoiser = Denoiser(without_ddp(network), self.autocast_dtype)
        denoiser.set_condition(len(sample), sample.device, class_labels, context)
        denoiser.check_guidance(len(sample), guidance_scale, guidance)

        kept = []
        with evaluation_mode(network):
            for i in tqdm(range(len(chain)), desc="sampling") if progress else range(len(chain)):
                if low <= chain.timesteps[i] <= high:
                    output = denoiser(chain, i, sample, guidance_scale, guidance)
                else:
                    output = denoiser(chain, i, sample)
                sample, original = chain.step(i, output, sample)
                if intermediate_steps and ((i + 1) % intermediate_steps == 0 or i + 1 == len(chain)):
                    kept.append(_like(self.space.decode(sample), input_noise))
                if callback is not None:
                    callback(
                        StepInfo(
                            step=i,
                            num_steps=len(chain),
                            timestep=chain.timesteps[i],
                            next_timestep=chain.next_timestep(i),
                            sample=sample,
                            original=original,
                        )
                    )
        return SampleResult(_like(self.space.decode(sample), input_noise), tuple(kept), denoiser.calls)

    @torch.no_grad()
    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """What the network sees of images in training; the autoencoder gets no gradient."""
        return self.space.encode(plain(images))

    def _check_noise(self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor | None) -> torch.Tensor:
        """The timesteps, after comparing their shape and the noise's with the images."""
        if noise.shape != images.shape:
            seen = "inputs" if self.space.autoencoder is None else "latents"
            raise ValueError(
                f"JointDiffusionInferer: noise must have the shape of the {seen} {tuple(images.shape)}, "
                f"got {tuple(noise.shape)}."
            )
        if timesteps is None or timesteps.shape != images.shape[:1] or timesteps.is_floating_point():
            got = "None" if timesteps is None else f"{timesteps.dtype} of shape {tuple(timesteps.shape)}"
            raise ValueError(
                f"JointDiffusionInferer: noise needs integer timesteps of shape ({len(images)},), got {got}."
            )
        return timesteps


def _check_interval(interval: tuple[float, float] | None) -> tuple[float, float]:
    """The first and last timestep at which guidance acts."""
    if interval is None:
        return float("-inf"), float("inf")
    low, high = interval
    if low > high:
        raise ValueError(f"JointDiffusionInferer: guidance_interval must be (low, high) timesteps, got {interval}.")
    return low, high


def _like(image: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The image as a MetaTensor with the meta data of the source if that is one."""
    return MetaTensor(image).copy_meta_from(source) if isinstance(source, MetaTensor) else image
