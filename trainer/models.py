"""The four models of PPO around any Hugging Face backbone, with what they share.

`Policy` and the frozen reference: token log-probabilities of answers. `RewardModel`: one score an
answer. `Critic`: values, and the small head that predicts an answer's group. Each takes
`Sequences` and works on answer tokens only: the state before answer token t is the hidden state of
the token in front of it. s sequences, L padded tokens, T padded answer tokens, D hidden, V
vocabulary, n answer tokens in all.
"""

from __future__ import annotations

import contextlib
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

import gikernels
from gikernels import TokenStats
from trainer import parallel
from trainer.attention import kernel, last_hidden, use_packed
from trainer.batching import Sequences, micro_batches
from trainer.config import ConfigError


class Policy(nn.Module):
    """A causal language model that returns statistics of its answer tokens, never logits.

    The head's operation runs inside forward(), where a sharded head is gathered.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        # Cohere multiplies by logit_scale, Granite divides by logits_scaling.
        self.logit_scale = getattr(config, "logit_scale", None) or 1 / (
            getattr(config, "logits_scaling", None) or 1.0
        )

    def forward(
        self, sequences: Sequences, temperature: float = 1.0, reference: Policy | None = None
    ) -> TokenStats:
        """(s, T) each; with a reference, `kl` is the exact KL over the vocabulary."""
        ref = None
        if reference is not None:
            with torch.no_grad():
                ref = (answer_states(reference.model.base_model, sequences), reference.head.weight)
        stats = gikernels.linear_logprobs(
            answer_states(self.model.base_model, sequences),
            self.head.weight,
            sequences.tokens[:, 1:][before_answer(sequences)],
            temperature,
            bias=self.head.bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            ref=ref,
        )
        mask = sequences.mask
        return TokenStats(*(None if x is None else unflatten(x, mask) for x in stats))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32, before the temperature: for sampling one token."""
        z = self.logit_scale * self.head(hidden).float()
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    def save(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        save_pretrained(self.model, path, tokenizer)


class RewardModel(nn.Module):
    """A `...ForSequenceClassification` model with one label, read in one of two ways.

    "last": the score at the last token, as Hugging Face reads it. "pooled": the mean of the scores
    at the answer's tokens. Both have the same weights (a linear map commutes with the mean), so
    both save and load as the same Hugging Face class; `config.reward_head` says which is meant, and
    Hugging Face's own forward() of a pooled model gives the score at the last token instead.
    Backbones without a per-token `score` layer (encoders) keep their own forward and are "last".
    """

    def __init__(self, model: PreTrainedModel, head: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.head = head or getattr(model.config, "reward_head", "last")
        model.config.reward_head = self.head
        if self.head == "pooled" and not hasattr(model, "score"):
            raise ConfigError(
                f"pooled: {type(model).__name__} has no score at each token; want last", "rm.head"
            )

    def forward(self, sequences: Sequences) -> Tensor:  # (s)
        tokens, lengths = sequences.tokens, sequences.lengths
        if not hasattr(self.model, "score"):
            seen = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
            return self.model(tokens, attention_mask=seen.long()).logits[:, 0].float()
        hidden = last_hidden(self.model.base_model, tokens, lengths)
        if self.head == "last":
            return self.model.score(at(hidden, lengths - 1))[:, 0].float()
        places = torch.arange(tokens.shape[1], device=tokens.device)
        answer = (places >= sequences.prompt_lengths.unsqueeze(1)) & (places < lengths.unsqueeze(1))
        scores = self.model.score(hidden)[..., 0].float().masked_fill(~answer, 0)
        return scores.sum(1) / sequences.answer_lengths

    def save(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        save_pretrained(self.model, path, tokenizer)


class Critic(nn.Module):
    """Values of the states in front of answer tokens, and logits of the sequence's group.

    Both are linear in the last hidden state. The group is read at the last prompt token (it judges
    the task) or at the last answer token (the paper; it judges the answer too).
    """

    def __init__(self, body: nn.Module, hidden_size: int, num_groups: int, on: str) -> None:
        super().__init__()
        self.body = body
        self.value_head = nn.Linear(hidden_size, 1)
        self.group_head = nn.Linear(hidden_size, num_groups)
        self.on = on
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        nn.init.normal_(self.group_head.weight, std=0.02)
        nn.init.zeros_(self.group_head.bias)

    def forward(self, sequences: Sequences) -> tuple[Tensor, Tensor]:  # (s, T), (s, M)
        if self.on == "prompt":
            states = answer_states(self.body, sequences)
            lengths = sequences.answer_lengths
            judged = states[lengths.cumsum(0) - lengths]  # in front of each answer's first token
        else:
            hidden = last_hidden(self.body, sequences.tokens, sequences.lengths)
            states = hidden[:, :-1][before_answer(sequences)]
            judged = at(hidden, sequences.lengths - 1)
        values = self.value_head(states)[:, 0].float()
        return unflatten(values, sequences.mask), self.group_head(judged).float()


# --- shared by the models -----------------------------------------------------------------------


def before_answer(sequences: Sequences) -> Tensor:
    """(s, L - 1) bool: True at tokens whose next token belongs to the answer."""
    places = torch.arange(1, sequences.tokens.shape[1], device=sequences.tokens.device)
    after_prompt = places >= sequences.prompt_lengths.unsqueeze(1)
    return after_prompt & (places < sequences.lengths.unsqueeze(1))


def answer_states(body: nn.Module, sequences: Sequences) -> Tensor:
    """(n, D): the hidden states in front of the answers' tokens, in row order."""
    if sequences.shared and _keeps_plain_keys(body):
        prompts, padding = sequences.prompts_on_the_right()
        unique, row_of = torch.unique(prompts, dim=0, return_inverse=True)
        if 2 * len(unique) <= len(prompts):
            return _states_with_shared_prompts(
                body, sequences, prompts.clamp(min=0), padding, row_of
            )
    # the last token predicts nothing
    states = last_hidden(body, sequences.tokens[:, :-1], sequences.lengths - 1)
    return states[before_answer(sequences)]


def _keeps_plain_keys(body: nn.Module) -> bool:
    """Whether its cache can be split by rows: not with a sliding window or linear attention, and
    there is no cache at all where activations are computed twice."""
    if body.training and getattr(body, "gradient_checkpointing", False):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=body.config).layers)


def _states_with_shared_prompts(
    body: nn.Module,
    sequences: Sequences,
    prompts: Tensor,  # (s, P), padded on the left
    padding: Tensor,  # (s, P) bool
    row_of: Tensor,  # (s) each row's place among the different prompts
) -> Tensor:
    """Each different prompt is computed once; its keys and values serve all of its answers.

    Gradients flow through the cache. Answers go in batches of like length, so next to nothing is
    padded: with 4 answers to a prompt and prompts as long as answers, 0.6 of the tokens.
    """
    first = torch.zeros(int(row_of.max()) + 1, dtype=torch.long, device=row_of.device)
    first[row_of] = torch.arange(len(row_of), device=row_of.device)  # one row for each prompt
    seen = ~padding
    cache = DynamicCache(config=body.config)
    out = body(
        input_ids=prompts[first],
        attention_mask=seen[first] if bool(padding.any()) else None,
        position_ids=(seen[first].cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    before_first = out.last_hidden_state[:, -1]
    mask = sequences.mask  # (s, T)
    states = before_first.new_zeros(*mask.shape, before_first.shape[1])
    states[:, 0] = before_first[row_of]
    follow = sequences.answer_lengths - 1  # tokens that predict another
    for rows in micro_batches(follow, len(follow) * mask.shape[1]):
        steps = torch.arange(int(follow[rows].max()), device=rows.device)
        if len(steps) == 0:
            continue
        places = sequences.prompt_lengths[rows].unsqueeze(1) + steps
        part = DynamicCache(config=body.config)
        for i, layer in enumerate(cache.layers):
            part.update(layer.keys[row_of[rows]], layer.values[row_of[rows]], i)
        inside = places.clamp(max=sequences.tokens.shape[1] - 1)  # padding; nobody looks at it
        out = body(
            input_ids=sequences.tokens[rows].gather(1, inside),
            attention_mask=torch.cat([seen[rows], torch.ones_like(places, dtype=torch.bool)], 1),
            position_ids=places,
            past_key_values=part,
            use_cache=True,
        )
        states[rows, 1 : len(steps) + 1] = out.last_hidden_state
    return states[mask]


def at(hidden: Tensor, place: Tensor) -> Tensor:  # (s, L, D), (s) -> (s, D)
    return hidden[torch.arange(len(hidden), device=hidden.device), place]


def unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """(n) in row order -> (s, T) with zeros where mask is False; gradients flow."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


# --- making them --------------------------------------------------------------------------------


@contextmanager
def quietly():
    """Hugging Face announces every load, save and new head; all are expected here."""
    level, bars = (
        transformers.logging.get_verbosity(),
        transformers.logging.is_progress_bar_enabled(),
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def save_pretrained(model: PreTrainedModel, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """In Hugging Face format; written aside and renamed, so that what is there is whole."""
    state = {}
    for name, p in model.named_parameters():  # tied ones once
        full = parallel.whole(p.detach())  # every rank has to ask
        if parallel.is_main():
            state[name] = full.cpu()
    if parallel.is_main():
        aside = path.with_name(f".{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        with quietly():
            buffers = dict(model.named_buffers())
            state |= {name: x for name, x in model.state_dict().items() if name in buffers}
            model.save_pretrained(aside, state_dict=state)
            tokenizer.save_pretrained(aside)
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
    parallel.barrier()


def gather(policy: Policy, dtype: torch.dtype, into: Policy | None) -> Policy:
    """A sharded policy as a whole one on this rank, for sampling; `into` is used again."""
    if into is None:
        with torch.device("meta"), quietly():
            model = type(policy.model)(policy.model.config)
        for p in model.parameters():
            p.data = p.data.to(dtype)
        model.to_empty(device=parallel.device())
        model.tie_weights()
        model.generation_config = policy.model.generation_config
        into = frozen(Policy(model))
    for ours, theirs in ((into.parameters, policy.parameters), (into.buffers, policy.buffers)):
        for mine, sharded in zip(ours(), theirs(), strict=True):
            mine.data.copy_(parallel.whole(sharded.detach()))
    return into


def load_tokenizer(source: str, config) -> PreTrainedTokenizerBase:
    if source == "toy":
        from trainer.toy import World

        return World(config.toy).tokenizer()
    with quietly():
        return AutoTokenizer.from_pretrained(
            source, trust_remote_code=config.model.trust_remote_code
        )


def load_policy(source: str, config, offload: bool = False) -> Policy:
    """`offload`: weights wait in the CPU's memory and visit the GPU block by block."""
    return prepare(_policy(source, config), config, offload)


def _policy(source: str, config) -> Policy:
    if source == "toy":
        from trainer.toy import World

        return Policy(World(config.toy).model(config.run.seed))
    return Policy(_load(AutoModelForCausalLM, source, config))


def load_reward_model(
    source: str, config, head: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> RewardModel:
    """A reward model; or, from a causal language model's folder, one with a new score layer, which
    takes its pad token from the tokenizer."""
    return prepare(_reward_model(source, config, head, tokenizer), config)


def _reward_model(
    source: str, config, head: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> RewardModel:
    torch.manual_seed(config.run.seed)  # the new layer's weights
    if source == "toy":
        raise ConfigError("toy: a reward model starts from the model of stage sft", "model.policy")
    model = _load(AutoModelForSequenceClassification, source, config, num_labels=1)
    if tokenizer is not None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return RewardModel(model, head)


def policy_source(config, run) -> str:
    """Where the later stages' policy starts: what stage sft of this run made, if it has one."""
    if "sft" not in config.run.stages:
        return config.model.policy
    return made_by("sft", run)


def reference_source(config, run) -> str:
    return config.model.reference or policy_source(config, run)


def start_name(config) -> str:
    """What evaluations call a policy that PPO has not touched."""
    return "start" if config.model.reference else "sft"


def reward_source(config, run) -> str:
    return config.model.reward or made_by("rm", run)


def made_by(stage: str, run) -> str:
    folder = run.model("policy" if stage == "ppo" else stage)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not there: run stage {stage} first")
    return str(folder)


def load_scoring_model(config, run) -> tuple[RewardModel | None, PreTrainedTokenizerBase | None]:
    """The frozen reward model and its own tokenizer; none where functions alone give the reward."""
    if config.reward.model_weight == 0:
        return None, None
    source = reward_source(config, run)
    return frozen(load_reward_model(source, config)), load_tokenizer(source, config)


def make_critic(config, run, policy: Policy, groups) -> Critic | None:
    """From the reward model's or the policy's backbone, or from a path. None where neither values
    nor a group head are asked for."""
    if not (config.ppo.has_critic or groups.has_head):
        return None
    source = config.model.critic
    if source == "reward" and config.reward.model_weight:
        body = _reward_model(reward_source(config, run), config).model.base_model
        vocabulary = policy.model.get_input_embeddings().num_embeddings
        if body.get_input_embeddings().num_embeddings < vocabulary:
            raise ConfigError(
                "reward: the reward model has another vocabulary than the policy; want policy",
                "model.critic",
            )
    else:
        named = source not in ("reward", "policy")
        body = _policy(source if named else policy_source(config, run), config).model.base_model
    torch.manual_seed(config.run.seed)  # the new heads' weights
    hidden_size = body.config.get_text_config().hidden_size
    return prepare(Critic(body, hidden_size, groups.num, config.groups.on), config)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


def prepare(module: nn.Module, config, offload: bool = False) -> nn.Module:
    """The one place where a finished model meets the machine: device, and later its shards.

    Dropout is off: it would make the log-probabilities of training and sampling those of two
    different policies. Models come in eval mode; only an update switches to train mode, which
    gradient checkpointing asks for.
    """
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(getattr(part, "attention_dropout", None), float):
            part.attention_dropout = 0.0
    if packs(config):
        use_packed(next(part for part in module.modules() if isinstance(part, PreTrainedModel)))
    if config.model.gradient_checkpointing:
        for part in module.modules():
            if isinstance(part, PreTrainedModel):
                enable = getattr(part, "activation_checkpointing_enable", None)  # its newer name
                (enable or part.gradient_checkpointing_enable)()
                break
    return parallel.place(module, config, offload).eval()


def packs(config) -> bool:
    """auto: on a GPU, where padding costs time; a CPU has small batches of like lengths anyway."""
    wanted = {"on": True, "off": False}.get(config.model.packing)
    return parallel.device().type == "cuda" if wanted is None else wanted


def describe_attention(config) -> str:
    if not packs(config):
        return f"padded sequences, attention {config.model.attention}"
    which = kernel(parallel.device().type, getattr(torch, config.model.dtype))
    return f"packed sequences, attention {which}"


def _load(auto, source: str, config, **options) -> PreTrainedModel:
    """Rank 0 reads the weights; the others build a model without storage and get theirs from it."""
    common = {
        "attn_implementation": config.model.attention,
        "trust_remote_code": config.model.trust_remote_code,
    }
    with quietly():
        if not parallel.is_main():
            code = config.model.trust_remote_code
            settings = AutoConfig.from_pretrained(source, trust_remote_code=code, **options)
            with torch.device("meta"):
                model = auto.from_config(settings, dtype=torch.float32, **common)
            with contextlib.suppress(OSError):  # it says where answers end
                model.generation_config = GenerationConfig.from_pretrained(source)
            return model
        return auto.from_pretrained(
            source,
            dtype=torch.float32,  # the master copy; model.dtype is what autocast computes in
            **common,
            **options,
        )
