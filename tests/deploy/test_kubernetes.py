"""The manifests, rendered: valid by Kubernetes' schemas, and in agreement with what they deploy."""

import asyncio
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

from server.app import create_app
from server.draining import LAST_WORDS_S
from server.metrics import Metrics
from server.settings import ServeSettings
from tests.server.conftest import FakeEngine
from trm.settings import ENV_PREFIX

with warnings.catch_warnings(action="ignore"):  # pydantic's, of Ray
    import ray_serve
    from ray.serve.schema import ServeDeploySchema

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
VERSIONS = ("1.29", kubernetes_validate.latest_version())
BYTES = {"Mi": 2**20, "Gi": 2**30}
Objects = Mapping[str, dict[str, Any]]


def render(folder: Path) -> Objects:
    """The objects of a kustomization by kind; each kind occurs once."""
    kubectl = Path(sys.executable).parent / "kubectl"
    assert kubectl.exists(), "kubectl is missing; install the extra `deploy`"
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    objects = list(yaml.safe_load_all(done.stdout))
    by_kind = {item["kind"]: item for item in objects}
    assert len(by_kind) == len(objects)
    return by_kind


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def overlay(request: pytest.FixtureRequest) -> Objects:
    return render(KUBERNETES / "overlays" / request.param)


@pytest.fixture(scope="module", params=COMPONENTS)
def extended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Objects:
    """The overlay for CPUs with one of the components."""
    copy = tmp_path_factory.mktemp("kustomize") / "kubernetes"
    shutil.copytree(KUBERNETES, copy)
    kustomization = copy / "mine" / "kustomization.yaml"
    kustomization.parent.mkdir()
    wanted = {"resources": ["../overlays/cpu"], "components": [f"../components/{request.param}"]}
    kustomization.write_text(yaml.safe_dump(wanted))
    return render(kustomization.parent)


def pod_of(objects: Objects) -> dict[str, Any]:
    return dict(objects["Deployment"]["spec"]["template"]["spec"])


def container_of(objects: Objects) -> dict[str, Any]:
    (container,) = pod_of(objects)["containers"]
    return dict(container)


def settings_of(container: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, keys: Path) -> ServeSettings:
    """What `trm-serve` makes of the container's environment; each variable of ours has to be a setting."""
    keys.write_text("key\n")
    for variable in container["env"]:
        name, value = variable["name"], variable["value"]
        if name.startswith(ENV_PREFIX):
            assert name.removeprefix(ENV_PREFIX).lower() in ServeSettings.model_fields
            monkeypatch.setenv(name, str(keys) if name == "TRM_API_KEY_FILE" else value)
    return ServeSettings.from_command_line(container.get("args", []))


