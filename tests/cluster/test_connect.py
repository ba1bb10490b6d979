"""Clusters that are not there are told at once, and how to mend it."""

from __future__ import annotations

import socket

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[default]'")

import ray

from tests.cli.test_json_schemas import twofour
from tests.ports import free_ports
from twofour.cli import options
from twofour.cluster.connect import connect
from twofour.cluster.tasks import on_ray
from twofour.core.errors import InputError


def test_an_address_that_nobody_answers_at() -> None:
    (port,) = free_ports(1)
    with pytest.raises(InputError, match=r"there is no Ray cluster at '127\.0\.0\.1:") as error:
        connect(f"127.0.0.1:{port}")
    assert "ray start --head" in error.value.fix
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["here", "host:", "host:port", "127.0.0.1:99999"])
def test_an_address_of_another_form(address: str) -> None:
    with pytest.raises(InputError, match="there is no Ray cluster at"), on_ray(address):
        raise AssertionError
    assert not ray.is_initialized()


def test_jobs_are_at_least_one() -> None:
    with pytest.raises(InputError, match="cannot work with 0 workers"), on_ray(jobs=0):
        raise AssertionError


def test_a_cluster_of_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself refuses; its words are handed on."""

    def init(*arguments: object, **options: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 1.0")

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(ray, "init", init)
        with pytest.raises(InputError, match="runs other versions") as error:
            connect(f"127.0.0.1:{server.getsockname()[1]}")
    assert "    Ray: 1.0" in error.value.reasons


# Commands, which find it before they read a file.

SCAN = ("sensitivity", "model.onnx", "--data", "data.npz")


def refused(*arguments: str) -> str:
    result = twofour(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr


def test_an_address_without_a_cluster() -> None:
    (port,) = free_ports(1)
    text = refused(*SCAN, "--ray", "--ray-address", f"127.0.0.1:{port}")
    assert "there is no Ray cluster at" in text
    assert "ray start --head" in text


def test_options_that_say_nothing() -> None:
    assert "--ray-address is of no use without --ray" in refused(*SCAN, "--ray-address", "auto")
    quantize = ("quantize", "model.onnx", "-o", "int8.onnx", "--data", "data.npz")
    assert "--ray is of no use without --max-drop" in refused(*quantize, "--ray")
    text = refused(*quantize, "--max-drop", "1", "--ray-address", "auto")
    assert "--ray-address is of no use without --ray" in text


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = options.find_spec
    monkeypatch.setattr(options, "find_spec", lambda name: None if name == "ray" else find(name))
    text = refused(*SCAN, "--ray")
    assert "missing: ray" in text
    assert "pip install 'twofour[ray]'" in text
