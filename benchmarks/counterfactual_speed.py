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

    JOINTDIFF_DATA=... python -m benchmarks.counterfactual_speed [--quick] [--cells none] [--seed N] [--work DIR]

The recipe is the loop of MONAI's anomaly detection tutorial with classifier guidance (Wolleb et al. 2022,
https://arxiv.org/abs/2203.04306): a denoiser leads the image by reversed DDIM to noise; on the way back the gradient of
a separate classifier at x_t is added to the predicted noise. Nothing goes backward through the denoiser, and no factual
reconstruction is made. Its two networks and ours have the same size; its classifier has seen noisy images, as MONAI's.

Measured in one run, in turns: the recipe one image at a time; the same loop with all images in one batch (batching
alone); ours with one strength for all images, and with the strength found for each. The clock is that of the process:
what else runs on the machine takes the core away from all in turn, and is not counted. All are scored by the oracle of
`benchmarks.counterfactual`.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import ROOT, Cell, CellStore, Target, write_result
from benchmarks.counterfactual import (
    ABLATION,
    DATA,
    DIRECTIONS,
    FAST,
    METHODS,
    ORACLE_EPOCHS,
    ROBUST_EPOCHS,
    Court,
    get_network,
    probabilities,
    share_interval,
)
from monai_jointdiff.inferers import CounterfactualInferer, CounterfactualResult
from monai_jointdiff.metrics import l1_distance

SEED = 1
IMAGES = 8  # of each class
ROUNDS = 3  # turns of the interleaved run, and images of the recipe one at a time
OURS_EVERY = 2  # rounds: ours takes its turn in every second
FIXED = "T500_scale3"
FINE_TUNING = 200  # steps of the classifier on noisy images
BATCHED, AT_VALIDITY = 5, 20  # targets: times faster at equal calls, and at an equal validity
Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """MONAI's recipe.

    Args:
        steps: out, and back.
        stride: timesteps between two steps; 1 is the tutorial's grid.
        scale: of the gradient.
    """

    steps: int = 200
    stride: int = 3
    scale: float = 30.0

    @property
    def timestep(self) -> int:
        """Where the way back begins."""
        return self.steps * self.stride

    @property
    def denoiser_calls(self) -> int:
        """Per image."""
        return 2 * self.steps

    @property
    def classifier_calls(self) -> int:
        """Per image, with their gradients."""
        return self.steps


# By the oracle, in favour of the recipe, on 30 validation images of seed 1 with 20 steps: timesteps to 200 and to 600,
# scales 3, 10 and 30 there, 10 and 30 at 200.
RECIPE = Recipe()


