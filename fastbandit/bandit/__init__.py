"""The bandits of a search: which path to train next, and which arms to abandon.

- :mod:`~fastbandit.bandit.settings`: what one may set, once for commands, bandits and logs;
- :mod:`~fastbandit.bandit.policies`: how arms are drawn, credited and abandoned, by name;
- :mod:`~fastbandit.bandit.bandits`: the state and the schedule of any number of bandits;
- :mod:`~fastbandit.bandit.anti_bandit`: the bandit of one search, checked and resumable;
- :mod:`~fastbandit.bandit.log`: ``bandit.jsonl``, its lines and their replay;
- :mod:`~fastbandit.bandit.simulation`: searches without networks.

Source: *Binary Neural Networks* (Zhang, Xu et al.), section 4.2 and Algorithm 8; Chen et al.,
"Anti-Bandit Neural Architecture Search for Model Defense", ECCV 2020.
"""

from fastbandit.bandit.anti_bandit import AntiBandit
from fastbandit.bandit.bandits import Bandits, counter_uniform
from fastbandit.bandit.log import replay
from fastbandit.bandit.policies import POLICIES, History, Policy, Printed, Random, register
from fastbandit.bandit.settings import BanditSettings

__all__ = [
    "POLICIES",
    "AntiBandit",
    "BanditSettings",
    "Bandits",
    "History",
    "Policy",
    "Printed",
    "Random",
    "counter_uniform",
    "register",
    "replay",
]
