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

"""The diffusion classifier on PneumoniaMNIST: accuracy against calls, stopping, uncertainty, unusual images, speed.

Each seed trains the chest x-ray bundle with the overlay `train_conditional.json`, so that one network has a head and a
class condition, and then records the errors of random draws: `DRAWS` of each of `IMAGES` test images, drawn once, and
`FEW` of each test image. Curves and stopping rules are read off the recordings (a test of the inferer shows that it
decides as its recorded errors say); stratified draws are run.

    JOINTDIFF_DATA=... python -m benchmarks.diffusion_classifier [--quick] [--cells curve:0 ...] [--work DIR]

A rerun measures only the missing cells; recordings are kept in the work folder, in blocks.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.common import (
    RESULTS,
    ROOT,
    Cell,
    CellStore,
    mean_interval,
    paired_difference,
    train_bundle,
    write_result,
)
from benchmarks.joint_vs_single import load
from monai_jointdiff.data import draw_seed, make_phantoms, open_source
from monai_jointdiff.inferers import DenoisingProfile, DiffusionClassifierInferer, Typicality, aggregate, count_votes
from monai_jointdiff.metrics import (
    Interval,
    MomentsDetector,
    PrincipalComponentDetector,
    accuracy_at_coverage,
    area_under_risk_coverage,
    area_under_roc,
    brier_score,
    choose_threshold,
    detection_report,
    expected_calibration_error,
    fit_temperature,
    max_softmax_score,
)
from monai_jointdiff.visualize import accuracy_against_calls_figure, save_figure

DATA = "pneumoniamnist_28"
SEEDS = (0, 1, 2)
CHANNELS = [16, 32, 64]  # a small network: the recordings take half a million evaluations
EPOCHS = 6
NUMBERS = (1, 3, 5, 11, 25, 51, 101, 251, 501)
PUBLISHED = (67.0, 71.6, 75.0, 80.0, 81.6, 83.5, 84.4, 84.8, 85.0)  # UNet, CheXpert, majority (Favero et al.)
DRAWS, IMAGES, FEW = 501, 150, 25
BLOCK = 50  # images of a recording that are kept together
RULES = ("majority", "mean")
ERROR_RATES = (0.001, 0.01, 0.05, 0.1, 0.2)
TRUSTS = (0.9, 0.99)
KINDS = ("curve", "stopping", "answers", "unusual", "throughput")


@dataclass(frozen=True)
class Part:
    """Images (N, 1, 28, 28) of a part of the data, their labels (N,), and the seeds of their draws."""

    images: Tensor
    labels: Tensor
    seeds: list[int]

    def take(self, rows: Sequence[int]) -> Part:
        """Some of the images."""
        index = list(rows)
        return Part(self.images[index], self.labels[index], [self.seeds[i] for i in index])


def read(part: str) -> Part:
    """A part of the data as the bundle prepares it."""
    source = open_source(Path(os.environ["JOINTDIFF_DATA"]) / f"{DATA}.npz")
    prepare = source.preprocessing()
    items = [prepare(item) for item in source.part(part)]
    images = torch.stack([torch.as_tensor(item["image"]) for item in items])
    labels = torch.as_tensor([int(item["label"]) for item in items])
    return Part(images.float(), labels, [draw_seed(0, 0, f"classify/{item['name']}") for item in items])


def train(seed: int, folder: Path, quick: bool) -> None:
    """Run the bundle with its overlay by options alone, where there is no trained network yet."""
    if (folder / "output" / "metrics.json").is_file():
        return
    options: dict[str, Any] = {
        "dataset_dir": Path(os.environ["JOINTDIFF_DATA"]) / f"{DATA}.npz",
        "seed": seed,
        "epochs": 1 if quick else EPOCHS,
        "network_def#channels": CHANNELS,
        "num_samples": 0,
        "counterfactual_pictures": 0,
        "picture_interval": EPOCHS,
    }
    if quick:
        options["train#epoch_length"] = 5
    train_bundle(["chest_xray/train.json", "chest_xray/train_conditional.json"], folder, options)


class Subject:
    """A trained network, the data, and what has been recorded of it.

    Args:
        seed: of the network.
        work: folder of networks and recordings.
        quick: few images and draws.
    """

    def __init__(self, seed: int, work: Path, quick: bool) -> None:
        self.folder = work / f"{DATA}_{seed}"
        train(seed, self.folder, quick)
        self.network, self.description = load(self.folder)
        self.scheduler = self.description.build_scheduler("ddim")
        self.val, self.test = read("val"), read("test")
        few = 12 if quick else IMAGES
        order = torch.randperm(len(self.test.images), generator=torch.Generator().manual_seed(0)).tolist()
        self.chosen = order[:few]  # the fixed part of the test images
        self.rest = order[few : few + 12] if quick else order[few:]
        if quick:
            self.val = self.val.take(range(24))
        self.draws, self.few = (9, 5) if quick else (DRAWS, FEW)

    def inferer(self, num_draws: int, **options: Any) -> DiffusionClassifierInferer:
        """A diffusion classifier for this network."""
        return DiffusionClassifierInferer(self.scheduler, num_draws, **options)

    def recorded(self, name: str, part: Part, num_draws: int) -> Tensor:
        """Errors (N, K, D) of random draws, from the files of the blocks or measured now."""
        blocks = []
        for begin in range(0, len(part.images), BLOCK):
            path = self.folder / "recordings" / f"{name}_{num_draws}_{begin:04d}.npy"
            if not path.is_file():
                path.parent.mkdir(exist_ok=True)
                some = part.take(range(begin, min(begin + BLOCK, len(part.images))))
                result = self.inferer(num_draws, draws="random")(some.images, self.network, seed=some.seeds)
                np.save(path.with_suffix(".part.npy"), result.draw_errors.numpy())
                path.with_suffix(".part.npy").replace(path)
                print(f"recorded {path.name}: {result.seconds:.0f} s", flush=True)
            blocks.append(torch.as_tensor(np.load(path)))
        return torch.cat(blocks)

    def of_chosen(self) -> Tensor:
        """All draws of the fixed part."""
        return self.recorded("chosen", self.test.take(self.chosen), self.draws)

    def of_test(self) -> tuple[Tensor, Tensor]:
        """The first draws of every test image, and the labels."""
        rest = self.recorded("rest", self.test.take(self.rest), self.few)
        errors = torch.cat([self.of_chosen()[:, :, : self.few], rest])
        return errors, self.test.labels[self.chosen + self.rest]

    def head_logits(self, images: Tensor) -> Tensor:
        """Logits (N, K) of the head."""
        with torch.no_grad():
            return torch.cat([self.network(part) for part in images.split(256)])


def accuracy(errors: Tensor, labels: Tensor, rule: str) -> float:
    """Accuracy of a rule on recorded errors."""
    return float((aggregate(errors, rule).argmax(1) == labels).double().mean())


def curve(subject: Subject) -> dict[str, Any]:
    """Accuracy of the first n random draws of the fixed part, and of the whole test part where there are as many."""
    chosen, labels = subject.of_chosen(), subject.test.labels[subject.chosen]
    errors, all_labels = subject.of_test()
    numbers = [n for n in NUMBERS if n <= subject.draws]
    values: dict[str, Any] = {}
    for rule in RULES:
        values[rule] = {str(n): accuracy(chosen[:, :, :n], labels, rule) for n in numbers}
        whole = [n for n in numbers if n <= subject.few]
        values[f"{rule}, whole test part"] = {str(n): accuracy(errors[:, :, :n], all_labels, rule) for n in whole}
    return values


def replay(inferer: DiffusionClassifierInferer, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Answers (N,) and calls (N,) of an inferer that had drawn these errors (N, K, D)."""
    running = torch.ones(errors.shape[:2], dtype=torch.bool)
    seen = torch.full_like(errors, torch.nan)
    made = 0
    for look in inferer.looks():
        running &= running.sum(1, keepdim=True) > 1
        if not bool(running.any()):
            break
        seen[:, :, made:look] = torch.where(running[..., None], errors[:, :, made:look], torch.nan)
        made, active = look, running.any(1)
        running[active] &= inferer.still_running(seen[active][:, :, :made])
    return aggregate(seen, inferer.rule).argmax(1), (~seen.isnan()).flatten(1).sum(1)


