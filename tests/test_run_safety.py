"""Run folders that are damaged, a stranger's, on a full disk or on an odd file system."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from fastbandit._files import (
    FileError,
    canonical_json,
    naming,
    plain_file,
    read_sealed,
    seal,
    write_atomic,
)
from fastbandit.evaluate.run import FILES as EVALUATION
from fastbandit.genotype import Genotype, GenotypeError
from fastbandit.models import Architecture, find_model, load_model, save_model
from fastbandit.report import write_report
from fastbandit.report.folders import collect
from fastbandit.runs import folder as folders
from fastbandit.runs.folder import RunFiles, RunFolder
from fastbandit.runs.tensors import CheckpointError, RunError, load_tensors, save_tensors
from fastbandit.study.run import FILES as STUDY

CONFIG = {"seed": 0, "attack": {"epsilon": "8/255"}, "epochs": 6, "learning_rate": 3e-4}
NAME = "ABANDIT_MNIST_NORMAL_1"


def make(path: Path, *, finished: bool = False) -> Path:
    with RunFolder.open(path, CONFIG) as folder:
        folder.write_json("split.json", {"weights": [1, 2], "digest": "ab"})
        folder.write_json("env.json", {"threads": 2, "torch": "2.10"})
        folder.append("bandit.jsonl", {"event": "sample", "probability": [0.25, 0.75]})
        folder.append("metrics.jsonl", {"epoch": 0, "loss": 1.5})
        state = {"epoch": 1, "finished": False, "robust": 0.25}
        folder.save_checkpoint({"w": torch.arange(3.0), "e": torch.zeros(0, 2)}, state)
        if finished:
            folder.write_json("summary.json", {"status": "finished", "robust": 0.25})
    return path


def resume(path: Path) -> dict[str, Any]:
    """What ``--resume`` goes on with: everything that decides it."""
    with RunFolder.open(path, RunFolder.read_config(path)) as folder:
        found: dict[str, Any] = {"config": folder.config}
        if folder.finished:
            return {**found, "result": folder.result()}
        assert folder.load_checkpoint(
            lambda tensors, state: found.update(
                state=state, tensors={name: (t.shape, t.tolist()) for name, t in tensors.items()}
            )
        )
        for name in ("split.json", "env.json"):
            found[name] = folder.read_json(name)
        for name in ("bandit.jsonl", "metrics.jsonl"):
            found[name] = folder.read_lines(name)
        return found


# --- damage -------------------------------------------------------------------------------------


def flips(data: bytes, step: int = 1):
    """The data with one bit flipped: in every byte, or in one of ``step``, one of the eight."""
    chance = random.Random(0)
    for position in range(0, len(data), step):
        broken = bytearray(data)
        broken[position] ^= 1 << chance.randrange(8)
        yield bytes(broken)


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "split.json",
        "env.json",
        "bandit.jsonl",
        "metrics.jsonl",
        "checkpoints/latest.safetensors",
    ],
)
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, name):
    path = make(tmp_path / "r")
    expected, file = resume(path), path / name
    whole, refused = file.read_bytes(), 0
    step = max(1, len(whole) // 300)
    for broken in flips(whole, step):
        file.write_bytes(broken)
        try:
            assert resume(path) == expected
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017 - not every flip has to raise
        file.write_bytes(whole)
    assert refused > len(whole) // step // 2
    assert resume(path) == expected


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_a_flipped_bit_of_a_finished_run(tmp_path, name):
    path = make(tmp_path / "r", finished=True)
    expected, file = resume(path), path / name
    for broken in flips(file.read_bytes(), 1 + 3 * (name == "summary.json")):
        file.write_bytes(broken)
        try:
            assert resume(path) == expected
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017


def test_a_flipped_bit_of_a_tensor_file(tmp_path):
    file = tmp_path / "x"
    save_tensors(file, {"w": torch.arange(3.0), "e": torch.zeros(0, 2)}, "weights", {"epoch": 1})

    def said() -> Any:
        tensors, metadata = load_tensors(file, "weights")
        return metadata, {name: (t.dtype, t.shape, t.tolist()) for name, t in tensors.items()}

    expected = said()
    for broken in flips(file.read_bytes()):
        file.write_bytes(broken)
        try:
            assert said() == expected
        except CheckpointError as error:
            assert str(file) in str(error)  # noqa: PT017


def test_a_flipped_bit_of_a_genotype(tmp_path):
    file = tmp_path / "g.json"
    genotype = Genotype.published(NAME)
    genotype.save(file)
    for broken in flips(file.read_bytes(), 3):
        file.write_bytes(broken)
        try:
            assert Genotype.load(file) == genotype
        except GenotypeError as error:
            assert str(file) in str(error)  # noqa: PT017


def test_one_digit_of_a_log_or_of_a_state_is_noticed(tmp_path):
    path = make(tmp_path / "r")
    log = path / "bandit.jsonl"
    log.write_text(log.read_text().replace("0.25", "0.35"))
    with pytest.raises(CheckpointError, match=r"bandit\.jsonl: damaged or edited"):
        resume(path)
    log.write_text(log.read_text().replace("0.35", "0.25"))
    file = path / "checkpoints" / "latest.safetensors"
    file.write_bytes(file.read_bytes().replace(rb"\"robust\":0.25", rb"\"robust\":0.75"))
    with pytest.raises(CheckpointError, match="checksum of its tensors and metadata"):
        resume(path)


def model_file(path: Path) -> Path:
    genotype = Genotype.published(NAME)
    architecture = Architecture(in_channels=1, classes=10, channels=2, cells=1)
    tensors = architecture.build(genotype).state_dict()
    training = {"threat": {"epsilon": "0.2"}, "epoch": 3}
    save_model(
        path, tensors, genotype=genotype, architecture=architecture, data={}, training=training
    )
    return path


def test_the_threat_model_of_a_model_is_covered(tmp_path):
    file = model_file(tmp_path / "m")
    assert load_model(file).training["threat"]["epsilon"] == "0.2"
    whole = file.read_bytes()
    for old, new in ((rb"epsilon\":\"0.2", rb"epsilon\":\"0.0"), (rb"epoch\":3", rb"epoch\":2")):
        assert whole.count(old) == 1
        file.write_bytes(whole.replace(old, new))
        with pytest.raises(CheckpointError, match="checksum of its tensors and metadata"):
            load_model(file)


def old_file(path: Path, kind: str, tensors: dict[str, torch.Tensor], **metadata: Any) -> None:
    """As older versions wrote it, with a checksum of the tensors alone."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].numpy().tobytes(), zlib.crc32(name.encode(), crc))
    header = {"kind": kind, "version": 1, "crc32": crc, **metadata}
    path.write_bytes(save(tensors, metadata={"fastbandit": canonical_json(header)}))


