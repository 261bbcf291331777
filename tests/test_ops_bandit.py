"""The bandit ops: Eqs. 4.9 to 4.13 by hand, against a scalar rewrite, and as torch ops."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fastbandit import ops
from fastbandit.ops._register import OPERATORS

bandit_module = importlib.import_module("fastbandit.ops.bandit")
NAMES = sorted(name for name in OPERATORS if name.startswith("bandit_"))
ARGUMENTS = {name: [a.name for a in OPERATORS[name]._schema.arguments] for name in NAMES}
TENSORS = {name: [a for a in ARGUMENTS[name] if a not in ("rate", "bonus")] for name in NAMES}

# One edge with three arms after seven samples: 2 ln 7 = 3.891820298, the square roots of
# 2 ln N / n are 1.972769702, 1.394958834 and 0.986384851, and exp(-s_L) = 4.361296, 2.989060 and
# 1.471651.
MEAN = [0.5, 0.3, 0.6]
COUNT = [1, 2, 4]
LOWER = [-1.472769702249, -1.094958834179, -0.386384851124]
UPPER = [2.472769702249, 1.694958834179, 1.586384851124]
PROBABILITY = [0.494365646020, 0.338818494471, 0.166815859510]
# Arm 2 has the smallest upper bound. Arm 1 is then credited with 0.9, rate 0.7.
MEAN_1 = 0.72  # 0.3 * 0.3 + 0.7 * 0.9
# N = 8, the abandoned arm included: 2 ln 8 = 4.158883083.
LOWER_8 = [-1.539333980338, -0.457410022515, -0.419666990169]
PROBABILITY_8 = [0.746857901795, 0.253142098205, 0.0]


def table(device, dtype=torch.float64, count_dtype=torch.int64):
    mean = torch.tensor(MEAN, dtype=dtype, device=device)
    count = torch.tensor(COUNT, dtype=count_dtype, device=device)
    return mean, count, torch.ones(3, dtype=torch.bool, device=device)


def random_state(device, *, shape=(64, 7), dtype=torch.float64, seed=0):
    """Rows with ties, untried arms, abandoned arms, one arm or none alive."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    mean = (rand(*shape) * 8).round() / 8  # eighths: ties happen, float32 is exact
    count = (rand(*shape) * 6).long()
    count[: shape[0] // 2].clamp_(min=1)
    alive = rand(*shape) < 0.7
    alive[-1] = False
    alive[-2] = torch.arange(shape[-1]) == 3
    choice = (rand(*shape[:-1]) * (shape[-1] + 1)).long() - 1
    state = {
        "mean": mean.to(dtype),
        "count": count,
        "alive": alive,
        "choice": choice,
        "reward": rand(*shape[:-1]),
        "prune": rand(*shape[:-1]) < 0.5,
        "uniform": rand(*shape[:-1]),
    }
    return {name: tensor.to(device) for name, tensor in state.items()}


class Scalar:
    """The same rules for one row in plain Python, written from the equations."""

    @staticmethod
    def bounds(mean, count, bonus):
        total = sum(count)
        lower, upper = [], []
        for m, n in zip(mean, count, strict=True):
            width = bonus * math.sqrt(2 * math.log(total) / n) if n else math.inf
            lower.append(m - width)
            upper.append(m + width)
        return lower, upper

    @staticmethod
    def probabilities(mean, count, alive, bonus):
        arms = [k for k, living in enumerate(alive) if living]
        lower, _ = Scalar.bounds(mean, count, bonus)
        untried = [k for k in arms if count[k] == 0]
        weight = dict.fromkeys(untried, 1.0) or {k: math.exp(-lower[k]) for k in arms}
        total = sum(weight.values())
        return [weight.get(k, 0.0) / total if total else 0.0 for k in range(len(mean))]

    @staticmethod
    def sample(mean, count, alive, uniform, bonus):
        probability = Scalar.probabilities(mean, count, alive, bonus)
        cumulative, choice = 0.0, -1
        for k, living in enumerate(alive):
            cumulative += probability[k]
            if living:
                choice = k
                if cumulative > uniform:
                    break
        return choice, probability[choice] if choice >= 0 else 0.0

    @staticmethod
    def prune(alive, mean, count, bonus):
        _, upper = Scalar.bounds(mean, count, bonus)
        arms = [k for k, living in enumerate(alive) if living]
        if len(arms) > 1:
            alive[min(arms, key=lambda k: (upper[k], k))] = False

    @staticmethod
    def step(mean, count, alive, choice, reward, prune, uniform, rate, bonus):
        if choice >= 0:
            mean[choice] = (1 - rate) * mean[choice] + rate * reward
            count[choice] += 1
        if prune:
            Scalar.prune(alive, mean, count, bonus)
        return Scalar.sample(mean, count, alive, uniform, bonus)


# --- values -------------------------------------------------------------------------------------


def test_hand_worked_table(device):
    mean, count, alive = table(device)
    lower, upper = ops.bandit_bounds(mean, count)
    assert lower.tolist() == pytest.approx(LOWER, abs=2e-12)
    assert upper.tolist() == pytest.approx(UPPER, abs=2e-12)
    probability = ops.bandit_probabilities(mean, count, alive)
    assert probability.tolist() == pytest.approx(PROBABILITY, abs=2e-12)

    ops.bandit_prune_(alive, mean, count)
    assert alive.tolist() == [True, True, False]
    ops.bandit_update_(mean, count, torch.tensor(1, device=device), 0.9, rate=0.7)
    assert mean.tolist() == pytest.approx([0.5, MEAN_1, 0.6], abs=1e-15)
    assert count.tolist() == [1, 3, 4]
    lower, _ = ops.bandit_bounds(mean, count)
    assert lower.tolist() == pytest.approx(LOWER_8, abs=2e-12)
    probability = ops.bandit_probabilities(mean, count, alive)
    assert probability.tolist() == pytest.approx(PROBABILITY_8, abs=2e-12)
    assert probability[2] == 0


def test_hand_worked_step(device):
    mean, count, alive = table(device)
    # Between the first edge at N = 7 (0.593 without arm 2) and at N = 8 (0.747): only a draw
    # after the credit and the abandonment gives arm 0.
    uniform = torch.tensor(0.66, dtype=torch.float64, device=device)
    choice, probability = ops.bandit_step_(
        mean, count, alive, torch.tensor(1, device=device), 0.9, True, uniform, rate=0.7
    )
    assert mean.tolist() == pytest.approx([0.5, MEAN_1, 0.6], abs=1e-15)
    assert count.tolist() == [1, 3, 4]
    assert alive.tolist() == [True, True, False]
    assert choice.item() == 0
    assert probability.item() == pytest.approx(PROBABILITY_8[0], abs=2e-12)


@pytest.mark.parametrize("bonus", [1.0, 0.25, 0.0])
def test_against_scalar_rewrite(device, bonus):
    state = random_state(device)
    mean, count, alive = (state[name].tolist() for name in ("mean", "count", "alive"))
    lower, upper = ops.bandit_bounds(state["mean"], state["count"], bonus=bonus)
    probability = ops.bandit_probabilities(
        state["mean"], state["count"], state["alive"], bonus=bonus
    )
    for row in range(len(mean)):
        expected_lower, expected_upper = Scalar.bounds(mean[row], count[row], bonus)
        assert lower[row].tolist() == pytest.approx(expected_lower, rel=1e-13, abs=1e-13)
        assert upper[row].tolist() == pytest.approx(expected_upper, rel=1e-13, abs=1e-13)
        expected = Scalar.probabilities(mean[row], count[row], alive[row], bonus)
        assert probability[row].tolist() == pytest.approx(expected, rel=1e-13)

    choice, chosen = ops.bandit_step_(**state, rate=0.7, bonus=bonus)
    inputs = random_state("cpu")
    for row in range(len(mean)):
        scalars = [inputs[name][row].item() for name in ("choice", "reward", "prune", "uniform")]
        expected_choice, expected_chosen = Scalar.step(
            mean[row], count[row], alive[row], *scalars, 0.7, bonus
        )
        assert choice[row].item() == expected_choice
        assert chosen[row].item() == pytest.approx(expected_chosen, rel=1e-13)
    assert state["count"].tolist() == count
    assert state["alive"].tolist() == alive
    assert state["mean"].tolist() == mean


def test_step_is_update_prune_sample(device):
    state, apart = random_state(device), random_state(device)
    choice, probability = ops.bandit_step_(**state, rate=0.6, bonus=0.5)

    mean, count, alive = apart["mean"], apart["count"], apart["alive"]
    ops.bandit_update_(mean, count, apart["choice"], apart["reward"], rate=0.6)
    pruned = alive.clone()
    ops.bandit_prune_(pruned, mean, count, bonus=0.5)
    alive = torch.where(apart["prune"].unsqueeze(-1), pruned, alive)
    expected = ops.bandit_sample(mean, count, alive, apart["uniform"], bonus=0.5)
    assert torch.equal(state["mean"], mean)
    assert torch.equal(state["count"], count)
    assert torch.equal(state["alive"], alive)
    assert torch.equal(choice, expected[0])
    assert torch.equal(probability, expected[1])


def test_dtypes_compute_in_float64(device):
    exact, single = random_state(device), random_state(device, dtype=torch.float32)
    counts = single["count"].float()  # a count may have the dtype of the mean
    for got, expected in zip(
        ops.bandit_bounds(single["mean"], counts),
        ops.bandit_bounds(exact["mean"], exact["count"]),
        strict=True,
    ):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected.float())
    probability = ops.bandit_probabilities(single["mean"], counts, single["alive"])
    expected = ops.bandit_probabilities(exact["mean"], exact["count"], exact["alive"])
    assert torch.equal(probability, expected.float())
    single["count"], single["uniform"] = counts, single["uniform"].float()
    exact["uniform"] = single["uniform"].double()
    choice, probability = ops.bandit_step_(**single, rate=0.7)
    expected_choice, _ = ops.bandit_step_(**exact, rate=0.7)
    assert choice.dtype == torch.int64
    assert probability.dtype == torch.float32
    assert torch.equal(choice, expected_choice)
    assert torch.equal(single["mean"], exact["mean"].float())
    assert torch.equal(counts, exact["count"].float())


