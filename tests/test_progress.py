import pytest

from gaussians.progress import Clock
from gaussians.stages import Stage

STAGES = {
    "coarse": Stage(steps=4, low_steps=2, low_scale=0.5),
    "fine": Stage(steps=10, low_steps=0),
}


def test_steps_to_come_cost_what_their_kind_did():
    clock = Clock(STAGES)
    for step, seconds in enumerate([1.0, 1.0, 3.0, 3.0, 90.0, 2.0, 2.0], 1):
        clock.note(step, seconds)  # Step 5 was compiled: the median forgets it.
    assert clock.remaining(3) == pytest.approx(3 + 10 * 2)
    assert clock.remaining(7) == pytest.approx(7 * 2.0)
    for step in range(8, 15):
        clock.note(step, 2.0)
    assert clock.remaining(14) == 0


def test_kinds_that_have_not_come_grow_with_the_side_of_the_image():
    clock = Clock(STAGES)
    clock.note(1, 1.0)
    # One more small step, and 2 + 10 of twice the side.
    assert clock.remaining(1) == pytest.approx(1 + 12 * 2)


def test_a_resumed_run_starts_in_the_middle():
    clock = Clock(STAGES)
    clock.note(13, 0.5)
    assert clock.remaining(13) == pytest.approx(0.5)


def test_only_the_last_steps_of_a_kind_count():
    clock = Clock({"fine": Stage(steps=200)})
    for step in range(1, 101):
        clock.note(step, 1.0)
    for step in range(101, 151):
        clock.note(step, 3.0)
    assert clock.remaining(150) == pytest.approx(150.0)


def test_a_stage_at_low_resolution_alone():
    clock = Clock({"coarse": Stage(steps=3, low_steps=600, low_scale=0.25)})
    clock.note(1, 2.0)
    assert clock.remaining(1) == pytest.approx(4.0)
