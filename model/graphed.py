"""A whole training step as one CUDA graph, for batches so small that a GPU runs kernels faster than the host queues them."""

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch

from imagefeed.model.step import train_step

WARM_UP = 3  # ordinary steps before the capture, in which libraries choose their kernels and the compiler compiles
MAX_IMAGES = 512  # in a batch: a GPU computes larger ones for longer than the host takes to queue them
LEAST_GAIN = 0.02  # of a step's time
TIMED_STEPS, ROUNDS = 10, 3
log = logging.getLogger("imagefeed")


class Recorder(Protocol):
    """Runs and records work that a GPU can repeat by itself."""

    def warm_up(self, work: Callable[[], torch.Tensor]) -> torch.Tensor: ...

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """Records work without running it; returns what repeats it, and its result's place."""


class CudaRecorder:
    """By CUDA graphs. Recording must see the same stream as the runs before it, or the libraries would not be ready there.

    Other threads, such as DALI's, may call CUDA meanwhile; by default that would end the recording with an error.
    """

    def __init__(self, device: torch.device):
        self.device, self._side = device, torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def warm_up(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        current = torch.cuda.current_stream(self.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            result = work()
        current.wait_stream(self._side)
        return result

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        # Kept even if it fails: PyTorch's allocator goes on asking such a graph where memory belongs.
        graph = self._graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self._side.device_index]
        before = generator.clone_state()
        current = torch.cuda.stream(torch.cuda.current_stream(self.device))
        try:
            # After a recording that failed, torch.cuda.graph leaves its own stream current.
            with current, torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
                result = work()
        except Exception:
            generator.graphsafe_set_state(before)  # which would refuse to draw, as if the recording went on
            raise
        return graph.replay, result


class HostRecorder:
    """The same on a CPU: repeats the work itself, with the tensors of the recording, and into the same place."""

    def warm_up(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        return work()

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        place = torch.full((), math.nan)
        return lambda: place.copy_(work()), place


def open_recorder(device: torch.device) -> Recorder:
    return CudaRecorder(device) if device.type == "cuda" else HostRecorder()


class GraphedSGD:
    """The update of `optimizer`, an SGD of torch, from learning rates and momenta in tensors; its state stays where it is."""

    def __init__(self, optimizer: torch.optim.SGD):
        self.optimizer = optimizer
        self.settings: list[torch.Tensor] = []
        self._given: list[tuple[float, float]] = []
        for group in optimizer.param_groups:
            if group["nesterov"] or group["maximize"] or group["dampening"]:
                raise ValueError("only plain SGD with momentum can be graphed")
            self.settings.append(torch.zeros(2, device=group["params"][0].device))
            self._given.append((math.nan, math.nan))
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                # torch's first step makes it the gradient, which 0 * momentum + gradient is too.
                before = state.get("momentum_buffer")
                state["momentum_buffer"] = torch.zeros_like(parameter) if before is None else _strided_as(parameter, before)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def take_settings(self) -> None:
        """Copies what the optimizer's groups have now into the tensors, in the order of the current stream."""
        for number, (group, settings) in enumerate(zip(self.optimizer.param_groups, self.settings, strict=True)):
            now = float(group["lr"]), float(group["momentum"])
            if now != self._given[number]:
                for place, value in zip(settings, now, strict=True):
                    place.fill_(value)  # by value: a copy from host memory would be read later
                self._given[number] = now

    @torch.no_grad()
    def step(self) -> None:
        for group, settings in zip(self.optimizer.param_groups, self.settings, strict=True):
            for parameter in group["params"]:
                gathered = self.optimizer.state[parameter]["momentum_buffer"]
                if parameter.grad is not None:
                    update(parameter, parameter.grad, gathered, settings, group["weight_decay"])


def update(weight: torch.Tensor, grad: torch.Tensor, gathered: torch.Tensor, settings: torch.Tensor, decay: float) -> None:
    """gathered <- momentum * gathered + grad + decay * weight; weight <- weight - rate * gathered. `settings`: rate, momentum."""
    if weight.is_cuda:
        launch_update(weight, _strided_as(weight, grad), gathered, settings, decay)
    else:
        gathered.mul_(settings[1]).add_(grad + decay * weight)
        weight.sub_(settings[0] * gathered)


def _strided_as(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return values if values.stride() == weight.stride() else torch.empty_like(weight).copy_(values)


def launch_update(weight, grad, gathered, settings, decay: float) -> None:
    """`update` by its kernel; the three have the same strides, without gaps."""
    from imagefeed.model import sgd_kernels

    count = weight.numel()
    grid = (-(-count // sgd_kernels.BLOCK),)
    with torch.cuda.device_of(weight):
        sgd_kernels.update[grid](weight.detach(), grad, gathered, settings, decay, count, BLOCK=sgd_kernels.BLOCK)


class GraphedStep:
    """As `train_step`, called with (images, labels, on_phase): the first steps run as usual, then one is recorded and repeated.

    Batches of another shape or type than the first run as usual, and so do all if the recording fails, after a warning. The loss
    is valid until the next call. Learning rates and momenta may change between steps, weights may be read and written in place,
    and dropout follows the device's generator.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.SGD, precision: str, recorder: Recorder):
        self.model, self.precision, self.recorder = model, precision, recorder
        self.update = GraphedSGD(optimizer)
        self.steps, self.failed, self.lacked_memory = 0, False, False
        self._replay: Callable[[], object] | None = None
        self._batch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._loss: torch.Tensor | None = None

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, on_phase: Callable[[str], None] = lambda phase: None
    ) -> torch.Tensor:
        on_phase("forward")
        self.update.take_settings()
        if self._batch is None:
            self._batch = torch.empty_like(images), torch.empty_like(labels)
        places = self._batch
        usual = any(one.shape != other.shape or one.dtype != other.dtype for one, other in zip((images, labels), places))
        if not usual and self.steps == WARM_UP and not self.failed:
            self._record(*places)
        if usual or self._replay is None:
            loss = self.recorder.warm_up(lambda: self._step(images, labels))
        else:
            for place, tensor in zip(places, (images, labels), strict=True):
                place.copy_(tensor, non_blocking=True)
            self._replay()
            loss = self._loss
        self.steps += not usual
        for phase in ("backward", "optimizer", "end"):  # the parts of a graph cannot be told apart
            on_phase(phase)
        return loss

    def _record(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Changes no weights: what is recorded does not run."""
        self.update.zero_grad()  # these lie outside the graph's memory
        try:
            self._replay, self._loss = self.recorder.record(lambda: self._step(images, labels))
        except RuntimeError as error:
            self.failed = True
            # What ends a recording may fail in turn.
            self.lacked_memory = any(isinstance(one, torch.OutOfMemoryError) for one in (error, error.__context__))
            reason = " ".join(str(error).split())[:150]
            log.warning("a step of this net cannot become one CUDA graph (%s), so its kernels are queued one by one", reason)

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return train_step(self.model, images, labels, self.update, self.precision)


class StepForm(NamedTuple):
    """How steps are fastest on a GPU."""

    graphed: bool


def fastest_form(
    net: torch.nn.Module, optimizer: torch.optim.SGD, precision: str, batch: tuple[torch.Tensor, torch.Tensor], recorder: Recorder
) -> StepForm:
    """Graphed if that takes at least LEAST_GAIN less time. Trains the net, so it should be a copy.

    Raises torch.OutOfMemoryError where memory is too short to find out.
    """
    graphed = GraphedStep(net, optimizer, precision, recorder)
    usual = partial(train_step, net, optimizer=optimizer, precision=precision)
    ways: tuple[Callable[..., torch.Tensor], ...] = usual, graphed
    for way in ways:
        for _ in range(WARM_UP + 1):
            way(*batch)
    if graphed.lacked_memory:
        raise torch.OutOfMemoryError("no memory is left to record a step")
    if graphed.failed:
        return StepForm(graphed=False)
    least = [math.inf, math.inf]
    for _ in range(ROUNDS):
        for number, way in enumerate(ways):
            least[number] = min(least[number], _seconds(partial(way, *batch), batch[0].device))
    return StepForm(graphed=least[1] <= (1 - LEAST_GAIN) * least[0])


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Of TIMED_STEPS steps, until the device has done them."""
    _synchronize(device)
    start_s = time.perf_counter()
    for _ in range(TIMED_STEPS):
        step()
    _synchronize(device)
    return time.perf_counter() - start_s


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
