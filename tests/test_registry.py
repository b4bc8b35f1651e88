"""Components by name: registered, or named outside the code."""

import fractions

import pytest

from d4d_jax import registry


@registry.register("test_family", "half")
def half(numerator: int = 1):
    return fractions.Fraction(numerator, 2)


def test_build_by_name():
    assert registry.build("test_family", {"name": "half", "numerator": 3}) == 1.5
    assert registry.names("test_family") == ("half",)
    registry.register("test_family", "half")(half)  # Importing a module twice is no clash.


def test_build_from_outside():
    spec = {"name": "fractions:Fraction", "numerator": 1, "denominator": 4}
    assert registry.build("test_family", spec) == 0.25


@pytest.mark.parametrize(
    "spec, sentence",
    [
        ({"name": "third"}, "Unknown test_family 'third'; known: half; or name your own"),
        ({"name": "half", "denominator": 3}, "unexpected keyword argument 'denominator'"),
        ({"name": "no.such.module:X"}, "Cannot load the test_family 'no.such.module:X'"),
        ({"name": "math:no_such_name"}, "no_such_name"),
        ({"numerator": 3}, "needs a 'name'"),
    ],
)
def test_bad_names(spec, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        registry.build("test_family", spec)
    assert "\n" not in str(caught.value)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'half' is already"):
        registry.register("test_family", "half")(lambda: None)
