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

"""What a counterfactual costs, against MONAI's recipe: two networks, 200 steps out and 200 guided steps back, one
image at a time.

    JOINTDIFF_DATA=... python -m benchmarks.counterfactual_speed --threads 1 [--quick] [--cells SIZE:SEED ...]

The recipe is the loop of MONAI's anomaly detection tutorial with classifier guidance (Wolleb et al. 2022,
https://arxiv.org/abs/2203.04306): a denoiser leads the image by reversed DDIM to noise; on the way back the gradient of
a separate classifier at x_t is added to the predicted noise. Nothing goes backward through the denoiser, and no factual
reconstruction is made. All networks have the same size; its classifier has seen noisy images, as MONAI's.

Measured in one run, in turns: the recipe one image at a time; the same loop with all images in one batch (batching
alone); ours by both rules, with one strength for all images and with the strength found for each. The clock is that of
the process: what else runs on the machine takes the core away from all in turn, and is not counted. All are scored by
the oracles of `benchmarks.counterfactual`. What is free to choose is chosen in the run, on validation images: for the
recipe by the oracle, in its favour; our one strength by the model alone. `--cells none` only writes the table.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import diffusion_classifier, joint_vs_single
from benchmarks.common import RESULTS, ROOT, Cell, CellStore, Target, ensure_trained, mean_interval, write_result
from benchmarks.counterfactual import (
    CONDITION,
    DATA,
    DIRECTIONS,
    FAST,
    MAIN,
    METHODS,
    ORACLE,
    ORACLE_EPOCHS,
    ROBUST,
    ROBUST_EPOCHS,
    STEPS,
    Court,
    of_both_classes,
    probabilities,
    share_interval,
    worse_direction,
)
from benchmarks.monai_recipe import (
    FINE_TUNING,
    NOISIEST,
    Recipe,
    choose_recipe,
    get_noisy_classifier,
    monai_recipe,
    of_noisy_images,
)
from monai_jointdiff.inferers import CounterfactualInferer, CounterfactualResult
from monai_jointdiff.metrics import l1_distance
from monai_jointdiff.schedulers import DDIMGridScheduler

SIZES = {"default": diffusion_classifier.CHANNELS, "larger": joint_vs_single.CHANNELS}
SEEDS = {"default": (0, 1, 2), "larger": (1,)}
IMAGES = 25  # of each class
CHOOSING = 10  # validation images of each class on which strengths are chosen
ROUNDS = 5  # turns of the interleaved run, and images of the recipe one at a time
OURS_EVERY = 4  # rounds: ours takes its turn in every fourth
STRENGTHS = (1.0, 2.0, 3.0, 5.0, 10.0)  # of ours, to choose from where one has to do for all images
OURS: dict[str, dict[str, Any]] = {
    "head, one strength, 8 steps": {**STEPS, "timestep": 500, "probability": None},
    "head, found for each, 8 steps": METHODS[FAST],
    "head, found for each, 20 steps": METHODS[MAIN],
    "class condition, one strength, 8 steps": {**STEPS, "rule": "class_free", "timestep": 900, "probability": None},
    "class condition, found for each, 8 steps": {**METHODS[CONDITION], **STEPS},
    "class condition, found for each, 20 steps": METHODS[CONDITION],
}
BEYOND = "smaller direction less the recipe's (oracle)"
WORST_BEYOND = f"{BEYOND}, worst seed"
SPEED = "speed of counterfactuals"
BATCHED, AT_VALIDITY = 5, 20  # targets: times faster at equal calls, and at an equal validity


RECIPE = Recipe()
RECIPES = [replace(RECIPE, stride=stride, scale=scale) for stride in (1, 3) for scale in (3.0, 10.0, 30.0, 100.0)]
COARSER = 10  # the recipes are compared with so many times fewer steps of as much greater stride


@dataclass
class Contender:
    """A way to counterfactuals that runs in pieces, so that the others run in between.

    Args:
        method: name in the table.
        images: that all its pieces make together.
        batch: images per call.
        pieces: generator of images or results; each of them ends a piece.
        every: takes its turn in every such round.
        seconds: of the processor, so far.
        found: what the pieces made.
    """

    method: str
    images: int
    batch: int
    pieces: Iterator[Any]
    every: int = 1
    seconds: float = 0.0
    found: list[Any] = field(default_factory=list)

    def turn(self) -> None:
        """Run the next piece."""
        started = time.process_time()
        self.found.append(next(self.pieces))
        self.seconds += time.process_time() - started


def in_turns(contenders: Sequence[Contender], rounds: int) -> None:
    """Run all of them piece by piece, one after the other in each round."""
    for number in range(rounds):
        for contender in contenders:
            if number % contender.every == 0:
                contender.turn()
                print(f"round {number + 1}, {contender.method}: {contender.seconds:.1f} s", flush=True)


def one_at_a_time(loop: Callable[..., Iterator[Tensor]], images: Tensor, target: Tensor) -> Iterator[Tensor]:
    """Counterfactuals (1, C, H, W), one after the other."""
    for image, label in zip(images.split(1), target.split(1), strict=True):
        *_, sample = loop(image, label)
        yield sample


def together(loop: Iterator[Tensor], steps: int, pieces: int) -> Iterator[Tensor]:
    """The same loop on all images, in so many pieces; the last sample is the counterfactual."""
    for number in range(pieces):
        *_, sample = islice(loop, steps * (number + 1) // pieces - steps * number // pieces)
        yield sample


def ours(options: Mapping[str, Any], scheduler: Any, network: Any, images: Tensor, target: Tensor) -> Iterator[Any]:
    """Results of our inferer on all images, as often as asked."""
    inferer = CounterfactualInferer(scheduler, **options)
    while True:
        yield inferer(images, network, target=target)


# ---- networks, and what is chosen on validation images --------------------------------------------------------------


@dataclass(frozen=True)
class Networks:
    """The networks of a size and seed.

    Args:
        classifier: of clean images, trained alone.
        denoiser: trained alone.
        explained: the network and the scheduler of each of our rules.
    """

    classifier: Any
    denoiser: Any
    explained: Mapping[str, tuple[Any, DDIMGridScheduler]]


def get_networks(size: str, seed: int, work: Path, quick: bool = False) -> Networks:
    """The networks of a size, trained where they are missing; of the larger ones none is class-conditional.

    Args:
        size: one of `SIZES`.
        seed: of the trainings.
        work: folder of the networks of all benchmarks.
        quick: tiny trainings.
    """
    folder = work / ("joint_vs_single" if size == "larger" else "counterfactual_speed") / ("quick" if quick else "")
    found = {}
    for name in ("classifier", "denoiser", "joint"):
        place = folder / f"{DATA}_{name}_{seed}"
        epochs = 1 if quick else joint_vs_single.EPOCHS
        options = joint_vs_single.training_options(Cell(DATA, name, seed), epochs, {"channels": SIZES[size]})
        ensure_trained(joint_vs_single.CONFIG, place, options)
        found[name] = joint_vs_single.load(place)
    explained = {"classifier": found["joint"]}
    if size == "default":
        place = work / "diffusion_classifier" / ("quick" if quick else "") / f"{DATA}_{seed}"
        diffusion_classifier.train(seed, place, quick)
        explained["class_free"] = joint_vs_single.load(place)
    of_rules = {rule: (network, about.build_scheduler("ddim")) for rule, (network, about) in explained.items()}
    return Networks(found["classifier"][0], found["denoiser"][0], of_rules)


def choose_strength(
    options: Mapping[str, Any], scheduler: DDIMGridScheduler, network: Any, images: Tensor, labels: Tensor
) -> float:
    """The strength that flips most images by the network itself, of equal ones the smallest.

    Args:
        options: of the inferer, without a strength.
        scheduler: of the network.
        network: that is explained.
        images: (N, C, H, W) in [-1, 1].
        labels: (N,).
    """

    def flips(scale: float) -> float:
        result = next(ours({**options, "scale": scale}, scheduler, network, images, 1 - labels))
        return worse_direction(network, result.counterfactual, labels)

    return max(STRENGTHS, key=lambda scale: (flips(scale), -scale))


# ---- one cell --------------------------------------------------------------------------------------------------------


def row(
    contender: Contender, shown: Tensor, images: Tensor, judged: Mapping[str, Tensor], steps: int, calls: float
) -> dict[str, Any]:
    """What a cell keeps of a contender.

    Args:
        contender: whose.
        shown: its counterfactuals (N, C, H, W) in [-1, 1].
        images: (N, C, H, W); the first half is normal.
        judged: whether each image flips (N,), by judge.
        steps: of the way back.
        calls: of networks, per image.
    """
    return {
        "method": contender.method,
        "batch": contender.batch,
        "steps": steps,
        "calls per image": calls,
        "seconds per image": contender.seconds / contender.images,
        **{
            f"{judge}, {direction}": float(half.mean())
            for judge, flipped in judged.items()
            for direction, half in zip(DIRECTIONS, flipped.double().chunk(2), strict=True)
        },
        "median L1": float(torch.as_tensor(l1_distance(shown, images)).median()),
    }


def measure(size: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """Run all of them in turns.

    Args:
        size: of the networks.
        seed: of the networks.
        work: folder of the networks.
        quick: two images of each class, few steps, tiny trainings.
    """
    networks = get_networks(size, seed, work, quick)
    count, steps, tuning = (2, 10, 2) if quick else (IMAGES, RECIPE.steps, FINE_TUNING)
    court = Court(work / "counterfactual", count, ORACLE_EPOCHS, ROBUST_EPOCHS)
    joint, scheduler = networks.explained["classifier"]
    levels = scheduler.alphas_cumprod
    cache = work / "counterfactual_speed" / ("quick" if quick else "") / f"noisy_classifier_{size}_{seed}.pt"
    learned = levels[:NOISIEST]
    noisy = get_noisy_classifier(networks.classifier, *court.parts["train"], learned, cache, tuning, seed)
    asked = [] if quick else [networks.classifier, *(network for network, _ in networks.explained.values())]
    images, labels = court.trial(*asked)

    def denoiser(x: Tensor, timesteps: Tensor) -> Tensor:
        return scheduler.predict_epsilon(networks.denoiser(x, timesteps), timesteps, x)

    def loop(some: Tensor, toward: Tensor, recipe: Recipe) -> Iterator[Tensor]:
        return monai_recipe(some, toward, denoiser, of_noisy_images(noisy), levels, recipe)

    # chosen on validation images that the oracle and the networks classify rightly
    chosen, chosen_labels = court.parts["val"]
    judge = court.oracles[ORACLE]
    right = torch.stack([probabilities(n, chosen).argmax(1) == chosen_labels for n in (judge, *asked)]).all(0)
    chosen, chosen_labels = of_both_classes(chosen[right], chosen_labels[right], CHOOSING)

    def flips(one: Recipe) -> float:
        return worse_direction(judge, [*loop(chosen, 1 - chosen_labels, one)][-1], chosen_labels)

    recipe = choose_recipe(flips, RECIPES, COARSER)
    recipe = replace(recipe, steps=steps, stride=recipe.stride * RECIPE.steps // steps)
    rules = {}
    for name, options in OURS.items():
        if (rule := options.get("rule", "classifier")) in networks.explained:
            network, own = networks.explained[rule]
            one_for_all = options["probability"] is None
            scale = choose_strength(options, own, network, chosen, chosen_labels) if one_for_all else None
            rules[name] = (network, own, {**options, "scale": scale})

    number, target = len(images), 1 - labels
    spread = torch.linspace(0, number - 1, ROUNDS).round().long()  # of both classes
    single = one_at_a_time(lambda image, toward: loop(image, toward, recipe), images[spread], target[spread])
    alone = Contender("MONAI's recipe, one at a time", ROUNDS, 1, single)
    pieces = together(loop(images, target, recipe), 2 * recipe.steps, ROUNDS)
    batched = Contender("MONAI's recipe, all in one batch", number, number, pieces)
    found = {}
    for name, (network, own, options) in rules.items():
        results, runs = ours(options, own, network, images, target), len(range(0, ROUNDS, OURS_EVERY))
        found[name] = Contender(name, number * runs, number, results, every=OURS_EVERY)
    in_turns([alone, batched, *found.values()], ROUNDS)

    def line(contender: Contender, shown: Tensor, model: Any, steps: int, calls: float) -> dict[str, Any]:
        judged = {n: probabilities(j, shown).argmax(1) != labels for n, j in {"model": model, **court.oracles}.items()}
        return row(contender, shown, images, judged, steps, calls)

    made = batched.found[-1].clamp(-1, 1)
    calls = recipe.denoiser_calls + recipe.classifier_calls
    rows = [line(contender, made, networks.classifier, recipe.steps, calls) for contender in (alone, batched)]
    for name, contender in found.items():
        result: CounterfactualResult = contender.found[-1]
        steps = len(result.record.timesteps)
        rows.append(line(contender, result.counterfactual.clamp(-1, 1), rules[name][0], steps, result.network_calls))
    for one in rows:
        one["times faster"] = rows[0]["seconds per image"] / one["seconds per image"]
    same = float((torch.cat(alone.found).clamp(-1, 1) - made[spread]).abs().max())
    strengths = {name: options["scale"] for name, (_, _, options) in rules.items() if options["scale"] is not None}
    return {"rows": rows, "largest difference": same, "recipe": asdict(recipe), "strengths": strengths}


# ---- tables ----------------------------------------------------------------------------------------------------------


def validity(one: Mapping[str, Any]) -> float:
    """Share of images that flip the oracle, in the direction that flips fewer."""
    return min(one[f"{ORACLE}, {direction}"] for direction in DIRECTIONS)


def summary(size: str, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of the table: the mean over the seeds of a size.

    Args:
        size: of the networks.
        cells: of `measure`, one per seed.
    """
    lines = []
    recipe = [validity(cell["rows"][0]) for cell in cells]
    for same in zip(*(cell["rows"] for cell in cells), strict=True):
        beyond = [validity(one) - its for one, its in zip(same, recipe, strict=True)]
        over = {name: [one[name] for one in same] for name in same[0]}
        lines.append(
            {
                "networks": size,
                "seeds": len(same),
                **{name: over[name][0] for name in ("method", "batch", "steps")},
                "calls per image": mean_interval(over["calls per image"]),
                "seconds per image": mean_interval(over["seconds per image"]),
                "times faster": mean_interval(over["times faster"]),
                "times faster, worst seed": min(over["times faster"]),
                **{name: share_interval(shares, IMAGES) for name, shares in over.items() if name.endswith(DIRECTIONS)},
                "median L1": mean_interval(over["median L1"]),
                BEYOND: mean_interval(beyond),
                WORST_BEYOND: min(beyond),
            }
        )
    return lines


