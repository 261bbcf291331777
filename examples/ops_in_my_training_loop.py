"""The ops alone, in a training loop of mine: no search, no network of this package.

    python examples/ops_in_my_training_loop.py

A small CNN is trained on the embedded digits against PGD by hand: `random_start` draws the
perturbation, `pgd_step_` takes a step and projects, both in one pass over the batch. The numbers of
a start depend on the seed, the epoch and the image's id, not on the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbandit import ops
from fastbandit.attacks import pgd
from fastbandit.data import load

EPSILON, STEP, STEPS, EPOCHS = 0.1, 0.05, 3, 3
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
    nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adversarial(x: Tensor, y: Tensor, ids: Tensor, epoch: int) -> Tensor:
    """The images after PGD, [N, 1, 8, 8] in [0, 1]."""
    box = {"epsilon": EPSILON, "lower": 0.0, "upper": 1.0}
    delta = ops.random_start(x, seed=0, index=ids, offset=epoch, **box)
    for _ in range(STEPS):
        point = (x + delta).requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(point), y), point)
        ops.pgd_step_(delta, grad, x, step_size=STEP, **box)
    assert delta.abs().max() <= torch.tensor(EPSILON)
    return x + delta


digits = load("digits")
images, labels = digits.train.images[:2000] / 255, digits.train.labels[:2000]
test, truth = digits.test.images[:500] / 255, digits.test.labels[:500]
for epoch in range(EPOCHS):
    for ids in torch.randperm(len(images)).split(64):
        x, y = images[ids], labels[ids]
        loss = F.cross_entropy(model(adversarial(x, y, ids, epoch)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    attacked = pgd(model, test, truth, epsilon=EPSILON, steps=10)
    with torch.no_grad():
        clean, robust = ((model(z).argmax(1) == truth).float().mean() for z in (test, attacked))
    print(f"epoch {epoch + 1}: clean {clean:.1%}, under PGD-10 {robust:.1%}")
