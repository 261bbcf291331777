"""What is shown while a command works, and how long a dry run measures."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from fastbandit.runs import preflight
from fastbandit.runs.preflight import Preflight
from fastbandit.runs.progress import Progress


def shown(terminal: bool) -> tuple[Progress, io.StringIO]:
    stream, progress = io.StringIO(), Progress(interval=0.0)
    progress.console = Console(
        file=stream, force_terminal=terminal, width=120, color_system=None, highlight=False
    )
    return progress, stream


@pytest.mark.parametrize("alike", [True, False])
def test_the_last_panel_stays_when_it_is_interrupted(alike):
    progress, stream = shown(terminal=True)

    def work() -> None:
        with progress.steps("begins", 9, alike=alike) as update:
            update(3, "epoch 3/9  clean 12.5 %")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    last = "epoch 3/9" + stream.getvalue().rpartition("epoch 3/9")[2]
    assert "\x1b[2K" not in last  # nothing erases it
    assert "epoch 3/9  clean 12.5 %" in last
    assert "3/9" in last
    # How long, and of what: never a bare time.
    assert ("to go" in last, "in all" in last) == (alike, not alike)


def test_life_is_shown_before_the_first_step_is_done():
    for steps in (True, False):
        progress, stream = shown(terminal=True)
        with progress.steps("begins", 9) if steps else progress.working("begins"):
            pass
        assert stream.getvalue().count("\n") > 1


def test_lines_where_there_is_no_terminal():
    progress, stream = shown(terminal=False)
    with progress.steps("begins", 2, alike=False) as update:
        update(1, "PGD-20: 1 of 4 parts")
    with progress.working("measuring") as say:
        say("path 1")
    lines = stream.getvalue().splitlines()
    assert lines == ["begins", "PGD-20: 1 of 4 parts  0:00 in all", "measuring"]
    silent = Progress.silent()
    with silent.working("x") as say, silent.steps("y", 3) as update:
        say("z")
        update(1, "z")


class Machine:
    """A step takes so many seconds for each image, and memory grows by 2 MiB with each."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, per_image: float, of_calls: float = 0.0
    ) -> None:
        self.now, self.per_image, self.steps = 0.0, per_image, []
        self.of_calls = of_calls  # what a step takes beside its images
        self.peak = 100.0
        monkeypatch.setattr(preflight.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(preflight, "peak_memory_mb", lambda device: self.peak)
        monkeypatch.setattr(preflight, "reset_peak_memory", self.reset)

    def reset(self, device: torch.device) -> bool:
        self.peak = 100.0
        return True

    def step(self, images: int) -> None:
        self.now += self.of_calls + images * self.per_image
        self.steps.append(images)
        self.peak = max(self.peak, 100.0 + 2.0 * images)


def test_whole_batches_are_measured_where_they_are_fast(monkeypatch):
    machine = Machine(monkeypatch, per_image=0.001)
    measuring = Preflight(15.0)
    assert measuring.images(128, machine.step) == 128
    assert machine.steps == [4, 4]
    cpu = torch.device("cpu")
    assert measuring.peak_memory_mb(cpu, 128, machine.step) == 356.0
    assert not measuring.extrapolated
    assert not measuring.over


def test_a_step_that_is_bound_by_its_calls_is_measured_with_whole_batches(monkeypatch):
    """As for the smallest networks, of which 4 images take as long as 64."""
    machine = Machine(monkeypatch, per_image=1e-5, of_calls=0.02)
    measuring = Preflight(2.0)
    assert measuring.images(64, machine.step) == 64
    assert machine.steps == [4, 4, 64]
    assert measuring.per_image == pytest.approx(0.02 / 64 + 1e-5)


def test_a_slow_network_is_measured_with_fewer_images_in_half_a_minute(monkeypatch):
    machine = Machine(monkeypatch, per_image=0.1)
    measuring = Preflight(15.0)
    assert measuring.images(512, machine.step) == 4  # 80 steps of 512 images take 68 minutes
    found = measuring.peak_memory_mb(torch.device("cpu"), 512, machine.step)
    assert measuring.extrapolated
    assert found == pytest.approx(100.0 + 2.0 * 512)
    assert machine.now < 30.0
    assert 512 not in machine.steps
    machine.now += 15.0
    assert measuring.over


def test_memory_of_a_whole_batch_where_its_peak_cannot_be_measured_anew(monkeypatch):
    machine = Machine(monkeypatch, per_image=0.1)
    monkeypatch.setattr(preflight, "reset_peak_memory", lambda device: False)
    measuring = Preflight(15.0)
    measuring.images(512, machine.step)
    assert measuring.peak_memory_mb(torch.device("cpu"), 512, machine.step) == 1124.0
    assert not measuring.extrapolated
