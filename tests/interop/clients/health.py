"""Asks grpc.health.v1 and server reflection by grpcio's own stubs; prints what they say.

python health.py GRPC_ADDRESS
"""

import json
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

with grpc.insecure_channel(sys.argv[1]) as channel:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    database = ProtoReflectionDescriptorDatabase(channel)
    services = sorted(database.get_services())
    file = database.FindFileContainingSymbol("inference.GRPCInferenceService")
    methods = sorted(m.name for s in file.service for m in s.method)
    print(json.dumps({"health": answer.status, "services": services, "methods": methods}))
