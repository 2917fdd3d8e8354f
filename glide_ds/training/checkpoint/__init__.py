"""A checkpoint is committed or it is not there: writing, choosing, reading."""
