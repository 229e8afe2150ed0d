"""Backbones: the right maps of torchvision's networks, frozen statistics, padding, and weights that cannot be had."""

import pickle
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from small_models import small_resnet, unchecked, unfold_norms
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from regolite.data import batch_images
from regolite.errors import UserError
from regolite.models.backbone import BUNDLED, WEIGHTS, Backbone, FoldedNorm, NormalizedConv2d, run_masked
from regolite.types import ImageBatch

CHANNELS = {
    "tiny": [32, 64, 128, 128],
    "mobilenet_v2": [24, 32, 96, 320],
    "resnet50": [256, 512, 1024, 2048],
    "resnet101": [256, 512, 1024, 2048],
    "resnext101_32x8d": [256, 512, 1024, 2048],
    "resnext101_64x4d": [256, 512, 1024, 2048],
}


def blank(height, width, device="cpu"):
    """One image without padding."""
    mask = torch.zeros(1, height, width, dtype=torch.bool, device=device)
    return ImageBatch(torch.randn(1, 3, height, width, device=device), mask, torch.tensor([[height, width]]).to(device))


@pytest.mark.parametrize("name", CHANNELS)
def test_strides_and_channels(name):
    with torch.device("meta"):
        backbone = Backbone(name)
        features = backbone(blank(96, 70, "meta"))
    assert backbone.channels == CHANNELS[name]
    assert backbone.strides == [f.stride for f in features] == [4, 8, 16, 32]
    for feature, channels in zip(features, CHANNELS[name]):
        height, width = -(-96 // feature.stride), -(-70 // feature.stride)
        assert feature.tensor.shape == (1, channels, height, width)
        assert feature.mask.shape == (1, height, width)


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_dc5_keeps_the_stride_of_stage_4(name):
    with torch.device("meta"):
        backbone = Backbone(name, dilated=True)
        features = backbone(blank(96, 64, "meta"))
        plain = Backbone(name)
    assert backbone.strides == [f.stride for f in features] == [4, 8, 16, 16]
    assert features[3].tensor.shape == (1, 2048, 6, 4)
    assert {k: v.shape for k, v in backbone.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


def test_stages_are_chosen_in_the_order_given():
    images = blank(64, 64)
    backbone = Backbone("tiny")
    every = backbone(images)
    backbone.stages, backbone.strides = (3, 5), [8, 32]
    for some, whole in zip(backbone(images), (every[1], every[3])):
        assert torch.equal(some.tensor, whole.tensor)
    assert Backbone("tiny", (3, 5)).channels == [64, 128]
    assert Backbone("tiny", (3, 5)).strides == [8, 32]


@pytest.fixture(scope="module")
def bundled():
    return Backbone("mobilenet_v2", weights="bundled")


def torchvision_maps(state, x):
    """The outputs of torchvision's own MobileNetV2 before each halving, by its ordinary batch norms in eval mode."""
    net = torchvision.models.mobilenet_v2()
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith(("classifier.", "features.18.")) or "num_batches" in key for key in missing)
    maps, net = {}, net.eval()
    for part in net.features[:18]:
        x = part(x)
        maps[x.shape[-1]] = x  # the last map of each size
    return maps


def test_bundled_weights_give_the_maps_of_torchvision(bundled):
    images = blank(96, 96)
    with torch.no_grad():
        expected = torchvision_maps(load_file(BUNDLED["bundled"]), images.pixels)
        features = bundled(images)
    for feature in features:
        torch.testing.assert_close(feature.tensor, expected[96 // feature.stride], rtol=1e-4, atol=1e-4)


def test_coco_weights_give_the_maps_of_torchvision_and_not_imagenets(bundled):
    images = blank(96, 96)
    with torch.no_grad():
        state = {key: value.float() for key, value in load_file(BUNDLED["bundled_coco"]).items()}
        expected = torchvision_maps(state, images.pixels)
        features, others = Backbone("mobilenet_v2", weights="bundled_coco")(images), bundled(images)
    for feature, other in zip(features, others):
        torch.testing.assert_close(feature.tensor, expected[96 // feature.stride], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(feature.tensor, other.tensor, atol=0.1)


def test_resnet_maps_are_those_of_torchvision(monkeypatch):
    small_resnet(monkeypatch)
    backbone = Backbone("resnet50")
    net = torchvision.models.resnet50(norm_layer=FrozenBatchNorm2d, replace_stride_with_dilation=[False] * 3)
    net.load_state_dict(backbone.body.state_dict(), strict=False)
    images, seen = blank(64, 64), []
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        net(images.pixels)
        features = backbone(images)
    for feature, expected in zip(features, seen):
        torch.testing.assert_close(feature.tensor, expected, rtol=1e-4, atol=1e-5)  # norms are folded into convolutions


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50"])
def test_folded_norms_change_neither_maps_nor_gradients(monkeypatch, name):
    """Beside the same network with norms of its own, in float64: there, only a mistake is larger than rounding."""
    small_resnet(monkeypatch)
    images = batch_images([torch.randn(3, 64, 64), torch.randn(3, 40, 64)], 32)
    images.pixels = images.pixels.double()
    folded = Backbone(name, frozen_stages=2).double()
    for norm in (module for module in folded.modules() if isinstance(module, FrozenBatchNorm2d)):
        for statistic, (low, high) in {"running_mean": (-0.1, 0.1), "running_var": (0.5, 2.0)}.items():
            getattr(norm, statistic).uniform_(low, high)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.1, 0.1)
    unfold_norms(monkeypatch)
    beside = Backbone(name, frozen_stages=2).double()
    beside.load_state_dict(folded.state_dict())
    assert not [m for m in beside.modules() if isinstance(m, (FoldedNorm, NormalizedConv2d))]
    gradients = []
    for backbone in (folded, beside):
        maps = [feature.tensor for feature in backbone(images)]
        weights = [p for p in backbone.parameters() if p.requires_grad]
        gradients.append((*maps, *torch.autograd.grad(sum(m.square().sum() for m in maps), weights)))
    assert len(gradients[0]) > 10
    for ours, expected in zip(*gradients, strict=True):
        assert (ours - expected).norm() <= 1e-10 * expected.norm()


def test_batch_norm_is_frozen_and_training_changes_none_of_it(bundled):
    assert not [m for m in bundled.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    backbone = Backbone("mobilenet_v2", weights="bundled").train()
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    assert len([key for key in before if key.endswith("running_var")]) > 50
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    backbone(blank(64, 64))[-1].tensor.square().mean().backward()
    optimizer.step()
    for key, value in backbone.named_buffers():
        assert torch.equal(value, before[key]), key
    images = blank(64, 64)
    with torch.no_grad():
        training = backbone(images)[-1].tensor
        assert torch.equal(training, backbone.eval()(images)[-1].tensor)


def trained_stages(backbone):
    """The stages whose own weights are trained."""
    begin, trained = 0, []
    for stage, end in backbone.ends.items():
        flags = {p.requires_grad for part in list(backbone.body)[begin:end] for p in part.parameters()}
        assert len(flags) == 1, f"stage {stage} is frozen in part"
        trained += [stage] if flags == {True} else []
        begin = end
    return trained


@pytest.mark.parametrize("name", ["tiny", "mobilenet_v2", "resnet50"])
@pytest.mark.parametrize("frozen, trained", [(0, [2, 3, 4, 5]), (2, [3, 4, 5]), (4, [5]), (5, [])])
def test_frozen_stages(name, frozen, trained):
    with torch.device("meta"):
        assert trained_stages(Backbone(name, frozen_stages=frozen)) == trained


def test_no_gradient_reaches_frozen_stages():
    backbone = Backbone("tiny", frozen_stages=3)
    sum(f.tensor.sum() for f in backbone(blank(64, 64))).backward()
    assert [p.grad is not None for p in backbone.parameters()] == [p.requires_grad for p in backbone.parameters()]


@pytest.mark.parametrize("multiple", [1, 32])
def test_masks_are_true_on_cells_wholly_on_padding(multiple):
    images = batch_images([torch.randn(3, 64, 97), torch.randn(3, 99, 37)], multiple)
    for feature in Backbone("tiny")(images):
        s = feature.stride
        height, width = feature.mask.shape[1:]
        for b in range(2):
            for i in range(height):
                for j in range(width):
                    window = images.mask[b, i * s : (i + 1) * s, j * s : (j + 1) * s]
                    assert feature.mask[b, i, j] == window.all()


@pytest.mark.parametrize("name, dilated", [("mobilenet_v2", False), ("resnet50", False), ("resnet50", True)])
@pytest.mark.parametrize("multiple", [1, 32])
def test_padding_changes_no_map(monkeypatch, name, dilated, multiple):
    small_resnet(monkeypatch)
    weights = "bundled" if name == "mobilenet_v2" else None
    backbone = Backbone(name, weights=weights, dilated=dilated).eval()
    if name == "resnet50":  # frozen statistics that change nothing would leave zeros zeros
        for norm in (m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)):
            nn.init.normal_(norm.bias)
    images = [torch.randn(3, 64, 97), torch.randn(3, 99, 37), torch.randn(3, 30, 30)]
    with torch.no_grad():
        together = backbone(batch_images(images, multiple))
        for b, image in enumerate(images):
            for one, many in zip(backbone(batch_images([image], multiple)), together):
                height, width = one.tensor.shape[-2:]
                torch.testing.assert_close(many.tensor[b, :, :height, :width], one.tensor[0], rtol=1e-4, atol=1e-5)
                assert torch.equal(many.mask[b, :height, :width], one.mask[0])
                assert many.mask[b, height:].all() and many.mask[b, :, width:].all()
                assert (many.tensor[b, :, many.mask[b]] == 0).all()


class Maps(nn.Module):
    """A backbone from tensors to tensors, as ``torch.jit.trace`` needs it."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels, mask, sizes):
        return [x for feature in self.backbone(ImageBatch(pixels, mask, sizes)) for x in (feature.tensor, feature.mask)]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["tiny", "mobilenet_v2", "resnet50"])
def test_a_traced_backbone_hides_padding_in_batches_of_any_size(monkeypatch, name):
    small_resnet(monkeypatch)
    module = Maps(Backbone(name)).eval()
    batches = [batch_images([torch.randn(3, *size) for size in sizes]) for sizes in ([(64, 97), (99, 37)], [(50, 70)])]
    before = {part: set(vars(part)) for part in module.modules()}
    with torch.no_grad(), unchecked():
        traced = torch.jit.trace(module, (batches[0].pixels, batches[0].mask, batches[0].sizes), check_trace=False)
        for images in batches:
            inputs = images.pixels, images.mask, images.sizes
            for ours, expected in zip(traced(*inputs), module(*inputs), strict=True):
                torch.testing.assert_close(ours, expected)
    assert {part: set(vars(part)) for part in module.modules()} == before  # nothing of a batch is kept on a module


def test_padding_cannot_be_hidden_inside_an_unknown_block():
    block = torchvision.models.resnet.BasicBlock(8, 8)
    with pytest.raises(TypeError, match="hidden inside a BasicBlock"):
        run_masked(block, torch.randn(1, 8, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool))


def test_published_detectors_let_padding_in(bundled):
    images = [torch.randn(3, 64, 96), torch.randn(3, 96, 64)]
    published = Backbone("mobilenet_v2", weights="bundled", mask_padding=False)
    with torch.no_grad():
        alone, together = published(batch_images(images[:1])), published(batch_images(images))
        for one, same in zip(alone, bundled(batch_images(images[:1]))):
            assert torch.equal(one.tensor, same.tensor)  # without padding there is no difference
    for one, many in zip(alone, together):
        height, width = one.tensor.shape[-2:]
        assert (many.tensor[0, :, :height, :width] - one.tensor[0]).abs().max() > 0.1
        assert (many.tensor[0, :, many.mask[0]] != 0).any()


# Weights


def test_weights_from_files_of_either_kind_and_naming(tmp_path):
    source = Backbone("tiny").body.state_dict()
    torch.save(source, tmp_path / "plain.pth")
    save_file({f"features.{key}": value for key, value in source.items()}, tmp_path / "prefixed.safetensors")
    torch.save(source | {"fc.weight": torch.zeros(3)}, tmp_path / "more.pth")
    for name in ("plain.pth", "prefixed.safetensors", "more.pth"):
        loaded = Backbone("tiny", weights=str(tmp_path / name)).body.state_dict()
        assert all(torch.equal(loaded[key], source[key]) for key in source), name


def test_without_weights_backbones_differ():
    one, other = Backbone("tiny"), Backbone("tiny")
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_imagenet_weights_are_torchvisions(monkeypatch):
    small_resnet(monkeypatch)
    state = torchvision.models.resnet50(
        norm_layer=FrozenBatchNorm2d, replace_stride_with_dilation=[False] * 3
    ).state_dict()
    asked = []

    def get_weight(name):
        asked.append(name)
        weight = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
        assert str(weight) == name
        return type("Weight", (), {"get_state_dict": lambda self, **options: state})()

    monkeypatch.setattr(torchvision.models, "get_weight", get_weight)
    body = Backbone("resnet50", weights="imagenet").body.state_dict()
    assert asked == ["ResNet50_Weights.IMAGENET1K_V1"]
    assert all(torch.equal(value, state[key]) for key, value in body.items())


@pytest.mark.parametrize("weight", WEIGHTS.values())
def test_torchvision_knows_the_weights_by_these_names(weight):
    assert torchvision.models.get_weight(weight).url.startswith("https://")


@pytest.mark.parametrize("error", [URLError("no route"), TimeoutError("timed out"), OSError(28, "no space left")])
def test_weights_that_cannot_be_downloaded_are_one_clear_error(monkeypatch, tmp_path, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("torch.hub.urlopen", fail)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))  # an empty cache
    with pytest.raises(UserError) as caught:
        Backbone("mobilenet_v2", weights="imagenet")
    message = str(caught.value)
    assert "MobileNet_V2_Weights.IMAGENET1K_V1" in message and "weights=PATH" in message and "weights=None" in message
    assert "\n" not in message


class Spy:
    """An object whose unpickling would leave a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_files_that_are_no_weights_are_one_clear_error(tmp_path):
    (tmp_path / "garbage.safetensors").write_bytes(b"not at all")
    (tmp_path / "garbage.pth").write_bytes(b"not at all")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"0.0.0.weight": torch.zeros(1)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:300])
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Spy(tmp_path / "trace"), protocol=2))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError) as caught:
            Backbone("tiny", weights=str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "trace").exists()


