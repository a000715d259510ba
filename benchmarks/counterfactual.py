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

"""Counterfactuals judged by an independent oracle, beside controls that change as much and mean nothing.

    JOINTDIFF_DATA=... python -m benchmarks.counterfactual [--quick] [--cells METHOD:SEED ...] [--work DIR]

The joint networks are those of `benchmarks.joint_vs_single` (trained there when missing). The oracle is a plain CNN,
trained apart with blur, noise, brightness and contrast, and never used in a search. Of the test images that model and
oracle both classify rightly, a fixed number of each class is asked for the other class; the two directions are
reported apart. Every control changes each image by the same L1 as our counterfactual does: the factual reconstruction
(its change scaled), Gaussian blur, sign noise, brightness (the worse of up and down), and an adversarial change of the
same network by projected gradient descent. `two_networks` takes the same rule with a denoiser and a classifier of the
same size that were trained apart (the two-network recipe).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import joint_vs_single
from benchmarks.common import RESULTS, ROOT, Cell, CellStore, mean_interval, write_result
from benchmarks.judges import PlainCNN, disturb_strongly, gaussian_blur, train_cnn
from monai_jointdiff.data import open_source
from monai_jointdiff.engines import ModelDescription
from monai_jointdiff.inferers import CounterfactualInferer, CounterfactualResult
from monai_jointdiff.metrics import l1_distance, macro_auc, structural_similarity

DATA = "pneumoniamnist_28"
SEEDS = (0, 1, 2)
IMAGES = 100  # of each class, asked for the other one
BATCH = 50
# Timestep and probability were chosen on 30 images of the validation part, seed 0. A first look, with an unfinished
# network, was at 20 test images, and the oracle's augmentation was made milder after its test AUC had been seen (.94).
MAIN = "searched"
STEPS = {"num_inference_steps": 8, "inversion_iterations": 2}
SEARCH = {"precision": 1.5, "max_trials": 8}
METHODS: dict[str, dict[str, Any]] = {
    MAIN: {**STEPS, **SEARCH, "timestep": 600, "probability": 0.97},
    "searched_nearer": {**STEPS, **SEARCH, "timestep": 600, "probability": 0.9},
    "two_networks": {**STEPS, **SEARCH, "timestep": 600, "probability": 0.97},
}
# seed 0 alone: what each choice does; fixed strengths draw the frontier of flips against change
ABLATION: dict[str, dict[str, Any]] = {
    f"T{timestep}_scale{scale}": {**STEPS, "timestep": timestep, "probability": None, "scale": float(scale)}
    for timestep in (300, 500, 700)
    for scale in (1, 3, 10)
} | {
    "T500_scale3_noise": {**STEPS, "timestep": 500, "probability": None, "scale": 3.0, "encoding": "noise"},
    "T500_scale3_region": {**STEPS, "timestep": 500, "probability": None, "scale": 3.0, "region_fraction": 0.3},
    "T500_scale3_20steps": {**STEPS, "timestep": 500, "probability": None, "scale": 3.0, "num_inference_steps": 20},
}
ORACLE_EPOCHS = 12
PGD_STEPS = 20
Classify = Callable[[Tensor], Tensor]


class TwoNetworks(nn.Module):
    """A classifier and a denoiser that were trained apart, called as one joint network."""

    multi_label = False

    def __init__(self, classifier: Any, denoiser: nn.Module) -> None:
        super().__init__()
        self.classifier, self.denoiser = classifier, denoiser
        self.num_classes = classifier.num_classes

    def forward(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Logits of clean images, or the prediction for noisy ones."""
        return self.classifier(x) if timesteps is None else self.denoiser(x, timesteps)


