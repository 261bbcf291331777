"""fastbandit._yaml: settings that can be read in one way only, within bounds."""

from __future__ import annotations

import pytest

from fastbandit._yaml import parse_yaml
from fastbandit.config import ConfigError, merge, read_config_file
from fastbandit.runs.folder import RunFolder
from fastbandit.runs.tensors import RunError
from fastbandit.search import SearchConfig, main


def test_plain_values():
    assert parse_yaml("a: [1, 0.5, yes, null, x]\nb: {c: 3e-4}") == {
        "a": [1, 0.5, True, None, "x"],
        "b": {"c": "3e-4"},
    }
    # What is merged into a mapping may be given there again.
    text = "a: &a {x: 1}\nb: &b\n  <<: *a\n  x: 2\nc:\n  <<: *b\n  x: 3\nd: *b"
    found = {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}, "d": {"x": 2}}
    assert parse_yaml(text) == found
    # A byte of a file name that is not UTF-8.
    assert parse_yaml('a: "r\\udcff"') == {"a": "r\udcff"}


LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3", r"the key 'a' is given twice \(line 3, column 1\)"),
        ("a: 1\n'a': 1", "the key 'a' is given twice"),
        ("a: {b: [{c: 1, d: 2, c: 1}]}", "the key 'c' is given twice"),
        (LAUGHS, "more than 100,000 values"),
        ("a: &a [*a]", "a value that holds itself"),
        ("[" * 3000, "nested deeper than 64 levels"),
        ("a:\n" + "".join(" " * n + "- \n" for n in range(1, 200)), "nested deeper than 64"),
        ('a: "\\ud800"', "lone surrogate"),
        ("a: 0x" + "f" * 5000, "a number of more than 100 characters"),
        ("a: " + ":".join(["1"] * 5000), "a number of more than 100 characters"),
        ("a: 2024-13-45", "month must be in"),
        ("a: [1,", "line 1, column 7"),
        ("a: \0", "special characters"),
        ("? [1]\n: 2", "unhashable key"),
        ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: 1\n---\nb: 2", "another document"),
    ],
)
def test_what_is_refused(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason) as error:
        parse_yaml(text)
    assert "\n" not in str(error.value)
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"--config .*config\.yaml: not valid YAML: .*{reason}"):
        read_config_file(str(file))
    with pytest.raises(RunError, match=rf"config\.yaml: .*{reason}"):
        RunFolder.read_config(tmp_path)


def test_a_long_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("seed: 1\n" + "#" * 2**16)
    with pytest.raises(ConfigError, match="expected at most 65,536 bytes, got more"):
        read_config_file(str(file))


def test_a_setting_in_two_spellings():
    with pytest.raises(ConfigError, match="learning_rate is given twice, with an underscore and"):
        merge(SearchConfig(), {"learning_rate": 0.1, "learning-rate": 0.2}, "test")
    with pytest.raises(ConfigError, match=r"bandit\.rounds"):
        merge(SearchConfig(), {"bandit": {"rounds": "many"}}, "test")


def test_the_command_refuses_a_key_given_twice(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("seed: 1\nattack:\n  epsilon: 8/255\n  epsilon: 4/255\n")
    assert main(["--config", str(file), "--print-config"]) == 1
    assert "the key 'epsilon' is given twice (line 4, column 3)" in capsys.readouterr().err
