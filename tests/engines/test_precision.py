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
from unittest import mock

import torch
from parameterized import parameterized

from monai_jointdiff.engines import precision
from monai_jointdiff.engines.precision import has_fast_bf16, refuse_bf16_at_depth_two, resolve_autocast

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


class TestResolveAutocast(unittest.TestCase):
    @parameterized.expand(
        [
            ({"avx512f", "avx512_bf16"}, torch.bfloat16),
            ({"amx_tile", "amx_bf16"}, torch.bfloat16),
            ({"avx2", "avx512f"}, None),
            (set(), None),
        ]
    )
    def test_auto_on_a_cpu(self, flags, expected):
        with mock.patch.object(precision, "_cpu_flags", return_value=flags):
            self.assertEqual(resolve_autocast("auto", CPU), expected)
            self.assertEqual(resolve_autocast("fp32", "cpu"), None)
            self.assertEqual(resolve_autocast("bf16", "cpu"), torch.bfloat16)  # slower, but asked for

    @parameterized.expand([(True, torch.bfloat16), (False, None)])
    def test_auto_on_a_gpu(self, supported, expected):
        with mock.patch.object(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported):
            self.assertEqual(resolve_autocast("auto", CUDA), expected)
            self.assertEqual(resolve_autocast("fp32", CUDA), None)
            if not supported:
                with self.assertRaisesRegex(ValueError, "cuda does not support bf16"):
                    resolve_autocast("bf16", CUDA)

    def test_other_devices(self):
        self.assertIsNone(resolve_autocast("auto", "mps"))
        with self.assertRaisesRegex(ValueError, "mps does not support bf16; use 'fp32'"):
            resolve_autocast("bf16", "mps")

    def test_flags_of_this_cpu(self):
        text = "processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_bf16\nbugs\t: flags\n"
        with (
            mock.patch("platform.system", return_value="Linux"),
            mock.patch("pathlib.Path.is_file", return_value=True),
            mock.patch("pathlib.Path.read_text", return_value=text),
        ):
            self.assertEqual(precision._cpu_flags(), {"fpu", "avx512_bf16", "amx_bf16"})
            self.assertTrue(has_fast_bf16("cpu"))
        with mock.patch("platform.system", return_value="Darwin"):
            self.assertEqual(precision._cpu_flags(), set())

    @parameterized.expand(
        [
            ("fp16", "fp16 is not supported, because its gradients need a scaler; use 'bf16'"),
            ("half", "precision must be 'auto', 'fp32' or 'bf16', got 'half'"),
        ]
    )
    def test_refused(self, name, message):
        with self.assertRaisesRegex(ValueError, message):
            resolve_autocast(name, CPU)

    @parameterized.expand(
        [
            ((8, 16, 16), 3, torch.bfloat16, "cpu", True),
            ((7, 16, 16), 3, torch.bfloat16, "cpu", True),
            ((2, 16, 16), 1, torch.bfloat16, "cpu", True),
            ((16, 8, 8), 3, torch.bfloat16, "cpu", False),
            ((8, 16, 16), 2, torch.bfloat16, "cpu", False),
            ((8, 8), 3, torch.bfloat16, "cpu", False),
            ((8, 16, 16), 3, None, "cpu", False),
            ((8, 16, 16), 3, torch.bfloat16, "cuda", False),
        ]
    )
    def test_bf16_volumes_of_depth_two(self, size, levels, dtype, device, refused):
        if refused:
            with self.assertRaisesRegex(ValueError, "--precision fp32"):
                refuse_bf16_at_depth_two(dtype, device, size, levels)
        else:
            refuse_bf16_at_depth_two(dtype, device, size, levels)

    def test_tf32_is_switched_for_products_and_convolutions(self):
        backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
        before = [backend.fp32_precision for backend in backends]
        for enabled, expected in ((True, "tf32"), (False, "ieee")):
            precision.set_tf32(enabled)
            self.assertEqual([backend.fp32_precision for backend in backends], [expected] * 2)
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


if __name__ == "__main__":
    unittest.main()
