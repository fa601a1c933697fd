"""Networks: any image size, normalisation, checkpointing, frozen batch norms, auxiliary head, COPLE-Net."""

import copy
import pickle

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from mcseg.module import SegmentationModule
from mcseg.networks import SegmentationNetwork

ENCODER = "tu-test_resnet.r160_in1k"


def smp_model(network, arch, encoder):
    """Build SMP's model, which includes the upsampling, with the weights of the network."""
    import segmentation_models_pytorch as smp

    model = smp.create_model(arch, encoder, encoder_weights=None, classes=network.model.segmentation_head[0].out_channels)
    model.load_state_dict(network.model.state_dict())
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
    assert not network.model.encoder._forward_hooks
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
