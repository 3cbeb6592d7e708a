"""Reads manifests into KServe's own models; what they do not know would be lost on the way back.

python kserve_manifests.py MANIFEST
"""

import json
import sys
from types import SimpleNamespace

import yaml
from kserve import models
from kubernetes import client

KINDS = {"ServingRuntime": "V1alpha1ServingRuntime", "InferenceService": "V1beta1InferenceService"}


def kept(written: object, read: object, path: str) -> None:
    """Fail where a part of `written` is not in `read`."""
    if isinstance(written, dict):
        for key, value in written.items():
            if not isinstance(read, dict) or key not in read:
                raise SystemExit(f"{path}.{key}: not known to KServe")
            kept(value, read[key], f"{path}.{key}")
    elif isinstance(written, list):
        if not isinstance(read, list) or len(written) != len(read):
            raise SystemExit(f"{path}: {written} became {read}")
        for place, (one, other) in enumerate(zip(written, read, strict=True)):
            kept(one, other, f"{path}[{place}]")
    elif written != read:
        raise SystemExit(f"{path}: {written!r} became {read!r}")


api = client.ApiClient()
for name in dir(models):
    if isinstance(getattr(models, name), type):
        setattr(client.models, name, getattr(models, name))
seen = []
with open(sys.argv[1], encoding="utf-8") as stream:
    for document in yaml.safe_load_all(stream):
        answer = SimpleNamespace(data=json.dumps(document))
        read = api.deserialize(answer, KINDS[document["kind"]])
        kept(document, api.sanitize_for_serialization(read), document["kind"])
        seen.append(document["kind"])
print(json.dumps(seen))
