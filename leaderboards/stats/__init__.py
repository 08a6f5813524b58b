"""Records to numbers: what may be compared, intervals, ranks, fronts. Others call `aggregate.aggregate`."""
