"""The page of explain: its numbers are the trace's, its texts stay text, it is small, and it needs nothing else."""

import base64
import json
import re

import numpy as np
import pytest
import small_models
import torch
from PIL import Image
from test_recorder import with_rego

import regolite
from regolite import Trace, UserError, record
from regolite.cli import main
from regolite.data.images import read_image
from regolite.explaining import FOLDER, MODULES, page_of, script_of
from regolite.explaining.packing import MOST, Arrays, pack
from regolite.models.presets import configure
from regolite.plots import drawing
from regolite.tracing.trace import AttentionMap, Boxes, Frame, Sampling

CLASSES = ("cat", "dog", "cup", "car", "kite")
HOSTILE = '</script><img src=x onerror=alert(1)>&\n"quoted" \u202e \u05e9\u05dc\u05d5\u05dd.jpg'


def prepared(model):
    model.model_config = configure("detr_tiny", image_size=96, classes=CLASSES)
    return model


def image_of(width=90, height=70):
    return Image.effect_noise((width, height), 60).convert("RGB")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return prepared(with_rego("two_stage"))


def traced(model, image):
    with record(model) as trace:
        regolite.detect(model, image)
    return trace


def unpacked(header, content):
    """The arrays by name, as pack.js decodes them."""
    arrays = {}
    for name, about in header["arrays"].items():
        count = int(np.prod(about["shape"]))
        codes = np.frombuffer(content, f"<u{int(about['kind'][4:]) // 8}", count, about["at"])
        arrays[name] = torch.tensor((about["low"] + about["step"] * codes.astype(float)).reshape(about["shape"]))
    return arrays


def header_of(page):
    return json.loads(re.search(r'id="header">(.*?)</script>', page.html).group(1))


# ------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("size", [(90, 70), (1999, 501)])
def test_the_numbers_of_a_page_are_those_of_the_trace(model, size):
    trace = traced(model, image_of(*size))
    header, content = pack(trace)
    arrays = unpacked(header, content)
    assert (header["width"], header["height"]) == size
    assert (header["layers"], header["stages"], header["alphas"]) == (2, 2, [2.0, 1.0])
    queries = arrays["queries"].long()
    pixels = torch.tensor(size, dtype=torch.float64)
    predictions = [trace[name] for name in trace.names("decoder.*.boxes")] + trace.by_stage[1:]
    for row, boxes in enumerate(predictions):
        scores, labels = boxes.best()
        center, extent = arrays["boxes"][row].split(2, -1)
        corners = torch.cat([center - extent / 2, center + extent / 2], -1) * pixels.repeat(2)
        assert (corners - boxes.boxes_xyxy()).abs().max() < 0.5
        assert (arrays["scores"][row] - scores).abs().max() < 1e-4
        assert (arrays["labels"][row] == labels).all()
    for layer, name in enumerate(trace.names("decoder.*.cross")):
        read = trace[name]
        assert (arrays["points"][layer] * pixels - read.points()[queries]).abs().max() < 0.5
        assert (arrays["origins"][layer] * pixels - read.reference_points()[queries, 0]).abs().max() < 0.5
        assert (arrays["weights"][layer] - read.weights[0, queries]).abs().max() < 1e-4
    for stage, name in enumerate(trace.names("stage.*.glimpses")):
        assert (arrays["regions"][stage] * pixels.repeat(2) - trace[name].boxes_xyxy()).abs().max() < 0.5
        assert (arrays["region_levels"][stage] == trace[name].level[0]).all()
    for entry, (stage, layer) in enumerate(header["relations"]):
        name = f"stage.{stage}.relations.{layer}" if stage else f"decoder.{layer}.self"
        assert (arrays["relations"][entry] - trace[name].weights[0, :, queries].mean(0)).abs().max() < 1e-4
    assert (
        arrays["references"] * pixels.repeat(2) - trace["references"].references[0] * pixels.repeat(2)
    ).abs().max() < 0.5


@pytest.mark.parametrize("name", ["detr", "smca", "anchor_detr"])
def test_dense_attention_is_stored_as_cells(name):
    torch.manual_seed(0)
    trace = traced(prepared(small_models.DETECTORS[name]()), image_of())
    header, content = pack(trace)
    arrays = unpacked(header, content)
    assert header["stages"] == 0 and "points" not in arrays and "regions" not in arrays
    assert arrays["cells"].shape[-1] == sum(level["rows"] * level["columns"] for level in header["maps"])
    for layer, record_name in enumerate(trace.names("decoder.*.cross")):
        for row, query in enumerate(arrays["queries"].int().tolist()):
            expected = trace[record_name].of(query)
            found = arrays["cells"][layer, row] * arrays["peaks"][layer, row]
            assert (found - expected).abs().max() <= expected.max() / 255


