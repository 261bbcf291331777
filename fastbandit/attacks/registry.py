"""All attacks by name. A new one is a file with a subclass of ``Attack``, and its place here."""

from __future__ import annotations

from collections.abc import Mapping

from fastbandit.attacks._apgd import APGDCEAttack, APGDTAttack
from fastbandit.attacks._attack import Attack, AttackResult
from fastbandit.attacks._mifgsm import MIFGSMAttack
from fastbandit.attacks._pgd import FGSMAttack, PGDAttack
from fastbandit.attacks._square import SquareAttack

__all__ = ["ATTACKS", "SECTIONS", "Attack", "AttackResult", "find_attack"]

#: The attacks by name, in the order in which messages and help list them.
ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (FGSMAttack, MIFGSMAttack, PGDAttack, APGDCEAttack, APGDTAttack, SquareAttack)
}

#: The groups of settings, ``--<section>.*``, each with its dataclass.
SECTIONS: dict[str, type] = {
    attack.section: attack.settings_class() for attack in ATTACKS.values() if attack.section
}


def find_attack(name: str, settings: Mapping[str, object]) -> Attack | None:
    """The attack that ``name`` means, such as ``pgd-20``, with its settings; None for no attack.

    Args:
        settings: by section, an object of the section's dataclass.
    """
    for attack in ATTACKS.values():
        named = attack.parse(name.strip().lower())
        if named is not None:
            return attack.of(settings.get(attack.section), named)
    return None
