"""Writes the same images in every form that raw trees come in."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.rawtree import SHAPES, jpeg

CLASSES = ("n01440764", "n02084071", "n03995372", "n04037443")
TITLES = ("tench, Tinca tinca", "dog, domestic dog, Canis familiaris", "power drill", "racer, race car, racing car")
KIT_IDS = (3, 1, 4, 2)  # of CLASSES in the development kit: not in the order of CLASSES
PER_CLASS = {"train": 5, "val": 3}

Images = dict[str, dict[str, dict[str, bytes]]]


def make_images(splits=("train", "val"), classes=CLASSES) -> Images:
    """JPEGs by split, class and name, the names as ImageNet's are."""
    images: Images = {}
    seed = validation = 0
    for split in splits:
        images[split] = {name: {} for name in classes}
        # Validation images are numbered across classes, which therefore take turns.
        for number in range(PER_CLASS[split]):
            for name in classes if number % 2 else classes[::-1]:
                seed += 1
                validation += split == "val"
                file = f"{name}_{seed}.JPEG" if split == "train" else f"ILSVRC2012_val_{validation:08d}.JPEG"
                images[split][name][file] = jpeg(*SHAPES[seed % len(SHAPES)], seed)
    return images


def flat(of_class: dict[str, dict[str, bytes]]) -> dict[str, tuple[str, bytes]]:
    """(class, bytes) by name, in the order of the names."""
    return dict(sorted((name, (of, data)) for of, found in of_class.items() for name, data in found.items()))


def make_tar(members: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_folders(root: Path, images: Images) -> Path:
    for split, of_class in images.items():
        for name, found in of_class.items():
            (root / split / name).mkdir(parents=True)
            for file, data in found.items():
                (root / split / name / file).write_bytes(data)
    return root


def make_devkit(truth: list[int], year: str = "2012", ids=KIT_IDS, classes=CLASSES) -> bytes:
    """The development kit: `synsets` as in the real meta.mat, with an inner node of the hierarchy at the end."""
    from scipy.io import savemat

    kind = np.dtype(
        [(name, "O") for name in (f"ILSVRC{year}_ID", "WNID", "words", "gloss", "num_children", "children")]
        + [(name, "O") for name in ("wordnet_height", "num_train_images")]
    )
    rows = [
        (float(number), wnid, title, "a thing", 0.0, np.zeros((1, 0)), 0.0, 5.0)
        for number, wnid, title in sorted(zip(ids, classes, TITLES))
    ]
    inner = (1001.0, "n00001740", "entity", "something that exists", 2.0, np.array([[1.0, 2.0]]), 18.0, 0.0)
    synsets = np.empty((len(rows) + 1, 1), kind)
    synsets[:, 0] = [*rows, inner]
    out = io.BytesIO()
    savemat(out, {"synsets": synsets}, do_compression=True)
    folder = "ILSVRC2012_devkit_t12" if year == "2012" else "devkit-1.0"
    lines = "".join(f"{number}\n" for number in truth).encode()
    return gzip.compress(
        make_tar(
            {
                f"{folder}/readme.txt": b"Read this.",
                f"{folder}/data/meta.mat": out.getvalue(),
                f"{folder}/data/ILSVRC{year}_validation_ground_truth.txt": lines,
            }
        )
    )


def write_archives(root: Path, images: Images, test: dict[str, bytes] | None = None) -> Path:
    """ImageNet 2012's own archives."""
    root.mkdir(parents=True, exist_ok=True)
    if "train" in images:
        tars = {f"{name}.tar": make_tar(found) for name, found in images["train"].items()}
        (root / "ILSVRC2012_img_train.tar").write_bytes(make_tar(tars))
    validation = flat(images.get("val", {}))
    if validation:
        (root / "ILSVRC2012_img_val.tar").write_bytes(make_tar({name: data for name, (_, data) in validation.items()}))
    id_of = dict(zip(CLASSES, KIT_IDS))
    truth = [id_of[name] for name, _ in validation.values()]
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(make_devkit(truth))
    if test:
        (root / "ILSVRC2012_img_test_v10102019.tar").write_bytes(make_tar(test))
    return root


def write_archives_2010(root: Path, images: Images, test: dict[str, bytes]) -> Path:
    """ImageNet 2010's: other names, validation images in a folder, and a ground truth of the test images."""
    root.mkdir(parents=True)
    tars = {f"{name}.tar": make_tar(found) for name, found in images["train"].items()}
    (root / "ILSVRC2010_images_train.tar").write_bytes(make_tar(tars))
    validation = {name.replace("2012", "2010"): found for name, found in flat(images["val"]).items()}
    members = {f"val/{name}": data for name, (_, data) in validation.items()}
    (root / "ILSVRC2010_images_val.tar").write_bytes(make_tar(members))
    id_of = dict(zip(CLASSES, KIT_IDS))
    truth = [id_of[name] for name, _ in validation.values()]
    (root / "ILSVRC2010_devkit-1.0.tar.gz").write_bytes(make_devkit(truth, "2010"))
    (root / "ILSVRC2010_images_test.tar").write_bytes(make_tar({f"test/{name}": data for name, data in test.items()}))
    return root


def write_kaggle(root: Path, images: Images, test: dict[str, bytes] | None = None) -> Path:
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    write_folders(data, {"train": images["train"]})
    (data / "val").mkdir()
    lines = ["ImageId,PredictionString"]
    for name, (of, content) in reversed(flat(images["val"]).items()):
        (data / "val" / name).write_bytes(content)
        lines.append(f"{name.removesuffix('.JPEG')},{of} 85 1 499 272 {of} 1 2 3 4")
    (root / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{of} {title}\n" for of, title in zip(CLASSES, TITLES)))
    for name, content in (test or {}).items():
        (data / "test").mkdir(exist_ok=True)
        (data / "test" / name).write_bytes(content)
    return root


def write_csv(root: Path, images: Images) -> Path:
    """train.csv and val.csv, their images all in one folder."""
    (root / "pictures").mkdir(parents=True)
    for split, of_class in images.items():
        lines = ["label,path"]
        for name, (of, data) in flat(of_class).items():
            (root / "pictures" / name).write_bytes(data)
            lines.append(f"{of},pictures/{name}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root


def write_parquet(root: Path, images: Images, names=CLASSES, files: int = 2) -> Path:
    """data/train-00000-of-00002.parquet ... as a hub writes them; a class's number is its place in `names`."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (root / "data").mkdir(parents=True)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    schema = pyarrow.schema(
        [("image", kind), ("label", pyarrow.int64())], {"huggingface": json.dumps({"info": {"features": features}})}
    )
    for split, of_class in images.items():
        rows = [
            {"image": {"bytes": data, "path": name}, "label": list(names).index(of)}
            for name, (of, data) in flat(of_class).items()
        ]
        for number in range(files):
            table = pyarrow.Table.from_pylist(rows[number::files], schema)
            path = root / "data" / f"{split.replace('val', 'validation')}-{number:05d}-of-{files:05d}.parquet"
            parquet.write_table(table, path, row_group_size=3)
    return root