def test_missing_file_and_weights_of_another_network(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth"):
        Backbone("tiny", weights=str(tmp_path / "nowhere.pth"))
    with pytest.raises(UserError, match=r"holds no weights of tiny: 0\.0\.0\.weight and \d+ others are missing"):
        Backbone("tiny", weights=str(BUNDLED["bundled"]))
    state = Backbone("tiny").body.state_dict()
    state["0.0.0.weight"] = torch.zeros(8, 3, 3, 3)
    torch.save(state, tmp_path / "shapes.pth")
    with pytest.raises(UserError, match=r"0\.0\.0\.weight is \(8, 3, 3, 3\) there and \(16, 3, 3, 3\)"):
        Backbone("tiny", weights=str(tmp_path / "shapes.pth"))


def test_wrong_names():
    with pytest.raises(UserError, match="unknown backbone 'resnet5'.*resnet50"):
        Backbone("resnet5")
    with pytest.raises(UserError, match="'mobilenet_v2' has no dilated"):
        Backbone("mobilenet_v2", dilated=True)
    with pytest.raises(UserError, match="only mobilenet_v2 is bundled, not 'resnet50'"):
        Backbone("resnet50", weights="bundled")
    with pytest.raises(UserError, match="no ImageNet weights of backbone 'tiny'"):
        Backbone("tiny", weights="imagenet")
    with pytest.raises(UserError, match=r"stages .*\(1, 2\).* 2 to 5"):
        Backbone("tiny", stages=(1, 2))
    with pytest.raises(UserError, match=r"frozen_stages .* 1.* 2 to 5"):
        Backbone("tiny", frozen_stages=1)
