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

"""Write generated images to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.utils import optional_import

from monai_jointdiff.visualize import image_grid, save_png, to_tile

__all__ = ["ImageWriter"]

nibabel, _ = optional_import("nibabel")


class ImageWriter:
    """Handler of an evaluator that generates: writes every image, and one picture of all of them.

    2D images become PNG files, 3D images NIfTI files (axes columns, rows, depth, with unit spacing toward the patient's
    left, back and head, as this package reads volumes), named as the batch names them; `grid.png` shows all, of 3D
    images the central slice.

    Args:
        output_dir: folder for the files.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)
        self._images: list[np.ndarray] = []

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator that does not decollate (`decollate: false`)."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _reset(self, engine: Engine) -> None:
        self._images = []

    def _write(self, engine: Engine) -> None:
        output: Any = engine.state.output
        arrays = np.asarray(output["pred"].detach().float().clamp(-1, 1).cpu())  # (N, C, *spatial)
        batch: Any = engine.state.batch
        for image, name in zip(arrays, batch["name"], strict=True):
            self._write_one(image, name)
        self._images.append(arrays)

    def _write_one(self, image: np.ndarray, name: str) -> None:
        path = self.output_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if image.ndim == 3:
            save_png(to_tile(image), path.with_name(path.name + ".png"))
            return
        volume = image[0].T if len(image) == 1 else image.T  # (columns, rows, depth[, C])
        affine = np.diag([-1.0, -1.0, 1.0, 1.0])  # NIfTI's axes run to the right, the front and the head
        nibabel.save(nibabel.Nifti1Image(volume, affine), path.with_name(path.name + ".nii.gz"))

    def _finish(self, engine: Engine) -> None:
        images = np.concatenate(self._images)
        columns = int(np.ceil(np.sqrt(len(images))))
        save_png(image_grid(images, columns=columns), self.output_dir / "grid.png")
