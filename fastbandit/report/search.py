"""The sections of a search: one function each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from fastbandit.bandit import POLICIES
from fastbandit.bandit.log import Abandon, Start
from fastbandit.report.charts import DIVERGING_STEPS, Lane, Series, arm_lanes, line_chart
from fastbandit.report.html import (
    duration,
    finite,
    get,
    interval,
    pairs,
    percent,
    section,
    show,
    table,
    tile,
)
from fastbandit.report.networks import networks, trained_networks
from fastbandit.report.reading import Run, read_lines, without_folder
from fastbandit.threat import ThreatModel

__all__ = ["SECTIONS", "accuracy_rows", "describe_threat", "header", "totals"]


def _section(run: Run, name: str, title: str, body: str, source: str) -> str:
    """A section; on a page of several runs its title, anchor and source say which one."""
    if not run.key:
        return section(name, title, body, source)
    return section(f"{run.key}-{name}", f"{run.key}: {title}", body, f"{run.label}: {source}")


def describe_threat(value: Mapping[str, Any]) -> str:
    """A threat model in words, escaped; the bare settings where they make no valid one."""
    known = {name: value[name] for name in ThreatModel.__dataclass_fields__ if name in value}
    if not known:
        return "not recorded"
    try:
        return escape(ThreatModel(**known).describe())
    except (TypeError, ValueError):
        return ", ".join(f"{show(name)} {show(entry)}" for name, entry in value.items())


def _training_threat(run: Run) -> str:
    """The adversary of the training step in words."""
    found = get(run.summary, "threat")
    if isinstance(found, Mapping):
        return describe_threat(found)
    attack = get(run.config, "attack")
    if not isinstance(attack, Mapping):
        return "not recorded"
    settings = dict(attack)
    if settings.pop("clip", None) == "none":
        settings["lower"] = settings["upper"] = None
    return describe_threat(settings)


def _norm(run: Run) -> Any:
    return get(run.summary, "threat", "norm") or get(run.config, "attack", "norm") or "linf"


# --- sections -------------------------------------------------------------------------------


def header(run: Run) -> str:
    name = get(run.summary, "name") or run.config.get("name") or run.folder.name
    status = "finished" if run.finished else "unfinished"
    facts = []
    identity = get(run.summary, "run_id")
    if identity is not None:
        facts.append(f"run <b>{show(identity)}</b>")
    date = get(run.environment, "date")
    if date is not None:
        facts.append(f"started <b>{show(date)}</b>")
    data = get(run.summary, "data", "name") or get(run.split, "data") or run.config.get("data")
    if data is not None:
        sizes = [
            f"{show(size)} {part}"
            for part in ("weights", "validation", "test")
            if (size := _split_size(run, part)) is not None
        ]
        facts.append(f"data <b>{show(data)}</b>{' (' + ', '.join(sizes) + ')' if sizes else ''}")
    space = run.start.space if run.start else run.config.get("space")
    if space is not None:
        facts.append(f"space <b>{show(space)}</b>")
    digest = get(run.summary, "genotype_hash")
    if digest is not None:
        facts.append(f"genotype <b>{show(str(digest)[:12])}</b>")
    notes = ""
    if not run.finished:
        notes += (
            '<div class="warning">This run is not finished: '
            f"{len(run.samples)} of {run.planned} samples so far. What follows is the state its "
            "files show; the same command goes on with it.</div>"
        )
    if run.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in run.notes[:20])
        more = f"<li>and {len(run.notes) - 20} more</li>" if len(run.notes) > 20 else ""
        notes += f'<div class="warning">Not everything could be read:<ul>{items}{more}</ul></div>'
    return (
        f'<header><h1>{show(name)} <span class="status {status}">{status}</span></h1>\n'
        f'<p class="meta">{" · ".join(facts)}</p>\n'
        f'<p class="meta">adversary in training: <b>{_training_threat(run)}</b></p>\n'
        f'<p class="provenance">{_provenance(run)}</p>\n{notes}\n'
        '<p class="source">from summary.json, config.yaml, env.json, split.json</p></header>'
    )


def _split_size(run: Run, part: str) -> int | None:
    """Images of a part of the data: from the summary, else from the stored split."""
    value = get(run.summary, "data", part)
    if value is None:
        value = get(run.split, part)
    if isinstance(value, list):
        return len(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _provenance(run: Run) -> str:
    """One line with all that a robust accuracy depends on."""
    parts = []
    for key in ("final", "test"):
        found = get(run.summary, key)
        if isinstance(found, Mapping) and found.get("n") is not None:
            parts.append(f"n = {show(found['n'])} ({show(found.get('split', key))})")
    if not parts and (size := _split_size(run, "validation")) is not None:
        parts.append(f"n = {size:,} (validation)")
    if run.config.get("seed") is not None:
        parts.append(f"seed {show(run.config['seed'])}")
    measured = get(run.summary, "test", "attack") or get(run.summary, "final", "attack")
    attack = f"measured with {show(measured)}" if measured else _reward_attack(run)
    parts.append(attack)
    norm = {"linf": "L-infinity"}.get(str(_norm(run)), str(_norm(run)))
    parts.append(f"norm {escape(norm)}")
    epsilon = get(run.summary, "threat", "epsilon") or get(run.config, "attack", "epsilon")
    if epsilon is not None:
        parts.append(f"epsilon {show(epsilon)}")
    dtype = get(run.summary, "dtype") or run.config.get("dtype") or "float32"
    parts.append(f"dtype {show(dtype)}")
    bn_mode = get(run.summary, "threat", "bn_mode") or get(run.config, "attack", "bn_mode")
    if bn_mode is not None:
        parts.append(f"bn_mode {show(bn_mode)} in training, eval when measured")
    selection = get(run.summary, "selection")
    parts.append(
        f"selection: {show(selection)}"
        if selection is not None
        else "selection: the arm that is left on every edge"
    )
    return "; ".join(parts)


def _reward_attack(run: Run) -> str:
    steps = get(run.config, "attack", "steps")
    words = f", {show(steps)} step(s)" if steps is not None else ""
    return f"attack of the reward: the training step's{words}, batch norm in eval mode"


def accuracy_rows(run: Run) -> list[tuple[str, str, float, int | None, str]]:
    """(split, kind, accuracy, n, attack) of every accuracy of the found path."""
    rows = []
    for key in ("test", "final"):
        found = get(run.summary, key)
        if not isinstance(found, Mapping):
            continue
        n = found.get("n")
        count = n if isinstance(n, int) and not isinstance(n, bool) and n > 0 else None
        split = str(found.get("split") or key)
        for kind in ("clean", "robust"):
            value = finite(found.get(f"{kind}_accuracy"))
            if value is not None:
                attack = str(found.get("attack") or "") if kind == "robust" else ""
                rows.append((split, kind, value, count, attack))
    return rows


def _key_figures(run: Run) -> str:
    accuracies = accuracy_rows(run)
    tiles = []
    for split, kind, value, n, _ in accuracies:
        count = "" if n is None else f", n&nbsp;=&nbsp;{n:,}"
        tiles.append(
            tile(
                f"shared weights: {kind}, {escape(split)}",
                percent(value),
                f"95 %: {interval(value, n)}{count}",
            )
        )
    if not accuracies and run.samples:
        last = run.samples[-1]
        n = _split_size(run, "validation")
        for kind, found in (("clean", last.clean_accuracy), ("robust", last.robust_accuracy)):
            if found is not None:
                count = "" if n is None else f", n&nbsp;=&nbsp;{n:,}"
                tiles.append(
                    tile(
                        f"{kind} accuracy, last sample",
                        percent(found),
                        f"95 %: {interval(found, n)}{count} (validation)",
                    )
                )
    cost = get(run.summary, "cost") or {}
    epochs = get(cost, "epochs")
    epochs = run.epoch_at(len(run.samples)) if epochs is None else epochs
    planned = "" if run.finished else f"of {run.planned_epochs} planned"
    only_evaluated = sum(not line.trained for line in run.samples)
    if only_evaluated:
        planned += f"{', ' if planned else ''}{only_evaluated:,} more paths only evaluated"
    tiles.append(tile("epochs", show(epochs), planned))
    measured = totals(run)
    seconds = finite(get(cost, "seconds_total"))
    seconds = measured["seconds_total"] if seconds is None else seconds
    if seconds is not None:
        tiles.append(tile("time", duration(seconds), f"{seconds:.1f} seconds"))
    speed = finite(get(cost, "images_per_second"))
    speed = measured["images_per_second"] if speed is None else speed
    if speed is not None:
        tiles.append(tile("images/s", f"{speed:,.0f}", "in training"))
    peak = finite(get(cost, "peak_memory_mb"))
    peak = measured["peak_memory_mb"] if peak is None else peak
    if peak is not None:
        device = get(cost, "device") or run.config.get("device")
        on = "" if device is None else f", {show(device)}"
        owner = "process" if str(device).startswith("cpu") else "allocator"
        tiles.append(tile("peak memory", f"{peak:,.0f} MiB", f"of the {owner}{on}"))
    body = f'<dl class="tiles">{"".join(tiles)}</dl>'
    if any(kind == "robust" and split == "validation" for split, kind, *_ in accuracies):
        body += (
            "<p>These accuracies are those of the found path with the weights that all paths of "
            "the search share; they do not judge the architecture. The validation images gave "
            "the search its rewards, so their accuracy is optimistic. Intervals are Wilson's, for "
            "the images alone: they hold no variance between seeds.</p>"
        )
    attacks = dict.fromkeys(attack for *_, attack in accuracies if attack)
    for attack in attacks:
        body += f'<p class="meta">robust: {escape(attack)}</p>'
    source = "summary.json" if run.finished else "bandit.jsonl and metrics.jsonl"
    return _section(run, "figures", "The search", body, source)


def totals(run: Run) -> dict[str, float | None]:
    """Cost so far from the metrics, for a run without a summary."""

    def total(name: str) -> float | None:
        values = [v for line in run.metrics if (v := getattr(line, name)) is not None]
        return sum(values) if values else None

    peaks = [line.peak_memory_mb for line in run.metrics if line.peak_memory_mb is not None]
    pairs = [
        (line.images_per_second * line.seconds_train, line.seconds_train)
        for line in run.metrics
        if line.images_per_second is not None and line.seconds_train
    ]
    images, seconds = sum(p[0] for p in pairs), sum(p[1] for p in pairs)
    return {
        "seconds_total": total("seconds_total"),
        "seconds_train": total("seconds_train"),
        "seconds_validate": total("seconds_validate"),
        "images_per_second": images / seconds if seconds else None,
        "peak_memory_mb": max(peaks) if peaks else None,
    }


def _drawing(run: Run) -> str:
    """The cells of the genotype, or of the best arms so far."""
    from fastbandit.genotype import Genotype

    source, lead = "genotype.json", ""
    svg = None
    try:
        if (run.folder / "genotype.json").is_file():
            svg = Genotype.load(run.folder / "genotype.json").svg()
        else:
            source = "the last line of genotypes.jsonl"
            last = None
            for _, value in read_lines(run, "genotypes.jsonl"):
                last = value
            if last is not None:
                svg = Genotype.from_dict(last.get("genotype"), where=source).svg()
                lead = (
                    f"<p>The best arms after {show(last.get('sample'))} samples, with "
                    f"{show(last.get('arms_left'))} arms left on each edge: not the result.</p>"
                )
    except (ValueError, OSError) as error:
        message = without_folder(str(error), run.folder)
        body = f'<div class="warning">The cells cannot be drawn: {escape(message)}</div>'
        return _section(run, "cells", "Cells", body, source)
    if svg is None:
        body = '<p class="empty">No genotype yet: the first one is written after a pruning.</p>'
    else:
        body = f'{lead}<div class="drawing">{svg}</div>'
    return _section(run, "cells", "Cells", body, source)


def _curves(run: Run) -> str:
    if not run.samples:
        body = '<p class="empty">No sample yet.</p>'
        return _section(run, "curves", "Accuracy over samples", body, "bandit.jsonl, metrics.jsonl")
    x = [line.sample + 1 for line in run.samples]
    clean = [line.clean_accuracy for line in run.samples]
    robust = [line.robust_accuracy for line in run.samples]
    reward = [line.reward for line in run.samples]
    events = [(float(sample), str(left)) for sample, _, left in run.prunings]
    span = (0.0, float(run.planned))

    def shown(value: float | None) -> str:
        return "none" if value is None else f"{value:.4f}"

    notes = [
        (
            float(at),
            f"after {at} samples ({line.phase}{'' if line.trained else ', only evaluated'}): "
            f"clean {shown(line.clean_accuracy)}, robust {shown(line.robust_accuracy)}, "
            f"reward {shown(line.reward)}",
        )
        for at, line in zip(x, run.samples, strict=True)
    ]
    mixed = not all(line.trained for line in run.samples)
    # A reward that is one of the two accuracies is named there instead of drawn over it.
    names = ["clean = reward" if reward == clean else "clean"]
    names.append("robust = reward" if reward == robust else "robust")
    lines = [Series(names[0], x, clean, "s1"), Series(names[1], x, robust, "s2")]
    if reward not in (clean, robust):
        lines.append(Series("reward", x, reward, "s3", dashed=True))
    accuracy = line_chart(
        lines,
        title="Validation accuracy of each sampled path",
        x_label="samples" if mixed else "samples (one epoch each)",
        y_label="validation accuracy",
        x_range=span,
        events=events,
        notes=notes,
    )
    # Loss and learning rate belong to the paths that were trained: their axis counts epochs.
    epochs = [line.epoch + 1 for line in run.metrics]
    by_epoch = "epochs" if mixed else "samples"
    # The found path's own epochs come after those of the search.
    epoch_span = (0.0, float(max([run.planned_epochs, *epochs])))
    epoch_events = [(float(run.epoch_at(sample)), str(left)) for sample, _, left in run.prunings]
    loss = line_chart(
        [Series("loss", epochs, [line.loss for line in run.metrics], "s4")],
        title="Training loss on attacked images",
        x_label=by_epoch,
        y_label="loss, attacked images",
        x_range=epoch_span,
        events=epoch_events,
        notes=[(float(m.epoch + 1), f"epoch {m.epoch}: loss {shown(m.loss)}") for m in run.metrics],
        width=540,
        height=230,
    )
    rate = line_chart(
        [Series("rate", epochs, [line.learning_rate for line in run.metrics], "s1")],
        title="Learning rate",
        x_label=by_epoch,
        y_label="learning rate",
        x_range=epoch_span,
        notes=[
            (float(m.epoch + 1), f"epoch {m.epoch}: learning rate {show(m.learning_rate)}")
            for m in run.metrics
        ],
        width=540,
        height=230,
    )
    means = _round_means(run)
    n = _split_size(run, "validation")
    count = "" if n is None else f" ({n:,} images)"
    after = " after its epoch"
    if mixed:
        after += " or, where it was only evaluated, with the weights that the others had trained"
    body = (
        f"<p>Each point is one sampled path{after}, on the validation images{count}. "
        "The reward is what the bandit was credited with. Dotted lines: prunings, with the arms "
        "left on each edge above them.</p>"
        f'<div class="figure wide">{accuracy}</div>\n'
        f'<div class="pair"><div class="figure">{loss}</div>'
        f'<div class="figure">{rate}</div></div>\n{means}'
    )
    return _section(run, "curves", "Accuracy over samples", body, "bandit.jsonl, metrics.jsonl")


def _round_means(run: Run) -> str:
    """Mean and spread of the accuracies between two prunings."""
    cuts = [0, *[sample for sample, _, _ in run.prunings], len(run.samples)]
    rows = []
    start = run.start
    assert start is not None
    arms = len(start.operations)
    lefts = [arms, *[left for _, _, left in run.prunings]]
    mixed = not all(line.trained for line in run.samples)
    for low, high, left in zip(cuts, cuts[1:], lefts, strict=False):
        part = run.samples[low:high]
        if not part:
            continue
        row = [str(left), f"{low + 1} to {low + len(part)}"]
        if mixed:
            row.append(str(sum(line.trained for line in part)))
        for name in ("clean_accuracy", "robust_accuracy", "reward"):
            values = [v for line in part if (v := getattr(line, name)) is not None]
            row.append(
                f'{np.mean(values):.4f} <span class="n">±{np.std(values):.4f}</span>'
                if values
                else "none"
            )
        rows.append(row)
    heads = ["arms left", "samples", *(["trained"] if mixed else []), "clean", "robust", "reward"]
    means = table(heads, rows)
    return (
        "<details><summary>Means between prunings (± standard deviation over paths)</summary>"
        f"{means}</details>"
    )


def _cells(start: Start) -> dict[str, list[int]]:
    """Rows by cell type, from the names of the edges ('a:0->1')."""
    cells: dict[str, list[int]] = {}
    for row, edge in enumerate(start.edges):
        cells.setdefault(edge.partition(":")[0], []).append(row)
    return cells


def _arms(run: Run) -> str:
    """Every edge's arms over time, one collapsible block for each cell."""
    start, history = run.start, run.history
    if start is None or history is None or not run.samples:
        body = '<p class="empty">No sample yet.</p>'
        return _section(run, "arms", "Arms over time", body, "bandit.jsonl")
    finite = np.abs(history.difference[np.isfinite(history.difference)])
    # One scale for all edges. The largest differences are those of the first epochs, when every
    # epoch changes the accuracy; a scale that held them would show nothing of the later ones.
    limit = float(np.quantile(finite, 0.8)) if finite.size else 0.0
    limit = limit or 1.0
    levels = history.levels(limit)
    total = len(run.samples)
    reasons = {(line.row, line.arm): line for line in run.abandons}
    blocks = []
    for number, (cell, rows) in enumerate(_cells(start).items()):
        drawings = []
        for row in rows:
            lanes = []
            for arm, operation in enumerate(start.operations):
                gone = reasons.get((row, arm))
                length = min(total, int(history.life[row, arm]))
                chosen = np.flatnonzero(history.choice[:, row] == arm).tolist()
                mean = history.mean[length, row, arm]
                note = f"{operation}: chosen {len(chosen)} times, "
                note += "not tried" if math.isnan(mean) else f"m {mean:.4f} at the end"
                note += (
                    "; still there"
                    if gone is None
                    else f"; abandoned after {gone.sample} samples (round {gone.round})"
                )
                level = levels[:length, row, arm].tolist()
                lanes.append(Lane(operation, note, level, chosen, gone is None))
            drawings.append(
                '<div class="figure">'
                + arm_lanes(
                    lanes,
                    title=f"edge {start.edges[row]}",
                    samples=run.planned,
                    events=[sample for sample, _, _ in run.prunings],
                )
                + "</div>"
            )
        opened = " open" if number == 0 else ""
        blocks.append(
            f"<details{opened}><summary>Cell {show(cell)}: {len(rows)} edges</summary>"
            f'<div class="grid">{"".join(drawings)}</div>'
            f"<h3>Means and counts, cell {show(cell)}</h3>{_means(run, rows)}</details>"
        )
    keys = "".join(f'<i style="background:var(--d{i})"></i>' for i in range(DIVERGING_STEPS))
    key = (
        f'<p class="key"><span>m against the mean of the edge\'s arms: '
        f'{-limit:+.3g} <span class="scale">{keys}</span> {limit:+.3g} and beyond</span>'
        '<span><i style="background:var(--untried)"></i> not yet tried</span>'
        '<span><i class="mark"></i> chosen</span><span>× abandoned</span>'
        "<span>bold: still there</span></p>"
    )
    body = (
        "<p>One lane for each operation, from left to right in samples; a lane ends where its arm "
        "is abandoned. Colour compares the arm's running performance m (Eq. 4.11) with that of the "
        "arms then alive on the same edge: blue is better, orange worse. While accuracy rises, "
        f"an arm that was not chosen lately looks worse for that alone.</p>{key}\n"
        + "\n".join(blocks)
    )
    return _section(run, "arms", "Arms over time", body, "bandit.jsonl (m and n computed again)")


