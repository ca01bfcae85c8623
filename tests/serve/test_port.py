"""What cannot be served is refused before Ray starts: all of it, by its option, in a line each."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from ray_jobs import cli


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["serve", *argv]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_that_is_none(tiny_model: Path, capsys: pytest.CaptureFixture[str], port: str) -> None:
    said = refused(capsys, "--model", str(tiny_model), "--port", port)
    assert f"--port: {port} is none" in said and len(said.splitlines()) == 1


def test_a_port_that_is_taken_and_hosts_that_are_not_here(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"{port} of 127.0.0.1 cannot be used" in refused(capsys, "--model", str(tiny_model), "--port", port)
    for host in ("nowhere.invalid", "203.0.113.77"):
        said = refused(capsys, "--model", str(tiny_model), "--port", "0", "--host", host)
        assert f"of {host} cannot be used" in said and len(said.splitlines()) == 1


def test_a_model_without_its_tokenizer_and_a_bad_port(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mute = Path(shutil.copytree(tiny_model, tmp_path / "mute"))
    (mute / "tokenizer.json").unlink()
    said = refused(capsys, "--model", str(mute), "--port", "99999")
    assert "mute: the model has no tokenizer" in said and "99999" in said and len(said.splitlines()) == 3