# --- what the equations leave open --------------------------------------------------------------


def test_bounds_move_with_the_total(device):
    # A bound that is only refreshed for the arm that was played is the trap of mabwiser #10.
    mean, count, _ = table(device)
    before_lower, before_upper = ops.bandit_bounds(mean, count)
    ops.bandit_update_(mean, count, torch.tensor(0, device=device), 0.5, rate=0.7)
    lower, upper = ops.bandit_bounds(mean, count)
    width = math.sqrt(2 * math.log(8) / 4)
    assert [lower[2].item(), upper[2].item()] == pytest.approx([0.6 - width, 0.6 + width])
    assert (lower[1:] < before_lower[1:]).all()
    assert (upper[1:] > before_upper[1:]).all()


def test_first_sample_has_no_bonus(device):
    mean = torch.tensor([0.25, 0.0], device=device)
    lower, upper = ops.bandit_bounds(mean, torch.tensor([1, 0], device=device))
    assert lower.tolist() == [0.25, -math.inf]
    assert upper.tolist() == [0.25, math.inf]


def test_counts_of_any_size(device):
    # 2^53 and more: converted with one rounding, also where a CPU has no instruction for it.
    count = torch.tensor(
        [[1, 2**31 + 5, 2**48 - 1], [2**48, 2**52 + 1, 2**53 + 1], [2**60 + 129, 3, 2**61]],
        device=device,
    )
    mean = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=device).repeat(3, 1)
    for ours, as_real in zip(
        ops.bandit_bounds(mean, count), ops.bandit_bounds(mean, count.double()), strict=True
    ):
        assert torch.equal(ours, as_real)


