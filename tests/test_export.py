"""Export of the convolution ops and of whole networks: as plain ops, which run anywhere."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import fastbandit
from fastbandit import export as module
from fastbandit import ops
from fastbandit.export import ExportError, export_model, main
from fastbandit.genotype import Genotype
from fastbandit.models import BEST, Architecture, Model, save_model
from fastbandit.nn.binary import pack
from fastbandit.operations import OPERATIONS

needs_onnx = pytest.mark.skipif(
    not module.has_onnx(),
    reason="onnx, onnxscript and onnxruntime are not installed",
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 1, 5, 5))
        self.dense = nn.Parameter(torch.randn(6, 6, 5, 5))
        self.parameters_of_filters = nn.ParameterList(
            [nn.Parameter(1.0 + torch.rand(6)) for _ in range(5)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = ops.depthwise_conv2d(x, self.weight, padding=4, dilation=2, relu=True)
        x = ops.dilated_conv2d(x, self.dense, padding=4, relu=True)
        bank = ops.gabor_filters(*self.parameters_of_filters, 3)
        return ops.gabor_conv2d(x, *self.parameters_of_filters) * bank.sum()


def test_an_exported_program_needs_no_kernels_of_this_package():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 6, 8, 8)
    exported = torch.export.export(block, (x,))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets
    assert not [target for target in targets if "fastbandit" in target]
    torch.testing.assert_close(exported.module()(x), block(x), rtol=1e-4, atol=1e-3)


def make_model(operations, denoise="dot", denoise_blocks=False, cells=1) -> Model:
    """Cells whose nodes are one operation of the input each; the last has stride 2, others 1."""
    genotype = Genotype.from_dict(
        {
            "format": "fastbandit.genotype",
            "schema_version": 1,
            "options": {"denoise": denoise},
            "macro": {"layers": cells, "reductions": [cells - 1]},
            "cells": [
                {
                    "name": "a",
                    "nodes": [[{"op": name, "source": 0}] for name in operations],
                    "concat": list(range(1, len(operations) + 1)),
                }
            ],
        }
    )
    architecture = Architecture(
        2, 4, 3, cells, denoise_blocks=denoise_blocks, denoise=denoise, bn_eps=0.1
    )
    torch.manual_seed(0)
    network = architecture.build(genotype, mean=(0.1, 0.2), std=(0.3, 0.4))
    # Weights of a network that was trained: none at its neutral start.
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif "bn" in name and tensor.is_floating_point():
                tensor.normal_(0.3, 0.5)
    network.eval()
    data = {"name": "none", "shape": [2, 9, 9]}
    return Model(network, genotype, architecture, data)


KINDS = ["torch", pytest.param("onnx", marks=needs_onnx)]


# Each composition once: a filter's size is a number in the same nodes.
EACH_KIND = [
    *("max_pool_3x3", "avg_pool_3x3", "skip_connect", "conv_1x1", "conv_5x5", "sep_conv_3x3"),
    *("sep_conv_m_5x5", "dil_conv_7x7", "gab_filt_3x3", "dtp_blok_3x3", "zero"),
    *("bin_sep_conv_3x3", "bin_dil_conv_3x3", "bin_conv_3x3", "bin_conv_d2_3x3"),
]


def kinds(operations):
    return {name.rpartition("_")[0] for name in operations}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_at_both_strides(kind, tmp_path):
    assert kinds(EACH_KIND) == kinds(OPERATIONS)
    model = make_model(EACH_KIND, denoise_blocks=True, cells=2)
    file = tmp_path / "network"
    result = export_model(model, file, kind)
    assert result["input"]["shape"] == ["N", 2, 9, 9]
    assert result["output"]["shape"] == ["N", 4]
    assert result["difference"] < 1e-4
    x = torch.rand(7, 2, 9, 9)
    with torch.no_grad():
        expected = model.network(x)
    assert expected.std() > 1e-2
    run = module._onnx_runner if kind == "onnx" else module._torch_runner
    torch.testing.assert_close(run(file.read_bytes())(x), expected, rtol=1e-3, atol=1e-3)
    if kind == "onnx":
        import onnx

        found = onnx.load(file)
        onnx.checker.check_model(found)
        assert [(opset.domain, opset.version) for opset in found.opset_import] == [("", 18)]
        assert not {node.domain for node in found.graph.node} - {""}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("denoise", ["gaussian", "mean"])
def test_the_other_ways_to_denoise(denoise, kind, tmp_path):
    model = make_model(["dtp_blok_3x3"], denoise)
    assert export_model(model, tmp_path / "network", kind)["difference"] < 1e-4


def test_median_is_refused_where_the_format_has_none(tmp_path):
    model = make_model(["dtp_blok_3x3"], "median")
    with pytest.raises(ExportError, match=r"kind median, and ONNX has no median; expected dot"):
        export_model(model, tmp_path / "network")
    assert list(tmp_path.iterdir()) == []
    export_model(model, tmp_path / "network", "torch")
    # Without such a block the option means nothing.
    if module.has_onnx():
        export_model(make_model(["skip_connect"], "median"), tmp_path / "other")


# -- 1-bit networks -------------------------------------------------------------------------------


def exact_model(operations) -> Model:
    """A network in which every number is a small multiple of a power of two.

    So sums have the same bits in any order, and two programs that compute the same agree in every
    bit of the logits.
    """
    model = make_model(operations)
    architecture = dataclasses.replace(model.architecture, bn_eps=0.25)
    network = architecture.build(model.genotype, mean=(0.25, 0.5), std=(0.5, 0.5))
    generator = torch.Generator().manual_seed(5)

    def fill(tensor, step, most):
        values = torch.randint(-most, most + 1, tensor.shape, generator=generator) * step
        tensor.copy_(values)

    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.fill_(0.75)  # with eps 1
            elif name.endswith("running_mean") or name in [
                f"{name}.weight" for name in ("stem", "classifier")
            ]:
                fill(tensor, 0.25, 3)
            elif tensor.dim() == 4:  # latents: one magnitude for a filter, so alpha is exact too
                size = 2.0 ** -torch.randint(1, 4, (len(tensor), 1, 1, 1), generator=generator)
                fill(tensor, 0.5, 1)
                tensor.copy_(torch.where(tensor >= 0, size, -size))
            elif name.endswith(("bn.weight", "bn1.weight", "bn2.weight", "bias")):
                fill(tensor, 0.25, 3)
    network.eval()
    data = {"name": "none", "shape": [2, 8, 8]}
    return Model(network, model.genotype, architecture, data)


ONE_BIT = ["bin_sep_conv_5x5", "bin_dil_conv_3x3", "bin_conv_3x3", "bin_conv_d2_5x5"]


def exact_images(n):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(17, (n, 2, 8, 8), generator=generator) / 16


@needs_onnx
@pytest.mark.parametrize("kind", ["onnx", "qonnx"])
def test_an_exported_1_bit_network_gives_the_packed_logits_bit_for_bit(kind, tmp_path):
    model = exact_model(ONE_BIT)
    file = tmp_path / "network.onnx"
    assert export_model(model, file, kind)["difference"] == 0
    run, packed = module._onnx_runner(file.read_bytes()), pack(model.network)
    for n in (1, 7):
        x = exact_images(n)
        expected = packed(x)
        assert expected.unique().numel() > n
        assert torch.equal(run(x), expected)


@needs_onnx
def test_qonnx_tools_read_the_file_and_give_the_same_bits(tmp_path):
    pytest.importorskip("qonnx", reason="qonnx is not installed")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.util.cleanup import cleanup_model

    model = exact_model(ONE_BIT)
    file = tmp_path / "network.qonnx.onnx"
    result = export_model(model, file, "qonnx")
    # Two convolutions in a separable block, one in a dense one; the input's signs are made once.
    assert result["signs"] == 2 * 3 + 2 * 1 + 1
    wrapped = ModelWrapper(str(file))
    assert wrapped.get_initializer("bipolar_scale") == 1
    x = exact_images(3)
    wrapped.set_tensor_shape("images", list(x.shape))
    # As FINN and hls4ml do first.
    cleaned = cleanup_model(wrapped).transform(InferDataTypes())
    signs = [node for node in cleaned.graph.node if node.op_type == "BipolarQuant"]
    assert {node.domain for node in signs} == {"qonnx.custom_op.general"}
    assert {cleaned.get_tensor_datatype(node.output[0]).name for node in signs} == {"BIPOLAR"}
    (name,) = (port.name for port in cleaned.graph.input)
    (logits,) = execute_onnx(cleaned, {name: x.numpy()}).values()
    assert torch.equal(torch.from_numpy(logits), pack(model.network)(x))


@needs_onnx
def test_an_onnx_file_has_no_surrogate_and_no_path_of_this_machine(tmp_path):
    import onnx

    model = exact_model(["bin_sep_conv_3x3"])
    file = tmp_path / "network.onnx"
    for kind, sign in (("onnx", "Where"), ("qonnx", "BipolarQuant")):
        export_model(model, file, kind)
        found = onnx.load(file)
        onnx.checker.check_model(found, full_check=True)
        kinds = [node.op_type for node in found.graph.node]
        assert kinds.count(sign) == (2 if kind == "onnx" else 4)  # signs of weights are numbers
        assert not {"Clip", "Abs", "Tanh", "IsNaN"} & set(kinds)
        assert not [node for node in found.graph.node if node.metadata_props]
    # A program of torch can be attacked, so there the surrogate is.
    export_model(model, file, "torch")
    x = exact_images(2).requires_grad_()
    module._torch_runner(file.read_bytes())(x).sum().backward()
    assert x.grad.abs().max() > 0


def test_formats_of_1_bit_networks_refuse_another(tmp_path):
    model = make_model(["sep_conv_m_3x3"])
    with pytest.raises(ExportError, match=r"packed: expected a network with 1-bit weights, got"):
        export_model(model, tmp_path / "network", "packed")
    if module.has_onnx():
        with pytest.raises(ExportError, match=r"qonnx: expected a network with 1-bit layers, got"):
            export_model(model, tmp_path / "network", "qonnx")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_packed_file(tmp_path, capsys):
    model = exact_model(ONE_BIT)
    save_model(
        tmp_path / BEST, dict(model.network.state_dict()), genotype=model.genotype,
        architecture=model.architecture, data=model.data, training={"seed": 3},
    )  # fmt: skip
    assert main([str(tmp_path), "--format", "packed"]) == 0
    file = tmp_path / "model-best.packed.safetensors"
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] == f"exported: {file}"
    assert printed[-1].startswith("next: python -m fastbandit.evaluate ")
    assert printed[-3].startswith(f"size    {file.stat().st_size:,} bytes, ")
    network = fastbandit.load(file)
    x = torch.rand(3, 2, 8, 8)
    assert torch.equal(network(x), model.network(x))
    assert network.about == {"data": model.data, "training": {"seed": 3}}
    assert sorted(f.name for f in tmp_path.iterdir()) == [file.name, BEST]


def test_a_packed_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    original = module.load_packed

    def loaded(file):
        network = original(file)
        network.classifier.bias.data += 1e-6
        return network

    monkeypatch.setattr(module, "load_packed", loaded)
    with pytest.raises(ExportError, match=r"the packed network differs .* expected the same bits"):
        export_model(exact_model(ONE_BIT), tmp_path / "network", "packed")
    assert list(tmp_path.iterdir()) == []


# -- The command ----------------------------------------------------------------------------------


def saved(folder):
    model = make_model(["sep_conv_m_3x3", "gab_filt_3x3"])
    tensors = dict(model.network.state_dict())
    save_model(
        folder / BEST, tensors, genotype=model.genotype, architecture=model.architecture,
        data=model.data, training={},
    )  # fmt: skip
    return model


def test_a_program_runs_in_a_process_without_this_package(tmp_path, capsys):
    model = saved(tmp_path)
    assert main([str(tmp_path), "--format", "torch"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "input   images: float32 ['N', 2, 9, 9]"
    assert printed[-2] == f"exported: {(tmp_path / BEST).with_suffix('.pt2')}"
    code = (
        "import sys, torch\n"
        f"program = torch.export.load({str((tmp_path / BEST).with_suffix('.pt2'))!r})\n"
        "x = torch.linspace(0, 1, 3 * 162).view(3, 2, 9, 9)\n"
        "print(program.module()(x).double().sum().item())\n"
        "assert 'fastbandit' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        x = torch.linspace(0, 1, 3 * 162).view(3, 2, 9, 9)
        here = model.network(x).double().sum().item()
    assert float(done.stdout) == pytest.approx(here, rel=1e-5)


@needs_onnx
def test_the_command_writes_onnx(tmp_path, capsys):
    saved(tmp_path)
    out = tmp_path / "net.onnx"
    assert main([str(tmp_path / BEST), "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["file"], result["opset"], result["batches"]) == (str(out), 18, [1, 5])
    assert out.stat().st_size > 1000


def test_an_export_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    original = module._torch_runner

    def runner(data):
        run = original(data)
        return lambda images: run(images) * 1.001

    monkeypatch.setattr(module, "_torch_runner", runner)
    with pytest.raises(ExportError, match=r"differs from the original by 0.001 of its largest"):
        export_model(make_model(["skip_connect"]), tmp_path / "network", "torch")
    monkeypatch.setattr(module, "_torch_runner", lambda data: lambda images: images)
    with pytest.raises(ExportError, match=r"logits of shape \[1, 2, 9, 9\], expected \[1, 4\]"):
        export_model(make_model(["skip_connect"]), tmp_path / "network", "torch")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert not module.has_onnx()
    with pytest.raises(ExportError, match=r"needs onnx, onnxscript, onnxruntime: pip install"):
        export_model(make_model(["skip_connect"]), tmp_path / "network")


def test_bad_input_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 1
    (tmp_path / "file").write_text("no model")
    assert main([str(tmp_path / "file")]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "expected a model file or the folder of a retraining run" in first
    assert second.startswith(f"export: error: {tmp_path / 'file'}: damaged or not a safetensors")
    model = make_model(["skip_connect"])
    model.data.clear()
    with pytest.raises(ExportError, match=r"data.shape: expected \[C, H, W\] of its images, got"):
        export_model(model, io.BytesIO(), "torch")
