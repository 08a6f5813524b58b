"""`NAME@tuned`: any method with the parameters that `harness tune` chose for a model on calibration prompts."""
