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

import hashlib
import unittest

import torch
from monai.data import MetaTensor
from parameterized import parameterized
from scipy import stats

from monai_jointdiff.engines.prepare_batch import JointPrepareBatch, ValidationPrepareBatch
from monai_jointdiff.losses import favero_weight, min_snr_weight
from monai_jointdiff.schedulers import make_scheduler
from tests.engines.small_run import use_one_thread

LABELS = [0, 2, -1, 1]


def setUpModule() -> None:
    use_one_thread()


def scheduler(prediction_type: str = "epsilon"):
    return make_scheduler("ddim", prediction_type=prediction_type)


def batch(draws=(8, 9, 10, 11), spatial_dims: int = 2, multi_label: bool = False) -> dict:
    generator = torch.Generator().manual_seed(0)
    size = (len(draws), 2, *(4 + d for d in range(spatial_dims)))
    label = torch.tensor([LABELS[n % 4] for n in range(len(draws))])
    if multi_label:
        label = torch.tensor([[1.0, 0.0, -1.0]]).repeat(len(draws), 1)
    return {
        "image": MetaTensor(torch.rand(size, generator=generator) * 2 - 1),
        "image_cls": torch.rand(size, generator=generator) * 2 - 1,
        "label": label,
        "draw": torch.tensor(draws),
        "name": [f"{draw}.png" for draw in draws],
    }


