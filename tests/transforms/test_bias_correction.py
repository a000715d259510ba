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

"""Bias fields that are known exactly are found and divided out."""

from __future__ import annotations

import json
import os
import pickle
import unittest
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.transforms import N4BiasFieldCorrection, N4BiasFieldCorrectiond

sitk, has_sitk = optional_import("SimpleITK")
DATA = os.environ.get("JOINTDIFF_DATA")
SHAPES = [((48, 40),), ((16, 24, 20),)]
OUTER, INNER = 100.0, 160.0  # the two tissues
FAST = {"iterations": (20, 20)}


def coordinates(shape: tuple[int, ...]) -> list[np.ndarray]:
    return np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")


def tissues(shape: tuple[int, ...]) -> np.ndarray:
    """A ball of one tissue in a ball of another, off the center; nothing around."""
    axes = coordinates(shape)
    radius, inner = (np.sqrt(sum(np.square(axis - shift) for axis in axes)) for shift in (0.0, 0.1))
    return np.where(inner < 0.45, INNER, np.where(radius < 0.85, OUTER, 0.0)).astype(np.float32)


def bias(shape: tuple[int, ...]) -> np.ndarray:
    """A smooth field that falls by a factor of about two across the image."""
    axes = coordinates(shape)
    return np.exp(0.4 * (axes[0] + 0.5 * axes[1] ** 2 - 0.4 * axes[0] * axes[-1])).astype(np.float32)


def variation(image: np.ndarray, tissue: np.ndarray, value: float) -> float:
    """Coefficient of variation within a tissue."""
    values = image[tissue == value]
    return float(values.std() / values.mean())


@unittest.skipUnless(has_sitk, "needs SimpleITK")
class TestKnownField(unittest.TestCase):
    @parameterized.expand(SHAPES)
    def test_tissues_become_even_and_keep_their_contrast(self, shape: tuple[int, ...]) -> None:
        """The coefficient of variation within each tissue falls to a fifth and the tissues' ratio is the true one."""
        tissue = tissues(shape)
        spoiled = tissue * bias(shape)
        found = np.asarray(N4BiasFieldCorrection()(spoiled[None]))[0]
        for value in (OUTER, INNER):
            self.assertGreater(variation(spoiled, tissue, value), 0.07)
            self.assertLess(variation(found, tissue, value), 0.2 * variation(spoiled, tissue, value))
        ratio = found[tissue == INNER].mean() / found[tissue == OUTER].mean()
        self.assertAlmostEqual(ratio, INNER / OUTER, delta=0.03)

    @parameterized.expand(SHAPES)
    def test_brightness_and_background_stay(self, shape: tuple[int, ...]) -> None:
        tissue = tissues(shape)
        spoiled = tissue * bias(shape)
        found = np.asarray(N4BiasFieldCorrection(mask="positive", **FAST)(spoiled[None]))[0]
        np.testing.assert_array_equal(found[tissue == 0], 0.0)
        inside = tissue > 0
        self.assertAlmostEqual(np.log(found[inside]).mean(), np.log(spoiled[inside]).mean(), places=4)

    def test_each_channel_for_itself(self) -> None:
        tissue = tissues((40, 40))
        spoiled = np.stack([tissue * bias((40, 40)), 3.0 * tissue * bias((40, 40)).T])
        correct = N4BiasFieldCorrection(**FAST)
        found = np.asarray(correct(spoiled))
        for channel in (0, 1):
            alone = np.asarray(correct(spoiled[channel : channel + 1]))[0]
            np.testing.assert_array_equal(found[channel], alone)
            self.assertLess(variation(alone, tissue, OUTER), 0.3 * variation(spoiled[channel], tissue, OUTER))

    def test_scaled_values_below_zero_are_those_of_the_image_they_came_from(self) -> None:
        """Subtract a mean, divide by a deviation: the background is the minimum then, and takes the part of zero."""
        spoiled = tissues((40, 40)) * bias((40, 40))
        scaled = (spoiled - 120.0) / 30.0
        found, expected = (np.asarray(N4BiasFieldCorrection(**FAST)(image[None])) for image in (scaled, spoiled))
        np.testing.assert_allclose(found, (expected - 120.0) / 30.0, atol=2e-3)
        np.testing.assert_allclose(found[0, 0, 0], -4.0, atol=1e-6)

    def test_given_mask_decides_where_the_field_is_estimated(self) -> None:
        """Something that has its own uneven brightness spoils the field unless the mask leaves it out."""
        tissue = tissues((40, 40))
        spoiled = tissue * bias((40, 40))
        spoiled[tissue == INNER] *= np.geomspace(0.2, 5.0, 40)[np.nonzero(tissue == INNER)[1]]
        masked = np.asarray(N4BiasFieldCorrection(**FAST)(spoiled[None], (tissue == OUTER)[None]))[0]
        self.assertLess(variation(masked, tissue, OUTER), 0.2 * variation(spoiled, tissue, OUTER))
        unmasked = np.asarray(N4BiasFieldCorrection(mask="positive", **FAST)(spoiled[None]))[0]
        self.assertLess(variation(masked, tissue, OUTER), 0.85 * variation(unmasked, tissue, OUTER))

    def test_even_image_stays_as_it_is(self) -> None:
        tissue = tissues((32, 32))
        np.testing.assert_allclose(N4BiasFieldCorrection(**FAST)(tissue[None])[0], tissue, rtol=0.02)

    def test_same_result_every_time_and_in_another_process(self) -> None:
        spoiled = (tissues((32, 32)) * bias((32, 32)))[None]
        correct = N4BiasFieldCorrection(**FAST)
        again = pickle.loads(pickle.dumps(correct))
        np.testing.assert_array_equal(correct(spoiled), again(spoiled))


