"""torch.nn.GRU as a contender: eager torch with its own autograd, on the device that JAX uses.

The weights are those of jaxgru, transposed. On a CPU every task is tried with torch's default
number of threads and with one thread, which is faster at small sizes; the faster one is timed. On
CUDA every call is synchronized. Nothing is compiled.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.layers import STEPS_PER_CALL
from experiments.benchmarks.problems import (
    CharModel,
    Problem,
    Program,
    Reset,
    Result,
    Size,
    Task,
    as_result,
)
from experiments.benchmarks.timing import interleave
from jaxgru import GRUParams

TRIAL_SECONDS = 0.1  # for each variant of a task, before the fastest is chosen
Calls = dict[str, Callable[[], Any]]  # name of a variant -> call


def torch_gru(reset: Reset, size: Size, dtype: Any) -> Callable[..., Program]:
    """A function that builds torch's programs."""
    torch = importlib.import_module("torch")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch_dtype = getattr(torch, jnp.dtype(dtype).name)

    def array(v):
        return torch.tensor(np.asarray(v, np.float32), dtype=torch_dtype, device=device)

    def build(task: Task, problem: Problem | CharModel, compiles: int = 1) -> Program:
        if isinstance(problem, CharModel):
            calls, read = _generation(torch, array, problem)
        else:
            make = {"forward": _forward, "step": _steps}.get(task, _training)
            calls, read = make(torch, array, problem)
        name, call = _fastest(_finish(torch, device, calls))
        return Program(call, read, repeats=STEPS_PER_CALL if task == "step" else 1, note=name)

    return build


def _finish(torch: Any, device: str, calls: Calls) -> Calls:
    """The calls with each number of threads; on CUDA the calls with a synchronization."""
    if device == "cuda":

        def synchronized(call):
            result = call()
            torch.cuda.synchronize()
            return result

        return {name: functools.partial(synchronized, call) for name, call in calls.items()}

    def threaded(call, count):
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
        return call()

    return {
        f"{name}, threads: {count}": functools.partial(threaded, call, count)
        for name, call in calls.items()
        for count in sorted({_default_threads(), 1}, reverse=True)
    }


@functools.cache
def _default_threads() -> int:
    """torch's default number of threads; the first call is before this module changes it."""
    return importlib.import_module("torch").get_num_threads()


def _fastest(calls: Calls) -> tuple[str, Callable[[], Any]]:
    """The name and call of the variant with the smallest median time."""
    samples = interleave(calls, TRIAL_SECONDS * len(calls), min_rounds=3)
    name = min(samples, key=lambda name: float(np.median(samples[name])))
    return name, calls[name]


