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


"""Files of all kinds become the same canonical arrays, and what cannot be used is named."""

from __future__ import annotations

import json
import os
import unittest
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from monai.utils import optional_import
from parameterized import parameterized
from PIL import Image

from monai_jointdiff.data import ImagePreprocessing, read_image
from monai_jointdiff.data.reading import (
    has_image_suffix,
    image_size_tuple,
    is_dicom,
    is_dicom_slice,
    is_gray,
    resize_and_pad,
)
from tests.bundles.runs import temporary_folder

nrrd, has_nrrd = optional_import("nrrd")
pydicom, has_pydicom = optional_import("pydicom")

DATA = os.environ.get("JOINTDIFF_DATA")
ORIGINALS = Path(DATA or ".") / "originals"
NEEDS_DATA = "set JOINTDIFF_DATA to the folder with the test data"
AXIS_CODES = [("R", "A", "S"), ("L", "P", "S"), ("P", "S", "R"), ("I", "L", "A"), ("S", "R", "P")]


def pixels(*shape: int, dtype: Any = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, min(np.iinfo(dtype).max, 4095), shape, endpoint=True).astype(dtype)


def axial(image: nibabel.Nifti1Image) -> np.ndarray:
    """Feet to head, front to back, right to left, by nibabel's own right-anterior-superior order."""
    array = np.asanyarray(nibabel.as_closest_canonical(image).dataobj)
    return array[::-1, ::-1].transpose(2, 1, 0)