@unittest.skipUnless(has_sitk, "needs SimpleITK")
class TestKinds(unittest.TestCase):
    def test_kind_dtype_and_meta_data_are_kept(self) -> None:
        spoiled = (tissues((24, 24)) * bias((24, 24)))[None]
        affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])).double()
        meta = MetaTensor(torch.from_numpy(spoiled).double(), affine=affine, meta={"name": "a"})
        correct = N4BiasFieldCorrection(**FAST)
        found = correct(meta)
        assert isinstance(found, MetaTensor)
        self.assertEqual((found.dtype, found.meta["name"]), (torch.float32, "a"))
        torch.testing.assert_close(found.affine, affine)
        plain = correct(torch.from_numpy(spoiled))
        self.assertIs(type(plain), torch.Tensor)
        whole = correct(np.rint(spoiled).astype(np.int16))
        self.assertIsInstance(whole, np.ndarray)
        self.assertEqual(whole.dtype, np.float32)
        self.assertEqual(float(meta.max()), float(spoiled.max()))  # the input is not changed

    def test_spacing_of_the_affine_reaches_itk(self) -> None:
        spoiled = torch.from_numpy(tissues((12, 24, 20)) * bias((12, 24, 20)))[None]
        seen: list[Any] = []

        class Recording(N4BiasFieldCorrection):
            def _log_field(self, signal: np.ndarray, region: np.ndarray, spacing: Any) -> np.ndarray:
                seen.append(spacing)
                return super()._log_field(signal, region, spacing)

        oblique = np.eye(4)
        oblique[:3, :3] = np.array([[0, 0.6, -0.8], [0, 0.8, 0.6], [1, 0, 0]]) * [5.0, 1.0, 2.0]
        found = [Recording(2, **FAST)(MetaTensor(spoiled, affine=a)) for a in (torch.eye(4), torch.from_numpy(oblique))]
        self.assertEqual([[round(s, 6) for s in spacing] for spacing in seen], [[1, 1, 1], [5, 1, 2]])
        self.assertTrue(all(bool(torch.isfinite(image).all()) for image in found))

    def test_nothing_in_the_mask_changes_nothing(self) -> None:
        image = np.stack([tissues((16, 16)) * bias((16, 16)), np.zeros((16, 16)), np.full((16, 16), 7.0)])
        found = N4BiasFieldCorrection(**FAST)(image.astype(np.float32), np.zeros((1, 16, 16)))
        np.testing.assert_array_equal(found, image.astype(np.float32))
        np.testing.assert_array_equal(N4BiasFieldCorrection()(image[1:2]), image[1:2])

    def test_arguments_by_name_make_the_same_again(self) -> None:
        correct = N4BiasFieldCorrection(2, "positive", (5, 6), 0.01)
        again = N4BiasFieldCorrection(**json.loads(json.dumps(correct.as_dict())))
        self.assertEqual(again.as_dict(), correct.as_dict())
        self.assertEqual(vars(again), vars(correct))

    @parameterized.expand(
        [
            ({"shrink_factor": 0}, "shrink_factor must be at least 1, got 0"),
            ({"mask": "brain"}, "mask must be one of otsu, positive, got 'brain'"),
            ({"iterations": ()}, "iterations must be positive numbers"),
            ({"iterations": (5, 0)}, "iterations must be positive numbers"),
        ]
    )
    def test_wrong_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"N4BiasFieldCorrection: {message}"):
            N4BiasFieldCorrection(**arguments)

    def test_wrong_images(self) -> None:
        correct = N4BiasFieldCorrection()
        with self.assertRaisesRegex(ValueError, r"needs \(C, \*spatial\) in 2D or 3D, got shape \(8, 8\)"):
            correct(np.ones((8, 8)))
        with self.assertRaisesRegex(ValueError, "holds NaN or infinite values"):
            correct(np.full((1, 8, 8), np.nan))
        with self.assertRaisesRegex(ValueError, r"mask of an image of shape \(2, 8, 8\) must .*, got \(3, 8, 8\)"):
            correct(np.ones((2, 8, 8)), np.ones((3, 8, 8)))


