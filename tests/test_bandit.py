"""AntiBandit: schedule, policies, randomness, errors, state and replay."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from safetensors.torch import load, save

from fastbandit import ops
from fastbandit.bandit import POLICIES, AntiBandit, Policy, register, replay


def accuracy(choice):
    """A made-up accuracy of a path: exact in float64, different for different paths."""
    weights = torch.arange(1, choice.numel() + 1, device=choice.device)
    return 0.5 + ((choice * weights).sum().item() % 64) / 256


def advance(bandit, samples):
    """Runs `samples` samples, abandoning when due; returns choices and abandoned arms."""
    choices, abandoned = [], []
    for _ in range(samples):
        choice = bandit.sample()
        bandit.credit(choice, accuracy(choice))
        choices.append(choice.tolist())
        while bandit.due:
            abandoned.append(bandit.prune().tolist())
    return choices, abandoned


def finish(bandit):
    return advance(bandit, bandit.total_samples - bandit.trained)


def after_initial(rows=3, arms=4, **keywords):
    bandit = AntiBandit(rows, arms, **keywords)
    advance(bandit, arms)
    return bandit


# --- schedule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["printed", "random"])
@pytest.mark.parametrize(
    ("arms", "rounds", "total"),
    [(9, 3, 141), (8, 3, 113), (4, 1, 13), (2, 5, 12), (3, 2, 13), (1, 3, 1)],
)
def test_number_of_samples(policy, arms, rounds, total, device):
    bandit = AntiBandit(2, arms, rounds=rounds, policy=policy, device=device)
    assert bandit.total_samples == total == arms + rounds * sum(range(2, arms + 1))
    drops = []  # samples at which the rows lost an arm
    while not bandit.finished:
        choice = bandit.sample()
        bandit.credit(choice, 0.5)
        if bandit.due:
            bandit.prune()
            drops.append(bandit.samples)
            assert not bandit.due
    assert bandit.samples == bandit.trained == total
    steps = [drops[0] - arms] if drops else []
    steps += [after - before for before, after in itertools.pairwise(drops)]
    assert steps == [k * rounds for k in range(arms, 1, -1)]
    assert bandit.alive.sum(1).tolist() == [1, 1]
    assert bandit.count.sum(1).tolist() == [total, total]  # n and N outlive the abandoned arms
    assert torch.equal(bandit.final(), bandit.alive.int().argmax(1))


def test_phases_and_rounds():
    bandit = AntiBandit(2, 3, rounds=1)
    seen = []
    while not bandit.finished:
        seen.append((bandit.phase, bandit.round, bandit.in_round, bandit.arms_left))
        advance(bandit, 1)
    assert seen == [
        *[("initial", 0, 0, 3)] * 3,
        *[("search", 1, c, 3) for c in range(3)],
        *[("search", 2, c, 2) for c in range(2)],
    ]
    assert (bandit.phase, bandit.round, bandit.arms_left) == ("finished", 3, 1)


def test_initial_pass_is_a_permutation_and_sets_mean_and_count(device):
    bandit = AntiBandit(5, 4, seed=3, device=device)
    rewards = [0.125, 0.25, 0.375, 0.5]
    choices = []
    for reward in rewards:
        law = bandit.probabilities()
        untried = bandit.count == 0
        assert torch.allclose(law, untried.double() / untried.sum(1, keepdim=True))
        choices.append(bandit.sample())
        bandit.credit(choices[-1], reward)
    order = torch.stack(choices, 1)
    assert torch.equal(order.sort(1).values, torch.arange(4, device=device).expand(5, 4))
    assert len({tuple(row) for row in order.tolist()}) > 1
    # m_0 is the accuracy itself, not a lambda-th of it.
    assert bandit.mean.gather(1, order).tolist() == [rewards] * 5
    assert bandit.count.tolist() == [[1] * 4] * 5
    assert bandit.phase == "search"


def test_hand_worked_run():
    """One edge, two arms, T = 1: two initial samples, two more, one abandonment."""
    bandit = AntiBandit(1, 2, rounds=1)
    bandit.sample()
    bandit.credit([0], 0.5)
    bandit.sample()
    bandit.credit([1], 0.25)
    # N = 2: sqrt(2 ln 2) = 1.177410022515.
    lower, upper = bandit.bounds()
    assert lower.tolist()[0] == pytest.approx([-0.677410022515, -0.927410022515], abs=1e-12)
    assert upper.tolist()[0] == pytest.approx([1.677410022515, 1.427410022515], abs=1e-12)
    # exp(0.677410) : exp(0.927410) = 1 : exp(0.25), so 1 / (1 + 1.284025416688).
    law = bandit.probabilities().tolist()[0]
    assert law == pytest.approx([0.437823499114, 0.562176500886], abs=1e-12)
    bandit.sample()
    bandit.credit([1], 0.75)  # 0.3 * 0.25 + 0.7 * 0.75
    assert bandit.mean.tolist()[0] == pytest.approx([0.5, 0.6], abs=1e-15)
    assert not bandit.due
    bandit.sample()
    bandit.credit([1], 0.9)  # 0.3 * 0.6 + 0.7 * 0.9
    assert bandit.mean.tolist()[0] == pytest.approx([0.5, 0.81], abs=1e-15)
    assert bandit.count.tolist() == [[1, 3]]
    # N = 4: sqrt(2 ln 4) = 1.665109222315 and, for n = 3, 0.961351257734.
    _, upper = bandit.bounds()
    assert upper.tolist()[0] == pytest.approx([2.165109222315, 1.771351257734], abs=1e-12)
    assert bandit.due
    assert bandit.final().tolist() == [1]  # stopped here, the higher mean would be taken
    assert bandit.prune().tolist() == [1]
    assert bandit.finished
    assert bandit.final().tolist() == [0]


def test_scale_acts_on_credited_accuracies_only():
    plain, percent = AntiBandit(2, 3, seed=1), AntiBandit(2, 3, seed=1, scale=100.0)
    for bandit in (plain, percent):
        for _ in range(3):
            bandit.credit(bandit.sample(), 0.25)
    assert torch.equal(percent.mean, 100 * plain.mean)
    assert torch.equal(percent.history.reward, plain.history.reward)


def test_history_holds_everything_in_order():
    bandit = AntiBandit(2, 3, rounds=1)
    assert bandit.history.choice.shape == (0, 2)
    choices, _ = advance(bandit, 4)
    bandit.credit(bandit.sample(trained=False), 0.5, trained=False)
    drawn = bandit.sample()
    bandit.credit(drawn, 0.25)
    kept = drawn.tolist()
    drawn.fill_(99)  # the caller's tensor is not the record
    history = bandit.history
    assert history.choice[5].tolist() == kept
    assert history.choice.tolist()[:4] == choices
    assert history.reward.dtype == torch.float64
    assert history.reward[4] == 0.5
    assert history.trained.tolist() == [True] * 4 + [False, True]


def test_paths_drawn_ahead():
    """The initial pass, then rounds, two and three at a time: no round is overrun."""
    bandit, one = AntiBandit(4, 5, rounds=1, seed=3), AntiBandit(4, 5, rounds=1, seed=3)
    rooms = []
    for _ in range(2):
        rooms.append(bandit.room)
        law = bandit.probabilities()
        pair = [bandit.sample(ahead=True) for _ in range(min(3, bandit.room))]
        assert (bandit.probabilities().gather(1, pair[-1].unsqueeze(1)) == 0).all()
        for choice in pair:
            assert (law.gather(1, choice.unsqueeze(1)) > 0).all()
            assert torch.equal(choice, one.sample())  # the same permutation
            for each in (bandit, one):
                each.credit(choice, 0.5)
    assert rooms == [5, 2]
    assert bandit.room == 5
    drawn = [bandit.sample(ahead=True) for _ in range(5)]
    assert bandit.room == 0
    assert torch.equal(drawn[0], one.sample())
    assert len({tuple(choice.tolist()) for choice in drawn}) == 5  # new numbers for each
    with pytest.raises(RuntimeError, match="5 paths drawn ahead are all that is left of this"):
        bandit.sample(ahead=True)
    with pytest.raises(RuntimeError, match="not credited yet"):
        bandit.sample()
    with pytest.raises(RuntimeError, match="trained: expected True, as the paths that are not"):
        bandit.sample(ahead=True, trained=False)
    with pytest.raises(RuntimeError, match="5 paths are drawn ahead and not credited"):
        bandit.state_dict()
    for i, choice in enumerate(drawn):
        assert torch.equal(bandit.pending, choice)
        assert not bandit.due
        bandit.credit(choice, 0.1 * i)
    assert bandit.pending is None
    assert bandit.due
    # Paths that are only evaluated have no end to their number.
    extra = [bandit.sample(trained=False, ahead=True) for _ in range(7)]
    with pytest.raises(RuntimeError, match="prune: a path is drawn"):
        bandit.prune()
    for choice in extra:
        bandit.credit(choice, 0.5, trained=False)
    bandit.prune()
    assert bandit.room == 4


def test_paths_only_evaluated_count_in_n_not_in_the_schedule():
    bandit = AntiBandit(2, 3, rounds=1)
    with pytest.raises(RuntimeError, match="in the initial pass every path is trained"):
        bandit.sample(trained=False)
    while not bandit.finished:
        initial = bandit.phase == "initial"
        bandit.credit(bandit.sample(), 0.5)
        for _ in range(0 if initial else 2):
            bandit.credit(bandit.sample(trained=False), 0.5, trained=False)
        while bandit.due:
            bandit.prune()
    assert bandit.trained == bandit.total_samples == 8
    assert bandit.samples == 8 + 2 * 5
    assert bandit.count.sum(1).tolist() == [18, 18]


# --- policies -----------------------------------------------------------------------------------


def test_printed_follows_the_ops():
    bandit = after_initial(rows=4, arms=5, seed=11, bonus=0.3)
    mean, count, alive = bandit.mean.clone(), bandit.count.clone(), bandit.alive.clone()
    while not bandit.finished:
        uniform = bandit.uniform("sample").squeeze(1)
        expected, probability = ops.bandit_sample(mean, count, alive, uniform, bonus=0.3)
        law = bandit.probabilities()
        choice = bandit.sample()
        assert torch.equal(choice, expected)
        assert torch.equal(law.gather(1, choice.unsqueeze(1)).squeeze(1), probability)
        bandit.credit(choice, accuracy(choice))
        ops.bandit_update_(mean, count, choice, accuracy(choice), rate=0.7)
        assert torch.equal(bandit.mean, mean)
        assert torch.equal(bandit.count, count)
        if bandit.due:
            before = alive.clone()
            ops.bandit_prune_(alive, mean, count, bonus=0.3)
            abandoned = bandit.prune()
            assert torch.equal(bandit.alive, alive)
            assert torch.equal((before & ~alive).int().argmax(1), abandoned)


CHI_SQUARE_0_1_PERCENT = {2: 13.816, 4: 18.467, 5: 20.515, 9: 27.877}


def chi_square(index, cells):
    observed = torch.bincount(index, minlength=cells).double()
    assert observed.numel() == cells
    expected = index.numel() / cells
    return ((observed - expected) ** 2 / expected).sum().item()


def test_random_draws_and_drops_uniformly():
    bandit = after_initial(rows=6000, arms=5, policy="random", rounds=1, seed=4)
    bandit.credit(bandit.sample(), 0.5)
    assert chi_square(bandit.history.choice[-1], 5) < CHI_SQUARE_0_1_PERCENT[4]
    while not bandit.due:
        bandit.credit(bandit.sample(), 0.5)
    dropped = bandit.prune()
    assert chi_square(dropped, 5) < CHI_SQUARE_0_1_PERCENT[4]
    assert torch.allclose(bandit.probabilities(), bandit.alive.double() / 4)
    second = bandit.sample()
    assert (bandit.alive.gather(1, second.unsqueeze(1))).all()
    rank = (bandit.alive.cumsum(1) - 1).gather(1, second.unsqueeze(1)).squeeze(1)
    assert torch.bincount(rank, minlength=4).min() > 1350  # 1500 expected, 4.5 sd below


def test_uniforms_and_permutations_are_uniform():
    bandit = AntiBandit(10_000, 3, seed=8)
    tenths = (bandit.uniform("sample") * 10).long().squeeze(1)
    assert chi_square(tenths, 10) < CHI_SQUARE_0_1_PERCENT[9]
    first, second = (bandit.uniform("sample", number=n).squeeze(1) for n in (0, 1))
    pair = (first * 3).long() * 3 + (second * 3).long()
    assert chi_square(pair[pair < 6], 6) < CHI_SQUARE_0_1_PERCENT[5]
    advance(bandit, 2)
    order = bandit.history.choice
    assert chi_square(order[0], 3) < CHI_SQUARE_0_1_PERCENT[2]
    code = order[0] * 2 + (order[1] > 3 - order[0] - order[1]).long()
    assert chi_square(code, 6) < CHI_SQUARE_0_1_PERCENT[5]


def test_uniforms_hold_53_bits_and_differ_by_purpose_number_and_column():
    bandit = AntiBandit(50, 3, seed=2**63 - 1)
    numbers = torch.cat(
        [
            bandit.uniform("sample", 2, number=0),
            bandit.uniform("sample", 2, number=1),
            bandit.uniform("prune", 2, number=0),
        ]
    )
    assert numbers.dtype == torch.float64
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert numbers.unique().numel() == numbers.numel()
    bits = numbers * 2**53
    assert torch.equal(bits, bits.round())
    assert (bits % 2 == 1).any()


def test_each_draw_has_its_own_numbers():
    bandit = after_initial(rounds=1)
    numbers = []
    while not bandit.finished:
        numbers.append(bandit.uniform("sample"))
        bandit.credit(bandit.sample(trained=False), 0.5, trained=False)
        numbers.append(bandit.uniform("sample"))
        bandit.credit(bandit.sample(), 0.5)
        if bandit.due:
            numbers.append(bandit.uniform("prune"))
            bandit.prune()
    numbers = torch.cat(numbers)
    assert numbers.numel() == 3 * (2 * 9 + 3)
    assert numbers.unique().numel() == numbers.numel()


def test_draws_depend_on_the_seed_alone():
    torch.manual_seed(0)
    first = finish(AntiBandit(6, 4, seed=1))
    before = torch.random.get_rng_state()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    assert finish(AntiBandit(6, 4, seed=1)) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(before, state)
    assert finish(AntiBandit(6, 4, seed=2)) != first
    assert finish(AntiBandit(6, 4, seed=1 + 2**40)) != first  # the high half of the seed counts


def philox(counter, key):
    """Philox4x32-10 with Python's integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ k, right % 2**32, (left >> 32) ^ d ^ m, left % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return a, b, c, d


