"""A dataset built on a Ray cluster of two nodes, of which one is killed on the way."""

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.build import build_dataset
from imagefeed.preprocess.engine import ProcessRunner, RayRunner
from imagefeed.preprocess.image import ImageOptions
from imagefeed.preprocess.sources.detect import find_images
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

    def progress(*values):
        seen.append(values)
        if len(seen) == 3:  # the first call tells of earlier runs, then one for every 32 images
            cluster.remove_node(other, allow_graceful=False)

    options = ImageOptions(size=64)
    build_dataset(find_images(raw), tmp_path / "ray", options, 0, RayRunner(cluster.address), progress=progress)
    assert sum(images for images, _, _ in seen) == 390
    build_dataset(find_images(raw), tmp_path / "local", options, 0, ProcessRunner(2))
    assert {path.name: path.read_bytes() for path in (tmp_path / "ray").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()
    }


@pytest.mark.filterwarnings("ignore")
def test_bad_images_and_errors_come_back_from_the_cluster(cluster, tmp_path):
    raw = make_raw_tree(tmp_path / "raw", {"train": 3})
    (raw / "train" / "n01440764" / "bad.JPEG").write_text("no")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="1 of 10 images are bad"):
        build_dataset(find_images(raw), out, ImageOptions(size=64), 0, RayRunner(cluster.address))
