"""The short tables at the end of the parts of gpu.sh, from the raw files that they wrote.

python benchmarks/tables.py kernels FILE.json...      # files of pytest-benchmark
python benchmarks/tables.py pipeline FOLDER           # search, retrain, evaluations below it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS = "fastbandit"


def kernels(files: Sequence[Path]) -> None:
    """Our median beside that of the best rival, for each group on the fastest device there is."""
    groups: dict[str, dict[str, Any]] = {}
    for file in files:
        for entry in json.loads(file.read_text(encoding="utf-8"))["benchmarks"]:
            rival = entry["extra_info"].get("rival")
            if rival is not None:
                groups.setdefault(entry["group"], {})[rival] = entry
    on_gpu = {name: entries for name, entries in groups.items() if name.endswith("[cuda]")}
    print(f"{'group':58}{'ours, us':>10}  {'ratio':>6}  best rival")
    missed, starred = 0, False
    for name, entries in (on_gpu or groups).items():
        if OURS not in entries:
            continue
        # The time on the device alone, where every entry has it: a launch and a wait for it take
        # longer than a small kernel.
        device = {r: e["extra_info"].get("device_seconds") for r, e in entries.items()}
        launched = not all(device.values())
        medians = {r: e["stats"]["median"] if launched else device[r] for r, e in entries.items()}
        ours = medians[OURS]
        rivals = {r: median for r, median in medians.items() if not r.startswith(OURS)}
        if not rivals:
            continue
        best = min(rivals, key=rivals.__getitem__)
        goals = entries[OURS]["extra_info"].get("goals") or {}
        below = [r for r, goal in goals.items() if r in rivals and rivals[r] / ours < goal]
        missed += bool(below)
        verdict = f"  below its goal against {', '.join(below)}" if below else ""
        where = "" if launched else " *"
        starred |= not launched
        print(
            f"{name[:57]:58}{ours * 1e6:10.1f}  {rivals[best] / ours:5.2f}x  {best}{where}{verdict}"
        )
    print(f"{missed} of {len(on_gpu or groups)} groups below a goal; ratio: best rival / ours")
    if starred:
        print("* on the device alone, replayed as a CUDA graph")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def pipeline(folder: Path) -> None:
    """What each step of a pipeline has reached; a step that is not finished says so."""
    for name in ("search", "retrain"):
        summary = _read(folder / name / "summary.json")
        if summary is None:
            print(f"{name:12} not finished")
            continue
        cost = summary["cost"]
        print(
            f"{name:12} {cost['seconds_total']:9.1f} s, {cost['epochs']} epochs, "
            f"{cost['images_per_second']:,.0f} images/s, peak {cost['peak_memory_mb']:,.0f} MiB, "
            f"genotype {summary['genotype_hash'][:12]}"
        )
    found = sorted(folder.glob("retrain/*/evaluation.json"))
    if not found:
        print("evaluation   not finished")
    for file in found:
        value = _read(file)
        for result in value["results"] if value is not None else []:
            threat = f"{result['threat']['norm']} {result['threat']['epsilon']}"
            shares = {"clean": result["clean"]}
            shares |= {attack["name"]: attack for attack in result["attacks"]}
            shares["worst case"] = result["worst_case"]
            for name, share in shares.items():
                low, high = share.get("interval") or (float("nan"),) * 2
                print(
                    f"{threat:14} {name:12} {100 * share['accuracy']:6.2f} %  "
                    f"[{100 * low:.2f}, {100 * high:.2f}]  n {share['n']}"
                )


def main() -> int:
    if len(sys.argv) < 3 or sys.argv[1] not in ("kernels", "pipeline"):
        print(f"tables: expected: kernels FILE.json... or pipeline FOLDER, got {sys.argv[1:]}",
              file=sys.stderr)  # fmt: skip
        return 2
    paths = [Path(argument) for argument in sys.argv[2:]]
    if sys.argv[1] == "kernels":
        kernels(paths)
    else:
        pipeline(paths[0])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
