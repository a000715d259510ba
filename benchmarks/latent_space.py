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

"""Latents against pixels on ham10000_64: images per second, what the autoencoder loses, accuracy with all labels.

Three trainings by the skin lesion bundle (autoencoder, joint model on its latents, joint model on pixels; the same
number of epochs for both joint models), and the speed of both joint models in one run, in turn.

    JOINTDIFF_DATA=... python -m benchmarks.latent_space [--quick] [--cells autoencoder latent ...] [--work DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import ROOT, Cell, CellStore, Target, train_bundle, write_result
from benchmarks.joint_vs_single import load
from monai_jointdiff.engines import SamplingInferer, draw_samples, space_of_model
from monai_jointdiff.inferers import JointDiffusionInferer

DATA = "ham10000_64"
EPOCHS = {"autoencoder": 10, "pixel": 8, "latent": 8}
AUTOENCODER = {"autoencoder_def#channels": [16, 32, 32]}  # half of the default: minutes on a CPU
NETWORK = {"network_def#channels": [16, 32, 64], "network_def#num_head_channels": 16}  # of both joint models
SELECTION = {"best#metric_name": "val_auc", "best#larger_is_better": True}
CELLS = ("autoencoder", "latent", "pixel", "speed")
FIGURES = {"auc": "macro AUC", "balanced_accuracy": "balanced accuracy", "accuracy": "accuracy"}
BATCH, STEPS = 32, 20  # images at once; steps of DPM-Solver++
CPU = torch.device("cpu")


def train(configs: Sequence[str], folder: Path, options: Mapping[str, Any], quick: bool) -> float:
    """Train by options alone; returns the minutes of the whole program."""
    dataset = Path(os.environ["JOINTDIFF_DATA"]) / f"{DATA}.npz"
    short = {"epochs": 1, "train#epoch_length": 4} if quick else {}
    files = [f"skin_lesion/{name}.json" for name in configs]
    return train_bundle(files, folder, {"dataset_dir": dataset, "preflight": False, **options, **short})


def autoencoder(work: Path, quick: bool) -> dict[str, Any]:
    """Train the first stage; how near its reconstructions of test images are."""
    options = {"epochs": EPOCHS["autoencoder"], **AUTOENCODER}
    minutes = train(["train_autoencoder"], work / "autoencoder", options, quick)
    summary = json.loads((work / "autoencoder" / "output" / "summary.json").read_text(encoding="utf-8"))
    return {"minutes": minutes, **{name: summary[f"test {name}"] for name in ("l1", "psnr", "ssim")}}


def joint(space: str, work: Path, quick: bool) -> dict[str, Any]:
    """Train a joint model; its figures on the test part."""
    options = {
        "epochs": EPOCHS[space],
        "num_samples": 0,
        "counterfactual_pictures": 0,
        **NETWORK,
        **SELECTION,
    }
    configs = ["train"]
    if space == "latent":
        configs += ["train_latent"]
        options["autoencoder"] = work / "autoencoder" / "models"
    minutes = train(configs, work / space, options, quick)
    metrics = json.loads((work / space / "output" / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    return {"minutes": minutes, **{name: metrics[name]["value"] for name in FIGURES}}


class Joint:
    """A trained joint model whose training step and sampling are timed."""

    def __init__(self, folder: Path) -> None:
        self.network, self.description = load(folder)
        self.space = space_of_model(self.description, folder / "models", CPU)
        self.scheduler = self.description.build_scheduler()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-5)
        space = {"autoencoder": self.space.autoencoder, "scale_factor": self.space.scale_factor}
        self.sampling = SamplingInferer(JointDiffusionInferer(self.scheduler, **space), self.scheduler, STEPS)

    def train(self, images: Tensor, views: Tensor, labels: Tensor) -> None:
        """One optimizer step, from images for the noise and their views for the head: encoding of both included."""
        with torch.no_grad():
            start, clean = self.space.encode(images), self.space.encode(views)
        noise, timesteps = torch.randn_like(start), torch.randint(0, 1000, (len(start),))
        noisy = self.scheduler.add_noise(start, noise, timesteps)
        output = self.network.train()(noisy, timesteps, clean=clean)
        loss = F.mse_loss(output.prediction, noise) + 0.005 * F.cross_entropy(output.logits, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sample(self) -> None:
        """Draw a batch of images: decoding included."""
        shape = self.description.noise_shape
        draw_samples(self.network.eval(), self.sampling, shape, BATCH, BATCH, 0, CPU, progress=False)


def speed(work: Path, repeats: int) -> dict[str, Any]:
    """Images per second of both, in turn, median of the repeats.

    Seconds of the processor on one thread: what other programs do meanwhile counts little.
    """
    torch.set_num_threads(1)
    models = {space: Joint(work / space) for space in ("pixel", "latent")}
    images, views = torch.rand(2, BATCH, 3, 64, 64) * 2 - 1
    labels = torch.randint(0, 7, (BATCH,))
    seconds: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):  # the first is a warm-up
        for space, model in models.items():
            for name, call in (("training", lambda: model.train(images, views, labels)), ("sampling", model.sample)):  # noqa: B023
                started = time.process_time()
                call()
                if repeat:
                    seconds.setdefault(f"{space} {name}", []).append(time.process_time() - started)
    return {name: BATCH / statistics.median(found) for name, found in seconds.items()}


def compare(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for pixels and one for latents.

    Args:
        found: values by cell; what is missing is left empty.
    """
    rows = []
    for space in ("pixel", "latent"):
        row: dict[str, Any] = {"diffusion on": "latents, 4 x 16 x 16" if space == "latent" else "pixels, 3 x 64 x 64"}
        for name in ("training", "sampling"):
            row[f"{name}, images/s"] = found.get("speed", {}).get(f"{space} {name}")
        row |= {title: found.get(space, {}).get(name) for name, title in FIGURES.items()}
        row["minutes"] = found.get(space, {}).get("minutes")
        row |= {title: None for title in ("PSNR, dB", "SSIM")}
        if space == "latent" and "autoencoder" in found:
            row |= {"PSNR, dB": found["autoencoder"]["psnr"], "SSIM": found["autoencoder"]["ssim"]}
        rows.append(row)
    return rows


