"""The modules that replace removed parts in a pruned model, and the adapter of its output head.

A stand-in of a block maps the state of each token separately. Massive tokens may bypass the stand-in. Other modules
replace a removed attention or a removed MLP, are inserted before the output head, or replace the embedding and its tied
head.
"""
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class StandIn(nn.Module):
    """A module that replaces a block. A stand-in maps the state of each token; massive tokens may bypass the
    stand-in."""

    def __init__(self, bypass_above: float | None) -> None:
        super().__init__()
        self.bypass_above = bypass_above

    def forward(self, h: Tensor) -> Tensor:
        mapped = self.map(h)
        if self.bypass_above is None:
            return mapped
        return torch.where(h.float().norm(dim=-1, keepdim=True) > self.bypass_above, h, mapped)


class RffMlp(StandIn):
    """KDP's folded block: random Fourier features, a linear map, an activation, a linear map.

    h -> W2 act(W1 (cos(Omega' x + b), sin(Omega' x + b)) + b1) + b2. Here x is h, or h divided by its root mean square,
    as `lift_input` says. W1 already contains the operators A_k .. A_1 and the factor 1/sqrt(m); W2 and b2 already
    contain the factor alpha (methods.kdp.inverse.to_module).
    """

    def __init__(self, width: int, frequencies: int, hidden: int, activation: str, lift_input: str,
                 bypass_above: float | None = None) -> None:
        super().__init__(bypass_above)
        self.lift_input = lift_input
        self.omega = nn.Parameter(torch.zeros(frequencies, width))
        self.phase = nn.Parameter(torch.zeros(frequencies))
        self.w1 = nn.Linear(2 * frequencies, hidden)
        self.w2 = nn.Linear(hidden, width)
        self.act = activation_function(activation)
        self.macs_per_token = width * frequencies + 2 * frequencies * hidden + hidden * width

    def map(self, h: Tensor) -> Tensor:
        # angles may be many times 2 pi, so they are computed in float32, whatever the precision of the model is
        x = rms_scale(h.float()) if self.lift_input == "rms" else h.float()
        angle = functional.linear(x, self.omega.float(), self.phase.float())
        z = torch.cat((angle.cos(), angle.sin()), dim=-1).to(h.dtype)
        return self.w2(self.act(self.w1(z)))


class Affine(StandIn):
    """h -> W h + b, an affine map of the state itself."""

    def __init__(self, width: int, bypass_above: float | None = None) -> None:
        super().__init__(bypass_above)
        self.map = nn.Linear(width, width)
        self.macs_per_token = width * width


class Residual(StandIn):
    """h -> h + W x + b + O f(V x + c), a skip path, a linear part and a dictionary; x is h normalised token by token.

    The kind of the dictionary f determines the matrix V. `glu`: gated neurons act(V_1 x) * (V_2 x). `mlp`: ordinary
    neurons act(V x). `rff`: random Fourier features cos(V x + c). If the dictionary has no entries, only the skip path
    and the linear part remain.
    """

    def __init__(self, width: int, entries: int, dictionary: str, activation: str, norm: str,
                 bypass_above: float | None = None) -> None:
        super().__init__(bypass_above)
        self.dictionary, self.norm, self.entries = dictionary, norm, entries
        self.linear = nn.Linear(width, width)
        self.act = activation_function(activation)
        rows = entries * (2 if dictionary == "glu" else 1)
        if entries:
            self.inner = nn.Linear(width, rows)
            self.outer = nn.Linear(entries, width, bias=False)
        self.macs_per_token = width * (width + rows + entries)

    def map(self, h: Tensor) -> Tensor:
        x = normalised(h.float(), self.norm).to(h.dtype)
        step = self.linear(x)
        return h + (step + self.outer(self.features(x)) if self.entries else step)

    def features(self, x: Tensor) -> Tensor:
        """The dictionary's values for normalised states, shape (..., entries)."""
        inner = self.inner(x)
        if self.dictionary == "rff":
            return inner.cos()
        if self.dictionary == "mlp":
            return self.act(inner)
        gate, up = inner.chunk(2, dim=-1)
        return self.act(gate) * up


