"""RULER beside lm-eval 0.4.13 as installed: the same templates and constants, and each known place that differs.

The differences are those of lm-eval from NVIDIA/RULER. A test of one shows both values, so that a release of lm-eval
that changes is noticed. Nothing here downloads; no index of tasks is built.
"""

import importlib
import random
import re
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import load_tasks, scoring
from tasks.base import Sample, TaskOptions
from tests.task_data import Options, prompt
from tests.upstream import Chars, task_file

pytest.importorskip("lm_eval.tasks.ruler.common_utils")
TASKS = load_tasks()
NEEDLES = {
    "niah_single_1": ("repeat", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 1, 1, 4),
}
RULER_FILES = {
    **dict.fromkeys(NEEDLES, "niah_single_1"),
    **{name: name for name in ("vt", "cwe", "fwe")},
    "qa_1": "qa_squad",
    "qa_2": "qa_hotpot",
}


def module(name: str) -> ModuleType:
    """A module of lm-eval's ruler folder.

    When `prepare_niah` is imported it looks for nltk's data, which it would download, and pairs six million words.
    """
    if "niah" not in name:
        return importlib.import_module(f"lm_eval.tasks.ruler.{name}")
    few = SimpleNamespace(_categories={"nouns": ["river", "stone"], "adjectives": ["old", "new"], "verbs": []})
    few._categories["nouns"] += [f"noun{letter}" for letter in "abcdefgh"]
    with mock.patch("nltk.data.find", return_value="found"), mock.patch("wonderwords.RandomWord", return_value=few):
        return importlib.import_module(f"lm_eval.tasks.ruler.{name}")


@pytest.fixture(scope="module", autouse=True)
def _unload() -> Iterator[None]:
    """Leaves no module with a few words behind."""
    yield
    for name in ("prepare_niah", "niah_utils"):
        sys.modules.pop(f"lm_eval.tasks.ruler.{name}", None)


@pytest.fixture
def options(small: Options) -> Options:
    return lambda **changes: small(**{"tokenizer": Chars(), "lengths": (4096,), "limit": 2, **changes})


def ruler(name: str, options: TaskOptions) -> list[Sample]:
    return list(TASKS[f"ruler/{name}"].samples(options))


text = st.lists(st.sampled_from(("The cat", "7", "17", "北京", "X", ".")), max_size=9).map(" ".join) | st.text(
    max_size=30
)


@settings(max_examples=60, deadline=None)
@given(text, st.lists(st.sampled_from(("cat", "7", "北京", "x", "\n")), min_size=1, max_size=4))
def test_string_match_all_is_the_same(prediction: str, references: list[str]) -> None:
    common = module("common_utils")
    (cleaned,) = common.postprocess_pred([prediction])
    assert scoring.string_match_all(prediction, references) == common.string_match_all([cleaned], [references])


def test_string_match_part_of_aliases() -> None:
    """Lm-eval wants all aliases of an answer, NVIDIA one of them."""
    aliases = ["Denver Broncos", "the Broncos", "Denver", "Broncos!!"]
    assert scoring.string_match_part("Denver Broncos", aliases) == 1.0
    assert module("common_utils").string_match_part(["Denver Broncos"], [aliases]) == 0.5
    assert task_file("ruler", "qa_squad")["process_results"] == "common_utils.process_results_part"


@pytest.mark.parametrize("name", RULER_FILES)
def test_generation_lengths_of_ruler(name: str, options: Options) -> None:
    content = task_file("ruler", RULER_FILES[name])
    while "generation_kwargs" not in content:
        content = task_file("ruler", content["include"].removesuffix(".yaml"))
    assert {s.max_new_tokens for s in ruler(name, options())} == {content["generation_kwargs"]["max_gen_toks"]}


def their_needles(name: str, **changes: Any) -> list[dict[str, Any]]:
    """Samples of lm-eval, over a haystack of made words where it would download essays."""
    prepare = module("prepare_niah")
    kind, keys, values, k, v, q = NEEDLES[name]
    haystack = ["Word", "word."] * 3000 if kind == "essay" else prepare.get_haystack(type_haystack=kind)
    asked = {"max_seq_length": 4096, "num_samples": 1, "template": module("niah_utils").TEMPLATE} | changes
    asked |= {"type_haystack": kind, "type_needle_k": keys, "type_needle_v": values}
    asked |= {"num_needle_k": k, "num_needle_v": v, "num_needle_q": q}
    with mock.patch.object(prepare, "cached_sent_tokenize", lambda whole: re.findall(r"[^.]+\.", whole)):
        made: list[dict[str, Any]] = prepare.generate_samples(haystack, TOKENIZER=Chars(), **asked)
    return made


def frame(whole: str) -> tuple[str, str]:
    """First and last line of a needle prompt, without the keys."""
    lines = whole.split("\n")
    return lines[0], re.sub(r"for .+? mentioned", "for KEYS mentioned", lines[-1])


@pytest.mark.parametrize("name", NEEDLES)
def test_needle_prompts(name: str, options: Options) -> None:
    """Instruction, question, prefix, needle and how many are hidden: the same, in singular and plural."""
    (other,) = their_needles(name)
    for sample in ruler(name, options()):
        assert frame(prompt(sample)) == frame(f"{other['input']} {other['gen_prefix']}")
        assert len(sample.answers) == len(other["outputs"])
        kind = NEEDLES[name][2]
        needle = rf"One of the special magic {kind} for [\w-]+ is: (\S+)\."
        found, theirs_found = re.findall(needle, sample.context), re.findall(needle, other["input"])
        assert set(sample.answers) <= set(found)
        if NEEDLES[name][0] != "needle":
            assert len(found) == len(theirs_found) == max(NEEDLES[name][3], NEEDLES[name][5]) * NEEDLES[name][4]
    if NEEDLES[name][0] == "repeat":
        noise = module("prepare_niah").get_haystack(type_haystack="repeat")
        assert noise in sample.context and noise in other["input"]