def target(found: Mapping[str, Mapping[str, Any]]) -> Target:
    """What was asked: the figures of both, whatever they are.

    Args:
        found: values by cell.
    """
    words = (f"latents against pixels, {DATA}", "images/s, reconstruction, accuracy with all labels reported")
    missing = [name for name in CELLS if name not in found]
    if missing:
        return Target(*words, "", None, f"without {', '.join(missing)}")
    speed, auc = found["speed"], "{:.3f} against {:.3f}".format(*(found[s]["auc"] for s in ("latent", "pixel")))
    times = [f"{name} {speed[f'latent {name}'] / speed[f'pixel {name}']:.1f}" for name in ("training", "sampling")]
    first_stage = found["autoencoder"]
    return Target(
        *words,
        f"times as fast: {', '.join(times)}; PSNR {first_stage['psnr']:.1f} dB, SSIM {first_stage['ssim']:.3f}; "
        f"macro AUC {auc}",
        True,
        "one seed, one thread",
    )


def tables(store: CellStore) -> None:
    """Write the result file from the cells there are."""
    cells = {name: Cell(DATA, name, 0) for name in CELLS}
    found = {name: values for name, cell in cells.items() if (values := store.get(cell)) is not None}
    if not found:
        print("not measured yet: no table")
        return
    notes = [
        f"One seed; {EPOCHS['pixel']} epochs, network [16, 32, 64] on both, batch {BATCH}; sampling with {STEPS} steps "
        "of DPM-Solver++; speed per second of processor time, one thread. Training counts the encoding of images and "
        "of the views for the head, sampling the decoding. PSNR and SSIM: "
        f"reconstruction of test images by the autoencoder, itself trained for {EPOCHS['autoencoder']} epochs"
        + (f" ({found['autoencoder']['minutes']:.1f} minutes)." if "autoencoder" in found else ".")
    ]
    write_result(
        "latent_space",
        "Latents against pixels, ham10000_64, all labels",
        compare(found),
        targets=[target(found)],
        notes=notes,
        environment=store.environment(cells[list(found)[-1]]),  # that of the speed
    )


def main() -> None:
    """Measure the missing cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps each: proves the script, writes nothing")
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=[*CELLS, "none"])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "latent_space", help="folder for the trainings")
    options = parser.parse_args()
    work = options.work / "quick" if options.quick else options.work
    root = {"root": work} if options.quick else {}
    store = CellStore("latent_space", {"epochs": EPOCHS, **AUTOENCODER, **NETWORK, **SELECTION}, **root)
    measures = {
        "autoencoder": lambda: autoencoder(work, options.quick),
        "latent": lambda: joint("latent", work, options.quick),
        "pixel": lambda: joint("pixel", work, options.quick),
        "speed": lambda: speed(work, 1 if options.quick else 7),
    }
    wanted = [Cell(DATA, name, 0) for name in CELLS if name in options.cells]
    store.run_missing(wanted, lambda cell: measures[cell.method]())
    if not options.quick:
        tables(store)


if __name__ == "__main__":
    main()