def test_files_of_older_versions_are_read(tmp_path):
    path = make(tmp_path / "r")
    tensors = {"w": torch.arange(3.0)}
    lengths = dict.fromkeys(RunFiles().logs, 0)
    latest = path / "checkpoints" / "latest.safetensors"
    old_file(latest, "checkpoint", tensors, state={"epoch": 5}, lengths=lengths)
    (path / "split.json").write_text('{"weights": [1]}')
    found = resume(path)
    assert found["state"] == {"epoch": 5}
    assert found["split.json"] == {"weights": [1]}


def test_no_new_file_is_taken_for_an_old_one(tmp_path):
    file = tmp_path / "x"
    save_tensors(file, {"w": torch.arange(3.0)}, "weights", {"epoch": 1})
    whole = file.read_bytes()
    file.write_bytes(whole.replace(rb"\"version\":2", rb"\"version\":1"))
    with pytest.raises(CheckpointError, match="checksum of its tensors does not match"):
        load_tensors(file, "weights")
    sealed = seal({"robust": 0.25})
    for key in ("checksum", "checksum_of"):
        broken = {("x" if k == key else k): v for k, v in sealed.items()}
        (tmp_path / "s.json").write_text(json.dumps(broken))
        with pytest.raises(FileError, match="damaged or edited"):
            read_sealed(tmp_path / "s.json")
    (tmp_path / "s.json").write_text(json.dumps(dict(reversed(sealed.items())), indent=7))
    assert read_sealed(tmp_path / "s.json") == {"robust": 0.25}


def test_a_checkpoint_of_another_configuration(tmp_path):
    path = make(tmp_path / "r")
    file = path / "config.yaml"
    file.write_text(file.read_text().replace("epochs: 6", "epochs: 3"))
    with pytest.raises(CheckpointError, match=r"configuration in config\.yaml, got one of another"):
        resume(path)