def affine_of(codes: tuple[str, ...], spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """Voxel axes that run toward these directions, with this spacing."""
    affine = np.eye(4)
    turn = nibabel.orientations.axcodes2ornt(codes)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(turn):
        affine[int(world), axis] = sign * spacing[axis]
    return affine


def save_dicom(path: Path, array: np.ndarray, interpretation: str = "MONOCHROME2", bits: int = 12) -> Path:
    """A single secondary-capture slice (rows, columns)."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    content = pydicom.Dataset()
    content.file_meta = meta
    content.SOPClassUID, content.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    content.Modality, content.PatientID = "DX", "phantom"
    content.Rows, content.Columns = array.shape
    content.SamplesPerPixel, content.PixelRepresentation = 1, 0
    content.PhotometricInterpretation = interpretation
    content.BitsAllocated = 8 * array.dtype.itemsize
    content.BitsStored, content.HighBit = bits, bits - 1
    content.PixelData = array.tobytes()
    content.save_as(path, enforce_file_format=True)
    return path


def save_series(folder: Path, array: np.ndarray, uid: str = "") -> Path:
    """Slices (depth, rows, columns) from the feet to the head, in files whose names are in another order."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = uid or pydicom.uid.generate_uid()
    for number, pixels_of_slice in enumerate(array):
        path = save_dicom(folder / f"{uid[-4:]}_{(7 * number) % 10}{number}.dcm", pixels_of_slice)
        content = pydicom.dcmread(path)
        content.SOPClassUID = content.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"  # MR
        content.Modality, content.SeriesInstanceUID = "MR", uid
        content.ImageOrientationPatient, content.PixelSpacing = [1, 0, 0, 0, 1, 0], [1, 1]
        content.ImagePositionPatient, content.SliceThickness = [0, 0, 2 * number], 2
        content.save_as(path, enforce_file_format=True)
    return folder


def save_frames(path: Path, array: np.ndarray) -> Path:
    """One DICOM file with several frames (depth, rows, columns)."""
    content = pydicom.dcmread(save_dicom(path, array[0]))
    content.SOPClassUID = content.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7.3"
    content.NumberOfFrames, content.PixelData = len(array), array.tobytes()
    content.save_as(path, enforce_file_format=True)
    return path


class TestPictures(unittest.TestCase):
    @parameterized.expand([(n, ending) for n in range(1, 9) for ending in ("jpg", "png")])
    def test_exif_orientation(self, orientation: int, ending: str) -> None:
        """The tag says where the first row and the first column of the file lie in the picture."""
        upright = np.zeros((20, 40), np.uint8)
        upright[:10, :20], upright[:10, 20:], upright[10:, :20] = 240, 160, 80
        flipped, mirrored = upright[::-1], upright[:, ::-1]
        stored = [upright, mirrored, flipped[:, ::-1], flipped, upright.T, mirrored.T, flipped[:, ::-1].T, flipped.T]
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = temporary_folder(self) / f"a.{ending}"
        Image.fromarray(np.ascontiguousarray(stored[orientation - 1])).save(path, exif=exif)
        found = read_image(path)[0].astype(int)
        self.assertEqual(found.shape, (20, 40))
        self.assertLess(np.abs(found - upright)[:, 2:-2].mean(), 3)  # JPEG is not exact

    def test_broken_exif_is_ignored(self) -> None:
        path = temporary_folder(self) / "a.jpg"
        Image.fromarray(np.full((20, 40), 99, np.uint8)).save(path, exif=b"Exif\0\0junkjunkjunk")
        self.assertEqual(read_image(path).shape, (1, 20, 40))

    @parameterized.expand([("a.png", "L"), ("a.PNG", "RGB"), ("a.bmp", "L"), ("a.tif", "RGB"), ("a.tiff", "L")])
    def test_rows_and_columns_as_in_the_file(self, name: str, mode: str) -> None:
        path = temporary_folder(self) / name
        array = pixels(5, 9, 3) if mode == "RGB" else pixels(5, 9)
        Image.fromarray(array).save(path)
        image = read_image(path)
        np.testing.assert_array_equal(image, array.transpose(2, 0, 1) if mode == "RGB" else array[None])
        self.assertEqual(image.dtype, np.uint8)

    def test_16_bit_keep_their_values(self) -> None:
        path = temporary_folder(self) / "deep.png"
        array = pixels(5, 9, dtype=np.uint16) * 16
        Image.fromarray(array).save(path)
        np.testing.assert_array_equal(read_image(path)[0], array)

    def test_palette_alpha_and_bits_are_resolved(self) -> None:
        folder = temporary_folder(self)
        colors = Image.fromarray(pixels(6, 7, 3))
        gray = Image.fromarray(pixels(6, 7))
        cases = {
            "palette": (colors.quantize(8), "RGB"),
            "alpha": (colors.convert("RGBA"), "RGB"),
            "gray_alpha": (gray.convert("LA"), "L"),
            "bits": (gray.convert("1"), "L"),
        }
        for name, (image, mode) in cases.items():
            image.save(folder / f"{name}.png")
            expected = np.asarray(image.convert(mode))
            expected = expected[None] if mode == "L" else expected.transpose(2, 0, 1)
            np.testing.assert_array_equal(read_image(folder / f"{name}.png"), expected, err_msg=name)

    def test_gray_stored_in_three_channels_becomes_one_and_back(self) -> None:
        folder = temporary_folder(self)
        array = pixels(5, 9)
        Image.fromarray(array).save(folder / "one.png")
        Image.fromarray(array).convert("RGB").save(folder / "three.png")
        for name in ("one.png", "three.png"):
            np.testing.assert_array_equal(read_image(folder / name, in_channels=1), array[None])
            np.testing.assert_array_equal(read_image(folder / name, in_channels=3), np.stack([array] * 3))
        self.assertEqual(read_image(folder / "three.png").shape, (3, 5, 9))

    def test_colored_markings_become_their_luminance(self) -> None:
        path = temporary_folder(self) / "caliper.png"
        array = np.repeat(pixels(40, 40)[..., None], 3, axis=2)
        array[3, 5:15] = (255, 200, 0)
        Image.fromarray(array).save(path)
        expected = np.asarray(Image.fromarray(array).convert("L"))
        np.testing.assert_allclose(read_image(path, in_channels=1)[0].astype(int), expected.astype(int), atol=1)

    def test_colors_are_not_thrown_away(self) -> None:
        path = temporary_folder(self) / "skin.png"
        Image.fromarray(pixels(8, 8, 3)).save(path)
        self.assertFalse(is_gray(read_image(path)))
        with self.assertRaisesRegex(ValueError, "skin.png.*different .colored. channels, but in_channels is 1"):
            read_image(path, in_channels=1)
        with self.assertRaisesRegex(ValueError, "skin.png.*it has 3 channels, but in_channels is 2"):
            read_image(path, in_channels=2)


class TestVolumes(unittest.TestCase):
    @parameterized.expand([(codes,) for codes in AXIS_CODES])
    def test_nifti_comes_in_axial_order(self, codes: tuple[str, ...]) -> None:
        path = temporary_folder(self) / "volume.nii.gz"
        image = nibabel.Nifti1Image(pixels(4, 5, 6, dtype=np.int16), affine_of(codes))
        nibabel.save(image, path)
        read = read_image(path, 3)
        np.testing.assert_array_equal(read[0], axial(image))
        self.assertEqual(read.dtype, np.int16)

    def test_orientation_of_storage_does_not_matter(self) -> None:
        folder = temporary_folder(self)
        array = pixels(4, 5, 6, dtype=np.int16)
        base = nibabel.Nifti1Image(array, affine_of(("R", "A", "S"), (1.0, 2.0, 3.0)))
        prepare = ImagePreprocessing(3, 16, 1)
        results = []
        for n, codes in enumerate(AXIS_CODES):
            turn = nibabel.orientations.ornt_transform(
                nibabel.orientations.axcodes2ornt(("R", "A", "S")), nibabel.orientations.axcodes2ornt(codes)
            )
            nibabel.save(base.as_reoriented(turn), folder / f"{n}.nii")
            results.append(prepare(folder / f"{n}.nii"))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)

    def test_axes_without_meaning_stay_as_stored(self) -> None:
        path = temporary_folder(self) / "array.nii"
        array = pixels(4, 5, 6, dtype=np.int16)
        nibabel.save(nibabel.Nifti1Image(array, None), path)
        np.testing.assert_array_equal(read_image(path, 3)[0], array.transpose(2, 1, 0))

    def test_channels_come_last_in_nifti(self) -> None:
        path = temporary_folder(self) / "two.nii.gz"
        array = pixels(4, 5, 6, 2, dtype=np.int16)
        nibabel.save(nibabel.Nifti1Image(array, affine_of(("L", "P", "S"))), path)
        read = read_image(path, 3, in_channels=2)
        np.testing.assert_array_equal(read, array.transpose(3, 2, 1, 0))

    def test_scaled_values_are_single_precision(self) -> None:
        path = temporary_folder(self) / "scaled.nii"
        image = nibabel.Nifti1Image(pixels(4, 5, 6, dtype=np.int16), affine_of(("L", "P", "S")))
        image.header.set_slope_inter(0.5, -100)
        nibabel.save(image, path)
        read = read_image(path, 3)
        self.assertEqual(read.dtype, np.float32)
        np.testing.assert_allclose(read[0], np.asanyarray(nibabel.load(path).dataobj).transpose(2, 1, 0))

    @unittest.skipUnless(has_nrrd, "needs pynrrd")
    @parameterized.expand([(codes,) for codes in AXIS_CODES])
    def test_nrrd_comes_in_axial_order(self, codes: tuple[str, ...]) -> None:
        path = temporary_folder(self) / "volume.nrrd"
        array, affine = pixels(4, 5, 6, dtype=np.int16), affine_of(codes)
        header = {"space": "right-anterior-superior", "space directions": affine[:3, :3].T, "space origin": np.zeros(3)}
        nrrd.write(str(path), array, header)
        np.testing.assert_array_equal(read_image(path, 3)[0], axial(nibabel.Nifti1Image(array, affine)))

    def test_single_slice_is_a_picture(self) -> None:
        path = temporary_folder(self) / "slice.nii"
        array = pixels(4, 5, 1, dtype=np.int16)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
        np.testing.assert_array_equal(read_image(path, 2)[0], array[..., 0].T)


