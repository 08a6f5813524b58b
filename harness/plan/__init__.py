"""From what a person asked for to what is run: names, samples and cells; what can be refused is refused here.

Others call `sweep` (plan_methods, plan_samples, plan_cells) and `datasets`.
"""
