"""`twofour serve --ray`: puts a repository on a Ray cluster, and keeps the two alike.

One application of Ray Serve for each model, and one for the front:

    client --HTTP--> Ray's proxy, any node --> front, same node --> replica of the model, any node

Each model is a deployment of its own, so that each has its own number of replicas, which follows
the length of its own queue, and a model that cannot be loaded keeps none of the others from being
deployed. The front costs a request one more hop, and repeats it where a replica dies.

A new version is taken up by the replicas themselves (`replica.py`). What is done here is what
they cannot do: models that come and go, options of `ray:`, nodes that join and leave.
"""

from __future__ import annotations

import hashlib
import logging
import math
import pickle
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve

from twofour.cluster.connect import connect
from twofour.core.errors import InputError
from twofour.core.version import __version__
from twofour.serve.app import ServeOptions
from twofour.serve.auth import Auth, TokenFile
from twofour.serve.logs import Logs
from twofour.serve.ray.front import DEPLOYMENT, Directory, Front, application_of
from twofour.serve.ray.replica import Replica
from twofour.serve.repository.config import ModelConfig
from twofour.serve.repository.layout import Snapshot
from twofour.serve.repository.store import Store

log = logging.getLogger(__name__)
LOOK_S = 1.0
FRONT_S = 10.0
RAYS_LOG = {"log_level": "WARNING", "enable_access_log": False}
"""Requests are logged by the replicas, where `logs` says so."""
CONSTRUCTIONS = 3
"""So often a replica is tried before its model is given up until the repository changes."""
BAD = ("DEPLOY_FAILED", "UNHEALTHY")
FRONT_REQUESTS = 4096
"""At once in one front: what waits is bounded for each model, by its `queue.length`."""


@dataclass(frozen=True)
class Wanted:
    """What the cluster should run.

    Attributes:
        models: to be deployed, with their configuration.
        files: name -> text that changes when the files of its versions do.
        refused: name -> why a model of the repository is not.
        nodes: of the cluster that are alive.
        auth: who may ask, as bytes that the fronts are given.
    """

    models: Mapping[str, ModelConfig] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    nodes: int = 0
    auth: bytes = b""


def deploy(options: ServeOptions, address: str = "") -> None:
    """Serves a repository on Ray until SIGTERM or SIGINT, and until what came before is answered.

    Args:
        options: as of a server of its own. The repository, and where they are named the files of
            TLS, have to be there under the same name on every node.
        address: of the cluster: "auto", the one of this machine; "host:port", that of its head;
            "": one is started on this machine, and ended at the end.

    Raises:
        InputError: there is no such cluster, or an option cannot be had there.
    """
    http = http_options(options)
    if "://" not in options.repository:
        options = replace(options, repository=str(Path(options.repository).absolute()))
    logs = Logs(options.logs, sys.stderr)
    try:
        connect(address, shows_logs=True)
        follow(options, http)
    finally:
        if not address and ray.is_initialized():
            serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
        logs.close()


