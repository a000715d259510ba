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
"""The blocks of MONAI's diffusion UNet with scale-shift conditioning, dropout, checkpointing and a choice of attention.

Each block takes over the layers of MONAI's block of the same place under the same names, so that state dicts of the
two networks agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import CrossAttentionBlock, SABlock, SpatialAttentionBlock
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock, WrappedUpsample
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "ATTENTION_MODES",
    "Attention",
    "DownStage",
    "MiddleStage",
    "ResidualBlock",
    "SpatialAttention",
    "UpStage",
    "UpsampleConvolution",
    "use_einsum",
]

ATTENTION_MODES = ("auto", "sdpa", "einsum")

# On a CPU in bfloat16 the explicit attention matrix was measured faster up to this many keys per channel of a head, in
# training by 1.1 to 9 times (the backward pass of scaled_dot_product_attention is the slow part) and in inference too;
# in single precision scaled_dot_product_attention wins or ties everywhere (torch 2.13, 64 to 4096 tokens).
EINSUM_KEYS_PER_CHANNEL = 8


def use_einsum(mode: str, key: torch.Tensor) -> bool:
    """Whether attention runs through the explicit attention matrix rather than scaled_dot_product_attention.

    Args:
        mode: one of ``ATTENTION_MODES``.
        key: keys (N, heads, tokens, channels of a head).

    Returns:
        True for the explicit matrix.
    """
    if mode != "auto":
        return mode == "einsum"
    if key.device.type != "cpu" or key.dtype not in (torch.bfloat16, torch.float16) or torch.jit.is_tracing():
        return False
    return key.shape[-2] <= EINSUM_KEYS_PER_CHANNEL * key.shape[-1]


class Attention(nn.Module):
    """Multi-head attention with the weights of MONAI's ``SABlock`` or ``CrossAttentionBlock``.

    Unlike MONAI 1.6.1 it drops attention weights in training only (``selfattention.py`` and ``crossattention.py`` hand
    their dropout to scaled_dot_product_attention in ``eval()`` too), and ``upcast`` covers keys, queries and values,
    under autocast as well.

    Args:
        source: the block whose layers are taken over.
        mode: one of ``ATTENTION_MODES``.
        upcast: compute the attention in single precision.
    """

    qkv: nn.Linear
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear

    def __init__(self, source: SABlock | CrossAttentionBlock, mode: str = "auto", upcast: bool = False) -> None:
        super().__init__()
        self.num_heads = source.num_heads
        self.scale = source.scale
        self.dropout_rate = source.dropout_rate
        self.mode = mode
        self.upcast = upcast
        self.combined = isinstance(source, SABlock) and source.use_combined_linear
        for name in ("qkv",) if self.combined else ("to_q", "to_k", "to_v"):
            self.add_module(name, getattr(source, name))
        self.out_proj = source.out_proj

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Attends from ``x`` to the context.

        Args:
            x: tokens (N, L, C).
            context: tokens attended to (N, L', C'); None for ``x`` itself.

        Returns:
            Tensor (N, L, C).
        """
        projected = self._project(x) if context is None else (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in projected)  # (N, heads, L, d)
        if self.upcast:
            with torch.autocast(x.device.type, enabled=False):
                out = self._attend(q.float(), k.float(), v.float()).to(v.dtype)
        else:
            out = self._attend(q, k, v)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return F.dropout(out, self.dropout_rate, self.training)

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values (N, L, heads * d) of self-attention, by one product with the joined weights."""
        layers = (self.qkv,) if self.combined else (self.to_q, self.to_k, self.to_v)
        weight = torch.cat([layer.weight for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        return F.linear(x, weight, bias).chunk(3, dim=-1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """softmax(q k^T / sqrt(d)) v, all (N, heads, tokens, d)."""
        dropout = self.dropout_rate if self.training else 0.0
        if not use_einsum(self.mode, k):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        weights = torch.einsum("bhxd,bhyd->bhxy", q * self.scale, k).softmax(dim=-1)
        return torch.einsum("bhxy,bhyd->bhxd", F.dropout(weights, dropout, self.training), v)


class ResidualBlock(nn.Module):
    """MONAI's residual block with optional scale-shift conditioning and dropout.

    ``h = conv1(silu(norm1(x))) + proj(silu(emb))``; ``h = norm2(h) (1 + scale) + shift``;
    ``y = skip(x) + conv2(dropout(silu(h)))``, where (scale, shift) is a linear map of ``silu(emb)`` (FiLM, as
    ``use_scale_shift_norm`` of Dhariwal and Nichol, https://arxiv.org/abs/2105.05233). The map starts at zero and the
    addition of MONAI's block stays, so that weights trained without scale-shift keep their function.

    Args:
        source: the block whose layers are taken over.
        scale_shift: add the scale-shift conditioning (the only new keys: ``time_scale_shift``).
        dropout: dropout probability before the second convolution.
    """

    def __init__(self, source: DiffusionUNetResnetBlock, scale_shift: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.upsample, self.downsample = source.upsample, source.downsample
        self.norm1, self.conv1 = source.norm1, source.conv1
        self.time_emb_proj = source.time_emb_proj
        self.norm2, self.conv2 = source.norm2, source.conv2
        self.skip_connection = source.skip_connection
        self.dropout = dropout
        self.time_scale_shift: nn.Linear | None = None
        if scale_shift:
            self.time_scale_shift = nn.Linear(source.emb_channels, 2 * source.out_channels)
            nn.init.zeros_(self.time_scale_shift.weight)
            nn.init.zeros_(self.time_scale_shift.bias)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Runs the block.

        Args:
            x: feature maps (N, C, *spatial).
            emb: embedding of timestep and class (N, E).

        Returns:
            Feature maps (N, C_out, *spatial).
        """
        emb = F.silu(emb)
        h = F.silu(self.norm1(x))
        for resample in (self.upsample, self.downsample):
            if resample is not None:
                x, h = resample(x), resample(h)
        h = self.conv1(h) + _unsqueeze(self.time_emb_proj(emb), h.ndim)
        h = self.norm2(h)
        if self.time_scale_shift is not None:
            scale, shift = _unsqueeze(self.time_scale_shift(emb), h.ndim).chunk(2, dim=1)
            h = h * (1 + scale) + shift
        h = self.conv2(F.dropout(F.silu(h), self.dropout, self.training))
        y: torch.Tensor = self.skip_connection(x) + h
        return y


class SpatialAttention(nn.Module):
    """Self-attention over the pixels of a map, with the layers of MONAI's ``SpatialAttentionBlock``.

    The sum has the memory format of ``x``. MONAI's has channels-last strides, in which PyTorch's group normalization on
    a CPU is up to 50 times slower in bfloat16 (measured on torch 2.13).

    Args:
        source: the block whose layers are taken over; its attention is an :py:class:`Attention` already.
    """

    def __init__(self, source: SpatialAttentionBlock) -> None:
        super().__init__()
        self.norm, self.attn = source.norm, source.attn

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Adds what the pixels attend to.

        Args:
            x: feature maps (N, C, *spatial).
            context: ignored, for a pixel attends to pixels only.

        Returns:
            Feature maps (N, C, *spatial).
        """
        tokens = self.norm(x).flatten(2).transpose(1, 2).contiguous()  # (N, L, C)
        out: torch.Tensor = x + self.attn(tokens).transpose(1, 2).reshape(x.shape)
        return out


class UpsampleConvolution(nn.Module):
    """Nearest upsampling by two and a convolution of width three, with the layers of MONAI's ``Upsample``.

    Both together are one transposed convolution of width four and stride two, whose weights are sums of the
    convolution's: along an axis pixels 2i and 2i+1 of the upsampled map are both x[i], so that
    y[o] = sum_k w[k] up(x)[o+k-1] = sum_i (w[2i-o+1] + w[2i-o+2]) x[i], with w = 0 outside its three taps.
    That takes 4/9 of the products in 2D and 8/27 in 3D.

    Args:
        source: the block whose convolution is taken over.
    """

    postconv: Any

    def __init__(self, source: WrappedUpsample) -> None:
        super().__init__()
        self.postconv = source.postconv

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        """Doubles the size.

        Args:
            x: feature maps (N, C, *spatial).
            emb: ignored, the embedding that MONAI's blocks hand to every upsampling.

        Returns:
            Feature maps (N, C_out, *twice the spatial size).
        """
        convolution = self.postconv.conv
        weight: torch.Tensor = convolution.weight.transpose(0, 1).flip(tuple(range(2, x.ndim)))  # (C, C_out, *3)
        for axis in range(2, x.ndim):
            padded = F.pad(weight, [0, 0] * (x.ndim - 1 - axis) + [1, 1])
            weight = padded.narrow(axis, 0, 4) + padded.narrow(axis, 1, 4)
        transpose = F.conv_transpose2d if x.ndim == 4 else F.conv_transpose3d
        return transpose(x, weight, convolution.bias, stride=2, padding=1)


class _Stage(nn.Module):
    """A level of the UNet: it runs its residual and attention blocks, each checkpointed when asked to.

    Args:
        source: MONAI's block of the level, whose children are taken over.
        use_checkpoint: recompute the activations of every block in the backward pass instead of keeping them.
    """

    resnets: nn.ModuleList

    def __init__(self, source: nn.Module, use_checkpoint: bool = False) -> None:
        super().__init__()
        for name, child in source.named_children():
            self.add_module(name, child)
        self.use_checkpoint = use_checkpoint

    def _run(self, block: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            out: torch.Tensor = checkpoint(block, *args, use_reentrant=False)
            return out
        return block(*args)

    def _attend(self, block: nn.Module | None, h: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        return h if block is None else self._run(block, h, context)

    def _layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """The residual blocks, each with the attention block that follows it."""
        return zip_longest(self.resnets, getattr(self, "attentions", ()))


class DownStage(_Stage):
    """A level of the encoder, with the layers of MONAI's ``DownBlock``, ``AttnDownBlock`` or ``CrossAttnDownBlock``."""

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, context: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Runs the level.

        Args:
            hidden_states: feature maps (N, C, *spatial).
            temb: embedding of timestep and class (N, E).
            context: context (N, L, D) of a cross-attention level.

        Returns:
            The last map, and the maps after every residual (and attention) block and after the downsampling.
        """
        maps = []
        for resnet, attention in self._layers():
            hidden_states = self._run(resnet, hidden_states, temb)
            hidden_states = self._attend(attention, hidden_states, context)
            maps.append(hidden_states)
        downsampler = getattr(self, "downsampler", None)
        if downsampler is not None:
            hidden_states = self._run(downsampler, hidden_states, temb)
            maps.append(hidden_states)
        return hidden_states, maps


class MiddleStage(_Stage):
    """The bottom of the UNet, with the layers of MONAI's ``AttnMidBlock`` or ``CrossAttnMidBlock``."""

    resnet_1: ResidualBlock
    attention: nn.Module
    resnet_2: ResidualBlock

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, context: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Runs the level.

        Args:
            hidden_states: feature maps (N, C, *spatial).
            temb: embedding of timestep and class (N, E).
            context: context (N, L, D) of a cross-attention block.

        Returns:
            Feature maps (N, C, *spatial).
        """
        hidden_states = self._run(self.resnet_1, hidden_states, temb)
        hidden_states = self._attend(self.attention, hidden_states, context)
        return self._run(self.resnet_2, hidden_states, temb)


class UpStage(_Stage):
    """A level of the decoder, with the layers of MONAI's ``UpBlock``, ``AttnUpBlock`` or ``CrossAttnUpBlock``."""

    @property
    def num_skips(self) -> int:
        """Number of encoder maps that the level takes."""
        return len(self.resnets)

    def forward(
        self,
        hidden_states: torch.Tensor,
        res_hidden_states_list: list[torch.Tensor],
        temb: torch.Tensor,
        context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the level.

        Args:
            hidden_states: feature maps (N, C, *spatial).
            res_hidden_states_list: ``num_skips`` maps of the encoder, the last one is used first.
            temb: embedding of timestep and class (N, E).
            context: context (N, L, D) of a cross-attention level.

        Returns:
            Feature maps (N, C_out, *spatial), twice as large where the level has an upsampling.
        """
        for (resnet, attention), skip in zip(self._layers(), reversed(res_hidden_states_list), strict=True):
            hidden_states = self._run(resnet, torch.cat([hidden_states, skip], dim=1), temb)
            hidden_states = self._attend(attention, hidden_states, context)
        upsampler = getattr(self, "upsampler", None)
        if upsampler is not None:
            hidden_states = self._run(upsampler, hidden_states, temb)
        return hidden_states


def _unsqueeze(x: torch.Tensor, ndim: int) -> torch.Tensor:
    """A tensor (N, C) with axes of length one appended up to ``ndim`` axes."""
    return x.reshape(*x.shape, *(1,) * (ndim - 2))
