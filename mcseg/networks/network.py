"""Networks by name, from segmentation_models_pytorch (SMP) or COPLE-Net, with normalisation and padding inside."""

import functools
import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcseg.messages import one_line
from mcseg.networks.coplenet import COPLENet
from mcseg.networks.probe import Sizes, accepted_sizes, native_sizes, probe, remove_unused, second_to_last
from mcseg.networks.recompute import recompute_blocks


class SegmentationNetwork(nn.Module):
    """Network from images of any size to logits of that size, either an SMP architecture or COPLE-Net.

    SMP is segmentation_models_pytorch.

    Normalisation and padding are part of the network, so that they always match its weights. Images are scaled to [0, 1],
    normalised with the mean and standard deviation of each band (the encoder's for RGB), and padded at the right and bottom
    to a multiple of the output stride. The logits of the padding are cropped. Padding is part of a traced or exported
    network as well.

    Parts of the architecture that the logits do not use, for example the last stages of an encoder whose decoder starts
    earlier, are not part of the network; old weights with them still load. A transformer that takes a single image size is
    built to take any size where timm can.

    Args:
        arch: SMP architecture, for example ``unet``, ``deeplabv3plus``, ``segformer``; or ``coplenet`` for
            :class:`~mcseg.networks.COPLENet`.
        encoder: SMP or timm (``tu-...``) encoder; not used by COPLE-Net.
        num_classes: number of classes C.
        in_channels: number of bands of the images, B. Other than 3, set their mean and standard deviation with
            :meth:`set_normalization`; pretrained weights of the first convolution are adapted as SMP does.
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

    Attributes:
        removed: name of each tensor that the architecture has and this network does not, because its output does not depend
            on it -> whether it is a parameter.

    Raises:
        ValueError: the architecture, the encoder or an option is unknown, an option belongs to another argument, they do not
            fit together, or the encoder has no blocks to checkpoint or no feature map for the auxiliary head; the message is
            one line.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        arch: str,
        encoder: str,
        num_classes: int,
        *,
        in_channels: int = 3,
        options: dict[str, Any] | None = None,
        channels_last: bool = True,
        checkpointing: bool = False,
        frozen_batch_norm: bool = False,
        aux_channels: int | None = None,
    ) -> None:
        super().__init__()
        _check_options(options or {})
        options = {**(options or {}), "in_channels": in_channels}
        self.arch = arch.lower()
        self._encoder, self._options = encoder, options
        with torch.inference_mode(mode=False), torch.enable_grad():
            self.model, self._sizes = _build_for_any_size(arch, encoder, num_classes, options)
            run = functools.partial(probe, self.model.eval(), with_aux=aux_channels is not None, bands=in_channels)
            # the forward methods upsample instead of the model; None if the logits have the size of the image
            self._align_corners = _remove_upsampling(self.model)
            if self._align_corners is None and run(*self._sizes.minimum)[0].shape[-2:] != self._sizes.minimum:
                self._align_corners = True  # as SMP's heads upsample
            self.removed = {
                f"model.{name}": is_parameter
                for name, is_parameter in remove_unused(self.model, run, self._sizes.minimum).items()
            }
            self.model.train()
        self.register_load_state_dict_pre_hook(_ignore_removed)  # type: ignore[no-untyped-call]
        self.channels_last = channels_last
        self.frozen_batch_norm = frozen_batch_norm
        self._is_compiled = False
        self._handles_single_values = False
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
            recompute_blocks(self.model.encoder, encoder)
        if frozen_batch_norm:
            for norm in self._batch_norms():
                for parameter in norm.parameters(recurse=False):
                    parameter.requires_grad_(False)
            self.train()
        # those of ImageNet, until pretrained weights replace them; buffers, because they belong to the weights
        mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if in_channels == 3 else ([0.5], [0.25])
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1).repeat(1, in_channels // len(mean), 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1).repeat(1, in_channels // len(std), 1, 1))

    @property
    def output_stride(self) -> int:
        """Number of pixels; height and width are padded to multiples of it."""
        return self._sizes.step[0]

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits.

        Args:
            image: (N,B,H,W), RGB for 3 bands: uint8 0..255, or floating point 0..1.

        Returns:
            (N,C,H,W) logits.
        """
        logits, upsampling = self.forward_coarse(image)
        return logits if upsampling is None else _upsample(logits, upsampling, image.shape[-2:])

    def forward_coarse(self, image: Tensor) -> tuple[Tensor, tuple[int, int, bool] | None]:
        """Compute logits without the final upsampling.

        Args:
            image: (N,B,H,W), RGB for 3 bands: uint8 0..255, or floating point 0..1.

        Returns:
            (N,C,h,w) logits, and height, width and align_corners of the final bilinear upsampling; :meth:`forward` returns
            its first H rows and W columns. The second value is None if the network does not end in an upsampling; the
            logits are (N,C,H,W) then.

        Raises:
            ValueError: the network takes images of one size, and an image is larger.
        """
        prepared = self._prepare(image)
        if self.training and len(image) == 1 and not self._handles_single_values:
            self._handle_single_values()
        logits = self._run(prepared)
        if self._align_corners is None:
            return _crop(logits, image.shape[-2:]), None
        return logits, (prepared.shape[-2], prepared.shape[-1], self._align_corners)

    def forward_with_aux(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute logits and, in training mode, those of the auxiliary head in the same pass of the encoder.

        Args:
            image: (N,B,H,W), RGB for 3 bands: uint8 0..255, or floating point 0..1.

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
        feature, self._feature = cast(Tensor, self._feature), None
        padded = (*self._sizes.padded(*image.shape[-2:]), False)
        return logits, _upsample(self.aux_head(feature), padded, image.shape[-2:])

    def _keep_feature(self, encoder: nn.Module, images: tuple[Tensor], outputs: Sequence[Any]) -> None:
        if self.training:
            self._feature = second_to_last(outputs)

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

    def _handle_single_values(self) -> None:
        """Make batch norms use their running statistics where a batch of one image has one value per channel.

        PyTorch refuses it. Batch norms after a global pooling always have it, for example those of DeepLab.
        """
        self._handles_single_values = True
        for norm in self._batch_norms():
            if not isinstance(norm, nn.SyncBatchNorm):  # it has the values of all processes
                norm.register_forward_pre_hook(_begin_single_value)
                norm.register_forward_hook(_end_single_value)

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, _BATCH_NORMS)]

    def _prepare(self, image: Tensor) -> Tensor:
        """Scale, normalise and pad images."""
        if not image.is_floating_point():
            image = image.to(self.mean.dtype) / 255
        image = (image - self.mean) / self.std
        height, width = image.shape[-2:]
        rows, columns = self._sizes.padded(height, width)
        # a traced network pads images of other sizes than the example's as well; otherwise padding by 0 would be a copy
        if _is_traced() or (rows, columns) != (height, width):
            image = F.pad(image, (0, columns - width, 0, rows - height), mode="replicate")
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image

    def set_normalization(self, mean: Tensor, std: Tensor) -> None:
        """Set the mean and standard deviation, (B,) each, of the bands of images in [0, 1]."""
        self.mean.copy_(mean.view(1, -1, 1, 1))
        self.std.copy_(std.clamp(min=1e-3).view(1, -1, 1, 1))  # a constant band would be divided by 0

    def load_pretrained_encoder(self, weights: str) -> None:
        """Load pretrained encoder weights and, for 3 bands, the mean and standard deviation of their training.

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
        removed = {name.removeprefix("model.encoder.") for name in self.removed}
        weights_left = {name: value for name, value in source.encoder.state_dict().items() if name not in removed}
        self.model.encoder.load_state_dict(weights_left)
        high = (preprocessing["input_range"] or [0, 1])[1]  # some encoders are trained on 0..255
        if self.mean.shape[1] == 3:
            self.mean.copy_(torch.tensor(preprocessing["mean"]).view(1, 3, 1, 1) / high)
            self.std.copy_(torch.tensor(preprocessing["std"]).view(1, 3, 1, 1) / high)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _is_traced() -> bool:
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return bool(tracing or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export())


def _ignore_removed(network: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Ignore weights of older checkpoints for the parts that are not in the network."""
    for name in network.removed:  # type: ignore[union-attr]
        state.pop(prefix + name, None)