def follow(options: ServeOptions, http: dict[str, Any]) -> None:
    """Serves until a signal comes.

    Raises:
        InputError: the repository or a token file cannot be used.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    deployed = Deployed(options)
    serve.start(proxy_location="EveryNode", http_options=http, logging_config=RAYS_LOG)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    log.info("HTTP at %s:%d of every node", http["host"], http["port"])
    deployed.run(stop)


def http_options(options: ServeOptions) -> dict[str, Any]:
    """What Ray's proxies are told.

    Raises:
        InputError: an option cannot be had on a cluster.
    """
    listen, fix = options.listen, "leave the option out, or serve without --ray"
    if not listen.http_port:
        expected = ["expected a port that is free on every node", f"got {listen.http_port}"]
        raise InputError("--ray serves HTTP on one port of all nodes", expected, "name a port")
    if options.fleet.control == "explicit":
        expected = ["expected control none or poll", "got explicit"]
        raise InputError("on Ray models are not loaded on request", expected, fix)
    if options.listeners:
        raise InputError("on Ray requests are not traced", ["got where traces should go"], fix)
    found: dict[str, Any] = {"host": listen.host, "port": listen.http_port}
    if listen.tls is not None:
        files = listen.tls
        found |= {"ssl_certfile": str(files.cert), "ssl_keyfile": str(files.key)}
        found |= {"ssl_ca_certs": str(files.client_ca)} if files.client_ca else {}
    return found


class Deployed:
    """What this process keeps on the cluster."""

    def __init__(self, options: ServeOptions) -> None:
        """Deploys nothing yet.

        Raises:
            InputError: the repository or a token file cannot be used.
        """
        self.options = options
        self.store = Store(options.repository, options.cache, trust=options.trust)
        self.auth = auth_of(options)
        self.now = Wanted()
        self.needed: list[str] = []
        self.states: dict[str, str] = {}
        self.tried: dict[str, str] = {}
        self.retries: dict[str, str] = {}

    def run(self, stop: threading.Event) -> None:
        """Keeps the cluster like the repository until it is stopped, then takes all down.

        Raises:
            InputError: the repository cannot be read at the start.
        """
        options, fleet = self.options, self.options.fleet
        wanted = self.wanted(self.store.snapshot())
        self.needed = [*wanted.refused]
        self.needed += [name for name, each in wanted.models.items() if each.load == "start"]
        self.remove(set(known(options.name)) - set(wanted.models))
        self.become(wanted)
        looked_s = time.monotonic()
        while not stop.wait(LOOK_S):
            self.tell()
            snapshot = None
            if fleet.control == "poll" and time.monotonic() - looked_s > fleet.poll_s:
                snapshot, looked_s = self.look(), time.monotonic()
            self.become(self.wanted(snapshot))
        log.info("stopping: requests are answered for %.1f s more", options.drain_delay_s)
        self.put_front(leaving=True)
        time.sleep(options.drain_delay_s)
        serve.delete(options.name)
        self.remove(set(self.now.models))

    def look(self) -> Snapshot | None:
        """The repository; None: it cannot be read now."""
        try:
            return self.store.snapshot()
        except InputError as e:
            log.error("the repository cannot be read, what is deployed stays: %s", e)
            return None

    def wanted(self, snapshot: Snapshot | None) -> Wanted:
        """What a repository, the nodes and the token files ask for; None: the same models."""
        self.auth.reread()
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
        rest = replace(self.now, nodes=nodes, auth=pickle.dumps(self.auth))
        if snapshot is None:
            return rest
        models: dict[str, ModelConfig] = {}
        files: dict[str, str] = {}
        refused = dict(snapshot.refused)
        for name, model in snapshot.models.items():
            if model.config is not None and model.versions:
                models[name] = model.config
                files[name] = " ".join(each.fingerprint for each in model.versions.values())
            else:
                refused[name] = model.problem or "; ".join(model.problems) or "no version"
        return replace(rest, models=models, files=files, refused=refused)

    def become(self, wanted: Wanted) -> None:
        """Deploys what differs, and removes what is not wanted any more."""
        before, self.now = self.now, wanted
        again = self.worth_another_try()
        if wanted == before and not again:
            return
        for name in sorted(wanted.refused.items() - before.refused.items()):
            log.error("model %s is not served: %s", *name)
        targets = [
            model_target(name, config, self.options, self.retries.get(name, ""))
            for name, config in wanted.models.items()
            if before.models.get(name) != config or name in again
        ]
        if targets:
            put(targets)
        self.put_front()
        if gone := set(before.models) - set(wanted.models):
            self.wait_front()
            self.remove(gone)

    def worth_another_try(self) -> set[str]:
        """The models that Ray has given up, and whose files are others than it had to try."""
        files = self.now.files
        given_up = {name for name in files if self.states.get(name) == "DEPLOY_FAILED"}
        again = {name for name in given_up if self.tried.get(name) != files[name]}
        self.retries |= {name: files[name] for name in again}
        self.tried |= {name: files[name] for name in files if name in again or name not in given_up}
        return again

    def wait_front(self) -> None:
        """Until the fronts know what they were told: none sends to a model that is then removed."""
        end = time.monotonic() + FRONT_S
        time.sleep(LOOK_S)
        while time.monotonic() < end:
            if serve.status().applications[self.options.name].status == "RUNNING":
                return
            time.sleep(LOOK_S)
        log.warning("not every node has a front yet")

    def put_front(self, *, leaving: bool = False) -> None:
        """Tells the fronts which models there are, and has one on every node."""
        models = {name: config.ray.min_replicas == 0 for name, config in self.now.models.items()}
        directory = Directory(models, dict(self.now.refused), self.needed, leaving)
        put([front_target(directory, self.now, self.options)])

    def remove(self, models: set[str]) -> None:
        """Ends the replicas of these models once they have answered what they have."""
        if not models:
            return
        with ThreadPoolExecutor(len(models)) as threads:
            list(threads.map(serve.delete, (application_of(self.options.name, n) for n in models)))
        log.info("taken off the cluster: %s", ", ".join(sorted(models)))

    def tell(self) -> None:
        """Logs what has changed of each model's state."""
        states = known(self.options.name)
        for name, (state, message) in states.items():
            if self.states.get(name) != state:
                level = logging.ERROR if state in BAD else logging.INFO
                log.log(level, "model %s: %s %s", name, state.lower(), message)
        self.states = {name: state for name, (state, _) in states.items()}


