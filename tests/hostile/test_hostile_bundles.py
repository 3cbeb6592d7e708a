"""Bundles made to deceive: each is refused, in one line that says what and why."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from anomalyd.cli import main
from anomalyd.detect.bundle import pack_calibration, pack_golden, read_bundle
from anomalyd.detect.manifest import dump_manifest, parse_manifest
from anomalyd.detect.onnxfile import MAX_FIELDS, check_graph, scan_model
from anomalyd.detect.tables import unpack_calibration
from anomalyd.errors import BundleError


@pytest.fixture
def path(tmp_path) -> Path:
    """A good bundle, to be made a bad one."""
    return tiny.tiny_bundle(tmp_path)


def read_all(path: Path) -> None:
    bundle = read_bundle(path)
    for name in bundle.graphs:
        bundle.graph(name)


def refused(path: Path, *says: str) -> None:
    """Reading it, and its graphs, ends in one line that names the bundle and says all that."""
    with pytest.raises(BundleError) as caught:
        read_all(path)
    message = str(caught.value)
    assert message.startswith(f"bundle {path}: ")
    tiny.check_line(caught.value)
    for text in says:
        assert text in message


class TestFolder:
    def test_wrong_hash(self, path):
        """One bit of the model flipped."""
        data = bytearray((path / "model.onnx").read_bytes())
        data[-1] ^= 1
        (path / "model.onnx").write_bytes(data)
        refused(path, "model.onnx has the SHA-256", "damaged or altered")

    def test_a_hash_that_is_none(self, path):
        """Upper case, or anything else that could never match."""
        files = json.loads((path / "manifest.json").read_text())["files"]
        files["CARD.md"]["sha256"] = "F" * 64
        tiny.rewrite_manifest(path, files=files)
        refused(path, "'CARD.md': sha256 must be 64 lower-case hexadecimal digits")

    def test_truncated_file(self, path):
        """A copy that stopped half way."""
        data = (path / "model.onnx").read_bytes()
        (path / "model.onnx").write_bytes(data[: len(data) // 2])
        refused(path, f"model.onnx has {len(data) // 2} bytes where", str(len(data)), "truncated")

    def test_oversize_file(self, path):
        """More bytes than listed are not even read: this one claims 8 TiB."""
        os.truncate(path / "weights.safetensors", 8 << 40)
        refused(path, f"weights.safetensors has {8 << 40} bytes where at most")

    def test_oversize_in_the_manifest(self, path):
        """A listed size beyond the limit of its kind."""
        files = json.loads((path / "manifest.json").read_text())["files"]
        files["model.onnx"]["bytes"] = 1 << 40
        tiny.rewrite_manifest(path, files=files)
        refused(path, "'model.onnx' has 1099511627776 bytes; at most 1073741824 are allowed")

    def test_oversize_manifest(self, path):
        """The one file that no size is listed for has a limit of its own."""
        os.truncate(path / "manifest.json", 2 << 20)
        refused(path, "manifest.json has 2097152 bytes where at most 1048576 are expected")

    @pytest.mark.parametrize("name", ["model.onnx", "calibration.npz", "golden.npz", "CARD.md"])
    def test_missing_file(self, path, name):
        """Listed and not there."""
        (path / name).unlink()
        refused(path, f"{name} is listed in manifest.json but missing")

    def test_missing_manifest(self, path):
        """Nothing says what the folder holds."""
        (path / "manifest.json").unlink()
        refused(path, "manifest.json is missing")

    def test_a_bundle_without_a_required_file(self, path):
        """Neither there nor listed."""
        files = json.loads((path / "manifest.json").read_text())["files"]
        del files["golden.npz"]
        (path / "golden.npz").unlink()
        tiny.rewrite_manifest(path, files=files)
        refused(path, "golden.npz is missing from the files in manifest.json")

    def test_extra_file(self, path):
        """There and not listed."""
        (path / "libhelper.so").write_bytes(b"\x7fELF")
        refused(path, "'libhelper.so' is not listed in manifest.json")

    def test_a_kind_of_file_that_is_not_data(self, path):
        """Listed, and a pickle."""
        tiny.put(path, "model.pkl", b"cos\nsystem\n.")
        refused(path, "'model.pkl' is of no kind that a bundle may hold")

    def test_too_many_files(self, path):
        """A folder that is something else, or means to exhaust the reader."""
        for i in range(70):
            (path / f"{i}.txt").touch()
        refused(path, "more than 64 files")

    def test_symbolic_link(self, path, tmp_path):
        """A listed file that is a link, even to the right bytes."""
        (path / "model.onnx").rename(tmp_path / "outside.onnx")
        (path / "model.onnx").symlink_to(tmp_path / "outside.onnx")
        refused(path, "'model.onnx' is a symbolic link, which may point out of the bundle")

    def test_symbolic_link_for_a_manifest(self, path, tmp_path):
        """The manifest itself, too."""
        (path / "manifest.json").rename(tmp_path / "outside.json")
        (path / "manifest.json").symlink_to(tmp_path / "outside.json")
        refused(path, "'manifest.json' is a symbolic link")

    def test_hard_link(self, path, tmp_path):
        """A second name somewhere else lets the verified bytes change later."""
        os.link(path / "model.onnx", tmp_path / "handle.onnx")
        refused(path, "'model.onnx' is a hard link (2 names), which can be changed from outside")

    def test_fifo(self, path):
        """A pipe in place of a file does not hang the reader."""
        (path / "CARD.md").unlink()
        os.mkfifo(path / "CARD.md")
        refused(path, "'CARD.md' is not a regular file")

    def test_sub_folder(self, path):
        """A bundle is flat."""
        (path / "more").mkdir()
        refused(path, "'more' is not a regular file")

    @pytest.mark.parametrize(
        "name",
        [
            "../outside.txt",
            "/etc/passwd",
            "a/b.txt",
            "a\\b.txt",
            "..",
            ".",
            "",
            ".hidden.txt",
            "manifest.json",
            "C:x.txt",
            "name\u2028.txt",
            "x" * 200 + ".txt",
        ],
    )
    def test_path_escape(self, path, name):
        """A listed name is a plain one in the folder, whatever is there."""
        files = json.loads((path / "manifest.json").read_text())["files"]
        files[name] = {"sha256": "0" * 64, "bytes": 1}
        tiny.rewrite_manifest(path, files=files)
        (path.parent / "outside.txt").write_text("x")
        refused(path, "manifest.json" if "\u2028" in name else "is not a file name")


class TestManifest:
    @pytest.mark.parametrize(
        ("version", "says"),
        [
            (2, "format_version 2 is newer than 1, the newest that this anomalyd reads; upgrade"),
            (10**30, "is newer than 1"),
            (0, "format_version must be a whole number from 1, not 0"),
            (True, "must be a whole number from 1, not True"),
            (1.0, "must be a whole number from 1, not 1.0"),
            ("1", "must be a whole number from 1, not '1'"),
            (None, "must be a whole number from 1, not None"),
        ],
    )
    def test_format_version(self, path, version, says):
        """Newer ones ask for an upgrade before anything else is looked at."""
        tiny.rewrite_manifest(path, format_version=version, unheard_of="in format 1")
        refused(path, says)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"opset": "18"}, "Expected `int`, got `str` - at `$.opset`"),
            ({"opset": True}, "Expected `int`, got `bool`"),
            ({"files": []}, "Expected `object`, got `array` - at `$.files`"),
            ({"nmae": "x"}, "unknown key 'nmae' at $"),
            (
                {"image": {"height": 4, "width": 4, "channels": 1, "depth": 3}},
                "'depth' at $.image",
            ),
            ({"image": {"height": 4, "width": 4, "channels": 2}}, "channels must be 1 or 3"),
            (
                {"image": {"height": 4, "width": 10**9, "channels": 1}},
                "image.width must be from 1",
            ),
            ({"name": "../../etc"}, "name must be like"),
            ({"name": "a b"}, "name must be like"),
            ({"licence": "\x1b[2J"}, "unprintable character"),
            ({"licence": "two\nlines"}, "unprintable character"),
            ({"classes": ["a", "\ud800"]}, "unprintable character"),
            ({"created": "yesterday"}, "created must be an ISO 8601 time in UTC"),
            ({"created": "2026-01-01T00:00:00+02:00"}, "created must be an ISO 8601 time in UTC"),
            ({"likelihood": "p(x)"}, "likelihood must be exact, elbo or iwae-K"),
            ({"kind": "oracle"}, "Invalid enum value 'oracle'"),
            ({"default_alpha": 0}, "default_alpha must be within (0, 1)"),
            ({"default_alpha": 0.001}, "so at default_alpha 0.001 nothing is flagged"),
            ({"guarantee": {"kind": "conditional", "confidence": None}}, "guarantee.confidence"),
            ({"guarantee": {"kind": "marginal", "confidence": 0.9}}, "guarantee.confidence"),
            (
                {"guarantee": {"kind": "conditional", "confidence": 0.95}},
                "a conditional p_table must hold with the confidence 0.95 of its guarantee: rank ",
            ),
            ({"statistics": ["a", "a"]}, "statistics must be different names"),
            ({"outputs": {"statistics": {"unit": "x"}}}, "at least log_likelihood and statistics"),
            ({"classes": []}, "classes must be different names"),
            ({"priors": [1.0]}, "priors must be positive, one per class"),
            ({"classes": ["a", "b"], "priors": [0.5, 0.6]}, "priors must be of sum 1"),
            (
                {"calibration_n": 200},
                "scores holds 199 where manifest.json says calibration_n 200",
            ),
            ({"opset": 19}, "opset is 18 where the manifest says 19"),
        ],
    )
    def test_wrong_content(self, path, changes, says):
        """A wrong type, an unknown key or a value out of range is named."""
        tiny.rewrite_manifest(path, **changes)
        refused(path, says)

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (b"", "not strict JSON"),
            (b"[]", "must hold one object"),
            (b"\xff\xfe{}", "not strict JSON in UTF-8"),
            (b'{"a": NaN}', "NaN is not a JSON number"),
            (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
            (b'{"a": 1e999}', "1e999 is beyond a double"),
            (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
            (b'{"b": {"a": 1, "a": 2}}', "duplicate key 'a'"),
            (b'{"a": ' + b"9" * 5000 + b"}", "not strict JSON"),
            (b"[" * 100_000, "nested too deeply"),
            (b'{"a":' * 100_000, "nested too deeply"),
            (b"{}", "format_version must be a whole number from 1, not None"),
            (b'{"format_version": 1}', "missing required field"),
        ],
    )
    def test_what_parsers_disagree_on(self, path, data, says):
        """Only strict JSON is read."""
        (path / "manifest.json").write_bytes(data)
        refused(path, says)

    def test_every_key_is_needed(self):
        """A manifest without one of its keys is refused by name, those with a default, too."""
        good = json.loads(dump_manifest(tiny.tiny_manifest()))
        for key in good:
            without = {k: v for k, v in good.items() if k != key}
            with pytest.raises(BundleError, match=key):
                parse_manifest(json.dumps(without).encode())


OTHER_KINDS = {"classifier": tiny.tiny_classifier, "autoencoder": tiny.tiny_autoencoder}


class TestKinds:
    """What has no density claims none, and what has one does not hide it."""

    @pytest.mark.parametrize("kind", OTHER_KINDS)
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"likelihood": "exact"}, "likelihood must be none where kind is "),
            ({"score_name": "typicality"}, "score_name must be none where kind is "),
            ({"calibration_n": 199}, "calibration_n must be 0 where kind is "),
            ({"bits_per_dim": {"test": 2.9}}, "bits_per_dim.test must be null where kind is "),
            (
                {"guarantee": {"kind": "conditional", "confidence": 0.9}},
                "guarantee.kind must be marginal where kind is ",
            ),
            ({"outputs": {"statistics": {"unit": "x"}}}, "outputs must be at least "),
        ],
    )
    def test_no_density_is_claimed(self, tmp_path, kind, changes, says):
        """Every key that would promise something is refused by name."""
        path = OTHER_KINDS[kind](tmp_path)
        tiny.rewrite_manifest(path, **changes)
        refused(path, says)

    @pytest.mark.parametrize("kind", OTHER_KINDS)
    @pytest.mark.parametrize("name", ["log_likelihood", "nll_map"])
    def test_no_density_is_put_out(self, tmp_path, kind, name):
        """An output that only a density has."""
        path = OTHER_KINDS[kind](tmp_path)
        outputs = json.loads((path / "manifest.json").read_text())["outputs"]
        tiny.rewrite_manifest(path, outputs=outputs | {name: {"unit": "nats"}})
        refused(path, f"outputs must be without ['{name}'] where kind is {kind}")

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"likelihood": "none"}, "likelihood must be exact, elbo or iwae-K, not 'none'"),
            ({"score_name": "none"}, "and not none, not 'none'"),
            ({"calibration_n": 0}, "calibration_n must be at least 1"),
            ({"kind": "classifier"}, "at least log_posterior, statistics and embedding"),
            ({"kind": "autoencoder"}, "at least embedding and statistics"),
        ],
    )
    def test_a_density_is_not_hidden(self, path, changes, says):
        """A density has a likelihood, a score and a calibration, and is called one."""
        tiny.rewrite_manifest(path, **changes)
        refused(path, says)

    def test_classes_are_a_classifiers(self, tmp_path):
        """Needed there, refused in an autoencoder, and as many as the graph has columns."""
        path = tiny.tiny_classifier(tmp_path)
        tiny.rewrite_manifest(path, classes=None)
        refused(path, "classes must be the names of the classes where kind is classifier")
        tiny.rewrite_manifest(path, classes=["a", "b", "c"])
        refused(path, "log_posterior must have the shape (4, 3), not (4, 2)")
        path = tiny.tiny_autoencoder(tmp_path)
        tiny.rewrite_manifest(path, classes=["a", "b"])
        refused(path, "classes must be null where kind is autoencoder")

    @pytest.mark.parametrize("name", ["fit_nll", "fit_statistics", "scores", "p_table"])
    def test_a_table_without_a_density_holds_hashes_alone(self, tmp_path, name):
        """p-values of nothing are refused."""
        path = tiny.tiny_autoencoder(tmp_path)
        table = read_bundle(path).calibration
        full = dataclasses.replace(table, **{name: GOOD[name]})
        tiny.put(path, "calibration.npz", pack_calibration(full))
        refused(path, f"calibration.npz: {name} must be empty where kind is autoencoder")

    @pytest.mark.parametrize(
        ("posterior", "says"),
        [
            (np.zeros((4, 2)), "the probabilities must sum to 1"),
            (np.full((4, 2), -1e30), "the probabilities must sum to 1"),
            (np.full((4, 2), 1e30), "log_posterior must be at most 0"),
            (np.full((4, 2), np.nan), "log_posterior must be finite"),
            (np.full((4, 1), 0.0), "log_posterior must have the shape (4, 2)"),
        ],
    )
    def test_golden_posteriors_are_probabilities(self, tmp_path, posterior, says):
        """Logits, and whatever else sums to something else, are refused."""
        path = tiny.tiny_classifier(tmp_path)
        golden = tiny.other_golden("classifier")
        bad = dataclasses.replace(golden, log_posterior=posterior.astype(np.float32))
        tiny.put(path, "golden.npz", pack_golden(bad))
        refused(path, "golden.npz: ", says)

    def test_golden_numbers_of_another_kind(self, tmp_path):
        """A table with the main output of a density, or of both kinds."""
        path = tiny.tiny_autoencoder(tmp_path)
        tiny.put(path, "golden.npz", pack_golden(tiny.tiny_golden()))
        refused(path, "golden.npz: not a plain .npz file: it must hold ['embedding.npy', ")
        both = dataclasses.replace(
            tiny.other_golden("autoencoder"), log_likelihood=np.zeros((4, 1))
        )
        tiny.put(path, "golden.npz", pack_golden(both))
        refused(path, "golden.npz: not a plain .npz file: it must hold 3 arrays, not 4")

    @pytest.mark.parametrize("name", ["explain.onnx", "sampler.onnx"])
    def test_nothing_is_drawn_without_a_density(self, tmp_path, name):
        """A sampler and a map of surprise belong to a density."""
        path = tiny.tiny_autoencoder(tmp_path)
        tiny.put(path, name, tiny.tiny_sampler().SerializeToString())
        refused(path, f"{name}: belongs to a density, and kind is autoencoder; leave it out")

    @pytest.mark.parametrize(
        ("names", "absent"),
        [
            (["row.onnx"], "sampler.onnx"),
            (["row.onnx", "sampler.onnx"], "step.onnx"),
            (["step.onnx", "sampler.onnx"], "row.onnx"),
            (["row.onnx", "step.onnx"], "sampler.onnx"),
        ],
    )
    def test_a_cached_sampler_is_there_whole(self, tmp_path, names, absent):
        """row.onnx and step.onnx together, beside sampler.onnx."""
        path = tiny.tiny_bundle(tmp_path)
        for name in names:
            tiny.put(path, name, tiny.tiny_sampler().SerializeToString())
        refused(path, f"{absent} is missing from the files in manifest.json: row.onnx and step")

    def test_every_graph_is_looked_at_before_it_is_run(self, tmp_path, capsys):
        """A sampler that holds what no graph may: `bundle verify` and `sample` refuse it."""
        path = tiny.tiny_bundle(tmp_path)
        tiny.put(path, "sampler.onnx", with_subgraph_initialiser().SerializeToString())
        for command in (["bundle", "verify"], ["sample"]):
            out = ["--output", str(tmp_path / "grid.png")] if command == ["sample"] else []
            assert main([*command, str(path), *out]) == 1
            assert f"bundle {path}: sampler.onnx: " in capsys.readouterr().err


def external(name: str = "w") -> TensorProto:
    """A tensor whose bytes are another file's."""
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), name)
    onnx.external_data_helper.set_external_data(tensor, "../../etc/passwd", 0, 16)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def sparse(values: TensorProto, indices: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[4])