def _begin_single_value(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    if norm.training and args[0].numel() == args[0].shape[1]:
        norm.eval()
        norm.had_single_value = True  # type: ignore[assignment]
        warnings.warn(
            "a training batch of one image: batch norms with one value per channel use their running statistics; use more "
            "images per process (data.batch_size), or model.frozen_batch_norm",
            stacklevel=2,
        )


def _end_single_value(norm: nn.Module, args: Any, output: Any) -> None:
    if getattr(norm, "had_single_value", False):
        norm.had_single_value = False  # type: ignore[assignment]
        norm.train()


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
    return _crop(full, size)


def _crop(logits: Tensor, size: torch.Size) -> Tensor:
    """Return the first rows and columns, ``size`` (H,W), of logits (N,C,h,w)."""
    if not _is_traced():
        return logits[..., : size[0], : size[1]]
    # torch.export would fix whether a slice is the whole tensor
    for axis in (-2, -1):
        logits = logits.index_select(axis, torch.arange(size[axis], device=logits.device))
    return logits


# Arguments of SMP and timm that other arguments of the network give -> those
_GIVEN = {
    "arch": "arch",
    "encoder_name": "encoder",
    "encoder_weights": "encoder_weights",
    "pretrained": "encoder_weights",
    "in_channels": "the bands of the data (data.bands)",
    "in_chans": "the bands of the data (data.bands)",
    "classes": "num_classes",
    "num_classes": "num_classes",
}


def _check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for options that other arguments give, or with which the output is not logits."""
    for name in options:
        if name in _GIVEN:
            raise ValueError(f"network_options: found {name}, which is given by {_GIVEN[name]}; remove it")
    if options.get("activation") not in (None, "identity"):
        raise ValueError(
            f"network_options: found activation {options['activation']}, expected none: objectives and scores take logits; "
            "remove it"
        )
    if options.get("aux_params") is not None:
        raise ValueError(
            "network_options: found aux_params, a head that classifies whole images, which nothing trains; remove it "
            "(aux_weight gives an auxiliary head that segments)"
        )


# Options with which timm builds a transformer for any image size
_ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False})


def _build_for_any_size(arch: str, encoder: str, num_classes: int, options: dict[str, Any] | None) -> tuple[Any, Sizes]:
    """Build a model that takes any image size, if there is one; arguments as for :class:`SegmentationNetwork`."""
    model = _build(arch, encoder, num_classes, None, options)
    bands = (options or {}).get("in_channels", 3)
    run = functools.partial(probe, model.eval(), bands=bands)
    if sizes := accepted_sizes(run, _stride(model, arch)):
        return model, sizes
    for more in _ANY_SIZE:
        try:
            other = _build(arch, encoder, num_classes, None, {**more, **(options or {})})
        except ValueError:  # an option of other encoders
            continue
        if sizes := accepted_sizes(functools.partial(probe, other.eval(), bands=bands), _stride(other, arch)):
            return other, sizes
    try:
        return model, native_sizes(model, run)
    except ValueError as error:
        raise ValueError(
            f"network {arch} with encoder {encoder}: they do not fit together ({error}); choose another encoder or other "
            "network_options"
        ) from None


def _stride(model: Any, arch: str) -> int:
    """Return the number of pixels that must divide height and width of an image for SMP."""
    stride = int(model.encoder.output_stride)
    if arch.lower() != "dpt":
        return stride
    if stride & (stride - 1):
        raise ValueError(
            f"network dpt: found an encoder with patches of {stride} pixels, expected a power of two, as dpt computes 1/4, "
            "1/8, 1/16 and 1/32 of the image; choose another encoder, for example one with patch16 in its name"
        )
    # DPT halves the grid of patches once more; its coarsest scale is 1/4 for depth 1, 1/8 for depth 2, ...
    return math.lcm(2 * stride, 2 ** (len(model.encoder.out_channels) + 1))


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
