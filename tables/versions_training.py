"""The tables of docs/versions.md about what libraries compute differently in training."""

from tables.common import IMAGEFEED, Table
from tables.versions_loaders import NUMPY, joined

STEPS = ["after 3 steps of gradient 1 at rate 0.1", "after 1 more at rate 0.01", "after 3 more at rate 0.01"]
STEPS += ["weight 1 after 3 steps of no gradient, weight decay 0.01, rate 0.1"]
optimizers = Table("optimizers", ["SGD, momentum 0.9, a weight of 0"], STEPS)
ties = Table("ties", ["Library", "top 5 of ten equal values"])


def stepped(run):
    """The cells of a function of the first weight, (rate, gradient) of each step, and weight decay; it returns all weights."""
    cut, decayed = run(0.0, [(0.1, 1.0)] * 3 + [(0.01, 1.0)] * 3, 0.0), run(1.0, [(0.1, 0.0)] * 3, 0.01)
    return [f"{cut[2]:.4f}", f"{cut[3]:.4f}", f"{cut[5]:.4f}", f"{decayed[2]:.6f}"]


def by_torch(set_rate):
    import torch

    def run(weight, steps, decay):
        parameter = torch.tensor([weight], requires_grad=True)
        optimizer, weights = torch.optim.SGD([parameter], 0.1, 0.9, weight_decay=decay), []
        for rate, gradient in steps:
            set_rate(optimizer.param_groups[0], rate)
            parameter.grad = torch.tensor([gradient])
            optimizer.step()
            weights.append(parameter.item())
        return weights

    return stepped(run)


@optimizers.add("torch 2.13.0", [IMAGEFEED])
def torch_sgd():
    return by_torch(lambda group, rate: group.update(lr=rate))


@optimizers.add("Keras 3.15.1", [IMAGEFEED, "keras==3.15.1"])
def keras_sgd():
    import os

    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    def run(weight, steps, decay):
        variable = keras.Variable([weight])
        optimizer, weights = keras.optimizers.SGD(0.1, 0.9, weight_decay=decay or None), []
        optimizer.build([variable])
        for rate, gradient in steps:
            optimizer.learning_rate = rate
            optimizer.apply([keras.ops.convert_to_tensor([gradient])])
            weights.append(float(variable[0]))
        return weights

    return stepped(run)


JAX = ["optax==0.2.8", "jax==0.6.2", "jaxlib==0.6.2", NUMPY]


@optimizers.add("optax 0.2.8", JAX)
def optax_sgd():
    import jax.numpy as jnp
    import optax

    def run(weight, steps, decay):
        def optimizer(rate):
            return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, 0.9))

        weight, weights = jnp.array(weight), []
        state = optimizer(0.1).init(weight)
        for rate, gradient in steps:
            change, state = optimizer(rate).update(jnp.array(gradient), state, weight)
            weight = weight + change
            weights.append(float(weight))
        return weights

    return stepped(run)


@optimizers.add("imagefeed", [IMAGEFEED])
def ours():
    from imagefeed.training.recipes import set_learning_rate

    return by_torch(lambda group, rate: set_learning_rate(group, rate, 0.9))


@ties.add("torch 2.13.0, `torch.topk`", [IMAGEFEED])
def torch_ties():
    import torch

    return [joined(torch.topk(torch.zeros(10), 5).indices.tolist())]


@ties.add("JAX 0.6.2, `jax.lax.top_k`", JAX)
def jax_ties():
    import jax

    return [joined(jax.lax.top_k(jax.numpy.zeros(10), 5)[1].tolist())]


@ties.add("numpy 2.4.6, `argsort()[::-1]`", [NUMPY])
def numpy_ties():
    import numpy as np

    return [joined(np.argsort(np.zeros(10))[::-1][:5].tolist())]


@ties.add("onnxruntime 1.32.0, TopK", ["onnxruntime==1.32.0", "onnx==1.23.2", NUMPY])
def onnx_ties():
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    x, k = helper.make_tensor_value_info("x", TensorProto.FLOAT, [10]), helper.make_tensor("k", TensorProto.INT64, [1], [5])
    outputs = [helper.make_tensor_value_info("v", 1, [5]), helper.make_tensor_value_info("i", 7, [5])]
    graph = helper.make_graph([helper.make_node("TopK", ["x", "k"], ["v", "i"])], "top", [x], outputs, [k])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    onnx.checker.check_model(model)
    return [joined(session.run(["i"], {"x": np.zeros(10, np.float32)})[0].tolist())]
