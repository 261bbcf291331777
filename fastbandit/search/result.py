"""The end of a search: the found path is measured, networks are trained, the result is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastbandit._version import __version__
from fastbandit.bandit import AntiBandit
from fastbandit.runs.cost import cost_summary
from fastbandit.runs.environment import peak_memory_mb
from fastbandit.runs.processes import Workers
from fastbandit.runs.tensors import RunError, save_tensors
from fastbandit.search.binary import explained
from fastbandit.search.networks import Networks, chance
from fastbandit.search.sizes import Sizes, table_of_search
from fastbandit.search.tournament import clear, run_tournament

if TYPE_CHECKING:
    from fastbandit.data import DataSource
    from fastbandit.search.config import SearchConfig
    from fastbandit.search.loop import SearchRun

__all__ = ["finish"]

# What makes a network the one found.
_SELECTION = {
    "path": "the last arm on every edge; nothing is chosen by the test images",
    "tournament": "the winner of a tournament on validation images; nothing is chosen by the test "
    "images",
}


def _largest(config: SearchConfig, source: DataSource) -> int | None:
    """Parameters of the largest network of the space, within the budget if there is one; None where
    a node keeps some of its edges only."""
    if config.edges_per_node != "all":
        return None
    sizes, budget = Sizes.of_search(config, source), config.size_budget(source)
    table = sizes.parameters
    choice = table.argmax(1)
    if budget is not None:
        choice = budget.best(table.double(), torch.ones_like(table, dtype=torch.bool))
    return int(table.gather(1, choice.unsqueeze(1)).sum()) + sizes.base_parameters


def finish(current: SearchRun, networks: Networks, workers: Workers) -> dict[str, Any]:
    """Check that the log explains the result, measure the found path, hold the tournament, train
    the found network and random ones from scratch, write the last files; returns the summary.

    Args:
        workers: train several networks of the tournament at a time.

    Raises:
        RunError: the log and the state of the bandit disagree.
    """
    bandit, config, session = current.bandit, current.config, current.session
    setup, folder = current.setup, session.folder
    if folder is not None:
        arms = explained(config, folder.lines("bandit.jsonl"))
        if not torch.equal(arms, bandit.final()):
            raise RunError(
                f"{folder.path}: bandit.jsonl does not explain the genotype found; it was changed "
                "by another program"
            )
    path = current.use_path([bandit.final()], current.team(1))
    measured = current.trial.measure(path, trained=current.tuned > 0)
    genotype, tournament = current.genotype(), None
    # A supernet that no path has trained is of no use to anybody.
    if folder is not None and config.rewards != "alone":
        save_tensors(
            folder.path / "weights.safetensors",
            dict(current.supernet.state_dict()),
            "supernet",
            {"run_id": session.run_id, "genotype": genotype.to_dict()},
        )
    if config.final.tournament:
        assert isinstance(bandit, AntiBandit)  # the settings allow no other
        tournament = run_tournament(session, setup.source, bandit, workers)
        winner = tournament["candidates"][tournament["winner"]]
        genotype = current.genotype(winner["choice"])
    if folder is not None:
        genotype.save(folder.path / "genotype.json")
    networks.train_found(genotype)
    if folder is None:
        return session.finish(None)
    table = table_of_search(config, setup.source)
    peak_memory = max(current.peak_memory, peak_memory_mb(setup.device))
    summary = {
        "status": "finished",
        "run_id": session.run_id,
        "name": config.name,
        "genotype": "genotype.json",
        "genotype_hash": genotype.hash,
        "data": {
            "name": setup.source.name,
            "description": setup.source.description,
            "weights": len(setup.splits["weights"]),
            "validation": len(setup.splits["validation"]),
            "test": len(setup.splits["test"]),
            "classes": setup.source.classes,
        },
        "selection": _SELECTION["path" if tournament is None else "tournament"],
        **current.trial.summary(),
        **({} if tournament is None else {"tournament": tournament}),
        "networks": networks.rows,
        "chance": chance(setup.source, config),
        "largest_parameters": _largest(config, setup.source),
        **({} if table is None else {"latency": table.facts()}),
        **measured,
        "cost": cost_summary(
            current.cost,
            peak_memory,
            config.device,
            session.group,
            epochs=bandit.trained,
            epochs_tuning=current.tuned,
            paths_only_evaluated=bandit.samples - bandit.trained,
        )
        | {"graphs": current.engine.records},
        "versions": {"torch": torch.__version__, "fastbandit": __version__},
    }
    clear(session)
    # Imported here: the report reads what this package writes, and knows its names.
    from fastbandit.report import write_report

    # The summary is what makes a run finished, so it comes last; the report shows it.
    write_report(folder.path, summary=summary)
    return session.finish(summary)
