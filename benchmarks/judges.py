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

"""Networks that judge and were never trained with ours: the plain CNN, and the feature spaces for distances."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_jointdiff.metrics import EfficientNetFeatures

__all__ = [
    "CNNFeatures",
    "PlainCNN",
    "disturb_strongly",
    "feature_spaces",
    "gaussian_blur",
    "train_cnn",
    "train_robust_cnn",
]

ATTACKED, ATTACK_STEPS = 0.7, 3  # share of the images, and sign steps, when a judge is trained against attacks


class PlainCNN(nn.Module):
    """Four convolution layers, global average pooling, a linear layer.

    Args:
        in_channels: channels of the images.
        num_classes: K.
        width: channels of the first layer; doubled twice.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        widths = (in_channels, width, 2 * width, 4 * width, 4 * width)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(N, 4 width) from (N, C, H, W)."""
        for index, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = F.relu(norm(layer(x)))
            x = F.max_pool2d(x, 2) if index < 3 else x
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.head(self.features(x))


def train_cnn(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    seed: int,
    epochs: int,
    disturb: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 64,
) -> PlainCNN:
    """Train the plain CNN with Adam and a cosine schedule.

    Args:
        images: (N, C, H, W) in [-1, 1].
        labels: (N,).
        num_classes: K.
        seed: of weights, order and augmentation.
        epochs: passes through the data.
        disturb: augmentation of a batch; None: small shifts, contrast and noise.
        batch_size: images per step.
    """
    torch.manual_seed(seed)
    network = PlainCNN(images.shape[1], num_classes)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch_size)[: len(images) // batch_size]:
            optimizer.zero_grad()
            F.cross_entropy(network((disturb or _disturb)(images[index])), labels[index]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def train_robust_cnn(
    images: Tensor, labels: Tensor, num_classes: int, seed: int, epochs: int, radius: float = 0.1, batch_size: int = 64
) -> PlainCNN:
    """Train the plain CNN on adversarial changes of itself beside the disturbances of :func:`disturb_strongly`.

    A network that was not trained so takes many a change that means nothing for another diagnosis, ours or another
    network's; one that was asks for a change that shows (Madry et al. 2018, https://arxiv.org/abs/1706.06083). Classes
    weigh the same, since such a network otherwise takes what it cannot make out for the more frequent one.

    Args:
        images: (N, C, H, W) in [-1, 1].
        labels: (N,).
        num_classes: K.
        seed: of weights, order, augmentation and attacks.
        epochs: passes through the data.
        radius: largest maximum norm of an attack; each image its own, up to this, growing over the first half.
        batch_size: images per step.
    """
    torch.manual_seed(seed)
    network = PlainCNN(images.shape[1], num_classes)
    weight = len(labels) / (num_classes * torch.bincount(labels, minlength=num_classes))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for epoch in range(epochs):
        for index in torch.randperm(len(images)).split(batch_size)[: len(images) // batch_size]:
            x, y = disturb_strongly(images[index], widest_blur=4.0, blurred_share=0.5), labels[index]
            each = (len(x), 1, 1, 1)
            reach = radius * torch.rand(each) * min(1, 2 * (epoch + 1) / epochs)
            x = torch.where(torch.rand(each) < ATTACKED, _attacked(network.eval(), x, y, reach), x)
            optimizer.zero_grad()
            F.cross_entropy(network.train()(x), y, weight).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def _attacked(network: PlainCNN, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Images (N, C, H, W) moved away from their labels (N,) by three sign steps from a random start."""
    change = (2 * torch.rand_like(x) - 1) * radius
    for _ in range(ATTACK_STEPS):
        change.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(x + change), y), change)
        change = (change.detach() + 2 / ATTACK_STEPS * radius * gradient.sign()).clamp(-radius, radius)
    return (x + change).detach()


def _disturb(x: Tensor) -> Tensor:
    """Shift by up to two pixels, contrast and brightness, noise; each image its own contrast."""
    shift = [int(s) for s in torch.randint(-2, 3, (2,))]
    x = torch.roll(x, shift, dims=(2, 3))
    gain, offset = 1 + 0.4 * (torch.rand(len(x), 1, 1, 1) - 0.5), 0.4 * (torch.rand(len(x), 1, 1, 1) - 0.5)
    return x * gain + offset + 0.1 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)


def disturb_strongly(x: Tensor, widest_blur: float = 2.0, blurred_share: float = 0.3) -> Tensor:
    """What an oracle must not be fooled by: blur, noise of two kinds, brightness and contrast, each image its own.

    Args:
        x: (N, C, H, W) in [-1, 1].
        widest_blur: largest standard deviation of the Gaussian, in pixels.
        blurred_share: of the images.
    """
    each = (len(x), 1, 1, 1)
    x = torch.roll(x, [int(s) for s in torch.randint(-2, 3, (2,))], dims=(2, 3))
    blurred = gaussian_blur(x, 0.4 + (widest_blur - 0.4) * float(torch.rand(())))
    x = torch.where(torch.rand(each) < blurred_share, blurred, x)
    gain, offset = 1 + 0.5 * (torch.rand(each) - 0.5), 0.6 * (torch.rand(each) - 0.5)
    noise = torch.where(torch.rand(each) < 0.5, torch.randn_like(x), torch.randn_like(x).sign())
    return x * gain + offset + 0.2 * torch.rand(each) * (torch.rand(each) < 0.5) * noise


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Images (N, C, H, W) blurred by a Gaussian of so many pixels, edges repeated."""
    radius = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=x.dtype) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    x = F.pad(x, [radius] * 4, mode="replicate")
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        x = F.conv2d(x, kernel.reshape(shape).expand(x.shape[1], 1, -1, -1), groups=x.shape[1])
    return x


class CNNFeatures:
    """Pooled features of a :class:`PlainCNN` trained on the same data, apart from the models that are compared.

    Args:
        network: the trained network.
    """

    def __init__(self, network: PlainCNN) -> None:
        self.network = network.eval()

    @torch.no_grad()
    def extract(self, images: Any) -> np.ndarray:
        """(N, D) from (N, C, H, W)."""
        batches = torch.as_tensor(images, dtype=torch.float32).split(256)
        return torch.cat([self.network.features(batch) for batch in batches]).double().numpy()


def feature_spaces(images: Tensor, labels: Tensor, num_classes: int, cache: Path) -> dict[str, Any]:
    """The two feature spaces of the distances: ImageNet features, and those of an independently trained classifier.

    Args:
        images: (N, C, H, W) training images.
        labels: (N,).
        num_classes: K.
        cache: file that keeps the trained classifier between cells.
    """
    if cache.is_file():
        network = PlainCNN(images.shape[1], num_classes)
        network.load_state_dict(torch.load(cache, weights_only=True))
    else:
        network = train_cnn(images, labels, num_classes, seed=987, epochs=6)
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), cache)
    return {"ImageNet (EfficientNet-Lite0)": EfficientNetFeatures(), "CNN of the same data": CNNFeatures(network)}
