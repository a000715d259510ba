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

"""Mixed precision for the inferers, only where it is fast."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["has_fast_bf16", "refuse_bf16_at_depth_two", "resolve_autocast", "set_tf32"]


def resolve_autocast(name: str, device: str | torch.device) -> torch.dtype | None:
    """The type for `torch.autocast` in the inferers.

    Args:
        name: `auto` (bf16 where it is fast, see :func:`has_fast_bf16`, else fp32), `fp32` or `bf16`. fp16 is refused:
            its gradients underflow without a scaler, and the scaler of MONAI's engines exists on CUDA only.
        device: where the network runs.

    Returns:
        `torch.bfloat16`, or None for no autocast.

    Raises:
        ValueError: for fp16, an unknown name, or bf16 on a device that has none.
    """
    if name == "fp16":
        raise ValueError(
            "resolve_autocast: fp16 is not supported, because its gradients need a scaler; use 'bf16', which does not."
        )
    if name not in ("auto", "fp32", "bf16"):
        raise ValueError(f"resolve_autocast: precision must be 'auto', 'fp32' or 'bf16', got {name!r}.")
    device = torch.device(device)
    if name == "fp32" or (name == "auto" and not has_fast_bf16(device)):
        return None
    if not _has_bf16(device):
        raise ValueError(f"resolve_autocast: {device} does not support bf16; use 'fp32'.")
    return torch.bfloat16


def refuse_bf16_at_depth_two(
    autocast_dtype: torch.dtype | None, device: str | torch.device, image_size: Sequence[int], num_levels: int
) -> None:
    """Refuse a training whose gradients would be wrong without a word.

    On CPUs, PyTorch 2.13's bf16 3D convolution (kernel 3, padding 1, stride 1) returns garbage as the gradient of its
    weights where the first spatial axis has 2 entries.

    Args:
        autocast_dtype: type of :func:`resolve_autocast`.
        device: where the network runs.
        image_size: size of an image.
        num_levels: levels of the network; each but the first halves the size.

    Raises:
        ValueError: when some level has depth 2 in bf16 on a CPU.
    """
    if autocast_dtype is not torch.bfloat16 or torch.device(device).type != "cpu" or len(image_size) != 3:
        return
    depths = [-(-image_size[0] // 2**level) for level in range(num_levels)]  # convolutions round up
    if 2 in depths:
        raise ValueError(
            f"refuse_bf16_at_depth_two: with depth {image_size[0]} it works at depths {depths}; the CPU at 2 gives "
            "wrong gradients in bf16. Use --precision fp32, or another --image_size."
        )


def set_tf32(enabled: bool) -> None:
    """Let CUDA compute fp32 matrix products and convolutions in TF32, or forbid it; elsewhere nothing changes.

    Args:
        enabled: True is faster and has 10 bits of mantissa; PyTorch's own default is True for convolutions only.
    """
    precision = "tf32" if enabled else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]


def has_fast_bf16(device: str | torch.device) -> bool:
    """Whether bf16 is faster than fp32: GPUs with native bf16, CPUs with AMX or AVX512-BF16 instructions (Linux)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool({"amx_bf16", "avx512_bf16"} & _cpu_flags())


def _has_bf16(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())


def _cpu_flags() -> set[str]:
    """Instruction sets of the CPU; empty where the system does not list them in /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not info.is_file():
        return set()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}
