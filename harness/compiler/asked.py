"""What the commands that calibrate are asked for. It is read before torch is imported."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, Strict, model_validator

from harness.compiler.corpora import check_corpus
from harness.compiler.prompts import ALIKE, FAMILIES
from harness.errors import did_you_mean, shown
from harness.models.source import check_device, check_dtype, check_scored
from harness.records.options import (
    MOST_ITEMS,
    MOST_SAMPLES,
    Flag,
    Lengths,
    PathText,
    Seed,
    Tokens,
    Word,
    Words,
    between,
)
from harness.records.spec import Frozen
from methods.budget import MOST_TOKENS as MOST_SLOTS
from methods.budget import PolicyError
from methods.label import MethodLabel
from methods.registry import check_method, known_methods

TRIALS = 81
"""Candidates that are tried for the form of CompilerKV; `harness tune` tries as many for any other method."""

Slots = Annotated[int, Strict(), AfterValidator(between(1, MOST_SLOTS))]
Count = Annotated[int, Strict(), AfterValidator(between(1, MOST_SAMPLES))]


class ModelAsk(Frozen):
    """A model as `harness run` takes it; whether it is there is known before torch is imported."""

    model: PathText = "smollm2-135m"
    dtype: Word = "auto"
    device: Word = "auto"

    @model_validator(mode="after")
    def _known(self) -> Self:
        check_scored(self.model)
        check_dtype(self.dtype)
        check_device(self.device)
        return self


class CalibrationSpec(ModelAsk):
    """What decides the calibration prompts and how candidates are judged on them.

    prompts: of all corpora together. families: of what kinds they are (`harness.compiler.prompts`). lengths: tokens of
    a prompt, least and most. answer: its first tokens, which are judged.
    """

    corpora: Annotated[Words, Field(min_length=1)] = ("kjv", "pydoc")
    prompts: Annotated[int, Strict(), AfterValidator(between(16, MOST_SAMPLES))] = 128
    families: Annotated[Words, Field(min_length=1)] = FAMILIES
    lengths: tuple[Tokens, Tokens] = (600, 1000)
    answer: Count = 16
    budgets: Annotated[tuple[Slots, ...], Field(min_length=1, max_length=MOST_ITEMS)] = (64, 128, 256, 512)
    seed: Seed = 0

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.lengths[0] > self.lengths[1]:
            raise ValueError(f"--lengths {self.lengths[0]},{self.lengths[1]}: give the least and the most tokens")
        if list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"--budgets {','.join(map(str, self.budgets[:9]))} are not ascending; sort them")
        for corpus in self.corpora:
            check_corpus(corpus)
        known = (*FAMILIES, *ALIKE)
        for family in self.families:
            if family not in known:
                told = f"is none{did_you_mean(family, known)}"
                raise ValueError(f"--families {shown(family)} {told}; give some of {', '.join(known)}")
        return self

    @property
    def tight(self) -> tuple[int, ...]:
        """The budgets that tell candidates apart: up to half of the shortest prompt, one at least."""
        return tuple(own for own in self.budgets if own <= self.lengths[0] / 2) or self.budgets[:1]


class CompileSpec(CalibrationSpec):
    """What decides the tables.

    form: `auto`, or tables (a folder, or packaged ones) whose form is taken instead of choosing one. steps: of the
    gradient. published: compile the tables of the published form too.
    """

    form: PathText = "auto"
    steps: Count = 160
    estimator: Literal["gradient", "ridge"] = "gradient"
    published: Flag = False


class RelaySpec(CalibrationSpec):
    """What decides what is calibrated between two models. receiver: the one that answers."""

    receiver: PathText
    prompts: Annotated[int, Strict(), AfterValidator(between(1, MOST_SAMPLES))] = 50

    @model_validator(mode="after")
    def _receiver_known(self) -> Self:
        check_scored(self.receiver)
        return self


class ConstantsSpec(CalibrationSpec):
    """What decides a method's constants. steps: of those that are trained; None for the method's own number."""

    method: Word
    steps: Count | None = None


class TuneSpec(CalibrationSpec):
    """What decides a tuning. methods: names. trials: sets of parameters that are tried of each at most."""

    methods: Annotated[Words, Field(min_length=1)]
    trials: Annotated[int, Strict(), AfterValidator(between(2, MOST_SAMPLES))] = TRIALS

    @model_validator(mode="after")
    def _tunable(self) -> Self:
        for name in self.methods:
            try:
                check_method(MethodLabel.parse(name), {})
            except PolicyError as error:
                raise ValueError(str(error)) from None
            known = known_methods()
            if name not in known or not known[name].tunable:
                able = ", ".join(sorted(own for own, method in known.items() if method.tunable))
                raise ValueError(f"{name} states no choices, so there is nothing to tune; methods that do: {able}")
        return self


class GradeSpec(ModelAsk):
    """What decides a calibration. tasks: names, or families. samples: prompts that the choice is measured on."""

    tasks: Annotated[Words, Field(min_length=1)] = ("graded", "instructions/obey")
    lengths: Annotated[Lengths, Field(min_length=1)] = (1024, 2048)
    samples: Annotated[int, Strict(), AfterValidator(between(8, MOST_SAMPLES))] = 24
    seed: Seed = 1000
