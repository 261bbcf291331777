"""The table of 58x and 32x: what 1-bit convolutions give on a named machine, shape by shape.

    python benchmarks/binary_table.py --machine cpu-epyc-zen3-2-cores   # measures, files, writes
    python benchmarks/binary_table.py                                   # writes docs/binary.md
    python benchmarks/binary_table.py --check                           # is the page old?
    taskset -c 0 python benchmarks/binary_table.py --machine NAME       # on one core
    python benchmarks/binary_table.py --machine NAME --kept-to avx2     # as a CPU without AVX-512

Measuring runs ``bench_binary.py`` on one thread of an idle machine and files it as run ``binary``
of ``benchmarks/results/NAME.csv``, or as ``binary-avx2``: then every rival that can be is kept to
AVX2 as well.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import to_csv
from tables import ROOT, Machine, Row, figure, groups, machines, median, table

PAGE = ROOT / "docs" / "binary.md"
BEGIN, END = "<!-- made by benchmarks/binary_table.py -->", "<!-- end -->"
RUN, OURS = "binary", "fastbandit"
RIVALS = ("F.conv2d", "bf16", "int8", "OpenVINO", "depthwise_conv2d", "parent")
# Our kernels, torch's own, oneDNN in torch and in OpenVINO (which looks at the first name too).
KEPT_TO = {
    "avx2": {
        "FASTBANDIT_CPU": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}  # fmt: skip
SETTINGS = {"OMP_NUM_THREADS": "1", "FASTBANDIT_BENCH_INTERLEAVED": "1"}
COMMAND = "pytest benchmarks/bench_binary.py -k cpu --benchmark-json FILE"
HEAD = """\
The text that 1-bit networks start from promises "up to 58 times faster and 32 times smaller". 58
counts operations, 32 the weights of one convolution. Measured, one thread, ratios of medians,
rival / ours, and in brackets of the least times, which a neighbour on the same core does not slow
down: above 1 ours is faster, **what is below 1 is a loss**. Rivals of a line take turns in one
process. Whole ops with sign and packing, float32 in and out, unless bits are named. `F.conv2d` is
float32 channels-last, `bf16` the same in bfloat16 where the CPU multiplies it, `int8` oneDNN's
convolution of numbers that are quantised already, `OpenVINO` its binary convolution from float32
and back in its own layout, `depthwise_conv2d` ours in float32, `parent` the same block or network
in full precision with the kernels of this package. CPUs with AMX multiply int8 and bfloat16 in
tiles and are expected to be faster with these than by counting bits: there packed bits are a way to
store a network. That was not measured.
"""


def measure(name: str, kept_to: str | None, extra: Sequence[str]) -> None:
    """Run the benchmark on one thread and file it."""
    settings = {**SETTINGS, **(KEPT_TO[kept_to] if kept_to else {})}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "binary.json"
        command = [
            sys.executable, "-m", "pytest", "-q", str(ROOT / "benchmarks" / "bench_binary.py"),
            "-k", "cpu", f"--benchmark-json={file}", *extra,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        set_to = [f"{name}={value}" for name, value in settings.items()]
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < (os.cpu_count() or 1):
            set_to.append(f"taskset -c {','.join(map(str, cores))}")
        told = {"command": " ".join([*set_to, COMMAND, *extra])}
        run = f"{RUN}-{kept_to}" if kept_to else RUN
        to_csv.add(file, name, run, told, to_csv.RESULTS)


def section(machine: Machine, run: str = RUN) -> list[str]:
    """The table of one run of a machine; nothing where it is not filed."""
    rows = machine.runs().get(run, [])
    lines = []
    for group, entries in groups(rows).items():
        ours = entries.get(OURS)
        rivals = [name for name in RIVALS if name in entries]
        if ours is None or not rivals:
            continue
        ratios = [ratio(entries[name], ours) if name in rivals else "" for name in RIVALS]
        lines.append([group, f"{median(ours):.4g} {ours['unit']}", *ratios, smaller(group)])
    if not lines:
        return []
    commit = sorted({row["commit"] for row in rows})
    kept = f" kept to {run.removeprefix(RUN + '-').upper()}, rivals too" if run != RUN else ""
    title = f"{machine.facts['name']}{kept}, torch {rows[0]['torch']}, commit {', '.join(commit)}:"
    return [title, "", table(["", "ours", *RIVALS, "weights"], lines), ""]


def ratio(rival: Row, ours: Row) -> str:
    """Of the medians, and of the least times where they are filed."""
    text = figure(median(rival) / median(ours))
    if not rival["min"] or not ours["min"]:
        return text
    return f"{text} ({figure(float(rival['min']) / float(ours['min']))})"


def smaller(group: str) -> str:
    """How many times fewer bytes the packed filters take, words of 64 channels counted whole."""
    found = re.match(r"signs, (\d+) x \d+, \d+ x (\d+) x", group)
    if found is None:
        return ""
    channels = int(found[2])
    return f"{32 * channels / (64 * ((channels + 63) // 64)):.3g}x"


def text_of(page: str, results: Path = to_csv.RESULTS) -> str:
    """The page with the tables between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"binary_table: {PAGE} lacks the marks {BEGIN} and {END}")
    runs = (RUN, *(f"{RUN}-{name}" for name in KEPT_TO))
    parts = [line for one in machines(results) for run in runs for line in section(one, run)]
    if not parts:
        parts = ["No run is filed yet, so no figure stands here.", ""]
    return f"{before}{BEGIN}\n\n{HEAD}\n" + "\n".join(parts) + f"\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", help="measure, and file under results/MACHINE.csv")
    parser.add_argument("--kept-to", choices=KEPT_TO, help="measure without newer instructions")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if old")
    options, extra = parser.parse_known_args(arguments)
    if options.machine:
        measure(options.machine, options.kept_to, extra)
    elif options.kept_to:
        parser.error("--kept-to: expected --machine too")
    elif extra:
        parser.error(f"unknown arguments {extra}; those of pytest go with --machine")
    page = PAGE.read_text(encoding="utf-8")
    wanted = text_of(page)
    if wanted == page:
        return 0
    print(f"docs/binary.md {'is old' if options.check else 'written'}")
    if not options.check:
        PAGE.write_text(wanted, encoding="utf-8")
    return int(options.check)


if __name__ == "__main__":
    raise SystemExit(main())
