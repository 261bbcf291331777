import errno
import itertools
import json
import math
import subprocess
import sys

import _processes
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from fastbandit.runs.environment import derive_seed, run_id
from fastbandit.runs.folder import RunFolder
from fastbandit.runs.tensors import CheckpointError, RunError, load_tensors, save_tensors

CONFIG = {"seed": 0, "attack": {"epsilon": "8/255"}, "learning_rate": 3e-4}


def tensors(value=1.0):
    return {"a": torch.full((3, 2), value), "b": torch.arange(4), "c": torch.tensor([], dtype=bool)}


def test_tensor_file_round_trip_and_same_bytes(tmp_path):
    for name in ("x", "y"):
        save_tensors(tmp_path / name, tensors(), "weights", {"z": 1, "m": {"k": [1, 2]}})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    found, metadata = load_tensors(tmp_path / "x", "weights")
    assert metadata["m"] == {"k": [1, 2]}
    for name, tensor in tensors().items():
        assert torch.equal(found[name], tensor)


def test_the_file_is_that_of_the_library(tmp_path):
    dtypes = [torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16]
    dtypes += [torch.float16, torch.int16, torch.int8, torch.uint8, torch.bool]
    shapes = [(), (0, 2), (3,), (2, 3, 4), (1,)]
    values = {
        f'{number % 7}."ö\\{dtype}': torch.arange(24).to(dtype)[: math.prod(shape)].reshape(shape)
        for number, (dtype, shape) in enumerate(itertools.product(dtypes, shapes))
    }
    values["transposed"] = torch.arange(12.0).reshape(3, 4).T
    save_tensors(tmp_path / "x", values, "weights", {"text": 'é "\\\n\x01\x7f'})
    with safe_open(tmp_path / "x", framework="pt") as file:
        metadata = file.metadata()
    dense = {name: value.contiguous() for name, value in values.items()}
    assert (tmp_path / "x").read_bytes() == save(dense, metadata=metadata)
    with pytest.raises(TypeError, match=r"c: expected a tensor of int64, .*, got torch.complex64"):
        save_tensors(tmp_path / "y", {"c": torch.zeros(1, dtype=torch.complex64)}, "weights", {})


def test_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "x"
    save_tensors(path, tensors(), "weights", {})
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        broken = bytearray(data)
        broken[position] ^= 0x10
        path.write_bytes(broken)
        try:
            found, _ = load_tensors(path, "weights")
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017 - not every flip has to raise
        else:
            # Only white space of the header can change without a meaning.
            for name, tensor in tensors().items():
                assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("length", [0, 5, 100])
