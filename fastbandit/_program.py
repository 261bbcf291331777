"""What the commands are called, and how one uses them: for help texts.

The console command ``fastbandit search`` and ``python -m fastbandit.search`` are the same; help and
messages say the one that was typed.
"""

from __future__ import annotations

import shlex
from pathlib import Path

__all__ = ["COMMANDS", "Named", "examples", "in_browser", "program", "started_as"]


class Named:
    """A command: the module that has its ``main``, what it does, and commands to type."""

    def __init__(self, module: str, summary: str, *examples: str) -> None:
        self.module, self.summary, self.examples = module, summary, examples


COMMANDS: dict[str, Named] = {
    "search": Named(
        "fastbandit.search.__main__",
        "search for an architecture that stays accurate under attack",
        "",
        "--preset mnist --data FOLDER --dry-run",
        "--data FOLDER --attack.epsilon 8/255 --out runs/mine",
    ),
    "retrain": Named(
        "fastbandit.retrain.__main__",
        "train a found or published network from scratch",
        "runs/SEARCH",
        "ABANDIT_MNIST_NORMAL_1 --preset mnist --data FOLDER",
    ),
    "evaluate": Named(
        "fastbandit.evaluate.__main__",
        "measure how robust a model is, yours or one of ours",
        "runs/RETRAINING --preset quick",
        "my_package.my_module:make_model --weights model.pt --data FOLDER --epsilon 8/255",
        "MODEL --epsilons 0,2/255,4/255 --epsilon 8/255",
    ),
    "report": Named(
        "fastbandit.report.command",
        "write one page about runs, finished or not",
        "runs/SEARCH",
        "runs/SEARCH runs/RETRAINING --out report.html",
    ),
    "study": Named(
        "fastbandit.study.__main__",
        "compare bandit policies on many searches, simulated and real",
        "",
        "--preset smoke",
    ),
    "export": Named(
        "fastbandit.export",
        "write a trained network as ONNX or torch.export program",
        "runs/RETRAINING --format onnx --out network.onnx",
    ),
    "info": Named(
        "fastbandit.info",
        "say what this installation consists of; for bug reports",
        "",
        "--json",
    ),
}

_console = False


def started_as(*, console: bool) -> None:
    """Say whether the console command started this process."""
    global _console
    _console = console


def program(name: str) -> str:
    """How a command is typed: ``fastbandit search`` or ``python -m fastbandit.search``."""
    if _console and name in COMMANDS:
        return f"fastbandit {name}"
    return f"python -m fastbandit.{name}"


def in_browser(page: str | Path) -> str:
    """What shows a page that was written."""
    return f"python -m webbrowser {shlex.quote(str(page))}"


def examples(name: str) -> str:
    """The end of a command's help: commands to type; empty where there are none."""
    if name not in COMMANDS:
        return ""
    lines = (f"  {program(name)} {example}".rstrip() for example in COMMANDS[name].examples)
    return "\n\nExamples:\n" + "\n".join(lines)
