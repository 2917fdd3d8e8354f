"""What holds for every test: few threads, no network."""

from __future__ import annotations

import gc
import ipaddress
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ranks import Warm

# Before torch is imported: two pytest processes with a thread per core each would get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without bytecode this process and each that a test starts compile what they import anew: 9 s of CPU.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Beside the packages: what tests keep is nothing of the user's.
os.environ.setdefault("GLIDE_DS_CACHE", str(Path(sys.prefix) / ".cache"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root directory."""
    return Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Any:
    """A test that reaches for the network fails at once, here as on a machine without one."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise AssertionError(f"a test connects to {address[0]!r}; tests use this machine only")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(autouse=True)
def _little_to_collect() -> Any:
    """Every engine's end collects garbage, 0.1 s if that walks all that was made before the test."""
    gc.freeze()
    yield
    gc.unfreeze()


def _is_loopback(host: str) -> bool:
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session")
def group() -> Any:
    """A process group of this one process over gloo, for everything that is collective; returns the device."""
    import torch.distributed as dist

    from glide_ds.environment import read_environment
    from glide_ds.training.zero.group import start_process_group

    before = dict(os.environ)
    read_environment()
    device = start_process_group(timeout_s=60)
    yield device
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def warm_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """What ranks are forked from, see ranks.py; for fixtures, which end the ranks that they start."""
    from ranks import Warm

    warm = Warm(tmp_path_factory.mktemp("warm") / "log.txt")
    yield warm
    warm.close()


@pytest.fixture
def warm(warm_process: Warm) -> Iterator[Warm]:
    """What ranks are forked from; those of a test that failed end with it."""
    yield warm_process
    warm_process.ask("end")


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """moto's S3, which s3fs finds by the environment; (method, path) of every request that reaches it."""
    pytest.importorskip("s3fs", reason="S3 needs s3fs")
    moto = pytest.importorskip("moto.server", reason="the S3 emulator is moto")
    from werkzeug.serving import make_server

    requests: list[tuple[str, str]] = []
    emulator = moto.DomainDispatcherApplication(moto.create_backend_app)

    def counted(environ: dict[str, Any], respond: Any) -> Any:
        requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        return emulator(environ, respond)

    server = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=moto.MotoRequestHandler)
    # Every so often it looks whether it shall end: half a second, if not told otherwise.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield requests
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def trained(group: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short, finished run of phase full with everything switched on; not to be changed."""
    from train_kit import make_config, shake, train_phase

    folder = tmp_path_factory.mktemp("trained")
    log = {
        "every": 2,
        "tensorboard": True,
        "samples_every": 100,
        "sample_prompts": ["a red circle", "a blue square"],
        "sample_steps": 2,
    }
    train = {"steps": 5, "lr_scale": {"gates": 3.0}}
    ema = {"decay": 0.5, "snapshot_every": 2}
    train_phase(make_config(folder, train=train, log=log, checkpoint={"every": 2}, ema=ema), shake)
    return folder