def test_uniforms_are_a_fixed_function_of_the_counter():
    # A run that is resumed by a later release has to draw what it would have drawn.
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    bandit = AntiBandit(3, 4, seed=7 * 2**32 + 5)
    for code, purpose in ((1, "sample"), (2, "prune")):
        numbers = bandit.uniform(purpose, 2, number=6)
        for index, number in enumerate(numbers.flatten().tolist()):
            high, low, _, _ = philox((index, 6, code, 2**31), (5, 7))
            assert number == ((high >> 5) * 2**26 + (low >> 6)) / 2**53
    keys = [philox((k, 0, 0, 2**31), (5, 7)) for k in range(4)]
    keys = [(high >> 5) * 2**26 + (low >> 6) for high, low, _, _ in keys]
    order = sorted(range(4), key=keys.__getitem__)
    choices, _ = advance(bandit, 4)
    assert [choice[0] for choice in choices] == order


def test_policies_are_found_by_name(monkeypatch):
    monkeypatch.setitem(POLICIES, "halving", Policy)  # what is there afterwards is taken out
    del POLICIES["halving"]
    assert {"printed", "random"} <= POLICIES.keys()

    @register
    class Halving(Policy):
        """Half of the arms at once, the first ones; draws the first arm alive."""

        name = "halving"

        def budget(self, bandit, arms):
            return 4 if arms in (8, 4, 2) else 0

        def probabilities(self, bandit):
            return torch.nn.functional.one_hot(self.sample(bandit), bandit.arms).double()

        def sample(self, bandit):
            return bandit.alive.int().argmax(1)

        def prune(self, bandit):
            return bandit.alive.int().argmax(1)

    with pytest.raises(ValueError, match="policy 'halving' is registered already"):
        register(Halving)
    bandit = AntiBandit(2, 8, policy="halving")
    assert bandit.total_samples == 8 + 3 * 4
    choices, abandoned = advance(bandit, 12)
    assert len(abandoned) == 4
    assert bandit.arms_left == 4
    assert choices[8:] == [[0, 0]] * 4
    finish(bandit)
    assert bandit.finished
    assert bandit.final().tolist() == [7, 7]


