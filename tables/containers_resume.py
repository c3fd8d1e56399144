"""The table of docs/containers.md about resuming in the middle of a shuffled epoch."""

from pathlib import Path

from tables.common import IMAGEFEED, Table
from tables.containers_order import DATASETS, GRAIN, NUMPY, STREAMING, Numbers, numbered, streaming_module

RECORDS, BATCH, BATCHES = 40, 4, 3
resuming = Table("resuming", ["Loader, saved after 12 of 40 shuffled records", "the rest of the epoch", "the next epoch"])


def compared(whole, resumed):
    """A cell: how `resumed` differs from the rest of `whole`."""
    rest = whole[BATCH * BATCHES :]
    if resumed == rest:
        return "the same"
    seen = whole[: BATCH * BATCHES]
    lost, twice = set(whole) - set(seen) - set(resumed), set(seen) & set(resumed)
    if not lost and not twice:
        return "the same records in another order"
    return f"{len(lost)} of {RECORDS} lost, {len(twice)} read twice"


def rows(epochs, resumed_epochs):
    """The cells of two whole epochs and of what came after resuming."""
    following = "the same" if resumed_epochs[1] == epochs[1] else "another order"
    return [
        compared(epochs[0], resumed_epochs[0]),
        following if sorted(resumed_epochs[1]) == sorted(epochs[1]) else "other records",
    ]


def flat(batches, count=None):
    return [int(n) for _, batch in zip(range(count or 1000), batches) for n in batch]


def stateful(workers, seeded):
    import torch
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader():
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(1) if seeded else None
        return StatefulDataLoader(Numbers(RECORDS), BATCH, shuffle=True, num_workers=workers, generator=generator)

    whole = loader()
    epochs = [flat(whole), flat(whole)]
    begun = loader()
    flat(iter(begun), BATCHES)
    state = begun.state_dict()
    torch.manual_seed(5)  # another process
    resumed = StatefulDataLoader(
        Numbers(RECORDS), BATCH, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(1) if seeded else None
    )
    resumed.load_state_dict(state)
    return rows(epochs, [flat(resumed), flat(resumed)])


TORCHDATA = [IMAGEFEED, "torchdata==0.11.0"]
resuming.add("torchdata 0.11.0, StatefulDataLoader", TORCHDATA)(lambda: stateful(0, False))
resuming.add("the same with generator=", TORCHDATA)(lambda: stateful(0, True))


@resuming.add("datasets 5.2.0, streaming, buffer of 8", DATASETS)
def datasets():
    import datasets

    def stream(epoch=0):
        whole = datasets.Dataset.from_dict({"n": list(range(RECORDS))}).to_iterable_dataset(num_shards=4)
        made = whole.shuffle(seed=1, buffer_size=8)
        made.set_epoch(epoch)
        return made

    begun, resumed = stream(), stream()
    state = None
    for count, _ in enumerate(begun, 1):
        if count == BATCH * BATCHES:
            state = begun.state_dict()
            break
    resumed.load_state_dict(state)
    later = [row["n"] for row in resumed]
    return rows([[row["n"] for row in stream()], [row["n"] for row in stream(1)]], [later, [row["n"] for row in stream(1)]])


@resuming.add("Grain 0.2.18, DataLoader", GRAIN)
def grain():
    import grain.python as grain

    def loader():
        part = grain.ShardOptions(0, 1)
        sampler = grain.IndexSampler(RECORDS, part, shuffle=True, num_epochs=2, seed=1)
        return grain.DataLoader(data_source=Numbers(RECORDS), sampler=sampler, worker_count=0)

    whole = list(loader())
    begun = iter(loader())
    flat([[next(begun)] for _ in range(BATCH * BATCHES)])
    resumed = iter(loader())
    resumed.set_state(begun.get_state())
    rest = list(resumed)
    return rows([whole[:RECORDS], whole[RECORDS:]], [rest[: RECORDS - 12], rest[RECORDS - 12 :]])


