"""The result of a study as tables of text."""

from __future__ import annotations

from typing import Any

from fastbandit.study.compare.tables import format_compare, mean_text
from fastbandit.study.simulated import REFERENCES, X_NAMES

__all__ = ["format_tables"]


def format_tables(result: dict[str, Any]) -> str:
    """The result as tables of text."""
    if result.get("compare") is not None:
        return format_compare(result["compare"])
    lines: list[str] = []
    simulated = result["simulated"]
    if simulated is not None:
        seeds = len(simulated["seeds"])
        lines.append(
            f"simulated searches, {seeds} seeds; advantage of the surviving arms over average "
            "ones, in sd of an arm's effect, +- standard error"
        )
        parts: dict[str, list[dict[str, Any]]] = {}
        for row in simulated["rows"]:
            parts.setdefault(row["part"], []).append(row)
        for part, rows in parts.items():
            wide = max(len(row["entry"]) for row in rows)
            x_head = "" if part == "policies" else f"{X_NAMES[part]:>11}"
            against = "printed" if part == "policies" else REFERENCES.get(part, "")
            p_head = f"p against {against}" if against else ""
            lines += [
                "",
                f"{part:<{wide}}{x_head}{'advantage':>18}{'best arm kept':>18}"
                f"{'trained':>9}{'evaluated':>11}  {p_head}",
            ]
            for row in rows:
                x = "" if part == "policies" else f"{row['x']:>11}"
                value = f"{row['mean']:.3f} +- {row['standard_error']:.3f}"
                kept = (
                    f"{100 * row['best_kept_mean']:.1f} +- "
                    f"{100 * row['best_kept_standard_error']:.1f} %"
                )
                p = "" if row["p"] is None else f"{row['p']:.2g}"
                lines.append(
                    f"{row['entry']:<{wide}}{x}{value:>18}{kept:>18}"
                    f"{row['trained']:>9}{row['evaluated']:>11}  {p}"
                )
            if part != "space":
                lines.append(
                    f"{'best possible':<{wide}}{'':>{len(x_head)}}{rows[0]['possible_mean']:>8.3f}"
                )
    if "tabular" in result:
        lines += [*([""] if lines else []), *_tabular(result["tabular"])]
    real = result["real"]
    if real is not None:
        if lines:
            lines.append("")
        groups = real["groups"]
        wide = max(len(group["name"]) for group in groups)
        lines.append(
            f"{'trained from scratch':<{max(wide, 20)}}{'networks':>9}{'clean %':>24}"
            f"{'robust %':>24}{'parameters':>11}{'search min':>11}  p (robust): random, printed"
        )
        for group in groups:
            clean, robust = (mean_text(group[f"{kind}_accuracy"]) for kind in ("clean", "robust"))
            p = group["robust_accuracy"]["p"]
            tests = ", ".join(
                f"{p[name]:.2g}" if name in p else "-" for name in ("random networks", "printed")
            )
            minutes = group["search_seconds"]
            lines.append(
                f"{group['name']:<{max(wide, 20)}}{len(group['networks']):>9}{clean:>24}"
                f"{robust:>24}{group['parameters']:>11,.0f}"
                f"{'-' if minutes is None else format(minutes / 60, '.1f'):>11}  {tests}"
            )
        lines.append(
            f"in brackets: 95 % intervals of the mean over networks; tests: Mann-Whitney; attack: "
            f"{real['attack']}; n = {real['n']} test images"
        )
    return "\n".join(lines)


def _tabular(result: dict[str, Any]) -> list[str]:
    lines = [
        f"true accuracies ({result['column']}), {result['seeds']} seeds, %; differences in points "
        "with 95 % intervals; F: a full training"
    ]
    for table in result["tables"]:
        rows = table["rows"]
        wide = max(len(row["entry"]) for row in rows)
        lines += [
            "",
            f"cells {table['cells']}, budget {table['budget']}: random "
            f"{100 * table['random']['mean']:.2f}, largest {100 * table['largest']['mean']:.2f}, "
            f"best {100 * table['best']['mean']:.2f}; size explains "
            f"{100 * table['size_explains']:.0f} %",
            f"{'entry':<{wide}}{'rho':>6}{'cost F':>8}{'accuracy':>16}{'over random':>24}"
            f"{'over best of m':>24}{'m':>6}",
        ]
        for row in rows:
            differences = [
                f"{100 * row[name]:+.2f} ({100 * row[name + '_low']:+.2f}, "
                f"{100 * row[name + '_high']:+.2f})"
                for name in ("gain", "against_best_of")
            ]
            rho = "" if row["rho"] is None else f"{row['rho']:g}"
            value = f"{100 * row['mean']:.2f} +- {100 * row['standard_error']:.2f}"
            lines.append(
                f"{row['entry']:<{wide}}{rho:>6}{row['cost']:>8.3g}{value:>16}"
                f"{differences[0]:>24}{differences[1]:>24}{row['best_of']:>6}"
            )
    return lines