class TestJointPrepareBatch(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_parts(self, spatial_dims):
        data = batch(spatial_dims=spatial_dims)
        image, targets, args, keywords = JointPrepareBatch(scheduler(), seed=0)(data, "cpu")
        self.assertEqual((args, set(targets)), ((), {"label", "target", "weight"}))
        self.assertEqual(set(keywords), {"noise", "timesteps", "clean"})
        torch.testing.assert_close(image, data["image"].as_tensor())
        torch.testing.assert_close(keywords["clean"], data["image_cls"])
        self.assertIs(type(image), torch.Tensor)  # a MetaTensor costs half as much again in the network
        self.assertEqual(targets["label"].tolist(), LABELS)
        self.assertEqual(keywords["noise"].shape, image.shape)
        self.assertEqual((keywords["timesteps"].dtype, keywords["timesteps"].shape), (torch.int64, (4,)))
        self.assertEqual(targets["weight"].tolist(), [1.0] * 4)

    @parameterized.expand(["epsilon", "sample", "v_prediction"])
    def test_target_and_min_snr(self, prediction_type):
        process = scheduler(prediction_type)
        image, targets, _, keywords = JointPrepareBatch(process, 0, weighting="min_snr", gamma=3.0)(batch(), "cpu")
        alpha_bar = process.alphas_cumprod[keywords["timesteps"]].double()
        alpha, sigma = (x.sqrt().reshape(4, 1, 1, 1).float() for x in (alpha_bar, 1 - alpha_bar))
        noise = keywords["noise"]
        expected = {"epsilon": noise, "sample": image, "v_prediction": alpha * noise - sigma * image}[prediction_type]
        torch.testing.assert_close(targets["target"], expected)
        weight = min_snr_weight(alpha_bar / (1 - alpha_bar), prediction_type, 3.0).float()
        torch.testing.assert_close(targets["weight"], weight)

    @parameterized.expand([(JointPrepareBatch,), (ValidationPrepareBatch,)])
    def test_weighting_of_favero(self, kind):
        process = scheduler("v_prediction")
        _, targets, _, keywords = kind(process, 0, weighting="favero", gamma=3.0)(batch(), "cpu")
        weight = favero_weight(process.snr(keywords["timesteps"]), "v_prediction", 3.0)
        torch.testing.assert_close(targets["weight"], weight.float())

    def test_functions_of_the_draw(self):
        prepare = JointPrepareBatch(scheduler(), seed=3, class_conditional=True, num_classes=3, label_dropout=0.5)
        whole, half = prepare(batch(range(16)), "cpu"), prepare(batch(range(8, 12)), "cpu")
        for key in ("noise", "timesteps", "class_labels"):
            torch.testing.assert_close(whole.kwargs[key][8:12], half.kwargs[key], rtol=0, atol=0)
        torch.manual_seed(77)  # the global generator has no part in it, and is left alone
        state = torch.get_rng_state()
        again = prepare(batch(range(8, 12)), "cpu")
        torch.testing.assert_close(again.kwargs["noise"], half.kwargs["noise"], rtol=0, atol=0)
        self.assertTrue(torch.equal(state, torch.get_rng_state()))
        other = JointPrepareBatch(scheduler(), seed=4)(batch(range(8, 12)), "cpu")
        self.assertFalse(torch.equal(other.kwargs["timesteps"], half.kwargs["timesteps"]))

    def test_distributions(self):
        prepare = JointPrepareBatch(scheduler(), seed=0, class_conditional=True, num_classes=3, label_dropout=0.25)
        data = batch(range(4000))
        _, _, _, keywords = prepare(data, "cpu")
        self.assertGreater(stats.kstest(keywords["noise"].flatten()[::7].numpy(), "norm").pvalue, 1e-3)
        timesteps = keywords["timesteps"].numpy()
        self.assertGreater(stats.kstest(timesteps, stats.randint(0, 1000).cdf).pvalue, 1e-3)
        self.assertGreaterEqual(timesteps.min(), 0)
        self.assertLess(timesteps.max(), 1000)
        labelled = data["label"] >= 0
        hidden = keywords["class_labels"][labelled] == 3
        self.assertGreater(stats.binomtest(int(hidden.sum()), int(labelled.sum()), 0.25).pvalue, 1e-3)
        neighbours = keywords["noise"][:-1].flatten() @ keywords["noise"][1:].flatten()
        self.assertLess(abs(float(neighbours)) / keywords["noise"][1:].numel() ** 0.5, 4)  # standard deviations

    def test_class_condition(self):
        def labels(dropout: float, **options):
            prepare = JointPrepareBatch(scheduler(), 0, class_conditional=True, label_dropout=dropout, **options)
            return prepare(batch(multi_label=not options), "cpu").kwargs["class_labels"].tolist()

        self.assertEqual(labels(0.0, num_classes=3), [0, 2, 3, 1])  # unlabelled: the null class
        self.assertEqual(labels(1.0, num_classes=3), [3, 3, 3, 3])
        self.assertEqual(labels(0.0), [[1, 0, -1]] * 4)
        self.assertEqual(labels(1.0), [[-1, -1, -1]] * 4)  # multi-label: a row of -1
        self.assertNotIn("class_labels", JointPrepareBatch(scheduler(), 0)(batch(), "cpu").kwargs)

    def test_single_tasks(self):
        joint = JointPrepareBatch(scheduler(), 0)(batch(), "cpu")
        denoise = JointPrepareBatch(scheduler(), 0, task="denoise")({**batch(), "label": None}, "cpu")
        self.assertEqual((set(denoise.targets), set(denoise.kwargs)), ({"target", "weight"}, {"noise", "timesteps"}))
        for key in denoise.kwargs:  # the same noise as in the joint training
            torch.testing.assert_close(denoise.kwargs[key], joint.kwargs[key], rtol=0, atol=0)
        classify = JointPrepareBatch(scheduler(), 0, task="classify")(batch(), "cpu")
        self.assertEqual((set(classify.targets), classify.kwargs), ({"label"}, {}))
        torch.testing.assert_close(classify.inputs, joint.kwargs["clean"])

    def test_precision_of_the_images(self):
        single = JointPrepareBatch(scheduler("v_prediction"), 0)(batch(), "cpu")
        double = JointPrepareBatch(scheduler("v_prediction"), 0)(batch(), "cpu", dtype=torch.float64)
        for tensor in (double.inputs, double.targets["target"], double.targets["weight"], double.kwargs["clean"]):
            self.assertEqual(tensor.dtype, torch.float64)
        self.assertEqual((double.targets["label"].dtype, double.kwargs["timesteps"].dtype), (torch.int64, torch.int64))
        torch.testing.assert_close(double.kwargs["noise"].float(), single.kwargs["noise"], rtol=0, atol=0)

    @parameterized.expand(
        [
            ({"weighting": "snr"}, "weighting must be one of .* got 'snr'"),
            ({"task": "sample"}, "task must be one of .* got 'sample'"),
            ({"label_dropout": 1.5}, r"label_dropout must be in \[0, 1\], got 1.5"),
        ]
    )
    def test_wrong_options(self, options, message):
        with self.assertRaisesRegex(ValueError, f"JointPrepareBatch: {message}"):
            JointPrepareBatch(scheduler(), 0, **options)

    @parameterized.expand(["image", "image_cls", "label", "draw"])
    def test_missing_key(self, key):
        data = batch()
        del data[key]
        with self.assertRaisesRegex(ValueError, f"the batch has no '{key}', it has"):
            JointPrepareBatch(scheduler(), 0)(data, "cpu")

    def test_missing_number_of_classes(self):
        with self.assertRaisesRegex(ValueError, "needs num_classes"):
            JointPrepareBatch(scheduler(), 0, class_conditional=True)(batch(), "cpu")


class TestValidationPrepareBatch(unittest.TestCase):
    def test_functions_of_the_name(self):
        prepare = ValidationPrepareBatch(scheduler(), seed=0)
        first, again = prepare(batch(), "cpu"), prepare(batch(), "cpu")
        torch.testing.assert_close(first.kwargs["noise"], again.kwargs["noise"], rtol=0, atol=0)
        torch.testing.assert_close(first.inputs, first.kwargs["clean"])
        data = batch()
        del data["draw"], data["image_cls"]
        order = [2, 0, 3, 1]  # of the images in another batch
        shuffled = prepare({**data, "name": [data["name"][n] for n in order]}, "cpu")
        for key in ("noise", "timesteps"):
            torch.testing.assert_close(shuffled.kwargs[key], first.kwargs[key][order], rtol=0, atol=0)
        other = ValidationPrepareBatch(scheduler(), seed=1)(data, "cpu")
        self.assertFalse(torch.equal(other.kwargs["timesteps"], first.kwargs["timesteps"]))

    def test_hash_of_the_name(self):
        # the same in every process and on every machine: a hash of the name, not Python's own
        timesteps = ValidationPrepareBatch(scheduler(), seed=0)(batch(), "cpu").kwargs["timesteps"]
        for name, timestep in zip(batch()["name"], timesteps, strict=True):
            digest = hashlib.blake2b(f"0/0/validation/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            self.assertEqual(int(timestep), int(torch.randint(1000, (), generator=generator)))

    def test_class_condition_is_never_hidden(self):
        prepare = ValidationPrepareBatch(scheduler(), seed=0, class_conditional=True, num_classes=3)
        self.assertEqual(prepare(batch(), "cpu").kwargs["class_labels"].tolist(), [0, 2, 3, 1])

    def test_without_names(self):
        data = batch()
        del data["name"]
        with self.assertRaisesRegex(ValueError, "no list of names at 'name'"):
            ValidationPrepareBatch(scheduler(), seed=0)(data, "cpu")


if __name__ == "__main__":
    unittest.main()