def test_numbers_that_are_not_finite_and_arrays_of_one_value():
    arrays = Arrays()
    arrays.add("odd", torch.tensor([3, 1, 2]), bits=8)
    arrays.add("same", torch.full((2, 2), 0.25))
    arrays.add("wild", torch.tensor([1.0, float("nan")]))
    found = unpacked({"arrays": arrays.layout}, arrays.content)
    assert found["odd"].tolist() == [3, 1, 2] and found["same"].tolist() == [[0.25] * 2] * 2
    assert found["wild"].tolist() == pytest.approx([1.0, 0.0])


def test_a_large_model_and_a_large_photograph_give_a_page_of_at_most_6_mb():
    queries, layers, frame = 900, 6, Frame((512, 512), torch.tensor([[512, 512]]), torch.tensor([[2000, 2000]]))
    shapes = ((64, 64), (32, 32), (16, 16), (8, 8))
    records = {}
    for layer in range(layers):
        records[f"decoder.{layer}.self"] = AttentionMap(torch.rand(1, 1, queries, queries), (), None, frame)
        records[f"decoder.{layer}.cross"] = Sampling(
            torch.rand(1, queries, 8, 4, 4, 2),
            torch.rand(1, queries, 8, 4, 4),
            torch.rand(1, queries, 4, 4),
            shapes,
            frame,
        )
        records[f"decoder.{layer}.boxes"] = Boxes(
            torch.randn(1, queries, 91), torch.rand(1, queries, 4), "sigmoid", frame
        )
    page = page_of(image_of(2000, 2000), Trace(records, frame))
    assert 2_000_000 < len(page.html.encode()) <= 6_000_000
    arrays = header_of(page)["arrays"]
    assert arrays["boxes"]["shape"] == [layers, queries, 4], "boxes of all queries"
    assert 50 < arrays["queries"]["shape"][0] <= MOST


# ---------------------------------------------------------------------------------------------------------- the page


def test_the_page_loads_nothing(model):
    page = regolite.explain(model, image_of())
    assert not re.findall(r'\b(?:src|href)="(?!data:)', page.html)
    assert not re.findall(r"\b(?:import|fetch|url)\(|XMLHttpRequest|@import|^import ", page.html, flags=re.MULTILINE)
    assert not re.findall(r"\{\{\w+\}\}", page.html), "a place of the template is empty"


def test_words_of_others_stay_text(model, tmp_path):
    model = prepared(with_rego("two_stage"))
    model.model_config = configure("detr_tiny", image_size=96, classes=(HOSTILE, "a", "b", "c", "{{js}}"))
    page = regolite.explain(model, image_of(), name=HOSTILE, credit=HOSTILE)
    assert page.html.count("</script>") == 3 and "<img src=x" not in page.html
    header = header_of(page)
    assert header["name"] == header["credit"] == header["classes"][0] == HOSTILE
    [title] = re.findall("<title>(.*?)</title>", page.html, flags=re.DOTALL)
    assert title.startswith("&lt;/script&gt;&lt;img") and "\n" not in title
    assert "innerHTML" not in page.html and "insertAdjacentHTML" not in page.html and "document.write" not in page.html
    assert page.save(tmp_path / "page.html").read_text("utf-8") == page.html
    assert regolite.explain(model, image_of(), name="\udcff").save(tmp_path / "page.html").stat().st_size


def test_the_image_of_the_page_is_upright_and_small(model):
    page = regolite.explain(model, image_of(2600, 1300))
    [photo] = re.findall(r'id="photo"[^>]* src="data:image/jpeg;base64,([^"]+)"', page.html)
    assert read_image(base64.b64decode(photo)).size == (1280, 640)
    assert (header_of(page)["width"], header_of(page)["height"]) == (2600, 1300)


def test_the_scripts_are_modules_that_become_one():
    assert {path.name for path in FOLDER.glob("*.js")} == set(MODULES)
    whole = script_of([FOLDER / module for module in MODULES])
    assert not re.findall(r"^\s*(?:import|export)\b", whole, flags=re.MULTILINE)
    given: dict[str, set[str]] = {}
    for module in MODULES:
        text = (FOLDER / module).read_text("utf-8")
        for wanted, source in re.findall(r'^import \{([^}]*)\} from "\./(\S+)";', text, flags=re.MULTILINE):
            assert {name.strip() for name in wanted.split(",")} - {""} <= given[source], f"{module} from {source}"
        given[module] = set(re.findall(r"^export (?:async )?(?:function|const) (\w+)", text, flags=re.MULTILINE))


def test_modules_of_one_script_may_share_names(tmp_path):
    (tmp_path / "a.js").write_text("const own = 1;\nexport const one = own;\nexport function two() {}\n")
    (tmp_path / "b.js").write_text('import { one as a, two } from "./a.js";\nconst own = a;\nawait two();\n')
    script = script_of([tmp_path / "a.js", tmp_path / "b.js"])
    assert script.split("\n") == [
        "const $a = (() => {", "const own = 1;", "const one = own;", "function two() {}", "", "return { one, two };",
        "})();", "", "const { one: a, two } = $a;", "const own = a;", "await two();", "",
    ]  # fmt: skip