@unittest.skipUnless(has_pydicom, "needs pydicom")
class TestDicom(unittest.TestCase):
    def test_single_slice_is_rows_and_columns(self) -> None:
        path = save_dicom(temporary_folder(self) / "one.dcm", array := pixels(6, 9, dtype=np.uint16))
        np.testing.assert_array_equal(read_image(path), array[None])

    @parameterized.expand([(np.uint8, 8), (np.uint16, 12), (np.uint16, 16)])
    def test_air_is_dark_under_both_interpretations(self, dtype: Any, bits: int) -> None:
        """MONOCHROME1 says that low values are bright: a film of it has bright air, which has to become dark."""
        folder = temporary_folder(self)
        tissue = pixels(6, 9, dtype=dtype)
        tissue[:2, :2] = 0
        save_dicom(folder / "two.dcm", tissue, "MONOCHROME2", bits)
        save_dicom(folder / "one.dcm", (2**bits - 1 - tissue).astype(dtype), "MONOCHROME1", bits)
        one, two = read_image(folder / "one.dcm"), read_image(folder / "two.dcm")
        np.testing.assert_array_equal(one.astype(int), two.astype(int))
        self.assertEqual(int(one[0, :2, :2].max()), 0)

    def test_known_by_content(self) -> None:
        folder = temporary_folder(self)
        path = save_dicom(folder / "7106", array := pixels(6, 9, dtype=np.uint16))
        (folder / "other").write_bytes(b"DICM")
        self.assertEqual((is_dicom(path), is_dicom(folder / "other")), (True, False))
        np.testing.assert_array_equal(read_image(path), array[None])

    def test_series_is_a_volume_and_one_of_its_slices_is_none(self) -> None:
        array = pixels(5, 6, 9, dtype=np.uint16)
        folder = save_series(temporary_folder(self) / "series", array)
        np.testing.assert_array_equal(read_image(folder, 3), array[None])
        one = sorted(folder.iterdir())[0]
        with self.assertRaisesRegex(ValueError, f"'{one}': it is a single DICOM slice, .* name the folder of the"):
            read_image(one, 3)
        self.assertEqual(read_image(one).shape, (1, 6, 9))
        for path in sorted(folder.iterdir())[1:]:
            path.unlink()
        with self.assertRaisesRegex(ValueError, "series': it is a single DICOM slice"):
            read_image(folder, 3)

    def test_several_series_in_a_folder_are_refused(self) -> None:
        folder = temporary_folder(self)
        for _ in range(2):
            save_series(folder, pixels(3, 6, 9, dtype=np.uint16))
        with self.assertRaisesRegex(ValueError, f"'{folder}': it holds more than one DICOM series; give each a folder"):
            read_image(folder, 3)

    def test_slices_are_known_by_their_header(self) -> None:
        folder = temporary_folder(self)
        array = pixels(4, 6, 9, dtype=np.uint16)
        frames = save_frames(folder / "frames.dcm", array)
        (folder / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 10)
        Image.fromarray(pixels(6, 9)).save(folder / "a.png")
        slices = [save_dicom(folder / name, array[0]) for name in ("one.dcm", "7106")]
        found = [path for path in sorted(folder.iterdir()) if is_dicom_slice(path)]
        self.assertEqual(found, sorted(slices))
        self.assertEqual(read_image(frames, 3).shape, (1, 4, 6, 9))


