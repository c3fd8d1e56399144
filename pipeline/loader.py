"""Batches for PyTorch, in an exactly known order, from a dataset on disk."""

import dataclasses
import functools
import inspect
import operator
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from imagefeed.codec.cores import usable_cores
from imagefeed.dataset.blockcache import BlockCache
from imagefeed.dataset.console import plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.joined import One, open_datasets
from imagefeed.dataset.reader import Dataset, RecordReader
from imagefeed.dataset.remote import Traffic
from imagefeed.dataset.storage import Url
from imagefeed.pipeline.arguments import (
    check_combination,
    check_labels,
    choose_decoder,
    choose_device,
    default_shuffle,
    normalization,
    pca_matrix,
)
from imagefeed.pipeline.augment import AugmentedBatches, check_augmentation, describe, transformed
from imagefeed.pipeline.batch import Batch, column_values
from imagefeed.pipeline.both import BothBatches
from imagefeed.pipeline.cache import DeviceCache, HostCache, open_cache
from imagefeed.pipeline.crops import (
    AheadBatches,
    CachedBatches,
    DecodedBatches,
    DeviceCropper,
    GraphBatches,
    HostCropper,
    graph_batches,
)
from imagefeed.pipeline.gpu import trouble_of, warn_without_hardware_decoder
from imagefeed.pipeline.graph import PREFETCH, GraphOptions
from imagefeed.pipeline.handover import CropMemory, DeviceMemory, HostMemory
from imagefeed.pipeline.native import NativeBatches, UndecodableError
from imagefeed.pipeline.options import OPTIONS, Number, Option, check, described, renamed
from imagefeed.pipeline.plan import Plan
from imagefeed.pipeline.ranks import Attendance, Ranks, ranks_here
from imagefeed.pipeline.sampling import DataLoaderFace
from imagefeed.pipeline.selection import Selection, Subset, Weights, find_records, find_weights, in_short, select
from imagefeed.pipeline.source import Colors, InputBatch, Source
from imagefeed.pipeline.streams import open_streams

# Of a state whose pixels imagefeed's own decoder resized or jittered; older versions of imagefeed, where DALI did, refuse it. All
# other states have version 3.
STATE_VERSION = 4
EPOCH = Option("epoch", 0, Number(0, 2**62, whole=True), "Epoch, from 0.")
forks = 0  # between this process and the first one


def _count_fork() -> None:
    global forks
    forks += 1


os.register_at_fork(after_in_child=_count_fork)