def constant(**attribute) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], **attribute)


def with_nodes(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    model = tiny.tiny_model()
    model.graph.node.extend(nodes)
    return model


def with_initialiser() -> onnx.ModelProto:
    model = tiny.tiny_model()
    model.graph.initializer.append(external())
    return model


def with_sparse_initialiser(hidden: str) -> onnx.ModelProto:
    inside = numpy_helper.from_array(np.arange(4), "inside")
    parts = (external(), inside) if hidden == "values" else (inside, external())
    model = tiny.tiny_model()
    model.graph.sparse_initializer.append(sparse(*parts))
    return model


def branch() -> onnx.GraphProto:
    return helper.make_graph([constant(value=external())], "branch", [], [])


def with_subgraph() -> onnx.ModelProto:
    return with_nodes(helper.make_node("If", ["b"], ["x"], then_branch=branch()))


def with_subgraph_initialiser() -> onnx.ModelProto:
    body = helper.make_graph([], "body", [], [], [external()])
    inner = helper.make_graph([helper.make_node("Loop", [], [], body=body)], "inner", [], [])
    return with_nodes(helper.make_node("If", ["b"], ["x"], else_branch=inner))


def attribute(**fields) -> onnx.ModelProto:
    node = constant()
    node.attribute.append(onnx.AttributeProto(name="a", **fields))
    return with_nodes(node)


def with_function(**fields) -> onnx.ModelProto:
    model = tiny.tiny_model()
    model.functions.append(onnx.FunctionProto(name="f", domain="local", **fields))
    return model


def with_training() -> onnx.ModelProto:
    model = tiny.tiny_model()
    graph = helper.make_graph([], "step", [], [], [external()])
    model.training_info.append(onnx.TrainingInfoProto(algorithm=graph))
    return model


def located_only() -> onnx.ModelProto:
    model = with_initialiser()
    model.graph.initializer[-1].ClearField("external_data")
    return model


def data_only() -> onnx.ModelProto:
    model = with_initialiser()
    model.graph.initializer[-1].ClearField("data_location")
    return model


EXTERNAL = {
    "initialiser": with_initialiser,
    "data location alone": located_only,
    "external data alone": data_only,
    "sparse initialiser, values": lambda: with_sparse_initialiser("values"),
    "sparse initialiser, indices": lambda: with_sparse_initialiser("indices"),
    "attribute": lambda: with_nodes(constant(value=external())),
    "attribute, list": lambda: attribute(tensors=[external()], type=9),
    "attribute, sparse": lambda: attribute(sparse_tensor=sparse(external(), external()), type=11),
    "attribute, sparse list": lambda: attribute(
        sparse_tensors=[sparse(external(), external())], type=12
    ),
    "attribute of a wrong type": lambda: attribute(t=external(), type=1),
    "subgraph": with_subgraph,
    "subgraph in a list": lambda: attribute(graphs=[branch()], type=10),
    "subgraph of a subgraph": with_subgraph_initialiser,
    "function": lambda: with_function(node=[constant(value=external())]),
    "subgraph in a function": lambda: with_function(
        node=[helper.make_node("If", ["b"], ["x"], then_branch=branch())]
    ),
    "default of a function": lambda: with_function(
        attribute_proto=[onnx.AttributeProto(name="a", t=external(), type=4)]
    ),
}


class TestGraph:
    @pytest.mark.parametrize("where", EXTERNAL)
    def test_external_data(self, path, where):
        """Wherever a tensor can sit, its data stays inside the file."""
        tiny.put(path, "model.onnx", EXTERNAL[where]().SerializeToString())
        refused(path, "model.onnx: external data in ", "outside the bytes that were verified")

    @pytest.mark.parametrize("name", ["explain.onnx", "sampler.onnx"])
    def test_external_data_in_another_graph(self, path, name):
        """Every graph of the folder is walked."""
        tiny.put(path, name, with_initialiser().SerializeToString())
        refused(path, f"{name}: external data in initialiser 'w' of graph")

    def test_external_data_in_a_second_graph_field(self, path):
        """Protobuf merges a repeated field, so it is no hiding place."""
        more = onnx.ModelProto()
        more.graph.initializer.append(external())
        data = tiny.tiny_model().SerializeToString() + more.SerializeToString()
        tiny.put(path, "model.onnx", data)
        refused(path, "external data in initialiser 'w'")

    def test_external_data_in_training(self, path):
        """A graph for training has no business here at all."""
        tiny.put(path, "model.onnx", with_training().SerializeToString())
        refused(path, "model.onnx: training graphs are not for serving")

    def test_custom_operator(self, path):
        """An operator of another domain is code from elsewhere."""
        node = helper.make_node("Shell", ["image"], ["x"], domain="com.evil")
        tiny.put(path, "model.onnx", with_nodes(node).SerializeToString())
        refused(path, "operator 'Shell' of graph is of the domain 'com.evil'", "code")

    def test_custom_operator_in_a_subgraph(self, path):
        """Subgraphs have the same rule."""
        node = helper.make_node("Shell", [], ["x"], domain="com.evil")
        body = helper.make_graph([node], "body", [], [])
        tiny.put(
            path,
            "model.onnx",
            with_nodes(helper.make_node("Loop", [], ["x"], body=body)).SerializeToString(),
        )
        refused(path, "operator 'Shell' of a subgraph is of the domain 'com.evil'")

    def test_local_function(self, path):
        """A function could redefine what an operator's name means."""
        tiny.put(path, "model.onnx", with_function().SerializeToString())
        refused(path, "model.onnx: local function 'f'", "inline")

    def test_random_operator(self, path):
        """One image has one score."""
        node = helper.make_node("RandomNormal", [], ["x"], shape=[1])
        tiny.put(path, "model.onnx", with_nodes(node).SerializeToString())
        refused(path, "RandomNormal draws at random")

    @pytest.mark.parametrize("name", ["explain.onnx", "sampler.onnx"])
    def test_random_operator_in_another_graph(self, path, name):
        """A draw that no seed controls is nowhere."""
        model = explain() if name == "explain.onnx" else tiny.tiny_sampler()
        model.graph.node.append(helper.make_node("RandomNormal", [], ["x"], shape=[1]))
        tiny.put(path, name, model.SerializeToString())
        refused(path, f"{name}: operator RandomNormal draws at random")

    def test_a_good_explanation_and_sampler_are_read(self, path):
        """The graphs that the others are made from; other names are only scanned."""
        tiny.put(path, "explain.onnx", explain().SerializeToString())
        tiny.put(path, "sampler.onnx", tiny.tiny_sampler().SerializeToString())
        tiny.put(path, "other.onnx", tiny.tiny_encoder("classifier").SerializeToString())
        assert read_bundle(path).read("sampler.onnx")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda g: g.output.pop(), "outputs must be ['log_probs', 'order']"),
            (lambda g: g.output.append(value("more", [1])), "not ['log_probs', 'more', 'order']"),
            (lambda g: g.input.append(value("seed", ["N"])), "inputs must be ['image'] and"),
            (lambda g: g.input.pop(), "not []"),
            (
                lambda g: g.input.append(value("label", ["N"], TensorProto.INT64)),
                "inputs must be ['image'] and at most ['latent'] more, not ['image', 'label']",
            ),
            (
                lambda g: g.input.append(value("latent", ["N"])),
                "latent must be float32 with shape (N, fixed)",
            ),
            (
                lambda g: g.input.append(value("latent", ["N", "Z"])),
                "latent must be float32 with shape (N, fixed)",
            ),
            (
                lambda g: g.output[0].type.tensor_type.shape.dim.pop(),
                "log_probs must be float32 with shape (N, 4, 4, 1, 256)",
            ),
            (
                lambda g: retyped(g.output[1], TensorProto.INT32),
                "order must be int64 with shape (4, 4, 1), not int32",
            ),
            (lambda g: sized(g.input[0], 8), "image must be uint8 with shape (N, 4, 4, 1)"),
        ],
    )
    def test_a_sampler_of_another_form(self, path, change, says):
        """Inputs and outputs are those that whoever draws relies on."""
        model = tiny.tiny_sampler()
        change(model.graph)
        tiny.put(path, "sampler.onnx", model.SerializeToString())
        refused(path, "sampler.onnx: ", says)

    def test_a_sampler_asks_for_a_label_where_there_are_classes(self):
        """And only there."""
        model = tiny.tiny_sampler()
        manifest = tiny.tiny_manifest(classes=["a", "b"])
        with pytest.raises(BundleError, match=r"inputs must be \['image', 'label'\]"):
            check_graph(scan_model(model.SerializeToString()), manifest, "sampler.onnx")
        model.graph.input.append(value("label", ["N"], TensorProto.INT64))
        model.graph.input.append(value("latent", ["N", 3]))
        check_graph(scan_model(model.SerializeToString()), manifest, "sampler.onnx")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda g: g.output.pop(), "has no outputs"),
            (
                lambda g: g.output.append(value("score", ["N"])),
                "at most ['embedding', 'excess_map', ",
            ),
            (lambda g: g.input.append(value("mask", ["N"])), "must have the one input 'image'"),
            (lambda g: sized(g.output[0], 2), "nll_map must be float32 with shape (N, 4, 4)"),
        ],
    )
    def test_an_explanation_of_another_form(self, path, change, says):
        """One image in, a map or features out."""
        model = explain()
        change(model.graph)
        tiny.put(path, "explain.onnx", model.SerializeToString())
        refused(path, "explain.onnx: ", says)

    def test_truncated_graph(self, path):
        """Cut short, with a manifest that agrees."""
        data = tiny.tiny_files()["model.onnx"]
        tiny.put(path, "model.onnx", data[:-100])
        refused(path, "model.onnx: truncated or not an ONNX file")

    @pytest.mark.parametrize("data", [b"", b"\x80\x04K\x01.", b"GIF89a", bytes(1000)])
    def test_not_a_graph(self, path, data):
        """Something else under the name."""
        tiny.put(path, "model.onnx", data)
        refused(path, "model.onnx: ", "ONNX")

    def test_ort_format(self, path):
        """A file that protobuf and onnxruntime would read differently."""
        model = tiny.tiny_model()
        data = b"\x92\x03\x88\x00ORTM1234" + model.SerializeToString()
        assert onnx.load_from_string(data).graph == model.graph  # protobuf sees nothing odd
        tiny.put(path, "model.onnx", data)
        refused(path, "model.onnx: an ORT format file, not an ONNX one")

    def test_deep_nesting(self):
        """Subgraphs nested beyond reason end the walk, not the process."""
        body = b""
        for _ in range(2000):  # graph <- attribute <- node <- graph
            for tag in (0x32, 0x2A, 0x0A):
                body = bytes([tag]) + varint(len(body)) + body
        with pytest.raises(BundleError, match="nested deeper than"):
            scan_model(b"\x3a" + varint(len(body)) + body)

    def test_more_fields_than_any_model_has(self):
        """A file made of tiny fields is given up early."""
        with pytest.raises(BundleError, match="too fragmented"):
            scan_model(b"\x08\x07" * (MAX_FIELDS + 1))


