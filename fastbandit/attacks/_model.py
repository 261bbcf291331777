"""A model as an attack sees it: its mode, what may be fed to it, logits and input gradients."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbandit.threat import parse_whole, plain_number

LARGEST_SEED = 2**63 - 1
_BatchNorm = nn.modules.batchnorm._BatchNorm
_P = ParamSpec("_P")
_R = TypeVar("_R")
_INFERENCE = (
    "expected weights that autograd can use, got a tensor made within torch.inference_mode(); "
    "attack copy.deepcopy(model), made outside of it"
)


def with_autograd(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: ``function`` runs outside ``torch.inference_mode()``, where gradients exist.

    Tensors that were made in inference mode stay as they are: see :func:`normal`. Within a
    transform of ``torch.func``, where values are not known, it raises a ValueError.
    """

    @functools.wraps(function)
    def outside(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise ValueError(
                "attacks and evaluations: expected a call outside of torch.func's transforms "
                "(vmap, grad, jvp), got one within; they take a batch of images by themselves"
            )
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        # Leaving inference mode would also end a no_grad around it.
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside


def normal(tensor: Tensor) -> Tensor:
    """A copy that autograd may save of a tensor made in inference mode; others as they are."""
    return tensor.clone() if tensor.is_inference() else tensor


def kind(value: object) -> str:
    """What a value is, for a message: ``a numpy.ndarray``, ``None``."""
    if value is None:
        return "None"
    cls = type(value)
    home = "" if cls.__module__ == "builtins" else f"{cls.__module__.split('.')[0]}."
    name = f"{home}{cls.__qualname__}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _check_tensor(value: object, name: str, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {kind(value)}")


def check_images(images: Tensor, name: str = "images") -> None:
    """Refuse inputs that are not images in [0, 1]. Reads two numbers back from the device.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: fewer than two dimensions, NaN, or values outside [0, 1].
    """
    _check_tensor(images, name, "a floating-point tensor in [0, 1]")
    if not images.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor in [0, 1], got {images.dtype}")
    if images.dim() < 2:
        raise ValueError(f"{name}: expected shape [N, C, H, W], got {list(images.shape)}")
    if images.numel() == 0:
        return
    low, high = torch.aminmax(images.detach())
    # A comparison written this way is also false for NaN.
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{name}: expected values in [0, 1], got [{float(low):.4g}, {float(high):.4g}]; "
            "normalisation belongs inside the model"
        )


@contextmanager
def attack_mode(
    model: nn.Module,
    bn_mode: str,
    *,
    modules: Iterable[nn.Module] | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Iterator[None]:
    """Put ``model`` into the mode an attack runs in, and back.

    ``bn_mode="eval"``: evaluation mode. ``"train"``: training mode, with batch norm using the
    batch's statistics and leaving the running ones as they are. In both, no parameter requires a
    gradient, so no weight gradient is computed and nothing is saved for one.

    ``modules`` and ``parameters`` name those the forward pass uses (default: all of the model's);
    a supernet that runs one path of many passes that path's.

    Raises:
        ValueError: a parameter was made within ``torch.inference_mode()``.
    """
    train = bn_mode == "train"
    used = list(model.modules() if modules is None else modules)
    # A frozen script has no mode any more: it computes what it was frozen as.
    used = [module for module in used if hasattr(module, "training")]
    modes = [(module, module.training) for module in used]
    tracking = [m for m in used if isinstance(m, _BatchNorm) and m.track_running_stats]
    learning = [
        p
        for p in (model.parameters() if parameters is None else parameters)
        # What is computed from another, as in a copy of a script, has no flag of its own.
        if p.requires_grad and p.is_leaf
    ]
    for parameter in learning:
        if parameter.is_inference():
            raise ValueError(f"model: {_INFERENCE}")
    try:
        for module, was in modes:
            if was is not train:
                module.training = train
        if train:
            for norm in tracking:
                norm.track_running_stats = False
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, was in modes:
            module.training = was
        for norm in tracking:
            norm.track_running_stats = True
        for parameter in learning:
            parameter.requires_grad_(True)


def checked_labels(images: Tensor, labels: Tensor, name: str = "labels") -> Tensor:
    """The labels of ``images`` as int64 [N]. Reads a number back from the device.

    That a label is below the number of classes is checked with the model's first answer.

    Raises:
        TypeError: not a tensor.
        ValueError: not of an integer type, another number, another device, or below 0.
    """
    _check_tensor(labels, name, f"an integer tensor of shape [{images.shape[0]}]")
    if not _integers(labels) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name}: expected integers of shape [{images.shape[0]}], "
            f"got {labels.dtype} of shape {list(labels.shape)}"
        )
    labels = normal(labels).to(torch.int64)
    if labels.device != images.device:
        raise ValueError(f"{name}: expected on {images.device} as the images, got {labels.device}")
    if len(labels) and (least := int(labels.min())) < 0:
        raise ValueError(f"{name}: expected classes, 0 or more, got {least}")
    return labels


