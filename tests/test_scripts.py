"""The shell scripts: valid, and launch/env.sh does what it says, with a stand-in for uv."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in [
        *ROOT.glob("launch/*.sh"),
        *ROOT.glob("slurm/*.sh"),
        *ROOT.glob("slurm/*.sbatch"),
        *ROOT.glob("tests/slurm/*.sh"),
        ROOT / ".ci/run",
    ]
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_valid_bash(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(script):
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; `bash launch/env.sh --extras test` installs it")
    result = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_constraints_are_names_and_versions_and_cover_every_requirement():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    pinned = {line.split("==")[0] for line in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *(name for extra in extras.values() for name in extra)]
    names = {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in required}
    assert names - pinned == {"glide-ds"}  # an extra may name another


STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$UV_LOG"
case "$1 ${2:-}" in
  "--version ") echo "uv 0" ;;
  "venv "*) mkdir -p .venv/bin && ln -sf "$REAL_PYTHON" .venv/bin/python ;;
  "pip install") case "$*" in *--dry-run*) exit 2 ;; esac; echo " + torch==1" >&2; exit "${UV_FAILS:-0}" ;;
esac
"""

IMPORTED = (
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "open_clip",
    "glide_ds.cli",
    "glide_ds.training.run",
)


class Checkout:
    """A project folder with nothing but what env.sh reads, and a PATH on which uv is a stand-in."""

    def __init__(self, path, with_uv=True):
        self.path, self.log = path / "project", path / "uv.log"
        (self.path / "launch").mkdir(parents=True)
        shutil.copy(ROOT / "launch/env.sh", self.path / "launch")
        for name in ("pyproject.toml", "constraints.txt"):
            (self.path / name).write_text(name)
        # env.sh ends with a look at the real packages; here they are empty ones.
        for module in IMPORTED:
            file = self.path.joinpath(*module.split(".")).with_suffix(".py")
            for folder in file.relative_to(self.path).parents[:-1]:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
                (self.path / folder / "__init__.py").write_text("__version__ = '1'\n")
            file.write_text("")
        with (self.path / "torch" / "__init__.py").open("a") as file:
            file.write("class cuda: device_count = staticmethod(lambda: 0)\n")
        self.bin = path / "bin"
        self.bin.mkdir()
        for tool in ("bash", "env", "cat", "cut", "sha256sum", "dirname", "grep", "rm", "mkdir", "ln", "flock"):
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        if with_uv:
            self.add("uv", STAND_IN)

    def add(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, *arguments, **variables):
        """env.sh as a process that sees nothing of this machine's settings."""
        environment = {
            "PATH": str(self.bin),
            "HOME": str(self.path),
            "UV_LOG": str(self.log),
            "REAL_PYTHON": sys.executable,
            "PYTHONPATH": str(self.path),
        }
        return subprocess.Popen(
            ["bash", "launch/env.sh", *arguments],
            cwd=self.path,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, **variables):
        """The script's result; `self.calls` are the stand-in's, without --version."""
        self.log.write_text("")
        process = self.start(*arguments, **variables)
        result = subprocess.CompletedProcess(arguments, None, *process.communicate())
        result.returncode = process.returncode
        self.calls = [line for line in self.log.read_text().splitlines() if line != "--version"]
        return result

    def installs(self):
        return [call for call in self.calls if "pip install" in call and "--dry-run" not in call]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_env_leaves_the_bytecode_of_what_a_launch_imports_though_none_is_to_be_written(checkout):
    assert checkout.run(PYTHONDONTWRITEBYTECODE="1").returncode == 0
    for module in IMPORTED:
        *folders, name = module.split(".")
        assert list(checkout.path.joinpath(*folders, "__pycache__").glob(f"{name}.*.pyc"))


def test_env_installs_once_and_then_ends_at_once(checkout):
    first = checkout.run()
    assert first.returncode == 0, first.stderr
    assert checkout.calls[0].startswith("venv ")
    assert [call.endswith("--editable .") for call in checkout.installs()] == [True]
    assert "env: ready: glide_ds 1" in first.stdout
    assert "torch==1" not in first.stdout + first.stderr  # the list of packages is not shown
    again = checkout.run()
    assert (again.returncode, again.stdout, checkout.calls) == (0, "", [])


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "launch/env.sh"])
def test_env_installs_again_when_its_inputs_change(checkout, name):
    checkout.run()
    with (checkout.path / name).open("a") as file:
        file.write("\n# changed\n")
    assert checkout.run().returncode == 0
    assert len(checkout.installs()) == 1
    assert not any(call.startswith("venv") for call in checkout.calls)  # the venv itself is kept


