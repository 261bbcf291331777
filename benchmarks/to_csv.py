"""Files what a benchmark wrote under benchmarks/results, as rows of CSV.

    python benchmarks/to_csv.py --machine NAME [--run RUN] [--command TEXT] [--note TEXT] FILE

FILE is a JSON file of pytest-benchmark, of two_ranks.py, waiting.py, default_search.py or
found_vs_random.py, the study.json of a study, or an archive of gpu.py. Timings become rows of
``results/NAME.csv``, in place of rows with the same run, group, rival and device; other figures
become ``results/NAME/RUN.csv``. RUN is FILE's stem unless given. ``results/NAME.json`` says what
the machine is and which command made each run. Needs no package.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import statistics
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (
    "run", "group", "rival", "shape", "dtype", "device", "threads", "rounds", "min", "q1",
    "median", "q3", "unit", "commit", "torch", "date", "extra",
)  # fmt: skip
KEY = ("run", "group", "rival", "device")
EXTRA = ("floor_us", "steps", "kernels", "peak_bytes", "standing")
ALONE = {"ceilings": "torch", "compiled": "torch.compile"}  # what a stage measures without a rival
Row = dict[str, str]


# --- Files ----------------------------------------------------------------------------------------


def number(value: Any) -> str:
    """Five significant digits, without an exponent where that is as short."""
    if value is None or isinstance(value, (str, bool, int)):
        return "" if value is None else str(value)
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.5g}"


def read_csv(file: Path) -> list[Row]:
    with file.open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: number(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def replace(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """``new`` in place of the rows of the same key, the others at the end."""
    merged = {tuple(row[name] for name in KEY): row for row in old}
    keys = [tuple(row[name] for name in KEY) for row in new]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise SystemExit(f"to_csv: measured twice in one file: {sorted(twice)[0]}")
    merged |= dict(zip(keys, new, strict=True))
    return list(merged.values())


# --- Timings --------------------------------------------------------------------------------------


def spread(samples: Sequence[float], factor: float = 1.0) -> dict[str, Any]:
    """Rounds, least, quartiles and median."""
    values = [factor * sample for sample in samples]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if (
        len(values) > 1
    ) else values * 3  # fmt: skip
    return {"rounds": len(values), "min": min(values), "q1": q1, "median": median, "q3": q3}


def extras(facts: Mapping[str, Any]) -> str:
    """``name=value`` of what has no column of its own."""
    kept = {name: facts[name] for name in EXTRA if facts.get(name) is not None}
    if facts.get("bytes") and "floor_us" not in kept:
        kept["bytes"] = facts["bytes"]
    if facts.get("device_seconds") is not None:
        kept["device_us"] = 1e6 * facts["device_seconds"]
    return ";".join(f"{name}={number(value)}" for name, value in kept.items())


def sizes(shape: Sequence[int] | None) -> str:
    return "x".join(map(str, shape or ()))


def pytest_rows(run: str, found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for entry in found["benchmarks"]:
        facts, stats = entry["extra_info"], entry["stats"]
        group, _, device = entry["group"].rpartition(" [")
        kind, _, rest = device.partition("]")
        yield {
            "run": run, "group": group + rest, "rival": facts["rival"],
            "shape": sizes(facts.get("shape")),
            "dtype": facts.get("dtype", "").removeprefix("torch."), "device": kind,
            "threads": facts["threads"], "rounds": stats["rounds"], "unit": "us",
            **{name: 1e6 * stats[name] for name in ("min", "q1", "median", "q3")},
            "commit": facts["commit"], "torch": facts["torch"], "date": found["datetime"][:10],
            "extra": extras(facts),
        }  # fmt: skip


def ranks_rows(run: str, found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """two_ranks.py: a step of one and of two processes."""
    for ranks, samples in found["seconds"].items():
        yield {
            "run": run, "rival": "one rank" if ranks == "1" else f"{ranks} ranks",
            "group": f"data-parallel step of {found['space']}, batch {found['batch']}, "
            f"a thread each, {found['clock']}",
            "device": "cpu", "threads": 1, "unit": "us", "torch": found["torch"],
            **spread(samples, 1e6),
        }  # fmt: skip


def waiting_rows(run: str, found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """waiting.py: images/s by how threads wait."""
    beside = f"beside {found['busy']} busy processes" if found["busy"] else "nothing else running"
    for setting, rates in found["images_per_second"].items():
        yield {
            "run": run, "group": f"training of the default search, {beside}", "rival": setting,
            "device": "cpu", "threads": found["cpus"], "unit": "images/s", **spread(rates),
        }  # fmt: skip


def archive_rows(file: Path) -> Iterator[dict[str, Any]]:
    """gpu.py: each result with samples, by its stage; launches as the stage says."""
    with tarfile.open(file) as archive:
        for member in archive.getmembers():
            stage, _, suffix = Path(member.name).name.rpartition(".")
            opened = archive.extractfile(member) if suffix == "jsonl" else None
            if opened is None:
                continue
            head: dict[str, Any] = {}
            for line in opened.read().decode("utf-8", "replace").splitlines():
                try:
                    found = json.loads(line)
                except ValueError:  # half a line of a process that was killed
                    continue
                if "commit" in found and "torch" in found:
                    head = found | {"date": f"{datetime.fromtimestamp(member.mtime):%Y-%m-%d}"}
                yield from stage_rows(stage, head, found)


def stage_rows(stage: str, head: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Any]:
    common = {"run": f"gpu-{stage}", "device": "cpu" if head.get("check") else "cuda",
              "unit": "us", "commit": head.get("commit"), "torch": head.get("torch"),
              "date": head.get("date")}  # fmt: skip
    if "op" in found:
        for rival, samples in found.items():
            if isinstance(samples, list):
                yield {**common, "group": found["op"], "rival": ours(rival), **spread(samples, 1e6)}
    elif found.get("samples"):
        rival = ours(found.get("rival", found.get("route", ALONE.get(stage, "ours"))))
        base, _, precision = rival.rpartition(", ")
        if precision not in ("float32", "bfloat16"):
            base, precision = rival, ""
        dtype = found.get("dtype", precision)
        names = ["batch", "kernel", "stride", "dilation", "size"]
        names += [] if "shape" in found else ["bytes"]
        parts = [sizes(found.get("shape")), found.get("what", ""), dtype]
        parts += [f"{name} {found[name]}" for name in names if name in found]
        group = " ".join(filter(None, parts)) or found["line"].split(":")[0]
        yield {**common, "group": f"{stage} {group}", "shape": sizes(found.get("shape")),
               "rival": base, "dtype": dtype, "extra": extras(found),
               **spread(found["samples"], 1e6)}  # fmt: skip


def ours(name: str) -> str:
    return "fastbandit" if name == "ours" else name


# --- Other figures --------------------------------------------------------------------------------


def simulated_table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """study.json: one line for each policy and setting, over all seeds."""
    study = found["simulated"]
    names = ("part", "entry", "x", "arms", "mean", "standard_error", "low", "high",
             "best_kept_mean", "best_kept_standard_error", "possible_mean", "trained",
             "evaluated", "cpu_seconds", "against", "p")  # fmt: skip
    return [
        {**{name: row.get(name) for name in names}, "noise": study["world"]["noise"],
         "seeds": len(study["seeds"])}
        for row in study["rows"]
    ]  # fmt: skip


def real_table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """study.json: one line for each network trained from scratch, with the search it is of."""
    rows = []
    for group in found["real"]["groups"]:
        searches = {search["genotype"]: search for search in group.get("searches") or ()}
        for network in group["networks"]:
            search = searches.get(network["genotype"], {})
            for trained in network["trained"]:
                rows.append(
                    {
                        "group": group["name"], "search_seed": search.get("seed"),
                        "genotype": network["genotype"][:12],
                        **{name: trained[name] for name in
                           ("parameters", "clean_accuracy", "robust_accuracy", "n", "seconds")},
                        **{name: search.get(name) for name in
                           ("shared_clean_accuracy", "shared_robust_accuracy", "trained",
                            "evaluated")},
                        "search_seconds": search.get("seconds"), "attack": trained["attack"],
                    }
                )  # fmt: skip
    return rows


def found_table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"group": group, **row, "genotype": row["genotype"][:12]}
        for group in ("found", "random")
        for row in found[group]
    ]


def search_table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """default_search.py: one line for each search."""
    rows = []
    for backend in ("native", "reference"):
        kept = found["runs"][backend] if "runs" in found else [found[backend] | {"seed": 0}]
        for run in kept:
            row = {"backend": backend, "seed": run["seed"],
                   "processor_seconds": run["processor_seconds"]}  # fmt: skip
            for name, key in (("validation", "final"), ("test", "test")):
                row |= {f"{name}_n": run[key]["n"],
                        f"{name}_clean_accuracy": run[key]["clean_accuracy"],
                        f"{name}_robust_accuracy": run[key]["robust_accuracy"]}  # fmt: skip
            row |= {"attack": run["test"]["attack"], "commit": run.get("commit", found["commit"]),
                    "genotype": run.get("genotype_hash", "")[:12]}  # fmt: skip
            rows.append(row)
    return rows


def flat_table(found: Any, path: str = "") -> Iterator[dict[str, Any]]:
    """Any other JSON file: a line for each leaf, a genotype as one leaf."""
    if isinstance(found, dict) and found and "cells" not in found:
        for name, value in found.items():
            yield from flat_table(value, f"{path}.{name}" if path else name)
    elif isinstance(found, list) and any(isinstance(one, (dict, list)) for one in found):
        for place, value in enumerate(found):
            yield from flat_table(value, f"{path}.{place}")
    else:
        text = found if isinstance(found, (str, float, int)) else json.dumps(found)
        yield {"path": path, "value": text}


def table_of(found: Any) -> list[dict[str, Any]]:
    if "simulated" in found and "real" in found:
        return simulated_table(found) if found["simulated"] else real_table(found)
    if "found" in found and "random" in found:
        return found_table(found)
    if "reference" in found or "reference" in found.get("runs", ()):
        return search_table(found)
    return list(flat_table(found))


# --- The command ----------------------------------------------------------------------------------


def machine_facts(found: Mapping[str, Any]) -> dict[str, Any]:
    """What pytest-benchmark says of the machine, less what only this run has."""
    info = found.get("machine_info") or {}
    cpu = info.get("cpu") or {}
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")
    facts = {
        "cpu": cpu.get("brand_raw"),
        "cores": cpu.get("count"),
        "instruction_sets": [name for name in cpu.get("flags", ()) if name in wanted],
        "system": f"{info.get('system', 'Linux')} {info.get('machine', '')}".strip(),
        "python": info.get("python_version"),
        "compiler_of_python": info.get("python_compiler"),
    }
    return {name: value for name, value in facts.items() if value} if info else {}


def add(
    file: Path, machine: str, run: str, told: Mapping[str, str], results: Path,
    filled: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """File one result; the CSV it went to. filled: columns that the file itself does not say."""
    if tarfile.is_tarfile(file):
        found, rows = {}, list(archive_rows(file))
    else:
        found = json.loads(file.read_text(encoding="utf-8"))
        if "benchmarks" in found:
            rows = list(pytest_rows(run, found))
        elif "images_per_second" in found:
            rows = list((waiting_rows if "busy" in found else ranks_rows)(run, found))
        else:
            rows = []
    if rows:
        target = results / f"{machine}.csv"
        old = read_csv(target) if target.exists() else []
        new = [{name: number({**(filled or {}), **row}.get(name)) for name in COLUMNS}
               for row in rows]  # fmt: skip
        replace(target, csv_text(merge(old, new), COLUMNS))
    else:
        table = table_of(found)
        target = results / machine / f"{run}.csv"
        replace(target, csv_text(table, table[0]))
        told = {**told, **(filled or {})}
    about = results / f"{machine}.json"
    known = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {"runs": {}}
    facts = {**machine_facts(found), **known}
    for name in dict.fromkeys(row["run"] for row in rows) if rows else [run]:
        facts["runs"].setdefault(name, {}).update({k: v for k, v in told.items() if v})
    replace(about, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--machine", required=True, help="as in results/MACHINE.csv")
    parser.add_argument("--run", help="name of these rows; default: the stem of FILE")
    parser.add_argument("--command", default="", help="what made FILE")
    parser.add_argument("--note", default="", help="what a reader has to know of this run")
    for name in ("commit", "torch", "date"):
        parser.add_argument(f"--{name}", default="", help="if FILE does not say it")
    options = parser.parse_args(arguments)
    told = {"command": options.command, "note": options.note}
    filled = {name: getattr(options, name) for name in ("commit", "torch", "date")}
    run = options.run or options.file.name.split(".")[0]
    print(add(options.file, options.machine, run, told, options.results, filled))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