class TestBadFiles(unittest.TestCase):
    def test_truncated_files_are_named(self) -> None:
        folder = temporary_folder(self)
        picture = Image.fromarray(pixels(64, 64))
        picture.save(folder / "cut.jpg")
        picture.save(folder / "cut.png")
        nibabel.save(nibabel.Nifti1Image(pixels(8, 8, 8, dtype=np.int16), np.eye(4)), folder / "cut.nii.gz")
        for name, spatial_dims in (("cut.jpg", 2), ("cut.png", 2), ("cut.nii.gz", 3)):
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[: len(content) // 2])
            for read in (lambda p, d: read_image(p, d), lambda p, d: ImagePreprocessing(d, 8)(p)):
                with self.assertRaisesRegex(ValueError, f"cannot use '.*{name}'"):
                    read(folder / name, spatial_dims)

    @parameterized.expand([("text.png",), ("text.dcm",), ("text.nii",), ("text.nrrd",), ("empty.jpg",), ("text",)])
    def test_other_content_is_named(self, name: str) -> None:
        path = temporary_folder(self) / name
        path.write_text("" if name.startswith("empty") else "no image\n" * 100)
        with self.assertRaisesRegex(ValueError, f"read_image: cannot use '.*{name}'"):
            read_image(path, 3 if name.endswith((".nii", ".nrrd")) else 2)

    def test_missing_file_and_empty_folder(self) -> None:
        folder = temporary_folder(self)
        with self.assertRaisesRegex(ValueError, "cannot use '.*away.png': there is no such file"):
            read_image(folder / "away.png")
        (folder / "series").mkdir()
        with self.assertRaisesRegex(ValueError, "cannot use '.*series'"):
            read_image(folder / "series", 3)

    @parameterized.expand([(np.nan,), (np.inf,)])
    def test_pixels_that_are_no_numbers(self, value: float) -> None:
        folder = temporary_folder(self)
        flat, solid = np.ones((6, 7), dtype=np.float32), np.ones((4, 4, 4), dtype=np.float32)
        flat[2, 3] = solid[1, 2, 3] = value
        Image.fromarray(flat).save(folder / "bad.tif")
        nibabel.save(nibabel.Nifti1Image(solid, np.eye(4)), folder / "bad.nii")
        for name, spatial_dims in (("bad.tif", 2), ("bad.nii", 3)):
            with self.assertRaisesRegex(ValueError, f"cannot use '.*{name}': it holds NaN or infinite values"):
                read_image(folder / name, spatial_dims)
        for array in (flat, solid):
            with self.assertRaisesRegex(ValueError, "holds NaN or infinite values"):
                ImagePreprocessing(array.ndim, 8)(array[None])

    def test_wrong_number_of_axes(self) -> None:
        folder = temporary_folder(self)
        Image.fromarray(pixels(6, 7)).save(folder / "flat.png")
        nibabel.save(nibabel.Nifti1Image(pixels(4, 5, 6), np.eye(4)), folder / "solid.nii")
        with self.assertRaisesRegex(ValueError, r"flat.png': it has 2 spatial axes \(6, 7\), spatial_dims is 3"):
            read_image(folder / "flat.png", 3)
        with self.assertRaisesRegex(ValueError, r"solid.nii': it has 3 spatial axes \(6, 5, 4\), spatial_dims is 2"):
            read_image(folder / "solid.nii", 2)

    def test_values_outside_of_the_trained_range_name_the_file(self) -> None:
        path = temporary_folder(self) / "bright.tif"
        Image.fromarray(np.full((4, 4), 7.0, dtype=np.float32)).save(path)
        with self.assertRaisesRegex(ValueError, "cannot use '.*bright.tif': .*floating values must lie in"):
            ImagePreprocessing(2, 4, 1, {"float_range": [0, 1]})(path)


class TestNames(unittest.TestCase):
    @parameterized.expand(
        [
            (True, ["a.jpg", "b.JPEG", "c.png", "d.nii.gz", "e.nii", "f.nrrd", "g.dcm", "h.MHA", "x/i.tiff"]),
            (False, ["labels.csv", "a.gz", "jpg", "a.npz", "a.png.txt"]),
        ]
    )
    def test_suffix(self, expected: bool, names: list[str]) -> None:
        for name in names:
            self.assertEqual(has_image_suffix(name), expected, name)

    def test_gray(self) -> None:
        gray = np.stack([pixels(20, 20)] * 3)
        self.assertTrue(is_gray(gray))
        tinted = np.clip(gray.astype(int) + np.array([0, 3, -3])[:, None, None], 0, 255).astype(np.uint8)
        self.assertTrue(is_gray(tinted))
        half = gray.copy()
        half[0, :10] = 255 - half[0, :10]
        self.assertFalse(is_gray(half))

    @parameterized.expand(
        [(8, 2, (8, 8)), ((8, 6), 2, (8, 6)), ([np.int64(4), 5, 6], 3, (4, 5, 6)), (np.int32(4), 3, (4, 4, 4))]
    )
    def test_image_size(self, given: Any, spatial_dims: int, expected: tuple[int, ...]) -> None:
        self.assertEqual(image_size_tuple(given, spatial_dims), expected)

    @parameterized.expand([(8, 4), (0, 2), ((8, 8), 3), ((8, -1), 2), ((8, 8.0), 2), (32.5, 2), ("32", 3), (None, 2)])
    def test_wrong_image_size(self, given: Any, spatial_dims: int) -> None:
        with self.assertRaisesRegex(ValueError, "--spatial_dims must be 2 or 3|--image_size must be one positive"):
            image_size_tuple(given, spatial_dims)


class TestResizeAndPad(unittest.TestCase):
    @parameterized.expand([((32, 32), (11, 11)), ((40, 20), (20, 10)), ((9, 12), (18, 24)), ((50, 30), (25, 15))])
    def test_same_as_the_antialiased_interpolation_of_torch(self, given: Any, wanted: Any) -> None:
        image = np.random.default_rng(0).normal(size=(2, *given)).astype(np.float32)
        expected = F.interpolate(torch.from_numpy(image)[None], wanted, mode="bilinear", antialias=True)[0]
        np.testing.assert_allclose(resize_and_pad(image, wanted, (1, 1)), expected.numpy(), atol=1e-5)

    def test_enlarging_a_volume_is_the_trilinear_interpolation_of_torch(self) -> None:
        image = np.random.default_rng(0).normal(size=(1, 4, 6, 8)).astype(np.float32)
        expected = F.interpolate(torch.from_numpy(image)[None], (8, 12, 16), mode="trilinear", align_corners=False)[0]
        np.testing.assert_allclose(resize_and_pad(image, (8, 12, 16), (1, 1, 1)), expected.numpy(), atol=1e-5)

    @parameterized.expand([((8, 8),), ((4, 5, 6),)])
    def test_right_size_is_left_alone(self, size: tuple[int, ...]) -> None:
        image = np.random.default_rng(0).normal(size=(1, *size)).astype(np.float32)
        np.testing.assert_array_equal(resize_and_pad(image, size, (1,) * len(size)), image)

    @parameterized.expand(
        [
            ((20, 10), (1, 1), (8, 8), (slice(0, 8), slice(2, 6))),
            ((10, 20), (1, 1), (8, 8), (slice(2, 6), slice(0, 8))),
            ((10, 10), (2, 1), (8, 8), (slice(0, 8), slice(2, 6))),
            ((5, 20), (4, 1), (8, 8), (slice(0, 8), slice(0, 8))),
            ((4, 8, 8), (2.5, 1, 1), (10, 10, 10), (slice(0, 10), slice(1, 9), slice(1, 9))),
            ((3, 3), (1, 1), (9, 8), (slice(0, 8), slice(0, 8))),
            ((100, 1), (1, 1), (8, 8), (slice(0, 8), slice(3, 4))),
        ]
    )
    def test_aspect_is_kept_and_the_rest_padded_evenly(
        self, given: Any, spacing: Any, size: Any, inner: tuple[slice, ...]
    ) -> None:
        result = resize_and_pad(np.full((1, *given), 0.25, dtype=np.float32), size, spacing)
        expected = np.full((1, *size), -1.0, dtype=np.float32)
        expected[(0, *inner)] = 0.25
        np.testing.assert_allclose(result, expected, atol=1e-6)
        self.assertEqual(result.dtype, np.float32)

    def test_a_ball_stays_a_ball_in_anisotropic_voxels(self) -> None:
        path = temporary_folder(self) / "ball.nii"
        i, j, k = np.meshgrid(np.arange(32), np.arange(32), np.arange(8), indexing="ij")
        ball = ((i - 15.5) ** 2 + (j - 15.5) ** 2 + (4 * (k - 3.5)) ** 2 < 12**2).astype(np.uint8) * 255
        nibabel.save(nibabel.Nifti1Image(ball, affine_of(("L", "P", "S"), (0.5, 0.5, 2.0))), path)
        inside = ImagePreprocessing(3, 32)(path)[0].numpy() > 0
        extents = [np.ptp(np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))) + 1 for axis in range(3)]
        np.testing.assert_allclose(extents, 24, atol=3)