def test_the_report_leaves_out_what_is_damaged(tmp_path):
    path = make(tmp_path / "r", finished=True)
    assert not any("damaged" in note for note in collect([path]).searches[0].notes)
    log = path / "metrics.jsonl"
    log.write_text(log.read_text().replace("1.5", "1.6"))
    (path / "config.yaml").write_text("seed: 1\n")
    found = collect([path]).searches[0]
    assert found.config == {}
    assert found.metrics == []
    notes = "\n".join(found.notes)
    assert "config.yaml: damaged or edited" in notes
    assert "metrics.jsonl: damaged or edited" in notes
    text = (path / "summary.json").read_text()
    (path / "summary.json").write_text(text.replace("0.25", "0.75"))
    assert collect([path]).searches[0].summary is None


# --- links, pipes, devices ----------------------------------------------------------------------


def put(kind: str, place: Path, elsewhere: Path) -> None:
    place.unlink(missing_ok=True)
    if kind == "a symbolic link":
        place.symlink_to(elsewhere)
    elif kind == "a pipe":
        os.mkfifo(place)
    else:
        place.mkdir()


@pytest.mark.parametrize("kind", ["a symbolic link", "a pipe", "a folder"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "summary.json", ".lock"])
def test_what_is_no_file_is_refused(tmp_path, kind, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("a long text of mine")
    path = make(tmp_path / "r")
    before = (path / "bandit.jsonl").read_bytes()
    put(kind, path / name, elsewhere)
    for force in (False, True):
        with pytest.raises(ValueError, match=f"expected a plain file, got {kind}"):
            RunFolder.open(path, CONFIG, force=force)
    if name != ".lock":
        report = "\n".join([*map(str, _report_says(path))])
        assert f"expected a plain file, got {kind}" in report
    assert elsewhere.read_text() == "a long text of mine"
    assert (path / "bandit.jsonl").read_bytes() == before


def _report_says(path: Path) -> list[str]:
    try:
        return collect([path]).searches[0].notes
    except ValueError as error:
        return [str(error)]


@pytest.mark.parametrize(
    ("files", "name"),
    [(RunFiles(), "checkpoints"), (STUDY, "pieces"), (STUDY, "searches")],
)
def test_a_folder_that_is_a_link_is_refused(tmp_path, files, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".mine.tmp").write_text("mine")
    with RunFolder.open(tmp_path / "r", CONFIG, files=files):
        pass
    if name in files.folders:
        (tmp_path / "r" / name).rmdir()
    (tmp_path / "r" / name).symlink_to(tmp_path / "elsewhere")
    for force in (False, True):
        with pytest.raises(FileError, match=f"{name}: expected a folder, got a symbolic link"):
            RunFolder.open(tmp_path / "r", {} if force else CONFIG, force=force, files=files)
    assert (tmp_path / "elsewhere" / ".mine.tmp").read_text() == "mine"


def test_every_file_of_a_folder_is_looked_at(tmp_path):
    for files in (RunFiles(), EVALUATION, STUDY):
        for name in ("config.yaml", files.result, *files.all):
            path = tmp_path / f"{files.command}-{name.replace('/', '-')}"
            with RunFolder.open(path, CONFIG, files=files):
                pass
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).unlink(missing_ok=True)
            (path / name).symlink_to(tmp_path / "nowhere")
            with pytest.raises(FileError, match="got a symbolic link"):
                RunFolder.open(path, CONFIG, files=files)


def test_a_log_with_a_second_name_is_not_changed_there(tmp_path):
    path = make(tmp_path / "r")
    log, other = path / "metrics.jsonl", tmp_path / "snapshot"
    os.link(log, other)
    before = other.read_bytes()
    with log.open("ab") as stream:
        stream.write(b"more")  # of both names
    with RunFolder.open(path, CONFIG) as folder:
        folder.load_checkpoint(lambda tensors, state: None)
        folder.append("metrics.jsonl", {"epoch": 1})
        assert len(folder.read_lines("metrics.jsonl")) == 2
    assert other.read_bytes() == before + b"more"


def test_models_and_genotypes_in_a_folder(tmp_path):
    file = model_file(tmp_path / "mine.safetensors")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model-best.safetensors").symlink_to(file)
    with pytest.raises(FileError, match="expected a plain file, got a symbolic link"):
        find_model(folder)
    # Who names a link means it.
    assert load_model(folder / "model-best.safetensors").training["epoch"] == 3
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="expected a file"):
        load_tensors(tmp_path / "pipe", "network")
    assert plain_file(tmp_path / "nothing") == tmp_path / "nothing"


# --- what a stranger's file may cost ------------------------------------------------------------


