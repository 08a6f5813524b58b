"""Values that can be read and mean nothing: refused by the command's model, one line each, before torch is asked."""

import shlex
from pathlib import Path

import pytest

from tests.hostile import tried_command

pytestmark = pytest.mark.hostile

RUN = "run --model tiny --methods knorm --tasks niah/passkey --budgets 64 --lengths 512 --limit 1"
COUNTS = ("0", "-1", "-999999999999999999", "999999999999999999", "100000000")
TEXTS = ("", " ", "nope\x1b[31m", "\u202enope", "n" * 5000, "../nope", "no\npe")
LABELS = ("snapkv@", "@kvcf", "snapkv@@kvcf", "SnapKV", "snapkv[", "snapkv[]", "snapkv[kernel]", "snapkv[kernel=5]")
LABELS = (
    *LABELS,
    "snapkv@kvcf@paper",
    "snаpkv",
    "ｓｎａｐｋｖ",
    "snapkv\u200b",
    "kvpress:",
    ":x",
    "kvpress:(",
    "n" * 9000,
    "a:b:c",
)
BUDGETS = (
    "0",
    "-5",
    "0.0",
    "1.5",
    "nan",
    "inf",
    "1e3",
    "1_000",
    "٣",
    "%",
    "0%",
    "101%",
    "1e-9",
    "0x40",
    "64.5",
    "9" * 15,
)
SETS = ("knorm", "knorm=", "knorm.=1", "=1", "other.recent=1", "knorm.nope=1", "knorm.recent=x", "knorm.recent=true")
SETS = (
    *SETS,
    "knorm.recent=1e999",
    "knorm.recent=NaN",
    "knorm.recent=-1",
    "knorm.recent=" + "9" * 50,
    "knorm.recent=1.5",
)
SETS = (*SETS, "knorm.recent=" + "9" * 5000, "knorm.recent=" + "[" * 5000, "knorm.recent=" + "[" * 50 + "]" * 50)
WHERE = ("\x1b[31m", "n" * 300, "~nobody-here", "$NOT_SET_HERE", "")


@pytest.mark.parametrize(
    ("option", "values"),
    [
        *((f"--{name}", COUNTS) for name in ("limit", "max-tokens", "max-new-tokens")),
        ("--lengths", (*COUNTS, "512,0", ",".join(map(str, range(1, 2000))))),
        *((f"--{name}", ("-1", "999999999999999999")) for name in ("nll-tokens", "observe", "seed")),
        *((f"--{name}", TEXTS) for name in ("model", "dtype", "device", "tasks", "methods")),
        ("--methods", LABELS),
        ("--budgets", (*BUDGETS, *(f"64,{budget}" for budget in BUDGETS))),
        ("--set", SETS),
        *((f"--{name}", WHERE) for name in ("data-dir", "graded", "config")),
    ],
)
def test_a_run_of_values_that_mean_nothing_is_refused(option: str, values: tuple[str, ...], tmp_path: Path) -> None:
    for value in values:
        if (option, value) != ("--seed", "999999999999999999"):
            line = tried_command(f"values of {option}", *RUN.split(), f"{option}={value}", "--out", tmp_path)
            assert len(line) < 900, line
    assert not list(tmp_path.iterdir())


