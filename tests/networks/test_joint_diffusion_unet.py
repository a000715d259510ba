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

import copy
import json
import tempfile
import unittest
from pathlib import Path

import torch
from monai.bundle import ckpt_export, verify_net_in_out
from monai.inferers import DiffusionInferer
from monai.networks.nets import ControlNet, DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler
from parameterized import parameterized

from monai_jointdiff.networks import EncoderFeatures, JointDiffusionUNet, JointOutput

SMALL = {
    "in_channels": 1,
    "out_channels": 1,
    "num_res_blocks": 1,
    "channels": (8, 8),
    "attention_levels": (False, True),
    "norm_num_groups": 4,  # with as many groups as channels the normalization removes the time embedding
}
CONTEXT = {"with_conditioning": True, "cross_attention_dim": 6, "num_head_channels": 4}

# name, spatial dimensions, arguments that MONAI's network knows too
MONAI_OPTIONS = [
    ("plain_2d", 2, {}),
    ("plain_3d", 3, {}),
    ("fc", 2, {"include_fc": True}),
    ("combined_linear_3d", 3, {"use_combined_linear": True, "include_fc": True}),
    ("updown", 2, {"resblock_updown": True}),
    ("channels", 2, {"in_channels": 3, "out_channels": 2, "num_res_blocks": (2, 1), "channels": (8, 16)}),
    ("all_levels", 2, {"attention_levels": (True, True), "num_head_channels": (4, 8), "norm_eps": 1e-5}),
    ("context_2d", 2, {**CONTEXT, "transformer_num_layers": 2}),
    ("context_3d", 3, {**CONTEXT, "include_fc": True, "upcast_attention": True}),
    ("one_level", 2, {"channels": (8,), "attention_levels": (False,)}),
]

# name, spatial dimensions, arguments of ours
OPTIONS = [
    ("plain_2d", 2, {}),
    ("plain_3d", 3, {"head": "jointdiffusion"}),
    ("conditional_2d", 2, {"class_conditional": True, "time_conditioning": "scale_shift"}),
    ("conditional_3d", 3, {"class_conditional": True, "multi_label": True, "head": "linear"}),
    ("context", 2, {**CONTEXT, "class_conditional": True, "include_fc": True, "resblock_updown": True}),
]


def monai_unet(spatial_dims=2, **options):
    return randomize(DiffusionModelUNet(spatial_dims, **{**SMALL, "include_fc": False, **options}))


def joint_unet(spatial_dims=2, num_classes=3, **options):
    return randomize(JointDiffusionUNet(spatial_dims, num_classes=num_classes, **{**SMALL, **options}))


def randomize(net, std=0.2):
    """Give every parameter a random value: MONAI starts the last layer of each block at zero, which hides errors."""
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std)
    return net.eval()


