"""How long a sweep would take on a cluster, from a recorded run. Others call `simulate.simulate`."""
