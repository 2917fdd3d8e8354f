"""The frozen CLIP encoder whose embeddings condition the adapter, through open_clip.

B captions or pictures, S their side in pixels, D the width of the joint embedding space (512 for ViT-B, 768 for
ViT-L/14). Embeddings have unit length; the adapter scales them as it needs.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from glide_ds.errors import ConfigError, WeightsError
from glide_ds.files import sha256, user_path
from glide_ds.model.tensor_files import State, StateFile, check_precision, read_state_file, sidecar
from glide_ds.types import Batch, send

logger = logging.getLogger(__name__)

BUILTIN = "builtin:tiny"
BUILTIN_WEIGHTS = Path(__file__).parents[1] / "tiny" / "clip.safetensors"
SOURCES = ("text", "image", "both")

# Channel statistics that OpenAI normalised pictures with (Radford et al. 2021); most later models kept them.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# Beside the weights, OpenAI's archives carry three integers that no other checkpoint has.
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
# What a text tower may say of itself to be OpenAI's: most of LAION's are too.
_PLAIN = {"embed_dim", "quick_gelu", "text_cfg", "vision_cfg"}
_PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers"}
_PLAIN_VISION = {"image_size", "layers", "width", "patch_size"}
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


class FrozenClip:
    """Both towers of a CLIP model, or one, without gradients, in float32.

    `model` is a name as people write it ("ViT-B/32", "ViT-L/14", open_clip's "ViT-B-32"), `builtin:tiny`, or
    the path of an open_clip architecture as JSON. `weights` is an open_clip tag ("openai", "laion2b_s32b_b82k",
    …: open_clip downloads it once), or a local file, open_clip's or OpenAI's, read without executing it.
    `source` says which tower to keep: text, image or both.

    OpenAI's weights were trained with quick-GELU, x·σ(1.702x), and give wrong embeddings under the exact GELU.
    It is chosen for a tag or a file known to want it, or by a name that ends in -quickgelu.

    Raises ConfigError for a name or tag that does not exist, WeightsError for weights that do not fit or cannot
    be had.
    """

    def __init__(
        self,
        model: str = "ViT-L/14",
        weights: str = "openai",
        device: torch.device | str = "cpu",
        *,
        source: str = "both",
    ) -> None:
        if source not in SOURCES:
            raise ConfigError(
                f"clip.source {source!r} does not exist", remedy=f"choose one of {', '.join(SOURCES)}"
            )
        found = _find(model, weights)
        self.name = found.name
        self.source = source
        self.device = torch.device(device)
        self.dim: int = found.architecture["embed_dim"]
        self.quick_gelu: bool = bool(found.architecture.get("quick_gelu", False))
        self.weights_hash = found.hash
        self._architecture = found.architecture
        self.tokenize = _tokenizer(found)  # B captions, cut at the context length -> int64 [B, T] on the CPU
        self.plain = _is_plain(found)  # the end of a caption's tokens has no bearing on it
        self.bf16 = False  # matrix products alone; embeddings stay float32
        self._model = _load(found, source).to(self.device)
        self._mean, self._std = (
            torch.tensor(v, device=self.device).view(3, 1, 1) for v in (found.mean, found.std)
        )
        logger.info(
            "CLIP %s from %s: %d-d, %s",
            self.name,
            found.path,
            self.dim,
            "quick-GELU" if self.quick_gelu else "GELU",
        )

    @property
    def image_side(self) -> int:
        """Of the pictures that it reads, in pixels."""
        return image_side(self._architecture)

    def embed(self, batch: Batch) -> Tensor:
        """What conditions a batch: its pictured rows' picture, the others' caption -> float32 [B, D] of unit length."""
        if batch.pictured is None:
            return self.encode_text(batch.captions)
        parts = []
        if texts := [
            text for text, shown in zip(batch.captions, batch.pictured.tolist(), strict=True) if not shown
        ]:
            parts.append(self.encode_text(texts))
        if batch.clip_images is not None:
            parts.append(self.encode_image(batch.clip_images))
        # Row i of the batch is the place of i among captions first, pictures after.
        order = batch.pictured.int().argsort(stable=True).argsort()
        return torch.cat(parts)[send(order, self.device)]

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """B captions, cut at the context length -> float32 [B, D] of unit length."""
        return self.encode_tokens(self.tokenize(list(captions)))

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] of `tokenize` -> float32 [B, D] of unit length. Where `plain`, T may end with the longest."""
        self._has("text")
        encode = self._model.encode_text
        if tokens.shape[1] < self._architecture["text_cfg"].get("context_length", 0):
            encode = self._encode_cut
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return functional.normalize(encode(tokens.to(self.device)).float(), dim=-1)

    def _encode_cut(self, tokens: Tensor) -> Tensor:
        """As open_clip's towers do, which take whole contexts only: no token sees a later one, and the end is read."""
        tower, length = getattr(self._model, "text", self._model), tokens.shape[1]
        x = tower.token_embedding(tokens) + tower.positional_embedding[:length]
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
        ends = x[torch.arange(len(x), device=x.device), tokens.argmax(-1)]
        return ends @ tower.text_projection

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3], any S -> float32 [B, D] of unit length."""
        self._has("image")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return functional.normalize(self._model.encode_image(self._prepare(images)).float(), dim=-1)

    def _prepare(self, images: Tensor) -> Tensor:
        x = images.to(self.device).movedim(3, 1).float() / 255
        if x.shape[-1] != self.image_side:
            sides = (self.image_side, self.image_side)
            x = functional.interpolate(x, sides, mode="bicubic", antialias=True).clamp(0, 1)
        return (x - self._mean) / self._std

    def _has(self, tower: str) -> None:
        if self.source not in (tower, "both"):
            raise ConfigError(
                f"this CLIP encoder keeps its {self.source} tower alone",
                f"it cannot encode {tower}",
                f"set clip.source={tower}, or build it with source='both'",
            )


def image_side(model: str | Mapping[str, Any]) -> int:
    """The side in pixels of the pictures that a model reads, by its name or its architecture.

    Raises ConfigError for an unknown name, and for a model whose pictures are no squares.
    """
    name, architecture = _architecture(model) if isinstance(model, str) else ("", model)
    side = architecture["vision_cfg"]["image_size"]
    if isinstance(side, int):
        return side
    if len(set(side)) > 1:
        raise ConfigError(
            f"the CLIP model {name} reads pictures of {tuple(side)} pixels",
            "they would be squeezed",
            "choose one that reads squares, such as ViT-L/14",
        )
    return int(side[0])


def embedding_dim(model: str, weights: str = "openai") -> int:
    """D of a model, without building or downloading it; a local weight file is checked against the name.

    Raises ConfigError for an unknown name, WeightsError for a local file of another width.
    """
    name, architecture = _architecture(model)
    path = _local(model, weights)
    if path is not None:
        _check_width(read_state_file(path).tensors, architecture, name, path)
    return int(architecture["embed_dim"])


# --- finding ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """Everything needed to build one encoder."""

    name: str
    architecture: dict[str, Any]
    path: Path
    hash: str
    tensors: State
    mean: tuple[float, ...]
    std: tuple[float, ...]


def weights_hash(model: str, weights: str) -> str:
    """The SHA-256 of the file that a FrozenClip would read, without reading its tensors. Raises as that does."""
    name, _ = _architecture(model)
    return sha256(_local(model, weights) or _download(name, weights, _tag(name, weights)))


def _find(model: str, weights: str) -> _Found:
    name, architecture = _architecture(model)
    path = _local(model, weights)
    about: Mapping[str, Any] = {}  # what open_clip knows of a tag: quick_gelu, mean, std
    if path is None:
        about = _tag(name, weights)
        file = _downloaded(name, weights, about)
    else:
        file = read_state_file(path)
    path, digest = file.path, sha256(file.path)
    _check_width(file.tensors, architecture, name, path)
    quick = architecture.get("quick_gelu", False) or about.get("quick_gelu", False)
    if name != BUILTIN:  # of which nobody else's file is known
        quick = quick or _from_openai(file, digest)
    return _Found(
        name,
        {**architecture, "quick_gelu": bool(quick)},
        path,
        digest,
        {key: value for key, value in file.tensors.items() if key not in _OPENAI_EXTRAS},
        tuple(about.get("mean", OPENAI_MEAN)),
        tuple(about.get("std", OPENAI_STD)),
    )


def _open_clip_folder() -> Path:
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "open_clip is not installed", "no CLIP model can be used", "pip install open_clip_torch"
        )
    return Path(spec.origin).parent


@cache  # each phase of a pipeline has an encoder of its own
def _part(name: str) -> ModuleType:
    """A module of open_clip without what the package imports: torchvision, timm and torch's compiler, 1.9 s a rank."""
    if "open_clip" in sys.modules:
        return import_module(f"open_clip.{name}")
    package, vision = ModuleType("open_clip"), ModuleType("torchvision.ops.misc")
    package.__path__ = [str(_open_clip_folder())]
    vision.__dict__["FrozenBatchNorm2d"] = None  # which the image towers alone call
    for module in (package, vision):
        sys.modules.setdefault(module.__name__, module)
    try:
        return import_module(f"open_clip.{name}")
    finally:  # an import of the packages themselves finds nothing left of these
        for key, module in list(sys.modules.items()):
            if key.split(".")[0] == "open_clip" or module is vision:
                del sys.modules[key]