def stopping(subject: Subject) -> dict[str, Any]:
    """Calls and agreement of cheaper classifiers with all random draws of the same rule, on the fixed part."""
    part, errors = subject.test.take(subject.chosen), subject.of_chosen()
    rows: dict[str, Any] = {}

    def row(name: str, rule: str, answers: Tensor, calls: Tensor) -> None:
        full = aggregate(errors, rule).argmax(1)
        right, was_right = answers == part.labels, full == part.labels
        rows[f"{rule}, {name}"] = {
            "calls": float(calls.double().mean()),
            "agreement": float((answers == full).double().mean()),
            "accuracy": float(right.double().mean()),
            "accuracy difference": float(right.double().mean() - was_right.double().mean()),
            "better and worse": [int((right & ~was_right).sum()), int((~right & was_right).sum())],
        }

    for rule in RULES:
        row("all draws", rule, aggregate(errors, rule).argmax(1), torch.tensor([2.0 * subject.draws]))
        for rate in ERROR_RATES:
            inferer = subject.inferer(subject.draws, rule=rule, error_rate=rate)
            row(f"random draws, error rate {rate}", rule, *replay(inferer, errors))
        for rate in (0.01, 0.05):
            result = subject.inferer(subject.draws, rule=rule, error_rate=rate)(
                part.images, subject.network, seed=part.seeds
            )
            row(f"stratified draws, error rate {rate}", rule, result.prediction, result.network_calls)
            if rate == 0.05:
                for trust in TRUSTS:
                    options = {"rule": rule, "error_rate": rate, "head": "nominate", "trust": trust}
                    found = subject.inferer(subject.draws, **options)(part.images, subject.network, seed=part.seeds)
                    name = f"stratified draws, error rate {rate}, head nominates at {trust}"
                    row(name, rule, found.prediction, found.network_calls)
    head = subject.head_logits(part.images).argmax(1)
    row("the head alone", "majority", head, torch.tensor([1.0]))
    row("the head alone", "mean", head, torch.tensor([1.0]))
    half = errors.shape[-1] // 2
    for rule in RULES:  # how far two classifiers agree that differ in their draws only
        one, other = (aggregate(half_of, rule).argmax(1) for half_of in (errors[:, :, :half], errors[:, :, half:]))
        right, was_right = one == part.labels, other == part.labels
        rows[f"{rule}, first half of the draws against the second"] = {
            "calls": 2.0 * half,
            "agreement": float((one == other).double().mean()),
            "accuracy": float(right.double().mean()),
            "accuracy difference": float(right.double().mean() - was_right.double().mean()),
            "better and worse": [int((right & ~was_right).sum()), int((~right & was_right).sum())],
        }
    return rows