def test_final_of_a_stopped_run():
    bandit = AntiBandit(2, 3)
    for choice, reward in (([0, 1], 0.5), ([1, 2], 0.75), ([2, 0], 0.75)):
        bandit.sample()
        bandit.credit(choice, reward)
    assert bandit.final().tolist() == [1, 0]  # the best mean; the lowest index of two


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"rows": 0}, "rows: expected an integer >= 1, got 0"),
        ({"arms": 2.0}, "arms: expected an integer >= 1, got 2.0"),
        ({"rounds": True}, "rounds: expected an integer >= 1, got True"),
        ({"rows": 2**31}, "rows * arms: expected less than 2**32"),
        ({"rate": 0.0}, "rate: expected a number in (0, 1], got 0.0"),
        ({"rate": math.nan}, "rate: expected a number in (0, 1], got nan"),
        ({"bonus": -1.0}, "bonus: expected a finite number >= 0, got -1.0"),
        ({"scale": 0.0}, "scale: expected a finite number > 0, got 0.0"),
        ({"seed": -1}, "seed: expected an integer in [0, 2**63), got -1"),
        ({"seed": 2**63}, "seed: expected an integer in [0, 2**63)"),
        (
            {"policy": "ucb"},
            "policy: expected one of detrended, hierarchical, printed, random",
        ),
    ],
)
def test_wrong_settings(keywords, message):
    with pytest.raises(ValueError, match=re.escape(f"AntiBandit: {message}")):
        AntiBandit(**{"rows": 2, "arms": 3, **keywords})


