"""A policy of mine against the paper's and against chance, in simulated searches.

    python examples/my_policy.py

Once it is registered, bandits, simulation and SearchConfig take its name like any other. The
accuracy of a simulated path is the rise of training, an effect of the arm on each edge, and noise;
all policies meet the same ones.
"""

import math

import torch
from torch import Tensor

from fastbandit.bandit import BanditSettings, Policy, register
from fastbandit.bandit.policies import State
from fastbandit.bandit.simulation import World, simulate


@register
class HalfGreedy(Policy):
    """Half of the draws are uniform, the others take the arm that looks best.

    What it does not define is the base's: arms are credited with running averages, and the arm
    with the smallest one is abandoned. Any decision reads the bandit, which keeps all state.
    """

    name = "half-greedy"
    description = "the best so far, or any"

    def probabilities(self, bandit: State) -> Tensor:
        law = 0.5 * bandit.alive.double() / bandit.arms_left
        best = self.best(bandit).unsqueeze(-1)
        return law.scatter_add(-1, best, torch.full_like(best, 0.5, dtype=law.dtype))

    def sample(self, bandit: State) -> Tensor:
        # Uniform numbers of the bandit's own generator, so that a run resumes and replays.
        coin, place = bandit.uniform("sample", 2).unbind(-1)
        rank = (place * bandit.alive.sum(-1)).long().unsqueeze(-1)
        anyone = (bandit.alive.cumsum(-1) > rank).int().argmax(-1)
        return torch.where(coin < 0.5, anyone, self.best(bandit))

    @staticmethod
    def best(bandit: State) -> Tensor:
        return torch.where(bandit.alive, bandit.mean, -math.inf).argmax(-1)


# Small, so that it takes seconds; of searches of 60 edges docs/study.md has the figures.
world = World(rows=6, arms=5, effect=0.02, noise=0.02)
seeds = torch.arange(200)
print("how much better than an average arm the survivors are, in deviations of an effect")
for name in ("random", "printed", "half-greedy"):
    found = simulate(world, BanditSettings(policy=name), seeds).advantage / world.effect
    error = found.std() / math.sqrt(len(seeds))
    print(f"{name:12} {found.mean():5.2f} +- {error:.2f}")
