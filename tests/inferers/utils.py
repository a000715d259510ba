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
"""Networks whose answers are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from monai_jointdiff.networks import JointDiffusionUNet
from monai_jointdiff.schedulers import GridScheduler


def tiny_unet(spatial_dims: int = 2, seed: int = 0, **options: Any) -> JointDiffusionUNet:
    """A small network in evaluation mode whose output is not zero (MONAI starts it at zero).

    Several channels share a norm group: with one channel each the norm would take timestep and class away.
    """
    arguments = {"num_classes": 3, "class_conditional": True, "head": "linear", **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the biases, too, whichever test ran before
        net = JointDiffusionUNet(
            spatial_dims=spatial_dims,
            in_channels=1,
            out_channels=1,
            channels=(8, 8),
            num_res_blocks=1,
            attention_levels=(False, False),
            norm_num_groups=2,
            **arguments,
        )
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if parameter.ndim > 1:  # weights keep the variance of their input
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
    if net.class_conditional:
        nn.init.normal_(net.class_embedding.weight, generator=generator)
    return net.eval()


class GaussianNetwork(nn.Module):
    """The optimal prediction for pixels x_0 ~ N(mean, std^2), in closed form."""

    def __init__(self, scheduler: GridScheduler, mean: float, std: float) -> None:
        super().__init__()
        self.scheduler, self.mean, self.std = scheduler, mean, std

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.scheduler.alpha_sigma(timesteps, x)
        # E[epsilon | x_t] of the joint Gaussian (x_t, epsilon)
        epsilon = sigma * (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        return self.scheduler.model_output_from_epsilon(epsilon, timesteps, x)

    def flow(self, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """Solution of the probability flow from x_t to x_0: the standardized value is kept."""
        alpha, sigma = self.scheduler.alpha_sigma(timestep, noise)
        return self.mean + self.std * (noise - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2).sqrt()


class Recorder(nn.Module):
    """Passes everything on to a network and remembers the inputs of every call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name == "network" or "network" not in self.__dict__.get("_modules", {}):
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.network, name)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor | None = None, **condition: Any) -> Any:
        self.calls.append({"x": x, "timesteps": timesteps, "training": self.network.training, **condition})
        return self.network(x, timesteps, **condition)
