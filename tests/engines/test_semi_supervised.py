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

"""Semi-supervised training: what the network is given, exact resuming, several processes, settings."""

from __future__ import annotations

import copy
import tempfile
import unittest
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from parameterized import parameterized
from torch import Tensor, nn

from monai_jointdiff.data import (
    AntiCurriculumPseudoLabeller,
    DrawBatchSampler,
    DrawDataset,
    PseudoLabels,
    PseudoLabelTable,
    TwoStreamOrder,
)
from monai_jointdiff.engines import (
    PRESETS,
    JointPrepareBatch,
    SemiSupervisedPrepareBatch,
    make_unlabelled_term,
    parameter_groups,
    semi_supervised_settings,
    task_of,
    view_transforms,
)
from monai_jointdiff.handlers import (
    DeterministicDraws,
    ExponentialMovingAverage,
    GroupLearningRateSchedule,
    PseudoLabelRounds,
    ResumableCheckpoint,
    WeightSchedule,
)
from monai_jointdiff.inferers import JointDiffusionInferer
from monai_jointdiff.losses import FixMatchLoss, PiModelLoss, PseudoLabelLoss, SemiSupervisedLoss, UnlabelledTerm
from monai_jointdiff.networks import HEADS, ClassifierHead, JointDiffusionUNet
from monai_jointdiff.schedulers import make_scheduler
from monai_jointdiff.transforms import ClassificationAugmentation
from tests.engines.small_run import Recorder, items, small_network, use_one_thread
from tests.inferers.autoencoders import HalvingAutoencoder

LABELS = [0, -1, -1, 1, -1, -1, 2, -1, -1, -1, -1, 1]
VIEWS = ("image_cls", "image_strong")
WORLD_SIZE = 2


def setUpModule() -> None:
    use_one_thread()


def batch(labels: Sequence[int] = (2, -1, -1, 0), spatial_dims: int = 2, multi_label: bool = False) -> dict[str, Any]:
    """Images that say which view of which image they are: 10 times the view plus the image."""
    numbers = torch.arange(len(labels), dtype=torch.float32).reshape(-1, *[1] * (spatial_dims + 1))
    image = numbers.expand(-1, 1, *[8] * spatial_dims)
    label = torch.tensor(labels)
    if multi_label:
        label = torch.stack([label.clamp(max=1).float(), torch.full(label.shape, -1.0)], dim=1)
    views = {"image_cls": image + 10, "image_strong": image + 20, "image_second": image + 30}
    return {"image": image, **views, "label": label, "draw": torch.arange(40, 40 + len(labels))}


def prepare(**options: Any) -> SemiSupervisedPrepareBatch:
    return SemiSupervisedPrepareBatch(make_scheduler("ddim"), seed=0, **options)


def shown(images: Tensor) -> list[int]:
    return [int(image.flatten()[0]) for image in images]


