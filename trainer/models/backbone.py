"""One frozen model that several share, each by an adapter of low rank, or by none.

    backbone = Backbone(model, base)               frozen, in the dtype of compute
    backbone.add("policy", settings, model)        what is trained, in float32
    policy = Policy(model, Use(backbone, "policy"))
    reference = Policy(model, Use(backbone, None))

The layers are PEFT's. Which adapter they compute with is set before each forward, which goes
through the backbone: FSDP has its weights gathered there. A model that shares nothing goes by
`ALONE`. Masters of adapters are float32 and computed with in the dtype of what comes in, as
everything that is trained; PEFT would turn what comes in, and keep for the backward, into float32.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from trainer import parallel
from trainer.config import ConfigError, Lora
from trainer.config.lora import ALL_LINEAR
from trainer.models.adapters import Base
from trainer.models.quantized import widened
from trainer.parallel.place import blocks

Out = TypeVar("Out")
EMBEDDINGS, HEAD = "embed_tokens", "lm_head"
"""What the settings call them, whatever the model does."""


class Through(Protocol):
    """How a model of ours reaches the transformer that it computes with."""

    @property
    def adapter(self) -> str | None: ...

    def __call__(self, do: Callable[[], Out]) -> Out:
        """What `do` says of the transformer, within its forward."""
        ...

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Inside, no rank waits for another: each may compute as often as it likes."""
        ...


@dataclass(frozen=True)
class Alone:
    """It is the model's own."""

    adapter: ClassVar[None] = None

    def __call__(self, do: Callable[[], Out]) -> Out:
        return do()

    def whole(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


ALONE = Alone()


@dataclass(frozen=True)
class Use:
    """It is shared, by an adapter, or by none."""

    backbone: Backbone
    adapter: str | None

    def __call__(self, do: Callable[[], Out]) -> Out:
        return self.backbone(self.adapter, do)

    def whole(self) -> contextlib.AbstractContextManager[None]:
        return self.backbone.whole()


class Backbone(nn.Module):
    def __init__(self, model: PreTrainedModel, base: Base) -> None:
        super().__init__()
        self.model, self.base = model.requires_grad_(False), base
        self.settings: dict[str, Any] = {}
        """PEFT's, of each adapter."""

    def forward(self, adapter: str | None, do: Callable[[], Out]) -> Out:
        for layer in self.layers():
            # set_adapter would freeze the others' adapters
            layer._active_adapter = [] if adapter is None else [adapter]
        return do()

    def layers(self) -> Iterator[Any]:
        """That have an adapter, one or several."""
        return (part for part in self.model.modules() if hasattr(part, "lora_A"))

    def add(self, name: str, settings: Any, part: PreTrainedModel) -> None:
        """An adapter with PEFT's settings, for the layers of this model or of its body. It adds
        nothing until it is trained, or read."""
        self.settings[name] = settings
        with warnings.catch_warnings():  # of other adapters, and of a head that is tied
            warnings.simplefilter("ignore", UserWarning)
            import_peft().inject_adapter_in_model(settings, part, adapter_name=name)
        for layer in self.layers():
            layer.cast_input_dtype_enabled = False
            for ours in (layer.lora_A, layer.lora_B):
                if name in ours:
                    ours[name] = Low(ours[name])
        for p in adapter_of(self.model, name).values():
            p.data = p.data.float()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        parts = [part for part in self.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.set_reshard_after_forward(True, recurse=False)
                part.reshard()


class Low(nn.Linear):
    """One of an adapter's two layers."""

    def __init__(self, made: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = made.in_features, made.out_features
        self.weight = made.weight
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


def import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("peft is not installed: pip install peft", "lora.rank") from None
    return peft


def settings_for(lora: Lora, rank: int, part: PreTrainedModel, task: str) -> Any:
    """PEFT's settings of an adapter for `part`, a model or its body."""
    return import_peft().LoraConfig(
        r=rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(targets(lora, part)),
        task_type=task,
    )


def targets(lora: Lora, part: PreTrainedModel) -> set[str]:
    """Ends of the names of the layers of `part` that get an adapter."""
    found: set[str] = set()
    inner = dict(part.named_modules())
    linear = {
        name.rpartition(".")[2]
        for block in blocks(part)
        for name, each in block.named_modules()
        if (isinstance(each, nn.Linear) or hasattr(each, "base_layer"))
        and not {"base_layer", "lora_A", "lora_B"} & {*name.split(".")}
    }
    special = {HEAD: part.get_output_embeddings(), EMBEDDINGS: part.get_input_embeddings()}
    for name in lora.names:
        if name == ALL_LINEAR:
            found |= linear
        elif name in special:
            own = [n for n, each in inner.items() if each is special[name] and n]
            if part.base_model is not part:  # the policy; its readers share the embeddings
                found |= {n.rpartition(".")[2] for n in own}
        elif any(n == name or n.endswith(f".{name}") for n in inner):
            found.add(name)
        else:
            known = ", ".join([ALL_LINEAR, *sorted(linear), *special])
            raise ConfigError(f"there is no layer {name}; want some of {known}", "lora.targets")
    if not found:
        raise ConfigError("names no layer of the body: want all-linear beside it", "lora.targets")
    return found


def adapter_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Its parameters, by their names in the model."""
    named = model.named_parameters()
    return {n: p for n, p in named if "lora_" in n and name in n.split(".")}


def base_of(model: nn.Module) -> Base | None:
    """What its adapter stands on; None where it has weights of its own."""
    through = getattr(model, "through", ALONE)
    return through.backbone.base if isinstance(through, Use) else None


def kept(**models: nn.Module | None) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint keeps of models that stand on a base: what is trained beside it."""
    return {
        name: {inner: p.detach() for inner, p in trained(model).items()}
        for name, model in models.items()
        if model is not None and base_of(model)
    }


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of a model of ours, by name, tied ones once: all of it, or its adapter and
    what stands beside the backbone."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    through = getattr(model, "through", ALONE)
    if through is ALONE:
        return named
    mine = adapter_of(model, through.adapter) if through.adapter else {}
    return {n: p for n, p in named.items() if n in mine or "lora_" not in n}


def plain_name(name: str) -> str:
    """As the model without adapters calls a weight."""
    return name.replace(".base_layer", "")


def frozen(model: PreTrainedModel, adapter: str | None) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the model, weight) of a base, or of any model; tied ones once, but for a head that
    the adapter unties."""
    once = not unties(model, adapter)
    named = model.named_parameters(remove_duplicate=once)
    return ((name, p) for name, p in named if "lora_" not in name)


def with_adapter(model: PreTrainedModel, name: str, whole: Tensor, adapter: str | None) -> Tensor:
    """This weight of the model, with what the adapter adds to it."""
    if adapter is None or not name.endswith(".base_layer.weight"):
        return whole
    layer: Any = model.get_submodule(name.removesuffix(".base_layer.weight"))
    if not _has(layer, adapter):
        return whole
    return (whole.float() + layer.get_delta_weight(adapter).float()).to(whole.dtype)


def merged_weights(model: PreTrainedModel, adapter: str | None) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor in float32) of the model that base and adapter make. Every rank has to
    walk through all of it."""
    for name, p in frozen(model, adapter):
        full = parallel.whole(widened(p)).float()
        yield plain_name(name), with_adapter(model, name, full, adapter)


def _has(layer: Any, adapter: str | None) -> bool:
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def unties(model: PreTrainedModel, adapter: str | None) -> bool:
    """Whether head and embeddings are tied, and an adapter moves them apart."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return False
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(hasattr(each, "base_layer") and _has(each, adapter) for each in both)
