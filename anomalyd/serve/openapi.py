"""`GET /openapi.json`: the HTTP surface, described; `/v2` is in openapi_v2.py."""

from __future__ import annotations

from typing import Any

from anomalyd.serve.openapi_v2 import PATHS as V2_PATHS
from anomalyd.serve.openapi_v2 import SCHEMAS as V2_SCHEMAS
from anomalyd.serve.openapi_v2 import SHARE

__all__ = ["OPENAPI"]


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": _json(schema)}


def _problem(description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/problem+json": {"schema": _ref("Problem")}},
    }


BOOLEAN_QUERY = {"type": "string", "enum": ["0", "1", "false", "true"], "default": "0"}

PARAMETERS = [
    {
        "name": "alpha",
        "in": "query",
        "description": "rate of false alarms to decide at; the bundle's default otherwise",
        "schema": SHARE,
    },
    {
        "name": "label_alpha",
        "in": "query",
        "description": "share of images whose credible labels may lack the true one; or 0.1",
        "schema": SHARE,
    },
    {
        "name": "reject_cost",
        "in": "query",
        "description": "give a label only where its expected cost, 1 if wrong, is at most this",
        "schema": SHARE,
    },
    {
        "name": "prior",
        "in": "query",
        "description": "NAME=P, the probability of a class where the images come from; give all",
        "schema": {"type": "array", "items": {"type": "string"}},
    },
    {
        "name": "heatmap",
        "in": "query",
        "description": "add a PNG that shows where the image is surprising",
        "schema": BOOLEAN_QUERY,
    },
    {
        "name": "explain",
        "in": "query",
        "description": "add each statistic's value and unadjusted p-value; diagnostic only",
        "schema": BOOLEAN_QUERY,
    },
]

BINARY = {"schema": {"type": "string", "format": "binary"}}

SCORE = {
    "summary": "Score one image, or many",
    "parameters": PARAMETERS,
    "requestBody": {
        "required": True,
        "description": "one image under any type (its first bytes decide), or many as multipart",
        "content": {
            "image/*": BINARY,
            "application/octet-stream": BINARY,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                        }
                    },
                }
            },
        },
    },
    "responses": {
        "200": _answer("one result an image, in order", _ref("Scores")),
        "401": _problem("no token, or an unknown one, where the daemon wants one"),
        "403": _problem("a token without the scope score"),
        "400": _problem("empty body, bad parameter, no map, no labels, no default model"),
        "404": _problem("unknown model"),
        "408": _problem("the body arrived too slowly"),
        "413": _problem("too many bytes, pixels or images"),
        "415": _problem("format not allowed, or animated"),
        "422": _problem("truncated, corrupt or of a wrong size"),
        "500": _problem("the daemon failed"),
        "503": _problem("overloaded; Retry-After says when to come again"),
    },
}

NUMBER = {"type": "number"}

SCHEMAS: dict[str, Any] = {
    "Problem": {
        "type": "object",
        "description": "RFC 9457 problem details",
        "required": ["type", "title", "status", "detail"],
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "reason": {"type": "string", "description": "a slug that programs may branch on"},
        },
    },
    "Scores": {
        "type": "object",
        "required": ["model", "version", "results"],
        "properties": {
            "model": {"type": "string"},
            "version": {"type": "string"},
            "results": {
                "type": "array",
                "items": {"oneOf": [_ref("Result"), _ref("Unreadable")]},
            },
        },
    },
    "Result": {
        "type": "object",
        "required": [
            "index",
            "bits_per_dim",
            "likelihood",
            "score",
            "score_name",
            "p_value",
            "alpha",
            "outlier",
        ],
        "properties": {
            "index": {"type": "integer", "description": "place in the request, from 0"},
            "bits_per_dim": {
                "type": "number",
                "description": "-log2 p(x) / (H W C), or its bound; larger is stranger",
            },
            "likelihood": {"type": "string", "description": "exact, elbo or iwae-K"},
            "score": {"type": "number", "description": "the verdict rests on it"},
            "score_name": {"type": "string"},
            "p_value": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            "alpha": SHARE,
            "outlier": {"type": "boolean", "description": "p_value <= alpha"},
            "label": {"type": ["string", "null"]},
            "posterior": {"type": "object", "additionalProperties": NUMBER},
            "rejected": {"type": "boolean"},
            "reason": {"type": "string", "enum": ["novel", "ambiguous"]},
            "explain": {
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "properties": {
                        "value": NUMBER,
                        "p_value": NUMBER,
                        "diagnostic": {"const": True},
                    },
                },
            },
            "heatmap": {"type": "string", "contentEncoding": "base64"},
        },
    },
    "Unreadable": {
        "type": "object",
        "description": "one bad image of several; the others are not affected",
        "required": ["index", "error"],
        "properties": {"index": {"type": "integer"}, "error": {"type": "string"}},
    },
}

NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}

OPENAPI: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "anomalyd", "version": "1", "license": {"name": "Apache-2.0"}},
    "paths": {
        "/v1/score": {"post": {"operationId": "score", **SCORE}},
        "/v1/models/{name}/score": {
            "parameters": [NAME],
            "post": {"operationId": "scoreByModel", **SCORE},
        },
        "/v1/models": {
            "get": {
                "operationId": "listModels",
                "summary": "What is served",
                "responses": {
                    "200": _answer("the models", {"type": "object"}),
                    "401": _problem("no token, or an unknown one, where the daemon wants one"),
                    "403": _problem("a token without the scope score"),
                },
            }
        },
        "/livez": {
            "get": {
                "operationId": "live",
                "summary": "Whether the process works",
                "responses": {"200": _answer("it does", {"type": "object"})},
            }
        },
        "/readyz": {
            "get": {
                "operationId": "ready",
                "summary": "Whether to send requests here",
                "responses": {
                    "200": _answer("yes", {"type": "object"}),
                    "503": _answer("no: still loading, or shutting down", {"type": "object"}),
                },
            }
        },
        "/startupz": {
            "get": {
                "operationId": "started",
                "summary": "Whether the first load is over",
                "responses": {
                    "200": _answer("yes, and from now on", {"type": "object"}),
                    "503": _answer("not yet", {"type": "object"}),
                },
            }
        },
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "summary": "Metrics for Prometheus",
                "responses": {
                    "200": {"description": "the text format, or OpenMetrics"},
                    "401": _problem("no token, or an unknown one, where the daemon wants one"),
                    "403": _problem("a token without the scope score"),
                },
            }
        },
        "/openapi.json": {
            "get": {
                "operationId": "describe",
                "summary": "This description",
                "responses": {
                    "200": _answer("OpenAPI 3.1", {"type": "object"}),
                    "401": _problem("no token, or an unknown one, where the daemon wants one"),
                    "403": _problem("a token without the scope score"),
                },
            }
        },
        "/": {
            "get": {
                "operationId": "page",
                "summary": "A page to drop an image on",
                "responses": {"200": {"description": "HTML", "content": {"text/html": {}}}},
            }
        },
        **V2_PATHS,
    },
    "components": {
        "schemas": {**SCHEMAS, **V2_SCHEMAS},
        "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
    },
    "security": [{}, {"bearer": []}],
}
