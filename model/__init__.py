"""The nets that train.py trains."""

from model.alexnet import AlexNet
from model.nets import NETS, build_net, load_all_but_last

__all__ = ["NETS", "AlexNet", "build_net", "load_all_but_last"]
