"""The shards of a split, in files, in stores, or some of several datasets in either."""

from pathlib import Path

import numpy as np

from imagefeed.dataset.blockcache import BlockCache
from imagefeed.dataset.remote import RemoteShards
from imagefeed.dataset.shards import LocalShards, Shards
from imagefeed.dataset.storage import Url


def open_shards(
    index: np.ndarray, places: list[Path | Url], sizes: list[int], digest: str, checked: bool, cache: BlockCache | None
) -> "tuple[Shards, RemoteShards | None]":
    """The shards of a split, and those of them that are in stores, if there are any. `digest` stands for the content of all."""
    if not any(isinstance(place, Url) for place in places):
        return LocalShards(index, [place for place in places if isinstance(place, Path)], sizes, checked), None
    remote = RemoteShards(places, sizes, digest, cache)
    return (remote if all(isinstance(place, Url) for place in places) else MixedShards(index, remote, checked)), remote


class MixedShards:
    """Shards of several datasets, of which some are in files and others in stores."""

    def __init__(self, index: np.ndarray, remote: RemoteShards, checked: bool):
        self._remote, numbers = remote, np.flatnonzero(remote.local)
        self._numbers = np.cumsum(remote.local) - 1  # of the files among files
        paths = [place for place in remote.places if isinstance(place, Path)]
        rows = self._of_files(index[remote.local[index["shard"]]])
        self._files = LocalShards(rows, paths, [remote.sizes[n] for n in numbers.tolist()], checked)

    def _of_files(self, rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        rows["shard"] = self._numbers[rows["shard"]]
        return rows

    def gather(self, rows: np.ndarray, out: np.ndarray, stride: int, checked: bool) -> np.ndarray:
        local = self._remote.local[rows["shard"]]
        bad = np.empty(len(rows), bool)
        together = out[: len(rows) * stride].reshape(len(rows), stride)
        for shards, here, those in ((self._files, local, self._of_files(rows[local])), (self._remote, ~local, rows[~local])):
            part = np.empty((len(those), stride), np.uint8)
            bad[here] = shards.gather(those, part.reshape(-1), stride, checked)
            together[here] = part
        return bad

    def view(self, shard: int, begin: int, end: int) -> np.ndarray:
        shards, number = self._of(shard)
        return shards.view(number, begin, end)

    def read(self, shard: int, begin: int, end: int) -> tuple[bytes, bool]:
        shards, number = self._of(shard)
        return shards.read(number, begin, end)

    def _of(self, shard: int) -> tuple[Shards, int]:
        return (self._files, int(self._numbers[shard])) if self._remote.local[shard] else (self._remote, shard)

    def will_need(self, rows: np.ndarray) -> None:
        self._files.will_need(self._of_files(rows[self._remote.local[rows["shard"]]]))

    def close(self) -> None:
        self._files.close()
        self._remote.close()
