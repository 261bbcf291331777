"""Where the time of a search goes, by kernel: the dry run of a search under torch's profiler.

    python benchmarks/profile_step.py --out FILE -- --preset mnist --data DIR

Everything after ``--`` is for ``python -m fastbandit.search``; its dry run trains and validates a
few batches of the paths of the initial pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastbandit import search


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rows", type=int, default=12, help="kernels to print")
    parser.add_argument("search", nargs="*", help="arguments of the search, after --")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    # On a GPU its kernels are what is wanted, and a million operators would have to be read past.
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        status = search.main([*arguments.search, "--dry-run"])
    if status:
        print(f"profile_step: the dry run failed with status {status}", file=sys.stderr)
        return status
    rows = []
    for event in profiler.key_averages():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if on_device != cuda:  # on a GPU its kernels alone, else the operators
            continue
        time_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if time_us > 0:
            rows.append({"name": event.key, "calls": event.count, "time_us": time_us})
    rows.sort(key=lambda row: -row["time_us"])
    total = sum(row["time_us"] for row in rows)
    device = torch.cuda.get_device_name() if cuda else "CPU"
    result = {"device": device, "torch": str(torch.__version__), "total_us": total, "rows": rows}
    arguments.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(f"{'self time':>12} {'share':>7} {'calls':>8}  kernel ({device})")
    for row in rows[: arguments.rows]:
        share = 100 * row["time_us"] / total
        print(f"{row['time_us'] / 1e3:9.2f} ms {share:5.1f} % {row['calls']:8}  {row['name'][:90]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
