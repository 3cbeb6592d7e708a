"""The graph behind LitServe, with its own batching; images come as base64 in JSON."""

import base64
import os

import litserve
from graph import MAX_BATCH, bits_per_dim, decode, open_session


class Api(litserve.LitAPI):
    def setup(self, device):
        self.session = open_session()

    def decode_request(self, request):
        return decode(base64.b64decode(request["image"]))

    def predict(self, images):
        return bits_per_dim(self.session, images)

    def encode_response(self, bits):
        return {"bits_per_dim": bits}


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(
        port=int(os.environ["PORT"]),
        host="127.0.0.1",
        log_level="error",
        access_log=False,
        generate_client_file=False,
    )
