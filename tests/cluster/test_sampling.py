"""Sampling: base and adapters mixed in one pass give, greedily, what transformers and peft give one by one."""

import importlib.util
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.tiny import INSTRUCTIONS, LAYOUT

from cluster.running import CLUSTER
from jpo_ray.cluster.sampling import TransformersActor, _Group, _groups, choose_engine, engine_options, generate
from jpo_ray.cluster.session import LARGE_AHEAD, READ_AHEAD, within
from jpo_ray.config import SampleConfig
from jpo_ray.config_training import TrainConfig
from jpo_ray.data.tokens import prompt_ids
from jpo_ray.engine.model import add_lora, load_model, load_tokenizer
from jpo_ray.errors import InputError
from jpo_ray.evaluation.generation import (
    Generated,
    Request,
    SampledModel,
    TransformersSampler,
    _Drawn,
    clean_response,
    effective_temperature,
)

NEW_TOKENS = 24
CONFIG = SampleConfig(max_new_tokens=NEW_TOKENS, temperatures=[0.0, 1.0], timeout_s=240)
Models = dict[str, SampledModel]
Texts = dict[tuple[str, int], tuple[str, int]]  # (model, prompt) -> text and number of tokens


@pytest.fixture(scope="module")
def models(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The base, and two adapters of different ranks whose random weights change what it says."""
    found = {"base": SampledModel("base", llama, llama)}
    for number, (name, rank) in enumerate((("jpo.one", 4), ("dpo", 8))):
        train = TrainConfig(name=name, lora_r=rank, lora_alpha=2 * rank)
        adapter = add_lora(load_model(llama, dtype="float32"), train, seed=number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, weight in adapter.named_parameters():
                if "lora_B" in key:
                    weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
        folder = tmp_path_factory.mktemp(name)
        adapter.save_pretrained(folder)
        found[name] = SampledModel(name, folder, llama)
    return found


@pytest.fixture(scope="module")
def prompts(llama: Path) -> list[list[int]]:
    found = prompt_ids(load_tokenizer(llama), LAYOUT, INSTRUCTIONS)
    assert len({len(prompt) for prompt in found}) >= 4
    return found


@pytest.fixture(scope="module")
def greedy(models: Models, prompts: list[list[int]]) -> Texts:
    """Text of each model for each prompt, by transformers and peft alone: one prompt at a time, no padding."""
    from peft import PeftModel

    tokenizer = load_tokenizer(models["base"].path)
    texts: Texts = {}
    for name, model in models.items():
        loaded = load_model(model.base, dtype="float32")
        if model.is_adapter:
            loaded = PeftModel.from_pretrained(loaded, model.path).eval()
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                output = loaded.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
                )
            ids = output[0, len(prompt) :]
            texts[name, number] = (whole_characters(tokenizer.decode(ids, skip_special_tokens=True)), len(ids))
    for name in ("jpo.one", "dpo"):
        assert all(texts[name, number] != texts["base", number] for number in range(len(prompts)))
    return texts


def whole_characters(text: str) -> str:
    """Without what the last tokens began and did not end: vLLM leaves it out, transformers writes `\ufffd`."""
    return text.rstrip("\ufffd")


def answers_of(requests: list[Request], answers: list[Generated], models: Models) -> Texts:
    """What `greedy_requests` got."""
    return {
        (requests[answer.number].model.name, answer.number // len(models)): (
            whole_characters(answer.text),
            answer.tokens,
        )
        for answer in answers
    }


def greedy_requests(models: Models, prompts: list[list[int]]) -> list[Request]:
    """Base and adapters in turn, so that every batch mixes them."""
    return [
        Request(number, model, prompt, 0.0, 0)
        for number, (prompt, model) in enumerate((prompt, model) for prompt in prompts for model in models.values())
    ]


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_vllm_mixes_base_and_adapters_in_one_pass(
    ray_cluster: Any, models: Models, prompts: list[list[int]], greedy: Texts
) -> None:
    """Greedy rows equal transformers and peft text for text; beside them, in the same pass, rows at temperature 1."""
    requests = greedy_requests(models, prompts)
    drawn = [Request(0, model, prompts[1], 1.0, seed) for model in models.values() for seed in (7, 8, 7)]
    count = len(requests)
    requests += [replace(request, number=count + place) for place, request in enumerate(drawn)]
    # A row that fails does not end the others: vLLM refuses a token that the model does not have.
    requests.append(Request(len(requests), models["base"], [10**6], 0.0, 0))
    answers = {answer.number: answer for answer in generate(ray_cluster, CLUSTER, CONFIG, "vllm", "float32", requests)}
    assert sorted(answers) == list(range(len(requests)))
    assert [number for number, answer in answers.items() if answer.error] == [len(requests) - 1]
    assert "out of vocabulary" in answers[len(requests) - 1].error
    assert answers_of(requests, [answers[n] for n in range(count)], models) == greedy
    drawn_texts = [answers[n].text for n in range(count, count + len(drawn))]
    for first, other, again in zip(drawn_texts[::3], drawn_texts[1::3], drawn_texts[2::3], strict=True):
        assert first == again  # the seed decides
        assert first != other


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_an_engine_split_in_two_says_the_same(
    ray_cluster: Any, models: Models, prompts: list[list[int]], greedy: Texts
) -> None:
    requests = greedy_requests(models, prompts)
    split = CONFIG.model_copy(update={"tensor_parallel_size": 2})
    answers = list(generate(ray_cluster, CLUSTER, split, "vllm", "float32", requests))
    assert [answer.error for answer in answers] == [""] * len(requests)
    assert answers_of(requests, answers, models) == greedy


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_two_engines_that_hold_every_core_say_the_same(
    ray_cluster: Any, models: Models, prompts: list[list[int]], greedy: Texts
) -> None:
    """More requests than one engine takes at a time, so that both have some."""
    requests = greedy_requests(models, prompts)
    copies = [replace(request, number=number) for number, request in enumerate(requests * 16)]
    two = CLUSTER.model_copy(update={"num_actors": 2})
    answers = list(generate(ray_cluster, two, CONFIG, "vllm", "float32", copies))
    assert sorted(answer.number for answer in answers) == list(range(len(copies)))
    for turn in range(16):
        here = range(turn * len(requests), (turn + 1) * len(requests))
        again = [replace(answer, number=answer.number - here[0]) for answer in answers if answer.number in here]
        assert answers_of(requests, again, models) == greedy


def test_transformers_mixes_base_and_adapters(models: Models, prompts: list[list[int]], greedy: Texts) -> None:
    requests = greedy_requests(models, prompts)
    base = models["base"].path
    sampler = TransformersSampler(base, [model for model in models.values() if model.is_adapter], "float32", "cpu")
    groups = _groups(requests)
    assert [len(group) for group in groups] == [len(prompts)] * len(models)
    answers = [answer for group in groups for answer in sampler.generate(group, NEW_TOKENS)]
    assert answers_of(requests, answers, models) == greedy


def test_transformers_repeats_itself_with_the_same_seed(models: Models, prompts: list[list[int]]) -> None:
    sampler = TransformersSampler(models["base"].path, [], "float32", "cpu")

    def texts(seed: int, some: list[list[int]] = prompts) -> list[str]:
        requests = [Request(n, models["base"], prompt, 1.0, seed) for n, prompt in enumerate(some)]
        return [answer.text for answer in sampler.generate(requests, NEW_TOKENS)]

    assert texts(5) == texts(5)
    assert texts(5) != texts(6)
    assert texts(5)[2:4] == texts(5, prompts[2:4])  # whatever else is in the batch
    assert len(set(texts(5, [prompts[0]] * 3))) == 1


def test_transformers_draws_tokens_as_often_as_they_are_likely(models: Models, prompts: list[list[int]]) -> None:
    """The first token, 4,000 times at temperature 0.7: total variation to the softmax near what chance makes of it."""
    model, temperature, count = load_model(models["base"].path, dtype="float32"), 0.7, 4000
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0]])).logits[0, -1]
    expected = (logits / temperature).softmax(0)
    drawn = _Drawn(temperature, range(count), "cpu")(None, logits.expand(count, -1)).argmax(dim=1)
    found = torch.bincount(drawn, minlength=len(expected)) / count
    chance = torch.multinomial(expected, count, replacement=True, generator=torch.Generator().manual_seed(0))
    by_chance = torch.bincount(chance, minlength=len(expected)) / count
    assert (found - expected).abs().sum() < 1.3 * (by_chance - expected).abs().sum()


def test_a_text_that_ends_with_its_last_token_is_not_cut(models: Models, prompts: list[list[int]]) -> None:
    sampler = TransformersSampler(models["base"].path, [], "float32", "cpu")
    requests = [Request(number, models["base"], prompt, 0.0, 0) for number, prompt in enumerate(prompts)]
    (cut, *_) = sampler.generate(requests[:1], 8)
    assert (cut.tokens, cut.ended) == (8, False)
    sampler.tokenizer.eos_token = sampler.tokenizer.convert_ids_to_tokens(eighth_token(sampler, prompts[0]))
    (ended, *_) = sampler.generate(requests[:1], 8)
    assert ended.ended
    (stopped, *_) = sampler.generate(requests[:1], 8, [cut.text[-1]])
    assert stopped.ended


def eighth_token(sampler: TransformersSampler, prompt: list[int]) -> int:
    with torch.no_grad():
        output = sampler.model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    return int(output[0, -1])


def test_a_request_that_fails_does_not_fail_its_batch(models: Models, prompts: list[list[int]]) -> None:
    """As with vLLM: a token that the model does not have."""
    actor = TransformersActor(str(models["base"].path), [], "float32", "cpu", 1)
    requests = [Request(number, models["base"], prompt, 0.0, 0) for number, prompt in enumerate(prompts)]
    broken = [*requests, Request(len(requests), models["base"], [10**6], 0.0, 0)]
    found = actor({"requests": [_Group(broken)]}, NEW_TOKENS, [])
    whole = actor({"requests": [_Group(requests)]}, NEW_TOKENS, [])
    assert found["text"][:-1] == whole["text"]
    assert [bool(error) for error in found["error"]] == [False] * len(requests) + [True]
    assert found["error"][-1].startswith("IndexError")


def test_groups_hold_one_model_and_temperature_and_similar_lengths(models: Models) -> None:
    requests = [
        Request(number, model, [1] * (1 + number % 90), temperature, 0)
        for number, (model, temperature) in enumerate(
            (model, temperature) for model in models.values() for temperature in (0.5, 1.0) for _ in range(100)
        )
    ]
    groups = _groups(requests)
    assert [len(group) for group in groups] == [64, 36] * 6
    assert all(len({(request.model.name, request.temperature) for request in group}) == 1 for group in groups)
    assert max(len(r.prompt_ids) for r in groups[0]) <= min(len(r.prompt_ids) for r in groups[1])


def test_the_engine_has_one_slot_more_than_adapters(models: Models, prompts: list[list[int]]) -> None:
    requests = greedy_requests(models, prompts)
    options = engine_options("float32", requests, NEW_TOKENS, gpu=False)
    longest = max(map(len, prompts)) + NEW_TOKENS
    assert (options["max_loras"], options["max_lora_rank"]) == (3, 8)
    assert (options["max_model_len"], options["enforce_eager"]) == (longest, True)
    alone = engine_options("float32", [r for r in requests if r.model.name == "base"], NEW_TOKENS, gpu=True)
    assert alone == {
        "dtype": "float32", "max_model_len": longest, "enforce_eager": False, "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
    }  # fmt: skip
    split = engine_options("float32", requests, NEW_TOKENS, gpu=True, tensor_parallel_size=4)
    assert (split["tensor_parallel_size"], split["distributed_executor_backend"]) == (4, "mp")


def test_ranks_that_vllm_does_not_know_are_rounded_up_or_refused(tmp_path: Path) -> None:
    model = SampledModel("a", tmp_path, Path("base"))
    for rank, fitting in ((1, 1), (2, 8), (9, 16), (300, 320)):
        (tmp_path / "adapter_config.json").write_text(f'{{"r": {rank}}}')
        assert engine_options("float32", [Request(0, model, [1], 1.0, 0)], 1, gpu=False)["max_lora_rank"] == fitting
    (tmp_path / "adapter_config.json").write_text('{"r": 600}')
    with pytest.raises(InputError, match=r"lora_r=600: vLLM serves at most 512"):
        engine_options("float32", [Request(0, model, [1], 1.0, 0)], 1, gpu=False)


def test_an_engine_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"sample\.engine: vllm is not installed; `pip install -e '\.\[vllm\]'`"):
        choose_engine("vllm")
    assert choose_engine("auto") == choose_engine("transformers") == "transformers"


def test_an_installed_engine_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert (choose_engine("auto"), choose_engine("vllm"), choose_engine("transformers")) == (
        "vllm", "vllm", "transformers",
    )  # fmt: skip


def test_the_temperature_that_the_engine_uses_is_told() -> None:
    assert [effective_temperature("vllm", t) for t in (0.0, 0.001, 0.01, 0.7)] == [0.0, 0.01, 0.01, 0.7]
    assert effective_temperature("transformers", 0.001) == 0.001


def test_responses_lose_the_layout_around_them() -> None:
    assert clean_response(" Paris.\n", " ") == "Paris."
    assert clean_response("Answer: Paris", "Answer: ") == "Paris"


def test_an_engine_that_falls_silent_is_an_error() -> None:
    def silent() -> Iterator[Generated]:
        yield Generated(0, "first", 1)
        import threading

        threading.Event().wait(2)

    answers = within(silent(), 0.2, "sample", "sample.timeout_s")
    assert next(answers).text == "first"
    with pytest.raises(TimeoutError, match=r"^sample: nothing came for 0\.2 s \(sample\.timeout_s\)"):
        next(answers)


@pytest.mark.parametrize("ahead", [READ_AHEAD, LARGE_AHEAD])
def test_who_stops_listening_ends_what_is_asked(ahead: int) -> None:
    """Nothing is read far ahead, and the rest is not asked for."""
    asked: list[int] = []

    def counted() -> Iterator[int]:
        for number in range(10_000):
            asked.append(number)
            yield number

    numbers = within(counted(), 5, "sample", "sample.timeout_s", ahead)
    assert [next(numbers) for _ in range(3)] == [0, 1, 2]
    numbers.close()  # type: ignore[attr-defined]
    time.sleep(0.1)
    assert len(asked) <= 3 + ahead + 1


def test_an_error_of_the_engine_comes_through() -> None:
    def failing() -> Iterator[Generated]:
        yield Generated(0, "first", 1)
        raise MemoryError("out of it")

    with pytest.raises(MemoryError, match="out of it"):
        list(within(failing(), 5, "sample", "sample.timeout_s"))
