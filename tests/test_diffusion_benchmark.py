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

import torch
from parameterized import parameterized

from benchmarks import diffusion_classifier as benchmark
from benchmarks.render import render_table
from monai_jointdiff.inferers import DiffusionClassifierInferer, replay
from tests.inferers.test_diffusion_classifier import SCHEDULER, TwoMeans, between


def row(classifier: str, calls: float, agreement: float, low: float | None, high: float | None) -> dict[str, Any]:
    difference = {"mean": 0.0, "low": low, "high": high}
    figures = {"calls": {"mean": calls}, "agreement": {"mean": agreement}, "accuracy difference": difference}
    return {"classifier": classifier, **figures}


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
            (1.0, None, None, False),  # of one seed
        ]
    )
    def test_both_halves_of_the_target(self, agreement, low, high, met):
        self.assertEqual(benchmark.same_decisions(row("", 1, agreement, low, high)), met)

    def test_each_way_within_its_calls(self):
        rows = [
            row("majority, all draws", 1002, 1, 0, 0),
            row("majority, random draws, error rate 0.01", 40, 1, 0, 0),  # neither of the ways that were asked for
            row("majority, stratified draws, error rate 0.01", 51, 1, 0, 0),
            row("majority, stratified draws, error rate 0.05", 50, 0.9756, 0, 0),
            row("majority, stratified draws, error rate 0.05, head nominates at 0.9", 12, 1, 0, 0),
        ]
        _, stopping, nominating, both = benchmark.verdicts(rows)
        self.assertRegex(stopping, "MISSED.*rate 0.05: agreement 0.976")
        self.assertRegex(nominating, r"MISSED.*none, the fewest calls are 12.0")
        self.assertRegex(
            both, r"random draws, error rate 0.01 \(40 calls\).*stratified.*0.01 \(51.*nominates at 0.9 \(12"
        )
        self.assertNotIn("all draws (", both)
        rows += [
            row("mean, stratified draws, error rate 0.05", 49, 0.985, -0.004, 0.006),
            row("mean, stratified draws, error rate 0.05, head nominates at 0.9", 9, 0.985, -0.004, 0.006),
        ]
        for note in benchmark.verdicts(rows)[1:3]:
            self.assertRegex(note, "met.*the best is mean, .*agreement 0.985")

    @parameterized.expand(
        [
            (1.0, 1.0, 40, "met"),
            (0.9, 1.0, 40, "MISSED"),  # by the clock
            (1.0, 0.9, 40, "MISSED"),  # by the processor
            (1.0, 1.0, 39, "MISSED"),  # other decisions
        ]
    )
    def test_throughput(self, wall, processor, same, verdict):
        def way(images: int, wall: float, processor: float, same: int) -> dict[str, Any]:
            figures = {"seconds": wall, "processor seconds": processor, "answer of all draws": same}
            return {"images": images, "calls": 1002.0, "right": 1, **figures}

        cell = {
            "batched": way(40, 10.0, 5.0, 40),
            "one call at a time": way(4, 50.0, 25.0, 4),
            "batched, stopping": way(40, 1 / wall, 0.5 / processor, same),
        }
        stopping = {0: {"majority, stratified draws, error rate 0.05": {"calls": 77.0}}}
        name, title, rows, options = benchmark.throughput_table({0: cell}, stopping)
        self.assertEqual([r["how"] for r in rows], ["one call at a time", "batched", "batched, stopping"])
        self.assertEqual((rows[0]["times"], rows[1]["times"], rows[1]["times, processor"]), (1.0, 5.0, 5.0))
        self.assertRegex(options["notes"][1], "5.0, by the processor's seconds 5.0: met")
        self.assertRegex(
            options["notes"][2], f": {verdict}; the answer of all draws on {same} of 40 images.*take 1002 calls.*77"
        )
        self.assertIn(f"{same} of 40", render_table({"name": name, "title": title, "rows": rows, **options}))


class TestCurve(unittest.TestCase):
    def test_fixed_images_and_whole_test_part_are_kept_apart(self):
        def cell(shift: float) -> dict[str, dict[str, float]]:
            fixed = {str(n): 0.7 + 0.009 * place + shift for place, n in enumerate(benchmark.NUMBERS)}
            whole = {n: value + 0.1 for n, value in fixed.items() if int(n) <= benchmark.FEW}
            worse = {n: value - (0.02 if n == "25" else 0) for n, value in whole.items()}
            values = {"majority": fixed, "mean": fixed}
            return values | {"majority, whole test part": whole, "mean, whole test part": worse}

        _, _, rows, options = benchmark.curve_table({seed: cell(0.01 * seed) for seed in range(3)})
        of = {r["draws"]: r for r in rows}
        self.assertAlmostEqual(of[25]["mean, whole test part"]["mean"], 0.826)
        self.assertAlmostEqual(of[25]["mean - majority, whole test part"]["high"], -0.02)
        self.assertNotIn("mean, whole test part", of[51])
        self.assertIn(
            "majority: the mean over seeds is within one point of its end from 251 draws on.", options["notes"]
        )
        self.assertIn("mean - majority: the interval excludes 0 in 0 of 9.", options["notes"])
        expected = "mean - majority, whole test part: the interval excludes 0 in 1 of 5: 25 draws (-0.02)."
        self.assertEqual(options["notes"][-1], expected)


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
