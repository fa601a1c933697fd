"""Networks: any image size, parts without use, export, options, checkpointing, batch norms, auxiliary head, COPLE-Net."""

import copy
import pickle
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from mcseg.checkpoints.compatibility import initialize_network
from mcseg.module import SegmentationModule
from mcseg.networks import SegmentationNetwork
from mcseg.networks import network as networks
from mcseg.networks.probe import remove_unused

ENCODER = "tu-test_resnet.r160_in1k"


def smp_model(network, arch, encoder):
    """Build SMP's model, which includes the upsampling, with the weights of the network."""
    import segmentation_models_pytorch as smp

    model = smp.create_model(arch, encoder, encoder_weights=None, classes=network.model.segmentation_head[0].out_channels)
    removed = {f"model.{name}" for name in model.load_state_dict(network.model.state_dict(), strict=False).missing_keys}
    assert removed == set(network.removed)
    return model.eval()


@pytest.mark.parametrize("arch", ["unet", "fpn", "deeplabv3", "deeplabv3plus", "pspnet", "upernet", "segformer"])
def test_logits_equal_those_of_smp(arch):
    encoder = "resnet18" if arch.startswith("deeplab") else ENCODER
    network = SegmentationNetwork(arch, encoder, 4, channels_last=False).eval()
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = smp_model(network, arch, encoder)((image - network.mean) / network.std)
        torch.testing.assert_close(network(image), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arch",
    [
        "unet",
        "unetplusplus",
        "manet",
        "linknet",
        "fpn",
        "pspnet",
        "deeplabv3",
        "deeplabv3plus",
        "pan",
        "upernet",
        "segformer",
    ],
)
def test_every_architecture_takes_any_size(arch):
    network = SegmentationNetwork(arch, "resnet18" if arch in ("deeplabv3", "deeplabv3plus", "pan") else ENCODER, 5).eval()
    height, width = (131, 150) if arch == "pan" else (49, 70)  # PAN's pyramid needs a feature map of 8x8
    with torch.no_grad():
        logits = network(torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8))
    assert logits.shape == (1, 5, height, width)
    assert logits.isfinite().all()


def test_dpt_takes_any_size():
    network = SegmentationNetwork("dpt", "tu-test_vit.r160_in1k", 3, options={"dynamic_img_size": True}).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 50, 70)).shape == (1, 3, 50, 70)


def whole_network(monkeypatch, *arguments, **options):
    """Build the network with the parts that its output does not use, as versions before did."""
    with monkeypatch.context() as patch:
        patch.setattr(networks, "remove_unused", lambda *args: {})
        torch.manual_seed(11)
        return SegmentationNetwork(*arguments, **options)


EVERY = {
    "unet": "efficientnet-b0",
    "unetplusplus": "tu-test_byobnet.r160_in1k",
    "manet": "timm-skresnet18",
    "linknet": "timm-efficientnet-b0",
    "fpn": "mobilenet_v2",
    "pspnet": "resnet18",
    "deeplabv3": "resnet18",
    "deeplabv3plus": ENCODER,
    "pan": "dpn68",
    "upernet": "tu-test_convnext.r160_in1k",
    "segformer": "mit_b0",
    "dpt": "tu-test_vit.r160_in1k",
    "coplenet": "",
}
FAMILIES = [
    "densenet121",
    "efficientnet-b0",
    "xception",
    "mobilenet_v2",
    "mit_b0",
    "dpn68",
    "timm-regnetx_002",
    "tu-hrnet_w18_small",
]


def test_every_architecture_of_smp_is_covered():
    import segmentation_models_pytorch as smp

    assert EVERY.keys() == smp.MODEL_ARCHITECTURES_MAPPING.keys() | {"coplenet"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`timm-` encoders are deprecated")
@pytest.mark.parametrize(("arch", "encoder"), [*EVERY.items(), *(("pspnet", encoder) for encoder in FAMILIES)])
def test_every_parameter_is_trained_and_the_logits_do_not_change(arch, encoder, monkeypatch):
    whole = whole_network(monkeypatch, arch, encoder, 3)
    before = torch.get_rng_state()
    torch.manual_seed(11)
    network = SegmentationNetwork(arch, encoder, 3)
    torch.set_rng_state(before)
    own, old = network.state_dict(), whole.state_dict()
    assert old.keys() - own.keys() == set(network.removed)
    assert all(torch.equal(value, old[name]) for name, value in own.items())  # neither weights nor statistics
    image = torch.rand(2, 3, 67, 90)
    with torch.no_grad():
        expected = whole.eval()(image)
        assert torch.equal(network.eval()(image), expected)
    network.train()(image).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None] == []
    again = SegmentationNetwork(arch, encoder, 3).eval()
    again.load_state_dict(old)  # a checkpoint of before
    with torch.no_grad():
        assert torch.equal(again(image), expected)