def _means(run: Run, rows: Sequence[int]) -> str:
    """m and n of every arm: now for those alive, when abandoned for the others."""
    start, history = run.start, run.history
    assert start is not None
    assert history is not None
    logged = {(line.row, line.arm): line for line in run.abandons}
    lines = []
    for row in rows:
        cells = [f"<th>{show(start.edges[row])}</th>"]
        for arm in range(len(start.operations)):
            gone = logged.get((row, arm))
            if gone is not None:
                mean, count, kind = gone.mean, gone.count, "gone"
            else:
                mean = float(history.mean[-1, row, arm])
                count, kind = int(history.count[-1, row, arm]), "kept"
            shown = "none" if count == 0 else f"{mean:.4f}"
            cells.append(f'<td class="{kind}">{shown}<br><span class="n">n {count}</span></td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    # A name of several words may be broken where the column is narrow.
    head = "".join(f"<th>{show(name).replace('_', '_<wbr>')}</th>" for name in start.operations)
    return (
        '<div class="scroll"><table class="means"><thead><tr><th class="text">edge</th>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        "<p>m and n at the end for arms still there (framed), when abandoned for the others.</p>"
    )


def _survival(run: Run) -> str:
    """How many edges hold each operation after each round, and in which cells the last ones are."""
    start, history = run.start, run.history
    if start is None or history is None:
        body = '<p class="empty">The bandit has not started.</p>'
        return _section(run, "survival", "Operations that survive", body, "bandit.jsonl")
    edges, arms = len(start.edges), len(start.operations)
    prunings = run.prunings
    alive = [np.full(arms, edges)]
    for _, number, _ in prunings:
        alive.append((history.round > number).sum(0))
    heads = [f"{arms} arms", *[f"{left}" for _, _, left in prunings]]

    def heat(value: int, most: int) -> str:
        share = 0.6 * value / most if most else 0.0
        return f'<td class="heat" style="--v:{share:.2f}">{value}</td>'

    order = sorted(range(arms), key=lambda arm: (-int(alive[-1][arm]), arm))
    rows = "".join(
        f"<tr><th>{show(start.operations[arm])}</th>"
        + "".join(heat(int(step[arm]), edges) for step in alive)
        + "</tr>"
        for arm in order
    )
    head = "".join(f"<th>{name}</th>" for name in heads)
    first = (
        f'<div class="scroll"><table><thead><tr><th class="text">operation</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    cells = _cells(start)
    kept = history.life == history.ALIVE
    by_cell = {cell: kept[cell_rows].sum(0) for cell, cell_rows in cells.items()}
    rows = "".join(
        f"<tr><th>{show(start.operations[arm])}</th>"
        + "".join(heat(int(found[arm]), len(cells[cell])) for cell, found in by_cell.items())
        + "</tr>"
        for arm in order
    )
    head = "".join(f"<th>{show(cell)}</th>" for cell in cells)
    second = (
        f'<div class="scroll"><table><thead><tr><th class="text">operation</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    left = prunings[-1][2] if prunings else arms
    body = (
        f"<p>Edges, of {edges}, on which an operation is still there; by chance each would keep "
        f"{edges * left / arms:.1f} with {left} of {arms} arms left.</p>"
        f'<div class="side"><div><h3>By arms left on each edge</h3>{first}</div>'
        f"<div><h3>Now, by cell</h3>{second}</div></div>"
    )
    return _section(run, "survival", "Operations that survive", body, "bandit.jsonl")


def _reason(run: Run, line: Abandon) -> str:
    """Why an arm went, as far as the log alone can tell."""
    start, history = run.start, run.history
    assert start is not None
    assert history is not None
    name = start.settings.policy
    rule = f"rule of policy {show(name)}"
    if line.upper is None or not history.explained:
        return rule
    upper = history.upper(line.sample, line.row)
    others = [
        (float(upper[arm]), arm)
        for arm in range(len(upper))
        if arm != line.arm and history.round[line.row, arm] > line.round
    ]
    if not others:
        return rule
    smaller = sum(value < line.upper - 1e-9 for value, _ in others)
    reason = POLICIES[name].reason if name in POLICIES else ""
    if reason or smaller:
        return f"{reason or rule}; upper bound {smaller + 1} of {len(others) + 1} from below"
    bound, arm = min(others)
    other = show(start.operations[arm])
    if bound <= line.upper + 1e-12:
        return f"smallest upper bound {line.upper:.4f}, equal to {other}'s; the lowest index goes"
    return f"smallest upper bound {line.upper:.4f}; next smallest {bound:.4f} ({other})"


def _abandoned(run: Run) -> str:
    if not run.abandons:
        body = '<p class="empty">No arm has been abandoned yet.</p>'
        return _section(run, "abandoned", "Abandoned arms", body, "bandit.jsonl")

    def bound(value: float | None) -> str:
        return "none" if value is None else f"{value:.4f}"

    by_round: dict[int, list[Abandon]] = {}
    for line in run.abandons:
        by_round.setdefault(line.round, []).append(line)
    blocks = []
    heads = ["cell", "edge", "operation", "round", "sample", "m", "n", "lower", "upper", "N",
             "reason"]  # fmt: skip
    for number, lines in sorted(by_round.items()):
        rows = [
            [
                show(line.cell),
                show(line.edge),
                show(line.operation),
                str(line.round),
                str(line.sample),
                f"{line.mean:.4f}",
                str(line.count),
                bound(line.lower),
                bound(line.upper),
                str(line.total),
                _reason(run, line),
            ]
            for line in lines
        ]
        opened = " open" if len(by_round) == 1 else ""
        blocks.append(
            f"<details{opened}><summary>Round {number}: after {lines[0].sample} samples, "
            f"{len(lines)} arms, {lines[0].arms_left} left on each edge</summary>"
            f"{table(heads, rows, text=(0, 1, 2, 10))}</details>"
        )
    body = (
        f"<p>{len(run.abandons)} arms in {len(by_round)} rounds. The bounds are Eqs. 4.9 and 4.12, "
        "m ∓ bonus √(2 ln N / n), at the moment of the decision.</p>" + "\n".join(blocks)
    )
    return _section(run, "abandoned", "Abandoned arms", body, "bandit.jsonl")


def _cost(run: Run) -> str:
    cost = get(run.summary, "cost")
    if isinstance(cost, Mapping):
        source = "summary.json"
        ledger: dict[str, Any] = dict(cost)
    else:
        source = "metrics.jsonl, summed (a run in progress has no ledger yet)"
        ledger = {name: value for name, value in totals(run).items() if value is not None}
    total = finite(ledger.get("seconds_total"))
    phases = []
    for name, value in ledger.items():
        seconds = finite(value)
        if name.startswith("seconds_") and seconds is not None and name != "seconds_total":
            share = f"{100 * seconds / total:.1f} %" if total else ""
            phases.append([show(name.removeprefix("seconds_")), f"{seconds:.2f}", share])
    if total is not None:
        phases.append(["<b>total</b>", f"<b>{total:.2f}</b>", ""])
    words = {
        "epochs": "epochs",
        "epochs_tuning": "epochs of the found path after the search",
        "paths_only_evaluated": "paths only evaluated",
        "images_per_second": "images/s in training",
        "images_trained": "images trained on",
        "images_evaluated": "images evaluated",
        "forward_passes": "forward passes (mini-batches)",
        "backward_passes": "backward passes (mini-batches)",
        "peak_memory_mb": "peak memory, MiB",
        "device": "device",
        "threads": "CPU threads",
    }
    counts = []
    for name, value in ledger.items():
        if name.startswith("seconds_"):
            continue
        shown = f"{value:,.1f}" if isinstance(value, float) else show(value)
        counts.append([words.get(name, show(name)), shown])
    if not phases and not counts:
        return _section(run, "cost", "Cost", '<p class="empty">Nothing measured yet.</p>', source)
    times = [one.seconds for one in trained_networks(run) if one.seconds is not None]
    trained = f": {duration(sum(times))} for {len(times)} networks" if times else ""
    body = (
        f"<p>The cost of this search alone; training from scratch is not part of it{trained}.</p>"
        f'<div class="pair"><div>{table(["phase", "seconds", "share"], phases, text=(0,))}</div>'
        f"<div>{table(['measure', 'value'], counts, text=(0,))}</div></div>"
    )
    return _section(run, "cost", "Cost", body, source)


def _environment(run: Run) -> str:
    found = dict(run.environment or {})
    versions = get(run.summary, "versions")
    if isinstance(versions, Mapping):
        found["versions"] = versions
    if not found:
        body = '<p class="empty">Not recorded.</p>'
    else:
        rows = "".join(
            f'<tr><th>{show(name)}</th><td class="wrap">{show(value)}</td></tr>'
            for name, value in pairs(found)
        )
        body = f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
    return _section(run, "environment", "Environment", body, "env.json, summary.json")


def _configuration(run: Run) -> str:
    return _section(
        run, "config", "Configuration", f"<pre>{escape(run.config_text)}</pre>", "config.yaml"
    )


#: (anchor, title in the navigation, function) of every section, in the order of the page. A
#: function returns nothing where its section does not apply.
SECTIONS = (
    ("networks", "Trained from scratch", networks),
    ("figures", "The search", _key_figures),
    ("cells", "Cells", _drawing),
    ("curves", "Accuracy", _curves),
    ("arms", "Arms over time", _arms),
    ("survival", "Survivors", _survival),
    ("abandoned", "Abandoned arms", _abandoned),
    ("cost", "Cost", _cost),
    ("config", "Configuration", _configuration),
    ("environment", "Environment", _environment),
)
