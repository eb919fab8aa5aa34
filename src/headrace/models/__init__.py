"""From a checkpoint to logits: loading, layer stack, attention over slots and the runner."""
