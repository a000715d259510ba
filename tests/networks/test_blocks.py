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
import torch.nn.functional as F
from monai.networks.blocks import Convolution, CrossAttentionBlock, SABlock, SpatialAttentionBlock
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, WrappedUpsample
from parameterized import parameterized

from monai_jointdiff.networks.blocks import (
    Attention,
    ResidualBlock,
    SpatialAttention,
    UpsampleConvolution,
    use_einsum,
)


def randomize(module: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
    """Give every parameter a random value: MONAI starts the last layer of each block at zero, which hides errors."""
    torch.manual_seed(1)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=std)
    return module


class TestAttention(unittest.TestCase):
    @parameterized.expand(
        [
            (mode, combined, include_fc, bias)
            for mode in ("sdpa", "einsum", "auto")
            for combined, include_fc, bias in ((False, False, True), (True, True, False), (False, True, False))
        ]
    )
    def test_equals_monai_self_attention(self, mode, combined, include_fc, bias):
        source = SABlock(16, 2, qkv_bias=bias, include_fc=include_fc, use_combined_linear=combined)
        randomize(source)
        x = torch.randn(3, 10, 16)
        ours = Attention(source, mode)
        torch.testing.assert_close(ours(x), source(x))
        self.assertEqual(set(ours.state_dict()), set(source.state_dict()))

    @parameterized.expand([("sdpa",), ("einsum",)])
    def test_equals_monai_cross_attention(self, mode):
        source = randomize(CrossAttentionBlock(16, 4, context_input_size=5, dim_head=4))
        x, context = torch.randn(3, 10, 16), torch.randn(3, 7, 5)
        torch.testing.assert_close(Attention(source, mode)(x, context), source(x, context))

    @parameterized.expand([("sdpa",), ("einsum",)])
    def test_dropout_only_in_training(self, mode):
        source = randomize(CrossAttentionBlock(16, 4, dropout_rate=0.5, context_input_size=5, use_flash_attention=True))
        x, context = torch.randn(3, 10, 16), torch.randn(3, 7, 5)
        ours = Attention(source, mode)
        self.assertFalse(torch.equal(ours(x, context), ours(x, context)))
        ours.eval(), source.eval()
        self.assertFalse(torch.equal(source(x, context), source(x, context)))  # the fault of MONAI 1.6.1
        plain = CrossAttentionBlock(16, 4, context_input_size=5)
        plain.load_state_dict(source.state_dict())
        torch.testing.assert_close(ours(x, context), plain(x, context))

    @parameterized.expand([("sdpa",), ("einsum",)])
    def test_upcast_attends_in_single_precision_under_autocast(self, mode):
        source = randomize(SABlock(16, 2, include_fc=False, qkv_bias=True, use_combined_linear=False), std=1.0)
        x = torch.randn(2, 6, 16)
        with torch.autocast("cpu", torch.bfloat16):
            upcast = Attention(source, mode, upcast=True)(x)
            q, k, v = (F.linear(x, layer.weight, layer.bias) for layer in (source.to_q, source.to_k, source.to_v))
        q, k, v = (t.double().reshape(2, 6, 2, 8).transpose(1, 2) for t in (q, k, v))
        exact = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 16)
        self.assertEqual(upcast.dtype, torch.bfloat16)
        torch.testing.assert_close(upcast.double(), exact, rtol=2**-8, atol=1e-6)  # the rounding of the result alone

    @parameterized.expand(
        [
            ("auto", torch.float32, 64, 32, False),
            ("auto", torch.bfloat16, 256, 32, True),
            ("auto", torch.bfloat16, 257, 32, False),
            ("auto", torch.bfloat16, 256, 8, False),
            ("auto", torch.bfloat16, 64, 8, True),
            ("einsum", torch.float32, 4096, 8, True),
            ("sdpa", torch.bfloat16, 16, 32, False),
        ]
    )
    def test_choice(self, mode, dtype, tokens, channels, expected):
        self.assertIs(use_einsum(mode, torch.empty(1, 2, tokens, channels, dtype=dtype)), expected)

    def test_accelerators_use_sdpa(self):
        self.assertFalse(use_einsum("auto", torch.empty(1, 2, 16, 8, dtype=torch.bfloat16, device="meta")))