def test_sampling_twice():
    bandit = AntiBandit(2, 3)
    choice = bandit.sample()
    with pytest.raises(RuntimeError, match="drawn before is not credited yet: call credit"):
        bandit.sample()
    assert torch.equal(bandit.pending, choice)
    bandit.credit(bandit.pending, 0.5)
    assert bandit.pending is None


def test_crediting_nothing_or_another_kind():
    bandit = AntiBandit(2, 3)
    with pytest.raises(RuntimeError, match="no path was drawn: call sample"):
        bandit.credit([0, 0], 0.5)
    bandit.sample()
    with pytest.raises(RuntimeError, match="trained: expected True, as the path was drawn"):
        bandit.credit([0, 0], 0.5, trained=False)


@pytest.mark.parametrize(
    ("choice", "reward", "message"),
    [
        ([0, 1], 0.5, "choice: expected shape [3], got [2]"),
        (torch.zeros(3, 1, dtype=torch.int64), 0.5, "choice: expected shape [3], got [3, 1]"),
        (torch.zeros(3), 0.5, "choice: expected integers, got torch.float32"),
        ([True, True, True], 0.5, "choice: expected integers, got torch.bool"),
        ([0, 1, 4], 0.5, "choice: expected an arm in 0..3 in row 2, got 4"),
        ([0, -1, 0], 0.5, "choice: expected an arm in 0..3 in row 1, got -1"),
        (None, 1.01, "reward: expected an accuracy in [0, 1], got 1.01"),
        (None, -0.01, "reward: expected an accuracy in [0, 1], got -0.01"),
        (None, math.nan, "reward: expected an accuracy in [0, 1], got nan"),
        (None, 93.5, "reward: expected an accuracy in [0, 1], got 93.5"),
    ],
)
def test_wrong_credit_changes_nothing(choice, reward, message):
    bandit = after_initial(rows=3, arms=4)
    drawn = bandit.sample()
    before = bandit.state_dict()
    with pytest.raises(ValueError, match=re.escape(f"credit: {message}")):
        bandit.credit(drawn if choice is None else choice, reward)
    assert_same_state(bandit.state_dict(), before)


