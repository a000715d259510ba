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

from __future__ import annotations

import unittest
from typing import Any

import numpy as np
import torch
from parameterized import parameterized

from benchmarks import diffusion_classifier as benchmark
from benchmarks.render import render_table
from monai_jointdiff.inferers import DiffusionClassifierInferer, replay
from tests.inferers.test_diffusion_classifier import SCHEDULER, TwoMeans, between


def row(
    classifier: str,
    calls: float,
    agreement: float,
    low: float | None,
    high: float | None,
    chosen: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """A row whose calls and agreement on the chosen images are those of all unless they are given."""
    on_chosen = chosen or (calls, agreement)
    figures = {
        "calls": calls,
        "agreement": agreement,
        "agreement, others": agreement,
        "calls, chosen": on_chosen[0],
        "agreement, chosen": on_chosen[1],
    }
    difference = {"mean": 0.0, "low": low, "high": high}
    wide = {"mean": 0.0, "low": -0.04, "high": 0.04}  # over seeds, which is not what is judged
    named = {name: {"mean": value} for name, value in figures.items()}
    return {"classifier": classifier, "accuracy difference": wide, benchmark.OVER_IMAGES: difference, **named}


class TestRecordings(unittest.TestCase):
    @parameterized.expand([("majority",), ("mean",)])
    def test_draws_until_the_lowest_error_rate_answer_for_higher_ones(self, rule):
        x, net = between(40), TwoMeans((-0.2, 0.2))
        lowest = DiffusionClassifierInferer(SCHEDULER, 51, rule=rule, error_rate=0.01)(x, net)
        self.assertTrue(bool(lowest.draw_errors.isnan().any()))  # some were stopped: no recording of all draws
        inferer = DiffusionClassifierInferer(SCHEDULER, 51, rule=rule, error_rate=0.1)
        expected, found = inferer(x, net), replay(lowest.draw_errors, inferer)
        self.assertTrue(torch.equal(found.prediction, expected.prediction))
        self.assertTrue(torch.equal(found.network_calls, expected.network_calls))
        self.assertLess(float(found.network_calls.mean()), float(lowest.network_calls.mean()))


class TestVerdicts(unittest.TestCase):
    @parameterized.expand(
        [
            (0.98, -0.01, 0.01, True),
            (0.9756, -0.01, 0.01, False),  # shown as 0.98 with two decimals
            (1.0, -0.011, 0.005, False),
            (1.0, -0.005, 0.011, False),
        ]
    )
    def test_both_halves_of_the_target(self, agreement, low, high, met):
        self.assertEqual(benchmark.same_decisions(row("", 1, agreement, low, high)), met)

    def test_each_way_within_its_calls(self):
        rows = [
            row("majority, all draws", 1002, 1, 0, 0),
            row("majority, random draws, error rate 0.01", 40, 1, 0, 0),
            row("majority, stratified draws, error rate 0.01", 51, 1, 0, 0),
            row("majority, stratified draws, error rate 0.05", 50, 0.9756, 0, 0),
            row("majority, stratified draws, error rate 0.05, head nominates at 0.9", 12, 1, 0, 0),
        ]
        stopping, nominating = benchmark.calls_targets(rows, "3 seeds")
        _, random, both = benchmark._other_decisions(rows)
        self.assertRegex(
            stopping.sentence(), "stratified.*at most 50 calls: MISSED.*0.976.*50.0 calls; .*rate 0.05;.*3 s"
        )
        self.assertRegex(
            nominating.sentence(), "head.*at most 10 calls: MISSED .none takes so few, the fewest are 12.0"
        )
        self.assertRegex(random, "^Not asked for: .* random draws .*: met .*; majority, random draws, error rate 0.01;")
        self.assertRegex(
            both, r"random draws, error rate 0.01 \(40 calls\).*stratified.*0.01 \(51.*nominates at 0.9 \(12"
        )
        self.assertNotIn("all draws (", both)
        rows += [
            row("mean, stratified draws, error rate 0.05", 49, 0.985, -0.004, 0.006),
            row("mean, stratified draws, error rate 0.05, head nominates at 0.9", 9, 0.985, -0.004, 0.006),
        ]
        for target in benchmark.calls_targets(rows, "3 seeds"):
            self.assertTrue(target.met)
            self.assertRegex(target.details, "^agreement 0.985.* calls; mean, ")

    def test_the_way_is_chosen_on_the_chosen_images_and_judged_on_all(self):
        random = row("mean, random draws, error rate 0.1", 1, 1, 0, 0)
        nominated = row("mean, stratified draws, error rate 0.1, head nominates at 0.9", 1, 1, 0, 0)
        fewer = row("mean, stratified draws, error rate 0.1", 40, 0.97, 0, 0, chosen=(45, 0.99))
        as_good = row("mean, stratified draws, error rate 0.05", 48, 1, 0, 0, chosen=(49, 0.99))
        worse = row("mean, stratified draws, error rate 0.2", 30, 1, 0, 0, chosen=(20, 0.98))
        target = benchmark.calls_targets([random, nominated, worse, as_good, fewer], "")[0]
        self.assertFalse(target.met)
        self.assertRegex(target.details, "^agreement 0.970.* 40.0 calls; mean, stratified draws, error rate 0.1;")
        dear = row("mean, stratified draws, error rate 0.1", 51, 1, 0, 0, chosen=(45, 0.99))
        target = benchmark.calls_targets([random, nominated, dear], "")[0]
        self.assertFalse(target.met)
        self.assertRegex(target.found, "agreement 1.000.* 51.0 calls")

    @parameterized.expand(
        [
            (1.0, 1.0, 40, True),
            (0.9, 1.0, 40, False),  # by the clock
            (1.0, 0.9, 40, False),  # by the processor
            (1.0, 1.0, 39, False),  # other decisions
        ]
    )
    def test_throughput(self, wall, processor, same, met):
        def way(images: int, wall: float, processor: float, same: int) -> dict[str, Any]:
            figures = {"seconds": wall, "processor seconds": processor, "answer of all draws": same}
            return {"images": images, "calls": 1002.0, "right": 1, **figures}

        cell = {
            "batched": way(40, 10.0, 5.0, 40),
            "one call at a time": way(4, 50.0, 25.0, 4),
            "batched, stopping": way(40, 1 / wall, 0.5 / processor, same),
        }
        stopping = {0: {"mean, stratified draws, error rate 0.1": {"whole": {"calls": 77.0}}}}
        name, title, rows, options = benchmark.throughput_table({0: cell}, stopping)
        self.assertEqual([r["how"] for r in rows], ["one call at a time", "batched", "batched, stopping"])
        self.assertEqual((rows[0]["times"], rows[1]["times"], rows[1]["times, processor"]), (1.0, 5.0, 5.0))
        batched, stopped = options["targets"]
        self.assertTrue(batched.met)
        self.assertRegex(
            batched.sentence(), "at least 4 times.*5.0 times, by the processor's seconds 5.0; one run, seed 0"
        )
        self.assertIs(stopped.met, met)
        self.assertRegex(stopped.sentence(), f"at least 50 times.*the answer of all draws on {same} of 40 images")
        self.assertRegex(options["notes"][1], "take 1002 calls.*77")
        self.assertIn(
            f"{same} of 40", render_table({"name": name, "title": title, "rows": rows, "notes": options["notes"]})
        )


class TestUnusual(unittest.TestCase):
    def test_each_kind_by_the_mean_over_seeds(self):
        def cell(shift: float) -> dict[str, dict[str, float]]:
            aurocs = {"ham10000_64": 0.95 + shift, "busi_64": 0.94 + shift, "phantoms": 0.99, "kermany_cxr_64": 0.1}
            return {kind: {"errors, 5 calls": auroc, "max-softmax": 0.5} for kind, auroc in aurocs.items()}

        _, _, _, options = benchmark.unusual_table({0: cell(0.01), 1: cell(-0.004)})
        found = {target.figure.split(", ")[1].split()[0]: target for target in options["targets"]}
        self.assertEqual(
            {kind: t.met for kind, t in found.items()}, {"ham10000_64": True, "busi_64": False, "phantoms": True}
        )
        self.assertRegex(found["ham10000_64"].sentence(), r"at least 0.95: met \(0.953 \[.*; 2 of 3 seeds\)")


class TestCurve(unittest.TestCase):
    def test_rules_are_paired_by_seed(self):
        def cell(shift: float) -> dict[str, dict[str, float]]:
            majority = {str(n): 0.7 + 0.009 * place + shift for place, n in enumerate(benchmark.NUMBERS)}
            return {"majority": majority, "mean": {n: v - (0.02 if n == "25" else 0) for n, v in majority.items()}}

        _, _, rows, options = benchmark.curve_table({seed: cell(0.01 * seed) for seed in range(3)})
        of = {r["draws"]: r for r in rows}
        self.assertAlmostEqual(of[25]["mean"]["mean"], 0.726)
        self.assertAlmostEqual(of[25]["mean - majority"]["high"], -0.02)
        self.assertIn(
            "majority: the mean over seeds is within one point of its end from 251 draws on.", options["notes"]
        )
        self.assertEqual(options["notes"][-1], "mean - majority: the interval excludes 0 in 1 of 9: 25 draws (-0.02).")


class TestStopping(unittest.TestCase):
    def test_parts_are_kept_apart(self):
        def cell(shift: float) -> dict[str, Any]:
            def figures(agreement: float, calls: float) -> dict[str, Any]:
                of_part = {"calls": calls, "agreement": agreement, "accuracy": 0.8, "accuracy difference": shift}
                return of_part | {"better and worse": [1, 2]}

            changes = "+0-" + "0" * 21

            kinds = [f"{kind} draws, error rate {rate}" for kind in ("random", "stratified") for rate in (0.01, 0.05)]
            kinds += ["stratified draws, error rate 0.05, head nominates at 0.9"]
            rates = [f"{kind} draws, error rate {rate}" for kind in ("random", "stratified") for rate in (0.1, 0.2)]
            parts = {"chosen": figures(1.0, 30), "others": figures(0.96, 60), "whole": figures(0.97, 50)}
            parts |= {"changes": changes}
            return {f"{rule}, {kind}": parts for rule in benchmark.RULES for kind in (*kinds, *rates)}

        _, _, rows, options = benchmark.stopping_table({seed: cell(0.001 * seed) for seed in range(3)})
        first = rows[0]
        self.assertEqual([first[key]["mean"] for key in ("calls", "calls, chosen", "calls, others")], [50, 30, 60])
        self.assertAlmostEqual(first["agreement"]["mean"], 0.97)
        self.assertAlmostEqual(first["agreement, others"]["mean"], 0.96)
        self.assertEqual(first["images better, worse"], "3, 6")
        stopping, nominating = options["targets"]
        on_others = "agreement 0.960 on the images it was not chosen on"
        self.assertRegex(
            stopping.details, f"^agreement 0.970.*50.0 calls; .*{on_others}; .*over seeds.* 0.0010.*; 3 of 3 s"
        )
        self.assertRegex(nominating.details, "^none takes so few, the fewest are 30.0 .*; 3 of 3 seeds")
        self.assertRegex(options["notes"][-1], "Stratified draws take more in 0 of 8")


class TestOverImages(unittest.TestCase):
    def test_images_are_drawn_with_their_differences_in_all_seeds(self):
        clustered = ["+" * 20 + "0" * 980] * 3
        apart = ["0" * (20 * seed) + "+" * 20 + "0" * (980 - 20 * seed) for seed in range(3)]
        widths = []
        for changes, count, share in ((clustered, 20, 1.0), (apart, 60, 1 / 3)):
            found = benchmark.difference_over_images(changes)
            self.assertAlmostEqual(found["mean"], 0.02)
            values = np.array([share] * count + [0.0] * (1000 - count))
            widths.append(found["high"] - found["low"])
            self.assertAlmostEqual(widths[-1] / (2 * 1.96 * values.std() / 1000**0.5), 1, delta=0.06)
        self.assertGreater(widths[0], 1.5 * widths[1])

    def test_worse_is_negative(self):
        self.assertAlmostEqual(benchmark.difference_over_images(["--0+", "-000"])["mean"], -0.25)


class TestStratifiedAgainstRandom(unittest.TestCase):
    def test_difference_is_paired_by_seed(self):
        def cell(shift: float) -> dict[str, Any]:
            random = {"agreement": 0.9 + shift, "accuracy": 0.8}
            return {"mean, 5": {"random": random, "stratified": {"agreement": 0.92 + shift, "accuracy": 0.8}}}

        _, _, rows, options = benchmark.draws_table({0: cell(0.0), 1: cell(0.03), 2: cell(-0.02)})
        difference = rows[0]["agreement, stratified - random"]
        for key in ("mean", "low", "high"):
            self.assertAlmostEqual(difference[key], 0.02)
        self.assertIn("excludes 0 in 1 of 2: mean, 5 draws, agreement (+0.02).", options["notes"][-1])


if __name__ == "__main__":
    unittest.main()
