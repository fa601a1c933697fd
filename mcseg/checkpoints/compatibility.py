"""Compare a checkpoint with a network; copy the weights of another run."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from mcseg.checkpoints.files import read_checkpoint, written_by

_NETWORK = "network."  # prefix of the network's tensors in a module's state


def check_num_classes(checkpoint: Mapping[str, Any], num_classes: int) -> None:
    """Raise ValueError if a checkpoint's network has another number of classes."""
    stored = checkpoint.get("hyper_parameters", {}).get("num_classes", num_classes)
    if stored != num_classes:
        raise ValueError(
            f"the checkpoint's network has {stored} classes, the data have {num_classes}; give the data that it was trained "
            "on, or start a new run from its weights with --model.init_from"
        )


def check_bands(checkpoint: Mapping[str, Any], in_channels: int) -> None:
    """Raise ValueError if a checkpoint's network takes images of another number of bands."""
    stored = checkpoint.get("hyper_parameters", {}).get("in_channels", 3)  # older versions had no other number
    if stored != in_channels:
        raise ValueError(
            f"the checkpoint's network takes images of {stored} bands, the data have {in_channels} (data.bands); set "
            f"data.bands to {stored}"
        )


def warn_of_other_classes(checkpoint: Mapping[str, Any], names: Sequence[str]) -> None:
    """Warn if the class names of a checkpoint and of the data differ; without names on either side, do nothing."""
    stored = list(checkpoint.get("class_names") or ())
    if stored and names and stored != list(names):
        there, here = next((a, b) for a, b in zip(stored, names, strict=True) if a != b)
        rank_zero_warn(
            f"the checkpoint was trained on other classes ({there} where the data have {here}); its class numbers are read "
            "as the data's classes in their order"
        )


def warn_of_other_split(checkpoint: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
    """Warn if the data's random split is drawn in another way than that of the checkpoint's training.

    Args:
        checkpoint: The checkpoint.
        own: Settings of the data's random split; None if the split is not random.
    """
    if own is None or not checkpoint.get("class_names"):
        return
    risk = "validation images may be among its training images, and scores too high"
    if "random_split" not in checkpoint:  # of an earlier version
        if own.get("draw") != "order":
            rank_zero_warn(
                f"the checkpoint does not contain its random split; {risk}; if it was trained on this folder by an earlier "
                "version, give --data.draw order"
            )
        return
    stored = checkpoint["random_split"] or {}
    if differing := [name for name, value in own.items() if stored and stored.get(name) != value]:
        found = ", ".join(f"{name} {own[name]}" for name in differing)
        there = ", ".join(f"{name} {stored.get(name)}" for name in differing)
        rank_zero_warn(f"the checkpoint was trained with the random split {there}, the data have {found}; {risk}")


def check_network(checkpoint: Mapping[str, Any], state: Mapping[str, Tensor], removed: Collection[str] = ()) -> None:
    """Raise ValueError if the network tensors of a checkpoint and of a module's ``state`` differ in name or shape.

    Tensors named in ``removed`` (`mcseg.networks.SegmentationNetwork.removed`) may be in the checkpoint.
    """
    stored, own = _network_tensors(checkpoint.get("state_dict", {}), removed), _network_tensors(state)
    differ = _differing(stored, own)
    if stored and differ:
        raise ValueError(
            f"the checkpoint contains another network ({len(differ)} tensors differ, for example {_NETWORK}{differ[0]}; "
            f"{written_by(checkpoint)}); expected one of the same arch, encoder and network_options"
        )


def drop_removed_parameters(checkpoint: Mapping[str, Any], network: Any) -> None:
    """Remove the parameters that a network no longer has from a checkpoint's optimisers, which number all parameters.

    Optimisers with other parameters than those of the network are left as they are.

    Args:
        checkpoint: Modified.
        network: The `mcseg.networks.SegmentationNetwork` that loads the checkpoint.
    """
    removed = {name for name, is_parameter in network.removed.items() if is_parameter}
    own = {name for name, _ in network.named_parameters()}
    stored = [name for name in _network_tensors(checkpoint.get("state_dict", {})) if name in own | removed]
    if not removed.intersection(stored):
        return
    kept = [number for number, name in enumerate(stored) if name in own]
    for optimizer in checkpoint.get("optimizer_states", ()):
        groups, state = optimizer["param_groups"], optimizer["state"]
        if len(groups) == 1 and len(groups[0]["params"]) == len(stored):
            old = [groups[0]["params"][number] for number in kept]
            groups[0]["params"] = list(range(len(kept)))
            optimizer["state"] = {new: state[number] for new, number in enumerate(old) if number in state}


def load_initial_weights(network: Any, init_from: str | None, encoder_weights: str | None) -> None:
    """Load the weights that a run starts from, if it names any.

    Args:
        network: The network of a `mcseg.module.SegmentationModule`; modified.
        init_from: Checkpoint of another run, see `initialize_network`.
        encoder_weights: Pretrained weights of the encoder; not used with ``init_from``.
    """
    if init_from:
        initialize_network(network, init_from)
    elif encoder_weights:
        network.load_pretrained_encoder(encoder_weights)


def initialize_network(network: Any, path: str) -> None:
    """Copy the network of another run's checkpoint into ``network``.

    A last layer that is missing from the file, or has another shape, keeps its fresh initialisation, as does an auxiliary
    head.

    Args:
        network: A `mcseg.networks.SegmentationNetwork`; modified.
        path: The checkpoint.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The file is not a checkpoint, or one of another network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"model.init_from: no checkpoint {path}; expected the path of a .ckpt file")
    stored, own = _network_tensors(read_checkpoint(path)["state_dict"], network.removed), network.state_dict()
    differ = _differing(stored, own)
    unequal = [name for name in differ if "aux_head" not in name and ("segmentation_head" not in name or name not in own)]
    if unequal:
        raise ValueError(
            f"model.init_from: {path} contains another network ({len(unequal)} tensors differ, for example {unequal[0]}); "
            "expected one of the same arch, encoder and network_options"
        )
    equal = {name: value for name, value in stored.items() if name in own and name not in differ}
    network.load_state_dict(equal, strict=False)
    other_head = any("segmentation_head" in name for name in differ)
    head = "; its last layer is skipped, because the number of classes differs" if other_head else ""
    rank_zero_info(f"network initialised from {path}{head}")


def _network_tensors(state: Mapping[str, Tensor], removed: Collection[str] = ()) -> dict[str, Tensor]:
    tensors = {name.removeprefix(_NETWORK): value for name, value in state.items() if name.startswith(_NETWORK)}
    return {name: value for name, value in tensors.items() if name not in removed}


def _differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that only one of two states has, or that differ in shape, sorted."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or one[name].shape != other[name].shape
    )