def _architecture(model: str) -> tuple[str, dict[str, Any]]:
    """open_clip's name for a model and its description there, read as data: importing it takes seconds."""
    if model == BUILTIN:
        return model, _builtin_architecture()
    if model.endswith(".json"):
        path = user_path(model)
        return path.stem, _read_architecture(path)
    name = model.strip().replace("@", "-").removesuffix("px").replace("/", "-")
    known = {path.stem.lower(): path for path in (_open_clip_folder() / "model_configs").glob("*.json")}
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3)
        near_names = ", ".join(known[key].stem for key in near) or "ViT-B/32, ViT-B/16, ViT-L/14"
        raise ConfigError(
            f"clip.model {model!r} is no CLIP model that open_clip knows", remedy=f"did you mean {near_names}?"
        )
    path = known[name.lower()]
    return path.stem, _read_architecture(path)


def _builtin_architecture() -> dict[str, Any]:
    about = sidecar(BUILTIN_WEIGHTS)
    if about is None or not BUILTIN_WEIGHTS.exists():
        raise WeightsError(
            f"the built-in CLIP model is missing at {BUILTIN_WEIGHTS}",
            remedy="install the package again, or train it with launch/train_tiny_clip.py",
        )
    return dict(about["model_cfg"])


def _read_architecture(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the CLIP architecture {path}: {error}",
            remedy="give an open_clip architecture, or a name",
        ) from error
    architecture = content.get("model_cfg", content)
    if missing := {"embed_dim", "vision_cfg", "text_cfg"} - set(architecture):
        raise ConfigError(
            f"{path} describes no CLIP model: {', '.join(sorted(missing))} missing",
            remedy="give an open_clip architecture, or a name",
        )
    return dict(architecture)


