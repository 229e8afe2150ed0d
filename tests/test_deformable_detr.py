"""Deformable DETR, plain, refined and two-stage: against a second implementation, padding, references, gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, SIZES, batch, deformable, random_images, refined, two_stage, with_stub
from torch import nn

from regolite.data import batch_images
from regolite.models.deformable_detr import (
    DeformableDetr,
    DeformableDetrConfig,
    ImageNorm,
    Proposals,
    Pyramid,
    cell_centers,
    valid_ratio,
)
from regolite.models.positions import sine_positions
from regolite.models.transformer import flatten
from regolite.types import FeatureMap, Memory

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
KINDS = [deformable, refined, two_stage]


# A second implementation, of one image without padding


def read(image, x, y):
    """Bilinear interpolation of a [h, w, c] map at x, y in cells, zero outside, by way of a border of zeros."""
    height, width = image.shape[:2]
    bordered = F.pad(image, (0, 0, 1, 1, 1, 1))
    total = 0
    for i, vertical in ((y.floor(), 1 - y % 1), (y.floor() + 1, y % 1)):
        for j, horizontal in ((x.floor(), 1 - x % 1), (x.floor() + 1, x % 1)):
            cells = bordered[i.clamp(-1, height).long() + 1, j.clamp(-1, width).long() + 1]
            total = total + cells * (vertical * horizontal)[..., None]
    return total


def look(attention, queries, tokens, shapes, reference):
    """Deformable attention of one image; the reference is [Q, 2] or [Q, 4], the same on all levels."""
    m, levels, k = attention.heads, attention.levels, attention.points
    offsets = attention.sampling_offsets(queries).view(-1, m, levels, k, 2)
    weights = attention.attention_weights(queries).view(-1, m, levels * k).softmax(-1).view(-1, m, levels, k)
    values = attention.value(tokens).split([h * w for h, w in shapes])
    heads = []
    for head in range(m):
        mixed = 0
        for level, (height, width) in enumerate(shapes):
            image = values[level].view(height, width, m, -1)[:, :, head]
            for point in range(k):
                dx, dy = offsets[:, head, level, point].unbind(-1)
                if reference.shape[1] == 2:
                    x, y = reference[:, 0] * width + dx, reference[:, 1] * height + dy
                else:
                    x = (reference[:, 0] + dx / k * reference[:, 2] / 2) * width
                    y = (reference[:, 1] + dy / k * reference[:, 3] / 2) * height
                mixed = mixed + weights[:, head, level, point, None] * read(image, x - 0.5, y - 0.5)
        heads.append(mixed)
    return attention.out(torch.cat(heads, -1))


def ffn(layer, x):
    return layer.ffn_norm(x + layer.ffn[3](F.relu(layer.ffn[0](x))))


def logit(x):
    x = x.clamp(1e-5, 1 - 1e-5)
    return torch.log(x / (1 - x))


def second_pyramid(model, maps):
    levels = []
    for number, (project, norm) in enumerate(zip(model.pyramid.projections, model.pyramid.norms)):
        if number < len(maps):
            x = F.conv2d(maps[number], project.weight, project.bias)
        else:
            x = F.conv2d(maps[-1] if number == len(maps) else levels[-1], project.weight, project.bias, 2, 1)
        levels.append(F.group_norm(x, 32, norm.weight, norm.bias))
    return levels


def second_proposals(model, x, shapes):
    """Proposals of one image, cell by cell."""
    part = model.proposals
    anchors = []
    for level, (height, width) in enumerate(shapes):
        for i in range(height):
            for j in range(width):
                anchors.append([(j + 0.5) / width, (i + 0.5) / height, 0.05 * 2**level, 0.05 * 2**level])
    anchors = torch.tensor(anchors)
    good = ((anchors > 0.01) & (anchors < 0.99)).all(1)
    seen = part.project_norm(part.project(x * good[:, None]))
    logits = part.class_head(seen)
    boxes = (part.box_head(seen) + logit(anchors)).sigmoid()
    boxes[~good] = 1.0
    best = logits[:, 0].argsort(descending=True)[: model.config.queries]
    reference = boxes[best]
    waves = []
    for number in range(4):
        for channel in range(model.dim // 2):
            angle = 2 * math.pi * reference[:, number] / 10000 ** (2 * (channel // 2) / (model.dim // 2))
            waves.append(angle.cos() if channel % 2 else angle.sin())
    both = part.to_query_norm(part.to_query(torch.stack(waves, -1)))
    return logits, boxes, reference, both[:, : model.dim], both[:, model.dim :]


def second(model, images):
    """Deformable DETR once more: the logits and boxes of every layer, the last hidden states and the proposals."""
    levels = second_pyramid(model, [f.tensor for f in model.backbone(images)])
    shapes = [tuple(x.shape[-2:]) for x in levels]
    x = torch.cat([x[0].flatten(1).T for x in levels])
    where = [
        sine_positions(torch.zeros(1, *shape, dtype=torch.bool), model.dim, center=True)[0].flatten(1).T
        for shape in shapes
    ]
    where = torch.cat([w + level for w, level in zip(where, model.level_positions)])
    centers = [[(j + 0.5) / w, (i + 0.5) / h] for h, w in shapes for i in range(h) for j in range(w)]
    for layer in model.encoder.layers:
        x = layer.attention_norm(x + look(layer.attention, x + where, x, shapes, torch.tensor(centers)))
        x = ffn(layer, x)

    proposals = None
    if model.config.two_stage:
        *proposals, reference, positions, state = second_proposals(model, x, shapes)
    else:
        positions, state = model.query_positions.weight, model.queries.weight
        reference = model.reference_points(positions).sigmoid()
    found = []
    for number, layer in enumerate(model.decoder_layers):
        asked = state + positions
        state = layer.self_norm(state + layer.self_attention(asked[None], asked[None], state[None])[0])
        state = layer.cross_norm(state + look(layer.cross_attention, state + positions, x, shapes, reference))
        state = ffn(layer, state)
        head = number if model.config.refine else 0
        change = model.box_heads[head](state)
        if reference.shape[1] == 2:
            boxes = torch.cat([logit(reference) + change[:, :2], change[:, 2:]], 1).sigmoid()
        else:
            boxes = (logit(reference) + change).sigmoid()
        found.append((model.class_heads[head](state), boxes))
        if model.config.refine:
            reference = boxes
    return found, state, proposals


@pytest.mark.parametrize("make", KINDS)
def test_the_whole_is_a_second_implementation(make):
    model, images = make(levels=4), batch((96, 64))
    with torch.no_grad():
        output = model(images)
        expected, state, proposals = second(model, images)
    assert len(output.layers) == len(expected)
    for layer, (logits, boxes) in zip(output.layers, expected):
        torch.testing.assert_close(layer.logits[0], logits, **CLOSE)
        torch.testing.assert_close(layer.boxes[0], boxes, **CLOSE)
    torch.testing.assert_close(output.queries[0], state, **CLOSE)
    assert (output.proposals is not None) == (proposals is not None) == (make is two_stage)
    if proposals:
        torch.testing.assert_close(output.proposals.logits[0], proposals[0], **CLOSE)
        torch.testing.assert_close(output.proposals.boxes[0], proposals[1], **CLOSE)


@pytest.mark.parametrize("make", KINDS)
def test_shapes_and_names(make):
    model = make()
    with torch.no_grad():
        output = model(batch((64, 96), (96, 64)))
    assert (model.scoring, model.num_logits, model.dim, model.heads) == ("sigmoid", CLASSES, 32, 4)
    assert output.queries.shape == (2, 7, 32)
    for layer in output.layers:
        assert (layer.logits.shape, layer.boxes.shape) == ((2, 7, CLASSES), (2, 7, 4))
        assert (layer.boxes > 0).all() and (layer.boxes < 1).all()
    assert [f.stride for f in output.features] == [8, 16, 32]
    assert [f.tensor.shape[1] for f in output.features] == model.feature_channels == [32] * 3
    heads = 2 if make is not deformable else 1
    assert len(model.class_heads) == len(model.box_heads) == heads
    if make is two_stage:
        cells = 12 * 12 + 6 * 6 + 3 * 3
        assert output.proposals.logits.shape == (2, cells, CLASSES)
        assert output.proposals.boxes.shape == (2, cells, 4)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("levels", [3, 4, 5])
@pytest.mark.parametrize(
    "sizes", [[(64, 64), (160, 96)], [(96, 128), (128, 64)], [(50, 70), (33, 96), (100, 100)]], ids=str
)
def test_padding_does_not_move_a_images_boxes(make, levels, sizes):
    """A batch whose sides are odd multiples of 32 has coarse cells that belong half to the padding."""
    model, images = with_stub(make(levels=levels)), random_images(*sizes)
    with torch.no_grad():
        together = model(batch_images(images, 32))
        for i, image in enumerate(images):
            alone = model(batch_images([image], 32))
            for one, many in zip(alone.layers, together.layers):
                torch.testing.assert_close(one.boxes[0], many.boxes[i], **CLOSE)
                torch.testing.assert_close(one.logits[0], many.logits[i], **CLOSE)
    assert (together.final.boxes[0] - together.final.boxes[1]).abs().max() > 1e-2  # the pixels do matter


def test_published_models_let_padding_in():
    model, images = with_stub(deformable(mask_padding=False)), random_images((64, 64), (160, 96))
    with torch.no_grad():
        together, alone = model(batch_images(images, 32)), model(batch_images(images[:1], 32))
    assert (together.final.boxes[0] - alone.final.boxes[0]).abs().max() > 1e-3


@pytest.mark.parametrize("make", [deformable, refined])
def test_queries_in_another_order_give_the_same_objects(make):
    model, images, order = make(), batch((64, 64)), torch.randperm(7)
    with torch.no_grad():
        before = model(images).final
        for embedding in (model.queries, model.query_positions):
            embedding.weight.copy_(embedding.weight[order])
        after = model(images).final
    torch.testing.assert_close(after.boxes, before.boxes[:, order], **CLOSE)
    torch.testing.assert_close(after.logits, before.logits[:, order], **CLOSE)
    assert not torch.allclose(after.boxes, before.boxes, atol=1e-3)


def untouched(model):
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("make", KINDS)
def test_everything_is_trained(make):
    model = make(levels=4).train()
    output = model(batch((128, 64)))
    predictions = [*output.layers, output.proposals] if output.proposals else output.layers
    sum(p.logits.sum() + p.boxes.square().sum() for p in predictions).backward()
    assert untouched(model) == []


# References


def fresh(**changes):
    return DeformableDetr(DeformableDetrConfig(**(SIZES | {"levels": 3, "points": 2} | changes)), CLASSES).eval()


@pytest.mark.parametrize("refine", [False, True])
def test_at_the_start_every_layer_gives_the_reference_points_and_small_sizes(refine):
    model = fresh(refine=refine)
    with torch.no_grad():
        output = model(batch((64, 64)))
        centers = model.reference_points(model.query_positions.weight).sigmoid()
    size = 1 / (1 + math.exp(2))
    for layer in output.layers:
        torch.testing.assert_close(layer.boxes[0, :, :2], centers)
        torch.testing.assert_close(layer.boxes[0, :, 2:], torch.full((7, 2), size))
        assert layer.logits.sigmoid().mean() < 0.05  # the prior of the focal loss is 0.01


def test_at_the_start_two_stage_boxes_are_the_anchors():
    model = fresh(refine=True, two_stage=True)
    with torch.no_grad():
        output = model(batch((64, 64)))
    for layer in output.layers:
        distance = (layer.boxes[0, :, None] - output.proposals.boxes[0, None]).abs().sum(-1)
        assert distance.min(1).values.max() < 1e-4


def test_each_refined_layer_corrects_the_detached_boxes_of_the_one_before():
    model = refined(decoder_layers=3).train()
    output = model(batch((64, 64)))
    for number in (1, 2):
        with torch.no_grad():
            states = []
            hook = model.decoder_layers[number].register_forward_hook(lambda m, i, o, s=states: s.append((i, o)))
            again = model(batch((64, 64)))
            hook.remove()
        ((inputs, state),) = states
        reference = again.layers[number - 1].boxes
        torch.testing.assert_close(inputs[3], reference[:, :, None].expand(-1, -1, 3, -1))
        expected = (logit(reference) + model.box_heads[number](state)).sigmoid()
        torch.testing.assert_close(again.layers[number].boxes, expected)

    output.layers[2].boxes.sum().backward()
    for number, head in enumerate(model.box_heads):
        grads = [p.grad for p in head.parameters()]
        assert all(g is not None and g.any() for g in grads) if number == 2 else all(g is None for g in grads)
    assert model.decoder_layers[0].ffn[0].weight.grad.any()  # the hidden states are not detached


@pytest.mark.parametrize("start", [2, 4])
def test_decodes_queries_of_any_origin(start):
    """Contents, points or boxes of the caller's; queries that are padding do not reach the others."""
    model, images = refined(), batch((64, 96), (64, 64))
    with torch.no_grad():
        maps = model.pyramid(model.backbone(images), images.mask)
        memory = flatten(maps, [sine_positions(f.mask, model.dim) for f in maps])
        valid = torch.stack([valid_ratio(f.mask) for f in maps], 1)
        contents, positions = torch.randn(2, 2, 5, model.dim)
        reference, padding = torch.rand(2, 5, start), torch.arange(5).expand(2, -1) >= 3
        layers, hidden = model.decode(contents, positions, memory, valid, reference, padding)
        few = model.decode(contents[:, :3], positions[:, :3], memory, valid, reference[:, :3])
    assert len(layers) == len(model.decoder_layers) and hidden.shape == (2, 5, model.dim)
    torch.testing.assert_close(hidden[:, :3], few[1], **CLOSE)
    torch.testing.assert_close(layers[-1].boxes[:, :3], few[0][-1].boxes, **CLOSE)


