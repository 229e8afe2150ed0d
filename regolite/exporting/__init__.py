"""Export: detectors as ONNX files and exported PyTorch programs, which run without this package.

:func:`export` writes a detector for square images of one size. Smaller and oblong images are padded, and tell their own
height and width, so that one file serves images of every shape. Normalization is part of the file. See
``detect_onnx.py`` beside an exported file for all that its user has to do.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regolite.data import batch_images, list_images, make_transform, read_image
from regolite.data.images import ImageSource
from regolite.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from regolite.errors import UserError
from regolite.exporting.card import write_card
from regolite.inference import check_stages, run
from regolite.models.config import config_of
from regolite.models.detector import Detector, as_detector
from regolite.tracing.recorder import record
from regolite.tracing.trace import Trace
from regolite.types import ImageBatch, Prediction
from regolite.utils.devices import constant
from regolite.utils.files import write_atomic
from regolite.utils.modes import evaluating
from regolite.utils.validation import shown, whole

Format = Literal["onnx", "torch-export"]
Precision = Literal["fp32", "fp16", "int8"]

OPSET = 20
"""ONNX's version of operators; the first with the ``GridSample`` that deformable attention needs."""

TOLERANCE = 1e-3
"""Largest difference of a logit or a box coordinate between a file of full precision and PyTorch."""

PHOTOGRAPHS = Path("data/coco_tiny/images")
"""Two of these check a file where no images are given. The repository has them, an installed package does not."""


class Exportable(nn.Module):
    """A detector whose inputs and outputs are plain tensors.

    Args:
        detector: the detector.
        stages: number of REGO stages; all by default.
        records: names of records (:mod:`regolite.tracing.trace`) to return as well.
    """

    def __init__(self, detector: Detector, stages: int | None = None, records: Sequence[str] = ()) -> None:
        super().__init__()
        self.detector, self.stages, self.records = detector, stages, list(records)

    def forward(self, pixels: Float[Tensor, "B 3 S S"], sizes: Int[Tensor, "B 2"]) -> tuple[Tensor, ...]:
        """The values of :meth:`outputs`, in this order: PyTorch exports tuples of tensors."""
        return tuple(self.outputs(pixels, sizes).values())

    def outputs(self, pixels: Float[Tensor, "B 3 S S"], sizes: Int[Tensor, "B 2"]) -> dict[str, Tensor]:
        """Detect.

        Args:
            pixels: RGB in [0, 1], each image in the upper left corner; the rest is padding of any value.
            sizes: height and width of each image in pixels.

        Returns:
            Class ``logits`` [R, B, Q, K] and ``boxes`` [R, B, Q, 4] (``cxcywh`` in [0, 1] of the image) of the base
            detector and of each stage, R results in all; then the fields of the records.
        """
        results, trace = self.traced(pixels, sizes)
        fields = {
            f"{name}.{field}": value
            for name in trace
            for field, value in vars(trace[name]).items()
            if isinstance(value, Tensor) and field != "mask"
        }
        logits, boxes = torch.stack([p.logits for p in results]), torch.stack([p.boxes for p in results])
        return {"logits": logits, "boxes": boxes, **fields}

    def traced(self, pixels: Float[Tensor, "B 3 S S"], sizes: Int[Tensor, "B 2"]) -> tuple[list[Prediction], Trace]:
        """Detect: the predictions of the base detector and of each stage, and the records. Inputs as of the module."""
        rows, columns = (torch.arange(side, device=pixels.device) for side in pixels.shape[2:])
        mask = (rows[None, :, None] >= sizes[:, :1, None]) | (columns[None, None] >= sizes[:, 1:, None])
        mean, deviation = (
            constant(v, pixels.device, pixels.dtype)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD)
        )
        images = ImageBatch(((pixels - mean) / deviation).masked_fill(mask[:, None], 0.0), mask, sizes)
        if not self.records:
            return run(self.detector, images, self.stages).by_stage, Trace()
        with record(self.detector, self.records) as trace:
            return run(self.detector, images, self.stages).by_stage, trace


