"""A server started as `deploy/` starts it, and what Prometheus and the dashboard get from it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from tiny_server import ANSWER, about_demo, endless

pytestmark = pytest.mark.waits
DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/mcv.json").read_text())
QUERIES = sorted({target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]})
ADAPTER = yaml.safe_load((DEPLOY / "kubernetes/components/prometheus/adapter-values.yaml").read_text())["rules"]["custom"]
KEY = "a-key"


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def deployment():
    """The container's arguments, its settings put in as Kubernetes does."""
    pod = yaml.safe_load((DEPLOY / "kubernetes/deployment.yaml").read_text())["spec"]["template"]["spec"]
    settings = dict(line.split("=") for line in (DEPLOY / "kubernetes/settings.env").read_text().split())
    return [re.sub(r"\$\((\w+)\)", lambda found: settings[found[1]], one) for one in pod["containers"][0]["args"]], pod


def compose():
    """The service's arguments."""
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["mcv"]
    return service["command"], service


class Deployed:
    """A process of `mcv-serve` with such arguments; a container's folders are in `root`, its address is loopback."""

    def __init__(self, arguments, root):
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        root.mkdir()
        (root / "api-keys").write_text(f"{KEY}\n")
        places = {
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--api-key-file": str(root / "api-keys"),
            "--cache-dir": str(root / "pictures"),
            "--save-state": str(root / "state"),
            "--threads": "1",  # this machine's, not a node's
        }
        named = {one.partition("=")[0] for one in arguments}
        given = [
            f"{name}={places.get(name, value)}" if value else name for name, _, value in (a.partition("=") for a in arguments)
        ]
        given += [f"--port={self.port}"] if "--port" not in named else []
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MCV_")}
        program = "from mcv_serve.command import main; main()"
        self.process = subprocess.Popen([sys.executable, "-c", program, *given], env={**environment, "MCV_CACHE": str(root)})
        while True:
            try:
                if httpx.get(f"{self.address}/ready", trust_env=False, timeout=None).status_code == 200:
                    break
            except httpx.TransportError:
                assert self.process.poll() is None, "the server has ended"

    def client(self):
        return httpx.Client(base_url=self.address, timeout=None, trust_env=False, headers={"Authorization": f"Bearer {KEY}"})

    def stop(self):
        self.process.terminate()
        return self.process.wait()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    server = Deployed(deployment()[0], tmp_path_factory.mktemp("deployed") / "root")
    yield server
    assert server.stop() == 0


def ask_all_kinds(client):
    """Requests after which every figure of the dashboard has a value."""
    assert client.post("/v1/chat/completions", json={"messages": []}).status_code == 400
    for _ in range(2):  # a new picture, and a known one
        assert client.post("/v1/chat/completions", json=about_demo()).json()["choices"][0]["message"]["content"] == ANSWER


def test_a_pod_is_probed_asked_and_ended(deployed):
    _, pod = deployment()
    container = pod["containers"][0]
    with deployed.client() as client:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert httpx.get(deployed.address + container[probe]["httpGet"]["path"], trust_env=False).status_code == 200
        ask_all_kinds(client)
        assert httpx.get(f"{deployed.address}/metrics", trust_env=False).status_code == 401
        assert client.get("/metrics").status_code == 200


def test_compose_starts_a_server_that_saves_what_was_read(tmp_path):
    server = Deployed(compose()[0], tmp_path / "root")
    with server.client() as client:
        ask_all_kinds(client)
    assert server.stop() == 0
    assert (tmp_path / "root" / "state").stat().st_size > 0


def metric_names(query):
    """Names of the metrics in a query: what is neither in braces, nor a function, nor a word of the language."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"|\b(by|without)\s*\([^)]*\)", " ", query)
    return {
        name for name in re.findall(r"(?<![\w:.])[a-zA-Z_][\w:]*(?!\s*\(|[\w:])", bare) if name not in ("and", "or", "unless")
    }


def test_names_of_metrics_are_found_in_queries():
    query = 'histogram_quantile(0.5, sum by (le) (rate(vllm:a_seconds_bucket{instance=~"$x", kind!="y"}[5m]))) / b_total or c'
    assert metric_names(query) == {"vllm:a_seconds_bucket", "b_total", "c"}


def test_every_query_of_the_dashboard_is_about_what_the_server_measures(deployed):
    with deployed.client() as client:
        ask_all_kinds(client)
        told = client.get("/metrics").text
    measured = set(re.findall(r"^# TYPE (\S+)", told, re.M)) | set(re.findall(r"^([a-zA-Z_:][\w:]*)[ {]", told, re.M))
    for query in [*QUERIES, *(rule["name"]["matches"].strip("^$") for rule in ADAPTER)]:
        names = metric_names(query)
        assert names and names <= measured, query


def prometheus(name):
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here: apt-get install prometheus")
    return found


def settings_for(deployed, folder):
    """Our prometheus.yml with this machine's address and key, the labels that a cluster gives, and often enough for a test."""
    settings = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    settings["global"]["scrape_interval"] = "1s"
    job = settings["scrape_configs"][0]
    (folder / "key").write_text(f"{KEY}\n")
    job["authorization"]["credentials_file"] = str(folder / "key")
    job["static_configs"] = [
        {"targets": [deployed.address.removeprefix("http://")], "labels": {"namespace": "mcv", "pod": "one"}}
    ]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(settings))
    return path


def of_pods(rule):
    """What the adapter asks for the autoscaler."""
    values = {"Series": rule["name"]["matches"].strip("^$"), "LabelMatchers": 'namespace="mcv"', "GroupBy": "pod"}
    return re.sub(r"<<\.(\w+)>>", lambda found: values[found[1]], rule["metricsQuery"])


def test_promtool_takes_the_settings(deployed, tmp_path):
    checked = subprocess.run(
        [prometheus("promtool"), "check", "config", settings_for(deployed, tmp_path)], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


def test_prometheus_scrapes_and_every_query_has_a_value(deployed, tmp_path):
    program, port = prometheus("prometheus"), free_port()
    settings = settings_for(deployed, tmp_path)
    flags = [f"--config.file={settings}", f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    process = subprocess.Popen([program, *flags, "--log.level=error"])
    address = f"http://127.0.0.1:{port}/api/v1"

    def value(query):
        try:
            response = httpx.get(f"{address}/query", params={"query": query}, trust_env=False, timeout=None)
        except httpx.TransportError:
            assert process.poll() is None, "Prometheus has ended"
            return []
        if response.status_code == 503:  # it listens before it answers
            return []
        told = response.json()
        if told["status"] != "success":
            assert told["errorType"] != "bad_data", told["error"]
            return []
        return told["data"]["result"]

    try:
        while not value('up{job="mcv"} == 1'):
            pass
        waiting = [query.replace("$__rate_interval", "10m").replace('"$instance"', '".*"') for query in QUERIES]
        scaling = [of_pods(rule) for rule in ADAPTER]
        waiting += scaling
        with deployed.client() as client:
            while waiting:  # a rate needs two looks, with something between them
                ask_all_kinds(client)
                with client.stream("POST", "/v1/chat/completions", json=endless(stream=True)) as left:
                    next(left.iter_bytes())
                waiting = [query for query in waiting if not value(query)]
        for query in scaling:
            assert [one["metric"] for one in value(query)] == [{"pod": "one"}]
    finally:
        process.terminate()
        process.wait()