@pytest.mark.parametrize(
    ("arch", "encoder", "options", "share"),
    [
        ("pspnet", "resnet18", None, 0.2),
        ("unet", "resnet18", {"encoder_depth": 4, "decoder_channels": [64, 48, 32, 16]}, 0.4),
        ("fpn", "resnet18", {"encoder_depth": 4}, 0.4),
        ("pspnet", "mobilenet_v2", None, 0.6),  # SMP computes one more stage than its decoder gets
    ],
)
def test_unused_stages_are_removed(arch, encoder, options, share, monkeypatch):
    whole = whole_network(monkeypatch, arch, encoder, 3, options=options)
    network = SegmentationNetwork(arch, encoder, 3, options=options)
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in (network, whole)]
    assert sizes[0] < share * sizes[1]
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert sum(network.removed.values()) == len(list(whole.parameters())) - len(list(network.parameters()))
    called = []
    for name, module in network.named_modules():
        if not list(module.children()) and type(module).__name__ != "Unused":
            module.register_forward_hook(lambda *args, name=name: called.append(name))
    network(torch.rand(2, 3, 64, 64))
    last = {"resnet18": "encoder.layer4", "mobilenet_v2": "encoder.features.7"}[encoder]
    assert not any(last in name for name in called)


def test_parts_that_change_the_logits_stay_and_are_not_trained():
    class Detached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.conv = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)
            self.spare = torch.nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x * self.gate(x).detach())

    model = Detached()
    image = torch.rand(1, 3, 8, 8)
    removed = remove_unused(model, lambda height, width: [model(image)], (8, 8))
    assert removed == {"spare.weight": True, "spare.bias": True}
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "gate.weight",
        "gate.bias",
    ]


@pytest.mark.parametrize("with_aux", [False, True])
def test_an_auxiliary_head_keeps_what_it_uses(with_aux, monkeypatch):
    """Give the second-to-last feature map a layer of its own, as encoders with a norm for each map have."""
    build = networks._build

    def with_norm(*arguments):
        model = build(*arguments)
        encoder, forward = model.encoder, model.encoder.forward
        encoder.norm = torch.nn.BatchNorm2d(encoder.out_channels[-2])
        encoder.forward = lambda x: [*(maps := forward(x))[:-2], encoder.norm(maps[-2]), maps[-1]]
        return model

    monkeypatch.setattr(networks, "_build", with_norm)
    network = SegmentationNetwork("pspnet", "resnet18", 3, aux_channels=8 if with_aux else None)
    assert ("model.encoder.norm.weight" in network.removed) == (not with_aux)
    assert "model.encoder.layer4.0.conv1.weight" in network.removed
    network.train()
    outputs = network.forward_with_aux(torch.rand(2, 3, 64, 64)) if with_aux else [network(torch.rand(2, 3, 64, 64))]
    sum(output.mean() for output in outputs).backward()
    assert [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None] == []


def test_dpt_has_an_auxiliary_head():
    network = SegmentationNetwork("dpt", "tu-test_vit.r160_in1k", 3, aux_channels=8).train()
    logits, aux = network.forward_with_aux(torch.rand(2, 3, 50, 70))
    assert logits.shape == aux.shape == (2, 3, 50, 70)


def test_networks_can_be_built_in_inference_mode():
    with torch.inference_mode():
        network = SegmentationNetwork("pspnet", "resnet18", 3)
        assert network.eval()(torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16)
    assert network.removed


