"""What lies in serving/: files that fit the code and each other, and a load generator that is fair.

promtool and kubernetes-validate check their files too, where they are installed.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import fields
from itertools import chain, combinations, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from linting import lint
from recsys.serving.metrics import Metrics
from recsys.serving.settings import ServeSettings

CHECKOUT = Path(__file__).parents[2]
SERVING = CHECKOUT / "serving"
sys.path += [str(CHECKOUT / "scripts"), str(SERVING)]

import load_test  # noqa: E402

from bench.load import (  # noqa: E402
    Refused,
    Result,
    Shot,
    Target,
    arrivals,
    closed_loop,
    open_loop,
    taken,
)

GUIDE = (CHECKOUT / "docs" / "serving.md").read_text(encoding="utf-8")
SERVERS = ("server-a", "server-b")


def read(path: str) -> Any:
    """Return a file of serving/."""
    text = (SERVING / path).read_text(encoding="utf-8")
    return json.loads(text) if path.endswith(".json") else yaml.safe_load(text)


COMPOSE = read("compose.yaml")
DASHBOARD = read("grafana/dashboards/recsys.json")
RULES = [rule for group in read("alerts.yml")["groups"] for rule in group["rules"]]
OBJECTS = {
    (one["kind"], one["metadata"]["name"]): one
    for path in sorted((SERVING / "kubernetes").glob("*.yaml"))
    if path.stem != "kustomization"
    for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))
}
POD = OBJECTS["StatefulSet", "recsys"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]


# --- metrics, alerts, dashboard ---------------------------------------------------------------


def known_series() -> dict[str, set[str]]:
    """Return the labels of every series that a server shows, or Prometheus adds."""
    made = [vars(Metrics())[name] for name in vars(Metrics())]
    known = {"up": {"job", "instance"}}
    for metric in made:
        if hasattr(metric, "_labelnames"):
            labels = {*metric._labelnames, "job", "instance"}
            endings = {"counter": ["_total"], "gauge": [""]}
            for ending in endings.get(metric._type, ["_bucket", "_sum", "_count"]):
                extra = {"le"} if ending == "_bucket" else set()
                known[metric._name + ending] = labels | extra
    return known


def dashboard_expressions() -> list[str]:
    targets = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    noted = [one["expr"] for one in DASHBOARD["annotations"]["list"] if "expr" in one]
    return [target["expr"] for target in targets] + noted


def series_in(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Yield the name and the labels of each series that an expression selects."""
    for name, selector in re.findall(r"\b(recsys_\w+|up)\b(?:\{([^}]*)\})?", expression):
        yield name, set(re.findall(r"(\w+)\s*(?:=|!=|=~|!~)\"", selector))


def grouped_by(expression: str) -> set[str]:
    return {
        label.strip()
        for labels in re.findall(r"\bby \(([^)]*)\)", expression)
        for label in labels.split(",")
    }


EXPRESSIONS = [*dashboard_expressions(), *(rule["expr"] for rule in RULES)]


def test_the_parsing_of_expressions() -> None:
    found = dict(series_in('sum by (le) (rate(recsys_x_bucket{a=~"b", c!="d"}[5m])) > up'))
    assert found == {"recsys_x_bucket": {"a", "c"}, "up": set()}
    assert grouped_by("sum by (le, arm) (x)") == {"le", "arm"}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_only_what_the_server_counts(expression: str) -> None:
    known, found = known_series(), list(series_in(expression))
    assert found
    assert {name for name, _ in found} <= set(known)
    labels = set.union(*(known[name] for name, _ in found))
    assert set.union(*(used for _, used in found)) <= labels
    assert grouped_by(expression) <= labels


def test_every_metric_of_the_server_is_shown() -> None:
    shown = {name for expression in dashboard_expressions() for name, _ in series_in(expression)}
    hidden = {name for name in known_series() if name not in shown}
    assert hidden == {"recsys_stage_seconds_bucket", "recsys_request_seconds_sum"} | {
        "recsys_request_seconds_count",
        "recsys_shadow_overlap_bucket",
    }