@unittest.skipUnless(has_sitk, "needs SimpleITK")
class TestDictionary(unittest.TestCase):
    def test_keys_mask_and_the_rest(self) -> None:
        tissue = tissues((24, 24))
        spoiled = (tissue * bias((24, 24)))[None]
        item = {"a": spoiled, "b": 2 * spoiled, "mask": (tissue > 0)[None], "name": "x"}
        options: dict[str, Any] = {"shrink_factor": 1, "iterations": (3,)}
        found = N4BiasFieldCorrectiond(["a", "b", "none"], "mask", allow_missing_keys=True, **options)(item)
        correct = N4BiasFieldCorrection(**options)
        for key in ("a", "b"):
            np.testing.assert_array_equal(found[key], correct(item[key], item["mask"]))
        self.assertEqual((found["name"], set(found)), ("x", set(item)))
        np.testing.assert_array_equal(item["a"], spoiled)

    def test_in_a_chain(self) -> None:
        chain = Compose([N4BiasFieldCorrectiond("image", iterations=(5,)), lambda item: item["image"].shape])
        self.assertEqual(chain({"image": torch.rand(1, 16, 16)}), (1, 16, 16))
        with self.assertRaises(KeyError):
            N4BiasFieldCorrectiond("image")({"other": 1})


@unittest.skipUnless(DATA and has_sitk, "JOINTDIFF_DATA does not say where the real data are, or no SimpleITK")
class TestRealScan(unittest.TestCase):
    def test_added_field_is_removed(self) -> None:
        """A slice of a brain, spoiled: the correction brings it near to what it makes of the slice itself."""
        path = Path(str(DATA)) / "originals" / "brats2013_pat0006" / "T1c_subtrMeanDivStd.nii.gz"
        image = np.asarray(nibabel.load(path).dataobj[:, :, 100], dtype=np.float32)
        image = image - image.min()
        spoiled = image * bias(image.shape)
        clean, found = (np.asarray(N4BiasFieldCorrection(**FAST)(each[None]))[0] for each in (image, spoiled))
        inside = image > 0.3 * image.max()
        apart = [np.std(np.log(each[inside] / clean[inside])) for each in (spoiled, found)]
        self.assertLess(apart[1], 0.6 * apart[0])


if __name__ == "__main__":
    unittest.main()
