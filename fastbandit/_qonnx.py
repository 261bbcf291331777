"""QONNX: the signs of a network as nodes ``BipolarQuant``, which FINN and hls4ml read.

The node is ``where(x >= 0, 1, -1) * scale`` (QONNX 1.0, ``qonnx.custom_op.general``). Here every
scale is 1: sums of signs are integers, and what scales them is a multiplication of its own, as in
the network. Source: Pappalardo et al., "QONNX", arXiv 2206.07527.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["DOMAIN", "bipolar", "bipolar_nodes", "finish"]

DOMAIN, _NODE, _VERSION = "qonnx.custom_op.general", "BipolarQuant", 1
_SCALE = "bipolar_scale"


def bipolar(x: Tensor) -> Tensor:
    """The sign as a node of the ONNX model, while one is exported; its scale is still to come."""
    y: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{_NODE}", (x,), dtype=x.dtype, shape=x.shape, version=_VERSION
    )
    return y


def bipolar_nodes(model: Any) -> list[Any]:
    """The nodes of the signs in an ONNX model."""
    return [n for n in model.graph.node if (n.domain, n.op_type) == (DOMAIN, _NODE)]


def finish(model: Any) -> None:
    """Give the nodes of a model their scale, and the model the node's definition, in place.

    QONNX's tools look for the scale among the initialisers. The definition is an ONNX function: a
    runtime that does not know QONNX, as ONNX Runtime, takes the nodes by it.
    """
    from onnx import TensorProto, helper

    model.graph.initializer.append(helper.make_tensor(_SCALE, TensorProto.FLOAT, [], [1.0]))
    for node in bipolar_nodes(model):
        del node.input[1:]
        node.input.append(_SCALE)
    if DOMAIN not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, _VERSION))
    standard = next(opset for opset in model.opset_import if opset.domain == "")
    constants = [
        helper.make_node(
            "Constant", [], [name], value=helper.make_tensor(name, TensorProto.FLOAT, [], [value])
        )
        for name, value in (("zero", 0.0), ("plus", 1.0), ("minus", -1.0))
    ]
    model.functions.append(
        helper.make_function(
            DOMAIN,
            _NODE,
            ["x", "scale"],
            ["y"],
            [
                *constants,
                helper.make_node("GreaterOrEqual", ["x", "zero"], ["positive"]),
                helper.make_node("Where", ["positive", "plus", "minus"], ["signs"]),
                helper.make_node("Mul", ["signs", "scale"], ["y"]),
            ],
            [helper.make_opsetid("", standard.version)],
        )
    )