def test_a_header_that_claims_gigabytes(tmp_path):
    file = tmp_path / "x"
    for length in (2**62, 2**40, 33 * 2**20):
        file.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match="damaged or not a safetensors file: a header of"):
            load_tensors(file, "weights")
    with file.open("wb") as stream:
        stream.write((40 * 2**20).to_bytes(8, "little"))
        stream.truncate(50 * 2**20)
    with pytest.raises(CheckpointError, match="a header of"):
        load_tensors(file, "weights")
    with pytest.raises(CheckpointError, match="expected at most 1,000 bytes"):
        load_tensors(file, "weights", 1000)


def test_a_model_of_any_size(tmp_path):
    genotype = Genotype.published(NAME)
    for sizes in (
        {"channels": 2**20, "cells": 1},
        {"channels": 2, "cells": 10**9},
        {"channels": 10**30, "cells": 1},
    ):
        architecture = Architecture(in_channels=1, classes=10, **sizes)
        tensors = {f"t{number}": torch.zeros(1) for number in range(3)}
        facts = {"genotype": genotype, "architecture": architecture, "data": {}, "training": {}}
        save_model(tmp_path / "m", tensors, **facts)
        with pytest.raises(CheckpointError, match="not a model that this version can build"):
            load_model(tmp_path / "m")


HOSTILE_JSON = [
    ("[" * 3000 + "]" * 3000, "nested too deeply"),
    ("[" * 100 + "]" * 100, "nested too deeply"),
    ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
    ('{"a": {"b": [{"c": 1, "c": 1}]}}', "the key 'c' is given twice"),
    (r'{"a": "\ud800"}', "lone surrogate"),
    (r'{"a": "x\udfff"}', "lone surrogate"),
    ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
]


@pytest.mark.parametrize(("text", "reason"), HOSTILE_JSON)
def test_hostile_json(tmp_path, text, reason):
    file = tmp_path / "g.json"
    file.write_text(text)
    with pytest.raises(FileError, match=reason):
        read_sealed(file)
    with pytest.raises(GenotypeError, match=reason):
        Genotype.load(file)
    path = make(tmp_path / "r")
    (path / "metrics.jsonl").write_text(text + "\n")
    with RunFolder(path) as folder, pytest.raises(FileError, match=f"line 1: .*{reason}"):
        folder.read_lines("metrics.jsonl")
    (note,) = [n for n in collect([path]).searches[0].notes if n.startswith("metrics.jsonl")]
    assert "line 1 is not a JSON object" in note


def test_huge_files_are_not_read(tmp_path):
    path = make(tmp_path / "r")
    (path / "summary.json").touch()
    for name in ("config.yaml", "summary.json", "metrics.jsonl", "bandit.jsonl"):
        os.truncate(path / name, 10 * 2**30)  # a hole: it takes no room
    with pytest.raises(RunError, match=r"config\.yaml: expected at most 65,536 bytes"):
        RunFolder.open(path, CONFIG)
    with pytest.raises(ValueError, match="expected at most 65,536 bytes"):
        collect([path])
    (path / "config.yaml").write_text("seed: 0\n")
    notes = "\n".join(collect([path]).searches[0].notes)
    for name in ("summary.json", "metrics.jsonl", "bandit.jsonl"):
        assert f"{name}: expected at most" in notes
    file = tmp_path / "g.json"
    file.touch()
    os.truncate(file, 2**40)
    with pytest.raises(GenotypeError, match="expected at most 1,048,576 bytes"):
        Genotype.load(file)


def test_a_genotype_of_any_size(tmp_path):
    cell = {"name": "a", "nodes": [[{"op": "conv_3x3", "source": 0}]], "concat": [1]}
    base = {"format": "fastbandit.genotype", "schema_version": 1}
    file = tmp_path / "g.json"
    for change, reason in (
        ({"cells": [cell] * 10_000}, "cells: Tuple should have at most 26 items"),
        (
            {"cells": [{**cell, "nodes": cell["nodes"] * 10_000}]},
            "nodes: Tuple should have at most",
        ),
        ({"cells": [cell], "operations": ["conv_3x3"] * 50_000}, "operations: Tuple should have"),
    ):
        file.write_text(json.dumps({**base, **change}))
        with pytest.raises(GenotypeError, match=reason):
            Genotype.load(file)
    with pytest.raises(GenotypeError, match="DARTS text"):
        Genotype.from_darts("Genotype(a=[('conv_3x3', 0)], a_concat=range(0, 10**12, 1))")
    with pytest.raises(GenotypeError, match="concat: expected different nodes"):
        Genotype.from_darts("Genotype(a=[('conv_3x3', 0)], a_concat=range(0, 100000000000))")


