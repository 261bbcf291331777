"""The bandits of a search: which path to train next, and which arms to abandon.

- :mod:`~fastbandit.bandit.settings`: what one may set, once for commands, bandits and logs;
- :mod:`~fastbandit.bandit.policies`: how arms are drawn, credited and abandoned, by name;
- :mod:`~fastbandit.bandit.bandits`: the state and the schedule of any number of bandits;
- :mod:`~fastbandit.bandit.anti_bandit`: the bandit of one search, checked and resumable;
- :mod:`~fastbandit.bandit.budget`: paths within a budget of sizes;
- :mod:`~fastbandit.bandit.mixes`: paths with a random mix of operations;
- :mod:`~fastbandit.bandit.regression`, :mod:`~fastbandit.bandit.hierarchical`: the models of all
  edges together;
- :mod:`~fastbandit.bandit.log`: ``bandit.jsonl``, its lines and their replay;
- :mod:`~fastbandit.bandit.simulation`: searches without networks.

Source: *Binary Neural Networks* (Zhang, Xu et al.), section 4.2 and Algorithm 8; Chen et al.,
"Anti-Bandit Neural Architecture Search for Model Defense", ECCV 2020.
"""

from fastbandit.bandit.anti_bandit import AntiBandit
from fastbandit.bandit.bandits import Bandits, counter_uniform
from fastbandit.bandit.budget import SizeBudget
from fastbandit.bandit.hierarchical import HierarchicalRidge
from fastbandit.bandit.log import replay
from fastbandit.bandit.mixes import random_mix
from fastbandit.bandit.policies import POLICIES, History, Policy, Printed, Random, register
from fastbandit.bandit.settings import BanditSettings

__all__ = [
    "POLICIES",
    "AntiBandit",
    "BanditSettings",
    "Bandits",
    "HierarchicalRidge",
    "History",
    "Policy",
    "Printed",
    "Random",
    "SizeBudget",
    "counter_uniform",
    "random_mix",
    "register",
    "replay",
]
