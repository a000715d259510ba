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
"""A diffusion UNet that predicts noise and classifies with one encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from monai.networks.blocks import CrossAttentionBlock, SABlock, SpatialAttentionBlock
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import (
    DiffusionUNetResnetBlock,
    WrappedUpsample,
    get_timestep_embedding,
)
from torch import nn

from .blocks import (
    ATTENTION_MODES,
    Attention,
    DownStage,
    MiddleStage,
    ResidualBlock,
    SpatialAttention,
    UpsampleConvolution,
    UpStage,
)
from .heads import ClassifierHead, HeadFeatures

__all__ = ["EncoderFeatures", "JointDiffusionUNet", "JointOutput"]

TIME_CONDITIONING = ("add", "scale_shift")


class JointOutput(NamedTuple):
    """Both answers of the joint forward (a NamedTuple: MONAI's decollation refuses dataclasses).

    Attributes:
        logits: logits (M, K) of the clean images.
        prediction: prediction (N, C_out, *spatial) for the noisy images.
    """

    logits: torch.Tensor
    prediction: torch.Tensor


class EncoderFeatures(NamedTuple):
    """What the encoder hands to the decoder and to the head.

    Attributes:
        skips: maps (N, C_i, *spatial_i) of the encoder, from the first convolution to the last level.
        middle: map (N, C, *spatial) of the middle block.
        emb: embedding (N, E) of timestep and class.
        context: context (N, L, D) for cross-attention, None in a network without.
    """

    skips: list[torch.Tensor]
    middle: torch.Tensor
    emb: torch.Tensor
    context: torch.Tensor | None = None

    def split(self, sizes: Sequence[int]) -> list[EncoderFeatures]:
        """Features of consecutive parts of the batch with the given numbers of images."""
        parts = len(sizes)
        skips = list(zip(*(skip.split(list(sizes)) for skip in self.skips), strict=True))
        middle, emb = self.middle.split(list(sizes)), self.emb.split(list(sizes))
        context = [None] * parts if self.context is None else self.context.split(list(sizes))
        return [EncoderFeatures(list(skips[i]), middle[i], emb[i], context[i]) for i in range(parts)]


class JointDiffusionUNet(DiffusionModelUNet):
    """Joint diffusion network: MONAI's ``DiffusionModelUNet`` plus a classification head on its encoder.

    ================================================ ==========================================================
    call                                             returns
    ================================================ ==========================================================
    ``net(x)``                                       logits (N, K) at timestep 0 with the null class
    ``net(x, timesteps, context, class_labels)``     prediction (N, C_out, *spatial), as MONAI's network
    ``net(x_t, timesteps, ..., clean=x_0)``          :py:class:`JointOutput`, from one call of the encoder
    ``encode``, ``decode``, ``head``, ``classify``   the halves
    ================================================ ==========================================================

    The state dict has the keys of MONAI's network and those of the head, ``classifier.*``. In the joint forward noisy
    and clean images pass the encoder as one batch (their numbers may differ) and the decoder sees the noisy ones only.
    The clean images always carry timestep 0, the null class and the null context: with their own label or context the
    head would read the answer from the condition. Every parameter gets a gradient in the joint forward.

    The null class is the last row of the class embedding, index ``num_classes``; ``class_labels=None`` means the null
    class. The null context is a zero token: cross-attention then adds its bias only, whatever the number of tokens.
    (MONAI's network attends to the image itself without a context, and fails where the widths differ.)

    ``include_fc`` is False by default, unlike in MONAI 1.6.1: weights of monai-generative, and the published bundles
    that are based on it, carry a projection that was never trained, and give the right output without it only.

    Sources: Deja, Trzcinski, Tomczak, "Learning Data Representations with Joint Diffusion Models",
    https://arxiv.org/abs/2301.13622; Kaleta et al., "Mediffusion", https://arxiv.org/abs/2411.09434.

    Args:
        spatial_dims: 2 or 3.
        in_channels: number of image channels C.
        out_channels: number of channels of the prediction C_out.
        num_classes: number of logits K; at least 2, or at least 1 when ``multi_label``.
        num_res_blocks: residual blocks per level, one number or one per level.
        channels: channels per level, multiples of ``norm_num_groups``.
        attention_levels: which levels have attention; the middle block always has.
        norm_num_groups: groups of the group normalization. A level with as many channels as groups loses the added
            time embedding, for the normalization subtracts a constant of a channel: take fewer groups (MONAI's
            default, 32 groups, meets the first level of 32 channels) or ``scale_shift``.
        norm_eps: epsilon of the group normalization.
        resblock_updown: change the size with residual blocks instead of convolutions.
        num_head_channels: channels of an attention head, one number or one per level.
        with_conditioning: use cross-attention to a context.
        transformer_num_layers: layers of every cross-attention transformer.
        cross_attention_dim: width D of the context; needs ``with_conditioning``.
        class_conditional: condition the prediction on the class.
        multi_label: labels are multi-hot (N, K), and so is ``class_labels``.
        upcast_attention: compute attention in single precision.
        dropout_cattn: dropout probability in the cross-attention transformers.
        include_fc: have an output projection in self-attention.
        use_combined_linear: have one linear map for queries, keys and values in self-attention.
        head: head variant, one of :py:data:`monai_jointdiff.networks.HEADS`.
        head_hidden: hidden width of the head; None for the published one.
        head_dropout: dropout probability of the head; None for the published one.
        time_conditioning: ``add`` as MONAI, or ``scale_shift`` (FiLM) on top of it.
        dropout: dropout probability in the residual blocks.
        use_checkpoint: recompute activations in the backward pass, block by block, to save memory.
        attention: ``sdpa``, ``einsum``, or ``auto`` for whichever was measured faster for the call.

    Raises:
        ValueError: when an argument is out of its range.

    Example:

    .. code-block:: python

        net = JointDiffusionUNet(spatial_dims=2, in_channels=1, out_channels=1, num_classes=2)
        x_t, x_0, timesteps = torch.randn(4, 1, 32, 32), torch.randn(6, 1, 32, 32), torch.randint(0, 1000, (4,))
        logits, prediction = net(x_t, timesteps, clean=x_0)  # (6, 2), (4, 1, 32, 32)
        logits = net(x_0)  # (6, 2)
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        num_classes: int,
        num_res_blocks: Sequence[int] | int = (2, 2, 2),
        channels: Sequence[int] = (32, 64, 128),
        attention_levels: Sequence[bool] = (False, True, True),
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        resblock_updown: bool = False,
        num_head_channels: int | Sequence[int] = 8,
        with_conditioning: bool = False,
        transformer_num_layers: int = 1,
        cross_attention_dim: int | None = None,
        class_conditional: bool = False,
        multi_label: bool = False,
        upcast_attention: bool = False,
        dropout_cattn: float = 0.0,
        include_fc: bool = False,
        use_combined_linear: bool = False,
        head: str = "standardized",
        head_hidden: int | None = None,
        head_dropout: float | None = None,
        time_conditioning: str = "add",
        dropout: float = 0.0,
        use_checkpoint: bool = False,
        attention: str = "auto",
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        _check_arguments(spatial_dims, num_classes, multi_label, time_conditioning, dropout, attention)
        super().__init__(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            out_channels=out_channels,
            num_res_blocks=num_res_blocks,
            channels=channels,
            attention_levels=attention_levels,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            resblock_updown=resblock_updown,
            num_head_channels=num_head_channels,
            with_conditioning=with_conditioning,
            transformer_num_layers=transformer_num_layers,
            cross_attention_dim=cross_attention_dim,
            num_class_embeds=num_classes + 1 if class_conditional else None,
            upcast_attention=upcast_attention,
            dropout_cattn=dropout_cattn,
            include_fc=include_fc,
            use_combined_linear=use_combined_linear,
        )
        self.spatial_dims = spatial_dims
        self.num_classes = num_classes
        self.multi_label = multi_label
        self.class_conditional = class_conditional
        self.cross_attention_dim = cross_attention_dim
        self._arguments = arguments

        scale_shift = time_conditioning == "scale_shift"
        _replace(self, (SABlock, CrossAttentionBlock), lambda old: Attention(old, attention, upcast_attention))
        _replace(self, (SpatialAttentionBlock,), SpatialAttention)
        _replace(self, (DiffusionUNetResnetBlock,), lambda old: ResidualBlock(old, scale_shift, dropout))
        _replace(self, (WrappedUpsample,), lambda old: UpsampleConvolution(old) if hasattr(old, "postconv") else old)
        self.down_blocks = nn.ModuleList(DownStage(block, use_checkpoint) for block in self.down_blocks)
        self.middle_block = MiddleStage(self.middle_block, use_checkpoint)
        self.up_blocks = nn.ModuleList(UpStage(block, use_checkpoint) for block in self.up_blocks)
        self.classifier = ClassifierHead(self._map_channels(), num_classes, head, head_hidden, head_dropout)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, fit for JSON: ``JointDiffusionUNet(**net.config)`` builds the same network."""
        scalar = (bool, int, float, str, type(None))
        return {k: v if isinstance(v, scalar) else list(v) for k, v in self._arguments.items()}

    @classmethod
    def from_diffusion_unet(cls, unet: DiffusionModelUNet, num_classes: int, **options: Any) -> JointDiffusionUNet:
        """Makes a joint network of a trained diffusion UNet; the source's options and weights are taken over.

        A source with C class embeddings needs ``num_classes=C`` and gets a null class with their mean, C+1 rows. A
        class condition that the source lacks starts at zero, as does scale-shift conditioning, so that the prediction
        is the source's until it is trained. Without those two the only new keys are the head's.

        Args:
            unet: the source. It is not changed.
            num_classes: number of classes of the head.
            options: arguments of :py:class:`JointDiffusionUNet` that a diffusion UNet does not have
                (``class_conditional, multi_label, head, head_hidden, head_dropout, time_conditioning, dropout,
                use_checkpoint, attention``).

        Returns:
            A new network on the source's device, in its dtype and mode.

        Raises:
            TypeError: when the source is not a plain ``DiffusionModelUNet`` or an option is unknown.
            ValueError: when the source's class embeddings are not ``num_classes``.
        """
        if isinstance(unet, JointDiffusionUNet) or not isinstance(unet, DiffusionModelUNet):
            raise TypeError(f"from_diffusion_unet expects a monai DiffusionModelUNet, got {type(unet).__name__}.")
        unknown = sorted(set(options) - _LIFT_OPTIONS)
        if unknown:
            raise TypeError(f"from_diffusion_unet got unknown options {unknown}, accepted are {sorted(_LIFT_OPTIONS)}.")
        if unet.num_class_embeds is not None:
            if unet.num_class_embeds != num_classes:
                raise ValueError(
                    f"from_diffusion_unet: the source has {unet.num_class_embeds} class embeddings, "
                    f"num_classes is {num_classes}; both must be equal."
                )
            if options.get("class_conditional") is False:
                raise ValueError("from_diffusion_unet: the source is class-conditional, got class_conditional=False.")
            options["class_conditional"] = True

        net = cls(num_classes=num_classes, **_source_options(unet), **options)
        state = dict(unet.state_dict())
        if net.class_conditional:
            state["class_embedding.weight"] = _with_null_class(state.get("class_embedding.weight"), net)
        net.load_state_dict({**net.state_dict(), **state})
        parameter = next(unet.parameters())
        return net.to(device=parameter.device, dtype=parameter.dtype).train(unet.training)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        clean: torch.Tensor | None = None,
    ) -> Any:
        """Classifies ``x``, predicts for ``x``, or does both for ``clean`` and ``x``.

        Args:
            x: images (N, C, *spatial), in [-1, 1]; noisy ones when ``timesteps`` is given.
            timesteps: timesteps (N,) or (1,), any number type; None to classify ``x``.
            context: context (N, L, D); None for the null context.
            class_labels: class indices (N,) in [0, K], K for the null class; or, in a multi-label network, multi-hot
                (N, K), where -1 is unknown and a row of -1 is the null class. None for the null class.
            down_block_additional_residuals: ControlNet's residuals of the encoder maps.
            mid_block_additional_residual: ControlNet's residual of the middle block.
            clean: clean images (M, C, *spatial) to classify; M may differ from N.

        Returns:
            Logits (N, K) without ``timesteps``, a :py:class:`JointOutput` with ``clean``, else the prediction
            (N, C_out, *spatial).

        Raises:
            ValueError: when a shape, a label or the combination of arguments is wrong.
        """
        if timesteps is None:
            if any(v is not None for v in (context, class_labels, mid_block_additional_residual, clean)):
                raise ValueError(
                    f"{self._name}: without timesteps the network classifies x alone; context, class_labels, "
                    "residuals and clean need timesteps."
                )
            return self.classify(x)
        residuals = (down_block_additional_residuals, mid_block_additional_residual)
        if clean is None:
            return self.decode(_add_residuals(self.encode(x, timesteps, context, class_labels), *residuals))

        self._check_images(x)
        self._check_images(clean)
        if not torch.jit.is_tracing() and x.shape[2:] != clean.shape[2:]:
            raise ValueError(
                f"{self._name}: x and clean share one encoder call and must have one spatial size, "
                f"got {tuple(x.shape[2:])} and {tuple(clean.shape[2:])}."
            )
        context = self._context(x, context)
        emb = torch.cat([self._embed(x, timesteps, class_labels), self._embed(clean, clean.new_zeros(1), None)])
        if context is not None:
            context = torch.cat([context, context.new_zeros(clean.shape[0], *context.shape[1:])])
        features = self._encode(torch.cat([x, clean]), emb, context)
        noisy, seen = features.split((x.shape[0], clean.shape[0]))
        return JointOutput(logits=self.head(seen), prediction=self.decode(_add_residuals(noisy, *residuals)))

    def encode(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
    ) -> EncoderFeatures:
        """The encoder and the middle block.

        Args:
            x: images (N, C, *spatial), of any size.
            timesteps: timesteps (N,) or (1,).
            context: context (N, L, D); None for the null context.
            class_labels: see :py:meth:`forward`; None for the null class.

        Returns:
            The maps for :py:meth:`decode` and :py:meth:`head`.

        Raises:
            ValueError: when a shape or a label is wrong.
        """
        self._check_images(x)
        return self._encode(x, self._embed(x, timesteps, class_labels), self._context(x, context))

    def decode(self, features: EncoderFeatures) -> torch.Tensor:
        """The decoder.

        Args:
            features: what :py:meth:`encode` returned.

        Returns:
            Prediction (N, C_out, *spatial).

        Raises:
            ValueError: when the spatial size is not a multiple of 2 ** (levels - 1).
        """
        self._check_spatial_size(features.skips[0])
        skips, h = list(features.skips), features.middle
        for stage in cast(Iterable[UpStage], self.up_blocks):
            skips, used = skips[: -stage.num_skips], skips[-stage.num_skips :]
            h = stage(hidden_states=h, res_hidden_states_list=used, temb=features.emb, context=features.context)
        prediction: torch.Tensor = self.out(h)
        return prediction

    def head(self, features: EncoderFeatures) -> torch.Tensor:
        """Logits (N, K) from the maps of the encoder and the middle block, of any size."""
        logits: torch.Tensor = self.classifier([*features.skips, features.middle])
        return logits

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, K) of clean images (N, C, *spatial): timestep 0, null class, encoder only."""
        return self.head(self.encode(x, x.new_zeros(1)))

    def features(self, x: torch.Tensor) -> HeadFeatures:
        """Penultimate features of the head (N, F), and logits (N, K), of clean images as in :py:meth:`classify`."""
        encoded = self.encode(x, x.new_zeros(1))
        return self.classifier.features([*encoded.skips, encoded.middle])

    def _encode(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor | None) -> EncoderFeatures:
        h = self.conv_in(x)
        skips = [h]
        for stage in self.down_blocks:
            h, maps = stage(hidden_states=h, temb=emb, context=context)
            skips += maps
        return EncoderFeatures(skips, self.middle_block(hidden_states=h, temb=emb, context=context), emb, context)

    def _embed(self, x: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """Embedding (N, E) of timestep and class."""
        if timesteps.ndim != 1 or (not torch.jit.is_tracing() and timesteps.shape[0] not in (1, x.shape[0])):
            raise ValueError(
                f"{self._name}: timesteps must have shape (1,) or ({x.shape[0]},), got {tuple(timesteps.shape)}."
            )
        emb = self.time_embed(get_timestep_embedding(timesteps, self.block_out_channels[0]).to(x.dtype))
        emb = emb.expand(x.shape[0], -1)
        if self.class_conditional:
            return emb + self._embed_class(x, class_labels).to(emb.dtype)
        if class_labels is not None:
            raise ValueError(f"{self._name}: class_labels were given to a network with class_conditional=False.")
        return emb

    def _embed_class(self, x: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """Class embedding (N, E), or (1, E) of the null class."""
        weight = self.class_embedding.weight  # (K + 1, E)
        if class_labels is None:
            return weight[-1:]
        expected = (x.shape[0], self.num_classes) if self.multi_label else (x.shape[0],)
        if tuple(class_labels.shape) != expected or class_labels.is_floating_point() != self.multi_label:
            kind = "multi-hot floating point" if self.multi_label else "integer"
            raise ValueError(
                f"{self._name}: class_labels must be {kind} of shape {expected}, "
                f"got {class_labels.dtype} of shape {tuple(class_labels.shape)}."
            )
        low, high = (-1, 1) if self.multi_label else (0, self.num_classes)
        # On an accelerator the check would wait for the device in every call.
        checked = class_labels.device.type == "cpu" and not torch.jit.is_tracing()
        if checked and not bool(((class_labels >= low) & (class_labels <= high)).all()):
            raise ValueError(
                f"{self._name}: class_labels must lie in [{low}, {high}], got "
                f"[{class_labels.min().item()}, {class_labels.max().item()}]."
            )
        if not self.multi_label:
            embedded: torch.Tensor = self.class_embedding(class_labels)
            return embedded
        null = (class_labels < 0).all(dim=1, keepdim=True)
        return torch.cat([class_labels.clamp(min=0), null.to(class_labels.dtype)], dim=1).to(weight.dtype) @ weight

    def _context(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor | None:
        """The context (N, L, D), the null context where there is none, None in a network without cross-attention."""
        if not self.with_conditioning:
            if context is not None:
                raise ValueError(f"{self._name}: context was given to a network with with_conditioning=False.")
            return None
        if context is None:
            return x.new_zeros(x.shape[0], 1, self.cross_attention_dim or 0)
        if context.ndim != 3 or context.shape[0] != x.shape[0] or context.shape[2] != self.cross_attention_dim:
            raise ValueError(
                f"{self._name}: context must have shape ({x.shape[0]}, L, {self.cross_attention_dim}), "
                f"got {tuple(context.shape)}."
            )
        return context

    def _check_images(self, x: torch.Tensor) -> None:
        if torch.jit.is_tracing():
            return
        if x.ndim != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            axes = ", ".join(["N", str(self.in_channels), *["size"] * self.spatial_dims])
            raise ValueError(f"{self._name}: images must have shape ({axes}), got {tuple(x.shape)}.")

    def _check_spatial_size(self, x: torch.Tensor) -> None:
        factor = 2 ** (len(self.block_out_channels) - 1)
        if not torch.jit.is_tracing() and any(size % factor for size in x.shape[2:]):
            raise ValueError(
                f"{self._name}: the prediction needs spatial sizes that are multiples of {factor} "
                f"({len(self.block_out_channels)} levels), got {tuple(x.shape[2:])}; pad the images, for example with "
                f"monai.transforms.DivisiblePad({factor})."
            )

    def _map_channels(self) -> list[int]:
        """Channels of every map that the encoder returns, the middle block's last."""
        channels = [self.block_out_channels[0]]
        for i, width in enumerate(self.block_out_channels):
            is_last = i == len(self.block_out_channels) - 1
            channels += [width] * (self.num_res_blocks[i] + (not is_last))
        return [*channels, self.block_out_channels[-1]]

    @property
    def _name(self) -> str:
        return type(self).__name__


_LIFT_OPTIONS = {
    "class_conditional",
    "multi_label",
    "head",
    "head_hidden",
    "head_dropout",
    "time_conditioning",
    "dropout",
    "use_checkpoint",
    "attention",
}


def _check_arguments(
    spatial_dims: int, num_classes: int, multi_label: bool, time_conditioning: str, dropout: float, attention: str
) -> None:
    """Raises a ValueError for an argument that MONAI's network does not know and that is out of its range."""
    if spatial_dims not in (2, 3):
        raise ValueError(f"JointDiffusionUNet: spatial_dims must be 2 or 3, got {spatial_dims}.")
    least = 1 if multi_label else 2
    if num_classes < least:
        raise ValueError(
            f"JointDiffusionUNet: num_classes must be at least {least} with multi_label={multi_label}, "
            f"got {num_classes}."
        )
    if time_conditioning not in TIME_CONDITIONING:
        raise ValueError(
            f"JointDiffusionUNet: time_conditioning must be one of {TIME_CONDITIONING}, got {time_conditioning!r}."
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"JointDiffusionUNet: dropout must be in [0, 1), got {dropout}.")
    if attention not in ATTENTION_MODES:
        raise ValueError(f"JointDiffusionUNet: attention must be one of {ATTENTION_MODES}, got {attention!r}.")


def _replace(module: nn.Module, kinds: tuple[type[nn.Module], ...], build: Callable[[Any], nn.Module]) -> None:
    """Replaces every descendant of one of the kinds by what ``build`` makes of it, under the same name."""
    for name, child in list(module.named_children()):
        if isinstance(child, kinds):
            setattr(module, name, build(child))
        else:
            _replace(child, kinds, build)


def _add_residuals(
    features: EncoderFeatures, down: Sequence[torch.Tensor] | None, middle: torch.Tensor | None
) -> EncoderFeatures:
    """Adds ControlNet's residuals to the maps of the encoder and the middle block."""
    if down is not None:
        if len(down) != len(features.skips):
            raise ValueError(
                f"JointDiffusionUNet: got {len(down)} down_block_additional_residuals, expected {len(features.skips)}."
            )
        features = features._replace(skips=[h + r for h, r in zip(features.skips, down, strict=True)])
    return features if middle is None else features._replace(middle=features.middle + middle)


def _source_options(unet: Any) -> dict[str, Any]:
    """Constructor arguments of a MONAI network, read from its layers (it keeps only some of them)."""
    self_attention = next(m for m in unet.modules() if isinstance(m, SABlock))
    cross_attention = next((m for m in unet.modules() if isinstance(m, CrossAttentionBlock)), None)
    options: dict[str, Any] = {
        "spatial_dims": unet.conv_in.conv.weight.ndim - 2,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "num_res_blocks": unet.num_res_blocks,
        "channels": unet.block_out_channels,
        "attention_levels": unet.attention_levels,
        "norm_num_groups": unet.out[0].num_groups,
        "norm_eps": unet.out[0].eps,
        "resblock_updown": isinstance(unet.down_blocks[0].downsampler, DiffusionUNetResnetBlock),
        "num_head_channels": unet.num_head_channels,
        "with_conditioning": unet.with_conditioning,
        "include_fc": self_attention.include_fc,
        "use_combined_linear": self_attention.use_combined_linear,
    }
    if cross_attention is not None:
        options["transformer_num_layers"] = len(unet.middle_block.attention.transformer_blocks)
        options["cross_attention_dim"] = cross_attention.context_input_size
        options["upcast_attention"] = cross_attention.attention_dtype is not None
        options["dropout_cattn"] = cross_attention.dropout_rate
    return options


def _with_null_class(rows: torch.Tensor | None, net: JointDiffusionUNet) -> torch.Tensor:
    """Class embeddings (C + 1, E) from C rows and their mean, or zeros where the source has none."""
    if rows is None:
        return torch.zeros_like(net.class_embedding.weight)
    return torch.cat([rows, rows.mean(dim=0, keepdim=True)])