def old_checkpoint(path, monkeypatch):
    """Train a step of a network with unused parts, and write its checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(networks, "remove_unused", lambda *args: {})
        module = SegmentationModule("pspnet", "resnet18", num_classes=3)
    names = [name for name, _ in module.network.named_parameters()]
    run = pl.Trainer(logger=False, accelerator="cpu", barebones=True)
    run.strategy.connect(module)
    run.strategy.optimizers = [torch.optim.AdamW(module.network.parameters())]
    module.network(torch.rand(2, 3, 16, 16)).square().mean().backward()
    run.strategy.optimizers[0].step()
    run.save_checkpoint(path)
    state = run.strategy.optimizers[0].state
    moments = {name: state[value]["exp_avg"] for name, value in module.network.named_parameters() if value in state}
    return module, names, moments


def test_checkpoints_with_unused_parts_load(tmp_path, monkeypatch):
    old, names, moments = old_checkpoint(tmp_path / "old.ckpt", monkeypatch)
    module = SegmentationModule.load_from_checkpoint(tmp_path / "old.ckpt").eval()
    assert len(list(module.network.parameters())) < len(names)
    image = torch.rand(1, 3, 20, 20)
    with torch.no_grad():
        assert torch.equal(module(image), old.eval()(image))
    started = SegmentationModule("pspnet", "resnet18", num_classes=3).eval()
    initialize_network(started.network, str(tmp_path / "old.ckpt"))
    with torch.no_grad():
        assert torch.equal(started(image), old(image))
    # the moments of an optimiser are numbered by all parameters of the old network
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    module.on_load_checkpoint(checkpoint)
    optimizer = torch.optim.AdamW(module.network.parameters())
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    for name, parameter in module.network.named_parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[name]), name


def test_only_removed_weights_are_ignored(tmp_path, monkeypatch):
    old_checkpoint(tmp_path / "old.ckpt", monkeypatch)
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    checkpoint["state_dict"]["network.model.encoder.layer5.weight"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(
        ValueError, match="another network .1 tensors differ, for example network.model.encoder.layer5.weight"
    ):
        SegmentationModule.load_from_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="another network .1 tensors differ, for example model.encoder.layer5.weight"):
        initialize_network(SegmentationNetwork("pspnet", "resnet18", 3), str(tmp_path / "other.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "encoder"), [("unet", ENCODER), ("coplenet", "")])
def test_traced_and_exported_networks_pad_as_the_network_does(arch, encoder):
    torch.manual_seed(12)
    options = {"feature_channels": [8, 16, 32, 64, 128]} if arch == "coplenet" else None
    network = SegmentationNetwork(arch, encoder, 3, options=options).eval()
    free = torch.export.Dim.DYNAMIC
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns about each size that is read
        traced = torch.jit.trace(network, torch.rand(1, 3, 64, 96))
        exported = torch.export.export(network, (torch.rand(2, 3, 70, 90),), dynamic_shapes=({0: free, 2: free, 3: free},))
        for size in [(2, 3, 70, 91), (1, 3, 101, 64), (2, 3, 96, 128)]:
            image = torch.rand(size)
            torch.testing.assert_close(traced(image), network(image))
            torch.testing.assert_close(exported.module()(image), network(image))


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_pads_as_the_network_does(dynamo, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    network = SegmentationNetwork("unet", ENCODER, 3).eval()
    axes = {"image": {2: "height", 3: "width"}}
    free = torch.export.Dim.DYNAMIC
    shapes = (
        {"dynamic_shapes": {"image": {2: free, 3: free}}} if dynamo else {"dynamic_axes": {**axes, "logits": axes["image"]}}
    )
    names = {"input_names": ["image"], "output_names": ["logits"]}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.rand(1, 3, 64, 96),), tmp_path / "n.onnx", dynamo=dynamo, verbose=False, **names, **shapes
        )
        image = torch.rand(1, 3, 70, 91)
        (found,) = runtime.InferenceSession(tmp_path / "n.onnx").run(None, {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), network(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 5}, "network_options: found classes, which is given by num_classes; remove it"),
        ({"encoder_name": "resnet50"}, "network_options: found encoder_name, which is given by encoder; remove it"),
        ({"encoder_weights": "imagenet"}, "found encoder_weights, which is given by encoder_weights; remove it"),
        ({"in_channels": 4}, r"found in_channels, which is given by the bands of the data \(data.bands\); remove it"),
        ({"activation": "softmax"}, "found activation softmax, expected none: objectives and scores take logits"),
        ({"aux_params": {"classes": 2}}, "found aux_params, a head that classifies whole images"),
        ({"encoder_depth": 9}, "network unet with encoder .* depth should be in range"),
    ],
)
def test_options_that_collide_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        SegmentationNetwork("unet", ENCODER, 3, options=options)
    assert "\n" not in str(error.value)


def test_logits_have_the_size_of_the_image_whatever_the_options():
    for options in ({"upsampling": 1}, {"encoder_depth": 4}, {"encoder_depth": 2, "upsampling": 2}):
        network = SegmentationNetwork("pspnet", ENCODER, 3, options=options).eval()
        with torch.no_grad():
            assert network(torch.rand(1, 3, 37, 50)).shape == (1, 3, 37, 50)
            coarse, upsampling = network.forward_coarse(torch.rand(1, 3, 64, 64))
        assert coarse.shape[-1] < 64
        assert upsampling == (64, 64, True)


def test_small_images_are_padded_to_what_the_network_needs():
    network = SegmentationNetwork("pan", ENCODER, 3).eval()
    image = torch.rand(1, 3, 20, 150)
    with torch.no_grad():
        padded = torch.nn.functional.pad(image, (0, 10, 0, 108), mode="replicate")  # 128x160
        torch.testing.assert_close(network(image), network(padded)[..., :20, :150])


@pytest.mark.parametrize(
    ("arch", "encoder", "options"),
    [
        ("dpt", "tu-test_vit3.r160_in1k", None),
        ("unet", "tu-swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1], "embed_dim": 24}),
    ],
)
def test_transformers_of_one_size_are_built_for_any_size(arch, encoder, options):
    network = SegmentationNetwork(arch, encoder, 3, options=options).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, 50, 70)).shape == (1, 3, 50, 70)


def test_a_transformer_that_stays_at_one_size_says_which():
    options = {"dynamic_img_size": False}
    network = SegmentationNetwork("dpt", "tu-test_vit3.r160_in1k", 3, options=options).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, 100, 160)).shape == (1, 3, 100, 160)
        with pytest.raises(ValueError, match="image of 161x90 pixels, but the encoder takes at most 160x160; set .*160,160"):
            network(torch.rand(1, 3, 161, 90))


def test_patches_that_dpt_cannot_scale_are_refused():
    with pytest.raises(ValueError, match="found an encoder with patches of 10 pixels, expected a power of two"):
        SegmentationNetwork("dpt", "tu-test_vit.r160_in1k", 3, options={"patch_size": 10})


@pytest.mark.parametrize(("arch", "size"), [("deeplabv3plus", 64), ("unet", 32), ("pspnet", 32), ("upernet", 64)])
def test_a_batch_of_one_image_trains(arch, size):
    network = SegmentationNetwork(arch, "resnet18", 3).train()
    pooled = {
        "deeplabv3plus": "decoder.aspp.0.convs.4.2",
        "unet": "encoder.layer4.1.bn2",
        "upernet": "decoder.psp.blocks.0.1.1",
    }.get(arch)
    if pooled:
        norm = network.model.get_submodule(pooled)
        norm.running_mean.fill_(0.5)
        with pytest.warns(UserWarning, match="batch of one image: batch norms with one value per channel use their running"):
            network(torch.rand(1, 3, size, size)).mean().backward()
        assert (norm.running_mean == 0.5).all()
    else:
        network(torch.rand(1, 3, size, size)).mean().backward()
    assert all(module.training for module in network.modules())
    network(torch.rand(2, 3, size, size)).mean().backward()
    assert not pooled or not (norm.running_mean == 0.5).any()


def test_integer_and_float_images_give_the_same_logits():
    network = SegmentationNetwork("unet", ENCODER, 3).eval()
    image = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(network(image), network(image / 255))


def test_images_are_normalised(monkeypatch):
    network = SegmentationNetwork("unet", ENCODER, 3).eval()
    seen = []
    network.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        network(torch.full((1, 3, 32, 32), 128, dtype=torch.uint8))
    expected = [(128 / 255 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    torch.testing.assert_close(seen[0][0, :, 5, 5], torch.tensor(expected))


def test_padding_is_cropped():
    network = SegmentationNetwork("fpn", ENCODER, 3).eval()
    seen = []
    network.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2:]))
    image = torch.rand(1, 3, 33, 64)
    with torch.no_grad():
        logits = network(image)
        direct = smp_model(network, "fpn", ENCODER)(
            ((torch.nn.functional.pad(image, (0, 0, 0, 31), mode="replicate")) - network.mean) / network.std
        )
    assert seen[0] == (64, 64)
    torch.testing.assert_close(logits, direct[..., :33, :64])


def test_channels_last_does_not_change_the_logits():
    torch.manual_seed(3)
    first = SegmentationNetwork("unet", ENCODER, 3, channels_last=True).eval()
    second = SegmentationNetwork("unet", ENCODER, 3, channels_last=False).eval()
    second.load_state_dict(first.state_dict())
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(first(image), second(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unett", ENCODER, None), "network unett with encoder .*unetplusplus"),
        (("unet", "resnet19", None), "network unet with encoder resnet19: .*resnet34"),
        (("unet", ENCODER, {"decoder_chanels": [1]}), "decoder_chanels"),
    ],
)
def test_errors_for_unknown_names_are_one_line(arguments, message):
    arch, encoder, options = arguments
    with pytest.raises(ValueError, match=message) as error:
        SegmentationNetwork(arch, encoder, 3, options=options)
    assert "\n" not in str(error.value)


def test_unavailable_pretrained_weights_are_refused(monkeypatch):
    network = SegmentationNetwork("unet", "resnet18", 3)
    with pytest.raises(ValueError, match="encoder_weights: imagenet for resnet18 .* set encoder_weights to null"):
        network.load_pretrained_encoder("imagenet")


def test_pretrained_weights_set_the_normalisation(monkeypatch):
    """Replace the download, and check the copied weights and normalisation."""
    import segmentation_models_pytorch as smp
    from segmentation_models_pytorch import encoders

    create = smp.create_model

    def pretrained(arch, encoder, encoder_weights=None, **options):
        model = create(arch, encoder, encoder_weights=None, **options)
        if encoder_weights:
            torch.nn.init.constant_(next(model.encoder.parameters()), 0.25)
        return model

    monkeypatch.setattr(smp, "create_model", pretrained)
    monkeypatch.setattr(
        encoders,
        "get_preprocessing_params",
        lambda name, pretrained: {"input_range": [0, 255], "mean": [51, 102, 153], "std": [51, 51, 51]},
    )
    network = SegmentationNetwork("unet", "resnet18", 3)
    assert not (next(network.model.encoder.parameters()) == 0.25).all()
    network.load_pretrained_encoder("imagenet")
    assert (next(network.model.encoder.parameters()) == 0.25).all()
    torch.testing.assert_close(network.mean.flatten(), torch.tensor([0.2, 0.4, 0.6]))
    torch.testing.assert_close(network.std.flatten(), torch.tensor([0.2, 0.2, 0.2]))


def pair(encoder, arch="unet", dtype=torch.float64, **options):
    """Build the same network without and with checkpointing, in training mode."""
    networks = []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        networks.append(SegmentationNetwork(arch, encoder, 3, checkpointing=checkpointing, **options).to(dtype).train())
    return networks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "arch"),
    [
        (ENCODER, "unet"),
        ("resnet18", "unet"),
        ("resnet18", "deeplabv3plus"),
        ("densenet121", "unet"),  # passes lists from layer to layer
        ("mit_b0", "segformer"),
        ("tu-test_efficientnet.r160_in1k", "unet"),
        ("any", "coplenet"),  # dropout: the second run must draw the same numbers
    ],
)
def test_checkpointing_changes_neither_gradients_nor_statistics(encoder, arch):
    plain, checkpointed = pair(encoder, arch)
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    results = []
    for network in (plain, checkpointed):
        torch.manual_seed(6)
        logits = network(image)
        logits.square().mean().backward()
        results.append(logits.detach())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    for (name, one), two in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-7, atol=1e-12, msg=name)
    for (name, one), two in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-12, atol=0, msg=name)


def saved_bytes(network, image):
    """Count the bytes that autograd saves in a forward pass, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(image)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize(("arch", "share"), [("unet", 0.65), ("deeplabv3plus", 0.55)])
