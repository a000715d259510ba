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
class condition, and then records the errors of `DRAWS` random draws of each test image, and of stratified draws until
they are stopped at `LOWEST_RATE`. Curves and stopping rules are read off the recordings with
`monai_jointdiff.inferers.replay`. Rules of stopping are chosen on `IMAGES` fixed test images, which earlier versions of
this study had looked at, and reported on the others and on all.

    JOINTDIFF_DATA=... python -m benchmarks.diffusion_classifier [--quick] [--cells curve:0 ...] [--work DIR]

A rerun measures only the missing cells; recordings are kept in the work folder, in blocks.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.common import (
    RESULTS,
    ROOT,
    Cell,
    CellStore,
    Target,
    ensure_trained,
    mean_interval,
    paired_difference,
    write_result,
)
from benchmarks.joint_vs_single import load
from benchmarks.render import format_value
from monai_jointdiff.data import draw_seed, make_phantoms, open_source
from monai_jointdiff.inferers import (
    DenoisingProfile,
    DiffusionClassifierInferer,
    Typicality,
    aggregate,
    count_votes,
    replay,
)
from monai_jointdiff.metrics import (
    Interval,
    MomentsDetector,
    PrincipalComponentDetector,
    accuracy_at_coverage,
    area_under_risk_coverage,
    area_under_roc,
    bootstrap_intervals,
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
DRAWS, IMAGES, FEW = 501, 150, 25  # the images on which a way of stopping is chosen; draws beside the head
BLOCK = 50  # images of a recording that are kept together
RULES = ("majority", "mean")
PARTS = ("chosen", "others", "whole")  # the fixed images, the other test images, both
ERROR_RATES = (0.001, 0.01, 0.05, 0.1, 0.2)
LOWEST_RATE = 0.01  # of stratified draws
STOPPING = {"rule": "mean", "error_rate": 0.1}  # of the throughput: the way that the chosen images choose
EQUAL = (5, 11, 51)  # numbers at which stratified and random draws are compared
TRUSTS = (0.9, 0.99)
NOMINATIONS = [(rate, trust) for rate in (0.05, 0.2) for trust in TRUSTS]  # error rates and trusts
TIMED, AT_ONCE, ONE_BY_ONE = 40, 20, 2  # images timed, in rounds of so many, of which so many one call at a time
KINDS = ("curve", "stopping", "draws", "answers", "unusual", "throughput")
OVER_IMAGES, RESAMPLES = "accuracy difference, over images", 10000
AGREEMENT, POINT, CALLS, NOMINATED_CALLS = 0.98, 0.01, 50, 10  # targets of the cheaper classifiers
FASTER_BATCHED, FASTER_STOPPED = 4, 50  # targets of the throughput
FAR_AUROC, FAR = 0.95, ("ham10000_64", "busi_64", "phantoms")  # target for images of other kinds

T = TypeVar("T")


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
    """Run the bundle with its overlay by options alone, unless it has run with them."""
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
    ensure_trained(["chest_xray/train.json", "chest_xray/train_conditional.json"], folder, options)


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

    def recorded(self, name: str, part: Part, num_draws: int, **options: Any) -> Tensor:
        """Errors (N, K, D) of random draws, or as the options say, from the files of the blocks or measured now."""
        blocks = []
        for begin in range(0, len(part.images), BLOCK):
            path = self.folder / "recordings" / f"{name}_{num_draws}_{begin:04d}.npy"
            if not path.is_file():
                path.parent.mkdir(exist_ok=True)
                some = part.take(range(begin, min(begin + BLOCK, len(part.images))))
                inferer = self.inferer(num_draws, **{"draws": "random", **options})
                result = inferer(some.images, self.network, seed=some.seeds)
                np.save(path.with_suffix(".part.npy"), result.draw_errors.numpy())
                path.with_suffix(".part.npy").replace(path)
                print(f"recorded {path.name}: {result.seconds:.0f} s", flush=True)
            blocks.append(torch.as_tensor(np.load(path)))
        return torch.cat(blocks)

    def of_chosen(self) -> Tensor:
        """All random draws of the fixed part."""
        return self.recorded("chosen", self.test.take(self.chosen), self.draws)

    def of_test(self) -> Tensor:
        """All random draws of every test image, the fixed ones first."""
        return torch.cat([self.of_chosen(), self.recorded("rest", self.test.take(self.rest), self.draws)])

    @property
    def ordered(self) -> Part:
        """The test images in the order of `of_test`."""
        return self.test.take(self.chosen + self.rest)

    def stratified(self, num_draws: int) -> Tensor:
        """Stratified draws of the fixed part: their noise levels depend on how many there are."""
        return self.recorded("chosen_stratified", self.test.take(self.chosen), num_draws, draws="stratified")

    def stopped(self, rule: str) -> Tensor:
        """Stratified draws of every test image until it is stopped at `LOWEST_RATE`, then NaN; fixed images first.

        At a higher error rate an image is stopped no later, so that these draws answer for all higher rates.
        """
        options = {"draws": "stratified", "rule": rule, "error_rate": LOWEST_RATE}
        parts = {"chosen": self.chosen, "rest": self.rest}
        return torch.cat(
            [
                self.recorded(f"{name}_within_levels_{rule}_{LOWEST_RATE}", self.test.take(rows), self.draws, **options)
                for name, rows in parts.items()
            ]
        )

    def head_logits(self, images: Tensor) -> Tensor:
        """Logits (N, K) of the head."""
        with torch.no_grad():
            return torch.cat([self.network(part) for part in images.split(256)])


def accuracy(errors: Tensor, labels: Tensor, rule: str) -> float:
    """Accuracy of a rule on recorded errors."""
    return float((aggregate(errors, rule).argmax(1) == labels).double().mean())


def curve(subject: Subject) -> dict[str, Any]:
    """Accuracy of the first n random draws, on the whole test part."""
    errors, labels = subject.of_test(), subject.ordered.labels
    numbers = [n for n in NUMBERS if n <= subject.draws]
    return {rule: {str(n): accuracy(errors[:, :, :n], labels, rule) for n in numbers} for rule in RULES}


def stopping(subject: Subject) -> dict[str, Any]:
    """Calls and agreement of cheaper classifiers with all random draws of the same rule, by part of the test images."""
    images, errors = subject.ordered, subject.of_test()
    head, temperature = subject.head_logits(images.images), subject.description.decision.temperature
    bounds = {"chosen": slice(0, len(subject.chosen)), "others": slice(len(subject.chosen), None), "whole": slice(None)}
    rows: dict[str, Any] = {}

    def row(name: str, rule: str, answers: Tensor, calls: Tensor, reference: Tensor = errors) -> None:
        full = aggregate(reference, rule).argmax(1)
        right, was_right, calls = answers == images.labels, full == images.labels, calls.expand(len(answers))
        signs = torch.sign(right.int() - was_right.int()).tolist()
        rows[f"{rule}, {name}"] = {"changes": "".join("0+-"[sign] for sign in signs)} | {
            part: {
                "calls": float(calls[some].double().mean()),
                "agreement": float((answers == full)[some].double().mean()),
                "accuracy": float(right[some].double().mean()),
                "accuracy difference": float(right[some].double().mean() - was_right[some].double().mean()),
                "better and worse": [int((right & ~was_right)[some].sum()), int((~right & was_right)[some].sum())],
            }
            for part, some in bounds.items()
        }

    def stop(name: str, rule: str, recorded: Tensor, **options: Any) -> None:
        inferer = subject.inferer(subject.draws, rule=rule, head_temperature=temperature, **options)
        result = replay(recorded, inferer, head)
        row(name, rule, result.prediction, result.network_calls)

    half = errors.shape[-1] // 2
    for rule in RULES:
        stopped = subject.stopped(rule)
        row("all draws", rule, aggregate(errors, rule).argmax(1), torch.tensor([2.0 * subject.draws]))
        for rate in ERROR_RATES:
            stop(f"random draws, error rate {rate}", rule, errors, draws="random", error_rate=rate)
        for rate in (rate for rate in ERROR_RATES if rate >= LOWEST_RATE):
            stop(f"stratified draws, error rate {rate}", rule, stopped, error_rate=rate)
        for rate, trust in NOMINATIONS:
            name = f"stratified draws, error rate {rate}, head nominates at {trust}"
            stop(name, rule, stopped, error_rate=rate, head="nominate", trust=trust)
        row("the head alone", rule, head.argmax(1), torch.tensor([1.0]))
        one, other = errors[:, :, :half], errors[:, :, half:]  # two classifiers that differ in their draws only
        name = "first half of the draws against the second"
        row(name, rule, aggregate(one, rule).argmax(1), torch.tensor([2.0 * half]), reference=other)
    return rows


def equal_draws(subject: Subject) -> dict[str, Any]:
    """Agreement and accuracy of as many stratified and random draws, beside random draws that are in neither."""
    labels, errors = subject.test.labels[subject.chosen], subject.of_chosen()
    numbers = [n for n in EQUAL if n < subject.draws]
    reference = errors[:, :, max(numbers) :]
    values: dict[str, Any] = {}
    for rule in RULES:
        full = aggregate(reference, rule).argmax(1)
        for n in numbers:
            kinds = {"stratified": subject.stratified(n), "random": errors[:, :, :n]}
            found = {kind: aggregate(drawn, rule).argmax(1) for kind, drawn in kinds.items()}
            values[f"{rule}, {n}"] = {
                kind: {
                    "agreement": float((answer == full).double().mean()),
                    "accuracy": float((answer == labels).double().mean()),
                }
                for kind, answer in found.items()
            }
    return values


def timed(work: Callable[[], T]) -> tuple[T, np.ndarray]:
    """What a function returns, and its seconds: by the clock, and of the processor (which others do not slow)."""
    wall, processor = time.perf_counter(), time.process_time()
    found = work()
    return found, np.array([time.perf_counter() - wall, time.process_time() - processor])


def seconds_of_answers(subject: Subject) -> dict[str, float]:
    """Processor seconds per image of the head and of the few draws, on the same images in turn."""
    part = subject.test.take(subject.chosen[:TIMED])
    inferer = subject.inferer(subject.few, draws="random")
    subject.head_logits(part.images[:1])  # the first call prepares the network
    spent = {"head": 0.0, "draws": 0.0}
    for begin in range(0, len(part.images), AT_ONCE):
        some = part.take(range(begin, min(begin + AT_ONCE, len(part.images))))
        spent["head"] += timed(partial(subject.head_logits, some.images))[1][1]
        spent["draws"] += timed(partial(inferer, some.images, subject.network, seed=some.seeds))[1][1]
    return {name: float(total) / len(part.images) for name, total in spent.items()}


def answers(subject: Subject) -> dict[str, Any]:
    """Head, votes, mean and their products on the whole test part; temperature and threshold from validation."""
    errors, images, labels = subject.of_test()[:, :, : subject.few], subject.ordered.images, subject.ordered.labels
    val_errors = subject.recorded("val", subject.val, subject.few)
    head = subject.head_logits(images).double()
    val_head = subject.head_logits(subject.val.images).double()

    def share_logits(e: Tensor) -> Tensor:
        return ((count_votes(e) + 1) / (e.shape[-1] + e.shape[1])).log()

    def mean_logits(e: Tensor) -> Tensor:
        return aggregate(e, "mean")

    head_scale = fit_temperature(val_head, subject.val.labels)
    spent = seconds_of_answers(subject)
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
            asks, draws = "head" in method, method != "head"
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
                "calls": asks + draws * 2.0 * subject.few,
                "seconds": asks * spent["head"] + draws * spent["draws"],
            }
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
    """Seconds per image in batches, one call at a time, and with stopping as well: on the same images, in turn."""
    part = subject.test.take(subject.chosen[:TIMED])
    ways = {
        "batched": (AT_ONCE, subject.inferer(subject.draws, rule=STOPPING["rule"])),
        "one call at a time": (ONE_BY_ONE, subject.inferer(subject.draws, rule=STOPPING["rule"], max_batch=1)),
        "batched, stopping": (AT_ONCE, subject.inferer(subject.draws, **STOPPING)),
    }
    subject.inferer(1)(part.images, subject.network)  # the first calls prepare the network
    totals = {way: np.zeros(6) for way in ways}
    for begin in range(0, len(part.images), AT_ONCE):
        for way, (count, inferer) in ways.items():
            some = part.take(range(begin, min(begin + count, len(part.images))))
            result, seconds = timed(partial(inferer, some.images, subject.network, seed=some.seeds))
            if way == "batched":
                full = result.prediction
            same = (result.prediction == full[: len(some.images)]).sum()
            right = (result.prediction == some.labels).sum()
            totals[way] += [len(some.images), float(result.network_calls.sum()), *seconds, int(same), int(right)]
    return {
        way: {
            "images": int(images),
            "calls": calls / images,
            "seconds": wall / images,
            "processor seconds": processor / images,
            "answer of all draws": int(same),
            "right": int(right),
        }
        for way, (images, calls, wall, processor, same, right) in totals.items()
    }