def test_crediting_an_abandoned_arm():
    bandit = AntiBandit(2, 3, rounds=1)
    _, abandoned = advance(bandit, 6)
    drawn = bandit.sample()
    choice = [int(drawn[0]), abandoned[0][1]]
    with pytest.raises(ValueError, match=f"arm {choice[1]} of row 1 was abandoned"):
        bandit.credit(choice, 0.5)


def test_pruning_out_of_turn():
    bandit = AntiBandit(2, 3, rounds=2)
    with pytest.raises(RuntimeError, match="prune: not due: the phase is initial"):
        bandit.prune()
    advance(bandit, 4)
    with pytest.raises(RuntimeError, match="not due: 1 of 6 paths are trained with 3 arms"):
        bandit.prune()
    advance(bandit, 4)
    bandit.credit(bandit.sample(), 0.5)
    assert bandit.due
    with pytest.raises(RuntimeError, match="an arm has to be abandoned now, call prune"):
        bandit.sample()
    bandit.sample(trained=False)
    with pytest.raises(RuntimeError, match="a path is drawn and not credited"):
        bandit.prune()


def test_after_the_end():
    bandit = AntiBandit(2, 2, rounds=1)
    finish(bandit)
    with pytest.raises(RuntimeError, match="sample: the run is finished"):
        bandit.sample()
    with pytest.raises(RuntimeError, match="prune: not due: the phase is finished"):
        bandit.prune()


