"""The programs of a model card: a prompt with the token ids of training, and an answer by transformers and by vLLM."""

from jpo_ray.data.tokens import CHAT

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


def how_to_use(template: str, *, base: str | None = None, rank: int = 0) -> str:
    """Markdown; `base` and `rank` are those of an adapter. The ids are `data.tokens.prompt_ids`' for the template."""
    if template == CHAT:
        prompt = (
            'tokenizer.apply_chat_template([{"role": "user", "content": instruction}], tokenize=False, '
            "add_generation_prompt=True)"
        )
    else:
        prompt = f"{template!r}.replace('{{instruction}}', instruction)"
    loader, plain, serve = "", "AutoModelForCausalLM, ", "vllm serve FOLDER"
    if base is not None:
        loader, plain = "from peft import AutoPeftModelForCausalLM as AutoModelForCausalLM\n", ""
        serve = "vllm serve BASE --enable-lora --lora-modules NAME=FOLDER"
    # BOS is put before the ids and not into the text: SentencePiece adds a blank only to what begins a text.
    return f"""The prompt has the form that the model was trained on.

```python
import torch
{loader}from transformers import {plain}AutoTokenizer

folder = "FOLDER"  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

instruction = "INSTRUCTION"
prompt = {prompt}
ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
bos = tokenizer.bos_token_id
if bos is not None and ids[:1] != [bos]:
    ids = [bos, *ids]

inputs = torch.tensor([ids])
answer = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=256, do_sample=False)
print(tokenizer.decode(answer[0, len(ids):], skip_special_tokens=True).strip())
```

With vLLM (or as a server: `{serve}`):

```python
{_in_vllm(base, rank)}
```

In the run's folder, `jpo serve --run-dir RUN_DIR` serves it behind an OpenAI-compatible endpoint that lays prompts out
by itself."""


def _in_vllm(base: str | None, rank: int) -> str:
    """Goes on from the first program's `ids`."""
    lines, lora = ["from vllm import LLM, SamplingParams"], ""
    if base is None:
        lines += ["", "llm = LLM(folder)"]
    else:
        lora = ', lora_request=LoRARequest("adapter", 1, folder)'
        room = next((most for most in RANKS if most >= rank), rank)
        lines += [
            "from vllm.lora.request import LoRARequest\n",
            f'base = "{base}"  # the model that the adapter was trained on: its folder, or its name on the Hub',
            f"llm = LLM(base, enable_lora=True, max_lora_rank={room})",
        ]
    return "\n".join(
        [
            *lines,
            "params = SamplingParams(temperature=0, max_tokens=256)",
            f'answer = llm.generate({{"prompt_token_ids": ids}}, params{lora})',
            "print(answer[0].outputs[0].text.strip())",
        ]
    )
