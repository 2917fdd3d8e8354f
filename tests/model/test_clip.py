"""The frozen encoder: names, widths, quick-GELU, local files, and what the built-in one has learned."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glide_ds.data import shapes
from glide_ds.errors import ConfigError, WeightsError
from glide_ds.model import clip as clip_module
from glide_ds.model.clip import BUILTIN, FrozenClip, embedding_dim
from glide_ds.model.tensor_files import read_state, write_state

MINI: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def theirs() -> Any:
    """open_clip, imported by the process that runs these tests and not by each that collects them: seconds."""
    import open_clip

    return open_clip


CAPTIONS = ["a red circle", "a small blue square"]


@pytest.fixture(scope="module")
def mini() -> Any:
    torch.manual_seed(0)
    return theirs().CLIP(**MINI).eval()


@pytest.fixture
def description(tmp_path: Path) -> str:
    """An architecture of our own, as a user would give it."""
    (tmp_path / "mini.json").write_text(json.dumps(MINI))
    return str(tmp_path / "mini.json")


@pytest.fixture
def weights(tmp_path: Path, mini: Any) -> str:
    write_state(tmp_path / "mini.safetensors", mini.state_dict())
    return str(tmp_path / "mini.safetensors")


@pytest.fixture(scope="module")
def tiny() -> FrozenClip:
    return FrozenClip(BUILTIN)


# --- names and widths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("ViT-B/32", 512),
        ("ViT-B/16", 512),
        ("ViT-L/14", 768),
        ("ViT-L/14@336px", 768),
        ("ViT-B-32", 512),
        ("vit-l-14", 768),
        ("ViT-L-14-quickgelu", 768),
        ("RN50", 1024),
        (BUILTIN, 64),
    ],
)
def test_widths_of_the_names_people_write(name: str, dim: int) -> None:
    assert embedding_dim(name) == dim


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"ViT-L/41.*ViT-L-14"):
        embedding_dim("ViT-L/41")


def test_an_unknown_tag_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'opnai'.*openai"):
        FrozenClip("ViT-B/32", "opnai")


def test_weights_of_another_width(tmp_path: Path) -> None:
    write_state(tmp_path / "b32.pt", {"text_projection": torch.zeros(512, 512)})
    for call in (embedding_dim, FrozenClip):
        with pytest.raises(WeightsError) as caught:
            call("ViT-L/14", str(tmp_path / "b32.pt"))
        assert "width 512" in str(caught.value)
        assert "clip.model=ViT-L-14 has width 768" in str(caught.value)


def test_weights_of_another_model(tmp_path: Path, description: str, mini: Any) -> None:
    state = mini.state_dict()
    state["visual.more"] = state.pop("visual.conv1.weight")
    state["positional_embedding"] = torch.zeros(9, 16)
    write_state(tmp_path / "x.pt", state)
    with pytest.raises(WeightsError) as caught:
        FrozenClip(description, str(tmp_path / "x.pt"))
    for part in ("1 missing (visual.conv1.weight)", "1 unknown (visual.more)", "(9, 16) instead of (8, 16)"):
        assert part in str(caught.value)


def test_missing_weights_are_not_searched_for(description: str) -> None:
    for path in ("none.pt", "models/none"):
        with pytest.raises(WeightsError, match="no CLIP weights at"):
            FrozenClip(description, path)


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise FileNotFoundError("no network")

    monkeypatch.setattr(clip_module._part("pretrained"), "download_pretrained", offline)
    with pytest.raises(WeightsError, match=r"'openai' of ViT-L-14.*no network.*clip\.weights="):
        FrozenClip("ViT-L/14", "openai")


def test_a_tokenizer_that_cannot_be_had(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str, **__: object) -> None:
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr("open_clip.get_tokenizer", absent)
    monkeypatch.setattr(clip_module, "_architecture", lambda _: ("ViT-B-16-SigLIP", MINI))
    with pytest.raises(ConfigError, match=r"ViT-B-16-SigLIP.*pip install transformers"):
        FrozenClip("ViT-B-16-SigLIP", weights)


def test_a_described_model_with_a_tokenizer_of_its_own_is_not_given_another(
    tmp_path: Path, weights: str
) -> None:
    text = {**MINI["text_cfg"], "hf_tokenizer_name": "org/words"}
    (tmp_path / "own.json").write_text(json.dumps({**MINI, "text_cfg": text}))
    with pytest.raises(ConfigError, match="org/words"):
        FrozenClip(str(tmp_path / "own.json"), weights)


def test_a_model_that_writes_captions_is_refused(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        clip_module, "_architecture", lambda _: ("coca_ViT-L-14", {**MINI, "multimodal_cfg": {}})
    )
    with pytest.raises(ConfigError, match="CoCa"):
        FrozenClip("coca_ViT-L-14", weights)


# --- encoding -----------------------------------------------------------------------------------------------


def reference(model: Any, captions: list[str]) -> torch.Tensor:
    tokens = theirs().tokenizer.SimpleTokenizer(context_length=8)(captions)
    with torch.no_grad():
        return model.encode_text(tokens, normalize=True)


def test_text_equals_open_clips(description: str, weights: str, mini: Any) -> None:
    clip = FrozenClip(description, weights)
    out = clip.encode_text(CAPTIONS)
    assert torch.allclose(out, reference(mini, CAPTIONS), rtol=0, atol=1e-6)
    assert (out.dtype, out.requires_grad, clip.dim, clip.name) == (torch.float32, False, 32, "mini")
    assert clip.encode_text(["", "word " * 100]).isfinite().all()


@pytest.mark.parametrize("source", ["text", "both"])
def test_tokens_may_end_with_the_longest_caption(description: str, weights: str, source: str) -> None:
    clip = FrozenClip(description, weights, source=source)
    tokens = clip.tokenize(CAPTIONS)
    longest = int(tokens.any(0).nonzero().max()) + 1
    assert clip.plain
    assert longest < tokens.shape[1]
    assert torch.allclose(
        clip.encode_tokens(tokens[:, :longest]), clip.encode_text(CAPTIONS), rtol=0, atol=1e-6
    )


def test_images_equal_open_clips(description: str, weights: str, mini: Any) -> None:
    """At the model's own size only the normalisation is left to compare with open_clip's transform."""
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    transform = theirs().image_transform(16, is_train=False)
    from PIL import Image

    prepared = torch.stack([transform(Image.fromarray(image.numpy())) for image in images])
    with torch.no_grad():
        expected = mini.encode_image(prepared, normalize=True)
    clip = FrozenClip(description, weights, source="image")
    assert torch.allclose(clip.encode_image(images), expected, atol=1e-6)
    larger = images.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert clip.encode_image(larger).shape == (2, 32)


def test_half_precision_files_encode_in_float32(tmp_path: Path, description: str, mini: Any) -> None:
    write_state(tmp_path / "half.pt", {k: v.half() for k, v in mini.state_dict().items()})
    clip = FrozenClip(description, str(tmp_path / "half.pt"))
    with torch.autocast("cpu", torch.bfloat16):
        out = clip.encode_text(CAPTIONS)
    assert out.dtype == torch.float32
    assert torch.allclose(out, reference(mini, CAPTIONS), atol=1e-3)


def test_only_the_wanted_tower_is_kept(description: str, weights: str) -> None:
    images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    both = FrozenClip(description, weights)
    for source, method, other in (("text", "encode_text", "image"), ("image", "encode_image", "text")):
        clip = FrozenClip(description, weights, source=source)
        given = CAPTIONS if source == "text" else images
        assert torch.equal(getattr(clip, method)(given), getattr(both, method)(given))
        with pytest.raises(ConfigError, match=f"clip.source={other}"):
            getattr(clip, f"encode_{other}")(images if other == "image" else CAPTIONS)
        size = sum(p.numel() for p in clip._model.parameters())
        assert size < sum(p.numel() for p in both._model.parameters())
    with pytest.raises(ConfigError, match="'audio'"):
        FrozenClip(description, weights, source="audio")


@pytest.mark.parametrize("source", ["text", "image", "both"])
@pytest.mark.parametrize("quick", [True, False])
def test_a_plain_model_leaves_open_clip_unimported(
    tmp_path: Path, quick: bool, source: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip imports torchvision, timm and torch's compiler; the numbers are those of its own model."""
    (tmp_path / "mini.json").write_text(json.dumps({**MINI, "quick_gelu": quick}))
    large = ("open_clip", "torchvision", "timm")
    with monkeypatch.context() as patch:
        patch.setattr(clip_module, "_has_plain_vision", lambda _: False)
        whole = FrozenClip(str(tmp_path / "mini.json"), weights)
        assert isinstance(whole._model, theirs().CLIP)
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] in large]:
            patch.delitem(sys.modules, name)
        clip_module._part.cache_clear()
        clip_module._simple_tokenizer.cache_clear()
        clip = FrozenClip(str(tmp_path / "mini.json"), weights, source=source)
        assert not [name for name in sys.modules if name.split(".")[0] in large]
    if source != "image":
        assert torch.equal(clip.encode_text(CAPTIONS), whole.encode_text(CAPTIONS))
    if source != "text":
        images = torch.randint(256, (3, 20, 20, 3), generator=torch.Generator().manual_seed(0)).byte()
        assert torch.equal(clip.encode_image(images), whole.encode_image(images))


