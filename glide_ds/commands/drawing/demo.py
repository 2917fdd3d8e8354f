"""A page to play with a model: prompt, picture prompt, strength, guidance, steps. On this machine alone by default."""

from __future__ import annotations

import argparse
from typing import Any

from PIL import Image

from glide_ds.commands.drawing.drawer import SAMPLER, STEPS, Drawer, load
from glide_ds.diffusion import SAMPLERS
from glide_ds.errors import ConfigError, GlideError

MOST = 16  # pictures at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="an export, a run directory or checkpoint folder, openai, or builtin:tiny"
    )
    parser.add_argument("--upsampler", help="a second model, of kind upsample, that enlarges the pictures")
    parser.add_argument("--ema", action="store_true", help="of a run: by the average of its weights")
    parser.add_argument("--clip_model", metavar="FILE", help="where the CLIP encoder's weights are now")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: whoever can reach this machine can draw")
    parser.add_argument("--port", type=int, default=7860)


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    gradio = find_gradio()
    drawer = load(args.model, args.upsampler, ema=args.ema, clip_model=args.clip_model)
    page = make_page(gradio, drawer, args.model)
    try:
        page.launch(server_name=args.host, server_port=args.port, share=False)
    except OSError as error:
        raise ConfigError(
            f"{args.host}:{args.port} can't be served ({error})", remedy="give another --port"
        ) from error


def find_gradio() -> Any:
    """The library that makes the page. Raises ConfigError where the extra is not installed."""
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the page is made by gradio, which is not installed here ({error.name} is missing)",
            remedy="pip install 'glide_ds[demo]'",
        ) from error
    return gradio


def make_page(gradio: Any, drawer: Drawer, title: str) -> Any:
    """A gradio.Blocks; what is not for this model is not on it."""

    def draw(
        prompt: str,
        image: Image.Image | None,
        clip_scale: float,
        guidance: float,
        steps: float,
        sampler: str,
        seed: float,
        n: float,
    ) -> list[Image.Image]:
        try:
            return drawer(
                prompt.strip(),
                image,
                int(n),
                steps=int(steps),
                guidance=guidance,
                clip_scale=clip_scale,
                sampler=sampler,
                seed=int(seed),
            )
        except GlideError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    has_clip = drawer.base.clip is not None
    with gradio.Blocks(title=f"GLIDE: {title}", analytics_enabled=False) as page:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Textbox(label="Prompt", elem_id="prompt")
                image = gradio.Image(label="Picture prompt, for CLIP", type="pil", visible=has_clip)
                scale = gradio.Slider(0, 1.5, 1.0, label="Strength of CLIP", visible=has_clip)
                guidance = gradio.Slider(1, 10, 3.0, label="Guidance")
                steps = gradio.Slider(1, 250, STEPS, step=1, label="Steps")
                sampler = gradio.Dropdown(list(SAMPLERS), value=SAMPLER, label="Sampler")
                seed = gradio.Number(0, precision=0, minimum=0, label="Seed")
                count = gradio.Slider(1, MOST, 1, step=1, label="Pictures")
                button = gradio.Button("Draw", elem_id="draw")
            gallery = gradio.Gallery(label="Pictures", format="png", elem_id="pictures")
        inputs = [prompt, image, scale, guidance, steps, sampler, seed, count]
        for event in (button.click, prompt.submit):
            event(draw, inputs, gallery, api_name="draw", concurrency_limit=1, concurrency_id="model")
    return page