def auth_of(options: ServeOptions) -> Auth:
    """Who may ask; nobody may control.

    Raises:
        InputError: a token file cannot be used.
    """
    tokens = TokenFile(options.tokens) if options.tokens is not None else None
    control = TokenFile(options.control_tokens) if options.control_tokens is not None else None
    return Auth(tokens, control, loopback_only=False)


def known(server: str) -> dict[str, tuple[str, str]]:
    """Models of a server that are on the cluster -> their state, and what Ray says of it."""
    prefix = application_of(server, "")
    found = serve.status().applications.items()
    return {
        name.removeprefix(prefix): (
            each.status.value,
            " ".join(deployment.message for deployment in each.deployments.values()),
        )
        for name, each in found
        if name.startswith(prefix)
    }


def put(targets: list[serve.RunTarget]) -> None:
    """Deploys applications, or changes those that are there, and does not wait."""
    serve.run_many(
        targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    )


def model_target(
    name: str, config: ModelConfig, options: ServeOptions, retry: str = ""
) -> serve.RunTarget:
    """The application of a model.

    Args:
        name: of the model.
        config: of the model.
        options: of the server.
        retry: another text has Ray start what it had given up.
    """
    scale = config.ray
    threads = sum(each.threads or 1 for each in config.instances)
    deployment = serve.deployment(
        name=DEPLOYMENT,
        user_config={},
        ray_actor_options={
            "num_cpus": threads if scale.num_cpus is None else scale.num_cpus,
            "num_gpus": scale.num_gpus,
        },
        max_ongoing_requests=math.ceil(2 * scale.target_ongoing_requests),
        max_queued_requests=config.queue.length,
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.target_ongoing_requests,
            "upscale_delay_s": scale.upscale_delay_s,
            "downscale_delay_s": scale.downscale_delay_s,
        },
        max_constructor_retry_count=CONSTRUCTIONS,
        graceful_shutdown_timeout_s=options.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=RAYS_LOG,
    )(Replica)
    deployment = kept(deployment, version_of(options, retry.encode()))
    application = application_of(options.name, name)
    return serve.RunTarget(deployment.bind(name, options), application, route_prefix=None)


def front_target(directory: Directory, wanted: Wanted, options: ServeOptions) -> serve.RunTarget:
    """The application of the front: one on each node, as Ray's proxies prefer the one beside."""
    deployment = serve.deployment(
        name="Front",
        user_config=directory.plain(),
        num_replicas=wanted.nodes,
        max_replicas_per_node=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=FRONT_REQUESTS,
        graceful_shutdown_timeout_s=options.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=RAYS_LOG,
    )(Front)
    deployment = kept(deployment, version_of(options, wanted.auth))
    return serve.RunTarget(deployment.bind(options, wanted.auth), options.name, route_prefix="/")


def kept(deployment: serve.Deployment, version: str) -> serve.Deployment:
    """With a version by which Ray knows that running processes are still what is asked for.

    Without one Ray starts all processes of an application anew whenever it is put again, be it for
    one more node. The option is Ray's own (its declarative files use it), not a public one.
    """
    return deployment.options(version=version, _internal=True)


def version_of(options: ServeOptions, more: bytes = b"") -> str:
    """Changes where processes have to be started anew; so Ray keeps all others."""
    return hashlib.sha256(f"{__version__}\n{options}\n".encode() + more).hexdigest()[:16]