def test_unknown_purpose_of_a_uniform():
    with pytest.raises(ValueError, match="expected sample or prune, got 'shuffle'"):
        AntiBandit(1, 2).uniform("shuffle")


# --- state --------------------------------------------------------------------------------------


def assert_same_state(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[key], value), key
        else:
            assert got[key] == value, key


def through_files(state):
    """Tensors through safetensors, the rest through JSON, as a checkpoint would."""
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    plain = {key: value for key, value in state.items() if key not in tensors}
    return {**load(save(tensors)), **json.loads(json.dumps(plain))}


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("stop", [0, 2, 4, 5, 8, 9, 13])
@pytest.mark.parametrize("pending", [False, True])
def test_state_continues_a_run(device, policy, stop, pending):
    # 4 + 4 + 3 + 2 samples
    settings = {"policy": policy, "rounds": 1, "seed": 5, "device": device}
    straight, stopped = AntiBandit(3, 4, **settings), AntiBandit(3, 4, **settings)
    advance(straight, stop)
    advance(stopped, stop)
    drawn = stopped.sample() if pending and not stopped.finished else None
    resumed = AntiBandit(3, 4, **settings)
    resumed.load_state_dict(through_files(stopped.state_dict()))
    assert_same_state(resumed.state_dict(), stopped.state_dict())
    assert (resumed.pending is None) == (drawn is None)
    if drawn is not None:
        choice = resumed.pending
        assert torch.equal(choice, drawn)
        assert torch.equal(choice, straight.sample())
        for bandit in (straight, resumed):
            bandit.credit(choice, accuracy(choice))
            while bandit.due:
                bandit.prune()
    assert finish(resumed) == finish(straight)
    assert_same_state(resumed.state_dict(), straight.state_dict())


def test_state_knows_that_the_drawn_path_is_only_evaluated():
    bandit, resumed = after_initial(), AntiBandit(3, 4)
    bandit.sample(trained=False)
    resumed.load_state_dict(bandit.state_dict())
    resumed.credit(resumed.pending, 0.5, trained=False)
    assert (resumed.samples, resumed.trained) == (5, 4)


def test_state_is_a_copy():
    bandit = after_initial()
    state = bandit.state_dict()
    before = {key: value.clone() for key, value in state.items() if hasattr(value, "clone")}
    other = AntiBandit(3, 4)
    other.load_state_dict(state)
    advance(bandit, 5)
    advance(other, 5)
    for key, value in before.items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mean"), "keys missing: ['mean'], keys unknown: []"),
        (lambda s: s.update(extra=1), "keys missing: [], keys unknown: ['extra']"),
        (lambda s: s.update(version=99), "version: expected 1, got 99"),
        (lambda s: s.update(policy="random"), "policy: expected 'printed', got 'random'"),
        (lambda s: s.update(rows=5), "rows: expected 3, got 5"),
        (lambda s: s.update(arms=5), "arms: expected 4, got 5"),
        (lambda s: s.update(seed=1), "seed: expected 0, got 1"),
        (lambda s: s.update(rate=0.5), "rate: expected 0.7, got 0.5"),
        (lambda s: s.update(rounds="3"), "rounds: expected 3, got '3'"),
        (lambda s: s.update(pending_trained=1), "pending_trained: expected a bool, got 1"),
        (lambda s: s.update(mean=[1.0]), "mean: expected a tensor, got list"),
        (
            lambda s: s.update(mean=s["mean"].float()),
            "mean: expected torch.float64 [3, 4], got torch.float32 [3, 4]",
        ),
        (
            lambda s: s.update(alive=s["alive"][:2]),
            "alive: expected torch.bool [3, 4], got torch.bool [2, 4]",
        ),
        (
            lambda s: s.update(history_choice=s["history_choice"][1:]),
            "history_choice: expected torch.int64 [20, 3], got torch.int64 [19, 3]",
        ),
        (lambda s: s["history_reward"].fill_(1.5), "history_reward: expected values in [0, 1]"),
        (lambda s: s["history_choice"].fill_(4), "history_choice: expected arms in 0..3"),
        (lambda s: s["count"].add_(1), "count: expected how often history_choice holds each arm"),
        (lambda s: s["mean"].fill_(math.nan), "mean: expected finite values"),
        (lambda s: s["alive"][0].fill_(True), "alive: expected the same number of arms"),
        (lambda s: s["alive"].fill_(False), "alive: expected the same number of arms, 1 or more"),
        (lambda s: s["alive"].fill_(True), "history_trained: expected 0 to 16 trained paths"),
        (lambda s: s["pending"].fill_(7), "pending: expected -1 everywhere or an arm alive"),
        (lambda s: s["pending"][1:].fill_(0), "pending: expected -1 everywhere or an arm alive"),
    ],
)
def test_foreign_state_changes_nothing(change, message):
    source = AntiBandit(3, 4)
    advance(source, 20)
    state = source.state_dict()
    change(state)
    bandit = AntiBandit(3, 4)
    advance(bandit, 3)
    bandit.sample()
    before = bandit.state_dict()
    with pytest.raises(ValueError, match=re.escape(f"AntiBandit.load_state_dict: {message}")):
        bandit.load_state_dict(state)
    assert_same_state(bandit.state_dict(), before)


