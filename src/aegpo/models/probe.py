"""Reads attention entropy off a network while it runs (arXiv 2602.06825), without touching what it computes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, MochiAttention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aegpo.math.entropy import attention_entropy

Tokens = Literal["image", "text", "all"]
Half = Literal["both", "unconditional", "conditional"]
Kind = Literal["joint", "self", "cross"]
Spans = Mapping[Tokens, slice]


@dataclass(frozen=True)
class Layer:
    """An attention layer that was read: its name in the network, who looks at whom in it, and how many queries it has.

    `joint`: image and text tokens at one another; `self`: image tokens at image tokens; `cross`: image tokens at text.
    """

    name: str
    kind: Kind
    queries: int


@dataclass
class _Running:
    """The attention layer that the network is in, the tokens it was given, and the layer that it is a part of."""

    name: str
    module: Any
    hidden: Tensor
    encoder: Tensor | None
    outer: "_Running | None"
    shown: bool = False  # its queries and keys
    holds: bool = False  # another layer, which may do all the attending


class AttentionProbe(TorchFunctionMode):
    """Within it, every attention layer of a diffusers transformer or U-Net leaves the entropy of its rows behind.

    Queries and keys are taken where all networks hand them over, after normalisation and position embedding: at
    `scaled_dot_product_attention`, or at diffusers' attention dispatcher where its backend is another. What the network
    returns stays the same to the bit. What a gradient checkpoint computes again in a backward is not read again. A
    compiled network runs uncompiled within it, since compiled code shows neither layers nor keys.

    Which tokens are of the image and which of the text, a network shows where a layer is given both apart. One that
    never does (Lumina, Z-Image), or runs a layer in parts (Mochi) or twice (image prompts), is refused.

        with AttentionProbe(pipe.transformer, layers=("transformer_blocks.1?.attn",)) as probe, torch.no_grad():
            pipe.transformer(...)
        entropy = probe.entropy()  # (layers, B), given once; probe.layers says which is which

    Args:
        network: a diffusers model; it, or blocks of it, may be compiled.
        rows: queries to read in a layer, at most; evenly spaced over those asked for, the same ones every time.
        queries: whose attention is looked at; a layer without such queries is not read.
        keys: what it is spread over; less than all of a layer's keys are renormalised, and a layer without such keys is
            not read.
        layers: names to read, as patterns such as `transformer_blocks.1?.attn`; empty: all.
        half: of a batch that guidance has doubled, the unconditional half first, as diffusers does it.
        normalise: divide by the logarithm of the number of keys, so that layers of different length weigh alike.

    Raises:
        ValueError: for an argument that is none of these; on entry, for a network without attention layers, and a
            pattern that none of them matches; while the network runs, for a layer that hides its queries and keys, or
            shows them in a way that cannot be told; from `entropy`, if nothing was there to read, or nothing shows
            which tokens are the image's.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        rows: int = 64,
        queries: Tokens = "image",
        keys: Tokens = "all",
        layers: Sequence[str] = (),
        half: Half = "both",
        normalise: bool = False,
    ) -> None:
        super().__init__()
        for name, value, known in (("queries", queries, Tokens), ("keys", keys, Tokens), ("half", half, Half)):
            if value not in get_args(known):
                raise ValueError(f"probe: {name} must be one of {', '.join(get_args(known))}, not {value!r}")
        if not isinstance(network, nn.Module):
            raise ValueError(f"probe: network must be a module, such as pipe.transformer, not {type(network).__name__}")
        if not isinstance(rows, int) or rows < 1:
            raise ValueError(f"probe: rows must be a whole number of at least 1, not {rows!r}")
        if isinstance(layers, str) or not isinstance(layers, Sequence):
            example = layers if isinstance(layers, str) else "transformer_blocks.1?.attn"
            raise ValueError(f"probe: layers must be a sequence of names, such as ({example!r},), not {layers!r}")
        self.network = network
        self.rows = rows
        self.queries: Tokens = queries
        self.keys: Tokens = keys
        self.patterns = layers
        self.half: Half = half
        self.normalise = normalise
        self.layers: list[Layer] = []
        self._read: list[tuple[Layer, Tensor]] = []
        self._running: _Running | None = None
        self._joined: tuple[int, int] = (0, 0)  # image and text tokens of the last layer that joined them,
        self._text_first: bool | None = None  # and in which order it did, once that is known
        self._images: set[int] = set()  # how many image tokens there were in layers that were given text apart
        self._undo = ExitStack()

    def entropy(self) -> Tensor:
        """Mean over heads and rows of each layer that ran since the last call, in nats: float32 (layers, B).

        They are in the order in which they ran, those of one forward after those of another; `layers` then names them.
        """
        if not self._read:
            raise ValueError(
                f"probe: no attention layer has run that has {self.queries} queries and {self.keys} keys, or entropy() "
                "was called before and gave what there was"
            )
        self.layers = [layer for layer, _ in self._read]
        for layer in self.layers if not self.queries == self.keys == "all" else ():
            if layer.kind == "self" and layer.queries not in self._images:
                raise ValueError(
                    f"probe: nothing in {type(self.network).__name__} shows that the {layer.queries} tokens of "
                    f"{layer.name} are the image's; leave it out by probe.layers, or set probe.queries and probe.keys "
                    "to all"
                )
        entropies, self._read = [entropy for _, entropy in self._read], []
        return torch.stack(entropies)

    # ---------------------------------------------------------------- watching

    def __enter__(self) -> Self:
        layers = _attention_layers(self.network)
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise ValueError(
                    f"probe.layers: no attention layer is named {pattern!r}; {next(iter(layers))!r} is one"
                )
        with ExitStack() as stack:
            stack.enter_context(_uncompiled(self.network))
            stack.enter_context(self._dispatcher())
            for name, module in layers.items():
                stack.callback(module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            self._undo = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listen(None)
        self._undo.__exit__(kind, error, trace)

    def _listen(self, running: _Running | None) -> None:
        """To what that layer calls; to nothing, between layers, where there is nothing to be heard."""
        if (running is None) != (self._running is None):
            super().__enter__() if self._running is None else super().__exit__(None, None, None)
        self._running = running

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and self._running is not None:
            self._sdpa(self._running, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch._C._current_graph_task_id() != -1:  # a backward is running: this is a checkpoint's second time
            return
        given = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
        hidden, encoder = given["hidden_states"], given.get("encoder_hidden_states")
        encoder = encoder[0] if isinstance(encoder, tuple) else encoder  # beside it, an image prompt's
        outer = self._running
        if outer is not None and outer.name and not name.startswith(f"{outer.name}."):
            outer = None
        self._listen(_Running(name, module, hidden, None if encoder is hidden else encoder, outer))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        running = self._running
        if running is None:
            return
        self._listen(running.outer)
        if running.outer is not None:
            running.outer.holds = True
        failed = output is None  # the layer raised an error, which is on its way
        if not (failed or running.shown or running.holds) and self._wanted(running.name):
            processor = type(running.module.processor).__name__
            raise ValueError(
                f"probe: {running.name} computes its attention by {processor}, which hides its queries and keys; take "
                "one that calls scaled_dot_product_attention, by set_attn_processor(AttnProcessor2_0()) or "
                "set_attention_backend('native')"
            )

    def _wanted(self, name: str) -> bool:
        return not self.patterns or any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def _sdpa(
        self,
        running: _Running,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> None:
        """Read a call of `scaled_dot_product_attention`, whose arguments these are: tokens in dimension 2."""
        if is_causal:
            attn_mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        self._look(running, query, key, value, attn_mask, scale)

    @contextmanager
    def _dispatcher(self) -> Iterator[None]:
        """Within it, diffusers' attention backends are read as they are called, with tokens in dimension 1."""

        def read(backend: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
                running, self._running = self._running, None  # the native ones are not read a second time
                if running is not None:
                    q, k, v = (tokens.transpose(1, 2) for tokens in (query, key, value))
                    mask = options.get("attn_mask")
                    if mask is not None and mask.shape == (len(k), k.shape[2]):  # (B, keys), as some of them take it
                        mask = mask[:, None, None]
                    causal, scale = options.get("is_causal", False), options.get("scale")
                    self._sdpa(running, q, k, v, mask, is_causal=causal, scale=scale)
                output = backend(query=query, key=key, value=value, **options)
                self._running = running
                return output

            return call

        backends = _AttentionBackendRegistry._backends
        originals = dict(backends)
        backends.update({name: read(backend) for name, backend in originals.items()})
        try:
            yield
        finally:
            backends.update(originals)

    # ---------------------------------------------------------------- reading

    @torch.no_grad()
    def _look(
        self, running: _Running, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> None:
        if self._wanted(running.name) and (running.shown or len(query) != len(running.hidden)):
            raise ValueError(
                f"probe: {running.name} attends more than once, or sample by sample; leave it out by probe.layers"
            )
        running.shown = True
        kind, queries, keys = self._tokens(running, query.shape[2], key.shape[2], value)
        if self.queries not in queries or self.keys not in keys or not self._wanted(running.name):
            return
        tokens = query.shape[2]
        if self.half != "both":
            which = ("unconditional", "conditional").index(self.half)
            query, key = query.chunk(2)[which], key.chunk(2)[which]
            mask = mask if mask is None or mask.ndim < 4 or len(mask) == 1 else mask.chunk(2)[which]
        chosen = keys[self.keys]
        if mask is not None and mask.shape[-1] > 1:
            mask = mask[..., chosen]
        rows = _evenly(queries[self.queries], tokens, self.rows, query.device)
        entropy = attention_entropy(
            query, key[:, :, chosen], scale=scale, rows=rows, mask=mask, normalise=self.normalise
        )
        self._read.append((Layer(running.name, kind, tokens), entropy.mean((1, 2))))

    def _tokens(self, running: _Running, queries: int, keys: int, value: Tensor) -> tuple[Kind, Spans, Spans]:
        """What kind of layer runs, and where image and text tokens stand among so many queries, and so many keys."""
        whole = slice(None)
        if running.encoder is not None:
            images, texts = _count(running.hidden), running.encoder.shape[1]
            self._images.add(images)
            if keys != images + texts:
                return "cross", {"image": whole, "all": whole}, {"text": whole, "all": whole}
            self._joined = images, texts
            if self._text_first is None:
                self._text_first = _text_first(running, value, texts)
        images, texts = self._joined
        if not texts or keys != images + texts:
            return "self", {"image": whole, "all": whole}, {"image": whole, "all": whole}
        image, text = (slice(texts, None), slice(texts)) if self._text_first else (slice(images), slice(images, None))
        joined: Spans = {"image": image, "text": text, "all": whole}
        return "joint", joined if queries == keys else {"image": whole, "all": whole}, joined


def _attention_layers(network: nn.Module) -> dict[str, Any]:
    kinds = (Attention, AttentionModuleMixin, MochiAttention)
    found = {name.replace("_orig_mod.", ""): part for name, part in network.named_modules() if isinstance(part, kinds)}
    if not found:
        raise ValueError(f"probe: {type(network).__name__} has no attention layer of diffusers'")
    return found


def _uncompiled(network: nn.Module) -> Any:
    """Within it, compiled parts of the network run as they were written."""
    compiled = any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in network.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _count(hidden: Tensor) -> int:
    """Tokens of (B, tokens, width), or of (B, width, height, width of an image)."""
    return hidden.shape[1] if hidden.ndim == 3 else math.prod(hidden.shape[2:])


def _text_first(running: _Running, value: Tensor, texts: int) -> bool:
    """Whether a layer puts its text tokens before its image tokens: the first of those has its value behind them then.

    Networks differ in it, and none says so.
    """
    to_value = dict(running.module.named_children()).get("to_v")
    if to_value is None or running.hidden.ndim != 3:
        front = behind = 0.0
    else:
        first = to_value(running.hidden[:, :1])[:, 0]
        front, behind = (_distance(value[:, :, at].flatten(1), first) for at in (0, texts))
    if front == behind:
        raise ValueError(
            f"probe: {running.name} does not show where its image and its text tokens stand; set probe.queries and "
            "probe.keys to all"
        )
    return behind < front


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def _evenly(span: slice, tokens: int, most: int, device: torch.device) -> Tensor:
    """At most so many places of a span, from its first to its last."""
    first, end, _ = span.indices(tokens)
    count = min(most, end - first)
    return first + torch.arange(count, device=device) * (end - first - 1) // max(count - 1, 1)