def test_nothing_of_it_trains(description: str, weights: str) -> None:
    clip = FrozenClip(description, weights)
    assert not any(p.requires_grad for p in clip._model.parameters())
    assert not clip._model.training


# --- quick-GELU ---------------------------------------------------------------------------------------------


def is_quick(clip: FrozenClip) -> bool:
    found = any(type(module).__name__ == "QuickGELU" for module in clip._model.modules())
    assert found == clip.quick_gelu
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_openais_archive_gets_quick_gelu_and_is_not_executed(tmp_path: Path, description: str) -> None:
    """OpenAI published TorchScript archives in half precision, with three integers among the weights."""
    torch.manual_seed(0)
    model = theirs().CLIP(**MINI, quick_gelu=True).half().float().eval()
    state = {key: value.half() for key, value in model.state_dict().items()}
    extras = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(8)}
    path = tmp_path / "openai.pt"
    torch.jit.script(Wrapped(state | extras)).save(str(path))
    back = read_state(path)
    assert back.keys() == state.keys() | extras.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    clip = FrozenClip(description, str(path))
    assert is_quick(clip)
    assert torch.allclose(clip.encode_text(CAPTIONS), reference(model, CAPTIONS), rtol=0, atol=1e-6)


class Wrapped(torch.nn.Module):
    """A module tree with the names of a state dict: scripting open_clip's own code is not the point."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in state.items():
            first, _, rest = name.partition(".")
            if rest:
                groups.setdefault(first, {})[rest] = value
            else:
                self.register_buffer(first, value)
        for first, group in groups.items():
            self.add_module(first, Wrapped(group))

    def forward(self) -> int:
        return 0


def test_the_tag_says_so(
    tmp_path: Path, description: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """openai's, metaclip's and others' tags carry quick_gelu; laion2b's does not."""
    monkeypatch.setattr(clip_module._part("pretrained"), "download_pretrained", lambda _: weights)
    for tag, quick in (("openai", True), ("laion2b_s32b_b82k", False)):
        monkeypatch.setattr(clip_module, "_architecture", lambda _: ("ViT-L-14", MINI))
        assert is_quick(FrozenClip("ViT-L/14", tag)) == quick


def test_a_download_that_was_cut_is_removed_and_fetched_again(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the Hugging Face hub's cache has it: a link to a file named by its hash."""
    blob, link = tmp_path / "blob", tmp_path / "open_clip_model.safetensors"
    asked = []

    def download(_: object) -> str:
        asked.append(blob.exists())
        if not blob.exists():
            link.unlink(missing_ok=True)
            blob.write_bytes(Path(weights).read_bytes())
            link.symlink_to(blob)
        return str(link)

    link.symlink_to(blob)
    blob.write_bytes(Path(weights).read_bytes()[:-1000])
    monkeypatch.setattr(clip_module._part("pretrained"), "download_pretrained", download)
    monkeypatch.setattr(clip_module, "_architecture", lambda _: ("ViT-L-14", MINI))
    assert FrozenClip("ViT-L/14", "openai").weights_hash == FrozenClip("ViT-L/14", "openai").weights_hash
    assert asked == [True, False, True]