@resuming.add("Streaming 0.13.0", STREAMING)
def mosaic():
    streaming = streaming_module()

    with streaming.MDSWriter(out="mds", columns={"n": "int"}) as writer:
        for n in range(RECORDS):
            writer.write({"n": n})

    def loader():
        return streaming.StreamingDataLoader(
            streaming.StreamingDataset(local="mds", shuffle=True, shuffle_seed=1, batch_size=BATCH), batch_size=BATCH
        )

    def numbers(batches, count=1000):
        return [int(n) for _, batch in zip(range(count), batches) for n in batch["n"]]

    whole, begun, resumed = loader(), loader(), loader()
    epochs = [numbers(whole), numbers(whole)]
    numbers(iter(begun), BATCHES)
    resumed.load_state_dict(begun.state_dict())
    return rows(epochs, [numbers(resumed), numbers(resumed)])


@resuming.add("LitData 0.2.76", [IMAGEFEED, "litdata==0.2.76"])
def litdata():
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.cache import Cache

    Path("lit").mkdir()
    cache = Cache("lit", chunk_size=10)
    for n in range(RECORDS):
        cache[n] = n
    cache.done()
    cache.merge()

    def loader():
        return StreamingDataLoader(StreamingDataset("lit", shuffle=True, seed=1), batch_size=BATCH, num_workers=0)

    whole, begun, resumed = loader(), loader(), loader()
    epochs = [flat(whole), flat(whole)]
    flat(iter(begun), BATCHES)
    resumed.load_state_dict(begun.state_dict())
    return rows(epochs, [flat(resumed), flat(resumed)])


@resuming.add("DALI 2.4.0, readers.file, random_shuffle, checkpoint", [IMAGEFEED])
def dali():
    import numpy as np
    from nvidia.dali import fn, pipeline_def

    Path("files").mkdir()
    for n in range(RECORDS):
        Path(f"files/{n:02d}").write_bytes(bytes([n]))
    files = [f"files/{n:02d}" for n in range(RECORDS)]

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, enable_checkpointing=True, seed=1)
    def pipe():
        return fn.readers.file(files=files, random_shuffle=True, name="r")[0]

    def take(made, count):
        return [int(np.array(each)[0]) for _ in range(count) for each in made.run()[0]]

    whole, begun = pipe(), pipe()
    for made in (whole, begun):
        made.build()
    read = take(whole, 20)
    take(begun, BATCHES)
    resumed = pipe(checkpoint=begun.checkpoint())
    resumed.build()
    rest = take(resumed, 20 - BATCHES)
    return rows([read[:RECORDS], read[RECORDS:]], [rest[: RECORDS - 12], rest[RECORDS - 12 :]])


@resuming.add("tf.data 2.21.0, shuffle(16, seed=1), tf.train.Checkpoint", ["tensorflow-cpu==2.21.0", NUMPY])
def tensorflow():
    import tensorflow as tf

    def epochs():
        return iter(tf.data.Dataset.range(RECORDS).shuffle(16, seed=1).repeat(2))

    whole = [int(n) for n in epochs()]
    begun = epochs()
    for _ in range(BATCH * BATCHES):
        next(begun)
    path = tf.train.Checkpoint(iterator=begun).save("checkpoint")
    resumed = epochs()
    tf.train.Checkpoint(iterator=resumed).restore(path)
    rest = [int(n) for n in resumed]
    return rows([whole[:RECORDS], whole[RECORDS:]], [rest[: RECORDS - 12], rest[RECORDS - 12 :]])


def ours(first, then):
    """Saved on `first` ranks, resumed on `then`; a step reads the same records on any number of ranks."""
    import imagefeed

    numbered(RECORDS)

    def loaders(size):
        options = {"batch_size": BATCH // size, "crop_size": 32, "world_size": size}
        return [imagefeed.ImageLoader("out", "train", rank=rank, **options) for rank in range(size)]

    def epoch(opened, count=1000):
        """What the ranks read together, sorted within each step."""
        steps = zip(range(count), *opened)
        return [n for _, *batches in steps for n in sorted(n for batch in batches for n in batch.ids.tolist())]

    whole, begun, resumed = loaders(1), loaders(first), loaders(then)
    epochs = [epoch(whole), epoch(whole)]
    epoch([iter(loader) for loader in begun], BATCHES)
    for loader in resumed:
        loader.load_state_dict(begun[0].state_dict())
    return rows(epochs, [epoch(resumed), epoch(resumed)])


resuming.add("imagefeed, ImageLoader", [IMAGEFEED])(lambda: ours(1, 1))
resuming.add("imagefeed, saved on 1 rank, resumed on 2", [IMAGEFEED])(lambda: ours(1, 2))
