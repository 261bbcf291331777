"""fastbandit.nn.supernet: shapes, purity of the path, cumulative statistics, errors."""

from __future__ import annotations

import copy

import pytest
import torch

from fastbandit.nn.cell import run_nodes
from fastbandit.nn.norm import BatchNorm2d
from fastbandit.nn.supernet import Supernet
from fastbandit.space import SearchSpace, get


def random_path(rows: int, arms: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, arms, (rows,), generator=generator).tolist()


def small(space="robust9", **options):
    torch.manual_seed(0)
    defaults = {"in_channels": 1, "classes": 10, "channels": 4}
    return Supernet(space, **(defaults | options))


@pytest.mark.parametrize("name", ["general7", "robust9", "robust9-light", "robust11-light"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 7, 5), (1, 2, 1)])
def test_any_input_size(name, shape):
    net = small(name, in_channels=shape[0], classes=7)
    net.set_path(random_path(net.rows, net.arms, seed=1))
    assert net(torch.rand(3, *shape)).shape == (3, 7)


def test_a_single_pixel_works_and_a_batch_of_one_pixel_says_why_not():
    net = small()
    net.set_path(random_path(net.rows, net.arms, seed=2))
    assert net(torch.rand(4, 1, 1, 1)).shape == (4, 10)
    with pytest.raises(ValueError, match="more than one value for each channel"):
        net(torch.rand(1, 1, 1, 1))
    assert net.eval()(torch.rand(1, 1, 1, 1)).shape == (1, 10)


def test_maps_halve_at_the_reduction_cells_and_channels_double():
    net = small(in_channels=3)
    net.set_path(random_path(net.rows, net.arms, seed=3))
    shapes = []
    for cell in net.cells:
        cell.register_forward_hook(
            lambda module, args, out: shapes.append(tuple(torch.cat(out, 1).shape[1:]))
        )
    net(torch.rand(2, 3, 9, 9))
    assert shapes == [(16, 9, 9)] * 2 + [(32, 5, 5)] * 2 + [(64, 3, 3)] * 2
    assert net.reductions == (2, 4)


def test_terms_are_added_in_place_only_to_a_sum_of_the_cells_own():
    given = [torch.full((2, 3), float(value)) for value in (2, 3, 5, 7)]
    two, three, five, seven = (lambda x, y=y: y for y in given)

    def skip_connect(x):
        return x

    x = torch.ones(2, 3)
    edges = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    nodes = run_nodes(x, edges, [skip_connect, skip_connect, two, three, five, seven])
    assert [float(node[0, 0]) for node in nodes] == [1.0, 1.0, 3.0, 15.0]
    assert nodes[1] is x
    for tensor, value in zip((x, *given), (1, 2, 3, 5, 7), strict=True):
        assert torch.equal(tensor, torch.full((2, 3), float(value)))  # nobody's tensor changed
    low = run_nodes(x, [(0, 1)] * 3, [lambda x: x.bfloat16(), lambda x: x, lambda x: x.half()])
    assert (low[1].dtype, float(low[1][0, 0])) == (torch.float32, 3.0)


@pytest.mark.parametrize("name", ["robust9", "robust11-light"])
def test_only_the_path_runs_and_learns(name):
    net = small(name)
    net.set_path(random_path(net.rows, net.arms, seed=4))
    ran = set()
    for index, cell in enumerate(net.cells):
        for row, operations in enumerate(cell.edges):
            for arm, operation in enumerate(operations):
                operation.register_forward_hook(
                    lambda module, args, out, key=(index, row, arm): ran.add(key)
                )
    # Blocks that start as the identity would hide a missing gradient behind their zero scale.
    for module in net.modules():
        if isinstance(module, BatchNorm2d) and module.affine:
            torch.nn.init.ones_(module.weight)
    net(torch.rand(4, 1, 8, 8)).logsumexp(1).sum().backward()
    edges = len(net.space.edges)
    assert ran == {
        (index, row, net.path[index * edges + row]) for index in range(6) for row in range(edges)
    }
    on_path = list(net.path_parameters())
    assert len({id(parameter) for parameter in on_path}) == len(on_path)
    ids = {id(parameter) for parameter in on_path}
    for key, parameter in net.named_parameters():
        if id(parameter) in ids:
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key
        else:
            assert parameter.grad is None, key


def test_batches_counted_only_on_the_path():
    net = small()
    net.set_path(random_path(net.rows, net.arms, seed=5))
    net(torch.rand(4, 1, 8, 8))
    on_path = {id(module) for module in net.path_modules()}
    for module in net.modules():
        if isinstance(module, BatchNorm2d):
            assert module.momentum is None
            assert module.batches == (1 if id(module) in on_path else 0)
    net.reset_path_statistics()
    assert all(m.batches == 0 for m in net.modules() if isinstance(m, BatchNorm2d))