def inputs(net, batch=2, size=8, seed=1):
    """Images, timesteps, and the conditions the network takes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, net.in_channels, *(size,) * (net.conv_in.conv.weight.ndim - 2), generator=generator)
    timesteps = torch.randint(1, 1000, (batch,), generator=generator)
    conditions = {}
    if net.with_conditioning:
        conditions["context"] = torch.randn(batch, 5, 6, generator=generator)
    if getattr(net, "class_conditional", False):
        conditions["class_labels"] = torch.randint(0, net.num_classes, (batch,), generator=generator)
        if net.multi_label:
            conditions["class_labels"] = torch.randint(-1, 2, (batch, net.num_classes), generator=generator).float()
    return x, timesteps, conditions


def gradients(net):
    return {name: p.grad for name, p in net.named_parameters()}


class TestAgainstMonai(unittest.TestCase):
    @parameterized.expand(MONAI_OPTIONS)
    def test_lifted_network_equals_its_source(self, _, dims, options):
        source = monai_unet(dims, **options)
        before = copy.deepcopy(source.state_dict())
        net = JointDiffusionUNet.from_diffusion_unet(source, num_classes=3)
        x, timesteps, conditions = inputs(source)
        torch.testing.assert_close(net(x, timesteps, **conditions), source(x, timesteps, **conditions))
        new = set(net.state_dict()) - set(source.state_dict())
        self.assertTrue(all(name.startswith("classifier.") for name in new), new)
        self.assertEqual(set(source.state_dict()) - set(net.state_dict()), set())
        self.assertEqual(net(x).shape, (2, 3))
        for name, value in source.state_dict().items():  # neither changed nor shared
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
            self.assertNotEqual(value.data_ptr(), net.state_dict()[name].data_ptr())
        rebuilt = JointDiffusionUNet(**json.loads(json.dumps(net.config)))
        rebuilt.load_state_dict(net.state_dict())
        torch.testing.assert_close(rebuilt.eval()(x, timesteps, **conditions), net(x, timesteps, **conditions))

    @parameterized.expand(
        [(name, dims, options) for name, dims, options in MONAI_OPTIONS if "upcast" not in str(options)]
    )
    def test_one_seed_starts_both_with_the_same_weights(self, _, dims, options):
        options = {**SMALL, "include_fc": False, **options}
        torch.manual_seed(3)
        source = DiffusionModelUNet(dims, **options).state_dict()
        torch.manual_seed(3)
        ours = JointDiffusionUNet(dims, num_classes=2, **options).state_dict()
        for name, value in source.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0)

    def test_lift_keeps_mode_and_dtype(self):
        source = monai_unet().double().train()
        net = JointDiffusionUNet.from_diffusion_unet(source, 2)
        self.assertTrue(net.training)
        self.assertEqual({p.dtype for p in net.parameters()}, {torch.float64})
        x, timesteps, _ = inputs(source)
        torch.testing.assert_close(net(x.double(), timesteps), source(x.double(), timesteps), rtol=1e-12, atol=1e-12)

    def test_lift_reads_dropout_of_cross_attention(self):
        source = DiffusionModelUNet(2, **{**SMALL, **CONTEXT, "dropout_cattn": 0.25, "upcast_attention": True})
        config = JointDiffusionUNet.from_diffusion_unet(source, 2).config
        self.assertEqual(config["dropout_cattn"], 0.25)
        self.assertTrue(config["upcast_attention"])
        self.assertTrue(config["include_fc"])

    def test_lift_adds_a_null_class(self):
        source = monai_unet(num_class_embeds=3)
        net = JointDiffusionUNet.from_diffusion_unet(source, 3)
        self.assertEqual(
            set(net.state_dict()) - set(source.state_dict()), {k for k in net.state_dict() if "classif" in k}
        )
        rows = net.class_embedding.weight
        torch.testing.assert_close(rows[:3], source.class_embedding.weight)
        torch.testing.assert_close(rows[3], source.class_embedding.weight.mean(0))
        x, timesteps, _ = inputs(source)
        labels = torch.tensor([0, 2])
        torch.testing.assert_close(net(x, timesteps, class_labels=labels), source(x, timesteps, class_labels=labels))

    @parameterized.expand(
        [("scale_shift", {"time_conditioning": "scale_shift"}), ("class", {"class_conditional": True})]
    )
    def test_lift_with_a_new_condition_starts_at_the_source(self, _, options):
        source = monai_unet()
        net = JointDiffusionUNet.from_diffusion_unet(source, 3, **options)
        x, timesteps, _ = inputs(source)
        torch.testing.assert_close(net(x, timesteps), source(x, timesteps))
        new = set(net.state_dict()) - set(source.state_dict())
        expected = ("classifier.", "class_embedding.weight") if "class_conditional" in options else ("classifier.",)
        self.assertTrue(all(n.startswith(expected) or "time_scale_shift" in n for n in new), new)

    def test_lift_refuses(self):
        with self.assertRaisesRegex(ValueError, "4 class embeddings, num_classes is 3"):
            JointDiffusionUNet.from_diffusion_unet(monai_unet(num_class_embeds=4), 3)
        with self.assertRaisesRegex(ValueError, "class-conditional"):
            JointDiffusionUNet.from_diffusion_unet(monai_unet(num_class_embeds=3), 3, class_conditional=False)
        with self.assertRaisesRegex(TypeError, r"unknown options \['channels'\]"):
            JointDiffusionUNet.from_diffusion_unet(monai_unet(), 3, channels=(8, 8))
        with self.assertRaisesRegex(TypeError, "got JointDiffusionUNet"):
            JointDiffusionUNet.from_diffusion_unet(joint_unet(), 3)
        with self.assertRaisesRegex(TypeError, "got Linear"):
            JointDiffusionUNet.from_diffusion_unet(torch.nn.Linear(1, 1), 3)

    @parameterized.expand([(2,), (3,)])
    def test_controlnet_residuals(self, dims):
        source = monai_unet(dims)
        net = JointDiffusionUNet.from_diffusion_unet(source, 2)
        options = {k: v for k, v in SMALL.items() if k != "out_channels"}
        control = randomize(
            ControlNet(dims, conditioning_embedding_num_channels=(8,), include_fc=False, **options), std=0.3
        )
        x, timesteps, _ = inputs(source)
        down, middle = control(x, timesteps, controlnet_cond=torch.randn_like(x))
        residuals = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
        expected = source(x, timesteps, **residuals)
        self.assertGreater((expected - source(x, timesteps)).abs().max().item(), 1e-3)
        torch.testing.assert_close(net(x, timesteps, **residuals), expected)
        joint = net(x, timesteps, clean=x[:1], **residuals)
        torch.testing.assert_close(joint.prediction, expected)
        torch.testing.assert_close(joint.logits, net(x[:1]))
        with self.assertRaisesRegex(ValueError, "got 1 down_block_additional_residuals"):
            net(x, timesteps, down_block_additional_residuals=tuple(down[:1]))

    @parameterized.expand([(2,), (3,)])
    def test_diffusion_inferer(self, dims):
        source = monai_unet(dims)
        net = JointDiffusionUNet.from_diffusion_unet(source, 2)
        scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
        scheduler.set_timesteps(4)
        inferer = DiffusionInferer(scheduler)
        x, timesteps, _ = inputs(source)
        noise = torch.randn_like(x)
        arguments = {"inputs": x, "noise": noise, "timesteps": timesteps}
        torch.testing.assert_close(
            inferer(diffusion_model=net, **arguments), inferer(diffusion_model=source, **arguments)
        )
        ours, theirs = (inferer.sample(noise, n, verbose=False) for n in (net, source))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # four calls, each to rounding

    def test_weights_of_monai_generative(self):
        net = joint_unet(include_fc=True, attention_levels=(True, True))
        state = net.state_dict()
        old = {}
        for name, value in state.items():
            old[
                name.replace(".attn.to_", ".to_").replace(".attn.out_proj", ".proj_attn").replace("postconv", "conv")
            ] = value
        other = JointDiffusionUNet(**{**net.config, "head_dropout": 0.1})
        other.load_old_state_dict({k: v.clone() for k, v in old.items()})
        for name, value in other.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=0)


class TestJointForward(unittest.TestCase):
    @parameterized.expand([(name, dims, options, n, m) for name, dims, options in OPTIONS for n, m in ((2, 2), (1, 3))])
    def test_equals_separate_calls(self, _, dims, options, n, m):
        net = joint_unet(dims, **options)
        x, timesteps, conditions = inputs(net, n)
        clean, _, _ = inputs(net, m, seed=2)
        out = net(x, timesteps, clean=clean, **conditions)
        self.assertIsInstance(out, JointOutput)
        torch.testing.assert_close(out.prediction, net(x, timesteps, **conditions))
        torch.testing.assert_close(out.logits, net(clean))
        torch.testing.assert_close(net.decode(net.encode(x, timesteps, **conditions)), out.prediction)
        torch.testing.assert_close(net.head(net.encode(clean, torch.zeros(m))), out.logits)

    @parameterized.expand([(n, d, o) for n, d, o in OPTIONS if "class_conditional" in o])
    def test_head_sees_no_condition(self, _, dims, options):
        net = joint_unet(dims, **options)
        clean, _, _ = inputs(net, 3, seed=2)
        outputs = []
        for seed in (3, 4):
            x, timesteps, conditions = inputs(net, 3, seed=seed)
            for value in conditions.values():
                if value.is_floating_point():
                    value.requires_grad_()
            out = net(x.requires_grad_(), timesteps, clean=clean, **conditions)
            outputs.append(out)
            leaves = [x, *(v for v in conditions.values() if v.requires_grad)]
            leaked = torch.autograd.grad(out.logits.sum(), leaves, retain_graph=True)
            self.assertTrue(all(not g.any() for g in leaked))
        self.assertTrue(torch.equal(outputs[0].logits, outputs[1].logits))
        self.assertFalse(torch.equal(outputs[0].prediction, outputs[1].prediction))

    def test_class_labels_reach_the_prediction(self):
        net = joint_unet(class_conditional=True)
        x, timesteps, _ = inputs(net)
        a, b = (net(x, timesteps, class_labels=torch.tensor([y, 1])) for y in (0, 2))
        self.assertFalse(torch.allclose(a[0], b[0]))
        torch.testing.assert_close(a[1], b[1])

    @parameterized.expand([("add",), ("scale_shift",)])
    def test_timesteps_reach_the_prediction(self, time_conditioning):
        net = joint_unet(time_conditioning=time_conditioning)
        x, _, _ = inputs(net)
        a, b = (net(x, torch.tensor([t, 7])) for t in (10, 900))
        self.assertGreater((a[0] - b[0]).abs().max().item(), 1e-2)
        torch.testing.assert_close(a[1], b[1])

    def test_as_many_groups_as_channels_need_scale_shift(self):
        # the added embedding is one constant per channel, which a group of one channel subtracts again
        for time_conditioning, reached in (("add", False), ("scale_shift", True)):
            net = joint_unet(norm_num_groups=8, time_conditioning=time_conditioning).double()
            x = inputs(net)[0].double()
            a, b = (net(x, torch.tensor([t])) for t in (10, 900))
            self.assertIs(not torch.allclose(a, b, rtol=1e-9, atol=1e-9), reached)

    def test_one_encoder_call_and_a_decoder_for_the_noisy_half(self):
        net = joint_unet()
        batches = {"conv_in": [], "up_blocks.0": [], "out": []}
        for name, sizes in batches.items():
            net.get_submodule(name).register_forward_hook(lambda _, __, out, sizes=sizes: sizes.append(len(out)))
        x, timesteps, _ = inputs(net, 3)
        net(x, timesteps, clean=x[:2])
        self.assertEqual(batches, {"conv_in": [5], "up_blocks.0": [3], "out": [3]})
        net(x)
        self.assertEqual(batches, {"conv_in": [5, 3], "up_blocks.0": [3], "out": [3]})

    @parameterized.expand([(*case, labels) for case in OPTIONS for labels in (True, False)])
    def test_every_parameter_gets_a_gradient(self, _, dims, options, labels):
        net = joint_unet(dims, **options).train()
        x, timesteps, conditions = inputs(net)
        if not labels:
            conditions = {}
        out = net(x, timesteps, clean=x, **conditions)
        (out.prediction.square().mean() + out.logits.square().mean()).backward()
        missing = [name for name, grad in gradients(net).items() if grad is None]
        self.assertEqual(missing, [])

    @parameterized.expand([("plain", {}), ("context", CONTEXT)])
    def test_the_gradient_is_the_sum_of_both_terms(self, _, options):
        net = joint_unet(head_dropout=0.0, **options).double().train()
        x, timesteps, conditions = inputs(net)
        x = x.double()
        conditions = {k: v.double() for k, v in conditions.items()}
        out = net(x, timesteps, clean=x, **conditions)
        (out.prediction.square().mean() + out.logits.square().mean()).backward()
        together = {name: grad.clone() for name, grad in gradients(net).items()}
        net.zero_grad()
        net(x, timesteps, **conditions).square().mean().backward()
        net(x).square().mean().backward()
        for name, grad in gradients(net).items():
            torch.testing.assert_close(together[name], grad, rtol=1e-9, atol=1e-12)


class TestConditions(unittest.TestCase):
    def test_no_label_is_the_null_class(self):
        net = joint_unet(class_conditional=True)
        x, timesteps, _ = inputs(net)
        null = torch.full((2,), net.num_classes)
        torch.testing.assert_close(net(x, timesteps), net(x, timesteps, class_labels=null), rtol=0, atol=1e-6)
        features = net.encode(x, torch.zeros(2), class_labels=null)
        torch.testing.assert_close(net(x), net.head(features), rtol=0, atol=1e-6)

    def test_multi_hot(self):
        net = joint_unet(class_conditional=True, multi_label=True)
        x, timesteps, _ = inputs(net, 4)
        rows = net.class_embedding.weight
        labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [-1, -1, -1], [-1, 1, 0]])
        expected = torch.stack([rows[0] + rows[2], torch.zeros_like(rows[0]), rows[3], rows[1]])
        plain = joint_unet()
        plain.load_state_dict({k: v for k, v in net.state_dict().items() if k != "class_embedding.weight"})
        zero = torch.zeros(4)
        difference = net.encode(x, zero, class_labels=labels).emb - plain.encode(x, zero).emb
        torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net(x, timesteps), net(x, timesteps, class_labels=labels[2:3].expand(4, 3)))

    def test_no_context_is_a_zero_token(self):
        net = joint_unet(**CONTEXT)
        x, timesteps, _ = inputs(net)
        for tokens in (1, 4):
            torch.testing.assert_close(net(x, timesteps), net(x, timesteps, context=torch.zeros(2, tokens, 6)))

    def test_one_timestep_stands_for_the_batch(self):
        net = joint_unet()
        x, _, _ = inputs(net, 3)
        expected = net(x, torch.tensor([7, 7, 7]))
        for one in (torch.tensor([7]), torch.Tensor((7,))):
            torch.testing.assert_close(net(x, one), expected)
            torch.testing.assert_close(net(x, one, clean=x).prediction, expected)


class TestOptions(unittest.TestCase):
    @parameterized.expand([(n, d, o) for n, d, o in OPTIONS])
    def test_config_rebuilds_the_network(self, _, dims, options):
        net = joint_unet(dims, dropout=0.1, attention="einsum", **options)
        config = json.loads(json.dumps(net.config))
        other = JointDiffusionUNet(**config)
        self.assertEqual(other.config, net.config)
        other.load_state_dict(net.state_dict())
        x, timesteps, conditions = inputs(net)
        torch.testing.assert_close(other.eval()(x, timesteps, **conditions), net(x, timesteps, **conditions))

    @parameterized.expand([("plain_2d", 2, {}), ("plain_3d", 3, {}), ("context", 2, CONTEXT)])
    def test_attention_kernels_agree(self, _, dims, options):
        results = []
        for attention in ("sdpa", "einsum", "auto"):
            net = joint_unet(dims, attention=attention, **options).double()
            x, timesteps, conditions = inputs(net)
            conditions = {k: v.double() for k, v in conditions.items()}
            prediction = net(x.double(), timesteps, **conditions)
            prediction.square().sum().backward()
            results.append((prediction.detach(), net.middle_block.resnet_1.conv1.conv.weight.grad))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-10)

    @parameterized.expand([(n, d, o) for n, d, o in OPTIONS])
    def test_checkpointing_changes_nothing(self, _, dims, options):
        results = []
        for use_checkpoint in (False, True):
            net = joint_unet(dims, use_checkpoint=use_checkpoint, dropout=0.3, **options).train()
            x, timesteps, conditions = inputs(net)
            saved: list[torch.Tensor] = []
            torch.manual_seed(5)
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t):
                out = net(x, timesteps, clean=x, **conditions)
            (out.prediction.square().mean() + out.logits.square().mean()).backward()
            results.append((out.prediction.detach(), out.logits.detach(), gradients(net)))
            activations = {t.data_ptr(): t.numel() for t in saved if not isinstance(t, torch.nn.Parameter)}
            results[-1] += (sum(activations.values()),)
        plain, checkpointed = results
        torch.testing.assert_close(checkpointed[:3], plain[:3], rtol=0, atol=0)
        self.assertLess(checkpointed[3], 0.6 * plain[3])  # numbers kept for the backward pass

    def test_dropout_in_training_only(self):
        net = joint_unet(dropout=0.5, head_dropout=0.5, dropout_cattn=0.5, attention="sdpa", **CONTEXT)
        x, timesteps, conditions = inputs(net)
        self.assertTrue(torch.equal(net(x, timesteps, **conditions), net(x, timesteps, **conditions)))
        self.assertTrue(torch.equal(net(x), net(x)))
        without = JointDiffusionUNet(**{**net.config, "dropout": 0.0, "head_dropout": 0.0, "dropout_cattn": 0.0})
        without.load_state_dict(net.state_dict())
        torch.testing.assert_close(net(x, timesteps, **conditions), without(x, timesteps, **conditions))
        net.train()
        self.assertFalse(torch.equal(net(x, timesteps, **conditions), net(x, timesteps, **conditions)))
        self.assertFalse(torch.equal(net(x), net(x)))

    def test_an_untrained_network_predicts_zero(self):
        net = JointDiffusionUNet(2, num_classes=2, time_conditioning="scale_shift", class_conditional=True, **SMALL)
        x, timesteps, conditions = inputs(net)
        self.assertFalse(net(x, timesteps, **conditions).any())

    @parameterized.expand([(n, d, o) for n, d, o in OPTIONS])
    def test_classifies_any_size(self, _, dims, options):
        net = joint_unet(dims, **options)
        for size in ((9, 7), (4, 16)):
            x = torch.randn(2, 1, *size, *(5,) * (dims - 2))
            self.assertEqual(net(x).shape, (2, 3))
            features = net.encode(x, torch.zeros(1))
            self.assertIsInstance(features, EncoderFeatures)
            self.assertEqual(len(features.skips) + 1, net.classifier.num_maps)

    def test_every_map_reaches_the_head(self):
        net = joint_unet(num_res_blocks=(2, 1))
        features = net.encode(torch.randn(1, 1, 8, 8), torch.zeros(1))
        maps = [m.detach().requires_grad_() for m in (*features.skips, features.middle)]
        logits = net.head(features._replace(skips=maps[:-1], middle=maps[-1]))
        self.assertEqual(len(maps), 1 + (2 + 1) + 1 + 1)  # conv_in; level 0 with its downsampling; level 1; middle
        for grad in torch.autograd.grad(logits[0, 0], maps):
            self.assertTrue(grad.any())

    def test_autocast_keeps_logits_in_single_precision(self):
        net = joint_unet()
        x, timesteps, _ = inputs(net)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x, timesteps, clean=x)
        self.assertEqual(out.logits.dtype, torch.float32)
        scale = net(x, timesteps).abs().max().item()
        torch.testing.assert_close(out.prediction.float(), net(x, timesteps), rtol=0, atol=0.05 * scale)

    def test_copies(self):
        net = joint_unet(time_conditioning="scale_shift")
        x, timesteps, _ = inputs(net)
        other = copy.deepcopy(net)
        torch.testing.assert_close(other(x, timesteps), net(x, timesteps), rtol=0, atol=0)
        other.conv_in.conv.bias.data.add_(1)
        self.assertFalse(torch.equal(other(x, timesteps), net(x, timesteps)))


class TestExport(unittest.TestCase):
    @parameterized.expand([(n, d, o) for n, d, o in OPTIONS])
    def test_trace_classifies_other_batches_and_sizes(self, _, dims, options):
        net = joint_unet(dims, **options)
        traced = torch.jit.trace(net, torch.randn(1, 1, *(8,) * dims), check_trace=False)
        for batch, size in ((3, 8), (2, 12)):
            x = torch.randn(batch, 1, *(size,) * dims)
            torch.testing.assert_close(traced(x), net(x))

    @parameterized.expand([(2,), (3,)])
    def test_bundle_commands(self, dims):
        net = joint_unet(dims)
        meta = {
            "version": "0.1.0",
            "network_data_format": {
                "inputs": {"image": {"num_channels": 1, "spatial_shape": [8] * dims, "dtype": "float32"}},
                "outputs": {"pred": {"num_channels": 3, "dtype": "float32"}},
            },
        }
        network = {"_target_": "monai_jointdiff.networks.JointDiffusionUNet", **net.config}
        with tempfile.TemporaryDirectory() as folder:
            files = {"config": {"network_def": network}, "metadata": meta}
            for name, content in files.items():
                Path(folder, f"{name}.json").write_text(json.dumps(content))
            common = {"meta_file": f"{folder}/metadata.json", "config_file": f"{folder}/config.json"}
            verify_net_in_out(net_id="network_def", device="cpu", **common)
            torch.save(net.state_dict(), f"{folder}/model.pt")
            ckpt_export(
                net_id="network_def",
                filepath=f"{folder}/model.ts",
                ckpt_file=f"{folder}/model.pt",
                use_trace=True,
                input_shape=[1, 1, *[8] * dims],
                **common,
            )
            exported = torch.jit.load(f"{folder}/model.ts")
            x = torch.randn(2, 1, *[8] * dims)
            torch.testing.assert_close(exported(x), net(x))


class TestErrors(unittest.TestCase):
    @parameterized.expand(
        [
            ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
            ({"num_classes": 1}, "num_classes must be at least 2"),
            ({"num_classes": 0, "multi_label": True}, "num_classes must be at least 1"),
            ({"time_conditioning": "film"}, "time_conditioning must be one of"),
            ({"attention": "flash"}, "attention must be one of"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
            ({"head": "mlp"}, "unknown head 'mlp'"),
            ({"norm_num_groups": 3}, "multiple of norm_num_groups"),
            ({"channels": (8, 8, 8)}, "attention_levels"),
            ({"with_conditioning": True}, "cross_attention_dim"),
        ]
    )
    def test_wrong_arguments(self, arguments, message):
        with self.assertRaisesRegex(ValueError, message):
            JointDiffusionUNet(**{"spatial_dims": 2, "num_classes": 2, **SMALL, **arguments})

    def setUp(self):
        self.plain, self.conditional = joint_unet(), joint_unet(class_conditional=True)
        self.x, self.timesteps = torch.zeros(2, 1, 8, 8), torch.tensor([1, 2])

    @parameterized.expand(
        [
            ("channels", (2, 3, 8, 8), r"shape \(N, 1, size, size\), got \(2, 3, 8, 8\)"),
            ("dimensions", (2, 1, 8, 8, 8), r"got \(2, 1, 8, 8, 8\)"),
            ("odd", (2, 1, 9, 8), r"multiples of 2 \(2 levels\), got \(9, 8\)"),
        ]
    )
    def test_images(self, name, shape, message):
        x = torch.zeros(shape)
        with self.assertRaisesRegex(ValueError, message):
            self.plain(x, self.timesteps)
        with self.assertRaisesRegex(ValueError, message):
            self.plain(x, self.timesteps, clean=x)
        if name != "odd":
            with self.assertRaisesRegex(ValueError, message):
                self.plain(x)

    def test_clean_of_another_size(self):
        with self.assertRaisesRegex(ValueError, r"one spatial size, got \(8, 8\) and \(16, 16\)"):
            self.plain(self.x, self.timesteps, clean=torch.zeros(2, 1, 16, 16))

    def test_timesteps(self):
        for wrong in (torch.tensor(3), torch.tensor([1, 2, 3]), torch.zeros(2, 1)):
            with self.assertRaisesRegex(ValueError, r"timesteps must have shape \(1,\) or \(2,\)"):
                self.plain(self.x, wrong)

    def test_conditions_need_timesteps(self):
        for name in ("clean", "context", "class_labels", "mid_block_additional_residual"):
            with self.assertRaisesRegex(ValueError, "need timesteps"):
                self.conditional(self.x, **{name: self.x})

    def test_class_labels(self):
        with self.assertRaisesRegex(ValueError, "class_conditional=False"):
            self.plain(self.x, self.timesteps, class_labels=torch.tensor([0, 1]))
        cases = [
            (torch.tensor([0, 4]), r"must lie in \[0, 3\], got \[0, 4\]"),
            (torch.tensor([-1, 1]), r"must lie in \[0, 3\], got \[-1, 1\]"),
            (torch.tensor([0]), r"integer of shape \(2,\), got torch.int64 of shape \(1,\)"),
            (torch.tensor([0.0, 1.0]), "got torch.float32"),
        ]
        for labels, message in cases:
            with self.assertRaisesRegex(ValueError, message):
                self.conditional(self.x, self.timesteps, class_labels=labels)

    def test_multi_hot_class_labels(self):
        net = joint_unet(class_conditional=True, multi_label=True)
        cases = [
            (torch.tensor([0, 1]), r"multi-hot floating point of shape \(2, 3\), got torch.int64 of shape \(2,\)"),
            (torch.zeros(2, 4), r"got torch.float32 of shape \(2, 4\)"),
            (torch.full((2, 3), 2.0), r"must lie in \[-1, 1\]"),
            (torch.full((2, 3), torch.nan), r"must lie in \[-1, 1\]"),
        ]
        for labels, message in cases:
            with self.assertRaisesRegex(ValueError, message):
                net(self.x, self.timesteps, class_labels=labels)

    def test_context(self):
        with self.assertRaisesRegex(ValueError, "with_conditioning=False"):
            self.plain(self.x, self.timesteps, context=torch.zeros(2, 1, 6))
        net = joint_unet(**CONTEXT)
        for shape in ((2, 6), (1, 4, 6), (2, 4, 5)):
            with self.assertRaisesRegex(ValueError, r"context must have shape \(2, L, 6\)"):
                net(self.x, self.timesteps, context=torch.zeros(shape))


if __name__ == "__main__":
    unittest.main()
