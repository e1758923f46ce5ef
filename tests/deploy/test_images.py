"""The images without a container engine: their steps run in a folder, and the result as a container would run it.

The container is namespaces of our own: the root file system read-only, /tmp a tmpfs, a user
without name, home or capabilities, and trm-serve as process 1.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.deploy.dockerfiles import DEPLOY, ROOT, context, instructions, stages
from tests.test_packaging import locked

DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda"]
INSTALLED = "/opt/trm"  # in the image
PATH = "/usr/local/bin:/usr/bin:/bin"  # the system's Python: a user without a home must be able to start it
PIP = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
UNPRIVILEGED = ["--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


@pytest.mark.parametrize("dockerfile", sorted(DEPLOY.glob("Dockerfile*")), ids=lambda path: path.name)
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    command = Path(sys.executable).parent / "hadolint"
    assert command.exists(), "hadolint is missing; install the extra `deploy`"

    done = subprocess.run([command, "--failure-threshold", "style", dockerfile], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_every_image_keeps_to(dockerfile: Path) -> None:
    *_, final = stages(dockerfile)
    runs = [rest for instruction, rest in instructions(dockerfile) if instruction == "RUN"]

    assert all((ROOT / shlex.split(run)[0]).parent == DEPLOY / "images" for run in runs)
    assert ("USER", "10001:10001") in final
    assert ("STOPSIGNAL", "SIGTERM") in final
    assert ("EXPOSE", "8000") in final
    assert "RUN" not in dict(final)  # the last stage is files
    assert json.loads(dict(final)["ENTRYPOINT"]) == ["trm-serve"]  # no shell between it and the signal


def test_the_images_differ_in_torch_and_the_driver_only() -> None:
    cpu, cuda = (instructions(dockerfile) for dockerfile in DOCKERFILES)

    assert [line for line in cpu if line not in cuda] == [
        ("ARG", "TORCH_INDEX=https://download.pytorch.org/whl/cpu"),
        ("RUN", 'deploy/images/dependencies.sh /opt/trm "${TORCH_INDEX}"'),
    ]
    assert [line for line in cuda if line not in cpu] == [
        ("RUN", "deploy/images/dependencies.sh /opt/trm"),
        ("ENV", "NVIDIA_VISIBLE_DEVICES=all"),
        ("ENV", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"),
    ]


def test_only_what_is_installed_reaches_the_builder() -> None:
    names = {path.parts[0] for path in context()}

    assert names == {
        "LICENSE",
        "README.md",
        "deploy",
        "pyproject.toml",
        "requirements.lock",
        "server",
        "training",
        "trm",
    }
    assert {path.parts[1] for path in context() if path.parts[0] == "deploy"} == {"images", "ray_serve.py"}


@pytest.mark.parametrize("dockerfile", sorted(DEPLOY.glob("Dockerfile*")), ids=lambda path: path.name)
def test_what_is_copied_reaches_the_builder(dockerfile: Path) -> None:
    known = {Path(*path.parts[:depth]) for path in context() for depth in range(1, len(path.parts) + 1)}
    copied = [rest.split() for instruction, rest in instructions(dockerfile) if instruction == "COPY"]

    for *names, _ in copied:
        if "--from=build" not in names:
            assert {Path(name) for name in names if not name.startswith("--")} <= known


class Image:
    """What the steps of a Dockerfile leave, in a folder instead of a root file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env: dict[str, str] = {}
        self.settings: dict[str, str] = {}  # the last line of each other instruction

    def here(self, text: str) -> str:
        return text.replace(INSTALLED, f"{self.folder}{INSTALLED}")

    def build(self, dockerfile: Path) -> None:
        """Follow its instructions; TORCH_INDEX is empty: torch comes from where this machine gets it."""
        source, work = self.folder / "context", self.folder
        for path in context():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, source / path)
        for instruction, rest in instructions(dockerfile):
            match instruction:
                case "WORKDIR":
                    work = self.folder / rest.lstrip("/")
                    work.mkdir(exist_ok=True)
                case "COPY" if not rest.startswith("--from=build"):
                    *names, target = map(self.here, rest.split())
                    for name in names:
                        self._copy(source / name, work / target)
                case "RUN":
                    env = {"PATH": PATH, "HOME": str(self.folder), "TORCH_INDEX": "", **PIP}
                    done = subprocess.run(
                        self.here(rest), shell=True, cwd=work, env=env, capture_output=True, text=True
                    )
                    assert done.returncode == 0, f"RUN {rest}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
                case "ENV":
                    name, _, value = self.here(rest).partition("=")
                    self.env[name] = value
                case _:
                    self.settings[instruction] = self.here(rest)
        shutil.rmtree(source)
        shutil.rmtree(self.folder / "build")

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)

    def command(self, *words: str, **env: str) -> list[str]:
        """What runs `words` in a container of this image."""
        user, group = self.settings["USER"].split(":")
        lock = "mount -t tmpfs -o mode=1777 tmpfs /tmp && mount -o remount,bind,ro / && cd /tmp && exec"
        drop = ["setpriv", "--reuid", user, "--regid", group, *UNPRIVILEGED]
        variables = [f"{name}={value}" for name, value in (self.env | env).items()]
        return [*NAMESPACES, "sh", "-c", f"{lock} {shlex.join([*drop, 'env', '-i', *variables, *words])}"]

    @property
    def entrypoint(self) -> list[str]:
        words: list[str] = json.loads(self.settings["ENTRYPOINT"])
        return words

    @property
    def health_check(self) -> list[str]:
        words: list[str] = json.loads(self.settings["HEALTHCHECK"].partition("CMD ")[2])
        return words


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    assert os.geteuid() == 0, "namespaces like a container's need root: run `make deploy-check` as root"
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))  # not in /tmp, which the container has for itself
    folder.chmod(0o755)
    try:
        image = Image(folder)
        image.build(DEPLOY / "Dockerfile")
        yield image
    finally:
        shutil.rmtree(folder)


