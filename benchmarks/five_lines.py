"""The example of README.md and docs/evaluate.md: from a model to its robust accuracy.

Trains a network of two convolutions against FGSM (epsilon 0.15, four epochs, seed 0) on the
embedded digits and evaluates it on the first 500 test images::

    OMP_NUM_THREADS=1 python benchmarks/five_lines.py --out FILE.json

The seconds are of this machine; everything else is the same everywhere, up to rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from _digits import images, network

import fastbandit
from fastbandit._files import write_atomic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    arguments = parser.parse_args()
    found = fastbandit.evaluate(network(), *images(500), epsilon="0.15", preset="standard")
    print(found)
    if arguments.out is not None:
        write_atomic(arguments.out, json.dumps(found.result, indent=1) + "\n")


if __name__ == "__main__":
    main()
