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

"""MONAI's recipe for counterfactuals: denoiser and classifier trained apart, DDIM led by the classifier's gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FINE_TUNING = 200  # steps of the classifier on noisy images
NOISIEST = 601  # timesteps that the classifier learns
Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """MONAI's recipe.

    Args:
        steps: out, and back.
        stride: timesteps between two steps; 1 is the tutorial's grid.
        scale: of the gradient.
    """

    steps: int = 200
    stride: int = 3
    scale: float = 30.0

    @property
    def timestep(self) -> int:
        """Where the way back begins."""
        return self.steps * self.stride

    @property
    def denoiser_calls(self) -> int:
        """Per image."""
        return 2 * self.steps

    @property
    def classifier_calls(self) -> int:
        """Per image, with their gradients."""
        return self.steps


def ddim(sample: Tensor, epsilon: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor) -> Tensor:
    """One deterministic step of DDIM, toward noise or away from it (Song et al. 2020, equation 12 with eta = 0).

    Args:
        sample: (N, C, *spatial) at alpha_bar.
        epsilon: predicted noise in it.
        alpha_bar: where the sample stands.
        alpha_bar_next: where it goes.
    """
    clean = (sample - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
    return alpha_bar_next.sqrt() * clean + (1 - alpha_bar_next).sqrt() * epsilon


def monai_recipe(
    images: Tensor, target: Tensor, denoiser: Predict, classifier: Predict, alphas_cumprod: Tensor, recipe: Recipe
) -> Iterator[Tensor]:
    """Reversed DDIM with the denoiser, then DDIM with the gradient of a separate classifier at x_t.

    Args:
        images: (N, C, *spatial) in [-1, 1].
        target: classes (N,).
        denoiser: predicted noise of (x_t, t).
        classifier: logits (N, K) of (x_t, t).
        alphas_cumprod: (T,).
        recipe: steps and scale.

    Yields:
        the sample after each of the 2 steps steps; the last is the counterfactual.
    """
    alphas_cumprod = alphas_cumprod.to(images)
    grid = range(0, recipe.timestep + 1, recipe.stride)
    sample = images
    for now, following in zip(grid[:-1], grid[1:], strict=True):
        with torch.no_grad():
            epsilon = denoiser(sample, torch.full((len(images),), now))
            sample = ddim(sample, epsilon, alphas_cumprod[now], alphas_cumprod[following])
        yield sample
    for now, following in zip(grid[:0:-1], grid[-2::-1], strict=True):
        timesteps = torch.full((len(images),), now)
        with torch.no_grad():
            epsilon = denoiser(sample, timesteps)
        if recipe.scale > 0:
            with torch.enable_grad():
                x = sample.detach().requires_grad_()
                log_probability = classifier(x, timesteps).log_softmax(1).gather(1, target[:, None]).sum()
                (gradient,) = torch.autograd.grad(log_probability, x)
            epsilon = epsilon - recipe.scale * (1 - alphas_cumprod[now]).sqrt() * gradient
        sample = ddim(sample, epsilon, alphas_cumprod[now], alphas_cumprod[following])
        yield sample


def of_noisy_images(classifier: Any) -> Predict:
    """Logits of (x_t, t)."""
    return lambda x, timesteps: classifier.head(classifier.encode(x, timesteps))


def get_noisy_classifier(
    network: Any, images: Tensor, labels: Tensor, alphas_cumprod: Tensor, cache: Path, steps: int, seed: int
) -> Any:
    """The separate classifier, tuned to noisy images as MONAI's is, once.

    Args:
        network: the classifier of clean images.
        images: (N, C, H, W) in [-1, 1].
        labels: (N,).
        alphas_cumprod: (T,) of the timesteps to learn.
        cache: where to keep the weights.
        steps: of AdamW, 32 images each.
        seed: of order, timesteps and noise.
    """
    tuned = copy.deepcopy(network)
    if cache.is_file():
        tuned.load_state_dict(torch.load(cache, weights_only=True))
        return tuned.eval()
    torch.manual_seed(seed)
    learned = [p for n, p in tuned.named_parameters() if not n.startswith(("up_blocks", "out"))]
    optimizer = torch.optim.AdamW(learned, 3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    alphas_cumprod = alphas_cumprod.to(images)
    tuned.train()
    for _ in range(steps):
        index = torch.randint(len(images), (32,))
        timesteps = torch.randint(len(alphas_cumprod), (32,))
        level = alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        noisy = level.sqrt() * images[index] + (1 - level).sqrt() * torch.randn_like(images[index])
        optimizer.zero_grad()
        F.cross_entropy(of_noisy_images(tuned)(noisy, timesteps), labels[index]).backward()
        optimizer.step()
        schedule.step()
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tuned.state_dict(), cache)
    return tuned.eval()


def choose_recipe(flips: Callable[[Recipe], float], recipes: Sequence[Recipe], coarser: int) -> Recipe:
    """The recipe by which most images flip, of equal ones the one of the weakest gradient, then of the least noise.

    Args:
        flips: share of the images that a recipe flips.
        recipes: to choose from.
        coarser: they are compared with so many times fewer steps, of as much greater stride.
    """

    def quick(recipe: Recipe) -> float:
        return flips(replace(recipe, steps=max(2, recipe.steps // coarser), stride=recipe.stride * coarser))

    return max(recipes, key=lambda recipe: (quick(recipe), -recipe.scale, -recipe.stride))