def test_checkpointing_saves_memory(arch, share):
    plain, checkpointed = pair("resnet50", arch, torch.float32)
    image = torch.rand(2, 3, 64, 64)
    assert saved_bytes(checkpointed, image) < share * saved_bytes(plain, image)


def test_a_copy_of_a_checkpointed_network_is_independent():
    network = pair("resnet18", dtype=torch.float32)[1]
    image = torch.rand(2, 3, 32, 32)
    for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert saved_bytes(again, image) == saved_bytes(network, image)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1)
        again(image).mean().backward()
        assert all(parameter.grad is None for parameter in network.parameters())
        assert again.model.encoder.layer1[0].conv1.weight.grad.abs().sum() > 0


def test_an_encoder_without_blocks_cannot_be_checkpointed():
    with pytest.raises(ValueError, match="checkpointing: the encoder vgg11 is not made of blocks"):
        SegmentationNetwork("unet", "vgg11", 3, checkpointing=True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_batch_norms_keep_statistics_and_parameters(checkpointing):
    torch.manual_seed(7)
    network = SegmentationNetwork("deeplabv3plus", "resnet18", 3, checkpointing=checkpointing, frozen_batch_norm=True)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert network.training
    assert not any(norm.training for norm in network.eval().train().modules() if isinstance(norm, torch.nn.BatchNorm2d))
    before = [{name: value.clone() for name, value in norm.state_dict().items()} for norm in norms]
    weight = network.model.encoder.conv1.weight.clone()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    # one image: batch norms in training mode would need two after ASPP's pooling
    network(torch.rand(1, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    for norm, kept in zip(norms, before, strict=True):
        for name, value in norm.state_dict().items():
            assert torch.equal(value, kept[name]), name
    assert not torch.equal(network.model.encoder.conv1.weight, weight)


def test_batch_norms_are_not_frozen_by_default():
    network = SegmentationNetwork("unet", "resnet18", 3).train()
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("arch", "encoder"), [("deeplabv3plus", "resnet18"), ("coplenet", "any")])
def test_auxiliary_head(arch, encoder):
    torch.manual_seed(8)
    network = SegmentationNetwork(arch, encoder, 3, aux_channels=16, checkpointing=True)
    plain = SegmentationNetwork(arch, encoder, 3)
    assert {name for name in network.state_dict() if not name.startswith("aux_head.")} == set(plain.state_dict())
    plain.load_state_dict(network.state_dict(), strict=False)
    image = torch.rand(2, 3, 50, 70)
    network.train()
    logits, aux = network.forward_with_aux(image)
    assert logits.shape == aux.shape == (2, 3, 50, 70)
    aux.square().mean().backward()  # reaches the encoder, but not the decoder and the segmentation head
    assert next(network.model.encoder.parameters()).grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.model.segmentation_head.parameters())
    network.eval()
    plain.load_state_dict(network.state_dict(), strict=False)
    with torch.no_grad():
        logits, aux = network.forward_with_aux(image)
        torch.testing.assert_close(logits, plain.eval()(image))
        assert aux is None
    assert network._feature is None  # no activation is kept
    with pytest.raises(RuntimeError, match="no auxiliary head; set aux_channels"):
        plain.forward_with_aux(image)


def test_auxiliary_logits_are_resized_from_the_head(monkeypatch):
    network = SegmentationNetwork("unet", "resnet18", 3, aux_channels=8).train()
    network.aux_head[3].p = 0.0
    image = torch.rand(2, 3, 33, 64)
    seen = []
    network.model.encoder.register_forward_hook(lambda module, args, features: seen.append(features[-2].detach()))
    aux = network.forward_with_aux(image)[1]
    head = network.aux_head(seen[0])
    assert head.shape == (2, 3, 4, 4)  # stride 16 of an image padded to 64x64
    expected = torch.nn.functional.interpolate(head, scale_factor=16, mode="bilinear")[..., :33, :]
    torch.testing.assert_close(aux, expected)


def coplenet(num_classes=3, **options):
    return SegmentationNetwork("coplenet", "", num_classes, options={"feature_channels": [8, 16, 32, 64, 128], **options})


def test_coplenet_has_the_published_size():
    network = SegmentationNetwork("COPLEnet", "resnet34", 2)
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_634_434  # the authors' code, 3 channels in
    assert network.output_stride == 16


def test_coplenet_takes_any_size_and_has_no_dropout_in_evaluation():
    torch.manual_seed(9)
    network = coplenet().eval()
    image = torch.rand(2, 3, 37, 53)
    with torch.no_grad():
        logits = network(image)
        assert logits.shape == (2, 3, 37, 53)
        assert torch.equal(network(image), logits)
        network.train()
        assert not torch.equal(network(image), network(image))


def test_coplenet_overfits_one_batch():
    torch.manual_seed(10)
    network = coplenet(dropout=[0.0] * 5).train()
    image, target = torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long)
    target[:, 8:24, 8:16], target[1, 20:, 20:] = 1, 2
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(80):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(image), target)
        loss.backward()
        if step == 0:
            first = loss.item()
            dead = [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()]
            assert dead == []
        optimizer.step()
    assert loss.item() < 0.05 * first
    assert (network(image).argmax(1) == target).float().mean() > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_channels": [8, 16, 32, 64]}, "network coplenet: feature_channels: found .*, expected 5 numbers"),
        ({"feature_channels": [8, 16, 32, 64, 100]}, "each twice the one before"),
        ({"feature_channels": [4, 8, 16, 32, 64]}, "multiple of 8"),
        ({"dropout": [0, 0, 0, 0, 1.0]}, "dropout: found .*, expected 5 numbers"),
        ({"decoder_channels": [1]}, "decoder_channels"),
    ],
)
def test_errors_for_invalid_options_of_coplenet_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        SegmentationNetwork("coplenet", "", 3, options=options)
    assert "\n" not in str(error.value)