class TestImagePreprocessing(unittest.TestCase):
    @parameterized.expand([(np.uint8,), (np.uint16,)])
    def test_file_and_array_are_the_same(self, dtype: Any) -> None:
        path = temporary_folder(self) / "picture.png"
        array = pixels(12, 20, dtype=dtype)
        Image.fromarray(array).save(path)
        prepare = ImagePreprocessing(2, (16, 16))
        torch.testing.assert_close(prepare(path), prepare(array[None]), rtol=0, atol=0)
        torch.testing.assert_close(prepare(str(path)), prepare(path), rtol=0, atol=0)

    @parameterized.expand([(2, (10, 14), 1), (2, (10, 14), 3), (3, (6, 9, 7), 2)])
    def test_result(self, spatial_dims: int, given: tuple[int, ...], channels: int) -> None:
        result = ImagePreprocessing(spatial_dims, 8, channels)(pixels(channels, *given, dtype=np.uint16))
        self.assertEqual((result.shape, result.dtype), ((channels, *(8,) * spatial_dims), torch.float32))
        self.assertEqual(float(result.min()), -1.0)
        self.assertLessEqual(float(result.max()), 1.0)

    def test_8_bit_picture_of_the_right_size(self) -> None:
        array = pixels(1, 8, 8)
        expected = array.astype(np.float64) / 127.5 - 1
        np.testing.assert_allclose(ImagePreprocessing(2, 8)(array).numpy(), expected, atol=1e-6)

    def test_rebuilt_from_the_description(self) -> None:
        rule = {"kind": "window", "window": [-1000, 400]}
        description = {"spatial_dims": 3, "image_size": [8, 8, 8], "in_channels": 2, "intensity": rule, "more": 1}
        prepare = ImagePreprocessing.from_description(json.loads(json.dumps(description)))
        volume = pixels(2, 6, 7, 8, dtype=np.int16)
        expected = ImagePreprocessing(3, 8, 2, rule)(volume)
        torch.testing.assert_close(prepare(volume), expected, rtol=0, atol=0)

    @parameterized.expand(
        [
            (2, 1, (8, 8), r"needs \(1, rows, columns\), got shape \(8, 8\)"),
            (2, 1, (3, 8, 8), r"needs \(1, rows, columns\), got shape \(3, 8, 8\)"),
            (3, 2, (1, 8, 8, 8), r"needs \(2, depth, rows, columns\), got shape \(1, 8, 8, 8\)"),
            (3, 1, (1, 8, 8), r"needs \(1, depth, rows, columns\), got shape \(1, 8, 8\)"),
        ]
    )
    def test_wrong_arrays(self, spatial_dims: int, channels: int, shape: tuple[int, ...], message: str) -> None:
        with self.assertRaisesRegex(ValueError, message):
            ImagePreprocessing(spatial_dims, 8, channels)(pixels(*shape))


