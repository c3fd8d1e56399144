"""The options that decide the weights, each stated once. The command line, checks, a run's identity and recipe.json derive from
`RECIPE`; `Recipe` in recipes.py is written out as well, and a test compares the two."""

import dataclasses

from imagefeed.model import NETS
from imagefeed.pipeline.options import OPTIONS, Flag, Kind, Number, OneOf, Option

MAX_DROPS = 3  # section 5 of the paper: "reduced three times prior to termination"
PATIENCE_EPOCHS = 5  # section 5: "when the validation error rate stopped improving", without saying for how long
KEEP = 2  # checkpoints
SMOOTH = ("cosine", "linear")
SINCE_0_1 = ("auto_augment", "random_erasing", "mixup", "cutmix")
AUGMENTS = ("random_resized_crop", "color_jitter", *SINCE_0_1)  # of the loader
COMPILE = OneOf("auto", "off", "default", "reduce-overhead", "graph")


class Name(Kind):
    name = words = "name"

    def valid(self, value: object) -> bool:
        return isinstance(value, str)


class Hook(Name):
    name, words = "MODULE:FUNCTION", "the name of a module and of a function in it, such as hooks:log"

    def valid(self, value: object) -> bool:
        module, _, function = str(value).partition(":")
        return bool(module) and function.isidentifier()


class Epochs(Kind):
    name, words = "A,B,...", "numbers of epochs such as 25,51,79"

    def valid(self, value: object) -> bool:
        return isinstance(value, str) and all(part.isdecimal() for part in value.split(","))


class Schedule(Epochs):
    name, words = "schedule", "plateau, cosine, linear, or numbers of epochs such as 25,51,79"

    def parse(self, text: str) -> str:
        return "plateau" if text == "auto" else text

    def valid(self, value: object) -> bool:
        return value in ("plateau", *SMOOTH) or super().valid(value)


class Probability(Number):
    def __init__(self):
        super().__init__(0, 1)
        self.words = "a number of at least 0 and below 1"

    def valid(self, value: object) -> bool:
        return super().valid(value) and value != 1


POSITIVE = Number(0, open_ends=True)
COUNT = Number(1, whole=True)
SECTIONS = {
    "Options": (
        Option("model", "alexnet", Name(), f"Network: {', '.join(NETS)}."),
        Option("epochs", 90, COUNT, "Passes over the training split; may be raised later, except with cosine and linear."),
        dataclasses.replace(OPTIONS["batch_size"], help="Images in a batch, on each rank; ranks share a recipe's."),
        Option("lr", 0.01, POSITIVE, "Learning rate, before it falls."),
        Option(
            "schedule", "plateau", Schedule(),
            "Fall of the learning rate: cosine or linear, to 0 at the end; plateau, a tenth after "
            f"{PATIENCE_EPOCHS} epochs without a lower validation top-1 error, {MAX_DROPS} times at most; or --lr-milestones.",
        ),
        Option("weight_decay", 0.0005, Number(0), "Weight decay; each step subtracts this much of a weight, times --lr."),
        dataclasses.replace(OPTIONS["crop_size"], kind=Number(64, whole=True)),
        Option(
            "precision", "auto", OneOf("auto", "float32", "bfloat16"),
            "Precision of the arithmetic; auto is bfloat16 on CUDA, and whichever is faster on a CPU.",
        ),
        dataclasses.replace(OPTIONS["seed"], kind=Number(0, 2**32 - 1, whole=True)),
        Option("limit_batches", None, COUNT, "End each epoch after this many steps, for trials.", default_text="all"),
    ),
    "Network": (
        Option("lrn", True, Flag(), "Local response normalization (AlexNet)."),
        Option("overlapping", True, Flag(), "Pool windows of 3 pixels, 2 apart, instead of 2 (AlexNet)."),
        Option("dropout", None, Probability(), "Probability of dropping a unit.", default_text="the net's, 0.5 in AlexNet"),
        Option(
            "bias", None, Number(), "Initial biases of hidden layers; 0.1 starts faster on little data.",
            default_text="the net's, 1 in AlexNet",
        ),
    ),
    "Optimization": (
        Option("warmup_epochs", 0.0, Number(0), "Epochs during which the learning rate rises from 0."),
        Option("momentum", 0.9, Number(0, 1, open_ends=True), "Momentum."),
        Option(
            "bias_lr", None, POSITIVE, "Constant learning rate of the biases, which then do not decay.", default_text="as weights"
        ),
        Option("first_layer_epochs", None, Epochs(), "Epochs after which the first layer's rate is a tenth, and then 0."),
    ),
    "Images": (
        *(OPTIONS[name] for name in ("mean", "std", "shuffle", *AUGMENTS, "pca_jitter")),
        Option("pca_jitter_epochs", None, Number(0, whole=True), "Epochs with PCA color jitter.", default_text="all"),
        Option("pixel_divisor", 1.0, POSITIVE, "Divide pixels by this number in epochs with PCA color jitter."),
    ),
}  # fmt: skip
RECIPE = {option.name: option for options in SECTIONS.values() for option in options}
