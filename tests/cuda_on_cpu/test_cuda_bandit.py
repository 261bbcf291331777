"""The CUDA kernel of the bandit ops, run on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import Call, exact, run, run_all, run_sanitized
from torch import Tensor

from fastbandit.ops import bandit

MODES = ["plain", "sanitized"]
SHAPES = [(1,), (9,), (5, 3), (2, 7, 9), (130, 2), (300, 8), (3, 1), (2, 400)]


class Case:
    """Random bandits with untried, abandoned and tied arms, and rows with one arm or none."""

    def __init__(self, shape, dtype, whole, layout, generator) -> None:
        rows, arms = shape[:-1], shape[-1]
        number = max(1, torch.Size(rows).numel())
        mean = torch.rand(number, arms, generator=generator, dtype=torch.float64).to(dtype)
        count = torch.randint(0 if arms % 2 else 1, 6, (number, arms), generator=generator)
        alive = torch.rand(number, arms, generator=generator) > 0.3
        mean[::3] = 0.5
        count[::3] = 2
        alive[1::5] = False
        alive[2::5] = torch.arange(arms) == arms - 1
        draw = torch.rand(number, generator=generator, dtype=torch.float64)
        draw[0] = 0.0
        draw[-1] = 1.0 - 2.0**-53
        self.mean = self.lay(mean.view(shape), layout)
        self.count = self.lay((count if whole else count.to(dtype)).view(shape), layout)
        self.alive = self.lay(alive.view(shape), layout)
        choice = torch.randint(-1, arms, (number,), generator=generator)
        self.choice = exact(choice.view(rows))
        self.reward = torch.rand(number, generator=generator, dtype=torch.float64).view(rows)
        self.prune = (torch.rand(number, generator=generator) > 0.5).view(rows)
        self.uniform = draw.view(rows)
        self.rows, self.arms, self.dtype = rows, arms, dtype

    @staticmethod
    def lay(tensor: Tensor, layout: str) -> Tensor:
        if layout == "arms first":  # the arms vary slowest in memory
            return exact(tensor.movedim(-1, 0).contiguous().movedim(0, -1))
        if layout == "every second":
            wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] * 2, dtype=tensor.dtype)
            wide[..., ::2] = tensor
            return wide[..., ::2]
        return exact(tensor)

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mean.clone(), self.count.clone(), self.alive.clone()

    def call(self, *, credit=False, prune=None, draw=False, bounds=False, law=False, name=""):
        """The call and its results: lower, upper, probabilities, choice, probability."""
        shape = (*self.rows, self.arms)
        lower, upper, law_out = (
            torch.zeros(shape, dtype=self.dtype) if wanted else None
            for wanted in (bounds, bounds, law)
        )
        choice = torch.zeros(self.rows, dtype=torch.int64) if draw else None
        probability = torch.zeros(self.rows, dtype=self.dtype) if draw else None
        logical = torch.empty(self.rows).stride()
        per_row = [self.choice, self.reward, self.prune, self.uniform]
        strides = [*logical]
        for tensor in (self.mean, self.count, self.alive):
            strides += tensor.stride()[:-1]
        for tensor in per_row:
            strides += tensor.stride()
        arguments = [int(self.dtype == torch.float64), int(self.count.dtype == torch.int64)]
        arguments += [len(self.rows), list(self.rows), strides, self.arms]
        arguments += [[0, *(t.stride(-1) for t in (self.mean, self.count, self.alive))]]
        arguments += [self.mean, self.count, self.alive]
        arguments += [self.choice if credit else None, self.reward if credit else None]
        arguments += [self.prune if prune == "rows" else None, int(prune == "all")]
        arguments += [self.uniform if draw else None, 1, 1, 0.7, 1.0]
        arguments += [lower, upper, law_out, choice, probability]
        return Call("bandit", "bandit_on_cpu", arguments, name), (
            lower, upper, law_out, choice, probability,
        )  # fmt: skip


def near_an_edge(case: Case, state, before) -> Tensor:
    """Rows whose uniform number lies within 1e-12 of an edge of the distribution."""
    weight, total = bandit._weights(*state, 1.0)
    law = weight / total
    return ((law.cumsum(-1) - before.unsqueeze(-1)).abs() < 1e-12).any(-1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["int64", "float"])
def test_bandit(dtype, whole, mode):
    generator = torch.Generator().manual_seed(3)
    work = []
    for shape, layout in itertools.product(SHAPES, ["contiguous", "arms first", "every second"]):
        case = Case(shape, dtype, whole, layout, generator)
        name = f"{shape} {layout}"

        state = case.state()
        call, results = case.call(bounds=True, name=f"bounds {name}")
        work.append((call, case, results, state, bandit._bandit_bounds_reference(*state[:2], 1.0)))

        case = Case(shape, dtype, whole, layout, generator)
        state = case.state()
        call, results = case.call(law=True, draw=True, name=f"sample {name}")
        law = bandit._bandit_probabilities_reference(*state, 1.0)
        drawn = bandit._bandit_sample_reference(*state, case.uniform, 1.0)
        work.append((call, case, results, state, (None, None, law, *drawn)))

        case = Case(shape, dtype, whole, layout, generator)
        state = case.state()
        bandit._bandit_prune_reference(state[2], state[0], state[1], 1.0)
        call, results = case.call(prune="all", name=f"prune {name}")
        work.append((call, case, results, state, ()))

        case = Case(shape, dtype, whole, layout, generator)
        state = case.state()
        drawn = bandit._bandit_step_reference(
            *state, case.choice, case.reward, case.prune, case.uniform, 0.7, 1.0
        )
        call, results = case.call(credit=True, prune="rows", draw=True, name=f"step {name}")
        work.append((call, case, results, state, (None, None, None, *drawn)))

    run_all([item[0] for item in work], mode)
    tolerance = {"rtol": 1e-6 if dtype == torch.float32 else 1e-13, "atol": 1e-300}
    for call, case, results, state, expected in work:
        assert torch.equal(case.mean, state[0]), call.name
        assert torch.equal(case.count, state[1]), call.name
        assert torch.equal(case.alive, state[2]), call.name
        for got, wanted in zip(results, expected, strict=False):
            if wanted is None or got is None:
                continue
            if got.dtype == torch.int64:
                differs = (got != wanted) & ~near_an_edge(case, state, case.uniform)
                assert not differs.any(), call.name
            elif got.shape == (*case.rows, case.arms):
                torch.testing.assert_close(got, wanted, **tolerance, msg=call.name)


def test_results_do_not_depend_on_the_order_of_threads():
    generator = torch.Generator().manual_seed(4)
    results = []
    for order in ("forward", "reverse"):
        case = Case((300, 9), torch.float64, True, "contiguous", generator.manual_seed(4))
        call, (_, _, _, choice, probability) = case.call(credit=True, prune="rows", draw=True)
        run_sanitized([call], CUDA_ON_CPU_ORDER=order)
        results.append((case.mean, case.alive, choice, probability))
    for forward, backward in zip(*results, strict=True):
        assert torch.equal(forward, backward)


def test_more_arms_than_shared_memory_is_an_error():
    case = Case((1, 3000), torch.float64, True, "contiguous", torch.Generator().manual_seed(5))
    call, _ = case.call(draw=True)
    with pytest.raises(AssertionError, match="more arms than fit"):
        run(call)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("whole", [True, False], ids=["int64", "float"])
def test_nan_does_the_same_as_in_the_reference(whole, mode):
    nan, inf = float("nan"), float("inf")

    def poisoned() -> Case:
        generator = torch.Generator().manual_seed(6)
        case = Case((60, 5), torch.float64, whole, "contiguous", generator)
        case.alive[:50] = True
        case.alive[::7, 2] = False
        case.mean[0:8, 0] = case.mean[4:12, 3] = case.mean[12] = case.mean[13, 1:] = nan
        case.mean[14:18, 1] = case.mean[22] = inf
        case.mean[18:22, 2] = case.mean[23] = -inf
        case.reward[25:30] = torch.tensor([nan, inf, -inf, nan, 0.5])
        case.uniform[30:36] = torch.tensor([nan, 1.0, inf, -1.0, -inf, nan])
        if not whole:
            case.count[36:40, 1] = case.count[40] = nan
        return case

    bounds, law, prune, step = (poisoned() for _ in range(4))
    work = [
        (bounds, bounds.call(bounds=True, name="bounds")),
        (law, law.call(law=True, draw=True, name="sample")),
        (prune, prune.call(prune="all", name="prune")),
        (step, step.call(credit=True, prune="rows", draw=True, name="step")),
    ]
    states = [case.state() for case, _ in work]
    expected = [
        bandit._bandit_bounds_reference(*states[0][:2], 1.0),
        (
            bandit._bandit_probabilities_reference(*states[1], 1.0),
            *bandit._bandit_sample_reference(*states[1], law.uniform, 1.0),
        ),
        bandit._bandit_prune_reference(states[2][2], *states[2][:2], 1.0) or (),
        bandit._bandit_step_reference(
            *states[3], step.choice, step.reward, step.prune, step.uniform, 0.7, 1.0
        ),
    ]
    run_all([call for _, (call, _) in work], mode)
    for (case, (call, results)), state, wanted in zip(work, states, expected, strict=True):
        given = [result for result in results if result is not None]
        got = (case.mean, case.count, case.alive, *given)
        for one, other in zip(got, (*state, *wanted), strict=True):
            torch.testing.assert_close(
                one, other, rtol=1e-12, atol=1e-300, equal_nan=True, msg=call.name
            )