@unittest.skipUnless(DATA, NEEDS_DATA)
class TestRealFiles(unittest.TestCase):
    def test_jpeg_is_what_pil_shows(self) -> None:
        for path in sorted((ORIGINALS / "kermany_cxr_224").rglob("*.jp*g"))[:6]:
            stored = np.asarray(Image.open(path))
            read = read_image(path)
            np.testing.assert_array_equal(read, stored[None] if stored.ndim == 2 else stored.transpose(2, 0, 1))
            gray = read_image(path, in_channels=1)
            self.assertEqual(gray.shape, (1, *stored.shape[:2]))
            expected = np.asarray(Image.open(path).convert("L")).astype(int)
            np.testing.assert_allclose(gray[0].astype(int), expected, atol=1)

    def test_gray_jpegs_are_stored_in_colors(self) -> None:
        """If this fails, the test above has lost its point."""
        paths = (ORIGINALS / "kermany_cxr_224").rglob("*.jp*g")
        self.assertIn("RGB", {Image.open(path).mode for path in paths})

    def test_truncated_jpeg_is_named(self) -> None:
        path = sorted((ORIGINALS / "kermany_cxr_224").rglob("*.jp*g"))[0]
        cut = temporary_folder(self) / "cut.jpeg"
        cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with self.assertRaisesRegex(ValueError, "read_image: cannot use '.*cut.jpeg': .*truncated"):
            read_image(cut)

    @parameterized.expand([("ham10000_224", 1), ("fundus", 1)])
    def test_colored_pictures_are_not_gray(self, folder: str, channels: int) -> None:
        path = sorted((ORIGINALS / folder).rglob("*.jp*g"))[0]
        with self.assertRaisesRegex(ValueError, "colored"):
            read_image(path, in_channels=channels)

    def test_colored_markings_of_ultrasound_are_gray_enough(self) -> None:
        for path in sorted((ORIGINALS / "busi").glob("*/*.png"))[:6]:
            self.assertEqual(len(read_image(path, in_channels=1)), 1)

    @unittest.skipUnless(has_pydicom, "needs pydicom")
    def test_monochrome1_is_inverted(self) -> None:
        """The stored pixels of the two files are equal, and MONOCHROME1 says that low ones are bright."""
        paths = sorted((ORIGINALS / "dicom" / "cxr").glob("*.dcm"))
        interpretations = set()
        for path in paths:
            content = pydicom.dcmread(path, stop_before_pixels=True)
            interpretations.add(content.PhotometricInterpretation)
            self.assertEqual(read_image(path).shape, (1, content.Rows, content.Columns))
        self.assertEqual(interpretations, {"MONOCHROME1", "MONOCHROME2"})
        fake = ORIGINALS / "dicom" / "cxr" / "Fake_MONOHR1.dcm"
        (other,) = [path for path in paths if path != fake]
        np.testing.assert_array_equal(read_image(fake), 255 - read_image(other))

    @unittest.skipUnless(has_pydicom, "needs pydicom")
    @parameterized.expand([("brain_T1post_series",), ("hippocrop_series",)])
    def test_series_is_stacked_from_the_feet_to_the_head(self, name: str) -> None:
        slices = [pydicom.dcmread(path) for path in (ORIGINALS / "dicom" / name).glob("*.dcm")]
        slices.sort(key=lambda content: float(content.ImagePositionPatient[2]))
        expected = np.stack([content.pixel_array for content in slices])
        volume = read_image(ORIGINALS / "dicom" / name, 3)[0]
        np.testing.assert_array_equal(volume.astype(int), expected.astype(int))

    @unittest.skipUnless(has_pydicom, "needs pydicom")
    def test_file_without_a_suffix(self) -> None:
        path = ORIGINALS / "dicom" / "monai_CT_DICOM" / "7106"
        content = pydicom.dcmread(path)
        expected = content.pixel_array * float(content.RescaleSlope) + float(content.RescaleIntercept)
        np.testing.assert_array_equal(read_image(path)[0], expected)

    @unittest.skipUnless(has_nrrd, "needs pynrrd")
    @parameterized.expand([("brain1_image",), ("breast1_image",), ("prostate_phantom_subvolume",)])
    def test_nrrd(self, name: str) -> None:
        array, header = nrrd.read(str(ORIGINALS / "nrrd" / f"{name}.nrrd"))
        self.assertEqual(header["space"], "left-posterior-superior")
        affine = np.eye(4)
        affine[:3, :3] = np.diag([-1, -1, 1]) @ header["space directions"].T
        expected = axial(nibabel.Nifti1Image(array.astype(np.int32), affine))
        np.testing.assert_array_equal(read_image(ORIGINALS / "nrrd" / f"{name}.nrrd", 3)[0], expected)

    @parameterized.expand(
        [("nifti_monai/anatomical.nii",), ("nifti_monai/reoriented_anat_moved.nii",), ("lidc_nodules",)]
    )
    def test_nifti(self, name: str) -> None:
        path = ORIGINALS / name
        path = sorted((path / "image").iterdir())[0] if path.is_dir() else path
        np.testing.assert_array_equal(read_image(path, 3)[0], axial(nibabel.load(path)))
        self.assertEqual(ImagePreprocessing(3, 16)(path).shape, (1, 16, 16, 16))


if __name__ == "__main__":
    unittest.main()
