"""The graph behind BentoML, with its own batching; images come as base64 in JSON."""

import base64

import bentoml
from graph import MAX_BATCH, bits_per_dim, decode, open_session


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Scorer:
    def __init__(self) -> None:
        self.session = open_session()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=1000)
    def score(self, images: list[str]) -> list[float]:
        return bits_per_dim(self.session, [decode(base64.b64decode(image)) for image in images])