def test_untried_arms_share_all(device):
    mean, count, alive = table(device)
    count[:2] = 0
    assert ops.bandit_probabilities(mean, count, alive).tolist() == [0.5, 0.5, 0.0]
    alive[0] = False
    assert ops.bandit_probabilities(mean, count, alive).tolist() == [0.0, 1.0, 0.0]
    alive[1] = False  # untried arms which were abandoned have no say
    assert ops.bandit_probabilities(mean, count, alive).tolist() == [0.0, 0.0, 1.0]


def test_probabilities_are_stable_for_any_accuracy_scale(device):
    # exp(2000) is far beyond float64; the ratio of the two arms alive is 2 : 1.
    mean = [-9000.0, -2000.0, -2000.0 + math.log(2)]
    mean = torch.tensor(mean, dtype=torch.float64, device=device)
    alive = torch.tensor([False, True, True], device=device)
    probability = ops.bandit_probabilities(mean, torch.tensor([1, 1, 1], device=device), alive)
    assert probability.tolist() == pytest.approx([0.0, 2 / 3, 1 / 3], abs=1e-12)


def test_no_arm_alive(device):
    mean, count, _ = table(device)
    alive = torch.zeros(3, dtype=torch.bool, device=device)
    assert ops.bandit_probabilities(mean, count, alive).tolist() == [0.0, 0.0, 0.0]
    uniform = torch.tensor(0.5, device=device)
    choice, probability = ops.bandit_sample(mean, count, alive, uniform)
    assert (choice.item(), probability.item()) == (-1, 0.0)
    ops.bandit_prune_(alive, mean, count)
    assert not alive.any()


