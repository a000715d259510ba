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


"""Runs of a bundle as a user types them, with a network and data of seconds, in this process."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import unittest
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import monai.bundle
from monai.utils import set_determinism

from tests.bundles.default_model import BUNDLE
from tests.engines.small_run import use_one_thread

ROOT = BUNDLE.parents[1]
SMALL_NETWORK = {
    "channels": [8, 16, 16],
    "network_def#norm_num_groups": 8,
    "network_def#num_head_channels": 8,
}
TINY = {
    **SMALL_NETWORK,
    "image_size": 16,
    "batch_size": 8,
    "epochs": 2,
    "num_samples": 8,
    "num_inference_steps": 2,
    "picture_interval": 1,
    "counterfactual_pictures": 0,
    "progress": False,
}
PHANTOMS = {"source#phantom_counts": [24, 12, 12]}


def leave_no_trace() -> None:
    """For a test module's `setUpModule`: one thread, and MONAI's global seed and flags as they were."""
    use_one_thread()
    unittest.addModuleCleanup(set_determinism, None)


def temporary_folder(case: unittest.TestCase) -> Path:
    """A folder that lives as long as the test."""
    folder = tempfile.TemporaryDirectory()
    case.addCleanup(folder.cleanup)
    return Path(folder.name).resolve()


@contextlib.contextmanager
def working_directory(path: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def run(config_file: str | list[str], where: Path = ROOT, **options: Any) -> str:
    """`python -m monai.bundle run` in a folder; what it prints."""
    text = io.StringIO()
    with working_directory(where), contextlib.redirect_stdout(text), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monai.bundle.run(config_file=config_file, logging_file=False, **options)  # type: ignore[arg-type]
    return text.getvalue()


def train(
    directory: Path, where: Path = ROOT, config_file: str = "bundles/chest_xray/train.json", **options: Any
) -> str:
    """Train, with `models` and `output` in a folder."""
    folders = {"ckpt_dir": str(directory / "models"), "output_dir": str(directory / "output")}
    return run(config_file, where, **{**TINY, **folders, **options})


def use(program: str, model: Path, output: Path, bundle: str = "chest_xray", **options: Any) -> str:
    """Evaluate, infer or generate with the model in a folder."""
    folders = {"ckpt_dir": str(model / "models"), "output_dir": str(output)}
    return run(f"bundles/{bundle}/{program}.json", progress=False, **{**folders, **options})


def message_of(error: BaseException | None) -> str:
    """All messages of an error: MONAI wraps those of an expression."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)
