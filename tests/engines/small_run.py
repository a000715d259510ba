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

"""A joint training of seconds with every random part in it: dropout, random transforms, noise, shuffling.

Stock `SupervisedTrainer` and `SupervisedEvaluator`, with this package's parts as its bundles put them together.
"""

from __future__ import annotations

import unittest
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.metrics import Average
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import ValidationHandler
from monai.transforms import Compose, RandFlipd, RandGaussianNoised
from torch import nn
from torch.utils.data import Dataset

from monai_jointdiff.data import DrawBatchSampler, DrawDataset, ShuffledOrder
from monai_jointdiff.engines.prepare_batch import JointPrepareBatch, ValidationPrepareBatch
from monai_jointdiff.handlers import (
    BestModel,
    DeterministicDraws,
    ExponentialMovingAverage,
    GradientClipping,
    LearningRateSchedule,
    LossTerms,
    NonFiniteGuard,
    ResumableCheckpoint,
)
from monai_jointdiff.inferers import JointDiffusionInferer
from monai_jointdiff.losses import JointDiffusionLoss
from monai_jointdiff.networks import JointDiffusionUNet
from monai_jointdiff.schedulers import make_scheduler

EPOCH_LENGTH = 3
EPOCHS = 3


def use_one_thread() -> None:
    """For a test module's `setUpModule`: tiny networks are fastest so, and bit equality needs one number of threads."""
    unittest.addModuleCleanup(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)


