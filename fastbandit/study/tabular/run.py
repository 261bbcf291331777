"""The studies on a table of true accuracies: every entry at every setting, and what it is worth.

Each row is one entry at one number of cells, one budget and, where rewards of shared weights are
used, one correlation of the reward. It is compared with the mean of all networks within the same
budget, which is known exactly, and with the best of as many random ones, by short trainings, as
cost the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbandit._files import csv_text
from fastbandit._statistics import mean_interval, mean_limits, standard_error
from fastbandit.config import ConfigError
from fastbandit.runs.environment import derive_seed
from fastbandit.study.pieces import Pieces
from fastbandit.study.tabular.candidates import Candidates
from fastbandit.study.tabular.config import TabularConfig, parse_budget
from fastbandit.study.tabular.searches import best_of, parse_search, run_search
from fastbandit.study.tabular.table import Table, TableError, read_table
from fastbandit.study.tabular.world import TabularWorld, search

__all__ = ["COLUMNS", "plan", "run_tabular", "tabular_csv"]

#: Of the CSV file, in order.
COLUMNS = (
    "cells", "budget", "kind", "entry", "rho", "n", "mean", "standard_error", "low", "high",
    "parameters", "supernets", "short_trainings", "full_trainings", "cost", "random",
    "gain", "gain_low", "gain_high", "best_of", "best_of_mean", "against_best_of",
    "against_best_of_low", "against_best_of_high", "cpu_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One row to be."""

    kind: str
    entry: str
    rho: float | None


def settings(config: TabularConfig) -> Iterator[Setting]:
    """The rows of each number of cells and budget, but for the baselines."""
    yield from (Setting("policy", entry, r) for entry in config.policies for r in config.rhos)
    for entry in config.searches:
        rewards = parse_search(entry, "tabular.searches").uses_rewards
        rhos: Sequence[float | None] = config.rhos if rewards else (None,)
        for rho in rhos:
            yield Setting("search", entry, rho)


def plan(config: TabularConfig) -> dict[str, int]:
    """How much there is to do."""
    rows = len(list(settings(config))) * len(config.cells) * len(config.budgets)
    return {"tabular_rows": rows, "tabular_searches": rows * config.seeds}


def run_tabular(
    config: TabularConfig, seed: int, pieces: Pieces, log: Callable[[str], None]
) -> dict[str, Any]:
    """All rows; what is stored is not computed again.

    Raises:
        TableError: the table is none, or the settings do not fit it.
    """
    assert config.file is not None
    wanted = list(settings(config))
    table = read_table(config.file, config.column)
    if len(config.parameters) != table.operations or config.none >= table.operations:
        raise TableError(
            f"{table.path}: cells: expected as many operations as tabular.parameters has, "
            f"{len(config.parameters)}, tabular.none = {config.none} among them; got "
            f"{table.operations}"
        )
    numbers = [derive_seed(seed, "tabular", i) for i in range(config.seeds)]
    seeds = torch.tensor(numbers)
    tables = [
        _rows(config, table, count, budget, wanted, (seed, seeds), pieces, log)
        for count in config.cells
        for budget in config.budgets
    ]
    return {
        "column": table.column,
        "table": {
            "digest": table.digest,
            "operations": table.operations,
            "edges": table.edges,
            "networks": config.networks,
        },
        "assumptions": {
            name: getattr(config, name)
            for name in ("noise", "rise", "rounds", "short_rho", "short_cost", "supernet_cost")
        },
        "seeds": len(numbers),
        "recommended": config.recommended,
        "tables": tables,
    }


