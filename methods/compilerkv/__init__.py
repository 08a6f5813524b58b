"""CompilerKV: retention decided by tables that are compiled offline and only looked up at run time.

Runtime: `policy` (the method), `form` (our compiled form), `paper` (the published form), `tables` and `manifest` (the
artefact). Offline: `designs` (foldover designs, ridge), `cql` (the published Q-learning), `risk`, `selection`
(forms, gains, agreement). What runs a model is in `harness`.
"""

from methods.compilerkv.policy import CompilerKV

__all__ = ["CompilerKV"]