class ItemList(Dataset):
    def __init__(self, items: Sequence[Mapping[str, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.items[index]


def items(labels: Sequence[int], spatial_dims: int = 2) -> list[dict[str, Any]]:
    """Images of 8 pixels an axis, brighter the higher the class."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(len(labels), 1, *[8] * spatial_dims, generator=generator) - 1.0
    return [
        {"image": image + max(label, 0) / 2, "label": torch.tensor(label), "name": f"image_{n}.png"}
        for n, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def small_network(dropout: float = 0.2, spatial_dims: int = 2) -> JointDiffusionUNet:
    torch.manual_seed(3)
    network = JointDiffusionUNet(
        spatial_dims=spatial_dims,
        in_channels=1,
        out_channels=1,
        num_classes=3,
        num_res_blocks=(1, 1),
        channels=(8, 8),
        attention_levels=(False, False),
        norm_num_groups=4,
        dropout=dropout,
        head_dropout=dropout,
    )
    for parameter in network.parameters():  # MONAI's last layers start at 0, and with them most gradients
        if parameter.ndim > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.1)
    return network


@dataclass(frozen=True)
class SmallRun:
    trainer: SupervisedTrainer
    evaluator: SupervisedEvaluator
    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ExponentialMovingAverage
    best: BestModel
    loss: JointDiffusionLoss
    checkpoint: ResumableCheckpoint


def small_run(
    directory: Path,
    resume: Path | None = None,
    num_workers: int = 0,
    interval: int | None = None,
    epochs: int = EPOCHS,
    more_handlers: Sequence[Any] = (),
    lr: float = 3e-3,
    keep: int = 2,
    data: Sequence[Mapping[str, Any]] | None = None,
) -> SmallRun:
    network = small_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    scheduler = make_scheduler("ddim")
    inferer = JointDiffusionInferer(scheduler)
    ema = ExponentialMovingAverage(network, decay=0.9)
    best = BestModel(ema, directory, "val_loss", larger_is_better=False)
    evaluator = small_evaluator(ema.ema_model, inferer, scheduler, best)

    transform = Compose([RandFlipd(keys="image_cls", prob=0.5), RandGaussianNoised(keys="image_cls", prob=0.5)])
    data = items([0, 1, 2, -1, 0, 2, -1, 1, 1, 0]) if data is None else data
    dataset = DrawDataset(data, lambda item: {**item, "image_cls": item["image"]}, transform, seed=5)
    sampler = DrawBatchSampler(batch_size=4, iterations_per_epoch=EPOCH_LENGTH)
    loss = JointDiffusionLoss(classification_weight=0.5)
    checkpoint = ResumableCheckpoint(
        directory, network, optimizer, ema, best, interval, keep, resume, options={"seed": 5, "batch_size": 4}
    )
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers),
        network=network,
        optimizer=optimizer,
        loss_function=loss,
        prepare_batch=JointPrepareBatch(scheduler, seed=5, weighting="min_snr"),
        inferer=inferer,
        train_handlers=[
            checkpoint,
            DeterministicDraws(sampler, seed=5),
            LearningRateSchedule(optimizer, lr, total_iterations=epochs * EPOCH_LENGTH, warmup_iterations=2),
            NonFiniteGuard(loss),
            GradientClipping(1.0, network),
            LossTerms(loss),
            ema,
            ValidationHandler(1, evaluator),
            *more_handlers,
        ],
    )
    return SmallRun(trainer, evaluator, network, optimizer, ema, best, loss, checkpoint)


def small_evaluator(
    network: nn.Module, inferer: JointDiffusionInferer, scheduler: Any, best: BestModel
) -> SupervisedEvaluator:
    loss = JointDiffusionLoss(classification_weight=0.5)
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(ItemList(items([0, 1, 2, -1, 1, 2])), batch_size=3),
        network=network,
        prepare_batch=ValidationPrepareBatch(scheduler, seed=5),
        inferer=inferer,
        key_val_metric={"val_loss": Average(lambda output: float(loss(output["pred"], output["label"])))},
        val_handlers=[best],
        decollate=False,
    )


@dataclass(frozen=True)
class DistributedStep:
    gradients: dict[str, torch.Tensor]  # of the first iteration
    weights: dict[str, torch.Tensor]  # after the last
    labels: list[list[int]]  # of each iteration


def distributed_run(
    rank: int, world_size: int, dtype: torch.dtype, labels: Sequence[int], iterations: int, directory: Path
) -> DistributedStep:
    """Train on 4 draws an iteration, cut among the processes; without dropout, which depends on the rank."""
    base = small_network(dropout=0.0).to(dtype)
    network = nn.parallel.DistributedDataParallel(base) if world_size > 1 else base
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    scheduler = make_scheduler("ddim")
    order = ShuffledOrder(len(labels), seed=0)
    order.arrange = lambda epoch: torch.arange(len(labels)).numpy()  # type: ignore[method-assign]
    sampler = DrawBatchSampler(4 // world_size, iterations, rank, world_size)
    dataset = DrawDataset(items(labels), lambda item: {**item, "image_cls": item["image"].flip(-1)}, None, order, 5)
    gradients: dict[str, torch.Tensor] = {}
    seen: list[list[int]] = []
    loss = JointDiffusionLoss(classification_weight=0.5, class_weights=[1.0, 2.0, 0.5])
    ema = ExponentialMovingAverage(network)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader(dataset, batch_sampler=sampler),
        network=network,
        optimizer=optimizer,
        loss_function=loss,
        prepare_batch=JointPrepareBatch(scheduler, seed=5),
        inferer=JointDiffusionInferer(scheduler),
        to_kwargs={"dtype": dtype},
        decollate=False,
        train_handlers=[
            ResumableCheckpoint(directory / f"checkpoints{world_size}", network, optimizer, ema, interval=1),
            DeterministicDraws(sampler, seed=5),
            Recorder(base, gradients, seen),
            ema,
        ],
    )
    trainer.run()
    return DistributedStep(gradients, base.state_dict(), seen)


class Recorder:
    """Keeps the gradients of the first iteration and the labels of all."""

    def __init__(self, network: nn.Module, gradients: dict[str, torch.Tensor], labels: list[list[int]]) -> None:
        self.network = network
        self.gradients = gradients
        self.labels = labels

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        self.labels.append(engine.state.batch["label"].tolist())
        if engine.state.iteration == 1:
            self.gradients.update({name: p.grad.clone() for name, p in self.network.named_parameters()})
