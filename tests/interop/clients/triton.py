"""Asks a daemon by tritonclient, over HTTP and over gRPC, and prints what it got as JSON.

python triton.py HTTP_ADDRESS GRPC_ADDRESS MODEL IMAGE...
"""

import json
import sys

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http

OUTPUTS = ("score", "bits_per_dim", "p_value", "outlier", "label", "posterior", "reason")
http_address, grpc_address, model, *paths = sys.argv[1:]
images = []
for path in paths:
    with open(path, "rb") as stream:
        images.append(stream.read())
encoded = np.array(images, object)


def tensors(library, name, array, datatype, **how):
    tensor = library.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, **how)
    return [tensor]


def plain(result):
    """Every output as JSON has it."""
    found = {}
    for name in OUTPUTS:
        array = result.as_numpy(name)
        if array is not None:
            values = array.tolist()
            texts = array.dtype == object
            found[name] = (
                [v.decode() if isinstance(v, bytes) else v for v in values] if texts else values
            )
    return found


def asked(library, **how):
    return [library.InferRequestedOutput(name, **how) for name in OUTPUTS[:4]]


found = {}
with http.InferenceServerClient(http_address) as client:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(model)
    metadata = client.get_model_metadata(model)
    version = metadata["versions"][0]
    assert client.is_model_ready(model, version)
    found["metadata"] = metadata
    found["server"] = client.get_server_metadata()
    found["config"] = client.get_model_config(model)
    found["index"] = client.get_model_repository_index()
    sides = next(i["shape"][1:] for i in metadata["inputs"] if i["name"] == "pixels")
    pixels = np.arange(2 * int(np.prod(sides)), dtype=np.uint32).astype(np.uint8)
    pixels = pixels.reshape(2, *sides)
    for name, array, kind in (("image", encoded, "BYTES"), ("pixels", pixels, "UINT8")):
        for binary in (True, False):
            if name == "image" and not binary:
                continue  # it writes bytes into JSON as text, which no image is
            inputs = tensors(http, name, array, kind, binary_data=binary)
            key = f"http {name} {'binary' if binary else 'JSON'}"
            found[key] = plain(client.infer(model, inputs, request_id="mine"))
            found[key + ", JSON outputs"] = plain(
                client.infer(model, inputs, outputs=asked(http, binary_data=False))
            )
    inputs = tensors(http, "image", encoded, "BYTES")
    for algorithm in ("gzip", "deflate"):
        found[f"http image {algorithm}"] = plain(
            client.infer(model, inputs, request_compression_algorithm=algorithm)
        )
    found["http version"] = plain(client.infer(model, inputs, model_version=version))
    found["http id"] = client.infer(model, inputs, request_id="mine").get_response()["id"]
    found["statistics"] = client.get_inference_statistics(model)
    errors = {}
    for key, call in {
        "model": lambda: client.infer("nobody", inputs),
        "version": lambda: client.infer(model, inputs, model_version="99"),
        "image": lambda: client.infer(
            model, tensors(http, "image", np.array([images[0][:60]], object), "BYTES")
        ),
        "load": lambda: client.load_model(model),
    }.items():
        try:
            call()
            errors[key] = None
        except http.InferenceServerException as error:
            errors[key] = error.status()
    found["errors"] = errors

if grpc_address != "-":
    with grpc.InferenceServerClient(grpc_address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(model)
        assert client.is_model_ready(model, version)
        found["grpc metadata"] = client.get_model_metadata(model, as_json=True)
        found["grpc config"] = client.get_model_config(model, as_json=True)
        found["grpc index"] = client.get_model_repository_index(as_json=True)
        for name, array, kind in (("image", encoded, "BYTES"), ("pixels", pixels, "UINT8")):
            inputs = tensors(grpc, name, array, kind)
            found[f"grpc {name}"] = plain(client.infer(model, inputs, outputs=asked(grpc)))
        found["grpc all outputs"] = plain(
            client.infer(model, tensors(grpc, "image", encoded, "BYTES"))
        )
        found["grpc statistics"] = client.get_inference_statistics(model, as_json=True)
        try:
            client.infer("nobody", inputs)
        except grpc.InferenceServerException as error:
            found["errors"]["grpc model"] = error.status()

print(json.dumps(found))
