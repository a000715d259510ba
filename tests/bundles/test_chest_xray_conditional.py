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


"""Training with `train_conditional.json`, and `diffusion_classify.json`, from end to end through `monai.bundle`."""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import tempfile
import unittest
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import ignite.distributed as idist
import monai.bundle
import numpy as np
import torch
from parameterized import parameterized

from monai_jointdiff.data import draw_seed, read_image
from monai_jointdiff.engines import ModelDescription, load_weights, preprocessing_of_model, source_of_model
from monai_jointdiff.inferers import DenoisingProfile, DiffusionClassifierInferer, Typicality
from monai_jointdiff.losses import favero_weight
from monai_jointdiff.visualize import save_png
from tests.bundles.default_model import BUNDLE
from tests.bundles.runs import PHANTOMS, ROOT, TINY, leave_no_trace, message_of, train, use, working_directory

OVERLAY = ["bundles/chest_xray/train.json", "bundles/chest_xray/train_conditional.json"]
FILES = {"diffusion_predictions.csv", "summary.json", "risk_coverage.png", "accuracy_against_calls.png"}
FEW = {"num_draws": 7, "precision": "fp32"}

TEMPORARY = Path()
TRAINED = Path()  # one epoch of three iterations on phantoms


def setUpModule() -> None:
    global TEMPORARY, TRAINED
    leave_no_trace()
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    TEMPORARY = Path(folder.name).resolve()
    TRAINED = TEMPORARY / "trained"
    train(TRAINED, config_file=OVERLAY, **PHANTOMS, epochs=1, num_samples=0)