class TestSpatialAttention(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_equals_monai(self, dims):
        source = randomize(SpatialAttentionBlock(dims, 8, num_head_channels=4, norm_num_groups=4, include_fc=False))
        x = torch.randn(3, 8, *(4, 2, 3)[:dims])
        expected = source(x)
        source.attn = Attention(source.attn, "einsum")
        ours = SpatialAttention(source)
        torch.testing.assert_close(ours(x), expected)
        self.assertTrue(ours(x).is_contiguous())


class TestUpsampleConvolution(unittest.TestCase):
    @parameterized.expand([(2, 8), (3, 8), (2, 6)])
    def test_equals_monai(self, dims, out_channels):
        convolution = Convolution(dims, 8, out_channels, strides=1, kernel_size=3, padding=1, conv_only=True)
        source = WrappedUpsample(
            dims, 8, 8, 2, mode="nontrainable", interp_mode="nearest", align_corners=None, post_conv=convolution
        )
        randomize(source).double()
        x = torch.randn(3, 8, *(5, 4, 3)[:dims], dtype=torch.float64, requires_grad=True)
        ours = UpsampleConvolution(source)
        self.assertEqual(set(ours.state_dict()), set(source.state_dict()))
        torch.testing.assert_close(ours(x), source(x), rtol=1e-12, atol=1e-12)
        for p in (x, convolution.conv.weight, convolution.conv.bias):
            a, b = (torch.autograd.grad(block(x).square().sum(), p)[0] for block in (ours, source))
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class TestResidualBlock(unittest.TestCase):
    def block(self, spatial_dims=2, out_channels=16, **options):
        return DiffusionUNetResnetBlock(
            spatial_dims, in_channels=8, temb_channels=12, out_channels=out_channels, norm_num_groups=4, **options
        )

    @parameterized.expand(
        [(dims, options) for dims in (2, 3) for options in ({}, {"up": True, "out_channels": 8}, {"down": True})]
    )
    def test_equals_monai(self, dims, options):
        source = randomize(self.block(dims, **options))
        x, emb = torch.randn(3, 8, *(4,) * dims), torch.randn(3, 12)
        ours = ResidualBlock(source)
        torch.testing.assert_close(ours(x, emb), source(x, emb))
        self.assertEqual(set(ours.state_dict()), set(source.state_dict()))

    @parameterized.expand([(2,), (3,)])
    def test_scale_shift(self, dims):
        source = randomize(self.block(dims))
        x, emb = torch.randn(3, 8, *(4,) * dims), torch.randn(3, 12)
        ours = ResidualBlock(source, scale_shift=True)
        torch.testing.assert_close(ours(x, emb), source(x, emb))  # starts at zero: the source's function
        new = set(ours.state_dict()) - set(source.state_dict())
        self.assertEqual(new, {"time_scale_shift.weight", "time_scale_shift.bias"})

        randomize(ours)  # and written out again, channel by channel
        embedded = F.silu(emb)
        h = source.conv1(F.silu(source.norm1(x)))
        h = source.norm2(h + source.time_emb_proj(embedded).reshape(3, 16, *(1,) * dims))
        film = embedded @ ours.time_scale_shift.weight.T + ours.time_scale_shift.bias
        h = torch.stack(
            [torch.stack([h[n, c] * (1 + film[n, c]) + film[n, 16 + c] for c in range(16)]) for n in range(3)]
        )
        torch.testing.assert_close(ours(x, emb), source.skip_connection(x) + source.conv2(F.silu(h)))

    def test_dropout_stands_before_the_second_convolution(self):
        source = randomize(self.block())
        x, emb = torch.randn(3, 8, 4, 4), torch.randn(3, 12)
        ours = ResidualBlock(source, dropout=0.5)
        inputs = []
        handle = ours.conv2.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        self.addCleanup(handle.remove)
        ours(x, emb), ours.eval()(x, emb)
        trained, evaluated = inputs
        kept = trained != 0
        torch.testing.assert_close(trained[kept], 2 * evaluated[kept])
        self.assertAlmostEqual(kept.double().mean().item(), 0.5, delta=0.1)  # 768 draws: 5 standard deviations
        torch.testing.assert_close(ours(x, emb), source(x, emb))


if __name__ == "__main__":
    unittest.main()