def _local(model: str, weights: str) -> Path | None:
    """The weight file on this machine, or None where `weights` is a tag to download."""
    if model == BUILTIN:
        return BUILTIN_WEIGHTS
    path = user_path(weights)
    if path.suffix in _SUFFIXES or "/" in weights or path.exists():
        if not path.exists():
            raise WeightsError(
                f"there are no CLIP weights at {path}",
                remedy="correct clip.weights (of an export: sample --clip_model FILE), or give open_clip's tag openai",
            )
        return path
    return None


def _tag(name: str, weights: str) -> Mapping[str, Any]:
    pretrained = _part("pretrained")
    about: Mapping[str, Any] = pretrained.get_pretrained_cfg(name, weights)
    if not about:
        tags = pretrained.list_pretrained_tags_by_model(name)
        raise ConfigError(
            f"open_clip has no weights {weights!r} for {name}",
            remedy="give clip.weights a local file" + (f" or one of {', '.join(tags)}" if tags else ""),
        )
    return about


def _download(name: str, weights: str, about: Mapping[str, Any]) -> Path:
    try:
        return Path(_part("pretrained").download_pretrained(about))
    except (OSError, RuntimeError, ValueError) as error:
        source = about.get("hf_hub") or about.get("url")
        raise WeightsError(
            f"the CLIP weights {weights!r} of {name} are not on this machine and could not be downloaded from "
            f"{source} ({str(error)[:300]})",
            remedy="run once where there is a network, or give a local file by clip.weights=/path/to/weights.pt",
        ) from error


