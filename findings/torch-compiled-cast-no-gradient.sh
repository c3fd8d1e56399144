#!/usr/bin/env bash
# torch 2.11.0: torch.compile of a torch.autograd.Function whose forward ends in a cast that has nothing to do.
# Behavior: the function's values are right, and its gradient is 0, without an error or a warning, by the backends
# aot_eager and inductor alike. Without the cast, or not compiled, the gradient is right; torch 2.13.0 has it right always.
# One would have guessed: the same gradient as without torch.compile; `.to(x.dtype)` of a tensor that has this type
# already returns the tensor itself.
# Why it matters: such a cast is how a function written for mixed precision returns the type that it was given, so it has
# nothing to do just when training in float32. All layers before the function stop learning; the loss still falls, because
# the layers after it learn.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q --no-compile torch==2.11.0 numpy==2.4.6
cat > work.py <<'PY'
import torch


def square(cast):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            y = x * x
            return y.to(x.dtype) if cast else y

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    return lambda x: Square.apply(x).sum()


seen = {}
for cast in (True, False):
    for backend in (None, "aot_eager"):
        torch._dynamo.reset()
        x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        value = (torch.compile(square(cast), backend=backend) if backend else square(cast))(x)
        value.backward()
        seen[cast, backend] = value.item(), x.grad.tolist()
        print(f"torch {torch.__version__}, cast {cast}, compiled by {backend}: value and gradient {seen[cast, backend]}")
right = (14.0, [2.0, 4.0, 6.0])
if seen.pop((True, "aot_eager")) != (14.0, [0.0, 0.0, 0.0]) or set(map(str, seen.values())) != {str(right)}:
    raise SystemExit("changed: what the gradient of a function is that ends in a cast")
PY
CUDA_VISIBLE_DEVICES= venv/bin/python -W ignore work.py