def test_coplenet_has_no_pretrained_weights():
    with pytest.raises(ValueError, match="encoder_weights: found imagenet, .*coplenet has no pretrained weights"):
        coplenet().load_pretrained_encoder("imagenet")


def test_coplenet_is_restored_from_a_checkpoint(tmp_path):
    options = {"feature_channels": [8, 16, 32, 64, 128]}
    module = SegmentationModule("coplenet", num_classes=3, network_options=options)
    run = pl.Trainer(logger=False, accelerator="cpu", barebones=True)
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = SegmentationModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True).eval()
    image = torch.rand(1, 3, 20, 20)
    with torch.no_grad():
        assert torch.equal(again(image), module.eval()(image))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler itself change with its version
def test_a_checkpointed_network_can_be_compiled():
    plain, checkpointed = pair("resnet18", dtype=torch.float32)
    checkpointed.model.compile(backend="aot_eager")
    image = torch.rand(2, 3, 32, 32)
    for network in (plain, checkpointed):
        network(image).square().mean().backward()
    one, two = (network.model.encoder.layer1[0] for network in (plain, checkpointed))
    torch.testing.assert_close(two.conv1.weight.grad, one.conv1.weight.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(two.bn1.running_mean, one.bn1.running_mean, rtol=1e-4, atol=1e-6)
    assert two.bn1.num_batches_tracked == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler itself change with its version
@pytest.mark.parametrize("arch", ["unet", "fpn"])
def test_compiled_networks_train_as_others_and_evaluate_eagerly(arch):
    torch.manual_seed(0)
    plain = SegmentationNetwork(arch, "tu-test_resnet.r160_in1k", 3, aux_channels=8)
    for layer in plain.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.p = 0.0
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(inputs))
        return graph.forward

    compiled = copy.deepcopy(plain)
    compiled.compile(backend=backend)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for image in (torch.rand(2, 3, 40, 50), torch.rand(2, 3, 40, 50)):
        gradients = []
        for network in (plain, compiled):
            logits, aux = network.forward_with_aux(image)
            (logits.square().mean() + aux.square().mean()).backward()
            gradients.append([(name, p.grad) for name, p in network.named_parameters() if p.grad is not None])
        for (name, expected), (_, actual) in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected, msg=name)
    assert len(graphs) == 1
    for size in ((40, 50), (70, 33)):
        image = torch.rand(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(image), plain.eval()(image))
    assert len(graphs) == 1
