"""The anti-bandit rules as batched ops: bounds, sampling law, update, abandonment.

A bandit is one row of K arms; any leading shape holds independent bandits. For each arm:

- ``mean`` [..., K], float32 or float64: the running performance m;
- ``count`` [..., K], int64 or the dtype of ``mean``: how often it was credited, n;
- ``alive`` [..., K], bool: not yet abandoned.

N, the number of samples a row has seen, is ``count.sum(-1)`` over **all** its arms: m, n and N
persist over abandonments, so an abandoned arm still counts. It is computed at every use; a bound
that is not refreshed when N moves is a wrong bound. Logarithms are natural.

Everything is computed in float64 and returned in the dtype of ``mean``; cumulative sums run in
the order of the arms. So every implementation of an op makes the same choices, unless a uniform
number lies within 1e-12 of an edge of the distribution. Results are contiguous.

Means have to be finite and counts not negative; this is not checked, because it would wait for
the device. What NaN does is the same everywhere: an arm whose bounds are NaN is not drawn while
another one can be, and is the first to be abandoned; a NaN count is that of an untried arm, and its
row has no bonus; a NaN uniform number draws the last arm alive; a NaN reward is credited as it is.
A bonus or rate that is NaN is an error. No op here has a gradient: asking for one raises.

Source: *Binary Neural Networks* (Zhang, Xu et al.), Eqs. 4.9 to 4.13; Chen et al., "Anti-Bandit
Neural Architecture Search for Model Defense", ECCV 2020. What the printed equations leave open
is decided here: an untried arm (n = 0) has the bounds -infinity and +infinity, the untried arms
alive share the whole probability, ties go to the lowest index, the last arm is never dropped.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from fastbandit.ops._register import MISS, define, forward_mode, refuse_tangent, short_call

__all__ = [
    "bandit_bounds",
    "bandit_probabilities",
    "bandit_prune_",
    "bandit_sample",
    "bandit_step_",
    "bandit_update_",
]

_REAL = (torch.float32, torch.float64)


# --- Formulas: float64 tensors in, float64 or index tensors out ---------------------------------


def _bounds(mean: Tensor, count: Tensor, bonus: float) -> tuple[Tensor, Tensor]:
    """Eqs. 4.9 and 4.12 in float64: m -+ bonus sqrt(2 ln N / n)."""
    m = mean.double()
    n = count.double()
    # The smallest N with a bonus is 1, where it is zero; this also keeps a row of fractional counts
    # (discounted statistics) below 1 from taking the root of a negative number. NaN is not above 1.
    total = n.sum(-1, keepdim=True)
    log_total = torch.where(total > 1.0, total, 1.0).log()
    tried = n > 0
    width = bonus * (2.0 * log_total / torch.where(tried, n, 1.0)).sqrt()
    # Not m -+ inf * bonus: a bonus of zero would make that NaN.
    lower = torch.where(tried, m - width, -math.inf)
    upper = torch.where(tried, m + width, math.inf)
    return lower, upper


def _weights(mean: Tensor, count: Tensor, alive: Tensor, bonus: float) -> tuple[Tensor, Tensor]:
    """Eq. 4.10 in float64: softmax of -s_L over the arms alive, exactly zero elsewhere, as weights
    [..., K] and the total [..., 1] that they are to be divided by."""
    lower, _ = _bounds(mean, count, bonus)
    untried = alive & ~(count > 0)
    any_untried = untried.any(-1, keepdim=True)
    # exp(-s_L) grows without bound as s_L falls, so weights are taken relative to the smallest
    # s_L alive; rows decided by untried arms are masked here to keep inf - inf out.
    eligible = alive & ~any_untried & ~lower.isnan()
    smallest = torch.where(eligible, lower, math.inf).amin(-1, keepdim=True)
    # Of an infinite bound the difference is -inf, or NaN where the smallest is infinite as well.
    distance = smallest - lower
    weight = torch.where(eligible & (distance <= 0), distance.exp(), 0.0)
    weight = torch.where(any_untried, untried.double(), weight)
    # In the order of the arms, as a kernel adds them: sum() adds in another order for each layout.
    total = weight.cumsum(-1)[..., -1:]
    return weight, torch.where(total > 0, total, 1.0)  # a row with no arm alive stays at zero


def _inverse_cdf(weight: Tensor, total: Tensor, alive: Tensor, uniform: Tensor) -> Tensor:
    """First arm alive whose cumulative probability exceeds `uniform`; -1 with no arm alive.

    The weights are compared with uniform * total, which saves a kernel its divisions.
    """
    arms = alive.shape[-1]
    arm = torch.arange(arms, device=alive.device)
    reached = alive & (weight.cumsum(-1) > uniform.double().unsqueeze(-1) * total)
    first = torch.where(reached, arm, arms).amin(-1)
    # None is reached where the uniform number is not below 1.
    last = torch.where(alive, arm, -1).amax(-1)
    return torch.where(first < arms, first, last)


def _abandoned(alive: Tensor, mean: Tensor, count: Tensor, bonus: float) -> Tensor:
    """Eq. 4.13: mask [..., K] of the arm each row drops, none where one arm or less is alive."""
    _, upper = _bounds(mean, count, bonus)
    upper = torch.where(upper.isnan(), -math.inf, upper)
    smallest = torch.where(alive, upper, math.inf).amin(-1, keepdim=True)
    # The mask also excludes dead arms where the smallest bound alive is infinite.
    candidate = alive & (upper == smallest)
    first = candidate & (candidate.cumsum(-1) == 1)
    return first & (alive.sum(-1, keepdim=True) > 1)


# --- References: what serves a device without a kernel ------------------------------------------


def _bandit_bounds_reference(mean: Tensor, count: Tensor, bonus: float) -> tuple[Tensor, Tensor]:
    lower, upper = _bounds(mean, count, bonus)
    return lower.to(mean.dtype).contiguous(), upper.to(mean.dtype).contiguous()


def _bandit_probabilities_reference(
    mean: Tensor, count: Tensor, alive: Tensor, bonus: float
) -> Tensor:
    weight, total = _weights(mean, count, alive, bonus)
    return (weight / total).to(mean.dtype).contiguous()


def _bandit_sample_reference(
    mean: Tensor, count: Tensor, alive: Tensor, uniform: Tensor, bonus: float
) -> tuple[Tensor, Tensor]:
    weight, total = _weights(mean, count, alive, bonus)
    choice = _inverse_cdf(weight, total, alive, uniform)
    chosen = (weight / total).gather(-1, choice.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return choice.contiguous(), chosen.to(mean.dtype).contiguous()


def _bandit_update_reference(
    mean: Tensor, count: Tensor, choice: Tensor, reward: Tensor, rate: float
) -> None:
    """Eq. 4.11, in place: m <- (1 - rate) m + rate a and n <- n + 1 where chosen."""
    chosen = torch.arange(mean.shape[-1], device=mean.device) == choice.unsqueeze(-1)
    m = mean.double()
    a = reward.double().expand(choice.shape).unsqueeze(-1)
    mean.copy_(torch.where(chosen, (1.0 - rate) * m + rate * a, m))
    count.add_(chosen)


def _bandit_prune_reference(alive: Tensor, mean: Tensor, count: Tensor, bonus: float) -> None:
    alive.logical_and_(~_abandoned(alive, mean, count, bonus))


def _bandit_step_reference(
    mean: Tensor,
    count: Tensor,
    alive: Tensor,
    choice: Tensor,
    reward: Tensor,
    prune: Tensor,
    uniform: Tensor,
    rate: float,
    bonus: float,
) -> tuple[Tensor, Tensor]:
    _bandit_update_reference(mean, count, choice, reward, rate)
    alive.logical_and_(~(_abandoned(alive, mean, count, bonus) & prune.unsqueeze(-1)))
    return _bandit_sample_reference(mean, count, alive, uniform, bonus)


# --- Fake kernels: shapes and dtypes only -------------------------------------------------------


def _bandit_bounds_fake(mean: Tensor, count: Tensor, bonus: float) -> tuple[Tensor, Tensor]:
    return mean.new_empty(mean.shape), mean.new_empty(mean.shape)


def _bandit_probabilities_fake(mean: Tensor, count: Tensor, alive: Tensor, bonus: float) -> Tensor:
    return mean.new_empty(mean.shape)


def _bandit_sample_fake(
    mean: Tensor, count: Tensor, alive: Tensor, uniform: Tensor, bonus: float
) -> tuple[Tensor, Tensor]:
    rows = mean.shape[:-1]
    return mean.new_empty(rows, dtype=torch.int64), mean.new_empty(rows)


def _bandit_update_fake(
    mean: Tensor, count: Tensor, choice: Tensor, reward: Tensor, rate: float
) -> None:
    return None


def _bandit_prune_fake(alive: Tensor, mean: Tensor, count: Tensor, bonus: float) -> None:
    return None


def _bandit_step_fake(
    mean: Tensor,
    count: Tensor,
    alive: Tensor,
    choice: Tensor,
    reward: Tensor,
    prune: Tensor,
    uniform: Tensor,
    rate: float,
    bonus: float,
) -> tuple[Tensor, Tensor]:
    return _bandit_sample_fake(mean, count, alive, uniform, bonus)


# --- Declarations -------------------------------------------------------------------------------

_bandit_bounds = define(
    "bandit_bounds",
    "(Tensor mean, Tensor count, float bonus) -> (Tensor, Tensor)",
    _bandit_bounds_reference,
    _bandit_bounds_fake,
)
_bandit_probabilities = define(
    "bandit_probabilities",
    "(Tensor mean, Tensor count, Tensor alive, float bonus) -> Tensor",
    _bandit_probabilities_reference,
    _bandit_probabilities_fake,
)
_bandit_sample = define(
    "bandit_sample",
    "(Tensor mean, Tensor count, Tensor alive, Tensor uniform, float bonus) -> (Tensor, Tensor)",
    _bandit_sample_reference,
    _bandit_sample_fake,
)
_bandit_update_ = define(
    "bandit_update_",
    "(Tensor(a!) mean, Tensor(b!) count, Tensor choice, Tensor reward, float rate) -> ()",
    _bandit_update_reference,
    _bandit_update_fake,
)
_bandit_prune_ = define(
    "bandit_prune_",
    "(Tensor(a!) alive, Tensor mean, Tensor count, float bonus) -> ()",
    _bandit_prune_reference,
    _bandit_prune_fake,
)
_bandit_step_ = define(
    "bandit_step_",
    "(Tensor(a!) mean, Tensor(b!) count, Tensor(c!) alive, Tensor choice, Tensor reward, "
    "Tensor prune, Tensor uniform, float rate, float bonus) -> (Tensor, Tensor)",
    _bandit_step_reference,
    _bandit_step_fake,
)

_native_bounds = short_call(_bandit_bounds)
_native_probabilities = short_call(_bandit_probabilities)
_native_sample = short_call(_bandit_sample)
_native_update_ = short_call(_bandit_update_)
_native_prune_ = short_call(_bandit_prune_)
_native_step_ = short_call(_bandit_step_)


# --- Arguments: one function per op; nothing here waits for the device --------------------------


def _fail(op: str, argument: str, expected: str, got: object) -> None:
    raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def _check_tensor(
    op: str,
    argument: str,
    value: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: torch.Size,
    device: torch.device,
) -> None:
    if not isinstance(value, Tensor):
        _fail(op, argument, "a tensor", type(value).__name__)
    _check_layout(op, argument, value)
    if forward_mode():
        refuse_tangent(op, argument, value)
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        _fail(op, argument, f"dtype {names}", str(value.dtype).removeprefix("torch."))
    if value.shape != shape:
        _fail(op, argument, f"shape {list(shape)}", list(value.shape))
    if value.device != device:
        _fail(op, argument, f"device {device}, that of mean", value.device)


def _check_layout(op: str, argument: str, value: Tensor) -> None:
    if value.layout != torch.strided:
        _fail(op, argument, "a dense tensor", value.layout)


def _check_number(op: str, argument: str, value: float) -> None:
    # A tensor of one element is one: torch takes it for a number too.
    if not isinstance(value, (numbers.Real, Tensor)):
        _fail(op, argument, "a number", type(value).__name__)


def _check_statistics(op: str, mean: Tensor, count: Tensor, bonus: float = 0.0) -> None:
    if not isinstance(mean, Tensor):
        _fail(op, "mean", "a tensor", type(mean).__name__)
    if mean.dim() < 1 or mean.shape[-1] < 1:
        _fail(op, "mean", "shape [..., K] with at least one arm", list(mean.shape))
    _check_tensor(op, "mean", mean, _REAL, mean.shape, mean.device)
    _check_tensor(op, "count", count, (torch.int64, mean.dtype), mean.shape, mean.device)
    _check_number(op, "bonus", bonus)
    if not 0.0 <= bonus < math.inf:
        _fail(op, "bonus", "a finite number >= 0", bonus)


def _check_alive(op: str, alive: Tensor, mean: Tensor) -> None:
    _check_tensor(op, "alive", alive, (torch.bool,), mean.shape, mean.device)


def _check_uniform(op: str, uniform: Tensor, mean: Tensor) -> None:
    _check_tensor(op, "uniform", uniform, _REAL, mean.shape[:-1], mean.device)


def _check_update(
    op: str, mean: Tensor, count: Tensor, choice: Tensor, reward: Tensor | float, rate: float
) -> Tensor:
    """Also returns the reward as a tensor of choice's shape."""
    _check_statistics(op, mean, count)
    _check_tensor(op, "choice", choice, (torch.int64,), mean.shape[:-1], mean.device)
    _check_number(op, "rate", rate)
    if not 0.0 <= rate <= 1.0:
        _fail(op, "rate", "a number in [0, 1]", rate)
    if not isinstance(reward, Tensor):
        _check_number(op, "reward", reward)
        reward = torch.full((), float(reward), dtype=torch.float64, device=mean.device)
    reward = _broadcast(op, "reward", reward, choice.shape)
    _check_tensor(op, "reward", reward, _REAL, choice.shape, mean.device)
    return reward