def test_a_bandit_of_any_size(tmp_path):
    from fastbandit.bandit import replay

    start = {
        "event": "start", "space": "robust9", "operations": ["o"] * 20_000,
        "edges": ["e"] * 20_000, "policy": "printed", "rate": 0.7, "rounds": 1, "bonus": 1.0,
        "seed": 0,
    }  # fmt: skip
    with pytest.raises(
        ValueError, match="line 1: expected at most 1,000,000 arms, got 400,000,000"
    ):
        replay([start])
    path = make(tmp_path / "r")
    (path / "bandit.jsonl").write_text(json.dumps(start) + "\n" + "{}\n" * 1000)
    found = collect([path]).searches[0]
    assert found.start is None
    assert any("20,000 edges of 20,000 operations" in note for note in found.notes)
    (path / "bandit.jsonl").write_text("nonsense\n" * 10_000)
    assert len(collect([path]).searches[0].notes) < 100


# --- full disks ---------------------------------------------------------------------------------


def test_an_error_of_the_system_names_its_file(tmp_path, monkeypatch):
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        with pytest.raises(OSError, match=r"run\.json") as found, naming(tmp_path / "run.json"):
            raise OSError(code, os.strerror(code))
        assert found.value.errno == code
        assert found.value.filename == str(tmp_path / "run.json")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*run\.json'"):
        write_atomic(tmp_path / "run.json", "x")


def test_a_file_that_may_not_grow_is_named(tmp_path):
    path = make(tmp_path / "r")
    with RunFolder.open(path, CONFIG) as folder:
        folder.load_checkpoint(lambda tensors, state: None)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            long = {"text": "x" * 200}
            with pytest.raises(OSError, match=r"too large.*metrics\.jsonl"):
                folder.append("metrics.jsonl", long)
            with pytest.raises(OSError, match=r"too large.*'.*/env\.json'"):
                folder.write_json("env.json", long)
            with pytest.raises(OSError, match=r"too large.*next\.safetensors"):
                folder.save_checkpoint({"w": torch.zeros(100)}, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert resume(path)["metrics.jsonl"] == [{"epoch": 0, "loss": 1.5}]


# --- odd file systems ---------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_a_run_goes_on_and_says_so_once(tmp_path, monkeypatch, code):
    def no_locks(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(folders, "_warned_of_no_locks", False)
    with pytest.warns(RuntimeWarning, match="the file system has no locks"):
        make(tmp_path / "r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resume(tmp_path / "r")["state"]["epoch"] == 1


def test_another_error_of_a_lock_is_said_as_it_is(tmp_path, monkeypatch):
    def broken(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match=r"Input/output error: '.*\.lock'"):
        make(tmp_path / "r")


@pytest.fixture
def odd(tmp_path) -> Path:
    """A folder whose name is not UTF-8."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff\xe9"))
    try:
        path.mkdir()
    except OSError:
        pytest.skip("this file system has names of UTF-8 alone")
    return path


def test_a_folder_whose_name_is_not_utf8(odd):
    expected = resume(make(odd.parent / "plain"))
    assert resume(make(odd / "r")) == expected
    assert load_model(model_file(odd / "m")).training["epoch"] == 3
    data = bytearray((odd / "m").read_bytes())
    data[-1] ^= 1
    (odd / "m").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        load_model(odd / "m")
    page = write_report(odd / "r").read_bytes().decode()
    assert "r" in page


def test_a_configuration_may_hold_such_a_name(odd):
    from fastbandit.config import merge
    from fastbandit.retrain import RetrainConfig

    config = {"genotype": str(odd / "g.json"), "data": "digits"}
    with RunFolder.open(odd / "r", config):
        pass
    assert RunFolder.read_config(odd / "r") == config
    assert merge(RetrainConfig(), config, "test").genotype == str(odd / "g.json")


def report(*arguments: Any, **more: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "fastbandit.report", *map(os.fsencode, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, timeout=120, check=False, **more)


def test_report_prints_such_a_name(odd):
    make(odd / "r")
    found = report(odd / "r", stdout=subprocess.PIPE)
    assert found.returncode == 0, found.stderr
    assert rb"r\udcff\udce9/r/report.html" in found.stdout
    found = report(odd / "r", "--json", stdout=subprocess.PIPE)
    assert json.loads(found.stdout)["report"] == str(odd / "r" / "report.html")


def test_report_with_its_output_closed(tmp_path):
    path = make(tmp_path / "r")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        found = report(path, stdout=writing)
    finally:
        os.close(writing)
    assert found.stderr == b""
    assert found.returncode != 120
    assert (path / "report.html").is_file()
