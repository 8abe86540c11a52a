"""The files beside docs/server.md: checked by the programs that they are for, where these are installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import Limits, Served, photo, served

DOCS = Path(__file__).parents[2] / "docs"
FILES = DOCS / "server"


def program(name: str, *more: str) -> str:
    found = shutil.which(name, path=None) or next((str(path) for path in map(Path, more) if path.is_file()), None)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_the_dockerfile_has_nothing_to_complain_about() -> None:
    hadolint = program(
        "hadolint", str(Path(sys.executable).parent / "hadolint"), str(Path(sys.prefix) / "bin" / "hadolint")
    )
    done = subprocess.run(
        [hadolint, str(FILES / "Dockerfile")], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_dockerfile_keeps_its_promises() -> None:
    text = (FILES / "Dockerfile").read_text()
    final = text.rpartition("FROM ")[2]
    assert "python:3.12-slim" in final
    assert re.search(r"^USER 10001$", final, re.MULTILINE)
    assert "COPY . ." not in final
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", final, re.MULTILINE)[1])  # type: ignore[index]
    # The server is the process that signals go to.
    assert "exec sparsespec serve" in entry[2]


@pytest.mark.skipif(sys.platform != "linux", reason="systemd")
def test_the_unit_is_understood(tmp_path: Path) -> None:
    analyze = program("systemd-analyze")
    text = (FILES / "sparsespec.service").read_text()
    assert "/opt/sparsespec/bin/sparsespec serve" in text
    unit = tmp_path / "sparsespec.service"
    unit.write_text(text.replace("/opt/sparsespec/bin/sparsespec", "/bin/true"))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_and_the_command_fit_together() -> None:
    from click.testing import CliRunner

    from sparsespec.cli import main

    text = (FILES / "sparsespec.service").read_text()
    line = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)[1]  # type: ignore[index]
    shown = CliRunner().invoke(main, ["serve", "--help"]).output
    assert set(re.findall(r"--[a-z-]+", line)) <= set(re.findall(r"--[a-z-]+", shown))
    assert Limits().grace < int(re.search(r"TimeoutStopSec=(\d+)", text)[1])  # type: ignore[index]


def test_nginx_understands_its_part(tmp_path: Path) -> None:
    nginx = program("nginx", "/usr/sbin/nginx")
    openssl = program("openssl")
    text = (FILES / "nginx.conf").read_text()
    names = [str(tmp_path / name) for name in ("key", "crt")]
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=masks.example.org",
         "-keyout", names[0], "-out", names[1]],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    text = text.replace("/etc/nginx/masks.example.org.key", names[0]).replace(
        "/etc/nginx/masks.example.org.crt", names[1]
    )
    whole = f"pid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n{text}\n}}\n"
    (tmp_path / "nginx.conf").write_text(whole)
    done = subprocess.run(
        [nginx, "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr


def test_nginx_waits_at_least_as_long_as_the_server() -> None:
    text = (FILES / "nginx.conf").read_text()
    limits = Limits()
    assert int(re.search(r"proxy_read_timeout (\d+)s", text)[1]) > limits.wait_limit + limits.time_limit  # type: ignore[index]
    most = int(re.search(r"client_max_body_size (\d+)m", text)[1]) * 2**20  # type: ignore[index]
    assert limits.max_body < most < 1.2 * limits.max_body


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as server:
        server.event("ready")
        yield server


def test_the_example_in_python(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (DOCS / "server.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "urlopen" in block)
    assert "http://127.0.0.1:8000" in code
    (tmp_path / "cat.jpg").write_bytes(photo(kind="JPEG"))
    monkeypatch.chdir(tmp_path)
    exec(code.replace("http://127.0.0.1:8000", server.url), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2"]


def test_the_examples_of_curl(server: Served, tmp_path: Path) -> None:
    curl = program("curl")
    text = (DOCS / "server.md").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("curl ")]
    assert len(commands) == 4
    (tmp_path / "cat.jpg").write_bytes(photo(kind="JPEG"))
    import shlex

    for command in commands:
        arguments = shlex.split(command.replace("http://127.0.0.1:8000", server.url))[1:]
        done = subprocess.run(
            [curl, "-sS", "--fail", "--noproxy", "*", *arguments],
            cwd=tmp_path,
            capture_output=True,
            check=True,
            timeout=60,
        )
        if "-o" not in arguments:
            assert json.loads(done.stdout)["annotations"]
    assert (tmp_path / "labels.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "overlay.jpg").read_bytes().startswith(b"\xff\xd8")


def test_the_example_of_an_application() -> None:
    text = (DOCS / "server.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "create_app" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["app"].state.pool.workers == 2


def test_problems_and_parameters_in_the_document() -> None:
    from sparsespec.server.wish import PARAMETERS

    text = (DOCS / "server.md").read_text(encoding="utf-8")
    source = "".join(
        path.read_text() for path in (Path(sys.modules["sparsespec.server"].__file__ or "").parent).glob("*.py")
    )
    kinds = set(re.findall(r'Problem\(\s*\d{3},\s*"([a-z-]+)"', source)) | set(
        re.findall(r'_problem\(\s*"([a-z-]+)"', source)
    )
    assert len(kinds) > 15
    listed = text.partition("| status | `type` ends in | when |")[2].partition("\n\n")[0]
    assert kinds <= set(re.findall(r"`([a-z-]+)`", listed))
    for name in PARAMETERS:
        assert f"| `{name}` |" in text