def measure(cell: Cell, work: Path, quick: bool) -> Mapping[str, Any]:
    """One cell."""
    subject = Subject(cell.seed, work, quick)
    if cell.method == "unusual":
        return unusual(subject, 24 if quick else 600)
    kinds = {
        "curve": curve,
        "stopping": stopping,
        "draws": equal_draws,
        "answers": answers,
        "throughput": throughput,
    }
    return kinds[cell.method](subject)


def tables(store: CellStore) -> None:
    """Write the result files from the cells that are there."""
    found = {kind: {s: v for s in SEEDS if (v := store.get(Cell(DATA, kind, s))) is not None} for kind in KINDS}
    writers: dict[str, Callable[[Mapping[int, Any]], Table]] = {
        "curve": curve_table,
        "stopping": stopping_table,
        "draws": draws_table,
        "answers": answers_table,
        "unusual": unusual_table,
        "throughput": partial(throughput_table, stopping=found["stopping"]),
    }
    for kind, cells in found.items():
        if cells:
            environment = store.environment(Cell(DATA, kind, max(cells)))
            name, title, rows, options = writers[kind](cells)
            write_result(name, title, rows, **options, environment=environment)
            if kind == "curve" and len(cells) > 1:
                picture(rows)


def _of_all(cells: Mapping[int, Any]) -> str:
    return f"{len(cells)} of {len(SEEDS)} seeds"


