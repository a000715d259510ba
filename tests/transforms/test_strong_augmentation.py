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

"""Strongly disturbed views."""

from __future__ import annotations

import unittest

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from parameterized import parameterized
from scipy import ndimage

from monai_jointdiff.data import DrawDataset
from monai_jointdiff.transforms import ClassificationAugmentation, StrongAugmentation

SHAPES = [((1, 12, 16),), ((3, 12, 12),), ((2, 6, 8, 10),)]
GEOMETRY = ("rotate", "shear", "translate", "scale")
INTENSITY = ("brightness", "contrast", "gamma", "blur", "sharpen", "noise")


def image_of(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9


def view(image: torch.Tensor, seed: int = 0, **options) -> torch.Tensor:
    transform = StrongAugmentation(image.ndim - 1, **options)
    transform.set_random_state(seed)
    return transform({"image": image})["image_strong"]


def alone(image: torch.Tensor, name: str, magnitude: float, seed: int = 0) -> torch.Tensor:
    """One operation at a known magnitude."""
    transform = StrongAugmentation(image.ndim - 1, cutout=0.0)
    transform.set_random_state(seed)
    transform._choose = lambda channels: {name: magnitude}  # type: ignore[method-assign]
    return transform({"image": image})["image_strong"]


def framed(image: torch.Tensor) -> torch.Tensor:
    """The image with background around it."""
    return torch.nn.functional.pad(image, [3, 3] * (image.ndim - 1), value=-1.0)


class TestGeometry(unittest.TestCase):
    @parameterized.expand(SHAPES)
    def test_shift_by_whole_pixels(self, shape: tuple[int, ...]) -> None:
        image, found = image_of(shape), set()
        for seed in range(12):
            axis = 1 + np.argmax([self.shifted(image, k, seed) for k in range(1, image.ndim)])
            self.assertTrue(self.shifted(image, int(axis), seed))
            found.add(int(axis))
        self.assertEqual(found, set(range(1, image.ndim)))  # any axis

    def shifted(self, image: torch.Tensor, axis: int, seed: int) -> bool:
        """Whether the view shows, at each place, what was two pixels further along the axis."""
        count = image.shape[axis]
        moved = alone(image, "translate", 2 / (0.2 * count), seed)
        fill = torch.full_like(image.narrow(axis, 0, 2), -1.0)
        expected = torch.cat([image.narrow(axis, 2, count - 2), fill], dim=axis)
        return torch.allclose(moved, expected, atol=1e-5)

    def test_rotation_and_scale_equal_scipys_in_pixels(self) -> None:
        image = image_of((1, 14, 22))
        center = (np.array(image.shape[1:]) - 1) / 2
        for name, magnitude in (("rotate", 0.7), ("rotate", -0.4), ("scale", 0.8)):
            angle, factor = (magnitude * np.pi / 6, 1.0) if name == "rotate" else (0.0, 1.3**-magnitude)
            x_y = factor * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            matrix = x_y[::-1, ::-1]  # rows first
            expected = ndimage.affine_transform(
                image[0].double().numpy(), matrix, center - matrix @ center, order=1, mode="grid-constant", cval=-1.0
            )
            np.testing.assert_allclose(alone(image, name, magnitude)[0].numpy(), expected, atol=2e-5)

    def test_shear_of_volumes_moves_planes(self) -> None:
        image = image_of((1, 5, 5, 5))
        for seed in range(6):
            sheared = alone(image, "shear", 1.0, seed)
            kept = [torch.allclose(sheared.select(a, 2), image.select(a, 2), atol=1e-5) for a in (1, 2, 3)]
            self.assertEqual(sum(kept), 1)  # the middle plane across the axis along which the shift grows


class TestIntensity(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_formulas(self, spatial_dims: int) -> None:
        image = image_of((1, *[8] * spatial_dims)) / 3
        mean = image.mean()
        expected = {
            "brightness": image + 0.1,
            "contrast": mean + np.exp(0.2) * (image - mean),
            "gamma": 2 * ((image + 1) / 2) ** np.exp(0.2) - 1,
        }
        for name, by_hand in expected.items():
            torch.testing.assert_close(alone(image, name, 0.2), by_hand.float(), rtol=0, atol=1e-5)
        noise = alone(image, "noise", -0.2) - image
        self.assertLess(abs(float(noise.std()) - 0.06), 0.02)

    def test_blur_and_sharpening_equal_scipys(self) -> None:
        image = image_of((1, 24, 30)) / 3
        for name, magnitude in (("blur", -0.9), ("sharpen", 0.3), ("sharpen", -0.5)):
            sigma = 0.9 * 24 / 24 if name == "blur" else 1.0
            smooth = ndimage.gaussian_filter(image[0].double().numpy(), sigma, mode="nearest", truncate=3.0)
            factor = {0.3: 2 * 0.3, -0.5: -0.25}.get(magnitude, -1.0)
            expected = image[0].numpy() + factor * (image[0].numpy() - smooth)
            # MONAI integrates the Gaussian over the pixel, scipy samples it
            np.testing.assert_allclose(alone(image, name, magnitude)[0].numpy(), expected, atol=0.03)
        change = float((alone(image, "blur", -0.9) - image).abs().mean())
        self.assertGreater(change, 0.05)

    def test_colors(self) -> None:
        image = image_of((3, 6, 6)) / 3
        gray = image.mean(dim=0, keepdim=True)
        torch.testing.assert_close(
            alone(image, "saturation", -0.5), gray + np.exp(-0.5) * (image - gray), atol=1e-5, rtol=0
        )
        ratios = ((alone(image, "channels", 0.5) + 1) / (image + 1)).flatten(1)
        self.assertLess(float(ratios.std(dim=1).max()), 1e-5)  # one factor for a channel
        self.assertGreater(float(ratios.mean(dim=1).std()), 1e-3)  # another for the next
        self.assertLess(float(ratios.log().abs().max()), 0.25 + 1e-5)
        for seed in range(30):  # of gray images, and of two channels, neither
            transform = StrongAugmentation(2, num_operations=1)
            transform.set_random_state(seed)
            self.assertNotIn("saturation", transform._choose(2))
            self.assertEqual({"channels", "saturation"} & set(transform._choose(1)), set())

    @parameterized.expand([(name, channels) for name in INTENSITY[:3] for channels in (1, 3)])
    def test_background_stays(self, name: str, channels: int) -> None:
        inner = image_of((channels, 6, 6))
        inner[0, 2, 2] = -1.0  # of a color image one channel alone is no background
        image = framed(inner)
        outside = (image == -1).all(dim=0)
        for magnitude in (-0.9, 0.9):
            found = alone(image, name, magnitude)
            self.assertTrue(bool((found[:, outside] == -1).all()))
            self.assertGreater(float((found - image)[:, ~outside].abs().mean()), 0.05)


class TestView(unittest.TestCase):
    @parameterized.expand(SHAPES)
    def test_stays_in_range_and_keeps_shape_and_input(self, shape: tuple[int, ...]) -> None:
        image = image_of(shape)
        before = image.clone()
        for seed in range(30):
            found = view(image, seed, num_operations=4)
            self.assertEqual((found.shape, found.dtype), (image.shape, torch.float32))
            self.assertTrue(bool(((found >= -1) & (found <= 1)).all()))
        torch.testing.assert_close(image, before, rtol=0, atol=0)

    @parameterized.expand(SHAPES)
    def test_nothing_done_changes_nothing(self, shape: tuple[int, ...]) -> None:
        image = image_of(shape)
        torch.testing.assert_close(view(image, num_operations=0, cutout=0.0), image, rtol=0, atol=0)
        torch.testing.assert_close(view(image, magnitude=0.0, cutout=0.0), image, rtol=0, atol=2e-6)

    def test_operations_are_different_and_uniform_and_magnitudes_too(self) -> None:
        transform = StrongAugmentation(2, num_operations=3, magnitude=4.0)
        transform.set_random_state(0)
        drawn = [transform._choose(3) for _ in range(1200)]
        self.assertEqual({len(one) for one in drawn}, {3})
        counts = [sum(name in one for one in drawn) for name in transform.operations]
        deviation = (1200 * 0.25 * 0.75) ** 0.5
        self.assertLess(max(abs(count - 300) for count in counts), 4 * deviation)
        magnitudes = np.array([m for one in drawn for m in one.values()])
        self.assertLessEqual(abs(magnitudes).max(), 0.4)
        self.assertLess(abs(magnitudes.mean()), 0.02)
        self.assertAlmostEqual(magnitudes.std(), 0.4 / 3**0.5, delta=0.01)

    @parameterized.expand([((1, 20, 20),), ((3, 20, 20),), ((1, 12, 12, 12),)])
    def test_cutout_is_a_box_of_background_of_all_channels(self, shape: tuple[int, ...]) -> None:
        image, shares = image_of(shape), []
        for seed in range(40):
            found = view(image, seed, num_operations=0, cutout=0.5)
            covered = (found == -1).all(dim=0)
            self.assertTrue(torch.equal(found[:, ~covered], image[:, ~covered]))
            ranges = [
                covered.any(dim=tuple(a for a in range(covered.ndim) if a != axis)) for axis in range(covered.ndim)
            ]
            sides = [int(one.sum()) for one in ranges]
            self.assertEqual(int(covered.sum()), int(np.prod(sides)))  # a box, and one
            self.assertLessEqual(max(sides), shape[1] // 2)
            shares.append(max(sides) / shape[1])
        self.assertGreater(max(shares), 0.35)
        self.assertLess(min(shares), 0.15)

    def test_is_stronger_than_the_weak_view(self) -> None:
        image = image_of((1, 24, 24)).cumsum(dim=-1).cumsum(dim=-2)
        image = image / image.abs().max()
        weak, strong = [], []
        for seed in range(60):
            transforms = ClassificationAugmentation(2, 0.5), StrongAugmentation(2)
            both = Compose(transforms).set_random_state(seed)({"image": image})
            weak.append(float((both["image_cls"] - image).abs().mean()))
            strong.append(float((both["image_strong"] - image).abs().mean()))
        self.assertGreater(np.mean(strong), 1.5 * np.mean(weak))

    def test_view_of_a_draw_does_not_depend_on_what_was_drawn_before(self) -> None:
        items = [{"image": image_of((1, 8, 8), seed)} for seed in range(4)]

        def dataset(seed: int = 5) -> DrawDataset:
            return DrawDataset(items, dict, Compose([ClassificationAugmentation(2), StrongAugmentation(2)]), seed=seed)

        first, other = dataset(), dataset()
        expected = [first[draw]["image_strong"] for draw in range(12)]
        for draw in (7, 3, 11):
            torch.testing.assert_close(other[draw]["image_strong"], expected[draw], rtol=0, atol=0)
        shows = [first.order(draw) for draw in range(12)]
        again = next(draw for draw in range(4, 12) if shows[draw] == shows[0])
        self.assertFalse(torch.equal(expected[again], expected[0]))  # the same image of another draw
        self.assertFalse(torch.equal(dataset(6)[3]["image_strong"], expected[3]))

    def test_other_keys_stay_and_the_dictionary_is_a_copy(self) -> None:
        data = {"x": MetaTensor(image_of((1, 8, 8))), "label": 1}
        found = StrongAugmentation(2, key="x", new_key="y")(data)
        self.assertEqual((set(found), set(data)), ({"x", "y", "label"}, {"x", "label"}))
        self.assertIs(type(found["y"]), torch.Tensor)

    @parameterized.expand(
        [
            ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
            ({"magnitude": 11.0}, r"magnitude must be in \[0, 10\], got 11.0"),
            ({"cutout": -0.1}, r"cutout must be in \[0, 1\], got -0.1"),
            ({"background": 2.0}, r"background must be in \[-1, 1\], got 2.0"),
            ({"operations": ["invert"]}, "operations must be different ones of .* got .'invert',."),
            ({"operations": ["blur", "blur"]}, "operations must be different ones of"),
            ({"num_operations": 3, "operations": ["blur", "gamma"]}, r"num_operations must be in \[0, 2\], got 3"),
        ]
    )
    def test_wrong_arguments(self, options: dict, message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"StrongAugmentation: {message}"):
            StrongAugmentation(**{"spatial_dims": 2, **options})

    def test_wrong_image(self) -> None:
        with self.assertRaisesRegex(ValueError, r"2 spatial axes, got shape \(1, 4, 4, 4\)"):
            StrongAugmentation(2)({"image": torch.zeros(1, 4, 4, 4)})
        with self.assertRaisesRegex(ValueError, "2 operations are to be done, 1 fit an image of 1 channels"):
            StrongAugmentation(2, operations=["channels", "blur"])({"image": torch.zeros(1, 4, 4)})


if __name__ == "__main__":
    unittest.main()
