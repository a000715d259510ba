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

"""Checkpoints from which a run goes on bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.optim import Optimizer

from .atomic import atomic_save, sweep_partial_files
from .best_model import BestModel
from .ema import ExponentialMovingAverage
from .utils import is_writing_process, unwrap_network

__all__ = ["ResumableCheckpoint", "Stateful"]


class Stateful(Protocol):
    """A part of a run with a state of its own."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state: tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Go on from a saved state.

        Args:
            state_dict: as of :meth:`state_dict`.

        Returns:
            anything; it is not looked at (a module of torch returns the keys that did not fit).
        """
        ...


class ResumableCheckpoint:
    """Handler of a trainer: files from which a run goes on as if it had never stopped.

    A file holds network, optimizer, average, best metric with its weights, the iteration, and what else has a state
    (pseudo-labels); it is read with `torch.load(..., weights_only=True)`. Everything else in a run of this package is a
    function of the seed and the iteration. On the CPU, with an equal number of threads, the resumed run ends bit for
    bit like the uninterrupted one.

    Files `checkpoint_<iteration>.pt` are written at the end of every epoch, after its validation, every `interval`
    iterations, and when the run is terminated (:class:`TimeLimit`). Each appears in one step, and its predecessors are
    removed only then; half-written files of a killed process are removed at the start. Checkpoints of other runs in
    the folder are never removed.

    It stands **first** in the list of handlers, so that it restores before the others start; it saves after all other
    handlers wherever it stands (it enters the saving events only when the run starts).

    Args:
        directory: of the files, made when it is missing.
        network: in training; inside `DistributedDataParallel` or not, the file is the same.
        optimizer: of the network.
        ema: the average of the weights.
        best: the best validation so far.
        interval: iterations between two files within an epoch; None: only at the end of epochs.
        keep: number of files to keep, >= 1.
        resume: file to start from; None: from the beginning.
        options: what must be equal in the run that wrote `resume` and in this one, for example seed, batch size, data
            and the network's arguments; dictionaries are compared entry by entry, so that a message names the entry.
        further: other parts with a state by name; their state dicts hold tensors and plain values only.

    Raises:
        ValueError: for an impossible interval or number of files; at the start of the run, if `resume` cannot be read,
            does not fit the network, or comes from a run with other options.
    """

    def __init__(
        self,
        directory: str | Path,
        network: nn.Module,
        optimizer: Optimizer,
        ema: ExponentialMovingAverage | None = None,
        best: BestModel | None = None,
        interval: int | None = None,
        keep: int = 2,
        resume: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        further: Mapping[str, Stateful] | None = None,
    ) -> None:
        if interval is not None and interval < 1:
            raise ValueError(f"ResumableCheckpoint: interval must be >= 1 iteration or None, got {interval}.")
        if keep < 1:
            raise ValueError(f"ResumableCheckpoint: keep must be >= 1 file, got {keep}.")
        self.directory = Path(directory)
        self.network = unwrap_network(network)
        self.optimizer = optimizer
        self.ema = ema
        self.best = best
        self.interval = interval
        self.keep = keep
        self.resume = None if resume is None else Path(resume)
        self.options = dict(options or {})
        self.further = dict(further or {})
        self._files: list[str] = []  # of this run, oldest first
        self._completed = 0  # iterations whose step and handlers are done

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)

    def path(self, iteration: int) -> Path:
        """The file of an iteration."""
        return self.directory / f"checkpoint_{iteration:08d}.pt"

    def save(self, iteration: int, epoch_length: int) -> Path:
        """Write the present state, then remove this run's oldest files beyond `keep`; rank 0 only.

        Args:
            iteration: number of completed iterations.
            epoch_length: iterations per epoch.

        Returns:
            the file.
        """
        path = self.path(iteration)
        files = [name for name in self._files if name != path.name] + [path.name]
        if is_writing_process():
            atomic_save(self._content(iteration, epoch_length, files), path)
            for name in files[: -self.keep]:
                (self.directory / name).unlink(missing_ok=True)
        self._files = files[-self.keep :]
        return path

    def check(self, epoch_length: int) -> None:
        """Refuse a `resume` of another run before anything of this one is written.

        Args:
            epoch_length: iterations per epoch of this run.

        Raises:
            ValueError: if the file cannot be read or belongs to another run.
        """
        if self.resume is not None:
            self._check_options(self.resume, _read_checkpoint(self.resume), epoch_length)

    def load(self, path: Path, epoch_length: int) -> int:
        """Restore the state from a file.

        Args:
            path: written by :meth:`save`.
            epoch_length: iterations per epoch of this run.

        Returns:
            the number of completed iterations.

        Raises:
            ValueError: if the file cannot be read or belongs to another network or run.
        """
        content = _read_checkpoint(path)
        self._check_options(path, content, epoch_length)
        iteration = content["iteration"]
        try:
            self.network.load_state_dict(content["network"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.ema is not None:
                self.ema.load_state_dict(content["ema"], iteration)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"ResumableCheckpoint: {path} does not fit this network: {error}") from error
        for name, part in self.further.items():
            part.load_state_dict(content["further"][name])
        if self.best is not None:
            self.best.load_state_dict(content["best"])
        self._files = content["files"] if path.resolve().parent == self.directory.resolve() else []
        return iteration

    def _content(self, iteration: int, epoch_length: int, files: list[str]) -> dict[str, Any]:
        return {
            "iteration": iteration,
            "epoch_length": epoch_length,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "best": None if self.best is None else self.best.state_dict(),
            "files": files,
            "options": self.options,
            "further": {name: part.state_dict() for name, part in self.further.items()},
        }

    def _check_options(self, path: Path, content: dict[str, Any], epoch_length: int) -> None:
        saved = {"epoch_length": content["epoch_length"], **content["options"]}
        now = {"epoch_length": epoch_length, **self.options}
        parts = {name: content[name] is not None for name in ("ema", "best")} | dict.fromkeys(content["further"], True)
        expected = {"ema": self.ema is not None, "best": self.best is not None} | dict.fromkeys(self.further, True)
        was, is_ = _flat({**saved, **parts}), _flat({**now, **expected})
        differing = sorted(name for name in {*was, *is_} if was.get(name) != is_.get(name))
        if differing:
            changes = "; ".join(f"{name} was {was.get(name)!r}, is {is_.get(name)!r}" for name in differing)
            raise ValueError(f"ResumableCheckpoint: {path} comes from a run with other options: {changes}.")

    def _start(self, engine: Engine) -> None:
        state: Any = engine.state
        if state.epoch_length is None:
            raise ValueError("ResumableCheckpoint: the trainer needs an epoch_length to resume within an epoch.")
        if is_writing_process():
            sweep_partial_files(self.directory)
        self._completed = state.iteration
        if self.resume is not None and state.iteration == 0:
            self._completed = self.load(self.resume, state.epoch_length)
            state.iteration, state.epoch = self._completed, self._completed // state.epoch_length
            engine.logger.info(f"ResumableCheckpoint: resumed after step {self._completed} from {self.resume}.")
        if not engine.has_event_handler(self._epoch_completed, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
            engine.add_event_handler(Events.TERMINATE, self._terminated)

    def _iteration_completed(self, engine: Engine) -> None:
        self._completed = engine.state.iteration
        if self.interval is not None and self._completed % self.interval == 0:
            self._save_within_epoch(engine)

    def _epoch_completed(self, engine: Engine) -> None:
        self.save(self._completed, _epoch_length(engine))

    def _terminated(self, engine: Engine) -> None:
        if self.path(self._completed).name not in self._files:
            self._save_within_epoch(engine)

    def _save_within_epoch(self, engine: Engine) -> None:
        """Save, except where a run cannot go on: before the end of an epoch is handled, or with gradients pending."""
        done = self._completed % _epoch_length(engine)
        if done and done % getattr(engine, "accumulation_steps", 1) == 0:
            self.save(self._completed, _epoch_length(engine))


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries of nested dictionaries as `outer.inner`."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _epoch_length(engine: Engine) -> int:
    state: Any = engine.state
    return state.epoch_length


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file; the file's name is what the user needs
        raise ValueError(f"ResumableCheckpoint: cannot read {path}: {error}") from error
    keys = {"iteration", "epoch_length", "network", "optimizer", "ema", "best", "files", "options"}
    if not isinstance(content, dict) or not keys <= set(content):
        raise ValueError(f"ResumableCheckpoint: {path} is no checkpoint of a run; it may hold weights only.")
    content.setdefault("further", {})  # files written before there were further parts
    return content
