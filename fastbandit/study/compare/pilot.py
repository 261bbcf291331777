"""The pilot: how much random networks differ, and so how many an arm needs."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, Any

from fastbandit._statistics import components, r_squared, scipy_stats, spearman
from fastbandit.runs.environment import derive_seed
from fastbandit.study.compare.arms import Chance
from fastbandit.study.compare.config import image_range
from fastbandit.study.compare.jobs import Work, attack_job, network_job
from fastbandit.study.compare.power import networks_normal, power_table
from fastbandit.study.compare.protocol import attack_settings, recipe

if TYPE_CHECKING:
    from fastbandit.study.config import StudyConfig

__all__ = ["run_pilot"]


def run_pilot(config: StudyConfig, drawn: Chance, work: Work) -> dict[str, Any] | None:
    """Train random networks by the recipe of the comparison; None where there is no pilot.

    Their accuracy is that on test images which the comparison does not use, or on validation
    images. A network of the comparison is the mean of ``compare.repeats`` trainings, so its
    variance is between^2 + within^2 / repeats.
    """
    compare, pilot = config.compare, config.compare.pilot
    if not pilot.networks:
        return None
    images = image_range(pilot.images, "compare.pilot.images")
    jobs = []
    for number in range(pilot.networks):
        genotype = drawn.random("pilot network", number)
        for repeat in range(pilot.repeats):
            seed = derive_seed(config.seed, "compare", "pilot training", number, repeat)
            jobs.append(
                network_job(
                    "pilot",
                    genotype,
                    recipe(config, compare.epochs, seed),
                    work.folder,
                    protocol=None,
                    keeps=f"pilot-{number}-{repeat}.safetensors" if images else "",
                )
            )
    trained = work.do(jobs)
    robust = [one["validation"]["robust_accuracy"] for one in trained]
    seen = f"validation images, {trained[0]['validation']['attack']}"
    if images is not None:
        attack = attack_settings(config, pilot.attacks)
        attacked = work.do(
            [
                attack_job("pilot, attacked", one, attack, images, work.folder, protocol=None)
                for one in trained
            ]
        )
        robust = [one["robust_accuracy"] for one in attacked]
        seen = f"test images {images[0]} to {images[1] - 1}, {pilot.attacks}"
    r = pilot.repeats
    groups = [robust[i : i + r] for i in range(0, len(robust), r)]
    means = [statistics.fmean(group) for group in groups]
    parameters = [one["parameters"] for one in trained[::r]]
    variance = components(groups)
    sd = math.sqrt(variance.between**2 + variance.within**2 / compare.repeats)
    # Few networks say little about a standard deviation: its upper limit, one-sided, 80 %.
    freedom = len(groups) - 1
    upper = sd * math.sqrt(freedom / float(scipy_stats().chi2.ppf(0.2, freedom)))
    level = compare.first_level
    rank, p = spearman(parameters, means)
    table = []
    if sd > 0:
        table = power_table(
            pilot.differences,
            100 * sd,
            alpha=level,
            power=compare.power,
            simulations=pilot.simulations,
            seed=derive_seed(config.seed, "compare", "power") % 2**32,
        )
        for row in table:
            row["normal_upper"] = networks_normal(
                row["difference"], 100 * upper, alpha=level, power=compare.power
            )
    return {
        "images": seen,
        "networks": [
            {
                "genotype": one["genotype"],
                "parameters": one["parameters"],
                "macs": one["macs"],
                "robust_accuracy": group,
            }
            for one, group in zip(trained[::r], groups, strict=True)
        ],
        "mean": statistics.fmean(means),
        "components": dataclasses.asdict(variance),
        "icc_level": 0.9,
        "repeats": compare.repeats,
        "sd": sd,
        "sd_upper": upper,
        "size": {
            "spearman": rank,
            "p": p,
            "r_squared": r_squared([math.log(size) for size in parameters], means),
        },
        "level": level,
        "power": compare.power,
        "table": table,
        "seconds": sum(one["cost"]["seconds_total"] for one in trained),
    }