def _integers(values: Tensor) -> bool:
    """Whether the type of ``values`` is one of integers, bool apart."""
    other = values.is_floating_point() or values.is_complex() or values.dtype == torch.bool
    return not other


def check_answer(answer: object, images: Tensor) -> Tensor:
    """The model's answer for ``images`` as logits [N, K]; float32 where it is bfloat16 or float16.

    Nothing is read from the device.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape or device, or fewer than two classes.
    """
    n = len(images)
    expected = f"logits, a floating-point tensor of shape [{n}, classes] for {n} images"
    _check_tensor(answer, "model", expected)
    assert isinstance(answer, Tensor)
    if not answer.is_floating_point():
        raise TypeError(f"model: expected {expected}, got {answer.dtype}")
    if answer.dim() != 2 or answer.shape[0] != n or answer.shape[1] < 2:
        raise ValueError(
            f"model: expected {expected} and two classes or more, got shape {list(answer.shape)}"
        )
    if answer.device != images.device:
        raise ValueError(
            f"model: expected logits on {images.device} as the images, got {answer.device}"
        )
    return answer.float() if answer.dtype in (torch.bfloat16, torch.float16) else answer


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the prediction is not the label, bool [N]; so is an answer that is not finite.

    NaN and infinities say nothing of a class, and an argmax over NaN would say class 0.
    """
    return (logits.argmax(1) != labels) | ~logits.isfinite().all(1)


def finite_images(images: Tensor) -> Tensor:
    """Whether all pixels are finite, bool [N]."""
    # A sum of pixels near [0, 1] is finite where they are; it is one pass over the images.
    kept = torch.float64 if images.dtype == torch.float64 else torch.float32
    return images.sum(tuple(range(1, images.dim())), dtype=kept).isfinite()


def check_index(images: Tensor, index: Tensor | None) -> Tensor:
    """The ids of the images, int64 [N]; 0..N-1 for None.

    Raises:
        ValueError: another dtype, shape or device.
    """
    n = images.shape[0]
    if index is None:
        return torch.arange(n, device=images.device)
    _check_tensor(index, "index", f"an int64 tensor of shape [{n}]")
    if index.dtype != torch.int64 or index.shape != (n,) or index.device != images.device:
        raise ValueError(
            f"index: expected int64 of shape [{n}] on {images.device}, one id for each image, "
            f"got {index.dtype} of shape {list(index.shape)} on {index.device}"
        )
    return normal(index)


def aimed(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    index: Tensor | None,
    *,
    target: Tensor | int | None = None,
    batch_size: int | None = None,
    bn_mode: str = "eval",
) -> tuple[Tensor, Tensor, Tensor, Oracle]:
    """What a function that attacks works on, and whom it asks; after the checks above.

    Args:
        labels: None: what the model predicts for the images.
        target: of a targeted attack, the class of each image or of all; the labels are needed for
            nothing then.

    Returns:
        images; what the oracle judges by, the labels, or the classes that are aimed at; ids;
        the oracle.
    """
    # Of the arguments, in the order in which they are written.
    asked = Oracle(model, batch_size=batch_size, bn_mode=bn_mode)
    check_images(images)
    if labels is not None:
        labels = checked_labels(images, labels)
    ids = check_index(images, index)
    images = normal(images.detach())
    if target is not None:
        judged = checked_labels(images, _for_all(target, len(images), images.device), "target")
        if labels is not None and bool((labels == judged).any()):
            raise ValueError(
                "target: expected other classes than the labels, got the label of "
                f"{int((labels == judged).sum())} of {len(images)} images"
            )
    elif labels is None:
        with asked:
            judged = asked.logits(images).argmax(1) if len(images) else ids
    else:
        judged = labels
    return (
        images,
        judged,
        ids,
        Oracle(
            model,
            batch_size=batch_size,
            bn_mode=bn_mode,
            labels=judged,
            targeted=target is not None,
        ),
    )


def _for_all(target: object, n: int, device: torch.device) -> Tensor:
    """The class of each image, where one is given for all; a scalar of numpy or torch, too."""
    if isinstance(target, Tensor) and target.dim():
        return target
    number = plain_number(target)
    if not isinstance(number, int):
        got = target.dtype if isinstance(target, Tensor) else kind(target)
        raise TypeError(f"target: expected a class or a tensor of them, got {got}")
    if number > LARGEST_SEED:
        raise ValueError(f"target: expected a class, got {number}")
    return torch.full((n,), number, dtype=torch.int64, device=device)


#: Loss of each image, [n], from the logits [n, K] and columns that belong to the images.
Loss = Callable[..., Tensor]

# Below this many images, and in a remainder below it, libraries change the order in which they
# sum, so a gradient would depend on which images stand beside it. Batches are filled up to a
# multiple by repeating an image.
_BLOCK = 16


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, [n]."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit less the largest other one, [n]; negative where the model is fooled."""
    own = labels[:, None]
    other = logits.scatter(1, own, -torch.inf).amax(1)
    return logits.gather(1, own)[:, 0] - other