def codes_of_the_api() -> set[str]:
    """Return every outcome that a request may have."""
    from recsys.serving import app
    from recsys.serving.guard import Refusal
    from recsys.serving.state import StateUnavailable

    kinds, codes = [Refusal], {"ok", "not_found", "method_not_allowed"}
    while kinds:
        kinds += (kind := kinds.pop()).__subclasses__()
        codes |= {kind.code} if "code" in vars(kind) else set()
    others = (StateUnavailable("disk full"), ZeroDivisionError("ours"))
    return codes | {code for *_, code in app.REFUSALS} | {app.refusal(one)[0] for one in others}


def test_outcomes_are_codes_of_the_api() -> None:
    codes, used = codes_of_the_api(), set()
    for expression in EXPRESSIONS:
        for named in re.findall(r'recsys_requests_total\{[^}]*outcome[=!~]+"([^"]*)"', expression):
            used |= set(named.split("|"))
    assert {"internal", "state_unavailable", "overloaded", "rate_limited"} <= used <= codes
    assert all(f"`{code}`" in GUIDE for code in codes)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "guide"}
    assert notes["guide"] == f"docs/serving.md#{rule['alert'].lower()}"
    assert f"### {rule['alert']}\n" in GUIDE


def test_each_alert_is_made_to_fire_once() -> None:
    text = (SERVING / "alerts_test.yml").read_text(encoding="utf-8")
    fired = set(re.findall(r'labels: \'\{alertname="(\w+)"\}\'', text))
    assert fired == {rule["alert"] for rule in RULES}
    for test in yaml.safe_load(text)["tests"]:
        names = {name for one in test["input_series"] for name, _ in series_in(one["series"])}
        assert names <= set(known_series())


def test_promtool_agrees(tmp_path: Path) -> None:
    lint("promtool", "check", "rules", str(SERVING / "alerts.yml"))
    lint("promtool", "test", "rules", str(SERVING / "alerts_test.yml"))
    lint("promtool", "check", "config", "--syntax-only", str(SERVING / "prometheus.yml"))
    plain = [
        expression.replace("$__rate_interval", "1m").replace("$", "")
        for expression in dashboard_expressions()
    ]
    rules = [{"record": f"panel:{place}", "expr": text} for place, text in enumerate(plain)]
    panels = tmp_path / "panels.yml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    lint("promtool", "check", "rules", str(panels))


def test_panels_have_their_place() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"]
    for left, right in combinations([panel["gridPos"] for panel in panels], 2):
        apart = left["x"] + left["w"] <= right["x"] or right["x"] + right["w"] <= left["x"]
        below = left["y"] + left["h"] <= right["y"] or right["y"] + right["h"] <= left["y"]
        assert apart or below


