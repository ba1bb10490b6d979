"""The whole way: real clients, the HTTP server, the service, an engine; and its OpenAPI page."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import schemathesis
import tritonclient.http as client_library
import tritonclient.http.aio as aio_library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import checks

from tests.serve.engines import image, image_engine
from tests.serve.http_sample import Doubling, Running
from tests.serve.http_sample import serving as serving_http
from tests.serve.libraries import Shelf, serving
from twofour.runtime.session import Session
from twofour.serve.auth import Auth
from twofour.serve.http.api import Api, Parts
from twofour.serve.http.openapi import document
from twofour.serve.http.server import HttpServer
from twofour.serve.limits import Limits


def test_answers_are_the_engines() -> None:
    engine = image_engine()
    images = [image(rows, seed)["x"] for seed in range(8) for rows in (1, 2, 5)]
    with Session(engine) as session:
        expected = [session.run({"x": x})["y"] for x in images]

    def inputs(library: object, x: np.ndarray, binary: bool) -> list[object]:
        tensor = library.InferInput("x", list(x.shape), "FP32")  # type: ignore[attr-defined]
        tensor.set_data_from_numpy(x, binary_data=binary)
        return [tensor]

    def one_by_one(url: str) -> list[np.ndarray]:
        with client_library.InferenceServerClient(url) as client:
            assert client.get_model_metadata("m")["inputs"][0]["shape"] == [-1, 4, 6, 6]
            assert client.get_model_config("m")["name"] == "m"
            return [
                client.infer("m", inputs(client_library, x, n % 2 == 0)).as_numpy("y")
                for n, x in enumerate(images)
            ]

    async def together(url: str) -> list[np.ndarray]:
        async with aio_library.InferenceServerClient(url) as client:
            results = await asyncio.gather(
                *(client.infer("m", inputs(aio_library, x, True)) for x in images)
            )
        return [result.as_numpy("y") for result in results]

    async def whole() -> None:
        service = await serving(Shelf().put("m", {1: engine}))
        auth = Auth(None, None, True)
        server = HttpServer(Api(Parts(service, auth, lambda: b"", lambda: {})))
        url = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
        try:
            for got in (await asyncio.to_thread(one_by_one, url), await together(url)):
                for a, b in zip(got, expected, strict=True):
                    np.testing.assert_array_equal(a, b)
            statistics = service.statistics("m")[0]
            assert statistics["inference_stats"]["success"]["count"] == 2 * len(images)
        finally:
            assert await server.stop(5) == 0
            await service.fleet.close()

    asyncio.run(asyncio.wait_for(whole(), 60))


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving_http(Doubling()) as running:
        yield running


PAGE = document("0", Limits())


@pytest.mark.parametrize(
    "operation",
    [item.ok() for item in schemathesis.openapi.from_dict(PAGE).get_all_operations()],
    ids=lambda operation: operation.label,
)
def test_every_reply_is_as_the_page_says(
    running: Running, operation: schemathesis.schemas.APIOperation
) -> None:
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    cases = st.one_of(operation.as_strategy(generation_mode=mode) for mode in modes)

    @given(case=cases, known=st.booleans())
    @settings(
        max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    def ask(case: schemathesis.Case, known: bool) -> None:
        if known:
            names = {"model": "double", "version": "1"}
            case.path_parameters = {name: names[name] for name in case.path_parameters or {}}
        case.call_and_validate(
            base_url=f"http://{running.url}",
            checks=[
                checks.not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
            ],
        )

    ask()
