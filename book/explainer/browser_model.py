"""The detector as the browser runs it: one ONNX file whose outputs are the numbers that the page draws.

The outputs are the arrays of :mod:`regolite.explaining.packing` for all queries. The file is optimized when it is
written, since a browser would need seconds for it at every visit.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from jaxtyping import Float, Int
from onnx_ir.passes.common import DeduplicateInitializersPass
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

from regolite.data.images import ImageSource
from regolite.explaining.packing import arrays_of, pack, ranked
from regolite.exporting import OPSET, Exportable, halve, square
from regolite.inference import detect
from regolite.models.backbone import NormalizedConv2d
from regolite.models.config import config_of
from regolite.models.detector import as_detector
from regolite.tracing.recorder import record
from regolite.utils.modes import evaluating

RECORDS = ("references", "decoder.*", "stage.*")
"""What a page is made of, as :func:`regolite.explain` records it."""


GZIP = 31
"""``wbits`` of zlib: the largest window, with the header of gzip."""


class BrowserModel(Exportable):
    """A detector with the arrays of a page as outputs, for one image.

    Args:
        model: a detector with deformable attention, with or without REGO.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(as_detector(model), records=RECORDS)

    def outputs(self, pixels: Float[Tensor, "1 3 S S"], sizes: Int[Tensor, "1 2"]) -> dict[str, Tensor]:
        """Detect.

        Args:
            pixels: RGB in [0, 1], the image in the upper left corner; the rest is padding of any value.
            sizes: height and width of the image in pixels.

        Returns:
            The arrays of :func:`regolite.explaining.packing.arrays_of` for all queries, and ``class_scores``
            ``[S, Q, C]``, the scores of all classes for the base detector and each stage; all in float32.
            Boxes, points and regions are fractions of the image.
        """
        _, trace = self.traced(pixels, sizes)
        arrays = arrays_of(trace, ranked(trace))
        arrays["class_scores"] = torch.stack([boxes.scores[0] for boxes in trace.by_stage])
        return {name: values.float() for name, values in arrays.items()}


def header_of(model: nn.Module, image: ImageSource) -> dict[str, Any]:
    """What the page has to know of a model beside the arrays: layers, stages, strides, alphas, and its classes."""
    with record(model, RECORDS) as trace:
        detect(model, image)
    header, _ = pack(trace)
    config = config_of(model)
    of_the_image = ("width", "height", "arrays")
    header = {name: value for name, value in header.items() if name not in of_the_image}
    return {**header, "classes": list(trace.classes), "model": config.preset}


def write_model(model: nn.Module, file: Path, size: int, image: ImageSource) -> None:
    """Write a model for square images of one size as an ONNX file with weights of half precision.

    Args:
        model: a detector with deformable attention, with or without REGO.
        file: the ONNX file.
        size: side of the square, a multiple of 32.
        image: an image to trace the model with.

    Raises:
        ValueError: the graph has a loop, which takes a browser seconds.
    """
    pixels, shape = (values[None] for values in square(image, size))
    module = BrowserModel(model)
    with evaluating(module), torch.no_grad():
        names = list(module.outputs(pixels, shape))
        program = torch.export.export(module, (pixels, shape), strict=False)
    # onnxruntime optimizes the graph below. onnxscript's own optimizer would take twenty seconds more.
    converted = torch.onnx.export(
        program, input_names=["pixels", "sizes"], output_names=names, opset_version=OPSET, dynamo=True,
        verbose=False, optimize=False,
    )  # fmt: skip
    assert converted is not None  # with dynamo=True and no file name
    fold_constants(converted.model)
    DeduplicateInitializersPass()(converted.model)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.onnx"
        converted.save(str(plain))
        _optimize(plain, file)
    proto = onnx.load(file)
    _unscale(proto.graph, module.detector)
    halve(proto.graph, lossless=True)
    if loops := {node.op_type for node in proto.graph.node} & {"Loop", "Scan", "If"}:
        raise ValueError(f"{file.name} has nodes of type {', '.join(sorted(loops))}, which are slow in a browser")
    onnx.helper.set_model_props(proto, {"size": str(size), "header": json.dumps(header_of(model, image))})
    _align(proto)
    onnx.save(proto, file)


def compressed(content: bytes) -> bytes:
    """A model as a page fetches it: gzip, after all bytes at even places those at odd places.

    Of two bytes of a weight, one is noise; apart from the others they compress better, by half a megabyte. Few strings
    occur twice, so zlib is told to rely on the frequencies of bytes (Z_FILTERED), in shorter blocks: 0.3 MB less.
    """
    packer = zlib.compressobj(9, wbits=GZIP, memLevel=7, strategy=zlib.Z_FILTERED)
    return packer.compress(content[0::2] + content[1::2]) + packer.flush()


def _optimize(source: Path, file: Path) -> None:
    """Write the graph as onnxruntime optimizes it, without what depends on this machine's processor."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(file)
    options.log_severity_level = 3  # it warns that the file may suit this machine only, which holds for a higher level
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _unscale(graph: Any, detector: nn.Module) -> None:
    """Store the weights of convolutions without the scale of the normalization, and multiply when a session is created.

    The weights of the shipped checkpoints are numbers of half precision, which the products are not.
    """
    convolutions = []
    for module in detector.modules():
        if isinstance(module, NormalizedConv2d):
            scale = module.norm.weight * (module.norm.running_var + module.norm.eps).rsqrt()
            convolutions.append((module.weight.detach().numpy(), scale[:, None, None, None].numpy()))
    for tensor in list(graph.initializer):
        values = onnx.numpy_helper.to_array(tensor)
        for weight, scale in convolutions:
            if values.shape == weight.shape and np.allclose(values, weight * scale, rtol=1e-5, atol=0):
                factors = {f"{tensor.name}.weight": weight, f"{tensor.name}.scale": scale}
                graph.node.insert(0, onnx.helper.make_node("Mul", list(factors), [tensor.name]))
                graph.initializer.remove(tensor)
                graph.initializer.extend(onnx.numpy_helper.from_array(x, name) for name, x in factors.items())
                break


def _align(proto: Any) -> None:
    """Let the numbers of half precision begin at even bytes, so that :func:`compressed` keeps their halves apart."""
    for before, tensor in itertools.pairwise(proto.graph.initializer):
        if tensor.data_type == onnx.TensorProto.FLOAT16 and proto.SerializeToString().index(tensor.raw_data) % 2:
            before.doc_string = "-"  # three bytes in the file