def test_truncated_file(tmp_path, length):
    path = tmp_path / "x"
    save_tensors(path, tensors(), "weights", {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_tensors(path, "weights")


def test_foreign_files(tmp_path):
    path = tmp_path / "x"
    save_file(tensors(), path)
    with pytest.raises(CheckpointError, match="not one that fastbandit wrote"):
        load_tensors(path, "weights")
    save_tensors(path, tensors(), "checkpoint", {})
    with pytest.raises(
        CheckpointError, match="expected a weights of version 1 or 2, got 'checkpoint'"
    ):
        load_tensors(path, "weights")
    with pytest.raises(CheckpointError, match="missing"):
        load_tensors(tmp_path / "missing", "weights")


def test_derived_seeds_differ_and_stay():
    seeds = {derive_seed(s, *p) for s in range(20) for p in (("a",), ("b",), ("a", "b"), ("a", 1))}
    assert len(seeds) == 80
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Written down: a change would give every published seed another meaning.
    assert derive_seed(0, "weights") == 8454698744502178088


def test_run_id_is_the_configuration(tmp_path):
    assert run_id(CONFIG) == run_id(json.loads(json.dumps(CONFIG)))
    assert run_id(CONFIG) == run_id(dict(reversed(CONFIG.items())))
    assert run_id(CONFIG) != run_id({**CONFIG, "seed": 1})
    with RunFolder.open(tmp_path / "r", CONFIG):
        pass
    assert RunFolder.read_config(tmp_path / "r") == CONFIG


def open_run(path, config=CONFIG, **options):
    return RunFolder.open(path, config, **options)


def collect(folder):
    """What load_checkpoint hands back."""
    found = {}
    loaded = folder.load_checkpoint(lambda t, s: found.update(tensors=t, state=s))
    return found if loaded else None


def test_resume_cuts_logs_back(tmp_path):
    with open_run(tmp_path / "r") as folder:
        assert collect(folder) is None
        folder.append("metrics.jsonl", {"epoch": 0})
        folder.save_checkpoint(tensors(1.0), {"epoch": 1})
        folder.append("metrics.jsonl", {"epoch": 1})
        folder.append("bandit.jsonl", {"event": "sample"})
        (folder.path / "metrics.jsonl").open("a").write('{"epoch": 2, "lo')  # killed here
    with open_run(tmp_path / "r") as folder:
        found = collect(folder)
        assert found["state"] == {"epoch": 1}
        assert folder.read_lines("metrics.jsonl") == [{"epoch": 0}]
        assert folder.read_lines("bandit.jsonl") == []


def test_killed_before_the_first_checkpoint(tmp_path):
    with open_run(tmp_path / "r") as folder:
        folder.append("metrics.jsonl", {"epoch": 0})
    with open_run(tmp_path / "r") as folder:
        assert collect(folder) is None
        assert folder.read_lines("metrics.jsonl") == []


def test_killed_between_the_two_renames(tmp_path):
    with open_run(tmp_path / "r") as folder:
        folder.save_checkpoint(tensors(1.0), {"epoch": 1})
        folder.save_checkpoint(tensors(2.0), {"epoch": 2})
        (folder.path / "checkpoints" / "latest.safetensors").unlink()
    with open_run(tmp_path / "r") as folder:
        assert collect(folder)["state"] == {"epoch": 1}


def test_damaged_checkpoint_names_the_way_back(tmp_path):
    with open_run(tmp_path / "r") as folder:
        folder.append("metrics.jsonl", {"epoch": 0})
        folder.save_checkpoint(tensors(1.0), {"epoch": 1})
        folder.append("metrics.jsonl", {"epoch": 1})
        folder.save_checkpoint(tensors(2.0), {"epoch": 2})
        latest = folder.path / "checkpoints" / "latest.safetensors"
        data = bytearray(latest.read_bytes())
        data[-1] ^= 1
        latest.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"checksum.*delete it to go on from previous"):
            collect(folder)
        assert len(folder.read_lines("metrics.jsonl")) == 2  # nothing was cut
        latest.unlink()
        assert collect(folder)["state"] == {"epoch": 1}
        assert len(folder.read_lines("metrics.jsonl")) == 1


def test_missing_log_lines_are_noticed(tmp_path):
    with open_run(tmp_path / "r") as folder:
        folder.append("bandit.jsonl", {"event": "sample"})
        folder.save_checkpoint(tensors(), {})
        (folder.path / "bandit.jsonl").write_text("")
        with pytest.raises(CheckpointError, match=r"bandit\.jsonl: expected at least 20 bytes"):
            collect(folder)


def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    with open_run(tmp_path / "r") as folder:
        folder.save_checkpoint(tensors(1.0), {"epoch": 1})

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            folder.save_checkpoint(tensors(2.0), {"epoch": 2})
        monkeypatch.undo()
        assert collect(folder)["state"] == {"epoch": 1}
        names = {path.name for path in (folder.path / "checkpoints").iterdir()}
        assert names == {"latest.safetensors"}


def test_other_configuration_is_refused(tmp_path):
    with open_run(tmp_path / "r") as folder:
        folder.append("metrics.jsonl", {"epoch": 0})
    other = {**CONFIG, "attack": {"epsilon": "4/255"}}
    with pytest.raises(RunError, match=r"attack\.epsilon: '8/255' there, '4/255' asked for"):
        open_run(tmp_path / "r", other)
    assert (tmp_path / "r" / "metrics.jsonl").read_text() == '{"epoch": 0}\n'
    with open_run(tmp_path / "r", other, force=True) as folder:
        assert not (folder.path / "metrics.jsonl").exists()
        assert RunFolder.read_config(folder.path) == other


def test_finished_run_is_not_overwritten(tmp_path):
    with open_run(tmp_path / "r") as folder:
        folder.write_json("summary.json", {"status": "finished"})
        (folder.path / "my-notes.txt").write_text("mine")
    before = (tmp_path / "r" / "summary.json").read_bytes()
    with open_run(tmp_path / "r") as folder:
        assert folder.finished
        assert folder.result() == {"status": "finished"}
    assert (tmp_path / "r" / "summary.json").read_bytes() == before
    with open_run(tmp_path / "r", force=True) as folder:
        assert not folder.finished
        assert (folder.path / "my-notes.txt").read_text() == "mine"


def test_force_does_not_touch_an_unfinished_run_of_the_same_configuration(tmp_path):
    with open_run(tmp_path / "r") as folder:
        folder.save_checkpoint(tensors(), {"epoch": 1})
    with open_run(tmp_path / "r", force=True) as folder:
        assert collect(folder)["state"] == {"epoch": 1}


def test_folder_of_somebody_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="not a run folder"):
        open_run(tmp_path)
    with pytest.raises(RunError, match="not a run folder"):
        open_run(tmp_path, force=True)
    with pytest.raises(RunError, match="expected a folder"):
        open_run(tmp_path / "thesis.tex")


