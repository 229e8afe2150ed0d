"""The relation score: planted attention scores what it must, and removing the planted cause changes the class."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from regolite import Rego, Trace, UserError, record
from regolite.cli import main
from regolite.data import Scenes, collate, open_data
from regolite.data.scenes import CLASSES, Scene, Thing
from regolite.evaluation.relation_benchmark import as_text as benchmark_as_text
from regolite.evaluation.relation_benchmark import benchmark, shuffled
from regolite.evaluation.relations import interval, percent, relation_cases, relation_score, stand_for, summary
from regolite.evaluation.removal import removal, swapped, without
from regolite.models.presets import configure
from regolite.paper import relation_study
from regolite.tracing.trace import AttentionMap, Boxes, Frame
from regolite.types import DetectorOutput, FeatureMap, Prediction, Target

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results" / "relations"
HEADS = 2
FRAME = Frame((100, 100), torch.tensor([[100, 100]]), torch.tensor([[100, 100]]))
# Object 0 is the ball and 1 decides it, 2 is the nearest one, 3 is far off.
OBJECTS = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.5, 0.2, 0.2, 0.2], [0.2, 0.4, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]])
RELATIONS = [(0, 1)]
EMPTY = [0.5, 0.5, 0.05, 0.05]  # where no object is
LOGIT = math.log(3)


def target(objects=OBJECTS, image_id=1):
    return Target(torch.zeros(len(objects), dtype=torch.long), objects, image_id, (100, 100))


def planted(owners, maps, best=()):
    """A trace of one image: each query lies on an object, or on none (-1)."""
    boxes = torch.stack([OBJECTS[k] if k >= 0 else torch.tensor(EMPTY) for k in owners])[None]
    logits = torch.zeros(1, len(owners), 3)
    logits[0, list(best), 1] = 2.0
    records = {name: AttentionMap(w[None], (), None, FRAME) for name, w in maps.items()}
    stages = [name for name in maps if name.startswith("stage")]
    last = "stage.1.boxes.0" if stages else "decoder.0.boxes"
    records |= {last: Boxes(logits, boxes, "sigmoid", FRAME)}
    return Trace(records, FRAME)


def uniform(queries):
    return torch.full((HEADS, queries, queries), 1 / queries)


def looking_at(queries, query, weights):
    """Everyone looks everywhere but one query, which has these weights, by head or for all."""
    map_ = uniform(queries)
    map_[:, query] = torch.tensor(weights)
    return map_


def score_of(trace, relations=RELATIONS, objects=OBJECTS, name="decoder.0.self"):
    cases = relation_cases(trace, target(objects), relations)
    [row] = [row for row in summary(cases)["maps"] if row["name"] == name]
    return row["score"]["mean"]


# The maps.


def test_attention_at_the_decider_scores_one_and_elsewhere_nothing():
    for most, wanted in ((1, 1.0), (2, 0.0), (3, 0.0)):
        weights = [0.1] * 4
        weights[most] = 0.7
        maps = {"decoder.0.self": looking_at(4, 0, weights), "stage.1.relations.0": looking_at(4, 0, weights)}
        trace = planted([0, 1, 2, 3], maps)
        assert score_of(trace) == wanted
        assert score_of(trace, name="decoder.*.self") == wanted
        assert score_of(trace, name="stage.1.relations.0") == wanted


def test_uniform_attention_scores_chance():
    [case] = relation_cases(planted([0, 1, 2, 3], {"decoder.0.self": uniform(4)}), target(), RELATIONS)
    found = summary([case])
    assert case.chance == pytest.approx(1 / 3)
    assert found["maps"][0]["score"]["mean"] == pytest.approx(1 / 3)
    assert found["maps"][0]["over_chance"]["mean"] == pytest.approx(0.0, abs=1e-7)
    assert found["most_queries"]["mean"] == pytest.approx(1 / 3)
    assert found["nearest"]["mean"] == 0.0


def test_chance_is_that_of_each_ball():
    """By hand: one ball among three others, one among two: (1/3 + 1/2) / 2."""
    maps = {"decoder.0.self": uniform(4)}
    many = relation_cases(planted([0, 1, 2, 3], maps), target(), RELATIONS)
    few = relation_cases(planted([0, 1, 2, -1], maps), target(image_id=2), RELATIONS)
    found = summary([*many, *few])
    assert found["chance"]["mean"] == pytest.approx(5 / 12)
    assert found["maps"][0]["score"]["mean"] == pytest.approx(5 / 12)


def test_weights_of_all_queries_of_an_object_count_together():
    # The decider has twice 0.2, object 2 once 0.3; and the ball's own queries and empty places have most.
    weights = [0.1, 0.2, 0.2, 0.3, 0.05, 0.15]
    owners = [0, 1, 1, 2, 3, -1]
    trace = planted(owners, {"decoder.0.self": looking_at(6, 0, weights)})
    [case] = relation_cases(trace, target(), RELATIONS)
    torch.testing.assert_close(case.weights["decoder.0.self"][1], torch.tensor([0.1, 0.4, 0.3, 0.05]))
    assert case.queries.tolist() == [1, 2, 1, 1]
    found = summary([case])
    assert found["maps"][0]["score"]["mean"] == 1.0
    shares = {"decider": 0.4, "others": 0.35, "itself": 0.1, "nothing": 0.15}
    assert found["maps"][0]["shares"] == pytest.approx(shares)
    assert found["most_queries"]["mean"] == 1.0


def test_the_ball_and_empty_places_are_never_the_most_related():
    weights = [0.4, 0.05, 0.02, 0.01, 0.12, 0.4]
    trace = planted([0, 1, 2, 3, 0, -1], {"decoder.0.self": looking_at(6, 0, weights)}, best=[0])
    assert score_of(trace) == 1.0


def test_the_highest_scoring_query_speaks():
    attention = looking_at(5, 0, [0.1, 0.7, 0.1, 0.1, 0.0])
    attention[:, 4] = torch.tensor([0.1, 0.1, 0.7, 0.1, 0.0])
    for best, wanted in ((0, 1.0), (4, 0.0)):
        assert score_of(planted([0, 1, 2, 3, 0], {"decoder.0.self": attention}, best=[best])) == wanted


def test_the_order_of_queries_does_not_matter():
    owners, names = [0, 1, 2, 3, 0, -1, 2, -1], ("decoder.0.self", "decoder.1.self", "stage.1.relations.0")
    maps = {name: torch.rand(HEADS, 8, 8).softmax(-1) for name in names}
    one = planted(owners, maps, best=[4])
    order = torch.randperm(8)
    moved = {name: w[:, order][:, :, order] for name, w in maps.items()}
    other = planted([owners[k] for k in order], moved, best=[order.tolist().index(4)])
    found, again = (summary(relation_cases(trace, target(), RELATIONS)) for trace in (one, other))
    for row, same in zip(found["maps"], again["maps"], strict=True):
        assert row["score"] == same["score"] and row["heads"] == same["heads"]
        assert row["shares"] == pytest.approx(same["shares"], abs=1e-6)


@pytest.mark.parametrize(
    "owners", [[-1, 1, 2, 3], [0, -1, 2, 3], [0, 1, -1, -1]], ids=["no ball", "no decider", "no rival"]
)
def test_what_is_not_found_is_left_out(owners):
    assert relation_cases(planted(owners, {"decoder.0.self": uniform(4)}), target(), RELATIONS) == []


def test_a_query_lies_on_the_object_that_it_overlaps_most_and_by_half():
    objects = torch.tensor([[0.0, 0.0, 10.0, 10.0], [4.0, 0.0, 14.0, 10.0]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [3, 0, 13, 10], [0, 0, 10, 4.9], [0, 0, 10, 5.1], [30, 30, 40, 40]])
    scores = torch.tensor([[0.1, 0.2], [0.1, 0.1], [0.9, 0.9], [0.3, 0.0], [0.9, 0.9]])
    owner, speaker = stand_for(boxes, scores, objects)
    assert owner.tolist() == [0, 1, -1, 0, -1]
    assert speaker.tolist() == [3, 1]
    assert stand_for(boxes[2:3], scores[2:3], objects)[1].tolist() == [-1, -1]


def test_heads_are_averaged_and_the_best_one_is_chosen_on_other_images():
    """Head 1 always knows; in even images head 0 does too, by luck, and spoils the mean elsewhere."""
    cases = []
    for image_id in range(8):
        lucky = [0.0, 1.0, 0.0, 0.0] if image_id % 2 == 0 else [0.0, 0.0, 1.0, 0.0]
        attention = uniform(4)
        attention[0, 0], attention[1, 0] = torch.tensor(lucky), torch.tensor([0.1, 0.4, 0.3, 0.2])
        trace = planted([0, 1, 2, 3], {"decoder.0.self": attention})
        cases += relation_cases(trace, target(image_id=image_id), RELATIONS)
    [row] = [row for row in summary(cases)["maps"] if row["name"] == "decoder.0.self"]
    assert row["heads"] == [0.5, 1.0]
    assert row["score"]["mean"] == 0.5
    # Chosen among even images, where both are perfect, head 0 comes first and is wrong in the odd ones.
    assert row["best_head"]["mean"] == 0.5
    assert summary(cases[:1])["maps"][0]["best_head"] is None


def test_a_stage_is_compared_with_the_base_ball_by_ball():
    right, wrong = ([0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1])
    cases = []
    for image_id, (base, stage) in enumerate(((right, right), (wrong, right), (wrong, right), (wrong, wrong))):
        maps = {"decoder.0.self": looking_at(4, 0, base), "stage.1.relations.0": looking_at(4, 0, stage)}
        cases += relation_cases(planted([0, 1, 2, 3], maps), target(image_id=image_id), RELATIONS)
    rows = {row["name"]: row for row in summary(cases)["maps"]}
    assert list(rows) == ["decoder.*.self", "decoder.0.self", "stage.1.relations.*", "stage.1.relations.0"]
    assert rows["stage.1.relations.*"]["over_base"]["mean"] == 0.5
    assert rows["decoder.*.self"]["over_base"] is None
    assert [rows[name]["stage"] for name in rows] == [0, 0, 1, 1]


def test_intervals_draw_images_and_not_balls():
    values = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    alone = interval(values, np.arange(8))
    together = interval(values, np.array([5, 5, 5, 5, 9, 9, 9, 9]))
    assert alone["mean"] == together["mean"] == 0.5
    assert (together["low"], together["high"]) == (0.0, 1.0)
    assert 0.0 < alone["low"] < 0.5 < alone["high"] < 1.0
    # Eight tosses: 95 % of the means lie between 1/8 and 7/8.
    assert (alone["low"], alone["high"]) == (0.125, 0.875)
    assert interval(np.ones(3), np.arange(3)) == {"mean": 1.0, "low": 1.0, "high": 1.0}


# Removing.


@pytest.fixture(scope="module")
def scenes():
    return Scenes(40, max_objects=6, split="val")


def balls(scenes, count=None):
    pairs = [(i, ball, decider) for i in range(len(scenes)) for ball, decider in scenes.relations(i)]
    assert len(pairs) > 10
    return pairs[:count]


def test_a_scene_drawn_again_is_the_same_but_for_one_thing(scenes):
    for i, ball, decider in balls(scenes, 12):
        scene = scenes.scene(i)
        before = np.asarray(scene.draw())
        x, y, w, h = scenes.objects(i).boxes[ball].astype(int)
        rows, columns = scene.things[decider].stencil()[0]
        elsewhere = np.ones(before.shape[:2], dtype=bool)
        elsewhere[rows, columns] = False
        for changed in (without(scene, decider), swapped(scene, decider)):
            after = np.asarray(changed.draw())
            assert (after != before).any()
            assert (after == before)[elsewhere].all()
            assert (after == before)[y : y + h, x : x + w].all()
        assert swapped(scene, decider).label(ball) == {12: 13, 13: 12}[scene.label(ball)]
        assert len(without(scene, decider).things) == len(scene.things) - 1


# A world of its own: red things at fixed places, a ball beside the first of them, and a detector that knows the places.

PLACES = {"decider": (40.0, 64.0), "ball": (76.0, 64.0), "rival": (100.0, 24.0), "far": (24.0, 110.0)}
RADII = {"decider": 18.0, "ball": 9.0, "rival": 14.0, "far": 12.0}
RED = ((255.0, 0.0, 0.0),) * 2
SPOT = (40.0 + 0.6 * 18 * math.cos(math.pi / 5), 64.0 + 0.6 * 18 * math.sin(math.pi / 5))
"""A point that a square covers and a star does not."""


class World(Scenes):
    """Images 0, 2, ... show a ball of square, the others a ball of star."""

    def scene(self, i):
        i = range(len(self))[i]
        shapes = {"decider": ("square", "star")[i % 2], "ball": "ball", "rival": "triangle", "far": "triangle"}
        things = [Thing(shape, "dotted", *PLACES[name], RADII[name], colors=RED) for name, shape in shapes.items()]
        things[1] = replace(things[1], colors=Thing.colors, decider=0)
        return Scene(128, (i,), things)


class Planted(nn.Module):
    """Attention of every query by head, whatever is shown."""

    def __init__(self, weights):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(weights).log())

    def forward(self, queries):
        weights = self.logits.expand(len(queries), 4, -1, -1).transpose(1, 2)  # [B, M, Q, S]
        return weights.softmax(-1).mean(1) @ queries


class Layer(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.self_attention, self.cross_attention = Planted(weights), nn.Identity()


class Knower(nn.Module):
    """A query for each thing. The ball's class is that of its decider's shape, by log 3, or hangs on another thing.

    Args:
        weights: of every query's attention to decider, ball, rival and far thing, by head.
        cause: the thing at which it looks for the class; of another than the decider it only asks whether it is there.
        sees_ball: whether the ball is still found where the decider is not.
    """

    scoring, projected, dim, heads, num_logits, feature_channels = "sigmoid", True, 16, 2, len(CLASSES), [16]

    def __init__(self, weights=((0.7, 0.1, 0.1, 0.1),) * 2, cause="decider", sees_ball=True):
        super().__init__()
        self.layer, self.cause, self.sees_ball = Layer(weights), cause, sees_ball
        self.tokens = nn.Parameter(torch.randn(4, 16))
        self.model_config = replace(
            configure("deformable_detr_tiny", weights=None),
            classes=CLASSES, category_ids=tuple(range(1, 15)), image_size=128, augment="none",
        )  # fmt: skip

    def forward(self, images):
        def is_red(x, y):
            color = images.pixels[:, :, round(y), round(x)]
            return color[:, 0] > color[:, 1:].amax(1) + 1.5

        there = is_red(*PLACES[self.cause])
        square, star = CLASSES.index("ball of square"), CLASSES.index("ball of star")
        logits = torch.full((len(images), 4, len(CLASSES)), -20.0)
        logits[:, 1, [square, star]] = -LOGIT
        logits[:, 1, square] = torch.where(there & is_red(*SPOT), LOGIT, -LOGIT)
        logits[:, 1, star] = torch.where(there & ~is_red(*SPOT), LOGIT, -LOGIT)
        boxes = torch.tensor([[*PLACES[name], 1.7 * RADII[name], 1.7 * RADII[name]] for name in PLACES]) / 128
        boxes = boxes.repeat(len(images), 1, 1)
        if not self.sees_ball:
            boxes[~there, 1] = torch.tensor([0.9, 0.9, 0.1, 0.1])
        queries = self.layer.self_attention(self.tokens.expand(len(images), -1, -1))
        maps = [FeatureMap(torch.randn(len(images), 16, 16, 16), images.mask[:, ::8, ::8], 8)]
        return DetectorOutput([Prediction(logits, boxes)], queries, maps)


@pytest.fixture
def world():
    return World(6)


def both(model, world):
    figures, cases = relation_score(model, world, progress=False)
    return figures, removal(model, world, cases, progress=False)["stages"]


def test_a_class_that_hangs_on_the_neighbor_alone_changes_with_it(world):
    """Sigmoid of log 3 is 3/4, and of -log 3 it is 1/4: every change is known."""
    figures, [stage] = both(Knower(), world)
    assert (figures["images"], figures["balls"], figures["cases"]) == (6, 6, 6)
    assert [row["score"]["mean"] for row in figures["maps"]] == [1.0, 1.0]
    assert figures["nearest"]["mean"] == 1.0
    means = {measure: {k: f and f["mean"] for k, f in stage[measure].items()} for measure in ("score", "preference")}
    wanted = {"before": 0.75, "decider_removed": -0.5, "decider_swapped": -0.5, "other_removed": 0.0}
    wanted |= {"related_removed": None, "unrelated_removed": None, "decider_first": 1.0}
    assert means["score"] == pytest.approx(wanted, abs=1e-6)
    wanted |= {"decider_removed": -0.25}  # then both kinds of ball are equally likely
    assert means["preference"] == pytest.approx(wanted, abs=1e-6)
    assert stage["related_cases"] == 0  # it is always the decider
    assert stage["score"]["decider_removed"]["high"] == pytest.approx(-0.5)


def test_attention_may_point_at_what_does_not_matter(world):
    figures, [stage] = both(Knower(((0.1, 0.1, 0.7, 0.1),) * 2), world)
    assert figures["maps"][0]["score"]["mean"] == 0.0
    assert stage["related_cases"] == 6
    assert stage["score"]["related_removed"]["mean"] == stage["score"]["unrelated_removed"]["mean"] == 0.0
    assert stage["score"]["decider_first"]["mean"] == 1.0


def test_a_class_that_hangs_on_the_wrong_thing_is_found_out(world):
    _, [stage] = both(Knower(((0.1, 0.1, 0.7, 0.1),) * 2, cause="rival"), world)
    assert stage["score"]["related_removed"]["mean"] == pytest.approx(-0.5)
    assert stage["score"]["unrelated_removed"]["mean"] == 0.0
    assert stage["score"]["other_removed"]["mean"] == pytest.approx(-0.25)  # the rival, or the far thing
    assert stage["score"]["decider_first"]["mean"] < 1.0
    assert stage["score"]["decider_removed"]["mean"] != 0.0  # without red at the spot it takes all for stars


def test_a_ball_that_is_no_longer_seen_scores_nothing_and_prefers_nothing(world):
    _, [stage] = both(Knower(sees_ball=False), world)
    assert stage["score"]["decider_removed"]["mean"] == pytest.approx(-0.75)
    assert stage["preference"]["decider_removed"]["mean"] == pytest.approx(-0.25)
    assert stage["score"]["decider_swapped"]["mean"] == pytest.approx(-0.5)


def test_images_in_files_cannot_be_drawn_again(world, tmp_path):
    model = Knower()
    world.write(tmp_path)
    folder = open_data(tmp_path, "train")
    figures, cases = relation_score(model, folder, progress=False)
    assert figures == relation_score(model, world, progress=False)[0]
    with pytest.raises(UserError, match="cannot be drawn again"):
        removal(model, folder, cases)


# Stages, and the command.


def with_stages():
    return Rego(Knower(), stages=2, ffn_dim=32, dropout=0.0)  # whose boxes at the start are those of the base


def test_stages_are_scored_by_their_own_relations(world):
    model = with_stages().train()
    figures, stages = both(model, world)
    assert model.training
    names = [row["name"] for row in figures["maps"]]
    assert [name for name in names if "*" in name] == [
        "decoder.*.self",
        *(f"stage.{i}.{part}" for i in (1, 2) for part in ("decoder.*.self", "relations.*")),
    ]
    assert len(stages) == 3 and [stage["stage"] for stage in stages] == [0, 1, 2]

    figures, _ = relation_score(model, world, stages=1, batch_size=4, progress=False)
    assert {row["stage"] for row in figures["maps"]} == {0, 1}
    assert relation_score(model, world, stages=0, progress=False)[0]["maps"][-1]["name"] == "decoder.0.self"


def test_weights_of_cases_are_those_of_the_recorded_map(world):
    model = with_stages().eval()
    torch.manual_seed(1)
    _, cases = relation_score(model, world, batch_size=6, progress=False)
    torch.manual_seed(1)
    images, _ = collate([world[i] for i in range(6)], multiple=32)
    with record(model) as trace, torch.inference_mode():
        model(images)
    for n, case in enumerate(cases):
        for name, weights in case.weights.items():
            torch.testing.assert_close(weights, trace[name].weights[n, :, 1])


def test_what_cannot_be_scored_is_refused(world):
    with pytest.raises(UserError, match="give scenes"):
        relation_score(Knower(), Scenes(3, context=0), progress=False)
    blind = Knower(sees_ball=False)
    blind.cause = "ball"  # which is never red: the ball is never found
    with pytest.raises(UserError, match="train it longer"):
        relation_score(blind, world, progress=False)


# The benchmark.


def test_the_benchmark_compares_with_shuffled_weights_and_effects(world):
    model = Knower()
    figures, cases = relation_score(model, world, progress=False)
    found = benchmark(model, world, cases, removal(model, world, cases, progress=False), progress=False)
    [row] = found["rows"]
    assert (found["cases"], found["matched"], row["matched"]) == (6, 0, None), "the decider is always the nearest"
    assert row["pointing"]["mean"] == 1.0 and found["nearest"]["mean"] == 1.0
    assert row["decider_removed"]["mean"] == pytest.approx(-0.25) and row["other_removed"]["mean"] == pytest.approx(0.0)
    wanted = relation_score(shuffled(model), world, progress=False)[0]["maps"][0]["score"]["mean"]
    assert row["shuffled"]["mean"] == wanted


def test_matched_balls_have_a_nearer_object(monkeypatch):
    """Object 2 is nearer than the decider: the map that points at the decider is right, the nearest object is wrong."""
    weights = [0.1, 0.7, 0.1, 0.1]
    cases = relation_cases(planted([0, 1, 2, 3], {"decoder.0.self": looking_at(4, 0, weights)}), target(), RELATIONS)
    other = relation_cases(planted([0, 1, 2, 3], {"decoder.0.self": uniform(4)}), target(), RELATIONS)
    monkeypatch.setattr("regolite.evaluation.relation_benchmark.relation_score", lambda *_: ({}, other))
    found = benchmark(nn.Identity(), Scenes(1), cases)
    assert found["matched"] == 1 and found["nearest"]["mean"] == 0.0
    assert found["rows"][0]["matched"]["mean"] == 1.0
    assert found["rows"][0]["shuffled_matched"]["mean"] == pytest.approx(1 / 3)
    assert "1 balls, 1 matched" in benchmark_as_text(found) and "removed" not in benchmark_as_text(found)


def test_maps_of_another_model_are_scored_for_the_same_balls(world):
    elsewhere = Knower(weights=((0.1, 0.1, 0.7, 0.1),) * 2)
    figures, cases = relation_score(Knower(), world, progress=False, attention_of=elsewhere)
    assert [row["score"]["mean"] for row in figures["maps"]] == [0.0, 0.0] and len(cases) == 6


def test_shuffled_weights_are_the_same_numbers_in_another_order():
    model = nn.Linear(20, 20)
    before = {name: value.clone() for name, value in model.named_parameters()}
    one, two, other = shuffled(model), shuffled(model), shuffled(model, 1)
    for name, value in one.named_parameters():
        assert torch.equal(model.get_parameter(name), before[name]) and torch.equal(value, two.get_parameter(name))
        assert not torch.equal(value, before[name]) and not torch.equal(value, other.get_parameter(name))
        assert torch.equal(value.flatten().sort()[0], before[name].flatten().sort()[0])


def test_command_takes_a_model_of_transformers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    del transformers
    relation_study.ARMS["detr_hf"].build().model.save_pretrained(tmp_path)
    words = ["relations", "--data", "scenes:9:val=2:size=64", "--image-size", "64", "--device", "cpu", "--limit", "2"]
    assert main([*words, "--model", str(tmp_path)]) == 2
    assert "lacks" in (said := capsys.readouterr().err) or "train it longer" in said
    assert main([*words, "--model", str(tmp_path), "--checkpoint", "x"]) == 2
    assert "give either --checkpoint or --model" in capsys.readouterr().err
    assert main([*words, "--model", str(tmp_path), "--stages", "1"]) == 2


# The study.


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, arm in relation_study.ARMS.items() if arm.build])
def test_every_detector_of_the_study_trains_and_goes_on(name, tmp_path, monkeypatch):
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *_: [])
    found = relation_study.run(name, 0, tmp_path, small=True)
    assert found["config"]["model"] == name and set(found["benchmark"]) == set(relation_study.TESTS)
    (tmp_path / name / "0" / "result.json").unlink()
    again = relation_study.run(name, 0, tmp_path, small=True)  # the training is over, and is not started again
    assert again["stages"] == found["stages"]


def test_the_study_refuses_unknown_arms_and_prints_what_is_there(tmp_path):
    with pytest.raises(UserError, match="no arm 'detr_hff'; did you mean 'detr_hf'"):
        relation_study.conduct(["detr_hff"], folder=tmp_path, results=tmp_path)
    assert relation_study.report(tmp_path) == "no detector is measured yet"
    said = relation_study.report(RESULTS)
    assert "the shipped REGO" in said and "stage.3.relations.*" in said


def test_texts_give_the_figures_of_the_stored_benchmark():
    [one] = json.loads((RESULTS / "shipped.json").read_text("utf-8"))["runs"]
    plain, nearer = (one["benchmark"][kind] for kind in ("plain", "nearer"))
    rows, plain_rows = ({row["name"]: row for row in found["rows"]} for found in (nearer, plain))
    second, third = rows["stage.2.decoder.*.self"], rows["stage.3.relations.*"]
    best, random, chance = (percent(value) for value in (second["pointing"], second["shuffled"], nearer["chance"]))
    chapter = (ROOT / "notebooks" / "13_look_inside.ipynb").read_text("utf-8")
    said = f"for {best.replace(' [', ' % [')} of {nearer['cases']} balls, where chance is {chance.split()[0]} %"
    assert said in chapter and f"reaches {random.replace(' [', ' % [')}" in chapter
    changes = [round(-100 * row["decider_swapped"]["mean"]) for row in (third, plain_rows["stage.3.relations.*"])]
    assert f"by {changes[0]} points ({changes[1]} on plain scenes)" in chapter

    page = " ".join((ROOT / "book" / "docs" / "looking-inside.md").read_text("utf-8").split())
    was, shown = (percent(plain_rows[name]["pointing"]).split()[0] for name in (second["name"], third["name"]))
    shuffled_share = percent(plain_rows[third["name"]]["shuffled"]).split()[0]
    assert f"({shuffled_share} % and {shown} %)" in page and f"by {changes[0]} points" in page
    assert f"falls from {was} to {best.split()[0]} %" in page and f"right for {percent(nearer['nearest'])[0]} %" in page
    better = [name for name, row in rows.items() if row["pointing"]["mean"] > row["shuffled"]["mean"] + 0.02]
    assert not better, "the page says that no map is better than with shuffled weights"


def test_command(monkeypatch, tmp_path, capsys, world):
    monkeypatch.setattr("regolite.load", lambda path, device: with_stages())
    monkeypatch.setattr(
        "regolite.data.open_data", lambda root, split, transform, limit: World(limit, transform=transform)
    )
    words = ["relations", "--checkpoint", "model", "--data", "scenes:9", "--device", "cpu", "--limit", "4", "--json"]
    assert main([*words, str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    for words_ in ("decoder.*.self", "  stage.2.relations.1", "chance", "decider swapped", "stage 2"):
        assert words_ in printed
    assert max(map(len, printed.splitlines())) <= 120
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["images"] == 4 and len(found["removal"]["stages"]) == 3 and found["data"] == "scenes:9"

    assert main([*words, str(tmp_path / "less.json"), "--no-removal", "--stages", "0"]) == 0
    assert "removed" not in capsys.readouterr().out
    assert "removal" not in json.loads((tmp_path / "less.json").read_text())


def test_command_refuses_files_for_removal(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("regolite.load", lambda path, device: with_stages())
    World(2).write(tmp_path)
    words = ["relations", "--checkpoint", "model", "--data", str(tmp_path), "--split", "train", "--device", "cpu"]
    assert main(words) == 2
    assert "--no-removal" in capsys.readouterr().err
    assert main([*words, "--no-removal"]) == 0
