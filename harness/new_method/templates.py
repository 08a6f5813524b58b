"""What `harness new-method` writes around a method. @NAME@, @CLASS@, @DIST@ and @WHAT@ are filled in."""

CHANGE = "- Method `@NAME@`: @WHAT@.\n"

PROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "@DIST@"
version = "0.1.0"
description = "The method @NAME@ for kv-policy-harness"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["kv-policy-harness", "torch"]

[project.entry-points."kv_policy_harness.methods"]
@NAME@ = "kv_@NAME@"

[tool.setuptools]
py-modules = ["kv_@NAME@"]

[tool.ruff]
line-length = 120

[tool.ruff.lint.isort]
known-first-party = ["harness", "methods"]

[tool.mypy]
strict = true
"""

README = """# @DIST@

The method `@NAME@` of kv-policy-harness, in a package of its own: @WHAT@.

```
python -m pip install -e .
python -m pytest tests
harness run --model tiny --methods fullkv,@NAME@ --tasks niah/passkey --budgets 64 --lengths 1024 --limit 2
```

The method is in `kv_@NAME@.py`. `tests/test_@NAME@.py` holds it to the harness's contract, whose broken clause is
named, and to a plain loop: change both together.
"""
