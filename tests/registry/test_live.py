"""A server that polls while versions are published and promoted under load: no request is lost."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc_library
import tritonclient.http as http_library

from tests.serve.engines import image, image_engine
from tests.serve.server_process import Served, serving, wait_for
from twofour.registry.keys import new_key
from twofour.registry.promote import PromoteOptions, promote, rollback
from twofour.registry.publish import Published, PublishOptions, publish
from twofour.runtime.session import Session

INPUTS = image(2, 5)


def answer(seed: int) -> np.ndarray:
    with Session(image_engine(seed)) as session:
        return np.array(session.run(INPUTS)["y"])


@contextmanager
def load(served: Served, failed: queue.Queue[Any], answers: list[bytes]) -> Iterator[None]:
    """Clients of both protocols that never stop asking; what goes wrong is in `failed`."""
    stop = threading.Event()

    def ask(library: Any, url: str) -> None:
        try:
            with library.InferenceServerClient(url) as client:
                x = library.InferInput("x", list(INPUTS["x"].shape), "FP32")
                x.set_data_from_numpy(INPUTS["x"])
                while not stop.is_set():
                    answers.append(client.infer("net", [x]).as_numpy("y").tobytes())
        except Exception as e:  # noqa: BLE001  it is what the test is about
            failed.put(e)

    clients = [(http_library, served.http), (grpc_library, served.grpc)]
    threads = [threading.Thread(target=ask, args=each) for each in clients]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def put(repository: Path, folder: Path, seed: int, key: Path | None) -> Published:
    path = image_engine(seed).save(folder / f"{seed}.engine")
    return publish(str(repository), "net", {"net.engine": path}, PublishOptions(key))


def test_promotions_under_load_lose_no_request(tmp_path: Path) -> None:
    """And versions that are altered, or not signed, change nothing."""
    repository, key = tmp_path / "models", tmp_path / "key.pem"
    new_key(key)
    expected = {number: answer(number).tobytes() for number in (1, 2)}
    put(repository, tmp_path, 1, key)
    promote(str(repository), "net", 1)
    failed: queue.Queue[Any] = queue.Queue()
    answers: list[bytes] = []
    options = ("--control", "poll", "--poll", "0.2", "--trusted-keys", str(tmp_path / "key.pub"))
    with serving(repository, tmp_path, *options) as served, load(served, failed, answers):

        def answered(*numbers: int) -> bool:
            """All of these answer, and no other, in what comes from now on."""
            start = len(answers)
            wait_for(lambda: len(answers) > start + 60 or not failed.empty(), 60, "answers")
            return {*answers[start + 20 :]} == {expected[n] for n in numbers}

        wait_for(lambda: answered(1), 60, "version 1")
        assert put(repository, tmp_path, 2, key).version == 2
        promote(str(repository), "net", 2, PromoteOptions(50))
        wait_for(lambda: answered(1, 2), 60, "both")
        promote(str(repository), "net", 2)
        wait_for(lambda: answered(2), 60, "version 2")
        rollback(str(repository), "net")
        wait_for(lambda: answered(1), 60, "version 1 again")

        assert put(repository, tmp_path, 3, None).version == 3
        promote(str(repository), "net", 3)
        served.wait_for_log(r"version 3 cannot be loaded: .*refused here|not signed by one", 60)
        rollback(str(repository), "net")
        altered = Path(put(repository, tmp_path, 4, key).place) / "net.engine"
        content = bytearray(altered.read_bytes())
        content[len(content) // 2] ^= 1
        altered.chmod(0o644)
        altered.write_bytes(content)
        promote(str(repository), "net", 4)
        served.wait_for_log(r"net\.engine: its content is not what was published", 60)
        assert answered(1)
    assert failed.empty(), failed.get()
    assert {*answers} == {*expected.values()}
