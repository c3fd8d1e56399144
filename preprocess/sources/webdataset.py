"""Pairs images in a tar archive with their labels as in WebDataset's shards: KEY.jpg with KEY.cls or KEY.json.

Format: https://github.com/webdataset/webdataset. The key is the path up to the first dot of the name; what follows is the kind.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.sources.suffixes import NO_IMAGES
from imagefeed.preprocess.sources.tar import MAX_CONTENT, Member

WANTED = (".cls", ".json")  # whose contents are needed
FIELDS = ("label", "cls", "class", "target", "class_id", "class_label", "class_name")  # of KEY.json, most reliable first


class Samples(NamedTuple):
    """The images of an archive. `labels` are as spelled there, None for an image that lacks one; the list is empty if the archive
    is not a shard with labels. `skipped` counts other members by suffix, `alone` are the keys of labels without an image."""

    images: list[Member]
    labels: list[str | None]
    skipped: Counter
    alone: tuple[str, ...] = ()
    columns: Mapping[str, list] = MappingProxyType({})
    names: frozenset[str] = frozenset()  # those that a column may have


def pair_samples(members: Iterable[Member], archive: object, columns: Sequence[str] = ()) -> Samples:
    """Raises UserError, which names `archive`, if a key has two images. Of `columns`, each is a field of KEY.json, or the text
    KEY.NAME."""
    labels: dict[str, str] = {}
    values: dict[str, dict[str, Any]] = {name: {} for name in columns}
    names: set[str] = set()
    images: list[Member] = []
    skipped: Counter = Counter()
    for member in members:
        name = member.name
        kind = name[name.rfind(".") + 1 :].lower()  # also of a name without a dot: README is not among them
        if columns and _keep(member, archive, values, names) and kind not in ("cls", "json"):
            continue
        if kind not in NO_IMAGES:
            images.append(member)
            continue
        label = _label(kind, member.content) if member.content or not (member.size or member.odd) else None
        if label is None:
            skipped[f".{kind}"] += 1
        elif kind == "cls":
            labels[_key(member.name)[0]] = label
        else:
            labels.setdefault(_key(member.name)[0], label)
    if not labels and not columns:
        return Samples(images, [], skipped)
    by_key: dict[str, Member] = {}
    for member in images:
        key, kind = _key(member.name)
        other = by_key.setdefault(key, member)
        if other is member:
            continue
        plain = [each for each in (other, member) if "." not in _key(each.name)[1]]
        if len(plain) != 1:  # otherwise KEY.jpg is the image, and KEY.seg.png belongs to it
            raise UserError(f"{archive}: {other.name} and {member.name} share one label; keep one image for each key")
        by_key[key] = plain[0]
        skipped[f".{kind if plain[0] is other else _key(other.name)[1]}"] += 1
    alone = tuple(key for key in labels if key not in by_key)
    of_images = {name: [found.get(key) for key in by_key] for name, found in values.items()}
    return Samples(list(by_key.values()), [labels.get(key) for key in by_key], skipped, alone, of_images, frozenset(names))


def _keep(member: Member, archive: object, values: dict[str, dict[str, Any]], names: set[str]) -> bool:
    """Takes the values of columns out of a member; whether it is one column's text."""
    key, kind = _key(member.name)
    own = kind in values
    if (own or kind == "json") and member.size > MAX_CONTENT:
        raise UserError(f"{archive}: {member.name} has more than {MAX_CONTENT:,} bytes, too many for a column; shorten it")
    if own:
        names.add(kind)
        values[kind][key] = member.content
    if kind == "json":
        try:
            found = json.loads(member.content)
        except (ValueError, RecursionError):
            raise UserError(f"{archive}: {member.name} is not readable as JSON, which `columns` needs; correct it") from None
        names.update(found if isinstance(found, dict) else ())
        for name, of_key in values.items():
            if isinstance(found, dict) and name in found:
                of_key.setdefault(key, found[name])
    return own


def _key(name: str) -> tuple[str, str]:
    start = name.rfind("/") + 1
    key, _, kind = name[start:].partition(".")
    return name[:start] + key, kind


def _label(kind: str, content: bytes) -> str | None:
    """The label in a small file; None if there is none in it."""
    if kind == "cls":
        return content.decode("utf-8", "surrogateescape").strip()
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return None
    found = [values[field] for field in FIELDS if field in values] if isinstance(values, dict) else []
    value = found[0] if found else None
    return str(value) if isinstance(value, (str, int, float)) else None
