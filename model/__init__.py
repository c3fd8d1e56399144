"""The nets that train.py trains."""

from model.alexnet import AlexNet

__all__ = ["AlexNet"]
