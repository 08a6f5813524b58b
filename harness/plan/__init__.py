"""From what a person asked for to what is run: names, samples and cells; what can be refused is refused here.

Others call `names.sweep_of` and `check_sweep`, before torch; `sweep.plan_names` and `plan_sweep`;
`methods.plan_method`; `datasets`.
"""
