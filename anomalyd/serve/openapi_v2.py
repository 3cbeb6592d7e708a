"""The Open Inference Protocol's part of `GET /openapi.json`."""

from __future__ import annotations

from typing import Any

__all__ = ["PATHS", "SCHEMAS", "SHARE"]

TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
SHARE = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": _json(schema)}


def _errors(**described: str) -> dict[str, Any]:
    """Answers by status; every operation may be asked without the right token."""
    usual = {
        "s401": "no token, or an unknown one, where the daemon wants one",
        "s403": "a token without the scope, or a thing that is not allowed here",
    }
    return {
        status[1:]: _answer(description, _ref("InferenceError"))
        for status, description in {**usual, **described}.items()
    }


def _get(operation: str, summary: str, schema: dict[str, Any], **errors: str) -> dict[str, Any]:
    responses = {"200": _answer("done", schema), **_errors(**errors)}
    return {"get": {"operationId": operation, "summary": summary, "responses": responses}}


UNKNOWN = {"s404": "unknown model or version", "s503": "the models are being loaded"}
NAME = {"name": "name", "in": "path", "required": True, "schema": TEXT}
VERSION = {"name": "version", "in": "path", "required": True, "schema": TEXT}
HEADER_LENGTH = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "bytes of the JSON at the start of the body; tensors follow. 0: the body is "
    "one encoded image and no JSON",
    "schema": {"type": "integer", "minimum": 0},
}
ENCODING = {
    "name": "Content-Encoding",
    "in": "header",
    "schema": {"type": "string", "enum": ["gzip", "deflate", "identity"]},
}