def _measured(cells: Mapping[int, Any]) -> str:
    return f"{_of_all(cells)} measured; mean and 95 % t-interval over seeds where there are several."


Table = tuple[str, str, list[dict[str, Any]], dict[str, Any]]  # name, title, rows; targets, notes, digits
NETWORK = f"Network of channels {CHANNELS}, {EPOCHS} epochs with the overlay train_conditional.json."
RECORDINGS = (
    f"Random draws of the {IMAGES} fixed images were recorded when the timesteps of an image came from the same stream "
    "of random numbers as the noise of its first draw."
)


def curve_table(cells: Mapping[int, Any]) -> Table:
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
    notes = [f"{_measured(cells)} {NETWORK} Whole test part. {RECORDINGS}", *remarks(rows)]
    return "diffusion_curve", "Accuracy of the diffusion classifier by draws", rows, {"notes": notes}


def picture(rows: Sequence[Mapping[str, Any]]) -> None:
    """The picture of the documents, `docs/figures/diffusion_calls.png`."""

    def points(rule: str) -> dict[float, Interval]:
        return {row["calls"]: Interval(row[rule]["mean"], row[rule]["low"], row[rule]["high"]) for row in rows}

    published = {row["calls"]: row["published (UNet, CheXpert, majority)"] for row in rows}
    curves = {f"{rule}, PneumoniaMNIST": points(rule) for rule in RULES}
    figure = accuracy_against_calls_figure(curves, {"published: majority, CheXpert": published})
    save_figure(figure, ROOT / "docs" / "figures" / "diffusion_calls.png", dpi=100)


def remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rank correlation with the published curve, and where each rule comes near its end and leaves the other."""
    ours = [row["majority"]["mean"] for row in rows]
    correlation = spearmanr(ours, PUBLISHED)[0]
    remarks = [f"Spearman correlation of the majority curve with the published one: {correlation:.2f}."]
    for rule in RULES:
        means = [row[rule]["mean"] for row in rows]
        near = [abs(value - means[-1]) <= POINT for value in means]
        first = next(n for i, n in enumerate(NUMBERS) if all(near[i:]))
        where = f"from {first} draws on" if first < NUMBERS[-1] else f"at {first} draws only"
        remarks.append(f"{rule}: the mean over seeds is within one point of its end {where}.")
    differences = {f"{row['draws']} draws": row["mean - majority"] for row in rows}
    return [*remarks, f"mean - majority: {_excluding(differences)}."]


def _excludes_zero(interval: Mapping[str, Any]) -> bool:
    return bool(interval["low"] > 0 or interval["high"] < 0)


def stopping_table(cells: Mapping[int, Any]) -> Table:
    """Calls and agreement of every variant on the whole test part, and its agreement on the two parts of it."""
    rows = []
    for name in next(iter(cells.values())):
        keys = ("calls", "agreement", "accuracy", "accuracy difference")
        figures = {
            part: {key: mean_interval([cell[name][part][key] for cell in cells.values()]) for key in keys}
            for part in PARTS
        }
        better, worse = (sum(cell[name]["whole"]["better and worse"][i] for cell in cells.values()) for i in (0, 1))
        of_parts = {f"{key}, {part}": figures[part][key] for part in PARTS[:2] for key in ("calls", "agreement")}
        over_images = difference_over_images([cell[name]["changes"] for cell in cells.values()])
        rows.append(
            {
                "classifier": name,
                **figures["whole"],
                OVER_IMAGES: over_images,
                "images better, worse": f"{better}, {worse}",
                **of_parts,
            }
        )
    notes = [
        f"{_measured(cells)} {NETWORK} Whole test part; chosen: {IMAGES} fixed test images, others: the rest. "
        f"Intervals are not cut at 1. {RECORDINGS}",
        f"Agreement and accuracy difference: with {DRAWS} random draws of the same rule. Random draws that stop are "
        "the beginning of those very draws, stratified draws are others: compare them with the halves of the draws.",
        "Accuracy difference: mean with the t-interval over seeds; over images: with that of resampled images, each "
        "with its differences in all seeds. The target is judged by the latter, since it asks for all seeds and "
        "images; which of both was fixed when both were known.",
        "The head nominates with the temperature that was fitted on the validation part.",
        *_other_decisions(rows),
        *_stratified_calls(cells),
    ]
    digits = {column: 3 for row in rows for column in row if column.startswith("agreement")}
    digits |= {"accuracy": 3, "accuracy difference": 4, OVER_IMAGES: 4}
    options = {"targets": calls_targets(rows, _of_all(cells)), "notes": notes, "digits": digits}
    return "diffusion_calls", "Fewer calls for the same decisions", rows, options


def difference_over_images(changes: Sequence[str]) -> dict[str, Any]:
    """Mean accuracy difference with the bootstrap interval over images.

    Args:
        changes: of each seed one sign per image, the images in the same order: `+` right instead of wrong, `-` wrong
            instead of right, `0` neither.

    Returns:
        `{"mean", "low", "high", "n"}`; n is the number of seeds.
    """
    signs = np.array([[{"+": 1.0, "-": -1.0, "0": 0.0}[sign] for sign in seed] for seed in changes]).mean(axis=0)

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {"difference": weights @ signs / weights.sum(axis=1)}

    found = bootstrap_intervals(statistics, len(signs), RESAMPLES)["difference"]
    return {"mean": found.value, "low": found.low, "high": found.high, "n": len(changes)}


def same_decisions(row: Mapping[str, Any]) -> bool:
    """Both halves of the target: agreement, and the interval of the accuracy difference within a point."""
    low, high = (row[OVER_IMAGES][key] for key in ("low", "high"))
    return bool(-POINT <= low and high <= POINT and row["agreement"]["mean"] >= AGREEMENT)


def best_on_chosen(rows: Sequence[Mapping[str, Any]], most: float) -> Mapping[str, Any] | None:
    """The way to take by the fixed images alone: at most so many calls, the answer of all draws as often as possible.

    Args:
        rows: of the table.
        most: calls per image, mean over seeds.

    Returns:
        The row, of several with the same agreement that with the fewest calls; None where all take more calls.
    """
    cheap = [row for row in rows if row["calls, chosen"]["mean"] <= most]
    return max(cheap, key=lambda r: (r["agreement, chosen"]["mean"], -r["calls, chosen"]["mean"]), default=None)


def same_decisions_target(way: str, rows: Sequence[Mapping[str, Any]], most: float, about: str) -> Target:
    """Whether one way gave the same decisions within its calls, on the whole test part.

    Args:
        way: in words.
        rows: that go this way; the one to judge is chosen on the chosen images alone.
        most: calls per image, mean over seeds.
        about: what qualifies every row.
    """
    words = (
        f"the decisions of all {DRAWS} draws by {way}",
        f"on at least {100 * AGREEMENT:.0f} % of the test images, accuracy within 1 point (95 % interval), "
        f"at most {most} calls",
    )
    best = best_on_chosen(rows, most)
    if best is None:
        fewest = min(rows, key=lambda row: row["calls, chosen"]["mean"])
        found = f"none takes so few, the fewest are {fewest['calls, chosen']['mean']:.1f} ({fewest['classifier']})"
        return Target(*words, found, False, about)
    found = (
        f"agreement {best['agreement']['mean']:.3f}, accuracy difference "
        f"{format_value(best[OVER_IMAGES], 4)}, {best['calls']['mean']:.1f} calls"
    )
    met = same_decisions(best) and best["calls"]["mean"] <= most
    others = f"agreement {best['agreement, others']['mean']:.3f} on the images it was not chosen on"
    over_seeds = format_value(best["accuracy difference"], 4)
    seeds = f"with the interval over seeds, which judged until both were known, {over_seeds}"
    return Target(*words, found, met, "; ".join(filter(None, (best["classifier"], others, seeds, about))))


def ways(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows that stop, by way."""
    found: dict[str, list[Mapping[str, Any]]] = {"stratified": [], "nominates": [], "random": []}
    for row in rows:
        if "error rate" in row["classifier"]:
            way = next(way for way in ("nominates", "stratified", "random") if way in row["classifier"])
            found[way].append(row)
    return found


