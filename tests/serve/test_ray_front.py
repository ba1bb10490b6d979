"""The front and the options of a cluster, without a cluster: replicas are played."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[serve]'")

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from twofour.core.errors import InputError
from twofour.serve.app import Listen, ServeOptions
from twofour.serve.auth import Auth, TokenFile
from twofour.serve.http.messages import Reply, Request
from twofour.serve.limits import Limits
from twofour.serve.models.fleet import FleetOptions
from twofour.serve.ray.deploy import http_options, model_target
from twofour.serve.ray.front import MOST_PAUSES, TRIES, Directory, Front, State
from twofour.serve.repository.config import config_of

INFER = "/v2/models/m/infer"
TOKEN = "0123456789abcdef0123"


class Replicas:
    """What a handle of Ray is to the front: each call has the next of these outcomes."""

    def __init__(self, *outcomes: Reply | Exception) -> None:
        self.outcomes, self.asked = list(outcomes), []
        self.answer = self

    async def remote(self, request: Request) -> Reply:
        self.asked.append(request)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class Slow(Replicas):
    """They answer after a while."""

    async def remote(self, request: Request) -> Reply:
        await asyncio.sleep(0.1)
        return await super().remote(request)


def front(replicas: Replicas, auth: Auth | None = None) -> Front:
    options = ServeOptions("models", Path("cache"), limits=Limits(body_bytes=10))
    found = Front(options, pickle.dumps(auth or Auth(None, None, loopback_only=False)))
    found.directory, found.handles = Directory({"m": False}, {"bad": "no version"}), {"m": replicas}
    return found


def ask(
    served: Front, path: str, method: str = "POST", body: bytes = b"", **headers: str
) -> Response:
    lines = [(name.encode(), text.encode()) for name, text in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": lines}

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    return asyncio.run(served(HttpRequest(scope, receive)))


def test_a_request_goes_to_another_replica_when_one_dies() -> None:
    replicas = Replicas(RayActorError(), RayActorError(), Reply(200, (b"{}",)))
    reply = ask(front(replicas), INFER, body=b"12345")
    assert (reply.status_code, reply.body) == (200, b"{}")
    assert [bytes(request.body) for request in replicas.asked] == [b"12345"] * 3


def test_a_request_that_kills_replicas_is_given_up() -> None:
    replicas = Replicas(*[RayActorError()] * (TRIES + 1))
    reply = ask(front(replicas), INFER)
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert len(replicas.asked) == TRIES


def test_a_replica_that_is_known_to_be_dead_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofour.serve.ray.front.LONGEST_PAUSE_S", 0.01)
    replicas = Replicas(*[RayActorError("a1")] * 6, RayActorError("b2"), Reply(200, (b"{}",)))
    assert ask(front(replicas), INFER).status_code == 200
    assert len(replicas.asked) == 8


def test_nothing_but_dead_replicas_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofour.serve.ray.front.LONGEST_PAUSE_S", 0.0)
    replicas = Replicas(*[RayActorError("a1")] * (MOST_PAUSES + 1))
    assert ask(front(replicas), INFER).status_code == 503
    assert len(replicas.asked) == MOST_PAUSES


def test_a_full_queue_is_503_with_retry_after() -> None:
    reply = ask(front(Replicas(BackPressureError(3, 2))), INFER)
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert "'m'" in orjson.loads(reply.body)["error"]


@pytest.mark.parametrize(
    ("state", "status"), [(State(0, True), 503), (State(1, True), 200), (State(0, False), 200)]
)
def test_nobody_waits_for_a_replica_that_will_not_come(
    state: State, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twofour.serve.ray.front.states", lambda _: {"m": state})
    monkeypatch.setattr("twofour.serve.ray.front.WAIT_S", 0.01)
    assert ask(front(Slow(Reply())), INFER).status_code == status


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v2/models/absent/infer", b"", 404),
        ("GET", "/v2/models/absent/ready", b"", 404),
        ("POST", "/nothing", b"", 404),
        ("GET", INFER, b"", 405),
        ("POST", INFER, b"x" * 11, 413),
        ("POST", "/v2/repository/models/m/load", b"", 403),
        ("GET", "/metrics", b"", 501),
    ],
)
def test_what_no_replica_is_asked_for(method: str, path: str, body: bytes, status: int) -> None:
    replicas = Replicas()
    reply = ask(front(replicas), path, method, body)
    assert reply.status_code == status
    assert orjson.loads(reply.body)["error"]
    assert replicas.asked == []


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(TOKEN)
    served = front(Replicas(Reply()), Auth(TokenFile(tmp_path / "tokens"), None, False))
    assert ask(served, INFER).status_code == 401
    assert ask(served, "/v2/health/live", "GET").status_code == 200
    assert ask(served, INFER, authorization=f"Bearer {TOKEN}").status_code == 200


def test_ready_is_what_was_needed_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofour.serve.ray.front.states", lambda _: {"m": State(1)})
    served = front(Replicas())

    def status(directory: Directory) -> int:
        served.directory, served.looked_s = directory, -10.0
        return ask(served, "/v2/health/ready", "GET").status_code

    late = Directory({"m": False, "late": False}, {}, ["m"])
    assert status(late) == 200
    assert status(Directory(late.models, {}, ["m", "late"])) == 503
    assert status(Directory({"m": False, "late": True}, {}, ["m", "late"])) == 200
    assert status(Directory({"m": False}, {"late": "no version"}, ["m", "late"])) == 503
    assert status(Directory({"m": False}, {}, ["m", "gone"])) == 200
    assert status(Directory({"m": False}, {}, ["m"], leaving=True)) == 503


def options(**changes: object) -> ServeOptions:
    return ServeOptions("models", Path("cache"), **changes)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"listen": Listen(http_port=None)}, "one port"),
        ({"listen": Listen(http_port=0)}, "one port"),
        ({"fleet": FleetOptions("explicit")}, "not loaded on request"),
        ({"listeners": (print,)}, "not traced"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused(changed: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        http_options(options(**changed))


def deployed(config: dict[str, object]) -> Callable[..., object]:
    target = model_target("m", config_of(config, "config.yaml"), options())
    return target.target._bound_deployment


def test_the_options_of_a_model_reach_ray() -> None:
    ray = {"min_replicas": 0, "max_replicas": 5, "target_ongoing_requests": 2.5}
    found = deployed({"ray": ray, "queue": {"length": 7}, "instances": [{"threads": 3}, {}]})
    scaling = found._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (0, 5)
    assert scaling.target_ongoing_requests == 2.5
    assert (found.max_ongoing_requests, found.max_queued_requests) == (5, 7)
    assert found.ray_actor_options["num_cpus"] == 4
    again, other = deployed({}), deployed({"ray": {"num_cpus": 0.5}})
    assert again.version == other.version == found.version  # or Ray starts all processes anew
    assert other.ray_actor_options["num_cpus"] == 0.5
    assert other.ray_actor_options["num_gpus"] == 0
    assert deployed({"ray": {"num_gpus": 0.25}}).ray_actor_options["num_gpus"] == 0.25


def test_fewer_replicas_at_most_than_at_least_is_an_error() -> None:
    with pytest.raises(InputError, match="max_replicas has to be"):
        config_of({"ray": {"min_replicas": 3, "max_replicas": 2}}, "config.yaml")
