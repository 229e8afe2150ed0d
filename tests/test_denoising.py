"""Query denoising: noise is bounded, pairs are known, nothing leaks into the detector's own queries."""

from dataclasses import replace

import pytest
import torch
from small_models import batch, small

import regolite
from regolite.boxes import to_xyxy
from regolite.checkpoint import save_model
from regolite.denoising import NoisedQueries, known_matches
from regolite.errors import UserError
from regolite.losses import LossConfig, SetLoss
from regolite.matching import PaddedTargets
from regolite.types import Target

COUNTS = (3, 0, 1)


def targets(counts=COUNTS, classes=4):
    boxes = [torch.rand(n, 4) * 0.2 + 0.3 for n in counts]
    return [Target(torch.randint(classes, (len(b),)), b, i, (64, 64)) for i, b in enumerate(boxes)]


def denoiser(name="rego_deformable_detr_two_stage_scenes", **changes):
    return small(name, 4, **({"denoising": True} | changes))


def test_noise_of_positives_is_bounded_and_negatives_have_more():
    noise, given = NoisedQueries(4, 8), targets((5, 5))
    content, boxes, mask = noise(given)
    assert content.shape == (2, 10, 8) and boxes.shape == (2, 10, 4) and not mask.any()
    truth = to_xyxy(torch.stack([target.boxes for target in given])).repeat(1, 2, 1)
    half = torch.stack([target.boxes[:, 2:] for target in given]).repeat(1, 2, 2) / 2
    moved = (to_xyxy(boxes) - truth).abs() / half
    assert (moved[:, :5] <= 0.4 + 1e-5).all()
    assert (moved[:, 5:] >= 0.4 - 1e-5).all() and (moved[:, 5:] <= 0.8 + 1e-5).all()


def test_classes_are_replaced_as_often_as_asked():
    given = [Target(torch.zeros(400, dtype=torch.long), torch.full((400, 4), 0.5), 0, (64, 64))]
    noise = NoisedQueries(4, 8, label_noise=0.2)
    kept = (noise(given)[0] == noise.labels.weight[0]).all(-1).float().mean()
    assert 0.8 < kept < 0.9, "0.8 are left, and a quarter of the others is given their own class again"
    assert (NoisedQueries(4, 8, label_noise=0.0)(given)[0].std(1) == 0).all()


def test_padding_is_masked_and_every_image_has_a_key():
    _, _, mask = NoisedQueries(4, 8)(targets())
    assert mask.tolist() == [
        [False] * 6,
        [False] + [True] * 5,
        [False, True, True, False, True, True],
    ]


def test_boxes_at_the_border_stay_inside_and_keep_an_area():
    given = [Target(torch.zeros(50, dtype=torch.long), torch.tensor([[0.0, 1.0, 0.02, 0.02]]).repeat(50, 1), 0, (9, 9))]
    _, boxes, _ = NoisedQueries(4, 8)(given)
    assert ((boxes > 0) & (boxes < 1)).all()


def test_known_matches_pair_each_positive_with_its_object():
    matches = known_matches(PaddedTargets.of(targets()), 2)
    pairs = zip(*(t.tolist() for t in (matches.prediction, matches.image, matches.query, matches.target)))
    one = [(0, 0, 0), (0, 1, 1), (0, 2, 2), (2, 0, 0)]
    assert list(pairs) == [(p, *pair) for p in range(2) for pair in one]


@pytest.mark.parametrize("token_queries", [False, True])
def test_the_detectors_own_queries_do_not_change(token_queries):
    model = denoiser(token_queries=token_queries).eval()
    images = batch((64, 64), (48, 64), (64, 32))
    with torch.no_grad():
        alone, beside = model(images), model(images, targets=targets())
    for one, other in zip(alone.by_stage, beside.by_stage):
        assert torch.equal(one.logits, other.logits) and torch.equal(one.boxes, other.boxes)
    assert alone.denoising is None and len(beside.denoising.stages) == 2


