"""The walk over ONNX bytes: what it reads, what it refuses, and that nothing else comes out."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from anomalyd.detect.onnxfile import Tensor, check_graph, scan_model
from anomalyd.errors import BundleError
from anomalyd.images import ImageSpec

MODEL = tiny.tiny_model().SerializeToString(deterministic=True)


def check(model: onnx.ModelProto, **changes) -> None:
    check_graph(scan_model(model.SerializeToString()), tiny.tiny_manifest(**changes))


class TestReading:
    def test_inputs_outputs_and_opset(self):
        """Names, types and shapes are those that the onnx package put in."""
        graph = scan_model(MODEL)
        assert graph.opset == 18
        assert graph.inputs == [Tensor("image", "uint8", ("N", 4, 4, 1))]
        assert graph.outputs == [
            Tensor("log_likelihood", "float32", ("N", 1)),
            Tensor("statistics", "float32", ("N", 2)),
            Tensor("nll_map", "float32", ("N", 4, 4)),
        ]
        assert {"Gather", "ReduceSum", "Concat"} <= graph.operators

    def test_initialisers_among_the_inputs_are_no_inputs(self):
        """Old exporters list weights as inputs, too."""
        model = tiny.tiny_model()
        model.graph.input.append(helper.make_tensor_value_info("table", TensorProto.DOUBLE, [256]))
        assert [t.name for t in scan_model(model.SerializeToString()).inputs] == ["image"]

    def test_operators_of_subgraphs_are_found(self):
        """A random operator hides in no branch."""
        model = tiny.tiny_model()
        draw = helper.make_node("RandomNormal", [], ["noise"], shape=[1])
        branch = helper.make_graph([draw], "branch", [], [])
        model.graph.node.append(
            helper.make_node("If", ["yes"], ["x"], then_branch=branch, else_branch=branch)
        )
        assert "RandomNormal" in scan_model(model.SerializeToString()).operators
        with pytest.raises(BundleError, match="RandomNormal draws at random"):
            check(model)

    def test_a_split_message_is_read_as_protobuf_reads_it(self):
        """Two graph fields are one graph, merged; what stands in the second counts as well."""
        first, second = tiny.tiny_model(), onnx.ModelProto()
        second.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
        joined = first.SerializeToString() + second.SerializeToString()
        assert len(onnx.load_from_string(joined).graph.output) == 4
        assert [t.name for t in scan_model(joined).outputs][-1] == "more"

    @given(
        st.lists(
            st.tuples(
                st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
                st.sampled_from(["float32", "uint8", "int64", "float64"]),
                st.lists(st.integers(0, 2**40) | st.sampled_from(["N", "M"]), max_size=4),
            ),
            max_size=4,
        )
    )
    def test_any_signature_is_read_back(self, signature):
        """Names, types and shapes survive whatever they are."""
        values = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(t)), s)
            for name, t, s in signature
        ]
        graph = helper.make_graph([], "g", values, values)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
        found = scan_model(model.SerializeToString())
        assert found.outputs == [Tensor(n, t, tuple(s)) for n, t, s in signature]
        assert found.inputs == found.outputs


class TestContract:
    def test_the_tiny_graph_keeps_it(self):
        """The graph of the tiny bundle is as its manifest says."""
        check(tiny.tiny_model())

    def test_classes_are_columns_of_the_likelihood(self):
        """Two classes need two columns."""
        with pytest.raises(BundleError, match=r"log_likelihood must be float32 .*\(N, 2\)"):
            check(tiny.tiny_model(), classes=["a", "b"])

    def test_the_opset_is_the_stated_one(self):
        """The manifest does not lie about the operator set."""
        with pytest.raises(BundleError, match="opset is 18 where the manifest says 20"):
            check(tiny.tiny_model(), opset=20)

    def test_the_size_is_the_stated_one(self):
        """Height and width are fixed, and the manifest's."""
        with pytest.raises(BundleError, match=r"image must be uint8 .*\(N, 8, 4, 1\), not uint8"):
            check(tiny.tiny_model(), image=ImageSpec(8, 4, 1))

    def test_the_outputs_are_the_listed_ones(self):
        """No output is hidden and none is missing."""
        outputs = tiny.tiny_manifest().outputs
        with pytest.raises(BundleError, match=r"outputs must be \['emb.*, not \['log_"):
            check(tiny.tiny_model(), outputs={**outputs, "embedding": {"unit": "none"}})

    def test_the_batch_is_left_open(self):
        """A graph for batches of one size only is refused."""
        model = tiny.tiny_model()
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
        with pytest.raises(BundleError, match=r"image must be .*\(8, 4, 4, 1\)"):
            check(model)

    @pytest.mark.parametrize("name", ["log_likelihood", "statistics", "nll_map"])
    def test_outputs_are_float32(self, name):
        """Every output that the contract names has its type."""
        model = tiny.tiny_model()
        (output,) = [o for o in model.graph.output if o.name == name]
        output.type.tensor_type.elem_type = TensorProto.FLOAT16
        with pytest.raises(BundleError, match=f"{name} must be float32 .* not float16"):
            check(model)

    def test_there_is_one_input(self):
        """A second input would have to be fed by someone."""
        model = tiny.tiny_model()
        model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.UINT8, ["N"]))
        with pytest.raises(BundleError, match="must have the one input 'image'"):
            check(model)


