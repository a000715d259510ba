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


"""MedMNIST sets by name; without a network."""

from __future__ import annotations

import hashlib
import unittest
from typing import Any
from unittest import mock

from parameterized import parameterized

from monai_jointdiff.data import medmnist
from monai_jointdiff.data.medmnist import MEDMNIST_MD5, download_medmnist
from tests.bundles.runs import temporary_folder


class TestDownload(unittest.TestCase):
    @parameterized.expand(
        [
            ("pneumoniamnist", None, "pneumoniamnist.npz", 28),
            (" PneumoniaMNIST ", 64, "pneumoniamnist_64.npz", 64),
            ("pneumoniamnist_64", None, "pneumoniamnist_64.npz", 64),
            ("pneumoniamnist", (224, 224), "pneumoniamnist_224.npz", 224),
            ("pneumoniamnist", (64, 32), "pneumoniamnist.npz", 28),
            ("pneumoniamnist", 100, "pneumoniamnist.npz", 28),
            ("organmnist3d", 64, "organmnist3d_64.npz", 64),
            ("organmnist3d", 224, "organmnist3d.npz", 28),
            ("organmnist3d_28", 64, "organmnist3d.npz", 28),
        ]
    )
    def test_asks_for_file_of_the_size_with_checksum(self, name: str, size: Any, file: str, pixels: int) -> None:
        folder = temporary_folder(self)
        with mock.patch.object(medmnist, "download_url") as download:
            path = download_medmnist(name, size, folder)
        self.assertEqual(path, folder / file)
        (url, target), options = download.call_args
        self.assertIn(f"/{file}?", url)
        self.assertEqual(target, path)
        base = name.strip().lower().partition("_")[0]
        self.assertEqual((options["hash_val"], options["hash_type"]), (MEDMNIST_MD5[base][pixels], "md5"))

    def test_right_file_is_not_downloaded_again_and_a_wrong_one_is_refused(self) -> None:
        folder = temporary_folder(self)
        (folder / "breastmnist.npz").write_bytes(b"content")
        with self.assertRaisesRegex(ValueError, "cannot get breastmnist.npz .*--dataset_dir PATH/breastmnist.npz"):
            download_medmnist("breastmnist", None, folder)
        right = hashlib.md5(b"content").hexdigest()
        with mock.patch.dict(MEDMNIST_MD5, {"breastmnist": {28: right}}):
            self.assertEqual(download_medmnist("breastmnist", None, folder).read_bytes(), b"content")

    def test_without_a_network_says_what_to_do(self) -> None:
        with mock.patch.object(medmnist, "download_url", side_effect=OSError("no\n route")):
            with self.assertRaisesRegex(ValueError, r"cannot get pathmnist.npz \(no route\).*put the file there"):
                download_medmnist("pathmnist")

    @parameterized.expand(["mnist", "", "pneumonia"])
    def test_unknown_names_are_refused(self, name: str) -> None:
        with self.assertRaisesRegex(ValueError, f"there is no '{name}'; there are pathmnist, "):
            download_medmnist(name)

    @parameterized.expand(["pneumoniamnist_256", "pneumoniamnist_foo", "pneumoniamnist_", "organmnist3d_224"])
    def test_sizes_that_there_are_not_are_refused(self, name: str) -> None:
        base = name.partition("_")[0]
        with mock.patch.object(medmnist, "download_url") as download:
            with self.assertRaisesRegex(ValueError, f"there is no '{name}'; there are {base}, {base}_28, {base}_64"):
                download_medmnist(name)
        download.assert_not_called()

    @parameterized.expand([("organmnist3d", 2, 3), ("pathmnist_64", 3, 2)])
    def test_volumes_are_no_images(self, name: str, wrong: int, right: int) -> None:
        folder = temporary_folder(self)
        with mock.patch.object(medmnist, "download_url") as download:
            with self.assertRaisesRegex(ValueError, f"have {right} axes, .*right is --spatial_dims {right}"):
                download_medmnist(name, folder=folder, spatial_dims=wrong)
            download.assert_not_called()
            download_medmnist(name, folder=folder, spatial_dims=right)
        download.assert_called_once()

    def test_checksums_are_whole_and_all_different(self) -> None:
        sums = [value for sizes in MEDMNIST_MD5.values() for value in sizes.values()]
        self.assertEqual(len(MEDMNIST_MD5), 18)
        self.assertEqual(len(sums), 12 * 4 + 6 * 2)
        self.assertEqual(len(set(sums)), len(sums))
        self.assertTrue(all(len(value) == 32 and int(value, 16) >= 0 for value in sums))


if __name__ == "__main__":
    unittest.main()
