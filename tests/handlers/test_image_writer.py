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


"""Generated images as files."""

from __future__ import annotations

import unittest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.engines import SupervisedEvaluator
from monai.utils import optional_import
from torch import nn

from monai_jointdiff.data import read_image
from monai_jointdiff.handlers import ImageWriter
from monai_jointdiff.visualize import image_grid
from tests.bundles.runs import temporary_folder

nibabel, has_nibabel = optional_import("nibabel")


def write(folder: Path, *stacks: torch.Tensor) -> None:
    """An evaluator whose network gives back what it is given."""
    numbers = iter(range(1000))
    data = [{"image": stack, "name": [f"in/image.{next(numbers)}" for _ in stack]} for stack in stacks]

    def prepare(batch: dict[str, Any], device: Any, non_blocking: bool, **kwargs: Any) -> Any:
        return batch["image"], None

    SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=data,
        network=nn.Identity(),
        prepare_batch=prepare,
        val_handlers=[ImageWriter(folder)],
        decollate=False,
    ).run()


class TestImageWriter(unittest.TestCase):
    def test_pictures_and_grid_come_back(self) -> None:
        folder = temporary_folder(self)
        images = torch.rand(5, 1, 6, 9) * 2.4 - 1.2  # beyond the range, too
        write(folder, images[:3], images[3:])
        for n in range(5):
            stored = read_image(folder / "in" / f"image.{n}.png")
            expected = np.round((images[n].clamp(-1, 1).numpy() + 1) * 127.5)
            np.testing.assert_array_equal(stored, expected.astype(np.uint8))
        grid = read_image(folder / "grid.png")
        np.testing.assert_array_equal(grid[0], image_grid(images.clamp(-1, 1).numpy(), columns=3))
        self.assertEqual(len(list(folder.rglob("*.png"))), 6)

    def test_colors(self) -> None:
        folder = temporary_folder(self)
        image = torch.rand(1, 3, 6, 9) * 2 - 1
        write(folder, image)
        stored = read_image(folder / "in" / "image.0.png")
        np.testing.assert_array_equal(stored, np.round((image[0].numpy() + 1) * 127.5).astype(np.uint8))

    @unittest.skipUnless(has_nibabel, "needs nibabel")
    def test_volumes_come_back_through_the_reader_of_this_package(self) -> None:
        folder = temporary_folder(self)
        images = torch.rand(2, 1, 4, 5, 6) * 2 - 1  # depth, rows, columns
        write(folder, images)
        for n in range(2):
            file = folder / "in" / f"image.{n}.nii.gz"
            np.testing.assert_allclose(read_image(file, spatial_dims=3), images[n].numpy(), atol=1e-6)
            self.assertEqual(nibabel.load(file).shape, (6, 5, 4))
            self.assertEqual(nibabel.aff2axcodes(nibabel.load(file).affine), ("L", "P", "S"))
        self.assertTrue((folder / "grid.png").is_file())


if __name__ == "__main__":
    unittest.main()