def test_plain_layers_keep_the_reference_point_and_share_their_heads():
    model = deformable(decoder_layers=3)
    asked = []
    for layer in model.decoder_layers:
        layer.register_forward_hook(lambda module, inputs, output: asked.append((inputs[3], output)))
    with torch.no_grad():
        output = model(batch((64, 64)))
        centers = model.reference_points(model.query_positions.weight).sigmoid()
        for (reference, state), layer in zip(asked, output.layers):
            torch.testing.assert_close(reference, centers[None, :, None].expand(1, -1, 3, -1))
            torch.testing.assert_close(layer.logits, model.class_heads[0](state))
            change = model.box_heads[0](state)
            torch.testing.assert_close(layer.boxes[..., :2], (logit(centers) + change[..., :2]).sigmoid(), **CLOSE)
            torch.testing.assert_close(layer.boxes[..., 2:], change[..., 2:].sigmoid(), **CLOSE)


def test_proposals_are_trained_by_their_own_loss_alone():
    model = two_stage().train()
    output = model(batch((64, 64)))
    heads = [*model.proposals.class_head.parameters(), *model.proposals.box_head.parameters()]
    sum(layer.logits.sum() + layer.boxes.sum() for layer in output.layers).backward(retain_graph=True)
    assert all(p.grad is None for p in heads)
    assert model.proposals.to_query.weight.grad.any()
    (output.proposals.logits.sum() + output.proposals.boxes.square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in heads)