def _downloaded(name: str, weights: str, about: Mapping[str, Any]) -> StateFile:
    """The file of the cache; where it can't be read, anew: the Hugging Face hub's client looks at no hash of it."""
    path = _download(name, weights, about)
    try:
        return read_state_file(path)
    except WeightsError as damage:
        logger.warning("%s: removed and fetched again", damage.faults[0].fact)
        path.resolve().unlink(missing_ok=True)  # the hub's cache has links to files by their hash
        path.unlink(missing_ok=True)
        return read_state_file(_download(name, weights, about))


def _from_openai(file: StateFile, digest: str) -> bool:
    """Whether a file is OpenAI's own, or lies beside a description that asks for quick-GELU."""
    if any(name in file.tensors for name in _OPENAI_EXTRAS):
        return True
    beside = file.path.with_name("open_clip_config.json")
    if beside.exists():
        return bool(_read_architecture(beside).get("quick_gelu", False))
    return digest in _openai_hashes()


def _openai_hashes() -> set[str]:
    """SHA-256 of OpenAI's published CLIP files: the folder of each one's address."""
    known = _part("pretrained")
    urls = (
        known.get_pretrained_url(model, "openai") for model in known.list_pretrained_models_by_tag("openai")
    )
    return {url.split("/")[-2] for url in urls if url}


# --- building -----------------------------------------------------------------------------------------------


def _width(state: Mapping[str, Tensor]) -> int | None:
    """D of a CLIP state dict, read off whichever projection it has."""
    for name, axis in (
        ("text_projection", 1),
        ("text.text_projection", 1),
        ("text_projection.weight", 0),
        ("text.text_projection.weight", 0),
        ("visual.proj", 1),
        ("visual.attnpool.c_proj.weight", 0),
    ):
        if name in state:
            return state[name].shape[axis]
    return None


def _check_width(state: State, architecture: Mapping[str, Any], name: str, path: Path) -> None:
    width = _width(state)
    if width is not None and width != architecture["embed_dim"]:
        raise WeightsError(
            f"{path} holds CLIP weights of width {width}, but clip.model={name} has width "
            f"{architecture['embed_dim']}",
            "its embeddings would not fit",
            f"give the weights of {name}, or the model of the weights (512: ViT-B/32 and ViT-B/16, 768: ViT-L/14)",
        )


class _Bare(TorchFunctionMode):
    """Parameters stay as they are allocated: their weights are loaded next, and ViT-L/14's random ones take 2.4 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _is_plain(found: _Found) -> bool:
    """Whether text is read as OpenAI's models read it, so that for it two modules of open_clip are enough."""
    architecture = found.architecture
    plain = architecture.keys() <= _PLAIN and architecture["text_cfg"].keys() == _PLAIN_TEXT
    return plain and "siglip" not in found.name.lower()


def _has_plain_vision(found: _Found) -> bool:
    """Whether pictures are read as OpenAI's ViT models read them."""
    vision = found.architecture["vision_cfg"]
    return vision.keys() - {"head_width"} == _PLAIN_VISION and isinstance(vision["layers"], int)


def _load(found: _Found, source: str) -> Any:
    if _is_plain(found) and (source == "text" or _has_plain_vision(found)):
        return _load_plain(found, source)
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    model = _build(found.architecture)
    state = convert_state_dict(model, found.tensors)
    if hasattr(model, "text"):
        state = convert_to_custom_text_state_dict(state)
    _check_fit(model.state_dict(), state, found)
    model.load_state_dict(state)
    return _keep_tower(model, source).eval().requires_grad_(False)


