"""What starts the processes: every queue has somebody who reads it, and nothing is open that should be shut."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.broker import all_queues
from orchestrator.settings import WorkerSettings
from providers.catalog import load_catalog

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PASSWORDS = {"POSTGRES_PASSWORD": "p1", "REDIS_PASSWORD": "p2", "FLOWER_PASSWORD": "p3"}
SERVERS = ("postgres", "valkey")


def known_queues() -> set[str]:
    return set(all_queues(load_catalog().providers))


def queues_of(command: list[str]) -> list[str]:
    return command[command.index("--queues") + 1].split(",") if "--queues" in command else []


def compose(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real Compose; it needs no engine to read a file."""
    beside = BIN / "docker-compose"
    found = [str(beside)] if beside.exists() else ["docker", "compose"]
    command = [*found, "--file", "docker-compose.yml", "--env-file", "/dev/null", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """All services, with every anchor and variable resolved."""
    done = compose("--profile", "*", "config", "--format", "json", **PASSWORDS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["services"]


def procfile() -> dict[str, list[str]]:
    lines = [line.partition(":") for line in (ROOT / "Procfile").read_text().splitlines()]
    return {name: command.split() for name, _, command in lines}


def test_procfile_is_valid() -> None:
    done = subprocess.run([str(BIN / "honcho"), "check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_queue_is_read_by_one_kind_of_process() -> None:
    read = [queue for command in procfile().values() for queue in queues_of(command)]
    assert sorted(read) == sorted(known_queues())


def test_every_queue_is_read_by_one_service(services: dict[str, Any]) -> None:
    read = [queue for service in services.values() for queue in queues_of(service.get("command") or [])]
    assert sorted(read) == sorted(known_queues())


@pytest.mark.parametrize("missing", PASSWORDS)
def test_compose_refuses_to_start_without_a_password(missing: str) -> None:
    done = compose("config", "--quiet", **{name: word for name, word in PASSWORDS.items() if name != missing})
    assert done.returncode == 1
    assert f"required variable {missing} is missing a value" in done.stderr


def test_flower_is_reached_from_this_machine_only_and_with_a_password(services: dict[str, Any]) -> None:
    flower = services["flower"]
    assert [port["host_ip"] for port in flower["ports"]] == ["127.0.0.1"]
    assert flower["environment"]["FLOWER_BASIC_AUTH"] == f"flower:{PASSWORDS['FLOWER_PASSWORD']}"
    assert flower["profiles"] == ["flower"]


def test_flower_is_never_opened_to_everybody() -> None:
    sources = ["Procfile", "docker-compose.yml", *(path.relative_to(ROOT) for path in (ROOT / "deploy").rglob("*"))]
    for source in map(ROOT.joinpath, sources):
        if source.is_file():
            assert not re.search(r"FLOWER_UNAUTHENTICATED_API\s*[=:]", source.read_text()), source


def test_no_other_service_publishes_a_port(services: dict[str, Any]) -> None:
    assert [name for name, service in services.items() if service.get("ports")] == ["flower"]


def test_our_services_run_without_rights(services: dict[str, Any]) -> None:
    for name in services.keys() - set(SERVERS):
        service = services[name]
        assert service["user"] == "10001:10001", name
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_workers_wait_for_the_schema_and_may_finish_their_calls(services: dict[str, Any]) -> None:
    drain_s = WorkerSettings().drain_s
    for name, service in services.items():
        if not queues_of(service.get("command") or []):
            continue
        assert service["depends_on"]["migrate"]["condition"] == "service_completed_successfully", name
        assert _seconds(service["stop_grace_period"]) > drain_s, name
        assert service["healthcheck"]["test"][-1].endswith("healthcheck.sh"), name
        assert service["restart"] == "unless-stopped", name


def test_compose_servers_keep_their_data_and_say_when_they_are_ready(services: dict[str, Any]) -> None:
    for name in SERVERS:
        assert services[name]["volumes"], name
        assert services[name]["healthcheck"]["test"], name
    text = (ROOT / "docker-compose.yml").read_text()
    assert "appendonly yes" in text
    assert "maxmemory-policy noeviction" in text


def test_dockerfile_has_no_findings() -> None:
    command = [str(BIN / "hadolint"), "deploy/Dockerfile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_dockerfile_finds_what_it_copies() -> None:
    """All is ignored but what is named; a file that is copied and not named fails only when an image is built."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    instructions = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    copies = [line.split()[1:-1] for line in instructions if line.startswith("COPY ") and "--from" not in line]
    for source in (source for sources in copies for source in sources):
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in kept), source


@pytest.mark.parametrize("script", ["flower.sh", "healthcheck.sh"])
def test_scripts_are_valid_shell(script: str) -> None:
    done = subprocess.run(["sh", "-n", str(ROOT / "deploy" / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_systemd_unit_is_valid(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("this machine has no systemd")
    unit = (ROOT / "deploy" / "systemd" / "llm-orchestrator-worker@.service").read_text()
    # The program is not installed where the unit expects it.
    copy = tmp_path / "llm-orchestrator-worker@control.service"
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit, flags=re.MULTILINE))
    done = subprocess.run([program, "verify", str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Unknown" not in done.stderr


def _seconds(duration: str) -> float:
    """A duration of Compose's, such as `1m30s`."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([hms])", duration))
