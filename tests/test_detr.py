"""DETR and DETR*: the layers against PyTorch's, the whole against a second implementation, padding and queries."""

import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, batch, detr, detr_star, random_images, small_resnet, up_detr, with_stub
from torch import nn

from regolite.data import batch_images
from regolite.models.attention import MultiHeadAttention
from regolite.models.positions import sine_positions
from regolite.models.transformer import (
    Decoder,
    DecoderLayer,
    EncoderLayer,
    NormedEncoder,
    PreNormDecoderLayer,
    PreNormEncoderLayer,
    box_head,
    class_head,
)
from regolite.types import Memory

DIM, HEADS, FFN = 16, 4, 24
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def shaken(module):
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return module


def copy_attention(theirs, ours):
    parts = (ours.query, ours.key, ours.value)
    theirs.in_proj_weight.data = torch.cat([p.weight for p in parts]).detach()
    theirs.in_proj_bias.data = torch.cat([p.bias for p in parts]).detach()
    theirs.out_proj.load_state_dict(ours.out.state_dict())


def copy_ffn(theirs, ours):
    theirs.linear1.load_state_dict(ours.ffn[0].state_dict())
    theirs.linear2.load_state_dict(ours.ffn[3].state_dict())


def gradients_agree(out, expected, mine, other):
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, **CLOSE)


def test_encoder_layer_is_torchs():
    ours = shaken(EncoderLayer(DIM, MultiHeadAttention(DIM, HEADS), FFN, 0.0))
    theirs = nn.TransformerEncoderLayer(DIM, HEADS, FFN, 0.0, batch_first=True, norm_first=False)
    copy_attention(theirs.self_attn, ours.attention)
    copy_ffn(theirs, ours)
    theirs.norm1.load_state_dict(ours.attention_norm.state_dict())
    theirs.norm2.load_state_dict(ours.ffn_norm.state_dict())
    x = torch.randn(2, 6, DIM, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 4:] = True
    out = ours(Memory(x, torch.zeros_like(x), mask, [(2, 3)]))
    expected = theirs(y, src_key_padding_mask=mask)
    torch.testing.assert_close(out, expected, **CLOSE)
    gradients_agree(out, expected, x, y)


