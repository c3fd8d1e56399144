"""Trains AlexNet, or another net, on a packed dataset, or measures the error of checkpoints.

python train.py OUT                           # the same command again goes on where it stopped
python train.py OUT --evaluate runs/OUT       # center crop and ten views; several checkpoints are averaged
python train.py OUT --export runs/OUT         # for programs without this one: torch.export and ONNX
torchrun --nproc-per-node=8 train.py OUT      # on eight GPUs
"""

import os

# Read by OpenMP when torch loads: how long a thread spins for the others before it sleeps. A step on the CPU has thousands
# of short parallel regions. By default (300,000) two busy neighbors on two cores brought training from 48 to 2 images/s;
# without spinning it was 16 to 20, but 31 alone on the machine; so: 39 to 49 alone, 11 to 19 with neighbors.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from imagefeed.training.cli import main

if __name__ == "__main__":
    main()
