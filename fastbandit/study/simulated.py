"""The studies on simulated searches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fastbandit._statistics import mean_interval, standard_error, wilcoxon
from fastbandit.bandit import BanditSettings
from fastbandit.bandit.simulation import World, simulate
from fastbandit.config import to_plain
from fastbandit.runs.environment import derive_seed
from fastbandit.study.config import StudyConfig
from fastbandit.study.pieces import Pieces

__all__ = ["REFERENCES", "X_NAMES", "run_simulated"]

X_NAMES = {
    "policies": "policy",
    "rate": "lambda",
    "space": "operations",
    "evaluations": "R",
    "bonus": "bonus",
}
# The value of x that the others of an entry are tested against, seed by seed.
REFERENCES = {"rate": "0.7", "evaluations": "0", "bonus": "1"}


def run_simulated(
    config: StudyConfig, pieces: Pieces, log: Callable[[str], None]
) -> dict[str, Any] | None:
    wanted = list(config.simulated.settings())
    if not wanted:
        return None
    numbers = [derive_seed(config.seed, "simulated", i) for i in range(config.simulated.seeds)]
    seeds = torch.tensor(numbers)
    rows: list[dict[str, Any]] = []
    for position, (part, entry, x, world, settings) in enumerate(wanted, 1):
        key = {
            "world": to_plain(world),
            "settings": to_plain(settings),
            "seed": config.seed,
            "seeds": config.simulated.seeds,
        }

        def make(world: World = world, settings: BanditSettings = settings) -> dict[str, Any]:
            started, busy = time.perf_counter(), time.process_time()
            searches = simulate(world, settings, seeds)
            busy = time.process_time() - busy
            best = world.effects(seeds)
            possible = (best.amax(-1) - best.mean(-1)).mean(-1) / world.effect
            return {
                "advantage": (searches.advantage / world.effect).tolist(),
                "best_kept": searches.best_kept.tolist(),
                "possible": possible.tolist(),
                "trained": searches.trained,
                "evaluated": searches.evaluated,
                "seconds": time.perf_counter() - started,
                "cpu_seconds": busy,
            }

        stored = pieces.done("simulated", key)
        result = pieces.get("simulated", key, make)
        mean, low, high = mean_interval(result["advantage"])
        rows.append(
            {
                "part": part,
                "entry": entry,
                "x": x,
                "arms": world.arms,
                "settings": to_plain(settings),
                "mean": mean,
                "standard_error": standard_error(result["advantage"]),
                "low": low,
                "high": high,
                "best_kept_mean": statistics.fmean(result["best_kept"]),
                "best_kept_standard_error": standard_error(result["best_kept"]),
                "possible_mean": statistics.fmean(result["possible"]),
                **result,
            }
        )
        what = f"{part}: {entry}" + (f", {X_NAMES[part]} {x}" if x else "")
        took = "stored" if stored else f"{result['seconds']:.1f} s"
        log(
            f"simulated {position}/{len(wanted)}  {what}: {mean:.3f} "
            f"+- {rows[-1]['standard_error']:.3f}  ({took})"
        )
    _test_against(rows)
    return {
        "world": to_plain(config.simulated.world),
        "seeds": numbers,
        "unit": "standard deviations of an arm's effect",
        "rows": rows,
    }


def _test_against(rows: list[dict[str, Any]]) -> None:
    """Adds to each row what it is compared with and the p of Wilcoxon's test; None without."""
    by_place = {(row["part"], row["entry"], row["x"]): row for row in reversed(rows)}
    for row in rows:
        part, policies = row["part"], row["part"] == "policies"
        place = ("printed", "") if policies else (row["entry"], REFERENCES.get(part))
        other = by_place.get((part, *place))
        row["against"], row["p"] = None, None
        if other is not None and other is not row:
            row["against"] = other["entry"] if policies else other["x"]
            row["p"] = wilcoxon(row["advantage"], other["advantage"])
