"""The page: drawn through its own client and, where there is one, by a browser without a screen."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glide_ds.cli import main
from glide_ds.commands.drawing.demo import make_page
from glide_ds.commands.drawing.drawer import load

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "builtin:tiny"]) == 2
    assert "pip install 'glide_ds[demo]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    gradio = pytest.importorskip("gradio", reason="the extra demo is not installed")
    page = make_page(gradio, load("builtin:tiny", device="cpu"), "tiny")
    _, address, _ = page.launch(server_name="127.0.0.1", share=False, prevent_thread_lock=True, quiet=True)
    yield address
    page.close()


@pytest.mark.slow
def test_the_page_draws_what_the_package_draws(address: str):
    client = pytest.importorskip("gradio_client").Client(address, verbose=False)
    values = (None, 1.0, 3.0, 2, "dpm++2m", 5, 2)
    drawn = client.predict("a red circle", *values, api_name="/draw")
    expected = load("builtin:tiny", device="cpu")("a red circle", n=2, steps=2, seed=5)
    for found, picture in zip(drawn, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(found["image"])), np.asarray(picture))
    with pytest.raises(Exception, match="there is nothing to draw; give a prompt or an image"):
        client.predict(" ", *values, api_name="/draw")


@pytest.mark.slow
def test_a_browser_draws_a_picture(address: str, tmp_path: Path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        page.goto(address)
        page.fill("#prompt textarea", "a blue square")
        page.click("#draw")
        page.wait_for_selector("#pictures img", timeout=120_000)
        source = page.get_attribute("#pictures img", "src")
        (tmp_path / "x.png").write_bytes(page.request.get(str(source)).body())
    assert Image.open(tmp_path / "x.png").size == (32, 32)
