"""Training, evaluation and checkpoints. Models and data come in as factories, through gin."""