def answers(subject: Subject) -> dict[str, Any]:
    """Head, votes, mean and their products on the whole test part; temperature and threshold from validation."""
    errors, labels = subject.of_test()
    images = subject.test.images[subject.chosen + subject.rest]
    val_errors = subject.recorded("val", subject.val, subject.few)
    started = time.perf_counter()
    head = subject.head_logits(images).double()
    head_seconds = (time.perf_counter() - started) / len(images)
    val_head = subject.head_logits(subject.val.images).double()

    def share_logits(e: Tensor) -> Tensor:
        return ((count_votes(e) + 1) / (e.shape[-1] + e.shape[1])).log()

    def mean_logits(e: Tensor) -> Tensor:
        return aggregate(e, "mean")

    head_scale = fit_temperature(val_head, subject.val.labels)
    rows: dict[str, Any] = {}
    for name, logits in {"head": None, "majority": share_logits, "mean": mean_logits}.items():
        if logits is None:
            combined = {"head": (val_head / head_scale, head / head_scale)}
        else:
            scale = fit_temperature(logits(val_errors), subject.val.labels)
            alone = (logits(val_errors) / scale, logits(errors) / scale)
            both = (alone[0] + val_head / head_scale, alone[1] + head / head_scale)
            combined = {name: alone, f"head and {name}": both}
        for method, (val_scores, scores) in combined.items():
            val_p, p = val_scores.softmax(1), scores.softmax(1)
            right = (p.argmax(1) == labels).double().numpy()
            unsure = 1 - p.amax(1).numpy()
            threshold = choose_threshold(val_p, subject.val.labels)
            rows[method] = {
                "accuracy": float(right.mean()),
                "accuracy, threshold from validation": float(((p[:, 1] >= threshold) == labels).double().mean()),
                "auc": float(area_under_roc(p[:, 1], labels)),
                "ece": float(expected_calibration_error(p, labels)),
                "brier": float(brier_score(p, labels)),
                "aurc": float(area_under_risk_coverage(unsure, right)),
                "accuracy at 80 % coverage": float(accuracy_at_coverage(unsure, right, 0.8)),
                "accuracy at 50 % coverage": float(accuracy_at_coverage(unsure, right, 0.5)),
                "calls": (method != "majority" and method != "mean") + (method != "head") * 2.0 * subject.few,
            }
    rows["head"]["seconds"] = head_seconds
    return rows


