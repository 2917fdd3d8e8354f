"""The only room that touches what DeepSpeed and torch.distributed do not document."""
