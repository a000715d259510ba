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

"""One network for two tasks against one network for each, on PneumoniaMNIST: the same UNet, data and number of steps.

Each cell trains the chest x-ray bundle as a user would, by options alone, and then measures the network that
validation chose: test AUC and accuracy (threshold from validation), denoising error on the test part with fixed noise,
and the distance of 2,000 samples to the test images in two feature spaces. The controls are the same network trained
for classification alone and for denoising alone.

    JOINTDIFF_DATA=... python -m benchmarks.joint_vs_single [--quick] [--seeds 3] [--work DIR]

A rerun measures only the missing cells. The non-inferiority margins stand in MARGINS, fixed before the first run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, Cell, CellStore, mean_interval, paired_difference, write_result
from benchmarks.judges import feature_spaces
from monai_jointdiff.data import open_source
from monai_jointdiff.engines import ModelDescription, SamplingInferer, ValidationPrepareBatch, draw_samples, load_weights, resolve_autocast
from monai_jointdiff.inferers import JointDiffusionInferer
from monai_jointdiff.metrics import frechet_distance, kernel_distance

DATA = "pneumoniamnist_28"
METHODS = ("joint", "classifier", "denoiser")
CONTROLS: dict[str, dict[str, Any]] = {
    "joint": {},
    "classifier": {
        "train#prepare_batch#task": "classify",
        "validate#prepare_batch#task": "classify",
        "validate#additional_metrics": "$dict()",
    },
    "denoiser": {
        "train#prepare_batch#task": "denoise",
        "validate#prepare_batch#task": "denoise",
        "validate#additional_metrics": "$dict()",
        "classify": False,
    },
}
MARGINS = {"auc": -0.005, "accuracy": -0.01, "denoising_mse": 0.03, "frechet": 0.10}  # the last two relative


def train(cell: Cell, folder: Path, epochs: int, seed: int) -> float:
    """Run the bundle by options; returns the minutes of the whole program, its report excluded for the controls."""
    dataset = Path(os.environ["JOINTDIFF_DATA"]) / f"{cell.data}.npz"
    options: dict[str, Any] = {
        "dataset_dir": dataset,
        "epochs": epochs,
        "seed": seed,
        "ckpt_dir": folder / "models",
        "output_dir": folder / "output",
        "progress": False,
        "preflight": False,
        "num_samples": 0,
        **CONTROLS[cell.method],
    }
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "bundles/chest_xray/train.json"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)
    return (time.perf_counter() - started) / 60


class Judge:
    """Measures a trained network on the test part; the images and feature spaces are shared by all cells."""

    def __init__(self, data: str, work: Path, num_samples: int) -> None:
        source = open_source(Path(os.environ["JOINTDIFF_DATA"]) / f"{data}.npz")
        prepare = source.preprocessing()
        parts = {part: [prepare(item) for item in source.part(part)] for part in ("train", "test")}
        self.images = {part: torch.stack([torch.as_tensor(i["image"]) for i in items]) for part, items in parts.items()}
        self.labels = {part: torch.as_tensor([int(i["label"]) for i in items]) for part, items in parts.items()}
        self.names = [item["name"] for item in parts["test"]]
        self.num_samples = num_samples
        cache = work / f"judge_{data}.pt"
        self.spaces = feature_spaces(self.images["train"], self.labels["train"], source.num_classes, cache)
        self.references = {name: space.extract(self.images["test"].numpy()) for name, space in self.spaces.items()}

    def denoising_mse(self, network: torch.nn.Module, inferer: JointDiffusionInferer, repeats: int = 8) -> float:
        """Mean squared error of the prediction over the test part, `repeats` fixed (noise, timestep) per image."""
        errors = []
        for repeat in range(repeats):
            prepare = ValidationPrepareBatch(inferer.scheduler, seed=1000 + repeat, task="denoise")
            batch = {"image": self.images["test"], "name": self.names}
            image, targets, _, keywords = prepare(batch, "cpu")
            with torch.no_grad():
                for rows in torch.arange(len(image)).split(128):
                    prediction = inferer(image[rows], network, **{key: value[rows] for key, value in keywords.items()})
                    errors.append((prediction - targets["target"][rows]).square().flatten(1).mean(1))
        return float(torch.cat(errors).mean())

    def distances(self, samples: np.ndarray, prefix: str = "") -> dict[str, float]:
        """Frechet and kernel distance of samples to the test images in each feature space."""
        found: dict[str, float] = {}
        for name, space in self.spaces.items():
            features = space.extract(samples)
            found[f"{prefix}frechet, {name}"] = float(frechet_distance(features, self.references[name]))
            found[f"{prefix}kernel, {name}"] = float(kernel_distance(features, self.references[name]).value)
        return found

    def floor(self) -> dict[str, float]:
        """The same distances for real training images."""
        rows = torch.randperm(len(self.images["train"]), generator=torch.Generator().manual_seed(0))[: self.num_samples]
        return self.distances(self.images["train"][rows].numpy())


def load(folder: Path) -> tuple[torch.nn.Module, ModelDescription]:
    """The network that validation chose, in eval mode."""
    description = ModelDescription.load(folder / "models" / "model.json")
    network = description.build_network()
    network.load_state_dict(load_weights(folder / "models" / "model.pt"))
    return network.eval(), description


def sample(network: torch.nn.Module, description: ModelDescription, count: int, steps: int, seed: int) -> np.ndarray:
    """Samples of the network with DPM-Solver++ in bf16 where that is the default."""
    scheduler = description.build_scheduler()
    inferer = JointDiffusionInferer(scheduler, resolve_autocast("auto", torch.device("cpu")))
    sampling = SamplingInferer(inferer, scheduler, steps)
    return draw_samples(network, sampling, description.image_shape, count, 250, seed, torch.device("cpu"), progress=False)


def measure(cell: Cell, judge: Judge, work: Path, epochs: int) -> Mapping[str, Any]:
    """Train one cell and measure it."""
    folder = work / f"{cell.data}_{cell.method}_{cell.seed}"
    values: dict[str, Any] = {"minutes": train(cell, folder, epochs)}
    network, description = load(folder)
    if cell.method != "denoiser":
        metrics = json.loads((folder / "output" / "metrics.json").read_text(encoding="utf-8"))
        values |= {name: metrics["metrics"][name]["value"] for name in ("auc", "accuracy", "balanced_accuracy", "ece")}
        values |= {"threshold": (description.decision.thresholds or [None])[0]}
    if cell.method != "classifier":
        scheduler = description.build_scheduler("ddim")
        values["denoising_mse"] = judge.denoising_mse(network, JointDiffusionInferer(scheduler))
        samples = sample(network, description, judge.num_samples, 20, seed=cell.seed)
        values |= judge.distances(samples)
    return values


def tables(store: CellStore, seeds: int, floor: Mapping[str, float]) -> None:
    """Write the result files: the figures of each method, and the paired comparison with its verdicts."""
    found = {method: store.records_of(DATA, method) for method in METHODS}
    rows = []
    for method, cells in found.items():
        keys = [key for key in next(iter(cells.values()), {}) if key != "threshold"]
        rows.append({"method": method, **{key: mean_interval([c[key] for c in cells.values()]) for key in keys}})
    rows.append({"method": "real training images (floor)", **floor})
    write_result("pneumonia", "PneumoniaMNIST 28 px, test part", rows)
