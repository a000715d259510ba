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


"""Random views for the classification term."""

from __future__ import annotations

import unittest
from unittest import mock

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from parameterized import parameterized

from monai_jointdiff.data import DrawDataset
from monai_jointdiff.transforms import ClassificationAugmentation

SHAPES = [((1, 12, 16),), ((2, 6, 8, 10),)]


def image_of(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def view(image: torch.Tensor, seed: int = 0, **options) -> torch.Tensor:
    transform = ClassificationAugmentation(image.ndim - 1, **options)
    transform.set_random_state(seed)
    return transform({"image": image})["image_cls"]


def blob(shape: tuple[int, ...], sigma: float = 1.5) -> torch.Tensor:
    """A smooth spot off the center."""
    axes = [torch.arange(n) - (n - 1) / 2 - 2 for n in shape]
    squares = sum(axis.square() for axis in torch.meshgrid(*axes, indexing="ij"))
    return torch.exp(-torch.as_tensor(squares) / (2 * sigma**2))[None] * 2 - 1


def turned(image: torch.Tensor, *angles: float) -> torch.Tensor:
    """The geometry alone, with the given angles (radians) and neither scaling nor shift."""
    transform = ClassificationAugmentation(image.ndim - 1)
    numbers = [*angles, *[0.0] * image.ndim]
    with mock.patch.object(transform, "_uniform", side_effect=numbers):
        return transform._geometry(image)


def plane_rotation(dims: int, axis: int, angle: float) -> np.ndarray:
    """Rotation by an angle in the plane of an axis and the one before it."""
    matrix = np.eye(dims)
    matrix[axis, axis] = matrix[axis - 1, axis - 1] = np.cos(angle)
    matrix[axis, axis - 1], matrix[axis - 1, axis] = -np.sin(angle), np.sin(angle)
    return matrix


class TestAugmentation(unittest.TestCase):
    @parameterized.expand(SHAPES)
    def test_strength_zero_changes_nothing(self, shape: tuple[int, ...]) -> None:
        image = image_of(shape)
        torch.testing.assert_close(view(image, strength=0.0), image, rtol=0, atol=2e-6)

    @parameterized.expand(SHAPES)
    def test_flip_alone_mirrors_the_last_axis_in_half_of_the_cases(self, shape: tuple[int, ...]) -> None:
        image = image_of(shape)
        mirrored = 0
        for seed in range(40):
            found = view(image, seed, strength=0.0, flip=True)
            is_mirrored = torch.allclose(found, image.flip(-1), atol=2e-6)
            self.assertTrue(is_mirrored or torch.allclose(found, image, atol=2e-6))
            mirrored += is_mirrored
        self.assertTrue(8 <= mirrored <= 32, mirrored)

    @parameterized.expand(SHAPES)
    def test_is_a_function_of_the_state(self, shape: tuple[int, ...]) -> None:
        image = image_of(shape)
        torch.testing.assert_close(view(image, 3), view(image, 3), rtol=0, atol=0)
        self.assertGreater(float((view(image, 3) - view(image, 4)).abs().max()), 0.01)

    @parameterized.expand(SHAPES)
    def test_stays_in_range_and_keeps_shape_and_input(self, shape: tuple[int, ...]) -> None:
        image = image_of(shape)
        before = image.clone()
        for seed in range(20):
            found = view(image, seed, strength=2.0, flip=True)
            self.assertEqual(found.shape, image.shape)
            self.assertEqual(found.dtype, torch.float32)
            self.assertTrue(bool(((found >= -1) & (found <= 1)).all()))
        torch.testing.assert_close(image, before, rtol=0, atol=0)

    @parameterized.expand([((24, 24),), ((16, 16, 16),)])
    def test_geometry_moves_a_spot_within_its_bounds_and_not_outside(self, shape: tuple[int, ...]) -> None:
        image = blob(shape)
        distances = []
        for seed in range(30):
            transform = ClassificationAugmentation(len(shape))
            transform.set_random_state(seed)
            weights = transform._geometry(image)[0] + 1
            axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
            center = torch.stack([(axis * weights).sum() / weights.sum() for axis in axes])
            start = torch.tensor([(n - 1) / 2 + 2 for n in shape])
            distances.append(float((center - start).norm()))
        radius = 2 * len(shape) ** 0.5
        shift = 0.05 * max(shape) * 1.2 * len(shape) ** 0.5
        turn = (len(shape) - 1) * radius * np.pi / 12
        self.assertGreater(max(distances), 0.5)
        self.assertLess(max(distances), shift + turn + 0.2 * radius + 0.5)

    @parameterized.expand([((1, 16, 40), (0.2,)), ((2, 30, 12), (-0.26,)), ((1, 8, 14, 20), (0.2, -0.15))])
    def test_rotation_is_that_of_pixels(self, shape: tuple[int, ...], angles: tuple[float, ...]) -> None:
        image, dims = image_of(shape), len(shape) - 1
        matrix = np.eye(dims)
        for number, angle in enumerate(angles):
            matrix = matrix @ plane_rotation(dims, dims - 1 - number, angle)
        center = (np.array(shape[1:]) - 1) / 2
        for channel, found in zip(image.numpy(), turned(image, *angles).numpy(), strict=True):
            offset = center - matrix @ center
            expected = scipy.ndimage.affine_transform(channel, matrix, offset, order=1, mode="nearest")
            np.testing.assert_allclose(found, expected, atol=1e-5)

    @parameterized.expand([((1, 8, 12),), ((1, 14, 8),)])
    def test_quarter_of_a_turn_in_the_middle_of_an_oblong_image(self, shape: tuple[int, ...]) -> None:
        image = image_of(shape)
        middle = (slice(None), *(slice((n - 8) // 2, (n + 8) // 2) for n in shape[1:]))
        found = turned(image, np.pi / 2)[middle]
        torch.testing.assert_close(found, torch.rot90(image[middle], 1, (1, 2)), rtol=0, atol=1e-5)

    @parameterized.expand([((24, 48),), ((40, 24),), ((12, 18, 24),)])
    def test_no_axis_is_stretched_against_another(self, shape: tuple[int, ...]) -> None:
        axes = [torch.arange(n, dtype=torch.float32) for n in shape]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        middle = (slice(None), *(slice(n // 2 - 2, n // 2 + 2) for n in shape))
        places = coordinates[middle].flatten(1).T.numpy()
        for seed in range(5):
            transform = ClassificationAugmentation(len(shape), flip=True)
            transform.set_random_state(seed)
            taken_from = transform._geometry(coordinates)[middle].flatten(1).T.numpy()
            with_offset = np.concatenate([places, np.ones((len(places), 1))], axis=1)
            matrix = np.linalg.lstsq(with_offset, taken_from, rcond=None)[0][:-1]
            values = np.linalg.svd(matrix, compute_uv=False)
            self.assertAlmostEqual(values.max() / values.min(), 1.0, places=4)

    def test_axes_of_one_size_are_turned_without_rounding_by_it(self) -> None:
        image, angle = image_of((1, 29, 29)), 0.2
        theta = torch.tensor([[[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]]]).float()
        grid = F.affine_grid(theta, [1, 1, 29, 29], align_corners=False)
        expected = F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]
        self.assertTrue(torch.equal(turned(image, angle), expected))

    def test_strength_scales_all_ranges(self) -> None:
        image = blob((24, 24))
        weak, strong = (
            np.mean([float((view(image, seed, strength=strength) - image).abs().mean()) for seed in range(20)])
            for strength in (0.2, 1.0)
        )
        self.assertLess(2 * weak, strong)

    def test_other_keys_stay_and_the_dictionary_is_a_copy(self) -> None:
        transform = ClassificationAugmentation(2, key="x", new_key="y")
        data = {"x": MetaTensor(image_of((1, 8, 8))), "label": 1}
        found = transform(data)
        self.assertEqual(set(found), {"x", "y", "label"})
        self.assertEqual(set(data), {"x", "label"})
        self.assertIs(type(found["y"]), torch.Tensor)
        self.assertIs(found["x"], data["x"])

    def test_view_of_a_draw_does_not_depend_on_what_was_drawn_before(self) -> None:
        items = [{"image": image_of((1, 8, 8), seed)} for seed in range(4)]
        sets = [DrawDataset(items, lambda item: item, ClassificationAugmentation(2), seed=5) for _ in range(2)]
        first = sets[0][6]["image_cls"]
        for draw in (0, 3, 9):
            sets[1][draw]
        torch.testing.assert_close(sets[1][6]["image_cls"], first, rtol=0, atol=0)
        self.assertFalse(torch.equal(sets[1][6 + 4]["image_cls"], first))

    @parameterized.expand([({"spatial_dims": 1}, "spatial_dims"), ({"spatial_dims": 2, "strength": -1.0}, "strength")])
    def test_wrong_arguments(self, options: dict, message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"ClassificationAugmentation: {message} must be"):
            ClassificationAugmentation(**options)


if __name__ == "__main__":
    unittest.main()
