"""Training on DeepSpeed: phases, optimizer, loop, checkpoints."""