class Constant(nn.Module):
    """A teacher that answers with the number of the image, and reports how it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.asked: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append((self.training, torch.is_grad_enabled()))
        return self.weight * x.flatten(1)[:, :3]


class TestPrepareBatch(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_rows_say_what_they_are(self, spatial_dims: int) -> None:
        inputs, targets, args, keywords = prepare(views=VIEWS)(batch(spatial_dims=spatial_dims), "cpu")
        self.assertEqual((shown(inputs), args), ([0, 1, 2, 3], ()))
        self.assertEqual(shown(keywords["clean"]), [10, 13, 11, 12, 21, 22])
        self.assertEqual(targets["label"].tolist(), [2, 0, -1, -1, -1, -1])
        self.assertEqual(targets["view"].tolist(), [-1, -1, 0, 0, 1, 1])
        self.assertEqual(keywords["noise"].shape, inputs.shape)

    def test_noise_is_that_of_the_joint_training(self) -> None:
        joint = JointPrepareBatch(make_scheduler("ddim"), 0, weighting="min_snr")(batch(), "cpu")
        all_images = prepare(views=VIEWS, weighting="min_snr")(batch(), "cpu")
        some = prepare(views=VIEWS, weighting="min_snr", noisy="unlabelled")(batch(), "cpu")
        self.assertEqual(shown(some.inputs), [1, 2])
        self.assertEqual(shown(some.kwargs["clean"]), shown(all_images.kwargs["clean"]))
        for rows, found in ((slice(None), all_images), (slice(1, 3), some)):
            for key in ("noise", "timesteps"):
                torch.testing.assert_close(found.kwargs[key], joint.kwargs[key][rows], rtol=0, atol=0)
            for key in ("target", "weight"):
                torch.testing.assert_close(found.targets[key], joint.targets[key][rows], rtol=0, atol=0)

    @parameterized.expand([("all", 4), ("unlabelled", 2)])
    def test_on_latents_every_image_is_encoded_once(self, noisy: str, denoised: int) -> None:
        autoencoder = HalvingAutoencoder()
        with mock.patch.object(autoencoder, "encode", wraps=autoencoder.encode) as encode:
            found = prepare(views=VIEWS, noisy=noisy, autoencoder=autoencoder)(batch(), "cpu")
        self.assertEqual(sum(len(call.args[0]) for call in encode.call_args_list), 6 + denoised)
        self.assertEqual((len(found.kwargs["clean"]), len(found.inputs)), (6, denoised))
        self.assertEqual((found.inputs.shape[2:], found.kwargs["clean"].shape[2:]), ((4, 4), (4, 4)))

    def test_without_a_term(self) -> None:
        found = prepare()(batch(), "cpu")
        self.assertEqual((shown(found.inputs), shown(found.kwargs["clean"])), ([0, 1, 2, 3], [10, 13]))
        self.assertEqual((found.targets["label"].tolist(), found.targets["view"].tolist()), ([2, 0], [-1, -1]))

    def test_without_denoising(self) -> None:
        found = prepare(views=("image_cls", "image_second"), task="classify")(batch(), "cpu")
        self.assertEqual(shown(found.inputs), [10, 13, 11, 12, 31, 32])
        self.assertEqual((set(found.targets), found.kwargs), ({"label", "view"}, {}))
        alone = prepare(task="classify")(batch(), "cpu")  # on labels alone
        self.assertEqual((shown(alone.inputs), alone.targets["label"].tolist()), ([10, 13], [2, 0]))

    def test_teacher_is_asked_in_evaluation_mode_without_gradients(self) -> None:
        teacher = Constant()
        found = prepare(views=VIEWS, teacher=teacher)(batch(), "cpu")
        self.assertEqual(shown(found.kwargs["clean"]), [10, 13, 21, 22])
        self.assertEqual(found.targets["view"].tolist(), [-1, -1, 1, 1])
        self.assertEqual(found.targets["teacher_logits"].tolist(), [[11.0] * 3, [12.0] * 3])
        self.assertEqual((teacher.asked, teacher.training), ([(False, False)], True))

    @parameterized.expand([("all",), ("unlabelled",)])
    def test_pseudo_labels_of_the_images_that_the_draws_show(self, noisy: str) -> None:
        order = TwoStreamOrder(LABELS, 5, 3)
        table = PseudoLabelTable(LABELS, 3, order)
        count = len(table.waiting())
        q = np.random.default_rng(0).dirichlet(np.ones(3), size=count)
        weights = np.arange(count) % 3 / 2.0
        table.add(table.waiting(), PseudoLabels(q, weights, np.zeros(count, dtype=bool)))
        draws = torch.arange(40, 48)
        data = batch([LABELS[order(int(draw))] for draw in draws])
        found = prepare(views=("image_cls",), pseudo_labels=table, noisy=noisy)(data, "cpu")
        images = [order(int(draw)) for draw in draws]
        hidden = [n for n, image in enumerate(images) if LABELS[image] < 0]
        self.assertEqual(shown(found.kwargs["clean"])[2:], [10 + n for n in hidden])
        for row, n in enumerate(hidden):
            torch.testing.assert_close(found.targets["pseudo_label"][row], table.probabilities[images[n]])
            self.assertEqual(found.targets["pseudo_weight"][row], table.weights[images[n]])
        self.assertGreater(len(set(found.targets["pseudo_weight"].tolist())), 1)

    @parameterized.expand([((), None, "and no teacher"), (("image_cls",), nn.Identity(), "and a teacher")])
    def test_pseudo_labels_need_a_view_and_no_teacher(self, views: tuple, teacher: Any, message: str) -> None:
        table = PseudoLabelTable(LABELS, 3, TwoStreamOrder(LABELS, 5, 3))
        with self.assertRaisesRegex(ValueError, f"SemiSupervisedPrepareBatch: pseudo-labels need a view .*{message}"):
            prepare(views=views, teacher=teacher, pseudo_labels=table)

    def test_several_labels(self) -> None:
        found = prepare(views=("image_cls",))(batch(multi_label=True), "cpu")
        self.assertEqual(found.targets["label"].tolist(), [[1, -1], [0, -1], [-1, -1], [-1, -1]])
        self.assertEqual(found.targets["view"].tolist(), [-1, -1, 0, 0])

    def test_precision_and_class_condition(self) -> None:
        options = {"class_conditional": True, "num_classes": 3, "label_dropout": 0.0}
        found = prepare(views=VIEWS, **options)(batch(), "cpu", dtype=torch.float64)
        self.assertEqual(found.kwargs["class_labels"].tolist(), [2, 3, 3, 0])
        self.assertEqual((found.inputs.dtype, found.kwargs["clean"].dtype), (torch.float64, torch.float64))
        self.assertEqual((found.targets["label"].dtype, found.targets["view"].dtype), (torch.int64, torch.int64))

    @parameterized.expand(
        [
            ({"noisy": "labelled"}, "noisy must be one of .* got 'labelled'"),
            ({"noisy": "unlabelled", "class_conditional": True}, "noisy must be 'all'"),
            ({"task": "denoise"}, "use JointPrepareBatch"),
            ({"teacher": nn.Identity()}, "a teacher needs a view"),
            ({"weighting": "none"}, "weighting must be one of"),
        ]
    )
    def test_wrong_options(self, options: dict, message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"SemiSupervisedPrepareBatch: .*{message}"):
            prepare(**options)

    def test_several_processes_need_the_decoder(self) -> None:
        with mock.patch.multiple(dist, is_initialized=lambda: True, get_world_size=lambda: 2):
            prepare()
            with self.assertRaisesRegex(ValueError, "SemiSupervisedPrepareBatch: without denoising .* got 2 processes"):
                prepare(task="classify")

    def test_wrong_batches(self) -> None:
        data = batch()
        del data["image_strong"]
        with self.assertRaisesRegex(ValueError, "SemiSupervisedPrepareBatch: the batch has no 'image_strong', it has"):
            prepare(views=VIEWS)(data, "cpu")
        with self.assertRaisesRegex(ValueError, "nothing to see in a batch of 2 images without a label"):
            prepare()(batch((-1, -1)), "cpu")
        with self.assertRaisesRegex(ValueError, "only unlabelled images are denoised, and the batch has none"):
            prepare(noisy="unlabelled")(batch((0, 1)), "cpu")


class TestParts(unittest.TestCase):
    @parameterized.expand([("fixmatch", FixMatchLoss), ("pi_model", PiModelLoss)])
    def test_term_and_its_views(self, algorithm: str, kind: type) -> None:
        term = make_unlabelled_term(algorithm, multi_label=True, threshold=0.7)
        self.assertIsInstance(term, kind)
        self.assertTrue(term.multi_label)
        for dims in (2, 3):
            image = torch.rand(1, *[8] * dims, generator=torch.Generator().manual_seed(0)) - 0.5
            item = view_transforms(ClassificationAugmentation(dims), term.views).set_random_state(0)({"image": image})
            self.assertEqual(set(item), {"image", *term.views})
            self.assertGreater(float((item[term.views[0]] - item[term.views[1]]).abs().max()), 0.01)

    @parameterized.expand([(2,), (3,)])
    def test_strong_view_is_made_of_the_weak_one(self, dims: int) -> None:
        image = torch.rand(1, *[8] * dims, generator=torch.Generator().manual_seed(0)) - 0.5
        transform = view_transforms(ClassificationAugmentation(dims, flip=True), ("image_cls", "image_strong"), 0)
        mirrored = 0
        for seed in range(20):
            views = transform.set_random_state(seed)({"image": image})
            weak, strong = views["image_cls"], views["image_strong"]
            seen = strong > -1  # what the cutout has left
            self.assertGreater(float(seen.float().mean()), 0.5)
            torch.testing.assert_close(strong[seen], weak[seen], atol=1e-5, rtol=0)
            mirrored += bool((weak - image.flip(-1)).abs().mean() < (weak - image).abs().mean())
        self.assertTrue(4 <= mirrored <= 16, mirrored)

    def test_rounds_ask_for_the_weak_view_alone(self) -> None:
        term = make_unlabelled_term("acpl", multi_label=True)
        self.assertIsInstance(term, PseudoLabelLoss)
        self.assertEqual((term.multi_label, term.views, task_of("acpl")), (True, ("image_cls",), "joint"))

    def test_joint_has_no_term_and_the_weak_view_alone(self) -> None:
        self.assertIsNone(make_unlabelled_term("joint"))
        views = view_transforms(ClassificationAugmentation(2))({"image": torch.zeros(1, 8, 8)})
        self.assertEqual(set(views), {"image", "image_cls"})

    def test_every_weak_view_is_made_as_the_first(self) -> None:
        weak = ClassificationAugmentation(3, 0.3, flip=True)
        first, second = view_transforms(weak, ("image_cls", "other")).transforms
        settings = [(one.spatial_dims, one.strength, one.flip) for one in (first, second)]
        self.assertEqual(settings, [(3, 0.3, True)] * 2)
        self.assertEqual((first.new_key, second.new_key), ("image_cls", "other"))

    @parameterized.expand([(make_unlabelled_term,), (task_of,)])
    def test_unknown_algorithm(self, function: Callable[[str], Any]) -> None:
        with self.assertRaisesRegex(ValueError, f"{function.__name__}: algorithm must be .* got 'mixmatch'"):
            function("mixmatch")

    def test_presets_name_what_exists(self) -> None:
        for name in PRESETS:
            settings = semi_supervised_settings(name)
            make_unlabelled_term(settings.algorithm)
            ClassifierHead((4, 8), 3, settings.head, None, settings.head_dropout)
            self.assertIn(settings.head, HEADS)
            TwoStreamOrder([0, -1], 0, settings.unlabelled_per_labelled, batch_size=settings.batch_size)
            loss = SemiSupervisedLoss(None, classification_weight=settings.classification_weight)
            schedule = WeightSchedule(loss, settings.classification_weight, settings.start, settings.every)
            self.assertEqual(schedule.weight_at(settings.start + 1), settings.classification_weight)
        isic = asdict(PRESETS["mediffusion_isic"])  # 4 labelled and 28 unlabelled images
        self.assertEqual(isic["batch_size"] // (1 + isic["unlabelled_per_labelled"]), 4)
        with self.assertRaisesRegex(ValueError, "preset must be one of default, .* got 'cifar'"):
            semi_supervised_settings("cifar")

    def test_parameter_groups_hold_every_learning_parameter_once(self) -> None:
        network = small_network()
        network.conv_in.requires_grad_(False)
        rest, head = parameter_groups(network, 0.2)
        self.assertEqual((rest["lr_factor"], head["lr_factor"]), (1.0, 0.2))
        self.assertEqual({id(p) for p in head["params"]}, {id(p) for p in network.classifier.parameters()})
        learning = [id(p) for p in network.parameters() if p.requires_grad]
        self.assertEqual(sorted(id(p) for p in rest["params"] + head["params"]), sorted(learning))
        network.requires_grad_(False).classifier.requires_grad_(True)
        self.assertEqual([group["lr_factor"] for group in parameter_groups(network, 0.2)], [0.2])
        with self.assertRaisesRegex(ValueError, "head_factor must be > 0, got 0"):
            parameter_groups(network, 0.0)


class Run:
    """A tiny training with all parts: two streams, views, a term, a teacher, weights and rates by iteration."""

    def __init__(
        self,
        folder: Path,
        term: UnlabelledTerm | None,
        taught: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
        dropout: float = 0.2,
        resume: Path | None = None,
        more_handlers: Sequence[Any] = (),
        num_workers: int = 0,
        options: dict[str, Any] | None = None,
        rounds: bool = False,
    ) -> None:
        scheduler = make_scheduler("ddim")
        self.base: JointDiffusionUNet = small_network(dropout).to(dtype)
        network = nn.parallel.DistributedDataParallel(self.base) if world_size > 1 else self.base
        self.optimizer = torch.optim.AdamW(parameter_groups(self.base, 0.1), lr=1.0)
        self.ema = ExponentialMovingAverage(network, 0.9)
        self.loss = SemiSupervisedLoss(term, classification_weight=0.5)
        views = () if term is None else term.views
        order = TwoStreamOrder(LABELS, 5, 3, batch_size=8 // world_size)
        dataset = DrawDataset(items(LABELS), dict, view_transforms(ClassificationAugmentation(2, 0.5), views), order, 5)
        self.table = PseudoLabelTable(LABELS, 3, order) if rounds else None
        further = {"pseudo_labels": self.table} if self.table else None
        self.checkpoint = ResumableCheckpoint(
            folder, network, self.optimizer, self.ema, interval=1, resume=resume, further=further
        )
        sampler = DrawBatchSampler(8 // world_size, 3, rank, world_size)
        labeller, inferer = AntiCurriculumPseudoLabeller(3), JointDiffusionInferer(scheduler)
        looking = [self.table] if self.table else []
        self.rounds = [PseudoLabelRounds(labeller, one, dataset, self.ema.ema_model, inferer) for one in looking]
        self.gradients: dict[str, Tensor] = {}
        self.labels: list[list[int]] = []
        self.rates: list[list[float]] = []
        self.terms: list[dict[str, float]] = []
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=2,
            train_data_loader=DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers),
            network=network,
            optimizer=self.optimizer,
            loss_function=self.loss,
            prepare_batch=SemiSupervisedPrepareBatch(
                scheduler,
                5,
                views,
                self.ema.ema_model if taught else None,
                pseudo_labels=self.table,
                **(options or {}),
            ),
            inferer=inferer,
            to_kwargs={"dtype": dtype},
            decollate=False,
            train_handlers=[
                self.checkpoint,
                self.ema,
                DeterministicDraws(sampler, 5),
                GroupLearningRateSchedule(self.optimizer, 3e-3, 6, 2),
                WeightSchedule(self.loss, 0.5, start=1 if dropout else 0, every=2 if dropout else 1),
                *([] if options else [Recorder(self.base, self.gradients, self.labels)]),
                *self.rounds,
                *more_handlers,
            ],
        )
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self._record)

    def _record(self) -> None:
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])
        self.terms.append({name: float(value) for name, value in self.loss.terms.items()})


class Stop:
    """Handler that ends a run."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=self.iteration), lambda: engine.terminate())