def calls_targets(rows: Sequence[Mapping[str, Any]], about: str) -> list[Target]:
    """Whether fewer calls gave the same decisions, in the ways that were asked for.

    Args:
        rows: of the table.
        about: seeds.
    """
    of_way = ways(rows)
    return [
        same_decisions_target("stratified draws and stopping", of_way["stratified"], CALLS, about),
        same_decisions_target("nominations of the head and stopping", of_way["nominates"], NOMINATED_CALLS, about),
    ]


def _other_decisions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the judged rows were chosen, and what was not asked for: random draws, and any number of calls."""
    random = same_decisions_target("random draws and stopping", ways(rows)["random"], CALLS, "")
    both = [row for row in rows if "error rate" in row["classifier"] and same_decisions(row)]
    listed = "; ".join(f"{row['classifier']} ({row['calls']['mean']:.0f} calls)" for row in both)
    return [
        "Rule and error rate of each way: most agreement within the calls, on the chosen images alone.",
        f"Not asked for: {random.sentence()}",
        f"Both halves of the decision, at any number of calls: {listed or 'no row that stops'}.",
    ]


def _stratified_calls(cells: Mapping[int, Any]) -> list[str]:
    """What stratified draws save until the images are stopped."""
    differences = {}
    for rule in RULES:
        for rate in (rate for rate in ERROR_RATES if rate >= LOWEST_RATE):
            stratified, random = (
                {s: cell[f"{rule}, {kind} draws, error rate {rate}"]["whole"]["calls"] for s, cell in cells.items()}
                for kind in ("stratified", "random")
            )
            differences[f"{rule}, {rate}"] = paired_difference(stratified, random, larger_is_better=False)
    listed = "; ".join(f"{name}: {format_value(difference, 1)}" for name, difference in differences.items())
    more = sum(difference["mean"] > 0 for difference in differences.values())
    return [
        f"Calls with stopping, stratified - random draws, by rule and error rate: {listed}. Stratified draws take "
        f"more in {more} of {len(differences)}; {_excluding(differences)}."
    ]


def _excluding(differences: Mapping[str, Mapping[str, Any]]) -> str:
    """In how many and in which comparisons the interval over seeds excludes 0."""
    several = {name: d for name, d in differences.items() if d["low"] is not None}
    apart = [f"{name} ({d['mean']:+.3g})" for name, d in several.items() if _excludes_zero(d)]
    text = f"the interval excludes 0 in {len(apart)} of {len(differences)}"
    return text + (f": {'; '.join(apart)}" if apart else "")


def draws_table(cells: Mapping[int, Any]) -> Table:
    """What stratified draws gain over as many random ones."""
    rows = []
    for name in next(iter(cells.values())):
        rule, number = name.split(", ")
        row: dict[str, Any] = {"rule": rule, "draws": int(number)}
        for key in ("agreement", "accuracy"):
            values = {
                kind: {seed: cell[name][kind][key] for seed, cell in cells.items()} for kind in ("stratified", "random")
            }
            difference = paired_difference(values["stratified"], values["random"])
            row |= {f"{key}, {kind}": mean_interval(list(of_kind.values())) for kind, of_kind in values.items()}
            row[f"{key}, stratified - random"] = {k: difference[k] for k in ("mean", "low", "high", "n")}
        rows.append(row)
    differences = {
        f"{row['rule']}, {row['draws']} draws, {key}": row[f"{key}, stratified - random"]
        for row in rows
        for key in ("agreement", "accuracy")
    }
    notes = [
        f"{_measured(cells)} {NETWORK} {IMAGES} fixed test images, without stopping. {RECORDINGS}",
        f"Agreement: with the answer of the same rule on the last {DRAWS - max(EQUAL)} of {DRAWS} random draws, none "
        "of which is among those compared. Draw n of both kinds has the same noise; they differ in its level.",
        f"Stratified - random: {_excluding(differences)}. An interval without width comes from the same difference in "
        "all seeds; it is no certainty.",
    ]
    digits = {column: 3 for row in rows for column in row if column not in ("rule", "draws")}
    return "diffusion_draws", "Stratified against random draws", rows, {"notes": notes, "digits": digits}


def answers_table(cells: Mapping[int, Any]) -> Table:
    """Head, votes, mean and both combined."""
    rows = []
    for name, first in next(iter(cells.values())).items():
        keys = [key for key in first if key != "calls"]
        values = {key: mean_interval([cell[name][key] for cell in cells.values()]) for key in keys}
        rows.append({"classifier": name, "calls": first["calls"], **values})
    added = []
    for name in ("head and majority", "head and mean"):
        accuracy, auc = (
            paired_difference(
                {seed: cell[name][key] for seed, cell in cells.items()},
                {seed: cell["head"][key] for seed, cell in cells.items()},
            )
            for key in ("accuracy", "auc")
        )
        added.append(f"{name}: accuracy {format_value(accuracy, 4)}, AUC {format_value(auc, 4)}")
    notes = [
        f"{_measured(cells)} {NETWORK} Whole test part, {FEW} random draws. {RECORDINGS}",
        "Temperatures and thresholds fitted on the validation part; votes with one vote more for each class. "
        "Uncertainty: 1 - largest probability. Brier score: of the second class, (p - y)^2.",
        f"What the draws add to the head (difference to the head alone): {'; '.join(added)}.",
        f"Seconds: of the processor, per image, on {TIMED} test images in batches of {AT_ONCE}, one thread; head and "
        "draws in turn, while other measurements shared the machine. Of both together: the sum.",
        "Published accuracies at 80 % and 50 % coverage (UNet, CheXpert): 0.904, 0.963.",
    ]
    digits = {"calls": 0}
    return "diffusion_answers", "Head, votes, mean error, and both together", rows, {"notes": notes, "digits": digits}


def unusual_table(cells: Mapping[int, Any]) -> Table:
    """AUROC by kind of image and score."""
    rows = []
    for kind, scores in next(iter(cells.values())).items():
        values = {name: mean_interval([cell[kind][name] for cell in cells.values()]) for name in scores}
        rows.append({"images": kind, **values})
    found = {row["images"]: row["errors, 5 calls"] for row in rows}
    targets = [
        Target(
            f"AUROC of the denoising errors (5 calls), {kind} against PneumoniaMNIST",
            f"at least {FAR_AUROC}",
            format_value(found[kind], 3),
            found[kind]["mean"] >= FAR_AUROC,
            _of_all(cells),
        )
        for kind in FAR
    ]
    notes = [
        f"{_measured(cells)} {NETWORK}",
        "AUROC against the PneumoniaMNIST test part; scores fitted on the validation part.",
        "kermany_cxr_64 comes from the source that PneumoniaMNIST was made of, at another size. The test images pass "
        "no filter, all others do: see the first row.",
        "The targets are for skin lesions, ultrasound and phantoms.",
    ]
    return "diffusion_unusual", "Images of another kind", rows, {"targets": targets, "notes": notes}


def throughput_table(cells: Mapping[int, Any], stopping: Mapping[int, Any]) -> Table:
    """Images per second and how many times those of one call at a time."""
    seed = min(cells)
    cell = cells[seed]
    slow = cell["one call at a time"]
    rows = [
        {
            "how": how,
            "images": values["images"],
            "calls": values["calls"],
            "images per second": 1 / values["seconds"],
            "images per processor second": 1 / values["processor seconds"],
            "times": slow["seconds"] / values["seconds"],
            "times, processor": slow["processor seconds"] / values["processor seconds"],
            "answer of all draws": f"{values['answer of all draws']} of {values['images']}",
            "right": f"{values['right']} of {values['images']}",
        }
        for how, values in sorted(cell.items(), key=lambda item: -item[1]["seconds"])
    ]
    by_how = {row["how"]: row for row in rows}
    batched, stopped = by_how["batched"], by_how["batched, stopping"]
    rule, rate = STOPPING["rule"], STOPPING["error_rate"]
    same_way = f"{rule}, stratified draws, error rate {rate}"
    equal = cell["batched, stopping"]["answer of all draws"] >= AGREEMENT * cell["batched, stopping"]["images"]
    notes = [
        f"One run, seed {seed}, {DRAWS} stratified draws, rule {rule}, error rate of the stopping {rate}, fp32; in "
        f"rounds of {AT_ONCE} images, each way in turn, one call at a time the first {ONE_BY_ONE} of them. Where other "
        "measurements shared the machine, the processor's seconds do not count the waiting for it.",
        f"How much stopping saves depends on how easy the images are: these take {stopped['calls']:.0f} calls"
        + (f", the whole test part {stopping[seed][same_way]['whole']['calls']:.0f}." if seed in stopping else "."),
    ]
    run = f"one run, seed {seed}"
    same = f"{run}; the answer of all draws on {stopped['answer of all draws']} images"
    targets = [
        throughput_target("batching alone", batched, FASTER_BATCHED, run),
        throughput_target("batching and stopping at equal decisions", stopped, FASTER_STOPPED, same, equal),
    ]
    return "diffusion_throughput", "Throughput of the diffusion classifier", rows, {"targets": targets, "notes": notes}


def throughput_target(way: str, row: Mapping[str, Any], target: float, about: str, equal: bool = True) -> Target:
    """A ratio to one call at a time: met when by the clock and by the processor's seconds, and with equal decisions.

    Args:
        way: in words.
        row: of the table.
        target: the ratio asked for.
        about: what qualifies the figure.
        equal: whether the decisions are those of all draws.
    """
    return Target(
        f"diffusion classifier against one call at a time: {way}",
        f"at least {target} times as fast",
        f"{row['times']:.1f} times, by the processor's seconds {row['times, processor']:.1f}",
        equal and min(row["times"], row["times, processor"]) >= target,
        about,
    )


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
