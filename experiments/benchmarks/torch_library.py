"""torch.nn.GRU as a contender: its own autograd, on the device that JAX uses.

The weights are ours, transposed. On a CPU every call is tried with torch's own number of threads
and with one, which wins at small sizes, and the quicker of them is what counts; on CUDA every call
is synchronized. It is eager torch: nothing is compiled.
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

TRIAL_SECONDS = 0.1  # for each way to do a task, before the quickest is chosen
Calls = dict[str, Callable[[], Any]]  # how -> call


def torch_gru(reset: Reset, size: Size, dtype: Any) -> Callable[..., Program]:
    """The builder of torch's programs."""
    torch = importlib.import_module("torch")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    kind = getattr(torch, jnp.dtype(dtype).name)

    def array(v):
        return torch.tensor(np.asarray(v, np.float32), dtype=kind, device=device)

    def build(task: Task, problem: Problem | CharModel, compiles: int = 1) -> Program:
        if isinstance(problem, CharModel):
            calls, read = _generation(torch, array, problem)
        else:
            make = {"training": _training, "forward": _forward, "step": _steps}[task]
            calls, read = make(torch, array, problem)
        how, call = _quickest(_finish(torch, device, calls))
        return Program(call, read, repeats=STEPS_PER_CALL if task == "step" else 1, note=how)

    return build


def _finish(torch: Any, device: str, calls: Calls) -> Calls:
    """The calls with each number of threads, or synchronized."""
    if device == "cuda":

        def synchronized(call):
            result = call()
            torch.cuda.synchronize()
            return result

        return {how: functools.partial(synchronized, call) for how, call in calls.items()}

    def threaded(call, count):
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
        return call()

    return {
        f"{how}, threads: {count}": functools.partial(threaded, call, count)
        for how, call in calls.items()
        for count in sorted({_own_threads(), 1}, reverse=True)
    }


@functools.cache
def _own_threads() -> int:
    """How many threads torch takes unless told, asked before anything here tells it."""
    return importlib.import_module("torch").get_num_threads()


def _quickest(calls: Calls) -> tuple[str, Callable[[], Any]]:
    """The way that takes the least time."""
    samples = interleave(calls, TRIAL_SECONDS * len(calls), min_rounds=3)
    how = min(samples, key=lambda how: float(np.median(samples[how])))
    return how, calls[how]


def allow_tf32(allowed: bool) -> None:
    """Lets torch's float32 products on CUDA round their operands to TF32, or not."""
    torch = importlib.import_module("torch")
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def _load(module: Any, params: GRUParams, array: Callable[[Any], Any], suffix: str) -> Any:
    """The module with our weights, in the dtype and on the device of what array makes."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    arrays = (np.asarray(v).T for v in (params.w_x, params.w_h, params.b_x, params.b_h))
    state = {name + suffix: array(v) for name, v in zip(names, arrays)}
    (like, *_) = state.values()
    module = module.to(device=like.device, dtype=like.dtype)
    module.load_state_dict(state)
    return module


def _sequence(torch, array, problem: Problem):
    """nn.GRU with our weights, xs, h0 [1, B, H], dh_last [1, B, H], dhs."""
    _, _, input_size, hidden_size = (*problem.xs.shape, problem.h0.shape[1])
    module = _load(torch.nn.GRU(input_size, hidden_size), problem.params, array, "_l0")
    xs, dhs = array(problem.xs), array(problem.dhs)
    return module, xs, array(problem.h0)[None], array(problem.dh_last)[None], dhs


def _training(torch, array, problem: Problem) -> tuple[Calls, Callable[[Any], Result]]:
    """Forward, the functional, and autograd of everything.

    Given the cotangents, autograd starts at the GRU: the functional's own backward, some small
    kernels that a compiler would have fused, is left out.
    """
    module, xs, h0, dh_last, dhs = _sequence(torch, array, problem)
    xs, h0 = xs.requires_grad_(), h0.requires_grad_()
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    wanted = [*(getattr(module, name) for name in names), xs, h0]

    def from_value():
        hs, h_last = module(xs, h0)
        value = (h_last * dh_last).sum() + (hs * dhs).sum()
        return value.detach(), torch.autograd.grad(value, wanted)

    def from_cotangents():
        hs, h_last = module(xs, h0)
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
    module.eval()  # cuDNN then keeps nothing for a backward pass
    call = torch.inference_mode()(lambda: module(xs, h0))
    return {"nn.GRU": call}, lambda result: _read(h_last=result[1][0], hs=result[0])


def _steps(torch, array, problem: Problem) -> tuple[Calls, Callable[[Any], Result]]:
    """One step in three ways, in inference mode, its state fed back."""
    x, h0 = array(problem.xs)[0], array(problem.h0)

    @torch.inference_mode()
    def run(advance):
        h = h0
        for _ in range(STEPS_PER_CALL):
            h = advance(x, h)
        return h

    advances = _advances(torch, array, problem.params)
    calls = {how: functools.partial(run, advance) for how, advance in advances.items()}
    return calls, lambda h: _read(h=h)


def _generation(torch, array, model: CharModel) -> tuple[Calls, Callable[[Any], Result]]:
    """Three loops that write the same characters."""
    (params,) = model.params.layers
    assert isinstance(params, GRUParams)
    calls = {
        how: _writer(torch, array, model, advance)
        for how, advance in _advances(torch, array, params).items()
    }
    return calls, lambda tokens: _read(tokens=tokens)


def _advances(torch, array, params: GRUParams) -> dict[str, Callable[[Any, Any], Any]]:
    """name -> (x [1, E], h [1, H]) -> h by nn.GRUCell, the functional cell and nn.GRU."""
    input_size, hidden_size = params.w_x.shape[0], params.w_h.shape[0]
    cell = _load(torch.nn.GRUCell(input_size, hidden_size), params, array, "")
    gru = _load(torch.nn.GRU(input_size, hidden_size), params, array, "_l0")
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    return {
        "nn.GRUCell": cell,
        "torch.gru_cell": lambda x, h: torch.gru_cell(x, h, *weights),
        "nn.GRU": lambda x, h: gru(x[None], h[None])[1][0],
    }


def _writer(torch, array, model: CharModel, advance):
    """A loop in inference mode that writes all characters; they stay on the device till the end."""
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
    """torch's arrays as NumPy's; NumPy has no bfloat16."""
    return as_result(
        **{
            name: (v.float() if v.is_floating_point() else v).detach().cpu().numpy()
            for name, v in leaves.items()
        }
    )