def _broadcast(op: str, argument: str, value: Tensor, shape: torch.Size) -> Tensor:
    _check_layout(op, argument, value)
    fits = value.dim() <= len(shape) and all(
        own in (1, size) for own, size in zip(reversed(value.shape), reversed(shape), strict=False)
    )
    if not fits:
        _fail(op, argument, f"a shape that broadcasts to {list(shape)}", list(value.shape))
    return value.expand(shape)


# --- Public functions ---------------------------------------------------------------------------


def bandit_bounds(mean: Tensor, count: Tensor, *, bonus: float = 1.0) -> tuple[Tensor, Tensor]:
    """Confidence bounds ``mean -+ bonus * sqrt(2 ln N / count)``, Eqs. 4.9 and 4.12.

    Args:
        mean: [..., K], float32 or float64.
        count: [..., K], int64 or the dtype of ``mean``. N is its sum over the last dimension,
            abandoned arms included.
        bonus: factor of the square root, finite and >= 0; 1 is the printed rule.

    Returns:
        ``(lower, upper)``, each [..., K] in the dtype of ``mean``; -infinity and +infinity for
        an arm with count 0.

    Raises:
        ValueError: a dtype, shape, device or number other than the above.
    """
    if (result := _native_bounds(mean, count, bonus)) is not MISS:
        return result
    _check_statistics("bandit_bounds", mean, count, bonus)
    return _bandit_bounds(mean, count, bonus)


