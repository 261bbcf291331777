"""What one may set for an evaluation, and the presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastbandit.attacks._reference import has_reference
from fastbandit.attacks._square import QUERIES
from fastbandit.attacks.registry import ATTACKS, SECTIONS
from fastbandit.config import LATER, SEED, Config, ConfigError, Radius, at_least
from fastbandit.evaluate.plans import Plan, attack_plans
from fastbandit.evaluate.signs import SURROGATES
from fastbandit.runs.session import resolve_device
from fastbandit.threat import ThreatModel, format_fraction, parse_fraction

if TYPE_CHECKING:
    from fastbandit.attacks._apgd import APGDSettings
    from fastbandit.attacks._mifgsm import MIFGSMAttack
    from fastbandit.attacks._pgd import PGDSettings
    from fastbandit.attacks._square import SquareAttack

__all__ = ["PRESETS", "ChecksConfig", "EvaluateConfig"]


@dataclass(frozen=True)
class ChecksConfig:
    """The suspicion checks, on a sample of the images that are classified correctly."""

    images: Annotated[int, at_least(0)] = 128
    """how many; 0 for no checks"""
    steps: Annotated[int, at_least(10)] = 50
    """of the longest attack"""
    queries: Annotated[int, QUERIES] = 200
    """of the black-box attack"""


# Not written in the annotation: Sphinx cannot parse an f-string there, and leaves out all fields.
_NAMES = tyro.conf.arg(help=f"attacks in this order, with commas, of {', '.join(ATTACKS)}")


@dataclass(frozen=True)
class _General(Config):
    """The settings that are no attack's."""

    name: str = "evaluation"
    """part of the folder's name where the model comes from Python"""
    data: str = "digits"
    """'digits' (embedded) or a path: IDX, CIFAR-10 or image folder, .npz file, parquet"""
    image_size: Annotated[int | None, at_least(1), LATER] = None
    """bring all images to N x N pixels: resized, antialiased, and cut to the middle"""
    image_color: Annotated[Literal["rgb", "grey"] | None, LATER] = None
    """make all images rgb or grey"""
    split: Literal["test", "train"] = "test"
    """which images of the data"""
    limit: int | None = None
    """only the first so many images"""
    norm: Literal["linf", "l2"] = "linf"
    """the norm of the perturbation"""
    epsilon: Radius = "auto"
    """radius, for images in [0, 1]; write 8/255 as 8/255; auto: the model's training radius"""
    epsilons: str = ""
    """further radii for a sweep, with commas: 0,2/255,8/255"""
    attacks: Annotated[str, _NAMES] = (
        "fgsm,mifgsm,pgd-7,pgd-20,pgd-40,pgd-100,apgd-ce,apgd-t,square"
    )
    surrogates: Annotated[str, LATER] = ""
    """for a 1-bit network, with commas: the derivatives of the sign that each gradient attack is
    run through, of poly, clip, tanh, identity; parent: made on the network in full precision;
    none given: the derivative that the network was trained with"""
    attack_all: bool = False
    """attack every image with every attack, for a table as in papers; the worst case is the same
    kind of number, at a multiple of the time"""
    seed: Annotated[int, SEED] = 0
    """decides everything random, together with the image's position in the data"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    threads: Annotated[int, at_least(0)] = 0
    """CPU threads, 0: as torch chooses"""
    deterministic: bool | None = None
    """deterministic algorithms only; default: yes on a CPU, no on a GPU"""
    batch_size: Annotated[int, at_least(1)] = 256
    """images in one call of the model"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """what attacks compute in; whatever they find is asked of the float32 model before it counts"""
    channels_last: bool = True
    """lay the network out channels-last, which is faster"""
    cross_check: Literal["none", "auto", "autoattack"] = "none"
    """run the reference AutoAttack (extra eval) on the same images and compare image by image;
    auto: where it is installed and the model has 4 classes or more"""
    cross_check_limit: int | None = None
    """only on the first so many correctly classified images"""
    transfer_from: str | None = None
    """a second model whose adversarial images are tried on this one: a model file, the folder of a
    retraining run, or code that makes it with its weights, my_package.my_module:make_model"""
    transfer_attacks: str = "mifgsm,pgd-20"
    """attacks on that second model"""
    examples: Annotated[int, at_least(0)] = 32
    """adversarial images to keep"""


if TYPE_CHECKING:

    @dataclass(frozen=True)
    class _WithAttacks(_General):
        pgd: PGDSettings = field(default_factory=PGDSettings)
        mifgsm: MIFGSMAttack = field(default_factory=MIFGSMAttack)
        apgd: APGDSettings = field(default_factory=APGDSettings)
        square: SquareAttack = field(default_factory=SquareAttack)
else:
    # One field for each group of settings in the registry; above is what a type checker knows.
    _WithAttacks = dataclasses.make_dataclass(
        "_WithAttacks",
        [(name, kind, field(default_factory=kind)) for name, kind in SECTIONS.items()],
        bases=(_General,),
        frozen=True,
    )


@dataclass(frozen=True)
class EvaluateConfig(_WithAttacks):
    """Everything that decides the result of an evaluation, beside the model."""

    checks: ChecksConfig = field(default_factory=ChecksConfig)

    def check(self) -> None:
        for name in ("limit", "cross_check_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected 1 or more, got {value!r}")
        radius = "0.1" if self.epsilon == "auto" else self.epsilon
        threat = ThreatModel(norm=self.norm, epsilon=radius)
        # The names are checked at radius 0 too, where no attack runs.
        threat = threat if threat.epsilon else dataclasses.replace(threat, epsilon="0.1")
        for setting in ("attacks", "transfer_attacks"):
            self._plans(setting, threat)
        self.sweep()
        names = self.surrogate_names()
        for name in names:
            if name not in SURROGATES or names.count(name) > 1:
                raise ConfigError(
                    f"surrogates: expected names of {', '.join(SURROGATES)}, each once, with "
                    f"commas between them, got {self.surrogates!r}"
                )

    def surrogate_names(self) -> list[str]:
        """Those of :attr:`surrogates`."""
        texts = self.surrogates.split(",") if self.surrogates.strip() else []
        return [text.strip() for text in texts]

    def sweep(self) -> list[ThreatModel]:
        """The further radii, ascending, each once."""
        texts = self.epsilons.split(",") if self.epsilons.strip() else []
        values = sorted({parse_fraction(text, "epsilons") for text in texts})
        return [ThreatModel(norm=self.norm, epsilon=value) for value in values]

    def attack_settings(self) -> dict[str, Any]:
        """The attacks' settings by section."""
        return {section: getattr(self, section) for section in SECTIONS}

    def _plans(self, setting: str, threat: ThreatModel) -> list[Plan]:
        names = getattr(self, setting)
        return attack_plans(names, threat.ball, self.attack_settings(), setting=setting)

    def plans(self, threat: ThreatModel) -> list[Plan]:
        """The attacks at one radius; none at radius 0."""
        return self._plans("attacks", threat) if threat.epsilon else []

    def transfer_plans(self, threat: ThreatModel) -> list[Plan]:
        """The attacks whose images are made on the second model."""
        if not threat.epsilon or self.transfer_from is None:
            return []
        return self._plans("transfer_attacks", threat)

    def resolve(self, training: dict[str, Any] | None = None) -> EvaluateConfig:
        """The same configuration with every ``auto`` replaced by what it means here.

        Args:
            training: what the model file says about its training.

        Raises:
            ConfigError: no such device, or no radius is known.
        """
        device, deterministic = resolve_device(self.device, self.deterministic)
        epsilon = self.epsilon
        if epsilon == "auto":
            threat = (training or {}).get("threat")
            if not isinstance(threat, dict) or threat.get("norm") != self.norm:
                raise ConfigError(
                    f"epsilon: expected a radius such as 8/255, since the model does not say that "
                    f"it was trained for one in the norm {self.norm}; give one: --epsilon, "
                    "or epsilon= from Python"
                )
            epsilon = str(threat["epsilon"])
        epsilon = format_fraction(parse_fraction(epsilon, "epsilon"))
        absent = self.cross_check == "auto" and not has_reference()
        return dataclasses.replace(
            self,
            device=device,
            epsilon=epsilon,
            deterministic=deterministic,
            cross_check="none" if absent else self.cross_check,
        )


# Radii and steps are the ones that the field reports on these data.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "limit": 200,
        "attacks": "fgsm,pgd-20,apgd-ce",
        "apgd": {"steps": 20},
        "checks": {"images": 64, "steps": 20, "queries": 100},
    },
    "standard": {
        "attacks": "apgd-ce,apgd-t,square",
        # On all images it would take longer than all the rest.
        "cross_check": "auto",
        "cross_check_limit": 128,
        "checks": {"images": 256, "steps": 100, "queries": 500},
    },
    # For 1-bit networks: one run through one derivative of the sign finds too little.
    "binary": {
        "attacks": "pgd-50,apgd-ce,square",
        "surrogates": "poly,tanh,parent",
        "pgd": {"restarts": 5},
        "square": {"queries": 1000},
    },
    "digits": {"data": "digits", "epsilon": "0.2", "pgd": {"step_size": "0.02"}},
    "mnist": {
        "data": "mnist",
        "epsilon": "0.3",
        "batch_size": 512,
        "pgd": {"step_size": "0.01"},
    },
    "cifar10": {
        "data": "cifar10",
        "epsilon": "8/255",
        "batch_size": 512,
        "pgd": {"step_size": "2/255"},
    },
}

EvaluateConfig.presets = PRESETS
