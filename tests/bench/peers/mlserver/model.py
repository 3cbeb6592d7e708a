"""The graph behind MLServer, with its own batching; images come as base64 in JSON."""

import asyncio
import base64
import os
import sys

sys.path.insert(0, os.environ["PEERS"])
import numpy as np
from graph import bits_per_dim, decode, open_session
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Scorer(MLModel):
    async def load(self) -> bool:
        self.session = open_session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        texts = payload.inputs[0].data
        images = [decode(base64.b64decode(text)) for text in texts]
        loop = asyncio.get_running_loop()
        bits = await loop.run_in_executor(None, bits_per_dim, self.session, images)
        output = NumpyCodec.encode_output("bits_per_dim", np.array(bits))
        return InferenceResponse(model_name=self.name, outputs=[output])