def test_queries_are_the_best_proposals():
    model = two_stage(queries=4)
    part, seen = model.proposals, {}
    part.register_forward_hook(lambda module, inputs, output: seen.update(memory=inputs[0], out=output))
    with torch.no_grad():
        model(batch((64, 96), (96, 64)))
    prediction, reference, _, _ = seen["out"]
    for b in range(2):
        best = sorted(range(prediction.logits.shape[1]), key=lambda i: -prediction.logits[b, i, 0].item())
        best = [i for i in best if not seen["memory"].mask[b, i]]
        assert torch.equal(reference[b], prediction.boxes[b, best[:4]])


@pytest.mark.parametrize("mask_padding", [True, False])
def test_padding_is_proposed_only_as_published_however_high_it_scores(mask_padding):
    part = Proposals(8, 3, queries=5, mask_padding=mask_padding)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :, 3:] = mask[:, 3:] = True
    memory = Memory(torch.randn(1, 16, 8), torch.zeros(1, 16, 8), mask.flatten(1), [(4, 4)])
    nn.init.normal_(part.project.bias)
    with torch.no_grad():  # a class head that likes what zeros become best of all
        nothing = part.project_norm(part.project.bias)
        part.class_head.weight[0] = nothing
        prediction, reference, _, _ = part(memory)
    assert prediction.logits[0, :, 0].argmax() in mask.flatten().nonzero()
    assert bool((reference < 1).all()) is mask_padding