BENCH = "bench --model tiny --methods fullkv,knorm --budgets 64"
BOUNDARY = "boundary --model tiny --methods fullkv,knorm --budgets 64 --memory-limit 1GiB"
MORE = {
    BENCH: (
        *(f"--{name} {n}" for name in ("lengths", "batch", "new-tokens", "chunk", "rounds") for n in COUNTS),
        *(f"--timeout {s}" for s in ("0", "-1", "1e-320", "1e300")),
        *(f"--threads {n}" for n in COUNTS),
        *(
            f"--memory-limit {shlex.quote(s)}"
            for s in ("1e999", "0", "-1", "1.2.3MiB", "1e99", "x", "", "٣GiB", "9" * 400, "inf", "1 T i B")
        ),
        "--methods nope",
        "--methods snapkv@",
        "--budgets ''",
        "--set nope",
        "--set knorm.nope=1",
        "--model nope",
        "--dtype int3",
    ),
    BOUNDARY: (
        *(f"--{name} {n}" for name in ("context", "max-tokens", "max-batch", "chunk") for n in COUNTS),
        *(f"--timeout {s}" for s in ("0", "-1", "1e-320", "1e300", "0.5")),
        *(f"--threads {n}" for n in COUNTS),
        *(f"--memory-limit {s}" for s in ("1e999", "0", "0.5", "1e99", "8EiB", "nan", "9" * 19 + "TiB")),
        "--methods nope",
        "--budgets ,",
        "--device nope",
        "--model nope",
    ),
    "serve-bench --model tiny --methods fullkv": (
        "--length 1",
        "--length -1",
        "--batch 0",
        "--rounds 0",
        "--batch 100000000",
    ),
    "compile --model tiny --out OUT": (
        *(f"--{name} {n}" for name in ("prompts", "steps") for n in COUNTS),
        *(f"--threads {n}" for n in COUNTS),
        "--corpus ''",
        "--corpus ,",
        "--corpus nope",
        f"--corpus {'n' * 300}",
        "--corpus kjv,nope",
        "--lengths 5",
        "--lengths 9,5",
        "--lengths 0,5",
        "--lengths 1,2,3",
        "--budgets 0",
        "--budgets 64,64",
        "--budgets 128,64",
        "--budgets -1,5",
        "--seed -1",
        "--model nope",
        "--dtype nope",
        "--device nope",
        "--estimator nope",
        "--prompts 15",
        f"--form {'f' * 300}",
    ),
    "tune snapkv --model tiny --out OUT": (
        "--trials 1",
        "--trials -1",
        "--trials 10000000",
        "--prompts 0",
        "--threads 0",
    ),
    "tune --model tiny --out OUT": ("nope", "fullkv", "snapkv@", "''", ",", "snapkv@kvcf", "snapkv,nope"),
    "calibrate-tasks --model tiny --out OUT": (
        "--tasks nope",
        "--tasks ''",
        "--lengths 0",
        "--lengths ''",
        "--samples 7",
        "--samples 100000000",
        "--seed -1",
        "--threads 0",
        "--model nope",
    ),
    "calibrate-relay --model tiny --out OUT": (
        "--prompts 2",
        "--receiver nope",
        "--receiver tiny",
        "--receiver shape:llama-3-8b",
        *(f"--receiver smollm2-135m --prompts {n}" for n in ("0", "-1", "10000000")),
        "--receiver tiny --corpus nope",
        "--receiver tiny --lengths 9,5",
        "--receiver tiny --threads 0",
    ),
    "run --model tiny --methods fullkv --out OUT": (
        "--tasks stdlib --receiver tiny",
        "--tasks relay,stdlib",
        "--tasks relay --query aware",
        "--tasks relay --receiver nope",
        "--tasks relay --receiver-map OUT",
        "--tasks relay --receiver shape:llama-3-8b",
        "--tasks relay --measure",
    ),
    "simulate FINISHED": (
        *(f"--speedup {s}" for s in ("0", "-1", "1e-320", "1e300", "nan", "inf")),
        *(f"--{name} {n}" for name in ("nodes", "gpus", "max-tokens") for n in COUNTS),
        *(f"--{name} {s}" for name in ("start-seconds", "node-seconds", "mtbf-hours") for s in ("-1", "1e300", "inf")),
        *(
            f"--cost {s}"
            for s in (
                "x",
                "x=1",
                "record_s",
                "record_s=",
                "record_s=-1",
                "record_s=1e999",
                "record_s=NaN",
                "record_s=true",
                "record_s=1e300",
                "=1",
                "x" * 5000,
            )
        ),
        "--lengths 1",
        "--lengths 4096,1",
        "--tasks nope",
        "--tasks recorded,ruler",
        "--nodes 400 --gpus 400",
        "--seed -1",
    ),
    "new-method --to OUT": (
        "snapkv",
        "class",
        "None",
        "a/b",
        "../x",
        "Upper",
        "1a",
        "ü",
        "a b",
        "''",
        "a" * 41,
        "base",
        "lambda",
        "a-b",
        "match\x00",
        "budget",
        "_",
        "con.",
    ),
    "tables": (
        "show nope",
        "show ''",
        f"show {'n' * 300}",
        "compare nope nope",
        "transfer nope --model tiny --out OUT",
        "show /dev/null",
        "show ~nobody-here/x",
    ),
    "status OUT": ("--logs 0", "--logs -5", "nope"),
    "nightly": ("nope", "''", "quick", "/dev/null", "/", "n" * 300, "nightly --threads 0", "~nobody-here"),
    "data fetch": ("nope", "longbench nope", "''", "longbench squad --revision x"),
    "fetch": ("nope", "''", "essays nope", "../essays", "n" * 5000),
    "list": ("nope", "tasks --markdown"),
    "board": ("nope", "OUT --name a/b", "''", "--published --name x", "n" * 300),
    "compare": ("nope nope", "'' ''", "OUT OUT"),
    "export": ("OUT", "nope --card x.json", "OUT --card ''"),
    "submit": ("nope", "OUT", "''"),
    "verify": ("nope", "OUT", "''", "/dev/null"),
    "lm-eval-import": ("nope", "''", "/dev/null"),
}


@pytest.mark.parametrize("base", MORE)
def test_a_command_with_values_that_mean_nothing_is_refused(base: str, finished: Path, tmp_path: Path) -> None:
    for more in MORE[base]:
        line = f"{base} {more}".replace("OUT", str(tmp_path)).replace("FINISHED", str(next(finished.iterdir())))
        tried_command(f"values of {base.split()[0]}", *shlex.split(line))
    assert not list(tmp_path.iterdir())
