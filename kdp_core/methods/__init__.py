"""The table METHODS: every pruning method as a row of named steps."""