def explain() -> onnx.ModelProto:
    """The tiny graph with its map alone."""
    model = tiny.tiny_model()
    del model.graph.output[:2]
    return model


def value(name: str, shape: list[int | str], dtype: int = TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def retyped(tensor: onnx.ValueInfoProto, dtype: int) -> None:
    tensor.type.tensor_type.elem_type = dtype


def sized(tensor: onnx.ValueInfoProto, batch: int) -> None:
    tensor.type.tensor_type.shape.dim[0].dim_value = batch


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def npz(*, save=np.savez, **changes) -> bytes:
    """calibration.npz as NumPy writes it, with arrays changed, added or (None) left out."""
    arrays = {**vars(tiny.tiny_calibration()), **changes}
    buffer = io.BytesIO()
    save(buffer, **{key: array for key, array in arrays.items() if array is not None})
    return buffer.getvalue()


def zipped(names: list[str], data: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, data)
    return buffer.getvalue()


GOOD = {k: array for k, array in vars(tiny.tiny_calibration()).items() if array is not None}
TABLES = {
    "pickle": (npz(scores=np.array([{}], object)), "scores: not a plain NPY 1.0 array"),
    "compressed": (npz(save=np.savez_compressed), "must be stored, not compressed"),
    "bomb": (
        npz(save=np.savez_compressed, fit_nll=np.zeros(4_000_000)),
        "must be stored, not compressed",
    ),
    "missing array": (npz(scores=None), "it must hold 6 arrays, not 5"),
    "extra array": (npz(more=np.zeros(1)), "it must hold 6 arrays, not 7"),
    "renamed array": (npz(scores=None, score=np.zeros(1)), "it must hold ["),
    "float32": (npz(scores=GOOD["scores"].astype("f4")), "must be float64 with 1 dimensions"),
    "big-endian": (npz(scores=GOOD["scores"].astype(">f8")), "scores: not a plain NPY"),
    "two-dimensional": (npz(scores=GOOD["scores"][None]), "scores: must be float64 with 1 dim"),
    "fortran order": (
        npz(fit_statistics=np.asfortranarray(GOOD["fit_statistics"])),
        "fit_statistics: not a plain NPY",
    ),
    "unsorted": (npz(scores=GOOD["scores"][::-1].copy()), "scores must be sorted"),
    "unsorted hashes": (
        npz(training_hashes=GOOD["training_hashes"][::-1].copy()),
        "training_hashes must be sorted",
    ),
    "nan": (npz(fit_nll=np.array([np.nan] * 400)), "fit_nll must be finite"),
    "infinity": (npz(scores=np.append(GOOD["scores"][1:], np.inf)), "scores must be finite"),
    "empty fit": (
        npz(fit_nll=np.zeros(0), fit_statistics=np.zeros((0, 2), np.float32)),
        "fit_nll must not be empty",
    ),
    "short table": (npz(p_table=GOOD["p_table"][1:]), "p_table must have the shape (200,)"),
    "level table": (npz(p_table=np.full(200, 0.5)), "p_table must increase strictly"),
    "zero p-value": (npz(p_table=GOOD["p_table"] - 0.005), "p_table must increase strictly"),
    "p-value above 1": (npz(p_table=GOOD["p_table"] + 0.005), "p_table must increase strictly"),
    "untrue table": (npz(p_table=GOOD["p_table"] ** 2), "a marginal p_table must be r / (n + 1)"),
    "other width": (
        npz(fit_statistics=GOOD["fit_statistics"][:, :1].copy()),
        "fit_statistics must have the shape (400, 2), not (400, 1)",
    ),
    "not a zip": (b"PK\x03\x04" + bytes(100), "not a plain .npz file"),
    "empty": (b"", "not a plain .npz file"),
    "pickle instead": (b"\x80\x04K\x01." + bytes(40), "not a plain .npz file"),
    "empty entries": (zipped([f"{key}.npy" for key in GOOD]), "fit_nll: not a plain NPY"),
    "path": (zipped(["../x.npy", *(f"{i}.npy" for i in range(5))]), "it must hold ["),
}


class TestTables:
    @pytest.mark.parametrize("case", TABLES)
    def test_bad_calibration(self, path, case):
        """No pickle, no compression, and exactly the arrays that the format names."""
        data, says = TABLES[case]
        tiny.put(path, "calibration.npz", data)
        refused(path, "calibration.npz: ", says)

    def test_what_numpy_writes_is_read(self, path):
        """The strictness keeps no honest writer out."""
        tiny.put(path, "calibration.npz", npz())
        assert read_bundle(path).calibration.p_table[-1] == 1

    def test_a_shape_larger_than_the_file(self, path):
        """A header's promise is compared with the bytes before memory is taken."""
        good = pack_calibration(tiny.tiny_calibration())
        shape = b"'shape': (199,), }"
        assert shape in good
        bad = fix_crc(good.replace(shape, b"'shape': (999,), }"))
        tiny.put(path, "calibration.npz", bad)
        refused(path, "shape (999,) does not fit")

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"images": np.zeros((0, 4, 4, 1), np.uint8)}, "images must not be empty"),
            ({"images": np.zeros((4, 4, 4, 3), np.uint8)}, "images must have the shape"),
            ({"log_likelihood": np.full((4, 1), np.nan)}, "log_likelihood must be finite"),
            ({"log_likelihood": np.zeros((3, 1))}, "log_likelihood must have the shape (4, 1)"),
            (
                {"statistics": np.zeros((4, 9), np.float32)},
                "statistics must have the shape (4, 2)",
            ),
        ],
    )
    def test_bad_golden(self, path, changes, says):
        """Golden scores fit the golden images."""
        buffer = io.BytesIO()
        arrays = {**vars(tiny.tiny_golden()), **changes}
        np.savez(buffer, **{key: array for key, array in arrays.items() if array is not None})
        tiny.put(path, "golden.npz", buffer.getvalue())
        refused(path, "golden.npz: ", says)

    @settings(max_examples=300)
    @given(st.data())
    def test_fuzz(self, data):
        """Tables with some bytes changed or cut off are read or refused, nothing else."""
        good = bytearray(pack_calibration(tiny.tiny_calibration(3, 3)))
        places = st.one_of(
            st.integers(0, len(good) - 1), st.integers(len(good) - 600, len(good) - 1)
        )
        for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)))):
            good[place] = value
        cut = data.draw(st.just(len(good)) | st.integers(0, len(good)))
        manifest = tiny.tiny_manifest(calibration_n=3, default_alpha=0.25)
        try:
            unpack_calibration(bytes(good[:cut]), manifest)
        except BundleError as error:
            tiny.check_line(error)


def fix_crc(data: bytes) -> bytes:
    """Zip bytes with the checksums that its changed entries ought to have."""
    fixed = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    for entry in entries:
        start = entry.header_offset
        name, extra = struct.unpack_from("<HH", data, start + 26)
        body = data[start + 30 + name + extra :][: entry.file_size]
        old, new = struct.pack("<L", entry.CRC), struct.pack("<L", zipfile.crc32(body))
        fixed = bytearray(bytes(fixed).replace(old, new))
    return bytes(fixed)
