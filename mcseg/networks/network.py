"""Networks by name, from segmentation_models_pytorch (SMP) or COPLE-Net, with normalisation and padding inside."""

import contextlib
import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mcseg.messages import one_line
from mcseg.networks.coplenet import COPLENet


class SegmentationNetwork(nn.Module):
    """Network from RGB images of any size to logits of that size, either an SMP architecture or COPLE-Net.

    SMP is segmentation_models_pytorch.

    Normalisation and padding are part of the network, so that they always match its weights. Images are scaled to [0, 1],
    normalised with the encoder's mean and standard deviation, and padded at the right and bottom to a multiple of the
    output stride. The logits of the padding are cropped.

    Args:
        arch: SMP architecture, for example ``unet``, ``deeplabv3plus``, ``segformer``; or ``coplenet`` for
            :class:`~mcseg.networks.COPLENet`.
        encoder: SMP or timm (``tu-...``) encoder; not used by COPLE-Net.
        num_classes: number of classes C.
        options: further arguments of the architecture, for example ``{"decoder_channels": [64, 32, 16]}``; for COPLE-Net
            ``feature_channels`` and ``dropout``.
        channels_last: whether to use the channels-last memory format, which makes convolutions faster on CPUs and, with
            mixed precision, on GPUs.
        checkpointing: whether to store only the inputs of the encoder's blocks and recompute their activations in the
            backward pass (activation checkpointing). It saves memory and costs one more forward pass of the encoder.
            Logits, gradients and batch-norm statistics do not change.
        frozen_batch_norm: whether batch norms always use their loaded statistics and do not train their scale and shift,
            for fine-tuning with small batches. The weights must include a trained decoder, as frozen batch norms of a new
            decoder stay the identity.
        aux_channels: width of an auxiliary head on the encoder's second-to-last feature map, for
            :meth:`forward_with_aux`; None is no auxiliary head.

    Raises:
        ValueError: the architecture, the encoder or an option is unknown, or the encoder has no blocks to checkpoint or no
            feature map for the auxiliary head; the message is one line.
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
        # the forward methods upsample instead of the model; None if the model does not end in an upsampling
        self._align_corners = _remove_upsampling(self.model)
        self.channels_last = channels_last
        self.frozen_batch_norm = frozen_batch_norm
        self._is_compiled = False
        self.aux_head: nn.Sequential | None = None
        if aux_channels is not None:
            self.aux_head = _aux_head(self.model.encoder.out_channels[-2], aux_channels, num_classes)
            # SMP models pass the features to their decoder internally; a hook reads them without a second pass. It exists
            # from the start, as compiled code does not notice a new hook.
            self.model.encoder.register_forward_hook(self._keep_feature)
        self._feature: Tensor | None = None  # the encoder's second-to-last feature map, for the auxiliary head
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
        # those of ImageNet, until pretrained weights replace them; buffers, because they belong to the weights
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    @property
    def output_stride(self) -> int:
        """Number of pixels; height and width are padded to multiples of it."""
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
        return logits if upsampling is None else _upsample(logits, upsampling, image.shape[-2:])

    def forward_coarse(self, image: Tensor) -> tuple[Tensor, tuple[int, int, bool] | None]:
        """Compute logits without the final upsampling.

        Args:
            image: (N,3,H,W) RGB: uint8 0..255, or floating point 0..1.

        Returns:
            (N,C,h,w) logits, and height, width and align_corners of the final bilinear upsampling; :meth:`forward` returns
            its first H rows and W columns. The second value is None if the network does not end in an upsampling; the
            logits are (N,C,H,W) then.
        """
        prepared = self._prepare(image)
        logits = self._run(prepared)
        if self._align_corners is None:
            return logits[..., : image.shape[-2], : image.shape[-1]], None
        return logits, (prepared.shape[-2], prepared.shape[-1], self._align_corners)

    def forward_with_aux(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute logits and, in training mode, those of the auxiliary head in the same pass of the encoder.

        Args:
            image: (N,3,H,W) RGB: uint8 0..255, or floating point 0..1.

        Returns:
            (N,C,H,W) logits of :meth:`forward`, and (N,C,H,W) logits of the auxiliary head after bilinear resizing, or None
            in evaluation mode.

        Raises:
            RuntimeError: the network has no auxiliary head.
        """
        if self.aux_head is None:
            raise RuntimeError("forward_with_aux: the network has no auxiliary head; set aux_channels")
        if not self.training:
            return self(image), None
        logits = self(image)
        feature, self._feature = self._feature, None
        height, width, stride = *image.shape[-2:], self.output_stride
        padded = (height + -height % stride, width + -width % stride, False)
        return logits, _upsample(self.aux_head(feature), padded, image.shape[-2:])

    def _keep_feature(self, encoder: nn.Module, images: tuple[Tensor], features: Sequence[Tensor]) -> None:
        if self.training:
            self._feature = features[-2]

    def compile(self, **options: Any) -> None:
        """Compile the network in place for training; evaluation stays eager, since its images may differ in size.

        The names in the ``state_dict`` stay the same.

        Args:
            **options: arguments of `torch.compile`.
        """
        self.model.compile(**options)
        self._is_compiled = True

    def _run(self, prepared: Tensor) -> Tensor:
        if not self._is_compiled or self.training:
            return cast(Tensor, self.model(prepared))
        with torch.compiler.set_stance("force_eager"):
            return cast(Tensor, self.model(prepared))

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
        """Scale, normalise and pad images."""
        if not image.is_floating_point():
            image = image.to(self.mean.dtype) / 255
        image = (image - self.mean) / self.std
        height, width, stride = *image.shape[-2:], self.output_stride
        padding = (0, -width % stride, 0, -height % stride)
        if any(padding):
            image = F.pad(image, padding, mode="replicate")
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image

    def load_pretrained_encoder(self, weights: str) -> None:
        """Load pretrained encoder weights and the mean and standard deviation of their training.

        SMP downloads both if they are not in the local cache.

        Args:
            weights: name of the weights, for example ``imagenet``.

        Raises:
            ValueError: the weights are unknown, are neither in the cache nor downloadable, or the architecture has none.
        """
        arch, encoder = self.arch, self._encoder
        if arch == "coplenet":
            raise ValueError(
                f"encoder_weights: found {weights}, expected null: coplenet has no pretrained weights; set it to null"
            )
        from segmentation_models_pytorch.encoders import get_preprocessing_params

        try:
            with warnings.catch_warnings():  # SMP 0.5 warns when it tries another source
                warnings.filterwarnings("ignore", message="Error loading .* weights from Hugging Face Hub")
                source = _build(arch, encoder, 2, True if encoder.startswith("tu-") else weights, self._options)
            preprocessing = get_preprocessing_params(encoder, pretrained=weights)
        except OSError as error:
            raise ValueError(
                f"encoder_weights: {weights} for {encoder} are not in the local cache and cannot be downloaded "
                f"({one_line(error, limit=300)}); set encoder_weights to null to train from scratch"
            ) from None
        self.model.encoder.load_state_dict(source.encoder.state_dict())
        high = (preprocessing["input_range"] or [0, 1])[1]  # some encoders are trained on 0..255
        self.mean.copy_(torch.tensor(preprocessing["mean"]).view(1, 3, 1, 1) / high)
        self.std.copy_(torch.tensor(preprocessing["std"]).view(1, 3, 1, 1) / high)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _remove_upsampling(model: nn.Module) -> bool | None:
    """Remove the bilinear upsampling from the head of an SMP model: convolution, upsampling, activation.

    An upsampling has no parameters, so the keys of the ``state_dict`` stay the same.

    Returns:
        Whether the upsampling aligns corners; None if the model does not end in one and is unchanged.
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


def _upsample(coarse: Tensor, upsampling: tuple[int, int, bool], size: torch.Size) -> Tensor:
    """Upsample logits (N,C,h,w) bilinearly and crop them to the first rows and columns, ``size`` (H,W)."""
    height, width, align_corners = upsampling
    full = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=align_corners)
    return full[..., : size[0], : size[1]]


def _build(arch: str, encoder: str, num_classes: int, weights: str | bool | None, options: dict[str, Any] | None) -> Any:
    """Build an SMP model or COPLE-Net; arguments as for :class:`SegmentationNetwork`."""
    if arch.lower() == "coplenet":
        try:
            return COPLENet(num_classes, **(options or {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"network {arch}: {one_line(error, limit=300)}") from None
    import segmentation_models_pytorch as smp  # imported at first use, as it takes seconds

    try:
        if arch.lower() in smp.MODEL_ARCHITECTURES_MAPPING and not encoder.startswith(("tu-", "timm-")):
            # SMP passes unknown arguments to the encoder, and its own encoders accept any argument
            parameters = inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[arch.lower()]).parameters.values()
            known = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
            if unknown := sorted(set(options or {}) - set(known)):
                raise ValueError(f"found unknown network_options {', '.join(unknown)}, expected some of {', '.join(known)}")
        return smp.create_model(arch, encoder, encoder_weights=weights, classes=num_classes, **(options or {}))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"network {arch} with encoder {encoder}: {one_line(error, limit=300)}") from None


def _aux_head(in_channels: int, channels: int, num_classes: int) -> nn.Sequential:
    """Build a head from a feature map (N,in_channels,h,w) to logits (N,num_classes,h,w)."""
    if in_channels < 1:  # SMP's placeholder for a scale that an encoder skips
        raise ValueError(
            f"aux_channels: found {channels}, but the encoder has no second-to-last feature map; set aux_channels to null"
        )
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(channels, num_classes, 1),
    )


def _recompute_blocks(encoder: nn.Module, name: str) -> None:
    """Make each block of an encoder store only its input for the backward pass.

    timm's ``set_grad_checkpointing`` would update the batch-norm statistics twice.
    """
    blocks = _find_blocks(encoder)
    if not blocks:
        raise ValueError(f"checkpointing: the encoder {name} is not made of blocks; set checkpointing to false")
    for block in blocks:
        # set on the instance, which keeps the names in the state_dict; a partial is copied and pickled with its block
        block.forward = functools.partial(_run_checkpointed, block)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _find_blocks(module: nn.Module) -> list[nn.Module]:
    """Find the blocks of a module: submodules made of layers that are neither containers nor stages of blocks."""
    blocks: list[nn.Module] = []
    for child in module.children():
        if not _has_layers(child):
            continue
        if isinstance(child, _CONTAINERS) or _has_repeated_blocks(child):
            blocks += _find_blocks(child)
        else:
            blocks.append(child)
    return blocks


def _has_layers(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


def _has_repeated_blocks(module: nn.Module) -> bool:
    for container in module.modules():
        if isinstance(container, _CONTAINERS):
            types = Counter(type(c) for c in container.children() if _has_layers(c) and not isinstance(c, _CONTAINERS))
            if any(count > 1 for count in types.values()):
                return True
    return False


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch.compile does not support context_fn
def _run_checkpointed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a block's forward and store only its arguments for the backward pass."""
    forward = functools.partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # DenseNet appends to the list of features that it passes to its layers; the second run needs the original list
    arguments = [list(value) if isinstance(value, list) else value for value in args]
    return checkpoint(
        forward,
        *arguments,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _preserve_statistics(block)),
        **kwargs,
    )


@contextlib.contextmanager
def _preserve_statistics(block: nn.Module) -> Iterator[None]:
    """Make norms in training mode update copies of their running statistics, and discard the copies."""
    norms = [module for module in block.modules() if module.training and getattr(module, "track_running_stats", False)]
    originals = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    try:
        for norm, buffers in zip(norms, originals, strict=True):
            # copies, not None: the second run must save as many tensors, of the same shapes, as the first
            for name, value in buffers.items():
                setattr(norm, name, value.clone())
        yield
    finally:
        for norm, buffers in zip(norms, originals, strict=True):
            for name, value in buffers.items():
                setattr(norm, name, value)