def targets(rows: Sequence[Mapping[str, Any]]) -> list[Target]:
    """The ratios that were asked for: at equal calls, and at an oracle validity not below the recipe's.

    Args:
        rows: of one size: the recipe one at a time, the recipe in one batch, and ours.
    """

    alone, batched, *rest = rows
    size, seeds = alone["networks"], alone["seeds"]
    runs = f"{2 * IMAGES} images a seed, networks of {seeds} seed{'s' * (seeds > 1)}"

    def times(one: Mapping[str, Any]) -> str:
        return f"{one['times faster']['mean']:.3g} times, worst seed {one['times faster, worst seed']:.3g}"

    found = [
        Target(
            f"speed of MONAI's recipe, {size} networks, in one batch against one image at a time (equal calls)",
            f"about {BATCHED} times as fast",
            times(batched),
            batched["times faster, worst seed"] >= BATCHED,
            runs,
        )
    ]
    for one in rest:
        valid = one[WORST_BEYOND] >= -1e-9
        beyond = f"beside the recipe {one[BEYOND]['mean']:+.2f}, worst seed {one[WORST_BEYOND]:+.2f}"
        others = "; ".join(
            f"{judge} {smaller(one, judge):.2f} (the recipe {smaller(alone, judge):.2f})" for judge in ("model", ROBUST)
        )
        found.append(
            Target(
                f"{SPEED}, {size} networks: {one['method']}, against MONAI's recipe one at a time",
                f"at least {AT_VALIDITY} times as fast, oracle validity (smaller direction) not below",
                f"{times(one)}, {'' if valid else 'not as '}valid ({beyond})",
                valid and one["times faster, worst seed"] >= AT_VALIDITY,
                f"{runs}, too few to show that validities are equal; smaller direction by the other judges: {others}",
            )
        )
    return found


