"""Trains AlexNet or another net on a packed dataset, or evaluates or exports checkpoints; the same as `imagefeed train`.

python train.py OUT                           # the same command again resumes training
python train.py OUT --evaluate runs/OUT       # center crop and ten views; averages several checkpoints
python train.py OUT --export runs/OUT         # for programs without imagefeed: torch.export and ONNX
torchrun --nproc-per-node=8 train.py OUT      # on eight GPUs
"""

from imagefeed.cli import HELP_NAMES, load

main = load("train")

if __name__ == "__main__":
    main(help_option_names=HELP_NAMES)
