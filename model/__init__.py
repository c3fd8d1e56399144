"""Networks to train, by name (docs/recipes.md). No torch here: help texts list the names."""

# The AlexNets of alexnet.py, with the arguments that make them.
VARIANTS = {"alexnet": {}, "alexnet-code": {"as_coded": True}, "alexnet-one-gpu": {"towers": 1}, "alexnet-conv6": {"conv6": True}}
# What `build_net` of nets.py takes.
NETS = (*VARIANTS, "alexnet-owt", "torchvision:NAME", "timm:NAME")
