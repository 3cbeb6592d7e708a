"""Asks a daemon by KServe's clients, over REST and over gRPC, and prints what it got as JSON.

python kserve_client.py HTTP_URL GRPC_ADDRESS MODEL IMAGE
"""

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

url, grpc_address, model, path = sys.argv[1:]
with open(path, "rb") as stream:
    image = stream.read()


def request(binary: bool, parameters: dict | None = None) -> InferRequest:
    tensor = InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([image], object), binary_data=binary)
    return InferRequest(
        model_name=model, infer_inputs=[tensor], request_id="mine", parameters=parameters
    )


def plain(response) -> dict:
    found = {}
    for output in response.outputs:
        array = output.as_numpy()
        values = array.tolist()
        found[output.name] = [v.decode() if isinstance(v, bytes) else v for v in values]
    return found


async def rest(found: dict) -> None:
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=60))
    found["live"] = await client.is_server_live(url)
    found["ready"] = await client.is_server_ready(url)
    found["model ready"] = await client.is_model_ready(url, model)
    response = await client.infer(url, request(True), model_name=model)
    found["rest binary"] = plain(response)
    found["rest id"] = response.id
    response = await client.infer(
        url, request(True, {"binary_data_output": True}), model_name=model
    )
    found["rest binary outputs"] = plain(response)
    await client.close()


async def grpc(found: dict) -> None:
    async with InferenceGRPCClient(grpc_address, timeout=60) as client:
        found["grpc live"] = await client.is_server_live()
        found["grpc ready"] = await client.is_server_ready()
        found["grpc model ready"] = await client.is_model_ready(model)
        found["grpc"] = plain(await client.infer(request(True)))


async def main() -> None:
    found: dict = {}
    await rest(found)
    if grpc_address != "-":
        await grpc(found)
    print(json.dumps(found))


asyncio.run(main())