def test_fewer_cells_than_queries():
    model = two_stage(queries=50, backbone_stages=(5,), levels=1)
    with torch.no_grad():
        output = model(batch((64, 96)))
    assert output.final.boxes.shape == (1, 6, 4) and output.final.boxes.isfinite().all()


# The pyramid


def test_levels_beyond_the_backbone_halve_its_last_map():
    pyramid = Pyramid([3, 5], 4, 32, mask_padding=True)
    mask = torch.zeros(1, 80, 48, dtype=torch.bool)
    maps = [
        FeatureMap(torch.randn(1, c, 80 // s, 48 // s), torch.zeros(1, 80 // s, 48 // s, dtype=torch.bool), s)
        for c, s in ((3, 8), (5, 16))
    ]
    levels = pyramid(maps, mask)
    assert [f.stride for f in levels] == [8, 16, 32, 64]
    assert [tuple(f.tensor.shape) for f in levels] == [(1, 32, h, w) for h, w in ((10, 6), (5, 3), (3, 2), (2, 1))]
    third = F.group_norm(pyramid.projections[2](maps[1].tensor), 32)
    torch.testing.assert_close(levels[2].tensor, third, **CLOSE)
    torch.testing.assert_close(levels[3].tensor, F.group_norm(pyramid.projections[3](third), 32), **CLOSE)


def some_norm(mask_padding=True):
    norm = ImageNorm(4, 12, mask_padding)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def test_image_norm_is_group_norm_where_there_is_no_padding():
    norm, x = some_norm(), torch.randn(2, 12, 5, 6) * 3 + 1
    expected = F.group_norm(x, 4, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(x, torch.zeros(2, 5, 6, dtype=torch.bool)), expected)


def test_image_norm_ignores_padding_and_leaves_zeros_there():
    norm, x = some_norm(), torch.randn(2, 12, 5, 6)
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[0, :3, :4] = mask[1] = False
    x = torch.where(mask[:, None], torch.tensor(1e4), x)
    found = norm(x, mask)
    torch.testing.assert_close(found[:1, :, :3, :4], F.group_norm(x[:1, :, :3, :4], 4, norm.weight, norm.bias))
    torch.testing.assert_close(found[1:], F.group_norm(x[1:], 4, norm.weight, norm.bias))
    assert (found[mask[:, None].expand_as(found)] == 0).all()
    published = some_norm(mask_padding=False)
    torch.testing.assert_close(published(x, mask), F.group_norm(x, 4, published.weight, published.bias))


def test_image_norms_gradients_are_right():
    norm = some_norm().double()
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[:, 2] = True
    x = torch.randn(1, 12, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: norm(x, mask), (x,))


def test_valid_ratio_and_cell_centers():
    mask = torch.ones(2, 4, 8, dtype=torch.bool)
    mask[0, :3, :6] = mask[1] = False
    valid = valid_ratio(mask)
    assert valid.tolist() == [[0.75, 0.75], [1, 1]]
    centers = cell_centers([(4, 8), (2, 4)], torch.stack([valid, torch.tensor([[0.5, 1.0], [1, 1]])], 1))
    assert centers.shape == (2, 32 + 8, 2, 2)
    # Cell (row 2, column 4) of level 0 in the first image: 4.5 of its 6 columns, 2.5 of its 3 rows.
    of_image = torch.tensor([4.5 / 6, 2.5 / 3])
    torch.testing.assert_close(centers[0, 2 * 8 + 4, 0], of_image * 0.75)
    torch.testing.assert_close(centers[0, 2 * 8 + 4, 1], of_image * torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(centers[1, 32 + 4, 0], torch.tensor([0.5 / 4, 1.5 / 2]))


# Mistakes


def test_two_stage_needs_refinement():
    with pytest.raises(ValueError, match="two_stage needs refine"):
        fresh(two_stage=True)


def test_there_are_at_least_as_many_levels_as_stages():
    with pytest.raises(ValueError, match=r"2 levels .* 3 stages"):
        fresh(levels=2)


def test_initial_weights_of_the_proposals_are_xaviers():
    proposals = Proposals(256, CLASSES, 9, mask_padding=True)
    for layer, bound in ((proposals.project, (6 / 512) ** 0.5), (proposals.to_query, (6 / 1024) ** 0.5)):
        assert 0.999 * bound < layer.weight.abs().max() <= bound