def test_extras_are_added_and_stay(checkout):
    checkout.run()
    checkout.run("--extras", "test")
    assert checkout.installs()[0].endswith("--editable .[test]")
    checkout.run()
    assert checkout.calls == []
    (checkout.path / "constraints.txt").write_text("changed")
    checkout.run()
    assert checkout.installs()[0].endswith("--editable .[test]")
    checkout.run("--extras", "report", "--extras", "pack,remote")
    assert checkout.installs()[0].endswith("--editable .[test,report,pack,remote]")


def test_a_broken_venv_is_made_anew(checkout):
    checkout.run()
    (checkout.path / ".venv/bin/python").unlink()
    (checkout.path / ".venv/bin/python").symlink_to("/nonexistent/python")
    assert checkout.run().returncode == 0
    assert checkout.calls[0].startswith("venv ")


def test_a_moved_checkout_is_installed_anew(checkout, tmp_path):
    checkout.run()
    checkout.path = checkout.path.rename(tmp_path / "moved")
    checkout.run()
    assert len(checkout.installs()) == 1


def test_a_failed_installation_is_not_taken_for_done(checkout):
    failed = checkout.run(UV_FAILS="1")
    assert failed.returncode == 1
    assert "the installation failed" in failed.stderr
    assert checkout.run().returncode == 0
    assert len(checkout.installs()) == 1


def test_a_half_done_refresh_is_not_taken_for_done(checkout):
    checkout.run()
    (checkout.path / "constraints.txt").write_text("changed")
    assert checkout.run(UV_FAILS="1").returncode == 1
    (checkout.path / "constraints.txt").write_text("constraints.txt")  # as it was at the first run
    assert checkout.run().returncode == 0
    assert len(checkout.installs()) == 1


def test_a_wished_torch_build_is_not_probed(checkout):
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU, so PyTorch's CPU build is never looked for")
    checkout.run()
    assert any("--dry-run" in call for call in checkout.calls)
    (checkout.path / "constraints.txt").write_text("changed")
    checkout.run(UV_TORCH_BACKEND="cu128")
    assert not any("--dry-run" in call for call in checkout.calls)


PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m pip --version") exit {pip} ;;
  "-m pip install "*)
    while [ "$1" != --target ]; do shift; done
    mkdir -p "$2/bin" && cat "$STAND_IN" >"$2/bin/uv" && "$CHMOD" +x "$2/bin/uv" ;;
  "-m venv "*) exit {venv} ;;
esac
"""


def test_an_absent_uv_is_fetched_into_the_project_by_pip(tmp_path):
    checkout = Checkout(tmp_path, with_uv=False)
    checkout.add("python3", PYTHON.format(pip=0, venv=1))
    (tmp_path / "stand_in").write_text(STAND_IN)
    result = checkout.run(STAND_IN=str(tmp_path / "stand_in"), CHMOD=shutil.which("chmod"))
    assert result.returncode == 0, result.stderr
    assert "fetching uv" in result.stdout
    assert (checkout.path / ".uv/bin/uv").stat().st_mode & stat.S_IXUSR
    assert len(checkout.installs()) == 1


def test_a_machine_without_pip_or_python_is_told_what_to_install(tmp_path):
    checkout = Checkout(tmp_path, with_uv=False)
    result = checkout.run()
    assert result.returncode == 1
    assert "install Python 3.11 or newer" in result.stderr
    checkout.add("python3", PYTHON.format(pip=1, venv=1))
    result = checkout.run()
    assert result.returncode == 1
    assert "apt-get install python3-pip" in result.stderr


def test_a_machine_without_a_fitting_python_is_told(checkout):
    checkout.add("uv", '#!/usr/bin/env bash\n[ "$1" = --version ]\n')
    result = checkout.run()
    assert result.returncode == 1
    assert "no Python 3.11 or newer was found" in result.stderr


@pytest.mark.parametrize("arguments", [["--extra", "test"], ["--extras"], ["test"]])
def test_a_wrong_argument_is_named(checkout, arguments):
    result = checkout.run(*arguments)
    assert result.returncode == 1
    assert arguments[0] in result.stderr
    assert checkout.calls == []


def test_two_runs_at_once_install_once(checkout):
    if shutil.which("flock") is None:
        pytest.skip("flock is not installed; without it env.sh does not lock")
    checkout.add("uv", STAND_IN.replace('"pip install")', '"pip install") "$SLEEP" 0.3;'))
    runs = [checkout.start(SLEEP=shutil.which("sleep")) for _ in range(2)]
    shown = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("waiting for it" in text for text in shown) == 1
    installs = [line for line in checkout.log.read_text().splitlines() if "--editable" in line]
    assert len(installs) == 1
