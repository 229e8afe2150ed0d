"""The recorder on detectors of transformers: its maps are theirs, and so are its sampling points."""

import pytest
import torch
from small_models import batch, shake, small_resnet
from test_adapter import (
    CLASSES,
    DISTRIBUTIONS,
    KINDS,
    LAYERS,
    MORE_LAYERS,
    MULTI_SCALE,
    NAMES,
    PROMPTED,
    RAW_PIXELS,
    WITH_GROUPS,
    adapted,
    ask,
    dab_detr,
    detr,
    make,
    pp_doclayout_v3,
    rt_detr_v2,
    table_transformer,
)

from regolite import Rego, UserError, record
from regolite.interop import adapt, from_transformers
from regolite.interop.transformers import DEPTHS
from regolite.models.backbone import shrink

transformers = pytest.importorskip("transformers")

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
DENSE = [kind for kind in KINDS if kind not in MULTI_SCALE]


@pytest.fixture
def images():
    return batch((64, 96), (80, 60))


def hooks_of(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def names_of(trace):
    return [name for name in trace.names() if hasattr(trace[name], "weights")]


@each_kind
@pytest.mark.parametrize("attention", [None, "eager"])
def test_recording_changes_nothing(kind, attention, images):
    model = make(kind())
    if attention:
        model.set_attn_implementation(attention)
    elif kind not in (dab_detr, table_transformer, *PROMPTED):  # those have no other
        assert model.config._attn_implementation == "sdpa"
    rego = shake(Rego(adapted(model), stages=1, ffn_dim=32)).eval()
    with torch.inference_mode():
        wanted = rego(images)
        how, hooks = model.config._attn_implementation, hooks_of(rego)  # transformers leaves some of its own
        with record(rego) as trace:
            output = rego(images)
    assert model.config._attn_implementation == how
    assert torch.equal(output.final.boxes, wanted.final.boxes) and torch.equal(output.queries, wanted.queries)
    assert hooks_of(rego) == hooks
    assert len(names_of(trace)) == (kind not in WITH_GROUPS) + 2 * LAYERS + 4
    for name in names_of(trace):
        weights = trace[name].weights
        sums = weights.sum((-2, -1)) if hasattr(trace[name], "locations") else weights.sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
    for layer, prediction in enumerate(output.layers[-LAYERS:]):
        assert torch.equal(trace[f"decoder.{layer}.boxes"].boxes, prediction.boxes)
    assert ("proposals" in trace) == (len(output.layers) > LAYERS or output.proposals is not None)
    assert trace.classes == (NAMES if kind in PROMPTED else tuple(f"LABEL_{i}" for i in range(CLASSES)))


@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: kind.__name__)
def test_maps_are_their_output_attentions(kind, images):
    """Recorded beside the fused kernel, where there is one; theirs computed by their own slow path."""
    model = make(kind())
    detector = adapt(model)
    with record(detector) as trace, torch.no_grad():
        detector(images)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = ask(model, images, output_attentions=True)
    named = {"encoder.{}": theirs.encoder_attentions, "decoder.{}.self": theirs.decoder_attentions}
    named["decoder.{}.cross"] = theirs.cross_attentions
    for name, maps in named.items():
        for layer, wanted in enumerate(maps):
            torch.testing.assert_close(trace[name.format(layer)].weights, wanted, rtol=0, atol=1e-5)
    found = trace["decoder.1.cross"]
    assert found.shapes == ((3, 3),) and found.strides == (32,)
    assert torch.equal(found.mask, shrink(images.mask, (3, 3)).flatten(1)) and found.mask.any()
    assert found.weights.masked_select(found.mask[:, None, None]).max() < 1e-6


