"""A network of the space, trained for an epoch by the kernels and by the references."""

from __future__ import annotations

import os

import pytest
import torch
from _processes import run

from fastbandit import _native

pytestmark = pytest.mark.skipif(
    not _native.status()["cpu"]["loaded"], reason="the native CPU library is not loaded"
)

PROGRAM = """
import sys
import torch
import torch.nn.functional as F
from fastbandit import space
from fastbandit.nn.supernet import Supernet

torch.manual_seed(0)
torch.set_num_threads(1)
network = Supernet(
    space.get("robust9-light"), in_channels=1, classes=10, channels=8, mean=(0.3,), std=(0.4,)
).to(memory_format=torch.channels_last)
names = network.space.operations
used = [i for i, name in enumerate(names) if name.startswith(("dil", "sep", "conv", "gab"))]
choice = torch.tensor(used)[torch.arange(network.space.rows) % len(used)]
network.set_path(choice)
network.train()
generator = torch.Generator().manual_seed(1)
images = torch.rand(128, 1, 8, 8, generator=generator)
labels = torch.randint(0, 10, (128,), generator=generator)
# Small steps: with a rate of 0.005 images that differ by 1e-6 change the fourth loss by 6 %.
optimizer = torch.optim.SGD(network.path_parameters(), lr=0.0001, momentum=0.9)
losses, gradients = [], []
for first in range(0, 128, 32):
    x = images[first : first + 32].requires_grad_()
    loss = F.cross_entropy(network(x), labels[first : first + 32])
    # What an attack asks for. Its sign is not taken: it would turn a rounding into a step.
    gradients.append(torch.autograd.grad(loss, x, retain_graph=True)[0])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
torch.save((losses, gradients[0], network.state_dict()), sys.argv[1])
"""


def test_an_epoch_agrees_to_rounding(tmp_path):
    results = []
    for backend in ("auto", "reference"):
        target = tmp_path / backend
        environment = {**os.environ, "FASTBANDIT_BACKEND": backend}
        done = run("-c", PROGRAM, str(target), environment=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(target))
    (losses, gradient, state), (expected_losses, expected_gradient, expected_state) = results
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    scale = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-3 * scale)
    for name, value in expected_state.items():
        if value.is_floating_point():
            torch.testing.assert_close(state[name], value, rtol=1e-2, atol=1e-3, msg=name)
