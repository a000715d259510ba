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

"""What several handlers ask of the engine and of the processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine
from torch import nn

__all__ = ["all_processes_agree", "is_optimizer_step", "is_writing_process", "iteration_in_epoch", "unwrap_network"]


def unwrap_network(network: nn.Module) -> nn.Module:
    """The module inside `DistributedDataParallel` or `torch.compile`, whose state dict has no prefix."""
    inner: Any = network
    while isinstance(inner, nn.parallel.DistributedDataParallel) or hasattr(inner, "_orig_mod"):
        inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner._orig_mod
    return inner


def is_writing_process() -> bool:
    """True in the process of rank 0, the only one that writes files, and where there is only one process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def all_processes_agree(decision: bool, device: torch.device) -> bool:
    """The decision of rank 0, in every process: what one process decides alone leaves the others waiting.

    Args:
        decision: this process's opinion; only that of rank 0 counts.
        device: where the message may lie: the training's device.

    Returns:
        what rank 0 decided.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return decision
    message = torch.tensor([int(decision)], device=device if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(message, src=0)
    return bool(message.item())


def iteration_in_epoch(engine: Engine) -> int:
    """Iterations of the present epoch that are begun or done, from 1 to `epoch_length`; 0 before the first."""
    state: Any = engine.state
    return (state.iteration - 1) % state.epoch_length + 1 if state.iteration else 0


def is_optimizer_step(engine: Engine) -> bool:
    """Whether the present iteration ends with a step of the optimizer (MONAI's `accumulation_steps`)."""
    steps = getattr(engine, "accumulation_steps", 1)
    if steps == 1:
        return True
    done = iteration_in_epoch(engine)
    return done % steps == 0 or done == engine.state.epoch_length