@pytest.mark.parametrize("kind", MULTI_SCALE, ids=lambda kind: kind.__name__)
def test_sampling_points_are_those_that_they_read(kind, images, monkeypatch):
    model, read = make(kind()), []
    if kind is rt_detr_v2:
        from transformers.models.rt_detr_v2 import modeling_rt_detr_v2 as module

        original = module.multi_scale_deformable_attention_v2

        def spy(value, shapes, locations, weights, *rest):
            read.append((locations.unflatten(3, (3, -1)), weights.unflatten(3, (3, -1))))
            return original(value, shapes, locations, weights, *rest)

        monkeypatch.setattr(module, "multi_scale_deformable_attention_v2", spy)
    elif kind in DISTRIBUTIONS:
        for part in model.modules():
            if hasattr(part, "ms_deformable_attn_core"):
                original = part.ms_deformable_attn_core

                def spy(value, shapes, locations, weights, points, *rest, original=original):
                    read.append((locations.split(points, 3), weights.split(points, 3)))
                    return original(value, shapes, locations, weights, points, *rest)

                part.ms_deformable_attn_core = spy
    else:
        for part in model.modules():
            if type(part).__name__ == "MultiScaleDeformableAttention":
                part.register_forward_pre_hook(lambda m, args: read.append(args[4:6]))
    detector = adapted(model)
    with record(detector) as trace, torch.no_grad():
        output = detector(images)
    names = [name for name in names_of(trace) if hasattr(trace[name], "locations")]
    assert len(names) == len(read) == LAYERS + (kind in PROMPTED or kind not in MORE_LAYERS)
    for name, (locations, weights) in zip(names, read):
        if kind in DISTRIBUTIONS:  # 3, 6 and 3 points: the missing ones have weight 0
            for level, (points, shares) in enumerate(zip(locations, weights)):
                seen, count = trace[name].locations[..., level, :, :], points.shape[3]
                torch.testing.assert_close(seen[..., :count, :], points, rtol=0, atol=1e-6)
                torch.testing.assert_close(trace[name].weights[..., level, :count], shares, rtol=0, atol=1e-6)
                assert not trace[name].weights[..., level, count:].any()
            continue
        torch.testing.assert_close(trace[name].locations, locations, rtol=0, atol=1e-6)
        torch.testing.assert_close(trace[name].weights, weights, rtol=0, atol=1e-6)
    references = trace["references"].references
    if kind is pp_doclayout_v3:  # starts with the boxes of the masks that the encoder predicts
        assert references.min() >= 0
    elif kind in RAW_PIXELS:  # the encoder's choice, in the frame of the image
        torch.testing.assert_close(references, output.layers[0].boxes)
    height, width = detector.padded(images).mask.shape[1:]
    scale = torch.tensor([width, height]) / images.sizes.flip(1)  # of the padded batch by the image
    on_map = trace["decoder.0.cross"].references[:, :, 0, :2]
    if kind in RAW_PIXELS:
        torch.testing.assert_close(on_map * scale[:, None], references[..., :2])


@pytest.mark.parametrize("kind", PROMPTED, ids=lambda kind: kind.__name__)
def test_attention_among_queries_is_that_of_a_model_with_text(kind, images):
    """Attention to text and among text is left out: it has neither names nor records."""
    model = make(kind())
    detector = adapted(model)
    with record(detector) as trace, torch.no_grad():
        detector(images)
        among, to_text, to_images = ask(model, images, output_attentions=True).decoder_attentions
    for layer in range(LAYERS):
        torch.testing.assert_close(trace[f"decoder.{layer}.self"].weights, among[layer])
        torch.testing.assert_close(trace[f"decoder.{layer}.cross"].weights, to_images[layer])
    assert len(names_of(trace)) == 1 + 2 * LAYERS
    with (
        pytest.raises(UserError, match=r"names='decoder.0.text' matches no record"),
        record(detector, "decoder.0.text"),
    ):
        pass


def test_a_kernel_that_cannot_be_seen_is_refused():
    model = make(detr())
    model.config._attn_implementation = "flash_attention_2"
    with (
        pytest.raises(UserError, match=r"'flash_attention_2' cannot be recorded.*set_attn_implementation\('eager'\)"),
        record(adapt(model)),
    ):
        pass


def test_maps_of_our_own_detr_are_those_of_the_model_that_it_came_from(images, monkeypatch):
    small_resnet(monkeypatch)
    monkeypatch.setitem(DEPTHS, "resnet50", (1, 1, 1, 1))
    backbone = transformers.ResNetConfig(depths=[1, 1, 1, 1], out_features=[f"stage{i}" for i in (1, 2, 3, 4)])
    model = make(detr(backbone_config=backbone))
    model.set_attn_implementation("eager")
    ours = from_transformers(model)
    with torch.no_grad():
        theirs = ask(model, images, output_attentions=True)
        with record(ours) as trace:
            ours(images)
    torch.testing.assert_close(trace["encoder.0"].weights, theirs.encoder_attentions[0], rtol=0, atol=1e-5)
    for layer in range(LAYERS):
        found, wanted = trace[f"decoder.{layer}.cross"], theirs.cross_attentions[layer]
        torch.testing.assert_close(found.weights, wanted, rtol=0, atol=1e-5)
        found, wanted = trace[f"decoder.{layer}.self"], theirs.decoder_attentions[layer]
        torch.testing.assert_close(found.weights, wanted, rtol=0, atol=1e-5)