class TestTraining(unittest.TestCase):
    def folder(self) -> Path:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return Path(folder.name)

    def test_resumed_run_ends_as_the_uninterrupted_one(self) -> None:
        """With a teacher, strong views, weights and rates by iteration; stopped within an epoch; other workers."""
        term = FixMatchLoss(0.36)
        whole = Run(self.folder(), term, taught=True)
        start = copy.deepcopy(whole.base.state_dict())
        whole.trainer.run()
        folder = self.folder()
        Run(folder, term, taught=True, more_handlers=[Stop(4)]).trainer.run()
        torch.manual_seed(99)
        resumed = Run(folder, term, taught=True, resume=folder / "checkpoint_00000004.pt", num_workers=1)
        resumed.trainer.run()
        for one, other in ((whole.base, resumed.base), (whole.ema, resumed.ema), (whole.optimizer, resumed.optimizer)):
            torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
        self.assertFalse(torch.equal(start["conv_in.conv.weight"], whole.base.conv_in.conv.weight))
        self.assertEqual(whole.terms[4:], resumed.terms)
        # what was asked of each iteration
        self.assertEqual([sum(label >= 0 for label in labels) for labels in whole.labels], [2] * 6)
        schedule = GroupLearningRateSchedule(whole.optimizer, 3e-3, 6, 2)
        for n, (rest, head) in enumerate(whole.rates):
            self.assertAlmostEqual(rest, schedule.learning_rate_at(n + 1), places=12)
            self.assertAlmostEqual(head, 0.1 * rest, places=12)
        for n, terms in enumerate(whole.terms):
            alpha = 0.5 if n in (1, 3, 5) else 0.0
            expected = terms["diffusion"] + alpha * (terms["classification"] + terms["unlabelled"])
            self.assertAlmostEqual(terms["total"], expected, places=5)
        self.assertTrue(any(0 < terms["pseudo_label_rate"] < 1 for terms in whole.terms), whole.terms)

    @parameterized.expand([(3,), (4,)])
    def test_resumed_run_goes_on_with_its_pseudo_labels(self, stop: int) -> None:
        """From the end of the first epoch, after its round, and from the middle of the second."""
        whole = Run(self.folder(), PseudoLabelLoss(), rounds=True)
        whole.trainer.run()
        folder = self.folder()
        Run(folder, PseudoLabelLoss(), rounds=True, more_handlers=[Stop(4)]).trainer.run()
        file = folder / f"checkpoint_{stop:08d}.pt"  # the last two are kept
        resumed = Run(self.folder(), PseudoLabelLoss(), rounds=True, resume=file, num_workers=1)
        resumed.trainer.run()
        parts = ((whole.base, resumed.base), (whole.ema, resumed.ema), (whole.table, resumed.table))
        for one, other in parts:
            torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
        self.assertEqual(whole.terms[stop:], resumed.terms)
        rates = [terms["pseudo_label_rate"] for terms in whole.terms]
        self.assertEqual(rates[:3], [0.0] * 3)
        self.assertTrue(any(rate > 0 for rate in rates[4:]), rates)
        last = whole.rounds[0].last
        self.assertEqual((last.epoch, last.new), (1, int((whole.table.weights > 0).sum())))
        self.assertIsNone(resumed.rounds[0].last)  # it was restored, not made again

    @parameterized.expand([("joint",), ("pi_model",), ("fixmatch_alone",), ("supervised",)])
    def test_algorithms_and_controls_train(self, algorithm: str) -> None:
        options = {"task": task_of(algorithm), "noisy": "unlabelled" if algorithm == "pi_model" else "all"}
        run = Run(self.folder(), make_unlabelled_term(algorithm), options=options, more_handlers=[Stop(2)])
        before = copy.deepcopy(run.base.state_dict())
        run.trainer.run()
        expected = {
            "joint": {"diffusion"},
            "pi_model": {"diffusion", "unlabelled"},
            "fixmatch_alone": {"unlabelled", "pseudo_label_rate"},
            "supervised": set(),
        }[algorithm] | {"classification", "total"}
        self.assertEqual(set(run.terms[-1]), expected)
        moved = {name.split(".")[0] for name, value in run.base.state_dict().items() if not value.equal(before[name])}
        self.assertLessEqual({"conv_in", "down_blocks", "middle_block", "classifier"}, moved)
        self.assertEqual("up_blocks" in moved, "diffusion" in expected)  # the decoder learns from denoising alone