def export(
    model: nn.Module,
    output: str | Path,
    format: Format = "onnx",
    size: int | None = None,
    stages: int | None = None,
    traces: bool = False,
    precision: Precision = "fp32",
    images: Sequence[ImageSource] | None = None,
    license: str | None = None,
) -> Path:
    """Write a detector as a file that runs without this package, and check its outputs.

    At full precision every output must equal the model's within :data:`TOLERANCE`; at lower precision the outputs must
    be finite, and what it costs is to be measured (``python -m benchmarks.exporting`` does so for one detector).

    Beside an ONNX file come ``NAME.md``, a card with classes, preprocessing and license, and ``detect_onnx.py``, a
    program of one page that needs only numpy, Pillow and onnxruntime. The batch size stays free.

    Args:
        model: a detector with queries, with or without REGO; not one of torchvision's baselines, which return
            a varying number of detections.
        output: the file, ``.onnx`` or ``.pt2``.
        format: ``"onnx"``, or ``"torch-export"`` for a program that ``torch.export.load`` reads.
        size: side of the square that images are padded to, a multiple of 32; by default the model's image size. Images
            are resized by their longer side; a detector trained by the recipe ``detr`` resizes the shorter one, so give
            it the longer.
        stages: number of REGO stages, 0 for the base detector only; all by default. The file has the results of every
            stage.
        traces: add the records of attention, sampling points, glimpses and boxes (:func:`regolite.record`) as outputs,
            except those of the encoder, which are large.
        precision: ``"fp32"``; ``"fp16"`` stores weights in half precision, half the size, and computes in full
            precision; ``"int8"`` quantizes the weights of matrix products dynamically (ONNX only).
        images: photographs to check the file with; by default the first two in :data:`PHOTOGRAPHS`, a path from the
            working folder, and where it has none, two images of random colors.
        license: license of the weights, for the card and the metadata; by default none is named.

    Returns:
        The file.

    Raises:
        UserError: a library is missing, an option is impossible, the model is not on the CPU, PyTorch cannot export it,
            or the outputs of the file are not the model's.
    """
    for name, value, choices in (("format", format, Format), ("precision", precision, Precision)):
        if value not in get_args(choices):
            raise UserError(f"{name}={shown(value)} is unknown: choose one of {', '.join(get_args(choices))}")
    check_stages(model, stages)
    detector = as_detector(model)
    config = config_of(model, "the model does not say its classes: set its model_config (regolite.configure)")
    if not hasattr(detector, "num_logits"):
        raise UserError(
            f"{type(model).__name__} returns a varying number of detections: export a detector with queries"
        )
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise UserError("export takes a model on the CPU, where its file is checked: give model.cpu()")
    size = whole("size", size if size is not None else 32 * round(config.image_size / 32), 32)
    if size % 32:
        raise UserError(f"size={size} must be a multiple of 32; {32 * round(size / 32)} is the nearest")
    output = Path(output)
    suffix = {"onnx": ".onnx", "torch-export": ".pt2"}[format]
    if output.suffix != suffix:
        raise UserError(f"{output}: a file of format {format} ends in {suffix}")
    if format == "onnx":
        for library in ("onnx", "onnxscript", "onnxruntime"):
            _library(library)
    elif precision != "fp32":
        raise UserError(f"precision={precision} is possible for ONNX only")

    pixels, sizes = _examples(size, images)
    with evaluating(model), torch.no_grad():
        module = Exportable(detector, stages, _names(detector, stages, size) if traces else ())
        expected = module.outputs(pixels, sizes)
        program = _program(module, pixels, sizes)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / output.name
            if format == "torch-export":
                torch.export.save(program, file)
                found = torch.export.load(file).module()(pixels, sizes)
            else:
                about = _about(detector, size, precision, stages, license)
                _write_onnx(program, file, list(expected), about)
                if precision != "fp32":
                    reduce_precision(file, precision)
                found = run_onnx(file, pixels, sizes)
            _compare(expected, found, precision)
            write_atomic(output, file.read_bytes())
    if format == "onnx":
        write_card(output, about)
        shutil.copy(Path(__file__).with_name("detect_onnx.py"), output.with_name("detect_onnx.py"))
    return output


def run_onnx(file: str | Path, pixels: Tensor, sizes: Tensor) -> list[Tensor]:
    """The outputs of an exported ONNX file, see :class:`Exportable` for inputs and outputs."""
    inputs = {"pixels": pixels.numpy(), "sizes": sizes.numpy()}
    return [torch.from_numpy(x) for x in session_of(file).run(None, inputs)]


