"""Ray Train, two workers."""

import ray.train.torch
from ray.train import RunConfig, ScalingConfig

from imagefeed import ImageLoader
from tests.clients.records import BATCH, SIZE, page, planned, run


def test_the_pages_program_sees_each_record_once(root, seen, tmp_path):
    code = page("Ray Train", root, 2).replace(
        "scaling_config=", f"run_config=ray.train.RunConfig(storage_path={str(tmp_path)!r}), scaling_config="
    )
    code = "import ray\nray.init('local', num_cpus=2)\n" + code
    # The workers have a functional of their own, and their models come by pickle.
    code = code.replace("functional.cross_entropy(", "loss(")
    run(code, tmp_path)
    assert seen.check_training(2) == planned(root, 2)


def test_a_loader_made_outside_reaches_the_workers(root, seen, tmp_path):
    """By pickle; each takes its share there, and `prepare_data_loader` shards nothing a second time."""
    from tests.clients.records import record

    train = ImageLoader(root, "train", BATCH // 2, crop_size=SIZE)
    val = ImageLoader(root, "val", BATCH // 2, crop_size=SIZE, views="center")

    def work(options):
        for _ in range(2):
            for _images, labels in ray.train.torch.prepare_data_loader(train):
                record("train", labels)
        for batch in val:
            record("val", batch.labels[batch.valid])

    config = RunConfig(storage_path=str(tmp_path))
    ray.init("local", num_cpus=2)  # whose workers inherit SEEN
    try:
        ray.train.torch.TorchTrainer(work, scaling_config=ScalingConfig(num_workers=2), run_config=config).fit()
    finally:
        ray.shutdown()
    assert seen.check_training(2) == planned(root, 2)
    seen.check_evaluation()
