"""Any Hugging Face model: log-probabilities, entropy and loss from labels, without logits."""

import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from gikernels.integrations import patch_lm_head


def main() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    config = Gemma2Config(  # its logits go through a softcap, which is found and checked
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, final_logit_softcapping=30.0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 512, (2, 10))
    labels = ids.masked_fill(torch.arange(10) < 4, -100)  # the prompt is not scored

    before = model(ids).logits[:, :-1].log_softmax(-1)  # (2, 9, 512) floats in memory
    before = before.gather(-1, ids[:, 1:, None]).squeeze(-1)

    patch_lm_head(model)
    out = model(ids, labels=labels)
    out.loss.backward()

    print("logits         ", out.logits)
    print("log-probs      ", out.logprobs[0, 4:].tolist())
    print("the plain way  ", before[0, 3:].tolist())
    print("entropy        ", out.entropy[0, 4:].tolist())
    print("still generates", model.generate(ids[:1, :4], max_new_tokens=3)[0, 4:].tolist())
    return out.logprobs[:, 4:], before[:, 3:]


if __name__ == "__main__":
    main()