class ImageLoader(DataLoaderFace):
    """Batches of a split: RGB pixels of 0-255 minus a mean, as in the paper.

        loader = ImageLoader("/data/imagenet-256", "train", batch_size=32)
        for images, labels in loader:  # float32 (32, 3, 224, 224), int64 (32,)
            ...

    `dataset` is the folder of a dataset, its Manifest, or a Dataset. It yields a `Batch`, (images, labels) with `ids` and
    `valid`, which may be held as long as you like; with `keys` a dict of images, labels, ids and valid under as many names.
    `columns` are those that `build` kept, handed out as `batch.columns`, or in the dict under their own names.

    Epochs: `iter(loader)` begins an epoch: the current one if nothing was taken from it, or if `position` or `load_state_dict`
    put the loader there; otherwise the next. It ends an older loop, which raises RuntimeError if it goes on. `position` counts
    the batches yielded since the first epoch began.

    Order: `views` "random" is for training (random crops, flips and colors; shuffled, and the remainder of an epoch dropped);
    "center" and "ten" are for evaluation (each record once, in stored order). The last batch of an evaluation is short; over
    several ranks, or with `pad_last`, it is padded, and `valid` is False for the padding. `shuffle`: docs/shuffle.md.

    Ranks: each takes its share of a global batch. `rank` and `world_size` are by default those of torch.distributed if it is
    initialized, or of torchrun. All ranks take the same number of steps.

    Records (docs/records.md): `subset` takes some of them: record ids, names of classes, or a file of ids, classes or raw files,
    one a line. `weights` says how often: a number for each record, a dictionary of one for the records of each class, or
    "balanced"; they are drawn with replacement, and an epoch stays as long. `repeats` takes one of so many records in it, as
    often in a row, with other crops and colors each time. `crops` is the number of random crops of a record in a batch. In place
    of one dataset, give a list of them, or a dictionary {dataset: share of an epoch}; record ids run on from one to the next.

    Pixels: `pca_jitter` is in standard deviations (`pca_matrix`), 0 turns it off. `mean` "channel" is that of the train split,
    "image" its mean image (the paper's), "imagenet" torchvision's; or three numbers for R, G and B, in gray levels of 0-255.
    `std` "dataset", "imagenet" or three numbers divides the result. `random_resized_crop` and `color_jitter` (brightness,
    contrast, saturation, hue) follow torchvision. `dtype` "uint8" gives pixels of 0-255, whatever `mean` and `std` are.
    `memory_format` "channels_last" gives the same shape in PyTorch's channels-last strides.

    Augmentation, for training: `auto_augment` "trivial" or "rand" changes each image as torchvision's TrivialAugmentWide or
    RandAugment; "rand:N:M" by N operations of strength M. `random_erasing` is the probability that a rectangle becomes 0.
    `mixup` and `cutmix` are alphas, such as 0.2 and 1: two neighbors in a batch are blended or exchange a rectangle, one of the
    two at random if both are given, and labels become float32 (N, classes), as cross_entropy takes them. `transform(images)` or
    `transform(images, labels)` changes a whole batch on its device; it may draw from Python's, numpy's and torch's generators,
    which are seeded for each batch of a rank.

    Cost: a corrupt record is replaced by the next one; more than `max_corrupt` end the run. `read_ahead` is the number of batches
    to prefetch from disk. `cache` "host" or "device" keeps decoded images, up to `cache_bytes` (pipeline/cache.py); of several
    ranks, each keeps what it has seen, and sees other records in the next epoch. `decoder` "auto" needs DALI on a GPU, and on a
    CPU only for `cache="device"`. For a GPU "native" decodes on the cores and sends bytes; "both" gives `native_share` of the
    records, chosen by their ids, to the cores and the others to DALI. Pixels that DALI resizes or jitters differ by a few levels,
    and all that it decodes on a GPU a little, so a run with `random_resized_crop`, `color_jitter` or "both" goes on only with the
    decoder that it began with.

    Raises ValueError for an argument of the wrong type or out of range, UserError if dataset, machine and arguments do not fit
    each other.
    """

    def __init__(
        self,
        dataset: One | list[One] | tuple[One, ...] | Mapping[One, float],
        split: str,
        batch_size: int = 128,
        *,
        keys: Sequence[str] | None = None,
        columns: Sequence[str] = (),
        subset: Subset | None = None,
        weights: Weights | None = None,
        repeats: int = 1,
        crops: int = 1,
        views: str = "random",
        crop_size: int = 224,
        random_resized_crop: bool = False,
        pca_jitter: float = 0.1,
        color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
        auto_augment: str = "none",
        random_erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mean: str | tuple[float, float, float] = "channel",
        std: str | tuple[float, float, float] = "none",
        shuffle: str | None = None,
        transform: Callable | None = None,
        dtype: str = "float32",
        memory_format: str = "contiguous",
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        pad_last: bool = False,
        device: torch.device | str = "cpu",
        decoder: str = "auto",
        native_share: float = 0.5,
        num_threads: int | None = None,
        prefetch: int | None = None,
        read_ahead: int = 8,
        cache: str = "none",
        cache_bytes: int | None = None,
        cache_dir: str | os.PathLike | None = None,
        cache_dir_bytes: int | None = None,
        verify_checksums: bool = True,
        max_corrupt: int = 100,
        hw_decoder_load: float = 0.65,
        position: int = 0,
    ):
        self.arguments = {name: value for name, value in locals().items() if name != "self"}
        check(self.arguments)
        training = views == "random"
        self.split, self.keys = split, keys
        selection = self._select(dataset, training)
        manifest = self.manifest
        jitter = tuple(color_jitter) if training and any(color_jitter) else None
        random_resized_crop = training and random_resized_crop
        self._augment = check_augmentation(self.arguments)
        changes_images = bool(jitter or random_resized_crop)
        self.device = choose_device(device)
        self.decoder = choose_decoder(decoder, self.device, cache)
        check_combination(manifest, crop_size, mean, cache, changes_images, self.decoder)
        self.position, self.read_ahead, self.max_corrupt = position, read_ahead, max_corrupt
        self.ranks = self._ranks()
        records = len(self.reader) if selection is None else selection.records
        self.plan = Plan(records, batch_size, views, seed, *self.ranks[:2], self.arguments["shuffle"], selection, repeats, crops)
        self.columns = {name: manifest.load_column(split, name) for name in columns}
        if twice := set(columns).intersection(keys or ()):
            raise ValueError(f"keys and columns both name {twice.pop()!r}; choose another key")
        self._asked = self._pixels(random_resized_crop, jitter)  # of what augmentation returns
        self.options, self.colors = self._augment.before(*self._asked) if self._augment.used else self._asked
        self._decode_only = cache != "none" or (self.device.type == "cpu" and not changes_images)  # of DALI's work
        self._open_streams = functools.partial(open_streams, self.device) if self.device.type == "cuda" else None
        self._as_bytes = self.device.type == "cuda"  # DALI hands over bytes to normalize where it can
        self._open_cache = functools.partial(open_cache, cache, cache_bytes, manifest, len(self.reader), self.plan, self.device)
        self.cache = self._open_cache()
        self._corrupt: set[int] = set()
        # Held by the thread that takes a batch or closes the loader.
        self._busy, self._forks = threading.RLock(), forks

    _source: Source | None = None
    _batches: GraphBatches | NativeBatches | BothBatches | AugmentedBatches | None = None
    _attendance: Attendance | None = None
    _stopping = False  # Ctrl-C may have interrupted `_stop`
    _loop: object = None  # the loop that is going on
    _placed = True  # `position` is where the next loop begins, even inside an epoch

    def _select(self, dataset: One | list[One] | tuple[One, ...] | Mapping[One, float], training: bool) -> Selection | None:
        """Opens the dataset, and chooses its records. The arguments become what they stand for: a file may change."""
        arguments = self.arguments
        self.manifest = arguments["dataset"] = open_datasets(dataset, self.split)
        if isinstance(dataset, Dataset) and not dataset.is_whole:
            if arguments["subset"] is not None:
                raise UserError("the dataset is a part of one already; give its records and `subset` as one list of record ids")
            arguments["subset"] = dataset.ids
        shares = getattr(self.manifest, "shares", None)
        arguments["shuffle"] = arguments["shuffle"] or default_shuffle(self.manifest)
        self.reader = self._open_reader()
        subset = arguments["subset"] = find_records(arguments["subset"], self.reader, self.manifest)
        needed = arguments["mixup"] or arguments["cutmix"] or arguments["weights"] is not None or shares is not None
        if training and (needed or not arguments["columns"]):  # which may be what to train on
            check_labels(self.reader, self.manifest, subset)
        if not training and (arguments["weights"] is not None or shares is not None):
            raise UserError(
                "an evaluation takes each record once, without `weights` and shares of datasets; leave out the weights, and give "
                "several datasets as a list"
            )
        weights = arguments["weights"] = find_weights(arguments["weights"], self.reader, self.manifest, subset)
        return select(self.reader, self.manifest, subset, weights)

    def _open_reader(self) -> RecordReader:
        given = self.arguments
        folder, limit = given["cache_dir"], given["cache_dir_bytes"]
        if folder is not None and not isinstance(self.manifest.root, Url):
            raise UserError(f"{self.manifest.root}: not in a store, so `cache_dir` would keep nothing; leave it out")
        if folder is None and limit is not None:
            raise UserError("`cache_dir_bytes` is the room in `cache_dir`; give that too, or leave it out")
        return RecordReader(
            self.manifest, self.split, given["verify_checksums"], None if folder is None else BlockCache(folder, limit)
        )

    def __len__(self) -> int:
        """Batches in an epoch, the same on every rank."""
        self._take_ranks()
        return self.plan.steps

    def __iter__(self) -> Iterator[Batch]:
        self._take_ranks()
        begin = self.position if self._placed else self.next_epoch * len(self)
        if begin != self.position:
            self._stop()
            self.position = begin
        self._placed = True
        self._loop = loop = object()
        return self._epoch(loop)

    def _epoch(self, loop: object) -> Iterator[Batch]:
        steps = self.plan.steps
        watched = self._attendance is not None and self.position % steps == 0
        if watched:
            self._attendance.arrive(self.epoch)
        last = False
        while not last:
            if self._loop is not loop:
                raise RuntimeError("this loop over the loader has ended, because another one began; use a loader for each")
            batch = self.batch_at(self.position)
            last = self.position % steps == 0
            if last and watched:
                self._attendance.leave(self.epoch - 1)
            if len(batch[0] if self.keys is None else batch[self.keys[0]]):  # not all corrupt, and left out
                yield batch

    def batch_at(self, position: int) -> Batch:
        """The batch at a position, after which the loader continues; consecutive ones are made ahead."""
        OPTIONS["position"].check(position)
        if position != self.position:
            self._stop()
            self.position = position
        return self._next()

    @property
    def epoch(self) -> int:
        """The number of complete epochs before `position`."""
        return self.position // len(self)

    @property
    def next_epoch(self) -> int:
        """The epoch that `iter(loader)` begins or continues."""
        return self.epoch if self._placed else -(-self.position // len(self))

    def set_epoch(self, epoch: int) -> None:
        """Lets the next loop begin epoch `epoch`, from 0; if `load_state_dict` put the loader into this epoch, it stays there."""
        EPOCH.check(epoch)
        if not (self._placed and self.epoch == epoch):
            self._stop()
            self.position, self._placed = operator.index(epoch) * len(self), True

    def __repr__(self) -> str:
        rank, count, source = self.ranks
        ranks = f", rank {rank} of {count}" + (f" ({source})" if source else "") if count > 1 else ""
        arguments = f"{str(self.manifest.root)!r}, {self.split!r}, batch_size={self.batch_size}, views={self.plan.views!r}"
        if self.plan.records < len(self.reader):
            arguments += f", {self.plan.records:,} of {plural(len(self.reader), 'record')}"
        return f"ImageLoader({arguments}{ranks}: {plural(len(self), 'batch', 'batches')} an epoch, position {self.position})"

    def __reduce__(self) -> tuple:
        """Copies open their own files and threads, and continue at the same position."""
        return _restored, (self.arguments | {"position": self.position}, self._placed)

    def __deepcopy__(self, _memo: dict) -> "ImageLoader":
        return _restored(*self.__reduce__()[1])

    def _pixels(self, boxes: bool, jitter: tuple[float, ...] | None) -> tuple[GraphOptions, Colors]:
        """How images become pixels: by boxes of random resized crops and strengths of color jitter, if any."""
        given, statistics = self.arguments, self.manifest.load_statistics()
        mean, std, as_bytes = given["mean"], given["std"], given["dtype"] == "uint8"
        subtracted, scale = (np.zeros(3), np.ones(3)) if as_bytes else normalization(statistics, mean, std)
        options = GraphOptions(
            **{name: given[name] for name in ("crop_size", "dtype", "memory_format", "hw_decoder_load")},
            views=10 if given["views"] == "ten" else given["crops"],
            crops=given["crops"],
            scale=tuple(scale.tolist()),
            mean_image=statistics["mean_image"] if mean == "image" and not as_bytes else None,
            boxes=boxes,
            jitter=jitter is not None,
            device_id=self.device.index if self.device.type == "cuda" else None,  # as DALI counts
            num_threads=given["num_threads"] or usable_cores(),
            prefetch=given["prefetch"] or PREFETCH[self.decoder],
        )
        return options, Colors(subtracted, pca_matrix(statistics, given["pca_jitter"]), jitter)

    def _ranks(self) -> Ranks:
        rank, world_size = self.arguments["rank"], self.arguments["world_size"]
        if (rank is None) != (world_size is None):
            raise ValueError("rank and world_size belong together; give both or neither")
        return ranks_here() if rank is None else Ranks(rank, world_size)

    def _take_ranks(self) -> None:
        """Notices that torch.distributed has been initialized."""
        self._notice_fork()
        ranks = self._ranks()
        if ranks != self.ranks:
            epoch, step = divmod(self.position, self.plan.steps)
            plan = dataclasses.replace(self.plan, rank=ranks.rank, world_size=ranks.world_size)
            if step and ranks[:2] != self.ranks[:2]:
                raise UserError(
                    f"the loader began an epoch as rank {self.plan.rank} of {self.plan.world_size}, and is now {ranks.rank} of "
                    f"{ranks.world_size}; make it after torch.distributed is initialized"
                )
            self._stop()
            self.ranks, self.plan, self.position = ranks, plan, epoch * plan.steps + step
        if self._attendance is None and ranks.world_size > 1 and self.arguments["rank"] is None and not self.drop_last:
            self._attendance = Attendance(self.split, ranks)

    def _notice_fork(self) -> None:
        """In a forked process, opens everything anew: the threads that read and decode did not come along. What the parent's
        pipeline refers to stays (graph.py)."""
        if self._forks == forks:
            return
        self._batches = self._source = None
        if isinstance(self.cache, HostCache):
            self.cache.forget_threads()
        self._busy, self._forks = threading.RLock(), forks
        self.reader = self._open_reader()

    @property
    def traffic(self) -> Traffic | None:
        """What the stores of the dataset have been asked for by this process; None for a dataset in files."""
        return None if self.reader.remote is None else self.reader.remote.traffic

    @property
    def corrupt(self) -> int:
        """How many records were found corrupt; each is replaced every time."""
        return len(self._corrupt)

    @property
    def corrupt_ids(self) -> set[int]:
        return set(self._corrupt)

    @property
    def _identity(self) -> dict[str, object]:
        """What decides the batches besides the position. Ranks may split the global batch otherwise; any float type will do."""
        names = [name for name, option in OPTIONS.items() if option.decides == "batches" and name not in ("batch_size", "dtype")]
        return (
            plain({name: self.arguments[name] for name in names})
            | self._chosen
            | {
                "dataset": self.manifest.fingerprint,
                "split": self.split,
                "pixels": "0-255" if self.arguments["dtype"] == "uint8" else "less their mean",
                "device cache": self.arguments["cache"] == "device",  # whose chroma is coarser
                "global batch": self.plan.global_batch,
                "random_resized_crop": self.options.boxes,
                "transform": describe(self.arguments["transform"]),
                "color_jitter": list(self.colors.jitter) if self.colors.jitter else None,
            }
            | ({"decoder": self.decoder} if self.options.boxes or self.options.jitter or self.decoder == "both" else {})
            | ({"native_share": self.arguments["native_share"]} if self.decoder == "both" else {})
        )

    @functools.cached_property
    def _chosen(self) -> dict[str, object]:
        return {name: in_short(self.arguments[name]) for name in ("subset", "weights")}

    def state_dict(self) -> dict[str, object]:
        """Plain values with which `load_state_dict` continues at the next batch."""
        identity = self._identity
        version = STATE_VERSION if identity.get("decoder", "dali") != "dali" else 3
        return {"version": version, "position": self.position, "identity": identity}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continues where `state` was taken, on any number of ranks; raises UserError if it is damaged or does not fit.

        Inside a loop over the loader, it takes effect with that loop's next batch; at its last batch, in the next loop.
        """
        position, theirs = read_state(state)
        both = {"decoder": self.decoder} if "both" in (theirs["decoder"], self.decoder) else {}
        for name, value in (both | self._identity).items():
            saved = theirs.get(name, getattr(OPTIONS.get(name), "default", None))  # options that are newer than the state
            if saved != value:
                remedy = "use the same dataset and options as before"
                if name == "decoder":
                    remedy = f"their pixels differ by a few levels, so use `decoder={saved}` to go on"
                raise UserError(f"the loader's saved state has {name} {saved}, this run {value}; {remedy}, or start a new run")
        self._stop()
        self.position, self._placed = position, True

    def close(self) -> None:
        """Frees the pipeline, its threads and buffers, the maps and the cache; iterating again opens them anew."""
        self._notice_fork()
        with self._busy:  # another thread's batch is handed out first: it reads from the maps
            self._stop()
            self.cache = None
            self.reader.close()

    def __enter__(self) -> "ImageLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def reopened(self, **changes) -> "ImageLoader":
        """Another loader with the same arguments except `changes`, at this one's position unless they give another.

        Raises UserError for another split without `subset` and `weights` of its own, if this one has them.
        """
        for name in ("subset", "weights"):
            if changes.get("split", self.split) != self.split and self.arguments[name] is not None and name not in changes:
                raise UserError(f"`{name}` is of split {self.split}; give {name} for split {changes['split']} too, or None")
        return ImageLoader(**(self.arguments | {"position": self.position} | changes))

    @property
    def spans(self) -> tuple[tuple[str, float, float], ...]:
        """What the calling thread did for the last batch: ("read" | "decode" | "crop", start, seconds) by time.perf_counter.

        "decode" is the time it waited for the decoder, which works beside it; the graph's own crops are part of it.
        """
        return () if self._source is None else tuple(self._source.spans)

    def open_source(self) -> Source:
        """Batches before decoding, from `position` on."""
        share = self.arguments["native_share"] if self.decoder == "both" else None
        return Source(self.plan, self.reader, self.colors, self.options.boxes, self.cache, self.position, self.read_ahead, share)

    def open_memory(self) -> CropMemory:
        """Where threads of the CPU write crops."""
        if self._open_streams is None:
            return HostMemory(self.options)
        return DeviceMemory(self.options, self.plan.batch_size, self._open_streams())

    def _open(self) -> None:
        if self.cache is None:  # after a close
            self.cache = self._open_cache()
        self._source = self.open_source()
        where = (self._source, self.options, self.device)
        if self.decoder == "native":
            self._batches = NativeBatches(self._source, self.options, self.open_memory(), self.cache)
        elif self.decoder == "both":
            self._batches = BothBatches(*where, self.open_memory(), self._source.share, self._as_bytes)
        elif self._decode_only:
            self._batches = self._cropped_batches(*where)
        else:
            self._batches = graph_batches(*where, self._as_bytes)
        if self.device.type == "cuda" and self.decoder != "native" and self.options.hw_decoder_load:
            warn_without_hardware_decoder()
        if self._augment.used:
            augmented = (self._batches, self._source, self._augment, *self._asked, len(self.manifest.classes))
            self._batches = AugmentedBatches(*augmented)

    def _cropped_batches(self, *where) -> DecodedBatches:
        """Batches of whole images, which DALI decodes and a cache may keep."""
        if isinstance(self.cache, DeviceCache):
            cropper = DeviceCropper(self.options, self.cache)
            if self._open_streams is None:
                return CachedBatches(*where, cropper)
            return AheadBatches(*where, cropper, self._open_streams())
        batches = DecodedBatches if self.cache is None else CachedBatches
        return batches(*where, HostCropper(self.options, self.open_memory(), self.cache))

    def _stop(self) -> None:
        self._notice_fork()
        self._stopping = True
        for part in (self._batches, self._source):
            if part is not None:
                part.close()
        self._batches = self._source = None
        self._stopping = False

    def _next(self) -> Batch:
        self._notice_fork()
        # A second thread would end in an error that looks like a corrupt dataset.
        if not self._busy.acquire(blocking=False):
            raise UserError("two threads use one loader at the same time; open a loader for each")
        try:
            batch = self._take()
            self.position, self._placed = self.position + 1, False
            return batch
        except BaseException:
            # Also one of a transform, or Ctrl-C: the next attempt begins at the same position. DALI's pipeline is dead anyway.
            self._stop()
            raise
        finally:
            self._busy.release()

    def _take(self) -> Batch:
        try:
            if self._stopping:
                self._stop()
            if self._batches is None:
                self._open()
            self._source.spans.clear()
            images, batch = self._batches.next()
        except Exception as error:
            if isinstance(error, UndecodableError):
                raise self._undecodable(f"record {error.record_id}", error.reason) from error
            if isinstance(error, RuntimeError) and (words := trouble_of(str(error), self.device.type == "cuda")):
                raise UserError(f"{self.device}, batch size {self.batch_size}: {words}") from error
            if isinstance(error, RuntimeError) and "encountered:" in str(error):  # an operator of DALI
                reason = str(error).rpartition("encountered:")[2].partition("Current pipeline")[0]
                reason = f"DALI: {' '.join(reason.split())[:200]}"
                raise self._undecodable(f"a batch after step {self.position:,}", reason) from error
            raise
        self._source.recycle(batch, torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None)
        self._corrupt.update(batch.corrupt.tolist())
        if self.corrupt > self.max_corrupt:
            raise UserError(
                f"{self.manifest.root}: {plural(self.corrupt, 'corrupt record')}, more than the {self.max_corrupt:,} that "
                f"`max_corrupt` allows; run imagefeed verify {self.manifest.root}"
            )
        return self._handed(images, batch)

    def _undecodable(self, what: str, reason: str) -> UserError:
        root = self.manifest.root
        return UserError(f"{root}: {what} of split {self.split} cannot be decoded ({reason}); run imagefeed verify {root} --deep")

    def _handed(self, images: torch.Tensor, batch: InputBatch) -> Batch:
        """The batch as the caller gets it; one process has no use for padding."""
        ids, labels, valid = batch.ids, batch.labels, batch.valid
        if not (self.drop_last or self.arguments["pad_last"] or self.plan.world_size > 1 or valid.all()):
            kept = np.flatnonzero(valid)
            ids, labels, valid = ids[kept], labels[kept], valid[kept]
            images = images[: len(kept)] if batch.valid[: len(kept)].all() else images[torch.from_numpy(kept).to(self.device)]
        labels, valid = (torch.as_tensor(values).to(self.device, non_blocking=True) for values in (labels, valid))
        if self.arguments["transform"] is not None:
            images, labels = transformed(self.arguments["transform"], images, labels, self.plan, self.position)
        values = images, labels, torch.from_numpy(ids), valid
        columns = {name: column_values(column, ids, self.device) for name, column in self.columns.items()}
        if self.keys is not None:
            return dict(zip(self.keys, values, strict=False)) | columns
        return Batch(values[:2], *values[2:], columns)


ImageLoader.__doc__ = f"{inspect.cleandoc(ImageLoader.__doc__ or '')}\n\n{described(inspect.signature(ImageLoader))}"


def _restored(arguments: dict[str, object], placed: bool) -> ImageLoader:
    loader = ImageLoader(**arguments)
    loader._placed = placed
    return loader


def read_state(state: dict[str, object]) -> tuple[int, dict[str, object]]:
    """Position and identity of a loader's saved state; version 2 (imagefeed 0.1) had other names, and DALI made all pixels."""
    try:
        position = operator.index(state["position"])
        if state["version"] == 2:
            identity = dict(renamed(*item) for item in state["fingerprint"].items()) | {"seed": state["seed"]}
        elif state["version"] in (3, STATE_VERSION):
            identity = plain(state["identity"])
        else:
            raise UserError(f"the loader's saved state has version {state['version']}, this imagefeed reads 2 to {STATE_VERSION}")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the loader's saved state is incomplete ({error!r}); start a new run") from None
    if position < 0:
        raise UserError(f"the loader's saved state has position {position}, below 0; start a new run")
    return position, {"decoder": "dali"} | identity


def plain(values: dict[str, object]) -> dict[str, object]:
    """With lists for tuples, as JSON has them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