def test_damaged_configuration(tmp_path):
    with open_run(tmp_path / "r"):
        pass
    (tmp_path / "r" / "config.yaml").write_text("a: [1,")
    with pytest.raises(RunError, match=r"not a run folder: config\.yaml"):
        open_run(tmp_path / "r")


def test_two_processes_never_write_one_run(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fastbandit.runs.folder import RunFolder\n"
        f"RunFolder.open(Path({str(tmp_path / 'r')!r}), {CONFIG!r})"
    )
    with open_run(tmp_path / "r"):
        other = _processes.run("-c", code)
    assert "another process is writing this run" in other.stderr
    again = _processes.run("-c", code)
    assert again.returncode == 0, again.stderr


def test_unfinished_run_is_found(tmp_path):
    assert RunFolder.find_unfinished(tmp_path / "runs", CONFIG) is None
    path = RunFolder.fresh_path(tmp_path / "runs", "my run/1")
    assert path.name.endswith("-my-run-1")
    with open_run(path):
        pass
    assert RunFolder.find_unfinished(tmp_path / "runs", CONFIG) == path
    assert RunFolder.find_unfinished(tmp_path / "runs", {**CONFIG, "seed": 1}) is None
    assert RunFolder.fresh_path(tmp_path / "runs", "my run/1").name == f"{path.name}-2"
    (path / "summary.json").write_text("{}")
    assert RunFolder.find_unfinished(tmp_path / "runs", CONFIG) is None


def test_logs_hold_only_numbers(tmp_path):
    with open_run(tmp_path / "r") as folder, pytest.raises(ValueError, match="JSON compliant"):
        folder.append("metrics.jsonl", {"loss": math.nan})


def test_stored_is_the_result_of_a_finished_run_of_that_configuration(tmp_path):
    config = {"seed": 1}
    with RunFolder.open(tmp_path / "run", config) as folder:
        assert folder.stored(config) is None
        folder.write_json("summary.json", {"status": "finished"})
    folder = RunFolder(tmp_path / "run")
    assert folder.stored(config) == {"status": "finished"}
    assert folder.stored({"seed": 2}) is None
    # A process that was clearing the folder was killed: what is left is no finished run.
    (tmp_path / "run" / ".clearing").touch()
    assert folder.stored(config) is None


def test_deterministic_mode_does_not_load_the_compiler_and_is_told_to_one_that_comes():
    """Loading torch's compiler takes a second, at the start of every command."""
    program = """
import sys, torch
from fastbandit.runs.session import torch_settings
with torch_settings(0, True):
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert "torch._inductor.config" not in sys.modules
    import torch._inductor.config as compiler
    assert compiler.deterministic
assert not torch.are_deterministic_algorithms_enabled()
assert not compiler.deterministic
with torch_settings(0, True):
    assert compiler.deterministic
torch.use_deterministic_algorithms(True, warn_only=True)
with torch_settings(0, False):
    assert not torch.are_deterministic_algorithms_enabled()
assert torch.is_deterministic_algorithms_warn_only_enabled()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
