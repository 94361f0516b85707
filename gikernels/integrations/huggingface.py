"""Hugging Face causal language models that return log-probabilities instead of logits.

The model's own forward runs unchanged; only while it does, its output head (a linear layer over
the vocabulary) is asked for the statistics of the labels and never for logits. Two things are
gained over calling the backbone and multiplying by `lm_head.weight` outside:

- FSDP2 has gathered the head's weight, and its hook sits on what the head returns, so the weight
  is there again in the backward. Nothing is gathered twice.
- What the model does to its logits after the head can be observed. We pretend that a few known
  numbers were logits, and look what became of them: a scale or a softcap that we did not
  recognise in the config raises instead of training on wrong probabilities.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

import gikernels
from gikernels.backends import checks
from gikernels.reference import transform_logits

IGNORE = -100  # the label that Hugging Face models skip

CONFIG = "config"  # of a transform: as the model's configuration states it

# What configs call the factor between the head and the logits.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, ..., Falcon-H1
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, xLSTM


@dataclass
class LogProbOutput(ModelOutput):
    """What a patched model returns when it is called with labels.

    Entry t of `logprobs` and `entropy` belongs to label t, given the tokens before it; both have
    the shape of the labels, and are 0 where the label is -100 or has nothing before it.
    """

    loss: Tensor | None = None  # the mean of -logprobs over the labels, plus any auxiliary loss
    logprobs: Tensor | None = None  # (B, L) fp32
    entropy: Tensor | None = None  # (B, L) fp32
    logits: Tensor | None = None  # None: they never exist
    aux_loss: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def patch_lm_head(
    model: nn.Module,
    *,
    temperature: float = 1.0,
    logit_scale: float | str = CONFIG,
    softcap: float | str | None = CONFIG,
    backend: str = "auto",
) -> LmHeadPatch:
    """Calls of `model` with labels return a `LogProbOutput`; calls without are as before.

        patch_lm_head(model)
        out = model(input_ids, attention_mask=mask, labels=labels)
        out.logprobs, out.entropy, out.loss      # and out.logits is None

    The same, with a (B, L, V) tensor in memory:

        logits = model(input_ids, attention_mask=mask).logits[:, :-1].float() / temperature
        logp = logits.log_softmax(-1)
        logprobs = logp.gather(-1, labels[:, 1:, None]).squeeze(-1)
        entropy = -(logp.exp() * logp).sum(-1)

    `logit_scale` and `softcap` are read from the config unless they are given; softcap=None means
    that there is none, whatever the config says. The first call with labels compares the head and
    what follows it with the model's own, and raises if they differ. `shift_labels` (already
    shifted) and `num_items_in_batch` (the loss's denominator) are understood as the Hugging Face
    Trainer passes them. Threads may call the model at once. The returned handle is a context
    manager; `.remove()` undoes the patch.
    """
    return LmHeadPatch(
        model, temperature=temperature, logit_scale=logit_scale, softcap=softcap, backend=backend
    ).install()


class LmHeadPatch:
    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        logit_scale: float | str = CONFIG,
        softcap: float | str | None = CONFIG,
        fp32: bool = False,
        backend: str = "auto",
    ) -> None:
        if isinstance(getattr(model, "forward", None), PatchedForward):
            raise ValueError(f"model: this {type(model).__name__} is patched already")
        config = getattr(model, "config", None)
        if config is None or getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"model: got {type(model).__name__}, want a causal language model")
        output_head(model)
        self.model: Any = model
        self.temperature = checks.number("temperature", temperature, above=0)
        self.logit_scale, self.softcap = logit_transform(config, logit_scale, softcap)
        self.fp32 = fp32
        self.backend = backend
        self.verified = False
        self.installed_over: Any = None

    def install(self) -> LmHeadPatch:
        self.installed_over = vars(self.model).get("forward")
        self.model.forward = PatchedForward(self, self.model.forward)
        self.model._replicate_for_data_parallel = no_replicas
        return self

    def remove(self) -> None:
        if not isinstance(vars(self.model).get("forward"), PatchedForward):
            raise RuntimeError("the model's forward is no longer this patch: undo what came later")
        del self.model.forward, self.model._replicate_for_data_parallel
        if self.installed_over is not None:
            self.model.forward = self.installed_over

    def __enter__(self) -> LmHeadPatch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def run(
        self,
        forward: Any,
        args: tuple,
        kwargs: dict,
        labels: Tensor | None,  # (B, L)
        shift_labels: Tensor | None = None,  # (B, L)
        num_items_in_batch: int | Tensor | None = None,
    ) -> LogProbOutput:
        """The model's own `forward` without labels, the head replaced for the time being."""
        if shift_labels is not None:
            targets = shift_labels
        else:
            assert labels is not None
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        call = HeadCall(self, output_head(self.model), targets)
        with call.in_force():
            out = forward(*args, **kwargs)
        call.check_logits(out)
        assert call.stats is not None
        logprobs, entropy = call.stats[..., 0], call.stats[..., 1]
        count = (targets != IGNORE).sum().clamp(min=1)
        loss = -logprobs.sum() / (count if num_items_in_batch is None else num_items_in_batch)
        aux_loss = getattr(out, "aux_loss", None)
        if aux_loss is not None:  # a mixture of experts that was asked for its router's loss
            text_config = self.model.config.get_text_config()
            loss = loss + getattr(text_config, "router_aux_loss_coef", 0.0) * aux_loss
        if shift_labels is None:
            logprobs, entropy = (F.pad(x[:, :-1], (1, 0)) for x in (logprobs, entropy))
        return LogProbOutput(
            loss=loss,
            logprobs=logprobs,
            entropy=entropy,
            aux_loss=aux_loss,
            past_key_values=getattr(out, "past_key_values", None),
            hidden_states=getattr(out, "hidden_states", None),
            attentions=getattr(out, "attentions", None),
        )


class PatchedForward:
    """Stands in for `model.forward`. An object and not a closure, so that deepcopy copies it."""

    def __init__(self, patch: LmHeadPatch, original: Any) -> None:
        self.patch, self.original = patch, original
        # `generate` and Trainer look at the names of a model's arguments.
        self.__signature__ = inspect.signature(original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = labels_by_name(self.__signature__, args, kwargs)
        if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
            return self.original(*args, **kwargs)
        given = {name: kwargs.pop(name, None) for name in ABOUT_LABELS}
        return self.patch.run(self.original, args, kwargs, **given)


ABOUT_LABELS = ("labels", "shift_labels", "num_items_in_batch")


def labels_by_name(signature: inspect.Signature, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a call, those from the labels on by their names."""
    names = list(signature.parameters)
    first = names.index("labels") if "labels" in names else len(args)
    if len(args) <= first:
        return args, kwargs
    twice = set(kwargs) & set(names[first : len(args)])
    if twice:
        raise TypeError(f"forward() got multiple values for argument {min(twice)!r}")
    return args[:first], {**dict(zip(names[first:], args[first:])), **kwargs}


def no_replicas(*args: Any) -> Any:
    """In place of a method by which nn.DataParallel copies a model and all that its attributes
    point at, the patch among them: the copies would compute with the original's weights."""
    raise RuntimeError(
        "model: patched by patch_lm_head, which nn.DataParallel cannot replicate; want "
        "DistributedDataParallel or fully_shard"
    )


heads_lock = threading.Lock()


class HeadForward:
    """Stands in for the head's forward while any thread is inside the model: in each thread it is
    that thread's call, and in the others what it was."""

    def __init__(self, original: Any, installed_over: Any) -> None:
        self.original, self.installed_over = original, installed_over
        self.users = 0
        self.local = threading.local()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = getattr(self.local, "call", None)
        return self.original(*args, **kwargs) if call is None else call.forward(*args, **kwargs)


class HeadCall:
    """One forward pass: stands in for the head's forward and keeps what came out."""

    # Beyond the reach of any softcap, and small ones that show a scale.
    PROBES = (-50.0, -10.0, -1.0, -0.1, 0.0, 0.1, 1.0, 10.0, 50.0)

    def __init__(self, patch: LmHeadPatch, head: Any, targets: Tensor) -> None:
        self.patch, self.head, self.targets = patch, head, targets
        self.own_forward: Any = None
        self.stats: Tensor | None = None  # (B, L, 2): log-probability and entropy

    @contextlib.contextmanager
    def in_force(self):
        with heads_lock:
            stand_in = vars(self.head).get("forward")
            if not isinstance(stand_in, HeadForward):
                stand_in = HeadForward(self.head.forward, stand_in)
                self.head.forward = stand_in
            stand_in.users += 1
        self.own_forward = stand_in.original
        before, stand_in.local.call = getattr(stand_in.local, "call", None), self
        try:
            yield
        finally:
            stand_in.local.call = before
            with heads_lock:
                stand_in.users -= 1
                if not stand_in.users:
                    del self.head.forward
                    if stand_in.installed_over is not None:
                        self.head.forward = stand_in.installed_over

    def forward(self, hidden: Tensor) -> Tensor:  # (B, L, D)
        if self.stats is not None:
            raise ValueError("model: its forward calls the output head more than once")
        if hidden.shape[:-1] != self.targets.shape:
            raise checks.wrong(
                "labels",
                self.targets,
                f"one for each position that the model scores, {tuple(hidden.shape[:-1])} "
                f"(logits_to_keep and prompt tuning are not supported)",
            )
        patch = self.patch
        targets = self.targets.to(hidden.device)
        kept = targets != IGNORE
        hidden_kept = hidden[kept]
        if not patch.verified:
            self.check_head(hidden_kept)
        with self.precision(hidden.device):
            rows, weight, bias = self.linear_form(hidden_kept)
            stats = gikernels.linear_logprobs(
                rows,
                weight,
                targets[kept],
                patch.temperature,
                bias=bias,
                softcap=patch.softcap,
                logit_scale=patch.logit_scale,
                backend=patch.backend,
            )
        flat = torch.stack([stats.logprobs, stats.entropy], -1)
        # Scattered even where nothing is kept: with FSDP every rank needs a backward.
        packed = flat.new_zeros(*kept.shape, 2).masked_scatter(kept.unsqueeze(-1), flat)
        # In every call, looked at or not: torch.utils.checkpoint runs the first one twice, and the
        # second has to save for the backward what the first did.
        probes = packed.new_tensor(self.PROBES)
        packed = torch.cat([packed, probes.expand(*kept.shape, -1)], -1)
        # Gradients have to pass through the very tensor that we return: FSDP hooks on to it to
        # gather the weight again before the backward.
        self.stats = packed[..., :2]
        return packed

    def precision(self, device: torch.device) -> contextlib.AbstractContextManager:
        """With `fp32` autocast has no say."""
        if not self.patch.fp32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, enabled=False)

    def linear_form(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        parts = linear_form(self.head, rows)
        if not self.patch.fp32:
            return parts
        rows, weight, bias = parts
        return rows.float(), weight.float(), None if bias is None else bias.float()

    @torch.no_grad()
    def check_head(self, rows: Tensor) -> None:
        """That the head is the linear map we take it for. Dropout would make its answers differ."""
        rows = rows[:8].detach()
        training = self.head.training
        self.head.eval()
        try:
            own = self.own_forward(rows)
            with self.precision(rows.device):
                ours = F.linear(*self.linear_form(rows))
        finally:
            self.head.train(training)
        half = own.dtype in (torch.float16, torch.bfloat16)
        if own.shape != ours.shape or not close(ours, own, 3e-2 if half else 1e-3):
            raise ValueError(
                f"model: the output head, {type(self.head).__name__}, does not compute "
                f"hidden @ weight.T + bias"
            )

    @torch.no_grad()
    def check_logits(self, out: Any) -> None:
        """That what the model did to our probes is the transform that we applied."""
        patch, name = self.patch, type(self.patch.model).__name__
        if self.stats is None:
            raise ValueError(f"model: the forward of {name} never calls its output head")
        if patch.verified:
            return
        probes = self.stats.new_tensor(self.PROBES)
        want = transform_logits(probes, softcap=patch.softcap, logit_scale=patch.logit_scale)
        got = getattr(out, "logits", None)
        if got is None or got.shape != (*self.stats.shape[:-1], 2 + len(probes)):
            raise ValueError(f"model: {name} does not return what its output head gave it")
        got = got[..., 2:].reshape(-1, len(probes)).float()
        if not close(got, want.expand_as(got), 1e-2):
            raise ValueError(
                f"model: {name} turns the head's output {probes.tolist()} into "
                f"{[round(x, 4) for x in got[0].tolist()]}, and not, as logit_scale="
                f"{patch.logit_scale:g} and softcap={patch.softcap} would, into "
                f"{[round(x, 4) for x in want.tolist()]}. Pass the right logit_scale and softcap; "
                f"any other transform is not supported"
            )
        patch.verified = True


def close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    scale = y.float().abs().max().clamp(min=1e-6) if y.numel() else 1.0
    return bool(((x.float() - y.float()).abs() <= tolerance * scale).all())


def output_head(model: nn.Module) -> Any:
    """Looked up at each call: PEFT and FSDP may have replaced it since."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None or getattr(head, "weight", None) is None or head.weight.dim() != 2:
        raise ValueError(f"model: {type(model).__name__} has no linear output head to be patched")
    return head


def logit_transform(
    config: Any, logit_scale: float | str = CONFIG, softcap: float | str | None = CONFIG
) -> tuple[float, float | None]:
    """(logit_scale, softcap) as given, or as the config of this architecture states them."""
    config = config.get_text_config()

    def first(names: tuple[str, ...]) -> float | None:
        found = ((name, getattr(config, name, None)) for name in names)
        return next((stated(config, name, v) for name, v in found if v is not None), None)

    if logit_scale == CONFIG:
        scale = first(FACTORS)
        divisor = first(("logits_scaling",))  # Granite divides; the check finds who multiplies
        if scale is None:
            scale = 1.0 if divisor is None else 1 / divisor
    else:
        scale = checks.number("logit_scale", logit_scale)
    cap = first(SOFTCAPS) if softcap == CONFIG else softcap
    return scale, None if cap is None else checks.number("softcap", cap, above=0)


def stated(config: Any, name: str, value: Any) -> float:
    """A number of the config's; MPT has one word for one."""
    if value == "inv_sqrt_d_model":
        return config.hidden_size**-0.5
    try:
        return float(value)
    except (TypeError, ValueError):
        want = "a number; pass logit_scale and softcap for what the model does"
        raise checks.wrong(f"model.config.{name}", value, want) from None


def linear_form(head: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(rows, weight, bias) such that F.linear of them is head(rows).

    A LoRA head is W x + s B (A x): a wider linear layer, [W, B] applied to [x, s A x]. That is
    exact, dropout included, and both factors get their gradients.
    """
    base = getattr(head, "base_layer", None)
    if base is None:
        return rows, head.weight, getattr(head, "bias", None)
    if not hasattr(head, "lora_A"):
        raise ValueError(
            f"model: its output head carries a {type(head).__name__}, want plain LoRA there, or "
            f"the adapter on other layers only"
        )
    if head.disable_adapters and head.merged:
        head.unmerge()  # as its own forward does
    adapters = [a for a in head.active_adapters if a in head.lora_A]
    rows, weight, bias = linear_form(base, rows)
    if head.merged or head.disable_adapters or not adapters:
        return rows, weight, bias
    if getattr(head, "lora_variant", None) and any(a in head.lora_variant for a in adapters):
        raise ValueError(
            "model: its output head carries a LoRA variant (DoRA, ...), want plain LoRA"
        )
    wide_rows, wide_weight = [rows], [weight]
    for a in adapters:
        down, up = head.lora_A[a], head.lora_B[a]
        inner = down(head.lora_dropout[a](rows.to(down.weight.dtype))) * head.scaling[a]
        wide_rows.append(inner.to(rows.dtype))
        wide_weight.append(up.weight.to(weight.dtype))
        if up.bias is not None:
            shift = up.bias * head.scaling[a]
            bias = shift if bias is None else bias + shift
    return torch.cat(wide_rows, -1), torch.cat(wide_weight, -1), bias
