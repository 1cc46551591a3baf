"""What passes between stages, how it is stored and resumed, and the texts that everything starts from."""