def bandit_probabilities(
    mean: Tensor, count: Tensor, alive: Tensor, *, bonus: float = 1.0
) -> Tensor:
    """Sampling law ``softmax(-lower)`` over the arms alive, Eq. 4.10.

    Arms with a small lower bound, so with little credit or few trials, are preferred. Untried
    arms that are alive share the whole probability equally.

    Args:
        mean, count, bonus: as in :func:`bandit_bounds`.
        alive: [..., K], bool.

    Returns:
        [..., K] in the dtype of ``mean``: sums to 1 over each row, exactly 0 where not alive;
        all 0 in a row with no arm alive.

    Raises:
        ValueError: a dtype, shape, device or number other than the above.
    """
    if (result := _native_probabilities(mean, count, alive, bonus)) is not MISS:
        return result
    _check_statistics("bandit_probabilities", mean, count, bonus)
    _check_alive("bandit_probabilities", alive, mean)
    return _bandit_probabilities(mean, count, alive, bonus)


def bandit_sample(
    mean: Tensor, count: Tensor, alive: Tensor, uniform: Tensor, *, bonus: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draws one arm per row from :func:`bandit_probabilities` by inversion.

    The choice is the first arm alive, in the order of the arms, whose cumulative probability is
    greater than ``uniform``; the last arm alive for a number that is not below 1.

    Args:
        mean, count, alive, bonus: as in :func:`bandit_probabilities`.
        uniform: [...], float32 or float64, in [0, 1).

    Returns:
        ``(choice, probability)``: int64 [...], and [...] in the dtype of ``mean``; -1 and 0 in
        a row with no arm alive.

    Raises:
        ValueError: a dtype, shape, device or number other than the above.
    """
    if (result := _native_sample(mean, count, alive, uniform, bonus)) is not MISS:
        return result
    _check_statistics("bandit_sample", mean, count, bonus)
    _check_alive("bandit_sample", alive, mean)
    _check_uniform("bandit_sample", uniform, mean)
    return _bandit_sample(mean, count, alive, uniform, bonus)


def bandit_update_(
    mean: Tensor, count: Tensor, choice: Tensor, reward: Tensor | float, *, rate: float
) -> None:
    """Credits the chosen arm of each row, in place: Eq. 4.11.

    ``mean = (1 - rate) * mean + rate * reward`` and ``count = count + 1`` at ``choice``.

    Args:
        mean: [..., K], float32 or float64; changed.
        count: [..., K], int64 or the dtype of ``mean``; changed.
        choice: [...], int64. A row whose choice is -1, or no arm's index, is left as it is.
        reward: a number, or a float32 or float64 tensor that broadcasts to the shape of
            ``choice``.
        rate: lambda, the weight of the new value, in [0, 1] (printed: 0.7); 1 replaces the mean.

    Raises:
        ValueError: a dtype, shape, device or number other than the above.
    """
    if (
        isinstance(reward, Tensor)
        and _native_update_(mean, count, choice, reward, rate) is not MISS
    ):
        return
    reward = _check_update("bandit_update_", mean, count, choice, reward, rate)
    _bandit_update_(mean, count, choice, reward, rate)


def bandit_prune_(alive: Tensor, mean: Tensor, count: Tensor, *, bonus: float = 1.0) -> None:
    """Abandons, in place, the arm alive with the smallest upper bound of each row: Eq. 4.13.

    Ties go to the lowest index. A row with one arm alive, or none, is left as it is.

    Args:
        alive: [..., K], bool; changed.
        mean, count, bonus: as in :func:`bandit_bounds`.

    Raises:
        ValueError: a dtype, shape, device or number other than the above.
    """
    if _native_prune_(alive, mean, count, bonus) is not MISS:
        return
    _check_statistics("bandit_prune_", mean, count, bonus)
    _check_alive("bandit_prune_", alive, mean)
    _bandit_prune_(alive, mean, count, bonus)


def bandit_step_(
    mean: Tensor,
    count: Tensor,
    alive: Tensor,
    choice: Tensor,
    reward: Tensor | float,
    prune: Tensor | bool,
    uniform: Tensor,
    *,
    rate: float,
    bonus: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One step of every row at once: credit the last choice, abandon if asked, draw the next.

    The same as :func:`bandit_update_`, then :func:`bandit_prune_` on the rows where ``prune``
    is true, then :func:`bandit_sample`.

    Args:
        mean, count: as in :func:`bandit_update_`; changed.
        alive: [..., K], bool; changed.
        choice: [...], int64; -1 credits nothing in that row, as before the first draw.
        reward: a number, or a float32 or float64 tensor that broadcasts to [...].
        prune: a bool, or a bool tensor that broadcasts to [...].
        uniform: [...], float32 or float64, in [0, 1).
        rate: lambda, the weight of the new value, in [0, 1].
        bonus: as in :func:`bandit_bounds`.

    Returns:
        ``(choice, probability)`` as :func:`bandit_sample`.

    Raises:
        ValueError: a dtype, shape, device or number other than the above.
    """
    op = "bandit_step_"
    if isinstance(reward, Tensor) and isinstance(prune, Tensor):
        result = _native_step_(mean, count, alive, choice, reward, prune, uniform, rate, bonus)
        if result is not MISS:
            return result
    reward = _check_update(op, mean, count, choice, reward, rate)
    _check_statistics(op, mean, count, bonus)
    _check_alive(op, alive, mean)
    _check_uniform(op, uniform, mean)
    if not isinstance(prune, Tensor):
        if not isinstance(prune, bool):
            _fail(op, "prune", "a bool or a bool tensor", type(prune).__name__)
        prune = torch.full((), prune, dtype=torch.bool, device=mean.device)
    prune = _broadcast(op, "prune", prune, choice.shape)
    _check_tensor(op, "prune", prune, (torch.bool,), choice.shape, mean.device)
    return _bandit_step_(mean, count, alive, choice, reward, prune, uniform, rate, bonus)