def test_padding_changes_nothing_of_an_images_own_noised_queries():
    model, images, given = denoiser().eval(), batch((64, 64), (64, 64)), targets((1, 4))
    with torch.no_grad():
        torch.manual_seed(0)
        output = model(images, targets=given).denoising
        assert output.query_mask[0].sum() == 6
        features = model(images).features
        hidden, boxes, mask = output.queries, output.layers[-1].boxes, output.query_mask
        noisy = torch.where(mask[..., None], torch.rand_like(hidden), hidden)
        one, _ = model.stages[0](features, images.sizes, hidden, boxes, mask)
        other, _ = model.stages[0](features, images.sizes, noisy, boxes, mask)
    torch.testing.assert_close(one[-1].logits[~mask], other[-1].logits[~mask])


def test_loss_names_the_terms_and_every_weight_learns():
    model = denoiser().train()
    given, images = targets(), batch((64, 64), (48, 64), (64, 32))
    loss, terms = SetLoss(model.model_config.loss, model.scoring)(model(images, targets=given), given)
    assert {"denoising.base.1/l1", "denoising.base/label", "denoising.stage2/giou"} <= set(terms)
    loss.backward()
    assert model.detector.noised_queries.labels.weight.grad.abs().sum() > 0
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_padding_pays_no_loss():
    model = denoiser("deformable_detr_two_stage_scenes").train()
    given, images = targets((3, 1)), batch((64, 64), (64, 64))
    output = model(images, targets=given)
    loss = SetLoss(model.model_config.loss, model.scoring)
    _, terms = loss(output, given)
    mask = output.denoising.query_mask
    for layer in output.denoising.layers:
        layer.logits = torch.where(mask[..., None], layer.logits + 5, layer.logits)
    _, changed = loss(output, given)
    assert terms["denoising.base/label"] == changed["denoising.base/label"]


def test_images_without_objects():
    model = denoiser().train()
    given, images = targets((0, 0)), batch((64, 64), (64, 64))
    loss, _ = SetLoss(model.model_config.loss, model.scoring)(model(images, targets=given), given)
    assert loss.isfinite()
    loss.backward()


def test_a_frozen_base_detector_does_not_denoise():
    assert denoiser().denoises and not denoiser(frozen=True).denoises
    assert not denoiser(denoising=False).denoises


def test_shared_heads_predict_proposals_and_objects(tmp_path):
    name, sizes = "efficient_detr_scenes", {"dim": 32, "heads": 4, "ffn_dim": 32, "queries": 5}
    model = regolite.build(name, 3, **sizes).train()
    assert model.proposals.class_head is model.class_heads[0] and model.proposals.box_head is model.box_heads[0]
    assert len(model.encoder.layers) == 3 and len(model.decoder_layers) == 1
    images, given = batch((64, 64)), [Target(torch.tensor([2]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]), 0, (64, 64))]
    output = model(images)
    assert output.proposals_by_class and output.proposals.logits.shape[-1] == 3
    for part in (output.proposals, output.layers[0]):  # both train them
        [gradient] = torch.autograd.grad(part.logits.sum(), [model.class_heads[0].weight], retain_graph=True)
        assert gradient.any()
    SetLoss(LossConfig(), "sigmoid")(output, given)[0].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    save_model(model, tmp_path / "model.safetensors")
    again = regolite.load(tmp_path / "model.safetensors")
    assert again.proposals.class_head is again.class_heads[0]
    with torch.no_grad():
        assert torch.equal(again(images).final.boxes, model.eval()(images).final.boxes)
    apart = regolite.build(name, 3, **sizes, shared_heads=False)
    heads = (*model.class_heads.parameters(), *model.box_heads.parameters())
    counts = [sum(p.numel() for p in parameters) for parameters in (apart.parameters(), model.parameters(), heads)]
    assert counts[0] - counts[1] == counts[2]
    with pytest.raises(UserError, match="shared_heads needs token_queries"):
        regolite.build(name, 3, **sizes, token_queries=False)