def others(count: int, test: Tensor) -> dict[str, Tensor]:
    """Images of other kinds, brought to 28 x 28 gray pixels by one filter (area averages).

    The test images themselves, enlarged and brought back by that filter, show what it does by itself.
    """
    enlarged = torch.nn.functional.interpolate(test[:count], size=64, mode="bicubic")
    found = {"test images, resampled": torch.nn.functional.interpolate(enlarged, size=28, mode="area")}
    for name in ("ham10000_64", "busi_64", "kermany_cxr_64"):
        with np.load(Path(os.environ["JOINTDIFF_DATA"]) / f"{name}.npz") as file:
            images = torch.as_tensor(file["test_images"]).double()
        gray = images.mean(-1) if images.ndim == 4 else images
        found[name] = torch.nn.functional.interpolate(gray[:, None] / 127.5 - 1, size=28, mode="area").float()[:count]
    phantoms = make_phantoms("chest", 2, 64, 0)
    drawn = torch.stack([torch.as_tensor(phantoms(n).image) for n in range(min(count, 300))]).double() / 127.5 - 1
    found["phantoms"] = torch.nn.functional.interpolate(drawn, size=28, mode="area").float()
    return found


def unusual(subject: Subject, count: int) -> dict[str, Any]:
    """AUROC of telling other kinds of images from the test images; every score is fitted on the validation part."""
    profile = DenoisingProfile(subject.scheduler)
    usual = Typicality.fit(profile(subject.val.images, subject.network))
    moments = MomentsDetector().fit(subject.val.images)
    components = PrincipalComponentDetector(min(64, len(subject.val.images) // 2)).fit(subject.val.images)
    scores = {
        "errors, 5 calls": lambda x: usual.score(profile(x, subject.network)),
        "max-softmax": lambda x: max_softmax_score(subject.head_logits(x).softmax(1)),
        "no model: mean, std, gradient": moments.score,
        "no model: PCA residual": components.score,
    }
    test = subject.test.images[: len(subject.test.images) if count > 100 else 24]
    return {
        kind: {
            name: detection_report(score(test), score(images), bootstrap=0).auroc.value
            for name, score in scores.items()
        }
        for kind, images in others(count, test).items()
    }


def throughput(subject: Subject) -> dict[str, Any]:
    """Images per second: one call at a time, in batches, and with stopping as well, in one run."""
    few = subject.test.take(subject.chosen[:3])
    many = subject.test.take(subject.chosen[: 12 if subject.draws < DRAWS else 60])
    number = subject.draws
    single = subject.inferer(number, max_batch=1)(few.images, subject.network, seed=few.seeds)
    batched = subject.inferer(number)(few.images, subject.network, seed=few.seeds)
    stopped = subject.inferer(number, error_rate=0.05)(many.images, subject.network, seed=many.seeds)
    rate = {
        "one call at a time": len(few.images) / single.seconds,
        "batched": len(few.images) / batched.seconds,
        "batched, stopping": len(many.images) / stopped.seconds,
    }
    return {
        "images per second": rate,
        "evaluations per second": {"one call at a time": 2 * number * rate["one call at a time"]}
        | {"batched": 2 * number * rate["batched"]},
        "batching alone": rate["batched"] / rate["one call at a time"],
        "batching and stopping": rate["batched, stopping"] / rate["one call at a time"],
        "same answers": bool((single.prediction == batched.prediction).all()),
    }


def measure(cell: Cell, work: Path, quick: bool) -> Mapping[str, Any]:
    """One cell."""
    subject = Subject(cell.seed, work, quick)
    if cell.method == "unusual":
        return unusual(subject, 24 if quick else 600)
    kinds = {"curve": curve, "stopping": stopping, "answers": answers, "throughput": throughput}
    return kinds[cell.method](subject)


def tables(store: CellStore) -> None:
    """Write the result files from the cells that are there."""
    found = {kind: {s: v for s in SEEDS if (v := store.get(Cell(DATA, kind, s))) is not None} for kind in KINDS}
    writers = {
        "curve": curve_table,
        "stopping": stopping_table,
        "answers": answers_table,
        "unusual": unusual_table,
        "throughput": throughput_table,
    }
    for kind, cells in found.items():
        if cells:
            writers[kind](cells)


def _measured(cells: Mapping[int, Any]) -> str:
    number = f"{len(cells)} of {len(SEEDS)} seeds measured"
    return f"{number}; mean and 95 % t-interval over seeds where there are several."


NETWORK = f"Network of channels {CHANNELS}, {EPOCHS} epochs with the overlay train_conditional.json."


def curve_table(cells: Mapping[int, Any]) -> None:
    """Accuracy by number of draws, beside the published curve."""
    rows = []
    for n, published in zip(NUMBERS, PUBLISHED, strict=True):
        by_seed = {rule: {seed: cell[rule][str(n)] for seed, cell in cells.items()} for rule in RULES}
        difference = paired_difference(by_seed["mean"], by_seed["majority"])
        rows.append(
            {
                "draws": n,
                "calls": 2 * n,
                **{rule: mean_interval(list(by_seed[rule].values())) for rule in RULES},
                "mean - majority": {key: difference[key] for key in ("mean", "low", "high", "n")},
                "published (UNet, CheXpert, majority)": published / 100,
            }
        )
    share = f"All seeds share the {IMAGES} fixed test images, whose own standard error (3 points at 0.85) comes on top."
    notes = [f"{_measured(cells)} {NETWORK} Random draws. {share}", *_remarks(rows)]
    write_result("diffusion_curve", "Accuracy of the diffusion classifier by draws", rows, notes=notes)
    if len(cells) > 1:
        picture(rows)


def picture(rows: Sequence[Mapping[str, Any]]) -> None:
    """The picture of the documents, `docs/figures/diffusion_calls.png`."""

    def points(rule: str) -> dict[float, Interval]:
        return {row["calls"]: Interval(row[rule]["mean"], row[rule]["low"], row[rule]["high"]) for row in rows}

    published = {row["calls"]: row["published (UNet, CheXpert, majority)"] for row in rows}
    curves = {f"{rule}, PneumoniaMNIST": points(rule) for rule in RULES}
    figure = accuracy_against_calls_figure(curves, {"published: majority, CheXpert": published})
    save_figure(figure, ROOT / "docs" / "figures" / "diffusion_calls.png", dpi=100)


def _remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rank correlation with the published curve, and where each rule comes within a point of its end."""
    ours = [row["majority"]["mean"] for row in rows]
    correlation = spearmanr(ours, PUBLISHED)[0]
    remarks = [f"Spearman correlation of the majority curve with the published one: {correlation:.2f}; both rise."]
    for rule in RULES:
        means = [row[rule]["mean"] for row in rows]
        near = [abs(value - means[-1]) <= 0.01 for value in means]
        first = next(n for i, n in enumerate(NUMBERS) if all(near[i:]))
        where = f"from {first} draws on" if first < NUMBERS[-1] else "not before the end"
        remarks.append(f"{rule}: within one point of its end {where}.")
    return remarks


def stopping_table(cells: Mapping[int, Any]) -> None:
    """Calls and agreement of every variant."""
    rows = []
    for name in next(iter(cells.values())):
        values = [cell[name] for cell in cells.values()]
        keys = ("calls", "agreement", "accuracy", "accuracy difference")
        better, worse = (sum(v["better and worse"][i] for v in values) for i in (0, 1))
        figures = {key: mean_interval([v[key] for v in values]) for key in keys}
        rows.append({"classifier": name, **figures, "images better, worse": f"{better}, {worse}"})
    notes = [
        f"{_measured(cells)} {NETWORK} {IMAGES} fixed test images.",
        f"Agreement and accuracy difference: with {DRAWS} random draws of the same rule. Random draws that stop are "
        "the beginning of those very draws, stratified draws are others: compare them with the halves of the draws.",
        f"With {IMAGES} images an agreement of 0.98 has a 95 % interval of about 0.94 to 0.99 in one seed. The error "
        "rate of 0.1 was added after seed 0 had been seen.",
        "Targets: agreement of at least 0.98 with at most 50 calls on average, with the head nominating at most 10, on "
        "the whole test part (not run: a fixed part stands for it).",
    ]
    write_result("diffusion_calls", "Fewer calls for the same decisions", rows, notes=notes)


def answers_table(cells: Mapping[int, Any]) -> None:
    """Head, votes, mean and both combined."""
    rows = []
    for name, first in next(iter(cells.values())).items():
        keys = [key for key in first if key not in ("calls", "seconds")]
        values = {key: mean_interval([cell[name][key] for cell in cells.values()]) for key in keys}
        rows.append({"classifier": name, "calls": first["calls"], **values})
    notes = [
        f"{_measured(cells)} {NETWORK} Whole test part, {FEW} random draws.",
        "Temperatures and thresholds fitted on the validation part; votes with one vote more for each class. "
        "Uncertainty: 1 - largest probability.",
        "Published accuracies at 80 % and 50 % coverage (UNet, CheXpert): 0.904, 0.963.",
    ]
    write_result("diffusion_answers", "Head, votes, mean error, and both together", rows, notes=notes)


def unusual_table(cells: Mapping[int, Any]) -> None:
    """AUROC by kind of image and score."""
    rows = []
    for kind, scores in next(iter(cells.values())).items():
        values = {name: mean_interval([cell[kind][name] for cell in cells.values()]) for name in scores}
        rows.append({"images": kind, **values})
    notes = [
        f"{_measured(cells)} {NETWORK}",
        "AUROC against the PneumoniaMNIST test part; scores fitted on the validation part.",
        "kermany_cxr_64 comes from the source that PneumoniaMNIST was made of, at another size. Target: 0.95 for skin "
        "lesions, ultrasound and phantoms. The test images pass no filter, all others do: see the first row.",
    ]
    write_result("diffusion_unusual", "Images of another kind", rows, notes=notes)


def throughput_table(cells: Mapping[int, Any]) -> None:
    """Images per second and their ratios."""
    cell = cells[min(cells)]
    rows = [{"how": how, "images per second": value} for how, value in cell["images per second"].items()]
    notes = [
        f"One run without warm-up, {DRAWS} stratified draws, fp32; 3 images, with stopping (error rate 0.05) 60: how "
        "much that saves depends on how easy the images are.",
        f"Batching alone: {cell['batching alone']:.1f} times (target 4). Batching and stopping: "
        f"{cell['batching and stopping']:.0f} times (target 50).",
    ]
    write_result("diffusion_throughput", "Throughput of the diffusion classifier", rows, notes=notes)


def main() -> None:
    """Measure the missing cells and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, one seed: proves the script, writes nothing")
    parser.add_argument("--cells", nargs="*", help="kind:seed of the cells to measure; none: all")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "diffusion_classifier", help="folder for models")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    work = options.work / "quick" if options.quick else options.work
    settings: dict[str, Any] = {"epochs": EPOCHS, "channels": CHANNELS, "draws": DRAWS, "images": IMAGES, "few": FEW}
    settings |= {"error rates": ERROR_RATES, "trusts": TRUSTS}
    store = CellStore("diffusion_classifier", settings, work if options.quick else RESULTS / "cells")
    seeds = SEEDS[:1] if options.quick else SEEDS
    cells = [Cell(DATA, kind, seed) for seed in seeds for kind in KINDS if kind != "throughput" or seed == 0]
    if options.cells is not None:
        cells = [cell for cell in cells if f"{cell.method}:{cell.seed}" in options.cells]
    store.run_missing(cells, lambda cell: measure(cell, work, options.quick))
    if not options.quick:
        tables(store)


if __name__ == "__main__":
    main()