def test_grafana_finds_dashboard_and_data() -> None:
    mounts = dict(volume.split(":")[:2] for volume in COMPOSE["services"]["grafana"]["volumes"])
    provider = read("grafana/provisioning/dashboards/recsys.yaml")["providers"][0]
    assert provider["options"]["path"] == mounts["./grafana/dashboards"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    source = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert source["isDefault"]


# --- compose ----------------------------------------------------------------------------------


def settings_in(arguments: list[str]) -> dict[str, str]:
    """Return the settings that a server is started with, by their names."""
    assert arguments[0] == "serve"
    pairs = [argument.removeprefix("--").partition("=") for argument in arguments[1:]]
    found = {name.replace("-", "_"): value for name, _, value in pairs}
    assert set(found) <= {field.name for field in fields(ServeSettings)}
    return found


def seconds_to_stop(arguments: list[str]) -> int:
    found = settings_in(arguments)
    return int(found["grace_seconds"]) + int(found["drain_seconds"])


@pytest.mark.parametrize("name", list(COMPOSE["services"]))
def test_a_service_of_compose(name: str) -> None:
    service = COMPOSE["services"][name]
    tag = service["image"].partition(":")[2]
    assert re.fullmatch(r"v?\d+\.\d+\.\d+(-alpine)?", tag), "a tag that does not move"
    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["restart"] == "unless-stopped"
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
    assert set(service["networks"]) <= set(COMPOSE["networks"])
    named = [volume.split(":")[0] for volume in service.get("volumes", [])]
    volumes = {volume for volume in named if volume[0] not in ".$"}
    assert volumes <= set(COMPOSE["volumes"])
    assert all((SERVING / path).exists() for path in named if path.startswith("./"))


def test_servers_of_compose() -> None:
    servers = [COMPOSE["services"][name] for name in SERVERS]
    for server in servers:
        assert int(server["stop_grace_period"].rstrip("s")) > seconds_to_stop(server["command"])
        found = settings_in(server["command"])
        assert found["state"].startswith("redis://redis:")
        assert found["keys"] == "/run/secrets/keys"
        assert server["read_only"]
        assert "ports" not in server
        assert (SERVING / server["build"]["context"] / server["build"]["dockerfile"]).is_file()
        assert server["build"]["target"] == "serve"
    logs = [server["volumes"][0] for server in servers]
    assert len(set(logs)) == 2, "each its own log"


def test_redis_loses_nothing_and_is_not_reached_from_outside() -> None:
    redis = COMPOSE["services"]["redis"]
    for words in ("--appendonly yes", "--appendfsync always", "--maxmemory-policy noeviction"):
        assert words in redis["command"]
    assert COMPOSE["networks"]["state"]["internal"]
    reached = {n for n, one in COMPOSE["services"].items() if "state" in one["networks"]}
    assert reached == {"redis", *SERVERS}
    assert "ports" not in redis


def test_secrets_are_files_out_of_the_repository() -> None:
    for secret in COMPOSE["secrets"].values():
        assert secret["file"].startswith("./secrets/")
    assert "secrets/" in (SERVING / ".gitignore").read_text().split()
    for name in COMPOSE["secrets"]:
        assert f"secrets/{name}" in (SERVING / "README.md").read_text(encoding="utf-8")


def test_balancer_and_prometheus_know_both_servers() -> None:
    addresses = [f"{name}:8000" for name in SERVERS]
    scrape = read("prometheus.yml")["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == addresses
    assert scrape["job_name"] == "recsys"
    assert scrape["authorization"]["credentials_file"] == "/run/secrets/metrics_key"
    assert "metrics_key" in COMPOSE["services"]["prometheus"]["secrets"]
    balancer = (SERVING / "haproxy.cfg").read_text()
    assert re.findall(r"^\s+server \w+ (\S+)", balancer, re.MULTILINE) == addresses
    assert "uri /readyz" in balancer


# --- Kubernetes -------------------------------------------------------------------------------


def test_kubernetes_objects_fit_each_other() -> None:
    labels = {"app.kubernetes.io/name": "recsys"}
    workload = OBJECTS["StatefulSet", "recsys"]["spec"]
    assert workload["selector"]["matchLabels"] == labels
    assert workload["template"]["metadata"]["labels"] == labels
    assert ("Service", workload["serviceName"]) in OBJECTS
    for service in ("recsys", "recsys-pods"):
        spec = OBJECTS["Service", service]["spec"]
        assert spec["selector"] == labels
        assert spec["ports"][0]["targetPort"] == CONTAINER["ports"][0]["name"]
    assert OBJECTS["PodDisruptionBudget", "recsys"]["spec"]["selector"]["matchLabels"] == labels
    scaled = OBJECTS["HorizontalPodAutoscaler", "recsys"]["spec"]
    assert (scaled["scaleTargetRef"]["kind"], scaled["scaleTargetRef"]["name"]) in OBJECTS
    assert scaled["minReplicas"] == workload["replicas"] >= 2


def test_kubernetes_volumes_and_values_are_there() -> None:
    claims = OBJECTS["StatefulSet", "recsys"]["spec"]["volumeClaimTemplates"]
    volumes = {one["metadata"]["name"] for one in claims} | {one["name"] for one in POD["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == volumes
    for volume in POD["volumes"]:
        if claim := volume.get("persistentVolumeClaim"):
            assert ("PersistentVolumeClaim", claim["claimName"]) in OBJECTS
    secret = OBJECTS["Secret", "recsys"]["stringData"]
    known = set(OBJECTS["ConfigMap", "recsys"]["data"])
    for variable in CONTAINER["env"]:
        known.add(variable["name"])
        assert variable["valueFrom"]["secretKeyRef"]["key"] in secret
    used = set(re.findall(r"\$\((\w+)\)", " ".join(CONTAINER["args"])))
    assert used <= known
    assert set(OBJECTS["ConfigMap", "recsys"]["data"]) <= used


def test_kubernetes_pod_is_safe_and_has_time_to_stop() -> None:
    assert POD["terminationGracePeriodSeconds"] > seconds_to_stop(CONTAINER["args"])
    assert POD["securityContext"]["runAsNonRoot"]
    limits = CONTAINER["securityContext"]
    assert limits["readOnlyRootFilesystem"]
    assert not limits["allowPrivilegeEscalation"]
    assert limits["capabilities"] == {"drop": ["ALL"]}
    paths = {
        probe: CONTAINER[f"{probe}Probe"]["httpGet"]["path"]
        for probe in ("startup", "readiness", "liveness")
    }
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/healthz"}


def test_kustomization_names_every_file() -> None:
    there = {path.name for path in (SERVING / "kubernetes").glob("*.yaml")}
    listed = read("kubernetes/kustomization.yaml")["resources"]
    assert {*listed, "kustomization.yaml"} == there
    assert read("kubernetes/kustomization.yaml")["images"][0]["name"] == CONTAINER["image"]


def test_kubernetes_schemas() -> None:
    paths = (SERVING / "kubernetes").glob("*.yaml")
    files = [str(path) for path in paths if path.stem != "kustomization"]
    lint("kubernetes-validate", "--strict", *files)


def test_the_guide_names_every_setting() -> None:
    for field in fields(ServeSettings):
        assert f"--{field.name.replace('_', '-')}" in GUIDE, field.name


# --- the load generator -----------------------------------------------------------------------

Answering = Callable[[int, bytes], Awaitable[bytes]]


@asynccontextmanager
async def serving(answer: Answering) -> AsyncIterator[tuple[Target, list[bytes]]]:
    """Yield the target of a server that answers request number n with `answer(n, request)`."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
                seen.append(head + await reader.readexactly(size))
                writer.write(await answer(len(seen) - 1, seen[-1]))
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass  # the client is done
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield Target("127.0.0.1", server.sockets[0].getsockname()[1], key="a key"), seen


def http(body: bytes, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body)


async def at_once(number: int, request: bytes) -> bytes:
    return http(b"{}")


def shots(target: Target) -> Iterator[Shot]:
    return repeat(Shot("asked", target.request("POST", "/v1/recommend", b"{}")))


def test_a_stall_is_charged_to_all_who_would_have_asked() -> None:
    """Half a second's stall at 200/s is met by 100; a closed loop's one connection waits once."""

    async def late_in(open_: bool) -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        until = 0.0

        async def answer(number: int, request: bytes) -> bytes:
            nonlocal until
            if number == 20:
                until = loop.time() + 0.5
            if (left := until - loop.time()) > 0:
                await asyncio.sleep(left)
            return http(b"{}")

        async with serving(answer) as (target, _):
            if open_:
                found = await open_loop(target, shots(target), rate=200, seconds=1.5)
            else:
                found = await closed_loop(target, shots(target), connections=1, seconds=1.0)
        spent = found.latencies["asked", "ok"]
        return sum(one > 0.1 for one in spent), len(spent)

    late, count = asyncio.run(late_in(True))
    meant = arrivals(200, 1.5, seed=0)
    assert count == len(meant)
    begun = meant[20]
    assert late == pytest.approx(((meant >= begun) & (meant < begun + 0.4)).sum(), abs=8)
    assert 1 <= asyncio.run(late_in(False))[0] <= 3


def test_arrivals_are_a_poisson_process() -> None:
    moments = arrivals(1000, 20, seed=3)
    gaps = np.diff(moments)
    assert len(moments) == pytest.approx(20_000, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)


def test_kinds_and_outcomes() -> None:
    bodies = chain([b'{"fallback":"deadline"}'], repeat(b"{}"))

    async def answer(number: int, request: bytes) -> bytes:
        if b"/v1/events" in request:
            return http(b'{"error":{"code":"overloaded","message":""}}', 429)
        return http(next(bodies))

    async def find() -> tuple[Result, list[bytes]]:
        async with serving(answer) as (target, seen):
            mix = load_test.mixed(target, ["u1"], ["i1"], share=0.5, k=3, seed=1)
            found = await closed_loop(target, mix, connections=2, seconds=0.2)
        return found, seen

    found, seen = asyncio.run(find())
    counts = found.outcomes()
    assert found.count == sum(counts.values()) == len(seen)
    assert counts["fallback"] == 1
    assert counts["overloaded"] == pytest.approx(len(seen) / 2, abs=6 * len(seen) ** 0.5 / 2)
    events = [json.loads(one.partition(b"\r\n\r\n")[2]) for one in seen if b"/v1/events" in one]
    assert len({event["event_id"] for event in events}) == len(events)
    assert all(b"Authorization: Bearer a key\r\n" in one for one in seen)
    assert {row["outcome"] for row in found.rows()} == {"ok", "fallback", "overloaded"}


def test_broken_and_late_answers_are_counted() -> None:
    async def answer(number: int, request: bytes) -> bytes:
        if number % 2:
            raise ConnectionResetError
        await asyncio.sleep(1)
        return http(b"{}")

    async def find() -> Result:
        async with serving(answer) as (target, _):
            return await closed_loop(
                target, shots(target), connections=1, seconds=0.3, timeout=0.05
            )

    counts = asyncio.run(find()).outcomes()
    assert set(counts) == {"timeout", "broken"}


def test_answers_in_pieces() -> None:
    whole, received = http(b'{"a": 1}') + http(b"{}", 503), bytearray()
    replies = []
    for byte in whole:
        received.append(byte)
        if reply := taken(received):
            replies.append(reply)
    assert replies == [(200, b'{"a": 1}'), (503, b"{}")]
    assert not received


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://a", "http://", "http://a:b", "http://a/b"]
)
def test_wrong_address(url: str) -> None:
    with pytest.raises(Refused, match="expected such as http://127"):
        Target.of(url)


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_test.main(["--url", "http://127.0.0.1:1"]) == 2
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err


def test_no_such_list_of_users(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_test.main(["--users", "nowhere.txt"]) == 2
    assert "neither a number above 0 nor a file of ids" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--rate", "0"], ["--events", "2"], ["--connections", "-1"]])
def test_wrong_numbers(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_test.main(flags)
    assert caught.value.code == 2
    assert "is not a" in capsys.readouterr().err


def test_the_whole_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    users = tmp_path / "users.txt"
    users.write_text("ann\nbob\n")

    async def answer(number: int, request: bytes) -> bytes:
        return http(b'{"items":[{"item_id":"i7","score":1.0}]}')

    async def find() -> tuple[int, list[bytes]]:
        async with serving(answer) as (target, seen):
            flags = ["--url", f"http://127.0.0.1:{target.port}", "--users", str(users)]
            flags += ["--rate", "100", "--seconds", "0.5", "--warm", "0.1", "--events", "0.5"]
            return await asyncio.to_thread(load_test.main, flags), seen

    code, seen = asyncio.run(find())
    assert code == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    counted = sum(row["count"] for row in printed["answers"])
    assert counted == int((arrivals(100, 0.6, 0) >= 0.1).sum())
    assert {row["kind"] for row in printed["answers"]} == {"events", "recommend"}
    bodies = [json.loads(one.partition(b"\r\n\r\n")[2]) for one in seen[1:]]
    assert {body["user_id"] for body in bodies} == {"ann", "bob"}
    assert {body.get("item_id") for body in bodies} == {None, "i7"}
