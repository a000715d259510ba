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

"""MedMNIST sets by name, downloaded once with their checksum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.apps import download_url

__all__ = ["MEDMNIST_MD5", "download_medmnist"]

_RECORD = "https://zenodo.org/records/10519652/files/{file}?download=1"
_CACHE = Path.home() / ".cache" / "monai_jointdiff"

# MD5 sums of the files of release 3 (Yang et al., Scientific Data 10:41, 2023), by name and size in pixels.
MEDMNIST_MD5: dict[str, dict[int, str]] = {
    "pathmnist": {
        28: "a8b06965200029087d5bd730944a56c1",
        64: "55aa9c1e0525abe5a6b9d8343a507616",
        128: "ac42d08fb904d92c244187169d1fd1d9",
        224: "2c51a510bcdc9cf8ddb2af93af1eadec",
    },
    "chestmnist": {
        28: "02c8a6516a18b556561a56cbdd36c4a8",
        64: "9de6cd0b934ebb5b7426cfba5efbae16",
        128: "db107e5590b27930b62dbaf558aebee3",
        224: "45bd33e6f06c3e8cdb481c74a89152aa",
    },
    "dermamnist": {
        28: "0744692d530f8e62ec473284d019b0c7",
        64: "b70a2f5635c6199aeaa28c31d7202e1f",
        128: "2defd784463fa5243564e855ed717de1",
        224: "8974907d8e169bef5f5b96bc506ae45d",
    },
    "octmnist": {
        28: "c68d92d5b585d8d81f7112f81e2d0842",
        64: "e229e9440236b774d9f0dfef9d07bdaf",
        128: "0a97e76651ace45c5d943ee3f65b63ae",
        224: "abc493b6d529d5de7569faaef2773ba3",
    },
    "pneumoniamnist": {
        28: "28209eda62fecd6e6a2d98b1501bb15f",
        64: "8f4eceb4ccffa70c672198ea285246c6",
        128: "05b46931834c231683c68f40c47b2971",
        224: "d6a3c71de1b945ea11211b03746c1fe1",
    },
    "retinamnist": {
        28: "bd4c0672f1bba3e3a89f0e4e876791e4",
        64: "afda852cc34dcda56f86ad2b2457dbcc",
        128: "e48e916a24454daf90583d4e6efb1a18",
        224: "eae7e3b6f3fcbda4ae613ebdcbe35348",
    },
    "breastmnist": {
        28: "750601b1f35ba3300ea97c75c52ff8f6",
        64: "742edef2a1fd1524b2efff4bd7ba9364",
        128: "363e4b3f8d712e9b5de15470a2aaadf1",
        224: "b56378a6eefa9fed602bb16d192d4c8b",
    },
    "bloodmnist": {
        28: "7053d0359d879ad8a5505303e11de1dc",
        64: "2b94928a2ae4916078ca51e05b6b800b",
        128: "adace1e0ed228fccda1f39692059dd4c",
        224: "b718ff6835fcbdb22ba9eacccd7b2601",
    },
    "tissuemnist": {
        28: "ebe78ee8b05294063de985d821c1c34b",
        64: "123ece2eba09d0aa5d698fda57103344",
        128: "61b955355d7425a89687b06cca3ce0c2",
        224: "b077128c4a949f0a4eb01517f9037b9c",
    },
    "organamnist": {
        28: "68e3f8846a6bd62f0c9bf841c0d9eacc",
        64: "2dcccc29b88e6da5a01161ef20cda288",
        128: "eeae80d0a227a8d099027e1b3cfd3b60",
        224: "50747347e05c87dd3aaf92c49f9f3170",
    },
    "organcmnist": {
        28: "b9ceb9546e10131b32923c5bbeaea2b1",
        64: "3ce34a8724ea6f548e6db4744d03b6a9",
        128: "773c1f009daa3fe5d9a2a201b2a7ed94",
        224: "050f5e875dc056f6768abf94ec9995d1",
    },
    "organsmnist": {
        28: "9ab87b696fb54e2a387ebe992d6ed5f1",
        64: "53a6d115339d874c25e309a994ff46d3",
        128: "ded0c5fa01a95dc4978b956f613e9b8e",
        224: "b354719e553fbbb2513d5533f52a4cb1",
    },
    "organmnist3d": {
        28: "a0c5a1ff56af4f155c46d46fbb45a2fe",
        64: "58a2205adf14a9d0a189cb06dc78bf10",
    },
    "nodulemnist3d": {
        28: "8755a7e9e05a4d9ce80a24c3e7a256f3",
        64: "c47c5b7d457bf6332200d2ea6d64ecd8",
    },
    "adrenalmnist3d": {
        28: "bbd3c5a5576322bc4cdfea780653b1ce",
        64: "17721accfe9fb005146a47d33bc54b2f",
    },
    "fracturemnist3d": {
        28: "6aa7b0143a6b42da40027a9dda61302f",
        64: "f01d7e6316aedf4210da0da5b7437b42",
    },
    "vesselmnist3d": {
        28: "b41fd4f7e7e2feedddb201585ecafa1b",
        64: "6bb274a8846e1097066dcd64e2c4520f",
    },
    "synapsemnist3d": {
        28: "1235b78a3cd6280881dd7850a78eadb6",
        64: "43bd14ebf3af9d3dd072446fedc14d5e",
    },
}


def download_medmnist(
    name: str, image_size: Any = None, folder: str | Path | None = None, *, spatial_dims: int | None = None
) -> Path:
    """The file of a MedMNIST set, downloaded unless it is there already.

    Args:
        name: for example `pneumoniamnist`; the size may be part of it: `pneumoniamnist_64`.
        image_size: 28, 64, 128 or 224 takes the file of that size; anything else takes 28, scaled later.
        folder: where to keep the file. None: a cache folder in the user's home.
        spatial_dims: of the images that are asked for, 2 or 3. None: those of the set.

    Returns:
        the `.npz`.

    Raises:
        ValueError: for an unknown name, a size in the name or a number of axes that the set does not have, or when the
            file cannot be downloaded or is not what it should be.
    """
    base, underscore, suffix = name.strip().lower().partition("_")
    if base not in MEDMNIST_MD5:
        raise ValueError(f"download_medmnist: there is no {name!r}; there are {', '.join(MEDMNIST_MD5)}.")
    sums = MEDMNIST_MD5[base]
    if underscore and suffix not in map(str, sums):
        raise ValueError(
            f"download_medmnist: there is no {name!r}; there are {base}, "
            f"{', '.join(f'{base}_{size}' for size in sums)}."
        )
    dims = 3 if base.endswith("3d") else 2
    if spatial_dims not in (None, dims):
        raise ValueError(
            f"download_medmnist: the images of {base} have {dims} axes, spatial_dims is {spatial_dims}; "
            f"right is --spatial_dims {dims}."
        )
    size = int(suffix) if underscore else _one_size(image_size)
    size = size if size in sums else 28
    file = f"{base}.npz" if size == 28 else f"{base}_{size}.npz"
    path = Path(folder or _CACHE) / file
    try:
        download_url(_RECORD.format(file=file), path, hash_val=sums[size], hash_type="md5", progress=True)
    except Exception as error:  # urllib, ssl and checksum errors alike: the user needs the way out
        raise ValueError(
            f"download_medmnist: cannot get {file} ({' '.join(str(error).split())}). Without a network, put the file "
            f"there yourself and name it: --dataset_dir PATH/{file}."
        ) from error
    return path


def _one_size(image_size: Any) -> int:
    sizes = set(image_size) if isinstance(image_size, Sequence) else {image_size}
    only = sizes.pop() if len(sizes) == 1 else None
    return only if isinstance(only, int) else 28
