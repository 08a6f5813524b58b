"""A new method's files, written for its author. Others call `write.new_method`."""
