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

import dataclasses
import unittest

import torch
from parameterized import parameterized

from benchmarks.speed import (
    DENOISER,
    OURS,
    VARIANTS,
    build,
    loss_rows,
    loss_target,
    losses_of,
    random_batch,
    ratio_notes,
    ratio_rows,
)


class TestVariants(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_all_compute_the_same_losses(self, dims):
        batch = random_batch(dims, 8, 2, torch.device("cpu"))
        expected = None
        for variant in VARIANTS:
            net = build(variant, dims)
            torch.manual_seed(1)
            for p in net.parameters():
                torch.nn.init.normal_(p, std=0.05)
            denoising, classification = losses_of(dataclasses.replace(variant, bf16=False), net.eval(), batch)
            expected = expected or (denoising, classification)
            torch.testing.assert_close(denoising, expected[0])
            if variant.classify:
                torch.testing.assert_close(classification, expected[1])
            self.assertEqual({p.dtype for p in net.parameters()}, {torch.float32})

    def test_losses_are_fp32_under_autocast(self):
        batch = random_batch(2, 8, 2, torch.device("cpu"))
        for loss in losses_of(OURS, build(OURS, 2), batch):
            self.assertEqual(loss.dtype, torch.float32)


class TestTables(unittest.TestCase):
    def test_ratios(self):
        seconds = {v.label: [3.0, 3.0, 6.0] for v in VARIANTS}
        seconds[OURS.label] = [1.0, 1.0, 1.0]
        seconds[DENOISER[1].label] = [2.0, 2.0, 2.0]
        rows = {row["step"]: row for row in ratio_rows(seconds, batch_size=6)}
        self.assertEqual(rows[OURS.label]["images/s"]["mean"], 6.0)
        self.assertEqual(rows[DENOISER[0].label]["ours is faster by"], {"low": 3.0, "mean": 3.0, "high": 4.5})
        notes = ratio_notes(seconds)
        self.assertIn("(sdpa): 3.00 x", notes[0])
        self.assertIn("(einsum): 2.00 x", notes[2])

    def test_one_seed_has_no_range(self):
        one = [{"denoising": [1.0], "classification": [0.5]}]
        rows = loss_rows({"bf16": one, "fp32": one})
        self.assertEqual([(row["within"], row["range over fp32 seeds"]) for row in rows], [(None, None)] * 2)
        target = loss_target(rows, 300, {"bf16": 1, "fp32": 1})
        self.assertEqual((target.met, target.about), (None, "1 seed in fp32, 1 in bf16: no range"))

    @parameterized.expand([([True, True], True, "2 of 2"), ([True, False], False, "1 of 2")])
    def test_every_window_counts(self, within, met, found):
        target = loss_target([{"within": one} for one in within], 300, {"bf16": 1, "fp32": 3})
        self.assertEqual((target.met, target.found), (met, f"{found} windows"))
        self.assertEqual(target.about, "3 seeds in fp32, 1 in bf16")

    def test_loss_within_the_range_of_the_seeds(self):
        fp32 = [{"denoising": [1.0], "classification": [0.5]}, {"denoising": [1.2], "classification": [0.6]}]
        bf16 = [{"denoising": [1.1], "classification": [0.8]}, {"denoising": [1.2], "classification": [0.7]}]
        denoising, classification = loss_rows({"bf16": bf16, "fp32": fp32})
        self.assertAlmostEqual(denoising["difference of the same seeds"], 0.05)
        self.assertAlmostEqual(denoising["range over fp32 seeds"], 0.2)
        self.assertTrue(denoising["within"])
        self.assertAlmostEqual(classification["difference of the same seeds"], 0.2)
        self.assertFalse(classification["within"])
        denoising, _ = loss_rows({"bf16": bf16[:1], "fp32": fp32})  # against its own seed, within the range of all
        self.assertAlmostEqual(denoising["difference of the same seeds"], 0.1)
        self.assertAlmostEqual(denoising["fp32, separate"], 1.0)
        self.assertAlmostEqual(denoising["range over fp32 seeds"], 0.2)


if __name__ == "__main__":
    unittest.main()
