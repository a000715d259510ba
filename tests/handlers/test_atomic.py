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

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from monai_jointdiff.handlers import atomic_save, atomic_write_text, sweep_partial_files


def save_and_die(path: Path) -> None:
    """In another process: half a file is written, then the process is killed as by the system."""

    def half(obj, stream):
        stream.write(b"half a file")
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(torch, "save", half):
        atomic_save({"value": 2}, path)


class TestAtomic(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def test_round_trip(self):
        content = {"weights": torch.arange(6.0).reshape(2, 3), "names": ["a", "b"], "nothing": None}
        path = atomic_save(content, self.folder / "new" / "file.pt")
        read = torch.load(path, weights_only=True)
        torch.testing.assert_close(read["weights"], content["weights"])
        self.assertEqual((read["names"], read["nothing"]), (["a", "b"], None))
        self.assertEqual([p.name for p in path.parent.iterdir()], ["file.pt"])

    def test_bytes_depend_on_the_content_alone(self):
        content = {"weights": torch.arange(6.0)}
        first, second = (atomic_save(content, self.folder / name) for name in ("a.pt", "another_name.pt"))
        self.assertEqual(first.read_bytes(), second.read_bytes())

    def test_text(self):
        path = atomic_write_text(self.folder / "note.txt", "Größe\n")
        self.assertEqual(path.read_bytes(), "Größe\n".encode())

    def test_failed_write_leaves_the_former_file(self):
        path = atomic_save({"value": 1}, self.folder / "file.pt")

        def half(obj, stream):
            stream.write(b"half a file")
            raise OSError("no space left on device")

        with mock.patch.object(torch, "save", half), self.assertRaisesRegex(OSError, "no space"):
            atomic_save({"value": 2}, path)
        self.assertEqual(torch.load(path, weights_only=True), {"value": 1})
        self.assertEqual(self.names(), ["file.pt"])

    @unittest.skipUnless("fork" in multiprocessing.get_all_start_methods(), "needs os.fork")
    def test_killed_process_leaves_the_former_file(self):
        path = atomic_save({"value": 1}, self.folder / "file.pt")
        process = multiprocessing.get_context("fork").Process(target=save_and_die, args=(path,))
        process.start()
        process.join()
        self.assertEqual(process.exitcode, -signal.SIGKILL)
        self.assertEqual(torch.load(path, weights_only=True), {"value": 1})
        partial = f".file.pt.{process.pid}.partial"
        self.assertEqual(self.names(), [partial, "file.pt"])
        self.assertEqual([p.name for p in sweep_partial_files(self.folder)], [partial])
        self.assertEqual(self.names(), ["file.pt"])

    def test_sweep_spares_everything_else(self):
        spared = ["model.pt", ".hidden", "x.partial", ".x.partial", "checkpoint_00000001.pt"]
        for name in spared:
            (self.folder / name).touch()
        self.assertEqual(sweep_partial_files(self.folder), [])
        self.assertEqual(self.names(), sorted(spared))
        self.assertEqual(sweep_partial_files(self.folder / "missing"), [])


if __name__ == "__main__":
    unittest.main()
