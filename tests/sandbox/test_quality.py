"""Hand-made responses with the quality that the rules of each family give them."""

import pytest

from jpo_ray.sandbox import quality

LIST = "Name four fruits other than apple."
FACT = "What is the capital of France?"
FACTS = "Tell me the capital and the language of Japan."
SUMMARY = (
    "Write a short summary. Post: Anna lost a small ring at the beach. It was raining the whole day. "
    "In the end a friend helped."
)
SORT = "Put these words in alphabetical order: wolf, bear, zebra."
COUNT = "Count these words: wolf, bear, zebra."
NOTE = "Write a polite note to Ben: the dinner on Friday is cancelled."
SENTENCE = "Use lamp and violin in a sentence. Avoid the word broken."

GRADED = [
    # 4 of 4; 2 of 4; 4 named, one excluded: 3/4 - 0.5; one foreign: 3/4 - 0.2; one repeated: 3/4 - 0.2
    (LIST, "You could take pear, plum, fig and lime.", 1.0),
    (LIST, "You could take pear and plum.", 0.5),
    (LIST, "You could take pear, plum, apple and lime.", 0.25),
    (LIST, "You could take pear, plum, fig and hammer.", 0.55),
    (LIST, "You could take pear, plum, fig and fig.", 0.55),
    # one too many: 1 - 0.2
    (LIST, "You could take pear, plum, fig, kiwi and lime.", 0.8),
    (FACT, "It is Paris.", 1.0),
    (FACT, "Paris", 0.9),
    (FACT, "It is Paris or Rome.", 0.6),
    (FACT, "It is Rome.", 0.0),
    (FACTS, "The capital of Japan is Tokyo and the language is Japanese.", 1.0),
    (FACTS, "The capital of Japan is Tokyo.", 0.5),
    # 1/2 - 0.4
    (FACTS, "The capital of Japan is Tokyo and the language is Thai.", 0.1),
    (SUMMARY, "Anna lost a ring at the beach and a friend helped.", 1.0),
    # name, deed, thing
    (SUMMARY, "Anna lost a ring.", 0.6),
    # thing missing and one intruder: 0.75 - 0.2
    (SUMMARY, "Anna lost a phone at the beach and a friend helped.", 0.55),
    (SORT, "The words are bear, wolf and zebra.", 1.0),
    (SORT, "The words are bear and wolf.", 0.6667),
    (SORT, "The words are wolf, bear and zebra.", 0.3333),
    (COUNT, "There are three words.", 1.0),
    (COUNT, "There are three or four words.", 0.5),
    (COUNT, "There are six words.", 0.0),
    (NOTE, "Dear Ben, the dinner on Friday is cancelled. Kind regards.", 1.0),
    (NOTE, "Dear Ben, the dinner on Friday is cancelled.", 0.85),
    # day missing and wrong day: 1 - 0.2 - 0.25
    (NOTE, "Dear Ben, the dinner on Monday is cancelled. Kind regards.", 0.55),
    (NOTE, "Hello Ben, the plan has changed.", 0.2),
    (SENTENCE, "The tall lamp stood next to the violin.", 1.0),
    (SENTENCE, "The broken lamp stood next to the violin.", 0.5),
    (SENTENCE, "There was a lamp.", 0.4),
]


@pytest.mark.parametrize(("instruction", "response", "expected"), GRADED)
def test_graded_responses_have_the_quality_that_the_rules_give(
    instruction: str, response: str, expected: float
) -> None:
    assert quality(instruction, response) == expected


@pytest.mark.parametrize("instruction", [LIST, FACT, FACTS, SUMMARY, SORT, COUNT, NOTE, SENTENCE])
def test_evasion_is_worth_a_tenth_and_garbage_nothing(instruction: str) -> None:
    assert quality(instruction, "I am not sure.") == 0.1
    assert quality(instruction, "That is hard to say.") == 0.1
    for garbage in ("", "   ", "...", "\n\n", "xq zzz", "the " * 200, "\U0001f642 \x00 ü", "123 456"):
        assert quality(instruction, garbage) == 0.0


def test_rambling_and_repetition_lower_the_quality_of_a_right_answer() -> None:
    answer = "The capital of France is Paris."
    rambling = f"{answer} There is much more to say about this. I hope this helps you a lot."
    # 6 + 8 + 7 words where 9 are enough: 12 too many at 0.03 each.
    assert quality(FACT, rambling) == 0.64
    # 10 runs of three words, 6 of them distinct: 1 - 0.8 * 0.4; 12 words: 3 too many.
    assert quality(FACT, f"{answer} {answer}") == round((1 - 0.8 * 0.4) * (1 - 3 * 0.03), 4)
    assert quality(FACT, " ".join([answer] * 20)) < 0.1


def test_naming_everything_is_no_answer() -> None:
    every_fruit = "apple pear plum cherry banana mango grape lemon peach melon fig kiwi lime papaya."
    assert quality(LIST, every_fruit) == 0.0
    assert quality(FACT, "Paris, Rome, Madrid, Berlin.") == 0.0
    assert quality(COUNT, "One two three four five six seven.") == 0.0


@pytest.mark.parametrize(
    "instruction", ["", "Who are you?", "Name four fruits other than hammer.", "What is the capital of Atlantis?"]
)
def test_an_instruction_from_elsewhere_is_refused_in_one_line(instruction: str) -> None:
    with pytest.raises(ValueError, match="not an instruction of the sandbox") as error:
        quality(instruction, "I am not sure.")
    assert "\n" not in str(error.value)