def test_name_description_and_hash_say_so(
    tmp_path: Path, description: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = FrozenClip(description, weights)
    assert not is_quick(plain)
    assert clip_module._architecture("ViT-L/14-quickgelu")[1]["quick_gelu"]
    with monkeypatch.context() as patch:
        patch.setattr(clip_module, "_openai_hashes", lambda: {plain.weights_hash})
        assert is_quick(FrozenClip(description, weights))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**MINI, "quick_gelu": True}}))
    assert is_quick(FrozenClip(description, weights))


def test_openais_hashes_are_those_of_open_clip() -> None:
    hashes = clip_module._openai_hashes()
    assert len(hashes) >= 9
    assert all(len(h) == 64 and int(h, 16) for h in hashes)


# --- the built-in model -------------------------------------------------------------------------------------


def held_out(count: int) -> Iterator[tuple[torch.Tensor, str]]:
    """Held-out pictures of one object or of one above or left of another: no two captions mean the same."""
    seen: set[str] = set()
    for index in range(shapes.HELD_OUT + 10_000, shapes.HELD_OUT + 20_000):
        scene = shapes.scene(index)
        caption = shapes.caption(scene)
        if caption not in seen and scene.relation in (None, "above", "to the left of"):
            seen.add(caption)
            yield torch.from_numpy(shapes.render(scene, 32)), caption
        if len(seen) == count:
            return


