"""Networks: segmentation_models_pytorch and COPLE-Net by name, taking images as the data modules give them."""

import contextlib
import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mcseg.messages import one_line
from mcseg.networks.coplenet import COPLENet


class SegmentationNetwork(nn.Module):
    """A network that takes RGB images of any size and gives logits of that size: one of SMP's, or COPLE-Net.

    SMP is segmentation_models_pytorch.

    Normalisation and padding belong to the network, so that they cannot drift from its weights: images are scaled to [0, 1],
    normalised with the encoder's mean and standard deviation, and padded at the right and bottom to a multiple of the
    output stride; the logits of the padding are cut off.

    Args:
        arch: SMP architecture, for example ``unet``, ``deeplabv3plus``, ``segformer``; or ``coplenet``,
            :class:`~mcseg.networks.coplenet.COPLENet`.
        encoder: SMP or timm (``tu-...``) encoder. COPLE-Net has its own, and any name does.
        num_classes: number of classes C.
        options: further arguments of the architecture, for example ``{"decoder_channels": [64, 32, 16]}``; those of
            COPLE-Net are ``feature_channels`` and ``dropout``.
        channels_last: keep weights and activations in channels-last memory, the faster format for convolutions on CPUs and
            on GPUs with mixed precision.
        checkpointing: keep only the inputs of the encoder's blocks for the backward pass and compute the rest of their
            activations again there: less memory, for one more forward pass of the encoder. Logits, gradients and the
            statistics of batch norms are the same.
        frozen_batch_norm: batch norms normalise with the statistics that they were loaded with, in training as well, and
            their scale and shift are not trained: for fine-tuning with batches too small for statistics. It is for weights
            of which the decoder is trained, too: a new decoder's batch norms stay the identity.
        aux_channels: width of an auxiliary head on the encoder's second-to-last feature map, for
            :meth:`forward_with_aux`; None is no such head.

    Raises:
        ValueError: unknown architecture, encoder or option, or an encoder without blocks to checkpoint or without the
            feature map of the auxiliary head; the message is one line.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        arch: str,
        encoder: str,
        num_classes: int,
        *,
        options: dict[str, Any] | None = None,
        channels_last: bool = True,
        checkpointing: bool = False,
        frozen_batch_norm: bool = False,
        aux_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.model = _build(arch, encoder, num_classes, None, options)
        self.arch = arch.lower()
        self._encoder, self._options = encoder, options
        # Left out of the model, and done here; whether the corners are aligned, None if it ends in no upsampling
        self._align_corners = _remove_upsampling(self.model)
        self.channels_last = channels_last
        self.frozen_batch_norm = frozen_batch_norm
        self.aux_head: nn.Sequential | None = None
        if aux_channels is not None:
            self.aux_head = _aux_head(self.model.encoder.out_channels[-2], aux_channels, num_classes)
        if channels_last:
            for part in self.children():
                part.to(memory_format=torch.channels_last)
        if checkpointing:
            _recompute_blocks(self.model.encoder, encoder)
        if frozen_batch_norm:
            for norm in self._batch_norms():
                for parameter in norm.parameters(recurse=False):
                    parameter.requires_grad_(False)
            self.train()
        # ImageNet's, until pretrained weights bring their own; part of the checkpoint, as they belong to its weights.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    @property
    def output_stride(self) -> int:
        """Height and width are padded to multiples of this."""
        stride = int(self.model.encoder.output_stride)
        return 2 * stride if self.arch == "dpt" else stride  # DPT halves the grid of patches once more

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits.

        Args:
            image: (N,3,H,W) RGB: uint8 0..255, or floating point 0..1.

        Returns:
            (N,C,H,W) logits.
        """
        logits, upsampling = self.forward_coarse(image)
        return logits if upsampling is None else _upsampled(logits, upsampling, image.shape[-2:])

    def forward_coarse(self, image: Tensor) -> tuple[Tensor, tuple[int, int, bool] | None]:
        """Compute logits without the upsampling that the network may end in.

        Args:
            image: (N,3,H,W) RGB: uint8 0..255, or floating point 0..1.

        Returns:
            (N,C,h,w) logits; and height, width and align_corners of the bilinear upsampling of which :meth:`forward` gives
            the first H rows and W columns. None: the network does not end in an upsampling, and h, w are H, W.
        """
        prepared = self._prepare(image)
        logits = self.model(prepared)
        if self._align_corners is None:
            return logits[..., : image.shape[-2], : image.shape[-1]], None
        return logits, (prepared.shape[-2], prepared.shape[-1], self._align_corners)

    def forward_with_aux(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute logits, and in training mode those of the auxiliary head as well, in one pass of the encoder.

        Args:
            image: (N,3,H,W) RGB: uint8 0..255, or floating point 0..1.

        Returns:
            (N,C,H,W) logits, the same as :meth:`forward` gives, and (N,C,H,W) logits of the auxiliary head, resized
            bilinearly from its feature map; None in evaluation mode.

        Raises:
            RuntimeError: the network was made without ``aux_channels``.
        """
        if self.aux_head is None:
            raise RuntimeError("forward_with_aux: the network has no auxiliary head; set aux_channels")
        if not self.training:
            return self(image), None
        seen: list[Tensor] = []
        # SMP's models hand the features on to their decoder themselves; a hook sees them without computing them twice.
        hook = self.model.encoder.register_forward_hook(lambda encoder, args, features: seen.append(features[-2]))
        try:
            logits = self(image)
        finally:
            hook.remove()
        height, width, stride = *image.shape[-2:], self.output_stride
        padded = (height + -height % stride, width + -width % stride, False)
        return logits, _upsampled(self.aux_head(seen[0]), padded, image.shape[-2:])

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        if self.frozen_batch_norm:
            for norm in self._batch_norms():
                norm.eval()
        return self

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, _BATCH_NORMS)]

    def _prepare(self, image: Tensor) -> Tensor:
        """Normalise and pad."""
        if not image.is_floating_point():
            image = image.to(self.mean.dtype) / 255
        image = (image - self.mean) / self.std
        height, width, stride = *image.shape[-2:], self.output_stride
        padding = (0, -width % stride, 0, -height % stride)
        if any(padding):
            image = F.pad(image, padding, mode="replicate")
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image

    def load_pretrained_encoder(self, weights: str) -> None:
        """Copy pretrained encoder weights in, with the normalisation that they were trained with.

        SMP fetches both from its hub when they are not in the local cache.

        Raises:
            ValueError: unknown weights, or they can be had neither from the cache nor from the network, or there are none
                for this architecture.
        """
        arch, encoder = self.arch, self._encoder
        if arch == "coplenet":
            raise ValueError(f"encoder_weights: found {weights}; coplenet has no pretrained weights, set it to null")
        from segmentation_models_pytorch.encoders import get_preprocessing_params

        try:
            with warnings.catch_warnings():  # SMP 0.5 tells that it tries another place
                warnings.filterwarnings("ignore", message="Error loading .* weights from Hugging Face Hub")
                source = _build(arch, encoder, 2, True if encoder.startswith("tu-") else weights, self._options)
            found = get_preprocessing_params(encoder, pretrained=weights)
        except OSError as error:
            raise ValueError(
                f"encoder_weights: {weights} for {encoder} are not in the local cache and cannot be fetched "
                f"({one_line(error, limit=300)}); set encoder_weights to null to train from scratch"
            ) from None
        self.model.encoder.load_state_dict(source.encoder.state_dict())
        high = (found["input_range"] or [0, 1])[1]  # a few encoders were trained on 0..255
        self.mean.copy_(torch.tensor(found["mean"]).view(1, 3, 1, 1) / high)
        self.std.copy_(torch.tensor(found["std"]).view(1, 3, 1, 1) / high)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _remove_upsampling(model: nn.Module) -> bool | None:
    """Take the bilinear upsampling out of SMP's head, a convolution, an upsampling and an activation.

    Returns:
        Whether it aligns the corners; None if the model does not end in one, and stays as it is. An upsampling has no
        parameters, so checkpoints are the same without it.
    """
    head = getattr(model, "segmentation_head", None)
    if not isinstance(head, nn.Sequential) or len(head) != 3 or not isinstance(head[1], nn.Upsample):
        return None
    upsampling = head[1]
    plain = isinstance(getattr(head[2], "activation", head[2]), nn.Identity)
    if upsampling.mode != "bilinear" or not plain:
        return None
    head[1] = nn.Identity()
    return bool(upsampling.align_corners)


def _upsampled(coarse: Tensor, upsampling: tuple[int, int, bool], size: torch.Size) -> Tensor:
    """Upsample (N,C,h,w) bilinearly and give the first rows and columns, ``size`` of them."""
    height, width, align_corners = upsampling
    full = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=align_corners)
    return full[..., : size[0], : size[1]]


def _build(arch: str, encoder: str, num_classes: int, weights: str | bool | None, options: dict[str, Any] | None) -> Any:
    if arch.lower() == "coplenet":
        try:
            return COPLENet(num_classes, **(options or {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"network {arch}: {one_line(error, limit=300)}") from None
    import segmentation_models_pytorch as smp  # at first use: it loads timm and torchvision, which takes seconds

    try:
        if arch.lower() in smp.MODEL_ARCHITECTURES_MAPPING and not encoder.startswith(("tu-", "timm-")):
            # SMP hands whatever it does not know to the encoder, and its own encoders take anything without a word.
            named = inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[arch.lower()]).parameters.values()
            known = [parameter.name for parameter in named if parameter.kind is not parameter.VAR_KEYWORD]
            if unknown := sorted(set(options or {}) - set(known)):
                raise ValueError(f"unknown network_options {', '.join(unknown)}; expected some of {', '.join(known)}")
        return smp.create_model(arch, encoder, encoder_weights=weights, classes=num_classes, **(options or {}))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"network {arch} with encoder {encoder}: {one_line(error, limit=300)}") from None


def _aux_head(in_channels: int, channels: int, num_classes: int) -> nn.Sequential:
    if in_channels < 1:  # SMP's placeholder where an encoder skips a scale
        raise ValueError("aux_channels: the encoder has no second-to-last feature map; set aux_channels to null")
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(channels, num_classes, 1),
    )


def _recompute_blocks(encoder: nn.Module, name: str) -> None:
    """Make every block of an encoder keep only its input for the backward pass.

    timm's own ``set_grad_checkpointing`` is not used: it updates the statistics of batch norms twice.
    """
    blocks = _blocks(encoder)
    if not blocks:
        raise ValueError(f"checkpointing: the encoder {name} is not made of blocks; set checkpointing to false")
    for block in blocks:
        # On the instance, so that names in the state dict stay; a partial is copied and pickled along with its block.
        block.forward = functools.partial(_recomputed, block)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Find the blocks below a module: modules made of layers, and no mere lists or stages of further blocks."""
    found: list[nn.Module] = []
    for child in module.children():
        if not _has_layers(child):
            continue
        if isinstance(child, _CONTAINERS) or _has_repeated_blocks(child):
            found += _blocks(child)
        else:
            found.append(child)
    return found


def _has_layers(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


def _has_repeated_blocks(module: nn.Module) -> bool:
    for container in module.modules():
        if isinstance(container, _CONTAINERS):
            kinds = Counter(type(c) for c in container.children() if _has_layers(c) and not isinstance(c, _CONTAINERS))
            if any(count > 1 for count in kinds.values()):
                return True
    return False


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the compiler knows no context_fn: blocks run uncompiled
def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a block's forward so that only its arguments are kept for the backward pass."""
    forward = functools.partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # DenseNet appends to the list of features that it gives to its layers; the second run must see it as the first did.
    kept = [list(value) if isinstance(value, list) else value for value in args]
    return checkpoint(
        forward,
        *kept,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _spare_statistics(block)),
        **kwargs,
    )


@contextlib.contextmanager
def _spare_statistics(block: nn.Module) -> Iterator[None]:
    """Let norms in training mode update copies of their running statistics, which are then dropped."""
    norms = [module for module in block.modules() if module.training and getattr(module, "track_running_stats", False)]
    kept = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    try:
        for norm, buffers in zip(norms, kept, strict=True):
            # Copies and not None: the second run must keep tensors of the same number and shapes as the first.
            for name, value in buffers.items():
                setattr(norm, name, value.clone())
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, value in buffers.items():
                setattr(norm, name, value)
