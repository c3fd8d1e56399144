"""FFCV as a row of loader.py."""

from collections.abc import Iterator

from benchmarks.loader_images import BATCH_SIZE, DEVIATION, EPOCHS, MEAN, SIDE, SIZE, WORKERS, Images, pillow


def ffcv(dataset: str, work: str, dtype: str) -> Iterator:
    """Mode jpg of quality 90 made of the same pixels, OrderOption.RANDOM and os_cache=True as its performance guide says where
    data fits into memory (docs.ffcv.io), workers as many as cores, compiled crops; channels last."""
    from dataclasses import replace

    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    class RandomCrop(Operation):
        """FFCV has none that does not rescale."""

        def generate_code(self):
            each = Compiler.get_iterator()

            def crop(images, out):
                places = np.random.randint(0, SIDE - SIZE + 1, (len(images), 2))
                for i in each(len(images)):
                    top, left = places[i]
                    out[i] = images[i, top : top + SIZE, left : left + SIZE]
                return out

            crop.is_parallel = True
            return crop

        def declare_state_and_memory(self, previous):
            shape = (SIZE, SIZE, 3)
            return replace(previous, shape=shape, jit_mode=True), AllocationQuery(shape, previous.dtype)

    beton = f"{work}/{dtype}.beton"
    images = Images(work, pillow)
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    DatasetWriter(beton, fields, num_workers=WORKERS).from_indexed_dataset(images)
    normalize = [NormalizeImage(np.array(MEAN), np.array(DEVIATION), np.float32)] if dtype == "float32" else []
    crops = [SimpleRGBImageDecoder(), RandomCrop(), RandomHorizontalFlip(), *normalize, ToTensor(), ToTorchImage()]
    loader = Loader(
        beton,
        BATCH_SIZE,
        num_workers=WORKERS,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.tile(np.arange(len(images), dtype=np.uint64), EPOCHS),
        pipelines={"image": crops, "label": [IntDecoder(), ToTensor(), Squeeze()]},
    )
    while True:
        for batch in loader:
            yield batch[0]
