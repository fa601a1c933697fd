"""Networks: any size in, logits of that size out; normalisation; no network access."""

import pytest
import torch

from mcseg.networks import SegmentationNetwork

ENCODER = "tu-test_resnet.r160_in1k"


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
    network = SegmentationNetwork("dpt", "tu-test_vit.r160_in1k", 3, {"dynamic_img_size": True}).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 50, 70)).shape == (1, 3, 50, 70)


def test_integer_and_float_images_are_the_same_image():
    network = SegmentationNetwork("unet", ENCODER, 3).eval()
    image = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(network(image), network(image / 255))


def test_normalisation_reaches_the_model(monkeypatch):
    network = SegmentationNetwork("unet", ENCODER, 3).eval()
    seen = []
    network.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        network(torch.full((1, 3, 32, 32), 128, dtype=torch.uint8))
    expected = [(128 / 255 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    torch.testing.assert_close(seen[0][0, :, 5, 5], torch.tensor(expected))


def test_padding_is_cut_off_and_leaves_divisible_sizes_alone():
    network = SegmentationNetwork("fpn", ENCODER, 3).eval()
    seen = []
    network.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2:]))
    image = torch.rand(1, 3, 33, 64)
    with torch.no_grad():
        logits = network(image)
        direct = network.model(
            ((torch.nn.functional.pad(image, (0, 0, 0, 31), mode="replicate")) - network.mean) / network.std
        )
    assert seen[0] == (64, 64)
    torch.testing.assert_close(logits, direct[..., :33, :64])


def test_channels_last_is_a_matter_of_memory_only():
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
        (("unett", ENCODER, 3), "network unett with encoder .*unetplusplus"),
        (("unet", "resnet19", 3), "network unet with encoder resnet19: .*resnet34"),
        (("unet", ENCODER, 3, {"decoder_chanels": [1]}), "decoder_chanels"),
    ],
)
def test_unknown_names_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        SegmentationNetwork(*arguments)
    assert "\n" not in str(error.value)


def test_pretrained_weights_that_cannot_be_had(monkeypatch):
    network = SegmentationNetwork("unet", "resnet18", 3)
    with pytest.raises(ValueError, match="encoder_weights: imagenet for resnet18 .* set encoder_weights to null"):
        network.load_pretrained_encoder("unet", "resnet18", "imagenet")


def test_pretrained_weights_bring_their_normalisation(monkeypatch):
    """The hub is replaced; what is copied where is ours."""
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
    network.load_pretrained_encoder("unet", "resnet18", "imagenet")
    assert (next(network.model.encoder.parameters()) == 0.25).all()
    torch.testing.assert_close(network.mean.flatten(), torch.tensor([0.2, 0.4, 0.6]))
    torch.testing.assert_close(network.std.flatten(), torch.tensor([0.2, 0.2, 0.2]))
