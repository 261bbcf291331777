"""The step engine: precision, recorded steps, and no waiting for the device within an epoch."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbandit.data import Augment, ImageSet, Loader
from fastbandit.genotype import Genotype
from fastbandit.nn.network import Network
from fastbandit.nn.norm import BatchNorm2d, Moves
from fastbandit.nn.supernet import Supernet
from fastbandit.search import SearchConfig, search
from fastbandit.space import get
from fastbandit.threat import ThreatModel
from fastbandit.training import (
    Cost,
    Engine,
    Graphs,
    Objective,
    cuda_graphs,
    evaluate,
    reestimate_batchnorm,
    reset_batchnorm,
    train_epoch,
)
from fastbandit.training.batches import Start
from fastbandit.training.cuda_graphs import CudaRecorder
from fastbandit.training.objectives import Adversarial, Free, Trades

THREAT = ThreatModel(epsilon="8/255", steps=2, step_size="4/255", bn_mode="train")
CPU = torch.device("cpu")


class CallingRecorder:
    """Replays by calling: a CUDA graph without CUDA. Recording runs nothing, as there."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, function):
        self.recorded += 1

        def replay():
            self.replayed += 1
            function()

        return replay


class Double:
    """A loader's batches in float64."""

    def __init__(self, *arguments, **options) -> None:
        self.loader = Loader(*arguments, **options)

    def epoch(self, number):
        for x, y, ids in self.loader.epoch(number):
            yield x.double(), y, ids


class Run:
    """A small supernet, its optimiser and data; 22 images in batches of 5, so the last has 2."""

    def __init__(
        self, device=CPU, *, images=22, dtype=torch.float64, channels=3, layout=None,
        model_layout=torch.channels_last,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        space = get("robust9-light", nodes=2, cell_types=2)
        self.model = Supernet(space, in_channels=channels, classes=4, channels=4).to(device)
        # In float64 no sign of the attack hangs on how a gradient next to nothing is rounded.
        self.model.to(dtype)
        self.model.to(memory_format=model_layout)
        self.model.set_path([row % self.model.arms for row in range(self.model.rows)])
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randint(0, 256, (images, channels, 8, 8), generator=generator)
        pixels = pixels.to(torch.uint8)
        labels = torch.randint(0, 4, (images,), generator=generator)
        data = ImageSet(pixels, labels)
        augment = Augment(crop_padding=1, flip=True, cutout_length=2)
        loader = Double if dtype == torch.float64 else Loader
        same = {"device": device, "memory_format": layout or torch.contiguous_format}
        self.train = loader(
            data, range(images), batch_size=5, shuffle=True, augment=augment, **same
        )
        self.test = loader(data, range(images), batch_size=4, **same)
        self.path = {
            "modules": list(self.model.path_modules()),
            "parameters": list(self.model.path_parameters()),
        }
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.SGD(
            self.path["parameters"], lr=0.05, momentum=0.9, weight_decay=3e-4,
            fused=cuda, foreach=not cuda,
        )  # fmt: skip
        self.cost = Cost()

    def set_momentum(self, momentum):
        for module in self.path["modules"]:
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum

    def epoch(self, number, **options):
        reset_batchnorm(self.path["modules"])
        return train_epoch(
            self.model, self.train, number, self.optimizer, THREAT, seed=3, cost=self.cost,
            grad_clip=1.0, **self.path, **options,
        )  # fmt: skip

    def accuracy(self, number=0, **options):
        threat = dataclasses.replace(THREAT, bn_mode="eval")
        return evaluate(
            self.model, self.test, threat, seed=4, cost=self.cost, offset=number, **self.path,
            **options,
        )  # fmt: skip


def graphs(recorder=None):
    recorder = recorder or CallingRecorder()
    return Engine(graphs=Graphs("yes", CPU, recorder=recorder)), recorder


# --- Recorded steps -------------------------------------------------------------------------------


def same(plain: Run, other: Run, **tolerance) -> None:
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(
            other.model.state_dict()[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


class ForgetfulRecorder:
    """Keeps nothing of what was recorded but what it does to tensors, as a CUDA graph."""

    def record(self, function):
        return lambda: None


def test_what_a_recorded_step_reads_lives_as_long_as_it():
    run = Run(dtype=torch.float32)
    engine, _ = graphs(ForgetfulRecorder())
    run.epoch(0, engine=engine)
    run.accuracy(engine=engine)
    held = [weakref.ref(thing) for thing in (run.train, run.test, run.optimizer)]
    del run.train, run.test, run.optimizer
    gc.collect()
    assert all(thing() is not None for thing in held)
    del engine
    gc.collect()
    assert all(thing() is None for thing in held)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("operation not permitted\nand more"), r"'train' could not .*\(operation not "
         r"permitted\); --graphs no"),
        (torch.OutOfMemoryError("out of memory"), "^out of memory$"),
    ],
)  # fmt: skip
def test_a_step_that_cannot_be_recorded_says_what_to_do(error, message):
    class Refusing:
        def record(self, function):
            raise error

    engine, _ = graphs(Refusing())
    with pytest.raises(RuntimeError, match=message):
        Run(dtype=torch.float32).epoch(0, engine=engine)


