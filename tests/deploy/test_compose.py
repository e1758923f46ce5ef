"""compose.yaml as the real `docker-compose` reads it, and against what it mounts and names."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from server.draining import LAST_WORDS_S
from server.settings import ServeSettings
from tests.deploy.dockerfiles import DEPLOY, ROOT, instructions

SERVICES = ("server", "prometheus", "grafana")


def compose(**env: str) -> dict[str, Any]:
    command = Path(sys.executable).parent / "docker-compose"
    assert command.exists(), "docker-compose is missing; install the extra `deploy`"
    done = subprocess.run(
        [command, "--file", DEPLOY / "compose.yaml", "config", "--format", "json"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **env},
    )
    assert (done.returncode, done.stderr) == (0, "")
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return compose()


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """What of the repository lies where in the container."""
    return {mount["target"]: Path(mount["source"]) for mount in service["volumes"] if mount["type"] == "bind"}


def inside(service: dict[str, Any], path: str) -> Path:
    """The repository's file that the container sees at this path."""
    target, source = next((t, s) for t, s in mounts(service).items() if path == t or path.startswith(f"{t}/"))
    return source / path.removeprefix(target).lstrip("/")


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(services: dict[str, Any], name: str) -> None:
    service = services[name]

    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    assert {port["host_ip"] for port in service["ports"]} == {"127.0.0.1"}
    for source in mounts(service).values():
        assert source.is_relative_to(DEPLOY)
        assert source.exists()


def test_the_server_takes_its_settings_and_has_time_to_drain(
    services: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = services["server"]
    for name, value in server["environment"].items():
        monkeypatch.setenv(name, value)
    unset = ServeSettings.from_command_line(server.get("command") or [])
    given = compose(TRM_MODEL="/model", TRM_MODEL_DIR="/srv/checkpoint", TRM_API_KEY="one,two")["server"]
    for name, value in given["environment"].items():
        monkeypatch.setenv(name, value)
    set_ = ServeSettings.from_command_line(given.get("command") or [])
    (port,) = server["ports"]

    assert set(server["environment"]) <= {f"TRM_{name.upper()}" for name in ServeSettings.model_fields}
    assert (unset.model, unset.keys()) == (None, [])
    assert (set_.model, set_.keys()) == ("/model", ["one", "two"])
    assert "/metrics" in set_.public_paths
    assert server["init"]
    assert unset.drain_seconds + LAST_WORDS_S < int(server["stop_grace_period"].removesuffix("s"))
    assert ("EXPOSE", str(port["target"])) in instructions(DEPLOY / "Dockerfile")
    assert mounts(given) == {"/model": Path("/srv/checkpoint")}


def test_the_server_is_built_from_this_repository_and_has_its_version(services: dict[str, Any]) -> None:
    build, image = services["server"]["build"], services["server"]["image"]

    assert Path(build["context"]) == ROOT
    assert (ROOT / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert f'version = "{image.partition(":")[2]}"' in (ROOT / "pyproject.toml").read_text()


def test_prometheus_finds_its_configuration_and_the_server(services: dict[str, Any]) -> None:
    flags = dict(flag.split("=", 1) for flag in services["prometheus"]["command"])
    config = yaml.safe_load(inside(services["prometheus"], flags["--config.file"]).read_text())
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}

    assert jobs["qwen-trm"] == [f"server:{services['server']['ports'][0]['target']}"]
    assert flags["--storage.tsdb.path"] in {mount["target"] for mount in services["prometheus"]["volumes"]}


def test_grafana_finds_prometheus_and_the_dashboard(services: dict[str, Any]) -> None:
    grafana = services["grafana"]
    provisioning = inside(grafana, "/etc/grafana/provisioning")
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "dashboards.yaml").read_text())["providers"]
    address = urlsplit(source["url"])

    assert (address.hostname, address.port) == ("prometheus", services["prometheus"]["ports"][0]["target"])
    home = inside(grafana, grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.is_file()
    assert home.parent == inside(grafana, provider["options"]["path"])