def test_ties_drop_the_lowest_index_and_never_the_last_arm(device):
    mean = torch.full((1, 4), 0.5, dtype=torch.float64, device=device)
    count = torch.full((1, 4), 2, device=device)
    alive = torch.tensor([[False, True, True, True]], device=device)
    for expected in ([0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]):
        ops.bandit_prune_(alive, mean, count)
        assert alive.int().tolist() == [expected]


def test_prune_among_untried_arms_only(device):
    # All bounds are infinite, those of the abandoned arm too: it must not be dropped again.
    alive = torch.tensor([False, True, True], device=device)
    zeros = torch.zeros(3, device=device)
    ops.bandit_prune_(alive, zeros, zeros)
    assert alive.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("uniform", "choice"),
    [(0.0, 1), (0.2499, 1), (0.25, 3), (0.5, 4), (0.7499, 4), (0.75, 6), (1 - 2**-53, 6)],
)
def test_choices_for_given_uniforms(device, uniform, choice):
    # Four equal arms alive: the distribution's edges are the quarters exactly.
    alive = torch.tensor([False, True, False, True, True, False, True], device=device)
    mean = torch.full((7,), 0.5, dtype=torch.float64, device=device)
    count = torch.full((7,), 3, device=device)
    number = torch.tensor(uniform, dtype=torch.float64, device=device)
    assert ops.bandit_sample(mean, count, alive, number)[0].item() == choice


@pytest.mark.parametrize("arms", [3, 5, 9, 11, 12, 49])
def test_choices_where_the_uniform_number_is_an_edge(device, arms):
    """Untried arms share all: u = j / K is where arm j begins, on every implementation."""
    mean = torch.zeros(arms, arms, dtype=torch.float64, device=device)
    alive = torch.ones(arms, arms, dtype=torch.bool, device=device)
    uniform = torch.arange(arms, dtype=torch.float64, device=device) / arms
    choice, probability = ops.bandit_sample(mean, torch.zeros_like(mean), alive, uniform)
    # u * K may be rounded to just below j.
    expected = [min(k for k in range(arms) if k + 1 > float(u) * arms) for u in uniform.cpu()]
    assert choice.tolist() == expected
    assert torch.equal(probability, torch.full_like(probability, 1.0) / arms)