def field(number: int, wire: int, rest: bytes) -> bytes:
    """One field of a protobuf message, as it may not be."""
    return bytes([number << 3 | wire]) + rest


FOREIGN = {
    "wire type 3, an old group": field(15, 3, field(15, 4, b"")),
    "wire type 4, a group's end alone": field(15, 4, b""),
    "wire type 6": field(15, 6, b"\0"),
    "wire type 7": field(15, 7, b"\0"),
    "a field that is longer than the file": field(2, 2, b"\x7f" + b"x"),
    "a length of 2^63": field(2, 2, b"\x80" * 9 + b"\x01" + b"x"),
    "a length without an end": field(2, 2, b"\xff"),
    "a number of eleven bytes": field(1, 0, b"\x80" * 10 + b"\x01"),
    "eight bytes that are four": field(15, 1, b"\0" * 4),
    "four bytes that are two": field(15, 5, b"\0" * 2),
}


def followed(tail: bytes, *, in_graph: bool) -> bytes:
    """The tiny model with these bytes behind it, or behind the graph in it."""
    if not in_graph:
        return MODEL + tail
    model = tiny.tiny_model()
    graph = model.graph.SerializeToString() + tail
    model.ClearField("graph")
    size = len(graph)
    length = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
    return model.SerializeToString() + field(7, 2, length + graph)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("in_graph", [False, True])
def test_what_is_no_protobuf_is_refused(name, in_graph):
    """Behind a model that is read without it."""
    assert scan_model(followed(b"", in_graph=in_graph)).outputs == scan_model(MODEL).outputs
    with pytest.raises(BundleError) as caught:
        scan_model(followed(FOREIGN[name], in_graph=in_graph))
    tiny.check_line(caught.value)


class TestFuzz:
    @given(st.binary(max_size=200))
    def test_arbitrary_bytes(self, data):
        """Bytes that are no model end in a BundleError of one line."""
        with pytest.raises(BundleError) as caught:
            scan_model(data)
        tiny.check_line(caught.value)

    @settings(max_examples=400)
    @given(st.lists(st.tuples(st.integers(0, len(MODEL) - 1), st.integers(0, 255)), max_size=8))
    def test_changed_bytes(self, changes):
        """A model with some bytes changed is read or refused, never anything else."""
        data = bytearray(MODEL)
        for place, value in changes:
            data[place] = value
        try:
            graph = scan_model(bytes(data))
            check_graph(graph, tiny.tiny_manifest())
        except BundleError as error:
            tiny.check_line(error)

    @given(st.integers(0, len(MODEL) - 1))
    def test_truncation(self, length):
        """A model cut anywhere does not pass for the whole one."""
        with pytest.raises(BundleError):
            check_graph(scan_model(MODEL[:length]), tiny.tiny_manifest())

    @settings(max_examples=200)
    @given(st.integers(0, len(MODEL) - 1), st.integers(0, 255))
    def test_what_both_read_has_the_outputs_that_protobuf_reads(self, place, value):
        """Damage may lie in a part that the walk skips; onnxruntime refuses that."""
        from google.protobuf.message import DecodeError

        data = bytearray(MODEL)
        data[place] = value
        try:
            graph = scan_model(bytes(data))
        except BundleError:
            return
        try:
            model = onnx.load_from_string(bytes(data))
        except DecodeError:
            return
        assert [t.name for t in graph.outputs] == [o.name for o in model.graph.output]
