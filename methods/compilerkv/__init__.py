"""CompilerKV: retention decided by tables that are compiled offline and only looked up at run time.

`policy` is the published runtime, `tables` the artefact it reads.
"""

from methods.compilerkv.policy import CompilerKV

__all__ = ["CompilerKV"]
