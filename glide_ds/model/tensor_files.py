"""Tensors on disk: read without executing code, written atomically, hashed.

A checkpoint comes from a stranger and Python's pickle runs whatever it is told to, so a file is read by what
its first bytes say, through loaders that build tensors and nothing else.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glide_ds.errors import WeightsError
from glide_ds.files import PathLike, replacing

State = dict[str, Tensor]
PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of weights

ROWS = ".rows"  # NAME.rows int64 [k]: which rows of NAME the file holds; the others are zero
NUM_ROWS = ".num_rows"  # NAME.num_rows int64 [1]: how many rows NAME has once unpacked

# Where trainers put the tensors when a checkpoint also holds an optimizer, a step, …
_NESTS = ("state_dict", "model_state_dict", "model", "module")
# What wrappers (DataParallel, torch.compile, Lightning) put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class StateFile:
    """The tensors of one file by name, and what had to be undone to get at them."""

    path: Path
    tensors: State
    notes: tuple[str, ...] = ()
    scripted: bool = False  # a TorchScript archive, as OpenAI published CLIP


def read_state(path: PathLike) -> State:
    """The tensors of a `.pt` or `.safetensors` file by name, on the CPU, sparse rows unpacked.

    The kind of file is read off its content, not its name. Raises WeightsError for what is missing, truncated,
    no weight file at all, or holds anything but tensors.
    """
    return read_state_file(path).tensors


def read_state_file(path: PathLike) -> StateFile:
    """`read_state` with an account of nesting, prefixes and entries that are not tensors."""
    path = Path(path)
    content, scripted = _read_content(path)
    notes: list[str] = []
    tensors = _strip_prefixes(_only_tensors(_unnest(content, notes), path, notes), notes)
    return StateFile(path, unpack_rows(tensors), tuple(notes), scripted)


def write_state(path: PathLike, state: Mapping[str, Tensor]) -> None:
    """Write tensors to `.pt` or `.safetensors`: complete and on the disk, or the old file stands."""
    path = Path(path)
    standalone = _standalone(state)
    if path.suffix == ".safetensors":
        with _written(path) as partial:
            save_file(standalone, partial, metadata={"format": "pt"})
    elif path.suffix in (".pt", ".pth"):
        # Given a path, torch.save puts its name into the archive; given a file, equal tensors are equal bytes.
        with _written(path) as partial, partial.open("wb") as file:
            torch.save(standalone, file)
    else:
        raise WeightsError(
            f"cannot write weights to {path}: {path.suffix!r} names no format", remedy="use .pt or .safetensors"
        )


def sidecar(path: PathLike) -> dict[str, Any] | None:
    """The JSON beside a weight file (`X.pt.json` of `X.pt`), or None where there is none."""
    place = beside(path)
    if not place.exists():
        return None
    try:
        about = json.loads(place.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{place} is not JSON ({error})", remedy="restore it or delete it") from error
    if not isinstance(about, dict):
        raise WeightsError(
            f"{place} holds a {type(about).__name__}, not an object", remedy="restore it or delete it"
        )
    return about


def write_sidecar(path: PathLike, about: Mapping[str, Any]) -> None:
    """Write the JSON beside the weight file `path`, atomically."""
    with _written(beside(path)) as partial:
        partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def pack_rows(state: Mapping[str, Tensor], names: Iterable[str]) -> State:
    """Keep only the non-zero rows of `names`: NAME [n, …] becomes NAME [k, …], NAME.rows and NAME.num_rows.

    Lossless: the rows left out are zero. A vocabulary of 50257 of which a tiny model uses 30 costs 30 rows.
    """
    packed = dict(state)
    for name in names:
        table = state[name]
        rows = table.flatten(1).count_nonzero(1).nonzero().flatten()
        packed[name] = table[rows]
        packed[name + ROWS] = rows
        packed[name + NUM_ROWS] = torch.tensor([len(table)])
    return packed


def unpack_rows(state: Mapping[str, Tensor]) -> State:
    """The inverse of `pack_rows`; a state without packed tables comes back as it is."""
    full = dict(state)
    for name in [key.removesuffix(ROWS) for key in state if key.endswith(ROWS)]:
        rows, size, table = full.pop(name + ROWS), full.pop(name + NUM_ROWS, None), full.get(name)
        if table is None or size is None or len(rows) != len(table) or not _within(rows, int(size)):
            raise WeightsError(
                f"the packed rows of {name} contradict each other", "the file is damaged", "fetch it again"
            )
        full[name] = table.new_zeros(int(size), *table.shape[1:]).index_copy_(0, rows, table)
    return full


def _within(rows: Tensor, size: int) -> bool:
    return len(rows) == 0 or (int(rows.min()) >= 0 and int(rows.max()) < size)


def beside(path: PathLike) -> Path:
    """The sidecar's place: `X.pt.json` of `X.pt`."""
    path = Path(path)
    return path.with_name(path.name + ".json")


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """`files.replacing` for weights: what keeps them from the disk is a WeightsError."""
    try:
        with replacing(path) as partial:
            yield partial
    except (OSError, SafetensorError, RuntimeError) as error:  # what torch makes of a disk that is full
        why = str(error).partition("\n")[0]
        raise WeightsError(
            f"cannot write {path}: {why}",
            remedy="what stood there before still stands; look whether there is room and permission",
        ) from error


