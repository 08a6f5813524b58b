"""Published claims as data, each with a computed verdict and the command that checks it. Others call `judge`."""
