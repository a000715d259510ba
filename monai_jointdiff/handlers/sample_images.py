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

"""Pictures of what the network generates while it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from monai_jointdiff.inferers import JointDiffusionInferer, StepInfo
from monai_jointdiff.visualize import image_grid, save_png

from .utils import is_writing_process

__all__ = ["FixedNoiseSampler", "SampleImages"]


class FixedNoiseSampler:
    """Draws images from the same noise every time: a sampler for :class:`SampleImages`.

    Args:
        inferer: runs the chain.
        scheduler: makes its steps, with its time grid set.
        image_shape: (C, *spatial) of the noise: of an image, or of its latents if the inferer has an autoencoder.
        num_samples: number of images, K.
        num_frames: number of steps shown of the first image's chain, S, evenly spread, the last one included.
        seed: of the noise.

    Raises:
        ValueError: for fewer than one image or frame.
    """

    def __init__(
        self,
        inferer: JointDiffusionInferer,
        scheduler: Any,
        image_shape: Sequence[int],
        num_samples: int = 16,
        num_frames: int = 8,
        seed: int = 0,
    ) -> None:
        if num_samples < 1 or num_frames < 1:
            raise ValueError(
                f"FixedNoiseSampler: num_samples and num_frames must be at least 1, got {num_samples} and {num_frames}."
            )
        self.inferer = inferer
        self.scheduler = scheduler
        self.image_shape = tuple(image_shape)
        self.num_samples = num_samples
        self.num_frames = num_frames
        self.seed = seed

    def __call__(self, network: nn.Module) -> dict[str, Tensor]:
        """Sample.

        Args:
            network: the joint network.

        Returns:
            `samples`: (K, C, *spatial); `denoising`: (2, S, C, *spatial), x after a step above the estimate of the
            clean image from which the step was made (only x if the scheduler gives no estimate).
        """
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn((self.num_samples, *self.image_shape), generator=generator)
        frames: list[list[Tensor]] = []  # of the first image: x after each step, and its estimate of the clean image

        def keep(step: StepInfo) -> None:
            parts = (step["sample"], step["original"])
            frames.append([part[0].clone() for part in parts if part is not None])

        device = next(network.parameters()).device
        result = self.inferer.sample(noise.to(device), network, self.scheduler, generator=generator, callback=keep)
        shown = [round(position) for position in np.linspace(len(frames) - 1, 0, self.num_frames)[::-1]]
        rows = [torch.stack(row) for row in zip(*(frames[step] for step in shown), strict=True)]
        with torch.no_grad():
            rows = [self.inferer.space.decode(row) for row in rows]
        return {"samples": result.image, "denoising": torch.stack(rows)}


class SampleImages:
    """Handler of a trainer: shows every few epochs what the network generates, in TensorBoard and as PNG files.

    Each entry of the sampler's result becomes one picture: a stack of images (K, C, *spatial) a grid that is about
    square; stacks of chains (R, S, C, *spatial) a strip with R rows of S images, for example with R = 2 the noisy
    images x_t above their estimates of the clean one. Of a volume the middle slice is shown. Only rank 0 draws.

    Args:
        sampler: maps the network to images in [-1, 1] by name. It brings its own noise, the same every time, so that
            the pictures of different epochs can be compared.
        network: the sampler's argument, in general the average (`ema.ema_model`). Its mode is kept.
        directory: of the files `<name>_epoch<epoch>.png`, made when it is missing.
        spatial_dims: 2 or 3.
        interval: epochs between two pictures, >= 1.
        summary_writer: a TensorBoard `SummaryWriter`; None: PNG files only.

    Raises:
        ValueError: for another number of spatial dimensions or an interval below 1; in training, if the sampler
            returns arrays of another number of axes.
    """

    def __init__(
        self,
        sampler: Callable[[nn.Module], Mapping[str, Tensor | np.ndarray]],
        network: nn.Module,
        directory: str | Path,
        spatial_dims: int = 2,
        interval: int = 1,
        summary_writer: Any = None,
    ) -> None:
        if spatial_dims not in (2, 3):
            raise ValueError(f"SampleImages: spatial_dims must be 2 or 3, got {spatial_dims}.")
        if interval < 1:
            raise ValueError(f"SampleImages: interval must be >= 1 epoch, got {interval}.")
        self.sampler = sampler
        self.network = network
        self.directory = Path(directory)
        self.spatial_dims = spatial_dims
        self.interval = interval
        self.summary_writer = summary_writer

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)

    def __call__(self, engine: Engine) -> None:
        """Draw and write the pictures of the present epoch."""
        if not is_writing_process():
            return
        training = self.network.training
        self.network.eval()
        images = self.sampler(self.network)
        self.network.train(training)
        for name, stack in images.items():
            self._write(name, self.picture(stack), engine.state.epoch)

    def picture(self, stack: Tensor | np.ndarray) -> np.ndarray:
        """One picture of a stack of images (K, C, *spatial) or of chains (R, S, C, *spatial), see the class."""
        array = torch.as_tensor(stack).detach().float().cpu().numpy()
        extra = array.ndim - self.spatial_dims
        if extra not in (2, 3):
            raise ValueError(
                f"SampleImages: images must be (K, C, *spatial) or (R, S, C, *spatial) with {self.spatial_dims} "
                f"spatial axes, got shape {array.shape}."
            )
        columns = array.shape[1] if extra == 3 else None
        return image_grid(array.reshape(-1, *array.shape[extra - 1 :]), columns)  # (K or R S, C, *spatial)

    def _write(self, name: str, picture: np.ndarray, epoch: int) -> None:
        save_png(picture, self.directory / f"{name}_epoch{epoch:04d}.png")
        if self.summary_writer is not None:
            formats = "HW" if picture.ndim == 2 else "HWC"
            self.summary_writer.add_image(name, picture, global_step=epoch, dataformats=formats)