def allow_tf32(allowed: bool) -> None:
    """Allows torch's float32 products on CUDA to round their operands to TF32, or forbids it."""
    torch = importlib.import_module("torch")
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def _load(module: Any, params: GRUParams, array: Callable[[Any], Any], suffix: str) -> Any:
    """Loads jaxgru's weights into a module, with the dtype and device that `array` gives."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    arrays = (np.asarray(v).T for v in (params.w_x, params.w_h, params.b_x, params.b_h))
    state = {name + suffix: array(v) for name, v in zip(names, arrays)}
    (first, *_) = state.values()
    module = module.to(device=first.device, dtype=first.dtype)
    module.load_state_dict(state)
    return module


def _sequence(torch, array, problem: Problem):
    """(nn.GRU with jaxgru's weights, xs, h0 [1, B, H], dh_last [1, B, H], dhs)."""
    _, _, input_size, hidden_size = (*problem.xs.shape, problem.h0.shape[1])
    module = _load(torch.nn.GRU(input_size, hidden_size), problem.params, array, "_l0")
    xs, dhs = array(problem.xs), array(problem.dhs)
    return module, xs, array(problem.h0)[None], array(problem.dh_last)[None], dhs


def _training(torch, array, problem: Problem) -> tuple[Calls, Callable[[Any], Result]]:
    """Two variants of a training step: autograd from the value, and from given cotangents.

    Sequences of different lengths are packed in every call, as the loader of the data does not.
    With given cotangents autograd starts at the GRU's outputs. That saves the backward pass of the
    value, a few small kernels that a compiler would have fused.
    """
    module, xs, h0, dh_last, dhs = _sequence(torch, array, problem)
    xs, h0 = xs.requires_grad_(), h0.requires_grad_()
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    wanted = [*(getattr(module, name) for name in names), xs, h0]

    def run():
        if problem.lengths is None:
            return module(xs, h0)
        lengths = torch.tensor(problem.lengths, dtype=torch.int64)
        packed = torch.nn.utils.rnn.pack_padded_sequence(xs, lengths, enforce_sorted=False)
        packed_hs, h_last = module(packed, h0)
        total = {"total_length": len(xs)}
        return torch.nn.utils.rnn.pad_packed_sequence(packed_hs, **total)[0], h_last

    def from_value():
        hs, h_last = run()
        value = (h_last * dh_last).sum() + (hs * dhs).sum()
        return value.detach(), torch.autograd.grad(value, wanted)

    def from_cotangents():
        hs, h_last = run()
        value = (h_last.detach() * dh_last).sum() + (hs.detach() * dhs).sum()
        return value, torch.autograd.grad((hs, h_last), wanted, (dhs, dh_last))

    def read(result) -> Result:
        value, (w_x, w_h, b_x, b_h, dxs, dh0) = result
        leaves = {"w_x": w_x.T, "w_h": w_h.T, "b_x": b_x, "b_hn": b_h[2 * module.hidden_size :]}
        return _read(value=value, **leaves, xs=dxs, h0=dh0[0])

    return {"nn.GRU": from_value, "nn.GRU, cotangents given": from_cotangents}, read


def _forward(torch, array, problem: Problem) -> tuple[Calls, Callable[[Any], Result]]:
    """nn.GRU in inference mode."""
    module, xs, h0, *_ = _sequence(torch, array, problem)
    module.eval()  # so that cuDNN saves nothing for a backward pass
    call = torch.inference_mode()(lambda: module(xs, h0))
    return {"nn.GRU": call}, lambda result: _read(h_last=result[1][0], hs=result[0])


def _steps(torch, array, problem: Problem) -> tuple[Calls, Callable[[Any], Result]]:
    """Three variants of single steps in inference mode; each step gets the state before."""
    x, h0 = array(problem.xs)[0], array(problem.h0)

    @torch.inference_mode()
    def run(advance):
        h = h0
        for _ in range(STEPS_PER_CALL):
            h = advance(x, h)
        return h

    advances = _advances(torch, array, problem.params)
    calls = {name: functools.partial(run, advance) for name, advance in advances.items()}
    return calls, lambda h: _read(h=h)


def _generation(torch, array, model: CharModel) -> tuple[Calls, Callable[[Any], Result]]:
    """Three variants of a loop that generates the same characters."""
    (params,) = model.params.layers
    assert isinstance(params, GRUParams)
    calls = {
        name: _generator(torch, array, model, advance)
        for name, advance in _advances(torch, array, params).items()
    }
    return calls, lambda tokens: _read(tokens=tokens)


def _advances(torch, array, params: GRUParams) -> dict[str, Callable[[Any, Any], Any]]:
    """{name: function of x [1, E] and h [1, H]} of nn.GRUCell, the functional cell and nn.GRU."""
    input_size, hidden_size = params.w_x.shape[0], params.w_h.shape[0]
    cell = _load(torch.nn.GRUCell(input_size, hidden_size), params, array, "")
    gru = _load(torch.nn.GRU(input_size, hidden_size), params, array, "_l0")
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    return {
        "nn.GRUCell": cell,
        "torch.gru_cell": lambda x, h: torch.gru_cell(x, h, *weights),
        "nn.GRU": lambda x, h: gru(x[None], h[None])[1][0],
    }


def _generator(torch, array, model: CharModel, advance):
    """A loop in inference mode that generates all characters, on the device until the end."""
    embedding, w, b = (array(v) for v in (model.params.embedding, model.params.w, model.params.b))
    first = torch.full((1,), model.first, dtype=torch.int64, device=w.device)
    w_t = w.T.contiguous()

    @torch.inference_mode()
    def call():
        token, h = first, torch.zeros((1, w.shape[0]), dtype=w.dtype, device=w.device)
        tokens = []
        for _ in range(model.num_tokens):
            h = advance(torch.embedding(embedding, token), h)
            token = torch.nn.functional.linear(h, w_t, b).argmax(-1)
            tokens.append(token)
        return torch.cat(tokens)

    return call


def _read(**leaves) -> Result:
    """Converts torch's tensors to NumPy; bfloat16, which NumPy lacks, becomes float32."""
    return as_result(
        **{
            name: (v.float() if v.is_floating_point() else v).detach().cpu().numpy()
            for name, v in leaves.items()
        }
    )
