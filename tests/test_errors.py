"""Errors carry fact, consequence and remedy as fields, over processes too."""

from __future__ import annotations

import pickle

import pytest

from glide_ds.errors import ConfigError, Fault, GlideError


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("x = 3",), "x = 3"),
        (("x = 3", "", "give 4"), "x = 3; give 4"),
        (("x = 3", "nothing trains", "give 4"), "x = 3, so nothing trains; give 4"),
    ],
)
def test_an_error_reads_as_a_sentence(parts, text):
    error = GlideError(*parts)
    assert str(error) == text
    assert error.faults == (Fault(*parts),)


def test_several_faults_are_told_at_once():
    faults = [Fault("a = 1", "", "give 2"), Fault("b = 1", "it would hang", "give 2")]
    assert str(ConfigError.all_of(faults)) == "2 mistakes:\n- a = 1; give 2\n- b = 1, so it would hang; give 2"


def test_an_error_is_the_same_on_another_rank():
    error = ConfigError.all_of([Fault("a"), Fault("b", "c", "d")])
    error.on_all_ranks = True
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is ConfigError
    assert other.faults == error.faults
    assert other.on_all_ranks
    assert str(other) == str(error)
