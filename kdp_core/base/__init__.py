"""The records that stages write and read, their storage, the resumption of trainings, options, and texts."""
