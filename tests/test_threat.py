from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbandit.threat import ThreatModel, format_fraction, parse_fraction


def test_epsilon_stays_exact():
    threat = ThreatModel(epsilon="8/255")
    assert threat.epsilon == Fraction(8, 255)
    assert threat.epsilon_value == 8 / 255
    assert threat.to_dict()["epsilon"] == "8/255"
    assert threat.to_dict()["epsilon_value"] == 8 / 255


def test_a_float_is_read_as_it_is_written():
    assert ThreatModel(epsilon=0.3).epsilon == Fraction(3, 10)
    assert ThreatModel(epsilon=0.031).epsilon != ThreatModel(epsilon="8/255").epsilon


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"steps": 1}, 1.25 * 0.2),
        ({"steps": 1, "random_start": False}, 0.2),
        ({"steps": 10}, 2.5 * 0.2 / 10),
        ({"steps": 10, "step_size": "1/50"}, 0.02),
    ],
)
def test_step_size_rule(settings, expected):
    assert ThreatModel(epsilon="0.2", **settings).step_value == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 8}, r"epsilon: expected a value in \[0, 1\].*got 8.*did you mean 8/255\?"),
        ({"epsilon": "8"}, r"did you mean 8/255\?"),
        ({"epsilon": float("nan")}, "epsilon: expected a finite number, got nan"),
        ({"epsilon": "nan"}, "epsilon: expected a number such as 8/255"),
        ({"epsilon": "8/0"}, "epsilon: expected a number such as 8/255"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"step_size": 2.5}, "step_size"),
        ({"step_size": 3}, r"step_size.*did you mean 3/255\?"),
        ({"steps": -1}, "steps: expected a whole number"),
        ({"steps": True}, "steps: expected a whole number"),
        ({"norm": "l1"}, "norm: expected one of linf, l2, got 'l1'"),
        ({"bn_mode": "both"}, "bn_mode: expected one of eval, train"),
        ({"lower": 0.5, "upper": 0.5}, "lower: expected less than upper"),
        ({"upper": float("inf")}, "upper: expected None or a value"),
        ({"random_start": 1}, "random_start"),
    ],
)
def test_what_cannot_mean_anything_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel(**settings)


def test_a_wrong_type_is_a_type_error():
    with pytest.raises(TypeError, match="epsilon: expected a number or text"):
        ThreatModel(epsilon=[0.1])  # type: ignore[arg-type]


def test_frozen():
    with pytest.raises(AttributeError):
        ThreatModel().steps = 3  # type: ignore[misc]


def test_description_names_everything():
    text = ThreatModel(epsilon="8/255", steps=20, step_size="2/255").describe()
    for part in ("PGD-20", "L-infinity", "8/255", "2/255", "random start", "eval mode"):
        assert part in text
    assert "not enforced" in ThreatModel(lower=None, upper=None).describe()
    assert ThreatModel(steps=0).describe() == "clean (no attack)"


def test_attacks():
    assert ThreatModel().attacks
    assert not ThreatModel(steps=0).attacks
    assert not ThreatModel(epsilon=0).attacks


@given(st.fractions(min_value=0, max_value=1, max_denominator=10**6))
def test_fractions_survive_their_text(value):
    assert parse_fraction(format_fraction(value), "x") == value
    assert ThreatModel(epsilon=format_fraction(value)).epsilon == value


@given(st.floats(min_value=0, max_value=1))
def test_floats_survive(value):
    threat = ThreatModel(epsilon=value)
    assert threat.epsilon_value == value
    assert ThreatModel(epsilon=threat.to_dict()["epsilon"]) == threat


@pytest.mark.parametrize(
    "text",
    ["1e99999999", "1e-99999999", "1e9_9_9_9_9_9_9_9", "1e\u0669\u0669\u0669\u0669\u0669\u0669",
     "9" * 500, "1e331", "9" * 399],
)  # fmt: skip
def test_a_short_text_is_no_huge_number(text):
    with pytest.raises(ValueError, match=r"epsilon: expected a number such as 8/255 or 0\.3, got"):
        ThreatModel(epsilon=text, norm="l2")
