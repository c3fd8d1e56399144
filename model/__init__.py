"""The nets that train.py trains."""

from imagefeed.model.alexnet import AlexNet
from imagefeed.model.nets import NETS, build_net, load_all_but_last

__all__ = ["NETS", "AlexNet", "build_net", "load_all_but_last"]