def test_the_image_holds_what_the_lock_names_and_nothing_that_only_training_needs(image: Image) -> None:
    pip = [
        f"{image.folder}{INSTALLED}/bin/pip",
        "list",
        "--format",
        "json",
        "--exclude",
        "pip",
        "--exclude",
        "setuptools",
    ]
    listed = json.loads(subprocess.run(pip, capture_output=True, text=True, check=True).stdout)
    found = {canonicalize_name(one["name"]): Version(one["version"]).public for one in listed}
    del found["qwen-trm"]

    assert found.items() <= locked().items()
    assert not found.keys() & {"matplotlib", "tensorboard", "datasets", "accelerate", "pandas", "pyarrow"}


def test_the_container_has_the_command_and_a_read_only_root(image: Image) -> None:
    told = subprocess.run(
        image.command("sh", "-c", "trm-serve --help && touch /opt/x"), capture_output=True, text=True, timeout=120
    )

    assert "usage: trm-serve" in told.stdout
    assert "Read-only file system" in told.stderr


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def test_the_container_serves_is_healthy_and_stops_in_order(image: Image, tmp_path: Path) -> None:
    port = str(free_port())
    address = {"TRM_HOST": "127.0.0.1", "TRM_PORT": port}
    with (tmp_path / "log.txt").open("w") as log:
        container = subprocess.Popen(
            image.command(*image.entrypoint, "--num-threads", "1", **address), stdout=log, stderr=log
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while container.poll() is None and time.monotonic() < deadline and not answers(f"{url}/ready"):
            time.sleep(0.1)
        assert answers(f"{url}/ready"), (tmp_path / "log.txt").read_text()
        (process,) = psutil.Process(container.pid).children()

        asked = httpx.post(f"{url}/solve", json={"question": "Ann has 9 eggs and eats 4. How many are left?"})
        healthy = subprocess.run(image.command(*image.health_check, **address), timeout=60)
        process.terminate()

        assert asked.status_code == 200, asked.text
        assert asked.json()["usage"]["completion_tokens"] > 0
        assert healthy.returncode == 0
        assert container.wait(timeout=60) == 0
        assert "stopped" in (tmp_path / "log.txt").read_text()
        unhealthy = subprocess.run(image.command(*image.health_check, **address), timeout=60, stderr=subprocess.DEVNULL)
        assert unhealthy.returncode != 0
    finally:
        container.kill()
        container.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False
