"""Bodies and adapters that no server should take."""

import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

from jpo_ray.serving.adapter_checks import ADAPTER_CONFIG, WEIGHTS

PICKLE_RAN = Path("/tmp/jpo-pickle-was-run")
USER = [{"role": "user", "content": "Hello."}]
CHAT: dict[str, Any] = {"model": "sft", "messages": USER}
COMPLETION: dict[str, Any] = {"model": "sft", "prompt": "Hello."}
ITEM = {"instruction": "i", "response": "r"}

NO_JSON = [
    b"", b"{", b"[]", b"null", b"1", b'"text"', b"{'model': 'sft'}", b"\xff\xfe", b"{}", b"[" * 5000,
    b'{"model": "sft", "messages": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    b'{"a":' * 2000 + b"1" + b"}" * 2000,
]  # fmt: skip

WRONG_SAMPLING: list[dict[str, Any]] = [
    {"model": 1}, {"model": ["sft"]}, {"model": "m" * 65}, {"max_tokens": 0}, {"max_tokens": -5},
    {"max_tokens": "ten"}, {"max_tokens": 1.5}, {"max_tokens": True}, {"temperature": -0.1}, {"temperature": 2.1},
    {"temperature": "hot"}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 0}, {"top_p": 1.1},
    {"n": 0}, {"n": -1}, {"n": 2.5}, {"n": "2"}, {"seed": 2**70}, {"seed": "x"}, {"stop": ""}, {"stop": [""]},
    {"stop": ["x"] * 17}, {"stop": 5}, {"stop": [None]}, {"stream": "yes"}, {"stream": 1},
    {"stream_options": {"include_usage": True}}, {"stream": True, "stream_options": {"other": 1}},
    {"presence_penalty": 3}, {"frequency_penalty": -3}, {"repetition_penalty": 0}, {"top_k": 0.5}, {"min_p": 2},
    {"logit_bias": {"99999999": 1}}, {"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}},
    {"guided_regex": "(a+)+$"}, {"structured_outputs": {"regex": "("}},
    {"kv_transfer_params": {"prompt_token_ids": [1]}},
    {"chat_template": "{{ 1 }}"}, {"prompt_embeds": "AAAA"}, {"lora_path": "/etc"}, {"priority": 5}, {"echo": True},
    {"use_beam_search": True}, {"best_of": 3}, {"request_id": "x"}, {"user": 5}, {"user": "u" * 513},
    {"stop": "\ud800"}, {"user": "\udfff"}, {"model": "\ud800"},
]  # fmt: skip

WRONG_MESSAGES: list[Any] = [
    None, [], "Hello.", {}, [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}],
    [{"role": "user", "content": 5}], [{"role": "user", "content": ""}], [{"role": "user", "content": "  \n"}],
    [{"role": "tool", "content": "x"}], [{"role": "USER", "content": "x"}], [{"role": "user", "content": "\ud800"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [5]}],
    [{"role": "user", "content": "x", "extra": 1}], [*USER, {"role": "assistant", "content": "x"}], USER * 300,
]  # fmt: skip

WRONG_PROMPTS: list[Any] = [
    None, "", [], [""], [[]], [[1], []], 5, {}, [None], [1, "a"], ["a", 1], [-1], [2**31], [1.5], [True], [["a"]],
    "\ud800", ["\udc00"], [[-1]], {"text": "x"},
]  # fmt: skip

WRONG_ITEMS: list[Any] = [
    None, [], {}, "x", [5], [{}], [{"instruction": "i"}], [{"response": "r"}], [{**ITEM, "x": 1}],
    [{"instruction": "", "response": "r"}], [{"instruction": "i", "response": ""}],
    [{"instruction": 1, "response": "r"}],
    [{"instruction": "\ud800", "response": "r"}], [[ITEM]],
]  # fmt: skip

TOO_LONG_ITEMS: list[Any] = [  # as bodies nothing is wrong with them, but the model scores no item of so many tokens
    [{"instruction": "word " * 900, "response": "r"}], [ITEM, {"instruction": "i", "response": "word " * 900}],
    [{"instruction": "word " * 150_000, "response": "r"}],
]  # fmt: skip


def encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


CHAT_BODIES = [*NO_JSON, *(encoded(CHAT | wrong) for wrong in WRONG_SAMPLING)]
CHAT_BODIES += [encoded(CHAT | {"messages": wrong}) for wrong in WRONG_MESSAGES]
CHAT_BODIES += [encoded({"model": "sft"}), encoded({"messages": USER}), encoded(CHAT | {"top_logprobs": 3})]
COMPLETION_BODIES = [*NO_JSON, *(encoded(COMPLETION | wrong) for wrong in WRONG_SAMPLING)]
COMPLETION_BODIES += [encoded(COMPLETION | {"prompt": wrong}) for wrong in WRONG_PROMPTS]
SCORE_BODIES = [*NO_JSON, *(encoded({"model": "jpo", "items": wrong}) for wrong in WRONG_ITEMS)]
TOO_LONG_BODIES = [encoded({"model": "jpo", "items": wrong}) for wrong in TOO_LONG_ITEMS]


def random_bodies(count: int, seed: int) -> list[bytes]:
    """Good bodies with some bytes changed, taken out or doubled: nearly all are malformed."""
    draw = random.Random(seed)
    good = [encoded(CHAT | {"max_tokens": 4}), encoded(COMPLETION | {"max_tokens": 4})]
    made = []
    for _ in range(count):
        content = bytearray(draw.choice(good))
        for _ in range(draw.randint(1, 12)):
            place = draw.randrange(len(content))
            content[place : place + draw.randint(0, 2)] = bytes(draw.randrange(256) for _ in range(draw.randint(0, 3)))
        made.append(bytes(content))
    return made


def malformed(content: bytes) -> bool:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return True
    return not isinstance(fields, dict) or set(fields) - {*CHAT, *COMPLETION, "max_tokens"} != set()


def hostile_bodies(count: int) -> list[tuple[str, bytes]]:
    """So many malformed bodies with the paths that they are sent to."""
    scores = SCORE_BODIES + TOO_LONG_BODIES
    more = count - len(CHAT_BODIES) - len(COMPLETION_BODIES) - len(scores)
    made = [body for body in random_bodies(2 * more, seed=0) if malformed(body)][:more]
    bodies = [("/v1/chat/completions", body) for body in CHAT_BODIES + made[::2]]
    bodies += [("/v1/completions", body) for body in COMPLETION_BODIES + made[1::2]]
    return bodies + [("/v1/score", body) for body in scores]


class Pickled:
    """Weights that would run code where they are loaded as a pickle."""

    def __reduce__(self) -> Any:
        return (Path.touch, (PICKLE_RAN,))


def pickled_adapters(good: Path, root: Path) -> list[Path]:
    """Ten adapters whose weights are pickles, under all the names that weights may have."""
    made = []
    names = ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "adapter_model.pkl", "model.pth"]
    for number in range(10):
        folder = root / f"pickled{number}"
        folder.mkdir(parents=True)
        shutil.copyfile(good / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
        name = names[number] if number < len(names) else WEIGHTS
        padding = b"" if number < 8 else (8).to_bytes(8, "little") + b"{}      "
        (folder / name).write_bytes(padding + pickle.dumps(Pickled()))
        made.append(folder)
    return made
