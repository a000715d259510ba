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

"""`model.json`: what a program needs to use a trained network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_jointdiff.engines.first_stage import AutoencoderDescription
from monai_jointdiff.engines.prepare_batch import TASKS
from monai_jointdiff.handlers.atomic import atomic_write_text
from monai_jointdiff.networks import JointDiffusionUNet
from monai_jointdiff.schedulers import make_scheduler

__all__ = ["Decision", "ModelDescription"]

FORMAT_VERSION = 2
READABLE = (1, 2)  # 1 knows no autoencoder


@dataclass(frozen=True)
class Decision:
    """From logits to a decision: a temperature, then a threshold, both fixed on data that are not the test data.

    Args:
        temperature: divisor of the logits, > 0. 1 leaves the network's own confidence.
        thresholds: binary: one probability of class 1 from which class 1 is chosen; multi-label: one per label;
            None: the most probable class (multi-class).
        chosen_on: in words, the data on which temperature and thresholds were chosen.
    """

    temperature: float = 1.0
    thresholds: list[float] | None = None
    chosen_on: str = "nothing: the model has not been calibrated"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"Decision: temperature must be > 0, got {self.temperature}.")

    def probabilities(self, logits: np.ndarray, multi_label: bool = False) -> np.ndarray:
        """Calibrated probabilities.

        Args:
            logits: (N, K).
            multi_label: independent labels (sigmoid) instead of exclusive classes (softmax).

        Returns:
            (N, K) in [0, 1], float64.
        """
        scaled = torch.as_tensor(np.asarray(logits), dtype=torch.float64) / self.temperature
        return (scaled.sigmoid() if multi_label else scaled.softmax(dim=1)).numpy()

    def classes(self, probabilities: np.ndarray, multi_label: bool = False) -> np.ndarray:
        """Decided classes.

        Args:
            probabilities: (N, K) of :meth:`probabilities`.
            multi_label: independent labels.

        Returns:
            (N,) class indices, or (N, K) of 0 and 1 when multi-label.
        """
        if multi_label:
            return (probabilities >= np.asarray(self.thresholds or [0.5])).astype(np.int64)
        if self.thresholds is not None and probabilities.shape[1] == 2:
            return (probabilities[:, 1] >= self.thresholds[0]).astype(np.int64)
        return probabilities.argmax(axis=1)


@dataclass(frozen=True)
class ModelDescription:
    """What a program needs to use a trained network, and no option may contradict: `models/model.json`.

    Args:
        network: arguments of :class:`~monai_jointdiff.networks.JointDiffusionUNet`.
        scheduler: arguments of the noise process (`schedule`, `prediction_type`, ...).
        data: `ImageSource.description()`: class names, image size, channels, intensity rule.
        decision: temperature and thresholds with the data they were chosen on.
        trained: False for the description of an untrained network.
        autoencoder: on whose latents the network works, its weights being `autoencoder.pt` beside `model.pt`; None: it
            works on images.
        task: what it was trained for: `joint`, or `denoise` or `classify` alone.
        division: :func:`~monai_jointdiff.engines.division_of` the data it was trained on; None: not recorded.

    Raises:
        ValueError: for another task.
    """

    network: dict[str, Any]
    scheduler: dict[str, Any]
    data: dict[str, Any]
    decision: Decision = field(default_factory=Decision)
    trained: bool = True
    autoencoder: AutoencoderDescription | None = None
    task: str = "joint"
    division: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"{type(self).__name__}: task must be one of {', '.join(TASKS)}, got {self.task!r}.")

    @property
    def class_names(self) -> list[str]:
        """Names of the K classes in the order of the logits."""
        return list(self.data["class_names"])

    @property
    def multi_label(self) -> bool:
        """Whether the K labels are independent of each other."""
        return bool(self.data["multi_label"])

    @property
    def class_conditional(self) -> bool:
        """Whether the network's prediction of the noise may be conditioned on the class."""
        return bool(self.network.get("class_conditional", False))

    @property
    def channel_names(self) -> list[str] | None:
        """Names of the C channels of an image; None where they are not known."""
        names = self.data.get("channel_names")
        return None if names is None else list(names)

    @property
    def image_size(self) -> tuple[int, ...]:
        """Rows, columns (2D) or depth, rows, columns (3D)."""
        return tuple(self.data["image_size"])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape (C, *spatial) of one image."""
        return (int(self.data["in_channels"]), *self.image_size)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape (C, *spatial) of the noise from which a sample starts: of an image, or of its latents."""
        return self.image_shape if self.autoencoder is None else self.autoencoder.latent_shape(self.image_size)

    def build_network(self) -> JointDiffusionUNet:
        """An untrained network of the described architecture."""
        return JointDiffusionUNet(**self.network)

    def build_scheduler(self, name: str = "dpm_solver", **kwargs: Any) -> Any:
        """A sampler for the noise process the network was trained on.

        Args:
            name: a name of :func:`~monai_jointdiff.schedulers.make_scheduler`.
            kwargs: further arguments of that scheduler.

        Returns:
            the scheduler.
        """
        return make_scheduler(name, **{**self.scheduler, **kwargs})

    def require(self, *abilities: str) -> None:
        """Refuse to ask a model for what it never learned: that half of the network still has its random weights.

        Args:
            abilities: what a program needs, `denoise` or `classify` or both.

        Raises:
            ValueError: when the model was trained for the other one alone.
        """
        lacking = [ability for ability in abilities if self.task not in ("joint", ability)]
        if lacking:
            raise ValueError(
                f"{type(self).__name__}: this model was trained with --task {self.task}, and this program needs a "
                f"network that learned to {lacking[0]}, too. Train one with --task joint, or with an algorithm that "
                "denoises."
            )

    def decide(self, probabilities: Any) -> np.ndarray:
        """What `inference.json` would call images, from probabilities that have not met the temperature.

        Args:
            probabilities: of the network's head (N, K) in [0, 1], rows sum to 1 unless multi-label.

        Returns:
            (N,) class indices, or (N, K) of 0 and 1 when multi-label.
        """
        known = torch.as_tensor(probabilities).detach().double().cpu()
        logits = known.logit() if self.multi_label else known.log()
        calibrated = self.decision.probabilities(logits.numpy(), self.multi_label)
        return self.decision.classes(calibrated, self.multi_label)

    def with_decision(self, decision: Decision) -> ModelDescription:
        """The same model with another decision rule."""
        return replace(self, decision=decision)

    def save(self, path: str | Path) -> None:
        """Write the description as JSON, never half written."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        atomic_write_text(path, json.dumps(content, indent=4) + "\n")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ModelDescription:
        """Read the content of a `model.json`.

        Args:
            content: as :meth:`save` writes it.

        Returns:
            the description.

        Raises:
            ValueError: when the format is another one or a part is missing.
        """
        if content.get("format_version") not in READABLE:
            raise ValueError(
                f"{cls.__name__}: format_version is {content.get('format_version')!r}, this version of "
                f"monai_jointdiff reads {' and '.join(map(str, READABLE))}."
            )
        missing = [key for key in ("network", "scheduler", "data", "decision", "trained") if key not in content]
        if missing:
            raise ValueError(f"{cls.__name__}: missing in the model description: {', '.join(missing)}.")
        autoencoder = content.get("autoencoder")
        return cls(
            network=dict(content["network"]),
            scheduler=dict(content["scheduler"]),
            data=dict(content["data"]),
            decision=Decision(**content["decision"]),
            trained=bool(content["trained"]),
            autoencoder=None if autoencoder is None else AutoencoderDescription.from_dict(autoencoder),
            task=content.get("task", "joint"),  # files written before there was a choice
            division=content.get("division"),  # files written before it was recorded
        )

    @classmethod
    def load(cls, path: str | Path, untrained: str | Path | None = None) -> ModelDescription:
        """Read `model.json`; where there is none yet, the description of the untrained network.

        Args:
            path: the `model.json` beside `model.pt`.
            untrained: description to use when `path` does not exist. None: a missing file is an error.

        Returns:
            the description.

        Raises:
            ValueError: when neither file can be read.
        """
        path = Path(path)
        chosen = path if path.is_file() or untrained is None else Path(untrained)
        try:
            content = json.loads(chosen.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{cls.__name__}: cannot read the model description {chosen}: {error}. "
                "Train first, or point --ckpt_dir at the folder that holds model.pt and model.json."
            ) from error
        return cls.from_dict(content)
