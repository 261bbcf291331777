"""How networks of 1-bit layers are attacked: through several derivatives of the sign, and on bits.

The sign has no derivative to follow; an attack follows that of a surrogate. A single run through
one of them is no evaluation: where it stops, another derivative or another start goes on, and
queries without gradients find more than it does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastbandit import _native
from fastbandit.attacks._model import Oracle
from fastbandit.attacks._pgd import pgd_loop
from fastbandit.attacks.ball import Ball
from fastbandit.attacks.registry import AttackResult
from fastbandit.config import ConfigError
from fastbandit.evaluate.plans import Plan, on_another
from fastbandit.nn.binary import BinaryConv2d, pack, surrogate_of, use_full_precision
from fastbandit.ops.sign_ste import ESTIMATORS
from fastbandit.threat import ThreatModel

__all__ = ["PARENT", "SURROGATES", "has_signs", "of_signs", "parent_of", "surrogates_plan"]

#: The network in full precision, on which images are made that the 1-bit one judges.
PARENT = "parent"
SURROGATES = (*ESTIMATORS, PARENT)
# Those of the check: the two that find most, and one that is 0 elsewhere than they are.
_OF_CHECK = ("poly", "tanh", "clip")


def _layers(model: nn.Module) -> list[BinaryConv2d]:
    return [m for m in model.modules() if isinstance(m, BinaryConv2d) and not m.full_precision]


def has_signs(model: nn.Module) -> bool:
    """Whether it computes with the signs of its maps."""
    return bool(_layers(model))


def _plan_through(plan: Plan, ste: str) -> Plan:
    def run(oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        with surrogate_of(oracle.model, ste):
            return plan.run(oracle, x, y, ids, seed)

    return replace(
        plan,
        key=f"{plan.key}-{ste}",
        name=f"{plan.name} ({ste})",
        describe=f"{plan.describe}, sign differentiated as {ste}",
        run=run,
        settings={**plan.settings, "surrogate": ste},
    )


def _plan_on_parent(plan: Plan, parent: nn.Module) -> Plan:
    moved = on_another(plan, parent, "the network in full precision")
    return replace(
        moved,
        key=f"{plan.key}-{PARENT}",
        name=f"{plan.name} ({PARENT})",
        settings={**plan.settings, "surrogate": PARENT},
    )


def _plan_on_bits(plan: Plan, packed: nn.Module) -> Plan:
    """A black-box attack asks for logits alone: those of the packed network are the same."""

    def run(oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        bits = Oracle(packed, batch_size=oracle.batch_size, exact=oracle.exact, labels=y)
        with bits:
            result = plan.run(bits, x, y, ids, seed)
        oracle.forward_passes += bits.forward_passes
        oracle.unconfirmed |= bits.unconfirmed
        return result

    return replace(plan, run=run)


@torch.no_grad()
def parent_of(model: nn.Module, images: Tensor) -> nn.Module:
    """The network in full precision: the same weights as they are, batch norms of ``images``.

    Source: the parent of CP-NAS (Zhuo et al., IJCAI 2020).
    """
    parent = copy.deepcopy(model).eval()
    use_full_precision(parent, True)
    for layer in parent.modules():
        # Of these alone: what else differs in training, such as dropping paths, stays as it is.
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            layer.momentum = None  # the average of all batches, of which there is one
            layer.train()
    parent(images)
    return parent.eval()


def of_signs(
    plans: Sequence[Plan], surrogates: Sequence[str], model: nn.Module, images: Tensor
) -> list[Plan]:
    """``plans`` for a network of 1-bit layers.

    Args:
        surrogates: of :data:`SURROGATES`; an attack that follows gradients is run through each.
        images: to estimate the batch norms of the parent from.

    Raises:
        ConfigError: the network has no 1-bit layers.
    """
    if not has_signs(model):
        raise ConfigError(
            "surrogates: expected a network with 1-bit layers, whose signs have no derivative of "
            "their own; got one without"
        )
    parent = parent_of(model, images) if PARENT in surrogates else None
    # Elsewhere bits are computed by plain operations, slower than the network itself.
    packed = pack(model) if images.is_cpu and "cpu" in _native.served else None
    variants = []
    for plan in plans:
        if plan.black_box:
            variants.append(plan if packed is None else _plan_on_bits(plan, packed))
            continue
        for name in surrogates:
            if parent is not None and name == PARENT:
                variants.append(_plan_on_parent(plan, parent))
            else:
                variants.append(_plan_through(plan, name))
    return variants


def surrogates_plan(ball: Ball, *, steps: int) -> Plan:
    """PGD through three derivatives of the sign, one start each; for the checks."""
    threat = ThreatModel(norm=ball.norm, epsilon=ball.radius, steps=steps, random_start=True)

    def run(oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        adversarial = x.clone()
        success = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for number, ste in enumerate(_OF_CHECK):
            rest = (~success).nonzero()[:, 0]
            if not len(rest):
                break
            with surrogate_of(oracle.model, ste):
                result = pgd_loop(
                    oracle, x[rest], y[rest], threat,
                    seed=seed + number, index=ids[rest], stop_early=True,
                )  # fmt: skip
            adversarial[rest] = result.adversarial
            success[rest] = result.success
        return AttackResult(adversarial, success)

    passes = len(_OF_CHECK) * steps
    return Plan("surrogates", "surrogates", threat.describe(), run, forward=passes, backward=passes)
