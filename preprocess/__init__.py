"""Raw images to sharded record files, once: decode, check, rescale, shuffle, index, statistics."""
