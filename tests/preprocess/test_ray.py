"""A dataset built on a Ray cluster of two nodes, of which one is killed on the way."""

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.build import build
from tests.rawtree import make_raw_tree

pytest.importorskip("ray")


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    cluster.shutdown()


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_killed_node_changes_nothing(cluster, tmp_path):
    raw = make_raw_tree(tmp_path / "raw", {"train": 130})
    other = cluster.add_node(num_cpus=1)
    seen = []

    def note(progress):
        seen.append(progress.done)
        if len(seen) == 4:  # after the listing, and what earlier runs did, one for every 32 images
            cluster.remove_node(other, allow_graceful=False)

    build(raw, tmp_path / "ray", size=64, engine="ray", address=cluster.address, on_progress=note)
    assert seen[-1] == 390
    build(raw, tmp_path / "local", size=64, workers=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "ray").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()
    }


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_that_is_gone_is_replaced_by_one_here_unless_it_was_asked_for(tmp_path, monkeypatch, caplog):
    raw = make_raw_tree(tmp_path / "raw", {"train": 2})
    with pytest.raises(UserError, match="no Ray cluster answers at 127.0.0.1:1; start one with: ray start --head"):
        build(raw, tmp_path / "out", size=64, engine="ray", address="127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert build(raw, tmp_path / "out", size=64, engine="ray").num_records == 6
    assert "no Ray cluster answers at 127.0.0.1:1, which RAY_ADDRESS" in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_bad_images_and_errors_come_back_from_the_cluster(cluster, tmp_path):
    raw = make_raw_tree(tmp_path / "raw", {"train": 3})
    (raw / "train" / "n01440764" / "bad.JPEG").write_text("no")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="1 of 10 images are bad"):
        build(raw, out, size=64, engine="ray", address=cluster.address)