def ddim(sample: Tensor, epsilon: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor) -> Tensor:
    """One deterministic step of DDIM, toward noise or away from it (Song et al. 2020, equation 12 with eta = 0).

    Args:
        sample: (N, C, *spatial) at alpha_bar.
        epsilon: predicted noise in it.
        alpha_bar: where the sample stands.
        alpha_bar_next: where it goes.
    """
    clean = (sample - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
    return alpha_bar_next.sqrt() * clean + (1 - alpha_bar_next).sqrt() * epsilon


def monai_recipe(
    images: Tensor, target: Tensor, denoiser: Predict, classifier: Predict, alphas_cumprod: Tensor, recipe: Recipe
) -> Iterator[Tensor]:
    """Reversed DDIM with the denoiser, then DDIM with the gradient of a separate classifier at x_t.

    Args:
        images: (N, C, *spatial) in [-1, 1].
        target: classes (N,).
        denoiser: predicted noise of (x_t, t).
        classifier: logits (N, K) of (x_t, t).
        alphas_cumprod: (T,).
        recipe: steps and scale.

    Yields:
        the sample after each of the 2 steps steps; the last is the counterfactual.
    """
    alphas_cumprod = alphas_cumprod.to(images)
    grid = range(0, recipe.timestep + 1, recipe.stride)
    sample = images
    for now, following in zip(grid[:-1], grid[1:], strict=True):
        with torch.no_grad():
            epsilon = denoiser(sample, torch.full((len(images),), now))
            sample = ddim(sample, epsilon, alphas_cumprod[now], alphas_cumprod[following])
        yield sample
    for now, following in zip(grid[:0:-1], grid[-2::-1], strict=True):
        timesteps = torch.full((len(images),), now)
        with torch.no_grad():
            epsilon = denoiser(sample, timesteps)
        with torch.enable_grad():
            x = sample.detach().requires_grad_()
            log_probability = classifier(x, timesteps).log_softmax(1).gather(1, target[:, None]).sum()
            (gradient,) = torch.autograd.grad(log_probability, x)
        epsilon = epsilon - recipe.scale * (1 - alphas_cumprod[now]).sqrt() * gradient
        sample = ddim(sample, epsilon, alphas_cumprod[now], alphas_cumprod[following])
        yield sample


def of_noisy_images(classifier: Any) -> Predict:
    """Logits of (x_t, t)."""
    return lambda x, timesteps: classifier.head(classifier.encode(x, timesteps))


def get_noisy_classifier(
    network: Any, images: Tensor, labels: Tensor, alphas_cumprod: Tensor, cache: Path, steps: int, seed: int
) -> Any:
    """The separate classifier, tuned to noisy images as MONAI's is, once.

    Args:
        network: the classifier of clean images.
        images: (N, C, H, W) in [-1, 1].
        labels: (N,).
        alphas_cumprod: (T,) of the timesteps to learn.
        cache: where to keep the weights.
        steps: of AdamW, 32 images each.
        seed: of order, timesteps and noise.
    """
    tuned = copy.deepcopy(network)
    if cache.is_file():
        tuned.load_state_dict(torch.load(cache, weights_only=True))
        return tuned.eval()
    torch.manual_seed(seed)
    learned = [p for n, p in tuned.named_parameters() if not n.startswith(("up_blocks", "out"))]
    optimizer = torch.optim.AdamW(learned, 3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    alphas_cumprod = alphas_cumprod.to(images)
    tuned.train()
    for _ in range(steps):
        index = torch.randint(len(images), (32,))
        timesteps = torch.randint(len(alphas_cumprod), (32,))
        level = alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        noisy = level.sqrt() * images[index] + (1 - level).sqrt() * torch.randn_like(images[index])
        optimizer.zero_grad()
        F.cross_entropy(of_noisy_images(tuned)(noisy, timesteps), labels[index]).backward()
        optimizer.step()
        schedule.step()
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tuned.state_dict(), cache)
    return tuned.eval()


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


def row(
    contender: Contender, shown: Tensor, images: Tensor, judged: Mapping[str, Tensor], steps: int, calls: float
) -> dict[str, Any]:
    """A line of the table.

    Args:
        contender: whose.
        shown: its counterfactuals (N, C, H, W) in [-1, 1].
        images: (N, C, H, W); the first half is normal.
        judged: whether each image flips (N,), by judge.
        steps: of the way back.
        calls: of networks, per image.
    """
    halves = {judge: flipped.double().chunk(2) for judge, flipped in judged.items()}
    return {
        "method": contender.method,
        "batch": contender.batch,
        "steps": steps,
        "calls per image": calls,
        "seconds per image": contender.seconds / contender.images,
        **{
            f"{judge}, {direction}": share_interval([float(half.mean())], len(half))
            for judge, both in halves.items()
            for direction, half in zip(DIRECTIONS, both, strict=True)
        },
        "median L1": float(torch.as_tensor(l1_distance(shown, images)).median()),
    }


def targets(rows: Sequence[Mapping[str, Any]]) -> list[Target]:
    """The ratios that were asked for: at equal calls, and at an oracle validity not below the recipe's.

    Args:
        rows: the recipe one at a time, the recipe in one batch, and ours.
    """

    def validity(one: Mapping[str, Any]) -> float:
        return min(one[f"oracle, {direction}"]["mean"] for direction in DIRECTIONS)  # the smaller one counts

    alone, batched, *rest = rows
    times, images = batched["times faster"], f"{2 * IMAGES} images, networks of one seed"
    found = [
        Target(
            "speed of MONAI's recipe for counterfactuals, in one batch against one image at a time (equal calls)",
            f"about {BATCHED} times as fast",
            f"{times:.1f} times",
            times >= BATCHED,
            images,
        )
    ]
    for one in rest:
        times, valid = one["times faster"], validity(one) >= validity(alone)
        of_both = f"{validity(one):.3f}, of the recipe {validity(alone):.3f}"
        found.append(
            Target(
                f"speed of counterfactuals: {one['method']}, against MONAI's recipe one at a time",
                f"at least {AT_VALIDITY} times as fast, oracle validity (smaller direction) not below",
                f"{times:.1f} times, {'' if valid else 'not as '}valid ({of_both})",
                valid and times >= AT_VALIDITY,
                f"{images}, too few to show that validities are equal",
            )
        )
    return found


def get_store() -> CellStore:
    """Where the cell is kept, with what decides it."""
    ours_settings = {"fixed": ABLATION[FIXED], "searched": METHODS[FAST]}
    settings = {"recipe": asdict(RECIPE), "images": IMAGES, "rounds": ROUNDS, "tuning": FINE_TUNING, **ours_settings}
    return CellStore("counterfactual_speed", settings)


def tables(store: CellStore, seed: int) -> None:
    """Write the result file from the cell there is.

    Args:
        store: where it is.
        seed: of the networks.
    """
    cell = Cell(DATA, "costs", seed)
    values = store.get(cell)
    if values is None:
        print("not measured yet: no table")
        return
    rows, half = values["rows"], IMAGES
    notes = [
        f"{2 * half} test images of PneumoniaMNIST, half of each class, that both classifiers and the oracle get "
        f"right; networks of seed {seed}. Flips are shares of {half} images with Wilson's 95 % interval.",
        f"MONAI's recipe: timesteps up to {RECIPE.timestep}, scale {RECIPE.scale:g}, chosen on 30 validation images by "
        f"the oracle; {RECIPE.denoiser_calls} calls of the denoiser and {RECIPE.classifier_calls} of the classifier's "
        f"encoder with its gradient. One at a time {ROUNDS} images were timed; the batch makes the same ones (largest "
        f"difference {values['largest difference']:.1g}) and is what is judged.",
        f"Its classifier is that of clean images, tuned to noisy ones for {FINE_TUNING} steps, which are not counted; "
        "no training is. `model` is the classifier of clean images, and of ours the joint network.",
        "Ours: calls are of the whole network; guided steps go backward through it. The factual reconstruction is in "
        "them. The one strength is that of a row of the ablation, whose test figures on seed 0 had been seen; the "
        f"strength found is that of the method `{FAST}`, 8 steps from T' = 600. The defaults, 20 steps from T' = 500, "
        "take about 280 calls an image and were not timed.",
        "Seconds of the processor, one thread, measured in turns in one run; other work ran on the machine, and its "
        "time is not counted.",
    ]
    title, asked = "What a counterfactual costs", targets(rows)
    write_result("counterfactual_speed", title, rows, targets=asked, notes=notes, environment=store.environment(cell))


def measure(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """Run all of them in turns: the rows of the table.

    Args:
        seed: of the networks.
        work: folder of the networks.
        quick: two images of each class, few steps.
    """
    recipe = Recipe(steps=10, stride=60) if quick else RECIPE
    court = Court(work / "counterfactual", 2 if quick else IMAGES, ORACLE_EPOCHS, ROBUST_EPOCHS)
    two: Any
    two, description = get_network("two_networks", seed, work)
    joint, _ = get_network(FAST, seed, work)
    scheduler = description.build_scheduler("ddim")
    levels = scheduler.alphas_cumprod
    cache = work / "counterfactual" / f"{'quick_' if quick else ''}noisy_classifier_{DATA}_{seed}.pt"
    learned, steps = levels[: recipe.timestep + 1], 2 if quick else FINE_TUNING
    noisy = get_noisy_classifier(two.classifier, *court.parts["train"], learned, cache, steps, seed)
    images, labels = court.trial(joint, two.classifier)
    target = 1 - labels

    def denoiser(x: Tensor, timesteps: Tensor) -> Tensor:
        return scheduler.predict_epsilon(two.denoiser(x, timesteps), timesteps, x)

    def loop(some: Tensor, toward: Tensor) -> Iterator[Tensor]:
        return monai_recipe(some, toward, denoiser, of_noisy_images(noisy), levels, recipe)

    number, steps = len(images), 2 * recipe.steps
    spread = torch.linspace(0, number - 1, ROUNDS).round().long()  # of both classes
    alone = Contender("MONAI's recipe, one at a time", ROUNDS, 1, one_at_a_time(loop, images[spread], target[spread]))
    pieces = together(loop(images, target), steps, ROUNDS)
    batched = Contender("MONAI's recipe, all in one batch", number, number, pieces)
    found = {}
    for name, rule in (("one strength for all", ABLATION[FIXED]), ("strength found for each", METHODS[FAST])):
        pieces, runs = ours(rule, scheduler, joint, images, target), len(range(0, ROUNDS, OURS_EVERY))
        found[name] = Contender(f"ours, {name}", number * runs, number, pieces, every=OURS_EVERY)
    in_turns([alone, batched, *found.values()], ROUNDS)

    def line(contender: Contender, shown: Tensor, model: Any, steps: int, calls: float) -> dict[str, Any]:
        judged = {n: probabilities(j, shown).argmax(1) != labels for n, j in {"model": model, **court.oracles}.items()}
        return row(contender, shown, images, judged, steps, calls)

    made = batched.found[-1].clamp(-1, 1)
    calls = recipe.denoiser_calls + recipe.classifier_calls
    rows = [line(contender, made, two.classifier, recipe.steps, calls) for contender in (alone, batched)]
    for contender in found.values():
        result: CounterfactualResult = contender.found[-1]
        steps = len(result.record.timesteps)
        rows.append(line(contender, result.counterfactual.clamp(-1, 1), joint, steps, result.network_calls))
    for one in rows:
        one["times faster"] = rows[0]["seconds per image"] / one["seconds per image"]
    same = float((torch.cat(alone.found).clamp(-1, 1) - made[spread]).abs().max())
    return {"rows": rows, "largest difference": same}


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two images of each class, few steps; writes nothing")
    parser.add_argument("--cells", choices=["none"], help="`none` only writes the table")
    parser.add_argument("--seed", type=int, default=SEED, help="of the networks")
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="folder of the networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.quick:
        print(measure(options.seed, options.work, quick=True))
        return
    store = get_store()
    if options.cells is None:
        store.run_missing([Cell(DATA, "costs", options.seed)], lambda c: measure(c.seed, options.work, quick=False))
    tables(store, options.seed)


if __name__ == "__main__":
    main()