@pytest.mark.parametrize("name", NEEDLES)
def test_rows_of_the_needle_table(name: str) -> None:
    """Lm-eval always makes 500 samples of a length."""
    table = module("niah_utils")
    with (
        mock.patch.multiple(table, get_tokenizer=lambda _: None, get_haystack=lambda **_: None),
        mock.patch.multiple(table, generate_samples=lambda _, **asked: asked, download_dataset=list),
    ):
        (asked,) = getattr(table, name)(max_seq_lengths=[4096])
    assert asked["num_samples"] == TASKS[f"ruler/{name}"].about.samples == 500
    counts = [asked.get(f"num_needle_{letter}", 1) for letter in "kvq"]
    kinds = [asked[key] for key in ("type_haystack", "type_needle_k", "type_needle_v")]
    assert (*kinds, *counts) == NEEDLES[name]


def test_variable_tracking(options: Options) -> None:
    """Lm-eval misspells the answer prefix, and joins lines by blanks."""
    chains = module("vt_utils")
    head, tail = chains.TEMPLATE.split("{context}")
    for sample in ruler("vt", options()):
        (value,) = re.findall(r"assigned the value (\d+) in the text above\. ?\S*$", sample.question)
        assert sample.context.startswith(head)
        expected = tail.format(query=value, num_v=5)
        assert "are assgined the value" in expected
        assert prompt(sample).endswith(expected.replace("assgined", "assigned"))
        ours = [part for part in sample.context.split("\n") if "VAR" in part]
        assert len(ours) == 10  # five of the example and five to track, each a line of its own
        assert all(re.fullmatch(r"VAR [A-Z]+ = (VAR )?\w+ ?", part) for part in ours)
    random.seed(0)
    whole, _ = chains.generate_input_output(20, 1, 4)
    assert not [part for part in whole.split("\n") if re.fullmatch(r"VAR [A-Z]+ = (VAR )?\w+ ?", part)]


def test_common_words(options: Options) -> None:
    """Lm-eval leaves the worked example out of the prompt; sized for it all the same."""
    words = module("cwe_utils")
    head, tail = words.TEMPLATE.split("{context}")
    (other,) = words.sys_word_pair_random(1, 4096, tokenizer=Chars())
    assert other["input"].count(head) == 1
    for sample in ruler("cwe", options()):
        assert sample.context.count(head) == 2
        assert prompt(sample).endswith(tail)
        assert len(sample.answers) == len(other["outputs"]) == 10
    assert task_file("ruler", "cwe")["target_delimiter"] == "\n\n"  # before the prefix; NVIDIA has a blank


def test_frequent_words(options: Options) -> None:
    """Lm-eval does not subtract the tokens to generate."""
    words = module("fwe_utils")
    head, tail = words.TEMPLATE.split("{context}")
    random.seed(0)
    (other,) = words.sys_kwext(Chars(), 2048, num_samples=1)
    assert other["length"] == 2076
    for sample in ruler("fwe", options(lengths=(2048,))):
        assert sample.context.startswith(head)
        assert prompt(sample).endswith(tail)
        assert size(sample) <= 2048
        assert len(sample.answers) == len(other["outputs"]) == 3


def size(sample: Sample) -> int:
    """Tokens of prompt and generation, chat template included."""
    chars = Chars()
    return len(chars.encode(prompt(sample))) + sample.max_new_tokens + chars.template_tokens


def test_lengths_are_filled_in_steps_by_lm_eval(options: Options) -> None:
    """Steps of 25 lines leave up to 700 tokens empty; a binary search leaves less than two lines."""
    random.seed(0)
    (other,) = their_needles("niah_multikey_3", max_seq_length=4400)
    assert 0.8 < other["length"] / 4400 < 0.9
    assert all(0.98 < size(sample) / 4400 <= 1 for sample in ruler("niah_multikey_3", options(lengths=(4400,))))


def test_samples_depend_on_the_global_state_in_lm_eval(options: Options) -> None:
    """What was drawn before decides; here a sample depends on the seed and its id."""
    made = []
    for state in (0, 0, 1):
        random.seed(state)
        made.append((their_needles("niah_multikey_2")[0]["input"], ruler("niah_multikey_2", options())[0]))
    (first, ours), (again, same), (moved, still) = made
    assert first == again != moved
    assert ours == same == still


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_question_answering(name: str, options: Options) -> None:
    """The prompt is the same. lm-eval does not repeat documents when there are too few; NVIDIA does."""
    answering = module("qa_utils")
    head, tail = answering.TEMPLATE.split("{context}")
    for sample in ruler(name, options()):
        (query,) = re.findall(r"Question: (.+)", sample.question)
        assert sample.context.startswith(f"{head}Document 1:\n")
        assert prompt(sample).endswith(tail.format(query=query) + " Answer:")
        assert answering.CONFIG["answer_prefix"] == "Answer:"  # after a blank
    docs, item = ["one", "two"], {"query": "?", "outputs": ["x"], "context": [0]}
    other, _ = answering.generate_input_output(0, 50, [item], docs)
    assert other.count("Document ") == 2
    (sample, _) = ruler(name, options(lengths=(32_768,)))
    titles = re.findall(r"Document \d+:\n(.+)", sample.context)
    assert len(titles) > 2 * len(set(titles)) * 0.9 and len(set(titles)) < len(titles)