def test_last_arm_alive_where_none_is_reached(device):
    alive = torch.tensor([True] * 10 + [False], device=device)
    mean = torch.zeros(11, dtype=torch.float64, device=device)
    # The largest number below 1 is within the last arm; 1 itself is not allowed, and NaN no number.
    for uniform in (1 - 2**-53, 1.0, math.nan):
        drawn = torch.tensor(uniform, dtype=torch.float64, device=device)
        choice, probability = ops.bandit_sample(mean, mean, alive, drawn)
        assert choice.item() == 9
        assert probability.item() == 0.1


def test_update_credits_only_arms(device):
    mean = torch.zeros(4, 3, device=device)
    count = torch.zeros(4, 3, dtype=torch.int64, device=device)
    choice = torch.tensor([2, -1, 3, 0], device=device)
    reward = torch.tensor([0.5, 0.5, 0.5, 1.0], device=device)
    ops.bandit_update_(mean, count, choice, reward, rate=1.0)
    assert mean.tolist() == [[0, 0, 0.5], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert count.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0], [1, 0, 0]]


# --- against others -----------------------------------------------------------------------------


def test_upper_bound_is_mabwisers_ucb1():
    """mabwiser's UCB1(alpha) expects mean + alpha sqrt(2 ln N / n), with the plain average.

    That is s_U with bonus = alpha for the same m. The running performance of Eq. 4.11 weights
    the newest value by lambda; it is the plain average when an arm's rewards are constant.
    """
    mab = pytest.importorskip("mabwiser.mab")
    decisions = [0, 1, 2, 2, 1, 2, 2, 0, 2]
    reward = {0: 0.3, 1: 0.45, 2: 0.4}
    alpha = 0.8
    rival = mab.MAB(arms=[0, 1, 2], learning_policy=mab.LearningPolicy.UCB1(alpha=alpha))
    rival.fit(decisions[:3], [reward[k] for k in decisions[:3]])

    mean = torch.zeros(3, dtype=torch.float64)
    count = torch.zeros(3, dtype=torch.int64)
    for step, arm in enumerate(decisions):
        rate = 1.0 if count[arm] == 0 else 0.7
        ops.bandit_update_(mean, count, torch.tensor(arm), reward[arm], rate=rate)
        if step < 2:
            continue
        if step > 2:
            rival.partial_fit([arm], [reward[arm]])
        _, upper = ops.bandit_bounds(mean, count, bonus=alpha)
        expected = rival.predict_expectations()
        assert upper.tolist() == pytest.approx([expected[k] for k in range(3)], rel=1e-12)


def test_chi_square_of_sampled_frequencies(device):
    draws = 50_000
    mean = torch.tensor([0.9, 0.1, 0.5, 0.7, 0.3, 0.6], dtype=torch.float64, device=device)
    count = torch.tensor([3, 9, 5, 7, 4, 6], device=device)
    alive = torch.tensor([True, True, False, True, True, True], device=device)
    generator = torch.Generator().manual_seed(20)
    uniform = torch.rand(draws, generator=generator, dtype=torch.float64).to(device)
    rows = (tensor.expand(draws, 6) for tensor in (mean, count, alive))
    choice, probability = ops.bandit_sample(*rows, uniform)
    law = ops.bandit_probabilities(mean, count, alive)
    assert torch.equal(probability, law[choice])
    observed = torch.bincount(choice, minlength=6)[alive].double()
    expected = draws * law[alive]
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    assert observed.sum() == draws
    assert statistic < 18.467  # the 0.1 % point of chi-square with 4 degrees of freedom


# --- as torch ops -------------------------------------------------------------------------------


def arguments(name, state):
    """Positional arguments of the op, as its schema orders them."""
    values = {**state, "rate": 0.7, "bonus": 0.5}
    return tuple(values[argument] for argument in ARGUMENTS[name])


