"""What the rows of loader.py have in common: the folder of JPEGs, decoders, and the augmentation of those that bring none."""

import random
from pathlib import Path

BATCH_SIZE = 128
SIDE, SIZE = 256, 224
WORKERS = 2
WARM_UP = 8  # batches before the clock starts, more than any row prepares ahead: those were made while nobody took them
EPOCHS = 64  # a long epoch is so many of 1,000 images
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, RGB, 0-255


class Images:
    """The folder as a data set: images as they are decoded, or what `transform` makes of them, and labels."""

    def __init__(self, work: str, decoder, transform=None, epochs: int = 1):
        paths = sorted(Path(work, "jpegs").glob("*/*.jpg"))
        self.samples = [(str(path), int(path.parent.name)) for path in paths] * epochs
        self.decode = decoder()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple:
        path, label = self.samples[number]
        image = self.decode(path)
        return (self.transform(image) if self.transform else image), label


def pillow():
    import PIL
    from PIL import Image

    if "post" in PIL.__version__:
        raise ImportError("this is Pillow-SIMD, give --peers a Python with plain Pillow")
    return lambda path: Image.open(path).convert("RGB")


def simplejpeg():
    from simplejpeg import decode_jpeg

    return lambda path: decode_jpeg(read(path), "RGB")


def torchcodec():
    try:
        from torchcodec.decoders import decode_jpeg
    except OSError as error:  # its wheel is CUDA's, which the CPU's torch cannot load
        raise ImportError(f"torchcodec: {error}") from error
    return lambda path: decode_jpeg(read(path))


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def augment(image):
    """What torchvision's RandomCrop, RandomHorizontalFlip, ToTensor and Normalize do, on whatever the decoder gives."""
    import numpy as np
    import torch

    top, left = random.randint(0, SIDE - SIZE), random.randint(0, SIDE - SIZE)
    if isinstance(image, torch.Tensor):  # (3, SIDE, SIDE)
        pixels = image[:, top : top + SIZE, left : left + SIZE]
    else:
        crop = np.asarray(image)[top : top + SIZE, left : left + SIZE]
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
    if random.random() < 0.5:
        pixels = pixels.flip(-1)
    pixels = pixels.contiguous().to(torch.float32)
    return pixels.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(DEVIATION)[:, None, None])