class LowRank(nn.Module):
    """h -> h + B A h, with 2 r D parameters. This adapter changes the logits. An embedding that is tied to the head
    does not change."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Linear(width, rank, bias=False)
        self.b = nn.Linear(rank, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.b(self.a(h))

    def before(self, head: nn.Module, args: tuple) -> tuple:
        """The hook that runs the adapter before the output head. The hook is a bound method, so that a copied model
        runs its own copy of the adapter."""
        return (self(args[0]), *args[1:])


class RareEmbedding(nn.Module):
    """An embedding in which the rows of rare tokens have low rank r:

        e_v = frequent_v              for the F frequent tokens
        e_v = rare_v basis + mean     for all other tokens

    The embedding of a small model has a large share of all parameters: a fifth in SmolLM2-135M, and more than a half in
    Gemma 3 270M. Most of its rows belong to tokens that hardly occur. GroupReduce (Chen et al., NeurIPS 2018) also
    divides tokens by their frequency and gives each group its own rank; here the frequent tokens keep their rows.
    `scale` is the factor by which some families multiply the rows when tokens are read.
    """

    def __init__(self, vocabulary: int, width: int, frequent: int, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.scale = vocabulary, width, scale
        self.frequent = nn.Parameter(torch.zeros(frequent, width))
        self.rare = nn.Parameter(torch.zeros(vocabulary - frequent, rank))
        self.basis = nn.Parameter(torch.zeros(rank, width))
        self.mean = nn.Parameter(torch.zeros(width))
        # the place of each token: frequent tokens come first
        self.register_buffer("place", torch.zeros(vocabulary, dtype=torch.int32))

    def forward(self, ids: Tensor) -> Tensor:
        place, count = self.place[ids].long(), len(self.frequent)
        frequent = functional.embedding(place.clamp(max=count - 1), self.frequent)
        # e_v = rare_v basis + mean
        rare = functional.embedding((place - count).clamp(min=0), self.rare) @ self.basis + self.mean
        return torch.where((place < count).unsqueeze(-1), frequent, rare) * self.scale

    def rows(self) -> Tensor:
        """All rows as one matrix (V, D), without the scale."""
        return torch.cat((self.frequent, self.rare @ self.basis + self.mean))[self.place.long()]


class RareHead(nn.Module):
    """The output head that is tied to a RareEmbedding. It has no parameters of its own and reads those of the
    embedding."""

    def __init__(self, embedding: RareEmbedding) -> None:
        super().__init__()
        # a module in a list is not a submodule, so the parameters of the embedding are counted and stored once
        self._embedding = [embedding]
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings

    @property
    def embedding(self) -> RareEmbedding:
        """The embedding to which the head is tied."""
        return self._embedding[0]

    @property
    def weight(self) -> Tensor:
        """A parameter that states the precision and the device of the head. It is not the matrix of the head."""
        return self.embedding.basis

    @property
    def macs_per_token(self) -> int:
        """Multiply-adds for one token."""
        own = self.embedding
        return own.frequent.numel() + own.rare.numel() + own.basis.numel()

    def forward(self, h: Tensor) -> Tensor:
        own = self.embedding
        frequent, rare, basis, mean = (one.to(h.device) for one in (own.frequent, own.rare, own.basis, own.mean))
        h_DN = h.reshape(-1, self.in_features).T
        # h . e_v = (h basis') . rare_v + h . mean
        logits_VN = torch.cat((frequent @ h_DN, rare @ (basis @ h_DN) + mean @ h_DN))
        # whole rows are put into the order of the vocabulary, which is much faster than single numbers
        return logits_VN.index_select(0, own.place.to(h.device)).T.reshape(*h.shape[:-1], -1)


class NoAttention(nn.Module):
    """Replaces a removed attention and adds nothing to the state.

    For each token the cache stores one zero instead of keys and values. With these zeros, the length of the cache is
    correct in every layer. Positions and masks are computed from this length.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, layer_past: Any = None,
                **kwargs: Any) -> tuple[Tensor, None]:
        # GPT-NeoX uses another name for this argument
        cache = layer_past if past_key_values is None else past_key_values
        if cache is not None:
            token_B1T1 = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(token_B1T1, token_B1T1, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMlp(nn.Module):
    """Replaces a removed MLP and adds nothing to the state."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)


def activation_function(name: str) -> nn.Module:
    """The activation function with transformers' name `name`, such as `silu`."""
    # transformers is imported only where a stand-in is built
    from transformers.activations import ACT2FN

    return ACT2FN[name]


MODULES: dict[str, type[nn.Module]] = {"rff_mlp": RffMlp, "affine": Affine, "residual": Residual}
"""The stand-in class for each `kind` in a configuration."""


def rms_scale(h: Tensor) -> Tensor:
    """h divided by its root mean square over the last axis; input and output are float32. A zero state stays zero."""
    return h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True).clamp_min(1e-12))


def normalised(h: Tensor, norm: str) -> Tensor:
    """States as the MLPs of a family read them, without gain and bias. `norm` is `rms`, `layer` (mean-free) or
    `none`."""
    if norm == "none":
        return h
    return rms_scale(h - h.mean(dim=-1, keepdim=True) if norm == "layer" else h)