def _described(*, versioned: bool) -> dict[str, Any]:
    """The paths of one model, or of one of its versions."""
    base = "/v2/models/{name}" + ("/versions/{version}" if versioned else "")
    ending = "OfVersion" if versioned else ""
    given = {"parameters": [NAME, VERSION] if versioned else [NAME]}
    infer = {
        "operationId": "infer" + ending,
        "summary": "Score the images in a tensor",
        "parameters": [HEADER_LENGTH, ENCODING],
        "requestBody": {
            "required": True,
            "description": "one input: image (BYTES; base64 in JSON) or pixels (UINT8); as JSON, "
            "or with the tensor's bytes after it",
            "content": {
                **_json(_ref("InferenceRequest")),
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        },
        "responses": {
            "200": {
                "description": "one element an image, in order; a body with binary tensors says "
                "in Inference-Header-Content-Length where they begin",
                "content": {
                    **_json(_ref("InferenceResponse")),
                    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
                },
            },
            **_errors(
                s400="not JSON, or not of the protocol; a bad parameter; no map; empty image",
                s404="unknown model or version",
                s408="the body arrived too slowly",
                s413="too many bytes, pixels or images",
                s415="an image format that is not allowed, or an unknown Content-Encoding",
                s422="an image that is truncated, corrupt or of a wrong size",
                s500="the daemon failed",
                s503="overloaded, or loading; Retry-After says when to come again",
            ),
        },
    }
    return {
        base: {
            **given,
            **_get(
                "modelMetadata" + ending,
                "Inputs and outputs",
                _ref("ModelMetadata"),
                **UNKNOWN,
            ),
        },
        base + "/ready": {
            **given,
            "get": {
                "operationId": "modelReady" + ending,
                "summary": "Whether to send requests for this model here",
                "responses": {
                    "200": _answer("yes", _ref("ModelReady")),
                    **_errors(s404="unknown model or version"),
                    "503": _answer(
                        "no: leaving, or still loading",
                        {"anyOf": [_ref("ModelReady"), _ref("InferenceError")]},
                    ),
                },
            },
        },
        base + "/config": {
            **given,
            **_get(
                "modelConfig" + ending,
                "Configuration as Triton's clients read it",
                {"type": "object"},
                **UNKNOWN,
            ),
        },
        base + "/stats": {
            **given,
            **_get("modelStats" + ending, "Counts and times", _ref("Statistics"), **UNKNOWN),
        },
        base + "/infer": {**given, "post": infer},
    }


CHANGE = {
    "requestBody": {
        "content": _json(
            {
                "type": "object",
                "properties": {
                    "parameters": {
                        "type": "object",
                        "properties": {"version": TEXT},
                    }
                },
            }
        )
    },
    "responses": {
        "200": {"description": "done"},
        **_errors(
            s400="not JSON, or a bundle that cannot be loaded; what was served still is",
            s404="nothing of this name in the repository",
            s408="the body arrived too slowly",
            s413="too many bytes",
            s503="overloaded; Retry-After says when to come again",
        ),
    },
}

PATHS: dict[str, Any] = {
    "/v2": _get("serverMetadata", "Name, version and extensions", _ref("ServerMetadata")),
    "/v2/": _get("serverMetadataSlash", "The same", _ref("ServerMetadata")),
    "/v2/health/live": {
        "get": {
            "operationId": "serverLive",
            "summary": "Whether the process works",
            "responses": {"200": _answer("it does", _ref("Health"))},
        }
    },
    "/v2/health/ready": {
        "get": {
            "operationId": "serverReady",
            "summary": "Whether to send requests here",
            "responses": {
                "200": _answer("yes", _ref("Health")),
                "503": _answer("no: still loading, or shutting down", _ref("Health")),
            },
        }
    },
    "/v2/models": _get(
        "modelNames",
        "The models' names",
        {"type": "object", "properties": {"models": {"type": "array", "items": TEXT}}},
    ),
    "/v2/models/stats": _get("stats", "Counts and times of all models", _ref("Statistics")),
    **_described(versioned=False),
    **_described(versioned=True),
    "/v2/repository/index": {
        "post": {
            "operationId": "repositoryIndex",
            "summary": "Every version of every model, served or not, and why not",
            "requestBody": {
                "content": _json({"type": "object", "properties": {"ready": {"type": "boolean"}}})
            },
            "responses": {
                "200": _answer("one entry a version", {"type": "array", "items": _ref("Version")}),
                **_errors(
                    s400="not JSON",
                    s408="the body arrived too slowly",
                    s413="too many bytes",
                    s503="overloaded; Retry-After says when to come again",
                ),
            },
        }
    },
    "/v2/repository/models/{name}/load": {
        "parameters": [NAME],
        "post": {
            "operationId": "loadModel",
            "summary": "Load what is new of a model, and serve the version named, or its newest",
            **CHANGE,
        },
    },
    "/v2/repository/models/{name}/unload": {
        "parameters": [NAME],
        "post": {
            "operationId": "unloadModel",
            "summary": "Serve a model, or the version named, no more",
            **CHANGE,
        },
    },
}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


PARAMETERS = {
    "type": "object",
    "additionalProperties": {"type": ["boolean", "number", "string"]},
}
SHAPE = {"type": "array", "items": {"type": "integer"}}
TENSOR_METADATA = _object(["name", "datatype", "shape"], name=TEXT, datatype=TEXT, shape=SHAPE)
DURATION = _object(["count", "ns"], count=COUNT, ns=COUNT)

SCHEMAS: dict[str, Any] = {
    "InferenceError": _object(["error"], error=TEXT),
    "Health": _object(["live"], live={"type": "boolean"}, ready={"type": "boolean"}),
    "ServerMetadata": _object(
        ["name", "version", "extensions"],
        name=TEXT,
        version=TEXT,
        extensions={"type": "array", "items": TEXT},
    ),
    "ModelMetadata": _object(
        ["name", "versions", "platform", "inputs", "outputs"],
        name=TEXT,
        versions={"type": "array", "items": TEXT},
        platform=TEXT,
        inputs={"type": "array", "items": TENSOR_METADATA},
        outputs={"type": "array", "items": TENSOR_METADATA},
    ),
    "ModelReady": _object(["name", "ready"], name=TEXT, ready={"type": "boolean"}),
    "InferenceRequest": _object(
        ["inputs"],
        id=TEXT,
        parameters={
            **PARAMETERS,
            "properties": {
                "alpha": SHARE,
                "label_alpha": SHARE,
                "reject_cost": SHARE,
                "heatmap": {"type": "boolean"},
                "timeout": {"type": "integer", "description": "longest wait, microseconds"},
                "binary_data_output": {"type": "boolean"},
            },
        },
        inputs={
            "type": "array",
            "minItems": 1,
            "maxItems": 1,
            "items": _object(
                ["name", "shape", "datatype"],
                name={"type": "string", "enum": ["image", "pixels"]},
                shape={
                    "type": "array",
                    "items": {"type": "integer", "minimum": 1},
                    "minItems": 1,
                    "maxItems": 4,
                },
                datatype={"type": "string", "enum": ["BYTES", "UINT8"]},
                parameters=PARAMETERS,
                data={
                    "type": "array",
                    "description": "base64 texts, or numbers from 0 to 255, flat or nested",
                },
            ),
        },
        outputs={
            "type": "array",
            "items": _object(["name"], name=TEXT, parameters=PARAMETERS),
        },
    ),
    "InferenceResponse": _object(
        ["model_name", "model_version", "outputs"],
        model_name=TEXT,
        model_version=TEXT,
        id=TEXT,
        outputs={
            "type": "array",
            "items": _object(
                ["name", "shape", "datatype"],
                name=TEXT,
                shape=SHAPE,
                datatype=TEXT,
                parameters=PARAMETERS,
                data={"type": "array"},
            ),
        },
    ),
    "Version": _object(
        ["name", "version", "state", "reason"],
        name=TEXT,
        version=TEXT,
        state={"type": "string", "enum": ["READY", "UNLOADING", "UNAVAILABLE"]},
        reason=TEXT,
    ),
    "Statistics": _object(
        ["model_stats"],
        model_stats={
            "type": "array",
            "items": _object(
                ["name", "version", "inference_count", "execution_count", "inference_stats"],
                name=TEXT,
                version=TEXT,
                last_inference=COUNT,
                inference_count=COUNT,
                execution_count=COUNT,
                inference_stats={"type": "object", "additionalProperties": DURATION},
                batch_stats={"type": "array"},
            ),
        },
    ),
}
