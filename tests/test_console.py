"""The console command, the ends of help texts, and what is said of a wrong value."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastbandit
from fastbandit import _program, export
from fastbandit.__main__ import main
from fastbandit._suggest import did_you_mean, with_hint
from fastbandit.evaluate import __main__ as evaluate
from fastbandit.retrain import __main__ as retrain
from fastbandit.search import __main__ as search

CODE, SMALL = "_centroids:fitted", ("--limit", "10", "--epsilon", "0.1")


@pytest.fixture(autouse=True)
def not_the_console(monkeypatch):
    monkeypatch.setattr(_program, "_console", False)


def test_help_names_every_command(capsys):
    for arguments in ([], ["help"], ["--help"], ["-h"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        for name in ("search", "retrain", "evaluate", "report", "study", "export", "info"):
            assert f"\n  {name} " in shown
    for version in ("--version", "-V"):
        assert main([version]) == 0
        assert capsys.readouterr().out == f"fastbandit {fastbandit.__version__}\n"


def test_an_unknown_command_is_named(capsys):
    assert main(["serach"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastbandit: error: expected one of search, retrain")
    assert error.endswith("got 'serach'; did you mean search?\n")


@pytest.mark.parametrize("name", _program.COMMANDS)
def test_every_command_has_help_with_examples_of_the_form_that_was_typed(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert f"usage: fastbandit {name}" in shown
    assert f"Examples:\n  fastbandit {name}" in shown
    assert "python -m" not in shown.split("Examples:")[1].split("\n\n")[0]
    _program.started_as(console=False)
    assert f"\n  python -m fastbandit.{name}" in _program.examples(name)


def test_commands_run_with_their_arguments_and_status(capsys):
    assert main(["search", "--print-config", "--seed", "3"]) == 0
    assert "seed: 3" in capsys.readouterr().out
    assert main(["search", "--print-config", "--seed", "-3"]) == 1
    assert "search: error: seed" in capsys.readouterr().err


def test_the_module_form_and_no_torch_before_it_is_needed():
    code = (
        "import sys\n"
        "from fastbandit.__main__ import main\n"
        "assert main(['--version']) == 0 and main([]) == 0\n"
        "assert not {'torch', 'numpy', 'tyro'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-m", "fastbandit", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"fastbandit {fastbandit.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--reward", "clen"], 2, "--reward: expected one of auto, robust, clean, mix, got 'clen'"),
        (["--reward=robst"], 2, "got 'robst'; did you mean robust?"),
        (["--attack.clip", "imag"], 2, "--attack.clip: expected one of image, none, got 'imag'"),
        (["--edges_per_node", "al"], 2, "--edges-per-node: expected one of all, 1, 2, got 'al'"),
        (["--preset", "digit"], 1, "got 'digit'; did you mean digits?"),
        (["--bandit.policy", "printd"], 1, "got 'printd'; did you mean printed?"),
        (["--space", "robst9"], 1, "got 'robst9'; did you mean robust9?"),
    ],
)  # fmt: skip
def test_a_wrong_value_gets_the_nearest_one(arguments, status, message, capsys):
    try:
        found = search.main([*arguments, "--print-config"])
    except SystemExit as ended:
        found = ended.code
    assert found == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (export.main, ["x", "--format", "onx"], "got 'onx'; did you mean onnx?"),
        (retrain.main, ["ABANDIT_MNIST_NORMAL1"], "; did you mean ABANDIT_MNIST_NORMAL_1?"),
        (evaluate.main, ["x", "--norm", "L2"], "got 'L2'; did you mean l2?"),
        (evaluate.main, [CODE, *SMALL, "--attacks", "pgd-2O"], "got 'pgd-2O'; did you mean pgd-20"),
    ],
)
def test_so_do_those_of_other_commands(command, arguments, message, capsys):
    with contextlib.suppress(SystemExit):
        assert command(arguments) == 1
    assert message in capsys.readouterr().err


def test_a_value_that_is_near_to_nothing_is_the_parser_s(capsys):
    with pytest.raises(SystemExit) as ended:
        search.main(["--reward", "zzz"])
    assert ended.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_hints():
    assert did_you_mean("Digits", ["mnist", "digits"]) == "; did you mean digits?"
    assert did_you_mean("x", ["mnist"]) == ""
    message = "a: expected one of one, two, got 'tow'"
    assert with_hint(message) == f"{message}; did you mean two?"
    for other in ("expected 1 to 3, got 'two'", "a: expected one of one, two, got 7", "two"):
        assert with_hint(other) == other


def test_the_algorithm_as_printed_is_the_command_of_its_page():
    page = (Path(__file__).parents[1] / "docs/search.md").read_text()
    (command,) = re.findall(
        r"(?s)As printed, it is\n\n```\npython -m fastbandit.search (.*?)```", page
    )
    config = search.parse(command.replace("\\\n", " ").split()).config
    assert config.bandit.rounds == 3
    assert config.attack.clip == "none"
    assert not config.guard.enabled
    assert (config.final.tune_epochs, config.final.network_epochs) == (0, 0)
    assert not config.final.reference
    assert (config.bandit.policy, config.bandit.mixes, config.final.tournament) == ("printed", 0, 0)
    by_default = search.parse([]).config
    assert (by_default.bandit.rounds, by_default.final.tune_epochs) == (1, 3)
    assert by_default.final.network_epochs > 0
    # Off unless asked for.
    assert (by_default.macs, by_default.latency) == (None, None)
    assert (by_default.rewards, by_default.supernet.epochs) == ("shared", 0)