@pytest.fixture
def settings(overlay: Objects, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ServeSettings:
    return settings_of(container_of(overlay), monkeypatch, tmp_path / "keys")


def statuses(settings: ServeSettings, *paths: str) -> list[int]:
    """What a server that is starting answers to one without a key."""

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(create_app(None, settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [(await client.get(path)).status_code for path in paths]

    return asyncio.run(ask())


def size(quantity: str) -> int:
    return int(quantity[:-2]) * BYTES[quantity[-2:]]


def validate(objects: Objects) -> None:
    for item in objects.values():
        if not item["apiVersion"].startswith("monitoring.coreos.com/"):  # a custom resource: no schema
            for version in VERSIONS:
                kubernetes_validate.validate(item, version, strict=True)


def test_overlays_are_valid(overlay: Objects) -> None:
    validate(overlay)
    assert set(overlay) == {
        "Deployment",
        "Service",
        "HorizontalPodAutoscaler",
        "PodDisruptionBudget",
        "NetworkPolicy",
    }


def test_the_validation_refuses_what_kubernetes_would(overlay: Objects) -> None:
    wrong = yaml.safe_load(yaml.safe_dump(overlay["Deployment"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exce"] = {}

    with pytest.raises(kubernetes_validate.ValidationError):
        validate({"Deployment": wrong})


def test_components_are_valid(extended: Objects) -> None:
    validate(extended)


def test_selectors_find_the_pods(overlay: Objects) -> None:
    labels = overlay["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert overlay["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels
    assert overlay["Service"]["spec"]["selector"].items() <= labels
    assert overlay["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels
    assert overlay["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels
    (spread,) = pod_of(overlay)["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= labels
    target = overlay["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", overlay["Deployment"]["metadata"]["name"])


def test_ports_lead_to_the_server(overlay: Objects, settings: ServeSettings) -> None:
    (port,) = container_of(overlay)["ports"]
    assert (port["containerPort"], settings.host) == (settings.port, "0.0.0.0")
    assert overlay["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    (rule,) = overlay["NetworkPolicy"]["spec"]["ingress"]
    assert [allowed["port"] for allowed in rule["ports"]] == [port["name"]]
    assert rule["from"], "an empty list lets everybody in"


def test_probes_ask_routes_that_exist_and_need_no_key(overlay: Objects, settings: ServeSettings) -> None:
    container = container_of(overlay)
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/health",
        "liveness": "/health",
        "readiness": "/ready",
    }
    assert {probe["port"] for probe in probes.values()} == {container["ports"][0]["name"]}
    assert statuses(settings, "/health", "/ready", "/version") == [200, 503, 401]  # while the model loads


def test_a_pod_has_time_to_drain(overlay: Objects, settings: ServeSettings) -> None:
    command, seconds = container_of(overlay)["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    grace = pod_of(overlay)["terminationGracePeriodSeconds"]
    assert grace >= int(seconds) + settings.drain_seconds + LAST_WORDS_S


def test_an_update_takes_no_pod_away_before_another_is_ready(overlay: Objects) -> None:
    strategy = overlay["Deployment"]["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    autoscaler, budget = overlay["HorizontalPodAutoscaler"]["spec"], overlay["PodDisruptionBudget"]["spec"]
    assert 0 < budget["maxUnavailable"] < autoscaler["minReplicas"] < autoscaler["maxReplicas"]
    assert "replicas" not in overlay["Deployment"]["spec"], "each apply would undo the autoscaler's choice"


def test_the_autoscaler_asks_for_a_metric_of_ours_that_the_adapter_offers(overlay: Objects) -> None:
    (metric,) = overlay["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert metric["type"] == "Pods"
    (rule,) = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    labels = re.findall(r'(\w+)!=""', rule["seriesQuery"])
    assert rule["seriesQuery"].partition("{")[0] == name
    assert set(labels) == set(rule["resources"]["overrides"])
    metrics = Metrics()
    metrics.watch(FakeEngine(), lambda: True)
    assert name in {family.name for family in metrics.registry.collect()}


def test_nothing_may_be_written_but_tmp(overlay: Objects) -> None:
    pod, container = pod_of(overlay), container_of(overlay)
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["/tmp"]


def test_keys_come_from_a_secret_and_the_server_is_never_open(overlay: Objects, settings: ServeSettings) -> None:
    pod, container = pod_of(overlay), container_of(overlay)
    (file,) = [variable["value"] for variable in container["env"] if variable["name"] == "TRM_API_KEY_FILE"]
    mount = next(mount for mount in container["volumeMounts"] if file.startswith(mount["mountPath"] + "/"))
    volume = next(volume for volume in pod["volumes"] if volume["name"] == mount["name"])
    assert volume["secret"]["secretName"]
    assert not volume["secret"].get("optional"), "without its secret a pod must not start"
    assert settings.keys() == ["key"]


def test_what_the_server_takes_fits_into_the_pod(overlay: Objects, settings: ServeSettings) -> None:
    resources = container_of(overlay)["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert settings.num_threads == int(resources["requests"]["cpu"])  # the default is the machine's cores
    if settings.device == "cuda":
        assert resources["limits"]["nvidia.com/gpu"] == "1"
        assert pod_of(overlay)["tolerations"]
        assert container_of(overlay)["image"].endswith("-cuda")
    else:
        assert settings.kv_cache_bytes is not None
        assert settings.kv_cache_bytes <= size(resources["limits"]["memory"]) / 2


def test_only_the_hub_component_lets_a_pod_out() -> None:
    egress = {
        name: render(KUBERNETES / "overlays" / name)["NetworkPolicy"]["spec"]["egress"] for name in ("cpu", "gpu")
    }
    assert egress == {"cpu": [], "gpu": []}


@pytest.mark.parametrize("extended", ["hub"], indirect=True)
def test_the_hub_can_be_reached_where_it_is_asked_for(extended: Objects) -> None:
    ports = [port["port"] for rule in extended["NetworkPolicy"]["spec"]["egress"] for port in rule["ports"]]
    environment = {variable["name"]: variable["value"] for variable in container_of(extended)["env"]}
    assert ports == [53, 53, 443]
    assert environment["HF_HUB_OFFLINE"] == "0"
    assert environment["HF_HOME"].startswith("/tmp/"), "nothing else may be written"


@pytest.mark.parametrize("extended", ["model"], indirect=True)
def test_a_model_is_served_from_where_it_is_mounted(
    extended: Objects, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    container = container_of(extended)
    settings = settings_of(container, monkeypatch, tmp_path / "keys")
    assert settings.model in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert len(pod_of(extended)["volumes"]) == len(container["volumeMounts"]) == 3


@pytest.mark.parametrize("extended", ["servicemonitor"], indirect=True)
def test_the_monitor_scrapes_the_service(extended: Objects, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monitor, service = extended["ServiceMonitor"]["spec"], extended["Service"]
    (endpoint,) = monitor["endpoints"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    settings = settings_of(container_of(extended), monkeypatch, tmp_path / "keys")
    assert statuses(settings, endpoint["path"]) == [200]


@pytest.fixture(scope="module")
def ray_service() -> dict[str, Any]:
    return dict(yaml.safe_load((KUBERNETES / "rayservice.yaml").read_text()))


def ray_pods(ray_service: Mapping[str, Any]) -> list[dict[str, Any]]:
    cluster = ray_service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [{"apiVersion": "v1", "kind": "Pod"} | group["template"] for group in groups]


def test_the_ray_service_deploys_what_ray_accepts(
    ray_service: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(ray_service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, builder = application.import_path.partition(":")
    assert (module, getattr(ray_serve, builder)) == ("ray_serve", ray_serve.build)
    worker = ray_pods(ray_service)[1]["spec"]["containers"][0]
    environment = {variable["name"]: variable["value"] for variable in worker["env"]}
    assert environment["PYTHONPATH"] in {mount["mountPath"] for mount in worker["volumeMounts"]}
    settings_of(worker, monkeypatch, tmp_path / "keys")

    entrance = ray_serve.build(application.args)._bound_deployment

    decoder = entrance.init_args[0]._bound_deployment
    settings = decoder.init_args[0]
    assert {deployment.name for deployment in application.deployments} == {entrance.name, decoder.name}
    (scaled,) = [deployment for deployment in application.deployments if deployment.name == decoder.name]
    assert scaled.autoscaling_config["target_ongoing_requests"] == settings.max_rows
    assert settings.keys() == ["key"]
    assert decoder.ray_actor_options["num_cpus"] == int(worker["resources"]["requests"]["cpu"])
    assert settings.kv_cache_bytes <= size(worker["resources"]["limits"]["memory"]) / 2


def test_the_ray_pods_are_valid(ray_service: dict[str, Any]) -> None:
    for pod in ray_pods(ray_service):
        for version in VERSIONS:
            kubernetes_validate.validate(pod, version, strict=True)
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert pod["spec"]["enableServiceLinks"] is False
        (container,) = pod["spec"]["containers"]
        assert container["ports"][0] == {"name": "http", "containerPort": 8000}


def test_hadolint_finds_nothing_in_rays_image() -> None:
    command = Path(sys.executable).parent / "hadolint"
    assert command.exists(), "hadolint is missing; install the extra `deploy`"
    done = subprocess.run([command, "--failure-threshold", "style", DEPLOY / "Dockerfile.ray"], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


def test_ray_has_one_version(ray_service: dict[str, Any]) -> None:
    version = ray_service["spec"]["rayClusterConfig"]["rayVersion"]
    tag = re.search(r"ARG RAY_TAG=([\d.]+)-", (DEPLOY / "Dockerfile.ray").read_text())
    assert tag is not None
    assert tag[1] == version
    bound = re.search(r'"(ray\[serve\][^"]*)"', (DEPLOY.parent / "pyproject.toml").read_text())
    assert bound is not None
    assert Requirement(bound[1]).specifier.contains(version)
