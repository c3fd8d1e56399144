"""The tables of docs/containers.md about tars, the records of each rank, and resuming."""

from pathlib import Path

from tables.common import IMAGEFEED, ROOT, Table

NUMPY = "numpy==2.4.6"
STREAMING = [IMAGEFEED, "numpy==2.1.3", "mosaicml-streaming==0.13.0"]
GRAIN = ["grain==0.2.18", NUMPY]
DATASETS = ["datasets==5.2.0", NUMPY]
ranks = Table("ranks", ["10 records, 3 ranks, an epoch in order", "rank 0", "rank 1", "rank 2", "never read", "read twice"])
RECORDS = 10


def streaming_module():
    """Streaming, which imports torchvision, whose operators a torch for CPUs lacks."""
    import importlib

    importlib.import_module("tests.clients.vision")
    return importlib.import_module("streaming")


def shared(parts):
    """The cells of what three ranks read."""
    read = [int(n) for part in parts for n in part]
    once = {n for n in read if read.count(n) > 1}
    missing = sorted(set(range(RECORDS)) - set(read))
    return [
        *(" ".join(map(str, part)) for part in parts),
        *(" ".join(map(str, sorted(each))) or "none" for each in (missing, once)),
    ]


def by_sampler(drop_last):
    from torch.utils.data import DistributedSampler

    return shared([list(DistributedSampler(range(RECORDS), 3, rank, shuffle=False, drop_last=drop_last)) for rank in range(3)])


ranks.add("torch 2.13.0, DistributedSampler", [IMAGEFEED])(lambda: by_sampler(False))
ranks.add("the same, drop_last=True", [IMAGEFEED])(lambda: by_sampler(True))


@ranks.add("datasets 5.2.0, split_dataset_by_node", DATASETS)
def datasets_ranks():
    import datasets
    from datasets.distributed import split_dataset_by_node

    whole = datasets.Dataset.from_dict({"n": list(range(RECORDS))})
    return shared([split_dataset_by_node(whole, rank, 3)["n"] for rank in range(3)])


class Numbers:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return index

    def __repr__(self):
        return "Numbers"


def grain_ranks(drop_remainder):
    import grain.python as grain

    def read(rank):
        part = grain.ShardOptions(rank, 3, drop_remainder=drop_remainder)
        sampler = grain.IndexSampler(RECORDS, part, shuffle=False, num_epochs=1, seed=1)
        return list(grain.DataLoader(data_source=Numbers(RECORDS), sampler=sampler, worker_count=0))

    return shared([read(rank) for rank in range(3)])


ranks.add("Grain 0.2.18, IndexSampler, drop_remainder=False", GRAIN)(lambda: grain_ranks(False))
ranks.add("the same, drop_remainder=True", GRAIN)(lambda: grain_ranks(True))


@ranks.add("Streaming 0.13.0", STREAMING)
def streaming_ranks():
    import json
    import os
    import subprocess
    import sys

    streaming = streaming_module()

    with streaming.MDSWriter(out="mds", columns={"n": "int"}) as writer:
        for n in range(RECORDS):
            writer.write({"n": n})
    code = "import json; import tests.clients.vision; from streaming import StreamingDataset as S\n"
    code += "print(json.dumps([row['n'] for row in S(local='mds', shuffle=False, batch_size=1)]))"

    def start(rank):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, "-c", code], env=os.environ | place, stdout=subprocess.PIPE, text=True)

    return shared([json.loads(process.communicate()[0].splitlines()[-1]) for process in [start(rank) for rank in range(3)]])


def dali_ranks(**options):
    import numpy as np
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    Path("files").mkdir()
    for n in range(RECORDS):
        Path(f"files/{n}").write_bytes(bytes([n]))
    files = [f"files/{n}" for n in range(RECORDS)]

    def read(rank):
        @pipeline_def(batch_size=2, num_threads=1, device_id=None)
        def pipe():
            data, _ = fn.readers.file(files=files, shard_id=rank, num_shards=3, name="r", **options)
            return data

        batches = DALIGenericIterator([pipe()], ["n"], reader_name="r", last_batch_policy=LastBatchPolicy.PARTIAL)
        return [n for batch in batches for n in np.array(batch[0]["n"]).ravel().tolist()]

    return shared([read(rank) for rank in range(3)])


ranks.add("DALI 2.4.0, readers.file, LastBatchPolicy.PARTIAL", [IMAGEFEED])(dali_ranks)
ranks.add("the same, pad_last_batch=True", [IMAGEFEED])(lambda: dali_ranks(pad_last_batch=True))


def numbered(count):
    """A dataset of imagefeed, of images whose gray level is their number in the raw tree; and that number by record id."""
    import numpy as np
    from PIL import Image

    import imagefeed

    for n in range(count):
        path = Path(f"raw/train/one/{n:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (5 * n,) * 3).save(path)
    imagefeed.build("raw", "out", size=64, workers=1)
    return np.arange(count)


@ranks.add('imagefeed, views="center", the valid ones', [IMAGEFEED])
def our_ranks():
    import imagefeed

    numbered(RECORDS)

    def read(rank):
        options = {"views": "center", "shuffle": "none", "crop_size": 32, "rank": rank, "world_size": 3}
        with imagefeed.ImageLoader("out", "train", batch_size=2, **options) as loader:
            return [n for batch in loader for n in batch.ids[batch.valid].tolist()]

    return shared([read(rank) for rank in range(3)])