def test_path_of_every_module_is_complete():
    """With one arm for each edge, the path is the whole net."""
    net = small(SearchSpace("one", ("sep_conv_3x3",)))
    assert net.path is None
    net.set_path([0] * net.rows)
    assert {id(p) for p in net.path_parameters()} == {id(p) for p in net.parameters()}
    containers = (Supernet, torch.nn.ModuleList, type(net.cells[0]))
    assert {id(m) for m in net.path_modules()} == {
        id(m) for m in net.modules() if not isinstance(m, containers)
    }


def test_statistics_are_the_mean_over_batches():
    net = small()
    net.set_path([0] * net.rows)
    batches = [torch.rand(8, 1, 8, 8) for _ in range(3)]
    means = []
    net.stem.register_forward_hook(lambda module, args, out: means.append(out.mean((0, 2, 3))))
    for x in batches:
        net(x)
    torch.testing.assert_close(net.stem_bn.running_mean, torch.stack(means).mean(0))


def test_the_seed_decides_the_weights_and_the_path_the_output():
    first, second = small(), small()
    x = torch.rand(4, 1, 8, 8)
    path = random_path(first.rows, first.arms, seed=6)
    first.set_path(path)
    second.set_path(torch.tensor(path))
    torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)
    path[0] = (path[0] + 1) % first.arms
    second.set_path(path)
    assert not torch.equal(first(x), second(x))


def test_a_copy_has_a_path_of_its_own():
    net = small().eval()
    net.set_path([1] * net.rows)
    twin = copy.deepcopy(net)
    x = torch.rand(2, 1, 8, 8)
    before = net(x)
    twin.set_path([3] * net.rows)
    twin(x)
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)
    assert not {id(p) for p in twin.path_parameters()} & {id(p) for p in net.parameters()}


def test_state_dict_round_trip_keeps_the_count_of_batches():
    net = small()
    net.set_path([3] * net.rows)
    for _ in range(2):
        net(torch.rand(4, 1, 8, 8))
    other = small()
    other.load_state_dict(net.state_dict())
    other.set_path([3] * net.rows)
    x = torch.rand(4, 1, 8, 8)
    net(x), other(x)
    assert other.stem_bn.batches == 3
    torch.testing.assert_close(net.eval()(x), other.eval()(x), rtol=0, atol=0)


def test_normalisation_comes_first():
    net = small(in_channels=3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).eval()
    plain = small(in_channels=3).eval()
    for model in (net, plain):
        model.set_path([3] * net.rows)
    x = torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.6, 0.7]]).view(2, 3, 1, 1)
    torch.testing.assert_close(net(x), plain((x - mean) / std))


def test_channels_last_gives_the_same():
    net = small().eval()
    net.set_path(random_path(net.rows, net.arms, seed=7))
    x = torch.rand(2, 1, 8, 8)
    expected = net(x)
    net = net.to(memory_format=torch.channels_last)
    y = net(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_more_and_fewer_cells():
    net = small(cells=10)
    assert net.cell_type == (0, 0, 1, 1, 2, 3, 3, 4, 4, 5)
    assert net.rows == 60
    net.set_path(random_path(net.rows, net.arms, seed=8))
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    three = small("robust9", cells=3, nodes=2)
    assert three.rows == 9
    three.set_path([0] * 9)
    assert three(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_widest_path_is_measured_to_be_the_widest():
    """Bytes kept for the backward pass: the table that ranks the arms agrees with torch."""
    for name in ("robust11", "robust11-light"):
        net = small(name, channels=8)
        kept = []
        for arm in range(net.arms):
            net.set_path([arm] * net.rows)
            seen: dict[int, int] = {}

            def pack(tensor, seen=seen):
                seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                net(torch.rand(16, 1, 16, 16))
            kept.append(sum(seen.values()))
        assert net.widest_path() == [kept.index(max(kept))] * net.rows, (name, kept)


def test_errors():
    net = small()
    with pytest.raises(RuntimeError, match="call set_path"):
        net(torch.rand(2, 1, 8, 8))
    net.set_path([0] * 60)
    with pytest.raises(ValueError, match="expected 60 arms"):
        net.set_path([0] * 10)
    with pytest.raises(ValueError, match=r"choice\[0\] \(a:0->1\)"):
        net.set_path([9] * 60)
    assert net.path == (0,) * 60
    with pytest.raises(ValueError, match="channels: expected >= 1, got 0"):
        small(channels=0)
    with pytest.raises(ValueError, match=r"cells: .* at least 6, .* the 6 cell types .* got 5"):
        small(get("robust9"), cells=5)
    with pytest.raises(ValueError, match="nodes: expected 4"):
        small(get("robust9"), nodes=3)
    with pytest.raises(ValueError, match=r"denoise: expected one of dot, .* got 'fourier'"):
        small(denoise="fourier")
    with pytest.raises(ValueError, match="gabor: expected one of pixels, released, got 'x'"):
        small(gabor="x")
    with pytest.raises(ValueError, match="mean: expected 1 number or 1, got 3"):
        small(mean=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="std: expected positive"):
        small(std=0.0)