class _Towers(nn.Module):
    """A plain model's towers, or one of them, called as open_clip.CLIP calls them."""

    def __init__(self, text: nn.Module | None, visual: nn.Module | None) -> None:
        super().__init__()
        self.text, self.visual = text, visual

    def encode_text(self, tokens: Tensor) -> Tensor:
        assert self.text
        return cast(Tensor, self.text(tokens))

    def encode_image(self, images: Tensor) -> Tensor:
        assert self.visual
        return cast(Tensor, self.visual(images))


def _load_plain(found: _Found, source: str) -> nn.Module:
    transformer, architecture = _part("transformer"), found.architecture
    shared = {
        "output_dim": architecture["embed_dim"],
        "act_layer": transformer.QuickGELU if architecture["quick_gelu"] else nn.GELU,
    }
    text = visual = None
    with _Bare():
        if source != "image":
            text = transformer.TextTransformer(**architecture["text_cfg"], **shared)
        if source != "text":
            vision = dict(architecture["vision_cfg"])
            heads = vision["width"] // vision.pop("head_width", 64)
            visual = transformer.VisionTransformer(**vision, heads=heads, mlp_ratio=4.0, **shared)
    model = _Towers(text, visual).eval().requires_grad_(False)
    named = {
        key.removeprefix("text."): key for key in model.state_dict()
    }  # in the files the text has no prefix
    state = {
        key: value
        for key, value in found.tensors.items()
        if not key.startswith("logit_") and (visual if key.startswith("visual.") else text)
    }
    _check_fit({key: model.state_dict()[name] for key, name in named.items()}, state, found)
    model.load_state_dict({named[key]: value for key, value in state.items()})
    return model


def _build(architecture: Mapping[str, Any]) -> Any:
    """The model as open_clip.create_model builds it, which takes listed names only; weights are still to be loaded."""
    parts = copy.deepcopy(dict(architecture))
    if "multimodal_cfg" in parts:
        raise ConfigError(
            "CoCa models have no plain CLIP encoder", remedy="choose a CLIP model such as ViT-L/14"
        )
    foreign_text = "hf_model_name" in parts["text_cfg"]
    if foreign_text:
        parts["text_cfg"]["hf_model_pretrained"] = False
    custom = parts.pop("custom_text", False) or foreign_text
    import open_clip

    with _Bare():
        return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**parts)


def _check_fit(expected: State, state: State, found: _Found) -> None:
    missing = [name for name in expected if name not in state]
    foreign = [name for name in state if name not in expected]
    other = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if missing or foreign or other:
        first = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:3])})"
            for kind, names in (("missing", missing), ("unknown", foreign), ("of another shape", other))
            if names
        )
        raise WeightsError(
            f"{found.path} does not fit clip.model={found.name}: {first}", remedy="give this model's weights"
        )
    check_precision(found.path, expected, state)


def _keep_tower(model: Any, source: str) -> Any:
    """Drop the tower that will not be used: of ViT-L/14 the image tower alone is 1.2 GB."""
    if source == "text":
        model.visual = None
    elif source == "image":
        for part in ("text", "transformer", "token_embedding"):
            if hasattr(model, part):
                setattr(model, part, None)
    return model


def _tokenizer(found: _Found) -> Callable[[list[str]], Tensor]:
    text = found.architecture["text_cfg"]
    if _is_plain(found):
        return _simple_tokenizer(text["context_length"])
    import open_clip

    listed = found.name in open_clip.list_models()
    if "hf_tokenizer_name" in text and not listed:
        raise ConfigError(
            f"the CLIP architecture {found.name} has a tokenizer of its own, {text['hf_tokenizer_name']}",
            "its captions cannot be encoded",
            "give the model by its name in open_clip",
        )
    try:
        tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(
            found.name if listed else "", context_length=text.get("context_length")
        )
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"clip.model={found.name} has a tokenizer of its own, which cannot be had ({error})",
            remedy="pip install transformers and run once where there is a network, or choose ViT-L/14",
        ) from error
    return tokenizer


@cache  # to read the vocabulary takes 0.1 s
def _simple_tokenizer(context_length: int) -> Callable[[list[str]], Tensor]:
    tokenizer: Callable[[list[str]], Tensor] = _part("tokenizer").SimpleTokenizer(context_length=context_length)
    return tokenizer
