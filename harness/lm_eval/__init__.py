"""lm-eval's tasks on compressed caches, and its results as runs. Others call `plugin.KVPolicyLM`."""