# --- replay -------------------------------------------------------------------------------------


def record(bandit, samples=None):
    """The lines of bandit.jsonl of a run, through JSON; and the bandit as the run left it."""
    lines = [
        {
            "event": "start",
            "space": "example",
            "operations": [f"operation_{k}" for k in range(bandit.arms)],
            "edges": [f"a:0->{k}" for k in range(bandit.rows)],
            "policy": bandit.settings.policy,
            "rate": bandit.settings.rate,
            "rounds": bandit.settings.rounds,
            "bonus": bandit.settings.bonus,
            "seed": bandit.seed,
        }
    ]
    for _ in range(bandit.total_samples if samples is None else samples):
        number, phase = bandit.samples, bandit.phase
        choice = bandit.sample()
        bandit.credit(choice, accuracy(choice))
        lines.append(
            {
                "event": "sample",
                "sample": number,
                "phase": phase,
                "choice": choice.tolist(),
                "reward": accuracy(choice),
            }
        )
        while bandit.due:
            number, (lower, upper) = bandit.round, bandit.bounds()
            score = bandit.score()
            for row, arm in enumerate(bandit.prune().tolist()):
                lines.append(
                    {
                        "event": "abandon",
                        "sample": bandit.samples,
                        "round": number,
                        "row": row,
                        "cell": "a",
                        "edge": f"a:0->{row}",
                        "arm": arm,
                        "operation": f"operation_{arm}",
                        "mean": bandit.mean[row, arm].item(),
                        "count": bandit.count[row, arm].item(),
                        "lower": lower[row, arm].item(),
                        "upper": upper[row, arm].item(),
                        "score": score[row, arm].item(),
                        "total": bandit.samples,
                        "arms_left": bandit.arms_left,
                    }
                )
    if bandit.finished:
        lines.append({"event": "end", "sample": bandit.samples, "choice": bandit.final().tolist()})
    return [json.loads(json.dumps(line)) for line in lines]


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("samples", [None, 0, 2, 7, 16])
def test_replay_explains_a_run(policy, samples):
    bandit = AntiBandit(3, 4, policy=policy, seed=9, rate=0.4, bonus=0.2)
    lines = record(bandit, samples)
    assert_same_state(replay(lines).state_dict(), bandit.state_dict())


def test_replay_with_paths_only_evaluated_and_a_scale():
    bandit = AntiBandit(2, 3, rounds=1, scale=100.0)
    lines = record(bandit, 4)
    lines[0]["scale"] = 100.0
    choice = bandit.sample(trained=False)
    bandit.credit(choice, 0.5, trained=False)
    lines.append(
        {
            "event": "sample",
            "sample": 4,
            "phase": "search",
            "choice": choice.tolist(),
            "reward": 0.5,
            "trained": False,
        }
    )
    assert_same_state(replay(lines).state_dict(), bandit.state_dict())


def first(lines, event, skip=0):
    found = [number for number, line in enumerate(lines) if line["event"] == event]
    return found[skip]


