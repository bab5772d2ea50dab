"""torch.nn.GRU and jaxgru have the same values and gradients for the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from jaxgru import PYTORCH, Bidirectional, GRUParams, gru_stack, length_mask

torch = pytest.importorskip("torch", reason="torch is in the extra `peers`")

T, B, I_SIZE, H = 6, 3, 4, 5
EXACT = 1e-12  # float64 on both sides


def make_peer(num_layers, bidirectional):
    torch.manual_seed(0)
    return torch.nn.GRU(
        I_SIZE, H, num_layers=num_layers, bidirectional=bidirectional, dtype=torch.float64
    )


def gather(peer, of):
    """Applies `of` to each torch parameter; returns the arrays as a stack of jaxgru."""

    def direction(layer, suffix):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        arrays = [of(getattr(peer, f"{name}_l{layer}{suffix}")) for name in names]
        return GRUParams(*(jnp.asarray(np.array(v).T) for v in arrays), spec=PYTORCH)

    if not peer.bidirectional:
        return tuple(direction(layer, "") for layer in range(peer.num_layers))
    return tuple(
        Bidirectional(direction(layer, ""), direction(layer, "_reverse"))
        for layer in range(peer.num_layers)
    )


def gather_state(peer, h):
    """Converts torch's state [layers * directions, B, H] to a state of jaxgru."""
    h = [jnp.asarray(np.array(v)) for v in h]
    return tuple(map(Bidirectional, h[::2], h[1::2])) if peer.bidirectional else tuple(h)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("lengths", [None, [4, 6, 1]], ids=["full", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_torch_gru_has_the_same_values_and_gradients(num_layers, bidirectional, lengths):
    """Packed sequences of torch are a mask in jaxgru; torch's padded outputs are zero."""
    peer, rng = make_peer(num_layers, bidirectional), np.random.default_rng(1)
    directions = 2 if bidirectional else 1
    xs, dys = rng.normal(size=(T, B, I_SIZE)), rng.normal(size=(T, B, directions * H))
    h0, dh = rng.normal(size=(2, num_layers * directions, B, H))
    mask = np.ones((T, B), bool) if lengths is None else np.asarray(length_mask(lengths, T))

    their_xs, their_h0 = (torch.tensor(v, requires_grad=True) for v in (xs, h0))
    if lengths is None:
        their_ys, their_h = peer(their_xs, their_h0)
    else:
        pack = torch.nn.utils.rnn.pack_padded_sequence(their_xs, lengths, enforce_sorted=False)
        packed, their_h = peer(pack, their_h0)
        their_ys, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=T)
    ((their_ys * torch.tensor(dys)).sum() + (their_h * torch.tensor(dh)).sum()).backward()

    def run(layers, xs, h0):
        h_last, ys = gru_stack(layers, xs, h0, mask=None if lengths is None else jnp.asarray(mask))
        return h_last, jnp.where(mask[..., None], ys, 0.0)

    layers = gather(peer, lambda p: p.detach().numpy())
    arguments = (layers, jnp.asarray(xs), gather_state(peer, h0))
    (h_last, ys), pull = jax.vjp(jax.jit(run), *arguments)
    assert_close(ys, their_ys.detach().numpy(), EXACT, "outputs")
    assert_close(h_last, gather_state(peer, their_h.detach().numpy()), EXACT, "last states")
    dlayers, dxs, dh0 = pull((gather_state(peer, dh), jnp.asarray(dys)))
    assert_close(dlayers, gather(peer, lambda p: p.grad.numpy()), EXACT, "parameters")
    assert_close(dxs, their_xs.grad.numpy(), EXACT, "inputs")
    assert_close(dh0, gather_state(peer, their_h0.grad.numpy()), EXACT, "initial states")
