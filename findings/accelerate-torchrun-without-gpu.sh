#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0: Accelerator() under torchrun on a machine without a GPU.
# Behavior: torch.distributed gets initialized with both processes, but each accelerator says DistributedType.NO and one
# process, calls itself the main one, gives its model the whole dataset, leaves the model without
# DistributedDataParallel, and gather() returns the process's own values. Accelerator(cpu=True) does all of it right.
# One would have guessed: MULTI_CPU and two processes, as torch.distributed itself says; or an error.
# Why it matters: nothing warns. Two nets are trained side by side on the same records, each process writes the
# checkpoint as the main one, and metrics of "all" processes are those of one. A loader that takes its rank from
# torch.distributed, as it must with cpu=True, hands out halves whose results are never put together.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q --no-compile torch==2.13.0 accelerate==1.15.0
cat > work.py <<'PY'
import json
import sys

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True) if sys.argv[1] == "cpu" else Accelerator()
dataset = torch.utils.data.TensorDataset(torch.arange(8))
loader = torch.utils.data.DataLoader(dataset, batch_size=2)
net, loader = accelerator.prepare(torch.nn.Linear(1, 1), loader)
rank = torch.distributed.get_rank()
said = {
    "ranks of torch.distributed": torch.distributed.get_world_size(),
    "processes": accelerator.num_processes,
    "type": accelerator.distributed_type.value,
    "main": accelerator.is_main_process,
    "net": type(net).__name__,
    "records": [int(n) for (batch,) in loader for n in batch],
    "gathered": accelerator.gather(torch.tensor([rank])).tolist(),
}
with open(f"{sys.argv[1]}-{rank}.json", "w") as file:
    json.dump(said, file)
PY
for how in default cpu; do
  CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 venv/bin/python -m torch.distributed.run --standalone --nproc-per-node=2 work.py $how
done
venv/bin/python - <<'PY'
import json

said = {(how, rank): json.load(open(f"{how}-{rank}.json")) for how in ("default", "cpu") for rank in (0, 1)}
for (how, rank), values in said.items():
    print(f"Accelerator({'cpu=True' if how == 'cpu' else ''}) in rank {rank}: {values}")
alone = [
    said["default", rank]
    == {"ranks of torch.distributed": 2, "processes": 1, "type": "NO", "main": True, "net": "Linear",
        "records": list(range(8)), "gathered": [rank]}
    for rank in (0, 1)
]  # fmt: skip
halves = [set(said["cpu", rank]["records"]) for rank in (0, 1)]
if not all(alone) or halves[0] & halves[1] or said["cpu", 0]["gathered"] != [0, 1]:
    raise SystemExit("changed: what Accelerator() sees under torchrun")
PY