@pytest.mark.parametrize(
    ("event", "skip", "change", "message"),
    [
        ("abandon", 1, {"arm": 9}, r"arm: the rule gives \d, the log holds 9"),
        ("abandon", 2, {"mean": 0.1}, r"mean: the rule gives 0\.\d+, the log holds 0.1"),
        ("abandon", 0, {"upper": None}, r"upper: the rule gives \d\.\d+, the log holds None"),
        ("abandon", 4, {"count": 99}, r"count: the rule gives \d+, the log holds 99"),
        ("abandon", 0, {"arms_left": 2}, "arms_left: the rule gives 3, the log holds 2"),
        ("abandon", 1, {"row": 0}, "row: expected one of rows 1, 2, got 0"),
        ("abandon", 0, {"event": "sample"}, "expected abandon events, got sample|sample: the"),
        ("sample", 5, {"event": "abandon"}, "prune: not due"),
        (
            "sample",
            5,
            {"event": "pause"},
            "event: expected sample, abandon, attack, reward or end, got 'pause'",
        ),
        ("sample", 5, {"event": "end"}, r"choice: the rule gives \[\d, \d, \d\], the log"),
        ("sample", 5, {"sample": 6}, "sample: the rule gives 5, the log holds 6"),
        ("sample", 5, {"phase": "initial"}, "phase: the rule gives 'search', the log holds"),
        ("sample", 5, {"choice": [0, 1]}, r"credit: choice: expected shape \[3\], got \[2\]"),
        ("sample", 5, {"reward": 2.0}, "credit: reward: expected an accuracy in"),
        ("start", 0, {"event": "sample"}, "event: expected start, got 'sample'"),
        (
            "start",
            0,
            {"policy": "best"},
            "AntiBandit: policy: expected one of detrended, hierarchical, printed, random",
        ),
        ("end", 0, {"choice": [0, 0, 9]}, r"choice: the rule gives .* the log holds \[0, 0, 9\]"),
        ("end", 0, {"sample": 1}, "sample: the rule gives 31, the log holds 1"),
    ],
)
def test_replay_names_the_line_that_does_not_follow(event, skip, change, message):
    lines = record(AntiBandit(3, 4))
    at = first(lines, event, skip)
    lines[at] = {**lines[at], **change}
    with pytest.raises(ValueError, match=rf"^bandit log, line {at + 1}: ({message})"):
        replay(lines)


def test_replay_notices_a_changed_reward_at_the_abandonment_it_explains():
    lines = record(AntiBandit(3, 4))
    at = first(lines, "abandon", skip=-1) - 3
    assert lines[at]["event"] == "sample"
    lines[at]["reward"] += 0.1
    with pytest.raises(ValueError, match=r"bandit log, line \d+: (mean|arm|upper|lower|choice)"):
        replay(lines)


def test_replay_of_incomplete_logs():
    lines = record(AntiBandit(3, 4))
    at = first(lines, "abandon")
    with pytest.raises(ValueError, match=f"line {at + 1}: expected abandon events, got sample"):
        replay([*lines[:at], *lines[at + 3 :]])
    with pytest.raises(
        ValueError, match=f"line {at + 3}: expected abandon events of rows 2, got sample"
    ):
        replay([*lines[: at + 2], *lines[at + 3 :]])
    stopped = AntiBandit(3, 4)
    early = record(stopped, 15)
    choice = stopped.sample()
    stopped.credit(choice, 0.5)
    assert stopped.due
    early.append(
        {
            "event": "sample",
            "sample": 15,
            "phase": "search",
            "choice": choice.tolist(),
            "reward": 0.5,
        }
    )
    assert replay(early).due  # a run that was killed there
    early.append({"event": "end", "sample": 16, "choice": stopped.final().tolist()})
    with pytest.raises(ValueError, match="expected abandon events, got end"):
        replay(early)
    with pytest.raises(ValueError, match="line 6: sample event: reward is missing"):
        replay([*lines[:5], {k: v for k, v in lines[5].items() if k != "reward"}])
    with pytest.raises(ValueError, match=f"line {len(lines) + 1}: nothing may follow the end"):
        replay([*lines, lines[-1]])
    with pytest.raises(ValueError, match="line 2: event: expected sample, abandon, attack, r"):
        replay([lines[0], "sample"])
    with pytest.raises(ValueError, match="no start event, the log is empty"):
        replay([])
