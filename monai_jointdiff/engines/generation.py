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

"""Images from numbered noise, and how far they are from real ones."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from monai.utils import optional_import
from torch import nn

from monai_jointdiff.data import draw_seed
from monai_jointdiff.engines.bundle import json_word
from monai_jointdiff.engines.description import ModelDescription
from monai_jointdiff.handlers.atomic import atomic_write_text
from monai_jointdiff.inferers import RULES, ClassifierGuidance, Guidance, JointDiffusionInferer, RepresentationGuidance
from monai_jointdiff.metrics import GaussianReference, frechet_distance, kernel_distance
from monai_jointdiff.visualize import format_table, image_grid, save_png

__all__ = [
    "GenerationRow",
    "SamplingInferer",
    "compare_generation",
    "draw_samples",
    "guidance_to_generate",
    "noise_of_draws",
    "write_generation",
]

tqdm, _ = optional_import("tqdm", name="tqdm")

_HEAD_RULES: dict[str, tuple[type[Guidance], float]] = {  # with the strength where none is given
    "classifier": (ClassifierGuidance, 3.0),
    "representation": (RepresentationGuidance, 100.0),
}


def noise_of_draws(draws: Sequence[int], shape: Sequence[int], seed: int) -> torch.Tensor:
    """Starting noise of numbered samples: sample n has the same noise in whatever batch it is drawn.

    Args:
        draws: numbers of the samples.
        shape: (C, *spatial) of one image, or of its latents.
        seed: seed of the whole set.

    Returns:
        (len(draws), C, *spatial) standard normal, on the CPU.
    """
    noise = torch.empty(len(draws), *shape)
    for row, draw in enumerate(draws):
        noise[row].normal_(generator=torch.Generator().manual_seed(draw_seed(seed, draw, "sample")))
    return noise


def guidance_to_generate(
    description: ModelDescription, rule: str, target: int | None, scale: float | str | None = None
) -> Guidance | None:
    """The rule by which the head of a network leads samples to a class.

    Args:
        description: of the model.
        rule: `classifier` (gradient on the estimate of the clean image), `representation` (on the encoder's maps), or
            `class_free` (the class condition, not the head).
        target: class to generate; of several labels the one to be present.
        scale: strength, above 0. None: 3 for `classifier`, 100 for `representation`.

    Returns:
        the rule; None for `class_free`.

    Raises:
        ValueError: for an unknown rule, a rule of the head without a class or for a model without a trained head, and
            a strength that is not positive or that `class_free` does not know.
    """
    name, strength = "guidance_to_generate", json_word(scale)
    if rule not in RULES:
        raise ValueError(f"{name}: --rule is {rule!r}, it must be one of {', '.join(RULES)}.")
    if rule not in _HEAD_RULES:
        if strength is not None:
            raise ValueError(f"{name}: --rule {rule} has --guidance_scale; --scale is of {', '.join(_HEAD_RULES)}.")
        return None
    description.require("classify")
    kind, usual = _HEAD_RULES[rule]
    if target is None:
        raise ValueError(f"{name}: --rule {rule} leads to a class: --class_label is needed.")
    if strength is not None and not strength > 0:
        raise ValueError(f"{name}: --scale must be greater than 0, got {strength!r}.")
    return kind(target, usual if strength is None else strength)


class SamplingInferer(Inferer):
    """Inferer whose input is noise and whose output is images, so that a stock evaluator generates.

    The noise of an inferer with an autoencoder has the shape of the latents.

    Args:
        inferer: samples from the network.
        scheduler: sampler over the noise process the network was trained on.
        num_inference_steps: network calls per image.
        seed: of the noise that an ancestral sampler adds, which is a function of it and of the batch's starting noise.
        class_labels: class to generate, for a class-conditional network; of several labels K entries 1, 0 or -1 (open).
            None leaves the class open.
        guidance_scale: classifier-free guidance scale (1: none).
        guidance: rule by which the head leads to a class. None: none.
        progress: show a progress bar over the steps.
    """

    def __init__(
        self,
        inferer: JointDiffusionInferer,
        scheduler: Any,
        num_inference_steps: int = 20,
        seed: int = 0,
        class_labels: int | Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        guidance: Guidance | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.inferer = inferer
        self.scheduler = scheduler
        self.num_inference_steps = num_inference_steps
        self.seed = seed
        self.class_labels = class_labels
        self.guidance_scale = guidance_scale
        self.guidance = guidance
        self.progress = progress

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """Images from noise.

        Args:
            inputs: (N, C, *spatial) noise.
            network: the joint network.
            args: ignored (the engine's contract).
            kwargs: ignored (the engine's contract).

        Returns:
            (N, C, *spatial) in about [-1, 1].
        """
        self.scheduler.set_timesteps(self.num_inference_steps)
        labels = None
        if self.class_labels is not None:
            labels = torch.tensor(self.class_labels, device=inputs.device)
            labels = labels.expand(len(inputs), *labels.shape)
        batch = zlib.crc32(inputs[0].detach().float().cpu().numpy().tobytes())
        generator = torch.Generator(device=inputs.device).manual_seed(draw_seed(self.seed, batch, "ancestral"))
        result = self.inferer.sample(
            inputs,
            network,
            self.scheduler,
            class_labels=labels,
            guidance_scale=self.guidance_scale,
            guidance=self.guidance,
            generator=generator,
            progress=self.progress,
        )
        return result.image


def draw_samples(
    network: nn.Module,
    sampling: SamplingInferer,
    shape: Sequence[int],
    count: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    progress: bool = True,
) -> np.ndarray:
    """Generate numbered samples batch by batch.

    Args:
        network: the (EMA) network.
        sampling: from noise to images.
        shape: (C, *spatial) of the noise of one image.
        count: number of samples.
        batch_size: samples per batch.
        seed: seed of the starting noise.
        device: where the network is.
        progress: show a progress bar over the samples.

    Returns:
        (count, C, *spatial) float32, clipped to [-1, 1].
    """

    def batches() -> Iterator[np.ndarray]:
        with tqdm(total=count, desc="generating", disable=not progress, leave=False) as bar:
            for start in range(0, count, batch_size):
                draws = range(start, min(start + batch_size, count))
                images = sampling(noise_of_draws(draws, shape, seed).to(device), network)
                yield images.float().clamp(-1, 1).cpu().numpy()
                bar.update(len(draws))

    return np.concatenate(list(batches()))


@dataclass(frozen=True)
class GenerationRow:
    """Distance of one set of images to the test images, in one feature space.

    Args:
        images: what is compared with the test images.
        count: number of images on either side.
        frechet: Frechet distance (lower is closer; depends on `count`).
        kernel: unbiased kernel distance (KID).
    """

    images: str
    count: int
    frechet: float
    kernel: float


def compare_generation(
    samples: np.ndarray, train: np.ndarray, test: np.ndarray, features: Any, seed: int = 0
) -> list[GenerationRow]:
    """Samples, real training images (the floor) and draws from a Gaussian (the control) against test images.

    All sets have the size of the smallest, since the Frechet distance depends on it.

    Args:
        samples: (N, C, *spatial) in [-1, 1].
        train: real training images.
        test: real test images.
        features: has `extract(images) -> (N, D)`.
        seed: seed of the Gaussian draws and of the choice of training images.

    Returns:
        three rows: samples, Gaussian, real training images.
    """
    count = min(len(samples), len(train), len(test))
    chosen = np.random.RandomState(seed).permutation(len(train))[:count]
    gaussian = np.clip(GaussianReference(train).sample(count, seed), -1, 1).astype(np.float32)
    reference = features.extract(test[:count])
    sets = {
        "samples of the model": samples[:count],
        "draws from a Gaussian fitted to the training pixels": gaussian,
        "real training images (floor)": train[chosen],
    }
    rows = []
    for name, images in sets.items():
        extracted = features.extract(images)
        kernel = kernel_distance(extracted, reference)
        rows.append(GenerationRow(name, count, float(frechet_distance(extracted, reference)), float(kernel.value)))
    return rows


def write_generation(
    rows: Sequence[GenerationRow], samples: np.ndarray, test: np.ndarray, feature_name: str, output_dir: str | Path
) -> Mapping[str, Any]:
    """Write `generation.json` and the picture `real_and_generated.png`, print the table.

    Args:
        rows: from :func:`compare_generation`.
        samples: generated images.
        test: real images.
        feature_name: name of the feature space, for the table.
        output_dir: folder for the files.

    Returns:
        the content of `generation.json`.
    """
    content = {"features": feature_name, "rows": [asdict(row) for row in rows]}
    atomic_write_text(Path(output_dir) / "generation.json", json.dumps(content, indent=4) + "\n")
    both = np.concatenate([test[:16], samples[:32]])
    save_png(image_grid(both, columns=8), Path(output_dir) / "real_and_generated.png")
    print(f"\ndistance to test images ({feature_name})\n{format_table([asdict(row) for row in rows])}", flush=True)
    return content