def smaller(one: Mapping[str, Any], judge: str) -> float:
    """Mean over seeds of the share that flips a judge, in the direction that flips fewer."""
    return min(float(one[f"{judge}, {direction}"]["mean"]) for direction in DIRECTIONS)


def get_store() -> CellStore:
    """Where the cells are kept, with what decides them."""
    settings = {"recipes": [asdict(one) for one in RECIPES], "images": [IMAGES, CHOOSING], "rounds": ROUNDS}
    settings |= {"tuning": FINE_TUNING, "ours": OURS, "strengths": STRENGTHS, "epochs": joint_vs_single.EPOCHS}
    return CellStore("counterfactual_speed", settings, RESULTS / "cells")


def tables(store: CellStore) -> None:
    """Write the result file from the cells there are."""
    found = {size: {n: v for n in seeds if (v := store.get(Cell(DATA, size, n)))} for size, seeds in SEEDS.items()}
    found = {size: cells for size, cells in found.items() if cells}
    if not found:
        print("not measured yet: no table")
        return
    lines = {size: summary(size, list(cells.values())) for size, cells in found.items()}
    every = [(size, seed, cell) for size, cells in found.items() for seed, cell in cells.items()]
    recipes = "; ".join(
        f"{size}, seed {seed}: {cell['recipe']['steps'] * cell['recipe']['stride']} and {cell['recipe']['scale']:g}"
        for size, seed, cell in every
    )
    strengths = "; ".join(
        f"{size}, seed {seed}: " + ", ".join(f"{scale:g} ({name})" for name, scale in cell["strengths"].items())
        for size, seed, cell in every
    )
    environment = store.records()[0]["environment"]  # not that of a later rendering
    sizes = ", ".join(
        f"{size} {channels} ({len(found.get(size, ()))} of {len(SEEDS[size])} seeds run)"
        for size, channels in SIZES.items()
    )
    notes = [
        f"{2 * IMAGES} test images of PneumoniaMNIST a seed, half of each class, that all networks and oracles get "
        f"right. Channels of the networks: {sizes}. Flips are shares with Wilson's 95 % interval, other figures have "
        "95 % t-intervals over seeds. Every target counts by the worst seed, of speed and of validity: the smaller "
        "direction by the oracle beside that of the recipe of the same seed.",
        f"MONAI's recipe: {RECIPE.denoiser_calls} calls of the denoiser and {RECIPE.classifier_calls} of the "
        f"classifier's encoder with its gradient. Timestep (200, 600) and scale (3, 10, 30, 100) are chosen on "
        f"{2 * CHOOSING} validation images by the oracle with {COARSER} times fewer steps: {recipes}. One at a time "
        f"{ROUNDS} images were timed; the batch makes the same ones (largest difference "
        f"{max(cell['largest difference'] for _, _, cell in every):.1g}) and is what is judged.",
        f"Its classifier is that of clean images, tuned to noisy ones for {FINE_TUNING} steps, which are not counted; "
        "no training is. `model` is the classifier of clean images, and of ours the network that is explained.",
        "Ours: `head` is the rule `classifier`, whose guided steps go backward through the network; `class condition` "
        "is the rule `class_free`, two calls a guided step and nothing backward. Calls are of the whole network, the "
        "factual reconstruction is in them. The one strength is the smallest of "
        f"{', '.join(f'{one:g}' for one in STRENGTHS)} that flips most of the same validation images by the model "
        f"alone: {strengths}. Found for each: `{FAST}` and `{MAIN}`, `{CONDITION}` and the same with 8 steps.",
        f"Seconds of the processor, {environment['threads']} thread, measured in turns in one run; other work ran on "
        "the machine, and its time is not counted.",
    ]
    asked = [target for rows in lines.values() for target in targets(rows)]
    words = f"at least {AT_VALIDITY} times as fast at equal validity"
    asked += [Target(f"{SPEED}, {size} networks", words, "", None) for size in SIZES if size not in found]
    rows = [one for rows in lines.values() for one in rows]
    title = "What a counterfactual costs"
    write_result("counterfactual_speed", title, rows, targets=asked, notes=notes, environment=environment)


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, tiny trainings; writes nothing")
    parser.add_argument("--cells", nargs="*", help="size:seed ...; `none` only writes the table")
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="folder of the networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.quick:
        print(measure("default", 0, options.work, quick=True))
        return
    grid = [Cell(DATA, size, seed) for size, seeds in SEEDS.items() for seed in seeds]
    if options.cells is not None:
        grid = [cell for cell in grid if f"{cell.method}:{cell.seed}" in options.cells]
    store = get_store()
    store.run_missing(grid, lambda cell: measure(cell.method, cell.seed, options.work, quick=False))
    tables(store)


if __name__ == "__main__":
    main()
