"""The names that others import from glide_ds.data, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import glide_ds.data


def test_every_name_is_there() -> None:
    assert set(glide_ds.data.__all__) >= {"decode", "DecodeOptions", "Unusable", "open_shards", "build_source"}
    for name in glide_ds.data.__all__:
        assert getattr(glide_ds.data, name).__name__ == name
    with pytest.raises(AttributeError, match="Sauce"):
        glide_ds.data.Sauce  # noqa: B018


def test_importing_it_imports_no_torch() -> None:
    code = (
        "import sys; import glide_ds.data, glide_ds.data.shapes; from glide_ds.data import Unusable, decode\n"
    )
    code += "assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)