def session_of(file: str | Path) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU, with as many threads as PyTorch uses.

    Raises:
        UserError: onnxruntime is not installed.
    """
    runtime = _library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def square(image: ImageSource, size: int) -> tuple[Float[Tensor, "3 S S"], Int[Tensor, "2"]]:
    """An image as an exported file takes it.

    Args:
        image: any source of :func:`regolite.data.read_image`.
        size: side S of the square; the longer side of the image becomes S.

    Returns:
        RGB in [0, 1], padded at the right or at the bottom; and its height and width before padding.
    """
    batch = batch_images([make_transform("none", size, train=False)(read_image(image))], multiple=size)
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (batch.pixels[0] * deviation + mean).masked_fill(batch.mask[0], 0.0)
    return pixels.clamp(0, 1), batch.sizes[0]


def _examples(size: int, images: Sequence[ImageSource] | None) -> tuple[Tensor, Tensor]:
    """Images as input of the module; at least two, since a batch of one would fix the batch size at one."""
    images = images if images is not None else sorted(PHOTOGRAPHS.glob("*.jpg"))[:2]
    if not images:
        pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        return pixels, torch.tensor([[size, size], [size * 3 // 4, size // 2]])
    found = [square(image, size) for image in list_images(list(images))]
    found = found * 2 if len(found) == 1 else found
    return torch.stack([pixels for pixels, _ in found]), torch.stack([s for _, s in found])


def _program(module: Exportable, pixels: Tensor, sizes: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=1024)
    shapes = {"pixels": {0: batch}, "sizes": {0: batch}}
    try:
        return torch.export.export(module, (pixels[:2], sizes[:2]), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # PyTorch raises many kinds
        first = str(error).strip().splitlines()[0]
        raise UserError(f"PyTorch {torch.__version__} cannot export this model: {first}") from error


def _write_onnx(program: torch.export.ExportedProgram, file: Path, names: list[str], about: dict[str, str]) -> None:
    onnx = _library("onnx")
    try:
        converted = torch.onnx.export(
            program,
            input_names=["pixels", "sizes"],
            output_names=names,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # of several libraries; PyTorch 2.6 raises
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"PyTorch {torch.__version__} cannot convert this model to ONNX; 2.14.1 with onnxscript 0.7 can: {first}"
        ) from error
    assert converted is not None  # with dynamo=True and no file name
    converted.save(str(file))
    proto = onnx.load(file)
    onnx.helper.set_model_props(proto, about)
    onnx.save(proto, file)


def reduce_precision(file: Path, precision: Precision) -> None:
    """Rewrite an ONNX file with weights of another precision, see :func:`export`."""
    onnx = _library("onnx")
    about = onnx.load(file, load_external_data=False).metadata_props
    if precision == "int8":
        quantization = importlib.import_module("onnxruntime.quantization")
        full = file.with_name("full.onnx")
        file.rename(full)
        quantization.quantize_dynamic(full, file, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
    proto = onnx.load(file)
    if precision == "fp16":
        halve(proto.graph)
    onnx.helper.set_model_props(proto, {**{entry.key: entry.value for entry in about}, "precision": precision})
    onnx.save(proto, file)


def halve(graph: Any, lossless: bool = False) -> None:
    """Store large weights in half precision; a Cast, which onnxruntime computes once, gives them back in full.

    Args:
        graph: of an ONNX model; it is changed.
        lossless: leave out weights that are no numbers of half precision.
    """
    onnx = _library("onnx")
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < 1024:
            continue
        name, values = tensor.name, onnx.numpy_helper.to_array(tensor)
        halves = values.astype(np.float16)
        if lossless and (halves != values).any():
            continue
        tensor.CopyFrom(onnx.numpy_helper.from_array(halves, f"{name}.fp16"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.fp16"], [name], to=onnx.TensorProto.FLOAT))
    for cast in reversed(casts):
        graph.node.insert(0, cast)


def _about(detector: Detector, size: int, precision: str, stages: int | None, license: str | None) -> dict[str, str]:
    """What the file says about itself."""
    config = config_of(detector)
    return {
        "classes": json.dumps(list(config.classes)),
        "category_ids": json.dumps(list(config.category_ids)),
        "scoring": detector.scoring,
        "size": str(size),
        "results": json.dumps(["base"] + [f"stage {i}" for i in range(1, _stages(detector, stages) + 1)]),
        "preprocessing": "RGB in [0, 1]; longer side resized to size, bilinear with antialiasing; padded at the right "
        "and at the bottom; sizes are height and width before padding",
        "boxes": "center x, center y, width, height in [0, 1] of the image before padding",
        "precision": precision,
        "model": config.preset,
        "producer": "regolite",
    } | ({"license": license} if license else {})


def _stages(detector: Detector, stages: int | None) -> int:
    return detector.num_stages if stages is None else stages


def _compare(expected: Mapping[str, Tensor], found: Sequence[Tensor], precision: Precision) -> None:
    """Check the outputs of a file: each number if it has full precision, else that they are finite.

    Raises:
        UserError: the outputs of the file are not the model's.
    """
    if precision == "fp32":
        for (name, ours), theirs in zip(expected.items(), found, strict=True):
            if ours.is_floating_point() and not torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE):
                worst = (ours - theirs).abs().max().item()
                raise UserError(f"the exported file has other outputs than the model: {name} differs by {worst:.2g}")
    elif not all(x.isfinite().all() for x in found[:2]):
        raise UserError("the exported file gives numbers that are not finite")


def _names(detector: Detector, stages: int | None, size: int) -> list[str]:
    """The records that a file with traces has: all but the encoder's."""
    with record(detector) as trace:
        Exportable(detector, stages)(torch.zeros(1, 3, size, size), torch.tensor([[size, size]]))
    return [name for name in trace if not name.startswith("encoder.")]


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed: pip install 'regolite[export]'") from error