class Oracle:
    """Answers an attack's questions to a model, in batches, and counts them.

    Use it as a context manager: within, the model is in the mode an attack runs in and no
    parameter asks for a gradient. Every answer is checked by :func:`check_answer`. The model gets
    copies, which it may change in place.

    Args:
        model: logits [N, K] for images in [0, 1].
        labels: of all images that will be asked about; each answer must have a class for each.
        batch_size: images in one call of the model; None for all at once.
        precision: what the model computes in; anything but float32 is autocast, and what fools it
            is then asked of the model in float32 before it counts.
        exact: the model that decides what counts, where ``model`` is a faster one that computes
            nearly the same; None is ``model`` itself.
        targeted: the labels that are asked about are classes to reach, not to leave: an image
            counts when the model answers so, and every loss changes its sign.
        bn_mode: as in :func:`attack_mode`. In train mode batches are never cut or filled up,
            since the statistics are the batch's.

    Attributes:
        forward_passes, backward_passes: images that went through the model.
        unconfirmed: ids of images whose success the exact float32 model denied.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: int | None = None,
        precision: torch.dtype = torch.float32,
        bn_mode: str = "eval",
        exact: nn.Module | None = None,
        labels: Tensor | None = None,
        targeted: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {kind(model)}")
        if batch_size is not None:
            batch_size = parse_whole(batch_size, "batch_size", 1)
        if precision not in (torch.float32, torch.bfloat16):
            raise ValueError(f"precision: expected float32 or bfloat16, got {precision}")
        self.model, self.bn_mode, self.precision = model, bn_mode, precision
        self.targeted = targeted
        self.whole = bn_mode == "train"
        self.batch_size = None if self.whole else batch_size
        self.forward_passes = self.backward_passes = 0
        self.unconfirmed: set[int] = set()
        self.exact = model if exact is None else exact
        self._confirms = exact is not None or precision != torch.float32
        self._largest = int(labels.max()) if labels is not None and len(labels) else 0
        self._mode = ExitStack()

    def __enter__(self) -> Oracle:
        for name, tensor in itertools.chain(
            self.model.named_parameters(), self.model.named_buffers()
        ):
            if tensor.is_inference():
                raise ValueError(f"model: {name}: {_INFERENCE}")
        self._mode.enter_context(attack_mode(self.model, self.bn_mode))
        if self.exact is not self.model:
            self._mode.enter_context(attack_mode(self.exact, self.bn_mode))
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.close()

    def _cut(self, n: int) -> list[slice]:
        size = self.batch_size or max(n, 1)
        return [slice(low, min(low + size, n)) for low in range(0, n, size)]

    def _fill(self, rows: Tensor) -> Tensor:
        missing = 0 if self.whole else -len(rows) % _BLOCK
        if not missing:
            return rows
        return torch.cat([rows, rows[-1:].detach().expand(missing, *rows.shape[1:])])

    def _copy(self, rows: Tensor) -> Tensor:
        """``rows`` filled up, in memory of its own."""
        filled = self._fill(rows)
        return filled.clone() if filled is rows else filled

    def _call(self, x: Tensor, *, exact: bool) -> Tensor:
        """The checked answer to ``x``, which the model may overwrite."""
        if exact or self.precision == torch.float32:
            logits = check_answer((self.exact if exact else self.model)(x), x)
        else:
            with torch.autocast(x.device.type, dtype=self.precision):
                logits = check_answer(self.model(x), x)
        if self._largest >= logits.shape[1]:
            name = "target" if self.targeted else "labels"
            raise ValueError(
                f"{name}: expected classes below {logits.shape[1]}, the model's outputs, "
                f"got {self._largest}"
            )
        return logits

    @torch.no_grad()
    def logits(self, x: Tensor, *, exact: bool = False) -> Tensor:
        """Logits [N, K] at ``x``; ``exact``: of the exact model in float32."""
        self.forward_passes += len(x)
        parts = [
            self._call(self._copy(x[part]), exact=exact)[: part.stop - part.start]
            for part in self._cut(len(x))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def gradient(self, x: Tensor, loss: Loss, *columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, K], loss [N], and the gradient of each image's loss, shape of ``x``."""
        self.forward_passes += len(x)
        self.backward_passes += len(x)
        chunks: list[tuple[Tensor, Tensor, Tensor]] = []
        for part in self._cut(len(x)):
            n = part.stop - part.start
            point = x[part].detach().requires_grad_(True)
            with torch.enable_grad():
                logits = self._call(self._copy(point), exact=False)
                filled = (self._fill(column[part]) for column in columns)
                losses = self.value(loss, logits, *filled)
                gradient = None
                if losses.requires_grad:
                    # Of the sum: that of one image does not depend on the others' number.
                    (gradient,) = torch.autograd.grad(losses.sum(), point, allow_unused=True)
            if gradient is None:
                raise ValueError(
                    "model: expected logits with a gradient for the images, got none: they are "
                    "computed without autograd (no_grad, detach, quantised layers, other "
                    "libraries); only black-box attacks such as square need none"
                )
            chunks.append((logits.detach()[:n], losses.detach()[:n], gradient))
        if len(chunks) == 1:
            return chunks[0]
        a, b, c = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return a, b, c

    def value(self, loss: Loss, logits: Tensor, *columns: Tensor) -> Tensor:
        """The loss of each image, [n]; of a targeted attack with the other sign."""
        values = loss(logits, *columns)
        return -values if self.targeted else values

    def _won(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Whether the answer is what the attack is after, bool [N]."""
        if not self.targeted:
            return misclassified(logits, labels)
        return (logits.argmax(1) == labels) & logits.isfinite().all(1)

    def fooled(self, x: Tensor, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """Whether each image fools the exact model in float32, bool [N].

        Args:
            logits: what the model said at ``x``.
            index: ids of the images, to remember those that the exact model denied.
        """
        success = self._won(logits, labels) & finite_images(x)
        if not self._confirms or not bool(success.any()):
            return success
        rows = success.nonzero()[:, 0]
        truth = self._won(self.logits(x[rows], exact=True), labels[rows])
        self.unconfirmed.update(index[rows[~truth]].tolist())
        return success.index_put((rows,), truth)