def test_the_rate_of_a_replayed_step_is_told():
    run = Run(images=20)
    engine, recorder = graphs()
    run.epoch(0, learning_rate=lambda step: 0.1 / (1 + step), engine=engine)
    assert recorder.replayed == 3
    assert run.optimizer.param_groups[0]["lr"] == 0.1 / 4


def test_recorded_steps_give_the_numbers_of_eager_ones():
    plain, other = Run(), Run()
    engine, recorder = graphs()
    for number in range(2):
        # A rate that changes within the epoch, as in retraining.
        rate = lambda step, n=number: 0.05 / (1 + step + n)  # noqa: E731
        expected = plain.epoch(number, learning_rate=rate)
        got = other.epoch(number, learning_rate=rate, engine=engine)
        # A recorded rate is a float32, as the fused optimiser wants it.
        assert got.loss == pytest.approx(expected.loss, rel=1e-6)
        assert (got.accuracy, got.images) == (expected.accuracy, expected.images)
        same(plain, other, rtol=1e-5, atol=1e-7)
        assert plain.accuracy(number).robust_correct == other.accuracy(number).robust_correct
    # Five batches: the first eager, three replayed, the last one smaller; recorded once for both.
    assert (recorder.recorded, recorder.replayed) == (1, 6)
    batches = {m.batches for m in other.path["modules"] if hasattr(m, "batches")}
    assert batches == {5}
    assert all(m.moves is None for m in other.path["modules"] if hasattr(m, "moves"))
    assert plain.cost.forward_passes == other.cost.forward_passes
    assert plain.cost.backward_passes == other.cost.backward_passes


@pytest.mark.parametrize("make", [Adversarial, lambda: Trades(beta=6.0)])
def test_objectives_of_one_step_are_recorded_to_the_numbers_of_eager_ones(make):
    plain, other = Run(), Run()
    for run in (plain, other):  # as in a final network, whose statistics are a moving average
        run.set_momentum(0.1)
    engine, recorder = graphs()
    for number in range(2):
        # A new objective in every epoch, as in retraining, is the same step.
        expected = plain.epoch(number, objective=make())
        got = other.epoch(number, objective=make(), engine=engine)
        assert got.loss == pytest.approx(expected.loss, rel=1e-6)
        same(plain, other, rtol=1e-5, atol=1e-7)
    assert (recorder.recorded, recorder.replayed) == (1, 6)


def test_two_passes_through_a_cumulative_average_run_eagerly():
    plain, other = Run(), Run()
    engine, recorder = graphs()
    plain.epoch(0, objective=Trades(beta=6.0))
    other.epoch(0, objective=Trades(beta=6.0), engine=engine)
    assert recorder.recorded == 0
    same(plain, other)


def test_another_objective_is_recorded_anew():
    run = Run()
    run.set_momentum(0.1)
    engine, recorder = graphs()
    for objective in (Trades(beta=6.0), Trades(beta=1.0), Adversarial()):
        run.epoch(0, objective=objective, engine=engine)
    assert recorder.recorded == 3


class _Twice(Objective):
    """Says nothing of being recordable, so it is not taken to be."""


@pytest.mark.parametrize("objective", [Free(2), _Twice()])
def test_objectives_that_cannot_be_recorded_run_eagerly(objective):
    run = Run()
    engine, recorder = graphs()
    run.epoch(0, objective=objective, engine=engine)
    assert recorder.recorded == 0


def test_recorded_evaluation_gives_the_numbers_of_an_eager_one():
    run = Run()
    run.epoch(0)
    engine, recorder = graphs()
    for number in range(3):
        expected, got = run.accuracy(number), run.accuracy(number, engine=engine)
        assert (got.clean_correct, got.robust_correct, got.images) == (
            expected.clean_correct, expected.robust_correct, expected.images
        )  # fmt: skip
    assert (recorder.recorded, recorder.replayed) == (1, 12)


