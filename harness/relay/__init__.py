"""A context's compressed cache as bytes, and another process that answers from them (`tasks.relay`)."""