def test_builtin_finds_captions_of_held_out_pictures(tiny: FrozenClip) -> None:
    images, captions = zip(*held_out(128), strict=True)
    image, text = tiny.encode_image(torch.stack(images)), tiny.encode_text(captions)
    similarity = image @ text.T
    right = torch.arange(128)
    assert (similarity.argmax(1) == right).float().mean() > 0.9
    assert (similarity.argmax(0) == right).float().mean() > 0.9
    # A shuffled embedding must be a wrong one: the adapter's worth is measured against it.
    cosine = (text @ text.T)[~torch.eye(128, dtype=torch.bool)]
    assert cosine.abs().mean() < 0.5
    assert cosine.quantile(0.95) < 0.8


def test_builtin_reads_pictures_of_any_size(tiny: FrozenClip) -> None:
    drawn = [shapes.draw(shapes.HELD_OUT + i, 64) for i in range(16)]
    large = tiny.encode_image(torch.from_numpy(np.stack([image for image, _ in drawn])))
    small = tiny.encode_image(
        torch.from_numpy(np.stack([shapes.draw(shapes.HELD_OUT + i, 32)[0] for i in range(16)]))
    )
    assert ((large * small).sum(1) > 0.9).all()


def test_builtin_hash_names_the_file(tiny: FrozenClip) -> None:
    from glide_ds.files import sha256

    assert tiny.weights_hash == sha256(clip_module.BUILTIN_WEIGHTS)
    assert tiny.name == BUILTIN


def test_a_package_without_the_builtin_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clip_module, "BUILTIN_WEIGHTS", tmp_path / "clip.safetensors")
    with pytest.raises(WeightsError, match=r"launch/train_tiny_clip\.py"):
        embedding_dim(BUILTIN)
