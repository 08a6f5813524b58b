"""A sweep done: on this process (`sequential.run_sweep`) or over Ray's workers (`driver.run_fanout`)."""