def _rows(
    config: TabularConfig,
    table: Table,
    count: int,
    budget: str,
    wanted: Iterable[Setting],
    seeded: tuple[int, Tensor],
    pieces: Pieces,
    log: Callable[[str], None],
) -> dict[str, Any]:
    seed, seeds = seeded
    unit, ends = parse_budget(budget)
    parameters = torch.tensor(config.parameters)[table.cells].sum(1)
    convolution = max(range(table.operations), key=config.parameters.__getitem__)
    costs = torch.tensor(config.parameters)
    if unit == "convolutions":
        costs = (torch.arange(table.operations) == convolution).long()
    sizes = costs[table.cells].sum(1)
    allowed = torch.ones_like(sizes, dtype=torch.bool)
    if config.networks == "path":
        allowed = table.connected(config.none)
    try:
        within, anywhere = (Candidates(allowed, sizes, b, count) for b in (ends, None))
    except ValueError as error:
        raise ConfigError(f"tabular.budgets: {budget}: {error}") from None
    spread = float(table.accuracy[allowed].std())

    def world(candidates: Candidates, rho: float | None) -> TabularWorld:
        return TabularWorld(
            table,
            candidates,
            spread,
            torch.tensor(config.parameters),
            costs,
            rho or 1.0,
            config.noise,
            config.rise,
            config.short_rho,
        )

    key = {
        "table": table.digest, "column": table.column, "networks": config.networks,
        "parameters": list(config.parameters), "none": config.none, "cells": count,
        "budget": budget, "seed": seed, "seeds": len(seeds), "short_rho": config.short_rho,
    }  # fmt: skip
    rewards = {"noise": config.noise, "rise": config.rise, "rounds": config.rounds}

    def piece(
        setting: Setting, find: Callable[[], Tensor], more: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Accuracies and sizes of the networks that a setting comes to, seed by seed."""

        def make() -> dict[str, Any]:
            busy = time.process_time()
            codes = find()
            return {
                # Whole hundred-thousandths of the table, as short as they can be written.
                "accuracy": [round(one, 7) for one in table.accuracy[codes].mean(-1).tolist()],
                "parameters": float(parameters[codes].double().mean()),
                "cpu_seconds": time.process_time() - busy,
            }

        used = key if setting.rho is None else {**key, **rewards, "rho": setting.rho}
        used = {**used, **(more or {}), "kind": setting.kind, "entry": setting.entry}
        stored = pieces.done("tabular", used)
        result = pieces.get("tabular", used, make)
        mean, low, high = mean_interval(result["accuracy"])
        rho = "" if setting.rho is None else f", rho {setting.rho:g}"
        log(
            f"tabular {count} cells, budget {budget}: {setting.entry}{rho}: {100 * mean:.2f} "
            f"({100 * low:.2f}, {100 * high:.2f}) %"
            f"  ({'stored' if stored else format(result['cpu_seconds'], '.1f') + ' s'})"
        )
        return result

    random = within.mean(table.accuracy)
    plain = world(within, None)
    best: dict[int, list[float]] = {}

    def best_among(number: int) -> list[float]:
        if number not in best:
            one = Setting("baseline", f"best of {number}", None)
            best[number] = piece(one, lambda: best_of(plain, seeds, number))["accuracy"]
        return best[number]

    def row(setting: Setting, result: Mapping[str, Any], cost: Mapping[str, int]) -> dict[str, Any]:
        values = result["accuracy"]
        mean, low, high = mean_interval(values)
        total = (
            cost["supernets"] * config.supernet_cost
            + cost["short_trainings"] * config.short_cost
            + cost["full_trainings"]
        )
        number = max(1, round(total / config.short_cost))
        others = best_among(number)
        less = [a - b for a, b in zip(values, others, strict=True)]
        return {
            "cells": count, "budget": budget, "kind": setting.kind, "entry": setting.entry,
            "rho": setting.rho, "n": len(values), "mean": mean,
            "standard_error": standard_error(values), "low": low, "high": high,
            "parameters": result["parameters"], **cost, "cost": total, "random": random,
            **_with_limits("gain", [value - random for value in values]),
            "best_of": number, "best_of_mean": sum(others) / len(others),
            **_with_limits("against_best_of", less), "cpu_seconds": result["cpu_seconds"],
        }  # fmt: skip

    rows = []
    for setting in wanted:
        inside, outside = world(within, setting.rho), world(anywhere, setting.rho)
        if setting.kind == "policy":
            result = piece(setting, partial(search, inside, config.bandit(setting.entry), seeds))
            cost = {"supernets": 1, "short_trainings": 0, "full_trainings": 0}
        else:
            how = parse_search(setting.entry, "tabular.searches")
            # Pieces of releases that trained a network of several cells twice are another thing.
            once = {"trained": "once"} if count > 1 and how.kind == "model" else {}
            result = piece(setting, partial(run_search, how, inside, outside, seeds), once)
            cost = {
                "supernets": int(how.uses_rewards),
                "short_trainings": how.short,
                "full_trainings": how.full,
            }
        rows.append(row(setting, result, cost))
    return {
        "cells": count,
        "budget": budget,
        **_space(table, within, parameters),
        "largest": _largest(plain, seeds, piece),
        "one_operation": _one_operation(table, within, count, parameters),
        "rows": rows,
    }


def _with_limits(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of differences and its interval, as a row has them."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), mean_interval(values), strict=True))


def _space(table: Table, within: Candidates, parameters: Tensor) -> dict[str, Any]:
    """What there is within the budget: the mean, the best, and how much size explains."""
    weight, value = within.weights(), table.accuracy[within.codes]
    size = parameters[within.codes].double()
    mean, average = (weight * value).sum(), (weight * size).sum()
    spread = (weight * (value - mean) ** 2).sum()
    of_size = (weight * (size - average) ** 2).sum()
    both = (weight * (value - mean) * (size - average)).sum()
    varied = float(spread) > 0 and float(of_size) > 0
    best, score = within.best(value.expand(1, within.count, -1))
    return {
        "random": {"mean": float(mean), "parameters": float(average)},
        "best": {
            "mean": float(score[0, 0]) / within.count,
            "parameters": float(parameters[best[0, 0]].double().mean()),
        },
        "cells_within": len(within.codes),
        # Of a cell of a random network: R2 of its accuracy on its parameters.
        "size_explains": float(both**2 / (spread * of_size)) if varied else 0.0,
    }


def _largest(
    world: TabularWorld, seeds: Tensor, piece: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    result = piece(Setting("baseline", "largest", None), lambda: world.largest(seeds))
    return {**mean_limits(result["accuracy"]), "parameters": result["parameters"]}


def _one_operation(
    table: Table, within: Candidates, count: int, parameters: Tensor
) -> list[dict[str, Any]]:
    """The networks of one operation everywhere that are within the budget."""
    codes = [int(operation * table.place_values.sum()) for operation in range(table.operations)]
    return [
        {
            "operation": operation,
            "mean": float(table.accuracy[code]),
            "parameters": float(parameters[code]),
        }
        for operation, code in enumerate(codes)
        if bool(within.contain(torch.full((count,), code)))
    ]


def tabular_csv(result: Mapping[str, Any]) -> str:
    """The rows of all tables, and their baselines, as CSV; accuracies in [0, 1]."""
    rows: list[dict[str, Any]] = []
    for table in result["tables"]:
        where = {"cells": table["cells"], "budget": table["budget"], "kind": "baseline"}
        where["random"] = table["random"]["mean"]
        for name in ("random", "largest", "best"):
            entry = {"best": "the best there is"}.get(name, name)
            rows.append({**where, "entry": entry, **table[name]})
        for one in table["one_operation"]:
            rows.append({**where, "entry": f"operation {one['operation']} everywhere", **one})
        rows += table["rows"]
    return csv_text(
        COLUMNS,
        (
            {key: format(x, ".6g") if isinstance(x, float) else x for key, x in row.items()}
            for row in rows
        ),
    )
