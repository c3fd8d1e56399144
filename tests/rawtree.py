"""Makes tiny raw trees of images for the tests."""

from pathlib import Path

import numpy as np
import simplejpeg

CLASSES = ("n01440764", "n02084071", "n04037443")
SHAPES = ((375, 500), (500, 375), (333, 500), (120, 90), (256, 256), (640, 480))


class Here:
    """Runs tasks in this process, in a tenth of the time that a worker takes to start."""

    def map(self, function, tasks, progress):
        return (function(task, progress) for task in tasks)


def smooth_image(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 (height, width, 3): smooth enough to survive JPEG within a few gray levels, different for every seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j][..., None]
    a, b, phase = rng.uniform(1, 4, 3), rng.uniform(1, 4, 3), rng.uniform(0, 6, 3)
    return (127 + 90 * np.sin(a * y * 6 + phase) * np.cos(b * x * 6)).astype(np.uint8)


def jpeg(height: int, width: int, seed: int, quality: int = 92) -> bytes:
    return simplejpeg.encode_jpeg(smooth_image(height, width, seed), quality, "RGB", "444")


def make_raw_tree(root: Path, per_class: dict[str, int], classes=CLASSES) -> Path:
    """RAW/SPLIT/CLASS/IMAGE with `per_class[split]` images each, of the shapes of ImageNet."""
    seed = 0
    for split, images in per_class.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                seed += 1
                height, width = SHAPES[seed % len(SHAPES)]
                (folder / f"{name}_{number}.JPEG").write_bytes(jpeg(height, width, seed))
    return root
