"""From texts to token ids: exact boundaries, BOS and EOS, chat templates, truncation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from jpo_ray.data.tokens import (
    MARK,
    Layout,
    TokenizedItems,
    check_lengths,
    prompt_ids,
    prompt_texts,
    tokenize,
    tokenizer_hash,
)
from jpo_ray.errors import InputError
from jpo_ray.sandbox.model import make_tokenizer

PAPER = Layout("### Instructions: {instruction}\n\n### Response:", " ", 64)
CHAT = Layout("chat", " ", 128)
TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXTS = ["Name a fruit.", "An apple.", "### Instructions: ### Response: Say so, said she.", "<user> <assistant>"] * 3
ODD = [
    "Zürich, naïve, 東京",
    "\U0001f642 emoji\ttab",
    "  two  spaces ",
    "line\n\nbreak",
    "\x00\x7f",
    "{instruction} %s",
]


@pytest.fixture(scope="module")
def with_bos() -> Any:
    return make_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def without_bos(with_bos: Any) -> Any:
    """GPT-2's kind: EOS alone."""
    return PreTrainedTokenizerFast(tokenizer_object=with_bos.backend_tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module")
def spacing() -> Any:
    """Llama's and Mistral's kind: a space is put before every text, other bytes stand for what has no piece."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    words = ["▁An", "▁apple", "▁Response", "▁Instructions"]
    letters = sorted({"▁", *"".join([*TEXTS, *words]).replace(" ", "")})
    pieces = {piece: number for number, piece in enumerate(dict.fromkeys(["<s>", "</s>", *bytes_, *letters]))}
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            pieces.setdefault(word[: end + 1], len(pieces))
    tokenizer = Tokenizer(models.BPE(pieces, list(dict.fromkeys(merges)), byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_a_space_that_the_tokenizer_adds_does_not_stand_before_the_response(spacing: Any) -> None:
    """The parts together have the ids of the whole text, with a space before the response and without one."""
    for prefix in (" ", ""):
        layout = Layout(PAPER.template, prefix, 128)
        (found,) = [tokenize(spacing, layout, ["Name a fruit."], ["An apple."])]
        whole = f"### Instructions: Name a fruit.\n\n### Response:{prefix}An apple."
        assert found.item(0).tolist() == [spacing.bos_token_id, *bare(spacing, whole), spacing.eos_token_id]
    pieces = spacing.convert_ids_to_tokens(found.item(0).tolist())
    assert pieces[found.prompt_lengths[0] :][:3] == ["A", "n", "▁apple"]  # not "▁An", as the response alone has it
    assert spacing.convert_ids_to_tokens(bare(spacing, "An apple."))[0] == "▁An"


def chatty(tokenizer: Any, template: str) -> Any:
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>")
    found.chat_template = template
    return found


def bare(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def one(tokenizer: Any, layout: Layout, instruction: str, response: str) -> TokenizedItems:
    return tokenize(tokenizer, layout, [instruction], [response])


def parts(items: TokenizedItems, index: int = 0) -> tuple[list[int], list[int]]:
    ids, boundary = items.item(index).tolist(), int(items.prompt_lengths[index])
    return ids[:boundary], ids[boundary:]


def test_prompt_and_response_are_tokenized_apart_and_joined(with_bos: Any) -> None:
    """BOS, the template with the instruction | a blank and the response, EOS."""
    prompt, response = parts(one(with_bos, PAPER, "Name a fruit.", "An apple."))
    assert prompt == [1, *bare(with_bos, "### Instructions: Name a fruit.\n\n### Response:")]
    assert response == [*bare(with_bos, " An apple."), 2]


def test_the_boundary_holds_where_joined_text_would_have_one_token_across_it(with_bos: Any) -> None:
    """A word that the vocabulary has whole, cut after its first letter."""
    word = max((token for token in with_bos.get_vocab() if token.isascii() and token.isalpha()), key=len)
    assert len(word) > 2
    assert len(bare(with_bos, word)) == 1
    prompt, response = parts(one(with_bos, Layout("{instruction}", "", 64), word[0], word[1:]))
    assert prompt == [1, *bare(with_bos, word[0])]
    assert response == [*bare(with_bos, word[1:]), 2]


def test_counts_of_scored_tokens(with_bos: Any, without_bos: Any) -> None:
    """After BOS every token is scored; without one the first has nothing that predicts it."""
    prompt_tokens = len(bare(with_bos, "### Instructions: Name a fruit.\n\n### Response:"))
    response_tokens = len(bare(with_bos, " An apple.")) + 1  # EOS
    counted = one(with_bos, PAPER, "Name a fruit.", "An apple.")
    assert counted.instruction_tokens.tolist() == [prompt_tokens]
    assert counted.response_tokens.tolist() == [response_tokens]
    counted = one(without_bos, PAPER, "Name a fruit.", "An apple.")
    assert counted.item(0)[0] != 1
    assert counted.instruction_tokens.tolist() == [prompt_tokens - 1]
    assert counted.response_tokens.tolist() == [response_tokens]


def test_eos_is_there_once(with_bos: Any) -> None:
    assert parts(one(with_bos, PAPER, "Name a fruit.", "An apple.<eos>"))[1] == [*bare(with_bos, " An apple."), 2]
    assert parts(one(with_bos, PAPER, "Name a fruit.", ""))[1] == [*bare(with_bos, " "), 2]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_odd_characters_pass_unchanged(text: str, with_bos: Any) -> None:
    items = one(with_bos, PAPER, text, text)
    prompt, response = parts(items)
    assert with_bos.decode(prompt[1:]) == PAPER.template.replace("{instruction}", text)
    assert with_bos.decode(response[:-1]) == " " + text


def test_many_items_lie_end_to_end(with_bos: Any) -> None:
    instructions, responses = ["a", "b b", "a"], ["x", "y", "z z z"]
    items = tokenize(with_bos, PAPER, instructions, responses)
    assert len(items) == 3
    assert items.offsets.tolist() == [0, *np.cumsum(items.lengths)]
    for place, (instruction, response) in enumerate(zip(instructions, responses, strict=True)):
        assert items.item(place).tolist() == one(with_bos, PAPER, instruction, response).item(0).tolist()
    nothing = tokenize(with_bos, PAPER, [], [])
    assert (len(nothing), nothing.ids.tolist(), nothing.offsets.tolist(), nothing.truncated) == (0, [], [0], 0)


def test_each_distinct_instruction_is_tokenized_once(with_bos: Any) -> None:
    seen: list[Sequence[str]] = []

    class Counting:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, texts: list[str], **options: Any) -> Any:
            seen.append(texts)
            return with_bos(texts, **options)

    tokenize(Counting(), PAPER, ["a", "b", "a", "a"], ["w", "x", "y", "z"])
    assert [len(texts) for texts in seen if texts[0] != MARK] == [2, 4]


def test_a_long_response_is_cut_and_counted(with_bos: Any) -> None:
    """The end of the response goes, EOS with it; an item that just fits keeps its EOS and is not counted."""
    full = one(with_bos, PAPER, "Name a fruit.", "An apple.")
    length = int(full.lengths[0])
    fits = one(with_bos, Layout(PAPER.template, " ", length), "Name a fruit.", "An apple.")
    assert (fits.truncated, fits.item(0).tolist()) == (0, full.item(0).tolist())
    cut = tokenize(with_bos, Layout(PAPER.template, " ", length - 1), ["Name a fruit."] * 2, ["An apple.", "A"])
    assert cut.truncated == 1
    assert cut.item(0).tolist() == full.item(0).tolist()[:-1]
    assert cut.item(1)[-1] == 2


def test_max_length_without_room_for_a_response_names_the_numbers(with_bos: Any) -> None:
    (prompt,) = prompt_ids(with_bos, PAPER, ["Name a fruit."])
    (longer,) = prompt_ids(with_bos, PAPER, ["Name a fruit. " * 3])
    n = len(prompt)
    with pytest.raises(InputError) as caught:
        tokenize(with_bos, Layout(PAPER.template, " ", n), ["Name a fruit.", "Name a fruit. " * 3], ["x", "y"])
    assert str(caught.value).startswith(
        f"model.max_length={n} is shorter than an instruction of {len(longer)} tokens ('Name a fr"
    )
    with pytest.raises(InputError, match=f"of {len(longer)} tokens"):
        check_lengths(with_bos, Layout(PAPER.template, " ", n), ["Name a fruit.", "Name a fruit. " * 3])
    check_lengths(with_bos, Layout(PAPER.template, " ", len(longer) + 1), ["Name a fruit. " * 3])
    assert f"raise it to at least {len(longer) + 2}" in str(caught.value)
    assert one(with_bos, Layout(PAPER.template, " ", n + 1), "Name a fruit.", "x").response_tokens.tolist() == [1]
    clipped = tokenize(with_bos, Layout(PAPER.template, " ", n), ["Name a fruit."], ["xyz"], clip=True)
    assert parts(clipped) == (prompt[: n - 1], bare(with_bos, " ")[:1])


def test_chat_template_parts_are_the_conversation(with_bos: Any) -> None:
    """Prompt and response join to what the template writes of both turns, up to the end-of-turn mark."""
    tokenizer = chatty(with_bos, TURNS)
    assert prompt_texts(tokenizer, CHAT, ["Name a fruit."]) == ["<user>Name a fruit.\n<assistant>"]
    prompt, response = parts(one(tokenizer, CHAT, "Name a fruit.", "An apple."))
    assert prompt == [1, *bare(tokenizer, "<user>Name a fruit.\n<assistant>")]
    assert response == [*bare(tokenizer, "An apple."), 2]
    conversation = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "An apple."}]
    assert tokenizer.decode([*prompt[1:], *response]) + "\n" == tokenizer.apply_chat_template(
        conversation, tokenize=False
    )


# As the models ship them, less what refuses other roles and orders.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@pytest.mark.parametrize("kind", ["with_bos", "spacing"])
def test_mistrals_chat_template(kind: str, request: pytest.FixtureRequest) -> None:
    """No generation prompt: the answer follows `[/INST]` without a space. What stands after its EOS is left out."""
    tokenizer = request.getfixturevalue(kind)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
    )
    tokenizer.chat_template = MISTRAL
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert prompt_texts(tokenizer, CHAT, ["Name a fruit."]) == [f"{bos}[INST] Name a fruit. [/INST]"]
    prompt, response = parts(one(tokenizer, CHAT, "Name a fruit.", "An apple."))
    assert prompt == [tokenizer.bos_token_id, *bare(tokenizer, "[INST] Name a fruit. [/INST]")]
    assert tokenizer.convert_ids_to_tokens(response)[-1] == eos
    assert response.count(tokenizer.eos_token_id) == 1
    text = "".join(tokenizer.convert_ids_to_tokens(response[:-1])).replace("▁", " ").replace("Ġ", " ")
    assert text == "An apple."


def test_gemmas_chat_template(with_bos: Any) -> None:
    """The end of a turn is not EOS, which comes after it; texts are trimmed, the assistant is called model."""
    tokenizer = chatty(with_bos, GEMMA)
    before, after = "<start_of_turn>user\nName a fruit.<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"
    assert prompt_texts(tokenizer, CHAT, [" Name a fruit.\n"]) == ["<bos>" + before]
    prompt, response = parts(one(tokenizer, CHAT, " Name a fruit.\n", "  An apple. "))
    assert prompt == [1, *bare(tokenizer, before)]
    assert response == [*bare(tokenizer, "An apple." + after), 2]
    cut = tokenize(tokenizer, CHAT, ["Name a fruit."], ["An apple"], ended=[False])
    assert parts(cut)[1] == bare(tokenizer, "An apple")


def test_a_chat_template_that_writes_bos_gets_no_second_one(with_bos: Any) -> None:
    tokenizer = chatty(with_bos, "{{ bos_token }}" + TURNS)
    prompt, _ = parts(one(tokenizer, CHAT, "Name a fruit.", "An apple."))
    assert prompt == [1, *bare(tokenizer, "<user>Name a fruit.\n<assistant>")]
    assert prompt.count(1) == 1


def test_a_chat_template_without_end_mark_still_ends_in_eos(with_bos: Any) -> None:
    tokenizer = chatty(with_bos, TURNS.replace("{{ eos_token }}", "."))
    _, response = parts(one(tokenizer, CHAT, "Name a fruit.", "An apple"))
    assert response == [*bare(tokenizer, "An apple.\n"), 2]


def test_a_response_that_was_cut_has_no_end(with_bos: Any) -> None:
    """Neither EOS nor, of a chat template, the mark that ends a turn: nobody drew them."""
    marked = chatty(with_bos, TURNS.replace("{{ eos_token }}", "."))
    for tokenizer, layout, prefix in ((with_bos, PAPER, " "), (marked, CHAT, "")):
        found = tokenize(tokenizer, layout, ["a", "a"], ["An apple", "An apple"], ended=[False, True])
        cut, whole = (found.item(row)[found.prompt_lengths[row] :].tolist() for row in range(2))
        assert cut == bare(tokenizer, prefix + "An apple")
        assert whole[-1] == 2


def test_chat_templates_that_cannot_be_used_are_refused(with_bos: Any) -> None:
    with pytest.raises(InputError, match="the tokenizer has no chat template; give a text with"):
        one(with_bos, CHAT, "a", "b")
    other = chatty(with_bos, TURNS.replace("<assistant>{% endif %}", "<think>{% endif %}"))
    with pytest.raises(InputError, match="give the template as text with"):
        one(other, CHAT, "a", "b")


def test_sequence_id_is_of_ids_and_boundary() -> None:
    def of(ids: list[int], boundary: int) -> str:
        return TokenizedItems(np.array(ids, np.int32), np.array([0, len(ids)]), np.array([boundary]), 0).sequence_id(0)

    assert of([1, 5, 6, 2], 2) == of([1, 5, 6, 2], 2)
    assert len({of([1, 5, 6, 2], 2), of([1, 5, 7, 2], 2), of([1, 5, 6, 2], 3), of([1, 5, 6], 2)}) == 4


def test_tokenizer_hash_is_of_behaviour(with_bos: Any, without_bos: Any) -> None:
    """The same after use; another vocabulary, special token or chat template is another tokenizer."""
    before = tokenizer_hash(with_bos)
    with_bos(["a", "b b b b"], padding=True, truncation=True, max_length=2)
    one(with_bos, PAPER, "Name a fruit.", "An apple.")
    assert tokenizer_hash(with_bos) == before
    assert tokenizer_hash(make_tokenizer(TEXTS, 300)) == before
    others = [without_bos, make_tokenizer(TEXTS, 299), chatty(with_bos, TURNS), chatty(with_bos, TURNS + " ")]
    assert len({before, *map(tokenizer_hash, others)}) == 5
    added = make_tokenizer(TEXTS, 300)
    added.add_tokens(["fruitful"])
    assert tokenizer_hash(added) != before