def fresh(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=name + "_", dir=TEMPORARY))


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(output: Path) -> list[dict[str, str]]:
    with open(output / "diffusion_predictions.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def model_of(folder: Path) -> ModelDescription:
    return ModelDescription.load(folder / "models" / "model.json")


def decide(output: Path, model: Path | None = None, **options: Any) -> str:
    return use("diffusion_classify", TRAINED if model is None else model, output, **{**FEW, **options})


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(np.random.default_rng(seed).integers(0, 256, (16, 16)).astype(np.uint8), path)


class TestTraining(unittest.TestCase):
    def test_description_holds_the_noise_process_as_plain_numbers(self) -> None:
        described = content(TRAINED / "models" / "model.json")
        expected = {"num_train_timesteps": 1000, "noise_d": 64, "image_d": 16, "prediction_type": "v_prediction"}
        self.assertEqual(described["scheduler"], {**expected, "schedule": "shifted_logsnr"})
        self.assertIs(described["network"]["class_conditional"], True)

    def test_class_embedding_learned_and_is_in_the_average(self) -> None:
        (file,) = (TRAINED / "models").glob("checkpoint_*.pt")
        checkpoint = torch.load(file, weights_only=True)
        rows = {part: checkpoint[part]["class_embedding.weight"] for part in ("network", "ema")}
        self.assertEqual(rows["ema"].shape[0], 4)  # three classes and the null class
        self.assertFalse(torch.equal(rows["network"], rows["ema"]))
        torch.testing.assert_close(
            load_weights(TRAINED / "models" / "model.pt")["class_embedding.weight"], rows["ema"], rtol=0, atol=0
        )

    def test_options_reach_the_parts_and_may_be_changed(self) -> None:
        def parts(**options: Any) -> tuple[Any, Any]:
            folders = {"ckpt_dir": str(TEMPORARY), "output_dir": str(TEMPORARY)}
            with working_directory(ROOT), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parser = monai.bundle.ConfigParser()
                parser.read_config([str(ROOT / file) for file in OVERLAY])
                parser.update({**TINY, **PHANTOMS, **folders, **options})
                return tuple(parser.get_parsed_content(f"{kind}#prepare_batch") for kind in ("train", "validate"))

        training, validation = parts()
        for prepare, dropout in ((training, 0.15), (validation, 0.0)):
            self.assertTrue(prepare.class_conditional)
            self.assertEqual((prepare.label_dropout, prepare.num_classes), (dropout, 3))
            timesteps = torch.arange(0, 1000, 100)
            expected = favero_weight(prepare.scheduler.snr(timesteps), "v_prediction")
            torch.testing.assert_close(prepare._weight(timesteps), expected)
        training, validation = parts(weighting="min_snr", label_dropout=0.3, class_conditional="false")
        self.assertEqual((training.weighting, validation.weighting), ("min_snr", "min_snr"))
        self.assertEqual((training.label_dropout, training.class_conditional), (0.3, False))
        authors, _ = parts(**{"noise_process#image_d": 256})
        # log-SNR of the authors at t = .5 is -2.77
        self.assertAlmostEqual(float(authors.scheduler.snr(torch.tensor(500)).log()), -2.77, places=1)

    def test_images_of_a_class(self) -> None:
        images = []
        for name in ("normal", "effusion"):
            folder = fresh("generate")
            use("generate", TRAINED, folder, num_samples=1, num_inference_steps=2, class_label=name, guidance_scale=2)
            images.append(read_image(folder / "sample_00000.png"))
        self.assertTrue((images[0] != images[1]).any())

    @unittest.skipUnless(torch.distributed.is_available(), "needs torch.distributed")
    def test_with_several_processes_overlay(self) -> None:
        folder = fresh("process")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.addCleanup(idist.sync)  # or Ignite goes on asking for a process group
        one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        files = [*OVERLAY, "bundles/chest_xray/multi_gpu_train.json"]
        with mock.patch.dict(os.environ, one):
            train(folder, config_file=files, **PHANTOMS, epochs=1, num_samples=0, precision="fp32")
        self.assertEqual(model_of(folder).network, model_of(TRAINED).network)
        found, expected = (load_weights(f / "models" / "model.pt") for f in (folder, TRAINED))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


class TestDiffusionClassify(unittest.TestCase):
    def test_answers_are_those_of_the_inferer(self) -> None:
        output = fresh("output")
        printed = decide(output, error_rate="null", batch_size=5, head="nominate", trust=0.7)
        self.assertEqual({path.name for path in output.iterdir()}, FILES)
        self.assertIn("abstention is chosen on the validation part of phantoms of seed 0 (12 images)", printed)
        description = model_of(TRAINED)
        network = description.build_network()
        network.load_state_dict(load_weights(TRAINED / "models" / "model.pt"))
        items = source_of_model(description, None).part("test")
        prepared = [preprocessing_of_model(description)(item) for item in items]
        seeds = [draw_seed(0, 0, f"diffusion/{item['name']}") for item in items]
        inferer = DiffusionClassifierInferer(
            description.build_scheduler("ddim"),
            num_draws=7,
            head="nominate",
            trust=0.7,
            head_temperature=description.decision.temperature,
        )
        result = inferer(torch.stack([item["image"] for item in prepared]), network, seed=seeds)
        found = rows(output)
        names = description.class_names
        self.assertEqual([row["image"] for row in found], [item["name"] for item in items])
        self.assertEqual([row["label"] for row in found], [names[int(item["label"])] for item in items])
        self.assertEqual([row["prediction"] for row in found], [names[int(k)] for k in result.prediction])
        for column, values in (("votes", result.votes), ("probability", result.probabilities)):
            table = [[float(row[f"{column}_{name}"]) for name in names] for row in found]
            np.testing.assert_allclose(table, values, atol=1e-6)
        head = [[float(row[f"head_{name}"]) for name in names] for row in found]
        assert result.head_probabilities is not None
        np.testing.assert_allclose(head, result.head_probabilities, atol=1e-5)
        for column in ("vote_share", "uncertainty", "entropy", "network_calls"):
            table = [float(row[column] or "nan") for row in found]  # empty where the head answered alone
            np.testing.assert_allclose(table, getattr(result, column), atol=1e-5, err_msg=column)
        said = description.decision.classes(np.asarray(result.head_probabilities))
        self.assertEqual([row["head_prediction"] for row in found], [names[k] for k in said])
        self.assertFalse([key for key in found[0] if key.startswith(("calibrated", "unusual"))])  # 12 images are few
        self.assertEqual([int(row["draws"]) for row in found], result.num_draws.tolist())
        summary = content(output / "summary.json")
        right = [row["prediction"] == row["label"] for row in found]
        self.assertAlmostEqual(summary["selective"]["accuracy_at_coverage"][0]["value"], float(np.mean(right)))
        answered = [correct for row, correct in zip(found, right, strict=True) if row["abstain"] == "False"]
        self.assertAlmostEqual(summary["accuracy_of_answered"], float(np.mean(answered)))
        self.assertAlmostEqual(summary["network_calls"]["mean"], float(result.network_calls.mean()), places=4)
        self.assertEqual(summary["accuracy_of_first_draws"][-1]["draws"], 7)
        self.assertAlmostEqual(summary["accuracy_of_first_draws"][-1]["value"], float(np.mean(right)))
        for path in (output / "summary.json", output / "diffusion_predictions.csv"):
            self.assertNotIn(str(TEMPORARY), path.read_text(encoding="utf-8"))

    def test_calibrated_unusual_and_stages(self) -> None:
        folder, output = fresh("many"), fresh("output")
        counts = {"source#phantom_counts": [8, 24, 6]}
        train(folder, config_file=OVERLAY, **{**PHANTOMS, **counts}, batch_size=4, epochs=1, num_samples=0)
        staged = {"rule": "mean", "stages": [[3, 2]], "error_rate": "null"}
        printed = decide(output, folder, **staged)
        description = model_of(folder)
        network = description.build_network()
        network.load_state_dict(load_weights(folder / "models" / "model.pt"))
        source, prepare = source_of_model(description, None), preprocessing_of_model(description)
        val, test = (torch.stack([prepare(item)["image"] for item in source.part(part)]) for part in ("val", "test"))
        profile = DenoisingProfile(description.build_scheduler("ddim"), 5)
        known, new = profile(val, network), profile(test, network)
        scores, limit = Typicality.fit(known).score(new), Typicality.held_out_threshold(known, 0.95)
        found, summary = rows(output), content(output / "summary.json")
        np.testing.assert_allclose([float(row["unusual_score"]) for row in found], scores, rtol=1e-3)
        self.assertEqual([row["unusual"] for row in found], [str(bool(score > limit)) for score in scores])
        self.assertEqual(summary["unusual"]["draws"], 5)
        self.assertAlmostEqual(summary["unusual"]["threshold"], limit, places=3)
        names = description.class_names
        calibrated = np.array([[float(row[f"calibrated_{name}"]) for name in names] for row in found])
        np.testing.assert_allclose(calibrated.sum(axis=1), 1, atol=1e-5)
        answers = [names.index(row["prediction"]) for row in found]
        self.assertEqual(calibrated.argmax(axis=1).tolist(), answers)
        self.assertLess(float(calibrated.max(axis=1).mean()), 1.0)
        self.assertGreater(summary["calibrated"]["temperature"], 0)
        for figures in (summary, summary["calibrated"]):
            self.assertEqual([name for name in ("ece", "brier") if figures[name]["value"] is None], [])
        self.assertEqual(summary["settings"]["stages"], [[3, 2]])
        self.assertEqual({row["network_calls"] for row in found}, {str(3 * 3 + 4 * 2)})
        for words in ("calibrated with temperature", "unusual above a score", "brier, calibrated"):
            self.assertIn(words, printed)
        decide(output, folder, typicality_draws=0, limit=2)
        self.assertNotIn("unusual", rows(output)[0])
        self.assertNotIn("unusual", content(output / "summary.json"))

    def test_folder_with_a_reference_and_maps(self) -> None:
        folder, output = fresh("folder"), fresh("output")
        for number in range(4):
            picture(folder / "new" / "ward" / f"{number}.png", number)
            picture(folder / "reference" / f"{number}.png", 10 + number)
        options = {"dataset_dir": str(folder / "new"), "rule": "mean", "min_draws": 2, "batch_size": 3}
        printed = decide(output, **options, reference_dir=str(folder / "reference"), maps="true", map_limit=3)
        self.assertIn("abstention is chosen on reference (4 images)", printed)
        self.assertIn("abstains where the entropy is above", printed)
        found = rows(output)
        self.assertEqual([row["image"] for row in found], [f"ward/{number}.png" for number in range(4)])
        self.assertNotIn("label", found[0])
        names = [f"000{number}_ward_{number}_png.png" for number in range(3)]
        self.assertEqual(sorted(path.name for path in (output / "maps").iterdir()), names)
        self.assertEqual({path.name for path in output.iterdir()}, {*FILES, "maps"} - {n for n in FILES if "png" in n})
        alone = fresh("output")
        printed = decide(alone, **options, limit=2)
        self.assertIn("abstention is chosen on the images themselves", printed)
        stable = ("image", "prediction", "draws", "entropy")
        self.assertEqual(
            [[row[key] for key in stable[:3]] for row in rows(alone)],
            [[found[k][key] for key in stable[:3]] for k in (0, 3)],
        )

    def test_several_labels(self) -> None:
        folder, output = fresh("multi"), fresh("output")
        with open(folder / "labels.csv", "w", encoding="utf-8") as stream:
            stream.write("file,label\n")
            for n in range(30):
                picture(folder / f"{n:02d}.png", n)
                stream.write(f"{n:02d}.png,{('a', 'b', 'a|b', 'no finding', '')[n % 5]}\n")
        train(folder, config_file=OVERLAY, dataset_dir=str(folder), epochs=1, batch_size=4, num_samples=0)
        described = model_of(folder)
        self.assertTrue(described.multi_label and described.class_conditional)
        decide(output, folder, dataset_dir=str(folder), maps=True)
        self.assertEqual({path.name for path in output.iterdir()}, {*FILES, "maps"})
        found = rows(output)
        test = source_of_model(described, str(folder)).part("test")
        self.assertEqual([row["image"] for row in found], [item["name"] for item in test])
        for row in found:
            present = [name for name in ("a", "b") if 2 * int(row[f"votes_{name}"]) > int(row[f"draws_{name}"])]
            self.assertEqual(row["prediction"], "|".join(present) or "no finding")
        known = [(row, item["label"]) for row, item in zip(found, test, strict=True) if item["label"][0] >= 0]
        right = [
            (name in row["prediction"].split("|")) == (label[k] == 1)
            for row, label in known
            for k, name in enumerate(("a", "b"))
        ]
        accuracy = content(output / "summary.json")["selective"]["accuracy_at_coverage"][0]["value"]
        self.assertAlmostEqual(accuracy, float(np.mean(right)))

    def test_volumes(self) -> None:
        folder, output = fresh("volumes"), fresh("output")
        counts = {"source#phantom_counts": [8, 4, 4]}
        train(folder, config_file=OVERLAY, **counts, spatial_dims=3, batch_size=4, epochs=1, num_samples=0)
        self.assertEqual(model_of(folder).scheduler["image_d"], 16)
        decide(output, folder, num_draws=3, limit=2, reference_limit=1, maps=True)
        self.assertEqual(len(rows(output)), 2)
        self.assertEqual(len(list((output / "maps").iterdir())), 2)

    def test_untrained_is_refused_unless_allowed(self) -> None:
        empty, output = fresh("none"), fresh("output")
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            decide(output, empty)
        self.assertIn("Train first (train.json and train_conditional.json of", message_of(caught.exception))
        self.assertEqual(list(output.iterdir()), [])
        printed = decide(output, empty, allow_untrained="true", limit=2, reference_limit=1, num_draws=1)
        self.assertIn("UNTRAINED", printed)
        self.assertEqual(len(rows(output)), 2)

    @parameterized.expand(
        [
            ({"rule": "magic"}, "rule must be one of"),
            ({"head": "magic"}, "head must be one of"),
            ({"draws": "magic"}, "draws must be one of"),
            ({"error_rate": 2}, "error_rate must lie in (0, 1)"),
            ({"stages": [[9, 2]]}, "stages must be pairs (draws, classes to keep)"),
            ({"typicality_draws": -1}, "needs num_draws and max_batch of at least 1"),
            ({"coverage": 0}, "coverage must lie in (0, 1]"),
            ({"limit": 0}, "--limit must be a whole number"),
            ({"reference_limit": 0}, "--reference_limit must be a whole number"),
            ({"map_limit": 0, "maps": True}, "at least 1 image to draw"),
            ({"part": "tset"}, "'tset' is no part"),
            ({"reference_dir": "/nowhere"}, "there is no /nowhere"),
        ]
    )
    def test_wrong_options_are_refused(self, options: dict[str, Any], message: str) -> None:
        output = fresh("refused")
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            decide(output, **{"limit": 1, **options})
        self.assertIn(message, message_of(caught.exception))
        self.assertEqual(list(output.iterdir()), [])

    def test_unconditional_model_is_refused_with_the_remedy(self) -> None:
        folder = fresh("unconditional")
        description = model_of(TRAINED)
        (folder / "models").mkdir()
        plain = ModelDescription({**description.network, "class_conditional": False}, {}, description.data)
        plain.save(folder / "models" / "model.json")
        torch.save(plain.build_network().state_dict(), folder / "models" / "model.pt")
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            decide(fresh("output"), folder)
        message = message_of(caught.exception)
        self.assertIn("is not class-conditional", message)
        self.assertIn("train.json and train_conditional.json of this bundle, together", message)

    @parameterized.expand(["nominate", "prior"])
    def test_head_that_learned_nothing_is_not_asked(self, head: str) -> None:
        folder = fresh("denoiser")
        shutil.copytree(TRAINED / "models", folder / "models")
        replace(model_of(TRAINED), task="denoise").save(folder / "models" / "model.json")
        decide(fresh("output"), folder, limit=1)
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            decide(fresh("output"), folder, limit=1, head=head)
        self.assertIn("learned to classify, too", message_of(caught.exception))


class TestFormat(unittest.TestCase):
    def test_documented_options_are_those_of_the_program(self) -> None:
        readme = (BUNDLE / "docs" / "README.md").read_text(encoding="utf-8")
        table = readme.split("## Classify by the denoiser")[1].split("\n## ")[0]
        known = monai.bundle.ConfigParser.load_config_file(BUNDLE / "configs" / "diffusion_classify.json")
        cells = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `--")]
        named = {part.strip(" `-") for first, _ in cells for part in first.split(",")}
        made = {"imports", "bundle_root", "description", "network_def", "network", "space", "preprocessing", "images"}
        made |= {"scheduler", "handlers", "initialize", "run"}
        options = {key for key, value in known.items() if not isinstance(value, dict)} - made
        self.assertEqual(named, options)


if __name__ == "__main__":
    unittest.main()