def read(data: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Images in [-1, 1] and labels of each part."""
    source = open_source(Path(os.environ["JOINTDIFF_DATA"]) / f"{data}.npz")
    prepare = source.preprocessing()
    parts = {}
    for part in ("train", "val", "test"):
        items = [prepare(item) for item in source.part(part)]
        images = torch.stack([torch.as_tensor(item["image"]) for item in items]).float()
        parts[part] = (images, torch.as_tensor([int(item["label"]) for item in items]))
    return parts


def get_oracle(parts: Mapping[str, tuple[Tensor, Tensor]], cache: Path, epochs: int) -> PlainCNN:
    """The oracle, trained once."""
    images, labels = parts["train"]
    if cache.is_file():
        oracle = PlainCNN(images.shape[1], 2)
        oracle.load_state_dict(torch.load(cache, weights_only=True))
        return oracle.eval()
    oracle = train_cnn(images, labels, 2, seed=4321, epochs=epochs, disturb=disturb_strongly)
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(oracle.state_dict(), cache)
    return oracle


def probabilities(network: Classify, images: Tensor) -> Tensor:
    """(N, K), images cut to their range: nobody sees more than a screen shows."""
    with torch.no_grad():
        return torch.cat([network(batch).softmax(1) for batch in images.clamp(-1, 1).split(128)])


def get_network(method: str, seed: int, folder: Path, epochs: int) -> tuple[nn.Module, ModelDescription]:
    """The trained network of a method."""
    found = {}
    for name in ("classifier", "denoiser") if method == "two_networks" else ("joint",):
        place = folder / f"{DATA}_{name}_{seed}"
        if not (place / "output" / "summary.json").is_file():
            joint_vs_single.train(Cell(DATA, name, seed), place, epochs)
        found[name], description = joint_vs_single.load(place)
    return (found["joint"] if "joint" in found else TwoNetworks(**found)), description


# ---- controls: the same L1 as ours, image by image ------------------------------------------------------------------


def scaled_to(change: Tensor, l1: Tensor) -> Tensor:
    """A change (N, C, H, W), each image's scaled to a mean absolute value l1 (N,)."""
    present = change.abs().flatten(1).mean(1).clamp_min(1e-12)
    return change * (l1 / present).reshape(-1, 1, 1, 1)


def blurred(images: Tensor, l1: Tensor) -> Tensor:
    """Each image blurred until it has changed by l1 (by bisection), or as far as blur can go."""

    def blur(image: Tensor, target: float) -> Tensor:
        low, high = 0.1, 8.0
        for _ in range(12):
            middle = (low * high) ** 0.5
            far = float((gaussian_blur(image, middle) - image).abs().mean()) > target
            low, high = (low, middle) if far else (middle, high)
        return gaussian_blur(image, high)

    return torch.cat([blur(image[None], float(target)) for image, target in zip(images, l1, strict=True)])


def adversarial(network: Classify, images: Tensor, target: Tensor, l1: Tensor) -> Tensor:
    """Projected gradient descent (sign steps, no restart) in the ball of maximum norm 1.25 l1, then scaled to l1."""
    radius = 1.25 * l1.reshape(-1, 1, 1, 1)
    change = torch.zeros_like(images)
    for _ in range(PGD_STEPS):
        change.requires_grad_()
        loss = F.cross_entropy(network(images + change), target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, change)
        change = (change.detach() - 0.2 * radius * gradient.sign()).clamp(-radius, radius)
    return images + scaled_to(change, l1)


def controls(network: nn.Module, result: CounterfactualResult, target: Tensor, l1: Tensor) -> dict[str, list[Tensor]]:
    """Changed images by name; several where the worse one counts."""
    images = result.image
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(images.shape, generator=generator).sign()
    shift = l1.reshape(-1, 1, 1, 1)
    return {
        "reconstruction": [images + scaled_to(result.reconstruction - images, l1)],
        "blur": [blurred(images, l1)],
        "sign noise": [images + shift * signs],
        "brightness": [images + shift, images - shift],
        "adversarial": [adversarial(network, images, target, l1)],
    }


# ---- one cell --------------------------------------------------------------------------------------------------------


class Court:
    """The test images that model and oracle both classify rightly, and who judges them."""

    def __init__(self, work: Path, count: int, epochs: int) -> None:
        self.parts = read(DATA)
        self.count = count
        self.oracle = get_oracle(self.parts, work / f"oracle_{DATA}_{epochs}.pt", epochs)
        images, labels = self.parts["test"]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.images, self.labels = images[order], labels[order]
        self.oracle_right = probabilities(self.oracle, self.images).argmax(1) == self.labels
        first, second = images[order[: len(order) // 2]], images[order[len(order) // 2 :]]
        pairs = min(len(first), len(second))
        self.half_distance = 0.5 * float((first[:pairs] - second[:pairs]).abs().flatten(1).mean(1).median())

    def trial(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Images and labels, `count` of each class where there are so many."""
        right = self.oracle_right & (probabilities(network, self.images).argmax(1) == self.labels)
        chosen = [torch.nonzero(right & (self.labels == label))[: self.count, 0] for label in (0, 1)]
        index = torch.cat(chosen)
        return self.images[index], self.labels[index]

    def about_oracle(self) -> dict[str, Any]:
        """How good the oracle is, and how often changes of half the distance of two images flip it."""
        found: dict[str, Any] = {"half distance": self.half_distance}
        for part in ("val", "test"):
            images, labels = self.parts[part]
            found[f"{part} auc"] = macro_auc(probabilities(self.oracle, images), labels)
        images, labels = (x[self.oracle_right] for x in (self.images, self.labels))
        for amount in (0.05, 0.5 * self.half_distance, self.half_distance):
            l1 = torch.full((len(images),), amount)
            shift = l1.reshape(-1, 1, 1, 1)
            noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).sign()
            disturbed = {
                "blur": blurred(images, l1),
                "sign noise": images + shift * noise,
                "brighter": images + shift,
                "darker": images - shift,
            }
            for name, changed in disturbed.items():
                flipped = probabilities(self.oracle, changed).argmax(1) != labels
                shares = [float(flipped[labels == label].double().mean()) for label in (0, 1)]
                found[f"flipped by {name} at L1 {amount:.3f}"] = shares
        return found


def measure(
    method: str, options: Mapping[str, Any], seed: int, court: Court, folder: Path, epochs: int
) -> dict[str, Any]:
    """Counterfactuals of one network by one rule, and the controls beside them."""
    network, description = get_network(method, seed, folder, epochs)
    images, labels = court.trial(network)
    inferer = CounterfactualInferer(description.build_scheduler("ddim"), **options)
    judges = {"model": network, "oracle": court.oracle}
    flips: dict[str, list[Tensor]] = {}
    numbers: dict[str, list[Tensor]] = {"l1": [], "l1 of reconstruction": [], "ssim": [], "scale": []}
    calls, seconds = [], 0.0
    for batch, label in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        result = inferer(batch, network, target=1 - label)
        l1 = torch.as_tensor(l1_distance(result.counterfactual.clamp(-1, 1), batch)).float()
        shown = {"ours": [result.counterfactual]} | controls(network, result, 1 - label, l1)
        for judge, judging in judges.items():
            for name, versions in shown.items():
                flipped = torch.stack([probabilities(judging, v).argmax(1) != label for v in versions])
                flips.setdefault(f"{judge}, {name}", []).append(flipped)
        numbers["l1"].append(l1)
        numbers["l1 of reconstruction"].append(torch.as_tensor(l1_distance(result.reconstruction, batch)))
        numbers["ssim"].append(torch.as_tensor(structural_similarity(result.counterfactual.clamp(-1, 1), batch)))
        numbers["scale"].append(torch.tensor(result.record.scale))
        calls.append(result.network_calls)
        seconds += result.seconds
    values: dict[str, Any] = {
        "options": dict(options),
        "calls per image": sum(calls) / len(calls),
        "images/s": len(images) / seconds,
    }
    for label, direction in ((0, "normal to pneumonia"), (1, "pneumonia to normal")):
        mask = labels == label
        values[direction] = {
            "images": int(mask.sum()),
            **{name: float(torch.cat(found)[mask].median()) for name, found in numbers.items()},
            # of several versions the one that flips more counts
            **{name: float(torch.cat(f, 1)[:, mask].double().mean(1).max()) for name, f in flips.items()},
        }
    return values


# ---- tables ----------------------------------------------------------------------------------------------------------

NULL_CONTROLS = ("reconstruction", "blur", "sign noise", "brightness")
DIRECTIONS = ("normal to pneumonia", "pneumonia to normal")


def row(name: str, direction: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line of the table: the mean over seeds of one direction."""

    def figure(key: str) -> dict[str, Any]:
        return mean_interval([cell[direction][key] for cell in cells])

    excess = [c[direction]["oracle, ours"] - max(c[direction][f"oracle, {n}"] for n in NULL_CONTROLS) for c in cells]
    return {
        "method": name,
        "direction": direction,
        "flips, model": figure("model, ours"),
        "flips, oracle": figure("oracle, ours"),
        "median L1": figure("l1"),
        "L1 of reconstruction": figure("l1 of reconstruction"),
        **{f"{n} (oracle)": figure(f"oracle, {n}") for n in (*NULL_CONTROLS, "adversarial")},
        "excess over best null control": mean_interval(excess),
        "calls": mean_interval([cell["calls per image"] for cell in cells]),
    }


def missed(rows: Sequence[Mapping[str, Any]], half_distance: float) -> list[str]:
    """The targets that the main method misses, direction by direction, by the means over seeds."""
    found = []
    for line in (line for line in rows if line["method"] == MAIN):
        oracle, l1 = line["flips, oracle"]["mean"], line["median L1"]["mean"]
        verdicts = {
            "model flips": line["flips, model"]["mean"] >= 0.99,
            "oracle flips": oracle >= 0.90,
            "L1": l1 < half_distance,
            "excess": line["excess over best null control"]["mean"] >= 0.60,
            "distance to adversarial": line["adversarial (oracle)"]["mean"] <= oracle - 0.40,
        }
        found += [f"{name} ({line['direction']})" for name, met in verdicts.items() if not met]
    return found


def tables(store: CellStore, court: Court) -> None:
    """Write the result files from the cells there are."""
    rows, seeds = [], {}
    for method in METHODS:
        found = [values for seed in SEEDS if (values := store.get(Cell(DATA, method, seed)))]
        seeds[method] = len(found)
        rows += [row(method, direction, found) for direction in DIRECTIONS if found]
    notes = [
        f"Seeds measured: {', '.join(f'{m}: {n} of {len(SEEDS)}' for m, n in seeds.items())}; {IMAGES} test images a "
        "direction that model and oracle both classify rightly.",
        f"Half the median L1 of two test images: {court.half_distance:.3f}. Controls change each image by the L1 of "
        "our counterfactual; columns give the share of images that flip the oracle.",
        "The oracle's augmentation was made milder after its test AUC had been seen (0.94); timestep and probability "
        "were chosen on 30 validation images, after a first look at 20 test images with an unfinished network.",
        f"Machines of the cells: {', '.join(joint_vs_single.machines(store))}; on each an oracle of its own, trained "
        "by the same recipe.",
        "Targets, in the smaller direction: model at least 0.99, oracle at least 0.90, L1 below half the distance, "
        "excess at least 0.60, adversarial at least 0.40 below ours.",
    ]
    if rows:
        notes.append(f"Missed by {MAIN}: {', '.join(missed(rows, court.half_distance)) or 'nothing'}.")
        write_result("counterfactual", "Counterfactuals on PneumoniaMNIST", rows, notes=notes)
    single = {name: values for name in ABLATION if (values := store.get(Cell(DATA, name, 0)))}
    rows = [row(name, direction, [values]) for name, values in single.items() for direction in DIRECTIONS]
    if rows:
        title = "Counterfactuals: timestep, strength, encoding, region, steps"
        missing = [name for name in ABLATION if name not in single]
        about = f"Seed 0 alone. Not run: {', '.join(missing) or 'nothing'}."
        write_result("counterfactual_ablation", title, rows, notes=about)
    rows = [{"figure": name, "value": _text(value)} for name, value in court.about_oracle().items()]
    about = "Shares are of normal and of pneumonia images that the oracle classifies rightly. Target: below 0.10."
    write_result("counterfactual_oracle", "The oracle", rows, notes=about)


def _text(value: Any) -> Any:
    return " / ".join(f"{share:.3f}" for share in value) if isinstance(value, list) else value


def main() -> None:
    """Measure the missing cells and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, tiny trainings: proves the script")
    parser.add_argument("--cells", nargs="*", help="method:seed of the cells to measure; none: all")
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="folder for networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    folder = options.work / "joint_vs_single" / ("quick" if options.quick else "")
    count, epochs, oracle_epochs = (4, 1, 1) if options.quick else (IMAGES, joint_vs_single.EPOCHS, ORACLE_EPOCHS)
    court = Court(options.work / "counterfactual", count, oracle_epochs)
    grid = [(name, seed) for seed in SEEDS for name in METHODS] + [(name, 0) for name in ABLATION]
    if options.quick:
        grid = [(MAIN, 0), ("T300_scale3", 0)]
    if options.cells is not None:
        grid = [(name, seed) for name, seed in grid if f"{name}:{seed}" in options.cells]
    settings = {"images": count, "epochs": epochs, "oracle epochs": oracle_epochs}
    root = options.work / "counterfactual" / "quick" if options.quick else RESULTS / "cells"
    store = CellStore("counterfactual", settings, root)
    every = {**METHODS, **ABLATION}
    cells = [Cell(DATA, name, seed) for name, seed in grid]
    store.run_missing(cells, lambda c: measure(c.method, every[c.method], c.seed, court, folder, epochs))
    if not options.quick:
        tables(store, court)


if __name__ == "__main__":
    main()
