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

"""Speed of the joint training step against two separate encoder calls, and against MONAI's denoising step alone.

All variants of the step are one architecture with one set of start weights, are measured in turn within one process
and do the whole step: forward passes, loss in fp32, backward pass, AdamW on fp32 weights. An image counts once per
joint step.

    python -m benchmarks.speed [--quick] [--tables ratios ...] [--threads 2] [--seeds 3] [--bf16_seeds 1]
                              [--device cpu] [--output DIR]

Writes three tables: ``speed`` (the ratios), ``speed_throughput`` (images per second by image size) and ``speed_loss``
(whether bf16 with a shared encoder call learns as fp32 with separate calls does, on
``$JOINTDIFF_DATA/pneumoniamnist_28.npz``, or on drawn blobs where the variable is not set). A rerun measures only the
missing cells; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import Tensor, nn

from benchmarks.common import RESULTS, Cell, CellStore, Target, counted, write_result
from monai_jointdiff.networks import JointDiffusionUNet
from monai_jointdiff.schedulers import DDIMGridScheduler

NETWORK: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "num_res_blocks": (2, 2, 2),
    "channels": (32, 64, 128),
    "attention_levels": (False, True, True),
    "num_head_channels": 32,
    "include_fc": False,
}
NUM_CLASSES = 2
CLASSIFICATION_WEIGHT = 0.1
LEARNING_RATE = 2e-4
TABLES = ("ratios", "throughput", "loss")
TARGET = 2  # times faster than the same network in fp32 with two encoder calls
LOSS_WINDOW = 50  # steps averaged into one point of a loss curve

# name, spatial dimensions, pixels per axis, batch size
SIZES = (("28px", 2, 28, 32), ("64px", 2, 64, 16), ("32px-3D", 3, 32, 2))

Step = Callable[[], Any]


# --------------------------------------------------------------------------------------------------------------------
# what is compared


class MonaiJointUNet(DiffusionModelUNet):
    """The same network of MONAI's blocks: MONAI's forward pass to predict, its encoder with our head to classify."""

    classifier: nn.Module

    def classify(self, x: Tensor) -> Tensor:
        """Logits (N, K) at timestep 0, with the statements of MONAI's forward pass up to the middle block."""
        emb = self.time_embed(get_timestep_embedding(x.new_zeros(len(x)), self.block_out_channels[0]))
        h = self.conv_in(x)
        maps = [h]
        for block in self.down_blocks:
            h, levels = block(hidden_states=h, temb=emb)
            maps += levels
        logits: Tensor = self.classifier([*maps, self.middle_block(hidden_states=h, temb=emb)])
        return logits


@dataclass(frozen=True)
class Variant:
    """One way to do the step.

    Attributes:
        label: row of the table.
        blocks: ``ours`` or ``monai``.
        attention: ``auto``, ``sdpa`` or ``einsum``.
        bf16: autocast to bfloat16.
        shared: one encoder call for noisy and clean images instead of two.
        classify: False for the denoising step alone.
    """

    label: str
    blocks: str = "ours"
    attention: str = "auto"
    bf16: bool = False
    shared: bool = False
    classify: bool = True


OURS = Variant("joint step of ours: bf16, shared encoder call", bf16=True, shared=True)
SEPARATE = [Variant(f"(i) same network, fp32, separate calls, {a}", attention=a) for a in ("sdpa", "einsum")]
SEPARATE_MONAI = [
    Variant(f"(i) with MONAI's blocks, fp32, separate calls, {a}", "monai", a) for a in ("sdpa", "einsum")
]
DENOISER = [Variant(f"(ii) MONAI, denoising alone, fp32, {a}", "monai", a, classify=False) for a in ("sdpa", "einsum")]
PARTS = [
    Variant("ours, bf16, separate calls", bf16=True),
    Variant("ours, fp32, shared encoder call", shared=True),
    Variant("ours, bf16, denoising alone", bf16=True, classify=False),
]
VARIANTS = [OURS, *SEPARATE, *SEPARATE_MONAI, *DENOISER, *PARTS]