def process(rank: int, folder: str) -> None:
    """What each of two processes does; they meet at a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD_SIZE)
    run = distributed(Path(folder) / "two", rank, WORLD_SIZE)
    result = {"gradients": run.gradients, "weights": run.base.state_dict(), "labels": run.labels, "terms": run.terms}
    torch.save(result, f"{folder}/result{rank}.pt")
    dist.destroy_process_group()


def distributed(folder: Path, rank: int, world_size: int) -> Run:
    run = Run(folder, FixMatchLoss(0.36), False, rank, world_size, torch.float64, dropout=0.0, more_handlers=[Stop(3)])
    run.trainer.run()
    return run


class TestTwoProcesses(unittest.TestCase):
    def test_equal_one_with_the_double_batch(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(process, args=(folder,), nprocs=WORLD_SIZE)
            results = [torch.load(f"{folder}/result{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]
            alone = distributed(Path(folder) / "one", 0, 1)
        for iteration, labels in enumerate(alone.labels):
            self.assertEqual(results[0]["labels"][iteration] + results[1]["labels"][iteration], labels)
        for result in results:
            self.assertEqual([sum(label >= 0 for label in labels) for labels in result["labels"]], [1] * 3)
            for key, gradient in alone.gradients.items():
                torch.testing.assert_close(result["gradients"][key], gradient, rtol=0, atol=1e-8, msg=key)
            torch.testing.assert_close(result["weights"], alone.base.state_dict(), rtol=0, atol=1e-6)
        for name in ("unlabelled", "pseudo_label_rate"):
            shares = [result["terms"][0][name] for result in results]
            self.assertAlmostEqual(sum(shares) / 2, alone.terms[0][name], places=6)
        self.assertTrue(any(0 < terms["pseudo_label_rate"] < 1 for terms in alone.terms))
        self.assertGreater(max(float(gradient.abs().max()) for gradient in alone.gradients.values()), 1e-2)


if __name__ == "__main__":
    unittest.main()
