"""What may stand behind `kvpress:`: a name or a call of literals and presses, or one line; nothing of it is run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.kvpress.label import parse_press
from tests.hostile import tried

pytestmark = pytest.mark.hostile
DEPTHS = (50, 150, 250, 990, 5_000, 100_000)
VALUES = st.recursive(
    st.sampled_from(
        ["1", "-1", "0.5", "'x'", "None", "True", "KnormPress", "1e999", "nan", "b'x'", "1j", "...", "x.y"]
    ),
    lambda inner: st.one_of(
        *(inner.map(shape.format) for shape in ("[{}]", "({},)", "K({})", "K(a={})", "{{{}: 1}}", "-{}", "lambda: {}")),
        inner.map("[{} for x in y]".format),
        st.tuples(inner, inner).map(lambda two: f"{two[0]} + {two[1]}"),
    ),
    max_leaves=6,
)


@given(VALUES)
def test_an_argument_is_a_literal_or_a_press(value: str) -> None:
    def read() -> None:
        press = parse_press(f"KnormPress(a={value})")
        assert parse_press(str(press)) == press

    tried("a press's argument", read, may_pass=True)


@given(st.text(max_size=40))
def test_any_text_as_a_press(text: str) -> None:
    tried("a press's label", lambda: parse_press(text), may_pass=True)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    ("before", "after"),
    [("A(", ")"), ("A(x=[", "])"), ("A(x=(", ",))"), ("A(x={1:", "})"), ("-", ""), ("not ", ""), ("~", ""), ("(", ")")],
)
def test_depth_ends_in_one_line(before: str, after: str, depth: int) -> None:
    for whole in ("{}", "A(x={})"):
        text = whole.format(before * depth + "1" + after * depth)
        tried("a deep press", lambda text=text: parse_press(text), may_pass=depth < 200)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("joint", ["+", "*", "**", ".x", "()", "[0]", " if 1 else ", ",", " and "])
def test_length_ends_in_one_line(joint: str, depth: int) -> None:
    tried("a long press", lambda: parse_press(f"A(x={joint.join('1' * depth)})"), may_pass=joint == ",")
    tried("a long press", lambda: parse_press(f"A{joint * depth}"))


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "\n", "\0", "\x1b[31m", "A(\ud83d)", "A('\ud83d')", "A" * 100_000, "A(x=" + "9" * 5000 + ")", "A;B"),
        *(
            "__import__('os').system('x')",
            "A(__import__('os'))",
            "A(open('/x'))",
            "A(**{})",
            "A(*[1])",
            "A(x:=1)",
            "A=B",
        ),
        *(
            "A(x=f'{1}')",
            "A(x=1, x=2)",
            "A()()",
            "A.b()",
            "[A]",
            "1",
            "'A'",
            "A(x=1e999)",
            "A(x=-1e999)",
            "A(x=\\",
            "A #",
        ),
        *(
            "A(x=yield)",
            "A(x=await y)",
            "import os",
            "A(x=\u202e1)",
            "A(x='\u202e')",
            "A\u3000B",
            "A(x=0o9)",
            "A(x=1_)",
        ),
    ],
)
def test_labels_that_are_no_press(text: str) -> None:
    taken = {
        "A(__import__('os'))",
        "A(open('/x'))",
        "A #",
        "A(x='\u202e')",
    }  # names and literals: no press is so called
    tried("a press's label", lambda: parse_press(text), may_pass=text in taken)