def test_pre_norm_layers_are_torchs():
    """And so is the encoder's norm, which torch leaves to its nn.TransformerEncoder."""
    layers = [shaken(PreNormEncoderLayer(DIM, MultiHeadAttention(DIM, HEADS), FFN, 0.0)) for _ in range(2)]
    ours, mask = shaken(NormedEncoder(layers, DIM)), torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 4:] = True
    single = nn.TransformerEncoderLayer(DIM, HEADS, FFN, 0.0, batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(single, 2, nn.LayerNorm(DIM), enable_nested_tensor=False)
    theirs.norm.load_state_dict(ours.norm.state_dict())
    for one, other in zip(ours.layers, theirs.layers):
        copy_attention(other.self_attn, one.attention)
        copy_ffn(other, one)
        other.norm1.load_state_dict(one.attention_norm.state_dict())
        other.norm2.load_state_dict(one.ffn_norm.state_dict())
    x = torch.randn(2, 6, DIM)
    memory = ours(Memory(x, torch.zeros_like(x), mask, [(2, 3)]))
    torch.testing.assert_close(memory.tokens, theirs(x, src_key_padding_mask=mask), **CLOSE)

    layer = shaken(PreNormDecoderLayer(DIM, HEADS, MultiHeadAttention(DIM, HEADS), FFN, 0.0))
    other = torch_decoder_layer(layer, norm_first=True)
    queries = torch.randn(2, 3, DIM)
    expected = other(queries, memory.tokens, memory_key_padding_mask=mask)
    torch.testing.assert_close(layer(queries, 0.0, memory), expected, **CLOSE)


def torch_decoder_layer(ours, norm_first=False):
    theirs = nn.TransformerDecoderLayer(DIM, HEADS, FFN, 0.0, batch_first=True, norm_first=norm_first)
    copy_attention(theirs.self_attn, ours.self_attention)
    copy_attention(theirs.multihead_attn, ours.cross_attention)
    copy_ffn(theirs, ours)
    for name, norm in (("norm1", ours.self_norm), ("norm2", ours.cross_norm), ("norm3", ours.ffn_norm)):
        getattr(theirs, name).load_state_dict(norm.state_dict())
    return theirs


def some_decoder_layer(**options):
    return shaken(DecoderLayer(DIM, HEADS, MultiHeadAttention(DIM, HEADS), FFN, 0.0, **options))


def test_decoder_layers_are_torchs_and_every_one_is_kept_and_normalized():
    layers, norm = [some_decoder_layer() for _ in range(2)], shaken(nn.LayerNorm(DIM))
    tokens = torch.randn(2, 6, DIM)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, :3] = True
    x = torch.randn(2, 3, DIM, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found = Decoder(layers, norm)(x, 0.0, Memory(tokens, torch.zeros_like(tokens), mask, [(2, 3)]))
    expected, state = [], y
    for layer in layers:
        state = torch_decoder_layer(layer)(state, tokens, memory_key_padding_mask=mask)
        expected.append(norm(state))
    assert len(found) == 2
    for out, wanted in zip(found, expected):
        torch.testing.assert_close(out, wanted, **CLOSE)
    gradients_agree(found[-1], expected[-1], x, y)


def test_branch_scale_scales_the_attention_branches_alone():
    """With 0.5, as in the released REGO: the same as attentions whose output weights are halved."""
    half = some_decoder_layer(branch_scale=0.5)
    whole = some_decoder_layer()
    whole.load_state_dict(half.state_dict())
    with torch.no_grad():
        for attention in (whole.self_attention, whole.cross_attention):
            attention.out.weight.mul_(0.5)
            attention.out.bias.mul_(0.5)
    tokens, queries = torch.randn(2, 6, DIM), torch.randn(2, 3, DIM)
    memory = Memory(tokens, torch.zeros_like(tokens), None, [])
    torch.testing.assert_close(half(queries, 0.0, memory), whole(queries, 0.0, memory), **CLOSE)


def test_heads_at_the_start():
    logits = class_head(DIM, 7, prior=0.01)(torch.zeros(1, DIM))
    torch.testing.assert_close(logits.sigmoid(), torch.full((1, 7), 0.01))
    boxes = box_head(DIM, size=-2.0)(torch.randn(5, DIM))
    assert torch.equal(boxes, torch.tensor([0.0, 0, -2, -2]).expand(5, 4))
    free = box_head(DIM)
    assert [type(m) for m in free] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert free(torch.randn(5, DIM)).std() > 0


# The whole detector


def attend(module, query, key, value, mask=None):
    """Multi-head attention by PyTorch's functional."""
    parts = (module.query, module.key, module.value)
    out, _ = F.multi_head_attention_forward(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        query.shape[-1],
        module.heads,
        torch.cat([p.weight for p in parts]),
        torch.cat([p.bias for p in parts]),
        None,
        None,
        False,
        0.0,
        module.out.weight,
        module.out.bias,
        training=False,
        key_padding_mask=mask,
    )
    return out.transpose(0, 1)


def second_detr(model, images):
    """DETR once more, from the figure of its appendix A.3: the hidden states, logits and boxes of all layers.

    Pre-norm layers normalize what a branch is given, and not the sum.
    """
    pre = hasattr(model.encoder, "norm")

    def given(norm, state):
        return norm(state) if pre else state

    def joined(norm, state, seen):
        return state + seen if pre else norm(state + seen)

    last = model.backbone(images)[-1]
    x = F.conv2d(last.tensor, model.input_projection.weight, model.input_projection.bias).flatten(2).mT
    where = sine_positions(last.mask, model.dim).flatten(2).mT
    mask = last.mask.flatten(1)
    for layer in model.encoder.layers:
        y = given(layer.attention_norm, x)
        x = joined(layer.attention_norm, x, attend(layer.attention, y + where, y + where, y, mask))
        x = joined(layer.ffn_norm, x, layer.ffn[3](F.relu(layer.ffn[0](given(layer.ffn_norm, x)))))
    x = model.encoder.norm(x) if pre else x
    queries = model.query_positions.weight[None].repeat(len(images), 1, 1)
    state, found = torch.zeros_like(queries), []
    for layer in model.decoder.layers:
        y = given(layer.self_norm, state)
        state = joined(layer.self_norm, state, attend(layer.self_attention, y + queries, y + queries, y))
        asked = given(layer.cross_norm, state) + queries
        state = joined(layer.cross_norm, state, attend(layer.cross_attention, asked, x + where, x, mask))
        state = joined(layer.ffn_norm, state, layer.ffn[3](F.relu(layer.ffn[0](given(layer.ffn_norm, state)))))
        hidden = model.decoder.norm(state)
        box = model.box_head[4](F.relu(model.box_head[2](F.relu(model.box_head[0](hidden)))))
        if model.reference_points is not None:
            box = box + torch.cat([model.reference_points(queries), torch.zeros_like(box[..., 2:])], -1)
        found.append((hidden, model.class_head(hidden), box.sigmoid()))
    return found


@pytest.mark.parametrize("make", [detr, detr_star, up_detr])
def test_the_whole_is_a_second_implementation(make):
    model, images = make(), batch((64, 96), (96, 64))
    with torch.no_grad():
        output, expected = model(images), second_detr(model, images)
    assert len(output.layers) == len(expected) == 2
    for layer, (_, logits, boxes) in zip(output.layers, expected):
        torch.testing.assert_close(layer.logits, logits, **CLOSE)
        torch.testing.assert_close(layer.boxes, boxes, **CLOSE)
    torch.testing.assert_close(output.queries, expected[-1][0], **CLOSE)


@pytest.mark.parametrize("make, columns", [(detr, CLASSES + 1), (detr_star, CLASSES)])
def test_shapes_and_names(make, columns):
    model = make()
    assert (model.num_logits, model.dim, model.heads) == (columns, 32, 4)
    assert model.scoring == ("softmax" if make is detr else "sigmoid")
    with torch.no_grad():
        output = model(batch((64, 96), (96, 64)))
    assert output.stages == [] and output.proposals is None
    assert output.queries.shape == (2, 7, 32)
    for layer in output.layers:
        assert layer.logits.shape == (2, 7, columns)
        assert layer.boxes.shape == (2, 7, 4)
        assert (layer.boxes > 0).all() and (layer.boxes < 1).all()
    assert [f.stride for f in output.features] == [4, 8, 16, 32]
    assert [f.tensor.shape[1] for f in output.features] == model.feature_channels == model.backbone.channels


@pytest.mark.parametrize("make", [detr, detr_star])
@pytest.mark.parametrize("sizes", [[(64, 96), (128, 160)], [(50, 70), (96, 33), (128, 128)]])
def test_padding_does_not_move_a_images_boxes(make, sizes):
    model, images = with_stub(make()), random_images(*sizes)
    with torch.no_grad():
        together = model(batch_images(images, 32))
        for i, image in enumerate(images):
            alone = model(batch_images([image], 32))
            for one, many in zip(alone.layers, together.layers):
                torch.testing.assert_close(one.logits[0], many.logits[i], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(one.boxes[0], many.boxes[i], rtol=1e-4, atol=1e-4)
    assert (together.final.boxes[0] - together.final.boxes[1]).abs().max() > 1e-2  # the pixels do matter


@pytest.mark.parametrize("make", [detr, detr_star])
def test_queries_in_another_order_give_the_same_objects(make):
    model, images, order = make(), batch((64, 64)), torch.randperm(7)
    with torch.no_grad():
        before = model(images)
        model.query_positions.weight.copy_(model.query_positions.weight[order])
        after = model(images)
    torch.testing.assert_close(after.final.boxes, before.final.boxes[:, order], **CLOSE)
    torch.testing.assert_close(after.final.logits, before.final.logits[:, order], **CLOSE)
    assert not torch.allclose(after.final.boxes, before.final.boxes, atol=1e-3)


def test_the_boxes_of_detr_star_start_at_the_reference_points():
    model = detr_star()
    nn.init.zeros_(model.box_head[-1].weight)
    nn.init.zeros_(model.box_head[-1].bias)
    with torch.no_grad():
        boxes = model(batch((64, 64))).final.boxes
        centers = model.reference_points(model.query_positions.weight).sigmoid()
    torch.testing.assert_close(boxes, torch.cat([centers, torch.full((7, 2), 0.5)], 1)[None])


def test_dc5_detects_at_stride_16_and_glimpses_at_32(monkeypatch):
    small_resnet(monkeypatch)
    model = detr(backbone="resnet50", dilated=True)
    seen = {}
    model.input_projection.register_forward_hook(lambda module, inputs, output: seen.update(map=inputs[0]))
    with torch.no_grad():
        output = model(batch((64, 96), (96, 64)))
    assert seen["map"].shape[-2:] == (6, 6)
    last = output.features[-1]
    assert [f.stride for f in output.features] == [4, 8, 16, 32]
    assert torch.equal(last.tensor, seen["map"][:, :, ::2, ::2])
    assert last.mask.tolist() == [[[False] * 3] * 2 + [[True] * 3], [[False, False, True]] * 3]


def test_everything_is_trained():
    """All but one weight: the queries start at zero, so that the first self-attention has nothing to mix."""
    model = detr_star().train()
    output = model(batch((64, 64)))
    sum(layer.logits.sum() + layer.boxes.square().sum() for layer in output.layers).backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == ["decoder.layers.0.self_attention.value.weight"]
