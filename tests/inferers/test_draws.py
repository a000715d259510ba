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

import torch
from parameterized import parameterized

from monai_jointdiff.inferers import NoiseDraws, stratified_timesteps


class TestStratifiedTimesteps(unittest.TestCase):
    def test_midpoints_of_equal_parts(self):
        for count in (1, 2, 5, 51, 250):
            drawn = stratified_timesteps(count, 0, 999)
            expected = [int((n + 0.5) * 1000 / count) for n in range(count)]
            self.assertEqual(sorted(drawn.tolist()), expected)

    def test_every_beginning_is_spread(self):
        """Of any n first draws, no half of the range holds more than three more than the other."""
        drawn = stratified_timesteps(101, 0, 999)
        for n in range(2, 102):
            upper = int((drawn[:n] >= 500).sum())
            self.assertLessEqual(abs(2 * upper - n), 3)

    def test_range(self):
        drawn = stratified_timesteps(40, 100, 139)
        self.assertEqual(sorted(drawn.tolist()), list(range(100, 140)))


class TestNoiseDraws(unittest.TestCase):
    def test_function_of_seed_and_number(self):
        """Neither the batch nor how many draws are planned changes a draw."""
        for kind in ("stratified", "random"):
            many = NoiseDraws([3, 4, 5], (1, 4, 4), 9, 0, 99, kind)
            alone = NoiseDraws([4], (1, 4, 4), 20, 0, 99, kind)
            self.assertTrue(all(torch.equal(many.noise(1), alone.noise(0)) for _ in range(9)))
        self.assertTrue(torch.equal(many.timesteps[1], alone.timesteps[0, :9]))

    def test_random_timesteps_are_uniform(self):
        drawn = NoiseDraws(range(400), (1,), 25, 10, 19, "random").timesteps
        share = torch.bincount(drawn.flatten(), minlength=20)[10:] / drawn.numel()
        self.assertEqual((int(drawn.min()), int(drawn.max())), (10, 19))
        self.assertTrue(bool(((share - 0.1).abs() < 5 * (0.09 / drawn.numel()) ** 0.5).all()))

    @parameterized.expand([(7,), (2**40 + 7,), (2**64 - 1,)])
    def test_random_timesteps_are_another_stream_than_the_noise(self, seed):
        """A CPU generator looks at the low 32 bits of its seed only: the streams must differ in those."""
        drawn = NoiseDraws([seed], (1,), 200, 0, 999, "random").timesteps[0]
        stream = torch.randint(0, 1000, (200,), generator=torch.Generator().manual_seed(seed))
        self.assertLess(int((drawn == stream).sum()), 10)

    def test_noise_is_standard_normal_and_new_each_time(self):
        draws = NoiseDraws([0], (1, 64, 64), 2, 0, 9)
        first, second = draws.noise(0), draws.noise(0)
        self.assertAlmostEqual(float(first.std()), 1.0, delta=0.05)
        self.assertLess(abs(float((first * second).mean())), 0.06)

    def test_unknown_kind(self):
        with self.assertRaisesRegex(ValueError, "NoiseDraws: kind must be one of.*got 'sobol'"):
            NoiseDraws([0], (1,), 2, 0, 9, "sobol")


if __name__ == "__main__":
    unittest.main()