def test_another_path_is_recorded_anew():
    plain, other = Run(), Run()
    engine, recorder = graphs()
    for number in range(3):
        for run, options in ((plain, {}), (other, {"engine": engine})):
            arms = run.model.arms
            run.model.set_path([(row + number) % arms for row in range(run.model.rows)])
            run.path = {
                "modules": list(run.model.path_modules()),
                "parameters": list(run.model.path_parameters()),
            }
            run.optimizer.param_groups[0]["params"] = run.path["parameters"]
            run.epoch(number, **options)
        same(plain, other, rtol=1e-5, atol=1e-7)
    assert recorder.recorded == 3


def test_a_path_of_pools_is_not_replayed_for_another():
    """Pools and identities have no parameters, so the parameters do not tell such paths apart."""
    recorder = ReplayingRecorder()
    engine = Engine(graphs=Graphs("yes", CPU, recorder=recorder))
    run, eager = without_learning(images=16), without_learning(images=16)
    names, parameters = run.model.space.operations, []
    for number, name in enumerate(("max_pool_3x3", "avg_pool_3x3")):
        for r in (run, eager):
            r.model.set_path([names.index(name)] * r.model.rows)
            r.path["modules"] = list(r.model.path_modules())
            r.path["parameters"] = list(r.model.path_parameters())
            r.optimizer.param_groups[0]["params"] = r.path["parameters"]
            r.set_momentum(0.1)
        parameters.append(run.path["parameters"])
        got, expected = run.epoch(number, engine=engine), eager.epoch(number)
        assert got.loss == pytest.approx(expected.loss, rel=1e-6)
        # The extra step of recording has moved the statistics that an evaluation uses.
        run.model.load_state_dict(eager.model.state_dict())
        first, second = run.accuracy(number, engine=engine), eager.accuracy(number)
        assert (first.clean_correct, first.robust_correct) == (
            second.clean_correct, second.robust_correct
        )  # fmt: skip
    assert all(one is other for one, other in zip(*parameters, strict=True))
    assert recorder.recorded == 4


def stays_in_evaluation_mode(run: Run) -> None:
    norm = run.model.stem_bn.eval()
    norm.train = lambda mode=True: norm


def has_other_draws(run: Run) -> None:
    run.kept, augment = run.train._draws, run.train.augment
    run.train.augment = None
    run.epoch(1)
    run.train.augment = augment