def test_all_ops_are_declared():
    assert sorted(name for name in ops.__all__ if name.startswith("bandit_")) == NAMES
    assert len(NAMES) == 6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(device, name, dtype):
    state = random_state(device, shape=(5, 4), dtype=dtype)
    torch.library.opcheck(OPERATORS[name], arguments(name, state))


def call(name, state):
    """The public function of the op; returns everything it returns or changes."""
    keywords = {"bonus": 0.5}
    if name == "bandit_step_":
        keywords["rate"] = 0.7
    if name == "bandit_update_":
        keywords = {"rate": 0.7}
    tensors = [state[key] for key in TENSORS[name]]
    result = getattr(ops, name)(*tensors, **keywords)
    results = () if result is None else (result if isinstance(result, tuple) else (result,))
    return [*results, state["mean"], state["count"], state["alive"]]


@pytest.mark.parametrize("name", NAMES)
def test_compile(device, name):
    def run(state):
        return call(name, state)

    expected = run(random_state(device))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, value in zip(compiled(random_state(device)), expected, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("shape", [(7,), (3, 2, 7), (1, 1), (0, 7), (2, 0, 7)])
@pytest.mark.parametrize("name", NAMES)
def test_leading_shapes(device, name, shape):
    rows = math.prod(shape[:-1])
    flat = random_state(device, shape=(max(rows, 4), shape[-1]))
    flat = {key: tensor[:rows].contiguous() for key, tensor in flat.items()}
    state = {
        key: tensor.clone().view(shape if tensor.dim() == 2 else shape[:-1])
        for key, tensor in flat.items()
    }
    for got, value in zip(call(name, state), call(name, flat), strict=True):
        assert got.shape == (shape if value.dim() == 2 else shape[:-1])
        assert torch.equal(got.reshape(-1), value.reshape(-1))


SENTINEL = {torch.float64: -7.25, torch.int64: -99, torch.bool: True}


@pytest.mark.parametrize("name", NAMES)
def test_views_and_what_lies_around_them(device, name):
    expected = call(name, random_state(device))
    state, around = {}, {}
    for key, tensor in random_state(device).items():
        # Arms outermost and every second row of a larger buffer: no dimension is dense.
        fill = SENTINEL[tensor.dtype]
        size = [2 * tensor.shape[0] + 1, *(n + 2 for n in tensor.shape[1:])]
        buffer = torch.full(size[::-1], fill, dtype=tensor.dtype, device=device)
        view = buffer.permute(*reversed(range(buffer.dim())))[1::2]
        view = view[:, 1:-1] if view.dim() == 2 else view
        view.copy_(tensor)
        assert not view.is_contiguous()
        state[key], around[key] = view, buffer
    for got, value in zip(call(name, state), expected, strict=True):
        assert torch.equal(got, value)
    for key, view in state.items():
        view.fill_(SENTINEL[view.dtype])
        assert (around[key] == SENTINEL[view.dtype]).all(), key


def test_results_are_contiguous(device):
    state = random_state(device)
    mean, count, alive = (state[key].t().contiguous().t() for key in ("mean", "count", "alive"))
    results = [*ops.bandit_bounds(mean, count), ops.bandit_probabilities(mean, count, alive)]
    assert all(result.is_contiguous() for result in results)


def test_reward_and_prune_broadcast(device):
    expected = call("bandit_step_", {**random_state(device, shape=(6, 5))})
    state = random_state(device, shape=(6, 5))
    assert state["prune"].any()
    assert not state["prune"].all()
    for reward in (0.75, torch.tensor(0.75, device=device), torch.tensor([0.75], device=device)):
        first, second = (random_state(device, shape=(6, 5)) for _ in range(2))
        first.update(reward=reward, prune=True)
        second["reward"] = torch.full((6,), 0.75, dtype=torch.float64, device=device)
        second["prune"] = torch.ones(6, dtype=torch.bool, device=device)
        for got, value in zip(
            call("bandit_step_", first), call("bandit_step_", second), strict=True
        ):
            assert torch.equal(got, value)
    assert len(expected) == 5


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient(name):
    state = random_state("cpu", shape=(5, 4))
    state["mean"].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{name}: mean: expected a tensor without gradient"):
        call(name, state)
    with torch.no_grad():
        call(name, state)


WRONG = [
    ("mean", lambda t: t.half(), "mean: expected dtype float32 or float64, got float16"),
    ("mean", lambda t: t[0, 0], r"mean: expected shape \[..., K\] with at least one arm, got \[\]"),
    ("mean", lambda t: t[:, :0], r"mean: .* at least one arm, got \[5, 0\]"),
    ("mean", lambda t: t.tolist(), "mean: expected a tensor, got list"),
    ("count", lambda t: t.int(), "count: expected dtype int64 or float64, got int32"),
    ("count", lambda t: t.float(), "count: expected dtype int64 or float64, got float32"),
    ("count", lambda t: t[:, 1:], r"count: expected shape \[5, 4\], got \[5, 3\]"),
    ("count", lambda t: t.to("meta"), "count: expected device cpu, that of mean, got meta"),
    ("alive", lambda t: t.byte(), "alive: expected dtype bool, got uint8"),
    ("alive", lambda t: t[1:], r"alive: expected shape \[5, 4\], got \[4, 4\]"),
    ("choice", lambda t: t.int(), "choice: expected dtype int64, got int32"),
    ("choice", lambda t: t[1:], r"choice: expected shape \[5\], got \[4\]"),
    ("reward", lambda t: t[1:], r"reward: expected a shape that broadcasts to \[5\], got \[4\]"),
    ("reward", lambda t: t.half(), "reward: expected dtype float32 or float64, got float16"),
    ("prune", lambda t: t.int(), "prune: expected dtype bool, got int32"),
    ("prune", lambda t: 1, "prune: expected a bool or a bool tensor, got int"),
    ("uniform", lambda t: t[:, None], r"uniform: expected shape \[5\], got \[5, 1\]"),
    ("uniform", lambda t: t.long(), "uniform: expected dtype float32 or float64, got int64"),
]


@pytest.mark.parametrize(("argument", "change", "message"), WRONG)
def test_wrong_tensors(argument, change, message):
    used = [name for name in NAMES if argument in ARGUMENTS[name]]
    assert used
    for name in used:
        state = random_state("cpu", shape=(5, 4))
        state[argument] = change(state[argument])
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            call(name, state)


@pytest.mark.parametrize("bonus", [-0.1, math.nan, math.inf])
def test_wrong_bonus(bonus):
    mean, count, _ = table("cpu")
    with pytest.raises(ValueError, match="bandit_bounds: bonus: expected a finite number >= 0"):
        ops.bandit_bounds(mean, count, bonus=bonus)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_wrong_rate(rate):
    mean, count, _ = table("cpu")
    with pytest.raises(ValueError, match=r"bandit_update_: rate: expected a number in \[0, 1\]"):
        ops.bandit_update_(mean, count, torch.tensor(0), 0.5, rate=rate)


def test_overlapping_memory_is_refused():
    mean = torch.zeros(1, 3).expand(5, 3)
    count = torch.zeros(5, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="single memory location"):
        ops.bandit_update_(mean, count, torch.zeros(5, dtype=torch.int64), 0.5, rate=0.7)


# --- NaN ------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


def poisoned(dtype=torch.float64, count_dtype=torch.float64):
    """Rows with NaN and infinities in every place that may hold one, beside rows without."""
    state = random_state("cpu", shape=(60, 5), dtype=dtype, seed=3)
    state["count"] = state["count"].to(count_dtype)
    state["alive"][:50] = True
    state["alive"][::7, 2] = False
    state["mean"][0:8, 0] = NAN
    state["mean"][4:12, 3] = NAN
    state["mean"][12] = NAN
    state["mean"][13, 1:] = NAN
    state["mean"][14:18, 1] = INF
    state["mean"][18:22, 2] = -INF
    state["mean"][22] = INF
    state["mean"][23] = -INF
    state["mean"][24, :3] = torch.tensor([NAN, INF, -INF])
    state["reward"][25:30] = torch.tensor([NAN, INF, -INF, NAN, 0.5])
    state["uniform"][30:36] = torch.tensor([NAN, 1.0, INF, -1.0, -INF, NAN])
    if count_dtype != torch.int64:
        state["count"][36:40, 1] = NAN
        state["count"][40, :] = NAN
    return state


def everything(state, run):
    """All that the ops make of a state; ``run(name, arguments)`` calls one."""
    results = {}
    for name in NAMES:
        given = {key: tensor.clone() for key, tensor in state.items()}
        arguments = [given.get(a, 0.7) for a in ARGUMENTS[name]]
        results[name] = (run(name, arguments), given)  # None of an op that changes its arguments
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("whole", [True, False], ids=["int64", "float"])
def test_nan_does_the_same_in_kernel_and_reference(dtype, whole):
    state = poisoned(dtype, torch.int64 if whole else dtype)

    def reference(name, arguments):
        return getattr(bandit_module, f"_{name.rstrip('_')}_reference")(*arguments)

    got = everything(state, lambda name, arguments: OPERATORS[name](*arguments))
    wanted = everything(state, reference)
    tolerance = {"rtol": 1e-6 if dtype == torch.float32 else 1e-12, "atol": 1e-300}
    for name in NAMES:
        for one, other in zip(tree_leaves(got[name]), tree_leaves(wanted[name]), strict=True):
            torch.testing.assert_close(one, other, equal_nan=True, msg=name, **tolerance)


def test_nan_by_hand(device):
    mean = torch.tensor([0.5, NAN, 0.6], dtype=torch.float64, device=device)
    count = torch.tensor([1, 2, 4], device=device)
    alive = torch.ones(3, dtype=torch.bool, device=device)
    lower, upper = ops.bandit_bounds(mean, count)
    assert lower.isnan().tolist() == upper.isnan().tolist() == [False, True, False]
    law = ops.bandit_probabilities(mean, count, alive)
    assert law[1] == 0
    assert law.sum().item() == pytest.approx(1)
    for uniform in (0.0, 0.5, 0.999, 1.0, NAN):
        choice, _ = ops.bandit_sample(mean, count, alive, torch.tensor(uniform, device=device))
        assert choice.item() != 1
    ops.bandit_prune_(alive, mean, count)
    assert alive.tolist() == [True, False, True]

    # No arm has a bound: the last one alive is drawn, and the first one is abandoned.
    mean.fill_(NAN)
    alive.fill_(True)
    half = torch.tensor(0.5, device=device)
    choice, probability = ops.bandit_sample(mean, count, alive, half)
    assert (choice.item(), probability.item()) == (2, 0.0)
    ops.bandit_prune_(alive, mean, count)
    assert alive.tolist() == [False, True, True]

    # A count that is NaN is that of an untried arm.
    mean, count, alive = table(device, count_dtype=torch.float64)
    count[2] = NAN
    assert ops.bandit_probabilities(mean, count, alive).tolist() == [0, 0, 1]
    lower, upper = ops.bandit_bounds(mean, count)
    assert lower.tolist() == [0.5, 0.3, -INF]
    assert upper.tolist() == [0.5, 0.3, INF]


@pytest.mark.parametrize("number", [NAN, INF, -1.0])
def test_a_bonus_or_rate_that_is_no_number_is_refused(device, number):
    mean, count, _ = table(device)
    with pytest.raises(ValueError, match=r"bandit_bounds: bonus: expected a finite number >= 0"):
        ops.bandit_bounds(mean, count, bonus=number)
    choice = torch.tensor(0, device=device)
    with pytest.raises(ValueError, match=r"bandit_update_: rate: expected a number in \[0, 1\]"):
        ops.bandit_update_(mean, count, choice, 0.5, rate=number)
    assert mean.tolist() == MEAN