def _standalone(state: Mapping[str, Tensor]) -> State:
    """Contiguous CPU tensors that own their memory: torch.save writes a view's whole storage."""
    seen: set[int] = set()
    out: State = {}
    for name, tensor in state.items():
        copy = tensor.detach().cpu().contiguous()
        storage = copy.untyped_storage()
        if storage.nbytes() != copy.nbytes or (copy.nbytes and storage.data_ptr() in seen):
            copy = copy.clone()
        seen.add(copy.untyped_storage().data_ptr())
        out[name] = copy
    return out


# --- reading ------------------------------------------------------------------------------------------------


def _read_content(path: Path) -> tuple[Any, bool]:
    """What the file holds, and whether it is a TorchScript archive."""
    if path.is_dir():
        raise WeightsError(
            f"{path} is a directory, not a weight file", remedy="name the .pt or .safetensors file in it"
        )
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no weight file at {path}", remedy="check the path") from error
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}", remedy="check its permissions") from error
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path)
    if head[:1] == b"\x80":  # a pickle's protocol mark: torch.save before version 1.6
        return load_tensors(path, mmap=False), False
    if head[8:9] == b"{" and not head.lstrip().startswith((b"{", b"[")):
        return _read_safetensors(path), False
    raise WeightsError(
        f"{path} is not a weight file: {_looks_like(head)}", remedy="give a .pt or .safetensors file"
    )


def _looks_like(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return "it is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        return "it is a web page, perhaps the error page of a failed download"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, `git lfs pull` fetches what it points to"
    return f"it starts with {head[:8]!r}"


def _truncated(path: Path, why: str) -> WeightsError:
    return WeightsError(
        f"{path} is truncated or damaged ({why}, the file has {path.stat().st_size:,} bytes)",
        "nothing was loaded",
        "fetch or export it again",
    )


def _read_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _truncated(path, str(error)) from error


def _read_zip(path: Path) -> tuple[Any, bool]:
    if not zipfile.is_zipfile(path):  # the table of contents is the last thing in a zip
        raise _truncated(path, "its end, where the table of contents belongs, is missing")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        data = [name for name in names if name.endswith("data.pkl")]
        if not data:
            raise WeightsError(
                f"{path} is a zip archive without tensors, not a weight file", remedy="give a .pt file"
            )
        if any(name.endswith("/constants.pkl") for name in names):
            return _read_scripted(archive, data[0].removesuffix("data.pkl"), path), True
    return load_tensors(path, mmap=True), False


class _Ignored:
    """Stands for an object of a known class, of which nothing is kept and no code is called."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def load_tensors(path: Path, *, mmap: bool, known: Sequence[str] = ()) -> Any:
    """What torch.save wrote: tensors and plain values, on the CPU. Objects of the classes `known` are left out.

    A .safetensors file has tensors only, and is memory-mapped always.
    Raises WeightsError where it holds any other object, or is damaged.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in known]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _truncated(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _refused(path: Path, error: pickle.UnpicklingError) -> WeightsError:
    lines = str(error).splitlines()
    what = next((line.strip() for line in lines if "GLOBAL" in line), lines[0] if lines else "unknown")
    return WeightsError(
        f"{path} holds Python objects besides tensors ({what}), and unpickling them can execute code",
        "nothing was loaded",
        "ask for a .safetensors file, or re-save its state dict alone where the file is trusted",
    )


# --- TorchScript archives -----------------------------------------------------------------------------------


class _ScriptObject:
    """A module of a TorchScript archive: its attributes, never its code."""

    def __init__(self, *_: object) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.attributes = dict(state) if isinstance(state, dict) else {}


def _first(value: Any, *_: object) -> Any:
    return value


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_SCRIPT_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.jit._pickle", "build_intlist"): _first,
    ("torch.jit._pickle", "build_doublelist"): _first,
    ("torch.jit._pickle", "build_boollist"): _first,
    ("torch.jit._pickle", "build_tensorlist"): _first,
    ("torch.jit._pickle", "restore_type_tag"): _first,
}


