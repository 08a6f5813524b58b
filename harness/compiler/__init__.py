"""The offline compiler of CompilerKV's tables. Others call `compile.Compiler`."""