def test_the_colors_are_those_of_the_figures():
    script = (FOLDER / "draw.js").read_text("utf-8")
    for name, colors in (("STAGE_COLORS", drawing.STAGE_COLORS), ("LEVEL_COLORS", drawing.CLASS_COLORS)):
        assert json.loads(re.search(rf"const {name} = (\[.*?\]);", script).group(1)) == list(colors)
    assert f'INK = "{drawing.INK}"' in script


def test_chapters_are_those_of_the_course():
    chapters = re.findall(r'data-chapter="(\w+)">([^<]+)<', (FOLDER / "equations.html").read_text("utf-8"))
    folder = FOLDER.parents[1] / "notebooks"
    assert len(chapters) >= 7
    for name, title in chapters:
        notebook = json.loads((folder / f"{name}.ipynb").read_text("utf-8"))
        assert "".join(notebook["cells"][0]["source"]).startswith(f"# {title}\n")


# ------------------------------------------------------------------------------------------------------- ways to it


def test_a_file_gives_its_name_and_stages_can_be_left_out(model, tmp_path):
    image_of().save(tmp_path / "photo.png")
    header = header_of(regolite.explain(model, tmp_path / "photo.png", threshold=0.1, stages=1, book="../notebooks/"))
    assert (header["name"], header["model"], header["book"]) == ("photo.png", "detr_tiny", "../notebooks/")
    assert (header["threshold"], header["stages"]) == (0.1, 1)
    assert header_of(regolite.explain(model, image_of(), stages=0))["stages"] == 0


def test_a_trace_shows_what_it_has(model):
    image = image_of()
    with record(model, "*.boxes*") as trace:
        regolite.detect(model, image)
    header = header_of(page_of(image, trace))
    assert set(header["arrays"]) == {"boxes", "scores", "labels", "queries"}
    assert header["relations"] == [] and header["stages"] == 2


def test_the_explorer_writes_the_page_of_its_image(model, tmp_path):
    from regolite.viewers import Explorer

    Image.effect_noise((64, 48), 60).convert("RGB").save(tmp_path / "one.png")
    explorer = Explorer(model, [tmp_path / "one.png"])
    page = explorer.save_html(tmp_path / "one.html").read_text("utf-8")
    assert '"name": "one.png"' in page and '"model": "detr_tiny"' in page
    with pytest.raises(UserError, match="there is no image yet"):
        Explorer(model).save_html(tmp_path / "none.html")


def test_the_command_writes_a_page(tmp_path, capsys):
    image_of().save(tmp_path / "photo.png")
    assert main(["explain", str(tmp_path / "photo.png"), "--html", str(tmp_path / "new" / "page.html")]) == 0
    assert re.search(r"page\.html: 0\.\d MB; open it in a browser$", capsys.readouterr().out)
    page = (tmp_path / "new" / "page.html").read_text("utf-8")
    assert '"model": "rego_deformable_detr_everyday"' in page and "<title>photo.png</title>" in page


class NoQueries(torch.nn.Module):
    """No detector."""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": "none.jpg"}, "none.jpg does not exist"),
        ({"image": 3}, "int is not an image"),
        ({"threshold": 1.5}, r"threshold=1\.5 must be a number from 0 to 1"),
        ({"threshold": "high"}, "threshold='high' must be a number"),
        ({"stages": 3}, "stages is 3, and this model has 0 to 2"),
        ({"model": "everyday"}, "model='everyday' is not|model is"),
        ({"model": NoQueries()}, "NoQueries"),
        ({"trace": Trace()}, "nothing is recorded yet"),
        ({"trace": "another size"}, "the image has 90 x 70 pixels, but the trace is of 60 x 50"),
        ({"trace": "no boxes"}, r"the trace has no decoder\.\*\.boxes"),
        ({"path": "."}, "is a folder; give a file"),
        ({"path": "photo.png/page.html"}, "a part of the path is a file|cannot find"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_clear_error(change, said, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = image_of()
    image.save("photo.png")
    if change.get("trace") == "another size":
        change = {"trace": traced(model, image_of(60, 50))}
    elif change.get("trace") == "no boxes":
        with record(model, "decoder.*.cross") as trace:
            regolite.detect(model, image)
        change = {"trace": trace}
    with small_models.unchecked(), pytest.raises(UserError, match=said) as caught:
        if "trace" in change:
            page_of(image, change["trace"])
        else:
            choices = {"model": model, "image": image} | {k: v for k, v in change.items() if k != "path"}
            regolite.explain(**choices).save(change.get("path", "page.html"))
    assert "\n" not in str(caught.value)