class _ScriptUnpickler(pickle.Unpickler):
    """Reads the attributes of a TorchScript archive; every global outside a short list is refused."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}data.pkl"))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _ScriptObject
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) in _SCRIPT_GLOBALS:
            return _SCRIPT_GLOBALS[module, name]
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, numel = pid
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(self._archive.read(f"{self._root}data/{key}")), dtype=dtype)


def _read_scripted(archive: zipfile.ZipFile, root: str, path: Path) -> State:
    """The parameters and buffers of a TorchScript module, by the names its state_dict would give them."""
    try:
        module = _ScriptUnpickler(archive, root).load()
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except (KeyError, ValueError, RuntimeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise _truncated(path, str(error)) from error
    state: State = {}
    _collect(module, "", state)
    return state


def _collect(module: object, prefix: str, into: State) -> None:
    if not isinstance(module, _ScriptObject):
        return
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            into[prefix + name] = value
        else:
            _collect(value, f"{prefix}{name}.", into)


# --- unwrapping ---------------------------------------------------------------------------------------------


def _unnest(content: Any, notes: list[str]) -> Any:
    """Descend into the entry that holds the tensors, where trainers wrap them."""
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        nest = next((key for key in _NESTS if isinstance(content.get(key), Mapping)), None)
        if nest is None:
            break
        notes.append(f"its tensors were found under {nest!r}")
        content = content[nest]
    return content


def _only_tensors(content: Any, path: Path, notes: list[str]) -> State:
    entries = content if isinstance(content, Mapping) else {}
    tensors = {str(name): value for name, value in entries.items() if isinstance(value, Tensor)}
    if not tensors:
        holds = f"only {sorted(map(str, entries))[:5]}" if entries else type(content).__name__
        raise WeightsError(f"{path} holds no tensors ({holds})", remedy="give the state dict of a model")
    _check_plain(tensors, path)
    if extra := [str(name) for name in entries if str(name) not in tensors]:
        notes.append(f"{len(extra)} entries that are no tensors were passed over ({', '.join(extra[:3])})")
    return tensors


def _check_plain(tensors: State, path: Path) -> None:
    """Refuse tensors that do not hold their numbers one beside the other."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            kind, remedy = "has a shape and no numbers (meta)", "save the model once its weights are loaded"
        elif tensor.is_quantized:
            kind, remedy = f"is quantized ({tensor.dtype})", "save it in fp32, fp16 or bf16"
        elif tensor.layout != torch.strided:
            kind, remedy = f"is stored as {str(tensor.layout).removeprefix('torch.')}", "save it as .to_dense()"
        else:
            continue
        raise WeightsError(f"{path}: {name} {kind}", "it can't be loaded as a weight", remedy)


def check_precision(path: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises WeightsError where the file has whole numbers or 8 bits for what the model `own` has fractions of.

    Such weights mean something only together with scales, which nothing here knows.
    """
    for name, tensor in state.items():
        if name in own and own[name].is_floating_point() and tensor.dtype not in PRECISIONS:
            raise WeightsError(
                f"{path}: {name} is of type {str(tensor.dtype).removeprefix('torch.')}",
                "the model would read its numbers without the scales that belong to them",
                "give the weights in fp32, fp16 or bf16, as they were before they were quantized",
            )


def _strip_prefixes(state: State, notes: list[str]) -> State:
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None):
        notes.append(f"the prefix {prefix!r} was taken off every name")
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