CHANGES = {
    "path": lambda run: run.model.set_path([run.model.arms - 1] * run.model.rows),
    "number of a layer": lambda run: setattr(run.model.stem_bn, "eps", 0.1),
    "class of a layer": lambda run: setattr(
        run.model.classifier, "__class__", type("Other", (nn.Linear,), {})
    ),
    "forward of a layer": lambda run: setattr(
        run.model.classifier, "forward", lambda x: nn.functional.linear(x, x.new_ones(4, x.size(1)))
    ),
    "mode of a layer": stays_in_evaluation_mode,
    "place of a weight": lambda run: setattr(
        run.model.stem.weight, "data", run.model.stem.weight.data.clone()
    ),
    "place of a buffer": lambda run: setattr(
        run.model.stem_bn, "running_mean", run.model.stem_bn.running_mean.clone()
    ),
    "gradient of a weight": lambda run: run.model.stem.weight.requires_grad_(False),
    "momentum": lambda run: run.optimizer.load_state_dict(
        copy.deepcopy(run.optimizer.state_dict())
    ),
    "number of the optimiser": lambda run: run.optimizer.param_groups[0].update(weight_decay=0.1),
    "optimiser": lambda run: setattr(
        run, "optimizer", torch.optim.SGD(run.path["parameters"], lr=0.05, momentum=0.9)
    ),
    "place of the draws": has_other_draws,
    "layout of the images": lambda run: setattr(run.train, "memory_format", torch.channels_last),
    "layout of ready batches": lambda run: setattr(
        run.train.loader, "memory_format", torch.channels_last
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_between_epochs_is_recorded_anew(what):
    run = Run(images=20, dtype=torch.float32)
    run.path = {"modules": list(run.model.modules()), "parameters": list(run.model.parameters())}
    run.optimizer.param_groups[0]["params"] = run.path["parameters"]
    run.set_momentum(0.1)
    if what == "layout of ready batches":
        run.train = Ready(run.train)
    engine, recorder = graphs()
    for number in range(2):
        run.epoch(number, engine=engine)
    assert recorder.recorded == 1
    CHANGES[what](run)
    run.epoch(2, engine=engine)
    assert recorder.recorded == 2


def test_a_batch_of_another_layout_is_not_put_into_the_buffers_of_the_first():
    class Mixed:
        def epoch(self, number):
            for count, (x, y, ids) in enumerate(Run(dtype=torch.float32).train.epoch(number)):
                layout = torch.channels_last if count == 1 else torch.contiguous_format
                yield x.contiguous(memory_format=layout), y, ids

    run = Run(dtype=torch.float32)
    run.train = Mixed()
    engine, recorder = graphs()
    run.epoch(0, engine=engine)
    assert recorder.replayed == 2


def _hook(*_: object) -> None:
    """Changes nothing."""


@pytest.mark.parametrize(
    "register",
    [
        lambda run: run.model.stem_bn.register_forward_hook(_hook),
        lambda run: run.model.register_forward_pre_hook(_hook),
        lambda run: run.model.cells[0].register_full_backward_hook(_hook),
        lambda run: run.model.stem.weight.register_hook(_hook),
        lambda run: run.model.stem.weight.register_post_accumulate_grad_hook(_hook),
        lambda run: nn.modules.module.register_module_forward_hook(_hook),
    ],
)
def test_steps_with_hooks_run_eagerly(register):
    """A replay would not call them."""
    run = Run(images=20, dtype=torch.float32)
    run.path["modules"] = list(run.model.modules())
    run.set_momentum(0.1)
    engine, recorder = graphs()
    handle = register(run)
    try:
        run.epoch(0, engine=engine)
        run.accuracy(engine=engine)
    finally:
        handle.remove()
    assert recorder.recorded == 0
    run.epoch(1, engine=engine)
    assert recorder.recorded == 1


def test_running_statistics_are_moved_by_one_operation():
    """And not passed over where something reads them within the step."""
    recorder = ReplayingRecorder()
    names = []
    record = recorder.record

    def noted(function):
        with Operations() as operations:
            replay = record(function)
        names.extend(function.__name__ for function, *_ in operations.noted)
        return replay

    recorder.record = noted
    run = without_learning()
    run.epoch(0, engine=Engine(graphs=Graphs("yes", CPU, recorder=recorder)))
    assert names.count("_foreach_lerp_.List") == 1
    assert not any(name.startswith("lerp_") for name in names)


def test_layers_whose_statistics_are_moved_together():
    def layers() -> list[BatchNorm2d]:
        found = [BatchNorm2d(channels, momentum=0.3) for channels in (2, 5)]
        return [found[0], found[1].double()]

    def batches(number: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(4, 5, 3, 3, generator=generator)
        return [x[:, :2], x.double()]

    plain, other = layers(), layers()
    moves = Moves(other)
    for number in range(3):
        moves.start()
        moves.fill(0.3)
        for one, two, x in zip(plain, other, batches(number), strict=True):
            two.moves = moves
            # The second pass of a layer comes after the first, and evaluation sees both.
            for scale in (1.0, 2.0):
                torch.testing.assert_close(two(scale * x), one(scale * x), rtol=0, atol=0)
            torch.testing.assert_close(two.eval()(x), one.eval()(x))
            two.train()(x)
            one.train()(x)
        moves.make()
        for one, two in zip(plain, other, strict=True):
            for name in ("running_mean", "running_var"):
                torch.testing.assert_close(getattr(two, name), getattr(one, name))


def test_a_nan_does_not_stay_in_the_buffers_of_a_recorded_step():
    norm = BatchNorm2d(2, momentum=1.0)
    norm.moves = moves = Moves([norm])
    moves.fill(1.0)
    for x in (torch.full((2, 2, 2, 2), torch.nan), torch.ones(2, 2, 2, 2)):
        moves.start()
        norm.reset_running_stats()
        norm(x)
        moves.make()
    assert torch.equal(norm.running_mean, torch.ones(2))


def test_after_step_and_another_objective_with_graphs():
    class Twice(Objective):
        def losses(self, step):
            yield from super().losses(step)

    engine, recorder = graphs()
    steps = []
    Run().epoch(0, engine=engine, after_step=lambda: steps.append(1))
    assert len(steps) == 5
    Run().epoch(0, engine=engine, objective=Twice())
    assert recorder.recorded == 1


@pytest.mark.parametrize("batches", [3, 4])
def test_a_few_batches_are_not_worth_a_recording(batches):
    run, (engine, recorder) = Run(images=5 * batches, dtype=torch.float32), graphs()
    assert len(run.train) == batches
    run.test = run.train
    run.epoch(0, engine=engine)
    run.accuracy(engine=engine)
    assert recorder.recorded == (2 if batches == 4 else 0)


class FakeCuda:
    """Takes the place of torch.cuda in a recorder, and notes what it is asked for.

    full: how many recordings find no memory.
    """

    def __init__(self, full: int = 0) -> None:
        self.calls: list[str] = []
        self.full = full
        outer = self

        class Stream:
            def __init__(self, device=None) -> None:
                pass

            def wait_stream(self, other) -> None:
                outer.calls.append("side waits" if self is not outer.current else "current waits")

        class Graph:
            def capture_begin(self, pool) -> None:
                assert pool == "pool"
                outer.calls.append("begin")

            def capture_end(self) -> None:
                outer.calls.append("end")

            def replay(self) -> None:
                outer.calls.append("replay")

        self.current = Stream()
        self.Stream, self.CUDAGraph = Stream, Graph

    def device(self, device):
        return contextlib.nullcontext()

    def stream(self, stream):
        return contextlib.nullcontext()

    def graph_pool_handle(self):
        return "pool"

    def current_stream(self):
        return self.current

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        self.calls.append("empty")

    def run(self) -> None:
        self.calls.append("run")
        if self.full:
            self.full -= 1
            raise torch.OutOfMemoryError("no room")


RECORDING = ["side waits", "begin", "run", "end", "current waits"]


def cuda_recorder(monkeypatch, fake: FakeCuda) -> CudaRecorder:
    monkeypatch.setattr(cuda_graphs.torch, "cuda", fake)
    recorder = CudaRecorder(CPU)  # whose keeper is a recording too
    fake.calls.clear()
    return recorder


def test_a_recording_keeps_the_cached_memory(monkeypatch):
    fake = FakeCuda()
    recorder = cuda_recorder(monkeypatch, fake)
    replay = recorder.record(fake.run)
    replay()
    assert fake.calls == [*RECORDING, "replay"]


def test_a_recording_that_does_not_fit_is_made_again_without_the_cached_memory(monkeypatch):
    fake = FakeCuda()
    recorder = cuda_recorder(monkeypatch, fake)
    fake.full = 1
    recorder.record(fake.run)
    # The first one is ended as well: else nothing could be recorded any more.
    assert fake.calls == [*RECORDING[:4], "synchronize", "empty", *RECORDING]
    fake.full = 2
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        recorder.record(fake.run)


def test_where_there_are_no_graphs():
    assert Graphs("no", CPU).reason == "not asked for"
    assert Graphs("auto", CPU).reason == "CUDA graphs need a CUDA device, and this one is cpu"
    with pytest.raises(ValueError, match="graphs: expected auto or no here, got yes: CUDA graphs"):
        Graphs("yes", CPU)
    several = Graphs("auto", CPU, processes=2, recorder=CallingRecorder())
    assert several.reason == "2 processes exchange gradients within a step"


def test_a_search_that_cannot_have_graphs_leaves_nothing_behind(tmp_path):
    config = SearchConfig(graphs="yes", device="cpu", train_limit=16)
    with pytest.raises(ValueError, match="graphs: expected auto or no here, got yes"):
        search(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_graphs(precision):
    device = torch.device("cuda")
    plain, other = (Run(device, dtype=torch.float32) for _ in range(2))
    engine = Engine(precision, Graphs("yes", device))
    for number in range(2):
        expected = plain.epoch(number, engine=Engine(precision))
        got = other.epoch(number, engine=engine)
        assert got.loss == pytest.approx(expected.loss, rel=2e-3)
        first, second = plain.accuracy(engine=Engine(precision)), other.accuracy(engine=engine)
        assert abs(first.clean_correct - second.clean_correct) <= 1


# --- One pass over the bytes ----------------------------------------------------------------------


class Ready:
    """A loader's batches as they are, which no pass goes round."""

    def __init__(self, loader) -> None:
        self.loader = loader

    def epoch(self, number):
        return self.loader.epoch(number)


def two_ways(device=CPU, channels=3, **layouts):
    """The same run with its loaders, and with batches that come ready."""
    runs = []
    for ready in (False, True):
        run = Run(device, dtype=torch.float32, channels=channels, **layouts)
        statistics = (torch.tensor([0.3, 0.4, 0.5]), torch.tensor([0.2, 1.5, 0.3]))
        for name, values in zip(("mean", "std"), statistics, strict=True):
            getattr(run.model.normalize, name).copy_(values[:channels].view(-1, 1, 1))
        if ready:
            run.train, run.test = Ready(run.train), Ready(run.test)
        runs.append(run)
    return runs


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes over the bytes."""
    seen = []
    whole = Loader.started
    monkeypatch.setattr(
        Loader, "started", lambda *a, **options: seen.append(len(a[1])) or whole(*a, **options)
    )
    return seen


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_pass_gives_the_bits_of_the_single_operations(device, passes, precision):
    one, other = two_ways(device)
    engine = Engine(precision)
    for number in range(2):
        assert one.epoch(number, engine=engine).loss == other.epoch(number, engine=engine).loss
        first, second = (run.accuracy(number, engine=engine) for run in (one, other))
        assert (first.clean_correct, first.robust_correct) == (
            second.clean_correct, second.robust_correct
        )  # fmt: skip
    for run in (one, other):
        reestimate_batchnorm(
            run.model, run.train, THREAT, count=3, seed=5, cost=run.cost, **run.path, engine=engine
        )
    same(one, other, rtol=0, atol=0)
    # Twice an epoch of five batches and an evaluation of six; then the statistics.
    assert len(passes) == 2 * (5 + 6) + 3
    assert passes[:11] == [5, 5, 5, 5, 2, 4, 4, 4, 4, 4, 2]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("model_layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_one_pass_keeps_the_layout_of_the_maps(passes, channels, layout, model_layout):
    """The layout decides which kernels run, and so how sums round; one channel has both."""
    one, other = two_ways(channels=channels, layout=layout, model_layout=model_layout)
    seen = []
    for run in (one, other):
        strides = []
        note = lambda *given, to=strides: to.append(given[-1].stride())  # noqa: E731
        hook = run.model.stem.register_forward_hook(note)
        run.epoch(0)
        run.accuracy()
        hook.remove()
        seen.append(strides)
    assert seen[0] == seen[1]
    assert passes
    same(one, other, rtol=0, atol=0)


def test_recorded_steps_make_their_own_batches(passes):
    one, other = two_ways()
    counts = []
    for run in (one, other):
        run.set_momentum(0.1)
        engine, recorder = graphs()
        counts.append([])
        for number in range(3):
            run.epoch(number, engine=engine)
            counts[-1].append(run.accuracy(number, engine=engine).robust_correct)
        # A step of training and one of evaluation, once.
        assert recorder.recorded == 2
    assert len(passes) == 3 * (5 + 6)
    assert counts[0] == counts[1]
    same(one, other, rtol=0, atol=0)


class Operations(TorchDispatchMode):
    """Notes each operation with the tensors that it was given and that it made."""

    def __init__(self) -> None:
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.noted.append((function, args, kwargs or {}, result))
        return result


class ReplayingRecorder:
    """Replays the recorded operations on the recorded tensors, as a CUDA graph does.

    Recording runs them, unlike there, so the tests that use it leave the weights alone.
    """

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, function):
        self.recorded += 1
        with Operations() as operations:
            function()

        def replay():
            with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
                for operation, args, kwargs, result in operations.noted:
                    again = operation(*args, **kwargs)
                    for new, old in zip(tree_leaves(again), tree_leaves(result), strict=True):
                        if isinstance(old, torch.Tensor) and new.data_ptr() != old.data_ptr():
                            old.copy_(new)

        return replay


def without_learning(**options) -> Run:
    run = Run(dtype=torch.float32, **options)
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.set_momentum(0.1)
    return run


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_replay_takes_the_draws_and_ids_of_its_epoch(passes, precision):
    recorder = ReplayingRecorder()
    engine = Engine(precision, graphs=Graphs("yes", CPU, recorder=recorder))
    run, eager = without_learning(), without_learning()
    losses = []
    for number in range(4):
        if number == 3:  # what a recorded step has taken for good is recorded anew
            run.train.augment = eager.train.augment = None
        got = run.epoch(number, engine=engine)
        losses.append(eager.epoch(number, engine=Engine(precision)).loss)
        assert got.loss == pytest.approx(losses[-1], rel=1e-6)
        # The extra step of recording has moved the statistics that an evaluation uses.
        run.model.load_state_dict(eager.model.state_dict())
        first, second = run.accuracy(number, engine=engine), eager.accuracy(number)
        if precision == "float32":
            assert (first.clean_correct, first.robust_correct) == (
                second.clean_correct, second.robust_correct
            )  # fmt: skip
    assert len(set(losses)) == 4
    assert recorder.recorded == 3
    assert passes


def test_other_images_and_other_draws_are_recorded_apart():
    recorder = ReplayingRecorder()
    engine = Engine(graphs=Graphs("yes", CPU, recorder=recorder))
    run, eager = without_learning(), without_learning()
    for number in range(3):
        for r in (run, eager):
            images = r.train.images
            if number == 1:  # the same loader
                r.train.images = ImageSet(255 - images.images, images.labels)
            if number == 2:  # the same images
                r.train = Loader(
                    images, range(22), batch_size=5, seed=7, augment=r.train.augment
                )  # fmt: skip
        got, expected = run.epoch(number, engine=engine), eager.epoch(number)
        assert got.loss == pytest.approx(expected.loss, rel=1e-6)
    assert recorder.recorded == 3


def test_an_epoch_within_an_epoch_leaves_its_draws_alone():
    one, other = two_ways()

    def evaluates(run):
        inner = Run(dtype=torch.float32)
        return lambda: evaluate(
            inner.model, run.train, dataclasses.replace(THREAT, bn_mode="eval"), seed=9,
            cost=Cost(), **inner.path,
        )  # fmt: skip

    losses = [run.epoch(1, after_step=evaluates(run)).loss for run in (one, other)]
    assert losses[0] == losses[1]
    same(one, other, rtol=0, atol=0)


def test_a_step_that_is_changed_has_no_start(passes):
    """It belongs to the images, the threat and the draw that it was made for."""
    norms, losses = [], []

    class Reversed(Objective):
        def losses(self, step):
            order = torch.arange(len(step.labels) - 1, -1, -1)
            other = dataclasses.replace(
                step, images=step.images[order], labels=step.labels[order], index=step.index[order]
            )
            for loss, logits in super().losses(other):
                losses.append(loss.item())
                yield loss, logits

    class InABall(Objective):
        def losses(self, step):
            ball = dataclasses.replace(step.threat, norm="l2", epsilon="1/20")
            delta = dataclasses.replace(step, threat=ball).perturb()
            norms.append(delta.flatten(1).norm(dim=1).max())
            yield from super().losses(step)

    for run in two_ways():
        run.epoch(0, objective=Reversed())
        run.epoch(1, objective=InABall())
    assert passes
    assert losses[:5] == losses[5:]
    assert max(norms) <= 0.05 + 1e-6


@pytest.mark.parametrize("auxiliary", [0.0, 0.4])
def test_a_network_with_another_objective_takes_the_pass_too(passes, auxiliary):
    genotype = Genotype.published("ABANDIT_CIFAR_1")
    networks = []
    for ready in (False, True):
        torch.manual_seed(0)
        network = Network(
            genotype, in_channels=3, classes=4, channels=4, cells=3, auxiliary=auxiliary > 0,
            mean=0.4, std=0.3,
        )  # fmt: skip
        run = Run(dtype=torch.float32)
        loader = Ready(run.train) if ready else run.train
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        train_epoch(
            network, loader, 1, optimizer, THREAT, seed=3, cost=Cost(),
            objective=Adversarial(auxiliary),
        )  # fmt: skip
        networks.append(network.state_dict())
    for name, value in networks[0].items():
        assert torch.equal(value, networks[1][name]), name
    assert len(passes) == 5


@pytest.mark.parametrize(
    "threat",
    [
        dataclasses.replace(THREAT, norm="l2"),
        dataclasses.replace(THREAT, random_start=False),
        dataclasses.replace(THREAT, steps=0),
    ],
)
def test_another_attack_takes_batches_as_they_come(passes, threat):
    run = Run(dtype=torch.float32)
    train_epoch(
        run.model, run.train, 0, run.optimizer, threat, seed=3, cost=run.cost, **run.path
    )  # fmt: skip
    assert not passes


def test_what_looks_at_the_model_or_draws_by_itself_takes_batches_as_they_come(passes):
    run = Run(dtype=torch.float32)
    for objective in (Trades(beta=1.0), Free(2)):
        run.epoch(0, objective=objective)
    inputs = []
    note = lambda _, given, *__: inputs.append(given[0])  # noqa: E731
    for module in (run.model, run.model.normalize):
        hook = module.register_forward_hook(note)
        run.epoch(0)
        hook.remove()
    assert all(x.min() >= 0 and x.max() <= 1 for x in inputs)
    for register in (
        run.model.register_full_backward_pre_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        seen, hook = len(inputs), register(note)
        run.epoch(0)
        hook.remove()
        assert len(inputs) > seen
    assert not passes
    run.epoch(0)
    assert passes


def test_another_model_takes_batches_as_they_come(passes):
    class Quantised(Supernet):
        def forward(self, x):
            calls.append(1)
            return super().forward((x * 8).round() / 8)

    calls = []
    run = Run(dtype=torch.float32)
    run.model.__class__ = Quantised
    run.epoch(0)
    assert len(calls) == 5 * 3
    run = Run(dtype=torch.float32)
    run.model.normalize = nn.Identity()
    run.epoch(0)
    run = Run(dtype=torch.float32)
    run.model.forward = lambda x, forward=run.model.forward: calls.append(1) or forward(x)
    run.epoch(0)
    assert len(calls) == 2 * 5 * 3
    run = Run(dtype=torch.float32)
    run.model.double()  # the normalisation turns the images into float64 there
    run.epoch(0)
    assert not passes


def test_a_start_is_taken_once():
    start = Start(torch.zeros(1), torch.ones(1))
    assert start.take() is not None
    assert start.take() is None


def test_an_objective_may_ask_for_its_attack_twice(passes):
    """The second one is drawn again, and so the same."""
    found = []

    class Curious(Objective):
        def losses(self, step):
            found.append((step.perturb().clone(), step.perturb().clone()))
            yield from super().losses(step)

    Run(dtype=torch.float32).epoch(0, objective=Curious())
    assert passes
    assert all(torch.equal(first, second) for first, second in found)
    assert any(first.any() for first, _ in found)


# --- Momentum -------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [True, False])
def test_momentum_that_begins_with_zeros_is_what_sgd_does(foreach):
    def after(fill: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(3)) for _ in range(2)]
        optimizer = torch.optim.SGD(
            parameters, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=foreach
        )
        if fill:
            from fastbandit.training.steps import fill_momentum

            fill_momentum(optimizer)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(3)
            optimizer.step()
        return [*parameters, *(optimizer.state[p]["momentum_buffer"] for p in parameters)]

    for left, right in zip(after(True), after(False), strict=True):
        assert torch.equal(left, right)


# --- Precision ------------------------------------------------------------------------------------


def test_bfloat16_keeps_weights_statistics_and_loss_in_float32(device):
    run = Run(device, dtype=torch.float32)
    seen = []

    class Watch(Objective):
        def losses(self, step):
            for loss, logits in super().losses(step):
                seen.append((loss.dtype, logits.dtype))
                yield loss, logits

    inside = []
    hook = run.model.cells[0].register_forward_hook(lambda *a: inside.append(a[-1][0].dtype))
    result = run.epoch(0, engine=Engine("bfloat16"), objective=Watch())
    hook.remove()
    assert set(inside) == {torch.bfloat16}
    assert set(seen) == {(torch.float32, torch.float32)}
    assert {v.dtype for v in run.model.state_dict().values()} == {torch.float32, torch.int64}
    assert {p.grad.dtype for p in run.path["parameters"] if p.grad is not None} == {torch.float32}
    exact = Run(device, dtype=torch.float32).epoch(0)
    assert result.loss == pytest.approx(exact.loss, rel=0.05)
    assert run.accuracy(engine=Engine("bfloat16")).images == 22
    reestimate_batchnorm(
        run.model, run.train, THREAT, count=2, seed=0, cost=run.cost, **run.path,
        engine=Engine("bfloat16"),
    )  # fmt: skip


def test_precision_is_checked():
    with pytest.raises(ValueError, match="precision: expected one of float32, bfloat16, got 'fp8'"):
        Engine("fp8")


# --- No waiting -----------------------------------------------------------------------------------


class Readings(TorchDispatchMode):
    """Counts the operations that read a number back from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.nonzero.default,
        ):
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recorded", [False, True])
def test_the_host_does_not_wait_within_an_epoch(recorded):
    def readings(images: int) -> tuple[int, int]:
        run = Run(images=images)
        options = {}
        if recorded:
            options["engine"] = graphs()[0]
            # On a CPU, SGD takes a rate that lies in a tensor by reading it.
            run.optimizer = torch.optim.SGD(
                run.path["parameters"], lr=0.05, momentum=0.9, fused=True
            )
        with Readings() as training:
            run.epoch(0, **options)
        with Readings() as evaluation:
            run.accuracy(**options)
        return training.count, evaluation.count

    few, many = readings(10), readings(40)
    assert few == many
    assert few[0] <= 2  # loss and number of correct images, at the end
    assert few[1] <= 2


# --- Exact repetition -----------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes():
    runs = [Run(dtype=torch.float32) for _ in range(2)]
    for run in runs:
        run.epoch(0)
        run.epoch(1)
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert copy.deepcopy(runs[0].accuracy().robust_correct) == runs[1].accuracy().robust_correct