@pytest.mark.parametrize("option", ["denoising", "token_queries", "mixed_queries"])
def test_options_need_two_stages(option):
    with pytest.raises(UserError, match=f"{option} needs two_stage"):
        regolite.build("deformable_detr_refined_scenes", 4, **{option: True})


def test_mixed_queries_have_learned_contents_and_proposed_positions():
    model = small("dino_scenes", 4, encoder_layers=0).eval()  # without encoder the images of a batch differ surely
    images = batch((64, 64), (64, 64))
    with torch.no_grad():
        _, reference, positions, contents = model.proposals(memory_of(model, images))
    assert torch.equal(contents[0], contents[1]) and torch.equal(contents[0], model.proposals.contents.weight)
    assert not torch.equal(reference[0], reference[1]) and not torch.equal(positions[0], positions[1])
    with pytest.raises(UserError, match="exclude each other"):
        small("dino_scenes", 4, token_queries=True)


def memory_of(model, images):
    memory = []
    model.proposals.register_forward_pre_hook(lambda _, inputs: memory.append(inputs[0]))
    model(images)
    return memory[0]


@pytest.mark.parametrize("twice", [False, True])
def test_a_loss_trains_the_layer_before_only_with_look_forward_twice(twice):
    model = small("dino_scenes", 4, decoder_layers=3, look_forward_twice=twice, denoising=False).train()
    for head in model.box_heads:
        torch.nn.init.normal_(list(head.parameters())[-2])  # zero at first: no gradient would pass
    layers = model(batch((64, 64))).layers
    for later in range(3):
        for earlier in range(later):
            weight = list(model.box_heads[earlier].parameters())[-2]
            loss = layers[later].boxes.sum()
            [gradient] = torch.autograd.grad(loss, [weight], retain_graph=True, allow_unused=True)
            assert (gradient is not None) == (twice and earlier == later - 1)


def test_look_forward_twice_changes_no_prediction():
    model, images = small("dino_scenes", 4).eval(), batch((64, 64), (48, 64))
    with torch.no_grad():
        twice = model(images)
        model.config = replace(model.config, look_forward_twice=False)
        once = model(images)
    assert torch.equal(torch.stack([p.boxes for p in twice.layers]), torch.stack([p.boxes for p in once.layers]))
    with pytest.raises(UserError, match="look_forward_twice needs refine"):
        regolite.build("deformable_detr_scenes", 4, look_forward_twice=True)


@pytest.mark.parametrize("by_class", [{}, {"token_queries": True}, {"mixed_queries": True}])
def test_proposals_learn_classes_only_if_scored_by_class(by_class):
    model = denoiser("deformable_detr_two_stage_scenes", denoising=False, **by_class).train()
    images, given = batch((64, 64)), targets((2,))
    given[0].labels[:] = 3
    output = model(images)
    output.proposals.logits.retain_grad()
    SetLoss(model.model_config.loss, model.scoring)(output, given)[0].backward()
    pushed_up = {c for c in range(4) if (output.proposals.logits.grad[..., c] < 0).any()}
    assert pushed_up == ({3} if by_class else {0})


def test_one_to_many_matches_each_object_with_several_proposals():
    images, given = batch((64, 64)), targets((2,))
    pushed_up = {}
    for k in (1, 3):
        torch.manual_seed(0)
        model = denoiser("deformable_detr_two_stage_scenes", proposals_per_object=k, denoising=False).train()
        output = model(images)
        output.proposals.logits.retain_grad()
        SetLoss(model.model_config.loss, model.scoring)(output, given)[0].backward()
        pushed_up[k] = int((output.proposals.logits.grad[..., 0] < 0).sum())
    assert pushed_up == {1: 2, 3: 6}
