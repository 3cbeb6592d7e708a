"""The repository: what is on disk against what is served, and the swap between the two."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref

import pytest
from daemons import NORMAL, FakeSession, check_problem, load, serve
from tiny import rewrite_manifest, tiny_bundle, tiny_classifier

from anomalyd.errors import BundleError
from anomalyd.serve.metrics import Metrics
from anomalyd.serve.models import Key, by_age, newest
from anomalyd.serve.problems import Problem
from anomalyd.serve.repository import Repository, scan
from anomalyd.serve.settings import ServeSettings


class FakeFleet:
    """Notes what it is told; refuses what is on its list."""

    def __init__(self, bad=()):
        self.bad = set(bad)
        self.loads = []
        self.published = []

    def load(self, key, path, settings):
        self.loads.append(key)
        if key in self.bad:
            raise BundleError(f"bundle {path}: its golden scores are off")

    def publish(self, keys, current, leaving=()):
        self.published.append((set(keys), dict(current), set(leaving)))

    @property
    def current(self):
        return self.published[-1][1]


def versions(root, *names, model="shirts"):
    """Bundles side by side: ROOT/MODEL/VERSION."""
    for name in names:
        made = tiny_bundle(root / ".making")
        (root / model).mkdir(exist_ok=True)
        made.rename(root / model / name)
        shutil.rmtree(root / ".making")


def repository(root, fleet=None, **changes):
    fleet = fleet or FakeFleet()
    settings = ServeSettings(bundles=(str(root),), **changes)
    made = Repository(settings, fleet, pause=lambda seconds: None)
    made.start()
    return made, fleet


def states(made):
    return {(row["name"], row["version"]): row["state"] for row in made.index()}


def test_the_newest_version_is_served(tmp_path):
    """Version 10 is newer than version 9; folders say which is which."""
    versions(tmp_path, "9", "10")
    tiny_bundle(tmp_path, name="alone", version="7")
    made, fleet = repository(tmp_path)
    assert fleet.current == {"shirts": "10", "alone": "7"}
    assert states(made) == {
        ("alone", "7"): "READY",
        ("shirts", "9"): "READY",
        ("shirts", "10"): "READY",
    }


def test_versions_age_naturally():
    """Numbers count as numbers."""
    given = ["1.10", "1.9", "2", "1.9-rc1", "a", "10"]
    assert sorted(given, key=by_age) == ["1.9", "1.9-rc1", "1.10", "2", "10", "a"]
    assert newest([Key("m", "9"), Key("m", "10"), Key("m", "1")]) == {"m": "10"}


def test_a_bad_new_version_never_replaces_a_good_old_one(tmp_path):
    """It is named in the index with the reason; what was served still is."""
    versions(tmp_path, "1")
    made, fleet = repository(tmp_path)
    versions(tmp_path, "2")
    fleet.bad.add(Key("shirts", "2"))
    made.refresh()
    assert fleet.current == {"shirts": "1"}
    assert states(made)["shirts", "2"] == "UNAVAILABLE"
    (reason,) = [row["reason"] for row in made.index() if row["version"] == "2"]
    assert "golden scores are off" in reason
    with pytest.raises(Problem, match="golden"):
        made.load("shirts", "2")
    assert fleet.current == {"shirts": "1"}


def test_rollback_is_one_call(tmp_path):
    """`load` of an older version makes it the current one, until `load` without a version."""
    versions(tmp_path, "1", "2")
    made, fleet = repository(tmp_path)
    made.load("shirts", "1")
    assert fleet.current == {"shirts": "1"}
    versions(tmp_path, "3")
    made.refresh()
    assert fleet.current == {"shirts": "1"}
    made.load("shirts")
    assert fleet.current == {"shirts": "3"}


def test_a_bad_version_at_the_start(tmp_path):
    """Beside a good one it is passed over; alone it ends the start."""
    versions(tmp_path, "1", "2")
    fleet = FakeFleet(bad=[Key("shirts", "2")])
    repository(tmp_path, fleet)
    assert fleet.current == {"shirts": "1"}
    fleet.bad.add(Key("shirts", "1"))
    with pytest.raises(BundleError, match="golden"):
        repository(tmp_path, fleet)


def test_watching_waits_until_a_bundle_is_whole_and_at_rest(tmp_path):
    """Two looks in a row must see the same complete folder before it is loaded."""
    versions(tmp_path, "1")
    made, fleet = repository(tmp_path)
    versions(tmp_path, "2", model="copying")
    new = tmp_path / "copying" / "2"
    whole = (new / "model.onnx").read_bytes()
    (new / "model.onnx").write_bytes(whole[:100])
    for _ in range(3):
        made.refresh(settle=True)
    assert states(made)["copying", "2"] == "UNAVAILABLE"
    assert Key("copying", "2") not in fleet.loads
    (new / "model.onnx").write_bytes(whole)
    made.refresh(settle=True)
    assert Key("copying", "2") not in fleet.loads
    made.refresh(settle=True)
    assert fleet.current == {"shirts": "1", "copying": "2"}


def test_watching_does_not_try_again_what_failed(tmp_path):
    """Until its files change; being told to look again is another matter."""
    versions(tmp_path, "1", "2")
    fleet = FakeFleet(bad=[Key("shirts", "2")])
    made, _ = repository(tmp_path, fleet)
    for _ in range(3):
        made.refresh(settle=True)
    assert fleet.loads.count(Key("shirts", "2")) == 1
    made.refresh()
    assert fleet.loads.count(Key("shirts", "2")) == 2


def test_a_changed_bundle_is_loaded_again(tmp_path):
    """The same name and version with other files, such as after `anomalyd calibrate`."""
    versions(tmp_path, "1")
    made, fleet = repository(tmp_path)
    made.refresh()
    assert fleet.loads == [Key("shirts", "1")]
    rewrite_manifest(tmp_path / "shirts" / "1", licence="another")
    made.refresh()
    assert fleet.loads == [Key("shirts", "1")] * 2


def test_what_is_gone_is_dropped(tmp_path):
    """At once when told to look; when watching, after it was missing twice."""
    versions(tmp_path, "1", "2", "3")
    made, fleet = repository(tmp_path)
    shutil.rmtree(tmp_path / "shirts" / "3")
    made.refresh(settle=True)
    assert fleet.current == {"shirts": "3"}
    made.refresh(settle=True)
    assert fleet.current == {"shirts": "2"}
    shutil.rmtree(tmp_path / "shirts" / "2")
    made.refresh()
    assert fleet.current == {"shirts": "1"}


def test_a_mount_that_is_away_changes_nothing(tmp_path, caplog):
    """A folder without any bundle is an accident more often than a wish."""
    root = tmp_path / "models"
    root.mkdir()
    versions(root, "1")
    made, fleet = repository(root)
    root.rename(tmp_path / "elsewhere")
    made.refresh()
    made.refresh()
    assert fleet.current == {"shirts": "1"}
    assert "the models stay as they are" in caplog.text


def test_a_restart_serves_what_is_good(tmp_path):
    """Nobody is left who could serve a bundle that was changed for the worse: it is left out."""
    good, bad = (tiny_bundle(tmp_path, name=name) for name in ("good", "bad"))
    made, fleet = repository(tmp_path)
    rewrite_manifest(good, licence="another")
    rewrite_manifest(bad, licence="another")
    fleet.bad.add(Key("bad", "1"))
    made.restart()
    assert fleet.current == {"good": "1"}
    assert states(made) == {("good", "1"): "READY", ("bad", "1"): "UNAVAILABLE"}
    made.check_unchanged()
    fleet.bad.add(Key("good", "1"))
    with pytest.raises(BundleError, match="golden"):  # whoever restarts tries again
        made.restart()
    fleet.bad.clear()
    made.restart()
    assert fleet.current == {"good": "1", "bad": "1"}


def test_readiness_goes_first_when_a_model_leaves(tmp_path):
    """It is published as leaving before it is published as gone."""
    versions(tmp_path, "1")
    tiny_bundle(tmp_path, name="other")
    made, fleet = repository(tmp_path)
    made.unload("shirts")
    leaving, gone = fleet.published[-2:]
    assert Key("shirts", "1") in leaving[0]
    assert leaving[2] == {"shirts"}
    assert gone[0] == {Key("other", "1")}
    made.refresh()
    assert "shirts" not in fleet.current
    with pytest.raises(Problem):
        made.unload("shirts")
    made.load("shirts")
    assert fleet.current["shirts"] == "1"


def test_one_version_can_leave_alone(tmp_path):
    """The others go on; the newest of them becomes the current one."""
    versions(tmp_path, "1", "2")
    made, fleet = repository(tmp_path)
    made.unload("shirts", "2")
    assert fleet.current == {"shirts": "1"}
    assert states(made)["shirts", "2"] == "UNAVAILABLE"
    made.refresh()
    assert fleet.current == {"shirts": "1"}


def test_names_that_are_nowhere_are_404(tmp_path):
    """And a name that leads out of the folder is just another name that is nowhere."""
    versions(tmp_path, "1")
    made, _ = repository(tmp_path)
    for name, version in (("none", None), ("shirts", "9"), ("../shirts", None), ("", None)):
        with pytest.raises(Problem) as caught:
            made.load(name, version)
        assert caught.value.status == 404


def test_folder_names_that_no_url_can_hold_are_refused(tmp_path):
    """They would go into URLs and metrics."""
    versions(tmp_path, "1")
    versions(tmp_path, "one two")
    made, fleet = repository(tmp_path)
    assert fleet.loads == [Key("shirts", "1")]
    assert states(made)["shirts", "one two"] == "UNAVAILABLE"


def test_a_broken_manifest_is_seen_without_loading(tmp_path):
    """Under the name that its folders give it."""
    versions(tmp_path, "1", "2")
    (tmp_path / "shirts" / "2" / "manifest.json").write_text("{")
    made, fleet = repository(tmp_path)
    assert fleet.loads == [Key("shirts", "1")]
    assert states(made)["shirts", "2"] == "UNAVAILABLE"


def test_a_manifest_that_breaks_ends_nothing(tmp_path):
    """It names nobody any more, but who it was is served on, and the index says why."""
    path = tiny_bundle(tmp_path, name="alone", version="7")
    made, fleet = repository(tmp_path)
    (path / "manifest.json").write_bytes(b"{}")
    made.refresh()
    assert fleet.current == {"alone": "7"}
    (row,) = made.index()
    assert row["state"] == "READY"
    assert "what came after it was refused" in row["reason"]


def test_other_kinds_are_found_and_passed_over(tmp_path):
    """A classifier beside densities is no failure."""
    tiny_bundle(tmp_path)
    tiny_classifier(tmp_path)
    _, fleet = repository(tmp_path)
    assert fleet.current == {"tiny": "1"}
    assert {found.kind for found in scan([str(tmp_path)])} == {"density", "classifier"}


# With real models


def test_a_swap_under_traffic_fails_no_request(tmp_path):
    """Clients ask without pause while a model is loaded again and again; each gets its answer."""
    path = tiny_bundle(tmp_path)
    daemon = serve(tmp_path)
    statuses = []

    async def client(stop):
        while not stop.is_set():
            response = await daemon.send("POST", "/v1/score", content=NORMAL)
            statuses.append(response.status_code)

    async def scenario():
        stop = asyncio.Event()
        clients = [asyncio.ensure_future(client(stop)) for _ in range(4)]
        for i in range(20):
            rewrite_manifest(path, licence=f"number {i}")
            await daemon.control.refresh()
        stop.set()
        await asyncio.gather(*clients)

    asyncio.run(scenario())
    assert set(statuses) == {200}
    assert daemon.metric("anomalyd_model_loads_total", result="success") == 21
    daemon.models.close()


def test_what_was_swapped_out_is_let_go(tmp_path):
    """Nothing keeps an old model, its session or its thread alive."""
    path = tiny_bundle(tmp_path)
    models, control = load(ServeSettings(bundles=(str(tmp_path),), threads=1))
    old = weakref.ref(models.find("tiny"))
    rewrite_manifest(path, licence="another")
    asyncio.run(control.refresh())
    gc.collect()
    assert old() is None
    models.close()


def test_a_request_keeps_the_model_that_it_found(tmp_path):
    """A swap in the middle of a request does not change who answers it, though it leaves."""
    versions(tmp_path, "1")
    daemon = serve(tmp_path)
    old = daemon.models.find("shirts").detector
    old.session = held = FakeSession(old.session)
    held.open.clear()

    async def scenario():
        url = "/v1/models/shirts/score"
        asked = asyncio.ensure_future(daemon.send("POST", url, content=NORMAL))
        assert await asyncio.to_thread(held.reached.wait, 10)
        shutil.rmtree(tmp_path / "shirts" / "1")
        versions(tmp_path, "2")
        refreshed = asyncio.ensure_future(daemon.control.refresh())
        while daemon.models.find("shirts").version == "1":
            await asyncio.sleep(0.001)
        assert not asked.done()
        assert (await daemon.send("POST", url, content=NORMAL)).json()["version"] == "2"
        held.open.set()
        await refreshed
        return (await asked).json()

    answer = asyncio.run(scenario())
    assert (answer["version"], len(answer["results"])) == ("1", 1)
    assert held.ran == 1
    daemon.models.close()


def test_versions_stand_side_by_side(tmp_path):
    """The newest answers where none is named; each answers by its own address."""
    versions(tmp_path, "1")
    daemon = serve(tmp_path)
    found = daemon.models.find("shirts")
    versions(tmp_path, "2")
    asyncio.run(daemon.control.refresh())
    assert daemon.models.find("shirts").version == "2"
    assert daemon.models.find("shirts", "1") is found
    for version in ("1", "2"):
        answer = daemon.ask("GET", f"/v2/models/shirts/versions/{version}").json()
        assert answer["versions"] == ["1", "2"]
    assert daemon.score(NORMAL, "/v1/models/shirts/score").json()["version"] == "2"
    daemon.models.close()


def test_a_bundle_that_was_altered_is_refused_while_the_old_one_serves(tmp_path):
    """Verification is the same at every load."""
    path = tiny_bundle(tmp_path)
    daemon = serve(tmp_path)
    altered = bytearray((path / "model.onnx").read_bytes())
    altered[-1] ^= 1
    (path / "model.onnx").write_bytes(altered)
    asyncio.run(daemon.control.refresh())
    assert daemon.score(NORMAL).status_code == 200
    (row,) = daemon.ask("POST", "/v2/repository/index").json()
    assert row["state"] == "READY"
    assert "SHA-256" in row["reason"]
    assert daemon.metric("anomalyd_model_loads_total", result="failure") == 1
    daemon.models.close()


def test_no_model_left_is_not_ready(tmp_path):
    """A daemon whose last model was unloaded says so."""
    tiny_bundle(tmp_path)
    daemon = serve(tmp_path, repository_api=True)
    response = daemon.ask("POST", "/v2/repository/models/tiny/unload", json={})
    assert response.status_code == 200
    assert daemon.ask("GET", "/readyz").status_code == 503
    check_problem(daemon.score(NORMAL), 400)
    assert daemon.metric("anomalyd_images_total", model="tiny") is None
    assert daemon.ask("POST", "/v2/repository/models/tiny/load").status_code == 200
    assert daemon.ask("GET", "/readyz").status_code == 200
    daemon.models.close()


@pytest.mark.parametrize(
    "body", [b"[]", b"{", b'{"parameters":[]}', b'{"parameters":{"version":1}}']
)
def test_bad_repository_requests_are_400(tmp_path, body):
    """Whatever is not an object with parameters."""
    tiny_bundle(tmp_path)
    daemon = serve(tmp_path, repository_api=True)
    response = daemon.ask("POST", "/v2/repository/models/tiny/load", content=body)
    assert response.status_code == 400
    assert set(response.json()) == {"error"}
    daemon.models.close()


def test_before_the_first_load_requests_are_told_to_come_again():
    """Started, live and ready are three things."""
    from daemons import Daemon

    from anomalyd.serve.models import Models

    daemon = Daemon(Models(metrics=Metrics()), ServeSettings())
    assert daemon.ask("GET", "/livez").status_code == 200
    assert daemon.ask("GET", "/startupz").status_code == 503
    assert daemon.ask("GET", "/readyz").status_code == 503
    response = daemon.score(NORMAL)
    check_problem(response, 503, "loading")
    assert response.headers["retry-after"] == "1"
    assert daemon.ask("POST", "/v2/models/tiny/infer").status_code == 503
