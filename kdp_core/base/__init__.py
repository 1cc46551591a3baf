"""Records that stages pass on, their storage, the resumption of trainings, options, and texts."""