def build(variant: Variant, spatial_dims: int, seed: int = 0) -> nn.Module:
    """The network of a variant; the weights depend on the seed alone."""
    torch.manual_seed(seed)
    ours = JointDiffusionUNet(spatial_dims, num_classes=NUM_CLASSES, attention=variant.attention, **NETWORK)
    if variant.blocks == "ours":
        return ours
    monai = MonaiJointUNet(spatial_dims, use_flash_attention=variant.attention == "sdpa", **NETWORK)
    monai.classifier = ours.classifier
    monai.load_state_dict(ours.state_dict())
    return monai


@dataclass(frozen=True)
class Batch:
    """Inputs of one step: noisy and clean images (N, 1, *spatial), noise, timesteps (N,), labels (N,)."""

    noisy: Tensor
    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def random_batch(spatial_dims: int, size: int, batch_size: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    noisy, clean, noise = torch.randn(3, batch_size, 1, *[size] * spatial_dims, generator=generator)
    timesteps = torch.randint(0, 1000, (batch_size,), generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (batch_size,), generator=generator)
    return Batch(noisy, clean, noise, timesteps, labels).to(device)


def losses_of(variant: Variant, net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Denoising and classification loss of a step, in fp32."""
    logits: Tensor | None = None
    with torch.autocast(batch.clean.device.type, torch.bfloat16, enabled=variant.bf16):
        if variant.classify and variant.shared:
            logits, prediction = net(batch.noisy, batch.timesteps, clean=batch.clean)
        else:
            prediction = net(batch.noisy, batch.timesteps)
            if variant.classify:
                logits = net.classify(batch.clean)  # type: ignore[operator]
    denoising = F.mse_loss(prediction.float(), batch.noise)
    classification = denoising.new_zeros(()) if logits is None else F.cross_entropy(logits.float(), batch.labels)
    return denoising, classification


def training_step(variant: Variant, net: nn.Module) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """A function that does one optimizer step on a batch and returns both losses."""
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, fused=True)

    def step(batch: Batch) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        denoising, classification = losses_of(variant, net, batch)
        (denoising + CLASSIFICATION_WEIGHT * classification).backward()
        optimizer.step()
        return denoising.detach(), classification.detach()

    return step


# --------------------------------------------------------------------------------------------------------------------
# time


def measure_interleaved(
    steps: Mapping[str, Step], repeats: int, device: torch.device, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each step, one after the other in every repeat, so that a disturbance meets all alike.

    Args:
        steps: functions by name.
        repeats: repeats that count.
        device: where they run.
        warmup: repeats before those.

    Returns:
        Seconds by name, one per repeat.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for repeat in range(warmup + repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            steps[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_with_range(values: Sequence[float]) -> dict[str, float]:
    """Median with the quartiles as ``low`` and ``high``."""
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75))
    return {"mean": float(middle), "low": float(low), "high": float(high)}


def measure_ratios(settings: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every variant of the training step."""
    batch = random_batch(2, settings.size, settings.batch_size, settings.device)
    steps: dict[str, Step] = {}
    for variant in VARIANTS:
        step = training_step(variant, build(variant, 2).to(settings.device))
        steps[variant.label] = lambda step=step: step(batch)  # type: ignore[misc]
    return {"seconds": measure_interleaved(steps, settings.repeats, settings.device)}


def measure_throughput(spatial_dims: int, size: int, batch_size: int, settings: argparse.Namespace) -> dict[str, Any]:
    """Images per second of training, classification and one sampling step."""
    batch = random_batch(spatial_dims, size, batch_size, settings.device)
    scheduler = DDIMGridScheduler()
    scheduler.set_timesteps(20)
    t = int(scheduler.timesteps[0])
    steps: dict[str, Step] = {}
    for name, variant in (("bf16", OURS), ("fp32", Variant("", shared=True)), ("monai", SEPARATE_MONAI[0])):
        trained = training_step(variant, build(variant, spatial_dims).to(settings.device))
        net = build(variant, spatial_dims).to(settings.device).eval()

        def classify(net: nn.Module = net, bf16: bool = variant.bf16) -> Tensor:
            with torch.no_grad(), torch.autocast(settings.device.type, torch.bfloat16, enabled=bf16):
                logits: Tensor = net.classify(batch.clean)  # type: ignore[operator]
            return logits

        def sample(net: nn.Module = net, bf16: bool = variant.bf16) -> Tensor:
            with torch.no_grad(), torch.autocast(settings.device.type, torch.bfloat16, enabled=bf16):
                output = net(batch.noisy, batch.timesteps.new_full((1,), t))
            previous: Tensor = scheduler.step(output.float(), t, batch.noisy)[0]
            return previous

        steps[f"{name} training"] = lambda step=trained: step(batch)  # type: ignore[misc]
        steps[f"{name} classification"] = classify
        steps[f"{name} sampling step"] = sample
    seconds = measure_interleaved(steps, max(settings.repeats // 2, 2), settings.device, warmup=1)
    return {"seconds": seconds, "batch_size": batch_size}


# --------------------------------------------------------------------------------------------------------------------
# learning


def blobs(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, S, S) in [-1, 1] of one wide or two narrow bright spots, and which of both (N,)."""
    rng = np.random.RandomState(seed)
    labels = rng.randint(0, 2, count)
    axis = np.linspace(-1, 1, size)
    centers = rng.uniform(-0.6, 0.6, (count, 2, 2))
    images = np.zeros((count, size, size))
    for i, label in enumerate(labels):
        for center in centers[i, : label + 1]:
            distance = (axis[:, None] - center[0]) ** 2 + (axis[None, :] - center[1]) ** 2
            images[i] = np.maximum(images[i], np.exp(-distance / (0.02 if label else 0.08)))
    noisy = 2 * images - 1 + 0.05 * rng.standard_normal(images.shape)
    return np.clip(noisy, -1, 1)[:, None].astype(np.float32), labels.astype(np.int64)


def load_images(size: int) -> tuple[str, Tensor, Tensor]:
    """Name, images (N, 1, S, S) in [-1, 1] and labels (N,) to learn from."""
    folder = os.environ.get("JOINTDIFF_DATA")
    if not folder:
        images, labels = blobs(1000, size, seed=0)
        return "blobs", torch.from_numpy(images), torch.from_numpy(labels)
    with np.load(Path(folder) / "pneumoniamnist_28.npz") as data:
        array, target = data["train_images"], data["train_labels"]
    pixels = torch.from_numpy(array.astype(np.float32))[:, None] / 127.5 - 1
    border = size - pixels.shape[-1]
    pixels = F.pad(pixels, (border // 2, border - border // 2) * 2, value=-1.0)
    return "pneumoniamnist-28", pixels, torch.from_numpy(target.astype(np.int64).reshape(-1))


def learn(variant: Variant, seed: int, images: Tensor, labels: Tensor, settings: argparse.Namespace) -> dict[str, Any]:
    """Losses of a training run; start weights, order, noise and timesteps depend on the seed alone."""
    step = training_step(variant, build(variant, 2, seed).to(settings.device))
    generator = torch.Generator().manual_seed(seed)
    schedule = DDIMGridScheduler()
    curve = []
    for _ in range(settings.steps):
        picked = torch.randint(0, len(images), (settings.batch_size,), generator=generator)
        clean, noise = images[picked], torch.randn(settings.batch_size, *images.shape[1:], generator=generator)
        timesteps = torch.randint(0, 1000, (settings.batch_size,), generator=generator)
        noisy = schedule.add_noise(clean, noise, timesteps)
        batch = Batch(noisy, clean, noise, timesteps, labels[picked]).to(settings.device)
        curve.append([float(v) for v in step(batch)])
    windows = np.asarray(curve).reshape(-1, min(LOSS_WINDOW, settings.steps), 2).mean(axis=1)
    return {"denoising": windows[:, 0].tolist(), "classification": windows[:, 1].tolist()}


# --------------------------------------------------------------------------------------------------------------------
# tables


def ratio_rows(seconds: Mapping[str, Sequence[float]], batch_size: int) -> list[dict[str, Any]]:
    """One row per variant: images per second, and how many times faster ours is."""
    ours = seconds[OURS.label]
    return [
        {
            "step": variant.label,
            "images/s": median_with_range([batch_size / s for s in seconds[variant.label]]),
            "ours is faster by": median_with_range([s / o for s, o in zip(seconds[variant.label], ours, strict=True)]),
        }
        for variant in VARIANTS
    ]


def faster(variants: Sequence[Variant], seconds: Mapping[str, Sequence[float]]) -> Variant:
    """The variant with the smallest median."""
    return min(variants, key=lambda v: statistics.median(seconds[v.label]))


def ratio(variants: Sequence[Variant], seconds: Mapping[str, Sequence[float]]) -> tuple[float, str]:
    """How many times the median of ours the faster of some variants takes, and its attention."""
    best = faster(variants, seconds)
    return statistics.median(seconds[best.label]) / statistics.median(seconds[OURS.label]), best.attention


def ratio_target(seconds: Mapping[str, Sequence[float]], threads: int) -> Target:
    """How much faster the joint step was to be, and is."""
    times, attention = ratio(SEPARATE, seconds)
    return Target(
        "joint training step (bf16, shared encoder call) against fp32 with two encoder calls",
        f"at least {TARGET} times as fast",
        f"{times:.2f} times",
        times >= TARGET,
        f"{counted(threads, 'thread')}; the latter in its faster attention, {attention}",
    )


def ratio_notes(seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """The figures that count, by the median of each variant."""
    groups = {
        "the same network in fp32 with two separate encoder calls": SEPARATE,
        "the same weights in MONAI's blocks, fp32, two separate encoder calls": SEPARATE_MONAI,
        "MONAI's denoising step alone": DENOISER,
    }
    notes = []
    for name, variants in groups.items():
        times, attention = ratio(variants, seconds)
        notes.append(f"Against {name}, in its faster attention ({attention}): {times:.2f} x.")
    return [*notes, "Values are medians over interleaved repeats, in brackets the quartiles."]


def throughput_rows(measured: Mapping[str, Mapping[str, Any]], cpus: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row per image size and task; bf16 pays on processors that have it, so the processor stands in the row."""
    labels = {"bf16": "ours, bf16", "fp32": "ours, fp32", "monai": "MONAI's blocks, fp32, separate calls"}
    rows = []
    for size, values in measured.items():
        for task in ("training", "classification", "sampling step"):
            row: dict[str, Any] = {"images": size, "batch": values["batch_size"], "task": task}
            for key, label in labels.items():
                row[label] = values["batch_size"] / statistics.median(values["seconds"][f"{key} {task}"])
            row["processor"] = cpus[size]
            rows.append(row)
    return rows


def loss_rows(curves: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]) -> list[dict[str, Any]]:
    """One row per term and window: both ways of the same seeds, their mean difference, the range of the fp32 seeds.

    One seed has no range, and whether the difference lies within it is not known.

    Args:
        curves: for ``bf16`` and ``fp32``, the windows' losses by term, one mapping per seed; bf16 may have fewer seeds,
            the first ones.

    Returns:
        Rows of the table.
    """
    rows = []
    for term in ("denoising", "classification"):
        bf16, fp32 = (np.asarray([seed[term] for seed in curves[way]]) for way in ("bf16", "fp32"))  # (seeds, windows)
        for window in range(fp32.shape[1]):
            a, every = bf16[:, window], fp32[:, window]
            b = every[: len(a)]
            difference = abs(float((a - b).mean()))
            spread = float(every.max() - every.min()) if len(every) > 1 else None
            rows.append(
                {
                    "loss": term,
                    "window": window + 1,
                    "bf16, shared": float(a.mean()),
                    "fp32, separate": float(b.mean()),
                    "difference of the same seeds": difference,
                    "range over fp32 seeds": spread,
                    "within": None if spread is None else difference <= spread,
                }
            )
    return rows


def loss_target(rows: Sequence[Mapping[str, Any]], steps: int, seeds: Mapping[str, int]) -> Target:
    """Whether bf16 learns as fp32 does.

    Args:
        rows: of :func:`loss_rows`.
        steps: of the training.
        seeds: how many, for ``bf16`` and ``fp32``.
    """
    figure = f"loss over {steps} steps of bf16 with a shared encoder call against fp32 with two"
    asked, about = (
        "within the range of the fp32 seeds",
        f"{counted(seeds['fp32'], 'seed')} in fp32, {seeds['bf16']} in bf16",
    )
    known = [row["within"] for row in rows if row["within"] is not None]
    if not known:
        return Target(figure, asked, "", None, f"{about}: no range")
    return Target(figure, asked, f"{sum(known)} of {len(known)} windows", all(known), about)


# --------------------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="Speed of the joint training step.")
    parser.add_argument("--quick", action="store_true", help="few small repeats, to prove the script; needs --output")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the loss curves in fp32")
    parser.add_argument("--bf16_seeds", type=int, default=1, help="and in bf16, which some processors only emulate")
    parser.add_argument("--tables", nargs="*", default=list(TABLES), choices=TABLES, help="which to measure and write")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path, default=None, help=f"folder of the results (default: {RESULTS})")
    settings = parser.parse_args(arguments)
    if settings.quick and settings.output is None:
        parser.error("--quick needs --output, so that its numbers do not stand where measured ones belong")
    settings.output = settings.output or RESULTS
    settings.size, settings.batch_size = (16, 4) if settings.quick else (32, 32)
    settings.repeats, settings.steps = (2, 4) if settings.quick else (15, 300)
    settings.seeds = min(settings.seeds, 2) if settings.quick else settings.seeds
    if not 1 <= settings.bf16_seeds <= settings.seeds:
        parser.error(f"--bf16_seeds must be between 1 and --seeds ({settings.seeds}), got {settings.bf16_seeds}")
    settings.sizes = [(n, d, 8, 2) for n, d, _, _ in SIZES] if settings.quick else list(SIZES)
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the three tables."""
    settings = parse(arguments)
    torch.set_num_threads(settings.threads)
    common = {
        "network": NETWORK,
        "size": settings.size,
        "batch_size": settings.batch_size,
        "repeats": settings.repeats,
        "steps": settings.steps,
        "sizes": settings.sizes,
        "threads": settings.threads,
        "device": str(settings.device),
    }
    store = CellStore("speed", common, root=settings.output / "cells")

    def write(name: str, title: str, rows: list[dict[str, Any]], cell: Cell, **options: Any) -> None:
        write_result(name, title, rows, **options, environment=store.environment(cell), folder=settings.output)

    if "ratios" in settings.tables:
        cell = Cell("random", "ratios", 0)
        seconds = store.run_missing([cell], lambda _: measure_ratios(settings))[cell]["seconds"]
        title = f"Training step, {settings.size} px, batch {settings.batch_size}"
        asked = [ratio_target(seconds, store.environment(cell)["threads"])]
        write("speed", title, ratio_rows(seconds, settings.batch_size), cell, targets=asked, notes=ratio_notes(seconds))

    if "throughput" in settings.tables:
        sizes = {Cell(name, "throughput", 0): (dims, size, batch) for name, dims, size, batch in settings.sizes}
        measured = store.run_missing(sizes, lambda cell: measure_throughput(*sizes[cell], settings))
        cpus = {cell.data: store.environment(cell)["cpu"] for cell in sizes}
        rows = throughput_rows({cell.data: values for cell, values in measured.items()}, cpus)
        notes = "Medians. Training is the joint step; a sampling step is one network call and one step of DDIM."
        write("speed_throughput", "Images per second", rows, next(iter(sizes)), notes=notes)

    if "loss" in settings.tables:
        name, images, labels = load_images(settings.size)
        ways = {"bf16": OURS, "fp32": SEPARATE[0]}
        # Neither the other tables' sizes nor the number of threads changes what is learnt.
        learning = {key: common[key] for key in ("network", "size", "batch_size", "steps", "device")}
        curve_store = CellStore("speed", learning, root=settings.output / "cells")
        seeds = {"bf16": settings.bf16_seeds, "fp32": settings.seeds}
        cells = [Cell(name, f"loss_{way}", seed) for way in ways for seed in range(seeds[way])]
        runs = curve_store.run_missing(
            cells, lambda cell: learn(ways[cell.method.removeprefix("loss_")], cell.seed, images, labels, settings)
        )
        curves = {way: [runs[c] for c in cells if c.method == f"loss_{way}"] for way in ways}
        rows = loss_rows(curves)
        notes = (
            f"{name}, {settings.steps} steps in windows of {min(LOSS_WINDOW, settings.steps)}; "
            f"{counted(settings.seeds, 'seed')} in fp32, the first {settings.bf16_seeds} of them in bf16: the losses "
            "of both ways are of these."
        )
        asked = [loss_target(rows, settings.steps, seeds)]
        title = "Loss of bf16 with a shared encoder call against fp32"
        write("speed_loss", title, rows, cells[0], targets=asked, notes=notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
