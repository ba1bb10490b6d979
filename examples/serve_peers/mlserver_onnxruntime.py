"""An ONNX file as a runtime of MLServer's; `start.py` writes its settings.

MLServer batches by itself (max_batch_size, max_batch_time). A run happens in a thread, so that
requests are read meanwhile.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxRuntime(MLModel):
    """parameters.uri is the file; parameters.extra has `threads` and `parallel`."""

    async def load(self) -> bool:
        """Makes the session."""
        parameters = self.settings.parameters
        extra = parameters.extra
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = extra["threads"]
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            parameters.uri, options, providers=["CPUExecutionProvider"]
        )
        self._outputs = [each.name for each in self._session.get_outputs()]
        self._threads = ThreadPoolExecutor(extra["parallel"])
        return True

    async def unload(self) -> bool:
        """Ends its threads."""
        self._threads.shutdown()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Runs one batch."""
        feeds = {each.name: NumpyCodec.decode_input(each) for each in payload.inputs}
        arrays = await asyncio.get_running_loop().run_in_executor(
            self._threads, self._session.run, self._outputs, feeds
        )
        outputs = [
            NumpyCodec.encode_output(name, np.asarray(array))
            for name, array in zip(self._outputs, arrays, strict=True)
        ]
        return InferenceResponse(model_name=self.name, outputs=outputs)
